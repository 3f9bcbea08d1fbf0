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

    q = unit(batch, args.dim, dim=1).requires_grad_()
    k = unit(batch, args.dim, dim=1)
    return q, k, classes(batch), unit(args.dim, queue, dim=0), classes(queue), TEMPERATURE


def call(loss, given):
    """A function without arguments that returns the gradient of the loss with respect to the queries."""
    return lambda: torch.autograd.grad(loss(*given), given[0])[0]


def measure(name, args):
    """In a fresh process: prints the peak memory beyond the inputs; name: of the loss."""
    given = inputs(args.batch, args.queue, args)
    call(LOSSES[name], inputs(args.batch, 8, args))()  # loads what the libraries load in their first call
    common.report_peak(call(LOSSES[name], given), args.device, above=True)


def table_rows(batch, queue, args, argv) -> list[tuple[str, ...]]:
    """One row per loss."""
    given = inputs(batch, queue, args)
    functions = {name: call(loss, given) for name, loss in LOSSES.items()}
    gradients = {name: function() for name, function in functions.items()}
    scale = gradients["baseline"].norm()
    clock = time.process_time if args.cpu_time else time.perf_counter
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
    "batch x queue", "version", "forward and backward", "times as fast", "peak above inputs", "gradient differs by",
)  # fmt: skip


def tables(args, argv) -> list[common.Table]:
    """The losses, and by queue and by batch with --scaling."""
    title = f"{common.command('benchmarks.loss', argv)}; {common.machine(args.device)}"
    sizes = {"loss": [(args.batch, args.queue)]}
    if args.scaling:
        sizes["loss by queue"] = [(args.batch, queue) for queue in args.scaling_queues]
        sizes["loss by batch"] = [(batch, args.queue) for batch in args.scaling_batches]
    return [
        common.Table(name, title, HEADERS, [row for size in own for row in table_rows(*size, args, argv)])
        for name, own in sizes.items()
    ]


def main(argv=None) -> int:
    parser = common.argument_parser(__doc__, "loss", repeats=7)
    size = whole_number(1)
    # fmt: off
    parser.add_argument("--cpu-time", action="store_true",
        help="measure processor time, not wall-clock time: for a busy machine; set OMP_NUM_THREADS=1, since the time "
        "of all threads is added up")
    # fmt: on
    add = parser.add_argument
    add("--batch", type=size, default=256, metavar="N")
    add("--queue", type=size, default=115712, metavar="K")
    add("--dim", type=size, default=128, metavar="D")
    add("--classes", type=size, default=1000, metavar="C")
    add("--scaling-queues", type=size, nargs="+", default=SCALING_QUEUES, metavar="K")
    add("--scaling-batches", type=size, nargs="+", default=SCALING_BATCHES, metavar="N")
    return common.run(parser, argv, tables, measure)


if __name__ == "__main__":
    sys.exit(main())
