"""Peak memory of a training step on a CPU beside the lower bound that --memory-check computes (utils/memory.py).

python -m benchmarks.memory                         the table of docs/usage.md, each line measured in a fresh process
python -m benchmarks.memory --stages i --settings resnet18:64:32 --amp none
"""

import sys
from argparse import SUPPRESS, Namespace

import torch

from benchmarks import common
from models import SDL, SLG, SSFL
from utils.command_line import ArgumentParser
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
        help="precisions (default: both)")
    parser.add_argument("--measure", metavar="NAME", help=SUPPRESS)  # a line, in a fresh process: "STAGE SETTING AMP"
    # fmt: on
    common.add_write_flag(parser)
    return parser


def build(stage: str, arch: str):
    """A stage's network in train mode."""
    if stage == "i":
        return SSFL(arch, CLASSES, queue_size=QUEUE).train()
    return (SLG if stage == "ii" else SDL)(arch, CLASSES).train()


def run_arguments(setting: str, amp: str) -> tuple[str, int, Namespace]:
    """(backbone, batch, what the check reads of a run's arguments)."""
    arch, size, batch = setting.split(":")
    return arch, int(batch), Namespace(amp=amp, image_size=int(size), momentum=0.9, accum_steps=1)


def train_steps(model, batch: int, args, steps: int):
    """Some training steps on random images, as the scripts take them."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01, args.momentum)
    for _ in range(steps):
        images = torch.randn(2 if isinstance(model, SSFL) else 1, batch, 3, args.image_size, args.image_size)
        optimizer.zero_grad(set_to_none=True)
        step_loss(model, images.unbind(), torch.randint(CLASSES, (batch,)), args).backward()
        optimizer.step()


def measure(line: str, _):
    """Prints the bytes that three steps add to what a process holds that has imported all and warmed up."""
    stage, setting, amp = line.split()
    arch, batch, args = run_arguments(setting, amp)
    train_steps(build("ii", "resnet8"), 2, args, steps=1)  # the libraries' own memory
    common.report_peak(lambda: train_steps(build(stage, arch), batch, args, steps=3), CPU, above=True)


def tables(args, argv) -> list[common.Table]:
    rows = []
    for stage in args.stages:
        for setting in args.settings:
            for amp in args.amp:
                arch, batch, run = run_arguments(setting, amp)
                bound = step_memory(build(stage, arch), batch, run, CPU).total()
                peak = common.in_fresh_process("benchmarks.memory", [], f"{stage} {setting} {amp}")
                row = f"stage {stage.upper()}, {arch}", str(run.image_size), str(batch)
                row += ("float32" if amp == "none" else amp, common.mib(bound), common.mib(peak), f"{peak / bound:.2f}")
                rows.append(common.note(row))
    headers = ("training step", "pixels", "batch", "precision", "lower bound", "peak", "peak / bound")
    title = f"{common.command('benchmarks.memory', argv)}; {common.machine(CPU)}"
    return [common.Table("memory", title, headers, rows)]


def main(argv=None) -> int:
    return common.run(get_parser(), argv, tables, measure)


if __name__ == "__main__":
    sys.exit(main())
