"""Checkpoint files and the state dicts in them: read without running code, checked before they are used."""

import errno
import io
import math
import os
import re
import stat
import warnings
import zipfile
from collections import Counter

import numpy as np
import torch
from torch import nn

from .backbones import infer_arch
from .preprocess import MAX_SIZE, MEAN, MIN_SIZE, MIN_STD, STD, EvalTransform
from .ssd import STAGES
from .state_dicts import check_weights, find_mismatch, find_state_dict, is_dense, strip_module, strip_prefix

MAX_PICKLE = 16 * 2**20  # bytes of everything but tensors; one MiB is already far more than a checkpoint needs
MAX_LEGACY = 4 * 2**30  # bytes of a file in the format before PyTorch 1.6, which has to be read as a whole

# Published checkpoints may hold best_acc1 as a numpy scalar, under the module's new name or that before numpy 1.26.
NUMPY_SCALARS = [
    *((np.float64().__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("_core", "core")),
    np.dtype,
    *(type(np.dtype(name)) for name in ("float64", "float32", "int64")),
]


def load(path) -> nn.Module:
    """Returns the network in a checkpoint file of any stage, with its weights, on the CPU, in eval mode.

    Stage, arch and sizes are inferred from names and shapes (see from_state_dict). The network has these attributes:
    `transform` turns a PIL image into its input (3, S, S), as evaluation does. `classes` is a list of names, or None if
    the checkpoint has none. `preferred` is the classifier that `classify` and utils.predict use: in stage III the soft
    one, or the hard one after --kd-weight 0. Raises OSError if the file cannot be opened or is not a regular file, and
    ValueError, in one line that names the file, if it is not a valid checkpoint of a stage.
    """
    return build_network(path, read_checkpoint(path))


def build_network(path, content: dict) -> nn.Module:
    """The network in the content of the checkpoint at path, as load returns it. Raises ValueError as load does."""
    state_dict = find_state_dict(path, content)
    try:
        transform = build_transform(content)
        network = from_state_dict(state_dict, transform.size)
        num_classes = len(network.state_dict()[f"{network.linear}weight"])
        network.classes = read_class_names(content, num_classes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; use another file") from None
    network.transform = transform
    network.preferred = network.classifiers[-1 if is_soft_trained(content) else 0]
    return network


def is_soft_trained(content: dict) -> bool:
    """Whether stage III's soft classifier was trained; with --kd-weight 0 it was not. True for the other stages."""
    return (content.get("args") or {}).get("kd_weight") != 0


def read_class_names(content: dict, num_classes: int) -> list[str] | None:
    """The names of the classes in a checkpoint, or None. Raises ValueError if they are not num_classes names."""
    names = content.get("classes")
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("its classes are not a list of names")
    if len(names) != num_classes:
        raise ValueError(f"it names {len(names)} classes, and has {num_classes}")
    return names


def build_transform(content: dict) -> EvalTransform:
    """Returns the evaluation transform with the image size, mean and std in a checkpoint's content.

    The defaults are 224 and ImageNet's mean and std. Raises ValueError, in one line, if one of the three is invalid.
    """
    saved = content.get("args") or {}
    run = content.get("run") or {}
    if not isinstance(saved, dict) or not isinstance(run, dict):
        raise ValueError("its args or run is not a dict")
    size = run.get("image_size", saved.get("image_size", 224))
    if type(size) is not int or not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(f"its image_size is not a whole number from {MIN_SIZE} to {MAX_SIZE}")
    statistics = saved.get("mean", MEAN), saved.get("std", STD)
    for values, least in zip(statistics, (0.0, MIN_STD), strict=True):
        is_triple = isinstance(values, list | tuple) and len(values) == 3
        if not is_triple or not all(isinstance(v, int | float) and least <= v < math.inf for v in values):
            raise ValueError(f"its --mean or --std is not three numbers from {least:g}")
    return EvalTransform(size, *statistics)


class Refused(Exception):
    """A reason not to load a file, which read_checkpoint turns into a ValueError."""


def read_checkpoint(path) -> dict:
    """The dict of tensors, numbers, strings, lists and dicts in a checkpoint file, on the CPU.

    Reads the zip format and the one before PyTorch 1.6. The tensors of a zip file are memory-mapped if possible: unused
    ones cost no memory, and a caller that keeps some should copy them, since the file may change. Raises OSError if the
    file is not a regular one, or if the system cannot read it, and ValueError, in one line that names the file, if it
    is damaged, is not a checkpoint, would run code, or would unpack to more than its own size.
    """
    with open_regular(path) as file, warnings.catch_warnings(), torch.serialization.safe_globals(NUMPY_SCALARS):
        warnings.simplefilter("ignore")  # what they warn of is an error here
        try:
            if file.read(4) == b"PK\x03\x04":
                sizes = check_zip(file)
                content = load_mapped(path, file)
                if storage_sizes(content) - sizes:  # a storage whose size no part of the file has
                    raise Refused("it is damaged: a tensor in it is cut short")
            else:
                if os.fstat(file.fileno()).st_size > MAX_LEGACY:
                    raise Refused(f"it is in the format before PyTorch 1.6 and has more than {MAX_LEGACY:,} bytes")
                content = load_copied(file)
        except MemoryError:
            raise
        except Exception as error:
            cause = error if isinstance(error, OSError) else error.__context__  # zipfile hides it there
            if isinstance(cause, OSError) and cause.errno not in (None, errno.EINVAL):
                raise cause from None
            reason = str(error) if isinstance(error, Refused) else "it is damaged or not a checkpoint"
            if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):  # torch names what it refuses to load
                reason = f"it holds {refused[1]}, and all but tensors, numbers, strings, lists and dicts could run code"
            raise ValueError(f"{path}: not loaded: {reason}; use another file") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a checkpoint: it holds a {type(content).__name__}, not a dict; use another file")
    return content


def load_copied(file):
    """Loads an open file, and reads it in Python first, so that torch does not hide the system's errors."""
    file.seek(0)
    return torch.load(io.BytesIO(file.read()), map_location="cpu", weights_only=True)


def load_mapped(path, file):
    """Loads a zip file with its tensors memory-mapped, or copied if it is damaged or cannot be mapped.

    Some file systems cannot map files, and torch's C++ code cannot open a path that the locale cannot encode.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, UnicodeError):
        return load_copied(file)


def open_regular(path):
    """open(path, "rb") for regular files only: a FIFO would block, a device has no end. Raises OSError."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, "a folder; name a file in it, such as last_checkpoint.pth.tar", os.fspath(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return open(path, "rb")


def check_zip(file) -> Counter:
    """Counts the tensors in a zip file by their size in bytes.

    Raises Refused if the file could unpack to more than its own size, or if the parts that are not tensors are too
    large.
    """
    members = zipfile.ZipFile(file).infolist()
    if any(m.compress_type != zipfile.ZIP_STORED or m.compress_size != m.file_size for m in members):
        raise Refused("it is compressed, which torch.save never does")
    if sum(m.file_size for m in members) > os.fstat(file.fileno()).st_size:
        raise Refused("its parts are larger than the file")
    is_tensor = re.compile("[^/]+/data/[^/]+").fullmatch
    if sum(m.file_size for m in members if not is_tensor(m.filename)) > MAX_PICKLE:
        raise Refused(f"it has more than {MAX_PICKLE:,} bytes that are not tensors")
    return Counter(m.file_size for m in members if is_tensor(m.filename))


def storage_sizes(content) -> Counter:
    """Counts the storages of all tensors in nested dicts, lists and tuples by their size in bytes."""
    storages = {}
    seen = set()
    stack = [content]
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor) and is_dense(value):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict | list | tuple):
            stack.extend(value.values() if isinstance(value, dict) else value)
    return Counter(size for size in storages.values() if size > 0)


def infer_stage_and_arch(state_dict: dict, image_size: int = 224) -> dict | None:
    """Infers stage ("i", "ii" or "iii"), arch and num_classes from the names and shapes in a state dict.

    For stage I also infers dim and queue_size, if the state dict has the queue. arch is None if the backbone is not one
    of ARCHS at this image size. Returns None if the names belong to no stage.
    """
    state_dict = strip_module(state_dict)
    stage = next((s for s in STAGES.values() if any(name.startswith(s.mark) for name in state_dict)), None)
    linear = strip_prefix(state_dict, stage.linear) if stage else {}
    one_per_class = linear.get("weight", linear.get("bias"))
    if one_per_class is None or one_per_class.dim() == 0:
        return None
    arch = infer_arch(strip_prefix(state_dict, stage.backbone), image_size)
    return {"stage": stage.stage, "arch": arch, "num_classes": len(one_per_class), **stage.sizes(state_dict)}


def empty_network(state_dict: dict, image_size: int) -> tuple[nn.Module, dict]:
    """Returns a network of the stage that a state dict belongs to, on the meta device, and its constructor arguments.

    Raises ValueError if names or shapes belong to no stage or to an unknown backbone.
    """
    found = infer_stage_and_arch(state_dict, image_size)
    if found is None or found["arch"] is None:
        raise ValueError("the names and shapes in it belong to no stage of SSD-LT with a known backbone")
    stage = STAGES[found.pop("stage")]
    arguments = found | {"image_size": image_size}
    with torch.device("meta"):  # nothing is allocated
        return stage(**arguments), arguments


def from_state_dict(state_dict: dict, image_size: int = 224) -> nn.Module:
    """The network of the stage that the state dict belongs to, with its weights, in eval mode.

    What a state dict does not hold, such as momentum, temperatures and non-persistent buffers, keeps the constructor's
    defaults. Raises ValueError, in one line, if names or shapes belong to no stage or to an unknown backbone, or if
    check_weights does.
    """
    state_dict = strip_module(state_dict)
    empty, arguments = empty_network(state_dict, image_size)
    if problem := find_mismatch(empty, state_dict):
        raise ValueError(f"it does not fit stage {empty.number}: {problem}")
    check_weights(state_dict, empty)
    with torch.random.fork_rng(devices=[]):  # every random number is overwritten
        network = type(empty)(**arguments)
    network.load_state_dict(state_dict)
    return network.eval()


def check_complete(state_dict: dict, image_size: int, receiver: type[nn.Module], *options):
    """Checks that a state dict holds all that receiver.load_previous(state_dict, *options) takes from it.

    receiver: the class of a stage that starts from another. Tries load_previous on the meta device, which allocates no
    memory, and checks types and values. Raises ValueError, in one line that names the wrong entry.
    """
    empty, arguments = empty_network(state_dict, image_size)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # copies to the meta device have no effect
        network = receiver(arguments["arch"], arguments["num_classes"], image_size=image_size)
        network.load_previous(state_dict, *options)
    check_weights(state_dict, empty)
