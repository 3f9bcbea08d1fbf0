"""Writing files so that after a crash at any moment there is the old file or the complete new one; walking folders."""

import errno
import fcntl
import os
import secrets
import shutil
import stat
from collections import deque
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from .errors import PASSING, Unavailable, UserError, one_line, printable, retry, system_error

REFUSALS = {errno.EPERM, errno.EACCES, errno.EBADF, errno.EINVAL, errno.EISDIR, errno.ENOSYS, errno.ENOTSUP}
ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}  # no other error means that a file is missing
SYSTEM_NAMES = {  # of NAS systems, macOS' archives, Windows and ext4, in small letters
    "@eadir", "@__thumb", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "__macosx", "$recycle.bin",
    "system volume information", "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini",
}  # fmt: skip


@contextmanager
def optional_service():
    """Ignores that the file system does not support what the block does, such as flushing folders."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS:
            raise


def get_mode(path, follow: bool = True) -> int:
    """The st_mode of what is at a path, or 0 if there is nothing; follow: whether a link stands for its target.

    If the system cannot tell, which os.path.exists and others take for a missing file, raises Unavailable if the error
    may pass, else UserError.
    """
    try:
        return retry(partial(os.stat, follow_symlinks=follow), path).st_mode
    except ValueError:
        return 0
    except OSError as error:
        if error.errno in ABSENT:
            return 0
        raise UserError(f"{path}: {one_line(error)}; correct its permissions or the path") from None


def is_file(path) -> bool:
    """os.path.isfile, but raises where get_mode does."""
    return stat.S_ISREG(get_mode(path))


def is_dir(path) -> bool:
    """os.path.isdir, but raises where get_mode does."""
    return stat.S_ISDIR(get_mode(path))


def lexists(path) -> bool:
    """os.path.lexists, but raises where get_mode does."""
    return get_mode(path, follow=False) != 0


def check_link(path):
    """Raises UserError, which names the target, for a link that leads nowhere."""
    if lexists(path) and not get_mode(path):
        raise UserError(broken_link(path))


def broken_link(path, reason: str = "") -> str:
    """What is wrong with a link that leads nowhere, and what helps."""
    why = f"{path}: a broken link, to {os.readlink(path)}{reason}"
    return f"{why}; have its target there too (mount it in a container), or make the links again"


def check_folder(path, hint: str):
    """Raises UserError, which ends with the hint, if a path is no folder."""
    check_link(path)
    if not is_dir(path):
        raise UserError(f"{path}: {'a file' if lexists(path) else 'no such folder'}; {hint}")


@contextmanager
def temporary_beside(path):
    """Yields a name for a temporary file in the folder of `path`; the file, if it is still there, is removed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_write(path, sync=True):
    """Opens a temporary file beside `path` for writing bytes; if the block succeeds, it replaces path.

    The file and then its folder are flushed to the disk. If the block raises, path stays as it was and the temporary
    file is removed. sync=False skips flushing to the disk, which takes milliseconds per file; use it for many files
    that can be made again. Raises OSError.
    """
    with temporary_beside(path) as temporary, open(temporary, "xb") as file:
        yield file
        file.flush()
        if sync:
            flush(file)
            replace(temporary, path)
        else:
            os.replace(temporary, path)


def flush(file):
    """Writes what an open file holds to the disk."""
    file.flush()
    with optional_service():
        os.fsync(file.fileno())


@contextmanager
def name_failure(path, kept: str):
    """Turns a failure to write `path` into a UserError that names the file, the system's reason, and what is kept.

    If the failure may pass, raises Unavailable instead, without a retry: the system may have lost what it had to write.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's writer turns the system's errors into RuntimeError
        cause = system_error(error)
        kind = Unavailable if cause is not None and cause.errno in PASSING else UserError
        raise kind(f"{path}: cannot be written ({one_line(cause or error)}); {kept}") from None


def lock_folder(folder):
    """Opens and locks a folder's .lock; the lock ends when the file is closed, or when the process ends, in any way.

    Returns None, with a warning, on a file system without locks. Raises BlockingIOError if another process holds the
    lock, OSError if the file cannot be opened.
    """
    file = open(Path(folder) / ".lock", "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise BlockingIOError(error.errno, "locked by another run", file.name) from None
        if error.errno not in REFUSALS | {errno.ENOLCK}:
            raise
        print(f"warning: {folder}: cannot be locked ({one_line(error)}); start no second run in it", flush=True)
        return None
    return file


def replace(source, target):
    """os.replace, with the folder's new entry flushed to the disk."""
    os.replace(source, target)
    with optional_service():
        folder = os.open(Path(target).parent, os.O_RDONLY)
        try:
            os.fsync(folder)
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


@contextmanager
def name_refused():
    """Turns a PermissionError, such as for a folder that may not be read, into a UserError that names the path."""
    try:
        yield
    except PermissionError as error:
        raise UserError(f"{error.filename}: {one_line(error)}; correct its permissions or the path") from None


def walk(root, is_wanted=lambda name: True) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """([(folder, names of its files)] of root and all below it, sorted; a line on each kind of thing that is left out).

    Leaves out what is hidden, and SYSTEM_NAMES. Follows links, but lists each real folder once, and each real file with
    a wanted name once: under its own path or, if that is not below root, under the path of the first link to it. Leaves
    out a link to a folder that contains root. Raises UserError for a folder that may not be read or searched, and
    OSError.
    """
    top = os.path.realpath(root)
    tree = {}  # real folder: (folder, names)
    folders = deque([os.fspath(root)])
    links = deque()
    file_links = []
    hidden = []
    repeated = []
    broken = []
    with name_refused():
        while folders or links:
            if not folders:  # all real folders come before the first link
                link = links.popleft()
                (folders if is_dir(link) else file_links).append(link)
                continue
            folder = folders.popleft()
            real = os.path.realpath(folder)
            if tree and (real in tree or os.path.commonpath((real, top)) == real):
                repeated.append(folder)
                continue
            retry(os.stat, os.path.join(folder, "."))  # refused if the folder may be read, but not searched
            tree[real] = folder, []
            for name, is_link, is_folder in sorted(retry(list_folder, folder)):
                path = os.path.join(folder, name)
                if is_hidden(name):
                    hidden += [path] if is_folder else []
                elif is_folder:
                    folders.append(path)
                elif is_link:
                    links.append(path)
                else:
                    tree[real][1].append(name)
    seen = {f"{real}/{name}" for real, (_, names) in tree.items() if file_links for name in names if is_wanted(name)}
    for link in sorted(file_links, key=lambda link: (not is_wanted(os.path.basename(link)), link)):  # wanted ones first
        if not is_wanted(os.path.basename(link)) and not get_mode(link):
            broken.append(link)
        elif (real := os.path.realpath(link)) in seen:
            repeated.append(link)
        else:
            seen.add(real)
            tree[os.path.realpath(os.path.dirname(link))][1].append(os.path.basename(link))
    left_out = {"hidden folders or folders of thumbnails": hidden, "links to what is there without them": repeated}
    left_out["links that lead nowhere"] = broken
    notes = [
        f"left out: {len(paths)} {what}, such as {printable(os.path.relpath(min(paths), root))}"
        for what, paths in left_out.items()
        if paths
    ]
    return sorted((folder, sorted(names)) for folder, names in tree.values()), notes


def is_hidden(name: str) -> bool:
    """Whether walk leaves out what has this name."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def list_folder(folder) -> list[tuple[str, bool, bool]]:
    """(name, whether it is a link, whether it is a folder itself) of all in a folder."""
    with os.scandir(folder) as entries:
        return [(entry.name, entry.is_symlink(), entry.is_dir(follow_symlinks=False)) for entry in entries]
