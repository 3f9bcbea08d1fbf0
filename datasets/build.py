"""The data of a run: which lists, checked before anything is trained, and a loader for each."""

import platform
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from tqdm import tqdm

from utils.distributed import (
    find_difference,
    gather_objects,
    get_dist_info,
    get_rank,
    get_world_size,
    is_main_process,
    print_main,
    raise_on_all_ranks,
)
from utils.errors import UserError
from utils.groups import numbering_note

from .loaders import Loader
from .samplers import BatchSampler, ShuffledSampler, eval_batches
from .splits import find_class_names, find_splits, unlisted_note
from .transforms import Views


class Data(NamedTuple):
    """Loaders of the splits (val is None under --evaluate), and what is known of the classes.

    train_counts: int (num_classes,), training images per class; classes: their names, or None; val_balanced: whether
    all classes in the validation list have the same number of images in it; checksums: split -> that of its list.
    """

    train: Loader
    val: Loader | None
    test: Loader
    num_classes: int
    train_counts: torch.Tensor
    classes: list[str] | None
    val_balanced: bool
    checksums: dict[str, int]


@contextmanager
def build_data(args, device, views=("query",), sampler_class=ShuffledSampler, **sampler_options):
    """Yields the Data of a run; its workers end with the block.

    views: names of the views of a training image, keys of transforms.VIEWS; sampler_class, sampler_options: the sampler
    of the training list, from samplers.py. Raises UserError, on all ranks, for missing images, labels beyond
    --num-classes, and a batch that the processes or the data cannot fill. Under --evaluate the training list is only
    read for its counts.
    """
    info = get_dist_info()
    batch_size = micro_batch_size(args, info.local_world_size)
    eval_batch_size = max(1, args.eval_batch_size // info.local_world_size)
    splits = locate_splits(args, info)
    ranks = {"rank": get_rank(), "world_size": get_world_size()}
    with raise_on_all_ranks():
        num_classes = check_labels(args, splits)
        classes, note = find_class_names(args.data, splits["train"], num_classes)
        train = splits["train"].image_list
        sampler = sampler_class(train.labels, seed=args.seed, **ranks, **sampler_options)
        sampler = BatchSampler(sampler, batch_size, args.accum_steps)
        if not args.evaluate and sampler.images_per_step * get_world_size() > len(train):  # it would repeat some
            nodes = f" on each of {info.nodes} nodes" if info.nodes > 1 else ""
            what = f"--batch-size {args.batch_size}{nodes}: the training list's {len(train)} images give no full step"
            raise UserError(f"{what}; lower it")
    train_counts = train.counts(num_classes)
    notes = [*list_warnings(splits, train_counts), note, *numbering_note(classes)]
    if is_main_process() and not args.evaluate:
        notes += unlisted_note(splits)
    for line in filter(None, notes):
        print_main(line)
    loaders = {}
    for name, split in splits.items():
        if name == "train":
            transform = Views(views, args.image_size, args.seed, args.augment, args.jitter)
        else:
            transform = Views(("eval",), args.image_size)
            sampler = eval_batches(len(split.image_list), eval_batch_size, **ranks)
        workers = -(-args.workers // info.local_world_size)
        options = {"channels_last": args.channels_last, "mean": args.mean, "std": args.std}
        loaders[name] = Loader(name, split.dataset(transform), sampler, workers, device, **options)
    try:
        yield Data(
            loaders["train"], loaders.get("val"), loaders["test"], num_classes, train_counts,
            classes, "val" in splits and is_balanced(splits["val"].image_list),
            {name: split.image_list.checksum for name, split in splits.items()},
        )  # fmt: skip
    finally:
        for loader in loaders.values():
            loader.close()


def micro_batch_size(args, processes: int) -> int:
    """Returns the number of images per micro-batch and process. processes: how many there are on this node.

    Raises UserError, the same on all ranks, if BatchNorm has fewer than two images in one of its --bn-splits pieces, or
    the pieces are not equal.
    """
    parts = processes * args.accum_steps
    size = args.batch_size // parts
    if args.evaluate:
        return size
    if size % args.bn_splits or size < 2 * args.bn_splits:
        unit = parts * args.bn_splits  # what the batch must be a multiple of, at least twice
        below = args.batch_size // unit * unit
        sizes = " or ".join(str(n) for n in (below, below + unit) if n >= 2 * unit) or 2 * unit
        flags = {"--bn-splits": args.bn_splits, "--accum-steps": args.accum_steps, "--batch-size": args.batch_size}
        flag, value = next((flag, value) for flag, value in flags.items() if value > 1 or flag == "--batch-size")
        raise UserError(
            f"{flag} {value}: a micro-batch has {size} images in each of {processes} processes, and BatchNorm needs "
            f"two or more in each of {args.bn_splits} equal pieces; use --batch-size {sizes}",
            on_all_ranks=True,
        )
    if size * parts != args.batch_size:
        print_main(
            f"--batch-size {args.batch_size}: not a multiple of {processes} processes times {args.accum_steps} "
            f"micro-batches; steps have {size * parts} images on this node"
        )
    return size


def locate_splits(args, info) -> dict:
    """The splits that the run needs; the first process of a node looks for their files, the others use its result.

    Raises UserError, on all ranks, if a split cannot be read, or if its entries are not the same on all ranks.
    """
    given = {split: getattr(args, f"{split}_list") for split in ("train", "val", "test")}
    wanted = ("train", "test") if args.evaluate else ("train", "val", "test")
    checked = ("test",) if args.evaluate else wanted

    disable = None if is_main_process() else True  # None: shown only on a terminal
    progress = partial(tqdm, desc="looking for the images", leave=False, disable=disable)
    with raise_on_all_ranks():
        splits = find_splits(args.data, given, wanted, progress, check=checked if info.local_rank == 0 else ())
    difference = find_difference({name: split.image_list.checksum for name, split in splits.items()})
    if difference:
        name, rank, *_ = difference
        file = splits[name].image_list.name
        raise UserError(
            f"{file}: differs between rank 0 and rank {rank}; give all nodes the same data", on_all_ranks=True
        )
    host = platform.node()
    own = {name: {"layout": split.layout, "missing": split.missing} for name, split in splits.items()}
    reports = gather_objects((host, info.local_rank, own))
    result = next(report for node, local_rank, report in reports if node == host and local_rank == 0)
    return {name: split._replace(**result[name]) for name, split in splits.items()}


def check_labels(args, splits: dict) -> int:
    """The number of classes. Raises UserError for missing files, and for labels beyond --num-classes."""
    for name, split in splits.items():
        if not (args.evaluate and name == "train"):
            split.require()
    num_classes = args.num_classes
    if num_classes is None:
        images = splits["train"].image_list
        images.check_num_classes(hint=", or give --num-classes")
        num_classes = images.num_classes
    for split in splits.values():
        largest = split.image_list.num_classes - 1
        if largest >= num_classes:
            where = split.image_list.locate([int(split.image_list.labels.argmax())])
            raise UserError(
                f"{where}: the label {largest} is out of range of {num_classes} classes"
                f"{split.image_list.label_hint()}; correct the list, or give --num-classes {largest + 1}"
            )
    return num_classes


def list_warnings(splits: dict, train_counts: torch.Tensor):
    """Yields a line for each list that may not be the one that was meant."""
    train = splits["train"].image_list
    empty = (train_counts == 0).nonzero()[:, 0].tolist()
    if empty:
        number = f"{len(empty)} of {len(train_counts)}"
        yield f"warning: {train.name}: {number} classes have no images, such as class {empty[0]}{train.label_hint()}"
    for name, split in splits.items():
        yield from split.image_list.notes
        if name != "train" and split.image_list.checksum == train.checksum:
            yield f"warning: {split.image_list.name}: has the images of the training list"


def is_balanced(images) -> bool:
    """Whether all classes in a list have the same number of images in it."""
    counts = images.counts(images.num_classes)
    return len(counts[counts > 0].unique()) == 1
