"""Networks of SSD-LT, and checkpoint files as their input; knows nothing of data sets or command lines."""

from .backbones import ARCHS, build_backbone
from .files import load
from .losses import contrastive_loss, distillation_loss
from .ssd import SDL, SLG, SSFL, from_state_dict, identify

__all__ = [
    "ARCHS",
    "SDL",
    "SLG",
    "SSFL",
    "build_backbone",
    "contrastive_loss",
    "distillation_loss",
    "from_state_dict",
    "identify",
    "load",
]
