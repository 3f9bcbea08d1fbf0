"""Heads on top of a backbone's features."""

import torch
from torch import nn


def projection_head(width: int, dim: int) -> nn.Sequential:
    """The projection g of stage I (paper, section 3.1; MoCo v2): Linear(width, width), ReLU, Linear(width, dim)."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dim))


class LWS(nn.Module):
    """Learnable weight scaling (Kang et al., 2020): a frozen linear classifier with a trained scale a class.

    Maps features (N, width) to logits (N, num_classes): (W h + b) * s. Only `scales`, at first one, takes a gradient.
    """

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        self.fc = nn.Linear(width, num_classes).requires_grad_(False)
        self.scales = nn.Parameter(torch.ones(num_classes))

    def forward(self, features):
        return self.fc(features) * self.scales
