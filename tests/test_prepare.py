"""python -m datasets.prepare: every subcommand, on small trees and with a local HTTP server."""

import gzip
import hashlib
import json
import os
import pickle
import struct
import tarfile
import threading
import time
from contextlib import contextmanager
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from datasets.lists import ImageList
from datasets.prepare import long_tail, published
from datasets.prepare.cli import main
from datasets.prepare.folders import split_class
from datasets.prepare.long_tail import long_tail_counts, pick
from datasets.splits import find_splits
from utils.images import load_rgb

CLASSES = ("n01", "n02", "n03")
LISTS = {
    "train": [(f"train/{CLASSES[c]}/{CLASSES[c]}_{i}.JPEG", c) for c, n in enumerate((5, 3, 2)) for i in range(n)],
    "val": [(f"train/{name}/{name}_{90 + i}.JPEG", c) for c, name in enumerate(CLASSES) for i in range(2)],
    "test": [(f"val/{name}/ILSVRC2012_val_{c}{i}.JPEG", c) for c, name in enumerate(CLASSES) for i in range(3)],
}


def content(split):
    return "".join(f"{path} {label}\n" for path, label in LISTS[split]).encode()


def facts(split, file, **more):
    counts = np.bincount([label for _, label in LISTS[split]])
    return {
        "file": file,
        "lines": len(LISTS[split]),
        "max_per_class": int(counts.max()),
        "min_per_class": int(counts.min()),
        "git_blobs": [published.git_blob_id(content(split)), published.git_blob_id(content(split).removesuffix(b"\n"))],
        **more,
    }


@pytest.fixture(autouse=True)
def small_manifest(tmp_path_factory, monkeypatch):
    """A manifest of published lists with a few images each."""
    lists = {}
    for dataset, name in (
        ("imagenet-lt", "ImageNet_LT"),
        ("places-lt", "Places_LT"),
        ("inaturalist18", "iNaturalist18"),
    ):
        splits = {split: facts(split, f"{name}_{split}.txt") for split in LISTS}
        lists[dataset] = {"name": name, "source": "http://127.0.0.1:9/", "classes": 3, "splits": splits}
    lists["inaturalist18"]["splits"]["test"] = {"file": "iNaturalist18_val.txt"}
    file = tmp_path_factory.mktemp("manifest") / "manifest.json"
    file.write_text(json.dumps({"lists": lists}))
    monkeypatch.setattr(published, "MANIFEST", file)


@contextmanager
def server(mode="whole", broken="train"):
    """Serves the lists, the one of the split `broken` changed according to mode; yields address and requested paths."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            split = self.path.rsplit("_", 1)[-1].removesuffix(".txt")
            body, length = content(split), None
            if split == broken and mode == "truncated":
                body, length = body[:-30], len(body)
            elif split == broken and mode == "short":
                body = b"".join(body.splitlines(True)[:-2])
            elif split == broken and mode == "mid line":
                body = body[:-3]
            elif split == broken and mode == "wrong id":
                lines = body.splitlines(True)
                body = b"".join([lines[1], lines[0], *lines[2:]])
            elif split == broken and mode == "wrong counts":
                body = body.replace(b" 1\n", b" 0\n", 1)
            elif split == broken and mode == "wrong classes":
                body = body.replace(b" 2\n", b" 3\n", 1)
            elif split == broken and mode == "html":
                body = b"<!DOCTYPE html><html><body>quota exceeded</body></html>\n" * 10
            elif split == broken and mode == "binary":
                body = b"\x00\xff\n" * body.count(b"\n")
            elif split == broken and mode == "gone":
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(length or len(body)))
            self.end_headers()
            if mode == "slow":
                for start in range(0, len(body), 100):
                    time.sleep(0.02)
                    self.wfile.write(body[start : start + 100])
                return
            if split == broken and mode == "stalls":
                self.wfile.write(body[:50])
                self.wfile.flush()
                self.connection.settimeout(None)
                self.rfile.read(1)  # until the client gives up
                return
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}/lists/", asked
        http.shutdown()


def fails(capsys, *argv):
    """Runs a command that must fail with status 2; returns its one line on stderr."""
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 2
    error = capsys.readouterr().err
    assert error.endswith("\n") and error.count("\n") == 1, error
    return error


def succeeds(capsys, *argv):
    """Runs a command that must succeed; returns its output."""
    capsys.readouterr()
    status = main([str(word) for word in argv])
    output = capsys.readouterr()
    assert status == 0 and output.err == "", output.err
    return output.out


def everything(folder):
    """{relative path: content or link target} of everything in a folder."""
    found = {}
    for file in sorted(Path(folder).rglob("*")):
        if file.is_symlink():
            found[file.relative_to(folder).as_posix()] = os.readlink(file)
        elif file.is_file():
            found[file.relative_to(folder).as_posix()] = file.read_bytes()
    return found


def stamps(folder):
    return {file: file.lstat().st_mtime_ns for file in Path(folder).rglob("*")}


WHOLE = {f"ImageNet_LT_{split}.txt": content(split) for split in LISTS}


# Published lists


def test_git_blob_id_equals_git_hash_object():
    assert published.git_blob_id(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_the_manifest_of_data_is_consistent(monkeypatch):
    monkeypatch.undo()
    for dataset, classes in (("imagenet-lt", 1000), ("places-lt", 365), ("inaturalist18", 8142)):
        about = published.manifest(dataset)
        assert about["classes"] == classes and about["source"].startswith("https://")
        for split in ("train", "val", "test"):
            entry = about["splits"][split]
            assert entry["file"].endswith(".txt")
            if "max_per_class" in entry and entry["max_per_class"] == entry["min_per_class"]:
                assert entry["lines"] == classes * entry["max_per_class"]
            assert all(len(bytes.fromhex(blob)) == 20 for blob in entry.get("git_blobs", []))
    assert len(published.manifest("imagenet-lt")["splits"]["val"]["git_blobs"]) == 2


@pytest.mark.parametrize("mode", ["whole", "slow"])
def test_lists_are_downloaded_once(tmp_path, capsys, mode):
    with server(mode) as (url, asked):
        said = succeeds(capsys, "imagenet-lt", "--out", tmp_path / "lists", "--url", url)
        assert everything(tmp_path / "lists") == WHOLE
        assert said.count("verified") == 3 and "10 images, 5 to 2 in each of 3 classes" in said
        before, number = stamps(tmp_path), len(asked)
        succeeds(capsys, "imagenet-lt", "--out", tmp_path / "lists", "--url", url.rstrip("/"))
        assert len(asked) == number and stamps(tmp_path) == before


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("truncated", "retrieval incomplete"),
        ("short", "8 lines, ImageNet_LT_train.txt has 10"),
        ("mid line", "no label|git blob id"),
        ("wrong id", "git blob id"),
        ("wrong counts", "per_class"),
        ("wrong classes", "4 classes"),
        ("html", "HTML page"),
        ("binary", "line 1"),
        ("gone", "404"),
        ("stalls", "timed out"),
    ],
)
def test_what_is_not_the_published_list_is_not_kept(tmp_path, capsys, monkeypatch, mode, reason):
    if mode == "stalls":  # the others may take their time
        monkeypatch.setattr(published, "TIMEOUT", 0.3)
    with server(mode) as (url, _):
        error = fails(capsys, "imagenet-lt", "--out", tmp_path, "--url", url)
    assert any(word in error for word in reason.split("|")), error
    assert "ImageNet_LT_train.txt" in error and "partial" not in error
    assert everything(tmp_path) == {}


def test_after_a_failure_only_the_missing_lists_are_downloaded(tmp_path, capsys):
    with server("html", broken="test") as (url, _):
        fails(capsys, "imagenet-lt", "--out", tmp_path, "--url", url)
        assert sorted(everything(tmp_path)) == ["ImageNet_LT_train.txt", "ImageNet_LT_val.txt"]
    with server() as (url, asked):
        succeeds(capsys, "imagenet-lt", "--out", tmp_path, "--url", url)
        assert {path.rsplit("_")[-1] for path in asked} == {"test.txt"}
    assert everything(tmp_path) == WHOLE


def test_a_server_that_cannot_be_reached_is_named(tmp_path, capsys):
    assert "http://127.0.0.1:9/" in fails(capsys, "imagenet-lt", "--out", tmp_path)
    assert "no-scheme" in fails(capsys, "imagenet-lt", "--out", tmp_path, "--url", "no-scheme")
    assert everything(tmp_path) == {}


def test_an_interrupted_download_leaves_nothing(tmp_path, capsys, monkeypatch):
    def interrupted(url, file, report):
        Path(file).write_bytes(b"half a li")
        raise KeyboardInterrupt

    monkeypatch.setattr(published, "urlretrieve", interrupted)
    assert main(["imagenet-lt", "--out", str(tmp_path)]) == 130
    assert everything(tmp_path) == {}


def test_only_overwrite_replaces_another_list(tmp_path, capsys):
    mine = tmp_path / "ImageNet_LT_train.txt"
    mine.write_text("mine.jpg 0\n")
    with server() as (url, asked):
        assert "--overwrite" in fails(capsys, "imagenet-lt", "--out", tmp_path, "--url", url)
        assert asked == [] and mine.read_text() == "mine.jpg 0\n"
    with server("html") as (url, _):
        fails(capsys, "imagenet-lt", "--out", tmp_path, "--url", url, "--overwrite")
        assert everything(tmp_path) == {mine.name: b"mine.jpg 0\n"}
    with server() as (url, _):
        succeeds(capsys, "imagenet-lt", "--out", tmp_path, "--url", url, "--overwrite")
        assert everything(tmp_path) == WHOLE


@pytest.mark.parametrize("inside", [".", "data", "data/ImageNet_LT", "ImageNet_LT"])
def test_from_finds_the_lists_in_a_folder(tmp_path, capsys, inside):
    clone = tmp_path / "clone" / inside
    clone.mkdir(parents=True)
    for name, text in WHOLE.items():
        (clone / name).write_bytes(text)
    succeeds(capsys, "imagenet-lt", "--out", tmp_path / "out", "--from", tmp_path / "clone")
    assert everything(tmp_path / "out") == WHOLE


def test_from_takes_a_single_file(tmp_path, capsys):
    out, given = tmp_path / "out", tmp_path / "renamed.txt"
    given.write_bytes(content("val").removesuffix(b"\n"))  # accepted with and without the last newline
    said = succeeds(capsys, "imagenet-lt", "--out", out, "--from", given)
    assert everything(out) == {"ImageNet_LT_val.txt": given.read_bytes()}
    assert "not there yet" in said and "ImageNet_LT_train.txt" in said

    altered = tmp_path / "ImageNet_LT_test.txt"
    altered.write_bytes(content("test").replace(b"\n", b"\r\n"))
    assert "line endings" in fails(capsys, "imagenet-lt", "--out", out, "--from", altered)
    given.write_text("something else 0\n")
    assert "holds none of" in fails(capsys, "imagenet-lt", "--out", out, "--from", given)
    assert "no such" in fails(capsys, "imagenet-lt", "--out", out, "--from", tmp_path / "none")
    os.mkfifo(tmp_path / "ImageNet_LT_train.txt")
    assert "holds none of" in fails(capsys, "imagenet-lt", "--out", out, "--from", tmp_path / "ImageNet_LT_train.txt")
    assert list(everything(out)) == ["ImageNet_LT_val.txt"]


# Image trees


@pytest.fixture
def lists(tmp_path):
    """A folder of verified lists of all three data sets."""
    folder = tmp_path / "lists"
    folder.mkdir()
    for name in ("ImageNet_LT", "Places_LT", "iNaturalist18"):
        for split in LISTS:
            if (name, split) != ("iNaturalist18", "test"):
                (folder / f"{name}_{split}.txt").write_bytes(content(split))
    return folder


@pytest.fixture
def root(tmp_path):
    """The images of all lists, in the layout of ILSVRC2012."""
    folder = tmp_path / "images"
    for entries in LISTS.values():
        for path, _ in entries:
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(path)
    return folder


def flatten(root):
    for file in list((root / "val").glob("*/*")):
        file.rename(root / "val" / file.name)
    for folder in (root / "val").iterdir():
        if folder.is_dir():
            folder.rmdir()


def test_all_images_of_a_complete_tree_are_found(lists, root, capsys):
    assert "all 25 listed images" in succeeds(capsys, "imagenet-lt", "--out", lists, "--root", root)


def test_missing_images_are_named_and_explained(lists, root, tmp_path, capsys):
    command = ("imagenet-lt", "--out", lists, "--root")
    (root / "train/n02/n02_1.JPEG").unlink()
    error = fails(capsys, *command, root)
    assert "1 of 10" in error and "train/n02/n02_1.JPEG" in error and "wrong release" in error
    (root / "train/n02/n02_1.png").touch()
    assert "another release or a converted copy" in fails(capsys, *command, root)
    for file in (root / "train/n02").iterdir():
        file.unlink()
    (root / "train/n02").rmdir()
    assert "incomplete copy" in fails(capsys, *command, root)
    (root / "train/n02.tar").touch()
    assert "not unpacked" in fails(capsys, *command, root)
    assert f"below {root}" in fails(capsys, *command, root / "train")
    assert f"below {root}" in fails(capsys, *command, tmp_path)
    (tmp_path / "nothing").mkdir()
    assert "wrong root" in fails(capsys, *command, tmp_path / "nothing")
    assert "no such folder" in fails(capsys, *command, tmp_path / "none")


def check_links(out, root, flat=False):
    """Checks that every image of every list is below out, as a link to the right file."""
    for split, entries in LISTS.items():
        for path, _ in entries:
            _, folder, name = path.split("/")
            link = out / split / folder / name
            assert link.is_symlink() and link.read_text() == path
    found = find_splits(out, {})
    assert {name: (len(split.images), split.missing) for name, split in found.items()} == {
        split: (len(entries), ()) for split, entries in LISTS.items()
    }


def test_links_are_made_once_and_missing_ones_added(lists, root, tmp_path, capsys):
    out = tmp_path / "out"
    command = ("imagenet-lt", "--out", lists, "--root", root, "--link", out)
    assert "25 links made, 0 there already" in succeeds(capsys, *command)
    check_links(out, root)
    before = stamps(out)
    assert "0 links made, 25 there already" in succeeds(capsys, *command)
    assert stamps(out) == before

    for link in list(out.glob("*/n02/*")):
        link.unlink()
    (out / "test.txt").unlink()
    assert "8 links made, 17 there already" in succeeds(capsys, *command)
    check_links(out, root)

    moved = root.rename(tmp_path / "moved")
    assert "25 links made" in succeeds(capsys, *command[:4], moved, *command[5:])
    check_links(out, moved)


def test_a_sorted_tree_can_be_linked_again(lists, root, tmp_path, capsys):
    succeeds(capsys, "imagenet-lt", "--out", lists, "--root", root, "--link", tmp_path / "one")
    succeeds(capsys, "imagenet-lt", "--out", lists, "--root", tmp_path / "one", "--link", tmp_path / "two")
    check_links(tmp_path / "two", root)


def test_link_sorts_a_flat_validation_folder(lists, root, tmp_path, capsys):
    flatten(root)
    error = fails(capsys, "imagenet-lt", "--out", lists, "--root", root)
    assert "unsorted validation folder" in error and "--link" in error
    succeeds(capsys, "imagenet-lt", "--out", lists, "--root", root, "--link", tmp_path / "out")
    check_links(tmp_path / "out", root)
    (root / "val/ILSVRC2012_val_11.JPEG").unlink()
    error = fails(capsys, "imagenet-lt", "--out", lists, "--root", root, "--link", tmp_path / "out")
    assert "1 of 9" in error and "val/ILSVRC2012_val_11.JPEG" in error


def test_links_never_replace_images(lists, root, tmp_path, capsys):
    command = ("imagenet-lt", "--out", lists, "--root", root, "--link")
    before = everything(root)
    assert "itself" in fails(capsys, *command, root)
    assert "itself" in fails(capsys, *command, root / ".." / root.name)
    file = tmp_path / "out/train/n01/n01_3.JPEG"
    file.parent.mkdir(parents=True)
    file.write_text("an image of the user's")
    assert str(file) in fails(capsys, *command, tmp_path / "out")
    assert file.read_text() == "an image of the user's" and everything(root) == before
    assert "--root" in fails(capsys, "imagenet-lt", "--out", lists, "--link", tmp_path / "out")


def test_two_images_with_the_same_link_are_refused(lists, root, tmp_path, capsys, monkeypatch):
    nested = [("a/outdoor/1.jpg", 0), ("b/outdoor/1.jpg", 1), ("c/2.jpg", 2)]
    monkeypatch.setitem(LISTS, "train", nested)
    for path, _ in nested:
        (root / path).parent.mkdir(parents=True)
        (root / path).touch()
    about = json.loads(published.MANIFEST.read_text())
    about["lists"]["inaturalist18"]["splits"]["train"] = facts("train", "iNaturalist18_train.txt")
    published.MANIFEST.write_text(json.dumps(about))
    (lists / "iNaturalist18_train.txt").write_bytes(content("train"))
    command = ("inaturalist18", "--out", lists, "--root", root)
    succeeds(capsys, *command)
    assert "outdoor/1.jpg" in fails(capsys, *command, "--link", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_inaturalist_tests_on_its_validation_list(lists, root, tmp_path, capsys):
    said = succeeds(capsys, "inaturalist18", "--out", lists, "--root", root)
    assert "its val list is used for test, and for validation" in said
    assert "all 22 listed images" in said
    assert said.count("iNaturalist18_val.txt") == 3  # verified once, and named for both splits
    succeeds(capsys, "inaturalist18", "--out", lists, "--root", root, "--link", tmp_path / "out")
    found = find_splits(tmp_path / "out", {})
    assert [len(found[split].images) for split in LISTS] == [10, 6, 6]
    assert not any(split.missing for split in found.values())


def test_places_lt_keeps_its_nested_folders(lists, root, tmp_path, capsys):
    said = succeeds(capsys, "places-lt", "--out", lists, "--root", root)
    assert "all 25" in said and f"--test-list {lists / 'Places_LT_test.txt'}" in said
    flatten(root)
    out = tmp_path / "out"
    assert "unsorted" in fails(capsys, "places-lt", "--out", lists, "--root", root)
    succeeds(capsys, "places-lt", "--out", lists, "--root", root, "--link", out)
    for entries in LISTS.values():
        assert all((out / path).is_symlink() and (out / path).read_text() == path for path, _ in entries)
    assert not any(split.missing for split in find_splits(out, {}).values())


def test_checking_a_tree_needs_all_lists(lists, root, capsys):
    (lists / "ImageNet_LT_val.txt").unlink()
    given = lists / "ImageNet_LT_train.txt"
    error = fails(capsys, "imagenet-lt", "--out", lists, "--root", root, "--from", given)
    assert "ImageNet_LT_val.txt" in error


# Long-tailed versions of small data sets


def test_long_tail_counts_are_the_published_ones():
    assert sum(long_tail_counts(500, 100, 100)) == 10847
    assert sum(long_tail_counts(500, 50, 100)) == 12608
    assert sum(long_tail_counts(500, 10, 100)) == 19573
    assert [sum(long_tail_counts(5000, imbalance, 10)) for imbalance in (100, 50, 10)] == [12406, 13996, 20431]
    assert long_tail_counts(500, "100", 10) == [500, 299, 179, 107, 64, 38, 23, 13, 8, 5]


def test_exact_powers_are_not_rounded_down():
    assert long_tail_counts(1000, 1000, 4) == [1000, 100, 10, 1]
    assert long_tail_counts(3**9, 3**9, 10) == [3**k for k in range(9, -1, -1)]
    assert long_tail_counts(7, 1, 3) == [7, 7, 7]


@given(st.integers(1, 10**6), st.fractions(1, 1000, max_denominator=10), st.integers(2, 40))
@settings(deadline=None)
def test_long_tail_counts_are_rounded_down_exactly(largest, imbalance, classes):
    last = classes - 1
    for c, count in enumerate(long_tail_counts(largest, str(imbalance), classes)):
        power = Fraction(largest) ** last / imbalance**c
        assert count**last <= power < (count + 1) ** last


def test_seed_0_picks_the_images_of_the_reference_cifar_lt():
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(10), 50))
    counts = long_tail_counts(50, 10, 10)
    np.random.seed(0)
    usual = []
    for label in range(10):
        numbers = np.where(labels == label)[0]
        np.random.shuffle(numbers)
        usual.extend(numbers[: counts[label]])
    assert sorted(pick(labels, counts, 0, seed=0)[0]) == sorted(usual)


def write_idx(file, array, packed):
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}i", *array.shape)
    open_file = gzip.open if packed else open
    with open_file(f"{file}.gz" if packed else file, "wb") as target:
        target.write(header + array.astype(np.uint8).tobytes())


@pytest.fixture(params=[True, False], ids=["gz", "raw"])
def fashion(tmp_path, request):
    """A Fashion-MNIST of 60 training and 2 test images per class; the first two pixels of an image are its number."""
    folder = tmp_path / "idx"
    folder.mkdir()
    for name, each in (("train", 60), ("t10k", 2)):
        labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), each))
        images = np.zeros((len(labels), 28, 28), np.uint8)
        images[:, 0, 0], images[:, 0, 1] = np.divmod(np.arange(len(labels)), 256)
        write_idx(folder / f"{name}-images-idx3-ubyte", images, request.param)
        write_idx(folder / f"{name}-labels-idx1-ubyte", labels, request.param)
    return folder


def read_lists(folder):
    found = {}
    for split in ("train", "val", "test"):
        images = ImageList.from_file(folder / f"{split}.txt")
        found[split] = [(images.path(i), int(images.labels[i])) for i in range(len(images))]
    return found


def test_fashion_mnist_lt_is_written_once(tmp_path, fashion, capsys):
    out = tmp_path / "out"
    command = ("fashion-mnist-lt", "--out", out, "--source", fashion, "--max-per-class", 10, "--imbalance", 10)
    said = succeeds(capsys, *command)
    lists = read_lists(out)
    counts = np.bincount([label for _, label in lists["train"]])
    assert counts.tolist() == long_tail_counts(10, 10, 10) and counts[0] == 10 and counts[9] == 1
    assert np.bincount([label for _, label in lists["val"]]).tolist() == [50] * 10
    assert np.bincount([label for _, label in lists["test"]]).tolist() == [2] * 10
    assert f"{counts.sum()} training (10 to 1 per class), 500 validation, 20 test images" in said

    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 60))
    seen = set()
    for split in ("train", "val"):
        for path, label in lists[split]:
            pixels = np.asarray(load_rgb(out / path))
            number = int(pixels[0, 0, 0]) * 256 + int(pixels[0, 1, 0])
            assert pixels.shape == (28, 28, 3) and labels[number] == label and number not in seen
            seen.add(number)
    assert (out / "classes.txt").read_text().splitlines()[9] == "Ankle boot"

    before = stamps(out)
    succeeds(capsys, *command)
    assert stamps(out) == before
    assert not [file for file in everything(out) if "partial" in file]


def test_fashion_mnist_lt_is_completed_or_overwritten(tmp_path, fashion, capsys):
    out = tmp_path / "out"
    command = ("fashion-mnist-lt", "--out", out, "--source", fashion, "--max-per-class", 10, "--imbalance", 10)
    succeeds(capsys, *command)
    first = everything(out)

    for name in list(first)[::3]:  # as if it had been interrupted
        (out / name).unlink()
    succeeds(capsys, *command)
    assert everything(out) == first

    assert "--overwrite" in fails(capsys, *command, "--seed", 1)
    (out / "train.txt").unlink()  # as if interrupted, then started with another seed
    assert "--overwrite" in fails(capsys, *command, "--seed", 1)
    succeeds(capsys, *command, "--seed", 1, "--overwrite")
    second = everything(out)
    assert second["train.txt"] != first["train.txt"] and second["test.txt"] == first["test.txt"]
    listed = {path for entries in read_lists(out).values() for path, _ in entries}
    assert {name for name in second if name.endswith(".png")} == listed


def test_fashion_mnist_mistakes_end_in_one_line(tmp_path, fashion, capsys, monkeypatch):
    out = tmp_path / "out"
    command = ("fashion-mnist-lt", "--out", out, "--source")
    assert "at most 10" in fails(capsys, *command, fashion, "--max-per-class", 11)
    assert "--imbalance 20" in fails(capsys, *command, fashion, "--max-per-class", 10, "--imbalance", 20)
    for wrong in ("0.5", "x", "1/0", "nan", "1e400", "1e9999999"):
        assert "--imbalance" in fails(capsys, *command, fashion, "--imbalance", wrong)
    assert "--seed" in fails(capsys, *command, fashion, "--seed", -1)
    assert "train-images-idx3-ubyte" in fails(capsys, *command, tmp_path)
    os.mkfifo(tmp_path / "train-images-idx3-ubyte")
    assert "train-images-idx3-ubyte" in fails(capsys, *command, tmp_path)
    labels = fashion / "t10k-labels-idx1-ubyte"
    if labels.exists():  # not compressed
        whole = labels.read_bytes()
        labels.write_bytes(whole[:-1] + b"\x0a")
        assert "a label of 10, of 10 classes" in fails(capsys, *command, fashion)
        labels.write_bytes(whole)
    damaged = next(fashion.glob("train-images*"))
    damaged.write_bytes(damaged.read_bytes()[:-500])
    assert "train-images-idx3-ubyte" in fails(capsys, *command, fashion)
    damaged.write_text("<html>")
    assert "train-images-idx3-ubyte" in fails(capsys, *command, fashion)
    monkeypatch.setattr(long_tail, "DEBIAN_FASHION_MNIST", tmp_path / "none")
    error = fails(capsys, *command[:-1], "--url", "http://127.0.0.1:9/")
    assert "dataset-fashion-mnist" in error and "--source" in error
    assert not (out / "train.txt").exists()


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A CIFAR-10 of 4 training images and 1 test image per class, with its own checksums."""
    folder = tmp_path / "source" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)

    def write(name, value):
        data = pickle.dumps(value)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    def batch(each):
        labels = random.permutation(np.repeat(np.arange(10), each)).tolist()
        return {"data": random.integers(0, 256, (len(labels), 3072), dtype=np.uint8), "labels": labels}

    class Small(long_tail.CIFAR10):
        train_list = [["data_batch_1", write("data_batch_1", batch(4))]]
        test_list = [["test_batch", write("test_batch", batch(1))]]
        meta = {
            "filename": "batches.meta",
            "key": "label_names",
            "md5": write("batches.meta", {"label_names": [f"name {i}" for i in range(10)]}),
        }

    monkeypatch.setitem(long_tail.CIFAR, 10, Small)
    return folder


def test_cifar_lt_is_the_same_from_every_kind_of_source(tmp_path, cifar, capsys):
    archive = tmp_path / "elsewhere" / "cifar-10-python.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(cifar, arcname=cifar.name)
    results = []
    for number, source in enumerate((cifar, cifar.parent, archive, archive.parent)):
        out = tmp_path / f"out{number}"
        said = succeeds(capsys, "cifar10-lt", "--out", out, "--source", source, "--imbalance", 4)
        assert "the test images are used for validation too" in said
        results.append(everything(out))
    assert all(result == results[0] for result in results)
    lists = read_lists(tmp_path / "out0")
    assert np.bincount([label for _, label in lists["train"]]).tolist() == long_tail_counts(4, 4, 10)
    assert lists["val"] == lists["test"] and len(lists["test"]) == 10
    data = pickle.loads((cifar / "data_batch_1").read_bytes())
    for path, label in lists["train"]:
        number = int(Path(path).stem)
        assert data["labels"][number] == label
        pixels = np.asarray(Image.open(tmp_path / "out0" / path))
        assert np.array_equal(pixels, data["data"][number].reshape(3, 32, 32).transpose(1, 2, 0))
    before = stamps(tmp_path / "out0")
    succeeds(capsys, "cifar10-lt", "--out", tmp_path / "out0", "--source", cifar, "--imbalance", 4)
    assert stamps(tmp_path / "out0") == before


def test_cifar_mistakes_end_in_one_line(tmp_path, cifar, capsys):
    out = tmp_path / "out"
    command = ("cifar10-lt", "--out", out)
    assert "cifar-10-python.tar.gz" in fails(capsys, *command, "--source", tmp_path / "elsewhere")
    assert "--imbalance 5" in fails(capsys, *command, "--source", cifar, "--imbalance", 5)
    assert "download failed" in fails(capsys, *command, "--url", "http://127.0.0.1:9/")
    (cifar / "data_batch_1").write_bytes(b"altered")
    assert "damaged" in fails(capsys, *command, "--source", cifar)
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_text("<html>")
    assert "cannot be unpacked" in fails(capsys, *command, "--source", archive)
    assert "--out" in fails(capsys, "cifar10-lt")
    assert not out.exists() or not list(out.glob("*.txt"))


# The user's own folder


def own_folder(root, **counts):
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"photo {i}.jpg").touch()
    return root


@pytest.mark.parametrize("count", range(3, 60))
def test_every_split_has_an_image_of_a_class_of_at_least_three(count):
    for val, test in ((0.1, 0.1), (0.01, 0.01), (0.49, 0.5), (0.9, 0.05), (0.05, 0.9), (0.5, 0.25)):
        held_val, held_test = split_class(count, val, test)
        assert held_val >= 1 and held_test >= 1 and held_val + held_test < count


def test_folder_splits_every_class(tmp_path, capsys):
    root = own_folder(tmp_path / "photos", zebra=20, ant=5, rare=2, single=1, empty=0)
    (root / ".cache").mkdir()
    (root / ".cache" / "thumb.jpg").touch()
    (root / "zebra" / "notes.txt").touch()
    said = succeeds(capsys, "folder", root)
    assert "empty: no images" in said
    assert "val: no image of 2 classes that have fewer than 3 images: rare, single" in said
    assert "test: no image of 1 classes that have fewer than 2 images: single" in said
    assert (root / "classes.txt").read_text().splitlines() == ["ant", "rare", "single", "zebra"]
    lists = read_lists(root)
    counts = {split: np.bincount([label for _, label in lists[split]], minlength=4).tolist() for split in lists}
    assert counts == {"train": [3, 1, 1, 10], "val": [1, 0, 0, 5], "test": [1, 1, 0, 5]}
    assert "test: 4 of 4 classes have fewer than 10 images" in said and "single 0, ant 1, rare 1, zebra 5" in said
    paths = [path for entries in lists.values() for path, _ in entries]
    assert len(set(paths)) == len(paths) == 28 and all((root / path).is_file() for path in paths)
    assert all(
        (root / "classes.txt").read_text().splitlines()[label] == path.split("/")[0] for path, label in lists["val"]
    )

    before = stamps(root)
    succeeds(capsys, "folder", root)
    assert stamps(root) == before
    text = (root / "train.txt").read_bytes()
    assert "--overwrite" in fails(capsys, "folder", root, "--seed", 1)
    assert (root / "train.txt").read_bytes() == text
    succeeds(capsys, "folder", root, "--seed", 1, "--overwrite")
    assert (root / "train.txt").read_bytes() != text
    succeeds(capsys, "folder", root, "--out", tmp_path / "lists")
    assert (tmp_path / "lists" / "train.txt").read_bytes() == text


def test_folder_takes_shares_of_each_class(tmp_path, capsys):
    root = own_folder(tmp_path, a=40, b=10)
    succeeds(capsys, "folder", root, "--val", 0.25, "--test", 0.5)
    lists = read_lists(root)
    assert [len(lists[split]) for split in ("train", "val", "test")] == [10 + 3, 10 + 2, 20 + 5]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, (0, 0)),
        (2, (0, 1)),
        (3, (1, 1)),
        (4, (1, 1)),
        (8, (2, 2)),
        (12, (3, 3)),
        (20, (5, 5)),
        (59, (6, 6)),
        (200, (20, 20)),
    ],
)
def test_a_share_takes_at_least_five_images_or_a_quarter(count, expected):
    assert split_class(count, 0.1, 0.1) == expected


@pytest.mark.parametrize(
    ("val", "test", "count", "expected"),
    [
        (5, 5, 200, (5, 5)), (5, 5, 15, (5, 5)), (5, 5, 12, (4, 4)), (5, 5, 3, (1, 1)), (5, 5, 2, (0, 1)),
        (0, 5, 200, (0, 5)), (0, 5, 9, (0, 4)), (0, 5, 2, (0, 1)), (0, 5, 1, (0, 0)),
        (5, 0, 200, (5, 0)), (5, 0, 2, (1, 0)), (0, 0.1, 200, (0, 20)),
        (0.5, 20, 60, (30, 20)), (0.9, 20, 60, (39, 20)),
    ],
)  # fmt: skip
def test_a_number_of_images_is_limited_to_an_equal_part_for_every_split(val, test, count, expected):
    assert split_class(count, val, test) == expected


def test_folder_takes_numbers_of_images_per_class(tmp_path, capsys):
    root = own_folder(tmp_path / "photos", a=40, b=33, c=3)
    said = succeeds(capsys, "folder", root, "--val", 5, "--test", 11)
    assert "test: 1 of 3 classes has fewer than 10 images" in said and ": c 1\n" in said
    lists = read_lists(root)
    assert [[label for _, label in lists[split]].count(0) for split in ("train", "val", "test")] == [24, 5, 11]
    assert [[label for _, label in lists[split]].count(2) for split in ("train", "val", "test")] == [1, 1, 1]


@pytest.mark.parametrize(("absent", "other"), [("val", "test"), ("test", "val")])
def test_one_split_of_a_folder_is_used_for_both_if_the_other_is_0(tmp_path, capsys, absent, other):
    root = own_folder(tmp_path / "photos", a=40, b=2, c=1)
    said = succeeds(capsys, "folder", root, f"--{absent}", 0, f"--{other}", 0.25)
    assert f"{absent}: no images of its own (--{absent} 0), so the {other} images are used" in said
    assert f"{other}: no image of 1 classes that have fewer than 2 images: c" in said
    lists = read_lists(root)
    assert lists["val"] == lists["test"] and [len(lists[split]) for split in ("train", "val")] == [32, 11]
    assert not {path for path, _ in lists["train"]} & {path for path, _ in lists["val"]}


def test_folder_keeps_existing_splits(tmp_path, capsys):
    root = tmp_path / "photos"
    for split, count in (("train", 4), ("val", 2), ("test", 1)):
        own_folder(root / split, ant=count, zebra=1)
    succeeds(capsys, "folder", root)
    lists = read_lists(root)
    assert [len(lists[split]) for split in lists] == [5, 3, 2]
    assert lists["test"] == [("test/ant/photo 0.jpg", 0), ("test/zebra/photo 0.jpg", 1)]

    other = tmp_path / "other"
    own_folder(other / "train", ant=4, zebra=1)
    own_folder(other / "val", zebra=1)
    assert "the val images are used" in succeeds(capsys, "folder", other)
    assert read_lists(other)["test"] == read_lists(other)["val"] == [("val/zebra/photo 0.jpg", 1)]


def test_folder_mistakes_end_in_one_line(tmp_path, capsys):
    root = own_folder(tmp_path / "photos", ant=3, zebra=3)
    assert "no class folders" in fails(capsys, "folder", root / "ant")
    assert "fewer than two classes" in fails(capsys, "folder", tmp_path)
    assert "no such folder" in fails(capsys, "folder", tmp_path / "none")
    assert "--val 0 --test 0" in fails(capsys, "folder", root, "--val", 0, "--test", "0.0")
    for value in (-1, 1.5, "1.0", "nan"):
        assert "--val" in fails(capsys, "folder", root, f"--val={value}")
    assert "--test" in fails(capsys, "folder", root, "--test", "many")
    assert "below 1" in fails(capsys, "folder", root, "--val", 0.5, "--test", 0.5)
    assert "nothing to validate on" in fails(capsys, "folder", own_folder(tmp_path / "few", a=2, b=2))
    (root / "ant" / "line\nbreak.jpg").touch()
    assert "rename" in fails(capsys, "folder", root)
    assert not (root / "train.txt").exists()


def test_folder_takes_only_regular_files(tmp_path, capsys):
    root = own_folder(tmp_path / "photos", ant=5, zebra=5)
    os.mkfifo(root / "ant" / "fifo.jpg")
    (root / "ant" / "._0.jpg").touch()  # of macOS
    assert "left out: ant/fifo.jpg is not a regular file" in succeeds(capsys, "folder", root)
    assert sum(map(len, read_lists(root).values())) == 10

    split_already = tmp_path / "split"
    own_folder(split_already / "train", ant=2, zebra=2)
    own_folder(split_already / "val", ant=1)
    os.mkfifo(split_already / "val" / "ant" / "fifo.jpg")
    assert "val/ant/fifo.jpg (not a regular file)" in fails(capsys, "folder", split_already)


def test_wrong_usage_ends_in_one_line(tmp_path, capsys):
    for argv in ([], ["imagenet"], ["folder"], ["imagenet-lt", "--nonsense"], ["cifar10-lt", "--out"]):
        assert "--help" in fails(capsys, *argv)
    locked = tmp_path / "file"
    locked.touch()
    with server() as (url, _):
        assert str(locked) in fails(capsys, "imagenet-lt", "--out", locked / "below", "--url", url)


def test_photos_in_formats_that_are_not_read_are_counted(tmp_path, capsys):
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{number}.jpg")
    (tmp_path / "dogs" / "IMG_1.HEIC").write_bytes(b"not read")
    assert main(["folder", str(tmp_path)]) == 0
    assert "left out: 1 files with the ending .heic" in capsys.readouterr().out
