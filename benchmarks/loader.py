"""Loading of training batches, compared with torchvision's ImageFolder, the same views, ToTensor and Normalize.

    python -m benchmarks.loader [--data DIR] [--workers 2] [--scaling]

DIR is a folder of class folders. Without it, JPEG files of 500 x 375 pixels are generated, smooth shapes with fine
noise, about 60 KB each. The time of an epoch is from its start to its last batch on the device, with workers that are
already running; ours includes the normalization, which it does on the device. The time at a worker is that of decoding
an image and making its views, in one process and thread. Both are given for stage I (two views) and for stages II and
III (one).
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
from datasets.loaders import Loader
from datasets.samplers import BatchSampler, ShuffledSampler
from datasets.splits import Split, class_folders
from datasets.transforms import GaussianBlur, Views
from models.preprocess import MEAN, SMALL, STD
from utils.command_line import whole_number

STAGES = {"I": ("query", "key"), "II and III": ("query",)}
SCALING_WORKERS = (0, 1, 2, 4, 8, 16, 32)


class SeveralCrops:
    """Returns a list of the transforms' results, as MoCo's TwoCropsTransform does."""

    def __init__(self, transforms):
        self.transforms = transforms

    def __call__(self, image):
        return [transform(image) for transform in self.transforms]


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


def make_images(root: Path, count: int, classes: int = 4):
    """Writes `count` JPEG files of 500 x 375 pixels in class folders."""
    generator = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (10, 13, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((500, 375), Image.BICUBIC), dtype=np.float32)
        pixels = pixels + generator.normal(0, 8, pixels.shape)
        folder = root / f"class{i % classes}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)


class PlainLoader(DataLoader):
    """A DataLoader as it is usually made; yields (views, labels) on the device."""

    def __init__(self, dataset, batch_size, workers, device):
        super().__init__(
            dataset, batch_size, sampler=RandomSampler(dataset), num_workers=workers, drop_last=True,
            pin_memory=device.type == "cuda", persistent_workers=workers > 0,
        )  # fmt: skip
        self.device = device

    def __iter__(self):
        for views, labels in super().__iter__():
            yield [view.to(self.device, non_blocking=True) for view in views], labels.to(self.device)

    def close(self):
        """Ends the workers."""
        self._iterator = None


def versions(folder: Path, names, args) -> dict:
    """(data set, function of an item's number, function of the number of workers that returns a loader), by version."""
    images, _ = class_folders(folder.parent, folder.name)
    device = torch.device(args.device)

    def ours(augment):
        dataset = Split("train", str(folder.parent), images).dataset(Views(names, args.size, 0, augment))
        batch_sampler = BatchSampler(ShuffledSampler(images.labels, 0), args.batch)
        return (
            dataset,
            lambda i: dataset[0, 0, i],
            lambda workers: Loader("train", dataset, batch_sampler, workers, device),
        )

    def plain():
        dataset = ImageFolder(folder, SeveralCrops([baseline_view(name, args.size) for name in names]))
        return dataset, lambda i: dataset[i], lambda workers: PlainLoader(dataset, args.batch, workers, device)

    return {"baseline": plain(), "pil": ours("pil"), "device": ours("device")}


def at_a_worker(made, args) -> dict[str, float]:
    """Median seconds per image, by version."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:

        def every(dataset, item, _):
            return lambda: [item(i) for i in range(len(dataset))]

        taken = common.medians({name: every(*parts) for name, parts in made.items()}, args.repeats)
        return {name: duration / len(made[name][0]) for name, duration in taken.items()}
    finally:
        torch.set_num_threads(threads)


def epochs(made, workers, args) -> dict[str, float]:
    """Median seconds of an epoch, by version."""
    loaders = {name: build(workers) for name, (_, _, build) in made.items()}

    def whole(loader):
        return lambda: sum(1 for _ in loader)

    try:
        return common.medians({name: whole(loader) for name, loader in loaders.items()}, args.repeats, args.device)
    finally:
        for loader in loaders.values():
            loader.close()


HEADERS = ("stage, workers", "version", "at a worker, per image", "of baseline", "of pil", "images/s", "times as fast")


def table_rows(folder, names, stage, worker_counts, args) -> list[tuple[str, ...]]:
    """One row per number of workers and version."""
    made = versions(folder, names, args)
    alone, rows = at_a_worker(made, args), []
    for workers in worker_counts:
        taken = epochs(made, workers, args)
        images = len(made["pil"][0]) // args.batch * args.batch
        rows += [
            (
                f"{stage}, {workers}", name, f"{alone[name] * 1e3:.2f} ms", f"{alone[name] / alone['baseline']:.2f}",
                f"{alone[name] / alone['pil']:.2f}", f"{images / taken[name]:.0f}",
                f"{taken['baseline'] / taken[name]:.2f}",
            )
            for name in made
        ]  # fmt: skip
    return rows


@contextlib.contextmanager
def image_folder(args):
    """Yields the folder of --data, or a temporary folder of generated images."""
    if args.data:
        yield Path(args.data).resolve()
        return
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "images"
        folder.mkdir()
        make_images(folder, args.images)
        yield folder


def tables(args, argv) -> list[common.Table]:
    """Loading by stage, and by number of workers with --scaling."""
    title = f"{common.command('benchmarks.loader', argv)}; {common.machine(args.device)}"
    with image_folder(args) as folder:
        rows = [
            row for stage, names in STAGES.items() for row in table_rows(folder, names, stage, [args.workers], args)
        ]
        found = [common.Table("loader", title, HEADERS, rows)]
        if args.scaling:
            rows = table_rows(folder, STAGES["I"], "I", args.scaling_workers, args)
            found.append(common.Table("loader by workers", title, HEADERS, rows))
    return found


def main(argv=None) -> int:
    parser = common.argument_parser(__doc__, "loader", repeats=5)
    parser.add_argument("--data", metavar="DIR", help="folder of class folders of images")
    parser.add_argument(
        "--images", type=whole_number(1), default=256, metavar="N", help="images to generate if no DIR is given"
    )
    parser.add_argument("--size", type=whole_number(SMALL + 1), default=224, metavar="S")
    parser.add_argument("--batch", type=whole_number(1), default=32, metavar="N", help="images per batch")
    parser.add_argument("--workers", type=whole_number(), default=os.cpu_count(), metavar="N")
    cores = [n for n in SCALING_WORKERS if n <= 2 * os.cpu_count()]
    parser.add_argument("--scaling-workers", type=whole_number(), nargs="+", default=cores, metavar="N")
    return common.run(parser, argv, tables)


if __name__ == "__main__":
    sys.exit(main())
