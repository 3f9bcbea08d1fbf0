"""Whether a training step can fit into memory: what it needs at least, compared with what is available."""

import copy
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from models import SSFL
from models.moco import SplitBatchNorm, without_exchange

from .distributed import gather_objects, get_dist_info, get_world_size, print_main
from .errors import UserError

ROOM = 0.7  # share of the available memory for what is counted; the rest is for workspaces, fragmentation and workers


def check_memory(model, batch_size, image_size, *, accum_steps=1, momentum=True, dtype=None, compiled=False, device):
    """Raises UserError, the same on all ranks, if a training step cannot fit into memory; warns if it barely can.

    model: as prepare_model returns it, before its optimizer exists; it is not changed, and no random number is drawn.
    batch_size: images per micro-batch of one process; dtype: of mixed precision, or None. If the system does not say
    how much memory it has, all fits.
    """
    measure = partial(step_memory, model, image_size=image_size, momentum=momentum, dtype=dtype, device=device)
    try:
        needed = measure(batch_size, accum_steps=accum_steps)
    except (DataDependentOutputException, DynamicOutputShapeException):
        print_main("the memory of a step is not checked: the network's forward pass depends on its values")
        return
    gather_objects(None)  # a barrier: from here on, every rank holds its model in memory
    free, source = min(gather_objects(available_memory(device)))
    available = free + storage_bytes([*model.parameters(), *model.buffers()])  # these are in memory already
    sizes = f"a training step needs at least {needed / 2**30:.1f} GiB per process"
    sizes += f", {available / 2**30:.1f} GiB are available ({source})"
    if compiled or needed <= available:  # compiled backbones recompute what is cheap, and save less
        if needed > ROOM * available:
            print_main(f"warning: {sizes}; raise --accum-steps or lower --batch-size if memory runs out")
        return
    splits = max((module.splits for module in model.modules() if isinstance(module, SplitBatchNorm)), default=1)
    fewest = 2 * splits  # images of a micro-batch: BatchNorm needs two in each piece

    def largest_batch(accum_steps: int) -> int:
        """Estimates, linearly between `fewest` and batch_size, how many images per micro-batch fit with room; or 0."""
        least, most = (measure(size, accum_steps=accum_steps) for size in (fewest, batch_size))  # bytes
        if least > ROOM * available:
            return 0
        return int(fewest + (ROOM * available - least) / (most - least) * (batch_size - fewest)) // splits * splits

    images = batch_size * accum_steps  # images of a step, in one process
    processes = get_dist_info().local_world_size
    largest = largest_batch(accum_steps)
    remedies = []
    if largest:
        remedies.append(f"--batch-size {largest * accum_steps * processes}")
    largest = largest_batch(2)  # any --accum-steps above 1 needs as much
    divisors = [n for n in range(2, images // fewest + 1) if images % (n * splits) == 0]
    remedies += [f"--accum-steps {n}" for n in divisors if images // n <= largest][:1]
    raise UserError(
        f"--batch-size {images * processes}: {sizes}; {' or '.join(remedies) or 'no batch'} can fit; smaller "
        "--image-size, smaller --arch and --amp bf16 need less; --no-memory-check skips this check",
        on_all_ranks=True,
    )


def step_memory(model, batch_size: int, image_size: int, *, accum_steps=1, momentum=True, dtype=None, device) -> int:
    """Bytes that a training step needs at least in this process, as its forward or its backward pass ends."""
    constant = storage_bytes([*model.parameters(), *model.buffers()])
    gradients = storage_bytes([parameter for parameter in model.parameters() if parameter.requires_grad])
    constant += gradients * (momentum + (get_world_size() > 1))  # DistributedDataParallel copies the gradients
    accumulated = gradients if accum_steps > 1 else 0  # of earlier micro-batches
    return constant + max(gradients, accumulated + activation_memory(model, batch_size, image_size, dtype, device))


def activation_memory(model, batch_size: int, image_size: int, dtype, device) -> int:
    """Bytes of the images and of what autograd saves, or of the largest input and output of a module if that is more.

    Nothing is allocated, since the forward pass runs on a copy of the model with fake tensors, shapes without values.
    """
    mode = FakeTensorMode()
    fakes = {id(tensor): mode.from_tensor(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    fake = copy.deepcopy(model, fakes.copy()).train()
    saved = []
    in_module = []

    def note_module(module, inputs, output):
        in_module.append(storage_bytes([value for value in (*inputs, output) if torch.is_tensor(value)], held))

    for module in list(fake.modules())[1:]:
        module.register_forward_hook(note_module)
        if isinstance(module, torch.nn.SyncBatchNorm):
            module.__class__ = torch.nn.BatchNorm2d  # saves the same, without the other ranks
    with mode, without_exchange():
        views = 2 if isinstance(fake, SSFL) and fake.contrast else 1
        images = [torch.empty(batch_size, 3, image_size, image_size, device=device) for _ in range(views)]
        labels = torch.zeros(batch_size, dtype=torch.long, device=device)
        held = {tensor.untyped_storage()._cdata for tensor in [*fakes.values(), *images, labels]}
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.detach()), lambda _: None):
            step_loss(fake, images, labels, dtype, enqueue=False)  # the batch may be larger than the queue
    return storage_bytes([*images, labels]) + max(storage_bytes(saved, held), *in_module)


def step_loss(model, images, labels, dtype, **options) -> torch.Tensor:
    """Any stage's loss: cross entropy of its first logits, plus its second loss; options: of stage I's network."""
    with torch.autocast(labels.device.type, dtype, enabled=dtype is not None):
        outputs = model(*images, labels=labels, **options) if isinstance(model, SSFL) else model(*images)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return F.cross_entropy(outputs[0], labels) + sum(output for output in outputs if output.dim() == 0)


def storage_bytes(tensors, held=frozenset()) -> int:
    """Bytes of the tensors' storages that are not in `held`; shared ones count once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages if storage._cdata not in held}.values())


def available_memory(device, proc=Path("/proc"), groups=Path("/sys/fs/cgroup")) -> tuple[float, str]:
    """(bytes that this process can still allocate, what limits them); infinity if the system does not say.

    On the host, the processes of a node share what the kernel can give and what control groups (version 2) leave.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), "free on the GPU"
    lines = [line for line in read_lines(proc / "meminfo") if line.startswith("MemAvailable:")]
    limits = [(int(line.split()[1]) * 1024, "MemAvailable") for line in lines]
    for path in [line[4:] for line in read_lines(proc / "self/cgroup") if line.startswith("0::/")]:
        for group in (groups / path, *(groups / path).parents):
            limit = read_lines(group / "memory.max")
            used = read_lines(group / "memory.current")
            if limit and used and limit[0].isdecimal():
                stat = dict(line.split() for line in read_lines(group / "memory.stat"))
                cached = int(stat.get("active_file", 0)) + int(stat.get("inactive_file", 0))  # the kernel drops these
                limits.append((max(0, int(limit[0]) - max(0, int(used[0]) - cached)), "limit of the control group"))
    return min(((free // get_dist_info().local_world_size, source) for free, source in limits), default=(math.inf, ""))


def read_lines(path: Path) -> list[str]:
    """The lines of a file of the kernel, none if it cannot be read."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
