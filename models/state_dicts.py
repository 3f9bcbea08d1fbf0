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

    Raises ValueError, in one line that names the file, if they are not a dict of dense tensors by name.
    """

    def is_weights(value):
        named = isinstance(value, dict) and all(isinstance(name, str) for name in value)
        return named and all(isinstance(tensor, torch.Tensor) for tensor in value.values())

    networks = {name: value for name, value in content.items() if is_weights(value) and value}
    default = next(iter(networks.values())) if len(networks) == 1 else content
    weights = content.get("state_dict", content.get("model", default))
    if not is_weights(weights):
        names = ", ".join(map(str, content))[:100]
        if weights is content and len(networks) > 1:
            names = ", ".join(networks)[:100]
            raise ValueError(
                f"{path}: holds several networks, {names}; save the one that you want in a file of its own"
            )
        entries = weights if isinstance(weights, dict) else {}
        wrong = [name for name, value in entries.items() if not isinstance(value, torch.Tensor)]
        if 0 < 2 * len(wrong) < len(entries):
            raise ValueError(f"{path}: {wrong[0]} among its weights is no tensor; save them without it")
        raise ValueError(f"{path}: not a checkpoint: it has no state_dict of tensors, but {names}; use another file")
    for name, tensor in strip_module(weights).items():
        if not is_dense(tensor):
            raise ValueError(f"{path}: not a checkpoint: no dense tensor at {name}; use another file")
    return weights


def strip_prefix(state_dict: dict, prefix: str) -> dict:
    """The entries whose names start with `prefix`, with the prefix removed."""
    return {name[len(prefix) :]: value for name, value in state_dict.items() if name.startswith(prefix)}


def find_mismatch(network: nn.Module, state_dict: dict) -> str | None:
    """Describes the first entry, in order of names, that only one side has or whose shape differs; None if all fit.

    state_dict: without `module.`.
    """
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state_dict.items()}
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

    An entry must be floating-point where the network's is, and only there (the label queue may be either: in published
    checkpoints it is float32). Values must be finite in float32, and no running variance may be below 0. Check shapes
    first, since this reads every entry. Raises ValueError, in one line that names the entry.
    """
    expected = network.state_dict()
    for name, value in strip_module(state_dict).items():
        if name not in expected:
            continue
        entry = name.rpartition(".")[2]
        kinds = FLOATS if expected[name].is_floating_point() else INTEGERS
        if entry == "label_queue":
            kinds += FLOATS
        if value.dtype not in kinds:
            wrong, right = (str(dtype).removeprefix("torch.") for dtype in (value.dtype, expected[name].dtype))
            raise ValueError(f"{name} is of type {wrong}, not {right}")
        if value.numel() == 0 or value.dtype == torch.bool:
            continue
        least, most = map(float, value.detach().aminmax())  # both NaN if there is one
        if not -MAX_FLOAT <= least <= most <= MAX_FLOAT and value.dtype in FLOATS:
            raise ValueError(f"{name} holds values that are not finite in float32")
        if entry == "running_var" and least < 0:
            raise ValueError(f"{name} holds a variance below 0")
