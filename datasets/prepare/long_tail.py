"""Long-tailed selections: of small data sets (CIFAR, Fashion-MNIST) as PNG files, of class folders as lists."""

import os
import re
import shutil
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import check_integrity, extract_archive
from tqdm import tqdm

from utils.errors import UserError, one_line, retry
from utils.files import atomic_write, is_dir, is_file
from utils.groups import numbering_note
from utils.images import is_image_file

from ..splits import SPLITS, class_folders
from .list_writer import list_files, read_entries, refuse_other_content, write_files
from .published import download_errors
from .trees import make_link

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # from the package dataset-fashion-mnist
IDX_FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
CIFAR = {10: CIFAR10, 100: CIFAR100}
WRITTEN = re.compile(r"\w+/\d+_[^/]+/\d{5}\.png")  # the images that write_long_tail writes


def long_tail_counts(largest: int, imbalance, num_classes: int) -> list[int]:
    """Images per class, floor(largest * imbalance^(-c / (C-1))), the exponential profile of CIFAR-LT.

    imbalance: a number of at least 1, or a string of one. Exact: rounding never makes a count one too small.
    """
    ratio = Fraction(imbalance)
    last = num_classes - 1
    counts = []
    for c in range(num_classes):
        count = int(largest * float(ratio) ** (-c / last)) + 1
        while count**last * ratio**c > largest**last:
            count -= 1
        counts.append(count)
    return counts


class SmallImages(NamedTuple):
    """A data set in memory: pixels uint8 (N, H, W) or (N, H, W, 3), labels int (N,)."""

    classes: list[str]
    train_pixels: np.ndarray
    train_labels: np.ndarray
    test_pixels: np.ndarray
    test_labels: np.ndarray


def read_fashion_mnist(source: Path | None, download_to: Path, url=None) -> SmallImages:
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
    data = SmallImages(FashionMNIST.classes, *(retry(read_idx, source, name) for name in IDX_FILES))
    for pixels, labels in ((data.train_pixels, data.train_labels), (data.test_pixels, data.test_labels)):
        if len(pixels) != len(labels) or labels.max() >= len(data.classes):
            found = f"{len(pixels)} images, {len(labels)} labels, the largest {labels.max()}"
            raise UserError(f"{source}: {found}, of {len(data.classes)} classes; get the files again")
    return data


def read_idx(folder: Path, name: str) -> np.ndarray:
    """The array in an idx file of the folder, or in its gzipped form. Raises UserError."""
    file = folder / name
    archive = folder / f"{name}.gz"
    if not is_file(file) and not is_file(archive):
        raise UserError(f"--source {folder}: neither {name} nor {name}.gz is in it; correct the path")
    reader = read_image_file if "images" in name else read_label_file
    with tempfile.TemporaryDirectory() as unpacked:
        try:
            return reader(str(file) if is_file(file) else extract_archive(str(archive), unpacked)).numpy()
        except Exception as error:  # the reader raises nearly anything on a damaged file
            raise UserError(f"{folder / name}: damaged, or not an idx file ({one_line(error)}); get it again") from None


def read_cifar(num_classes: int, source: Path | None, download_to: Path, url=None) -> SmallImages:
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
        source = download_to
    folder = source.parent if source.name == original.base_folder else source
    archive = source if is_file(source) else source / original.filename
    with tempfile.TemporaryDirectory() as unpacked:
        if not is_dir(folder / original.base_folder):
            if not is_file(archive):
                raise UserError(
                    f"--source {source}: neither {original.filename} nor {original.base_folder}/ is there; correct it"
                )
            if not check_integrity(archive, original.tgz_md5):
                what = f"is not the published {original.filename}: its MD5 is not {original.tgz_md5}"
                raise UserError(f"{archive}: {what}; get it again")
            shutil.unpack_archive(archive, unpacked, "gztar")  # its members are the published ones
            folder = unpacked
        try:
            train, test = (original(str(folder), train=part) for part in (True, False))
        except RuntimeError as error:
            raise UserError(f"{source}: incomplete or damaged ({one_line(error)}); get it again") from None
    return SmallImages(train.classes, train.data, np.array(train.targets), test.data, np.array(test.targets))


def pick(labels: np.ndarray, counts: list[int], held_out: int, seed: int):
    """(training, held out): image numbers, drawn without replacement in every class.

    With seed 0 the training images of CIFAR are those of the LDAM-DRW code (Cao et al., 2019), the usual reference:
    the same generator draws in the same order.
    """
    random = np.random.RandomState(seed)
    train = []
    rest = []
    for label, count in enumerate(counts):
        numbers = np.flatnonzero(labels == label)
        random.shuffle(numbers)
        train += sorted(numbers[:count].tolist())
        rest += sorted(numbers[count : count + held_out].tolist())
    return train, rest


class Selection(NamedTuple):
    """What determines a long-tailed selection.

    largest: training images of the first class, None for as many as the smallest class has beside the held-out ones;
    imbalance: largest class over smallest; held_out: images of each class that are kept for validation.
    """

    largest: int | None
    imbalance: str | float
    held_out: int
    seed: int

    def choose(self, labels: np.ndarray, classes: list[str]):
        """(training images per class, training image numbers, held-out image numbers); labels: class of every image.

        Raises UserError if a class has too few images.
        """
        held_out = self.held_out
        available = np.bincount(labels, minlength=len(classes)).tolist()
        fewest, name = min(zip(available, classes, strict=True))
        largest = fewest - held_out if self.largest is None else self.largest
        if largest < 1:
            what = f"--held-out {held_out} leaves none of its {fewest} images to train on"
            raise UserError(f"class {name}: {what}; lower it, or remove the class")
        counts = long_tail_counts(largest, self.imbalance, len(classes))
        for name, count, number in zip(classes, counts, available, strict=True):
            if count + held_out > number:
                what = f"class {name} has {number} images, too few for {count} and --held-out {held_out}"
                raise UserError(f"--max-per-class {largest}: {what}; lower one of these, or remove the class")
        if counts[-1] == 0:
            raise UserError(f"--imbalance {self.imbalance}: the last class would get no image; at most {largest}")
        return counts, *pick(labels, counts, held_out, self.seed)


def write_long_tail(data: SmallImages, out: Path, selection: Selection, overwrite: bool):
    """Writes out/{train,val,test}/<class>/<number>.png, the three lists and classes.txt.

    Returns ({split: entries}, training counts); without held-out images val's entries are test's, the same object.
    Files that exist are kept. Raises UserError as Selection.choose does, if out holds a different selection and
    overwrite is not set, and if images of someone else are in the folders of out, or behind links there.
    """
    counts, chosen, held = selection.choose(data.train_labels, data.classes)
    digits = len(str(len(data.classes) - 1))
    folders = [f"{c:0{digits}}_{name.lower().replace('/', '_')}" for c, name in enumerate(data.classes)]
    sources = {
        "train": (chosen, data.train_pixels, data.train_labels),
        "val": (held, data.train_pixels, data.train_labels),
        "test": (range(len(data.test_labels)), data.test_pixels, data.test_labels),
    }
    lists = {}
    images = {}
    for split, (numbers, pixels, labels) in sources.items():
        lists[split] = [(f"{split}/{folders[labels[i]]}/{i:05}.png", int(labels[i])) for i in numbers]
        images |= {path: pixels[i] for (path, _), i in zip(lists[split], numbers, strict=True)}
    if not held:
        lists["val"] = lists["test"]
    files = list_files(lists, data.classes)
    refuse_other_content(out, files, overwrite)
    remove_other_images(out, images, overwrite)
    write_images(out, images)
    write_files(out, files, overwrite)
    return lists, counts


def link_long_tail(source: Path, out: Path, selection: Selection, overwrite: bool, num_classes: int | None = None):
    """Writes the lists of a long-tailed selection from class folders, with links to them in out: no image is copied.

    source: has train/<class>/<image>, and test/ or val/ with the same classes. Test images are those of test/, else of
    val/; validation images the held-out ones of train/, else those of val/, else the test images. Returns what
    write_long_tail does, and lines to print. overwrite: replace lists and links of another selection; num_classes: what
    source must have. Raises UserError as Selection.choose does, and if source or out cannot be used.
    """
    others = [split for split in ("test", "val") if is_dir(source / split)]
    if not is_dir(source / "train") or not others:
        what = "must have train/<class>/<image>, and test/ or val/ with the same class folders"
        raise UserError(f"{source}: {what} (prepare folder takes plain class folders)")
    if out.resolve() == source.resolve():
        raise UserError(f"--out {out}: is the source itself; choose another folder for the lists")
    train, classes = class_folders(source, "train")
    if len(classes) < 2 or (num_classes and len(classes) != num_classes):
        raise UserError(
            f"{source / 'train'}: has {len(classes)} class folders, not {num_classes or 'two or more'}; correct it"
        )
    counts, chosen, held = selection.choose(train.labels.numpy(), classes)
    held_apart = {split: class_folders(source, split, classes)[0] for split in others}
    entries = {split: read_entries(images) for split, images in held_apart.items()}
    lists = {"train": read_entries(train, chosen), "val": entries[others[-1]], "test": entries[others[0]]}
    if held:
        lists["val"] = read_entries(train, held)
    files = list_files(lists, classes)
    refuse_other_content(out, files, overwrite)
    out.mkdir(parents=True, exist_ok=True)
    for split in ("train", *others):
        make_link(out / split, source / split, overwrite, "--out")
    write_files(out, files, overwrite)
    notes = numbering_note(classes) + [note for images in (train, *held_apart.values()) for note in images.notes]
    return lists, counts, notes


def remove_other_images(out: Path, images: dict, overwrite: bool):
    """Removes images of an earlier selection, which a reader of class folders would take for images of this one.

    Raises UserError, before any is removed, if overwrite is not set, and for links and images that write_long_tail does
    not write. Files that are not images (.DS_Store, Thumbs.db) stay.
    """
    others = []
    for split in SPLITS:
        for path in sorted([out / split, *out.glob(f"{split}/*"), *out.glob(f"{split}/*/*")]):
            name = path.relative_to(out).as_posix()
            if path.is_symlink():
                raise UserError(f"{path}: is a link to {os.path.realpath(path)}, which stays; choose another --out")
            if is_dir(path) or name in images or not is_image_file(name):
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
    absent = [path for path in images if not is_file(out / path)]
    for folder in {os.path.dirname(path) for path in absent}:
        (out / folder).mkdir(parents=True, exist_ok=True)
    for path in tqdm(absent, desc="images", unit="image", disable=None if absent else True):
        with atomic_write(out / path, sync=False) as file:
            Image.fromarray(images[path]).save(file, format="PNG")
