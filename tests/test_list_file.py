"""The list parser, layouts of image trees, and class folders."""

import os
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets import splits, verify
from datasets.lists import ImageList
from datasets.prepare.list_writer import list_content, read_entries
from datasets.splits import SPLITS, Split, as_listed, by_split, choose_lists, class_folders, find_files, find_splits
from utils.errors import UserError


def read(tmp_path, content: bytes):
    file = tmp_path / "list.txt"
    file.write_bytes(content)
    return ImageList.from_file(file)


def touch(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a/b.jpg 3\n", [("a/b.jpg", 3)]),
        (b"my cat/on  the mat.jpg 3\n", [("my cat/on  the mat.jpg", 3)]),
        (b"a/b.jpg\t3\nc.jpg \t 0\n", [("a/b.jpg", 3), ("c.jpg", 0)]),
        (b"a.jpg 1\r\nb.jpg 2\r\n", [("a.jpg", 1), ("b.jpg", 2)]),
        (b"\xef\xbb\xbfa.jpg 1\nb.jpg 2\n", [("a.jpg", 1), ("b.jpg", 2)]),
        (b"a.jpg 1\nb.jpg 12", [("a.jpg", 1), ("b.jpg", 12)]),
        (b"\na.jpg 1\n\n   \r\nb.jpg 2\n\n", [("a.jpg", 1), ("b.jpg", 2)]),
        ("è/ü.jpg 007\n".encode(), [("è/ü.jpg", 7)]),
        (b"..a/b..jpg 1\n", [("..a/b..jpg", 1)]),
        (b"a.jpg 2147483647\n", [("a.jpg", 2**31 - 1)]),
    ],
)
def test_lists_are_read(tmp_path, content, expected):
    assert read_entries(read(tmp_path, content)) == expected
    assert read_entries(ImageList.from_bytes("list", content)) == expected


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"a.jpg", "no label"),
        (b"a.jpg -1", "'-1' is not a whole number"),
        (b"a.jpg 1_0", "'1_0' is not a whole number"),
        ("a.jpg \u0663".encode(), "not a whole number"),
        ("a.png 0".encode("utf-16"), "not a whole number"),
        (b"a.jpg 2147483648", "too large"),
        (b"a.jpg " + b"9" * 5000, "too large"),
        (b"/a.jpg 1", "absolute"),
        (b"C:\\a.jpg 1", "absolute"),
        (b"\\\\server\\share\\x.png 0", "absolute"),
        (b"   /etc/passwd 0", "absolute"),
        (b"../a.jpg 1", "leaves"),
        (b"a/../../b.jpg 1", "leaves"),
        (b"a\\..\\b.jpg 1", "leaves"),
        (b"train/.. 0", "leaves"),
        (b"\xff\xfe.jpg 1", "UTF-8"),
        (b"a\0b.jpg 1", "NUL"),
    ],
)
def test_malformed_lines_are_refused_with_file_and_line(tmp_path, line, reason):
    with pytest.raises(UserError, match=rf"list\.txt, line 3: .*{reason}") as caught:
        read(tmp_path, b"fine.jpg 0\n\n" + line + b"\nfine.jpg 1\n")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf\n"])
def test_an_empty_list_is_refused(tmp_path, content):
    with pytest.raises(UserError, match="empty"):
        read(tmp_path, content)


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo.txt")
    reasons = dict.fromkeys(("fifo.txt", ".", "/dev/zero"), "not a regular file") | {"none.txt": "No such file"}
    for name, reason in reasons.items():
        with pytest.raises(UserError, match=reason) as caught:
            ImageList.from_file(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_line_numbers_and_counts_skip_blank_lines(tmp_path):
    images = read(tmp_path, b"\xef\xbb\xbfa 0\n\nb 2\r\n\n\nc 2")
    assert [images.line(i) for i in range(3)] == [1, 3, 6]
    assert images.num_classes == 3
    assert images.counts(4).tolist() == [1, 0, 2, 0]


names = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\\"), min_size=1, max_size=12)
paths = st.lists(names, min_size=1, max_size=3).map("/".join)
labels = st.integers(0, 2**31 - 1)


@given(st.lists(st.tuples(paths, labels), min_size=1, max_size=20), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_a_list_that_can_be_written_reads_back(wanted, newline, last_newline):
    try:
        content = list_content(wanted)
    except UserError:  # test_paths_that_a_list_cannot_hold_are_refused says which
        return
    content = content.replace(b"\n", newline.encode())
    if not last_newline:
        content = content.removesuffix(newline.encode())
    assert read_entries(ImageList.from_bytes("list", content)) == wanted


@given(st.lists(st.tuples(st.text("aZé07 ._-()", max_size=12), labels), min_size=1, max_size=20))
def test_ordinary_names_can_be_written(wanted):
    wanted = [(f"class {name}/i{name}.jpg", label) for name, label in wanted]
    assert read_entries(ImageList.from_bytes("list", list_content(wanted))) == wanted


@pytest.mark.parametrize("path", ["a\nb.jpg", "/a.jpg", "a/../b.jpg", " a.jpg", "a\udcff.jpg"])
def test_paths_that_a_list_cannot_hold_are_refused(path):
    with pytest.raises(UserError, match="rename"):
        list_content([(path, 0)])


pieces = st.lists(st.sampled_from([b"a", b" ", b"7", b"\n", b"\r", b"..", b"/", b"\xef\xbb\xbf", b"\0", b"\t"]))


@given(st.binary(max_size=200) | pieces.map(b"".join))
def test_arbitrary_bytes_raise_nothing_but_user_errors(content):
    try:
        images = ImageList.from_bytes("list", content)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        for path, label in read_entries(images):
            assert path and "\n" not in path and not path.startswith("/") and 0 <= label < 2**31


def test_the_layout_with_fewer_missing_files_is_found(tmp_path):
    images = ImageList.from_bytes("list", b"train/cat/1.jpg 0\ntrain/dog/2.jpg 1\ntrain/dog/3.jpg 1\n")
    for file in ("plain/train/cat/1.jpg", "plain/train/dog/2.jpg", "sorted/val/cat/1.jpg", "sorted/val/dog/2.jpg"):
        touch(tmp_path / file)
    found = [find_files(Split("val", str(tmp_path / root), images)) for root in ("plain", "sorted", "none")]
    assert [split.layout for split in found] == [as_listed, by_split, as_listed]
    assert [split.missing for split in found] == [(2,), (2,), (0, 1, 2)]


def test_class_folders_are_numbered_by_the_training_classes(tmp_path):
    for file in ("train/b/1.png", "train/a/2.JPEG", "train/a/._2.JPEG", "train/.c/4.png", "val/b/3.png"):
        touch(tmp_path / file)
    images, classes = class_folders(tmp_path, "train")
    assert classes == ["a", "b"]
    assert read_entries(images) == [("train/a/2.JPEG", 0), ("train/b/1.png", 1)]
    assert read_entries(class_folders(tmp_path, "val", classes)[0]) == [("val/b/3.png", 1)]
    (tmp_path / "test" / "zebra").mkdir(parents=True)
    with pytest.raises(UserError, match="zebra"):
        class_folders(tmp_path, "test", classes)


def test_a_fifo_in_a_class_folder_counts_as_missing(tmp_path):
    for split in SPLITS:
        touch(tmp_path / split / "cat" / "1.png")
    os.mkfifo(tmp_path / "train/cat/2.png")
    splits = find_splits(tmp_path, {})
    splits["val"].require()
    with pytest.raises(UserError, match=r"1 of 2 files .* train/cat/2\.png \(not a regular file\)"):
        splits["train"].require()


@pytest.mark.parametrize("name", ["train.txt", "my own.txt"])
def test_the_advice_for_missing_files_is_a_command_that_lists_them(tmp_path, name):
    """Also if the list is somewhere else, and has another name than verify looks for."""
    (tmp_path / name).write_text("a.png 0\nb.png 0\n")
    lists = dict.fromkeys(SPLITS, tmp_path / name)
    with pytest.raises(UserError) as caught:
        find_splits(tmp_path, lists)["train"].require()
    words = shlex.split(str(caught.value).split("; ")[-1].removesuffix(" lists them all"))
    assert words[:3] == ["python", "-m", "datasets.verify"]
    report = tmp_path / "report"
    assert verify.main([*words[3:-1], str(report)]) == 1 and report.read_text().count("\n") == 2


# ---- which lists


def test_without_lists_and_class_folders_the_published_lists_are_used(tmp_path, monkeypatch):
    monkeypatch.setattr(splits, "IMAGENET_LT", tmp_path / "data")
    with pytest.raises(UserError, match=r"has neither train\.txt nor class folders .*ImageNet_LT_train\.txt does not"):
        choose_lists(tmp_path, {})
    files = {split: tmp_path / "data" / f"ImageNet_LT_{split}.txt" for split in SPLITS}
    for file in files.values():
        touch(file)
    assert choose_lists(tmp_path, {"val": files["test"]}) == files | {"val": files["test"]}


def test_class_folders_are_not_mixed_with_lists(tmp_path, monkeypatch):
    monkeypatch.setattr(splits, "IMAGENET_LT", tmp_path / "data")
    for split in SPLITS:
        (tmp_path / split).mkdir()
    assert choose_lists(tmp_path, {}) is None
    (tmp_path / "own.txt").touch()
    with pytest.raises(UserError, match=r"--val-list: is missing; the class folders of .* only read if no list"):
        choose_lists(tmp_path, {"train": tmp_path / "own.txt"})
