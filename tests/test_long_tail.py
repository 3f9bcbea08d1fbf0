"""Long-tailed lists of class folders: counts, disjoint splits, links instead of copies, mistakes in one line."""

import math
import os

import numpy as np
import pytest

from datasets.lists import ImageList
from datasets.prepare.cli import main
from datasets.prepare.long_tail import SmallImages, write_long_tail
from tests.helpers import assert_command_mistake, class_image, train
from utils.errors import UserError

NAMES = ("ant", "bee", "cat", "dog")
TRAIN, TEST = 40, 3  # images per class


@pytest.fixture(scope="module", params=["test", "val"])
def source(request, tmp_path_factory):
    """A balanced tree of class folders; its second split is called test or val."""
    root = tmp_path_factory.mktemp("balanced")
    random = np.random.default_rng(0)
    for split, count in (("train", TRAIN), (request.param, TEST)):
        for label, name in enumerate(NAMES):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                class_image(random, label, 32).save(root / split / name / f"{number:02}.png")
    return root


def prepare(*words, command="long-tail"):
    return main([command, *map(str, words)])


def read_lists(folder) -> dict[str, list]:
    lists = {split: ImageList.from_file(folder / f"{split}.txt") for split in ("train", "val", "test")}
    return {split: [(x.path(i), int(x.labels[i])) for i in range(len(x))] for split, x in lists.items()}


def counts(entries) -> list[int]:
    return np.bincount([label for _, label in entries], minlength=len(NAMES)).tolist()


@pytest.mark.parametrize(("imbalance", "most", "held"), [(10, 36, 4), (4, 20, 20), (1, 5, 0)])
def test_classes_have_exponentially_fewer_images_in_the_order_of_their_names(source, tmp_path, imbalance, most, held):
    out = tmp_path / "out"
    flags = ["--imbalance", imbalance, "--max-per-class", most, "--held-out", held, "--out", out]
    assert prepare(source, *flags) == 0
    lists = read_lists(out)
    assert counts(lists["train"]) == [math.floor(most * imbalance ** (-c / 3) + 1e-9) for c in range(4)]
    assert counts(lists["test"]) == [TEST] * 4
    assert counts(lists["val"]) == ([held] * 4 if held else [TEST] * 4)
    assert all(path.split("/")[1] == NAMES[label] for entries in lists.values() for path, label in entries)
    assert (out / "classes.txt").read_text().split() == list(NAMES)
    paths = {split: [path for path, _ in entries] for split, entries in lists.items()}
    assert len(set(paths["train"])) == len(paths["train"]) and not {*paths["train"]} & {*paths["test"]}
    assert not {*paths["train"]} & {*paths["val"]} and (paths["val"] == paths["test"]) == (held == 0)


def test_by_default_the_first_class_gets_what_the_smallest_one_can_give(source, tmp_path, capsys):
    assert prepare(source, "--held-out", 4, "--imbalance", 6, "--out", tmp_path / "out") == 0
    assert counts(read_lists(tmp_path / "out")["train"])[::3] == [TRAIN - 4, (TRAIN - 4) // 6]
    assert "validation" in capsys.readouterr().out
    assert prepare(source, "--imbalance", 6, "--out", tmp_path / "none held out") == 0
    assert counts(read_lists(tmp_path / "none held out")["train"])[0] == TRAIN
    assert "test images are used for validation too" in capsys.readouterr().out


def test_a_tree_with_val_and_test_keeps_both(source, tmp_path, capsys):
    for split in ("val", "test"):
        (tmp_path / split).symlink_to(source / next(s for s in ("test", "val") if (source / s).is_dir()))
    (tmp_path / "train").symlink_to(source / "train")
    assert prepare(tmp_path, "--imbalance", 4, "--out", tmp_path / "out") == 0
    lists = read_lists(tmp_path / "out")
    assert {path.split("/")[0] for path, _ in lists["val"]} == {"val"}
    assert {path.split("/")[0] for path, _ in lists["test"]} == {"test"}
    assert "too" not in capsys.readouterr().out


def test_no_image_is_copied_and_out_is_the_folder_to_train_with(source, tmp_path):
    out = tmp_path / "out"
    assert prepare(source, "--imbalance", 10, "--held-out", 2, "--out", out) == 0
    assert sum(len(files) for _, _, files in os.walk(out)) == 4  # the lists, and the names of the classes
    assert (out / "train").resolve() == source / "train"
    train("i", out, tmp_path / "run", "--epochs", 1)


def test_running_again_changes_nothing_and_another_selection_needs_overwrite(source, tmp_path, capsys):
    flags = [source, "--imbalance", 10, "--held-out", 2, "--out", tmp_path / "out"]
    assert prepare(*flags) == prepare(*flags) == 0
    first = read_lists(tmp_path / "out")
    capsys.readouterr()
    assert_command_mistake((prepare(*flags, "--seed", 1), *capsys.readouterr()), "train.txt", "--overwrite")
    assert read_lists(tmp_path / "out") == first
    assert prepare(*flags, "--seed", 1, "--overwrite") == 0
    second = read_lists(tmp_path / "out")
    assert second["train"] != first["train"] and counts(second["train"]) == counts(first["train"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--held-out 40", ["--held-out 40", "ant", "40 images"]),
        ("--imbalance 4 --held-out 5 --max-per-class 36", ["--max-per-class 36", "ant", "at most 35", "--held-out"]),
        ("--imbalance 4 --max-per-class 41", ["--max-per-class 41", "at most 40"]),
        ("--imbalance 41", ["--imbalance 41", "at most 40"]),
        ("--imbalance 0.5", ["--imbalance"]),
    ],
)
def test_what_the_classes_cannot_give_is_refused_in_one_line(source, tmp_path, capsys, flags, words):
    status = prepare(source, *flags.split(), "--out", tmp_path / "out")
    assert_command_mistake((status, *capsys.readouterr()), *words)
    assert not (tmp_path / "out").exists()


def test_other_mistakes_are_one_line(source, tmp_path, capsys):
    def fails(*words, command="long-tail"):
        return prepare(*words, command=command), *capsys.readouterr()

    (tmp_path / "taken" / "train").mkdir(parents=True)
    assert_command_mistake(fails(tmp_path / "absent", "--out", tmp_path / "out"), "absent", "no such folder")
    assert_command_mistake(
        fails(source / "train", "--out", tmp_path / "out"), "train/<class>/<image>", "prepare folder"
    )
    assert_command_mistake(fails(source, "--imbalance", 4, "--out", source), "--out", "another folder")
    assert_command_mistake(fails(source, "--imbalance", 4, "--out", tmp_path / "taken"), "taken/train", "not a link")
    cifar = ["--source", source, "--out", tmp_path / "out"]
    assert_command_mistake(fails(*cifar, command="cifar10-lt"), "4 class folders", "cifar10-lt 10")


def test_cifar_takes_a_tree_of_class_folders_as_source(tmp_path, capsys):
    for split, count in (("train", 6), ("test", 1)):
        for label in range(10):
            folder = tmp_path / "tree" / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                class_image(np.random.default_rng(0), label, 32).save(folder / f"{number}.png")
    flags = ["--source", tmp_path / "tree", "--imbalance", 6, "--out", tmp_path / "out"]
    assert prepare(*flags, command="cifar10-lt") == 0
    assert (tmp_path / "out" / "train").is_symlink() and "6 to 1 per class" in capsys.readouterr().out


def test_writing_images_never_touches_those_behind_a_link(source, tmp_path):
    """OUT was made with --source before: its folders are links to the user's own images."""
    out, pixels, labels = tmp_path / "out", np.zeros((8, 32, 32, 3), np.uint8), np.repeat(np.arange(4), 2)
    assert prepare(source, "--imbalance", 4, "--out", out) == 0
    images = sorted(source.rglob("*.png"))
    with pytest.raises(UserError, match=r"train: is a link to .* another --out"):
        write_long_tail(SmallImages(list(NAMES), pixels, labels, pixels, labels), out, None, 1, 0, 0, overwrite=True)
    assert sorted(source.rglob("*.png")) == images


@pytest.mark.parametrize("own", ["train/cats/holiday.png", "val/0_ant/photo.png", "train/0_ant/00000.jpg"])
def test_writing_images_never_removes_those_of_someone_else(tmp_path, own):
    pixels, labels = np.zeros((8, 32, 32, 3), np.uint8), np.repeat(np.arange(4), 2)
    data = SmallImages(list(NAMES), pixels, labels, pixels, labels)
    (tmp_path / own).parent.mkdir(parents=True)
    (tmp_path / own).touch()
    with pytest.raises(UserError, match=rf"{own}: was not written by this command, and stays; choose another --out"):
        write_long_tail(data, tmp_path, None, 1, 0, 0, overwrite=True)
    assert [file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*.*")] == [own]
    (tmp_path / own).unlink()
    (tmp_path / "train" / "linked").mkdir(parents=True)
    (tmp_path / "val").mkdir(exist_ok=True)
    (tmp_path / "val" / "0_ant_link").symlink_to(tmp_path / "train")
    with pytest.raises(UserError, match=r"0_ant_link: is a link to .*, which stays"):
        write_long_tail(data, tmp_path, None, 1, 0, 0, overwrite=True)


def test_files_that_are_not_images_do_not_keep_a_selection_from_being_written(tmp_path):
    """File browsers leave them behind in folders that were opened."""
    pixels, labels = np.zeros((8, 32, 32, 3), np.uint8), np.repeat(np.arange(4), 2)
    data = SmallImages(list(NAMES), pixels, labels, pixels, labels)
    write_long_tail(data, tmp_path, None, 1, 0, 0, overwrite=False)
    left = [tmp_path / "train" / ".DS_Store", tmp_path / "train" / "0_ant" / "Thumbs.db"]
    for file in left:
        file.touch()
    write_long_tail(data, tmp_path, None, 1, 0, 0, overwrite=False)
    write_long_tail(data, tmp_path, 1, 1, 1, 0, overwrite=True)
    assert all(file.exists() for file in left) and counts(read_lists(tmp_path)["train"]) == [1] * 4
