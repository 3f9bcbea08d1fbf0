"""Whether a training step fits into memory: a lower bound of what it needs, compared with what is available."""

import argparse
import copy
import itertools
import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from models import SSFL
from models.moco import without_exchange

from .distributed import gather_objects, get_dist_info, get_world_size, print_main
from .errors import UserError
from .numerics import AUTOCAST

WARN_ABOVE = 0.7  # of the available memory; workspaces, fragmentation and data workers need some too
SMALLEST_PIECE = 2  # images that BatchNorm normalizes together
# Files of a control group: limit, usage, and the entries of memory.stat that count cached files.
V1_FILES = "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")
V2_FILES = "memory.max", "memory.current", ("active_file", "inactive_file")


class StepMemory(NamedTuple):
    """Bytes that a training step holds in one process, by kind; shared storages are counted once."""

    model: int  # parameters and buffers, including key encoder or teacher and the queue
    momentum: int
    gradients: int
    buckets: int  # of DistributedDataParallel, which copies the gradients
    accumulated: int  # gradients of a step's earlier micro-batches
    images: int
    saved: int  # for the backward pass
    widest: int  # input and output of the module for which they are largest

    @property
    def constant(self) -> int:
        """What is in memory throughout a step."""
        return self.model + self.momentum + self.buckets

    def total(self) -> int:
        """What is needed at least: after the forward pass or after the backward pass, whichever is more."""
        return self.constant + max(self.gradients, self.accumulated + self.images + max(self.saved, self.widest))


def check_memory(model, batch_size: int, args, device):
    """Raises UserError, the same on all ranks, if a training step cannot fit into memory; warns if it barely can.

    model: as prepare_model returns it, before its optimizer exists; it is not changed, and no random number is drawn.
    batch_size: images per micro-batch of one process. Does nothing under --evaluate, with --no-memory-check, or on a
    system that does not say how much memory there is.
    """
    if args.evaluate or not args.memory_check:
        return
    step = step_memory(model, batch_size, args, device)
    gather_objects(None)  # from here on every rank holds its model
    found = list(filter(None, gather_objects(available_memory(device, get_dist_info().local_world_size))))
    if not found:
        return
    free, source = min(found)
    available = free + step.model  # which is in memory already
    sizes = (
        f"a training step needs at least {gibibytes(step.total())} per process, {gibibytes(available)} are available"
    )
    if args.compile or step.total() <= available:  # compiled backbones recompute what is cheap, and save less
        if step.total() > WARN_ABOVE * available:
            print_main(f"warning: {sizes} ({source}); raise --accum-steps or lower --batch-size if memory runs out")
        return
    limits = available, int(WARN_ABOVE * available)
    per_process = args.accum_steps * get_dist_info().local_world_size
    most, ample = (n * per_process for n in largest_batches(model, args, device, limits))
    advice = "none can fit" if not most else f"at most {most} can fit" + (f", {ample} leaves room" if ample else "")
    accum_steps = advised_accum_steps(model, batch_size * args.accum_steps, args, device, limits)
    if accum_steps:
        advice += f"; --accum-steps {accum_steps} fits this batch"
    raise UserError(
        f"--batch-size {args.batch_size}: {sizes} ({source}); {advice}; smaller --image-size, smaller --arch and "
        "--amp bf16 need less; --no-memory-check skips this check",
        on_all_ranks=True,
    )


def advised_accum_steps(model, images: int, args, device, limits) -> int | None:
    """The smallest --accum-steps with which a step fits, if possible with room, or None; images: of one process.

    One that divides the images, if there is one, so that the step keeps its size.
    """
    args = argparse.Namespace(**vars(args) | {"accum_steps": 2})  # gradients accumulate with any number above 1
    most, ample = largest_batches(model, args, device, limits)
    if not most:
        return None
    pieces = images // args.bn_splits
    fewest, end = max(2, images // ((ample or most) + 1) + 1), pieces // SMALLEST_PIECE + 1
    return next((n for n in range(fewest, end) if pieces % n == 0), fewest if fewest < end else None)


def gibibytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


# ---- what a step needs


def step_memory(model, batch_size: int, args, device) -> StepMemory:
    """A lower bound of what a training step needs in this process, in micro-batches of batch_size images.

    Nothing is allocated: the stage's forward pass and loss run on a copy of the model that holds fake tensors, which
    have a shape but no values; hooks count what autograd saves.
    """
    parameters, buffers = list(model.parameters()), list(model.buffers())
    gradients = storage_bytes((p for p in parameters if p.requires_grad), set())
    mode = FakeTensorMode()
    fakes = {id(tensor): mode.from_tensor(tensor) for tensor in parameters + buffers}
    fake = copy.deepcopy(model, fakes.copy()).train()
    held = set()  # storages that are counted already
    size = storage_bytes(fakes.values(), held)
    for module in fake.modules():
        if isinstance(module, torch.nn.SyncBatchNorm):
            module.__class__ = torch.nn.BatchNorm2d  # saves the same, without the other ranks
    with mode, without_exchange():
        shape = (batch_size, 3, args.image_size, args.image_size)
        views = 2 if isinstance(fake, SSFL) and fake.contrast else 1
        images = [torch.empty(shape, device=device) for _ in range(views)]
        labels = torch.zeros(batch_size, dtype=torch.long, device=device)
        image_bytes = storage_bytes([*images, labels], held)
        saved, widest = count_forward(fake, images, labels, args, held)
    return StepMemory(
        model=size,
        momentum=gradients if args.momentum else 0,
        gradients=gradients,
        buckets=gradients if get_world_size() > 1 else 0,
        accumulated=gradients if args.accum_steps > 1 else 0,
        images=image_bytes,
        saved=saved,
        widest=widest,
    )


def count_forward(model, images, labels, args, held: set) -> tuple[int, int]:
    """(bytes saved for the backward pass, bytes of the largest module's input and output) of one forward pass.

    held: the storages to leave out.
    """
    saved, widest, seen = 0, 0, set(held)

    def pack(tensor):
        nonlocal saved
        saved += storage_bytes([tensor], seen)
        return tensor.detach()  # keeps the storage, so that no other one gets its address

    def note_module(module, inputs, output):
        nonlocal widest
        tensors = [value for value in (*inputs, output) if isinstance(value, torch.Tensor)]
        widest = max(widest, storage_bytes(tensors, set(held)))

    for module in itertools.islice(model.modules(), 1, None):
        module.register_forward_hook(note_module)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step_loss(model, images, labels, args, enqueue=False)  # the batch may be larger than the queue
    del loss  # it kept the graph, and so what was saved, until everything is counted
    return saved, widest


def step_loss(model, images, labels, args, **options) -> torch.Tensor:
    """The forward pass of any stage: cross entropy of its first logits, plus its second loss if it has one.

    images: the views; options: of stage I's network.
    """
    device = images[0].device
    with torch.autocast(device.type, AUTOCAST.get(args.amp), enabled=args.amp != "none"):
        outputs = model(*images, labels=labels, **options) if isinstance(model, SSFL) else model(*images)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        losses = [F.cross_entropy(outputs[0], labels), *(output for output in outputs if output.dim() == 0)]
        return sum(losses)


def storage_bytes(tensors, seen: set) -> int:
    """Bytes of the tensors' storages that are not in `seen`; adds these to `seen`."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            total += storage.nbytes()
    return total


def largest_batches(model, args, device, limits) -> list[int]:
    """For each limit in bytes, the largest number of images per process, a multiple of --bn-splits, whose step fits.

    It is 0 if none fits. Images, what is saved and the widest module grow linearly with the batch: two sizes determine
    all others.
    """
    few, more = SMALLEST_PIECE * args.bn_splits, 2 * SMALLEST_PIECE * args.bn_splits
    small, large = (step_memory(model, size, args, device) for size in (few, more))
    lines = []  # bytes at the smaller size, bytes per image
    for kind in ("saved", "widest"):
        at_few, at_more = (
            step.constant + step.accumulated + step.images + getattr(step, kind) for step in (small, large)
        )
        lines.append((at_few, (at_more - at_few) / (more - few)))
    most = [min(few + int((limit - at_few) / per_image) for at_few, per_image in lines) for limit in limits]
    fits = [small.total() <= limit for limit in limits]
    return [n // args.bn_splits * args.bn_splits if fit else 0 for n, fit in zip(most, fits, strict=True)]


# ---- what is available


def available_memory(device, local_world_size: int = 1) -> tuple[int, str] | None:
    """(bytes that this process can still allocate, their source), or None if the system does not say.

    On the host it is the smallest of what the kernel, the control groups and the limit of the address space leave. All
    but the last are shared by the processes of this node.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached, "free on the GPU"
    shared = [(free // local_world_size, source) for free, source in (*free_memory(), *free_in_cgroups())]
    return min([*shared, *free_address_space()], default=None)


def free_memory(proc: Path = Path("/proc")):
    """Yields what the kernel can give without swapping."""
    for line in read_lines(proc / "meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024, "MemAvailable"


def free_in_cgroups(proc: Path = Path("/proc"), mounted: Path = Path("/sys/fs/cgroup")):
    """Yields what each control group of this process, of version 1 or 2, leaves below its limit.

    Control groups count cached files as used, although the kernel can drop them: they are subtracted.
    """
    for line in read_lines(proc / "self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = mounted, V2_FILES
        elif "memory" in controllers.split(","):
            root, names = mounted / "memory", V1_FILES
        else:
            continue
        group = root / path.lstrip("/")
        while group.is_relative_to(root):
            yield from free_in_group(group, *names)
            group = group.parent


def free_in_group(group: Path, limit: str, usage: str, cache: tuple[str, ...]):
    """Yields what one control group leaves, if it exists and has a limit."""
    limits, used = read_lines(group / limit), read_lines(group / usage)
    if limits and used and limits[0].isdecimal():
        stat = dict(line.split() for line in read_lines(group / "memory.stat"))
        in_use = int(used[0]) - sum(int(stat.get(name, 0)) for name in cache)
        yield max(0, int(limits[0]) - max(0, in_use)), "limit of the control group"


def free_address_space(proc: Path = Path("/proc")):
    """Yields what the limit of this process's address space leaves."""
    try:
        import resource  # only Unix has it
    except ImportError:
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = read_lines(proc / "self/statm")
    if limit != resource.RLIM_INFINITY and pages:
        in_use = int(pages[0].split()[0]) * os.sysconf("SC_PAGE_SIZE")
        yield max(0, limit - in_use), "limit of the address space, ulimit -v"


def read_lines(path: Path) -> list[str]:
    """The lines of a file of the kernel, an empty list if it cannot be read."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
