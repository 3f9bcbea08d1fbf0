"""What stage I takes from momentum contrast (He et al., 2020): momentum encoder, queue, shuffling and split BN."""

import contextlib

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def momentum_update(encoder_q: nn.Module, encoder_k: nn.Module, m: float):
    """theta_k <- m theta_k + (1 - m) theta_q, for the parameters; the BatchNorm buffers stay as they are."""
    params_q = list(encoder_q.parameters())
    params_k = list(encoder_k.parameters())
    if params_k:  # an encoder without parameters is allowed
        torch._foreach_lerp_(params_k, params_q, 1 - m)  # theta_k + (1 - m) (theta_q - theta_k)


def init_queue(dim: int, size: int) -> dict[str, torch.Tensor]:
    """The buffers of a new queue: random unit keys (dim, size), their labels -1 (no class), the write position."""
    return {
        "queue": F.normalize(torch.randn(dim, size), dim=0),
        "label_queue": torch.full((size,), -1),
        "queue_ptr": torch.zeros(1, dtype=torch.long),
    }


@torch.no_grad()
def dequeue_and_enqueue(queue, label_queue, queue_ptr, keys, labels):
    """Replaces the oldest entries of the queue, in place, and wraps around at its end.

    queue (dim, K), label_queue (K,), queue_ptr (1,): the buffers; keys (N, dim) and labels (N,) with N <= K.
    A key that is not finite does not replace its entry: after an overflow in half precision it would stay among the
    negatives until the queue has gone around. (The scripts end such a run anyway, since its loss is not finite.)
    Raises ValueError if N > K.
    """
    size = queue.shape[1]
    count = len(keys)
    if count > size:
        raise ValueError(f"a queue of {size} keys cannot take a batch of {count}; make the queue larger (--moco-k)")
    slots = (queue_ptr + torch.arange(count, device=queue.device)) % size
    finite = keys.isfinite().all(dim=1)
    queue[:, slots] = torch.where(finite, keys.T.to(queue.dtype), queue[:, slots])
    label_queue[slots] = torch.where(finite, labels.to(label_queue.dtype), label_queue[slots])
    queue_ptr.add_(count).remainder_(size)


_exchange = True


@contextlib.contextmanager
def without_exchange():
    """Within the block this process computes as if it were the only one, without waiting for the other ranks."""
    global _exchange
    before = _exchange
    _exchange = False
    try:
        yield
    finally:
        _exchange = before


def _world_size() -> int:
    return dist.get_world_size() if _exchange and dist.is_available() and dist.is_initialized() else 1


@torch.no_grad()
def concat_all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """The tensors (N, ...) of all ranks, concatenated in the order of ranks; the tensor itself without a group."""
    world_size = _world_size()
    if world_size == 1:
        return tensor
    gathered = [torch.empty_like(tensor) for _ in range(world_size)]
    dist.all_gather(gathered, tensor.contiguous())
    return torch.cat(gathered)


@torch.no_grad()
def exchange_rows(rows: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
    """Sends the first sent[0] rows to rank 0, the next sent[1] to rank 1, and so on; returns the rows from all ranks.

    rows: (n, ...); received: how many rows come from each rank, n in all. Returns them as a contiguous (n, ...), in the
    order of the ranks that they come from.
    """
    result = torch.empty_like(rows, memory_format=torch.contiguous_format)
    dist.all_to_all_single(result, rows.contiguous(), received, sent)
    return result


@torch.no_grad()
def forward_shuffle_bn(encoder, images: torch.Tensor, splits: int = 1) -> torch.Tensor:
    """encoder(images), with the batch shuffled over all pieces of all ranks before the encoder and unshuffled after it.

    The BatchNorm statistics of a key then come from other images than those of its query, so they cannot reveal which
    key belongs to which query. images: (n, ...), those of this rank; n is the same on all ranks. Returns (n, d).
    splits: the number of pieces into which SplitBatchNorm splits the n images; with one piece, a single process has
    nothing to shuffle. Each rank receives only the images that it encodes, and sends their features back to their
    owners. The host waits for the device once, to learn how many images go where.
    """
    world_size = _world_size()
    count = len(images)
    if world_size * splits == 1:
        return encoder(images)
    order = torch.randperm(world_size * count, pin_memory=images.is_cuda).to(images.device, non_blocking=True)
    shuffled = torch.empty_like(images)  # keeps channels_last
    if world_size == 1:
        features = encoder(shuffled.copy_(images[order]))
        keys = torch.empty_like(features)
        keys[order] = features
        return keys
    dist.broadcast(order, src=0)
    own = slice(dist.get_rank() * count, (dist.get_rank() + 1) * count)
    sources = order[own] // count  # the ranks that own the images order[own], which this rank encodes
    positions = order.argsort()[own]  # of this rank's images in the shuffled order
    send_order = positions.argsort()  # by destination
    receive_order = sources.argsort(stable=True)  # by source
    ranks = torch.arange(world_size, device=order.device)[:, None]
    sent, received = torch.stack([positions // count == ranks, sources == ranks]).sum(2).tolist()
    shuffled[receive_order] = exchange_rows(images[send_order], sent, received)
    features = encoder(shuffled)
    keys = torch.empty_like(features)
    keys[send_order] = exchange_rows(features[receive_order], received, sent)
    return keys


class SplitBatchNorm(_BatchNorm):
    """BatchNorm that, in train mode, normalizes each of `splits` pieces p of a batch with the piece's own statistics.

        y_i = weight (x_i - mean(x_p)) / sqrt(var(x_p) + eps) + bias    for every image i of piece p

    x: (N, C, ...), N a multiple of splits. The pieces are contiguous, as the ranks' parts of a global batch are. The
    running statistics become the mean over the pieces, as if those of several ranks were averaged. Eval mode is
    BatchNorm's.
    Source: "split BatchNorm" of MoCo's CIFAR-10 demonstration (He et al.), there with strided pieces.
    """

    splits = 1  # set by split_batchnorm

    def _check_input_dim(self, x):
        pass  # (N, C) and anything with further dimensions

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        if len(x) % self.splits:
            raise ValueError(f"{len(x)} images cannot be split into {self.splits} equal pieces")
        momentum = self.momentum
        running = []
        means = variances = [None] * self.splits
        if self.running_mean is not None:
            self.num_batches_tracked.add_(1)
            momentum = 1 / float(self.num_batches_tracked) if momentum is None else momentum
            running = [self.running_mean, self.running_var]
            means, variances = (buffer.repeat(self.splits, 1) for buffer in running)
        pieces = [
            F.batch_norm(piece, mean, variance, self.weight, self.bias, True, momentum or 0.0, self.eps)
            for piece, mean, variance in zip(x.chunk(self.splits), means, variances, strict=True)
        ]
        for buffer, updated in zip(running, (means, variances), strict=False):  # none without running statistics
            buffer.copy_(updated.mean(dim=0))
        return torch.cat(pieces)


def split_batchnorm(module: nn.Module, splits: int) -> nn.Module:
    """Turns every BatchNorm in a module, or the module itself, into a SplitBatchNorm, in place; returns the module.

    With one piece nothing changes. Raises ValueError for a BatchNorm with a forward pass of its own.
    """
    if splits <= 1:
        return module
    for norm in module.modules():
        if isinstance(norm, _BatchNorm):
            if type(norm).forward not in (_BatchNorm.forward, SplitBatchNorm.forward):
                raise ValueError(f"{type(norm).__name__} cannot be split: its forward pass is not BatchNorm's")
            norm.__class__ = SplitBatchNorm
            norm.splits = splits
    return module
