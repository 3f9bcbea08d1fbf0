"""Layouts of image trees: where the file of a list's entry lies below the root, and which files are missing."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

from .lists import ImageList

CHUNK = 1024  # entries that a thread looks up at a time


def as_listed(path: str, split: str) -> str:
    """The layout of a tree whose paths are those of the list."""
    return path


def by_split(path: str, split: str) -> str:
    """The layout of a tree with one folder per split: <split>/<class>/<file>."""
    parts = PurePosixPath(path).parts
    return "/".join((split, *parts[-2:]))


def missing_entries(images: ImageList, root, layout, split: str, progress=iter) -> list[int]:
    """The entries without a regular file below root; a pool of threads looks them up.

    progress: wraps the iterator over the results.
    """

    def missing(chunk):
        return [i for i in chunk if not os.path.isfile(os.path.join(root, layout(images.path(i), split)))]

    chunks = [range(start, min(start + CHUNK, len(images))) for start in range(0, len(images), CHUNK)]
    with ThreadPoolExecutor(max_workers=16) as pool:
        return [i for found in progress(pool.map(missing, chunks)) for i in found]


def find_layout(images: ImageList, root, split: str, progress=iter):
    """(layout, missing): the layout under which most files exist below root, and the entries that are still missing."""
    layout, missing = as_listed, missing_entries(images, root, as_listed, split, progress)
    if missing:
        others = missing_entries(images, root, by_split, split, progress)
        if len(others) < len(missing):
            layout, missing = by_split, others
    return layout, missing
