"""scripts/train.sh: stopped or killed within any stage, the same command ends with the same results."""

import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.helpers import QUEUE, ROOT, SMALL, copied, results_of
from tests.helpers_prepare import everything
from tests.helpers_processes import wait_until
from utils.train_state import TrainState

STAGES = {"stage_i": "i", "stage_ii": "ii", "stage_iii": "iii", "stage_iii_tuned": "tuned"}  # keys of `trained`


def write_recipes(folder):
    folder.mkdir()
    (folder / "common.txt").write_text(f"{SMALL}  # as in the fixture\n--cos")
    for stage in STAGES:
        more = QUEUE if stage == "stage_i" else ""
        (folder / f"{stage}.txt").write_text(f"@common.txt\n{more}\n")
    return folder


def start(*words, launch=None) -> subprocess.Popen:
    environment = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    environment |= {"LAUNCH": launch, "PYTHONPATH": str(ROOT)} if launch else {}
    return subprocess.Popen(
        ["bash", ROOT / "scripts" / "train.sh", *map(str, words)], text=True, env=environment, cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def test_stopped_or_killed_within_a_stage_it_ends_with_the_same_results(trained, plain_tree, tmp_path):
    out = tmp_path / "runs with space"
    words = write_recipes(tmp_path / "config"), plain_tree, out
    out.mkdir()
    for stage in ("stage_i", "stage_iii_tuned"):  # are not interrupted
        (out / f"{stage}.waiting").touch()
    for stage, number in (("stage_ii", signal.SIGTERM), ("stage_iii", signal.SIGKILL)):
        run = start(*words, launch=f"{sys.executable} {ROOT}/tests/gated_launch.py")
        wait_until(lambda: (out / f"{stage}.waiting").exists() or run.poll() is not None, stage)  # noqa: B023
        if number == signal.SIGKILL:
            os.killpg(run.pid, number)
        else:
            run.send_signal(number)  # to the shell alone
        output, _ = run.communicate()
        assert run.returncode == (-number if number == signal.SIGKILL else 75), output
        assert output.count(": done, in ") == (stage == "stage_iii")  # stage I; stage II was finished in this start
    run = start(*words, launch=f"{sys.executable} {ROOT}/tests/gated_launch.py")
    output, _ = run.communicate()
    assert run.returncode == 0, output
    assert output.startswith("plan: 154 train, 24 val, 30 test images; up to ")
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


@pytest.mark.parametrize("finished", [True, False])
def test_other_flags_or_lists_are_refused_for_a_stage_that_was_stopped_as_for_a_finished_one(
    trained, plain_tree, tmp_path, finished
):
    run = copied(trained["i"], tmp_path / "out" / "stage_i")
    if not finished:
        (run / "results.json").unlink()
    data = shutil.copytree(plain_tree, tmp_path / "data")
    words, before = (write_recipes(tmp_path / "config"), data, tmp_path / "out"), everything(run)

    def refused(*flags):
        output, _ = (process := start(*words, *flags)).communicate()
        assert process.returncode == 2 and output.count("\n") == 1, output
        assert "stage_i: was trained" in output and "give what it had, name another OUT" in output
        return output

    assert "--lr 0.1, not --lr 9" in refused("--lr", 9)
    assert "--image-size 32, not --image-size 48" in refused("--image-size", 48)
    (data / "val.txt").write_text("".join(reversed((data / "val.txt").read_text().splitlines(True))))  # a redraw
    assert f"{data}/val.txt" in refused()
    assert everything(run) == before


def test_ctrl_c_while_a_stage_starts_ends_the_run(plain_tree, tmp_path):
    launch = tmp_path / "launch"
    launch.write_text(f'#!/bin/bash\necho started\nexec {sys.executable} "$@"\n')
    launch.chmod(0o755)
    run = start(write_recipes(tmp_path / "config"), plain_tree, tmp_path / "out", launch=str(launch))
    assert any(line.startswith("== stage I:") for line in iter(run.stdout.readline, ""))
    assert run.stdout.readline() == "started\n"  # until then bash has it ignore SIGINT
    os.killpg(run.pid, signal.SIGINT)  # as the terminal does
    output, _ = run.communicate()
    assert run.returncode not in (0, None) and "== stage II:" not in output
    assert not (tmp_path / "out" / "stage_i" / "results.json").exists()


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 75), (signal.SIGHUP, 75), (signal.SIGXCPU, 75), (signal.SIGINT, 130)]
)
def test_a_signal_that_comes_too_late_for_a_stage_stops_before_the_next(plain_tree, tmp_path, number, status):
    """In place of a stage: it signals the shell, and ends as if it had finished before that."""
    stage = tmp_path / "stage"
    stage.write_text(f"#!/bin/bash\ntrap '' TERM\nkill -{int(number)} $PPID\nexit 0\n")
    stage.chmod(0o755)
    run = start(write_recipes(tmp_path / "config"), plain_tree, tmp_path / "out", launch=str(stage))
    output, _ = run.communicate()
    assert run.returncode == status and "== stage I:" in output and "== stage II:" not in output


def test_it_goes_on_with_closed_streams(plain_tree, tmp_path):
    (tmp_path / "stage").write_text(f"#!/bin/bash\ntouch {tmp_path}/started\nexit 75\n")
    (tmp_path / "stage").chmod(0o755)
    words = write_recipes(tmp_path / "config"), plain_tree, tmp_path / "out"
    command = f"LAUNCH={tmp_path}/stage exec bash {ROOT}/scripts/train.sh {' '.join(map(str, words))} >&- 2>&-"
    environment = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    assert subprocess.run(["bash", "-c", command], env=environment).returncode == 75
    assert (tmp_path / "started").exists()


@pytest.mark.parametrize(("flags", "words"), [
    (["--moco-kk", 32], ["--moco-kk: unrecognized", "no stage has", "did you mean --moco-k?"]),
    (["--teacher_ckpt", "x"], ["--teacher_ckpt", "leave it out"]),
    (["--classifier", "soft"], ["--classifier soft", "stage_iii_tuned.txt"]),
])  # fmt: skip
def test_flags_that_no_stage_can_take_are_refused_before_the_first_is_trained(plain_tree, tmp_path, flags, words):
    run = start(write_recipes(tmp_path / "config"), plain_tree, tmp_path / "out", *flags)
    output, _ = run.communicate()
    assert run.returncode == 2 and output.count("\n") == 1 and all(word in output for word in words)
    assert not (tmp_path / "out").exists()


def test_a_flag_goes_to_the_stages_that_have_it(plain_tree, tmp_path):
    """In place of a stage: it prints its words, and what the bar adds to the time left."""
    stage = tmp_path / "stage"
    code = "import os, sys; print('WORDS', sys.argv[2:], os.environ['SSD_LT_LATER_IMAGES'])"
    stage.write_text(f"#!{sys.executable}\n{code}\n")
    stage.chmod(0o755)
    flags = ["--no-pretrained", "--moco_k", 40, "-b8", "--freeze-bn", "--kd-weight=2", "--std", 1, 1, 1, "--schedule"]
    run = start(write_recipes(tmp_path / "config"), plain_tree, tmp_path / "out", *flags, launch=str(stage))
    output, _ = run.communicate()
    found = [line for line in output.splitlines() if line.startswith("WORDS")]
    of_stages = ("--no-pretrained --moco-k", "--freeze-bn", "--no-pretrained --freeze-bn --kd-weight=2", "--freeze-bn")
    for line, own in zip(found, of_stages, strict=True):
        words = eval(line[6 : line.rindex("]") + 1])
        for flag in ("--no-pretrained", "--moco_k", "--freeze-bn", "--kd-weight=2"):
            assert (flag in words) == (flag.replace("_", "-") in own.split()), (flag, words)
        assert "-b8" in words and words[words.index("--std") + 1 :][:4] == ["1", "1", "1", "--schedule"]
    epoch = 2 * 154  # of all recipes; stages I and III take four passes per image, II takes one
    assert [int(line.split()[-1]) for line in found] == [epoch * 6 // 4, epoch * 5, epoch // 4, 0]


def test_the_time_left_counts_the_later_stages(monkeypatch):
    loader, optimizer = SimpleNamespace(images_per_epoch=100), SimpleNamespace(param_groups=[{"lr": 0.1}])
    clock = SimpleNamespace(images_per_second=10.0)
    logger = SimpleNamespace(clock=clock, means=lambda: {"loss": 1.0})
    state = SimpleNamespace(optimizer=optimizer, metrics=logger, loader=loader, epoch=0, images=0, best=0.0,
                            args=SimpleNamespace(epochs=3))  # fmt: skip
    assert "0m30 left" in TrainState._bar_text(state)
    monkeypatch.setenv("SSD_LT_LATER_IMAGES", "600")
    assert "1m30 left" in TrainState._bar_text(state)


def test_the_flags_of_all_stages_are_checked(plain_tree, tmp_path, capsys):
    check_recipes = runpy.run_path(str(ROOT / "scripts" / "check_recipes.py"))["main"]
    words = list(map(str, (write_recipes(tmp_path / "config"), plain_tree, tmp_path / "out")))
    assert check_recipes([*words, "--no-cos", "--schedule", "1", "2"]) == 0  # whose last flag takes any number of words
    assert check_recipes([*words, "--warmup-epochs", "9"]) == 2 and "below --epochs" in capsys.readouterr().err
    assert check_recipes(words[:2]) == 2 and "required: OUT" in capsys.readouterr().err


def test_its_mistakes_are_one_line(plain_tree, tmp_path):
    config, out = write_recipes(tmp_path / "config"), tmp_path / "out"
    for word, words in {
        "usage: ": (config, plain_tree),
        "the flags come last": (config, plain_tree, "--epochs", 1),
        "no such folder": (config, tmp_path / "absent", out),
        "absent/stage_i.txt: no such recipe": (tmp_path / "absent", plain_tree, out),
    }.items():
        run = start(*words)
        output, _ = run.communicate()
        assert run.returncode == 2 and output.count("\n") == 1 and word in output


def test_a_mistake_in_a_stage_ends_it_with_that_status(plain_tree, tmp_path):
    data = shutil.copytree(plain_tree, tmp_path / "data")
    (data / (data / "train.txt").read_text().split()[0]).unlink()  # train/ holds validation images too
    run = start(write_recipes(tmp_path / "config"), data, tmp_path / "out")
    output, _ = run.communicate()
    assert run.returncode == 2
    assert "1 of 154 files are not in" in output and "ended with status 2" in output and "stage II:" not in output


def test_lists_that_cannot_be_read_are_refused_before_the_plan(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.txt").write_text("a.png x\n")
    run = start(write_recipes(tmp_path / "config"), tmp_path / "data", tmp_path / "out")
    output, _ = run.communicate()
    assert run.returncode == 2 and output.count("\n") == 1 and "--val-list" in output
