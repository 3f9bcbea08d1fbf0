"""What a run prints: its settings at the start, and the next commands at the end."""

import shlex
from pathlib import Path

import torch

from .checkpoint import LAST
from .distributed import get_world_size
from .groups import GROUPS, shot_groups


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
        f"stage {state.model.number}, {state.model.title}": "",
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


def next_command(args, script: str, flag: str, recipe: str, *words: str) -> str:
    """The command of a stage that starts from this run's last checkpoint, with the flags given here that go on.

    script: of the next stage, which takes the checkpoint by the flag; recipe: the name of its recipe, beside this run's;
    words: further words, such as its --output_dir if it may not be the default.
    """
    folder = Path(args.output_dir)
    file = Path(args.recipes[0]).with_name(f"{recipe}.txt") if args.recipes else Path()
    if "output_dir" in args.given and "--output_dir" not in words:
        words = (*words, "--output_dir", str(folder.parent / recipe))
    start = ["python", script, flag, str(folder / LAST), *words, *([f"@{file}"] if file.is_file() else [])]
    return " ".join([shlex.join(start), *args.following, shlex.quote(args.data)])


def report_command(args) -> str:
    """The command that shows the results of this run and of those beside it."""
    return shlex.join(["python", "-m", "utils.report", str(Path(args.output_dir).parent)])
