"""The published lists of data/manifest.json: downloaded or taken from disk, verified, and only then put in place."""

import hashlib
import json
import shutil
import socket
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlretrieve

from tqdm import tqdm

from utils.errors import UserError, one_line
from utils.files import atomic_write

from ..lists import ImageList

MANIFEST = Path(__file__).resolve().parents[2] / "data" / "manifest.json"
TIMEOUT = 60  # seconds without a byte


def manifest(dataset: str) -> dict:
    """The facts of data/manifest.json about imagenet-lt, places-lt or inaturalist18."""
    return json.loads(MANIFEST.read_text())["lists"][dataset]


def git_blob_id(content: bytes) -> str:
    """The id under which git stores the content: it pins a list exactly."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def check_list(content: bytes, source: str, facts: dict, num_classes: int) -> ImageList:
    """The list's images. Raises UserError, naming source and what is wrong, if it is not the one that facts describe.

    facts: a split of the manifest.
    """
    if content.lstrip()[:1] == b"<":
        raise UserError(f"{source}: an HTML page, not a list (an error or login page?); fetch it by hand, use --from")
    lines = content.count(b"\n") + (not content.endswith(b"\n"))
    if lines != facts["lines"]:
        raise UserError(f"{source}: {lines} lines, {facts['file']} has {facts['lines']}: cut short, or another list")
    images = ImageList.from_bytes(source, content)
    if images.num_classes != num_classes:
        raise UserError(f"{source}: {images.num_classes} classes, {facts['file']} has {num_classes}: another list")
    counts = images.counts(num_classes)
    for bound, count in (("max_per_class", int(counts.max())), ("min_per_class", int(counts.min()))):
        if facts.get(bound, count) != count:
            raise UserError(f"{source}: {bound} is {count}, in {facts['file']} it is {facts[bound]}: another list")
    if git_blob_id(content) not in facts["git_blobs"]:
        raise UserError(
            f"{source}: git blob id {git_blob_id(content)}, that of {facts['file']} is {facts['git_blobs'][0]}: "
            "an altered list, or one with other line endings"
        )
    return images


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


def download(url: str, file: str):
    """Downloads url into file with a progress bar on a terminal. Raises UserError."""
    with (
        download_errors(url, "or fetch the list by hand and give it with --from"),
        tqdm(desc=url.rsplit("/", 1)[-1], unit="B", unit_scale=True, disable=None) as bar,
    ):

        def report(blocks, block_size, total):
            bar.total = max(total, 0) or None
            bar.update(blocks * block_size - bar.n)

        urlretrieve(url, file, report)


def find_on_disk(given: Path, facts: dict, name: str) -> Path | None:
    """The list in given: the file itself if its name or id matches, else a file in a usual place below it."""
    if given.is_file():
        known = given.name == facts["file"] or git_blob_id(given.read_bytes()) in facts["git_blobs"]
        return given if known else None
    folders = (given, given / "data", given / name, given / "data" / name)
    return next((folder / facts["file"] for folder in folders if (folder / facts["file"]).is_file()), None)


def obtain_lists(dataset: str, out: Path, url=None, given: Path | None = None, overwrite=False) -> dict[str, ImageList]:
    """Brings the published lists of a data set into out; returns {split: list} of those that are there now.

    They are taken from given (a folder, or a file: that list alone), else downloaded from url, else from the published
    source. Lists that are there already are verified and kept. Raises UserError if a list cannot be obtained or is not
    the published one, and if another file has its name and overwrite is not set.
    """
    about = manifest(dataset)
    wanted = {split: facts for split, facts in about["splits"].items() if "lines" in facts}
    if given is not None:
        if not given.exists():
            raise UserError(f"--from {given}: no such file or folder")
        on_disk = {split: find_on_disk(given, facts, about["name"]) for split, facts in wanted.items()}
        if not any(on_disk.values()):
            names = ", ".join(facts["file"] for facts in wanted.values())
            raise UserError(f"--from {given}: holds none of {names}")
    lists = {}
    for split, facts in wanted.items():
        file = out / facts["file"]
        if file.is_file():
            try:
                lists[split] = check_list(file.read_bytes(), str(file), facts, about["classes"])
                continue
            except UserError as error:
                if not overwrite:
                    raise UserError(f"{error}; remove it, or replace it with --overwrite") from None
        if given is not None and on_disk[split] is None:
            continue
        out.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as target:
            if given is not None:
                source = str(on_disk[split])
                shutil.copyfile(source, target.name)
            else:
                source = f"{(url or about['source']).rstrip('/')}/{facts['file']}"
                download(source, target.name)
            images = check_list(Path(target.name).read_bytes(), source, facts, about["classes"])
            images.name = str(file)
            lists[split] = images
    return lists
