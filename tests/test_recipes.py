"""Recipes: @FILE stands for the flags in a file; those in configs/ parse, and give models and views."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import models
import ssd_stage_i
import ssd_stage_ii
import ssd_stage_iii
from datasets.transforms import Views
from tests.helpers import ROOT, assert_mistake, call, run_stage, train
from utils.errors import UserError
from utils.recipes import END, expand

PARSERS = {"i": ssd_stage_i.get_parser, "ii": ssd_stage_ii.get_parser, "iii": ssd_stage_iii.get_parser}
NAMES = {"stage_i": "i", "stage_ii": "ii", "stage_iii": "iii", "stage_iii_tuned": "ii"}
CONFIGS = sorted(path for path in (ROOT / "configs").iterdir() if path.is_dir())
SETS = {"cifar100_lt", "cifar100_lt_50", "cifar100_lt_10", "fashion_mnist_lt", "imagenet_lt", "inaturalist18",
        "own_photos", "places_lt"}  # fmt: skip


def parse(tmp_path, text, *words, stage="i"):
    (tmp_path / "recipe.txt").write_text(text)
    return PARSERS[stage]().parse_args([f"@{tmp_path}/recipe.txt", *words, str(tmp_path)])


def test_a_recipe_has_words_as_in_a_shell_with_comments(tmp_path):
    args = parse(tmp_path, "# a comment\n--lr 0.3   # another\n\n--output_dir 'a folder'\n--cos --wd=1e-3\n")
    assert (args.lr, args.output_dir, args.cos, args.weight_decay) == (0.3, "a folder", True, 1e-3)


def test_hyphens_and_underscores_are_equal_in_recipes_too(tmp_path):
    args = parse(tmp_path, "--batch_size 8 --image_size 32\n--output-dir out")
    assert (args.batch_size, args.image_size, args.output_dir) == (8, 32, "out")


def test_later_flags_win(tmp_path):
    args = parse(tmp_path, "--lr 0.3 --cos --channels-last", "--lr", "0.5", "--no-cos")
    assert (args.lr, args.cos, args.channels_last) == (0.5, False, True)
    assert {"lr", "cos", "channels_last"} <= set(args.given)


@pytest.mark.parametrize("last", ["--schedule 3 5", "--pretrained"])
def test_the_last_flag_of_a_recipe_does_not_take_the_folder(tmp_path, last):
    args = parse(tmp_path, f"--lr 0.3\n{last}")
    assert args.data == str(tmp_path)
    assert (args.schedule, args.pretrained) in (([3, 5], None), ([120, 160], "torchvision"))


def test_a_recipe_may_hold_the_folder(tmp_path):
    (tmp_path / "recipe.txt").write_text(f"--epochs 3 {tmp_path}")
    args = ssd_stage_i.get_parser().parse_args([f"@{tmp_path / 'recipe.txt'}", "--cos"])
    assert (args.data, args.shared_words) == (str(tmp_path), ["--cos"])


def test_a_recipe_names_others_relative_to_its_folder(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "inner.txt").write_text("--lr 0.7\n@../base.txt")
    (tmp_path / "base.txt").write_text("--wd 0.01")
    args = parse(tmp_path, "@deep/inner.txt --momentum 0.5")
    assert (args.lr, args.weight_decay, args.momentum) == (0.7, 0.01, 0.5)


def test_args_json_holds_what_was_resolved(plain_tree, tmp_path):
    (tmp_path / "recipe.txt").write_text("--con-weight 0 --epochs 3 --jitter 0\n--schedule 1 2")
    folder = train("i", plain_tree, tmp_path / "run", f"@{tmp_path}/recipe.txt", "--epochs", 1)
    args = json.loads((folder / "args.json").read_text())
    assert (args["con_weight"], args["epochs"], args["jitter"], args["schedule"]) == (0, 1, 0, [1, 2])
    assert not [name for name in args if "recipe" in name or "=" in name]


def test_mistakes_are_one_line(plain_tree, tmp_path):
    outcome = run_stage("i", plain_tree, tmp_path / "run", f"@{tmp_path}/absent.txt")
    assert_mistake(outcome, f"@{tmp_path}/absent.txt", "no such recipe")
    (tmp_path / "quote.txt").write_text("--lr 0.1\n--output_dir 'x\n")
    assert_mistake(run_stage("i", plain_tree, tmp_path / "run", f"@{tmp_path}/quote.txt"), "quote.txt, line 2")
    (tmp_path / "itself.txt").write_text("@itself.txt")
    assert_mistake(run_stage("i", plain_tree, tmp_path / "run", f"@{tmp_path}/itself.txt"), "itself.txt", "itself?")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    assert_mistake(run_stage("i", plain_tree, tmp_path / "run", f"@{tmp_path}/binary.txt"), "binary.txt")
    (tmp_path / "unknown.txt").write_text("--learning-rat 1")
    assert_mistake(run_stage("i", plain_tree, tmp_path / "run", f"@{tmp_path}/unknown.txt"), "--learning-rat")
    assert_mistake(call("i", [f"@{tmp_path}"]), "is a folder", "stage_i.txt")
    with pytest.raises(UserError):
        expand([f"@{tmp_path}/absent.txt"])
    assert expand(["a", "--b"]) == ["a", "--b"] and END not in expand(["x"])


def test_a_mistake_in_a_recipe_names_its_file_and_line(tmp_path):
    text = "--arch resnet8\n--warmup_epochs 5 --lr 0.1"
    with pytest.raises(UserError, match=r"--warmup-epochs 5: must be below --epochs 2.* \(from .*recipe.txt, line 2\)"):
        parse(tmp_path, text, "--epochs", "2")
    with pytest.raises(UserError, match=r"--lr x: must be a number \(--help lists the flags\)$"):  # beside it
        parse(tmp_path, text, "--lr", "x")
    with pytest.raises(UserError, match=r"--unknown.* \(from .*recipe.txt, line 1\)"):
        parse(tmp_path, "--unknown 1")
    assert type(parse(tmp_path, text).arch) is str  # checkpoints hold no other class


def test_a_recipe_of_another_stage_is_refused(tmp_path, monkeypatch):
    for stage, name in (("i", "stage_ii"), ("iii", "stage_iii_tuned"), ("ii", "stage_iii")):
        monkeypatch.setattr("sys.argv", [f"ssd_stage_{stage}.py"])
        with pytest.raises(UserError, match=f"{name}.txt: a recipe for ssd_stage_i"):
            PARSERS[stage]().parse_args([f"@{ROOT}/configs/cifar100_lt/{name}.txt", str(tmp_path)])
    monkeypatch.setattr("sys.argv", ["ssd_stage_ii.py"])
    PARSERS["ii"]().parse_args([f"@{ROOT}/configs/cifar100_lt/stage_iii_tuned.txt", str(tmp_path)])


def test_no_pretrained_turns_a_recipe_s_pretrained_off(tmp_path):
    assert parse(tmp_path, "--pretrained", "--no-pretrained").pretrained is None


def test_the_next_command_names_the_recipe_of_the_next_stage(plain_tree, tmp_path):
    """Flags of the recipe are not repeated, those that were given next to it are."""
    for name in ("stage_i", "stage_ii"):
        (tmp_path / f"{name}.txt").write_text("--channels-last --lr 0.3")
    outcome = run_stage("i", plain_tree, tmp_path / "run", "--epochs", 1, "--jitter", 0.1, f"@{tmp_path}/stage_i.txt")
    (command,) = [line for line in outcome.out.splitlines() if line.startswith("  python ssd_stage_ii.py")]
    assert f"@{tmp_path}/stage_ii.txt" in command and "--jitter 0.1" in command
    assert "--channels-last" not in command and "--lr" not in command


# ---- the recipes in configs/


def test_every_data_set_has_its_recipes():
    assert {folder.name for folder in CONFIGS} == SETS
    for folder in CONFIGS:
        assert {file.stem for file in folder.glob("*.txt")} - {"common"} == set(NAMES), folder


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda folder: folder.name)
def test_every_recipe_parses_and_gives_model_and_views(config, name, tmp_path):
    stage = NAMES[name]
    args = PARSERS[stage]().parse_args([f"@{config}/{name}.txt", str(tmp_path)])
    with torch.device("meta"):
        if stage == "i":
            model = models.SSFL(args.arch, 7, args.moco_dim, args.moco_k, args.moco_m, args.moco_t)
        elif stage == "ii":
            model = models.SLG(args.arch, 7, args.freeze_bn)
        else:
            model = models.SDL(args.arch, 7, args.kd_t, args.freeze_bn)
    assert model.state_dict()
    names = ("query", "key") if stage == "i" else ("query",)
    views = Views(names, args.image_size, 0, args.augment, args.jitter)
    image = Image.fromarray(np.zeros((300, 400, 3), dtype=np.uint8))
    assert {view.shape for view in views(image, (0, 0, 0))} == {(3, args.image_size, args.image_size)}
    if stage == "ii":
        assert args.classifier == ("soft" if name == "stage_iii_tuned" and config.name != "imagenet_lt" else "hard")


def test_the_recipes_of_imagenet_lt_are_the_defaults(tmp_path):
    """The defaults are those of the published scripts."""
    for name, stage in NAMES.items():
        default = PARSERS[stage]().parse_args(["--cos", str(tmp_path)])
        args = PARSERS[stage]().parse_args([f"@{ROOT}/configs/imagenet_lt/{name}.txt", str(tmp_path)])
        differing = {key for key in vars(default) if vars(default)[key] != vars(args)[key]}
        assert differing <= {"given", "recipes", "shared_words"}


def test_the_stages_of_a_recipe_share_backbone_size_and_statistics(tmp_path):
    for config in CONFIGS:
        shared = set()
        for name, stage in NAMES.items():
            args = PARSERS[stage]().parse_args([f"@{config}/{name}.txt", str(tmp_path)])
            shared.add((args.arch, args.image_size, *args.mean, *args.std, args.jitter))
        assert len(shared) == 1, config


def test_pretrained_starts_the_student_of_stage_iii(plain_tree, trained, tmp_path):
    """With a learning rate of 0 the student keeps the weights that it started from."""
    flags = ["--kd-weight", 0, "--epochs", 1, "--lr", 0, "--pretrained", trained["i"] / "last_checkpoint.pth.tar"]
    folder = train("iii", plain_tree, tmp_path / "run", *flags)
    student, given = (
        torch.load(run / "last_checkpoint.pth.tar", weights_only=True)["state_dict"] for run in (folder, trained["i"])
    )
    names = [name for name in given if name.startswith("module.encoder_q.") and name.endswith("weight")]
    assert names and all(torch.equal(student[name], given[name]) for name in names)
