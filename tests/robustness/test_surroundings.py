"""What surrounds a run: launchers, signals, closed streams, a closed terminal, old packages."""

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import threading

import pytest

from tests.helpers import LAST, PARSERS, ROOT, TWO, Interruption, assert_one_line, call, checkpoint, log_of, stage_flags
from tests.helpers_processes import PATIENCE, free_port, wait_until
from utils.distributed import STOP_SIGNALS, defer_stop
from utils.errors import UserError
from utils.launch import launch, rendezvous
from utils.launch.network import check_interfaces
from utils.signals import Stopped

PODS = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "2345"}
TASK = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_JOB_NODELIST": "127.0.0.1"}
TASK |= {"SLURM_JOB_ID": "7"}


# ---- launchers


def test_every_step_of_a_job_has_a_port_of_its_own(monkeypatch):
    for name, value in (TASK | {"SLURM_JOB_ID": "4000000"}).items():
        monkeypatch.setenv(name, value)
    ports = set()
    for step in (*range(50), 2**32 - 6):  # the last is that of an interactive step
        monkeypatch.setenv("SLURM_STEP_ID", str(step))
        ports.add(rendezvous.srun_info(None).url)
    assert len(ports) == 51


def test_a_task_of_another_step_is_refused_at_a_shared_port_and_a_rank_joins_once(monkeypatch):
    """Both steps have the same flags. The first one goes on with its own task, which comes later."""
    args = PARSERS["i"]().parse_args(["--dist-timeout", "60", str(ROOT)])
    url = f"tcp://127.0.0.1:{free_port()}"

    def join(step, task):
        own = {"SLURM_STEP_ID": f"{step}", "SLURM_PROCID": f"{task}", "SLURM_LOCALID": f"{task}"}
        for name, value in (TASK | own).items():
            monkeypatch.setenv(name, value)
        return rendezvous.join_store(args, rendezvous.srun_info(url))

    store = join(0, 0)
    with pytest.raises(UserError, match=f"{url}: step 0 of SLURM's job 7 meets there, .* step 1 of .* port of its own"):
        join(1, 1)
    assert join(0, 1).get("run") == store.get("run")
    with pytest.raises(UserError, match=f"{url}: rank 1 of a run has joined there already; .* port of its own"):
        join(0, 1)


@pytest.mark.parametrize(
    ("env", "flags", "text"),
    [
        (TASK, [], "rank 1 waits at tcp://127.0.0.1:20007 for the 2 processes of the srun step"),
        (PODS, ["--dist-url", "env://"], "rank 1 waits at job-master-0:2345 for the 4 processes of WORLD_SIZE"),
    ],
)  # fmt: skip
def test_a_process_that_waits_says_where_and_for_whom(detect, monkeypatch, capsys, env, flags, text):
    """Nodes that are given by flags: tests/robustness/test_processes.py, in a run."""
    monkeypatch.setattr(rendezvous, "PATIENCE", 0.01)
    with rendezvous.say_if_waiting(detect(env, *flags)):
        wait_until(lambda: not any(isinstance(t, threading.Timer) for t in threading.enumerate()), "the line")
    assert capsys.readouterr().out == f"{text} (--dist-timeout)\n"


@pytest.mark.parametrize(
    "env", [PODS, {"WORLD_SIZE": "2"}, {"OMPI_COMM_WORLD_SIZE": "2"}, {"PMI_SIZE": "10"}, {"MV2_COMM_WORLD_SIZE": "2"}]
)
def test_one_of_several_processes_does_not_train_alone(detect, env):
    name = next(name for name in env if "SIZE" in name)
    for flags in ([], TWO):
        with pytest.raises(UserError, match=f"{name} is .* train alone; .*--dist-url env://.*--world-size 1"):
            detect(env, *flags)
    assert detect(env, "--world-size", 1, "--rank", 0).launcher == "plain"
    assert detect({**env, **TASK}).launcher == "srun"


def test_local_rank_is_accepted_and_ignored(plain_tree):
    parser = PARSERS["i"]()
    given = [parser.parse_args([*words, str(plain_tree)]).given for words in ([], ["--local-rank=0"])]
    assert given[0] == given[1] == parser.parse_args(["--local_rank", "1", str(plain_tree)]).given
    assert "local" not in parser.format_help().replace("localhost", "").replace("local port", "")


@pytest.mark.parametrize(
    ("variable", "value", "right"),
    [
        *(("NCCL_SOCKET_IFNAME", value, True) for value in ("", "lo", "=lo", "l", "^docker")),  # beginnings of names
        *(("NCCL_SOCKET_IFNAME", value, False) for value in ("nope0", "=l", "nope0,no")),
        ("GLOO_SOCKET_IFNAME", "lo", True),
        ("GLOO_SOCKET_IFNAME", "l", False),
    ],
)
def test_an_interface_that_is_not_there_is_named(monkeypatch, variable, value, right):
    monkeypatch.setenv(variable, value)
    if right:
        check_interfaces(variable)
    else:
        with pytest.raises(UserError, match=f"{variable} is {value}, .*lo"):
            check_interfaces(variable)


@pytest.mark.parametrize(
    ("interface", "size", "words"),
    [("^lo", 1, ["GLOO_SOCKET_IFNAME ^lo", "name one of lo"]), ("lo", 2, ["WORLD_SIZE, MASTER_ADDR and MASTER_PORT"])],
)
def test_processes_of_env_that_do_not_meet_say_what_to_set(plain_tree, tmp_path, monkeypatch, interface, size, words):
    env = {"RANK": "0", "WORLD_SIZE": f"{size}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{free_port()}"}
    for name, value in (env | {"GLOO_SOCKET_IFNAME": interface}).items():
        monkeypatch.setenv(name, value)
    flags = ["--dist-url", "env://", "--dist-timeout", 1]
    assert_one_line(call("i", stage_flags("i", plain_tree, tmp_path / "run", flags)), 2, *words)


# ---- signals; tests/robustness/test_processes.py has those that come from schedulers


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_each_signal_saves_and_stops(plain_tree, tmp_path, number):
    out = Interruption("epoch 1/2 [1/", lambda: signal.raise_signal(number))
    outcome = call("i", stage_flags("i", plain_tree, tmp_path / "run", ["--con-weight", 0, "-p", 1]), out=out)
    assert_one_line(outcome, 75, "stopped on request at epoch 1, step 2", "--resume auto")
    assert (checkpoint(tmp_path / "run")["epoch"], checkpoint(tmp_path / "run")["step"]) == (0, 2)


@pytest.mark.parametrize("own", [True, False])
def test_further_signals_are_ignored_by_a_process_that_is_about_to_exit_alone(plain_tree, monkeypatch, own):
    def stop(args, device):
        defer_stop()
        os.kill(os.getpid(), signal.SIGUSR1)
        raise Stopped("stopped")

    words = ["--device", "cpu", str(plain_tree)]
    monkeypatch.setattr(sys, "argv", ["ssd_stage_i.py", *words])
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        assert launch(stop, PARSERS["i"](), None if own else words) == 75
        after = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert after == (dict.fromkeys(STOP_SIGNALS, signal.SIG_IGN) if own else before)


@pytest.mark.parametrize(
    ("flags", "ignored", "status"), [(["--epochs", 999], [], 75), (["-p", 1, "-j", 1], [signal.SIGHUP], 0)]
)
def test_a_closed_terminal_stops_the_run_unless_its_signal_is_ignored(plain_tree, tmp_path, flags, ignored, status):
    """Ignored, as by nohup, it stays ignored, also in data workers."""
    ours, theirs = pty.openpty()

    def control_terminal():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    words = stage_flags("i", plain_tree, tmp_path / "run", ["--con-weight", 0, *flags])
    run = subprocess.Popen(
        [sys.executable, "ssd_stage_i.py", *words], cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True, preexec_fn=control_terminal,
    )  # fmt: skip
    os.close(theirs)
    said = b""
    while b"epoch 1/" not in said:
        said += os.read(ours, 4096)
    if ignored:
        os.killpg(run.pid, signal.SIGHUP)
    os.close(ours)
    assert run.wait(PATIENCE) == status
    assert checkpoint(tmp_path / "run")["epoch"] == 2 or not ignored


# ---- streams


@pytest.mark.parametrize(
    ("closed", "flags"),
    [
        ("2>&-", []),
        ("<&- >&- 2>&-", ["-j", 1]),
        *(pytest.param(closed, TWO, marks=pytest.mark.full) for closed in ("2>&-", ">&-", "<&- >&- 2>&-")),
    ],
)
def test_a_run_with_closed_streams_trains(plain_tree, tmp_path, closed, flags):
    words = stage_flags("i", plain_tree, tmp_path / "run", ["--con-weight", 0, "-p", 1, "--epochs", 1, *flags])
    command = ["bash", "-c", f'exec "$@" {closed}', "bash", sys.executable, "ssd_stage_i.py", *words]
    done = subprocess.run(command, cwd=ROOT, timeout=PATIENCE, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(log_of(tmp_path / "run")) == 1 and (tmp_path / "run" / LAST).exists()
    assert ("epoch 1/1" in done.stdout) == (closed == "2>&-")  # and not in a file that took a stream's number


# ---- versions


def test_the_names_of_numpy_1_24_suffice():
    """It has no numpy._core."""
    code = "import sys, numpy, ssd_stage_i; sys.exit(ssd_stage_i.main(['--help']))"
    hidden = f"import sys, numpy, numpy.random, numpy.fft, numpy.linalg; sys.modules['numpy._core'] = None; {code}"
    done = subprocess.run([sys.executable, "-c", hidden], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage")
