"""Trees of images: why listed files are missing, and the sorted tree of symbolic links."""

import os
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from utils.errors import UserError

from ..splits import Split, by_split, find_splits, missing_entries

SORTING = "python -m datasets.prepare imagenet-lt (or places-lt) --root DIR --link OUT sorts it"


def flat(path: str, split: str) -> str:
    """The layout of a folder without class folders, as the ILSVRC2012 validation set is unpacked."""
    parts = PurePosixPath(path).parts
    return f"{parts[0]}/{parts[-1]}"


def bar(what: str):
    """A progress bar for missing_entries, which looks up 1,024 files at a time."""
    return lambda spans: tqdm(spans, desc=what, unit="k files", disable=None)


def find_tree(root: Path, lists: dict[str, Path], sort_flat: bool = False) -> dict[str, Split]:
    """The splits of the lists, after a check that all their files are below root.

    sort_flat: accept test images without class folders. Raises UserError if files are missing: one line with the first
    ones, their number and the likely cause.
    """
    splits = find_splits(root, {split: str(file) for split, file in lists.items()}, progress=bar("looking for images"))
    for name, split in splits.items():
        if sort_flat and split.missing and name == "test":
            missing = tuple(missing_entries(split.images, root, flat, name, bar("unsorted images")))
            if len(missing) < len(split.missing):
                splits[name] = split = split._replace(layout=flat, missing=missing)
        if split.missing:
            raise UserError(f"{split.missing_message()}; it looks like {diagnose(split)}")
    return splits


def diagnose(split: Split) -> str:
    """The likely cause of a split's missing files."""
    images, root = split.images, Path(split.root)
    step = max(1, len(split.missing) // 200)
    paths = [split.images.path(i) for i in split.missing[::step]]
    files = [split.layout(path, split.name) for path in paths]

    def any_in(folder, paths):
        return any((folder / path).is_file() for path in paths)

    if any((root / file).exists() for file in files):
        return "something that is not a regular file, such as a FIFO, with an image's name; replace it with the image"
    if split.layout is not flat and any_in(root, [flat(path, split.name) for path in paths]):
        return f"an unsorted validation folder, images without class folders; {SORTING}"
    if len(split.missing) == len(images):
        usual = [root / name for name in ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")]
        below = sorted(child for child in root.iterdir() if child.is_dir())[:1000]
        for base in (root.resolve().parent, *usual, *below):
            for relative in (paths[:20], [by_split(path, split.name) for path in paths[:20]]):
                if any_in(base, relative):
                    return f"the wrong root; these files lie below {base}"
    folders = {str(PurePosixPath(file).parent) for file in files}
    absent = {folder for folder in folders if not (root / folder).is_dir()}
    if any((root / f"{folder}.tar").is_file() for folder in absent):
        return f"class archives that are not unpacked yet ({next(iter(sorted(absent)))}.tar)"
    if len(absent) == len(folders) and len(split.missing) == len(images):
        return "the wrong root, or images that are not unpacked: none of the listed folders is there"
    for file in files:
        for suffix in (".JPEG", ".jpg", ".jpeg", ".png", ".JPG", ".webp"):
            other = PurePosixPath(file).with_suffix(suffix)
            if str(other) != file and (root / other).is_file():
                return f"another release or a converted copy: {other} is there instead of {PurePosixPath(file).name}"
    if len(absent) == len(folders):
        return f"an incomplete copy: class folders such as {min(absent)} are not there"
    return "the wrong release for these lists (ImageNet-LT's are of ILSVRC2012), or files that were lost or removed"


def link_tree(splits: dict[str, Split], out: Path, layout=by_split) -> int:
    """Makes symbolic links below out to the images of the splits, and returns how many were not there yet.

    layout: where the link of an entry lies below out, such as by_split. When run again, it makes the links
    that are missing, and corrects those of a tree that has moved. Raises UserError if two images would have the same
    link, or if something else exists in a link's place.
    """
    links = {}
    for name, split in splits.items():
        for i in range(len(split.images)):
            path = split.images.path(i)
            image = os.path.abspath(os.path.join(split.root, split.layout(path, name)))
            link = layout(path, name)
            if links.setdefault(link, image) != image:
                raise UserError(f"--link {out}: {image} and {links[link]} would both be {link}; use the tree as it is")
    for folder in sorted({os.path.dirname(link) for link in links}):
        (out / folder).mkdir(parents=True, exist_ok=True)
    made = 0
    for link, image in tqdm(links.items(), desc="links", unit="link", disable=None):
        link = out / link
        if link.is_symlink():
            if os.readlink(link) == image:
                continue
            link.unlink()
        elif link.exists():
            raise UserError(f"{link}: exists and is not a link; use another folder for --link")
        link.symlink_to(image)
        made += 1
    return made
