"""The published lists of data/manifest.json: downloaded or taken from disk, verified, and only then put in place."""

import hashlib
import json
import socket
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

from utils.errors import UserError, one_line, retry
from utils.files import is_file, lexists

from ..lists import ImageList
from .list_writer import write_files

MANIFEST = Path(__file__).resolve().parents[2] / "data" / "manifest.json"
TIMEOUT = 60  # seconds without a byte


def manifest(dataset: str) -> dict:
    """The facts of data/manifest.json about imagenet-lt, places-lt or inaturalist18."""
    return json.loads(MANIFEST.read_text())["lists"][dataset]


def git_blob_id(content: bytes) -> str:
    """The id under which git stores the content: it pins a list exactly."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def check_list(content: bytes, source: str, facts: dict) -> ImageList:
    """The list in content. Raises UserError, naming source and what is wrong, if it is not the one of the manifest.

    facts: a split of the manifest.
    """
    found = git_blob_id(content)
    name = facts["file"]
    wanted = facts["git_blobs"]
    if found in wanted:
        return ImageList.from_bytes(name, content)
    if content.lstrip()[:1] == b"<":
        raise UserError(f"{source}: an HTML page, not a list (an error or login page?); fetch it by hand, use --from")
    lines = content.count(b"\n") + (not content.endswith(b"\n"))
    if lines != facts["lines"]:
        raise UserError(f"{source}: {lines} lines, {name} has {facts['lines']}: cut short, or another list")
    changed = "an altered list, or one with other line endings"
    raise UserError(f"{source}: git blob id {found}, that of {name} is {wanted[0]}: {changed}")


@contextmanager
def download_errors(what: str, hint: str):
    """Turns what a download raises into a UserError with the hint; a stalled connection ends after TIMEOUT seconds."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    except (OSError, HTTPException, ValueError, RuntimeError, EOFError) as error:
        raise UserError(f"{what}: the download failed ({one_line(error)}); try again, {hint}") from None
    finally:
        socket.setdefaulttimeout(before)


def download(url: str) -> bytes:
    """The content of a small file. Raises UserError."""
    print(f"downloading {url}", flush=True)
    with download_errors(url, "or fetch the list by hand and give it with --from"), urlopen(url) as response:
        return response.read()


def find_on_disk(given: Path, name: str, wanted: dict[str, dict]) -> dict[str, Path]:
    """{split: list} of the wanted lists in given: a list with the right file name or content, or a folder.

    name: the data set's, which folders of lists have. Raises UserError if there is none.
    """
    if not lexists(given):
        raise UserError(f"--from {given}: no such file or folder; correct the path")
    found = {}
    for split, facts in wanted.items():
        if is_file(given):
            if given.name == facts["file"] or git_blob_id(retry(Path.read_bytes, given)) in facts["git_blobs"]:
                found[split] = given
            continue
        for folder in (given / "data" / name, given / name, given / "data", given):  # the last one counts
            if is_file(folder / facts["file"]):
                found[split] = folder / facts["file"]
    if not found:
        raise UserError(f"--from {given}: holds none of {', '.join(facts['file'] for facts in wanted.values())}")
    return found


def obtain_lists(dataset: str, out: Path, url=None, given: Path | None = None, overwrite=False) -> dict[str, ImageList]:
    """Brings the published lists of a data set into out; returns {split: list} of those that are there now.

    They are taken from given (a folder, or a file: that list alone), else downloaded from url, else from the published
    source. Lists that are there already are verified and kept. Raises UserError if a list cannot be obtained or is not
    the published one, and if another file has its name and overwrite is not set.
    """
    about = manifest(dataset)
    wanted = {split: facts for split, facts in about["splits"].items() if "lines" in facts}
    on_disk = {} if given is None else find_on_disk(given, about["name"], wanted)
    lists = {}
    for split, facts in wanted.items():
        file = out / facts["file"]
        if is_file(file):
            try:
                lists[split] = check_list(retry(Path.read_bytes, file), str(file), facts)
                continue
            except UserError as error:
                if not overwrite:
                    raise UserError(f"{error}; remove it, or replace it with --overwrite") from None
        if given is None:
            source = f"{(url or about['source']).rstrip('/')}/{facts['file']}"
            content = download(source)
        elif split in on_disk:
            source = str(on_disk[split])
            content = retry(Path.read_bytes, on_disk[split])
        else:
            continue
        lists[split] = check_list(content, source, facts)
        write_files(out, {facts["file"]: content}, overwrite)
    return lists
