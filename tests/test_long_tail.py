"""Long-tailed selections: counts, small data sets as PNG files, links to class folders, mistakes in one line."""

import errno
import gzip
import hashlib
import math
import os
import pickle
import struct
import tarfile
from fractions import Fraction
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from datasets.prepare import long_tail
from datasets.prepare.cli import build_parser
from datasets.prepare.long_tail import Selection, SmallImages, long_tail_counts, pick, write_long_tail
from datasets.splits import find_splits
from tests.helpers import results_of, train_all
from tests.helpers_prepare import class_counts, everything, fails, read_lists, stamps, succeeds
from utils.errors import UserError
from utils.images import load_rgb

NAMES = ("ant", "bee", "cat", "dog")
TRAIN, TEST = 40, 3  # images per class


# Counts and choice


def test_long_tail_counts_are_the_published_ones_and_exact_powers_are_not_rounded_down():
    assert [sum(long_tail_counts(500, imbalance, 100)) for imbalance in (100, 50, 10)] == [10847, 12608, 19573]
    assert [sum(long_tail_counts(5000, imbalance, 10)) for imbalance in (100, 50, 10)] == [12406, 13996, 20431]
    assert long_tail_counts(500, "100", 10) == [500, 299, 179, 107, 64, 38, 23, 13, 8, 5]
    assert long_tail_counts(3**9, 3**9, 10) == [3**k for k in range(9, -1, -1)]


@given(st.integers(1, 10**6), st.fractions(1, 1000, max_denominator=10), st.integers(2, 40))
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


@pytest.mark.parametrize("wrong", ["0.5", "x", "1/0", "nan", "1e400", "1e9999999"])
def test_an_imbalance_is_a_number_from_1_to_a_million(wrong):
    with pytest.raises(UserError, match="--imbalance"):
        build_parser().parse_args(["cifar10-lt", "--out", "out", "--imbalance", wrong])


# Small data sets


def write_idx(file, array, packed):
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}i", *array.shape)
    open_file = gzip.open if packed else open
    with open_file(f"{file}.gz" if packed else file, "wb") as target:
        target.write(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def fashion(tmp_path):
    """A Fashion-MNIST of 60 training (gzipped) and 2 test images a class, whose first two pixels are their number."""
    folder = tmp_path / "idx"
    folder.mkdir()
    for name, each in (("train", 60), ("t10k", 2)):
        labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), each))
        images = np.zeros((len(labels), 28, 28), np.uint8)
        images[:, 0, 0], images[:, 0, 1] = np.divmod(np.arange(len(labels)), 256)
        write_idx(folder / f"{name}-images-idx3-ubyte", images, packed=name == "train")
        write_idx(folder / f"{name}-labels-idx1-ubyte", labels, packed=name == "train")
    return folder


def test_fashion_mnist_lt_is_written_once_completed_or_overwritten(tmp_path, fashion, capsys):
    out = tmp_path / "out"
    command = ("fashion-mnist-lt", "--out", out, "--source", fashion, "--max-per-class", 10, "--imbalance", 10)
    said = succeeds(capsys, *command)
    lists = read_lists(out)
    counts = long_tail_counts(10, 10, 10)
    assert {split: class_counts(entries) for split, entries in lists.items()} == {
        "train": counts, "val": [50] * 10, "test": [2] * 10,
    }  # fmt: skip
    assert f"{sum(counts)} training (10 to 1 per class), 500 validation, 20 test images" in said
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 60))
    seen = set()
    for path, label in lists["train"] + lists["val"]:
        pixels = np.asarray(load_rgb(out / path))
        number = int(pixels[0, 0, 0]) * 256 + int(pixels[0, 1, 0])
        assert pixels.shape == (28, 28, 3) and labels[number] == label and number not in seen
        seen.add(number)
    assert (out / "classes.txt").read_text().splitlines()[9] == "Ankle boot"

    before, first = stamps(out), everything(out)
    succeeds(capsys, *command)
    assert stamps(out) == before
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


def test_all_stages_train_on_fashion_mnist_lt(tmp_path, fashion, capsys):
    data = tmp_path / "data"
    succeeds(capsys, "fashion-mnist-lt", "--out", data, "--source", fashion, "--imbalance", 4, "--max-per-class", 8)
    for folder in train_all(data, tmp_path, "--epochs", 1).values():
        for result in results_of(folder):
            assert result["train_counts"] == [8, 6, 5, 5, 4, 3, 3, 2, 2, 2] and result["count"] == 20
            assert result["many"] is result["medium"] is None and result["few"] is not None


def test_fashion_mnist_mistakes_end_in_one_line(tmp_path, fashion, capsys, monkeypatch):
    out = tmp_path / "out"
    command = ("fashion-mnist-lt", "--out", out, "--source")
    assert "--seed" in fails(capsys, *command, fashion, "--seed", -1)
    assert "train-images-idx3-ubyte" in fails(capsys, *command, tmp_path)
    os.mkfifo(tmp_path / "train-images-idx3-ubyte")
    assert "train-images-idx3-ubyte" in fails(capsys, *command, tmp_path)
    for labels in (np.full(20, 10), np.zeros(19)):
        write_idx(fashion / "t10k-labels-idx1-ubyte", labels, packed=False)
        assert f"20 images, {len(labels)} labels" in fails(capsys, *command, fashion)
    damaged = next(fashion.glob("train-images*"))
    for content in (damaged.read_bytes()[:-500], b"<html>"):
        damaged.write_bytes(content)
        assert "train-images-idx3-ubyte: damaged" in fails(capsys, *command, fashion)
    monkeypatch.setattr(long_tail, "DEBIAN_FASHION_MNIST", tmp_path / "none")
    error = fails(capsys, *command[:-1], "--url", "http://127.0.0.1:9/")
    assert "dataset-fashion-mnist" in error and "--source" in error
    assert not (out / "train.txt").exists()


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A CIFAR-10 of 4 training images and 1 test image per class, its folder and its archive, with their checksums."""
    folder, archive = tmp_path / "source" / "cifar-10-batches-py", tmp_path / "elsewhere" / "cifar-10-python.tar.gz"
    for parent in (folder, archive.parent):
        parent.mkdir(parents=True)
    random = np.random.default_rng(0)

    def write(name, value):
        (folder / name).write_bytes(pickle.dumps(value))
        return name, hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batch(each):
        labels = random.permutation(np.repeat(np.arange(10), each)).tolist()
        return {"data": random.integers(0, 256, (len(labels), 3072), dtype=np.uint8), "labels": labels}

    name, md5 = write("batches.meta", {"label_names": [f"name {i}" for i in range(10)]})

    class Small(long_tail.CIFAR10):
        train_list = [write("data_batch_1", batch(4))]
        test_list = [write("test_batch", batch(1))]
        meta = {"filename": name, "key": "label_names", "md5": md5}

    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)
    Small.tgz_md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(long_tail.CIFAR, 10, Small)
    return folder


def test_cifar_lt_is_the_same_from_every_kind_of_source(tmp_path, cifar, capsys):
    archive = tmp_path / "elsewhere" / "cifar-10-python.tar.gz"
    results = []
    for number, source in enumerate((cifar, cifar.parent, archive, archive.parent)):
        out = tmp_path / f"out{number}"
        said = succeeds(capsys, "cifar10-lt", "--out", out, "--source", source, "--imbalance", 4)
        assert "the test images are used for validation too" in said
        results.append(everything(out))
    assert all(result == results[0] for result in results)
    lists = read_lists(out)
    assert class_counts(lists["train"]) == long_tail_counts(4, 4, 10)
    assert lists["val"] == lists["test"] and len(lists["test"]) == 10
    data = pickle.loads((cifar / "data_batch_1").read_bytes())
    for path, label in lists["train"]:
        number = int(Path(path).stem)
        assert data["labels"][number] == label
        pixels = np.asarray(Image.open(out / path))
        assert np.array_equal(pixels, data["data"][number].reshape(3, 32, 32).transpose(1, 2, 0))


def test_cifar_mistakes_end_in_one_line(tmp_path, cifar, capsys, monkeypatch):
    out, archive = tmp_path / "out", tmp_path / "elsewhere" / "cifar-10-python.tar.gz"
    command = ("cifar10-lt", "--out", out)
    assert archive.name in fails(capsys, *command, "--source", tmp_path / "nowhere")
    assert "download failed" in fails(capsys, *command, "--url", "http://127.0.0.1:9/")
    (cifar / "data_batch_1").write_bytes(b"altered")
    assert "damaged" in fails(capsys, *command, "--source", cifar)
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(tarfile.TarFile, "extractall", mock.Mock(side_effect=full))
    error = fails(capsys, *command, "--source", archive)
    assert "No space left" in error and "published" not in error
    archive.write_bytes(archive.read_bytes()[:-1])
    assert f"{archive}: is not the published" in fails(capsys, *command, "--source", archive)
    assert not list(out.glob("*.txt"))


def test_cifar_takes_a_tree_of_class_folders_as_source(tmp_path, capsys):
    tree = write_folders(tmp_path / "tree", [f"class{label}" for label in range(10)], {"train": 6, "test": 1})
    command = ("cifar10-lt", "--source", tree, "--imbalance", 6, "--out", tmp_path / "out")
    assert "6 to 1 per class" in succeeds(capsys, *command)
    assert (tmp_path / "out" / "train").is_symlink()


# Class folders


def write_folders(root, names, counts):
    """root/<split>/<class>/<number>.png, empty files; counts: images per class, by split."""
    for split, count in counts.items():
        for name in names:
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                (root / split / name / f"{number:02}.png").touch()
    return root


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A balanced tree of class folders."""
    return write_folders(tmp_path_factory.mktemp("balanced"), NAMES, {"train": TRAIN, "test": TEST})


@pytest.mark.parametrize(("imbalance", "most", "held"), [(10, 36, 4), (6, None, 4), (6, None, 0)])
def test_classes_have_exponentially_fewer_images_in_the_order_of_their_names(
    source, tmp_path, capsys, imbalance, most, held
):
    """By default the first gets what the smallest one can give. No image is copied, and OUT can be trained with."""
    out = tmp_path / "out"
    flags = ["--imbalance", imbalance, "--held-out", held, "--out", out, *(["--max-per-class", most] if most else [])]
    said = succeeds(capsys, "long-tail", source, *flags)
    assert ("test images are used for validation too" in said) == (held == 0)
    lists, most = read_lists(out), most or TRAIN - held
    counts = [math.floor(most * imbalance ** (-c / 3) + 1e-9) for c in range(4)]
    assert {split: class_counts(entries) for split, entries in lists.items()} == {
        "train": counts, "val": [held or TEST] * 4, "test": [TEST] * 4,
    }  # fmt: skip
    assert all(path.split("/")[1] == NAMES[label] for entries in lists.values() for path, label in entries)
    assert (out / "classes.txt").read_text().split() == list(NAMES)
    paths = {split: {path for path, _ in entries} for split, entries in lists.items()}
    assert len(paths["train"]) == len(lists["train"]) and not paths["train"] & (paths["test"] | paths["val"])
    assert (lists["val"] == lists["test"]) == (held == 0)
    assert sum(len(files) for _, _, files in os.walk(out)) == 4  # the lists, and the names of the classes
    assert (out / "train").resolve() == source / "train"
    assert not any(split.missing for split in find_splits(out, {}).values())


def test_val_is_tested_on_if_there_is_no_test_and_both_are_kept(tmp_path, capsys):
    def used(splits):
        """The first folder of the paths in each list."""
        write_folders(tmp_path, NAMES, dict.fromkeys(splits, 4))
        said = succeeds(capsys, "long-tail", tmp_path, "--imbalance", 4, "--out", tmp_path / "out", "--overwrite")
        return "too" in said, [{path.split("/")[0] for path, _ in of} for of in read_lists(tmp_path / "out").values()]

    assert used(["train", "val"]) == (True, [{"train"}, {"val"}, {"val"}])
    assert used(["test"]) == (False, [{"train"}, {"val"}, {"test"}])


def test_running_again_changes_nothing_and_another_selection_needs_overwrite(source, tmp_path, capsys):
    command = ("long-tail", source, "--imbalance", 10, "--held-out", 2, "--out", tmp_path / "out")
    succeeds(capsys, *command)
    first, before = read_lists(tmp_path / "out"), stamps(tmp_path / "out")
    succeeds(capsys, *command)
    error = fails(capsys, *command, "--seed", 1)
    assert "train.txt" in error and "--overwrite" in error
    assert stamps(tmp_path / "out") == before
    succeeds(capsys, *command, "--seed", 1, "--overwrite")
    second = read_lists(tmp_path / "out")
    assert second["train"] != first["train"] and class_counts(second["train"]) == class_counts(first["train"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--held-out 40", ["--held-out 40", "ant", "40 images"]),
        ("--imbalance 4 --held-out 5 --max-per-class 36", ["--max-per-class 36", "ant", "40 images", "--held-out"]),
        ("--imbalance 41", ["--imbalance 41", "at most 40"]),
    ],
)
def test_what_the_classes_cannot_give_is_refused_in_one_line(source, tmp_path, capsys, flags, words):
    error = fails(capsys, "long-tail", source, *flags.split(), "--out", tmp_path / "out")
    assert all(word in error for word in words), error
    assert not (tmp_path / "out").exists()


def test_other_mistakes_are_one_line(source, tmp_path, capsys):
    write_folders(tmp_path / "taken", NAMES, {"train": 0})
    one = write_folders(tmp_path / "one", ["ant"], {"train": 1, "val": 1})
    absent, folders = tmp_path / "absent", source / "train"
    for (command, *argv), *words in (
        (["long-tail", absent], f"{absent}: must have train/<class>/<image>", "prepare folder"),
        (["long-tail", folders], f"{folders}: must have train/<class>/<image>", "prepare folder"),
        (["long-tail", source, "--out", source], "--out", "another folder"),
        (["long-tail", source, "--out", tmp_path / "taken"], "taken/train", "not a link", "--out"),
        (["long-tail", one], "has 1 class folders"),
        (["cifar10-lt", "--source", source], f"{folders}: has 4 class folders, not 10"),
    ):
        error = fails(capsys, command, "--imbalance", 4, "--out", tmp_path / "out", *argv)
        assert all(word in error for word in words), error


# What is already in OUT


def write_small(out, *selection, overwrite):
    """Writes images of four classes, two of each; by default all of them."""
    pixels, labels = np.zeros((8, 32, 32, 3), np.uint8), np.repeat(np.arange(4), 2)
    data = SmallImages(list(NAMES), pixels, labels, pixels, labels)
    write_long_tail(data, out, Selection(*(selection or (None, 1, 0, 0))), overwrite=overwrite)


def test_writing_images_never_touches_those_behind_a_link(source, tmp_path, capsys):
    """OUT was made with --source before: its folders are links to the user's own images."""
    out = tmp_path / "out"
    succeeds(capsys, "long-tail", source, "--imbalance", 4, "--out", out)
    images = sorted(source.rglob("*.png"))
    with pytest.raises(UserError, match=r"train: is a link to .* another --out"):
        write_small(out, overwrite=True)
    assert sorted(source.rglob("*.png")) == images


@pytest.mark.parametrize("own", ["train/cats/holiday.png", "val/0_ant/photo.png", "train/0_ant/00000.jpg"])
def test_writing_images_never_removes_those_of_someone_else(tmp_path, own):
    (tmp_path / own).parent.mkdir(parents=True)
    (tmp_path / own).touch()
    with pytest.raises(UserError, match=rf"{own}: was not written by this command, and stays; choose another --out"):
        write_small(tmp_path, overwrite=True)
    assert [file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*.*")] == [own]
    (tmp_path / own).unlink()
    (tmp_path / "train" / "linked").mkdir(parents=True)
    (tmp_path / "val").mkdir(exist_ok=True)
    (tmp_path / "val" / "0_ant_link").symlink_to(tmp_path / "train")
    with pytest.raises(UserError, match=r"0_ant_link: is a link to .*, which stays"):
        write_small(tmp_path, overwrite=True)


def test_files_that_are_not_images_do_not_keep_a_selection_from_being_written(tmp_path):
    """File browsers leave them behind in folders that were opened."""
    write_small(tmp_path, overwrite=False)
    left = [tmp_path / "train" / ".DS_Store", tmp_path / "train" / "0_ant" / "Thumbs.db"]
    for file in left:
        file.touch()
    write_small(tmp_path, overwrite=False)
    write_small(tmp_path, 1, 1, 1, 0, overwrite=True)
    assert all(file.exists() for file in left) and class_counts(read_lists(tmp_path)["train"]) == [1] * 4
