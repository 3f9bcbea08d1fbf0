"""Loads trained networks for the commands predict and export."""

from torch import nn

import models
from models.loading import network_of

from . import checkpoint
from .errors import UserError


def load_network(path, classifier: str) -> tuple[nn.Module, dict, dict]:
    """(network, what infer_stage_and_arch found, content) of a checkpoint of any stage, on the CPU, in eval mode.

    classifier: "hard" or "soft". Raises UserError, in one line, if the network does not have it, or if the checkpoint
    cannot be read.
    """
    content = checkpoint.read(path, "CKPT")
    try:
        model = network_of(path, content)
    except ValueError as error:
        raise UserError(str(error)) from None
    found = models.infer_stage_and_arch(model.state_dict())
    if classifier == "soft":
        if classifier not in model.classifiers:
            number = model.number
            raise UserError(f"--classifier soft: {path} is of stage {number}, which has one classifier; leave it out")
        checkpoint.check_trained(path, content)
    return model, found, content


def logits_of(model: nn.Module, images, classifier: str):
    """The logits (N, C) of a network in eval mode; classifier: which of stage III's two."""
    logits = model(images)
    return logits[model.classifiers.index(classifier)] if isinstance(logits, tuple) else logits
