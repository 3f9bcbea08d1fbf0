"""State dicts: the names and shapes of their entries, and loading those below a prefix."""

import torch
from torch import nn

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
MAX_FLOAT = torch.finfo(torch.float32).max


def strip_module(state_dict: dict) -> dict:
    """The state dict without what DistributedDataParallel (`module.`) and torch.compile (`_orig_mod.`) add to names."""
    return {name.replace("_orig_mod.", "").removeprefix("module."): value for name, value in state_dict.items()}


def find_state_dict(path, content: dict) -> dict:
    """The weights in a file's content: its entry `state_dict`, else `model`, else its only dict of tensors, else all.

    Raises ValueError, in one line that names the file, if that is no dict of dense tensors by name.
    """

    def is_found(value):
        named = isinstance(value, dict) and all(isinstance(name, str) for name in value)
        return named and all(isinstance(tensor, torch.Tensor) for tensor in value.values())

    others = {name: value for name, value in content.items() if is_found(value) and value}
    only = next(iter(others.values())) if len(others) == 1 else content
    found = content.get("state_dict", content.get("model", only))
    if not is_found(found):
        names = ", ".join(map(str, content))[:100]
        if found is content and len(others) > 1:
            names = ", ".join(others)[:100]
            raise ValueError(
                f"{path}: holds several networks, {names}; save the one that you want in a file of its own"
            )
        entries = found if isinstance(found, dict) else {}
        wrong = [name for name, value in entries.items() if not isinstance(value, torch.Tensor)]
        if 0 < 2 * len(wrong) < len(entries):
            raise ValueError(f"{path}: {wrong[0]} among its weights is no tensor; save them without it")
        raise ValueError(f"{path}: not a checkpoint: it has no state_dict of tensors, but {names}; use another file")
    for name, tensor in strip_module(found).items():
        if not is_dense(tensor):
            raise ValueError(f"{path}: not a checkpoint: no dense tensor at {name}; use another file")
    return found


def strip_prefix(state_dict: dict, prefix: str) -> dict:
    """The entries whose names start with `prefix`, with the prefix removed."""
    return {name[len(prefix) :]: value for name, value in state_dict.items() if name.startswith(prefix)}


def find_mismatch(network: nn.Module, state_dict: dict) -> str | None:
    """What is wrong with the first entry, by name, that only one side has or that differs in shape; None if all fit.

    state_dict: without `module.`.
    """
    expected, found = ({name: tuple(v.shape) for name, v in d.items()} for d in (network.state_dict(), state_dict))
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} is unknown"
        if found[name] != expected[name]:
            return f"{name} has the shape {found[name]}, not {expected[name]}"
    return None


def load_entries(module: nn.Module, state_dict: dict, prefix: str):
    """Loads the entries below `prefix` into a module.

    Raises ValueError, in one line that names the first wrong entry, if they are not exactly those of the module.
    """
    entries = strip_prefix(strip_module(state_dict), prefix)
    if problem := find_mismatch(module, entries):
        raise ValueError(prefix + problem)
    module.load_state_dict(entries)


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor is an ordinary one: on the CPU, not sparse, nested, quantized or expanded beyond its storage."""
    return (
        tensor.layout == torch.strided and tensor.device.type == "cpu"
        and not tensor.is_nested and not tensor.is_quantized
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )  # fmt: skip


def check_weights(state_dict: dict, network: nn.Module):
    """Checks types and values of the entries that a network has; names are with or without `module.`.

    They are of the kind that the network has, floating-point or not (the label queue may be either: it is float32 in
    published checkpoints), and finite in float32; no running variance is below 0. It reads every entry, so check shapes
    first. Raises ValueError, in one line that names the entry.
    """
    expected = network.state_dict()
    for name, value in strip_module(state_dict).items():
        if name not in expected:
            continue
        entry = name.rpartition(".")[2]
        kinds = FLOATS if expected[name].is_floating_point() else INTEGERS
        if value.dtype not in kinds + (FLOATS if entry == "label_queue" else ()):
            wrong, right = (str(dtype).removeprefix("torch.") for dtype in (value.dtype, expected[name].dtype))
            raise ValueError(f"{name} is of type {wrong}, not {right}")
        if value.numel() == 0 or value.dtype == torch.bool:
            continue
        least, most = map(float, value.detach().aminmax())  # both NaN if there is one
        if not -MAX_FLOAT <= least <= most <= MAX_FLOAT and value.dtype in FLOATS:
            raise ValueError(f"{name} holds values that are not finite in float32")
        if entry == "running_var" and least < 0:
            raise ValueError(f"{name} holds a variance below 0")
