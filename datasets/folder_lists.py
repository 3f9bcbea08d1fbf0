"""Lists of a user's own tree of class folders."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from utils.errors import UserError

from .list_file import class_folders
from .list_writer import list_content, write_files

SPLITS = ("train", "val", "test")


def split_class(count: int, val: float, test: float) -> tuple[int, int]:
    """(validation, test) images of a class of count images: the fractions, rounded, but at least one in each split.

    A class of two gives a training and a test image, a class of one a training image.
    """
    if count < 3:
        return 0, count // 2
    held = [max(1, round(count * fraction)) for fraction in (val, test)]
    while sum(held) >= count:
        held[held.index(max(held))] -= 1
    return held[0], held[1]


def split_folder(root: Path, val: float, test: float, seed: int):
    """(classes, {split: entries}, notes) of root/<class>/<image>, images below in deeper folders too.

    Classes are numbered in sorted order; folders without images and hidden ones are left out. notes: a line for each
    split that lacks classes. Raises UserError where there are fewer than two classes of images.
    """
    try:
        folders = [name for name in find_classes(root)[0] if not name.startswith(".")]
    except FileNotFoundError:
        folders = []
    if not folders:
        raise UserError(f"{root}: holds no class folders; DIR is the folder with a folder of images for each class")
    numbers = {name: number for number, name in enumerate(folders)}
    images = [[] for _ in folders]
    for file, number in make_dataset(root, numbers, IMG_EXTENSIONS, allow_empty=True):
        images[number].append(os.path.relpath(file, root).replace(os.sep, "/"))
    notes = [f"{name}: no images in it, left out" for name, found in zip(folders, images, strict=True) if not found]
    notes += left_out(root, folders)
    classes = [(name, found) for name, found in zip(folders, images, strict=True) if found]
    if len(classes) < 2:
        raise UserError(f"{root}: images of fewer than two classes ({folders[0]}, ...); give the folder above")

    random = np.random.RandomState(seed)
    entries = {split: [] for split in SPLITS}
    lacking = {"val": [], "test": []}
    for label, (name, found) in enumerate(classes):
        order = random.permutation(len(found))
        held_val, held_test = split_class(len(found), val, test)
        bounds = np.split(order, [held_test, held_test + held_val])
        for split, chosen in zip(("test", "val", "train"), bounds, strict=True):
            entries[split] += [(found[i], label) for i in sorted(chosen.tolist())]
            if not len(chosen):
                lacking[split].append(name)
    for split, needed in (("val", 3), ("test", 2)):
        if lacking[split]:
            shown = ", ".join(lacking[split][:5]) + (", ..." if len(lacking[split]) > 5 else "")
            notes.append(
                f"{split}: no image of {len(lacking[split])} classes that have fewer than {needed} images: {shown}"
            )
    return [name for name, _ in classes], entries, notes


def left_out(root: Path, folders) -> list[str]:
    """A line for each ending of files that are no images to torchvision, such as .heic; hidden files do not count."""
    files = [file for name in folders for file in (root / name).rglob("*") if file.is_file()]
    endings = Counter(f.suffix.lower() or "none" for f in files if not f.name.startswith("."))
    kinds = " ".join(ending.lstrip(".") for ending in IMG_EXTENSIONS)
    others = sorted(endings.keys() - set(IMG_EXTENSIONS))
    return [
        f"left out: {endings[ending]} files with the ending {ending}; convert them to one of {kinds}"
        for ending in others
    ]


def own_splits(root: Path):
    """As split_folder, for a tree of train/, val/ and test/; where one of the last two is absent, the other serves."""
    there = [split for split in SPLITS if (root / split).is_dir()]
    indices, classes = {}, None
    for split in there:  # train comes first: it numbers the classes
        indices[split], classes = class_folders(root, split, classes)
    entries = {split: [(i.path(n), int(i.labels[n])) for n in range(len(i))] for split, i in indices.items()}
    notes = [f"{root} is split into {', '.join(f'{split}/' for split in there)} already: lists of these"]
    for split, other in (("val", "test"), ("test", "val")):
        if split not in entries:
            entries[split] = entries[other]
            notes.append(f"{split}: there is no {split}/, so the {other} images serve")
    return classes, entries, notes


def write_folder_lists(root: Path, out: Path, val: float, test: float, seed: int, overwrite: bool):
    """Writes out/{train,val,test}.txt and classes.txt for the images below root; returns ({split: entries}, notes)."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    split_already = (root / "train").is_dir() and any((root / split).is_dir() for split in ("val", "test"))
    classes, entries, notes = own_splits(root) if split_already else split_folder(root, val, test, seed)
    if not entries["val"] or not entries["test"]:
        raise UserError(f"{root}: no class has three images, so there is nothing to validate on; add images")
    files = {f"{split}.txt": list_content(entries[split]) for split in SPLITS}
    files["classes.txt"] = "".join(f"{name}\n" for name in classes).encode(errors="surrogateescape")
    out.mkdir(parents=True, exist_ok=True)
    write_files(out, files, overwrite)
    return entries, notes
