"""What surrounds a run: launchers, signals, closed streams, a closed terminal, old packages."""

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios

import pytest

from tests.helpers import (
    LAST,
    PARSERS,
    ROOT,
    TWO,
    assert_mistake,
    assert_one_line,
    checkpoint,
    log_of,
    run_stage,
    stage_flags,
)
from tests.helpers_processes import PATIENCE, Job, free_port, listening, wait_until
from utils.errors import UserError
from utils.launch.network import check_interfaces

PODS = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "2345"}
TASK = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_JOB_NODELIST": "127.0.0.1"}
TASK |= {"SLURM_JOB_ID": "7"}


# ---- launchers


def test_every_step_of_a_job_has_a_port_of_its_own(detect):
    ports = [detect(TASK | {"SLURM_STEP_ID": f"{step}", "SLURM_JOB_ID": "4000000"}).url for step in range(50)]
    assert len(set(ports)) == 50


def test_a_task_of_another_step_is_refused_at_a_shared_port(plain_tree, tmp_path):
    """Both steps have the same flags. The first one trains with its own task, which comes later."""
    url = f"tcp://127.0.0.1:{free_port()}"

    def start(step, task):
        env = TASK | {"SLURM_STEP_ID": f"{step}", "SLURM_PROCID": f"{task}", "SLURM_LOCALID": f"{task}"}
        out = tmp_path / f"{step}.{task}"
        return Job("i", plain_tree, out, "--epochs", 1, "--con-weight", 0, "--dist-url", url, env=env)

    with start(0, 0) as first:
        wait_until(lambda: listening([first.pid]), "the key-value store to listen")
        with start(1, 1) as foreign:
            assert_one_line(foreign.end(), 2, url, "step 0 of SLURM's job 7", "step 1 of", "a port of its own")
        with start(0, 1) as second:
            assert [job.end()[::2] for job in (first, second)] == [(0, "")] * 2


def test_a_process_says_what_it_waits_for_and_a_rank_joins_once(plain_tree, tmp_path):
    url = f"tcp://127.0.0.1:{free_port()}"

    def start(rank, name):
        return Job("i", plain_tree, tmp_path / name, "--world-size", 3, "--rank", rank, "--dist-url", url)

    with start(0, "first") as first, start(1, "second") as second:
        first.wait_for(f"rank 0 waits at {url} for the 3 processes .*--rank 0 to 2")
        second.wait_for("rank 1 waits")
        with start(1, "third") as third:
            assert_one_line(third.end(), 2, url, "rank 1", "a port of its own")


@pytest.mark.parametrize(
    ("env", "start"),
    [
        (TASK, "rank 1 waits at tcp://127.0.0.1:20007 for the 2 processes of the srun step"),
        (PODS | {"MASTER_ADDR": "127.0.0.1"}, "rank 1 waits at 127.0.0.1:2345 for the 4 processes of WORLD_SIZE"),
    ],
)
def test_a_task_or_pod_that_waits_says_so(plain_tree, tmp_path, env, start):
    flags = ["--dist-url", "env://"] if "RANK" in env else []
    with Job("i", plain_tree, tmp_path / "run", *flags, env=env) as job:
        job.wait_for(start)


@pytest.mark.parametrize(
    "env", [PODS, {"WORLD_SIZE": "2"}, {"OMPI_COMM_WORLD_SIZE": "2"}, {"PMI_SIZE": "10"}, {"MV2_COMM_WORLD_SIZE": "2"}]
)
def test_one_of_several_processes_does_not_train_alone(plain_tree, tmp_path, monkeypatch, detect, env):
    for flags in ([], TWO):
        with pytest.raises(UserError, match="--dist-url env://"):
            detect(env, *flags)
    outcome = run_stage("i", plain_tree, tmp_path / "run")
    assert_mistake(outcome, next(name for name in env if "SIZE" in name), "train alone", "--world-size 1")
    assert detect(env, "--world-size", 1, "--rank", 0).launcher == "plain"
    assert detect({**env, **TASK}).launcher == "srun"


@pytest.mark.parametrize(
    ("env", "flags", "info"),
    [
        (PODS, [], (1, 4, 0, 1, "torchrun", "env://")),  # each pod is a node
        (PODS | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, [], (1, 4, 1, 2, "torchrun", "env://")),
    ],
)
def test_processes_of_pytorchjob_join_by_env(detect, env, flags, info):
    assert detect(env, "--dist-url", "env://", *flags) == info


def test_local_rank_is_accepted_and_ignored(plain_tree):
    parser = PARSERS["i"]()
    given = [parser.parse_args([*words, str(plain_tree)]).given for words in ([], ["--local-rank=0"])]
    assert given[0] == given[1] == parser.parse_args(["--local_rank", "1", str(plain_tree)]).given
    assert "local" not in parser.format_help().replace("localhost", "").replace("local port", "")


def test_gloos_interface_that_is_not_there_is_named(plain_tree, tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nope0")
    assert_mistake(run_stage("i", plain_tree, tmp_path / "run", *TWO), "GLOO_SOCKET_IFNAME", "nope0", "lo")


@pytest.mark.parametrize(
    ("value", "right"),
    [
        ("nope0", False),
        ("=l", False),
        ("nope0,no", False),
        ("", True),
        ("lo", True),
        ("=lo", True),
        ("l", True),
        ("^docker", True),
    ],
)
def test_nccls_interfaces_are_beginnings_of_names(monkeypatch, value, right):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", value)
    if right:
        check_interfaces("NCCL_SOCKET_IFNAME")
    else:
        with pytest.raises(UserError, match=f"NCCL_SOCKET_IFNAME is {value}, .*lo"):
            check_interfaces("NCCL_SOCKET_IFNAME")


# ---- signals; tests/robustness/test_processes.py has those that come from schedulers


@pytest.mark.parametrize(
    ("number", "flags"),
    [
        (signal.SIGHUP, ["-j", 2]),
        (signal.SIGXCPU, []),
        pytest.param(signal.SIGUSR2, ["-j", 2], marks=pytest.mark.full),
        pytest.param(signal.SIGHUP, TWO, marks=pytest.mark.full),
    ],
)
def test_a_signal_to_all_processes_saves_and_stops(plain_tree, tmp_path, number, flags):
    with Job("i", plain_tree, tmp_path / "run", "--con-weight", 0, *flags, gate=2) as job:
        job.wait_for(r"epoch 1/2 \[1/")
        os.killpg(job.pid, number)
        assert_one_line(job.end(), 75, "stopped on request at epoch ", "--resume auto")
    assert checkpoint(tmp_path / "run")["epoch"] < 2


def test_a_signal_that_is_ignored_at_the_start_stays_ignored(plain_tree, tmp_path):
    launcher = ("nohup", sys.executable)
    with Job("i", plain_tree, tmp_path / "run", "--con-weight", 0, "-j", 1, launcher=launcher) as job:
        job.wait_for(r"epoch 1/2 \[1/")
        os.killpg(job.pid, signal.SIGHUP)
        assert job.end().status == 0
    assert len(log_of(tmp_path / "run")) == 2


def start_in_terminal(plain_tree, out, *flags, ignored=()):
    """A run that controls a new terminal: (its process, the other end of the terminal)."""
    ours, theirs = pty.openpty()

    def prepare():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    command = [sys.executable, ROOT / "ssd_stage_i.py", *stage_flags("i", plain_tree, out, ["--con-weight", 0, *flags])]
    run = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=prepare,
    )  # fmt: skip
    os.close(theirs)
    said = b""
    while b"epoch 1/" not in said:
        said += os.read(ours, 4096)
    return run, ours


@pytest.mark.parametrize(
    ("flags", "ignored", "status"),
    [(["--epochs", 999], [], 75), (["-p", 1], [signal.SIGHUP], 0)],
)
def test_a_closed_terminal_stops_the_run_unless_its_signal_is_ignored(plain_tree, tmp_path, flags, ignored, status):
    run, terminal = start_in_terminal(plain_tree, tmp_path / "run", *flags, ignored=ignored)
    os.close(terminal)
    assert run.wait(PATIENCE) == status
    assert checkpoint(tmp_path / "run")


# ---- streams


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("flags", [["-j", 1], pytest.param(TWO, marks=pytest.mark.full)])
def test_a_run_with_closed_streams_trains(plain_tree, tmp_path, closed, flags):
    words = stage_flags("i", plain_tree, tmp_path / "run", ["--con-weight", 0, "-p", 1, *flags])
    command = ["bash", "-c", f'exec "$@" {closed}', "bash", sys.executable, "ssd_stage_i.py", *words]
    done = subprocess.run(command, cwd=ROOT, timeout=PATIENCE, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(log_of(tmp_path / "run")) == 2 and (tmp_path / "run" / LAST).exists()
    assert ("epoch 2/2" in done.stdout) == (closed == "2>&-")  # and not in a file that took a stream's number


# ---- versions


def test_the_names_of_numpy_1_24_suffice():
    """It has no numpy._core."""
    code = "import sys, numpy, ssd_stage_i; sys.exit(ssd_stage_i.main(['--help']))"
    hidden = f"import sys, numpy, numpy.random, numpy.fft, numpy.linalg; sys.modules['numpy._core'] = None; {code}"
    done = subprocess.run([sys.executable, "-c", hidden], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage")
