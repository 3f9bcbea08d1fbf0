"""Peak memory of a training step on the CPU, and the lower bound that --memory-check computes (utils/memory.py).

python -m benchmarks.memory                         prints a table, each line measured in a fresh process
python -m benchmarks.memory --stages i --settings resnet18:64:32 --amp none
"""

import re
import subprocess
import sys
from argparse import SUPPRESS, Namespace
from pathlib import Path

import torch

from models import SDL, SLG, SSFL
from utils.command_line import ArgumentParser, run_command
from utils.memory import step_loss, step_memory

CLASSES, QUEUE = 1000, 115712
SETTINGS = ("resnet18:64:32", "resnet50:128:8", "resnext50_32x4d:224:4")
CPU = torch.device("cpu")


def get_parser():
    parser = ArgumentParser(__doc__, prog="python -m benchmarks.memory")
    # fmt: off
    parser.add_argument("--stages", nargs="+", default=["i", "ii", "iii"], choices=("i", "ii", "iii"),
        help="(default: all)")
    parser.add_argument("--settings", nargs="+", default=SETTINGS, metavar="ARCH:SIZE:BATCH",
        help=f"(default: {' '.join(SETTINGS)})")
    parser.add_argument("--amp", nargs="+", default=["none", "bf16"], choices=("none", "bf16"),
        help="(default: both)")
    parser.add_argument("--measure", nargs=3, help=SUPPRESS)  # in a fresh process: setting, stage, precision
    # fmt: on
    return parser


def resident(name: str) -> int:
    """Bytes of memory that this process has now (VmRSS) or had at most (VmHWM); Linux only."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def build(stage: str, arch: str):
    """A stage's network."""
    if stage == "i":
        return SSFL(arch, CLASSES, queue_size=QUEUE)
    return SLG(arch, CLASSES) if stage == "ii" else SDL(arch, CLASSES)


def train_steps(model, size: int, batch: int, args, steps: int):
    """Some training steps on random images, as the scripts take them."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01, args.momentum)
    views = 2 if isinstance(model, SSFL) else 1
    for _ in range(steps):
        images = [torch.randn(batch, 3, size, size) for _ in range(views)]
        optimizer.zero_grad(set_to_none=True)
        step_loss(model.train(), images, torch.randint(CLASSES, (batch,)), args).backward()
        optimizer.step()


def measure(setting: str, stage: str, amp: str):
    """Prints bound and peak of the memory that three steps add to a process that has imported everything."""
    arch, size, batch = setting.split(":")
    args = Namespace(amp=amp, image_size=int(size), momentum=0.9)
    train_steps(build("ii", "resnet8"), 32, 2, args, steps=1)  # the libraries' own memory
    before = resident("VmRSS")
    model = build(stage, arch)
    train_steps(model, int(size), int(batch), args, steps=3)
    print(step_memory(model, int(batch), args, CPU).total(), resident("VmHWM") - before)


def table(args):
    print("| stage | arch | pixels | batch | precision | lower bound | peak | peak / bound |")
    print("| --- | --- | ---: | ---: | --- | ---: | ---: | ---: |")
    for stage in args.stages:
        for setting in args.settings:
            for amp in args.amp:
                command = [sys.executable, "-m", "benchmarks.memory", "--measure", setting, stage, amp]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                bound, peak = map(int, output.split())
                arch, size, batch = setting.split(":")
                row = (stage.upper(), arch, size, batch, {"none": "float32"}.get(amp, amp))
                row += (f"{bound / 2**20:.0f} MiB", f"{peak / 2**20:.0f} MiB", f"{peak / bound:.2f}")
                print("| " + " | ".join(row) + " |", flush=True)


def main(argv=None) -> int:
    return run_command(lambda args: measure(*args.measure) if args.measure else table(args), get_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
