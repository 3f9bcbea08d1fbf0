"""Writing files so that after a crash at any moment there is the old file or the complete new one."""

import errno
import os
import secrets
import shutil
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError, one_line


@contextmanager
def temporary_beside(path):
    """Yields a name for a temporary file in the folder of `path`; the file, if it is still there, is removed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporary_files(folder, *names: str):
    """Removes what a process did not remove that was killed while it wrote one of the named files."""
    for name in names:
        for file in Path(folder).glob(f".{name}.{'?' * 8}"):
            file.unlink(missing_ok=True)


@contextmanager
def atomic_write(path, before_replacing=lambda: None, sync=True):
    """Opens a temporary file beside `path` for writing bytes; if the block succeeds, it replaces path.

    The file and then its folder are flushed to the disk. If the block raises, path stays as it was and the temporary
    file is removed. before_replacing is called when the new file is complete. sync=False skips flushing to the disk,
    which takes milliseconds per file; use it for many files that can be made again. Raises OSError.
    """
    with temporary_beside(path) as temporary, open(temporary, "xb") as file:
        yield file
        file.flush()
        if sync:
            os.fsync(file.fileno())
        before_replacing()
        (replace if sync else os.replace)(temporary, path)


def replace(source, target):
    """os.replace, with the folder's new entry flushed to the disk."""
    os.replace(source, target)
    folder = os.open(Path(target).parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some shared file systems cannot flush folders
            raise
    finally:
        os.close(folder)


def link(source, target):
    """Gives a file, which must never change in place, a second name; copies it if the file system has no links."""
    with temporary_beside(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            with open(source, "rb") as original, atomic_write(target) as copy:
                shutil.copyfileobj(original, copy)
        else:
            replace(temporary, target)  # does nothing if both are the same file already


def walk(folder):
    """(path, names of its files) of a folder and those below it; links are followed, and no folder comes twice.

    Raises UserError for one that cannot be read.
    """

    def fail(error):
        raise UserError(f"{error.filename}: cannot be read ({one_line(error)}); correct its permissions or the path")

    seen = set()
    for path, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        if (real := os.path.realpath(path)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield path, names
