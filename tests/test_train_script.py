"""scripts/train.sh: stopped or killed within any stage, the same command ends with the same results."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from scripts import check_recipes
from tests.helpers import QUEUE, ROOT, SMALL, assert_mistake, copied, outcome_of, results_of
from tests.helpers_prepare import everything
from tests.helpers_processes import wait_until
from utils.checkpoint import set_aside
from utils.train_state import TrainState

STAGES = {"stage_i": "i", "stage_ii": "ii", "stage_iii": "iii", "stage_iii_tuned": "tuned"}  # keys of `trained`


ENVIRONMENT = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}


def start(*words, launch=None, **environment) -> subprocess.Popen:
    environment |= {"LAUNCH": str(launch), "PYTHONPATH": str(ROOT)} if launch else {}
    return subprocess.Popen(
        ["bash", ROOT / "scripts" / "train.sh", *map(str, words)], text=True, env=ENVIRONMENT | environment, cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def stand_in(folder, code, interpreter="/bin/bash"):
    """A program for LAUNCH, which is run in place of a stage."""
    file = folder / "stage"
    file.write_text(f"#!{interpreter}\n{code}\n")
    file.chmod(0o755)
    return file


@pytest.fixture
def words(plain_tree, tmp_path):
    """CONFIG, DIR and OUT."""
    config = tmp_path / "config"
    config.mkdir()
    (config / "common.txt").write_text(f"{SMALL}  # as in the fixture\n--cos")
    for stage in STAGES:
        (config / f"{stage}.txt").write_text(f"@common.txt\n{QUEUE if stage == 'stage_i' else ''}\n")
    return config, plain_tree, tmp_path / "runs with space"


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.full)])
def test_stopped_or_killed_within_a_stage_it_ends_with_the_same_results(trained, words, number):
    out = words[-1]
    for stage in ("stage_i", "stage_ii"):
        copied(trained[STAGES[stage]], out / stage)
    gate = {"launch": f"{sys.executable} {ROOT}/tests/gated_stage.py", "GATE": "12", "GATE_FILE": f"{out.parent}/gate"}
    run = start(*words, **gate)
    wait_until(lambda: [*out.parent.glob("gate.*")] or run.poll() is not None, "stage III in its second epoch")
    os.kill(-run.pid if number == signal.SIGKILL else run.pid, number)  # SIGTERM to the shell alone
    output, _ = run.communicate()
    assert run.returncode == (-number if number == signal.SIGKILL else 75), output
    assert "== stage II on stage III" not in output
    (out.parent / "gate").touch()  # nobody waits any more
    run = start(*words, **gate)
    output, _ = run.communicate()
    assert run.returncode == 0, output
    assert output.startswith("plan: 154 train, 24 val, 30 test images; up to ") and output.count(": done, in ") == 2
    for line in ("stage_i: 2 epochs of 154 images; done", "stage_iii_tuned: 2 epochs of 154 images"):
        assert f"  {line}\n" in output
    (echoed,) = [line for line in output.splitlines() if line.startswith("== stage III: ") and " @" in line]
    pasted = shlex.split(echoed.removeprefix("== stage III: "))
    assert pasted[pasted.index("--output_dir") + 1] == str(out / "stage_iii")  # the path has spaces
    times = r"stage I was done, stage II was done, stage III \d+ s, stage II on stage III \d+ s"
    assert re.search(rf"\ntime: {times}\n$", output)
    for stage, name in STAGES.items():
        assert results_of(out / stage) == results_of(trained[name])
    rows = [line.split("|")[1].strip() for line in output.splitlines() if line.startswith("|") and "classifier" in line]
    assert rows[-5:] == [
        "stage_i, linear classifier", "stage_ii, lws classifier", "stage_iii, hard classifier",
        "stage_iii, soft classifier", "stage_iii_tuned, lws classifier",
    ]  # fmt: skip


def test_ctrl_c_while_a_stage_starts_ends_the_run(words, tmp_path):
    run = start(*words, launch=stand_in(tmp_path, f'echo started\nexec {sys.executable} "$@"'))
    assert any(line.startswith("== stage I:") for line in iter(run.stdout.readline, ""))
    assert run.stdout.readline() == "started\n"  # until then bash has it ignore SIGINT
    os.killpg(run.pid, signal.SIGINT)  # as the terminal does
    output, _ = run.communicate()
    assert run.returncode not in (0, None) and "== stage II:" not in output
    assert not (words[-1] / "stage_i" / "results.json").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGXCPU, 75), (signal.SIGINT, 130)])
def test_a_signal_that_comes_too_late_for_a_stage_stops_before_the_next(words, tmp_path, number, status):
    """In place of a stage: it signals the shell, and ends as if it had finished before that."""
    run = start(*words, launch=stand_in(tmp_path, f"trap '' TERM\nkill -{int(number)} $PPID\nexit 0"))
    output, _ = run.communicate()
    assert run.returncode == status and "== stage I:" in output and "== stage II:" not in output


def test_it_goes_on_with_closed_streams(words, tmp_path):
    stage = stand_in(tmp_path, f"touch {tmp_path}/started\nexit 75")
    command = f"LAUNCH={stage} exec bash {ROOT}/scripts/train.sh {shlex.join(map(str, words))} >&- 2>&-"
    assert subprocess.run(["bash", "-c", command], env=ENVIRONMENT).returncode == 75
    assert (tmp_path / "started").exists()


def test_a_flag_goes_to_the_stages_that_have_it(words, tmp_path):
    """In place of a stage: it prints its words, and what the bar adds to the time left."""
    code = "import os, sys; print('WORDS', sys.argv[2:], os.environ['SSD_LT_LATER_IMAGES'])"
    flags = ["--no-pretrained", "--moco_k", 40, "-b8", "--freeze-bn", "--kd-weight=2", "--std", 1, 1, 1, "--schedule"]
    run = start(*words, *flags, launch=stand_in(tmp_path, code, sys.executable))
    output, _ = run.communicate()
    found = [line for line in output.splitlines() if line.startswith("WORDS")]
    of_stages = ("--no-pretrained --moco-k", "--freeze-bn", "--no-pretrained --freeze-bn --kd-weight=2", "--freeze-bn")
    for line, own in zip(found, of_stages, strict=True):
        given = eval(line[6 : line.rindex("]") + 1])
        for flag in ("--no-pretrained", "--moco_k", "--freeze-bn", "--kd-weight=2"):
            assert (flag in given) == (flag.replace("_", "-") in own.split()), (flag, given)
        assert "-b8" in given and given[given.index("--std") + 1 :][:4] == ["1", "1", "1", "--schedule"]
    epoch = 2 * 154  # of all recipes; stages I and III take four passes per image, II takes one
    assert [int(line.split()[-1]) for line in found] == [epoch * 6 // 4, epoch * 5, epoch // 4, 0]


def test_the_time_left_counts_the_later_stages(monkeypatch):
    loader, optimizer = SimpleNamespace(images_per_epoch=100), SimpleNamespace(param_groups=[{"lr": 0.1}])
    clock = SimpleNamespace(images_per_second=10.0)
    logger = SimpleNamespace(clock=clock, means=lambda: {"loss": 1.0})
    state = SimpleNamespace(optimizer=optimizer, metrics=logger, loader=loader, epoch=0, images_seen=0, best=0.0,
                            args=SimpleNamespace(epochs=3))  # fmt: skip
    assert "0m30 left" in TrainState._bar_text(state)
    monkeypatch.setenv("SSD_LT_LATER_IMAGES", "600")
    assert "1m30 left" in TrainState._bar_text(state)


# ---- mistakes; before the plan, those of scripts/check_recipes.py, here in this process


@pytest.fixture
def refused(words, capsys):
    """What check_recipes.py says of CONFIG DIR OUT [flags], which it must refuse."""

    def refused(*flags, words=words):
        outcome = outcome_of(check_recipes.main, capsys, *words, *flags)
        assert_mistake(outcome)
        return outcome.err

    return refused


@pytest.mark.parametrize("finished", [True, False])
def test_other_flags_or_lists_are_refused_for_stopped_and_finished_stages(trained, words, refused, tmp_path, finished):
    run = copied(trained["i"], words[-1] / "stage_i")
    if not finished:
        (run / "results.json").unlink()
    before = everything(run)
    for flag, was in {
        "--lr 0.9": "with --lr 0.1, not with --lr 0.9",
        "--image-size 48": "with --image-size 32, not with --image-size 48",
        "--num-classes 7": "with --num-classes 6, not with --num-classes 7",
        "--pretrained x.pth": "without --pretrained, not with --pretrained x.pth",
    }.items():
        message = refused(*flag.split())
        assert f"stage_i: was trained {was}; give what it had, name another OUT" in message
    data = shutil.copytree(words[1], tmp_path / "data")
    (data / "val.txt").write_text("".join(reversed((data / "val.txt").read_text().splitlines(True))))  # a redraw
    assert f"{data}/val.txt" in refused(words=(words[0], data, words[2]))
    for dropped, was in (("--cos", "with --cos, not with --no-cos"), ("--seed 3", "with --seed 3, not without --seed")):
        (words[0] / "common.txt").write_text(f"{SMALL} --cos".replace(dropped, ""))
        assert f"stage_i: was trained {was}; give" in refused()
    assert everything(run) == before


def test_a_seed_that_was_drawn_and_a_network_of_an_earlier_stage_are_not_compared(trained, words):
    for stage in ("stage_i", "stage_ii"):
        args = copied(trained[STAGES[stage]], words[-1] / stage) / "args.json"
        args.write_text(json.dumps(json.loads(args.read_text()) | {"deterministic": False}))
    (words[0] / "common.txt").write_text(f"{SMALL} --cos".replace("--seed 3", ""))
    (words[0] / "stage_ii.txt").write_text(f"{SMALL} --cos".replace("--arch resnet8", "").replace("--seed 3", ""))
    assert check_recipes.main([*map(str, words)]) == 0


def test_stages_without_the_one_that_they_were_made_from_are_refused(trained, words, refused):
    for stage in ("stage_ii", "stage_iii"):
        copied(trained[STAGES[stage]], words[-1] / stage)
    message, out = refused(), words[-1]
    assert f"{out / 'stage_i'}: has no results" in message
    assert f"remove '{out / 'stage_ii'}' '{out / 'stage_iii'}', or name another OUT" in message


def test_a_run_that_a_kill_left_set_aside_is_the_one_that_counts(trained, words, capsys):
    set_aside(copied(trained["i"], words[-1] / "stage_i"))
    assert check_recipes.main([*map(str, words)]) == 0
    assert "stage_i: 2 epochs of 154 images; done" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "named"), [
    ("--help", ["--help", "ssd_stage_i.py"]),
    ("''", ["unrecognized"]),  # an empty variable
    ("--moco-kk 32", ["--moco-kk: unrecognized", "no stage has", "did you mean --moco-k?"]),
    ("--teacher_ckpt x", ["--teacher_ckpt", "leave it out"]),
    ("--classifier soft", ["--classifier soft", "stage_iii_tuned.txt"]),
    ("--warmup-epochs 9", ["--warmup-epochs 9", "below --epochs"]),
    *((flag, [flag.split()[0], "leave it out", "remove OUT or name another", "call the stage's script"])
      for flag in ("--overwrite", "--output_dir x", "--resume auto", "-e", "--evaluate")),
])  # fmt: skip
def test_flags_that_no_stage_can_take_are_refused_before_the_first_is_trained(words, refused, flags, named):
    message = refused(*shlex.split(flags))
    assert all(word in message for word in named)
    assert not words[-1].exists()


def test_the_last_flag_may_take_any_number_of_words(words):
    assert check_recipes.main([*map(str, words), "--no-cos", "--schedule", "1", "2"]) == 0


def test_folders_and_lists_that_cannot_be_read_are_refused_before_the_plan(words, refused, tmp_path):
    config, data, out = words
    assert "absent/stage_i.txt: no such recipe" in refused(words=(tmp_path / "absent", data, out))
    assert "required: OUT" in refused(words=(config, data))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.txt").write_text("a.png x\n")
    assert "--val-list" in refused(words=(config, tmp_path / "data", out))


def test_its_own_mistakes_are_one_line(words, tmp_path):
    config, data, out = words
    for word, wrong in {
        "usage: ": (config, data),
        "the flags come last": (config, data, "--epochs", 1),
        "no such folder": (config, tmp_path / "absent", out),
    }.items():
        run = start(*wrong)
        output, _ = run.communicate()
        assert run.returncode == 2 and output.count("\n") == 1 and word in output


def test_a_mistake_in_a_stage_ends_it_with_that_status(words, tmp_path):
    data = shutil.copytree(words[1], tmp_path / "data")
    (data / (data / "train.txt").read_text().split()[0]).unlink()  # train/ holds validation images too
    run = start(words[0], data, words[2])
    output, _ = run.communicate()
    assert run.returncode == 2
    assert "1 of 154 files are not in" in output and "ended with status 2" in output and "stage II:" not in output
