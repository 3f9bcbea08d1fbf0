"""Small long-tailed image trees, and stages run on them: in this process, through the shell, or as ranks of a group."""

import contextlib
import ctypes
import io
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

import ssd_stage_i
import ssd_stage_ii
import ssd_stage_iii
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
PARSERS = {"i": ssd_stage_i.get_parser, "ii": ssd_stage_ii.get_parser, "iii": ssd_stage_iii.get_parser}
SCRIPTS = {"i": ssd_stage_i, "ii": ssd_stage_ii, "iii": ssd_stage_iii}
STAGES = tuple(SCRIPTS)
SPLITS = ("train", "val", "test")
COUNTS = {"train": (104, 25, 12, 6, 4, 3), "val": (4,) * 6, "test": (5,) * 6}  # images per class; all shot groups occur
CLASSES, IMAGES = len(COUNTS["train"]), sum(COUNTS["train"])
SMALL = "--arch resnet8 --image-size 32 -b 16 -j 0 --epochs 2 --seed 3 --device cpu -p 1000"
QUEUE = "--moco-k 50 --moco-dim 16 --moco-m 0.9"  # a queue size that is not a multiple of the batch
LAST, PREVIOUS, BEST = (f"{name}_checkpoint.pth.tar" for name in ("last", "previous", "best"))
TWO = ["--multiprocessing-distributed", "--nproc", 2]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)


def class_image(random: np.random.Generator, label: int, size: int) -> Image.Image:
    """Noise around a color and a brightness gradient that depend on the class."""
    color = np.array([(60 * label) % 256, (110 * label + 80) % 256, (170 * label + 40) % 256], dtype=float)
    slope = np.linspace(-60, 60, size)[:, None, None] * (-1) ** label
    pixels = color + slope + random.normal(0, 40, (size, size, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_tree(root: Path, counts=COUNTS, size=32, suffix=".png", reorganized=False) -> Path:
    """A tree and its lists. As in ImageNet-LT, validation images are named below train/ and test images below val/.

    They are at the paths in the lists or, if reorganized, in one folder per split.
    """
    random = np.random.default_rng(0)
    for split, named in (("train", "train"), ("val", "train"), ("test", "val")):
        lines = []
        for label, count in enumerate(counts[split]):
            for number in range(count):
                name = f"class{label}/{split}_{number}{suffix}"
                file = root / (split if reorganized else named) / name
                file.parent.mkdir(parents=True, exist_ok=True)
                class_image(random, label, size).save(file)
                lines.append(f"{named}/{name} {label}\n")
        (root / f"{split}.txt").write_text("".join(lines))
    return root


class Outcome(NamedTuple):
    """The result of a run of a stage or a command: exit status, stdout and stderr."""

    status: int
    out: str
    err: str


def stage_flags(stage: str, data, out, flags) -> list[str]:
    """The command line of a small run; flags override the defaults."""
    defaults = f"{SMALL} {QUEUE}" if stage == "i" else SMALL
    return [*defaults.split(), "--output_dir", str(out), *map(str, flags), str(data)]


def refusal(stage: str, data, out, *flags) -> str:
    """What the parser says of the command line of a small run, which it must refuse."""
    with pytest.raises(UserError) as caught:
        PARSERS[stage]().parse_args(stage_flags(stage, data, out, flags))
    return str(caught.value)


def call(stage: str, argv, out=None) -> Outcome:
    """main(argv) in this process."""
    out, err = out or io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = SCRIPTS[stage].main(list(map(str, argv)))
    return Outcome(status, out.getvalue(), err.getvalue())


def run_stage(stage: str, data, out, *flags) -> Outcome:
    """A small run in this process."""
    return call(stage, stage_flags(stage, data, out, flags))


def outcome_of(main, capture, *argv) -> Outcome:
    """The outcome of a command in this process; capture: capsys or capfd."""
    capture.readouterr()
    status = main(list(map(str, argv)))
    return Outcome(status, *capture.readouterr())


def train(stage: str, data, out, *flags) -> Path:
    """A small run in this process that has to succeed; returns its folder."""
    outcome = run_stage(stage, data, out, *flags)
    assert (outcome.status, outcome.err) == (0, "")
    return Path(out)


def source(stage: str, trained) -> list:
    """The flags that name the checkpoint of the stage before; trained: folders by stage."""
    flags = {"ii": ("--last_stage_ckpt", "i"), "iii": ("--teacher_ckpt", "ii")}
    if stage not in flags:
        return []
    flag, before = flags[stage]
    return [flag, trained[before] / LAST]


def train_all(data, root, *flags, run=None) -> dict[str, Path]:
    """Folders of stages i, ii, iii and ii again (`tuned`), each on the one before; run: as train, which is default."""
    run, folders = run or train, {name: root / name for name in (*STAGES, "tuned")}
    for stage in STAGES:
        run(stage, data, folders[stage], *flags, *source(stage, folders))
    run("ii", data, folders["tuned"], *flags, "--last_stage_ckpt", folders["iii"] / LAST)
    return folders


def run_shell(stage: str, data, out, *flags, launcher=(sys.executable,)) -> Outcome:
    """A small run as a user starts it."""
    command = [*launcher, ROOT / f"ssd_stage_{stage}.py", *stage_flags(stage, data, out, flags)]
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:  # a pipe may outlive the run
        done = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=stdout, stderr=stderr, start_new_session=True)
        try:
            done.wait(300)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(done.pid, signal.SIGKILL)  # its leftover processes, or itself if it hangs
        written = [file.seek(0) or file.read() for file in (stdout, stderr)]
    return Outcome(done.returncode, *written)


def _run_rank(stage, argv, environment, files, setup):
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, file in enumerate(files, 1):  # stdout, stderr
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    setup()
    sys.exit(SCRIPTS[stage].main(argv))


def run_ranks(stage: str, data, out, *flags, world=2, nodes=1, setup=dict) -> list[Outcome]:
    """A small run as `world` ranks on one node, or as many, told by torchrun's variables; the outcome of each.

    setup() runs in each before the run, to replace a part of it; a function of a module, so that it can be pickled.

    The ranks are forked from a process that has imported everything, which is far cheaper than to start them anew.
    """
    store, local = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), world // nodes
    shared = {
        "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(local),
    }  # fmt: skip
    argv = stage_flags(stage, data, out, flags)
    with tempfile.TemporaryDirectory() as folder:
        own = [{"RANK": f"{rank}", "LOCAL_RANK": f"{rank % local}"} for rank in range(world)]
        files = [[f"{folder}/{rank}.{name}" for name in ("out", "err")] for rank in range(world)]
        ranks = [
            forkserver().Process(
                target=_run_rank,
                args=(stage, argv, os.environ | shared | own[rank], files[rank], setup),
            )
            for rank in range(world)
        ]
        join(ranks)
        return [
            Outcome(process.exitcode, *(Path(file).read_text() for file in own))
            for process, own in zip(ranks, files, strict=True)
        ]


def train_ranks(stage: str, data, out, *flags, **options) -> Path:
    """A small run as two ranks that has to succeed; returns its folder."""
    outcomes = run_ranks(stage, data, out, *flags, **options)
    assert [(outcome.status, outcome.err) for outcome in outcomes] == [(0, "")] * 2
    return Path(out)


def assert_one_line(outcome, status, *words):
    """That (status, stdout, stderr) of a stage or a command has this status, and one line on stderr with the words."""
    found, out, err = outcome
    assert found == status and re.fullmatch(r"[^\n]+\n", err), outcome
    assert err[:-1].isprintable() and len(err) < 2000, err
    assert "Traceback" not in out + err and "Error(" not in err, err  # nor an exception's repr
    for word in map(str, words):
        assert word in err, (word, err)


def assert_mistake(outcome, *words):
    """That it is a user's mistake: status 2, and one line; a command prints nothing else."""
    assert_one_line(outcome, 2, *words)
    if outcome[2].startswith("error: "):  # so begin the messages of commands; those of stages begin with the script
        assert outcome[1] == "", outcome


def assert_mistake_of_all_ranks(outcomes, *words):
    """That all ranks end, and the first alone says why."""
    assert_mistake(outcomes[0], *words)
    assert [(outcome.status, outcome.err) for outcome in outcomes[1:]] == [(2, "")] * (len(outcomes) - 1), outcomes


def checkpoint(folder, name=LAST) -> dict:
    return torch.load(Path(folder) / name, weights_only=True)


def log_of(folder, *, timed=True) -> list[dict]:
    """The records of log.txt; timed=False leaves out what depends on the clock."""
    records = [json.loads(line) for line in (Path(folder) / "log.txt").read_text().splitlines()]
    if not timed:
        records = [{k: v for k, v in r.items() if k not in ("seconds", "images_per_second")} for r in records]
    return records


def args_of(folder) -> dict:
    return json.loads((Path(folder) / "args.json").read_text())


def copied(run, to) -> Path:
    """A copy of a run's folder, for a test to change."""
    return Path(shutil.copytree(run, to))


def results_of(folder) -> list[dict]:
    return json.loads((Path(folder) / "results.json").read_text())


@contextlib.contextmanager
def limited_memory(more=2**34):
    """Limits this process to `more` bytes in addition to its present memory, whatever the machine has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + more if hard < 0 else min(held + more, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def without_privileges():
    """Lets the permissions of files and folders hold for root too, in this thread and those that it starts."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, whole = struct.pack("Ii", 0x20080522, 0), ctypes.create_string_buffer(24)  # version 3; effective, ...
    assert libc.capget(header, whole) == 0
    effective, *others = struct.unpack("6I", whole.raw)
    assert libc.capset(header, struct.pack("6I", effective & ~0b110, *others)) == 0  # DAC_OVERRIDE, DAC_READ_SEARCH
    try:
        yield
    finally:
        assert libc.capset(header, whole.raw) == 0


def same(a, b) -> bool:
    """Whether two nested values agree bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(folder, reference):
    """Compares weights, queue, optimizer, BatchNorm statistics, best accuracy, log and results."""
    for name in (LAST, BEST):
        assert same(checkpoint(folder, name), checkpoint(reference, name)), name
    assert_same_results(folder, reference)


def assert_same_results(folder, reference):
    """The same for runs with other flags, which are in their checkpoints."""
    for name in ("state_dict", "optimizer", "best_acc1"):
        assert same(checkpoint(folder)[name], checkpoint(reference)[name]), name
    assert log_of(folder, timed=False) == log_of(reference, timed=False)
    assert results_of(folder) == results_of(reference)


class Interruption(io.StringIO):
    """A stdout that calls act() when a certain line is printed: by default, one that raises SIGTERM."""

    def __init__(self, line, act=lambda: signal.raise_signal(signal.SIGTERM)):
        super().__init__()
        self.line, self.act = line, act

    def write(self, text):
        if text.startswith(self.line):
            self.act()
        return super().write(text)


def _rank(function, rank, world, folder, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.save(function(rank, *args), f"{folder}/{rank}")
    dist.destroy_process_group()


def forkserver():
    """A multiprocessing context whose processes are forked from one that only imported.

    Autograd refuses a backward pass in a fork of a process that ran one.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers"])
    return context


def join(processes):
    """Starts processes, and waits for their end."""
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)  # a machine with other work may need that


def on_ranks(world: int, function, *args, method="forkserver") -> list:
    """function(rank, *args) on each of `world` processes of a gloo group; what they return, by rank.

    method="fork" forks this process, for a function that cannot be pickled and runs no backward pass.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("fork") if method == "fork" else forkserver()
        ranks = [context.Process(target=_rank, args=(function, r, world, folder, args)) for r in range(world)]
        join(ranks)
        assert [process.exitcode for process in ranks] == [0] * world
        return [torch.load(os.path.join(folder, str(rank)), weights_only=True) for rank in range(world)]
