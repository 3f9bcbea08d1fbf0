"""Which lists a run uses, where the files of their entries lie below DIR, and which are missing."""

import json
import os
import shlex
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS

from utils.errors import EndOfRun, UserError, one_line, printable, retry
from utils.files import (
    ABSENT,
    broken_link,
    check_folder,
    check_link,
    is_dir,
    is_file,
    is_hidden,
    lexists,
    list_folder,
    name_refused,
    walk,
)
from utils.groups import read_names
from utils.images import is_image_file

from .dataset import ListFileDataset
from .lists import ImageList

SPLITS = ("train", "val", "test")
CLASSES_FILE = "classes.txt"
PREPARED_FILE = "prepared.json"  # beside the lists of `prepare folder`: the flags that they were drawn with
IMAGENET_LT = Path(__file__).resolve().parent.parent / "data"
CHUNK = 1024  # entries that a thread looks up at a time


def as_listed(path: str, split: str) -> str:
    """The layout of a tree whose paths are those of the list."""
    return path


def by_split(path: str, split: str) -> str:
    """The layout of a tree with one folder per split: <split>/<class>/<file>."""
    parts = PurePosixPath(path).parts
    return "/".join((split, *parts[-2:]))


def split_named(file) -> str | None:
    """The split that the name of a list file ends in, such as train for my_train.txt; None if it ends in none."""
    return next((split for split in SPLITS if Path(file).stem.lower().endswith(split)), None)


def explain_missing(root, path: str) -> str | None:
    """Why root/path is no regular file, and what helps; None if it is simply not there."""
    place = str(root)
    mode = stat.S_IFDIR
    for name in path.split("/"):
        folder = place
        place = os.path.join(place, name)
        try:
            mode = os.stat(place).st_mode
        except OSError as error:
            target = f", to {os.readlink(place)}" if os.path.islink(place) else ""
            if isinstance(error, PermissionError):
                where = f"{place}{target}" if target else folder
                return f"{where}: {one_line(error)}, a folder may not be searched; correct its permissions"
            if target:
                return broken_link(place, f" ({one_line(error)})")
            return None if error.errno in ABSENT else f"{place}: {one_line(error)}"
    return None if stat.S_ISREG(mode) else f"{place}: not a regular file; replace it with the image"


class Split(NamedTuple):
    """The entries of a split, where their files lie, and the entries whose files are missing.

    layout: a function (path in the list, name of the split) -> path below root, such as as_listed; folders: the names
    of the class folders in the order of their labels, if the split was read from class folders.
    """

    name: str
    root: str
    image_list: ImageList
    layout: object = as_listed
    missing: tuple[int, ...] = ()
    folders: list[str] | None = None

    def path(self, i: int) -> str:
        """Where the file of entry i lies below root."""
        return self.layout(self.image_list.path(i), self.name)

    def file(self, i: int) -> str:
        return os.path.join(self.root, self.path(i))

    def dataset(self, transform) -> ListFileDataset:
        return ListFileDataset(self, transform)

    def require(self):
        """Raises UserError with the first missing files and their number, if there are any."""
        if self.missing:
            given = [f"--{self.name}-list", self.image_list.name] if self.image_list.has_list_file else []
            command = shlex.join(["python", "-m", "datasets.verify", self.root, *given, "--report", "FILE"])
            remedy = self.cause_of_missing() or "correct DIR or the list"
            if is_file(Path(self.image_list.name).with_name(PREPARED_FILE)):
                remedy += ", or run datasets.prepare folder again, with --overwrite and the flags of its last run"
            raise UserError(f"{self.missing_message()}; {remedy}; {command} lists them all")

    def cause_of_missing(self) -> str | None:
        """Why files are missing, and what helps, if that is certain for one of up to 200 that it looks at."""
        for i in self.missing[:: max(1, len(self.missing) // 200)]:
            path = self.image_list.path(i)
            for layout in (self.layout, as_listed, by_split):
                if why := explain_missing(self.root, layout(path, self.name)):
                    return why
                for other in (path.replace("\\", "/"), path.replace("/", "\\")):  # a list or an archive of Windows
                    there = layout(other, self.name)
                    if other != path and os.path.isfile(os.path.join(self.root, there)):
                        where = self.image_list.name if "\\" in path else "a file's name"
                        return f"{where} has \\ for /: {path} is {there} there; write / in both"
        return None

    def missing_message(self) -> str:
        """One line with the first missing files and their number."""
        shown = []
        for i in self.missing[:3]:
            exists = os.path.exists(self.file(i))  # a FIFO, a folder
            shown.append(self.path(i)[:200] + (" (not a regular file)" if exists else ""))
        number = f"{len(self.missing)} of {len(self.image_list)}"
        return f"{self.image_list.name}: {number} files are not in {self.root}; the first: {', '.join(shown)}"


def is_there(file) -> bool:
    """Whether a file can be found; explain_missing tells why not."""
    try:
        return is_file(file)
    except UserError:
        return False


def find_files(split: Split, progress=iter, layouts=(as_listed, by_split)) -> Split:
    """Returns the split in the first layout that leaves the fewest files missing; threads look for the files.

    progress: wraps the iterator over the results.
    """
    entries = range(len(split.image_list))
    candidates = []  # the split in each layout
    for layout in layouts:
        split = split._replace(layout=layout)

        def missing(start, split=split):
            return [i for i in entries[start : start + CHUNK] if not is_there(split.file(i))]

        with ThreadPoolExecutor(max_workers=16) as pool:
            results = progress(pool.map(missing, entries[::CHUNK]))
            candidates.append(split._replace(missing=tuple(i for result in results for i in result)))
        if not candidates[-1].missing:
            break
    return min(candidates, key=lambda split: len(split.missing))


@name_refused()
def choose_lists(root, given: dict[str, str | None], wanted=SPLITS) -> dict[str, Path] | None:
    """The list file of each wanted split, or None if root is to be read as class folders.

    In order: the given lists; root/{train,val,test}.txt; class folders root/{train,val,test}/ if there is no list at
    all; data/ImageNet_LT_{train,val,test}.txt. Raises UserError if root is not a folder or a list is not a file.
    """
    root = Path(root)
    check_folder(root, "DIR is the folder that the lists' paths are relative to")
    retry(os.stat, os.path.join(root, "."))  # refused if the folder may not be searched
    for split in SPLITS:
        check_link(root / f"{split}.txt")
    chosen = {split: Path(given[split]) for split in wanted if given.get(split)}
    rest = [split for split in wanted if split not in chosen]
    present = [f"{split}.txt" for split in SPLITS if is_file(root / f"{split}.txt")]
    folders = all(is_dir(root / split) for split in SPLITS)
    if rest and folders and not chosen and not present:
        return None
    folder, start = (root, "") if present else (IMAGENET_LT, "ImageNet_LT_")
    chosen |= {split: folder / f"{start}{split}.txt" for split in rest}
    for split, file in chosen.items():
        flag = f"--{split}-list"
        if is_file(file):
            continue
        if given.get(split):
            check_link(file)
            raise UserError(f"{file}: no such list; correct {flag}")
        if present:
            raise UserError(f"{file}: no such list, beside {' and '.join(present)}; add it, or name one with {flag}")
        if folders:
            raise UserError(f"{flag}: is missing; the class folders of {root} are only read if no list is given")
        check_link(root / split)
        raise UserError(
            f"{root}: has neither {split}.txt nor class folders train/, val/ and test/, and {file} does not exist; "
            f"make lists with python -m datasets.prepare, or name one with {flag}"
        )
    return chosen


def class_folders(root, split: str, classes: list[str] | None = None) -> tuple[ImageList, list[str]]:
    """(images, classes) of root/split/<class>/<image>, in the order of torchvision's ImageFolder.

    classes: the class names in the order of their labels; by default the folder's, sorted. Raises UserError if a folder
    belongs to no class, if there is no image, and as class_paths does.
    """
    folder = os.path.join(root, split)
    paths_by_class, left_out = class_paths(folder)
    classes = classes or list(paths_by_class)
    if unknown := sorted(set(paths_by_class) - set(classes)):
        raise UserError(f"{folder}/{unknown[0]}: a class that train/ does not have; remove or rename it")
    if not any(paths_by_class.values()):
        raise UserError(f"{folder}: no images in its class folders; correct DIR")
    labels = {name: label for label, name in enumerate(classes)}
    entries = ((f"{split}/{path}", labels[name]) for name, paths in paths_by_class.items() for path in paths)
    images = ImageList.from_entries(folder, entries)
    images.notes = tuple(f"{folder}: {line}" for line in left_out)
    return images, classes


def class_paths(root) -> tuple[dict[str, list[str]], list[str]]:
    """({class: paths of its images below root}, a line on each kind of thing that is left out).

    Classes and paths are sorted; a class may have no images. Raises UserError as walk does, and for a link beside the
    class folders that leads nowhere: without it the next classes would have other numbers.
    """
    ((_, beside), *tree), left_out = walk(root, is_image_file)  # root itself comes first
    for name, is_link, _ in retry(list_folder, root):
        if is_link and not is_hidden(name):
            check_link(os.path.join(root, name))
    if photos := [name for name in beside if is_image_file(name)]:
        what = f"{len(photos)} images beside the class folders, such as {printable(photos[0])}"
        left_out.append(f"left out: {what}; move each into the folder of its class")
    classes = {}
    endings = {}  # ending: files
    for folder, names in tree:
        below = os.path.relpath(folder, root)
        paths = classes.setdefault(below.split(os.sep)[0], [])
        for name in names:
            if is_image_file(name):
                paths.append(f"{below}/{name}")
            else:
                endings.setdefault(os.path.splitext(name)[1].lower() or "none", []).append(f"{below}/{name}")
    kinds = " ".join(ending.lstrip(".") for ending in IMG_EXTENSIONS)
    for ending, files in sorted(endings.items()):
        what = f"{len(files)} files with the ending {ending}, such as {printable(files[0])}"
        left_out.append(f"left out: {what}; convert them to one of {kinds}")
    return dict(sorted(classes.items())), left_out


def find_splits(root, given: dict[str, str | None], wanted=SPLITS, progress=iter, check=SPLITS) -> dict[str, Split]:
    """The wanted splits, each with the layout that its files were found in; given: split -> list file, or None.

    check: the splits whose files are looked for; progress wraps the iterator over the results. Missing files are
    recorded, not raised (Split.require raises). Raises UserError for what cannot be read.
    """
    lists = choose_lists(root, given, wanted)
    splits = {}
    classes = None
    for split in SPLITS if lists is None else lists:  # train comes first: it numbers the classes
        if lists is None:
            images, classes = class_folders(root, split, classes)
        else:
            images = ImageList.from_file(lists[split])
        splits[split] = Split(split, str(root), images, folders=classes)
        if split in check:
            splits[split] = find_files(splits[split], progress)
    return {split: splits[split] for split in wanted}


def unlisted_note(splits: dict[str, Split]) -> list[str]:
    """A line with the number of photos below DIR that no list has, if there are any.

    Only lists of `prepare folder` are meant to have all. splits: all three.
    """
    train = splits["train"]
    prepared = Path(train.image_list.name).with_name(PREPARED_FILE)
    if not (train.image_list.has_list_file and is_file(prepared)):
        return []
    try:
        flags = dict(json.loads(retry(Path.read_bytes, prepared)))
        if not flags:  # DIR had folders for splits, which were kept
            return []
        found, _ = class_paths(train.root)
    except (EndOfRun, OSError, ValueError, TypeError) as error:
        return [f"photos below {train.root} that are in no list could not be counted: {error}"]
    listed = {split.image_list.path(i) for split in splits.values() for i in range(len(split.image_list))}
    unlisted = [path for paths in found.values() for path in paths if path not in listed]
    number = sum(is_there(os.path.join(train.root, path)) for path in unlisted)
    words = ["python", "-m", "datasets.prepare", "folder", train.root, "--out", str(prepared.parent)]
    words += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    hint = f"{shlex.join([*words, '--overwrite'])} adds them"
    return [f"{number} photos below {train.root} are in no list; {hint}"] if number else []


def find_class_names(root, train: Split, num_classes: int) -> tuple[list[str] | None, str | None]:
    """(names of the classes or None, a line to print or None); the line says why existing names cannot be used.

    They are the lines of classes.txt, next to the training list or in root, else the names of the class folders.
    """
    beside = (Path(train.image_list.name).parent / CLASSES_FILE, Path(root) / CLASSES_FILE)
    file = next((file for file in beside if lexists(file)), None)
    if file is None and train.folders is None:
        return None, None
    try:
        if file is None:  # as UTF-8, whatever the locale's encoding is
            names = [os.fsencode(name).decode(errors="replace") for name in train.folders]
        else:
            names = retry(read_names, file)
    except (OSError, ValueError) as error:
        return None, f"warning: {file}: cannot be read ({one_line(error)}); the classes have no names"
    if len(names) != num_classes:
        where = file or f"{root}/train"
        return None, f"warning: {where}: {len(names)} names for {num_classes} classes; the classes have no names"
    return names, None
