"""Evaluation of a list: counts a class, kept up to date, against the logits of all images, kept until the end.

    python -m benchmarks.evaluate [--batch 16] [--images 64] [--scaling]

Ours is timed in float32, with channels_last and with bf16. The peak is that of a process that evaluates the images.
--scaling leaves the network out, logits are drawn at random, to show how time and memory above the start grow with the
number of images.
"""

import sys

import torch

from benchmarks import common, textbook
from models import SSFL
from models.preprocess import normalize
from utils import evaluate
from utils.numerics import AUTOCAST

VARIANTS = {"float32": (False, "none"), "channels_last": (True, "none"), "bf16": (True, "bf16"), "fp16": (True, "fp16")}
SCALING_IMAGES = (4096, 16384, 65536, 262144)


def pass_over(version, args):
    """A function of no arguments that evaluates --images images with the version."""
    torch.manual_seed(0)
    channels_last, amp = VARIANTS.get(version, (False, "none"))
    layout = torch.channels_last if channels_last else torch.preserve_format
    network = SSFL(args.arch, args.classes, queue_size=8).to(device=args.device, memory_format=layout).eval()
    pixels = torch.randint(256, (args.batch, 3, args.size, args.size), dtype=torch.uint8).to(args.device)
    labels = torch.randint(args.classes, (args.batch,)).to(args.device)

    def batches():
        for _ in range(-(-args.images // args.batch)):
            yield normalize(pixels).to(memory_format=layout), labels

    def predict(images):
        with torch.no_grad(), torch.autocast(args.device, AUTOCAST.get(amp), enabled=amp != "none"):
            return network(images)

    if version == "textbook":
        return lambda: textbook.evaluate(predict, batches(), args.classes)
    return lambda: ours(lambda images: (predict(images),), batches(), args)


def ours(predict, batches, args):
    return evaluate.evaluate(predict, batches, ("linear",), torch.ones(args.classes, dtype=torch.long), args.device)


def counting(version, args):
    """As pass_over, without a network: the same random logits for every batch."""
    logits = torch.randn(args.batch, args.classes, device=args.device)
    labels = torch.randint(args.classes, (args.batch,), device=args.device)

    def batches():
        for _ in range(-(-args.images // args.batch)):
            yield logits, labels

    if version == "textbook":
        return lambda: textbook.evaluate(torch.clone, batches(), args.classes)
    return lambda: ours(lambda images: (images,), batches(), args)


def measure(name, args):
    """A fresh process's part. name: a version, or counting:version."""
    if name.startswith("counting:"):
        version, images = name.removeprefix("counting:"), args.images
        args.images = args.batch
        counting(version, args)()  # loads what the libraries load on their first call
        args.images = images
        common.report_peak(counting(version, args), args.device, above=True)
    else:
        common.report_peak(lambda: pass_over(name, args)(), args.device, above=False)


HEADERS = ("images", "version", "images/s", "times as fast", "peak memory")


def rows(make, prefix, versions, args, argv) -> list[tuple[str, ...]]:
    """One line a version."""
    taken = common.alternate({version: make(version, args) for version in versions}, args.repeats, args.device)
    options, lines = [*argv, "--images", str(args.images)], []
    for version in versions:
        peak = None
        if not args.no_memory:
            peak = common.in_fresh_process("benchmarks.evaluate", options, prefix + version)
        lines.append((
            f"{args.images:,}", version, f"{args.images / taken[version]:.1f}",
            f"{taken['textbook'] / taken[version]:.2f}", common.mib(peak),
        ))  # fmt: skip
    return lines


def tables(args, argv) -> list[common.Table]:
    title = f"{common.command('benchmarks.evaluate', argv)}; {common.machine(args.device)}"
    lines = rows(pass_over, "", ["textbook", *args.variants], args, argv)
    found = [common.Table("evaluate", title, HEADERS, lines)]
    if args.scaling:
        lines = []
        for images in args.scaling_images:
            args.images = images
            lines += rows(counting, "counting:", ["textbook", "counts"], args, argv)
        headers = (*HEADERS[:-1], "peak above the start")
        found.append(common.Table("evaluate by images", title, headers, lines))
    return found


def main(argv=None) -> int:
    parser = common.argument_parser(__doc__, "evaluate", repeats=5)
    parser.add_argument("--arch", default="resnext50_32x4d")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--classes", type=int, default=1000)
    on_cpu = ["float32", "channels_last", "bf16"]
    default = list(VARIANTS) if torch.cuda.is_available() else on_cpu
    parser.add_argument("--variants", nargs="+", default=default, choices=VARIANTS)
    parser.add_argument("--scaling-images", type=int, nargs="+", default=SCALING_IMAGES, metavar="N")
    return common.run(parser, argv, tables, measure)


if __name__ == "__main__":
    sys.exit(main())
