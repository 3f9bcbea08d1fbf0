"""Processes that are asked to stop, are stuck, die, or never meet: one line, the right exit status, no process left.

No test depends on the speed of a process: if a test must find one at a certain step, the process waits there (gate).
"""

import contextlib
import errno
import functools
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch._inductor.exc import InductorError, InvalidCxxCompiler

from datasets.build import locate_splits
from datasets.loaders import report_killed_workers
from tests.helpers import (
    LAST,
    PARSERS,
    ROOT,
    TORCHRUN,
    TWO,
    Interruption,
    assert_one_line,
    assert_same_results,
    assert_same_run,
    call,
    checkpoint,
    on_ranks,
    run_ranks,
    run_shell,
    run_stage,
    stage_flags,
    train,
    train_ranks,
)
from tests.helpers_processes import Job, alive, free_port, listening, wait_until
from utils import arguments, metrics
from utils.arguments import training_parser
from utils.distributed import DistInfo, block_signals, get_dist_info, num_cores, raise_on_all_ranks, stop_requested
from utils.errors import UserError
from utils.launch import launch, rendezvous, spawn
from utils.launch.failures import LOST_CONTACT, describe_failure
from utils.launch.network import resolve
from utils.launch.rendezvous import check_equal_starts, detect_launcher, master_address, select_device

LOOPBACK = "0100007F"  # 127.0.0.1 as /proc/net/tcp writes it
SEVERAL_WORKERS = ["-j", 2]
LONG = ["--cos", "--epochs", 1000]
# parser and argv that start two processes, for launch
SMALL_RUN = (
    training_parser("", epochs=1, batch_size=2, lr=1, workers=0, output_dir="none"),
    [*map(str, TWO), "--device", "cpu", str(ROOT)],
)


def assert_stopped(outcome):
    """Checks that a run stopped, in either epoch: how far it gets before the signal arrives depends on the machine."""
    assert_one_line(outcome, 75, "stopped on request at epoch ", ", step ", "--resume auto")


# ---- asked to stop


def test_a_signal_to_all_processes_stops_the_run(trained, plain_tree, tmp_path, interface_is_chosen_by_the_run):
    """Schedulers and terminals signal every process: the data workers get the signal too, and must survive it."""
    run = tmp_path / "run"
    with Job("i", plain_tree, run, "--cos", *SEVERAL_WORKERS, gate=2) as job:
        job.wait_for(r"epoch 1/2 \[1/")
        assert len(job.workers()) >= 2 and listening(job.note()) == set()
        os.killpg(job.pid, signal.SIGUSR1)
        assert_stopped(job.end())
    assert checkpoint(run)["epoch"] < 2
    assert_same_run(train("i", plain_tree, run, "--cos", "--resume", "auto"), trained["i"])


@pytest.mark.parametrize(
    ("number", "rank"),
    [
        (signal.SIGTERM, 1),
        pytest.param(signal.SIGUSR1, 0, marks=pytest.mark.full),
        *(pytest.param(n, None, marks=pytest.mark.full) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)),
    ],
)
@pytest.mark.usefixtures("interface_is_chosen_by_the_run")
def test_a_signal_to_one_of_two_processes_stops_both(run_of_two_processes, plain_tree, tmp_path, number, rank):
    """If rank is None, the signal goes to their parent."""
    run = tmp_path / "run"
    with Job("i", plain_tree, run, "--cos", *TWO, *SEVERAL_WORKERS, gate=2) as job:
        job.wait_for(r"epoch 1/2 \[1/")
        assert len(job.ranks()) == 2 and listening(job.note()) == {LOOPBACK}
        job.send(number, None if rank is None else job.ranks()[rank])
        assert_stopped(job.end())
    assert_same_run(train_ranks("i", plain_tree, run, "--cos", "--resume", "auto"), run_of_two_processes)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.full)])
def test_a_process_says_that_it_waits_for_others_and_a_signal_ends_it(plain_tree, tmp_path, number):
    url = f"tcp://127.0.0.1:{free_port()}"
    with Job("i", plain_tree, tmp_path / "run", *node(0, url)) as job:
        job.wait_for(f"rank 0 waits at {url} for the 2 processes .*--rank 0 to 1")
        assert_one_line(job.send(number).end(), 75, "before the first step", "same command")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.full)])
def test_a_signal_ends_processes_that_are_starting(plain_tree, tmp_path, number):
    with Job("i", plain_tree, tmp_path / "run", *TWO, gate="start") as job:
        wait_until(lambda: len(job.ranks()) == 2, "the processes to start")
        assert_one_line(job.send(number).end(), 75, "before the first step", "same command")
    assert not (tmp_path / "run" / LAST).exists()


@pytest.mark.full
@pytest.mark.parametrize("flags", [[], TWO])
def test_a_second_interrupt_ends_the_run_at_once(plain_tree, tmp_path, flags):
    with Job("i", plain_tree, tmp_path / "run", *LONG, *flags, "--save-every-steps", 1, gate="twice") as job:
        number = 2 if flags is TWO else 1
        wait_until(lambda: len(list(tmp_path.glob("run.gate.*"))) == number, "every process to wait")
        for _ in range(2):
            for pid in {*job.ranks(), job.pid}:
                with contextlib.suppress(ProcessLookupError):  # the parent has killed it after its own second
                    os.kill(pid, signal.SIGINT)
            wait_until(lambda: not list(tmp_path.glob("run.gate.*")), "the first to be noted")
        outcome = job.end()
    assert_one_line(outcome, 130, "interrupted", "--resume auto")
    assert checkpoint(tmp_path / "run")["step"] > 0


@pytest.mark.full
def test_the_last_words_of_torchrun_name_the_mistake(tmp_path):
    outcome = run_shell("i", tmp_path / "missing", tmp_path / "run", launcher=TORCHRUN)
    assert outcome.status == 1  # torchrun's own
    assert "missing: no such folder" in outcome.err.split("Root Cause")[1]


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_torchrun_passes_a_stop_on(run_of_two_processes, plain_tree, tmp_path, number):
    run = tmp_path / "run"
    with Job("i", plain_tree, run, "--cos", launcher=TORCHRUN, gate=2) as job:
        job.wait_for(r"epoch 1/2 \[1/")
        outcome = job.send(number).end()
    assert outcome.status == 1  # torchrun's own
    assert outcome.err.count("stopped on request at epoch ") == 1
    assert_same_run(train_ranks("i", plain_tree, run, "--cos", "--resume", "auto"), run_of_two_processes)


@pytest.mark.parametrize("flags", [SEVERAL_WORKERS, pytest.param(TWO, marks=pytest.mark.full)])
def test_a_process_that_is_stuck_in_a_system_call_obeys_a_signal(plain_tree, tmp_path, flags):
    with Job("i", plain_tree, tmp_path / "run", "--cos", *flags, gate="hang") as job:
        number = 2 if flags is TWO else 1
        wait_until(lambda: len(list(tmp_path.glob("run.gate.*"))) == number, "every process to hang")
        outcome = job.send(signal.SIGTERM).end()
    assert_one_line(outcome, 75, "no progress for 1 s", "the last checkpoint is intact", "--resume auto")


@pytest.mark.parametrize(
    ("line", "step", "words"),
    [("val", (0, 9), "epoch 1"), ("epoch 1/2:", (1, 0), "epoch 2"), ("test", (2, 0), "before the test evaluation")],
)
def test_a_run_stopped_in_an_evaluation_trains_no_step_again(trained, plain_tree, tmp_path, line, step, words):
    run = tmp_path / "run"
    outcome = call("i", stage_flags("i", plain_tree, run, ["--cos", "-p", 1]), out=Interruption(line))
    assert_one_line(outcome, 75, words, "--resume auto")
    assert (checkpoint(run)["epoch"], checkpoint(run)["step"]) == step and not (run / "results.json").exists()
    again = run_stage("i", plain_tree, run, "--cos", "-p", 1, "--resume", "auto")
    assert again.status == 0 and "epoch 1/2 [" not in again.out
    assert_same_run(run, trained["i"])


def test_a_stopped_evaluation_writes_nothing(trained, plain_tree, tmp_path):
    flags = ["--evaluate", "--resume", trained["i"] / LAST, "-p", 1]
    outcome = call("i", stage_flags("i", plain_tree, tmp_path / "run", flags), out=Interruption("test"))
    assert_one_line(outcome, 75, "evaluate again")
    assert not stop_requested()  # of the next run in this process
    assert not list(tmp_path.glob("run/*.json"))


def test_a_stop_during_a_save_waits_for_its_end(trained, plain_tree, tmp_path, monkeypatch):
    run = tmp_path / "run"

    def fsync(descriptor, real=os.fsync):
        if f".{LAST}." in os.readlink(f"/proc/self/fd/{descriptor}"):
            signal.raise_signal(signal.SIGTERM)
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        outcome = run_stage("i", plain_tree, run, "--cos", "--save-every-steps", 4)
    assert_stopped(outcome)
    assert checkpoint(run)["step"] == 5  # the step after the save during which the signal came
    assert_same_run(train("i", plain_tree, run, "--cos", "--resume", "auto"), trained["i"])


@pytest.mark.parametrize(("status", "left"), [(75, False), (1, True), (0, False)])
def test_a_rank_that_still_saves_is_waited_for_unless_another_has_failed(monkeypatch, status, left):
    monkeypatch.setattr(spawn, "GRACE", 0.1)
    context = multiprocessing.get_context("fork")
    with block_signals():  # so that a stop, which is passed on, does not end it
        slow = context.Process(target=time.sleep, args=(99 if left else 1,))
        first = context.Process(target=os._exit, args=(status,))
        slow.start()
        first.start()
    assert spawn.watch([slow, first]) == ({slow} if left else set())
    assert (slow.exitcode, first.exitcode) == (-signal.SIGKILL if left else 0, status)


# ---- killed


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.full)])
def test_a_process_that_is_killed_ends_the_run(plain_tree, tmp_path, rank):
    with Job("i", plain_tree, tmp_path / "run", *LONG, *TWO, *SEVERAL_WORKERS) as job:
        job.wait_for(r"epoch 1/1000 \[2/")
        outcome = job.send(signal.SIGKILL, job.ranks()[rank]).end()
    assert_one_line(outcome, 1, f"rank {rank} died (SIGKILL", "--resume auto")


@pytest.mark.parametrize("flags", [[], pytest.param(TWO, marks=pytest.mark.full)])
def test_a_data_worker_that_is_killed_ends_the_run(plain_tree, tmp_path, flags):
    """One line, also on a single core, for which torch warns of too many workers."""
    on_one_core = ("taskset", "-c", min(os.sched_getaffinity(0)), sys.executable)
    with Job("i", plain_tree, tmp_path / "run", *LONG, *flags, *SEVERAL_WORKERS, launcher=on_one_core) as job:
        job.wait_for(r"epoch 1/1000 \[2/")
        victim = job.workers()[-1]
        outcome = job.send(signal.SIGKILL, victim).end()
    assert_one_line(outcome, 1, "a data loading worker died", str(victim))


def test_a_data_worker_that_is_killed_while_it_hands_over_a_batch_is_named():
    """The loader sees the end of the connection before it knows of the worker's death."""
    worker = multiprocessing.get_context("fork").Process(target=signal.pause)
    worker.start()
    reporting = report_killed_workers(SimpleNamespace(_workers=[worker]))
    with pytest.raises(RuntimeError, match=f"DataLoader worker .*{worker.pid}"), reporting:
        worker.kill()
        raise EOFError
    worker.join()


@pytest.mark.parametrize("flags", [[], pytest.param(TWO, marks=pytest.mark.full)])
def test_data_workers_of_a_killed_run_hold_no_lock_and_end(trained, plain_tree, tmp_path, flags):
    run = tmp_path / "run"
    with Job("i", plain_tree, run, "--cos", "--save-every-steps", 1, *flags, *SEVERAL_WORKERS, gate=6) as job:
        job.wait_for(r"epoch 1/2 \[2/")
        ranks, workers = job.ranks(), job.workers()
        for pid in ranks or [job.pid]:  # so that it does not end too early
            os.kill(pid, signal.SIGSTOP)
        assert_one_line(run_stage("i", plain_tree, run, "--cos", "--resume", "auto"), 2, "another run is writing there")
        for worker in workers:  # as if they were stuck in a slow read
            os.kill(worker, signal.SIGSTOP)
        job.note()
        job.send(signal.SIGKILL).process.wait()
        for rank in ranks:
            os.kill(rank, signal.SIGCONT)
        wait_until(lambda: not any(map(alive, ranks)), "the ranks to end")
        assert all(map(alive, workers))
        train("i", plain_tree, run, "--cos", "--resume", "auto")
        for worker in workers:
            os.kill(worker, signal.SIGCONT)
        job.end()
    if not flags:
        assert_same_run(run, trained["i"])


def fail_on_rank_1(kind, args, device):
    """A main_worker: rank 1 fails, rank 0 waits for it."""
    torch.distributed.barrier()  # both have met
    if get_dist_info().rank == 1:
        raise kind("of rank 1")
    torch.distributed.barrier()


@pytest.mark.parametrize(
    ("kind", "status", "words"),
    [
        (MemoryError, 2, ["out of memory"]),
        pytest.param(torch.cuda.OutOfMemoryError, 2, ["out of memory"], marks=pytest.mark.full),
        pytest.param(UserError, 2, ["of rank 1"], marks=pytest.mark.full),
        pytest.param(ZeroDivisionError, 1, ["ZeroDivisionError: of rank 1", "fail_on_rank_1"], marks=pytest.mark.full),
    ],
)
def test_the_message_is_that_of_the_rank_that_failed(capfd, kind, status, words):
    """The messages of the others, which only lost contact with it, are not printed."""
    assert launch(functools.partial(fail_on_rank_1, kind), *SMALL_RUN) == status
    err = capfd.readouterr().err
    assert all(word in err for word in words) and "lost contact" not in err
    assert (err.count("\n") == 1) == (kind is not ZeroDivisionError)  # an unknown failure has a traceback


WORKER = "Caught OSError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 2, r"\[Errno 28\] No space left on device"),
        (OSError(f'{WORKER}  File "/own/colors.py", line 7, in f\n  File "{tempfile.__file__}", line 1, in g\n'
                 f'  File "<frozen os>", line 2, in h\n  File "{torch.__file__}", line 3, in i\nOSError: bad disk'),
         2, r"bad disk \(in /own/colors.py, line 7\)"),
        (ConnectionResetError("of a transform's own"), 1, "ConnectionResetError: of a transform's own"),
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed."), 1, r"a data .* died .*pid 3.*"),
        (RuntimeError(f"{WORKER}gloo: Connection reset by peer"), 1, "RuntimeError: Caught .*gloo.*"),
        (InductorError(InvalidCxxCompiler(), None), 2, "--compile: the C.. compiler fails.*CXX.*"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 2, "out of memory: .*"),
        (MemoryError(), 2, "out of memory: .*--batch-size.*--workers.*"),
        (RuntimeError("can't start new thread"), 2, ".*ulimit -u.*"),
        (OSError(errno.EAGAIN, "Resource temporarily unavailable: data workers cannot be started"), 2, ".*ulimit -u.*"),
        (OSError(errno.EROFS, "Read-only file system: data workers cannot be started"), 2, ".*/dev/shm.*--workers.*"),
        (OSError("AF_UNIX path too long"), 2, "TMPDIR.*-j 0"),
        (RuntimeError("Caught _ArrayMemoryError ... Unable to allocate 512. TiB for an array"), 2, "out of memory.*"),
        (RuntimeError("[gloo/x.cc:81] Timed out waiting 5000ms for recv operation"), 1, "no answer.*timeout 5 s.*"),
        (RuntimeError("[gloo/x.cc:547] Connection closed by peer [127.0.0.1]:25311"), 1, "lost contact[^[]*"),
        (torch.distributed.DistBackendError("NCCL error:\nDuplicate GPU detected"), 1,
         r"lost contact.*\(NCCL error: Duplicate GPU detected\)"),
        (torch.distributed.DistStoreError("no more"), 1, "lost contact.*"),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, Exception) else "",
)  # fmt: skip
def test_the_cause_of_a_failure_gives_status_and_message(error, status, message):
    found = describe_failure(error)
    assert found[0] == status and re.fullmatch(message, found[1], re.S), found


def test_the_most_informative_outcome_of_several_ranks_is_reported():
    lost, stop, silent, mistake = (1, LOST_CONTACT), (75, "saved"), (2, ""), (2, "--lr: too high")
    outcomes = [(0, ""), lost, stop, (1, "Traceback"), silent, mistake]
    for number in range(1, len(outcomes) + 1):
        assert spawn.most_informative(outcomes[:number]) == outcomes[number - 1]


def test_an_incomplete_report_is_ignored():
    receive, send = multiprocessing.Pipe(duplex=False)
    assert spawn.read_report(receive) is None
    send.send((1, "a message"))
    whole = os.read(receive.fileno(), 1000)
    os.write(send.fileno(), whole[:-1])
    assert spawn.read_report(receive) is None


# ---- how a run is started


def test_a_full_disk_is_a_mistake_on_all_ranks_but_a_closed_pipe_is_none():
    with pytest.raises(UserError, match=r"log\.txt: No space left on device"), raise_on_all_ranks():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "log.txt")
    with pytest.raises(BrokenPipeError), raise_on_all_ranks():
        raise BrokenPipeError


def test_the_tasks_of_srun_share_the_cores_of_the_node(monkeypatch):
    own = num_cores()
    for name, value in (TASKS | {"SLURM_CPUS_ON_NODE": "32"}).items():
        monkeypatch.setenv(name, value)
    assert num_cores() == 32
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # in the batch script
    assert num_cores() == own


def test_flags_choose_gpus_processes_backend_and_timeout(monkeypatch):
    """On a node that seems to have three GPUs."""
    for name, stand_in in (("is_available", lambda: True), ("device_count", lambda: 3), ("set_device", Mock())):
        monkeypatch.setattr(torch.cuda, name, stand_in)

    def parsed(*flags):
        return PARSERS["i"]().parse_args([*map(str, flags), str(ROOT)])

    devices = [select_device(parsed(*flags), DistInfo()) for flags in ([], ["--gpu", 2], ["--device", "cpu"])]
    assert devices == [torch.device("cuda", 0), torch.device("cuda", 2), torch.device("cpu")]
    numbers = [detect_launcher(parsed("--multiprocessing-distributed", *n)).world_size for n in ([], ["--nproc", 2])]
    assert numbers == [3, 2]
    met, info = Mock(), DistInfo(0, 2, 0, 2, "spawn", "tcp://127.0.0.1:1")
    monkeypatch.setattr(torch.distributed, "init_process_group", met)
    monkeypatch.setattr(rendezvous, "join_store", Mock())
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    for backend in ("nccl", "gloo"):
        rendezvous.init_process_group(parsed("--dist-backend", backend, "--dist-timeout", 7), info, devices[0])
        assert met.call_args.args == (backend,) and met.call_args.kwargs["timeout"].total_seconds() == 7


def test_one_gpu_for_several_processes_is_refused():
    args, info = SimpleNamespace(gpu=0, device="auto"), DistInfo(1, 2, 1, 2, "torchrun", "env://")
    assert "--gpu 0: would put all 2 processes" in refusal(select_device, args, info)


PODS = {"MASTER_ADDR": "localhost", "MASTER_PORT": "2345", "RANK": "1", "WORLD_SIZE": "4"}  # of PyTorchJob
RANKS = PODS | {"TORCHELASTIC_RUN_ID": "x"}
SECOND_OF_TWO, FROM_ENV = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, ["--dist-url", "env://"]
TASKS = {
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "gpu[07-09,12]", "SLURM_JOB_ID": "20005",
}  # fmt: skip


@pytest.mark.parametrize(
    ("env", "flags", "info"),
    [
        ({}, [], (0, 1, 0, 1, "plain", None)),
        ({}, TWO, (0, 2, 0, 2, "spawn", None)),
        ({}, [*TWO, "--world-size", 3, "--rank", 1, "--dist-url", "tcp://a:1"], (2, 6, 0, 2, "spawn", "tcp://a:1")),
        ({}, ["--world-size", 3, "--rank", 1, "--dist-url", "tcp://a:1"], (1, 3, 0, 1, "node", "tcp://a:1")),
        (RANKS, [], (1, 4, 1, 4, "torchrun", "env://")),
        (RANKS | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, [], (1, 4, 0, 2, "torchrun", "env://")),
        (PODS, FROM_ENV, (1, 4, 0, 1, "torchrun", "env://")),  # each pod is a node
        (PODS | SECOND_OF_TWO, FROM_ENV, (1, 4, 1, 2, "torchrun", "env://")),
        (TASKS, [], (3, 4, 1, 2, "srun", "tcp://gpu07:20005")),
        (TASKS | {"SLURM_JOB_NODELIST": "login,gpu[1-2]"}, [], (3, 4, 1, 2, "srun", "tcp://login:20005")),
        (TASKS | {"SLURM_STEP_NODELIST": "gpu12"}, [], (3, 4, 1, 2, "srun", "tcp://gpu12:20005")),
        (TASKS, ["--dist-url", "tcp://a:1"], (3, 4, 1, 2, "srun", "tcp://a:1")),
    ],
)
def test_flags_and_environment_determine_rank_world_size_and_launcher(detect, env, flags, info):
    assert detect(env, *flags) == info


@pytest.mark.parametrize(
    ("env", "flags", "words"),
    [
        ({}, ["--world-size", 3, "--dist-url", "tcp://a:1"], "--rank -1: with --world-size 3 it must be from 0 to 2"),
        ({}, ["--world-size", 3, "--rank", 0], "--dist-url: name tcp://HOST:PORT"),
        ({}, FROM_ENV, "RANK and WORLD_SIZE are not set"),
        (RANKS | {"RANK": "4"}, [], "RANK is '4', must be a number from 0 to 3"),
        (RANKS | {"RANK": "first"}, [], "environment of the launcher: RANK is 'first'"),
        (RANKS | {"WORLD_SIZE": ""}, [], "WORLD_SIZE is missing"),
        (RANKS | {"WORLD_SIZE": "9" * 5000}, [], "WORLD_SIZE is '99999999999999999999'"),
        (RANKS | {"LOCAL_WORLD_SIZE": "0"}, [], "LOCAL_WORLD_SIZE is '0', must be a number from 1 to 4"),
        (RANKS | {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, [], "LOCAL_RANK is '2'"),
        (RANKS | {"MASTER_PORT": "1e3"}, [], "MASTER_PORT is '1e3'"),
        (RANKS | {"MASTER_ADDR": ""}, [], "MASTER_ADDR is missing"),
        (TASKS | {"SLURM_STEP_NUM_NODES": "5"}, [], "SLURM_STEP_NUM_NODES is '5', must be a number from 1 to 4"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, [], "SLURM_PROCID is missing"),
        (TASKS | {"SLURM_STEP_NUM_TASKS": "5"}, [], "5 tasks on 2 nodes; give every node as many"),
        (TASKS | {"SLURM_LOCALID": "4"}, [], "SLURM_LOCALID is '4'"),
        (TASKS | {"SLURM_JOB_ID": ""}, [], "SLURM_JOB_ID is missing"),
    ],
)
def test_invalid_values_from_a_launcher_are_named(detect, env, flags, words):
    with pytest.raises(UserError, match=re.escape(words)):
        detect(env, *flags)


# ---- never meeting


def node(rank, url, *more) -> list:
    """The flags of one of two nodes."""
    return ["--world-size", 2, "--rank", rank, "--dist-url", url, *more]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (node(0, "tcp://127.0.0.1:FREE"), ["the 2 processes did not meet within --dist-timeout 5 s"]),
        (node(1, "tcp://127.0.0.1:FREE"), ["node 0 is not reached within --dist-timeout 1 s", "Connection refused"]),
        (node(1, "tcp://192.0.2.77:2345"), ["tcp://192.0.2.77:2345", "node 0 is not reached"]),  # nobody's address
        (node(0, "tcp://192.0.2.77:2345"), ["tcp://192.0.2.77:2345", "cannot listen there"]),
        (node(0, "tcp://127.0.0.1:USED"), ["cannot listen there (Address already in use)"]),
        (node(1, "tcp://no.such.host.invalid:2345"), ["no.such.host.invalid is not known"]),
        ([*TWO, "--dist-url", "tcp://127.0.0.1:USED"], ["cannot listen there (Address already in use)"]),
        ([*TWO, "--dist-url", "tcp://192.0.2.77:2345"], ["cannot listen there", "assign requested address"]),
        ([*TWO, *node(1, "tcp://127.0.0.1:FREE")], ["node 0 is not reached"]),
        ([*TWO, *node(0, "tcp://127.0.0.1:FREE"), "--dist-interface", "none0"], ["--dist-interface none0"]),
    ],
)
def test_processes_that_do_not_meet_say_why(plain_tree, tmp_path, capfd, flags, words):
    seconds = 5 if "did not meet" in words[0] else 1  # in which its own store must answer
    with socket.create_server(("127.0.0.1", 0)) as used:
        ports = {"FREE": str(free_port()), "USED": str(used.getsockname()[1])}
        flags = [re.sub("FREE|USED", lambda found: ports[found[0]], str(flag)) for flag in flags]
        assert_one_line(run_stage("i", plain_tree, tmp_path / "run", *flags, "--dist-timeout", seconds), 2, *words)
    assert capfd.readouterr().err == ""  # nor does torch.distributed's C++ print anything


def test_a_listener_that_never_answers_is_given_up_after_the_timeout(plain_tree, tmp_path, capfd):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        flags = node(1, f"tcp://127.0.0.1:{mute.getsockname()[1]}", "--dist-timeout", 1)
        outcome = run_stage("i", plain_tree, tmp_path / "run", *flags)
    assert_one_line(outcome, 2, "node 0 is not reached within --dist-timeout 1 s", "no answer")
    # The thread that was given up ends now, and prints.
    wait_until(lambda: not any("(call)" in thread.name for thread in threading.enumerate()), "the thread to end")


@pytest.mark.parametrize(
    "url", ["localhost", "tcp://localhost", "tcp://localhost:high", "tcp://a:65536", "http://a:1", "file:///etc/passwd"]
)
def test_an_address_of_another_form_is_refused(url):
    with pytest.raises(UserError, match=f"--dist-url {url}: must be tcp://HOST:PORT"):
        resolve(url)


def test_a_name_that_is_loopback_only_on_node_0_is_refused(plain_tree, tmp_path, monkeypatch):
    """Debian's /etc/hosts maps the machine's own name to 127.0.1.1: gloo would listen where no other node can connect.

    torchrun takes that name for MASTER_ADDR.
    """
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [(None, None, None, None, ("127.0.1.1", 0))])
    outcome = run_stage("i", plain_tree, tmp_path / "run", *node(0, "tcp://node0:2345"))
    assert_one_line(outcome, 2, "127.0.1.1 on this node", "--dist-interface")
    monkeypatch.setattr(socket, "gethostbyname", lambda _: "127.0.1.1")
    assert master_address("localhost") == "127.0.1.1"
    with pytest.raises(UserError, match=r"MASTER_ADDR node0: is 127\.0\.1\.1.*--local-addr"):
        master_address("node0")


# ---- several nodes, on one machine


def slurm(task, nodes):
    """The environment that srun gives a task."""
    return {
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task if nodes == 1 else 0),
        "SLURM_STEP_NUM_NODES": str(nodes), "SLURM_JOB_NODELIST": "127.0.0.1", "SLURM_JOB_ID": str(os.getpid() + nodes),
    }  # fmt: skip


LAUNCHES = {
    "nodes of one process": lambda rank, url: (node(rank, url), {}),
    "nodes that spawn": lambda rank, url: (node(rank, url, "--multiprocessing-distributed", "--nproc", 1), {}),
    "nodes on an interface": lambda rank, url: (node(rank, url, "--dist-interface", "lo"), {}),
    "srun on one node": lambda rank, url: ([], slurm(rank, 1)),
    "srun on two nodes": lambda rank, url: ([], slurm(rank, 2)),
}


@pytest.mark.parametrize(
    "launch", ["nodes of one process", *(pytest.param(name, marks=pytest.mark.full) for name in list(LAUNCHES)[1:])]
)
def test_two_nodes_train_as_one(run_of_two_processes, plain_tree, tmp_path, launch, interface_is_chosen_by_the_run):
    """They listen only on the given address; stopping one stops both; the result is that of one node."""
    url, run = f"tcp://127.0.0.1:{free_port()}", tmp_path / "run"

    def start(rank):
        flags, env = LAUNCHES[launch](rank, url)
        batch = [] if launch == "srun on one node" else ["-b", 8]  # of one node
        out = run if rank == 0 else tmp_path / "other"
        return Job("i", plain_tree, out, "--cos", *batch, *flags, env=env, gate=2, gate_file=tmp_path / "gate")

    with start(0) as first, start(1) as second:
        first.wait_for(r"epoch 1/2 \[1/")
        assert [listening(job.note()) for job in (first, second)] == [{LOOPBACK}, {LOOPBACK}]
        second.send(signal.SIGTERM)
        assert_stopped(first.end())
        assert second.end().status == 75
    shutil.rmtree(tmp_path / "other", ignore_errors=True)
    saved = checkpoint(run)
    assert saved["run"]["world_size"] == 2 and saved["epoch"] < 2
    again = train_ranks("i", plain_tree, run, "--cos", "--resume", "auto")
    assert_same_results(again, run_of_two_processes)


# ---- started differently


def refusal(check, *args) -> str:
    """The message of an error that all ranks raise."""
    with pytest.raises(UserError) as caught:
        check(*args)
    assert caught.value.on_all_ranks
    return str(caught.value)


STARTS = {  # (stage, flags, processes per node) of each rank -> the message
    (("i", "-b 8", 1), ("i", "-b 6", 1)): "--batch-size: 8 on rank 0 and 6 on rank 1",
    (("ii", "--seed 1", 1), ("ii", "", 1)): "--seed: 1 on rank 0 and None on rank 1",
    (("i", "", 2), ("i", "-b 6", 1)): "processes per node: 2 on rank 0 and 1 on rank 1",
    (("i", "", 1), ("iii", "", 1)): "script: ssd_stage_i.py on rank 0 and ssd_stage_iii.py on rank 1",
}


def refusals_of_a_rank(rank, tree, folder):
    """What this rank says of each of STARTS, and of a list that differs."""
    messages = []
    for start in STARTS:
        stage, flags, local_world_size = start[rank]
        args = PARSERS[stage]().parse_args([*flags.split(), str(ROOT)])
        args.program = f"ssd_stage_{stage}.py"  # here it is pytest
        messages.append(refusal(check_equal_starts, args, DistInfo(rank, 2, 0, local_world_size)))
    args = PARSERS["i"]().parse_args(["--train-list", str(folder / f"{rank}.txt"), str(tree)])
    return [*messages, refusal(locate_splits, args, DistInfo(rank, 2, 0, 1))]


def test_two_nodes_that_were_started_differently_or_read_other_lists_end_in_one_line_on_both(plain_tree, tmp_path):
    lines = (plain_tree / "train.txt").read_text().splitlines(keepends=True)
    (tmp_path / "0.txt").write_text("".join(lines))
    (tmp_path / "1.txt").write_text("".join(lines[:-1]))
    for rank, found in enumerate(on_ranks(2, refusals_of_a_rank, plain_tree, tmp_path)):
        expected = [*STARTS.values(), f"{tmp_path}/{rank}.txt: differs between rank 0 and rank 1"]
        assert [message[: len(text)] for message, text in zip(found, expected, strict=True)] == expected


def test_nodes_with_different_numbers_of_processes_are_several_nodes():
    assert DistInfo(0, 12, 0, 8).nodes == 2 and DistInfo(8, 12, 0, 4).nodes == 3


def test_flags_that_start_no_process_under_torchrun_are_named(capsys, monkeypatch):
    parser, argv = SMALL_RUN
    for launcher, said in (("torchrun", True), ("spawn", False)):
        monkeypatch.setattr(arguments, "get_dist_info", lambda: DistInfo(0, 4, 0, 4, launcher))  # noqa: B023
        arguments.settle_defaults(parser.parse_args(argv))
        note = "--multiprocessing-distributed and --nproc: not used, since a launcher started"
        assert (note in capsys.readouterr().out) == said


def test_too_many_open_files_for_the_processes_end_in_one_line(capfd, monkeypatch):
    monkeypatch.setattr(spawn.mp, "start_processes", Mock(side_effect=OSError(errno.EMFILE, "Too many open files")))
    assert launch(lambda args, device: None, *SMALL_RUN) == 2
    assert re.fullmatch(
        r"\S+: --nproc 2: cannot be started \(Too many open files\); lower it\n", capfd.readouterr().err
    )


@pytest.mark.parametrize("name", ["error.json", "missing/error.json"])
def test_torchrun_is_told_the_message_which_is_printed_in_any_case(capsys, monkeypatch, tmp_path, name):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / name))
    assert launch(lambda args, device: None, SMALL_RUN[0], [str(tmp_path / "none")]) == 2
    message = capsys.readouterr().err.partition(": ")[2]
    assert "no such folder" in message
    if name == "error.json":
        assert json.loads((tmp_path / name).read_text())["message"]["message"] == message.strip()


def test_every_process_finds_images_in_folders_per_split(run_of_two_processes, reorganized_tree, tmp_path):
    assert_same_run(train_ranks("i", reorganized_tree, tmp_path / "run", "--cos"), run_of_two_processes)


def stop_rank_1_in_a_validation():
    if os.environ["RANK"] == "1":
        metrics.heartbeat = lambda: signal.raise_signal(signal.SIGTERM)  # after each of its batches


def test_two_processes_that_are_stopped_in_a_validation_resume(run_of_two_processes, plain_tree, tmp_path):
    run = tmp_path / "run"
    first, second = run_ranks("i", plain_tree, run, "--cos", setup=stop_rank_1_in_a_validation)
    assert_stopped(first)
    assert second.status == 75
    assert (checkpoint(run)["epoch"], checkpoint(run)["step"]) == (0, 9)
    assert_same_run(train_ranks("i", plain_tree, run, "--cos", "--resume", "auto"), run_of_two_processes)
