"""Evaluation of a list: counts per class, updated batch by batch, compared with keeping the logits of all images.

    python -m benchmarks.evaluate [--batch 16] [--images 64] [--scaling]

Ours is utils.evaluation.evaluate in float32, with channels_last and with bf16. Peak memory is that of a process that
evaluates the images. --scaling shows how time and memory grow with the number of images; there random logits replace
the network, and memory is what is added after the start.
"""

import sys

import torch

import ssd_stage_i
from benchmarks import baseline, common, step
from models import ARCHS
from utils.command_line import whole_number
from utils.evaluation import evaluate
from utils.train_state import TrainState, prepare_model

VARIANTS = ("float32", "channels_last", "bf16", "fp16")
SCALING_IMAGES = (4096, 16384, 65536, 262144)


class FixedLogits(torch.nn.Module):
    """Replaces a network: returns the same logits for every batch."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, images):
        return self.logits.clone()


def evaluator(version, model, pixels, labels, options, args):
    """A function without arguments that evaluates the model on --images images; pixels: a batch, uint8."""
    device = torch.device(args.device)
    model = prepare_model(model, device, options).eval()
    loader = step.RepeatedBatch([pixels], labels, device, options.channels_last, count=-(-args.images // args.batch))
    if version == "baseline":
        return lambda: baseline.evaluate(model, loader, args.classes)
    state = TrainState("i", model, None, None, device, options)
    train_counts = torch.ones(args.classes, dtype=torch.long)

    def ours():
        with common.quiet():
            return evaluate(model, loader, ("linear",), train_counts, state)

    return ours


def whole(version, args):
    """An evaluator with the network."""
    torch.manual_seed(0)
    variant = "float32" if version == "baseline" else version
    options = step.script_args("i", variant, args.arch, args.classes, args.size, queue=8)
    pixels = torch.randint(256, (args.batch, 3, args.size, args.size), dtype=torch.uint8).to(args.device)
    labels = torch.randint(args.classes, (args.batch,)).to(args.device)
    return evaluator(version, step.network("i", options), pixels, labels, options, args)


def counting(version, args):
    """An evaluator with random logits in place of a network."""
    options = ssd_stage_i.get_parser().parse_args(["."])
    logits = torch.randn(args.batch, args.classes, device=args.device)
    labels = torch.randint(args.classes, (args.batch,), device=args.device)
    pixels = torch.zeros(args.batch, 3, 1, 1, dtype=torch.uint8, device=args.device)
    return evaluator(version, FixedLogits(logits), pixels, labels, options, args)


def measure(name, args):
    """In a fresh process: prints the peak memory; name: a version, or counting:version."""
    if name.startswith("counting:"):
        version, images = name.removeprefix("counting:"), args.images
        args.images = args.batch
        counting(version, args)()  # loads what the libraries load in their first call
        args.images = images
        common.report_peak(counting(version, args), args.device, above=True)
    else:
        common.report_peak(lambda: whole(name, args)(), args.device, above=False)


HEADERS = ("images", "version", "images/s", "times as fast", "peak memory")


def table_rows(make, prefix, versions, args, argv) -> list[tuple[str, ...]]:
    """One row per version; make: whole or counting."""
    taken = common.medians({version: make(version, args) for version in versions}, args.repeats, args.device)
    options, rows = [*argv, "--images", str(args.images)], []
    for version in versions:
        peak = None
        if not args.no_memory:
            peak = common.in_fresh_process("benchmarks.evaluate", options, prefix + version)
        rows.append((
            f"{args.images:,}", version, f"{args.images / taken[version]:.1f}",
            f"{taken['baseline'] / taken[version]:.2f}", common.mib(peak),
        ))  # fmt: skip
    return rows


def tables(args, argv) -> list[common.Table]:
    """Evaluations with the network, and by number of images with --scaling."""
    title = f"{common.command('benchmarks.evaluate', argv)}; {common.machine(args.device)}"
    rows = table_rows(whole, "", ["baseline", *args.variants], args, argv)
    found = [common.Table("evaluate", title, HEADERS, rows)]
    if args.scaling:
        rows = []
        for images in args.scaling_images:
            args.images = images
            rows += table_rows(counting, "counting:", ["baseline", "counts"], args, argv)
        headers = (*HEADERS[:-1], "peak above the start")
        found.append(common.Table("evaluate by images", title, headers, rows))
    return found


def main(argv=None) -> int:
    parser = common.argument_parser(__doc__, "evaluate", repeats=5)
    size = whole_number(1)
    parser.add_argument("--arch", default="resnext50_32x4d", choices=ARCHS, metavar="ARCH")
    parser.add_argument("--size", type=whole_number(8), default=224, metavar="S", help="side of the images")
    parser.add_argument("--batch", type=size, default=16, metavar="N")
    parser.add_argument("--images", type=size, default=64, metavar="N")
    parser.add_argument("--classes", type=size, default=1000, metavar="C")
    default = VARIANTS if torch.cuda.is_available() else VARIANTS[:-1]
    parser.add_argument("--variants", nargs="+", default=default, choices=VARIANTS)
    parser.add_argument("--scaling-images", type=size, nargs="+", default=SCALING_IMAGES, metavar="N")
    return common.run(parser, argv, tables, measure)


if __name__ == "__main__":
    sys.exit(main())
