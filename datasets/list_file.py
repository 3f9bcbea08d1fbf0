"""Lists of images: a compact index of `<path> <label>` lines, and the data set of the images it names."""

import io
import os
import warnings
from array import array
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from utils.errors import UserError

LARGEST_LABEL = 2**31 - 1
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow hands EPS files, programs, to Ghostscript
warnings.filterwarnings("ignore", module=r"PIL\.")  # palettes with transparency, odd EXIF data: read all the same


def parse_line(line: bytes) -> tuple[bytes, int] | None:
    """(path, label) of a line, None for a blank one. Raises ValueError saying what is wrong.

    The label is the last word; what stands before it, less white space at its ends, is the path, spaces within it too.
    """
    words = line.rsplit(None, 1)
    if not words:
        return None
    if len(words) == 1:
        raise ValueError("no label: a line is '<path> <label>'")
    path, label = words[0].strip(), words[1]
    if not label.isdigit():
        raise ValueError(f"the label {label.decode(errors='replace')!r} is not a whole number from 0 on")
    if len(label) > 10 or int(label) > LARGEST_LABEL:
        raise ValueError(f"the label {label[:20].decode()} is too large")
    try:
        path.decode()
    except UnicodeDecodeError:
        raise ValueError("the path is not UTF-8 text") from None
    if b"\0" in path:
        raise ValueError("the path holds a NUL byte")
    if path.startswith((b"/", b"\\")) or path[1:3] in (b":/", b":\\"):
        raise ValueError("the path is absolute; paths are relative to the image root")
    if b".." in path and b".." in path.replace(b"\\", b"/").split(b"/"):
        raise ValueError("the path leaves the image root through '..'")
    return path, int(label)


class ListIndex:
    """Paths and labels of a list without a Python object an entry: the list's bytes, and a start and a label an entry.

    The arrays are tensors, so that worker processes share them, forked or spawned, instead of copying them.
    name: the list's file, for messages. len(index); index.labels, int32 (entries,); index.path(i), index.line(i).
    """

    def __init__(self, name: str, content: np.ndarray, starts: array, labels: array):
        self.name = name
        self.content = torch.from_numpy(content)
        self.starts = torch.frombuffer(starts, dtype=torch.int32 if starts.itemsize == 4 else torch.int64)
        self.labels = torch.frombuffer(labels, dtype=torch.int32)

    @classmethod
    def read(cls, file) -> "ListIndex":
        """Reads a list file: UTF-8, LF or CRLF, a BOM, blank lines and a missing last newline allowed.

        Raises UserError naming file and line where a line is malformed, or where there is no entry.
        """
        file = Path(file)
        try:
            content = np.fromfile(file, dtype=np.uint8)
            with file.open("rb") as lines:
                return cls._parse(str(file), content, lines)
        except OSError as error:
            raise UserError(f"{file}: cannot read the list: {error.strerror}") from None

    @classmethod
    def parse(cls, name: str, content: bytes) -> "ListIndex":
        """As read, of a list's bytes; name: what messages call it."""
        return cls._parse(name, np.frombuffer(bytearray(content), dtype=np.uint8), io.BytesIO(content))

    @classmethod
    def of(cls, name: str, entries) -> "ListIndex":
        """The index of an iterable of (path, label), as ImageFolder's listing gives it."""
        lines = [os.fsencode(f"{path} {label}\n") for path, label in entries]
        return cls._parse(name, np.frombuffer(bytearray(b"".join(lines)), dtype=np.uint8), lines)

    @classmethod
    def _parse(cls, name, content, lines):
        starts, labels = array("i" if len(content) < 2**31 else "q"), array("i")
        position = 0
        for number, line in enumerate(lines, 1):
            start, position = position, position + len(line)
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                start, line = 3, line[3:]
            try:
                entry = parse_line(line)
            except ValueError as error:
                raise UserError(f"{name}, line {number}: {error}") from None
            if entry is not None:
                starts.append(start)
                labels.append(entry[1])
        if not starts:
            raise UserError(f"{name}: the list is empty")
        return cls(name, content, starts, labels)

    def __len__(self):
        return len(self.labels)

    def path(self, i: int) -> str:
        """The path of entry i as the list has it."""
        start = int(self.starts[i])
        end = int(self.starts[i + 1]) if i + 1 < len(self) else len(self.content)
        line = bytes(self.content[start:end].numpy()).split(b"\n", 1)[0]
        return os.fsdecode(line.rsplit(None, 1)[0].strip())

    def line(self, i: int) -> int:
        """The line number of entry i in the list file, from 1."""
        before = self.content[: int(self.starts[i])].numpy()
        return int(np.count_nonzero(before == ord("\n"))) + 1

    @property
    def num_classes(self) -> int:
        """The largest label plus one."""
        return int(self.labels.max()) + 1

    def counts(self, num_classes: int) -> torch.Tensor:
        """Images a class, int64 (num_classes,)."""
        return torch.bincount(self.labels, minlength=num_classes)


def plain_place(path: str, split: str) -> str:
    """Where an entry lies in a tree that is laid out as the list says."""
    return path


def reorganised_place(path: str, split: str) -> str:
    """Where an entry lies in a tree of train/, val/ and test/, one folder a split: <split>/<class>/<file>."""
    parts = PurePosixPath(path).parts
    return "/".join((split, *parts[-2:]))


def missing_entries(index: ListIndex, root, place, split, progress=iter) -> list[int]:
    """The entries that have no file below root, found by a pool of threads. place: as the two functions above."""

    def absent(span):
        return [i for i in span if not os.path.isfile(os.path.join(root, place(index.path(i), split)))]

    step = 1024
    spans = [range(start, min(start + step, len(index))) for start in range(0, len(index), step)]
    with ThreadPoolExecutor(max_workers=16) as pool:
        return [i for found in progress(pool.map(absent, spans)) for i in found]


def find_place(index: ListIndex, root, split, progress=iter):
    """(place, missing): the layout under which most of the files exist below root, and the entries still missing."""
    place, missing = plain_place, missing_entries(index, root, plain_place, split, progress)
    if missing:
        others = missing_entries(index, root, reorganised_place, split, progress)
        if len(others) < len(missing):
            place, missing = reorganised_place, others
    return place, missing


def load_rgb(file) -> Image.Image:
    """The image as RGB, 8 bits a channel, whatever its mode: grey, palette, CMYK, 16 bits.

    Raises UserError naming the file where it is missing, damaged, no image, or has more pixels than Pillow's limit
    against decompression bombs, Image.MAX_IMAGE_PIXELS, doubled.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.mode.startswith("I"):  # 16 bits: convert() would clip, not scale
                levels = np.asarray(image).clip(0, 65535) // 257
                image = Image.fromarray(levels.astype(np.uint8))
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")  # which would copy an RGB image
    except FileNotFoundError:
        raise UserError(f"{file}: no such image") from None
    except UnidentifiedImageError:
        raise UserError(f"{file}: not an image that can be read; replace the file") from None
    except Image.DecompressionBombError:
        raise UserError(f"{file}: a decompression bomb, over {2 * Image.MAX_IMAGE_PIXELS} pixels") from None
    except Exception as error:  # a damaged file makes the decoders raise nearly anything
        raise UserError(f"{file}: cannot be decoded ({' '.join(str(error).split())}); replace the file") from None


class ListFileDataset(torch.utils.data.Dataset):
    """Images of a list below a root folder.

    Indexed by (epoch, draw, index), as the samplers give it: draw counts the times that the index came before in the
    epoch. An item is (views, label, index): `views` is what transform(image, (epoch, index, draw)) returns, a tuple of
    uint8 tensors (3, S, S). Raises UserError, naming file and list line, for an image that cannot be read.
    """

    def __init__(self, index: ListIndex, root, transform, place=plain_place, split="train"):
        self.index, self.root, self.transform = index, os.fspath(root), transform
        self.place, self.split = place, split

    def __len__(self):
        return len(self.index)

    def file(self, i: int) -> str:
        """The file of entry i."""
        return os.path.join(self.root, self.place(self.index.path(i), self.split))

    def where(self, i: int) -> str:
        """List and line of entry i, for messages."""
        return f"{self.index.name}, line {self.index.line(i)}"

    def __getitem__(self, item):
        epoch, draw, i = item
        try:
            image = load_rgb(self.file(i))
        except UserError as error:
            raise UserError(f"{error} ({self.where(i)})") from None
        return self.transform(image, (epoch, i, draw)), int(self.index.labels[i]), i

    def __getitems__(self, items):
        """What the loader's workers call. An error is handed over as a value: raised, it would bring a traceback."""
        try:
            return [self[item] for item in items]
        except UserError as error:
            return error


def class_folders(root, split, classes: list[str] | None = None) -> tuple[ListIndex, list[str]]:
    """(index, classes) of root/split/<class>/<image>, read as torchvision's ImageFolder reads it.

    classes: the names that numbers follow; those of the folder by default. Raises UserError where a folder is of no
    class, or where there is no image.
    """
    folder = Path(root) / split
    try:
        found, _ = find_classes(folder)
        classes = classes or found
        unknown = sorted(set(found) - set(classes))
        if unknown:
            raise UserError(f"{folder / unknown[0]}: a class that train/ does not have")
        numbers = {name: classes.index(name) for name in found}
        samples = make_dataset(folder, numbers, IMG_EXTENSIONS, allow_empty=True)
    except (FileNotFoundError, OSError) as error:
        raise UserError(f"{folder}: no class folders in it ({error})") from None
    if not samples:
        raise UserError(f"{folder}: no images in its class folders")
    root = os.fspath(root)
    return ListIndex.of(str(folder), ((os.path.relpath(file, root), label) for file, label in samples)), classes


def missing_message(index: ListIndex, root, place, split, missing, shown=3) -> str:
    """One line that names the first missing files and their number."""
    names = ", ".join(place(index.path(i), split)[:200] for i in islice(missing, shown))
    return f"{index.name}: {len(missing)} of {len(index)} files are not in {root}; the first: {names}"
