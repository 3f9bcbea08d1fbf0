"""Writes list files that read back exactly, completely or not at all, and overwrites others only on request."""

import os
from pathlib import Path

from utils.errors import UserError, retry
from utils.files import atomic_write, is_file, name_failure

from ..lists import ImageList, parse_line
from ..splits import CLASSES_FILE


def read_entries(image_list: ImageList, numbers=None) -> list[tuple[str, int]]:
    """(path, label) of the entries with these numbers, by default of all."""
    numbers = range(len(image_list)) if numbers is None else numbers
    return [(image_list.path(i), int(image_list.labels[i])) for i in numbers]


def list_content(entries) -> bytes:
    """The list file of an iterable of (path, label). Raises UserError for a path that a list cannot hold."""
    lines = []
    for path, label in entries:
        line = os.fsencode(f"{path} {label}")
        try:
            if parse_line(line) != (os.fsencode(path), label):
                raise ValueError("white space at an end of the path")
        except ValueError as error:
            raise UserError(f"{path!r}: a list cannot hold this path ({error}); rename the file or folder") from None
        lines.append(line + b"\n")
    return b"".join(lines)


def list_files(lists: dict[str, list], classes: list[str]) -> dict[str, bytes]:
    """{name: content} of <split>.txt for every split's entries, and of classes.txt."""
    files = {f"{split}.txt": list_content(entries) for split, entries in lists.items()}
    return files | {CLASSES_FILE: os.fsencode("".join(f"{name}\n" for name in classes))}


def refuse_other_content(folder: Path, files: dict[str, bytes], overwrite: bool):
    """Raises UserError if one of the files exists with another content and may not be overwritten."""
    for name, content in files.items():
        file = folder / name
        if not overwrite and is_file(file) and retry(Path.read_bytes, file) != content:
            raise UserError(f"{file}: exists with other content; keep it, or replace it with --overwrite")


def write_files(folder: Path, files: dict[str, bytes], overwrite: bool):
    """Writes {name: content} into the folder, apart from what is there; first, refuse_other_content."""
    refuse_other_content(folder, files, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        file = folder / name
        if not is_file(file) or retry(Path.read_bytes, file) != content:
            with name_failure(file, "name a folder that may be written"), atomic_write(file) as target:
                target.write(content)
