"""What a run prints: its settings at the start, and the next commands at the end."""

import shlex
from pathlib import Path

import torch

from .checkpoint import LAST
from .distributed import get_world_size
from .groups import GROUPS, shot_groups

STAGE_TITLES = {
    "i": "stage I, self-supervised guided feature learning",
    "ii": "stage II, soft label generation",
    "iii": "stage III, joint training with self-distillation",
}


def run_summary(state, data) -> str:
    """The settings of a training or evaluation, one line each; state: its TrainState, data: its Data."""
    args = state.args
    groups = torch.bincount(shot_groups(data.train_counts), minlength=len(GROUPS)).tolist()
    shots = ", ".join(f"{count} {name}" for count, name in zip(groups, GROUPS, strict=True))
    images = {"training": int(data.train_counts.sum()), "test": len(data.test.dataset)}
    if data.val is not None:
        images["validation"] = len(data.val.dataset)
    total = sum(parameter.numel() for parameter in state.model.parameters())
    trained = sum(parameter.numel() for parameter in state.model.parameters() if parameter.requires_grad)
    precision = {"none": "float32", "bf16": "bfloat16", "fp16": "float16"}[args.amp]
    rows = {
        STAGE_TITLES[state.stage]: "",
        "data": f"{args.data}: {', '.join(f'{count:,} {name}' for name, count in images.items())} images",
        "classes": f"{data.num_classes:,} ({shots}-shot)",
        "network": f"{args.arch} at {args.image_size} pixels, {trained:,} of {total:,} parameters train",
        "device": f"{device_name(state.device)}, {precision}, {get_world_size()} {plural(get_world_size(), 'process')}",
    }
    if args.evaluate:
        rows["checkpoint"] = args.resume
    else:
        per_step = data.train.images_per_step * get_world_size()
        epochs = f"epochs {state.epoch + 1} to {args.epochs}" if state.epoch < args.epochs else "all epochs are done"
        rows["training"] = f"{epochs}, {data.train.steps} steps of {per_step} images"
        if args.accum_steps > 1:
            rows["training"] += f" in {args.accum_steps} micro-batches"
        steps = ", ".join(map(str, args.schedule)) or "none"
        decay = "cosine" if args.cos else f"times {args.schedule_factor:g} at epochs {steps}"
        warmup = f"warm-up of {args.warmup_epochs} epochs, " if args.warmup_epochs else ""
        rows["learning rate"] = (
            f"{args.lr:g}, {warmup}{decay}; momentum {args.momentum:g}, weight decay {args.weight_decay:g}"
        )
        rows["output"] = args.output_dir
    width = max(len(name) for name, value in rows.items() if value)
    return "\n".join(f"  {name:{width}}  {value}" if value else name for name, value in rows.items())


def plural(count: int, word: str) -> str:
    """The word, in the plural unless count is 1."""
    return word if count == 1 else word + ("es" if word.endswith("s") else "s")


def device_name(device) -> str:
    """The name of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU with {torch.get_num_threads()} {plural(torch.get_num_threads(), 'thread')}"


def next_commands(state, source: str | None) -> list[str]:
    """The commands that follow a training, with the flags of this run that the next stage has as well.

    source: the stage whose checkpoint the run started from; None without one, and for a resumed run.
    """
    args, last = state.args, f"{state.folder.path}/{LAST}"
    following = {"i": "stage_ii", "ii": "stage_iii"}.get(state.stage)
    recipe = Path(args.recipes[0]).with_name(f"{following or 'stage_iii_tuned'}.txt") if args.recipes else None
    recipe = [f"@{shlex.quote(str(recipe))}"] if recipe and recipe.is_file() else []
    shared = [*recipe, *args.shared_words, shlex.quote(args.data)]
    if following and "output_dir" in args.given:
        shared.insert(0, f"--output_dir {shlex.quote(str(state.folder.path.parent / following))}")
    if state.stage == "i":
        return [" ".join(["python ssd_stage_ii.py --last_stage_ckpt", shlex.quote(last), *shared])]
    report = f"python -m utils.report {shlex.quote(str(state.folder.path.parent))}"
    if state.stage == "ii" and source != "i":  # a resumed run of stage II may be either
        return [report]
    if state.stage == "ii":
        return [" ".join(["python ssd_stage_iii.py --teacher_ckpt", shlex.quote(last), *shared])]
    tuned = shlex.quote(f"{state.folder.path}_tuned")
    start = ["python ssd_stage_ii.py --last_stage_ckpt", shlex.quote(last)]
    soft = ["--classifier soft"] if args.kd_weight > 0 and not recipe else []  # else untrained; a recipe says it
    return [" ".join([*start, *soft, "--output_dir", tuned, *shared]), report]
