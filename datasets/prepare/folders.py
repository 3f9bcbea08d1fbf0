"""Lists of a user's own tree of class folders."""

import json
import os
import unicodedata
from collections import Counter
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.errors import UserError, retry
from utils.files import check_folder, is_dir, is_file
from utils.groups import numbering_note, read_names

from ..lists import ImageList
from ..splits import CLASSES_FILE, PREPARED_FILE, SPLITS, Split, as_listed, class_folders, class_paths, find_files
from .list_writer import list_files, read_entries, write_files
from .trees import fold, require_files

LEAST = 5  # images that a share gives a class, if these are no more than a quarter of it
COARSE = 10  # test images below which a class is named
SHOWN = 10  # classes named at most


def split_class(count: int, val: float, test: float) -> tuple[int, int]:
    """(validation, test) images of a class of count images; val, test: shares of it (float), numbers (int), or 0.

    A share gives at least a quarter of the class or LEAST images, whichever is less; a number is limited to an equal
    part for every split; both give at least one image. At least one image is left for training. A class of two images
    has one for training and one for testing (with test 0, for validation), a class of one image only that for training.
    """
    if count < 3:
        return (0, count // 2) if test else (count // 2, 0)
    parts = 1 + (val > 0) + (test > 0)
    held = []
    for wanted in (val, test):
        if isinstance(wanted, int):
            held.append(min(wanted, count // parts))
        else:
            held.append(max(1, round(count * wanted), min(LEAST, count // 4)))
    while sum(held) >= count:
        held[held.index(max(held))] -= 1
    return held[0], held[1]


def photo_paths(root: Path):
    """({class: paths below root}, notes) of root/<class>/<image>, images in deeper folders included.

    As class_paths, but classes without images, and what is not a regular file, are left out too. notes: one line for
    each. Raises UserError if there are fewer than two classes.
    """
    paths, notes = class_paths(root)
    for name, found in paths.items():
        regular = [path for path in found if is_file(root / path)]
        notes += [f"left out: {path} is not a regular file" for path in sorted({*found} - {*regular})]
        notes += [] if regular else [f"{name}: no images in it, left out"]
        paths[name] = regular
    paths = {name: found for name, found in paths.items() if found}
    if len(paths) < 2:
        hint = "DIR is the folder that contains one folder of images per class"
        raise UserError(f"{root}: has fewer than two class folders with images; {hint}")
    return paths, notes


def join_names(names, most: int) -> str:
    """The first names, separated by commas."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


class Earlier(NamedTuple):
    """What earlier lists say, in the order of their class numbers.

    places: class folder -> {key of a photo: its split}; names: class folder -> the class's line in classes.txt; flags:
    those that the lists were drawn with, None if that is not known; lost: a file that is missing beside the others.
    """

    places: dict[str, dict[str, str]]
    names: dict[str, str]
    flags: dict | None
    lost: Path | None = None


def photo_key(path: str) -> str:
    """What tells a photo from the others of its class: the path below the class folder, as NFC."""
    return unicodedata.normalize("NFC", path.partition("/")[2])


def read_earlier(folder: Path) -> Earlier:
    """The lists that `prepare folder` wrote into a folder; without any if they are not all there.

    Raises UserError if one of them cannot be read: without it, photos could move from training to test.
    """
    files = [folder / name for name in (*(f"{split}.txt" for split in SPLITS), CLASSES_FILE)]
    if absent := [file for file in files if not is_file(file)]:
        return Earlier({}, {}, None, absent[0] if len(absent) < len(files) else None)
    file = folder / PREPARED_FILE
    try:
        flags = dict(json.loads(retry(Path.read_bytes, file))) if is_file(file) else None
        lines = retry(read_names, folder / CLASSES_FILE)
    except (ValueError, TypeError):
        raise UserError(f"{folder}: {PREPARED_FILE} or {CLASSES_FILE} is damaged; remove it") from None
    places = {}
    names = {}
    entries = []
    for split in SPLITS:
        if (flags or {}).get(split) != 0:  # else its list is that of the other split
            images = ImageList.from_file(folder / f"{split}.txt")
            entries += [(label, path, split) for path, label in read_entries(images)]
    complete = len(lines) == max(entries)[0] + 1
    for label, path, split in sorted(entries):
        name = path.partition("/")[0]
        names[name] = lines[label] if complete else name
        places.setdefault(name, {})[photo_key(path)] = split
    return Earlier(places, names, flags)


def find_renamed(earlier: Earlier, paths: dict[str, list[str]]) -> dict[str, str]:
    """{new name: earlier name} of class folders, where one pair alone fits.

    In this order, each without what was found before: classes.txt has the new name; the names differ only in capitals
    or the form of accents; the photos are the same; the new folder has all photos.
    """
    keys = {name: {*map(photo_key, found)} for name, found in paths.items() if name not in earlier.places}
    gone = {name: places.keys() for name, places in earlier.places.items() if name not in paths}
    renamed = {}
    for fits in (
        lambda old, new: earlier.names[old] == new,
        lambda old, new: fold(old) == fold(new),
        lambda old, new: gone[old] == keys[new],
        lambda old, new: gone[old] <= keys[new],
    ):
        pairs = [(new, old) for new in keys for old in gone if fits(old, new)]
        pairs = [(new, old) for new, old in pairs if new not in renamed and old not in renamed.values()]
        number = Counter(name for pair in pairs for name in pair)
        renamed |= {new: old for new, old in pairs if number[new] == number[old] == 1}
    return renamed


def place_photos(found: list[str], earlier: dict[str, str], val: float, test: float, seed: int) -> dict[str, str]:
    """{path: split} of a class's photos; earlier: key -> split.

    Photos keep the splits that they had; new ones fill test, then val, in the order of a hash of the seed and the key,
    and the rest trains. What a split has too many goes to training. No photo leaves training, and only if a class has
    no other to test on, one leaves val.
    """
    order = sorted(found, key=lambda path: (blake2b(os.fsencode(f"{seed}/{photo_key(path)}")).digest(), path))
    held_val, held_test = split_class(len(order), val, test)
    was = {split: [path for path in order if earlier.get(photo_key(path)) == split] for split in (*SPLITS, None)}
    places = dict.fromkeys(order, "train")
    shared = [] if val else was["val"]  # of lists whose flags are not known, val's may be test's
    tested = (was["test"] + shared + was[None])[:held_test] or was["val"][: min(1, held_test)]
    places.update(dict.fromkeys(tested, "test"))
    spare = [path for path in was["val"] + was[None] if places[path] == "train"]
    places.update(dict.fromkeys(spare[:held_val], "val"))
    return places


def split_folder(root: Path, earlier: Earlier, flags: dict, overwrite: bool):
    """(classes, {split: entries}, notes): the images of every class drawn for train, val and test.

    earlier: the lists that are there. If they were drawn with the same flags (val, test, seed), photos keep their
    splits. Classes keep their numbers; new ones follow. notes: those of photo_paths, lines on classes that have
    changed, and one for each split that lacks classes. Raises UserError as photo_paths does, and if there are photos in
    no list and overwrite is not set.
    """
    paths, notes = photo_paths(root)
    former = find_renamed(earlier, paths)
    now = {old: name for name, old in former.items()}
    were = [now.get(old, old) for old in earlier.places]  # gone classes too
    numbered = dict.fromkeys([*were, *paths])
    notes += [f"all splits are drawn anew: {earlier.lost} is missing"] if earlier.lost else []
    keep = earlier.flags in (None, flags)
    if not keep:
        drawn = " ".join(f"--{name} {value}" for name, value in earlier.flags.items())
        notes.append(f"all splits are drawn anew: the earlier lists were drawn with {drawn or 'folders for splits'}")
    classes = []
    added = 0
    entries = {split: [] for split in SPLITS}
    lacking = {split: [] for split in SPLITS}
    for name in numbered:
        old = former.get(name, name)
        found = paths.get(name, [])
        before = earlier.places.get(old, {})
        places = place_photos(found, before if keep else {}, **flags)
        if found:
            for path in found:
                entries[places[path]].append((path, len(classes)))
            line = earlier.names.get(old, old)
            classes.append(name if line == old or line in numbered else line)
            for split in {*SPLITS} - {*places.values()}:
                lacking[split].append(name)
        new = sum(photo_key(path) not in before for path in found)
        gone = len(before.keys() - map(photo_key, found))
        moved = sum(before.get(photo_key(path), split) != split for path, split in places.items())
        if earlier.places and (new or gone or moved or old != name):
            was = f" (was {old}, and keeps its number)" if old != name else ""
            notes.append(f"{name}{was}: {new} new, {gone} gone, {moved} moved to another split")
        added += new
    notes += renumbered_note(were, [name for name in numbered if name in paths])
    if earlier.places and added and keep and not overwrite:
        raise UserError(f"{added} photos below {root} are in no list; --overwrite adds them")
    for split, other, needed in (("val", "test", 3 if flags["test"] else 2), ("test", "val", 2)):
        if not flags[split]:
            entries[split] = entries[other]
            notes.append(f"{split}: no images of its own (--{split} 0), so the {other} images are used")
        elif names := lacking[split]:
            which = f"{len(names)} classes that have fewer than {needed} images: {join_names(names, 5)}"
            notes.append(f"{split}: no image of {which}")
    return classes, entries, notes


def renumbered_note(before: list[str], now: list[str]) -> list[str]:
    """The line that names classes whose number is another one now; both in the order of the numbers."""
    numbers = {name: number for number, name in enumerate(before)}
    pairs = [(name, numbers.get(name, number), number) for number, name in enumerate(now)]
    shown = join_names([f"{name} {was} to {number}" for name, was, number in pairs if was != number], SHOWN)
    return [f"class numbers changed: {shown}; checkpoints of the earlier lists mean other classes"] if shown else []


def coarse_note(classes: list[str], tested) -> list[str]:
    """The line that names classes with few test images, the fewest first; tested: the entries of the test list."""
    counts = np.bincount([label for _, label in tested], minlength=len(classes)).tolist()
    coarse = sorted((count, name) for count, name in zip(counts, classes, strict=True) if count < COARSE)
    if not coarse:
        return []
    number = f"{len(coarse)} of {len(classes)} classes {'have' if len(coarse) > 1 else 'has'}"
    shown = join_names([f"{name} {count}" for count, name in coarse], SHOWN)
    return [f"test: {number} fewer than {COARSE} images, so that their accuracies are coarse: {shown}"]


def own_splits(root: Path):
    """As split_folder, for a tree of train/, val/ and test/; if val/ or test/ is absent, the other is used for both."""
    there = [split for split in SPLITS if is_dir(root / split)]
    entries = {}
    classes = None
    left_out = []
    for split in there:  # train comes first: it numbers the classes
        image_list, classes = class_folders(root, split, classes)
        left_out += image_list.notes
        require_files(find_files(Split(split, str(root), image_list), layouts=[as_listed]))
        entries[split] = read_entries(image_list)
    notes = [*left_out, f"{root} is split into {', '.join(f'{split}/' for split in there)} already, which are kept"]
    for split, other in (("val", "test"), ("test", "val")):
        if split not in entries:
            entries[split] = entries[other]
            notes.append(f"{split}: there is no {split}/, so the {other} images are used")
    return classes, entries, notes


def write_folder_lists(root: Path, out: Path, val: float, test: float, seed: int, overwrite: bool):
    """Writes out/{train,val,test}.txt, classes.txt and prepared.json; returns (classes, {split: entries}, notes)."""
    check_folder(root, "DIR is the folder that contains one folder of images per class")
    flags = {"val": val, "test": test, "seed": seed}
    if is_dir(root / "train") and any(is_dir(root / split) for split in ("val", "test")):
        flags = {}
        before = []
        with suppress(OSError, ValueError):  # not there, too large
            before = read_names(out / CLASSES_FILE)
        classes, entries, notes = own_splits(root)
        notes += renumbered_note(before, classes)
    else:
        classes, entries, notes = split_folder(root, read_earlier(out), flags, overwrite)
    if not entries["val"] or not entries["test"]:
        raise UserError(f"{root}: has too few images of each class to validate on, or to test on; add images")
    files = list_files(entries, classes) | {PREPARED_FILE: json.dumps(flags).encode()}
    write_files(out, files, overwrite)
    return classes, entries, notes + numbering_note(classes) + coarse_note(classes, entries["test"])
