"""Loading of training batches: ours against torchvision's ImageFolder with two views, ToTensor and Normalize.

    python -m benchmarks.loader [--data DIR] [--workers 2] [--scaling]

Without DIR, JPEG files of 500 x 375 pixels are made, smooth shapes under fine noise, of about 60 KB each. DIR: a
folder of class folders. An epoch's time is from its start to its last batch, with workers that are running already;
the time at a worker is that of decoding an image and making its views, in one process and thread. Both are given for
stage I (two views) and for stages II and III (one).
"""

import contextlib
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, RandomSampler
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

from benchmarks import common
from datasets.dataset import ListFileDataset
from datasets.loaders import batches, build_loader
from datasets.samplers import BatchSampler, ShuffledSampler
from datasets.splits import class_folders
from datasets.transforms import GaussianBlur, Views
from models.preprocess import MEAN, SMALL, STD

STAGES = {"I": ("query", "key"), "II and III": ("query",)}
SCALING_WORKERS = (0, 1, 2, 4, 8, 16, 32)


class SeveralCrops:
    """As MoCo's TwoCropsTransform: a list of the transforms' results."""

    def __init__(self, transforms):
        self.transforms = transforms

    def __call__(self, image):
        return [transform(image) for transform in self.transforms]


def textbook_view(name, size) -> T.Compose:
    """A view as it is usually written; above 64 pixels."""
    if size <= SMALL:
        raise SystemExit(f"--size must be above {SMALL}: the plain version has the views of large images alone")
    if name == "query":
        start = [T.RandomResizedCrop(size), T.ColorJitter(0.4, 0.4, 0.4, 0)]
    else:
        start = [
            T.RandomResizedCrop(size, scale=(0.2, 1.0)),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            T.RandomGrayscale(p=0.2),
            T.RandomApply([GaussianBlur()], p=0.5),
        ]
    return T.Compose([*start, T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(MEAN, STD)])


def make_images(root: Path, count: int, classes: int = 4):
    """count JPEG files of 500 x 375 pixels in class folders."""
    generator = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (10, 13, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((500, 375), Image.BICUBIC), dtype=np.float32)
        pixels = pixels + generator.normal(0, 8, pixels.shape)
        folder = root / f"class{i % classes}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)


def versions(folder: Path, names, args) -> dict:
    """Data sets by name of the version, each with its items and its loader, a function of the number of workers."""
    index, _ = class_folders(folder.parent, folder.name)
    pinned = args.device == "cuda"

    def ours(augment):
        dataset = ListFileDataset(index, folder.parent, Views(names, args.size, 0, augment))
        batch_sampler = BatchSampler(ShuffledSampler(index.labels, 0), args.batch)
        return (
            dataset,
            lambda i: dataset[0, 0, i],
            lambda workers: build_loader(dataset, batch_sampler, workers, pinned),
        )

    def plain():
        dataset = ImageFolder(folder, SeveralCrops([textbook_view(name, args.size) for name in names]))
        return dataset, lambda i: dataset[i], lambda workers: DataLoader(
            dataset, args.batch, sampler=RandomSampler(dataset), num_workers=workers, pin_memory=pinned,
            drop_last=True, persistent_workers=workers > 0,
        )  # fmt: skip

    return {"textbook": plain(), "pil": ours("pil"), "device": ours("device")}


def at_a_worker(made, args) -> dict[str, float]:
    """Median seconds an image, by version."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:

        def every(dataset, item, _):
            return lambda: [item(i) for i in range(len(dataset))]

        taken = common.alternate({name: every(*parts) for name, parts in made.items()}, args.repeats)
        return {name: duration / len(made[name][0]) for name, duration in taken.items()}
    finally:
        torch.set_num_threads(threads)


def epochs(made, workers, args) -> dict[str, float]:
    """Median seconds of an epoch, by version."""

    def whole(build):
        loader = build(workers)
        return lambda: sum(1 for _ in batches(loader))

    return common.alternate({name: whole(build) for name, (_, _, build) in made.items()}, args.repeats)


HEADERS = ("stage, workers", "version", "at a worker, an image", "of textbook", "of pil", "images/s", "times as fast")


def rows(folder, names, stage, worker_counts, args) -> list[tuple[str, ...]]:
    made = versions(folder, names, args)
    alone, lines = at_a_worker(made, args), []
    for workers in worker_counts:
        taken = epochs(made, workers, args)
        images = len(made["pil"][0]) // args.batch * args.batch
        lines += [
            (
                f"{stage}, {workers}", name, f"{alone[name] * 1e3:.2f} ms", f"{alone[name] / alone['textbook']:.2f}",
                f"{alone[name] / alone['pil']:.2f}", f"{images / taken[name]:.0f}",
                f"{taken['textbook'] / taken[name]:.2f}",
            )
            for name in made
        ]  # fmt: skip
    return lines


@contextlib.contextmanager
def image_folder(args):
    """args.data, or a temporary folder of images made up."""
    if args.data:
        yield Path(args.data).resolve()
        return
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "images"
        folder.mkdir()
        make_images(folder, args.images)
        yield folder


def tables(args, argv) -> list[common.Table]:
    title = f"{common.command('benchmarks.loader', argv)}; {common.machine(args.device)}"
    with image_folder(args) as folder:
        lines = [row for stage, names in STAGES.items() for row in rows(folder, names, stage, [args.workers], args)]
        found = [common.Table("loader", title, HEADERS, lines)]
        if args.scaling:
            lines = rows(folder, STAGES["I"], "I", args.scaling_workers, args)
            found.append(common.Table("loader by workers", title, HEADERS, lines))
    return found


def main(argv=None) -> int:
    parser = common.argument_parser(__doc__, "loader", repeats=5)
    parser.add_argument("--data", metavar="DIR", help="folder of class folders of images")
    parser.add_argument("--images", type=int, default=256, help="images to make where no DIR is given")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    cores = [n for n in SCALING_WORKERS if n <= 2 * os.cpu_count()]
    parser.add_argument("--scaling-workers", type=int, nargs="+", default=cores, metavar="N")
    return common.run(parser, argv, tables)


if __name__ == "__main__":
    sys.exit(main())
