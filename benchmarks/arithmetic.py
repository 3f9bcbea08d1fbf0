"""What training at the published size asks of disk, processors and network, counted from the networks; no timing.

    python -m benchmarks.arithmetic [--gpus 1 8 64] [--batch 256] [--gpu-tflops 60] [--network-gbit 200]

--batch is a node's, as of the training scripts; a node has 8 GPUs. Three figures cannot be counted and are assumed:
the rate that a GPU keeps up in a training step, the network's rate of a node, and the mean size of an image file
(ImageNet's). The time of an image at a worker is to be measured by benchmarks.loader, on the machine in question.
"""

import argparse
import functools
import sys
from argparse import Namespace

import torch

from benchmarks import common, step, textbook

NODE = 8  # GPUs
STAGES = ("i", "ii", "iii")


@functools.cache
def counted(stage, arch, classes, queue, size) -> dict[str, float]:
    """Parameters trained and frozen, and floating point operations of a step an image."""
    args = Namespace(arch=arch, classes=classes, queue=queue, size=size, device="cpu")
    with torch.device("meta"):
        parameters = list(step.network(stage, args).parameters())
    return {
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
        "frozen": sum(p.numel() for p in parameters if not p.requires_grad),
        "flops": step.step_flops(stage, args),
    }


def gathered(stage, batch, args) -> dict[str, int]:
    """Bytes a rank holds after the gathers of a step, by what was gathered; batch: images a step of all ranks."""
    if stage != "i":
        return {}
    return {
        "key images": batch * 3 * args.size**2 * 4,
        "keys, twice": 2 * batch * args.dim * 4,
        "labels": batch * 8,
    }


def queue_bytes(args) -> int:
    """The queue and its labels, on each GPU."""
    return args.queue * (args.dim * 4 + 8)


def describe(number: float) -> str:
    """Bytes in decimal units."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} B"


def network_rows(args) -> list[tuple[str, ...]]:
    lines = []
    for stage in STAGES:
        count = counted(stage, args.arch, args.classes, args.queue, args.size)
        gathers = gathered(stage, args.batch, args)
        lines.append((
            stage.upper(), f"{count['trained'] / 1e6:.3f} M", f"{count['frozen'] / 1e6:.2f} M",
            f"{count['flops'] / 1e9:.1f} G", describe(4 * count["trained"]), describe(sum(gathers.values())),
            describe(queue_bytes(args)) if stage == "i" else "none",
        ))  # fmt: skip
    return lines


def demand_rows(args) -> list[tuple[str, ...]]:
    """What each stage asks for on each number of GPUs, where the GPUs compute all the time."""
    lines = []
    for stage in STAGES:
        count = counted(stage, args.arch, args.classes, args.queue, args.size)
        images_per_gpu = args.gpu_tflops * 1e12 / count["flops"]
        views = textbook.STAGES[stage].views
        for gpus in args.gpus:
            nodes = -(-gpus // NODE)
            rate = images_per_gpu * gpus
            batch = args.batch * nodes
            compute = batch / rate
            # A ring brings a node all but its own part of what is gathered, and twice the gradients but its part.
            share = (nodes - 1) / nodes
            received = share * (sum(gathered(stage, batch, args).values()) + 2 * 4 * count["trained"])
            cores = [rate / nodes * ms / 1e3 for ms in (args.pil_ms[views - 1], args.device_ms[views - 1])]
            lines.append((
                f"{stage.upper()}, {gpus}", f"{rate:,.0f}", describe(rate * args.image_kb * 1e3) + "/s",
                f"{cores[0]:.0f}, {cores[1]:.0f}", f"{compute * 1e3:.1f} ms", describe(received),
                f"{received * 8 / args.network_gbit / 1e6:.1f} ms",
            ))  # fmt: skip
    return lines


def tables(args, argv) -> list[common.Table]:
    title = common.command("benchmarks.arithmetic", argv)
    network = ("stage", "trained", "frozen", "operations an image", "all-reduced", "all-gathered", "queue a GPU")
    demand = (
        "stage, GPUs", "images/s", "read from disk", "cores a node: pil, device", "computation of a step",
        "received a node and step", "which takes",
    )  # fmt: skip
    (pil_one, pil_two), (device_one, device_two) = args.pil_ms, args.device_ms
    assumed = (
        f"{title}: {args.gpu_tflops:g} TFLOP/s a GPU, {args.network_gbit:g} Gbit/s a node and {args.image_kb:g} kB an "
        f"image assumed; an image at a worker, for one view and for two: {pil_one:g} and {pil_two:g} ms (pil), "
        f"{device_one:g} and {device_two:g} ms (device)"
    )
    return [
        common.Table("network", f"{title}: bytes a step of {args.batch} images", network, network_rows(args)),
        common.Table("demand", assumed, demand, demand_rows(args)),
    ]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.arithmetic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", default="resnext50_32x4d")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--queue", type=int, default=115712)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--batch", type=int, default=256, help="images a step and node")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument(
        "--gpu-tflops", type=float, default=60, help="assumed; in a training step, not the data sheet's"
    )
    parser.add_argument("--network-gbit", type=float, default=200, help="assumed; of a node")
    parser.add_argument("--image-kb", type=float, default=110, help="mean size of a file; ImageNet's by default")
    times = {"type": float, "nargs": 2, "metavar": ("ONE", "TWO")}
    parser.add_argument("--pil-ms", default=[2.6, 5.0], help="milliseconds an image at a worker, by views", **times)
    parser.add_argument("--device-ms", default=[1.4, 2.0], help="the same with --augment device", **times)
    parser.add_argument("--write", metavar="FILE", help="put the tables into this file too, at their marks")
    return common.run(parser, argv, tables)


if __name__ == "__main__":
    sys.exit(main())
