"""The contrastive loss of stage I, forward and backward: streamed over the queue against the whole matrix of scores.

    python -m benchmarks.loss [--batch 256] [--queue 115712] [--scaling]

Memory is the peak above the inputs: queries, keys, labels and the queue.
"""

import sys

import torch

from benchmarks import common
from models import contrastive_loss, contrastive_loss_plain

LOSSES = {"ours": contrastive_loss, "textbook": contrastive_loss_plain}
SCALING_QUEUES = (8192, 32768, 115712, 262144, 524288, 1048576)
SCALING_BATCHES = (32, 64, 128, 256, 512, 1024)
TEMPERATURE = 0.2


def inputs(batch, queue, args) -> tuple:
    """Arguments of a loss: random unit vectors and labels."""
    generator = torch.Generator(args.device).manual_seed(0)

    def unit(*shape, dim):
        vectors = torch.randn(*shape, generator=generator, device=args.device)
        return vectors.div_(vectors.norm(dim=dim, keepdim=True))

    def classes(count):
        return torch.randint(args.classes, (count,), generator=generator, device=args.device)

    q, k = unit(batch, args.dim, dim=1).requires_grad_(), unit(batch, args.dim, dim=1)
    return q, k, classes(batch), unit(args.dim, queue, dim=0), classes(queue), TEMPERATURE


def call(loss, given):
    def forward_and_backward():
        given[0].grad = None
        loss(*given).backward()

    return forward_and_backward


def gradient(loss, given) -> torch.Tensor:
    return torch.autograd.grad(loss(*given), given[0])[0]


def measure(name, args):
    """A fresh process's part: peak memory above the inputs."""
    given = inputs(args.batch, args.queue, args)
    call(LOSSES[name], inputs(args.batch, 8, args))()  # loads what the libraries load on their first call
    common.report_peak(call(LOSSES[name], given), args.device, above=True)


def rows(batch, queue, args, argv) -> list[tuple[str, ...]]:
    """One line a loss."""
    given = inputs(batch, queue, args)
    gradients = {name: gradient(loss, given) for name, loss in LOSSES.items()}
    scale = gradients["textbook"].norm()
    taken = common.alternate({name: call(loss, given) for name, loss in LOSSES.items()}, args.repeats, args.device)
    options = [*argv, "--batch", str(batch), "--queue", str(queue)]
    peaks = {n: None if args.no_memory else common.in_fresh_process("benchmarks.loss", options, n) for n in LOSSES}
    return [
        (
            f"{batch} x {queue:,}", name, f"{taken[name] * 1e3:.1f} ms", f"{taken['textbook'] / taken[name]:.2f}",
            common.mib(peaks[name]), f"{(gradients[name] - gradients['textbook']).norm() / scale:.1e}",
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
    title = f"{common.command('benchmarks.loss', argv)}; {common.machine(args.device)}"
    found = [common.Table("loss", title, HEADERS, rows(args.batch, args.queue, args, argv))]
    if args.scaling:
        by_queue = [row for queue in args.scaling_queues for row in rows(args.batch, queue, args, argv)]
        by_batch = [row for batch in args.scaling_batches for row in rows(batch, args.queue, args, argv)]
        found += [
            common.Table("loss by queue", title, HEADERS, by_queue),
            common.Table("loss by batch", title, HEADERS, by_batch),
        ]
    return found


def main(argv=None) -> int:
    parser = common.argument_parser(__doc__, "loss", repeats=7)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--queue", type=int, default=115712)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--scaling-queues", type=int, nargs="+", default=SCALING_QUEUES, metavar="K")
    parser.add_argument("--scaling-batches", type=int, nargs="+", default=SCALING_BATCHES, metavar="N")
    return common.run(parser, argv, tables, measure)


if __name__ == "__main__":
    sys.exit(main())
