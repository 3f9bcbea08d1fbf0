"""Lists of a user's own tree of class folders."""

from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.files import is_dir, is_file
from utils.groups import numbering_note

from ..splits import SPLITS, Split, as_listed, class_folders, class_paths, missing_entries
from .list_writer import list_files, read_entries, write_files
from .trees import require_files

LEAST = 5  # images that a share gives a class, if these are no more than a quarter of it
COARSE, SHOWN = 10, 10  # test images below which a class is named; classes named at most


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


def split_folder(root: Path, val: float, test: float, seed: int):
    """(classes, {split: entries}, notes): the images of every class drawn for train, val and test.

    notes: those of photo_paths, and one line for each split that lacks classes. Raises UserError as photo_paths does.
    """
    paths, notes = photo_paths(root)
    random = np.random.RandomState(seed)
    entries = {split: [] for split in SPLITS}
    lacking = {split: [] for split in SPLITS}
    for label, (name, found) in enumerate(paths.items()):
        order = random.permutation(len(found))
        held_val, held_test = split_class(len(found), val, test)
        parts = np.split(order, [held_test, held_test + held_val])
        for split, chosen in zip(("test", "val", "train"), parts, strict=True):
            entries[split] += [(found[i], label) for i in sorted(chosen.tolist())]
            if not len(chosen):
                lacking[split].append(name)
    for split, share, other, needed in (("val", val, "test", 3 if test else 2), ("test", test, "val", 2)):
        if not share:
            entries[split] = entries[other]
            notes.append(f"{split}: no images of its own (--{split} 0), so the {other} images are used")
        elif names := lacking[split]:
            which = f"{len(names)} classes that have fewer than {needed} images: {join_names(names, 5)}"
            notes.append(f"{split}: no image of {which}")
    return list(paths), entries, notes


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
    entries, classes, left_out = {}, None, []
    for split in there:  # train comes first: it numbers the classes
        image_list, classes = class_folders(root, split, classes)
        left_out += image_list.notes
        missing = missing_entries(image_list, root, as_listed, split)
        require_files(Split(split, str(root), image_list, missing=tuple(missing)))
        entries[split] = read_entries(image_list)
    notes = [*left_out, f"{root} is split into {', '.join(f'{split}/' for split in there)} already, which are kept"]
    for split, other in (("val", "test"), ("test", "val")):
        if split not in entries:
            entries[split] = entries[other]
            notes.append(f"{split}: there is no {split}/, so the {other} images are used")
    return classes, entries, notes


def write_folder_lists(root: Path, out: Path, val: float, test: float, seed: int, overwrite: bool):
    """Writes out/{train,val,test}.txt and classes.txt; returns (classes, {split: entries}, notes)."""
    if not is_dir(root):
        raise UserError(f"{root}: no such folder")
    split_already = is_dir(root / "train") and any(is_dir(root / split) for split in ("val", "test"))
    classes, entries, notes = own_splits(root) if split_already else split_folder(root, val, test, seed)
    if not entries["val"] or not entries["test"]:
        raise UserError(f"{root}: has too few images of each class to validate on, or to test on; add images")
    write_files(out, list_files(entries, classes), overwrite)
    return classes, entries, notes + numbering_note(classes) + coarse_note(classes, entries["test"])
