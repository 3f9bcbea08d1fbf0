"""Recipes: @FILE stands for the flags in a file; those in configs/ parse, and give models and views."""

import numpy as np
import pytest
import torch
from PIL import Image

import models
from datasets.transforms import Views
from tests.helpers import LAST, PARSERS, ROOT, args_of, assert_mistake, call, checkpoint, run_stage, train
from utils.command_line import expand_recipes
from utils.errors import UserError

NAMES = {"stage_i": "i", "stage_ii": "ii", "stage_iii": "iii", "stage_iii_tuned": "ii"}
CONFIGS = sorted(path for path in (ROOT / "configs").iterdir() if path.is_dir())
SETS = {"cifar100_lt", "cifar100_lt_50", "cifar100_lt_10", "fashion_mnist_lt", "imagenet_lt", "inaturalist18",
        "own_photos", "places_lt"}  # fmt: skip


def parse_words(stage, *words):
    return PARSERS[stage]().parse_args(list(map(str, words)))


def parse(tmp_path, text, *words):
    (tmp_path / "recipe.txt").write_text(text)
    return parse_words("i", f"@{tmp_path}/recipe.txt", *words, tmp_path)


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("# a comment\n--lr 0.3   # another\n\n--output_dir 'a folder'\n--cos --wd=1e-3\n", "",
         {"lr": 0.3, "output_dir": "a folder", "cos": True, "weight_decay": 1e-3}),
        ("--batch_size 8\n--output-dir out", "", {"batch_size": 8, "output_dir": "out"}),
        ("--lr 0.3 --cos --channels-last", "--lr 0.5 --no-cos", {"lr": 0.5, "cos": False, "channels_last": True}),
        ("--lr 0.3\n--schedule 3 5", "", {"lr": 0.3, "schedule": [3, 5]}),  # its last flag does not take the folder
        ("--lr 0.3\n--pretrained", "", {"lr": 0.3, "pretrained": "torchvision"}),
        ("--pretrained", "--no-pretrained", {"pretrained": None}),
        ("@deep/inner.txt --momentum 0.5", "", {"lr": 0.7, "weight_decay": 0.01, "momentum": 0.5}),
    ],
)  # fmt: skip
def test_a_recipe_stands_for_its_words_and_later_flags_win(tmp_path, text, words, expected):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "inner.txt").write_text("--lr 0.7\n@../base.txt")  # relative to its folder
    (tmp_path / "base.txt").write_text("--wd 0.01")
    args = parse(tmp_path, text, *words.split())
    assert {name: getattr(args, name) for name in expected} == expected
    assert args.data == str(tmp_path) and args.given == sorted(["data", *expected])


def test_a_recipe_may_hold_the_folder(tmp_path):
    """And what is given beside it goes on to the next stage, a network too, since the next recipe may name another."""
    (tmp_path / "recipe.txt").write_text(f"--epochs 3 --channels-last --arch resnet20 {tmp_path}")
    words = ["--cos", "--arch", "resnet8"]
    args = parse_words("i", f"@{tmp_path / 'recipe.txt'}", *words)
    assert (args.data, args.epochs, args.following) == (str(tmp_path), 3, ["--arch resnet8", "--cos"])
    assert parse_words("i", *words, str(tmp_path)).following == ["--cos"]  # the checkpoint says which network it is


def test_home_and_variables_are_expanded_as_in_a_shell(tmp_path, monkeypatch):
    """Also where shells leave ~ alone: after @, and after the = of a flag."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "home.txt").write_text("--train-list=~/train.txt --val-list ${HOME}/val.txt @~/inner.txt")
    (tmp_path / "inner.txt").write_text("--output_dir ~/runs --pretrained '$HOME/w~.pth'  # ~")
    args = PARSERS["i"]().parse_args(["@~/home.txt", "--test_list=~/test.txt", str(tmp_path)])
    names = {"train.txt": args.train_list, "val.txt": args.val_list, "test.txt": args.test_list}
    names |= {"runs": args.output_dir, "w~.pth": args.pretrained}
    assert names == {name: f"{tmp_path}/{name}" for name in names}
    assert args.recipes == [f"{tmp_path}/home.txt"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["no such recipe"]),
        (b"--lr 0.1\n--output_dir 'x\n", [", line 2:"]),
        (b"--lr 0.1\n--output_dir $NOT_SET/runs\n", [", line 2: $NOT_SET is not set"]),
        (b"@recipe.txt", ["itself?"]),
        (b"\xff\xfe\x00", ["not a text file"]),
    ],
)
def test_a_recipe_that_cannot_be_read_is_named(tmp_path, content, words):
    file = tmp_path / "recipe.txt"
    if content is not None:
        file.write_bytes(content)
    assert_mistake(call("i", [f"@{file}", tmp_path]), file, *words)


def test_mistakes_in_recipes_are_those_of_the_command_line(tmp_path):
    assert_mistake(call("i", [f"@{tmp_path}"]), "is a folder", "stage_i.txt")
    for text, words in (("--learning-rat 1", "--learning-rat"), ("--epochs 2 --warmup_epochs 5", "--warmup-epochs 5")):
        with pytest.raises(UserError, match=words):
            parse(tmp_path, text)
    assert type(parse(tmp_path, "--arch resnet8").arch) is str  # checkpoints hold no other class
    assert expand_recipes(["a", "--b"]) == ["a", "--b"]


def test_a_recipe_of_another_stage_is_refused(tmp_path):
    for stage, name in (("i", "stage_ii"), ("ii", "stage_iii")):
        parser = PARSERS[stage]()
        parser.prog = f"ssd_stage_{stage}.py"
        with pytest.raises(UserError, match=f"{name}.txt: a recipe for ssd_{name}.py"):
            parser.parse_args([f"@{ROOT}/configs/cifar100_lt/{name}.txt", str(tmp_path)])
    parser.parse_args([f"@{ROOT}/configs/cifar100_lt/stage_iii_tuned.txt", str(tmp_path)])


def test_args_json_holds_what_was_resolved_and_the_next_command_the_next_recipe(plain_tree, tmp_path):
    """Flags of the recipe are not repeated, those that were given next to it are."""
    for name in ("stage_i", "stage_ii"):
        (tmp_path / f"{name}.txt").write_text("--channels-last --lr 0.3 --epochs 3\n--schedule 1 2")
    outcome = run_stage("i", plain_tree, tmp_path / "run", "--jitter", 0.1, f"@{tmp_path}/stage_i.txt", "--epochs", 1)
    args = args_of(tmp_path / "run")
    assert (args["lr"], args["epochs"], args["jitter"], args["schedule"]) == (0.3, 1, 0.1, [1, 2])
    assert not [name for name in args if "recipe" in name or "=" in name]
    (command,) = [line for line in outcome.out.splitlines() if line.startswith("  python ssd_stage_ii.py")]
    assert f"@{tmp_path}/stage_ii.txt" in command and "--jitter 0.1" in command
    assert "--channels-last" not in command and "--lr" not in command


# ---- the recipes in configs/


def test_every_data_set_has_its_recipes_of_one_backbone_size_and_statistics(tmp_path):
    assert {folder.name for folder in CONFIGS} == SETS
    for folder in CONFIGS:
        assert {file.stem for file in folder.glob("*.txt")} - {"common"} == set(NAMES), folder
        stages = [parse_words(stage, f"@{folder}/{name}.txt", tmp_path) for name, stage in NAMES.items()]
        assert len({(args.arch, args.image_size, *args.mean, *args.std, args.jitter) for args in stages}) == 1, folder


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda folder: folder.name)
def test_every_recipe_parses_and_gives_model_and_views(config, name, tmp_path):
    stage = NAMES[name]
    args = parse_words(stage, f"@{config}/{name}.txt", tmp_path)
    with torch.device("meta"):
        model = models.STAGES[stage](args.arch, 7, **({"queue_size": args.moco_k} if stage == "i" else {}))
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
        default = parse_words(stage, "--cos", tmp_path)
        args = parse_words(stage, f"@{ROOT}/configs/imagenet_lt/{name}.txt", tmp_path)
        differing = {key for key in vars(default) if vars(default)[key] != vars(args)[key]}
        assert differing <= {"given", "recipes", "following"}


def test_pretrained_starts_the_student_of_stage_iii(plain_tree, trained, tmp_path):
    """With a learning rate of 0 the student keeps the weights that it started from."""
    flags = ["--kd-weight", 0, "--epochs", 1, "--lr", 0, "--pretrained", trained["i"] / LAST]
    folder = train("iii", plain_tree, tmp_path / "run", *flags)
    student, given = (checkpoint(run)["state_dict"] for run in (folder, trained["i"]))
    names = [name for name in given if name.startswith("module.encoder_q.") and name.endswith("weight")]
    assert names and all(torch.equal(student[name], given[name]) for name in names)
