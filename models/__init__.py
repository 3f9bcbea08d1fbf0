"""Networks of SSD-LT; knows nothing of data sets, files or command lines."""

from .backbones import ARCHS, build_backbone
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
]
