"""Heads on top of the features of a backbone."""

import torch
from torch import nn


def projection_head(in_dim: int, out_dim: int) -> nn.Sequential:
    """The projection g of stage I (paper, section 3.1; MoCo v2): g(h) = W2 ReLU(W1 h + b1) + b2."""
    return nn.Sequential(nn.Linear(in_dim, in_dim), nn.ReLU(), nn.Linear(in_dim, out_dim))


class LWS(nn.Module):
    """Learnable weight scaling (Kang et al., 2020): a frozen linear classifier with one trained scale per class.

    Maps features h (N, in_dim) to logits (W h + b) * s, (N, num_classes). Only the scales s, which start at 1, train.
    """

    def __init__(self, in_dim: int, num_classes: int):
        super().__init__()
        self.fc = nn.Linear(in_dim, num_classes).requires_grad_(False)
        self.scales = nn.Parameter(torch.ones(num_classes))

    def forward(self, features):
        return self.fc(features) * self.scales
