"""Runs on a GPU what tests on a CPU cannot show, within twenty minutes, and writes one Markdown file.

    bash scripts/gpu_check.sh [--data CIFAR100_LT_DIR] [--write gpu_check.md]
    bash scripts/gpu_check.sh --device cpu --quick        all parts at tiny sizes, to check that they run

The parts: the tests marked gpu; training steps in float32, TF32, bf16, fp16 and with BatchNorm by parts, with and
without --compile; how far the precisions move the losses over 200 steps; the contrastive loss; the loader; short runs
of all stages with the recipes of CIFAR100-LT. Each part is a process with a time limit: one that fails or hangs is
reported with its last lines, and the next one starts. The exit status is 0 if all parts passed, 1 if not, and 2
without a GPU.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import common, step
from benchmarks.loader import make_images
from datasets.prepare.long_tail import long_tail_counts
from utils.command_line import ArgumentParser, number, run_command, whole_number
from utils.errors import UserError
from utils.log import environment

COMPILED = ("bf16 compiled", "fp16 compiled", "tf32 compiled", "float32 compiled", "bn_splits_4 compiled")
EAGER = [name for name in step.VARIANTS if name not in COMPILED]
TAIL = 25  # lines that a report shows of a part's output
PARTS = (
    "tests", "steps", "drift", "contrastive loss", "loader", "training", *(f"steps ({name})" for name in COMPILED),
    "drift (compiled)",
)  # fmt: skip
GRACE = 5  # seconds between the request to end and the kill
TINY = "--arch resnet8 --size 32 --batch 8 --classes 5 --queue 16"
FLAGS = {  # part -> its flags, and those of its quick form
    "steps": ("--no-memory", f"--no-memory {TINY} --repeats 1"),
    "drift": ("--drift", f"--drift {TINY} --steps 12"),
    "contrastive loss": ("", "--batch 4 --queue 32 --dim 8 --classes 5 --repeats 1"),
    "loader": ("--images 256 --repeats 3", "--images 8 --size 72 --batch 4 --workers 0 --repeats 1"),
    "training": (
        "--epochs 2 --warmup-epochs 1 --eval-freq 1",
        "--epochs 1 --warmup-epochs 0 --arch resnet8 --batch-size 8 --eval-batch-size 8 --workers 0",
    ),
}


class Part(NamedTuple):
    """limit: in seconds; tables: whether its output is Markdown."""

    name: str
    limit: float
    command: list[str]
    tables: bool = True


class Result(NamedTuple):
    """What became of a part: "passed", or how it failed; the seconds that it took; what it printed."""

    part: Part
    outcome: str
    seconds: float
    out: str
    err: str

    @property
    def passed(self) -> bool:
        return self.outcome == "passed"

    def markdown(self) -> str:
        """The part's section of the report."""
        command = shlex.join(self.part.command).replace(shlex.quote(sys.executable), "python")
        sections = [f"## {self.part.name}", f"`{command}`", f"{self.outcome}, {self.seconds:.0f} s"]
        if self.part.tables:
            sections.append(self.out.strip())
        lines = [] if self.part.tables else self.out.splitlines()
        lines += [] if self.passed else self.err.splitlines()
        if lines:
            sections.append("\n".join(["```", *lines[-TAIL:], "```"]))
        return "\n\n".join(filter(None, sections))


# ---- the parts


def parts(args, work: Path) -> list[Part]:
    """The parts, in the order of their importance: if the time is too short for all, the last are left out."""
    python = sys.executable
    flags = {name: own[args.quick] for name, own in FLAGS.items()}
    if not args.quick:
        flags["steps"] += f" --batch {args.batch}"
    files = [str(file) for file in sorted((common.ROOT / "tests").glob("*.py")) if "mark.gpu" in file.read_text()]
    tests = [python, "-m", "pytest", "-m", "gpu", "-rs", "-p", "no:cacheprovider", *files]
    training = ["bash", "scripts/train.sh", "configs/cifar100_lt", str(args.data or work / "images"), str(work / "run")]
    training += ["--device", args.device, "--seed", "0", *flags["training"].split()]

    def benchmark(name, limit, module, words, variants=()):
        command = [python, "-m", f"benchmarks.{module}", "--device", args.device, *words.split()]
        return Part(name, limit, [*command, "--variants", *variants] if variants else command)

    def drift(name, words, variants):
        return benchmark(name, 240, "step", words, [variant for variant in variants if variant in step.BY_ROUNDING])

    return [
        Part("tests", 240, tests, tables=False),
        benchmark("steps", 300, "step", flags["steps"], EAGER),
        drift("drift", flags["drift"], EAGER[1:]),
        benchmark("contrastive loss", 90, "loss", flags["contrastive loss"]),
        benchmark("loader", 90, "loader", flags["loader"]),
        Part("training", 240, training, tables=False),
        *(benchmark(f"steps ({name})", 240, "step", f"{flags['steps']} --stages i", [name]) for name in COMPILED),
        drift("drift (compiled)", f"{flags['drift']} --arch resnet8", COMPILED),  # which compiles faster
    ]


# ---- running them


def run_part(part: Part, limit: float, environment: dict) -> Result:
    """Runs a part for at most `limit` seconds, then ends it with all its processes."""
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            part.command, cwd=common.ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment,
            start_new_session=True,
        )  # fmt: skip

        def send(number):
            with contextlib.suppress(ProcessLookupError):  # none of the part's processes is left
                os.killpg(process.pid, number)

        try:
            status = process.wait(limit)
            outcome = "passed" if status == 0 else f"**failed** with status {status}"
        except subprocess.TimeoutExpired:
            outcome = f"**stopped** after its limit of {limit:.0f} s"
            send(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            send(signal.SIGKILL)
            process.wait()
        out.seek(0)
        err.seek(0)
        return Result(part, outcome, time.monotonic() - started, out.read(), err.read())


def part_environment(args, work: Path) -> dict:
    """The environment of the parts, in which `python` is this interpreter."""
    python = work / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    changes = {"PATH": f"{python.parent}:{os.environ['PATH']}", "PYTHONPATH": str(common.ROOT), "LAUNCH": ""}
    return os.environ | changes | ({"TORCH_COMPILE_DISABLE": "1"} if args.quick else {})


# ---- the report


def machine_rows(device: str) -> list[tuple[str, str]]:
    """What the machine and the versions are."""
    rows = {"machine": common.machine(device)}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        rows["GPUs"] = torch.cuda.device_count()
        rows["GPU memory"] = common.mib(properties.total_memory)
        rows["compute capability"] = f"{properties.major}.{properties.minor}"
        rows["CUDA, cuDNN"] = f"{torch.version.cuda}, {torch.backends.cudnn.version()}"
    return [(name, str(value)) for name, value in (rows | environment()).items() if value is not None]


def report(args, argv, results: list[Result], missing: int) -> str:
    """The Markdown file; missing: the number of parts that have not run yet."""
    passed = sum(result.passed for result in results)
    seconds = sum(result.seconds for result in results)
    summary = f"{passed} of {len(results)} parts passed, in {seconds:.0f} s"
    summary += f"; {missing} are still to come" if missing else ""
    outcomes = [(result.part.name, result.outcome, f"{result.seconds:.0f}") for result in results]
    sections = [
        f"# GPU check\n\n`{shlex.join(['bash', 'scripts/gpu_check.sh', *argv])}`: {summary}",
        *(["Tiny sizes, nothing is compiled: the figures mean nothing."] if args.quick else []),
        common.Table("", "## Machine", ("", ""), machine_rows(args.device)).markdown(),
        common.Table("", "## Parts", ("part", "outcome", "seconds"), outcomes).markdown(),
        *(result.markdown() for result in results),
    ]
    return "\n\n".join(sections) + "\n"


def check(args, argv) -> int:
    """Runs the parts and writes the report after each; returns the exit status."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is available here; use --device cpu --quick")
    file = Path(args.write)
    results = []
    end = time.monotonic() + 60 * args.minutes
    args.data = args.data and Path(args.data).resolve()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        variables = part_environment(args, work)
        if not args.data:
            train = [6, 4, 2, 2] if args.quick else long_tail_counts(500, 100, 100)  # as CIFAR100-LT, imbalance 100
            for split, counts in (("train", train), ("val", [2] * len(train)), ("test", [10] * len(train))):
                make_images(work / "images" / split, counts, (32, 32))
        todo = [part for part in parts(args, work) if not args.only or part.name in args.only]
        file.write_text(report(args, argv, results, len(todo)))  # can it be written?
        for number, part in enumerate(todo):
            left = end - time.monotonic()
            if left <= 0:
                results.append(Result(part, "**left out**: no time was left", 0, "", ""))
            else:
                print(f"{part.name} ...", end=" ", flush=True)
                results.append(run_part(part, min(part.limit, left), variables))
                print(f"{results[-1].outcome.replace('*', '')}, {results[-1].seconds:.0f} s", flush=True)
            file.write_text(report(args, argv, results, len(todo) - number - 1))
    print(f"in {file}: {sum(result.passed for result in results)} of {len(results)} parts passed")
    return 0 if all(result.passed for result in results) else 1


def get_parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__, prog="bash scripts/gpu_check.sh")
    # fmt: off
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to check that all parts run")
    parser.add_argument("--data", metavar="DIR",
        help="CIFAR100-LT as data/README.md prepares it (default: generated images of the same number and size)")
    parser.add_argument("--batch", type=whole_number(2), default=64, metavar="N",
        help="images per timed step (default: %(default)s)")
    parser.add_argument("--minutes", type=number(above=0, most=1440), default=19.5, metavar="M",
        help="time for all parts together (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="PART", choices=PARTS, help=f"run only these: {', '.join(PARTS)}")
    parser.add_argument("--write", default="gpu_check.md", metavar="FILE", help="the report (default: %(default)s)")
    # fmt: on
    return parser


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    return run_command(lambda args: check(args, argv), get_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
