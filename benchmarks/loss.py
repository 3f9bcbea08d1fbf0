"""The contrastive loss of stage I, forward and backward: streamed over the queue, compared with the plain formula.

    python -m benchmarks.loss [--batch 256] [--queue 115712] [--scaling]

Memory is the peak in addition to the inputs: queries, keys, labels and queue.
"""

import sys
import time

import torch

from benchmarks import common
from models import contrastive_loss, contrastive_loss_plain
from utils.command_line import whole_number

LOSSES = {"ours": contrastive_loss, "baseline": contrastive_loss_plain}
SCALING_QUEUES = (8192, 32768, 115712, 262144, 524288, 1048576)
SCALING_BATCHES = (32, 64, 128, 256, 512, 1024)
TEMPERATURE = 0.2


def inputs(batch, queue, args) -> tuple:
    """The arguments of a loss: random unit vectors and labels."""
    generator = torch.Generator(args.device).manual_seed(0)

    def unit(*shape, dim):
        vectors = torch.randn(*shape, generator=generator, device=args.device)
        return vectors.div_(vectors.norm(dim=dim, keepdim=True))

    def classes(count):
        return torch.randint(args.classes, (count,), generator=generator, device=args.device)

    q, k = unit(batch, args.dim, dim=1).requires_grad_(), unit(batch, args.dim, dim=1)
    return q, k, classes(batch), unit(args.dim, queue, dim=0), classes(queue), TEMPERATURE


def call(loss, given):
    """A function without arguments that computes the loss and its gradient."""

    def forward_and_backward():
        given[0].grad = None
        loss(*given).backward()

    return forward_and_backward


def gradient(loss, given) -> torch.Tensor:
    """The gradient with respect to the queries."""
    return torch.autograd.grad(loss(*given), given[0])[0]


def measure(name, args):
    """In a fresh process: prints the peak memory beyond the inputs; name: of the loss."""
    given = inputs(args.batch, args.queue, args)
    call(LOSSES[name], inputs(args.batch, 8, args))()  # loads what the libraries load in their first call
    common.report_peak(call(LOSSES[name], given), args.device, above=True)


def table_rows(batch, queue, args, argv) -> list[tuple[str, ...]]:
    """One row per loss."""
    given = inputs(batch, queue, args)
    gradients = {name: gradient(loss, given) for name, loss in LOSSES.items()}
    scale = gradients["baseline"].norm()
    clock = time.process_time if args.cpu_time else time.perf_counter
    functions = {name: call(loss, given) for name, loss in LOSSES.items()}
    taken = common.medians(functions, args.repeats, args.device, clock)
    options = [*argv, "--batch", str(batch), "--queue", str(queue)]
    peaks = {n: None if args.no_memory else common.in_fresh_process("benchmarks.loss", options, n) for n in LOSSES}
    return [
        (
            f"{batch} x {queue:,}", name, f"{taken[name] * 1e3:.1f} ms", f"{taken['baseline'] / taken[name]:.2f}",
            common.mib(peaks[name]), f"{(gradients[name] - gradients['baseline']).norm() / scale:.1e}",
        )
        for name in LOSSES
    ]  # fmt: skip


HEADERS = (
    "batch x queue",
    "version",
    "forward and backward",
    "times as fast",
    "peak above inputs",
    "gradient differs by",
)


def tables(args, argv) -> list[common.Table]:
    """The losses, and by queue and by batch with --scaling."""
    title = f"{common.command('benchmarks.loss', argv)}; {common.machine(args.device)}"
    found = [common.Table("loss", title, HEADERS, table_rows(args.batch, args.queue, args, argv))]
    if args.scaling:
        by_queue = [row for queue in args.scaling_queues for row in table_rows(args.batch, queue, args, argv)]
        by_batch = [row for batch in args.scaling_batches for row in table_rows(batch, args.queue, args, argv)]
        found += [
            common.Table("loss by queue", title, HEADERS, by_queue),
            common.Table("loss by batch", title, HEADERS, by_batch),
        ]
    return found


def main(argv=None) -> int:
    parser = common.argument_parser(__doc__, "loss", repeats=7)
    size = whole_number(1)
    # fmt: off
    parser.add_argument("--cpu-time", action="store_true",
        help="measure processor time, not wall-clock time: for a busy machine; set OMP_NUM_THREADS=1, since the time "
        "of all threads is added up")
    # fmt: on
    parser.add_argument("--batch", type=size, default=256, metavar="N")
    parser.add_argument("--queue", type=size, default=115712, metavar="K")
    parser.add_argument("--dim", type=size, default=128, metavar="D")
    parser.add_argument("--classes", type=size, default=1000, metavar="C")
    parser.add_argument("--scaling-queues", type=size, nargs="+", default=SCALING_QUEUES, metavar="K")
    parser.add_argument("--scaling-batches", type=size, nargs="+", default=SCALING_BATCHES, metavar="N")
    return common.run(parser, argv, tables, measure)


if __name__ == "__main__":
    sys.exit(main())
