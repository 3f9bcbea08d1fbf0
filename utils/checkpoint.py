"""Checkpoints: written so that a crash cannot spoil them, read so that they cannot harm, checked before use."""

import os
import shutil
import tempfile
from pathlib import Path

import torch

import models
from models.files import read as read_file
from models.files import state_dict_of

from .errors import UserError

LAST, PREVIOUS, BEST = (f"{name}_checkpoint.pth.tar" for name in ("last", "previous", "best"))
STAGE_NAMES = {"i": "I", "ii": "II", "iii": "III"}


def write_atomically(path, write):
    """Calls write(file) on a temporary file beside `path`, flushes it to the disk, and puts it in path's place.

    Whatever happens, path is the old file or the whole new one. Raises UserError naming path where the disk is full,
    the folder is read-only or the like.
    """
    path = Path(path)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            write(file)
            file.flush()
            os.fsync(file.fileno())
        open_up(temporary)
        replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's writer turns the system's errors into RuntimeError
        raise UserError(f"{path}: cannot be written ({one_line(error)}); the file before it is kept") from None
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def open_up(temporary):
    """Gives a temporary file, private when it was made, the permissions of any new file."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)


def replace(temporary, path):
    """os.replace, with the folder's new entry flushed to the disk."""
    os.replace(temporary, path)
    folder = os.open(Path(path).parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def link(source, target):
    """A second name for a file that is never written in place; a copy where the file system has no links."""
    temporary = f"{target}.link"
    if os.path.exists(temporary):
        os.unlink(temporary)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    replace(temporary, target)


def one_line(error) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:200]


def save(folder, state: dict, is_best: bool = False):
    """Writes last_checkpoint.pth.tar, keeps the one before as previous, and names it best as well where it is.

    state: tensors, numbers, strings, lists and dicts only. Raises UserError where it cannot be written.
    """
    folder = Path(folder)
    last = folder / LAST
    try:
        if last.exists():
            link(last, folder / PREVIOUS)
        write_atomically(last, lambda file: torch.save(state, file))
        if is_best:
            link(last, folder / BEST)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({one_line(error)}); the checkpoints before are kept") from None


def read(path, flag: str) -> dict:
    """A checkpoint's content, with state_dict in it. Raises UserError naming the file and the flag that gave it."""
    try:
        content = read_file(path)
        state_dict_of(path, content)
        return content
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({one_line(error)}); correct {flag}") from None
    except ValueError as error:
        raise UserError(f"{error} ({flag})") from None


def newest(folder) -> Path | None:
    """The newest readable checkpoint of a run: last, or previous where last is damaged; None where there is none.

    Says on screen which file it passes over. Raises UserError where there are files and none can be read.
    """
    present = [Path(folder) / name for name in (LAST, PREVIOUS) if (Path(folder) / name).exists()]
    for path in present:
        try:
            read(path, "--resume auto")
            return path
        except UserError as error:
            print(f"passed over {error}", flush=True)
    if present:
        raise UserError(f"{folder}: no checkpoint in it can be read; start anew with --overwrite")
    return None


def agree(path, flag: str, state_dict: dict, stages: tuple[str, ...], arch: str, num_classes: int):
    """Raises UserError where a state dict is of none of the stages, or of another arch or number of classes."""
    found = models.identify(state_dict)
    if found is None:
        raise UserError(f"{path}: its names are of no stage of SSD-LT; correct {flag}")
    if found["stage"] not in stages:
        wanted = " or ".join(STAGE_NAMES[stage] for stage in stages)
        raise UserError(
            f"{path}: a checkpoint of stage {STAGE_NAMES[found['stage']]}; {flag} takes one of stage {wanted}"
        )
    if found["arch"] != arch:
        raise UserError(f"{path}: its backbone is {found['arch'] or 'unknown'}, not {arch}; correct --arch or {flag}")
    if found["num_classes"] != num_classes:
        raise UserError(
            f"{path}: it has {found['num_classes']} classes, this run {num_classes}; "
            f"correct {flag}, the lists or --num-classes"
        )
    return found


def restore(path, flag, content: dict, stage: str, model, optimizer=None, scaler=None):
    """Puts a checkpoint's content into model, optimizer and gradient scaler, each where it is given and saved.

    Names load with and without `module.`. Raises UserError where what was saved does not fit.
    """
    state = models.ssd.strip_module(content["state_dict"])
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        wrong = models.ssd.misfits(model, state)
        if "queue" in wrong and "queue" in state:
            dim, size = state["queue"].shape
            raise UserError(
                f"{path}: its queue has {size} keys of {dim}; use --moco-k {size} --moco-dim {dim}"
            ) from None
        first = wrong[0] if wrong else one_line(error)
        raise UserError(f"{path}: does not fit stage {STAGE_NAMES[stage]} at {first}; correct {flag}") from None
    for name in ("epoch", "step", "best_acc1"):
        try:
            float(content.get(name, 0))
        except (TypeError, ValueError, RuntimeError):
            raise UserError(f"{path}: its {name} is not a number; correct {flag}") from None
    if optimizer is not None and content.get("optimizer"):
        try:
            optimizer.load_state_dict(content["optimizer"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: its optimizer does not fit ({one_line(error)}); correct {flag}") from None
    if scaler is not None and content.get("scaler"):
        scaler.load_state_dict(content["scaler"])


def hand_over(load, path, flag: str, stages: tuple[str, ...], args):
    """load(the state dict of an earlier stage's checkpoint). Raises UserError where it cannot serve this run."""
    state_dict = read(path, flag)["state_dict"]
    agree(path, flag, state_dict, stages, args.arch, args.num_classes)
    try:
        load(state_dict)
    except RuntimeError as error:
        detail = str(error).splitlines()[-1].strip()[:200]
        raise UserError(f"{path}: its weights are not whole ({detail}); correct {flag}") from None
