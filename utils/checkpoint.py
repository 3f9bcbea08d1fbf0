"""Checkpoints: written so that a crash cannot spoil them, read so that they cannot harm, checked before use."""

import math
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch

import models
from models.load import read_checkpoint as read_file
from models.load import state_dict_of

from .distributed import rank
from .errors import UserError

LAST, PREVIOUS, BEST = (f"{name}_checkpoint.pth.tar" for name in ("last", "previous", "best"))
STAGE_NAMES = {"i": "I", "ii": "II", "iii": "III"}


def write_atomically(path, write, before_replacing=lambda: None):
    """Calls write(file) on a temporary file beside `path`, flushes it to the disk, and puts it in path's place.

    Whatever happens, path is the old file or the whole new one. before_replacing is called when the new one is whole.
    Raises UserError naming path where the disk is full, the folder is read-only or the like.
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
        before_replacing()
        replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's writer turns the system's errors into RuntimeError
        raise UserError(f"{path}: cannot be written ({reason(error)}); the file before it is kept") from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def remove_leftovers(folder):
    """Removes what a process that was killed while it wrote left behind; the folder's lock must be held."""
    random = "?" * 8
    for pattern in (f".*.tar.{random}", "*.tar.link", f".*.json.{random}", f".log.txt.{random}"):
        for file in Path(folder).glob(pattern):
            file.unlink(missing_ok=True)


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
    temporary = Path(f"{target}.link")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            with open(source, "rb") as original, open(temporary, "wb") as copy:
                shutil.copyfileobj(original, copy)
                copy.flush()
                os.fsync(copy.fileno())
        replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)  # replacing a name of the same file does nothing


def one_line(error) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:200]


def reason(error) -> str:
    """Why writing failed: the system's word for it, which torch's writer buries beneath errors of its own."""
    cause = error
    while not isinstance(cause, OSError) and (cause.__cause__ or cause.__context__):
        cause = cause.__cause__ or cause.__context__
    return one_line(cause if isinstance(cause, OSError) else error)


def save(folder, state: dict, is_best: bool = False):
    """Writes last_checkpoint.pth.tar, keeps the one before as previous, and names it best as well where it is.

    state: tensors, numbers, strings, lists and dicts only. Raises UserError where it cannot be written.
    """
    folder = Path(folder)
    last = folder / LAST

    def keep_previous():
        if last.exists():
            link(last, folder / PREVIOUS)

    try:
        write_atomically(last, lambda file: torch.save(state, file), keep_previous)
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


def read_run(path, flag: str) -> dict:
    """As read, of a run that is to go on or to be evaluated: what it says of its progress must make sense too."""
    content = read(path, flag)
    for name, (is_sound, wanted) in PROGRESS.items():
        try:
            sound = name not in content or is_sound(content[name])
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, OverflowError):
            sound = False
        if not sound:
            raise UserError(f"{path}: its {name} is not {wanted}; correct {flag}")
    return content


def is_whole(value) -> bool:
    return 0 <= float(value) < 2**31 and float(value) == int(value)


def is_run(value) -> bool:
    return all(isinstance(number, int) and number >= 0 for number in value.values()) and (
        8 <= value.get("image_size", 8) <= 4096
    )


def is_averages(value) -> bool:
    if value is None:
        return True
    rows, width = value["sums"], len(value["names"])
    return is_whole(value["steps"]) and len(rows) > 0 and all(len(list(map(float, row))) == width for row in rows)


PROGRESS = {
    "epoch": (is_whole, "a whole number"),
    "step": (is_whole, "a whole number"),
    "best_acc1": (lambda value: math.isfinite(value), "a number"),
    "run": (is_run, "a record of seed, batch and processes"),
    "averages": (is_averages, "a record of sums"),
}


def newest(folder) -> Path | None:
    """The newest readable checkpoint of a run: last, where it is damaged previous, then best; None where none is there.

    Says on stderr which file it passes over. Raises UserError where there are files and none can be read.
    """
    present = [Path(folder) / name for name in (LAST, PREVIOUS, BEST) if (Path(folder) / name).exists()]
    for path in present:
        try:
            read_run(path, "--resume auto")
            return path
        except UserError as error:
            print(f"passed over {error}", file=sys.stderr, flush=True)
    if present:
        raise UserError(f"{folder}: no checkpoint in it can be read; start anew with --overwrite")
    return None


def set_aside_unreadable(folder, resumed):
    """Renames a last checkpoint that --resume auto passed over, which the next save would keep as the previous one."""
    last = Path(folder) / LAST
    if Path(resumed).name != LAST and last.exists():
        try:
            read(last, "--resume")
        except UserError:
            os.replace(last, f"{last}.unreadable")


def adopt(content: dict, args) -> list[str]:
    """Takes from a checkpoint what the user left open of arch, image size and queue; returns what there is to say."""
    found = models.infer_stage_and_arch(content["state_dict"]) or {}
    size = content.get("run", {}).get("image_size")
    saved = {"arch": found.get("arch"), "image_size": size}
    saved |= {"moco_dim": found.get("dim"), "moco_k": found.get("queue_size")}
    notes = []
    for name, value in saved.items():
        if value is None or getattr(args, name, value) == value:
            continue
        if name not in args.given:
            setattr(args, name, value)
            notes.append(f"--{name.replace('_', '-')} {value}, as saved")
        elif name == "image_size":
            notes.append(f"warning: --image-size {args.image_size}, the checkpoint was trained at {value}")
    return notes


def agree(path, flag: str, state_dict: dict, stages: tuple[str, ...], arch: str, num_classes: int):
    """Raises UserError where a state dict is of none of the stages, or of another arch or number of classes."""
    found = models.infer_stage_and_arch(state_dict)
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
        wrong = models.ssd.mismatched_keys(model, state)
        if "queue" in wrong and "queue" in state and state["queue"].dim() == 2:
            dim, size = state["queue"].shape
            raise UserError(
                f"{path}: its queue has {size} keys of {dim}; use --moco-k {size} --moco-dim {dim}"
            ) from None
        first = wrong[0] if wrong else one_line(error)
        raise UserError(f"{path}: does not fit stage {STAGE_NAMES[stage]} at {first}; correct {flag}") from None
    try:
        part = "optimizer"
        if optimizer is not None and content.get(part):
            optimizer.load_state_dict(content[part])
            for parameter, values in optimizer.state.items():
                momentum = values.get("momentum_buffer")
                if momentum is not None and momentum.shape != parameter.shape:
                    raise ValueError(f"a momentum of {tuple(momentum.shape)} for {tuple(parameter.shape)}")
        part = "scaler"
        if scaler is not None and content.get(part):
            scaler.load_state_dict(content[part])
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path}: its {part} does not fit ({one_line(error)}); correct {flag}") from None


def hand_over(load, path, flag: str, stages: tuple[str, ...], args):
    """load(the state dict of an earlier stage's checkpoint). Raises UserError where it cannot serve this run."""
    content = read_run(path, flag)
    state_dict = content["state_dict"]
    agree(path, flag, state_dict, stages, args.arch, args.num_classes)
    size = content.get("run", {}).get("image_size", args.image_size)
    if size != args.image_size and rank() == 0:
        print(f"warning: --image-size {args.image_size}, but {path} was trained at {size}", flush=True)
    try:
        load(state_dict)
    except (RuntimeError, ValueError) as error:
        detail = str(error).splitlines()[-1].strip()[:200]
        raise UserError(f"{path}: its weights are not whole ({detail}); correct {flag}") from None
