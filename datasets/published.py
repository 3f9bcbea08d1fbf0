"""The published lists of data/manifest.json: fetched or taken from disk, verified before they get their final name."""

import hashlib
import json
import shutil
import socket
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlretrieve

from tqdm import tqdm

from utils.errors import UserError

from .list_file import ListIndex
from .list_writer import whole_file

MANIFEST = Path(__file__).resolve().parent.parent / "data" / "manifest.json"
TIMEOUT = 60  # seconds without a byte


def manifest(dataset: str) -> dict:
    """What data/manifest.json says of imagenet-lt, places-lt or inaturalist18."""
    return json.loads(MANIFEST.read_text())["lists"][dataset]


def git_blob_id(content: bytes) -> str:
    """The id under which git stores the content: it pins a list exactly."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def check_list(content: bytes, source: str, facts: dict, num_classes: int) -> ListIndex:
    """The list's index. Raises UserError, naming source and what is wrong, if it is not the one that facts describe.

    facts: a split of the manifest.
    """
    if content.lstrip()[:1] == b"<":
        raise UserError(f"{source}: an HTML page, not a list (an error or login page?); fetch it by hand, then --from")
    lines = content.count(b"\n") + (not content.endswith(b"\n"))
    if lines != facts["lines"]:
        raise UserError(f"{source}: {lines} lines, {facts['file']} has {facts['lines']}: cut short, or another list")
    index = ListIndex.parse(source, content)
    if index.num_classes != num_classes:
        raise UserError(f"{source}: {index.num_classes} classes where {facts['file']} has {num_classes}: another list")
    counts = index.counts(num_classes)
    for bound, count in (("max_per_class", int(counts.max())), ("min_per_class", int(counts.min()))):
        if facts.get(bound, count) != count:
            raise UserError(f"{source}: {bound} is {count} where {facts['file']} has {facts[bound]}: another list")
    if git_blob_id(content) not in facts["git_blobs"]:
        raise UserError(
            f"{source}: git blob id {git_blob_id(content)}, that of {facts['file']} is {facts['git_blobs'][0]}: "
            "an altered list, or one with other line ends"
        )
    return index


@contextmanager
def download_errors(what: str, hint: str):
    """Turns what a download raises into a UserError with the hint; a connection that stalls ends in TIMEOUT seconds."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    except (OSError, HTTPException, ValueError, RuntimeError, EOFError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{what}: the download failed ({reason}); try again, {hint}") from None
    finally:
        socket.setdefaulttimeout(before)


def download(url: str, file: Path):
    """Fetches url into file with a progress bar on a terminal. Raises UserError."""
    with (
        download_errors(url, "or fetch the list by hand and give it with --from"),
        tqdm(desc=url.rsplit("/", 1)[-1], unit="B", unit_scale=True, disable=None) as bar,
    ):

        def report(blocks, block_size, total):
            bar.total = max(total, 0) or None
            bar.update(blocks * block_size - bar.n)

        urlretrieve(url, file, report)


def find_on_disk(given: Path, facts: dict, name: str) -> Path | None:
    """The list in given: the file itself by its name or id, or in a folder, such as a clone, where clones have it."""
    if given.is_file():
        known = given.name == facts["file"] or git_blob_id(given.read_bytes()) in facts["git_blobs"]
        return given if known else None
    folders = (given, given / "data", given / name, given / "data" / name)
    return next((folder / facts["file"] for folder in folders if (folder / facts["file"]).is_file()), None)


def obtain_lists(dataset: str, out: Path, url=None, given: Path | None = None, overwrite=False) -> dict[str, ListIndex]:
    """Brings the published lists of a data set into out; returns {split: index} of those that are there now.

    They are taken from given (a file: that list alone, or a folder), else downloaded from url, else from the published
    source. Lists that are there already are verified and kept. Raises UserError where a list is not to be had, is not
    the published one, or where another file has its name and overwrite is not set.
    """
    about = manifest(dataset)
    wanted = {split: facts for split, facts in about["splits"].items() if "lines" in facts}
    if given is not None:
        if not given.exists():
            raise UserError(f"--from {given}: no such file or folder")
        found = {split: find_on_disk(given, facts, about["name"]) for split, facts in wanted.items()}
        if not any(found.values()):
            names = ", ".join(facts["file"] for facts in wanted.values())
            raise UserError(f"--from {given}: holds none of {names}")
    indices = {}
    for split, facts in wanted.items():
        file = out / facts["file"]
        if file.is_file():
            try:
                indices[split] = check_list(file.read_bytes(), str(file), facts, about["classes"])
                continue
            except UserError as error:
                if not overwrite:
                    raise UserError(f"{error}; remove it, or replace it with --overwrite") from None
        if given is not None and found[split] is None:
            continue
        out.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as partial:
            if given is not None:
                source = str(found[split])
                shutil.copyfile(source, partial)
            else:
                source = f"{(url or about['source']).rstrip('/')}/{facts['file']}"
                download(source, partial)
            index = check_list(partial.read_bytes(), source, facts, about["classes"])
            index.name = str(file)
            indices[split] = index
    return indices
