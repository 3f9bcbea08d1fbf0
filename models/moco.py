"""What stage I takes from momentum contrast (He et al., 2020): momentum encoder, queue, shuffling BN."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


@torch.no_grad()
def momentum_update(online: nn.Module, momentum: nn.Module, m: float):
    """theta_k <- m theta_k + (1 - m) theta_q, for the parameters, not the BatchNorm buffers."""
    targets, sources = list(momentum.parameters()), list(online.parameters())
    if targets:  # an encoder without parameters is allowed
        torch._foreach_lerp_(targets, sources, 1 - m)


def new_queue(dim: int, size: int) -> dict[str, torch.Tensor]:
    """Buffers of a fresh labelled ring: random unit keys (dim, size), labels -1 (no class), the write position."""
    return {
        "queue": F.normalize(torch.randn(dim, size), dim=0),
        "label_queue": torch.full((size,), -1),
        "queue_ptr": torch.zeros(1, dtype=torch.long),
    }


@torch.no_grad()
def enqueue(queue, label_queue, queue_ptr, keys, labels):
    """Replaces the oldest entries of the ring, in place, wrapping at its end.

    queue (dim, K), label_queue (K,), queue_ptr (1,): the buffers; keys (N, dim) and labels (N,) with N <= K.
    A key that is not finite leaves the entry it would replace as it was: a half-precision overflow must not
    stay among the negatives for a whole turn of the ring. Raises ValueError where N > K.
    """
    size, count = queue.shape[1], len(keys)
    if count > size:
        raise ValueError(f"a queue of {size} keys cannot take a batch of {count}; make the queue larger (--moco-k)")
    slots = (queue_ptr + torch.arange(count, device=queue.device)) % size
    keep = keys.isfinite().all(dim=1)
    queue[:, slots] = torch.where(keep, keys.T.to(queue.dtype), queue[:, slots])
    label_queue[slots] = torch.where(keep, labels.to(label_queue.dtype), label_queue[slots])
    queue_ptr.add_(count).remainder_(size)


def _world():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@torch.no_grad()
def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """The tensors (N, ...) of all ranks, concatenated in the order of ranks; the tensor itself without a group."""
    if _world() == 1:
        return tensor
    gathered = [torch.empty_like(tensor) for _ in range(_world())]
    dist.all_gather(gathered, tensor.contiguous())
    return torch.cat(gathered)


@torch.no_grad()
def shuffled(encoder, images: torch.Tensor) -> torch.Tensor:
    """encoder(images), with the batch shuffled across ranks before it and unshuffled after (shuffling BN).

    So the BatchNorm statistics of a key come from other images than those of its query, and leak nothing.
    images (n, ...) a rank, the same n on all of them; returns (n, d). Within one process it is encoder(images).
    """
    world = _world()
    if world == 1:
        return encoder(images)
    total = world * len(images)
    order = torch.randperm(total).to(images.device)
    dist.broadcast(order, src=0)
    mine = slice(dist.get_rank() * len(images), (dist.get_rank() + 1) * len(images))
    features = encoder(all_gather(images)[order[mine]])
    return all_gather(features)[order.argsort()[mine]]
