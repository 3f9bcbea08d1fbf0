"""Checkpoint files, read without running any code that they might carry."""

import re
import warnings

import numpy as np
import torch
from torch import nn

from .ssd import from_state_dict

# Published checkpoints may hold best_acc1 as a numpy scalar, under the module's present or former name.
NUMPY_SCALARS = [
    np._core.multiarray.scalar,
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(name)) for name in ("float64", "float32", "int64")),
]


def read(path) -> dict:
    """The dict of tensors, numbers, strings, lists and dicts in a checkpoint file, on the CPU.

    Zip and legacy serialisation. Raises OSError for a file that cannot be opened, ValueError, in one line and naming
    the file, for one that is damaged, is no checkpoint or would run code when loaded.
    """
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they are about ends in an error here
        try:
            with torch.serialization.safe_globals(NUMPY_SCALARS):
                content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            if found:
                reason = f"it holds {found[1]}, and all but tensors, numbers, strings, lists and dicts could run code"
            else:
                reason = "it is damaged or no checkpoint"
            raise ValueError(f"{path}: not loaded: {reason}; use another file") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a checkpoint: it holds a {type(content).__name__}, not a dict; use another file")
    return content


def state_dict_of(path, content: dict) -> dict:
    """The state dict of a checkpoint's content. Raises ValueError where there is none."""
    state = content.get("state_dict")
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise ValueError(f"{path}: not a checkpoint of SSD-LT: it has no state_dict of tensors; use another file")
    return state


def load(path) -> nn.Module:
    """The network in a checkpoint file, of whichever stage, with its weights, on the CPU, in eval mode.

    Stage, arch and sizes are read from names and shapes (see from_state_dict). Raises OSError for a file that cannot be
    opened, ValueError, in one line and naming the file, for one that is no checkpoint of a stage.
    """
    state_dict = state_dict_of(path, read(path))
    try:
        return from_state_dict(state_dict)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; use another file") from None
