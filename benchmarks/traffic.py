"""What the ranks of a run send each other in a training step: counted on gloo processes of this machine, by formula.

    python -m benchmarks.traffic [--processes 1 2 4] [--write docs/scaling.md]

The steps are those of the scripts' train_one_epoch on a CPU; no time is measured. Every function of torch.distributed
that the code calls in a step is replaced by one that first adds up the bytes that arrive from other ranks; the buckets
of DistributedDataParallel are reduced by such a function too. all_reduce is counted as a ring, which passes
2 (p - 1)/p of a tensor through each of p ranks. The formulas are those of `received`.
"""

import math
import sys
import tempfile
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from benchmarks import common, step
from models import ARCHS
from utils.command_line import ArgumentParser, whole_number
from utils.distributed import distribute

PER_RANK = 32  # images, in the table by ranks
UNEXPECTED = (  # functions that no step calls; if one does, its bytes are missing here
    "all_gather_into_tensor", "all_gather_object", "all_to_all", "barrier", "broadcast_object_list", "gather",
    "gather_object", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter", "send", "recv",
)  # fmt: skip


# ---- by formula


def received(stage, images, batch, trained, args) -> dict[str, float]:
    """Bytes that a rank receives from the others per step, by content.

    images: those of the step's batch that belong to it. Of the images whose keys it computes, the share images / batch
    is its own on average, since shuffling BN deals them out at random, in an order that one rank sends to the others;
    keys come back as images went. The gradients of the trained parameters, and three flags, pass twice through a ring.
    """
    others = batch - images
    reduced = {"gradients": 2 * 4 * trained * others / batch, "flags": 2 * 3 * 4 * others / batch}
    if stage != "i":
        return reduced
    return {
        "order of the shuffle": 8 * others,
        "key images": images * others / batch * 3 * args.size**2 * 4,
        "keys of own images": images * others / batch * args.dim * 4,
        "keys and labels for the queue": others * (args.dim * 4 + 8),
        **reduced,
    }


def calculated(stage: str, world_size: int, batch: int, args) -> dict[str, float]:
    """Bytes that one of `world_size` ranks receives in a step of `batch` images of all of them, by content."""
    with torch.device("meta"):
        parameters = step.network(stage, step.script_args(stage, "float32", args)).parameters()
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return received(stage, batch / world_size, batch, trained, args)


# ---- counting


def ring(size: int) -> float:
    """Bytes that a rank receives if a ring reduces `size` bytes."""
    world_size = dist.get_world_size()
    return 2 * (world_size - 1) / world_size * size


def counted_functions(counts: Counter) -> dict:
    """Replacements of torch.distributed's functions, by name, that add the bytes received to `counts`, by content."""
    rank = dist.get_rank()
    others = dist.get_world_size() - 1
    originals = {name: getattr(dist, name) for name in ("all_reduce", "all_gather", "all_to_all_single", "broadcast")}

    def all_reduce(tensor, *args, **kwargs):  # called by the hook for a bucket of gradients, and for the flags
        counts["gradients" if tensor.is_floating_point() else "flags"] += ring(tensor.nbytes)
        return originals["all_reduce"](tensor, *args, **kwargs)

    def all_gather(outputs, tensor):
        counts["keys and labels for the queue"] += others * tensor.nbytes
        return originals["all_gather"](outputs, tensor)

    def all_to_all_single(output, tensor, received, sent):
        rows = sum(number for source, number in enumerate(received) if source != rank)
        content = "key images" if output.dim() == 4 else "keys of own images"
        counts[content] += rows * math.prod(output.shape[1:]) * output.element_size()
        return originals["all_to_all_single"](output, tensor, received, sent)

    def broadcast(tensor, src):
        counts["order of the shuffle"] += tensor.nbytes if rank != src else 0
        return originals["broadcast"](tensor, src)

    counted = {f.__name__: f for f in (all_reduce, all_gather, all_to_all_single, broadcast)}
    errors = {
        name: RuntimeError(f"a step calls {name}, which benchmarks.traffic does not count") for name in UNEXPECTED
    }
    return counted | {name: mock.Mock(side_effect=error) for name, error in errors.items()}


def steps_of_a_rank(rank: int, world_size: int, stage: str, args, folder: str):
    """Takes the steps of one of the processes; writes the bytes that it received to folder/<rank>."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    ours = step.Ours(stage, "float32", args)
    counts = Counter()
    model = distribute(ours.model, ours.device)
    if world_size > 1:
        model.register_comm_hook(None, allreduce_hook)  # reduces buckets as without it, in a function that is counted
    views, labels = step.make_batch(stage, args.batch // world_size, args)
    loader = step.RepeatedBatch(views, labels, ours.device, count=args.steps)
    with mock.patch.multiple(dist, **counted_functions(counts)):
        ours.train(model, loader)
    Path(folder, str(rank)).write_text("".join(f"{size} {content}\n" for content, size in counts.items()))
    del model, ours, loader  # with the hook's last futures, which otherwise may keep the process from ending
    dist.destroy_process_group()


def measured(stage: str, world_size: int, args) -> dict[str, float]:
    """Bytes that a rank receives in a step, by content; means over ranks and steps."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(steps_of_a_rank, (world_size, stage, args, folder), world_size, start_method="spawn")
        total = Counter()
        for rank in range(world_size):
            for line in Path(folder, str(rank)).read_text().splitlines():
                size, content = line.split(" ", 1)
                total[content] += float(size) / world_size / args.steps
    return dict(total)


# ---- tables


def describe(number: float) -> str:
    """A number of bytes as text, in decimal units."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} B"


def measured_rows(args) -> list[tuple[str, ...]]:
    """One row per stage, number of processes and content."""
    rows = []
    for stage in args.stages:
        for world_size in args.processes:
            found = measured(stage, world_size, args)
            expected = calculated(stage, world_size, args.batch, args)
            if world_size == 1:
                found, expected = ({"all": sum(values.values())} for values in (found, expected))
            for content in [*expected, *(name for name in found if name not in expected)]:
                there = found.get(content, 0), expected.get(content, 0)
                rows.append((f"{stage.upper()}, {world_size}", content, *map(describe, there)))
                common.note(rows[-1])
    return rows


def growth_rows(args) -> list[tuple[str, ...]]:
    """One row per stage and content: bytes by number of ranks, each with the same images per rank."""
    rows = []
    for stage in args.stages:
        by_ranks = [calculated(stage, ranks, ranks * PER_RANK, args) for ranks in args.ranks]
        for content in by_ranks[0]:
            rows.append((stage.upper(), content, *(describe(found[content]) for found in by_ranks)))
        rows.append((stage.upper(), "sum", *(describe(sum(found.values())) for found in by_ranks)))
    return rows


def tables(args, argv) -> list[common.Table]:
    """What is counted, and what the formulas give for more ranks."""
    torch.set_num_threads(1)  # as in the processes, for the title
    command = common.command("benchmarks.traffic", argv)
    counted = f"{command}; {args.arch}, {args.size} pixels, steps of {args.batch} images; {common.machine('cpu')}"
    calculated = f"{command}; calculated, {PER_RANK} images per rank"
    ranks = [f"{ranks} rank{'s' if ranks > 1 else ''}" for ranks in args.ranks]
    return [
        common.Table(
            "traffic", counted, ("stage, processes", "content", "measured", "by formula"), measured_rows(args)
        ),
        common.Table("traffic by ranks", calculated, ("stage", "content", *ranks), growth_rows(args)),
    ]


def get_parser() -> ArgumentParser:
    parser = common.argument_parser(__doc__, "traffic")
    size = whole_number(1)
    # fmt: off
    parser.add_argument("--stages", nargs="+", default=list(step.SCRIPTS), choices=step.SCRIPTS)
    parser.add_argument("--processes", type=size, nargs="+", default=[1, 2, 4], metavar="N")
    parser.add_argument("--steps", type=size, default=2, metavar="N", help="steps to count (default: %(default)s)")
    parser.add_argument("--batch", type=whole_number(2), default=16, metavar="N",
        help="images per step of all processes (default: %(default)s)")
    parser.add_argument("--arch", default="resnext50_32x4d", choices=ARCHS, metavar="ARCH")
    parser.add_argument("--size", type=whole_number(8), default=224, metavar="S", help="side of the images")
    parser.add_argument("--classes", type=size, default=1000, metavar="C")
    parser.add_argument("--queue", type=size, default=115712, metavar="K")
    parser.add_argument("--ranks", type=size, nargs="+", default=[1, 8, 64, 512], metavar="N",
        help="numbers of ranks to calculate for (default: 1 8 64 512)")
    # fmt: on
    parser.set_defaults(device="cpu", dim=128)
    return parser


def main(argv=None) -> int:
    return common.run(get_parser(), argv, tables)


if __name__ == "__main__":
    sys.exit(main())
