"""python -m datasets.prepare: published lists with a local HTTP server, trees of links, lists of class folders."""

import json
import os
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets.prepare import published
from datasets.prepare.cli import main
from datasets.prepare.folders import photo_key, place_photos, split_class
from datasets.prepare.trees import link_tree
from datasets.splits import find_splits
from tests.helpers_prepare import class_counts, everything, fails, read_lists, stamps, succeeds
from utils.errors import UserError

CLASSES = ("n01", "n02", "n03")
LISTS = {
    "train": [(f"train/{CLASSES[c]}/{CLASSES[c]}_{i}.JPEG", c) for c, n in enumerate((5, 3, 2)) for i in range(n)],
    "val": [(f"train/{name}/{name}_{90 + i}.JPEG", c) for c, name in enumerate(CLASSES) for i in range(2)],
    "test": [(f"val/{name}/ILSVRC2012_val_{c}{i}.JPEG", c) for c, name in enumerate(CLASSES) for i in range(3)],
}
DATASETS = {"imagenet-lt": "ImageNet_LT", "places-lt": "Places_LT", "inaturalist18": "iNaturalist18"}
MODES = {  # what a server makes of a list, and why that is refused
    "truncated": (lambda body: body[:-30], "IncompleteRead"),  # of the announced length
    "stalls": (lambda body: body[:50], "timed out"),
    "short": (lambda body: b"".join(body.splitlines(True)[:-2]), "8 lines, ImageNet_LT_train.txt has 10"),
    "altered": (lambda body: body.replace(b" 1\n", b" 0\n", 1), "git blob id"),
    "html": (lambda body: b"<!DOCTYPE html><html><body>quota exceeded</body></html>\n" * 10, "HTML page"),
    "gone": (None, "404"),
}


def content(split):
    return "".join(f"{path} {label}\n" for path, label in LISTS[split]).encode()


def facts(split, file):
    blobs = [published.git_blob_id(content(split)), published.git_blob_id(content(split).removesuffix(b"\n"))]
    return {"file": file, "lines": len(LISTS[split]), "git_blobs": blobs}


LINKS = {f"{split}/{path.split('/', 1)[1]}": path for split, entries in LISTS.items() for path, _ in entries}
WHOLE = {f"ImageNet_LT_{split}.txt": content(split) for split in LISTS}


@pytest.fixture(autouse=True)
def small_manifest(tmp_path_factory, monkeypatch):
    """A manifest of published lists with a few images each."""
    lists = {}
    for dataset, name in DATASETS.items():
        splits = {split: facts(split, f"{name}_{split}.txt") for split in LISTS}
        lists[dataset] = {"name": name, "source": "http://127.0.0.1:9/", "classes": 3, "splits": splits}
    lists["inaturalist18"]["splits"]["test"] = {"file": "iNaturalist18_val.txt"}
    file = tmp_path_factory.mktemp("manifest") / "manifest.json"
    file.write_text(json.dumps({"lists": lists}))
    monkeypatch.setattr(published, "MANIFEST", file)


@contextmanager
def server(mode="whole", broken="train"):
    """Serves the lists, the one of the split `broken` as the mode makes it; yields address and requested paths."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            split = self.path.rsplit("_", 1)[-1].removesuffix(".txt")
            own_mode = mode if split == broken else "whole"
            if own_mode == "gone":
                return self.send_error(404)
            whole = content(split)
            body = whole if own_mode == "whole" else MODES[own_mode][0](whole)
            self.send_response(200)
            self.send_header("Content-Length", str(len(whole if own_mode in ("truncated", "stalls") else body)))
            self.end_headers()
            self.wfile.write(body)
            if own_mode == "stalls":
                self.connection.settimeout(None)
                self.rfile.read(1)  # until the client gives up

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}/lists/", asked
        http.shutdown()


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


def test_lists_are_downloaded_once_also_after_a_failure(tmp_path, capsys):
    out = tmp_path / "lists"
    with server("html", broken="test") as (url, _):
        fails(capsys, "imagenet-lt", "--out", out, "--url", url)
        assert sorted(everything(out)) == ["ImageNet_LT_train.txt", "ImageNet_LT_val.txt"]
    with server() as (url, asked):
        said = succeeds(capsys, "imagenet-lt", "--out", out, "--url", url)
        assert everything(out) == WHOLE
        assert said.count("verified") == 3 and "10 images, 5 to 2 in each of 3 classes" in said
        before = stamps(tmp_path)
        succeeds(capsys, "imagenet-lt", "--out", out, "--url", url.rstrip("/"))
        assert asked == ["/lists/ImageNet_LT_test.txt"] and stamps(tmp_path) == before


@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_the_published_list_is_not_kept(tmp_path, capsys, monkeypatch, mode):
    if mode == "stalls":  # the others may take their time
        monkeypatch.setattr(published, "TIMEOUT", 0.3)
    with server(mode) as (url, _):
        error = fails(capsys, "imagenet-lt", "--out", tmp_path, "--url", url)
    assert MODES[mode][1] in error and f"{url}ImageNet_LT_train.txt" in error
    assert everything(tmp_path) == {}


def test_what_cannot_be_downloaded_leaves_nothing(tmp_path, capsys, monkeypatch):
    assert "http://127.0.0.1:9/" in fails(capsys, "imagenet-lt", "--out", tmp_path)
    assert "no-scheme" in fails(capsys, "imagenet-lt", "--out", tmp_path, "--url", "no-scheme")
    monkeypatch.setattr(published, "urlopen", mock.Mock(side_effect=KeyboardInterrupt))
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
    command = ("imagenet-lt", "--out", out, "--from")
    given.write_bytes(content("val").removesuffix(b"\n"))  # accepted with and without the last newline
    said = succeeds(capsys, *command, given)
    assert everything(out) == {"ImageNet_LT_val.txt": given.read_bytes()}
    assert "not there yet" in said and "ImageNet_LT_train.txt" in said

    altered = tmp_path / "ImageNet_LT_test.txt"
    altered.write_bytes(content("test").replace(b"\n", b"\r\n"))
    assert "line endings" in fails(capsys, *command, altered)
    given.write_text("something else 0\n")
    assert "holds none of" in fails(capsys, *command, given)
    assert "no such" in fails(capsys, *command, tmp_path / "none")
    os.mkfifo(tmp_path / "ImageNet_LT_train.txt")
    assert "holds none of" in fails(capsys, *command, tmp_path / "ImageNet_LT_train.txt")
    assert list(everything(out)) == ["ImageNet_LT_val.txt"]


# Image trees


@pytest.fixture
def lists(tmp_path):
    """A folder of verified lists of all three data sets."""
    folder = tmp_path / "lists"
    folder.mkdir()
    for name in DATASETS.values():
        for split in LISTS:
            (folder / f"{name}_{split}.txt").write_bytes(content(split))
    (folder / "iNaturalist18_test.txt").unlink()
    return folder


@pytest.fixture
def root(tmp_path):
    """The images of all lists, in the layout of ILSVRC2012."""
    folder = tmp_path / "images"
    for entries in LISTS.values():
        for path, _ in entries:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(path)
    return folder


def flatten(root):
    for file in list((root / "val").glob("*/*")):
        file.rename(root / "val" / file.name)
    for name in CLASSES:
        (root / "val" / name).rmdir()


def test_missing_images_are_named_and_explained(lists, root, tmp_path, capsys):
    command = ("imagenet-lt", "--out", lists, "--root")
    assert "all 25 listed images" in succeeds(capsys, *command, root)
    (root / "train/n02/n02_1.JPEG").unlink()
    error = fails(capsys, *command, root)
    assert "1 of 10" in error and "train/n02/n02_1.JPEG" in error and "wrong release" in error
    (root / "train/n02/n02_1.png").touch()
    assert "another release or a converted copy (train/n02/n02_1.png" in fails(capsys, *command, root)
    (root / "train/n02/n02_1.JPEG").symlink_to("gone.JPEG")
    assert f"{root}/train/n02/n02_1.JPEG: a broken link, to gone.JPEG" in fails(capsys, *command, root)
    for file in (root / "train/n02").iterdir():
        file.unlink()
    (root / "train/n02").rmdir()
    assert "incomplete copy" in fails(capsys, *command, root)
    (root / "train/n02.tar").touch()
    assert "not unpacked yet (train/n02.tar)" in fails(capsys, *command, root)
    assert f"below {root}" in fails(capsys, *command, root / "train")
    assert f"below {root}" in fails(capsys, *command, tmp_path)
    (tmp_path / "nothing").mkdir()
    assert "wrong root" in fails(capsys, *command, tmp_path / "nothing")
    assert "no such folder" in fails(capsys, *command, tmp_path / "none")
    deep = tmp_path / "kaggle/ILSVRC/Data/CLS-LOC"
    deep.parent.mkdir(parents=True)
    root.rename(deep)
    assert f"below {deep}" in fails(capsys, *command, tmp_path / "kaggle")


def check_links(out, links=LINKS):
    """That every image of every list is below out, as a link to the right file; links: its path there -> as listed."""
    assert all((out / link).is_symlink() and (out / link).read_text() == path for link, path in links.items())
    found = find_splits(out, {})
    assert {name: (len(split.image_list), split.missing) for name, split in found.items()} == {
        split: (len(entries), ()) for split, entries in LISTS.items()
    }


def test_links_are_made_once_and_missing_ones_added(lists, root, tmp_path, capsys):
    out = tmp_path / "out"
    command = ("imagenet-lt", "--out", lists, "--link", out, "--root")
    assert "25 links made, 0 there already" in succeeds(capsys, *command, root)
    check_links(out)
    before = stamps(out)
    assert "0 links made, 25 there already" in succeeds(capsys, *command, root)
    assert stamps(out) == before
    for link in list(out.glob("*/n02/*")):
        link.unlink()
    (out / "test.txt").unlink()
    assert "8 links made, 17 there already" in succeeds(capsys, *command, root)
    check_links(out)
    moved = root.rename(tmp_path / "moved")
    assert "25 links made" in succeeds(capsys, *command, moved)
    check_links(out)
    succeeds(capsys, "imagenet-lt", "--out", lists, "--root", out, "--link", tmp_path / "of a tree of links")
    check_links(tmp_path / "of a tree of links")


def test_link_sorts_a_flat_validation_folder(lists, root, tmp_path, capsys):
    flatten(root)
    command = ("imagenet-lt", "--out", lists, "--root", root)
    error = fails(capsys, *command)
    assert "unsorted validation folder" in error and "--link" in error
    succeeds(capsys, *command, "--link", tmp_path / "out")
    check_links(tmp_path / "out")
    (root / "val/ILSVRC2012_val_11.JPEG").unlink()
    error = fails(capsys, *command, "--link", tmp_path / "out")
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


def test_two_images_with_the_same_link_are_refused(tmp_path):
    for folder in ("a/outdoor", "b/outdoor"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "1.jpg").touch()
    (tmp_path / "train.txt").write_text("a/outdoor/1.jpg 0\nb/outdoor/1.jpg 1\n")
    splits = find_splits(tmp_path, {}, ["train"])
    with pytest.raises(UserError, match=r"--link .*outdoor/1\.jpg"):
        link_tree(splits, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_inaturalist_tests_on_its_validation_list(lists, root, tmp_path, capsys):
    said = succeeds(capsys, "inaturalist18", "--out", lists, "--root", root, "--link", tmp_path / "out")
    assert "its val list is used for test, and for validation" in said and "all 22 listed images" in said
    assert succeeds(capsys, "inaturalist18", "--out", lists).count("iNaturalist18_val.txt") == 3  # read once, for two
    found = find_splits(tmp_path / "out", {})
    assert [(len(found[split].image_list), found[split].missing) for split in LISTS] == [(10, ()), (6, ()), (6, ())]


def test_places_lt_keeps_its_nested_folders(lists, root, tmp_path, capsys):
    command = ("places-lt", "--out", lists, "--root", root)
    said = succeeds(capsys, *command)
    assert "all 25" in said and f"--test-list {lists / 'Places_LT_test.txt'}" in said
    flatten(root)
    out = tmp_path / "out"
    assert "unsorted" in fails(capsys, *command)
    succeeds(capsys, *command, "--link", out)
    check_links(out, {path: path for entries in LISTS.values() for path, _ in entries})


def test_checking_a_tree_needs_all_lists(lists, root, capsys):
    (lists / "ImageNet_LT_val.txt").unlink()
    command = ("imagenet-lt", "--out", lists, "--root", root)
    assert "ImageNet_LT_val.txt" in fails(capsys, *command, "--from", lists / "ImageNet_LT_train.txt")


# The user's own folder


def own_folder(root, **counts):
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (root / name / f"photo {i}.jpg").touch()
    return root


@given(st.integers(3, 60), st.floats(0.01, 0.9), st.floats(0.01, 0.9))
def test_every_split_has_an_image_of_a_class_of_at_least_three(count, val, test):
    held_val, held_test = split_class(count, val, test)
    assert held_val >= 1 and held_test >= 1 and held_val + held_test < count


@pytest.mark.parametrize(
    ("val", "test", "count", "expected"),
    [
        # a share takes at least five images or a quarter
        (0.1, 0.1, 1, (0, 0)), (0.1, 0.1, 2, (0, 1)), (0.1, 0.1, 3, (1, 1)), (0.1, 0.1, 4, (1, 1)),
        (0.1, 0.1, 8, (2, 2)), (0.1, 0.1, 12, (3, 3)), (0.1, 0.1, 20, (5, 5)), (0.1, 0.1, 59, (6, 6)),
        (0.1, 0.1, 200, (20, 20)),
        # a number is limited to an equal part for every split
        (5, 5, 200, (5, 5)), (5, 5, 15, (5, 5)), (5, 5, 12, (4, 4)), (5, 5, 3, (1, 1)), (5, 5, 2, (0, 1)),
        (0, 5, 200, (0, 5)), (0, 5, 9, (0, 4)), (0, 5, 2, (0, 1)), (0, 5, 1, (0, 0)),
        (5, 0, 200, (5, 0)), (5, 0, 2, (1, 0)), (0, 0.1, 200, (0, 20)),
        (0.5, 20, 60, (30, 20)), (0.9, 20, 60, (39, 20)),
    ],
)  # fmt: skip
def test_shares_and_numbers_of_images(val, test, count, expected):
    assert split_class(count, val, test) == expected


def test_what_was_tested_stays_so_if_the_flags_of_lists_for_both_are_lost():
    """With --val 0 the validation list is that of the test images."""
    photos = [f"ant/{i}.jpg" for i in range(40)]
    places = place_photos(photos, {}, 0, 10, 0)
    earlier = {photo_key(path): {"test": "val"}.get(split, split) for path, split in places.items()}
    assert list(places.values()).count("test") == 10 and place_photos(photos, earlier, 0, 10, 0) == places
    more = place_photos([*photos, *(f"ant/new {i}.jpg" for i in range(40))], earlier, 0, 10, 0)
    assert all((more[path] == "test") == (split == "test") for path, split in places.items())


def test_a_photo_moves_from_val_to_test_if_its_class_has_no_other_to_test_on():
    photos = ["ant/0.jpg", "ant/1.jpg"]
    earlier = dict(zip(map(photo_key, photos), ("val", "train"), strict=True))
    assert place_photos(photos, earlier, 0.1, 0.1, 0) == {photos[0]: "test", photos[1]: "train"}


def test_folder_splits_every_class(tmp_path, capsys):
    root = own_folder(tmp_path / "photos", zebra=20, ant=5, rare=2, single=1, empty=0)
    (root / ".cache").mkdir()
    (root / ".cache" / "thumb.jpg").touch()
    for name in ("notes.txt", "IMG_1.HEIC", "IMG_2.heic", "._photo 0.jpg"):  # the last is of macOS
        (root / "zebra" / name).touch()
    os.mkfifo(root / "ant" / "fifo.jpg")
    said = succeeds(capsys, "folder", root)
    assert "empty: no images" in said and "left out: ant/fifo.jpg is not a regular file" in said
    assert "left out: 2 files with the ending .heic" in said and "left out: 1 files with the ending .txt" in said
    assert "val: no image of 2 classes that have fewer than 3 images: rare, single" in said
    assert "test: no image of 1 classes that have fewer than 2 images: single" in said
    names = (root / "classes.txt").read_text().splitlines()
    assert names == ["ant", "rare", "single", "zebra"]
    lists = read_lists(root)
    counts = {split: class_counts(lists[split], 4) for split in lists}
    assert counts == {"train": [3, 1, 1, 10], "val": [1, 0, 0, 5], "test": [1, 1, 0, 5]}
    assert "test: 4 of 4 classes have fewer than 10 images" in said and "single 0, ant 1, rare 1, zebra 5" in said
    entries = [entry for split in lists.values() for entry in split]
    assert len({path for path, _ in entries}) == len(entries) == 28
    assert all((root / path).is_file() and names[label] == path.split("/")[0] for path, label in entries)

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


@pytest.mark.parametrize(("val", "test", "counts"), [(0.25, 0.5, (10, 10, 20)), (5, 11, (24, 5, 11))])
def test_folder_takes_shares_or_numbers_of_each_class(tmp_path, capsys, val, test, counts):
    root = own_folder(tmp_path / "photos", a=40, c=3)
    said = succeeds(capsys, "folder", root, "--val", val, "--test", test)
    assert "test: 1 of 2 classes has fewer than 10 images" in said and ": c 1\n" in said
    assert [class_counts(entries) for entries in read_lists(root).values()] == [[count, 1] for count in counts]


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

    for split in lists:
        (root / split / "ant").rename(root / split / "zoo")
    assert "class numbers changed: zebra 1 to 0; checkpoints" in succeeds(capsys, "folder", root, "--overwrite")

    other = tmp_path / "other"
    own_folder(other / "train", ant=4, zebra=1)
    own_folder(other / "val", zebra=1)
    assert "the val images are used" in succeeds(capsys, "folder", other)
    assert read_lists(other)["test"] == read_lists(other)["val"] == [("val/zebra/photo 0.jpg", 1)]
    os.mkfifo(other / "val" / "zebra" / "fifo.jpg")
    error = fails(capsys, "folder", other)
    assert "val/zebra/fifo.jpg (not a regular file)" in error and "replace it" in error


def places(root) -> dict[str, dict[str, str]]:
    """{class: {photo: split}} of a folder's lists."""
    found = {}
    for split, entries in read_lists(root).items():
        for path, _ in entries:
            name, _, photo = path.partition("/")
            found.setdefault(name, {})[photo] = split
    return found


def moves(before, after) -> list[tuple[str, str]]:
    """(earlier, present) split of a class's photos that have moved."""
    return [(before[photo], after[photo]) for photo in before.keys() & after.keys() if before[photo] != after[photo]]


@pytest.mark.parametrize("flags", [("--seed", 3), ("--val", 0), ("--test", 7)])
def test_photos_keep_their_splits_when_others_come_and_go(tmp_path, capsys, flags):
    root = own_folder(tmp_path / "photos", bee=30, cat=6, dog=41)
    run = ("folder", root, *flags)
    succeeds(capsys, *run)
    first = places(root)
    for count in range(6, 30, 9):  # nine more of one class, time and again
        before = places(root)
        own_folder(root, cat=count + 9)
        assert f"9 photos below {root} are in no list" in fails(capsys, *run)
        said = succeeds(capsys, *run, "--overwrite")
        assert "cat: 9 new, 0 gone, 0 moved" in said and "bee:" not in said and "dog:" not in said
        after = places(root)
        assert [after[name] for name in ("bee", "dog")] == [first[name] for name in ("bee", "dog")]
        assert moves(before["cat"], after["cat"]) == []
    held = [sum(split == name for split in places(root)["cat"].values()) for name in ("val", "test")]
    assert held == [0 if "--val" in flags else 5, 7 if "--test" in flags else 5]

    for i in range(10):
        (root / "bee" / f"photo {i}.jpg").unlink()
    own_folder(root, ant=12)
    os.rename(root / "dog", tmp_path / "dog")
    said = succeeds(capsys, *run, "--overwrite")
    assert "bee: 0 new, 10 gone" in said and "ant: 12 new, 0 gone" in said and "dog: 0 new, 41 gone" in said
    before, after = after, places(root)
    assert after["cat"] == before["cat"] and {was for was, _ in moves(first["bee"], after["bee"])} <= {"val", "test"}
    unchanged = stamps(root)
    assert " new, " not in succeeds(capsys, *run) and stamps(root) == unchanged
    assert "class numbers changed" not in said
    os.rename(root / "bee", tmp_path / "bee")
    said = succeeds(capsys, *run, "--overwrite")
    assert "class numbers changed: cat 1 to 0, ant 2 to 1; checkpoints of the earlier lists" in said


def test_without_earlier_lists_the_hash_of_a_photo_decides(tmp_path, capsys):
    root = own_folder(tmp_path / "photos", bee=30, cat=26, dog=41)
    succeeds(capsys, "folder", root)
    first = places(root)
    (root / "cat").rename(root / "zebra")
    own_folder(root, ant=20, dog=60)
    succeeds(capsys, "folder", root, "--out", tmp_path / "lists")
    again = places(tmp_path / "lists")
    assert again["bee"] == first["bee"] and again["zebra"] == first["cat"]
    assert ("train", "test") not in moves(first["dog"], again["dog"]) and len(moves(first["dog"], again["dog"])) < 8
    said = succeeds(capsys, "folder", root, "--out", tmp_path / "lists", "--seed", 1, "--overwrite")
    assert "drawn anew: the earlier lists were drawn with --val 0.1 --test 0.1 --seed 0" in said
    assert " 0 new, 0 gone, " in said and places(tmp_path / "lists") != again
    lost = tmp_path / "lists" / "val.txt"
    lost.unlink()
    said = succeeds(capsys, "folder", root, "--out", tmp_path / "lists", "--overwrite")
    assert said.count("drawn anew") == 1 and f"all splits are drawn anew: {lost} is missing" in said


def test_a_class_that_classes_txt_renames_keeps_its_number_and_its_splits(tmp_path, capsys):
    """Also where a photo is gone too."""
    root = own_folder(tmp_path / "photos", bee=30, cat=26, dog=41)
    succeeds(capsys, "folder", root)
    own_folder(root, bee=50)
    succeeds(capsys, "folder", root, "--overwrite")
    first = places(root)
    (root / "bee").rename(root / "wasp")
    (root / "wasp" / "photo 1.jpg").unlink()
    (root / "classes.txt").write_text("wasp\nKatze\ndog\n")
    said = succeeds(capsys, "folder", root, "--overwrite")
    assert "wasp (was bee, and keeps its number): 0 new" in said
    assert (root / "classes.txt").read_text().split() == ["wasp", "Katze", "dog"]
    after = places(root)
    assert moves(first["bee"], after["wasp"]) == [] and after["cat"] == first["cat"] and after["dog"] == first["dog"]
    assert {path.split("/")[0]: label for path, label in read_lists(root)["train"]} == {"wasp": 0, "cat": 1, "dog": 2}


@pytest.mark.parametrize(
    ("counts", "names"),
    [
        ({"hund": 30, "katze": 26, "maus": 28}, ["Hunde", "Katzen", "Mäuse"]),  # told by their photos
        ({"hund": 30, "katze": 30, "maus": 30}, ["HUND", "Katze", "Mäuse"]),  # the third is left over
        ({"bär": 30, "löwe": 30, "möwe": 30}, ["ba\u0308r", "lo\u0308we", "mo\u0308we"]),  # a copy of macOS
    ],
)
def test_classes_that_are_renamed_at_once_keep_their_numbers_and_splits(tmp_path, capsys, counts, names):
    root = own_folder(tmp_path / "photos", **counts)
    succeeds(capsys, "folder", root)
    first = places(root)
    for old, new in zip(counts, names, strict=True):
        (root / old).rename(root / new)
    said = succeeds(capsys, "folder", root, "--overwrite")
    assert said.count(", and keeps its number): 0 new, 0 gone, 0 moved") == 3 and "class numbers" not in said
    assert (root / "classes.txt").read_text().split() == names
    assert places(root) == {new: first[old] for old, new in zip(counts, names, strict=True)}


def test_folder_mistakes_end_in_one_line(tmp_path, capsys):
    root = own_folder(tmp_path / "photos", ant=3, zebra=3)
    for folder in (root / "ant", tmp_path):
        assert f"{folder}: has fewer than two class folders" in fails(capsys, "folder", folder)
    assert "no such folder" in fails(capsys, "folder", tmp_path / "none")
    assert "--val 0 --test 0" in fails(capsys, "folder", root, "--val", 0, "--test", "0.0")
    for value in (-1, 1.5, "1.0", "nan", "many"):
        assert "--val" in fails(capsys, "folder", root, f"--val={value}")
    assert "below 1" in fails(capsys, "folder", root, "--val", 0.5, "--test", 0.5)
    assert "to validate on" in fails(capsys, "folder", own_folder(tmp_path / "few", a=2, b=2))
    (root / "ant" / "line\nbreak.jpg").touch()
    assert "rename" in fails(capsys, "folder", root)
    assert not (root / "train.txt").exists()


def test_wrong_usage_ends_in_one_line(tmp_path, capsys):
    for argv in ([], ["imagenet"], ["folder"], ["imagenet-lt", "--nonsense"], ["cifar10-lt", "--out"], ["cifar10-lt"]):
        assert "--help" in fails(capsys, *argv)
    locked = tmp_path / "file"
    locked.touch()
    with server() as (url, _):
        assert str(locked) in fails(capsys, "imagenet-lt", "--out", locked / "below", "--url", url)
