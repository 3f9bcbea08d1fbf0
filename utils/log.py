"""What a run writes for people: its settings and the next command, and log.txt, args.json and TensorBoard's files."""

import json
import platform
import shlex
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import numpy
import torch
import torchvision

from .checkpoint import LAST
from .command_line import __version__
from .distributed import get_world_size
from .errors import UserError, one_line, optional_package, retry
from .files import atomic_write, flush, lexists, name_failure
from .groups import GROUPS, shot_groups


def run_summary(state, data) -> str:
    """The settings of a training or evaluation, one line each; state: its TrainState, data: its Data."""
    args = state.args
    parameters = list(state.model.parameters())
    groups = torch.bincount(shot_groups(data.train_counts), minlength=len(GROUPS)).tolist()
    shots = ", ".join(f"{count} {name}" for count, name in zip(groups, GROUPS, strict=True))
    images = f"{int(data.train_counts.sum()):,} training, {len(data.test.dataset):,} test"
    if data.val is not None:
        images += f", {len(data.val.dataset):,} validation"
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in parameters)
    precision = {"none": "float32", "bf16": "bfloat16", "fp16": "float16"}[args.amp]
    threads = torch.get_num_threads()
    processes = get_world_size()
    device = f"CPU with {threads} thread{'s' * (threads > 1)}"
    if data.test.device.type == "cuda":
        device = torch.cuda.get_device_name(data.test.device)
    rows = {
        f"stage {state.model.number}, {state.model.title}": "",
        "data": f"{args.data}: {images} images",
        "classes": f"{data.num_classes:,} ({shots}-shot)",
        "network": f"{args.arch} at {args.image_size} pixels, {total:,} parameters",
        "device": f"{device}, {precision}, {processes} process{'es' * (processes > 1)}",
    }
    if args.evaluate:
        rows["checkpoint"] = args.resume
    else:
        rows["network"] += f", {trained:,} of them train"
        epochs = f"epochs {state.epoch + 1} to {args.epochs}" if state.epoch < args.epochs else "all epochs are done"
        parts = f" in {args.accum_steps} micro-batches" if args.accum_steps > 1 else ""
        per_step = data.train.images_per_step * processes
        rows["training"] = f"{epochs}, {data.train.steps} steps of {per_step} images{parts}"
        steps = ", ".join(map(str, args.schedule)) or "none"
        decay = "cosine" if args.cos else f"times {args.schedule_factor:g} at epochs {steps}"
        warmup = f"warm-up of {args.warmup_epochs} epochs, " if args.warmup_epochs else ""
        rest = f"momentum {args.momentum:g}, weight decay {args.weight_decay:g}"
        rows["learning rate"] = f"{args.lr:g}, {warmup}{decay}; {rest}"
        rows["output"] = args.output_dir
    width = max(len(name) for name, value in rows.items() if value)
    return "\n".join(f"  {name:{width}}  {value}" if value else name for name, value in rows.items())


def next_command(args, script: str, flag: str, recipe: str, *words: str) -> str:
    """The command that starts a stage from this run's last checkpoint, with the flags given here that are GOES_ON.

    script: that of the next stage, which takes the checkpoint by `flag`; recipe: the name of its recipe, next to this
    run's; words: further words, such as an --output_dir that is not the default.
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


def write_json(path, value):
    """Writes value as JSON, atomically. Raises UserError naming the file."""
    with name_failure(path, "the earlier file is kept"), atomic_write(path) as file:
        file.write((to_json(value) + "\n").encode())


def to_json(value, margin: str = "\n") -> str:
    """JSON with one line per entry, and lists of plain values on one line: a confusion matrix has one line per row."""
    inner = f"{margin} "
    if isinstance(value, dict) and value:
        entries = [f"{json.dumps(key)}: {to_json(entry, inner)}" for key, entry in value.items()]
        return "{" + inner + f",{inner}".join(entries) + margin + "}"
    if isinstance(value, list | tuple) and any(isinstance(entry, dict | list | tuple) for entry in value):
        entries = [to_json(entry, inner) for entry in value]
        return "[" + inner + f",{inner}".join(entries) + margin + "]"
    return json.dumps(value)


def append_epoch(folder, record: dict):
    """Adds a line to log.txt. Raises UserError naming the file."""
    path = Path(folder) / "log.txt"
    with name_failure(path, "the checkpoints are kept"), path.open("a") as file:
        file.write(json.dumps(record) + "\n")
        flush(file)


def truncate_log(folder, epochs: int):
    """Removes the lines of log.txt after the given number of epochs, and a line that a crash cut short."""
    path = Path(folder) / "log.txt"
    kept = []
    try:
        lines = retry(Path.read_text, path).splitlines() if lexists(path) else []
        if lines and not epochs and not lines[0].startswith("{"):
            raise UserError(f"{path}: is no log of a training; redirect output to another file, or move this one away")
        for line in lines:
            with suppress(ValueError, KeyError, TypeError):
                if json.loads(line)["epoch"] < epochs:
                    kept.append(line + "\n")
        with atomic_write(path) as file:
            file.write("".join(kept).encode())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be rewritten ({one_line(error)}); move it away") from None


def require_tensorboard():
    """TensorBoard's SummaryWriter class. Raises UserError if the package is missing or broken."""
    with optional_package("--tensorboard", "tensorboard"):
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter


def add_scalars(writer, record: dict):
    """Gives an epoch's record to TensorBoard, with the names of log.txt, nested ones joined by a slash."""
    validation = {f"val/{name}/{key}": value for name, result in record["val"].items() for key, value in result.items()}
    for name, value in (record | validation).items():
        if name not in ("epoch", "val") and value is not None:
            writer.add_scalar(name, value, record["epoch"])
    writer.flush()


def environment() -> dict:
    """Versions, of this project first, device and git commit, for args.json."""
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = None
    if (root / ".git").exists() and shutil.which("git"):
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    return {
        "version": __version__,
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
