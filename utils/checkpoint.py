"""Checkpoints: read without running code, checked before use, written so that a crash cannot damage them."""

import math
import os
import shutil
import sys
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import torch

import models
from models.loading import build_transform, is_soft_trained, read_checkpoint, read_class_names
from models.state_dicts import check_weights, find_mismatch, find_state_dict, is_dense, strip_module

from .command_line import EVALUATION, GOES_ON, KEPT, NETWORK, option_words
from .distributed import gather_objects, get_world_size, heartbeat, is_main_process, print_main, raise_on_all_ranks
from .errors import UserError, one_line, retry
from .files import atomic_write, flush, is_dir, is_file, lexists, link, lock_folder, name_failure, replace
from .groups import numbering_note
from .metrics import MetricLogger

LAST, PREVIOUS, BEST = (f"{name}_checkpoint.pth.tar" for name in ("last", "previous", "best"))
RUN_FILES = (f"{LAST}*", PREVIOUS, BEST, "args.json", "log.txt", "results.json", "plots", "events.out.tfevents.*")
ASIDE = ".replaced"  # the folder that holds all files of a run that --overwrite replaces
MOVING = f"{ASIDE}.moving"  # its name while files are moved into it or out of it
BEST_METRIC = "class_mean"


class LoadedCheckpoint(NamedTuple):
    """A checkpoint that was read: its file, the flag that named it, its content, and what names and shapes tell."""

    path: str
    flag: str
    content: dict
    inferred: dict  # stage, arch, num_classes and image_size; for stage I also dim and queue_size

    @property
    def state_dict(self) -> dict:
        """The network's weights, without `module.` before the names."""
        return strip_module(self.content["state_dict"])

    @property
    def run(self) -> dict:
        """Facts of the run that wrote it: seed, deterministic, image_size, batch_size, world_size."""
        return self.content.get("run", {})


# ---- reading


def load_resume(args, parser, network) -> LoadedCheckpoint | None:
    """The checkpoint that --resume names, None without one; flags that were not given are taken from it.

    parser: the one that made args; network: the class of the stage that it must belong to. Raises UserError, on all
    ranks, if it cannot be read or belongs to another stage.
    """
    latest = None
    bring_back(Path(args.output_dir, LAST) if args.resume == "auto" else args.resume)
    with raise_on_all_ranks():
        if args.resume == "auto" and is_main_process():
            latest = find_latest(args.output_dir)
            if latest is None and args.evaluate:
                raise UserError(f"--resume auto: no checkpoint in {args.output_dir}; name one")
    if args.resume == "auto":
        args.resume = str(gather_objects(latest)[0] or "")
    if not args.resume:
        return None
    with raise_on_all_ranks():
        loaded = read_stage(args.resume, "--resume", [network.stage])
        facts = (NETWORK, EVALUATION) if args.evaluate else (KEPT,)
        apply_saved_args(loaded, args, parser, *facts)
        return loaded


def load_stage(args, parser, flag: str, receiver, *options, hint: str = "") -> LoadedCheckpoint:
    """The checkpoint of an earlier stage that a flag names, to start from.

    receiver: the network's class, which takes it by load_previous(state_dict, *options); an option is the name of a
    classifier. Backbone, image size and statistics are taken from the checkpoint, unless their flags were given.
    Raises UserError, on all ranks, if it cannot be read, is of another stage than receiver takes, is incomplete, or has
    another backbone than --arch. hint: an alternative, for the message if the flag is missing.
    """
    path = getattr(args, flag.lstrip("-").replace("-", "_"))
    soft = "soft" in options
    stages = [stage for stage in receiver.takes if not soft or "soft" in models.STAGES[stage].classifiers]
    bring_back(path)
    with raise_on_all_ranks():
        if not path:
            names = stage_names(stages)
            raise UserError(f"{flag} is missing: name the checkpoint of stage {names} to start from{hint}")
        loaded = read_stage(path, flag, stages)
        apply_saved_args(loaded, args, parser, NETWORK)
        if soft:
            check_trained(path, loaded.content)
        try:
            models.check_complete(loaded.state_dict, loaded.inferred["image_size"], receiver, *options)
        except ValueError as error:
            raise UserError(f"{path}: {error}; correct {flag}") from None
        return loaded


def check_trained(path, content: dict):
    """Raises UserError if a run without distillation left the soft classifier as it was initialized."""
    if not is_soft_trained(content):
        raise UserError(f"--classifier soft: {path} was trained with --kd-weight 0, without it; leave the flag out")


def read_weights(path, flag: str) -> dict:
    """Reads a file with weights, and returns its content, in which they are the entry state_dict.

    If there is no such file, first brings back a run that was set aside there. Raises UserError, naming file and flag,
    if it has no weights, and Unavailable if the system cannot read it now.
    """
    try:
        if not lexists(path):
            settle_unless_in_use(Path(path).parent)
        content = retry(read_checkpoint, path)
        return content | {"state_dict": find_state_dict(path, content)}
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({one_line(error)}); correct {flag}") from None
    except ValueError as error:
        raise UserError(f"{error} ({flag})") from None


def read(path, flag: str) -> dict:
    """Reads a checkpoint, and returns its content with the fields as save writes them.

    Raises what read_weights does, and UserError if a field is not of a form that save could have written.
    """
    content = read_weights(path, flag)
    try:
        valid = all(is_valid(content[name]) for name, is_valid in FIELDS.items() if name in content)
        averages = content.get("averages") or {"steps": 0}
        if not valid or content.get("step", 0) != averages["steps"]:
            raise ValueError
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, OverflowError):
        raise UserError(f"{path}: its fields are not those of a checkpoint; correct {flag}") from None
    content |= {name: int(content[name]) for name in ("epoch", "step", "images") if name in content}
    best = float(content.get("best_acc1", 0.0))
    content["best_acc1"] = best / 100 if best > 1 else best  # it may be in percent
    return content


def read_stage(path, flag: str, stages: list[str]) -> LoadedCheckpoint:
    """A checkpoint of one of the stages. Raises UserError as read does, and if it belongs to another stage."""
    content = read(path, flag)
    try:
        image_size = build_transform(content).size
        inferred = models.infer_stage_and_arch(content["state_dict"], image_size)
        if inferred is None:
            names = f"the names of its weights, such as {min(content['state_dict'], default='none')},"
            raise ValueError(f"{names} belong to no stage of SSD-LT")
        read_class_names(content, inferred["num_classes"])
    except ValueError as error:
        raise UserError(f"{path}: {error}; correct {flag}") from None
    if inferred["stage"] not in stages:
        stage = models.STAGES[inferred["stage"]].number
        raise UserError(f"{path}: a checkpoint of stage {stage}; {flag} takes one of stage {stage_names(stages)}")
    return LoadedCheckpoint(str(path), flag, content, inferred | {"image_size": image_size})


def stage_names(stages) -> str:
    """The stages as a message names them."""
    return " or ".join(models.STAGES[stage].number for stage in stages)


def is_count(value) -> bool:
    """Whether a value is a whole number, also as a tensor or numpy scalar of one element; a seed may have 63 bits."""
    return bool(0 <= value <= 2**63 - 1 and int(value) == value)


def is_digests(value) -> bool:
    """Whether a value is None or a tensor of ListFileDataset.digests."""
    return value is None or (isinstance(value, torch.Tensor) and value.dtype == torch.int64 and is_dense(value))


def is_flag_value(value) -> bool:
    """Whether a value is of a type that flags have, or a list of such values."""
    values = value if isinstance(value, list) else [value]
    return all(isinstance(one, bool | int | float | str | None) for one in values)


# Checks of the fields that a run continues from; an exception counts as a failed check. Of these fields, published
# checkpoints have only epoch and best_acc1, the latter as a number, a tensor or a numpy scalar.
FIELDS = {
    "epoch": is_count, "step": is_count, "images": is_count, "best_acc1": math.isfinite,
    "best_metric": lambda name: isinstance(name, str), "trained_on": is_digests,
    "args": lambda flags: all(map(is_flag_value, flags.values())),
    "run": lambda facts: all(map(is_count, facts.values())),
    "averages": lambda averages: averages is None or MetricLogger.fits(averages),
}  # fmt: skip


def trained_on(path) -> torch.Tensor | None:
    """The digests of the images that the weights in a file were trained on; None if it does not tell, or is no file.

    Raises Unavailable if the system cannot read it now.
    """
    with suppress(UserError):
        digests = read_weights(path, "").get("trained_on")
        return digests if is_digests(digests) else None


def find_latest(folder) -> Path | None:
    """The newest readable checkpoint of a run: last, else previous, else best; None if there is none.

    Prints the damage of each file that it skips to stderr. Raises UserError if there are checkpoints but none can be
    read, and what find_damage raises.
    """
    present = present_in(folder)
    for path in present:
        damage = find_damage(path)
        if damage is None:
            return path
        print(f"skipped {damage}", file=sys.stderr, flush=True)
    if present:
        raise UserError(f"{folder}: no checkpoint in it can be read; to start over, remove them")
    return None


def find_damage(path) -> UserError | None:
    """Why a file is not a valid checkpoint, or None if it is. Raises what read does if the system cannot read it."""
    try:
        read(path, "--resume auto")
    except UserError as error:
        if isinstance(error.__context__, OSError) and is_file(path):  # the file itself may be intact
            raise
        return error
    return None


def present_in(folder) -> list[Path]:
    """The checkpoints in a folder, the newest first."""
    return [Path(folder) / name for name in (LAST, PREVIOUS, BEST) if lexists(Path(folder) / name)]


def quarantine_unreadable(folder, resumed):
    """Renames a last checkpoint that --resume auto skipped, so that it does not become the previous one."""
    last = Path(folder) / LAST
    if Path(resumed).name != LAST and lexists(last) and find_damage(last):
        os.replace(last, f"{last}.unreadable")


# ---- comparing a checkpoint with the run


def apply_saved_args(loaded: LoadedCheckpoint, args, parser, *facts: str):
    """Takes flags that were not given from a checkpoint, if one of the facts holds of them, and prints them.

    Prints a warning for every given flag that differs from what was saved. Raises UserError for a saved value that
    could not be given on the command line, or if the checkpoint has another backbone.
    """
    actions = parser.marked(*facts)
    taken = []
    warnings = []
    sizes = loaded.inferred
    shapes = {"arch": sizes["arch"], "moco_dim": sizes.get("dim"), "moco_k": sizes.get("queue_size")}
    saved = loaded.content.get("args", {}) | {name: value for name, value in shapes.items() if value is not None}
    for name, value in saved.items():
        if name not in actions or value in (None, getattr(args, name)):
            continue
        try:
            parser.check_value(actions[name], value)
        except UserError as error:
            raise UserError(f"{loaded.path}: its arguments are not valid: {error}; correct {loaded.flag}") from None
        words = option_words(actions[name], value)
        if name in args.given:
            given = option_words(actions[name], getattr(args, name))
            warnings.append(f"warning: {given} is given, {loaded.path} was saved with {words}")
            continue
        setattr(args, name, value)
        taken.append(words)
        if name in parser.marked(GOES_ON) and (name != "seed" or loaded.run.get("deterministic")):  # not a drawn one
            args.following.append(words)
    args.deterministic = args.deterministic or bool(KEPT in facts and loaded.run.get("deterministic"))
    check_compatible(loaded, args.arch)
    if taken:
        print_main(f"as saved: {' '.join(taken)}")
    for line in warnings:
        print_main(line)


def check_compatible(loaded: LoadedCheckpoint | None, arch: str, num_classes: int | None = None):
    """Raises UserError, the same on all ranks, if a checkpoint has another backbone or number of classes."""
    if loaded is None:
        return
    problem = ""
    backbone = loaded.inferred["arch"] or "unknown"
    classes = loaded.inferred["num_classes"]
    if backbone != arch:
        problem = f"its backbone is {backbone}, not {arch}; correct --arch or {loaded.flag}"
    elif num_classes not in (None, classes):
        problem = f"it has {classes} classes, this run {num_classes}; correct {loaded.flag}, the lists or --num-classes"
    if problem:
        raise UserError(f"{loaded.path}: {problem}", on_all_ranks=True)


def class_names(loaded: LoadedCheckpoint | None, from_data: list[str] | None) -> list[str] | None:
    """The names of the classes: from the data, else from the checkpoint, else None; warns if the two may differ."""
    from_checkpoint = loaded.content.get("classes") if loaded else None
    if from_data and from_checkpoint and from_data != from_checkpoint:
        pairs = zip(from_checkpoint, from_data, strict=True)
        number, theirs, ours = next((i, a, b) for i, (a, b) in enumerate(pairs) if a != b)
        print_main(
            f"warning: class {number} is {theirs!r} in {loaded.path}, and {ours!r} in the data: if the classes were "
            "renumbered, its weights belong to other classes"
        )
    if not from_data:
        for note in numbering_note(from_checkpoint):
            print_main(f"{note} ({loaded.path})")
    return from_data or from_checkpoint


# ---- continuing from one


def restore(loaded: LoadedCheckpoint | None, state, data):
    """Restores model, optimizer, scaler, metrics, epoch, step and best class mean of a training state, if resumed.

    For an evaluation, restores only the model. data: the run's Data. Raises UserError, on all ranks, if what was saved
    does not fit.
    """
    if loaded is None:
        return
    with raise_on_all_ranks():
        restore_model(loaded, state.model)
        if state.args.evaluate:
            return
        content = loaded.content
        for name, load in (("optimizer", restore_momentum), ("scaler", restore_scaler)):
            try:
                load(getattr(state, name), content.get(name))
            except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
                message = f"{loaded.path}: its {name} does not fit ({one_line(error)}); correct {loaded.flag}"
                raise UserError(message) from None
        if not content.get("optimizer"):
            print_main(f"warning: {loaded.path} has no optimizer, like an export: the momentum starts at 0")
        state.epoch = content.get("epoch", 0)
        state.step = content.get("step", 0)
        state.best = content["best_acc1"]  # in published checkpoints, the accuracy over all images
        if state.best and content.get("best_metric") != BEST_METRIC and not data.val_balanced:
            state.best = 0.0
            print_main(
                f"{loaded.path}: its best accuracy is not a class mean, which now chooses {BEST}, and the validation "
                "list is not balanced: the best starts over at 0"
            )
        if content.get("averages"):
            state.metrics.load_state_dict(content["averages"], loaded.path)
        check_position(loaded, state, data.train)
        if state.step and state.epoch >= state.args.epochs:
            raise UserError(
                f"--epochs {state.args.epochs}: {loaded.path} is in epoch {state.epoch + 1}; give at least that many"
            )
        print_main(f"continues from {loaded.path}: {state.epoch} epochs are done, and {state.step} steps of the next")


def check_position(loaded: LoadedCheckpoint, state, train_loader):
    """Sets where in its epoch a run continues, even if the number of processes or of images per step has changed.

    If it has, stages I and III continue after the images that were seen, and stage II, whose draws depend on the ranks,
    starts the epoch over. Raises UserError if the epoch has fewer images here than were seen.
    """
    world_size = get_world_size()
    per_step = train_loader.images_per_step * world_size
    per_epoch = train_loader.images_per_epoch * world_size
    state.images_seen = loaded.content.get("images", state.step * per_step)
    saved = loaded.run.get("world_size", world_size)
    # With W processes an epoch has up to W - 1 images twice, so that all have as many.
    if state.images_seen >= per_epoch + saved or (state.images_seen == 0) != (state.step == 0):
        raise UserError(
            f"{loaded.path}: stopped at step {state.step} after {state.images_seen} images, an epoch has {per_epoch} "
            "here; resume with the lists it was saved with"
        )
    if saved != world_size:
        print_main(f"warning: {world_size} processes, saved by {saved}: the result will not be bit-identical")
    if not state.step or (saved == world_size and state.images_seen == state.step * per_step):
        return
    how = f"continues after its first {state.images_seen} images"
    if train_loader.depends_on_ranks:
        how = "starts over, since its batches are different now"
        state.step = 0
        state.images_seen = 0
        state.metrics.reset()
    print_main(f"warning: epoch {state.epoch + 1} {how}")


def restore_model(loaded: LoadedCheckpoint, model):
    """Loads all weights and buffers. Raises UserError naming the first entry that does not fit."""
    state_dict = loaded.state_dict
    queue = loaded.state_dict.get("queue")
    if queue is not None and hasattr(model, "queue") and queue.dim() == 2 and queue.shape != model.queue.shape:
        dim, size = queue.shape
        raise UserError(f"{loaded.path}: its queue has {size} keys of {dim}; use --moco-k {size} --moco-dim {dim}")
    try:
        if problem := find_mismatch(model, state_dict):
            raise ValueError(f"does not fit stage {model.number}: {problem}")
        check_weights(state_dict, model)
    except ValueError as error:
        raise UserError(f"{loaded.path}: {error}; correct {loaded.flag}") from None
    model.load_state_dict(state_dict)


def restore_momentum(optimizer, saved: dict | None):
    """Takes the momentum buffers of SGD's state_dict, and nothing else: all settings are those of the run."""
    if not saved:
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    if len(numbers) != len(parameters):
        raise ValueError(f"it has {len(numbers)} parameters, this run has {len(parameters)}")
    for number, parameter in zip(numbers, parameters, strict=True):
        momentum = saved["state"].get(number, {}).get("momentum_buffer")
        if momentum is None:
            continue
        if not is_dense(momentum) or momentum.shape != parameter.shape:
            raise ValueError(f"a momentum is no dense tensor of shape {tuple(parameter.shape)}")
        if not momentum.is_floating_point() or not momentum.isfinite().all():
            raise ValueError("a momentum is not finite")
        optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum)


def restore_scaler(scaler, saved: dict | None):
    """Takes the loss scale of --amp fp16."""
    if saved and scaler.is_enabled():
        valid = all(isinstance(value, int | float) and 0 <= value < math.inf for value in saved.values())
        if not valid or not saved["scale"]:
            raise ValueError("a value that is negative or not finite, or a loss scale of 0")
        scaler.load_state_dict(saved)


# ---- writing


def save(state, is_best: bool = False):
    """Writes a training state as last_checkpoint.pth.tar, and as best if is_best; all ranks must call it.

    The format is the published one, plus what exact resuming needs: tensors, numbers, strings, lists and dicts, which
    can be loaded with weights_only. Raises UserError, on all ranks, if it cannot be written, or if a weight, statistic
    or momentum is not finite.
    """
    averages = state.metrics.state_dict() if state.step else None
    with raise_on_all_ranks():
        if is_main_process():
            check_finite(state)
            write(state.args.output_dir, build_checkpoint(state, averages), is_best)
            if state.args.overwrite:  # the run that was set aside is no longer needed
                settle(state.args.output_dir)
    heartbeat()


def check_finite(state):
    """Raises UserError if a weight, buffer or momentum is not finite, since no run could continue from it."""
    values = dict(state.model.state_dict())
    for i, buffers in enumerate(state.optimizer.state.values()):
        values |= {f"{name} of trained parameter {i}": value for name, value in buffers.items() if value is not None}
    for name, value in values.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"not saved, since {name} is not finite: lower --lr; earlier checkpoints are kept")


def build_checkpoint(state, averages: dict | None) -> dict:
    """The content of a training state's checkpoint; averages: the epoch's metrics so far, of all ranks."""
    args = state.args
    return {
        "epoch": state.epoch,
        "step": state.step,
        "stage": state.model.stage,
        "arch": args.arch,
        "state_dict": {f"module.{name}": value for name, value in state.model.state_dict().items()},
        "best_acc1": torch.tensor(state.best, dtype=torch.float64),
        "best_metric": BEST_METRIC,
        "classes": state.model.classes,
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "averages": averages,
        "images": state.images_seen,
        "trained_on": state.model.trained_on,
        "args": {name: getattr(args, name) for name in args.marked[KEPT]},
        "run": {
            "seed": args.seed, "deterministic": args.deterministic, "image_size": args.image_size,
            "batch_size": args.batch_size, "world_size": get_world_size(),
        },
    }  # fmt: skip


def write(folder, content: dict, is_best: bool = False):
    """Writes last_checkpoint.pth.tar, keeps the one before as previous, and also names the new one best if is_best.

    Raises UserError if it cannot be written; the earlier checkpoints are then kept.
    """
    folder = Path(folder)
    last = folder / LAST
    with name_failure(last, "earlier checkpoints are kept"), atomic_write(last) as file:
        torch.save(content, file)
        flush(file)
        # Previous and best come first: last records how good the best is, and must not be ahead of the best file.
        if last.exists():
            link(last, folder / PREVIOUS)
        if is_best:
            link(file.name, folder / BEST)


def set_aside(folder: Path):
    """Moves all files of a run, for settle to bring back or to remove; the folder's lock must be held."""
    (folder / MOVING).mkdir()
    for file in find_run_files(folder):
        os.replace(file, folder / MOVING / file.name)
    replace(folder / MOVING, folder / ASIDE)


def settle(folder):
    """Cleans up a folder, even if a run, set_aside or settle itself was killed there; the folder's lock must be held.

    Removes half-written files. A run that was set aside is removed if the new one has a checkpoint, otherwise it takes
    the new one's place again.
    """
    folder = Path(folder)
    for file in find_run_files(folder, ".{}.????????"):  # as atomic_write names them
        file.unlink()
    if lexists(folder / ASIDE):
        if lexists(folder / LAST):
            shutil.rmtree(folder / ASIDE)
            return
        for file in find_run_files(folder):
            shutil.rmtree(file) if is_dir(file) else file.unlink()
        replace(folder / ASIDE, folder / MOVING)
    if lexists(folder / MOVING):
        for file in (folder / MOVING).iterdir():
            os.replace(file, folder / file.name)
        (folder / MOVING).rmdir()


def bring_back(path):
    """Brings back a run that was set aside beside a checkpoint, before any rank reads it; all ranks must call it."""
    with raise_on_all_ranks():
        if path and is_main_process():
            settle_unless_in_use(Path(path).parent)


def settle_unless_in_use(folder: Path):
    """Settles a folder with a run that was set aside, unless it cannot be locked: the run in it will do so itself."""
    if lexists(folder / ASIDE) or lexists(folder / MOVING):
        with suppress(OSError):
            if lock := lock_folder(folder):
                with lock:
                    settle(folder)


def find_run_files(folder: Path, form: str = "{}") -> list[Path]:
    """The files in a folder that belong to a run; form: a template that each pattern in RUN_FILES is put into."""
    patterns = [form.format(name) for name in RUN_FILES]
    return [file for file in folder.iterdir() if any(fnmatch(file.name, pattern) for pattern in patterns)]
