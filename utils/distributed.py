"""What the processes of a run say to each other. In a process without a group, each of these is the identity."""

import contextlib
from typing import NamedTuple

import torch.distributed as dist

from .errors import UserError


class DistInfo(NamedTuple):
    """Who this process is: rank of world_size processes in all, local_rank of local_world_size on its node.

    launcher: plain, spawn, torchrun, srun, or node (one process per node, by flags). url: where the processes meet.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: str = "plain"
    url: str | None = None

    @property
    def nodes(self) -> int:
        return self.world_size // self.local_world_size


_dist_info = DistInfo()


def set_dist_info(info: DistInfo):
    """Called once by utils.launch, in every process, before main_worker."""
    global _dist_info
    _dist_info = info


def get_dist_info() -> DistInfo:
    return _dist_info


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(tensor, op=dist.ReduceOp.SUM):
    """The sum, or whatever op says, over all ranks; in place."""
    if world() > 1:
        dist.all_reduce(tensor, op)
    return tensor


def gather_objects(value) -> list:
    """The values of all ranks, small picklable ones."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def broadcast_buffers(model):
    """Gives all ranks rank 0's BatchNorm statistics, the ones that checkpoints hold."""
    if world() > 1:
        for name, buffer in model.named_buffers():
            if "queue" not in name:  # the same on all ranks by construction, and large
                dist.broadcast(buffer, src=0)


@contextlib.contextmanager
def together():
    """A user's mistake that any rank meets within is raised on all of them, in the words of the first."""
    mistake = None
    try:
        yield
    except UserError as error:
        mistake = str(error)
    first = next((text for text in gather_objects(mistake) if text is not None), None)
    if first is not None:
        raise UserError(first, on_all_ranks=True) from None
