"""The networks of SSD-LT and their checkpoints, independent of data sets and command lines.

SSFL, SLG and SDL are the networks of the stages; load reads one from a checkpoint file.
"""

from .backbones import ARCHS, build_backbone, check_backbone
from .loading import check_complete, from_state_dict, infer_stage_and_arch, load
from .losses import contrastive_loss, contrastive_loss_plain, distillation_loss
from .moco import split_batchnorm
from .ssd import SDL, SLG, SSFL, STAGES

__all__ = [
    "ARCHS",
    "SDL",
    "SLG",
    "SSFL",
    "STAGES",
    "build_backbone",
    "check_backbone",
    "check_complete",
    "contrastive_loss",
    "contrastive_loss_plain",
    "distillation_loss",
    "from_state_dict",
    "infer_stage_and_arch",
    "load",
    "split_batchnorm",
]
