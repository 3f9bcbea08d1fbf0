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
ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}  # all others do not say that a file is missing
SYSTEM_NAMES = {  # of NAS systems, macOS' archives, Windows and ext4, in small letters
    "@eadir", "@__thumb", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "__macosx", "$recycle.bin",
    "system volume information", "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini",
}  # fmt: skip


@contextmanager
def optional_service():
    """Forgives that the file system does not offer what the block asks for, such as flushing folders."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS:
            raise


def get_mode(path, follow: bool = True) -> int:
    """The st_mode of what is at a path, 0 if nothing is found; follow: of a link's target.

    Where the system cannot look, which os.path.exists and others take for a missing file, raises Unavailable if that
    passes, else UserError.
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
    """os.path.isfile, but for get_mode."""
    return stat.S_ISREG(get_mode(path))


def is_dir(path) -> bool:
    """os.path.isdir, but for get_mode."""
    return stat.S_ISDIR(get_mode(path))


def lexists(path) -> bool:
    """os.path.lexists, but for get_mode."""
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
        (replace if sync else os.replace)(temporary, path)


def flush(file):
    """Writes what an open file holds to the disk."""
    file.flush()
    with optional_service():
        os.fsync(file.fileno())


@contextmanager
def name_failure(path, kept: str):
    """Makes a failure to write `path` a UserError that names the file, the system's reason, and what is kept.

    Unavailable if it passes; it is not tried again, since the system may have lost what it could not write.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's writer turns the system's errors into RuntimeError
        found = system_error(error)
        kind = Unavailable if found is not None and found.errno in PASSING else UserError
        raise kind(f"{path}: cannot be written ({one_line(found or error)}); {kept}") from None


def lock_folder(folder):
    """Opens a folder's .lock and locks it until it is closed, or until this process ends, however it ends.

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
    """Makes a refusal of the system, such as of a folder that may not be read, a UserError with its path."""
    try:
        yield
    except PermissionError as error:
        raise UserError(f"{error.filename}: {one_line(error)}; correct its permissions or the path") from None


def walk(root, is_wanted=lambda name: True) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """([(folder, names of its files)] of root and all below it, sorted; a line on each kind of thing that is left out).

    What is hidden and SYSTEM_NAMES are left out. Links are followed, but a real folder comes once, and so does a real
    file with a wanted name: under its own path or, if it lies elsewhere, that of the first link. A link to a folder
    around root is left out. Raises UserError for a folder that may not be read or searched, and OSError.
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
            for name, is_link, below in sorted(retry(list_folder, folder)):
                path = os.path.join(folder, name)
                if is_hidden(name):
                    hidden += [path] if below else []
                elif below or is_link:
                    (folders if below else links).append(path)
                else:
                    tree[real][1].append(name)
    own = {f"{real}/{name}" for real, (_, names) in tree.items() if file_links for name in names if is_wanted(name)}
    for link in sorted(file_links, key=lambda link: (not is_wanted(os.path.basename(link)), link)):
        if not is_wanted(os.path.basename(link)) and not get_mode(link):
            broken.append(link)
        elif (real := os.path.realpath(link)) in own:
            repeated.append(link)
        else:
            own.add(real)
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
