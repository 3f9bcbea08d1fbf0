"""Downloads the released checkpoint, and verifies it before it is put in place.

    python -m weights.download stage_iii                 from Google Drive; needs gdown: python -m pip install gdown
    python -m weights.download stage_iii --from FILE     a file on disk, for example one downloaded in a browser

stage_iii is the last checkpoint of stage III: ResNeXt-50 32x4d on ImageNet-LT. It goes to
weights/stage_iii_released/, next to the folder of your own run; existing files are never replaced. The SHA-256 of the
first file that passes is kept beside it, in last_checkpoint.pth.tar.sha256, and later files are compared with it.
"""

import filecmp
import hashlib
import importlib.util
import json
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

from torchvision.datasets.utils import download_file_from_google_drive

import models
from models.loading import read_checkpoint
from models.state_dicts import find_state_dict
from utils.checkpoint import LAST
from utils.command_line import ArgumentParser, run_command
from utils.errors import UserError, one_line
from utils.files import atomic_write

PROJECT = Path(__file__).resolve().parent.parent
RELEASES = json.loads((PROJECT / "data" / "manifest.json").read_text())["checkpoints"]
EXPECTED = {"stage_iii": {"stage": "iii", "arch": "resnext50_32x4d", "num_classes": 1000}}


def fetch(name: str, folder: str) -> Path:
    """Downloads a release into an empty folder, and returns the file. Raises ValueError in one line."""
    if importlib.util.find_spec("gdown") is None:
        raise ValueError("gdown is missing, which downloads from Google Drive: python -m pip install gdown")
    try:
        download_file_from_google_drive(RELEASES[name]["google_drive_id"], folder, name)
    except Exception as error:  # gdown has its own exceptions, and so has requests, which it uses
        raise ValueError(f"the download failed ({one_line(error)})") from None
    return Path(folder, name)


def verify(name: str, file: Path, record: Path) -> str:
    """The SHA-256 of a file that contains the release.

    record: has the SHA-256 of the first file that was verified, if there was one. Raises ValueError, in one line, if
    the file contains anything else than the release, or has another SHA-256.
    """
    with open(file, "rb") as opened:
        if opened.read(1024).lstrip()[:1] == b"<":
            raise ValueError("an HTML page (about a quota or a login), not a checkpoint")
    try:
        state_dict = find_state_dict(file, read_checkpoint(file))
    except ValueError as error:
        raise ValueError(str(error).removeprefix(f"{file}: ")) from None
    found = models.infer_stage_and_arch(state_dict)
    if found != EXPECTED[name]:
        raise ValueError(f"not the release: it holds {describe(found)}, not {describe(EXPECTED[name])}")
    models.from_state_dict(state_dict)
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(2**20):
            digest.update(block)
    found = digest.hexdigest()
    if record.exists() and record.read_text(errors="replace").split()[:1] != [found]:
        raise ValueError(
            f"its SHA-256, {found}, is not that of the first verified file, in {record}; remove this record if you "
            "trust the new file"
        )
    return found


def locate_record(out: Path) -> Path:
    """The file beside out that keeps the SHA-256 of the first verified file, as sha256sum --check reads it."""
    return out.with_name(f"{out.name}.sha256")


def describe(found: dict | None) -> str:
    """What models.infer_stage_and_arch found, in words."""
    if found is None:
        return "names that belong to no stage"
    number = models.STAGES[found["stage"]].number
    arch = found["arch"] or "an unknown backbone"
    return f"stage {number}, {arch}, {found['num_classes']} classes"


def obtain(name: str, source: Path | None, out: Path) -> str:
    """Puts a release at out, which must not exist, from source or else from Google Drive; returns its SHA-256.

    Raises UserError, and leaves no file, if the release cannot be obtained.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as file, tempfile.TemporaryDirectory(dir=out.parent, prefix=".download.") as folder:
        try:
            with open(source or fetch(name, folder), "rb") as release:
                shutil.copyfileobj(release, file)
            file.flush()
            return verify(name, Path(file.name), locate_record(out))
        except ValueError as error:
            link = f"https://drive.google.com/file/d/{RELEASES[name]['google_drive_id']}/view"
            command = shlex.join(["python", "-m", "weights.download", name, "--out", str(out), "--from", "FILE"])
            raise UserError(f"{source or name}: {error}; download {link} in a browser and run: {command}") from None


def verify_existing(name: str, source: Path | None, out: Path) -> str:
    """The SHA-256 of an existing file. Raises UserError if it is not the release, or not the same as source."""
    try:
        if not out.is_file():
            raise ValueError("it is not a regular file")
        if source is not None and not filecmp.cmp(source, out, shallow=False):
            raise ValueError(f"it differs from {source}")
        return verify(name, out, locate_record(out))
    except ValueError as error:
        raise UserError(f"{out}: exists already: {error}; move it away, or choose another --out") from None


def download(args):
    """Gets and verifies the release, and prints the command that evaluates it with the published accuracies."""
    out = args.out or PROJECT / "weights" / f"{args.name}_released" / LAST
    if out.is_relative_to(Path.cwd()):
        out = out.relative_to(Path.cwd())
    if args.source is not None and not args.source.is_file():
        raise UserError(f"--from {args.source}: no such file; correct the path")
    digest = (verify_existing if out.exists() else obtain)(args.name, args.source, out)
    record = locate_record(out)
    if not record.exists():
        with atomic_write(record) as file:
            file.write(f"{digest}  {out.name}\n".encode())
    print(f"{out}: verified, {describe(EXPECTED[args.name])}, SHA-256 {digest}")
    print("evaluate it on the test list of ImageNet-LT; DIR is the folder of the images:")
    print(f"  python ssd_stage_iii.py --resume {shlex.quote(str(out))} --evaluate DIR")
    published = RELEASES[args.name]["published_test_accuracy"]
    for classifier in ("hard", "soft"):
        groups = zip(published["groups"], published[classifier], strict=True)
        print(f"published, {classifier} classifier, in %:", ", ".join(f"{group} {figure}" for group, figure in groups))


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__, prog="python -m weights.download")
    parser.add_argument("name", choices=sorted(EXPECTED), help="which checkpoint")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="a file on disk instead of a download")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"(default: weights/NAME_released/{LAST})")
    return parser


def main(argv=None) -> int:
    """Returns the exit status: 0, 2 after a mistake that one line on stderr names, 130 after Ctrl-C."""
    return run_command(download, build_parser(), argv, interrupted="stopped; nothing was kept")


if __name__ == "__main__":
    sys.exit(main())
