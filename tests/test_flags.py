"""The flags of the three stages: published names and defaults, spellings, what is said of each, what goes on."""

import re
import shlex

import pytest

from tests.helpers import LAST, SCRIPTS, STAGES, assert_mistake, call, run_stage, source, stage_flags
from utils.command_line import (
    ALIKE,
    EVALUATION,
    GOES_ON,
    IDENTITY,
    KEPT,
    NETWORK,
    RUN_ONLY,
    STARTS_FROM,
    get_facts,
    option_name,
)
from utils.errors import UserError

EACH_STAGE = pytest.mark.parametrize("stage", STAGES)
PUBLISHED = {
    "--start-epoch": 0, "--schedule": [120, 160], "--momentum": 0.9, "--wd": 5e-4, "--weight-decay": 5e-4,
    "-p": 10, "--print-freq": 10, "--resume": "", "-e": False, "--evaluate": False, "--world-size": -1, "--rank": -1,
    "--dist-url": "tcp://224.66.41.62:23456", "--dist-backend": "nccl", "--seed": None, "--gpu": None,
    "--multiprocessing-distributed": False, "--cos": False,
}  # fmt: skip
PUBLISHED_BY_STAGE = {
    "i": {"-j": 32, "--epochs": 135, "-b": 256, "--lr": 0.1, "--output_dir": "weights/stage_i/",
          "--moco-dim": 128, "--moco-k": 115712, "--moco-m": 0.999, "--moco-t": 0.2},
    "ii": {"-j": 12, "--epochs": 5, "-b": 512, "--lr": 0.2, "--output_dir": "weights/stage_ii/",
           "--last_stage_ckpt": "", "--num_samples_cls": 2},
    "iii": {"-j": 32, "--epochs": 135, "-b": 256, "--lr": 0.1, "--output_dir": "weights/stage_iii/",
            "--teacher_ckpt": None, "--kd_t": 2.0},
}  # fmt: skip


def parse(stage, *words):
    return SCRIPTS[stage].get_parser().parse_args(list(map(str, words)))


@EACH_STAGE
def test_flags_and_defaults_are_the_published_ones(stage):
    args = parse(stage, ".")
    assert args.data == "." and args.arch == "resnext50_32x4d" and args.image_size == 224
    options = SCRIPTS[stage].get_parser()._option_string_actions
    for option, default in (PUBLISHED | PUBLISHED_BY_STAGE[stage]).items():
        assert getattr(args, options[option].dest) == default, option


@pytest.mark.parametrize(
    ("stage", "words", "name", "value"),
    [
        ("i", "--moco_k 7", "moco_k", 7),
        ("i", "--output-dir a_b-c", "output_dir", "a_b-c"),
        ("i", "--dist_url tcp://a_b-c:1", "dist_url", "tcp://a_b-c:1"),
        ("ii", "--last-stage-ckpt=a_b-c", "last_stage_ckpt", "a_b-c"),
        ("ii", "--freeze_bn", "freeze_bn", True),
        ("iii", "--kd-t 3", "kd_t", 3.0),
    ],
)
def test_a_flag_may_be_spelled_with_dashes_or_underscores(stage, words, name, value, tmp_path, monkeypatch):
    (tmp_path / "a_b-c").mkdir()
    monkeypatch.chdir(tmp_path)
    args = parse(stage, *words.split(), "a_b-c")
    assert getattr(args, name) == value and args.data == "a_b-c" and args.given == sorted(["data", name])


def test_a_wrong_flag_is_named_and_what_is_right(tmp_path):
    outcome = call("i", ["--moco-kk", "24", tmp_path])
    assert_mistake(outcome, "--moco-kk; did you mean --moco-k?")
    assert str(tmp_path) not in outcome.err
    assert_mistake(call("i", ["--nproc", 2, tmp_path]), "--nproc 2", "--multiprocessing-distributed")
    assert_mistake(call("i", ["--world-size", 1, "--rank", 1, tmp_path]), "--rank 1")


# ---- what is said of a flag where it is declared


@EACH_STAGE
def test_the_facts_of_every_flag_are_consistent(stage):
    parser, args = SCRIPTS[stage].get_parser(), parse(stage, ".")
    assert [action.dest for action in parser._actions if not action.help] == []
    known = {RUN_ONLY, KEPT, IDENTITY, ALIKE, NETWORK, EVALUATION, GOES_ON, STARTS_FROM}
    flags = parser.marked(*known)
    assert flags.keys() == vars(args).keys() & {a.dest for a in parser._actions if a.option_strings} >= {"lr", "resume"}
    for name, action in flags.items():
        facts = get_facts(action)
        assert facts <= known, name
        assert not {NETWORK, EVALUATION} & facts or KEPT in facts, f"{name}: a checkpoint has to keep it"
        assert STARTS_FROM not in facts or not {KEPT, GOES_ON} & facts, f"{name}: names the file of one run"
    assert args.marked[KEPT] == {name: getattr(args, name) for name in parser.marked(KEPT)}
    kept = {"i": "con_weight", "ii": "freeze_bn num_samples_cls", "iii": "freeze_bn kd_t kd_weight"}[stage]
    assert set(kept.split()) <= parser.marked(KEPT).keys()
    assert list(args.marked[STARTS_FROM]) == {"i": [], "ii": ["last_stage_ckpt"], "iii": ["teacher_ckpt"]}[stage]
    assert not {"epochs", "lr"} & parser.marked(GOES_ON).keys()


@EACH_STAGE
def test_what_a_checkpoint_keeps_of_a_flag_is_taken_back_and_nothing_else(stage):
    parser, args = SCRIPTS[stage].get_parser(), parse(stage, "--seed", 3, ".")
    for name, action in parser.marked(KEPT).items():
        value = getattr(args, name)
        parser.check_value(action, value)
        wrong = [{}, "--help", ["--help"], [[value]], "no such value", object()]
        wrong += [] if isinstance(value, str) else [str(value)]
        wrong += [value + 0.5] if type(value) is int else [3] if type(value) is list else []
        for other in wrong:
            with pytest.raises(UserError, match=option_name(action)):
                parser.check_value(action, other)


# ---- the command for the next stage


@pytest.mark.parametrize(
    ("stage", "following", "flag"),
    [("i", "ii", "last_stage_ckpt"), ("ii", "iii", "teacher_ckpt"), ("iii", "ii", "last_stage_ckpt")],
)
def test_the_next_command_parses_and_repeats_what_goes_on_alone(trained, plain_tree, tmp_path, stage, following, flag):
    """The stages' own flags and those of one run, such as --epochs and --lr, are not repeated."""
    freeze = [] if stage == "i" else ["--freeze-bn"]
    own = ["--lr", 0.03, "--epochs", 1, *source(stage, trained)]
    goes_on = ["--jitter", 0.2, "--val-list", plain_tree / "val.txt", *freeze]
    outcome = run_stage(stage, plain_tree, tmp_path / "run", *own, *goes_on)
    assert (outcome.status, outcome.err) == (0, "")
    words = shlex.split(re.search(r"^next:\n  python \S+ (.*)$", outcome.out, re.M)[1])
    args = parse(following, *words)
    assert getattr(args, flag) == str(tmp_path / "run" / LAST) and args.data == str(plain_tree)
    assert args.jitter == 0.2 and args.val_list == str(plain_tree / "val.txt") and args.batch_size == 16
    assert getattr(args, "freeze_bn", False) == bool(freeze)
    assert not {"epochs", "lr", "arch", "moco_k", "resume"} & set(args.given)


@pytest.mark.parametrize("folder", [".", ".."])
def test_the_next_command_of_a_run_in_this_folder_names_those_beside_it(plain_tree, tmp_path, monkeypatch, folder):
    run, here = tmp_path / "runs" / "iii", tmp_path / "runs" / "iii" / "x"
    here.mkdir(parents=True)
    monkeypatch.chdir(run if folder == "." else here)
    outcome = run_stage("iii", plain_tree, folder, "--epochs", 1, "--kd-weight", 0)
    assert f"--output_dir {run}_tuned" in outcome.out and f"utils.report {tmp_path / 'runs'}\n" in outcome.out


@pytest.mark.parametrize("seed", [[], ["--seed=5"]], ids=["drawn", "given"])
def test_the_next_command_repeats_what_a_resumed_run_took_from_its_checkpoint(plain_tree, tmp_path, seed):
    """But no seed that was drawn, as without a resume."""

    def run(out, *flags):
        words = stage_flags("i", plain_tree, tmp_path / out, flags)
        at = words.index("--seed")
        return call("i", words[:at] + words[at + 2 :])

    run("run", "--jitter", 0.2, "--epochs", 1, *seed)
    outcome = run("again", "--resume", tmp_path / "run" / LAST)
    following = outcome.out.partition("next:\n")[2]
    assert "--jitter 0.2" in following
    assert "--seed 5" in following if seed else "--seed" not in following
