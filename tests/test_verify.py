"""python -m datasets.verify: what it finds, how it explains it, and its exit status."""

import builtins
import os

import pytest
from PIL import Image

from datasets.prepare import verify as module
from datasets.verify import main

from .test_dataset import broken_images

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
                Image.new("RGB", (8, 8), (label, i, 0)).save(folder / path)
                lines.append(f"{path} {label}\n")
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def verify(capsys):
    """Runs the command: (exit status, stdout); on status 2 (2, the one line on stderr)."""

    def run(*argv):
        capsys.readouterr()
        status = main([str(word) for word in argv])
        output = capsys.readouterr()
        if status == 2:
            assert output.err.count("\n") == 1 and output.err.endswith("\n")
            return status, output.err
        assert output.err == ""
        return status, output.out

    return run


def test_the_same_path_below_two_splits_is_not_the_same_image(root, verify):
    """Lists relative to their split, in a tree of one folder per split."""
    for split in COUNTS:
        text = (root / f"{split}.txt").read_text()
        (root / f"{split}.txt").write_text(text.replace(f"{split}/", ""))
    status, said = verify(root)
    assert status == 1 and "train and val share 3 images; the first: ant/0.jpg" in said  # copies
    for split, red in (("val", 100), ("test", 200)):
        for file in (root / split).rglob("*.jpg"):
            Image.new("RGB", (8, 8), (red, 99, 99)).save(file)
    status, said = verify(root)
    assert (status, "share" in said) == (0, False)


def test_a_label_that_would_use_up_all_memory_is_a_mistake(root, verify):
    append(root / "val.txt", "val/ant/0.jpg 2000000000\n")
    assert verify(root) == (2, verify(root)[1]) and "val.txt, line 4: the label 2000000000" in verify(root)[1]


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
    table = rows(said)
    assert table["train"] == {
        "split": "train",
        "images": "17",
        "classes": "3",
        "many": "0",
        "medium": "0",
        "few": "3",
        "imbalance": "6.0",
        "missing": "0",
        "unreadable": "-",
        "layout": "plain",
    }
    assert table["test"]["images"] == "6" and table["test"]["imbalance"] == "1.0"
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
    report = tmp_path / "report.txt"
    status, said = verify(root, "--report", report)
    assert status == 1 and "all images are there" not in said
    assert rows(said)["test"]["missing"] == "2" and rows(said)["train"]["missing"] == "0"
    assert f"test/bee/1.jpg ({root / 'test.txt'}, line 4)" in said
    assert [line.split("\t")[:3] for line in report.read_text().splitlines()] == [
        ["missing", "val", "val/ant/none.jpg"],
        ["missing", "test", "test/bee/0.jpg"],
        ["missing", "test", "test/bee/1.jpg"],
    ]


def test_twenty_problems_are_printed_and_all_are_in_the_report(root, verify, tmp_path):
    append(root / "train.txt", "".join(f"train/ant/none{i}.jpg 0\n" for i in range(50)))
    _, said = verify(root, "--report", tmp_path / "report.txt")
    assert said.count("train/ant/none") == 20 and "and 30 more" in said
    assert len((tmp_path / "report.txt").read_text().splitlines()) == 50


def test_decode_names_every_broken_image(root, verify, tmp_path):
    broken = broken_images(root / "train/cat")
    append(root / "train.txt", "".join(f"train/cat/{name} 2\n" for name in broken))
    status, said = verify(root)
    assert status == 0 and "truncated" not in said
    status, said = verify(root, "--decode", "--report", tmp_path / "report.txt")
    assert status == 1 and rows(said)["train"]["unreadable"] == "4"
    report = dict(line.split("\t")[2:] for line in (tmp_path / "report.txt").read_text().splitlines())
    for name, reason in broken.items():
        line = next(line for line in said.splitlines() if name in line)
        assert any(word in line for word in reason.split("|")) and "train.txt, line" in line
        assert any(word in report[f"train/cat/{name}"] for word in reason.split("|"))
    assert "0 bytes" in report["train/cat/zero.jpg"]


def test_images_of_another_format_than_their_name_says_are_information(root, verify):
    Image.new("RGB", (8, 8)).save(root / "train/ant/0.jpg", format="PNG")
    Image.new("CMYK", (8, 8)).save(root / "train/ant/1.jpg")
    Image.new("L", (8, 8)).save(root / "train/ant/2.jpg")
    status, said = verify(root, "--decode")
    assert status == 0
    assert "1 images have another format than their name says" in said and "train/ant/0.jpg" in said and ": PNG" in said
    assert "1 CMYK, 1 L" in said


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


def test_repeated_entries_and_untrained_classes_are_information(root, verify):
    append(root / "train.txt", "train/ant/0.jpg 0\n")
    append(root / "val.txt", "val/cat/0.jpg 7\n")
    (root / "train.txt").write_text((root / "train.txt").read_text().replace(" 1\n", " 3\n"))
    status, said = verify(root)
    assert status == 0
    assert "train: 1 entries are in the list more than once" in said
    assert "val: 2 classes have no training image, such as 1" in said
    assert "train: 1 classes have no image, such as 1" in said


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
    through_a_link = tmp_path / "link"
    through_a_link.symlink_to(root)
    assert "train: information: 1 links lead out" in verify(through_a_link)[1]


def test_sorted_trees_and_class_folders_are_verified(root, verify, tmp_path):
    listed = tmp_path / "list_val.txt"
    listed.write_text("".join(f"train/{name}/0.jpg {c}\n" for c, name in enumerate(CLASSES)))
    for file in (root / "train").glob("*/0.jpg"):
        file.unlink()
    status, said = verify(root, "--val-list", listed)
    assert status == 0 and rows(said)["val"]["layout"] == "reorganised"
    for split in COUNTS:
        (root / f"{split}.txt").unlink()
    status, said = verify(root, "--decode")
    assert status == 0 and rows(said)["train"]["images"] == "14"


def imagenet(root):
    """Replaces the test list with one that names class folders of val/, like ImageNet-LT's."""
    lines = [f"val/{name}/ILSVRC2012_val_{c}.JPEG {c}\n" for c, name in enumerate(CLASSES)]
    (root / "test.txt").write_text("".join(lines))
    return [line.split()[0] for line in lines]


def test_the_likely_cause_of_missing_images_is_named(root, verify, tmp_path):
    paths = imagenet(root)
    only_test = ("--test-list", root / "test.txt")
    assert "wrong release" in verify(root, *only_test)[1]
    for path in paths:
        (root / "val" / os.path.basename(path)).touch()
    assert "unsorted validation folder" in verify(root, *only_test)[1]
    assert f"these files lie below {root}" in verify(tmp_path, "--train-list", root / "train.txt")[1]
    assert f"these files lie below {root}" in verify(root / "train", "--train-list", root / "train.txt")[1]
    deep = tmp_path / "kaggle" / "ILSVRC" / "Data" / "CLS-LOC"
    deep.parent.mkdir(parents=True)
    root.rename(deep)
    status, said = verify(tmp_path / "kaggle", "--train-list", deep / "train.txt")
    assert status == 1 and f"these files lie below {deep}" in said


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
    at_once, most = 0, 0
    load = module.load_rgb

    def counted(file):
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        image = load(file)
        at_once -= 1
        return image

    append(root / "train.txt", "".join(f"train/ant/{i % 12}.jpg 0\n" for i in range(500)))
    monkeypatch.setattr(module, "load_rgb", counted)
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

    def no_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError
        return import_module(name, *args, **kwargs)

    import_module = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    status, said = verify(root, "--plot", tmp_path / "counts.png")
    assert status == 2 and "pip install matplotlib" in said


def test_mistakes_end_in_one_line(root, verify, tmp_path):
    def refused(*argv):
        status, said = verify(*argv)
        assert status == 2
        return said

    assert "no such folder" in refused(tmp_path / "none")
    assert "none_train.txt" in refused(root, tmp_path / "none_train.txt")
    assert "--train-list" in refused(root, tmp_path / "list.txt")
    assert "a second val list" in refused(root, "--val-list", root / "val.txt", root / "val.txt")
    assert "--help" in refused(root, "--nonsense")
    assert "--help" in refused()
    assert str(tmp_path / "no" / "report") in refused(root, "--report", tmp_path / "no" / "report")
    append(root / "test.txt", "test/ant/0.jpg\n")
    assert "test.txt, line 7" in refused(root)
