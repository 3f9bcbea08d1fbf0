"""scripts/train.sh: stopped or killed within any stage, the same command ends with the same results."""

import os
import runpy
import signal
import subprocess
import sys

import pytest

from tests.helpers import QUEUE, ROOT, SMALL, results_of
from tests.helpers_processes import wait_until

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
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored if the tests run in the background
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
    for stage, name in STAGES.items():
        assert results_of(out / stage) == results_of(trained[name])
    rows = [line.split("|")[1].strip() for line in output.splitlines() if line.startswith("|") and "classifier" in line]
    assert rows[-5:] == [
        "stage_i, linear classifier", "stage_ii, lws classifier", "stage_iii, hard classifier",
        "stage_iii, soft classifier", "stage_iii_tuned, lws classifier",
    ]  # fmt: skip

    run = start(*words, "--lr", 9)  # a finished run with other flags
    output, _ = run.communicate()
    assert run.returncode == 2 and output.count("\n") == 1 and "--lr 0.1, not --lr 9" in output

    other = tmp_path / "other.txt"
    other.write_text((plain_tree / "train.txt").read_text().partition("\n")[2])
    run = start(*words, "--train-list", other)
    output, _ = run.communicate()
    assert run.returncode == 2 and output.count("\n") == 1
    assert f"stage_i: was trained on other data than {other} has now; name another OUT" in output


def test_ctrl_c_while_a_stage_starts_ends_the_run(plain_tree, tmp_path):
    launch = tmp_path / "launch"
    launch.write_text(f'#!/bin/bash\necho started\nexec {sys.executable} "$@"\n')
    launch.chmod(0o755)
    run = start(write_recipes(tmp_path / "config"), plain_tree, tmp_path / "out", launch=str(launch))
    assert run.stdout.readline().startswith("== stage I:")
    assert run.stdout.readline() == "started\n"  # until then bash has it ignore SIGINT
    os.killpg(run.pid, signal.SIGINT)  # as the terminal does
    output, _ = run.communicate()
    assert run.returncode not in (0, None) and "== stage II:" not in output
    assert not (tmp_path / "out" / "stage_i" / "results.json").exists()


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 75), (signal.SIGHUP, 75), (signal.SIGXCPU, 75), (signal.SIGINT, 130)]
)
def test_a_signal_that_comes_too_late_for_a_stage_stops_before_the_next(tmp_path, number, status):
    """In place of a stage: it signals the shell, and ends as if it had finished before that."""
    (tmp_path / "data").mkdir()
    stage = tmp_path / "stage"
    stage.write_text(f"#!/bin/bash\ntrap '' TERM\nkill -{int(number)} $PPID\nexit 0\n")
    stage.chmod(0o755)
    run = start(write_recipes(tmp_path / "config"), tmp_path / "data", tmp_path / "out", launch=str(stage))
    output, _ = run.communicate()
    assert run.returncode == status and "== stage I:" in output and "== stage II:" not in output


def test_it_goes_on_with_closed_streams(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "stage").write_text(f"#!/bin/bash\ntouch {tmp_path}/started\nexit 75\n")
    (tmp_path / "stage").chmod(0o755)
    words = write_recipes(tmp_path / "config"), tmp_path / "data", tmp_path / "out"
    command = f"LAUNCH={tmp_path}/stage exec bash {ROOT}/scripts/train.sh {' '.join(map(str, words))} >&- 2>&-"
    environment = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    assert subprocess.run(["bash", "-c", command], env=environment).returncode == 75
    assert (tmp_path / "started").exists()


def test_a_flag_that_one_stage_does_not_have_is_refused_before_the_first_is_trained(plain_tree, tmp_path):
    run = start(write_recipes(tmp_path / "config"), plain_tree, tmp_path / "out", "--moco-k", 32)
    output, _ = run.communicate()
    assert run.returncode == 2 and output.count("\n") == 1 and "stage_ii.txt: unrecognized" in output
    assert "flags go to every stage" in output and not (tmp_path / "out").exists()


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


def test_a_mistake_in_a_stage_ends_it_with_that_status(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.txt").write_text("a.png x\n")
    run = start(write_recipes(tmp_path / "config"), tmp_path / "data", tmp_path / "out")
    output, _ = run.communicate()
    assert run.returncode == 2
    assert "--val-list" in output and "ended with status 2" in output and "stage II:" not in output
