"""The released checkpoint, verified before it gets its name.

    python -m weights.download stage_iii                 from Google Drive; needs gdown: python -m pip install gdown
    python -m weights.download stage_iii --from FILE     a file that is on disk, fetched in a browser for example

stage_iii is the last checkpoint of stage III: ResNeXt-50 32x4d on ImageNet-LT. It goes to
weights/stage_iii_released/, beside the folder of a run of one's own, and no file is ever replaced.
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
from models.load import read_checkpoint, state_dict_of
from utils.checkpoint import LAST
from utils.command_line import ArgumentParser, run_command
from utils.errors import UserError, one_line
from utils.files import apply_umask, replace

PROJECT = Path(__file__).resolve().parent.parent
RELEASES = json.loads((PROJECT / "data" / "manifest.json").read_text())["checkpoints"]
EXPECTED = {"stage_iii": {"stage": "iii", "arch": "resnext50_32x4d", "num_classes": 1000}}


def by_hand(name: str, out: Path) -> str:
    """How to get a release without the downloader."""
    link = f"https://drive.google.com/file/d/{RELEASES[name]['google_drive_id']}/view"
    return f"fetch {link} in a browser and run: python -m weights.download {name} --from FILE, which puts it at {out}"


def fetch(name: str, file: Path):
    """Downloads a release into file; what is left of a failure is in file's folder. Raises ValueError in one line."""
    if importlib.util.find_spec("gdown") is None:
        raise ValueError("gdown is missing, which downloads from Google Drive: python -m pip install gdown")
    try:
        download_file_from_google_drive(RELEASES[name]["google_drive_id"], file.parent, file.name)
    except Exception as error:  # gdown has exceptions of its own, and so has requests beneath it
        raise ValueError(f"the download failed ({one_line(error)})") from None


def verify(name: str, file: Path) -> str:
    """The SHA-256 of a file that holds the release. Raises ValueError, in one line, if it holds anything else."""
    with open(file, "rb") as opened:
        if opened.read(1024).lstrip()[:1] == b"<":
            raise ValueError("an HTML page (of a quota or a login), not a checkpoint")
    try:
        state_dict = state_dict_of(file, read_checkpoint(file))
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
    return digest.hexdigest()


def describe(found: dict | None) -> str:
    """What models.infer_stage_and_arch found, in words."""
    if found is None:
        return "names of no stage"
    return f"stage {found['stage'].upper()}, {found['arch'] or 'an unknown backbone'}, {found['num_classes']} classes"


def obtain(name: str, source: Path | None, out: Path) -> str:
    """Brings a release to out, from source or else from Google Drive; returns its SHA-256.

    A file that is there already is verified and kept. Raises UserError if the release cannot be obtained, or if out is
    another file; out then stays as it was.
    """
    if source is not None and not source.is_file():
        raise UserError(f"--from {source}: no such file")
    if out.exists():
        if source is not None and not filecmp.cmp(source, out, shallow=False):
            raise UserError(f"{out}: is there already, and is not {source}; move it away, or choose another --out")
        try:
            return verify(name, out)
        except ValueError as error:
            raise UserError(f"{out}: is there already: {error}; move it away, or choose another --out") from None
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".download.") as folder:
        partial = Path(folder) / out.name
        try:
            if source is None:
                fetch(name, partial)
            else:
                shutil.copyfile(source, partial)
            digest = verify(name, partial)
        except ValueError as error:
            raise UserError(f"{source or name}: {error}; {by_hand(name, out)}") from None
        apply_umask(partial)
        replace(partial, out)
    return digest


def near(path: Path) -> Path:
    """The path relative to the working folder if it lies in it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(__doc__, prog="python -m weights.download")
    parser.add_argument("name", choices=sorted(EXPECTED), help="which checkpoint")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="a file on disk instead of a download")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"(default: weights/NAME_released/{LAST})")
    return parser


def download(args):
    """Obtains the release; prints its SHA-256, the command that evaluates it, and the published accuracies."""
    out = near(args.out or PROJECT / "weights" / f"{args.name}_released" / LAST)
    digest = obtain(args.name, args.source, out)
    published = RELEASES[args.name]["published_test_accuracy"]
    print(f"{out}: verified, {describe(EXPECTED[args.name])}, SHA-256 {digest}")
    print("evaluate it on the test list of ImageNet-LT, whose images are in DIR:")
    print(f"  python ssd_stage_iii.py --resume {shlex.quote(str(out))} --evaluate DIR")
    for classifier in ("hard", "soft"):
        groups = zip(published["groups"], published[classifier], strict=True)
        print(f"published, {classifier} classifier, in %:", ", ".join(f"{group} {figure}" for group, figure in groups))


def main(argv=None) -> int:
    """Returns the exit status: 0, 2 after a mistake that one line on stderr names, 130 after Ctrl-C."""
    return run_command(download, build_parser(), argv, interrupted="stopped; nothing was kept")


if __name__ == "__main__":
    sys.exit(main())
