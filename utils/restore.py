"""Restores a run from a checkpoint: weights, momentum, gradient scaler, metrics, and the position in its epoch."""

import math

import torch

from models.state_dicts import check_weights, find_mismatch

from .checkpoint import BEST, BEST_METRIC, LoadedCheckpoint
from .distributed import get_world_size, print_main, raise_on_all_ranks
from .errors import UserError, one_line


def restore_run(loaded: LoadedCheckpoint | None, state, data):
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
        state.epoch, state.step = content.get("epoch", 0), content.get("step", 0)
        state.best = restore_best(loaded, data.val_balanced)
        if content.get("averages"):
            state.metrics.load_state_dict(content["averages"], loaded.path)
        check_position(loaded, state, data.train)
        if state.step and state.epoch >= state.args.epochs:
            raise UserError(
                f"--epochs {state.args.epochs}: {loaded.path} is in epoch {state.epoch + 1}; give at least that many"
            )
        print_main(f"continues from {loaded.path}: {state.epoch} epochs are done, and {state.step} steps of the next")


def check_position(loaded: LoadedCheckpoint, state, train_loader):
    """Sets the position in the epoch at which a run continues, also with other numbers of processes or images per step.

    Stages I and III then continue after the images that were seen; stage II, whose draws depend on the ranks, starts
    the epoch over. Raises UserError if the epoch has fewer images here than were seen, or if only one of the saved
    numbers of steps and images is 0.
    """
    world_size = get_world_size()
    per_step, per_epoch = train_loader.images_per_step * world_size, train_loader.images_per_epoch * world_size
    state.images = loaded.content.get("images", state.step * per_step)
    if state.images > per_epoch or (state.images == 0) != (state.step == 0):
        raise UserError(
            f"{loaded.path}: stopped at step {state.step} after {state.images} images, an epoch has {per_epoch} here; "
            "resume with the lists it was saved with"
        )
    saved_world_size = loaded.run.get("world_size", world_size)
    if saved_world_size != world_size:
        print_main(
            f"warning: {world_size} processes, saved by {saved_world_size}: the result will not be bit-identical"
        )
    if state.images == state.step * per_step and (saved_world_size == world_size or not state.step):
        return
    if train_loader.depends_on_ranks:
        state.step, state.images, state.metrics = 0, 0, state.metrics.without_values()
        print_main(f"warning: epoch {state.epoch + 1} starts over, since its batches are different now")
    else:
        print_main(f"warning: epoch {state.epoch + 1} continues after its first {state.images} images")


def restore_best(loaded: LoadedCheckpoint, balanced: bool) -> float:
    """The best class mean so far, as saved.

    In checkpoints that do not say which accuracy it is, such as published ones, it is the one over all images: on a
    balanced validation list this is the class mean; on an unbalanced one, the best starts over at 0.
    """
    best = loaded.content.get("best_acc1", 0.0)
    if loaded.content.get("best_metric") == BEST_METRIC or balanced or not best:
        return best
    print_main(
        f"{loaded.path}: its best accuracy is not a class mean, which now chooses {BEST}, and the validation list is "
        "not balanced: the best starts over at 0"
    )
    return 0.0


def restore_model(loaded: LoadedCheckpoint, model):
    """Loads all weights and buffers. Raises UserError naming the first entry that does not fit."""
    state_dict = loaded.state_dict
    queue = state_dict.get("queue")
    if queue is not None and hasattr(model, "queue") and queue.dim() == 2 and queue.shape != model.queue.shape:
        dim, size = queue.shape
        raise UserError(f"{loaded.path}: its queue has {size} keys of {dim}; use --moco-k {size} --moco-dim {dim}")
    if problem := find_mismatch(model, state_dict):
        raise UserError(f"{loaded.path}: does not fit stage {model.number}: {problem}; correct {loaded.flag}")
    try:
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
        if momentum.layout != torch.strided or momentum.shape != parameter.shape:
            raise ValueError(f"a momentum of shape {tuple(momentum.shape)}, not {tuple(parameter.shape)}")
        if not momentum.is_floating_point() or not momentum.isfinite().all():
            raise ValueError("a momentum that is not finite")
        optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum)


def restore_scaler(scaler, saved: dict | None):
    """Takes the loss scale of --amp fp16."""
    if saved and scaler.is_enabled():
        if not all(isinstance(value, int | float) and 0 <= value < math.inf for value in saved.values()):
            raise ValueError("a value that is negative or not finite")
        if not saved["scale"]:
            raise ValueError("a loss scale of 0")
        scaler.load_state_dict(saved)
