"""weights.download: from a local server through gdown, and from files; only the release is kept."""

import hashlib
import os
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

import models
from tests.helpers_networks import with_module
from weights import download

RELEASE = {"stage": "iii", "arch": "resnet8", "num_classes": 6}
HTML = b"\n<!DOCTYPE html><html><title>Google Drive - Quota exceeded</title></html>"


def checkpoint_of(model) -> dict:
    return {"epoch": 135, "state_dict": with_module(model.state_dict()), "optimizer": {}, "best_acc1": 0.554}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One file of each kind that a download may give."""
    folder = tmp_path_factory.mktemp("files")
    release = checkpoint_of(models.SDL("resnet8", 6))
    torch.save(release, folder / "good")
    torch.save(release, folder / "legacy", _use_new_zipfile_serialization=False)
    whole = (folder / "good").read_bytes()
    (folder / "cut").write_bytes(whole[: len(whole) // 2])
    (folder / "html").write_bytes(HTML)
    torch.save(checkpoint_of(models.SLG("resnet8", 6)), folder / "stage_ii")
    torch.save(checkpoint_of(models.SDL("resnet8", 7)), folder / "classes")
    torch.save({"weights": 1}, folder / "other")
    del release["state_dict"]["module.classifier_t.scales"]
    torch.save(release, folder / "key")
    return folder


BAD = {
    "cut": "it is damaged or not a checkpoint",
    "html": "an HTML page (about a quota or a login), not a checkpoint",
    "stage_ii": "it holds stage II, resnet8, 6 classes, not stage III, resnet8, 6 classes",
    "classes": "it holds stage III, resnet8, 7 classes, not",
    "other": "it has no state_dict of tensors",
    "key": "it does not fit stage III: classifier_t.scales is missing",
}


@pytest.fixture(autouse=True)
def small_release(monkeypatch):
    monkeypatch.setitem(download.EXPECTED, "stage_iii", RELEASE)


class Handler(SimpleHTTPRequestHandler):
    """Serves files; for those below /broken/ it announces more bytes than it sends."""

    def translate_path(self, path):
        return super().translate_path(path.removeprefix("/broken"))

    def send_header(self, keyword, value):
        if keyword == "Content-Length" and self.path.startswith("/broken/"):
            value = str(2 * int(value))
        super().send_header(keyword, value)

    def log_message(self, *args):
        pass


@pytest.fixture
def drive(files, monkeypatch):
    """drive(path) makes gdown download the release from a path of a local server."""
    gdown = pytest.importorskip("gdown")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(files)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    original = gdown.download

    def serve(path):
        def from_server(id, output, **options):
            assert id == download.RELEASES["stage_iii"]["google_drive_id"]
            return original(f"http://127.0.0.1:{server.server_port}/{path}", output, use_cookies=False, **options)

        monkeypatch.setattr(gdown, "download", from_server)

    yield serve
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def run(capsys):
    """run(out, word, ...) -> (status, stdout, last line of stderr) of the command with --out."""

    def call(out, *words):
        status = download.main(["stage_iii", "--out", str(out), *map(str, words)])
        printed, said = capsys.readouterr()
        return status, printed, said.splitlines()[-1] if said else ""

    return call


def assert_accepted(outcome, source, out):
    status, printed, _ = outcome
    assert status == 0 and hashlib.sha256(source.read_bytes()).hexdigest() in printed
    assert f"python ssd_stage_iii.py --resume {out} --evaluate DIR" in printed
    assert out.read_bytes() == source.read_bytes()
    assert sorted(file.name for file in out.parent.iterdir()) == [out.name, f"{out.name}.sha256"]
    assert out.stat().st_mode & 0o777 == source.stat().st_mode & 0o777


def assert_refused(outcome, out, *words):
    """In one line, and neither out nor anything next to it exists."""
    status, printed, line = outcome
    assert (status, printed) == (2, "") and line.startswith("error: ") and "Traceback" not in line
    assert all(str(word) in line for word in words), line
    assert not out.parent.exists() or not any(out.parent.iterdir())


@pytest.mark.parametrize("kind", ["good", "legacy"])
def test_the_release_is_accepted_from_a_download_and_from_a_file(kind, drive, files, tmp_path, run):
    drive(kind)
    for folder, words in (("new", []), ("other", ["--from", files / kind])):
        out = tmp_path / folder / "release"
        assert_accepted(run(out, *words), files / kind, out)


@pytest.mark.parametrize("kind", BAD)
def test_any_other_file_is_refused(kind, files, tmp_path, run):
    out = tmp_path / "release"
    assert_refused(run(out, "--from", files / kind), out, f"error: {files / kind}: ", BAD[kind])


@pytest.mark.parametrize(
    ("path", "reason"),
    [("html", BAD["html"]), ("broken/good", "the download failed ("), ("absent", "the download failed (")],
)
def test_a_download_of_anything_else_is_refused(path, reason, drive, tmp_path, run):
    drive(path)
    out = tmp_path / "release"
    link = "https://drive.google.com/file/d/"
    assert_refused(run(out), out, "error: stage_iii: ", reason, link, "--from FILE", out)


def test_missing_gdown_is_named(monkeypatch, tmp_path, run):
    monkeypatch.setitem(sys.modules, "gdown", None)
    out = tmp_path / "release"
    assert_refused(run(out), out, "gdown is missing", "pip install gdown", "--from FILE")


def test_an_existing_file_is_verified_and_kept(files, tmp_path, run):
    out = tmp_path / "release"
    out.write_bytes((files / "good").read_bytes())
    for words in ([], ["--from", files / "good"], ["--from", out]):
        assert_accepted(run(out, *words), files / "good", out)  # nothing is downloaded
    assert "exists already" in run(out, "--from", files / "legacy")[2]
    out.write_bytes((files / "stage_ii").read_bytes())
    for words in ([], ["--from", files / "good"]):
        status, _, line = run(out, *words)
        assert status == 2 and f"error: {out}: exists already" in line
    assert out.read_bytes() == (files / "stage_ii").read_bytes()


def test_later_files_must_have_the_sha256_of_the_first_verified_one(drive, files, tmp_path, run):
    drive("legacy")  # the same release in another file
    out, record = tmp_path / "release", tmp_path / "release.sha256"
    assert run(out, "--from", files / "good")[0] == 0
    digest = {kind: hashlib.sha256((files / kind).read_bytes()).hexdigest() for kind in ("good", "legacy")}
    assert record.read_text() == f"{digest['good']}  release\n"

    def assert_differs(outcome):
        status, printed, line = outcome
        assert (status, printed) == (2, "") and digest["legacy"] in line and str(record) in line

    out.write_bytes((files / "legacy").read_bytes())
    assert_differs(run(out))  # changed on the disk
    out.unlink()
    for words in ([], ["--from", files / "legacy"]):
        assert_differs(run(out, *words))
    assert not out.exists() and digest["good"] in record.read_text()
    record.unlink()
    assert run(out)[0] == 0 and digest["legacy"] in record.read_text()


def test_paths_that_are_no_files_are_named(files, tmp_path, run):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_text("")
    for out, words, reason in (
        ("fifo", [], "fifo: exists already: it is not a regular file"),
        ("new", ["--from", tmp_path / "fifo"], f"--from {tmp_path / 'fifo'}: no such file"),
        ("new", ["--from", tmp_path / "nothing"], f"--from {tmp_path / 'nothing'}: no such file"),
        ("file/x", ["--from", files / "good"], tmp_path / "file"),  # whose folder cannot be made
    ):
        status, _, line = run(tmp_path / out, *words)
        assert status == 2 and str(reason) in line


def test_an_unknown_release_is_refused(capsys):
    assert download.main(["stage_iv"]) == 2
    assert "stage_iii" in capsys.readouterr().err


def test_the_expected_release_is_resnext50_with_1000_classes(monkeypatch):
    monkeypatch.undo()
    with torch.device("meta"):
        model = models.SDL("resnext50_32x4d", 1000)
    assert models.infer_stage_and_arch(model.state_dict()) == download.EXPECTED["stage_iii"]
