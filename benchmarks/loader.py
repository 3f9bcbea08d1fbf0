"""Loading of training batches, compared with torchvision's ImageFolder, the same views, ToTensor and Normalize.

    python -m benchmarks.loader [--data DIR] [--workers 2] [--scaling]

DIR is a folder of class folders. Without it, JPEG files of 500 x 375 pixels are generated, smooth shapes with fine
noise, about 60 KB each. The time of an epoch is from its start to its last batch on the device, with workers that are
already running; ours includes the normalization, which it does on the device. It is given for stage I (two views) and
for stages II and III (one). --workers 0 shows what a single process does.
"""

import contextlib
import functools
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

from benchmarks import common
from datasets.loaders import Loader
from datasets.samplers import BatchSampler, ShuffledSampler
from datasets.splits import Split, class_folders
from datasets.transforms import GaussianBlur, Views
from models.preprocess import MEAN, SMALL, STD
from utils.command_line import whole_number

STAGES = {"I": ("query", "key"), "II and III": ("query",)}
SCALING_WORKERS = (0, 1, 2, 4, 8, 16, 32)


def several_crops(transforms, image) -> list:
    """The transforms' results, as of MoCo's TwoCropsTransform."""
    return [transform(image) for transform in transforms]


def baseline_view(name, size) -> T.Compose:
    """A view as it is usually written, for images of more than 64 pixels."""
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


def make_images(root: Path, counts: list[int], size=(500, 375)):
    """Writes JPEG files into class folders of root, counts[c] for class c: smooth shapes with fine noise."""
    generator = np.random.default_rng(0)
    for label, count in enumerate(counts):
        for i in range(count):
            coarse = Image.fromarray(generator.integers(0, 256, (10, 13, 3), dtype=np.uint8))
            pixels = np.asarray(coarse.resize(size, Image.BICUBIC), dtype=np.float32)
            pixels = pixels + generator.normal(0, 8, pixels.shape)
            file = root / f"class{label:02}" / f"{i}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, quality=90)


def loaders(folder: Path, names, workers: int, args) -> dict:
    """The loaders of the views with these names, by version."""
    device = torch.device(args.device)
    (images, _) = class_folders(folder.parent, folder.name)

    def ours(augment):
        dataset = Split("train", str(folder.parent), images).dataset(Views(names, args.size, 0, augment))
        return Loader("train", dataset, BatchSampler(ShuffledSampler(images.labels, 0), args.batch), workers, device)

    plain = ImageFolder(folder, functools.partial(several_crops, [baseline_view(name, args.size) for name in names]))
    baseline = DataLoader(
        plain, args.batch, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )  # fmt: skip
    return {"baseline": baseline, "pil": ours("pil"), "device": ours("device")}


def epoch(loader, device):
    """Iterates over a loader once, and brings the batches to the device, where ours are already."""
    for views, labels, *_ in loader:
        for tensor in (*views, labels):
            tensor.to(device, non_blocking=True)


def table_rows(folder, stage, worker_counts, args) -> list[tuple[str, ...]]:
    """One row per number of workers and version."""
    rows = []
    for workers in worker_counts:
        opened = loaders(folder, STAGES[stage], workers, args)
        functions = {name: functools.partial(epoch, loader, args.device) for name, loader in opened.items()}
        try:
            taken = common.medians(functions, args.repeats, args.device)
        finally:
            for name in ("pil", "device"):
                opened[name].close()
        images = len(opened["baseline"]) * args.batch
        for name, seconds in taken.items():
            rate = f"{images / seconds:.0f}", f"{taken['baseline'] / seconds:.2f}"
            rows.append((f"{stage}, {workers}", name, *rate))
    return rows


@contextlib.contextmanager
def image_folder(args):
    """Yields the folder of --data, or a temporary folder of generated images."""
    if args.data:
        yield Path(args.data).resolve()
        return
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "images"
        make_images(folder, [len(range(label, args.images, 4)) for label in range(4)])
        yield folder


def tables(args, argv) -> list[common.Table]:
    """Loading by stage, and by number of workers with --scaling."""
    title = f"{common.command('benchmarks.loader', argv)}; {common.machine(args.device)}"
    headers = ("stage, workers", "version", "images/s", "times as fast")
    with image_folder(args) as folder:
        rows = [row for stage in STAGES for row in table_rows(folder, stage, [args.workers], args)]
        found = [common.Table("loader", title, headers, rows)]
        if args.scaling:
            rows = table_rows(folder, "I", args.scaling_workers, args)
            found.append(common.Table("loader by workers", title, headers, rows))
    return found


def main(argv=None) -> int:
    parser = common.argument_parser(__doc__, "loader", repeats=5)
    add = parser.add_argument
    count = whole_number(1)
    add("--data", metavar="DIR", help="folder of class folders of images")
    add("--images", type=count, default=256, metavar="N", help="images to generate if no DIR is given")
    add("--size", type=whole_number(SMALL + 1), default=224, metavar="S", help="side of the views")
    add("--batch", type=count, default=32, metavar="N", help="images per batch")
    add("--workers", type=whole_number(), default=os.cpu_count(), metavar="N")
    cores = [n for n in SCALING_WORKERS if n <= 2 * os.cpu_count()]
    add("--scaling-workers", type=whole_number(), nargs="+", default=cores, metavar="N")
    return common.run(parser, argv, tables)


if __name__ == "__main__":
    sys.exit(main())
