"""What training with the published settings needs from disk, processors and network; calculated, not timed.

    python -m benchmarks.arithmetic [--gpus 1 8 64] [--batch 256] [--gpu-tflops 60] [--network-gbit 200]

--batch counts the images per node, as in the training scripts; a node has 8 GPUs. Assumptions, each a flag: the rate of
a GPU in a training step, the rate of a node's network, the mean size of an image file (ImageNet's), and the time that a
worker needs per image, which benchmarks.loader measures on a given machine.
"""

import functools
import sys

import torch

from benchmarks import baseline, common, step
from models import ARCHS
from utils.command_line import ArgumentParser, number, whole_number

NODE = 8  # GPUs
STAGES = ("i", "ii", "iii")


@functools.cache
def counted(stage, arch, classes, queue, dim, size) -> dict[str, float]:
    """The numbers of trained and frozen parameters, and the floating point operations per image of a step."""
    options = step.script_args(stage, "float32", arch, classes, size, queue)
    options.moco_dim = dim
    with torch.device("meta"):
        parameters = list(step.network(stage, options).parameters())
    return {
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
        "frozen": sum(p.numel() for p in parameters if not p.requires_grad),
        "flops": step.step_flops(stage, arch, size),
    }


def received(stage, images, batch, trained, args) -> dict[str, float]:
    """Bytes that a GPU or node receives per step from the others, by content.

    images: those of the step's batch that belong to it. Of the images whose keys it computes, the share images / batch
    is its own on average, since shuffling BN deals them out at random, in an order that one rank sends to the others;
    keys come back as images went. The gradients of the trained parameters, and two flags, pass twice through a ring.
    """
    others = batch - images
    reduced = {"gradients": 2 * 4 * trained * others / batch, "flags": 2 * 8 * others / batch}
    if stage != "i":
        return reduced
    return {
        "order of the shuffle": 8 * others,
        "key images": images * others / batch * 3 * args.size**2 * 4,
        "keys of own images": images * others / batch * args.dim * 4,
        "keys and labels for the queue": others * (args.dim * 4 + 8),
        **reduced,
    }


def queue_bytes(args) -> int:
    """Bytes of the queue and its labels, on each GPU."""
    return args.queue * (args.dim * 4 + 8)


def describe(number: float) -> str:
    """A number of bytes as text, in decimal units."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} B"


def network_rows(args) -> list[tuple[str, ...]]:
    """Rows of what is counted from the network of each stage."""
    rows = []
    for stage in STAGES:
        count = counted(stage, args.arch, args.classes, args.queue, args.dim, args.size)
        exchanged = received(stage, args.batch / NODE, args.batch, 0, args)
        rows.append((
            stage.upper(), f"{count['trained'] / 1e6:.3f} M", f"{count['frozen'] / 1e6:.2f} M",
            f"{count['flops'] / 1e9:.1f} G", describe(4 * count["trained"]), describe(sum(exchanged.values())),
            describe(queue_bytes(args)) if stage == "i" else "none",
        ))  # fmt: skip
    return rows


def demand_rows(args) -> list[tuple[str, ...]]:
    """Rows of what each stage needs on each number of GPUs, so that the GPUs are always busy."""
    rows = []
    for stage in STAGES:
        count = counted(stage, args.arch, args.classes, args.queue, args.dim, args.size)
        images_per_gpu = args.gpu_tflops * 1e12 / count["flops"]
        views = baseline.STAGES[stage].views
        for gpus in args.gpus:
            nodes = -(-gpus // NODE)
            rate = images_per_gpu * gpus
            batch = args.batch * nodes
            compute = batch / rate
            per_gpu, per_node = (
                sum(received(stage, batch / parts, batch, count["trained"], args).values()) for parts in (gpus, nodes)
            )
            cores = [rate / nodes * ms / 1e3 for ms in (args.pil_ms[views - 1], args.device_ms[views - 1])]
            rows.append((
                f"{stage.upper()}, {gpus}", f"{rate:,.0f}", describe(rate * args.image_kb * 1e3) + "/s",
                f"{cores[0]:.0f}, {cores[1]:.0f}", f"{compute * 1e3:.1f} ms", describe(per_gpu),
                describe(per_node), f"{per_node * 8 / args.network_gbit / 1e6:.1f} ms",
            ))  # fmt: skip
    return rows


def tables(args, argv) -> list[common.Table]:
    """Tables of what is counted, and of what follows from it and the assumptions."""
    title = common.command("benchmarks.arithmetic", argv)
    network = (
        "stage",
        "trained",
        "frozen",
        "operations per image",
        "all-reduced",
        "exchanged per GPU",
        "queue per GPU",
    )
    demand = (
        "stage, GPUs", "images/s", "read from disk", "cores per node: pil, device", "computation per step",
        "received per GPU and step", "per node", "which takes",
    )  # fmt: skip
    (pil_one, pil_two), (device_one, device_two) = args.pil_ms, args.device_ms
    assumed = (
        f"{title}; assumed are {args.gpu_tflops:g} TFLOP/s per GPU, {args.network_gbit:g} Gbit/s per node and "
        f"{args.image_kb:g} kB per image; time per image at a worker, for one view and for two: {pil_one:g} and "
        f"{pil_two:g} ms (pil), {device_one:g} and {device_two:g} ms (device)"
    )
    return [
        common.Table(
            "network", f"{title}; bytes per step of {args.batch} images on {NODE} GPUs", network, network_rows(args)
        ),
        common.Table("demand", assumed, demand, demand_rows(args)),
    ]


def main(argv=None) -> int:
    parser = ArgumentParser(__doc__, prog="python -m benchmarks.arithmetic")
    size, rate = whole_number(1), number(above=0)
    parser.add_argument("--arch", default="resnext50_32x4d", choices=ARCHS, metavar="ARCH")
    parser.add_argument("--size", type=whole_number(8), default=224, metavar="S", help="side of the images")
    parser.add_argument("--classes", type=size, default=1000, metavar="C")
    parser.add_argument("--queue", type=size, default=115712, metavar="K")
    parser.add_argument("--dim", type=size, default=128, metavar="D")
    parser.add_argument("--batch", type=size, default=256, metavar="N", help="images per step and node")
    parser.add_argument("--gpus", type=size, nargs="+", default=[1, 8, 64], metavar="N")
    # fmt: off
    parser.add_argument("--gpu-tflops", type=rate, default=60, metavar="X",
        help="assumed rate of a GPU in a training step, not the data sheet's (default: %(default)s)")
    parser.add_argument("--network-gbit", type=rate, default=200, metavar="X",
        help="assumed rate of a node's network (default: %(default)s)")
    parser.add_argument("--image-kb", type=rate, default=110, metavar="X",
        help="mean size of a file (default: %(default)s, ImageNet's)")
    times = {"type": rate, "nargs": 2, "metavar": ("ONE", "TWO")}
    parser.add_argument("--pil-ms", default=[2.6, 5.0],
        help="milliseconds that a worker needs for an image, for one view and for two (default: 2.6 5)", **times)
    parser.add_argument("--device-ms", default=[1.4, 2.0],
        help="the same with --augment device (default: 1.4 2)", **times)
    # fmt: on
    common.add_write_flag(parser)
    return common.run(parser, argv, tables)


if __name__ == "__main__":
    sys.exit(main())
