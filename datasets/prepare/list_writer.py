"""Writes list files that read back exactly, completely or not at all, and overwrites others only on request."""

import os
from pathlib import Path

from utils.errors import UserError
from utils.files import atomic_write

from ..lists import parse_line


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


def refuse_other_content(folder: Path, files: dict[str, bytes], overwrite: bool):
    """Raises UserError if one of the files exists with another content and may not be overwritten."""
    for name, content in files.items():
        file = folder / name
        if not overwrite and file.is_file() and file.read_bytes() != content:
            raise UserError(f"{file}: exists with other content; keep it, or replace it with --overwrite")


def write_files(folder: Path, files: dict[str, bytes], overwrite: bool = False) -> list[str]:
    """Writes {name: content} into the folder and returns the names of those that were not there already.

    Before anything is written, raises UserError as refuse_other_content does.
    """
    refuse_other_content(folder, files, overwrite)
    written = []
    for name, content in files.items():
        file = folder / name
        if file.is_file() and file.read_bytes() == content:
            continue
        with atomic_write(file) as target:
            target.write(content)
        written.append(name)
    return written
