"""Long-tailed versions of small balanced data sets (CIFAR, Fashion-MNIST), written as PNG files and lists."""

import os
import tarfile
import tempfile
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import extract_archive
from tqdm import tqdm

from utils.errors import UserError, one_line
from utils.files import atomic_write

from .list_writer import list_content, refuse_other_content, write_files
from .published import download_errors

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # from the package dataset-fashion-mnist
CIFAR = {10: CIFAR10, 100: CIFAR100}


def long_tail_counts(largest: int, imbalance, num_classes: int) -> list[int]:
    """Images per class, floor(largest * imbalance^(-c / (C-1))), the exponential profile of CIFAR-LT.

    imbalance: a number of at least 1, or a string of one. Exact: rounding never makes a count one too small.
    """
    ratio, last = Fraction(imbalance), num_classes - 1
    counts = []
    for c in range(num_classes):
        count = int(largest * float(ratio) ** (-c / last)) + 1
        while count**last * ratio**c > largest**last:
            count -= 1
        counts.append(count)
    return counts


@dataclass
class SmallImages:
    """A data set in memory: images uint8 (N, H, W) or (N, H, W, 3), labels int (N,)."""

    classes: list[str]
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def read_fashion_mnist(source, download_to: Path, url=None) -> SmallImages:
    """Fashion-MNIST from the idx files, plain or gzipped, in source; by default Debian's, else downloaded.

    url: a mirror for the download. Raises UserError if the files are missing or damaged.
    """
    if source is None and DEBIAN_FASHION_MNIST.is_dir():
        source = DEBIAN_FASHION_MNIST
    if source is None:
        mirrors = [url.rstrip("/") + "/"] if url else FashionMNIST.mirrors
        download = type("FashionMNIST", (FashionMNIST,), {"mirrors": mirrors})
        hint = "or install Debian's package dataset-fashion-mnist, or give the files with --source"
        with download_errors("Fashion-MNIST", hint):
            download(str(download_to), download=True)
        source = download_to / "FashionMNIST" / "raw"

    def read(reader, name):
        with tempfile.TemporaryDirectory() as unpacked:
            file = Path(source) / name
            archive = file.with_name(f"{name}.gz")
            try:
                if not file.is_file():
                    if not archive.is_file():
                        raise UserError(f"--source {source}: neither {name} nor {name}.gz is in it")
                    file = Path(extract_archive(str(archive), unpacked))
                return reader(str(file)).numpy()
            except UserError:
                raise
            except Exception as error:  # the reader raises nearly anything on a damaged file
                raise UserError(f"{file}: damaged, or not an idx file ({one_line(error)})") from None

    data = SmallImages(
        FashionMNIST.classes,
        read(read_image_file, "train-images-idx3-ubyte"),
        read(read_label_file, "train-labels-idx1-ubyte"),
        read(read_image_file, "t10k-images-idx3-ubyte"),
        read(read_label_file, "t10k-labels-idx1-ubyte"),
    )
    for images, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
        if len(images) != len(labels):
            raise UserError(f"{source}: {len(images)} images but {len(labels)} labels; get the files again")
    return data


def read_cifar(num_classes: int, source, download_to: Path, url=None) -> SmallImages:
    """CIFAR-10 or CIFAR-100, whose checksums torchvision verifies, from source or downloaded.

    source: the published tar.gz, its unpacked folder, or a folder that holds either. url: a mirror's folder.
    """
    original = CIFAR[num_classes]
    if source is None:
        address = f"{url.rstrip('/')}/{original.filename}" if url else original.url
        download = type("CIFAR", (original,), {"url": address})
        hint = f"or fetch {original.url} by hand and give it with --source"
        with download_errors(f"CIFAR-{num_classes}", hint):
            download(str(download_to), download=True)
        return load_cifar(original, download_to)
    source = Path(source)
    if source.name == original.base_folder and source.is_dir():
        return load_cifar(original, source.parent)
    if (source / original.base_folder).is_dir():
        return load_cifar(original, source)
    archive = source if source.is_file() else source / original.filename
    if not archive.is_file():
        raise UserError(f"--source {source}: neither {original.filename} nor {original.base_folder}/ is there")
    with tempfile.TemporaryDirectory() as unpacked:
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(unpacked, filter="data")  # refuses members that would be written outside
        except Exception as error:  # truncated, not an archive, disk full
            raise UserError(f"{archive}: cannot be unpacked ({one_line(error)})") from None
        return load_cifar(original, Path(unpacked), named=archive)


def load_cifar(original, root: Path, named=None) -> SmallImages:
    """Reads the unpacked files below root; named: their name in messages."""
    try:
        train, test = original(str(root), train=True), original(str(root), train=False)
    except RuntimeError as error:
        raise UserError(f"{named or root / original.base_folder}: incomplete or damaged ({one_line(error)})") from None
    return SmallImages(train.classes, train.data, np.array(train.targets), test.data, np.array(test.targets))


def pick(labels: np.ndarray, counts: list[int], held_out: int, seed: int):
    """(training, held out): image numbers, drawn without replacement in every class.

    With seed 0 the training images of CIFAR are those of the LDAM-DRW code (Cao et al., 2019), the usual reference:
    the same generator draws in the same order.
    """
    random = np.random.RandomState(seed)
    train, rest = [], []
    for label, count in enumerate(counts):
        numbers = np.flatnonzero(labels == label)
        random.shuffle(numbers)
        train += sorted(numbers[:count].tolist())
        rest += sorted(numbers[count : count + held_out].tolist())
    return train, rest


def write_long_tail(data: SmallImages, out: Path, largest, imbalance, held_out: int, seed: int, overwrite: bool):
    """Writes out/{train,val,test}/<class>/<number>.png, the three lists and classes.txt; returns the training counts.

    largest: images of the largest class, by default all. held_out: validation images per class, taken from the training
    images that are left; 0: the test images are used for validation too. Files that exist are kept. Raises UserError if
    the data do not have that many images, or if out holds a different selection and overwrite is not set.
    """
    available = np.bincount(data.train_labels, minlength=len(data.classes)).tolist()
    most = min(available) - held_out
    largest = most if largest is None else largest
    if largest > most:
        kept = f", of which {held_out} are kept for validation" if held_out else ""
        raise UserError(f"--max-per-class {largest}: the classes have {min(available)} images{kept}; at most {most}")
    if Fraction(imbalance) > largest:
        raise UserError(f"--imbalance {imbalance}: leaves the last class without images; at most {largest} here")
    counts = long_tail_counts(largest, imbalance, len(data.classes))

    train, held = pick(data.train_labels, counts, held_out, seed)
    digits = len(str(len(data.classes) - 1))
    folders = [f"{c:0{digits}}_{name.lower().replace('/', '_')}" for c, name in enumerate(data.classes)]

    def entries(split, numbers, labels):
        return [(f"{split}/{folders[labels[i]]}/{i:05}.png", int(labels[i])) for i in numbers]

    lists = {
        "train": entries("train", train, data.train_labels),
        "val": entries("val", held, data.train_labels),
        "test": entries("test", range(len(data.test_labels)), data.test_labels),
    }
    images = {path: data.train_images[i] for (path, _), i in zip(lists["train"], train, strict=True)}
    images |= {path: data.train_images[i] for (path, _), i in zip(lists["val"], held, strict=True)}
    images |= {path: image for (path, _), image in zip(lists["test"], data.test_images, strict=True)}
    if not held_out:
        lists["val"] = lists["test"]
    files = {"classes.txt": "".join(f"{name}\n" for name in data.classes).encode()}
    files |= {f"{split}.txt": list_content(lists[split]) for split in ("train", "val", "test")}

    refuse_other_content(out, files, overwrite)
    remove_other_images(out, images, overwrite)
    write_images(out, images)
    write_files(out, files, overwrite)
    return counts


def remove_other_images(out: Path, images: dict, overwrite: bool):
    """Removes images of another selection, which a reader of class folders would take for images of this one."""
    for split in ("train", "val", "test"):
        for file in out.glob(f"{split}/*/*.png"):
            if file.relative_to(out).as_posix() in images:
                continue
            if not overwrite:
                raise UserError(f"{file}: an image of another selection; choose another --out, or pass --overwrite")
            file.unlink()


def write_images(out: Path, images: dict[str, np.ndarray]):
    """Writes the images that are not there yet."""
    absent = [path for path in images if not (out / path).is_file()]
    for folder in {os.path.dirname(path) for path in absent}:
        (out / folder).mkdir(parents=True, exist_ok=True)
    for path in tqdm(absent, desc="images", unit="image", disable=None if absent else True):
        with atomic_write(out / path, sync=False) as file:
            Image.fromarray(images[path]).save(file, format="PNG")
