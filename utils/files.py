"""Writing files so that a crash at any moment leaves the old file or the complete new one."""

import errno
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError, one_line


@contextmanager
def atomic_write(path, before_replacing=lambda: None, sync=True):
    """Opens a temporary file beside `path` for writing bytes; if the block succeeds, it replaces path.

    The file and then its folder are flushed to the disk. If the block raises, path stays as it was and the temporary
    file is removed. before_replacing is called when the new file is complete. sync=False skips flushing to the disk,
    which takes milliseconds per file; use it for many files that can be made again. Raises OSError.
    """
    path = Path(path)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
            apply_umask(file.name)
            before_replacing()
            (replace if sync else os.replace)(file.name, path)
        finally:
            Path(file.name).unlink(missing_ok=True)


def apply_umask(path):
    """Gives a temporary file, which is private at first, the permissions of an ordinary new file."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)


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
    temporary = Path(f"{target}.link")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            with open(source, "rb") as original, open(temporary, "wb") as copy:
                shutil.copyfileobj(original, copy)
                copy.flush()
                os.fsync(copy.fileno())
        replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)  # os.replace does nothing if both are the same file


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


def remove_temporary_files(folder, *names: str):
    """Removes what a process left behind that was killed while it wrote one of the named files."""
    for name in names:
        for file in [*Path(folder).glob(f".{name}.{'?' * 8}"), Path(folder) / f"{name}.link"]:
            file.unlink(missing_ok=True)
