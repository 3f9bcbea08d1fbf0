"""Trees of images: why listed files are missing, and the sorted tree of symbolic links."""

import os
import unicodedata
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from tqdm import tqdm

from utils.errors import UserError

from ..splits import Split, by_split, find_files, find_splits

SUFFIXES = (".JPEG", ".jpg", ".jpeg", ".png", ".JPG", ".webp")
real_folder = lru_cache(maxsize=4096)(os.path.realpath)


def flat(path: str, split: str) -> str:
    """The layout of a folder without class folders, as the ILSVRC2012 validation set is unpacked."""
    parts = PurePosixPath(path).parts
    return f"{parts[0]}/{parts[-1]}"


def bar(what: str):
    """A progress bar for find_files, which looks up 1,024 files at a time."""
    return partial(tqdm, desc=what, unit="k files", disable=None)


class Missing(NamedTuple):
    """What CAUSES are recognized by: some of a split's missing files, and their folders that are not there."""

    split: Split
    root: Path
    paths: list[str]  # as listed
    files: list[str]  # below root, in the split's layout
    absent: list[str]


def unsorted_files(missing: Missing):
    paths = [] if missing.split.layout is flat else [flat(path, missing.split.name) for path in missing.paths]
    return (path for path in paths if os.path.isfile(missing.root / path))


def other_roots(missing: Missing):
    if len(missing.split.missing) < len(missing.split.image_list):
        return ()
    usual = [missing.root / name for name in ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")]
    below = sorted(child for child in missing.root.iterdir() if child.is_dir())[:1000]
    roots = (missing.root.resolve().parent, *usual, *below)
    paths = missing.paths[:20] + [by_split(path, missing.split.name) for path in missing.paths[:20]]
    return (root for root in roots if any(os.path.isfile(root / path) for path in paths))


def class_archives(missing: Missing):
    return (f"{folder}.tar" for folder in missing.absent if os.path.isfile(missing.root / f"{folder}.tar"))


def fold(name: str) -> str:
    """What names that differ only in capitals or the form of accents have in common."""
    return unicodedata.normalize("NFC", name).casefold()


def other_spelling(root, path: str) -> str | None:
    """The path of a file below root whose names differ from the path's in capitals or forms of accents, if any."""
    there = ""
    for name in path.split("/"):
        folder = os.path.join(root, there)
        if os.path.isdir(folder) and not os.path.lexists(os.path.join(folder, name)):
            name = next((other for other in sorted(os.listdir(folder)) if fold(other) == fold(name)), name)
        there = os.path.join(there, name)
    return there if os.path.isfile(os.path.join(root, there)) else None


def other_spellings(missing: Missing):
    return filter(None, (other_spelling(missing.root, file) for file in missing.files))


def other_suffixes(missing: Missing):
    others = (PurePosixPath(file).with_suffix(suffix) for file in missing.files for suffix in SUFFIXES)
    return (other for other in others if os.path.isfile(missing.root / other))


CAUSES = (  # cause, with {} for what was found; how to find it; remedy. The first that finds something is named
    ("an unsorted validation folder, images without class folders ({})", unsorted_files,
     "python -m datasets.prepare imagenet-lt (or places-lt) --root DIR --link OUT sorts it"),
    ("the wrong root: these files lie below {}", other_roots, "give that folder"),
    ("class archives that are not unpacked yet ({})", class_archives, "unpack each into a folder of its name"),
    ("capitals or accents that are written in another way ({} is there)", other_spellings, "correct the list"),
    ("another release or a converted copy ({} is there)", other_suffixes, "get the release that the lists are of"),
    ("an incomplete copy, or the wrong root: folders such as {} are not there", lambda missing: missing.absent,
     "copy them, or give the folder that contains them"),
    ("the wrong release for these lists (ImageNet-LT's are of ILSVRC2012), or files that were lost or removed",
     lambda missing: missing.files, "get them again"),
)  # fmt: skip


def diagnose(split: Split) -> str:
    """The cause of a split's missing files, if one is certain, else the likely one, and its remedy."""
    if cause := split.cause_of_missing():
        return cause
    root = Path(split.root)
    some = split.missing[:: max(1, len(split.missing) // 200)]
    paths = [split.image_list.path(i) for i in some]
    files = [split.path(i) for i in some]
    absent = [folder for folder in sorted({os.path.dirname(file) for file in files}) if not (root / folder).is_dir()]
    missing = Missing(split, root, paths, files, absent)
    for cause, find, remedy in CAUSES:
        for found in find(missing):
            return f"it looks like {cause.format(found)}; {remedy}"


def require_files(split: Split):
    """Raises UserError if files of the split are missing: the first ones, their number and the likely cause."""
    if split.missing:
        raise UserError(f"{split.missing_message()}; {diagnose(split)}")


def find_tree(root: Path, lists: dict[str, Path], sort_flat: bool = False) -> dict[str, Split]:
    """The splits of the lists, all of whose files are below root. Raises UserError as require_files does.

    sort_flat: accept test images without class folders.
    """
    splits = find_splits(root, {split: str(file) for split, file in lists.items()}, progress=bar("looking for images"))
    test = splits["test"]
    if sort_flat and test.missing:
        unsorted = find_files(test, bar("unsorted images"), [flat])
        splits["test"] = min(test, unsorted, key=lambda split: len(split.missing))
    for split in splits.values():
        require_files(split)
    return splits


def link_tree(splits: dict[str, Split], out: Path, layout=by_split) -> int:
    """Makes symbolic links below out to the images of the splits, and returns how many were not there yet.

    layout: where the link of an entry lies below out. When run again, it makes the links that are missing, and corrects
    those of a tree that has moved. Raises UserError if two images would have the same link, or if something else exists
    in a link's place.
    """
    targets = {}
    for name, split in splits.items():
        for i in range(len(split.image_list)):
            image = os.path.abspath(split.file(i))
            link = layout(split.image_list.path(i), name)
            if targets.setdefault(link, image) != image:
                both = f"{image} and {targets[link]}"
                raise UserError(f"--link {out}: {both} would both be {link}; use the tree as it is")
    for folder in {os.path.dirname(link) for link in targets}:
        (out / folder).mkdir(parents=True, exist_ok=True)
    progress = tqdm(targets.items(), desc="links", unit="link", disable=None)
    return sum(make_link(out / link, image, True, "--link") for link, image in progress)


def make_link(link: Path, image, replace: bool, flag: str) -> bool:
    """Makes a symbolic link; returns whether it was not there yet. replace: also in the place of another link.

    It is relative if both ends lie below one folder, which may then be moved, or mounted somewhere else. Raises
    UserError, which names the flag of the link's folder, if something else is there.
    """
    folder, name = os.path.split(os.path.abspath(image))
    target = os.path.join(folder, name)
    ends = (real_folder(folder), real_folder(link.parent))
    if os.path.commonpath(ends) != os.sep:
        target = os.path.join(os.path.relpath(*ends), name)
    is_link = link.is_symlink()
    if is_link and os.readlink(link) == target:
        return False
    if is_link and (replace or os.path.realpath(link) == os.path.realpath(image)):
        link.unlink()
    if os.path.lexists(link):
        raise UserError(f"{link}: exists and is not a link to {target}; use another folder for {flag}")
    link.symlink_to(target)
    return True
