"""The networks of SSD-LT and their checkpoints, independent of data sets and command lines.

`models.load` is the function; import from the module of the same name with `from models.load import ...`.
"""

from .backbones import ARCHS, build_backbone
from .batchnorm import split_batchnorm
from .load import check_complete, check_weights, from_state_dict, load
from .losses import contrastive_loss, contrastive_loss_plain, distillation_loss
from .ssd import SDL, SLG, SSFL, infer_stage_and_arch

__all__ = [
    "ARCHS",
    "SDL",
    "SLG",
    "SSFL",
    "build_backbone",
    "check_complete",
    "check_weights",
    "contrastive_loss",
    "contrastive_loss_plain",
    "distillation_loss",
    "from_state_dict",
    "infer_stage_and_arch",
    "load",
    "split_batchnorm",
]
