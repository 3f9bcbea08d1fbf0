"""Long-tailed selections: of small data sets (CIFAR, Fashion-MNIST) as PNG files, of class folders as lists."""

import os
import re
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
from utils.images import is_image_file

from ..splits import CLASSES_FILE, class_folders
from .list_writer import list_content, refuse_other_content, write_files
from .published import download_errors

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # from the package dataset-fashion-mnist
CIFAR = {10: CIFAR10, 100: CIFAR100}
WRITTEN = re.compile(r"\w+/\d+_[^/]+/\d{5}\.png")  # the images that write_long_tail writes


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
    if source is None and not url and DEBIAN_FASHION_MNIST.is_dir():
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
        if labels.max() >= len(data.classes):
            raise UserError(f"{source}: a label of {labels.max()}, of {len(data.classes)} classes; get the files again")
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


def choose(labels: np.ndarray, classes: list[str], largest, imbalance, held_out: int, seed: int):
    """(training images per class, training image numbers, held-out image numbers) of a long-tailed selection.

    labels: class of every image; largest: images of the first class, by default the smallest class's without the
    held-out ones; held_out: images of each class that are kept for validation. Raises UserError if a class has too few.
    """
    available = np.bincount(labels, minlength=len(classes)).tolist()
    largest = min(available) - held_out if largest is None else largest
    if largest < 1:
        name = classes[available.index(min(available))]
        if not held_out:
            raise UserError(f"class {name} has no training images; remove its folder, or give --max-per-class")
        raise UserError(f"--held-out {held_out}: class {name} has {min(available)} images, none is left; lower it")
    counts = long_tail_counts(largest, imbalance, len(classes))
    for name, count, number in zip(classes, counts, available, strict=True):
        if count + held_out > number:
            kept, hint = (f" next to {held_out} held out", ", or --held-out") if held_out else ("", "")
            raise UserError(
                f"--max-per-class {largest}: class {name} has {number} images, at most {number - held_out} to train on"
                f"{kept}, not {count}; lower it{hint}"
            )
    if Fraction(imbalance) > largest:
        raise UserError(f"--imbalance {imbalance}: leaves the last class without images; at most {largest} here")
    return counts, *pick(labels, counts, held_out, seed)


def write_long_tail(data: SmallImages, out: Path, largest, imbalance, held_out: int, seed: int, overwrite: bool):
    """Writes out/{train,val,test}/<class>/<number>.png, the three lists and classes.txt; returns the training counts.

    The arguments are those of choose; held_out 0: the test images are used for validation too. Files that exist are
    kept. Raises UserError as choose does, if out holds a different selection and overwrite is not set, and if images of
    someone else are in the folders of out, or behind links there.
    """
    counts, train, held = choose(data.train_labels, data.classes, largest, imbalance, held_out, seed)
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
    files = list_files(lists, data.classes)

    refuse_other_content(out, files, overwrite)
    remove_other_images(out, images, overwrite)
    write_images(out, images)
    write_files(out, files, overwrite)
    return counts


def list_files(lists: dict[str, list], classes: list[str]) -> dict[str, bytes]:
    """{name: content} of the list files and classes.txt; lists: split -> entries."""
    files = {CLASSES_FILE: "".join(f"{name}\n" for name in classes).encode()}
    return files | {f"{split}.txt": list_content(entries) for split, entries in lists.items()}


def link_long_tail(source: Path, out: Path, largest, imbalance, held_out: int, seed: int, overwrite: bool):
    """Writes the lists of a long-tailed selection from class folders; returns ({split: number of images}, counts).

    Test images are those of test/, else of val/; validation images the held-out ones of train/, else those of val/,
    else the test images: their number is then 0.

    source: has train/<class>/<image>, and test/ or val/ with the same classes; out gets links to these folders, so that
    no image is copied; overwrite: replace lists and links of another selection. The other arguments are those of
    choose. Raises UserError as choose does, and if source or out cannot be used.
    """
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; name the one that contains train/ and test/")
    held_splits = [split for split in ("test", "val") if (source / split).is_dir()]
    if not (source / "train").is_dir() or not held_splits:
        raise UserError(
            f"{source}: must have train/<class>/<image>, and test/ or val/ with the same class folders"
            " (prepare folder takes plain class folders)"
        )
    if out.resolve() == source.resolve():
        raise UserError(f"--out {out}: is the source itself; choose another folder for the lists")
    train, classes = class_folders(source, "train")
    if len(classes) < 2:
        raise UserError(f"{source / 'train'}: has one class folder; a long tail needs two classes")

    def entries(images, numbers=None):
        numbers = range(len(images)) if numbers is None else numbers
        return [(images.path(i), int(images.labels[i])) for i in numbers]

    counts, chosen, held = choose(train.labels.numpy(), classes, largest, imbalance, held_out, seed)
    lists = {split: entries(class_folders(source, split, classes)[0]) for split in held_splits}
    lists = {"train": entries(train, chosen), "val": lists[held_splits[-1]], "test": lists[held_splits[0]]}
    if held_out:
        lists["val"] = entries(train, held)
    files = list_files(lists, classes)
    refuse_other_content(out, files, overwrite)
    out.mkdir(parents=True, exist_ok=True)
    for split in ("train", *held_splits):
        link_folder(out / split, source / split, overwrite)
    write_files(out, files, overwrite)
    sizes = {split: len(found) for split, found in lists.items()}
    return sizes | ({"val": 0} if lists["val"] is lists["test"] else {}), counts


def link_folder(link: Path, folder: Path, overwrite: bool):
    """Makes a symbolic link to a folder. Raises UserError if something else is there, a link only without overwrite."""
    target = os.path.abspath(folder)
    if link.is_symlink() and os.readlink(link) == target:
        return
    if link.is_symlink() and overwrite:
        link.unlink()
    if os.path.lexists(link):
        raise UserError(f"{link}: exists and is not a link to {target}; choose another --out")
    link.symlink_to(target)


def remove_other_images(out: Path, images: dict, overwrite: bool):
    """Removes images of an earlier selection, which a reader of class folders would take for images of this one.

    Raises UserError, before any is removed, if overwrite is not set, and for links and images that write_long_tail does
    not write. Files that are not images (.DS_Store, Thumbs.db) stay.
    """
    others = []
    for split in ("train", "val", "test"):
        for path in sorted([out / split, *out.glob(f"{split}/*"), *out.glob(f"{split}/*/*")]):
            name = path.relative_to(out).as_posix()
            if path.is_symlink():
                raise UserError(f"{path}: is a link to {os.path.realpath(path)}, which stays; choose another --out")
            if path.is_dir() or name in images or not is_image_file(name):
                continue
            if not WRITTEN.fullmatch(name):
                raise UserError(f"{path}: was not written by this command, and stays; choose another --out")
            others.append(path)
    if others and not overwrite:
        raise UserError(f"{others[0]}: an image of another selection; choose another --out, or pass --overwrite")
    for file in others:
        file.unlink()


def write_images(out: Path, images: dict[str, np.ndarray]):
    """Writes the images that are not there yet."""
    absent = [path for path in images if not (out / path).is_file()]
    for folder in {os.path.dirname(path) for path in absent}:
        (out / folder).mkdir(parents=True, exist_ok=True)
    for path in tqdm(absent, desc="images", unit="image", disable=None if absent else True):
        with atomic_write(out / path, sync=False) as file:
            Image.fromarray(images[path]).save(file, format="PNG")
