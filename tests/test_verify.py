"""python -m datasets.verify: what it finds, how it explains it, and its exit status."""

import os
import sys
import time

import pytest
from PIL import Image

from datasets.prepare import verify as module
from datasets.verify import main
from tests.helpers import outcome_of

CLASSES = ("ant", "bee", "cat")
COUNTS = {"train": (12, 3, 2), "val": (1, 1, 1), "test": (2, 2, 2)}


@pytest.fixture
def root(tmp_path):
    """A tree of small images and its lists."""
    folder = tmp_path / "images"
    for split, counts in COUNTS.items():
        lines = []
        for label, (name, count) in enumerate(zip(CLASSES, counts, strict=True)):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                path = f"{split}/{name}/{i}.jpg"
                Image.new("RGB", (8, 8), (label, i, 0)).save(folder / path, comment=path)  # no two the same bytes
                lines.append(f"{path} {label}\n")
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def verify(capsys):
    """Runs the command: (exit status, stdout); on status 2 (2, the one line on stderr)."""

    def run(*argv):
        status, out, err = outcome_of(main, capsys, *argv)
        if status == 2:
            assert err.count("\n") == 1 and err.endswith("\n")
            return status, err
        assert err == ""
        return status, out

    return run


def rows(said):
    """The table: split -> column -> cell."""
    head, *lines = [line.split() for line in said.splitlines()[:4]]
    return {line[0]: dict(zip(head, line, strict=True)) for line in lines if line[0] in COUNTS}


def append(file, text):
    with file.open("a") as target:
        target.write(text)


def test_a_tree_without_problems_passes(root, verify):
    status, said = verify(root)
    assert status == 0 and "all images are there" in said and "information" not in said
    assert said.splitlines()[0].split() == [
        "split", "images", "classes", "many", "medium", "few", "imbalance", "missing", "unreadable", "layout",
    ]  # fmt: skip
    assert said.splitlines()[1].split() == ["train", "17", "3", "0", "0", "3", "6.0", "0", "-", "plain"]
    assert rows(said)["test"]["images"] == "6" and rows(said)["test"]["imbalance"] == "1.0"
    status, said = verify(root, "--decode")
    assert status == 0 and "can be read" in said and rows(said)["val"]["unreadable"] == "0"


def test_groups_follow_the_training_counts(tmp_path, verify):
    for name, counts in {"train": (101, 100, 20, 19), "test": (1, 1, 0, 1)}.items():
        lines = [f"{c}_{i}_{name}.jpg {c}\n" for c, count in enumerate(counts) for i in range(count)]
        (tmp_path / f"{name}.txt").write_text("".join(lines))
    table = rows(verify(tmp_path, tmp_path / "train.txt", tmp_path / "test.txt")[1])
    assert [table["train"][group] for group in ("many", "medium", "few")] == ["1", "2", "1"]
    assert [table["test"][group] for group in ("classes", "many", "medium", "few")] == ["3", "1", "1", "1"]
    assert verify(tmp_path, tmp_path / "test.txt")[1].splitlines()[1].split()[3:6] == ["-"] * 3


def test_missing_images_are_named_and_reported(root, verify, tmp_path):
    for i in range(2):
        (root / f"test/bee/{i}.jpg").unlink()
    append(root / "val.txt", "val/ant/none.jpg 0\n")
    append(root / "train.txt", "".join(f"train/ant/none{i}.jpg 0\n" for i in range(50)))
    report = tmp_path / "report.txt"
    status, said = verify(root, "--report", report)
    assert status == 1 and "all images are there" not in said and "wrong release" in said
    assert [rows(said)[split]["missing"] for split in COUNTS] == ["50", "1", "2"]
    assert f"test/bee/1.jpg ({root / 'test.txt'}, line 4)" in said
    assert said.count("train/ant/none") == 20 and "and 30 more" in said
    lines = [line.split("\t") for line in report.read_text().splitlines()]
    assert len(lines) == 53 and lines[50:] == [
        ["missing", "val", "val/ant/none.jpg", "no such file"],
        ["missing", "test", "test/bee/0.jpg", "no such file"],
        ["missing", "test", "test/bee/1.jpg", "no such file"],
    ]


def test_names_that_no_file_can_have_and_control_characters_are_named(root, verify):
    append(root / "train.txt", f"train/ant/{'a' * 256}.jpg 0\ntrain/ant/\033[31m\u3000.jpg 0\n")
    status, said = verify(root)
    assert status == 1 and f"{'a' * 256}.jpg" in said and "train/ant/\\x1b[31m\u3000.jpg" in said and "\033" not in said


def test_decode_names_every_broken_image(root, verify, tmp_path):
    folder = root / "train/cat"
    noise = Image.effect_noise((64, 64), 50)
    noise.save(folder / "truncated.jpg")
    os.truncate(folder / "truncated.jpg", 600)
    (folder / "zero.jpg").touch()
    (folder / "text.jpg").write_text("not an image")
    broken = {"truncated.jpg": "truncated", "zero.jpg": "0 bytes", "text.jpg": "not an image"}
    append(root / "train.txt", "".join(f"train/cat/{name} 2\n" for name in broken))
    status, said = verify(root)
    assert status == 0 and "cannot be read" not in said
    status, said = verify(root, "--decode", "--report", tmp_path / "report.txt")
    assert status == 1 and rows(said)["train"]["unreadable"] == "3"
    report = dict(line.split("\t")[2:] for line in (tmp_path / "report.txt").read_text().splitlines())
    for name, reason in broken.items():
        line = next(line for line in said.splitlines() if name in line)
        assert reason in line and "train.txt, line" in line and reason in report[f"train/cat/{name}"]


def test_images_of_another_format_than_their_name_says_are_information(root, verify):
    Image.new("RGB", (8, 8)).save(root / "train/ant/0.jpg", format="PNG")
    Image.new("CMYK", (8, 8)).save(root / "train/ant/1.jpg")
    Image.new("L", (8, 8)).save(root / "train/ant/2.jpg")
    status, said = verify(root, "--decode")
    assert status == 0 and "1 images have another format than their name says" in said and "1 CMYK, 1 L" in said
    assert f"train/ant/0.jpg ({root / 'train.txt'}, line 1): PNG" in said


def test_images_shared_with_training_are_a_problem(root, verify):
    append(root / "test.txt", "./train/ant/3.jpg 0\n")
    status, said = verify(root)
    assert status == 1 and "train and test share 1 images; the first: train/ant/3.jpg" in said
    (root / "test.txt").write_text((root / "val.txt").read_text())
    status, said = verify(root)
    assert status == 0 and "information: val and test are the same images" in said
    append(root / "test.txt", "test/ant/0.jpg 0\n")
    status, said = verify(root)
    assert status == 1 and "val and test share 3 images" in said


def test_the_same_path_below_two_splits_is_not_the_same_image(root, verify):
    """Lists relative to their split, in a tree of one folder per split."""
    for split in COUNTS:
        text = (root / f"{split}.txt").read_text()
        (root / f"{split}.txt").write_text(text.replace(f"{split}/", ""))
    for name in CLASSES:
        (root / f"val/{name}/0.jpg").write_bytes((root / f"train/{name}/0.jpg").read_bytes())
    status, said = verify(root)
    assert status == 1 and "train and val share 3 images; the first: ant/0.jpg" in said  # copies
    for split, red in (("val", 100), ("test", 200)):
        for file in (root / split).rglob("*.jpg"):
            Image.new("RGB", (8, 8), (red, 99, 99)).save(file)
    status, said = verify(root)
    assert (status, "share" in said) == (0, False)


def test_repeated_entries_and_untrained_classes_are_information(root, verify):
    append(root / "train.txt", "train/ant/0.jpg 0\n")
    (root / "val.txt").write_text((root / "val.txt").read_text().replace("cat/0.jpg 2", "cat/0.jpg 7"))
    (root / "train.txt").write_text((root / "train.txt").read_text().replace(" 1\n", " 3\n"))
    status, said = verify(root)
    assert status == 0
    assert "train: 1 entries are in the list more than once" in said
    assert "val: 2 classes have no training image, such as 1" in said
    assert "train: 1 classes have no image, such as 1" in said


def test_an_image_with_two_labels_is_a_problem(root, verify):
    append(root / "train.txt", "./train/ant/0.jpg 2\n")
    status, said = verify(root)
    file = root / "train.txt"
    assert status == 1 and f"train/ant/0.jpg: label 0 in {file}, line 1 and label 2 in {file}, line 18" in said
    (root / "train.txt").write_text(file.read_text().replace("./train/ant/0.jpg 2\n", ""))
    (root / "test.txt").write_text((root / "val.txt").read_text().replace("cat/0.jpg 2", "cat/0.jpg 1"))
    status, said = verify(root)
    assert status == 1 and f"label 2 in {root / 'val.txt'}, line 3 and label 1 in {root / 'test.txt'}, line 3" in said
    append(root / "train.txt", "".join(f"train/ant/{i}.jpg 1\n" for i in range(12)) * 2)
    assert "and 5 more paths with two labels" in verify(root)[1]


def test_decode_names_files_with_the_same_bytes(root, verify):
    """In two classes or two splits, with both lines; copies within a class and split, and a val list that is the test
    list, are none."""
    photo = (root / "train/bee/0.jpg").read_bytes()
    for copy in ("train/bee/1.jpg", "train/cat/1.jpg", "test/bee/0.jpg"):
        (root / copy).write_bytes(photo)
    assert verify(root)[0] == 0
    status, said = verify(root, "--decode")
    lines = [line for line in said.splitlines() if "the same bytes" in line]
    first, train, test = f"train/bee/0.jpg ({root / 'train.txt'}, line 13)", root / "train.txt", root / "test.txt"
    assert status == 1 and len(lines) == 2 and all(first in line for line in lines)
    assert f"train/cat/1.jpg ({train}, line 17): the same bytes in two classes, 1 and 2" in lines[0]
    assert f"test/bee/0.jpg ({test}, line 3): the same bytes in two splits" in lines[1]

    (root / "train.txt").write_text("".join(line for line in train.open() if " 2\n" not in line))
    (root / "train/bee/0.jpg").write_bytes(photo + b"0")
    (root / "train/bee/1.jpg").write_bytes(photo + b"0")
    (root / "test/bee/1.jpg").write_bytes(photo)
    (root / "val.txt").write_bytes(test.read_bytes())
    assert verify(root, "--decode")[0] == 0


def test_exif_orientations_are_counted(root, verify):
    for i, orientation in enumerate((1, 6, 8)):
        image = Image.effect_noise((8, 8), 90).convert("RGB")
        exif = image.getexif()
        exif[0x0112] = orientation
        image.save(root / f"train/ant/{i}.jpg", exif=exif)
    image.save(root / "train/ant/3.jpg", format="TIFF", exif=exif)  # which Pillow turns when it is read
    assert "EXIF" not in verify(root)[1]
    status, said = verify(root, "--decode")
    assert status == 0 and "2 images have an EXIF orientation" in said and "train/ant/1.jpg" in said


def test_links_that_leave_the_root_are_information(root, verify, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    os.replace(root / "train/ant/0.jpg", outside / "0.jpg")
    (root / "train/ant/0.jpg").symlink_to(outside / "0.jpg")
    (root / "train/ant/1.jpg").unlink()
    (root / "train/ant/1.jpg").symlink_to("2.jpg")
    os.replace(root / "test/bee", outside / "bee")
    (root / "test/bee").symlink_to(outside / "bee")
    status, said = verify(root, "--decode")
    assert status == 0
    assert "train: information: 1 links lead out" in said and "test: information: 2 links lead out" in said
    assert f"the first: test/bee/0.jpg ({root / 'test.txt'}, line 3)" in said
    through_a_link = tmp_path / "link"
    through_a_link.symlink_to(root)
    assert "train: information: 1 links lead out" in verify(through_a_link)[1]


def test_sorted_trees_and_class_folders_are_verified(root, verify, tmp_path):
    listed = tmp_path / "list_val.txt"
    listed.write_text("".join(f"train/{name}/0.jpg {c}\n" for c, name in enumerate(CLASSES)))
    for file in (root / "train").glob("*/0.jpg"):
        file.unlink()
    status, said = verify(root, "--val-list", listed)
    assert status == 0 and rows(said)["val"]["layout"] == "reorganized"
    for split in COUNTS:
        (root / f"{split}.txt").unlink()
    status, said = verify(root, "--decode")
    assert status == 0 and rows(said)["train"]["images"] == "14"


def test_a_fifo_is_reported_as_missing(root, verify, tmp_path):
    (root / "test/bee/0.jpg").unlink()
    os.mkfifo(root / "test/bee/0.jpg")
    status, said = verify(root, "--decode", "--report", tmp_path / "report.txt")
    assert status == 1 and rows(said)["test"]["missing"] == "1" and "not a regular file" in said
    assert (tmp_path / "report.txt").read_text() == "missing\ttest\ttest/bee/0.jpg\tnot a regular file\n"
    for split in COUNTS:
        (root / f"{split}.txt").unlink()
    status, said = verify(root, "--decode")  # as class folders
    assert status == 1 and rows(said)["test"]["missing"] == "1" and "not a regular file" in said


def test_large_images_are_decoded_one_at_a_time(root, verify, monkeypatch):
    at_once, most, decode = 0, 0, module.to_rgb

    def counted(image):
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        image = decode(image)
        time.sleep(0.001)  # so that another thread has its turn
        at_once -= 1
        return image

    append(root / "train.txt", "".join(f"train/ant/{i % 12}.jpg 0\n" for i in range(100)))
    monkeypatch.setattr(module, "to_rgb", counted)
    monkeypatch.setattr(module, "MAX_PARALLEL_PIXELS", 8 * 8 - 1)
    monkeypatch.setattr(module.os, "cpu_count", lambda: 8)
    assert verify(root, "--decode", root / "train.txt")[0] == 0
    assert most == 1


def test_plot_needs_matplotlib_and_a_known_format(root, verify, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    assert verify(root, "--plot", tmp_path / "counts.png")[0] == 0
    with Image.open(tmp_path / "counts.png") as image:
        assert image.format == "PNG" and image.width > 300
    assert "--plot" in verify(root, "--plot", tmp_path / "counts.xyz")[1]

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, said = verify(root, "--plot", tmp_path / "counts.png")
    assert status == 2 and "pip install matplotlib" in said


def test_mistakes_end_in_one_line(root, verify, tmp_path):
    append(root / "val.txt", "val/ant/0.jpg 2000000000\n")
    for argv, words in (
        ([tmp_path / "none"], "no such folder"),
        ([root, tmp_path / "none_train.txt"], "none_train.txt"),
        ([root, tmp_path / "list.txt"], "--train-list"),
        ([root, "--val-list", root / "val.txt", root / "val.txt"], "a second val list"),
        ([tmp_path, "--report", tmp_path / "no" / "report"], str(tmp_path / "no" / "report")),  # before any reading
        ([root], "val.txt, line 4: the label 2000000000"),  # it would use up all memory
        (["--nonsense"], "--help"),
        ([], "--help"),
    ):
        status, said = verify(*argv)
        assert status == 2 and words in said, said
    append(root / "test.txt", "test/ant/0.jpg\n")
    assert "test.txt, line 7" in verify(root)[1]


def test_the_images_of_a_split_within_another_are_shared(root, verify):
    (root / "val.txt").write_text((root / "test.txt").read_text() + "val/ant/0.jpg 0\n")
    status, said = verify(root)
    assert status == 1 and "val and test share 6 images" in said
