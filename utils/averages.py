"""Losses and accuracies of an epoch, averaged without waiting for the device."""

import torch

from . import distributed
from .distributed import gather_objects


class Averages:
    """Means over an epoch's steps, summed on the device: reading them is the only thing that waits for it."""

    def __init__(self, device):
        self.names, self.sums, self.steps, self.device = None, None, 0, device

    def add(self, values: dict[str, torch.Tensor]):
        stacked = torch.stack([value.detach().double() for value in values.values()])
        self.names, self.sums = tuple(values), stacked if self.sums is None else self.sums.add_(stacked)
        self.steps += 1

    def means(self) -> dict[str, float]:
        """Of this process."""
        return dict(zip(self.names, (self.sums / self.steps).tolist(), strict=True)) if self.steps else {}

    def global_means(self) -> dict[str, float]:
        """Of all processes; all must call it."""
        if not self.steps:
            return {}
        total = distributed.all_reduce(self.sums.clone()) / (self.steps * distributed.world())
        return dict(zip(self.names, total.tolist(), strict=True))

    def state(self) -> dict:
        """Of all processes, for a checkpoint in the midst of an epoch; all must call it."""
        every = gather_objects(self.sums.tolist() if self.steps else [])
        return {"names": list(self.names or ()), "sums": every, "steps": self.steps}

    def load(self, state: dict):
        sums = state["sums"]
        if len(sums) == distributed.world():
            mine = sums[distributed.rank()]
        else:  # saved by another number of processes: each takes an equal part
            mine = (torch.tensor(sums, dtype=torch.float64).sum(0) / len(sums)).tolist()
        self.names, self.steps = tuple(state["names"]), state["steps"]
        self.sums = torch.tensor(mine, dtype=torch.float64, device=self.device) if self.steps else None


def train_accuracies(logits: dict[str, torch.Tensor], labels) -> dict[str, torch.Tensor]:
    """top1_<classifier> and top5_<classifier> of a batch, in [0, 1]."""
    found = {}
    for name, scores in logits.items():
        hit = scores.detach().topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
        found[f"top1_{name}"] = hit[:, 0].float().mean()
        found[f"top5_{name}"] = hit.any(dim=1).float().mean()
    return found
