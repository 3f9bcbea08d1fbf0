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
from weights import download

RELEASE = {"stage": "iii", "arch": "resnet8", "num_classes": 6}
HTML = b"\n<!DOCTYPE html><html><title>Google Drive - Quota exceeded</title></html>"


def checkpoint_of(model) -> dict:
    state_dict = {f"module.{name}": value for name, value in model.state_dict().items()}
    return {"epoch": 135, "state_dict": state_dict, "optimizer": {}, "best_acc1": 0.554}


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
    (folder / "empty").write_bytes(b"")
    torch.save(checkpoint_of(models.SLG("resnet8", 6)), folder / "stage_ii")
    torch.save(checkpoint_of(models.SDL("resnet8", 7)), folder / "classes")
    torch.save(checkpoint_of(models.SDL("resnet20", 6)), folder / "arch")
    torch.save({"weights": 1}, folder / "other")
    del release["state_dict"]["module.classifier_t.scales"]
    torch.save(release, folder / "key")
    return folder


BAD = {
    "cut": "it is damaged or not a checkpoint",
    "html": "an HTML page (about a quota or a login), not a checkpoint",
    "empty": "it is damaged or not a checkpoint",
    "stage_ii": "it holds stage II, resnet8, 6 classes, not stage III, resnet8, 6 classes",
    "classes": "it holds stage III, resnet8, 7 classes, not",
    "arch": "it holds stage III, resnet20, 6 classes, not",
    "other": "it has no state_dict of tensors",
    "key": "it does not fit stage III at classifier_t.scales",
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
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
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


def refused(capsys, out, *argv) -> str:
    """Runs a command that must fail; returns its last line. Neither out nor anything next to it may exist."""
    assert download.main(["stage_iii", "--out", str(out), *map(str, argv)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and "Traceback" not in line
    assert not out.parent.exists() or not any(out.parent.iterdir())
    return line


def check_accepted(capsys, source, out, *argv):
    assert download.main(["stage_iii", "--out", str(out), *map(str, argv)]) == 0
    said = capsys.readouterr().out
    assert hashlib.sha256(source.read_bytes()).hexdigest() in said
    assert f"python ssd_stage_iii.py --resume {out} --evaluate DIR" in said
    assert out.read_bytes() == source.read_bytes()
    assert [file.name for file in out.parent.iterdir()] == [out.name]
    assert out.stat().st_mode & 0o777 == source.stat().st_mode & 0o777


@pytest.mark.parametrize("kind", ["good", "legacy"])
def test_the_release_downloads(kind, drive, files, tmp_path, capsys):
    drive(kind)
    check_accepted(capsys, files / kind, tmp_path / "new" / "release")


@pytest.mark.parametrize("kind", BAD)
def test_anything_else_is_refused_after_the_download(kind, drive, tmp_path, capsys):
    drive(kind)
    line = refused(capsys, tmp_path / "release")
    assert line.startswith("error: stage_iii: ") and BAD[kind] in line
    assert "https://drive.google.com/file/d/" in line and "--from FILE" in line and str(tmp_path / "release") in line


@pytest.mark.parametrize("path", ["broken/good", "absent"])
def test_a_broken_download_is_refused(path, drive, tmp_path, capsys):
    drive(path)
    line = refused(capsys, tmp_path / "release")
    assert "the download failed (" in line and "--from FILE" in line


def test_missing_gdown_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "gdown", None)
    line = refused(capsys, tmp_path / "release")
    assert "gdown is missing" in line and "pip install gdown" in line and "--from FILE" in line


@pytest.mark.parametrize("kind", ["good", "legacy"])
def test_from_accepts_the_release(kind, files, tmp_path, capsys):
    check_accepted(capsys, files / kind, tmp_path / "release", "--from", files / kind)


@pytest.mark.parametrize("kind", BAD)
def test_from_refuses_anything_else(kind, files, tmp_path, capsys):
    line = refused(capsys, tmp_path / "release", "--from", files / kind)
    assert line.startswith(f"error: {files / kind}: ") and BAD[kind] in line


def test_from_names_a_missing_file(tmp_path, capsys):
    line = refused(capsys, tmp_path / "release", "--from", tmp_path / "nothing")
    assert f"--from {tmp_path / 'nothing'}: no such file" in line


def test_an_existing_file_is_verified_and_kept(files, tmp_path, capsys):
    out = tmp_path / "release"
    argv = ["stage_iii", "--out", str(out)]
    out.write_bytes((files / "good").read_bytes())
    check_accepted(capsys, files / "good", out)  # nothing is downloaded
    check_accepted(capsys, files / "good", out, "--from", files / "good")
    check_accepted(capsys, files / "good", out, "--from", out)
    assert download.main([*argv, "--from", str(files / "legacy")]) == 2
    assert "exists already" in capsys.readouterr().err
    out.write_bytes((files / "stage_ii").read_bytes())
    for more in ([], ["--from", str(files / "good")]):
        assert download.main(argv + more) == 2
        assert f"error: {out}: exists already" in capsys.readouterr().err
    assert out.read_bytes() == (files / "stage_ii").read_bytes()


def test_only_regular_files_are_opened(files, tmp_path, capsys):
    os.mkfifo(tmp_path / "fifo")
    assert download.main(["stage_iii", "--out", str(tmp_path / "fifo")]) == 2
    assert "fifo: exists already, and is not a regular file" in capsys.readouterr().err
    assert download.main(["stage_iii", "--out", str(tmp_path / "new"), "--from", str(tmp_path / "fifo")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_named(files, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert download.main(["stage_iii", "--out", str(tmp_path / "file" / "x"), "--from", str(files / "good")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_an_unknown_release_is_refused(capsys):
    assert download.main(["stage_iv"]) == 2
    assert "stage_iii" in capsys.readouterr().err


def test_the_expected_release_is_resnext50_with_1000_classes(monkeypatch):
    monkeypatch.undo()
    with torch.device("meta"):
        model = models.SDL("resnext50_32x4d", 1000)
    assert models.infer_stage_and_arch(model.state_dict()) == download.EXPECTED["stage_iii"]
