"""Folders of images as every command reads them: each image once, nothing vanishes in silence, classes keep numbers."""

import os
import shlex
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.splits import find_splits, unlisted_note
from datasets.verify import main as verify
from tests.helpers import LAST, SPLITS, call, class_image, results_of, run_stage, stage_flags, without_privileges
from tests.helpers_prepare import fails, read_lists, succeeds
from utils import predict, report
from utils.groups import numbering_note

NAMES = ("ant", "cat", "dog")
HIDDEN = "left out: 4 hidden folders or folders of thumbnails, such as @eaDir"


def write_folders(root, names=NAMES, count=8):
    """root/<class>/<number>.jpg."""
    random = np.random.default_rng([*os.fsencode(Path(root).name)])  # no image is in two splits
    for label, name in enumerate(names):
        (Path(root) / name).mkdir(parents=True)
        for number in range(count):
            class_image(random, label, 32).save(Path(root) / name / f"{number}.jpg")
    return Path(root)


def write_splits(root, names=NAMES):
    """Class folders without lists, for a training."""
    for split in SPLITS:
        write_folders(root / split, names)
    return root


def litter(root):
    """What browsers, notebooks and NAS systems leave in folders of photos."""
    photo = (root / "ant/0.jpg").read_bytes()
    for file in (
        "cat/.ipynb_checkpoints/1-checkpoint.jpg",
        "cat/@eaDir/1.jpg/SYNOPHOTO_THUMB_XL.jpg",
        "dog/.@__thumb/s1.jpg",
        "@eaDir/2.jpg",
        "cat/more/2.jfif",
    ):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(photo)


def link_around(root):
    """Links to images and folders that are there anyway, to folders around them, and to one image elsewhere."""
    elsewhere = root.parent / f"{root.name} elsewhere"
    (elsewhere / "below").mkdir(parents=True)
    (root / "dog/0.jpg").rename(elsewhere / "below/0.jpg")
    for link, target in {
        "cat/again": ".", "cat/up": "..", "dog/up": "..", "dog/around": "../../..", "ant/of the next": "../cat",
        "ant/0 too.jpg": "../cat/0.jpg", "dog/0.jpg": elsewhere / "below/0.jpg", "dog/1 too.jpg": "1.jpg",
        "dog/elsewhere": elsewhere,
    }.items():  # fmt: skip
        (root / link).symlink_to(target)


def list_flags(folder):
    return [flag for split in SPLITS for flag in (f"--{split}-list", folder / f"{split}.txt")]


@contextmanager
def refused(folder, mode=0):
    """Lets nobody read or search a folder; mode: what is allowed."""
    folder.chmod(mode)
    try:
        with without_privileges():
            yield
    finally:
        folder.chmod(0o755)


def short_run(data, out, *flags):
    return run_stage("i", data, out, "-b", 4, "--epochs", 1, "--con-weight", 0, *flags)


def test_every_image_comes_once_and_what_is_left_out_is_counted(tmp_path, capsys, trained):
    data = write_splits(tmp_path / "data")
    link_around(data / "train")
    for split in SPLITS:
        litter(data / split)
    said = succeeds(capsys, "folder", data, "--out", tmp_path / "lists")
    expected = {(f"train/{name}/{i}.jpg", label) for label, name in enumerate(NAMES) for i in range(8)}
    listed = read_lists(tmp_path / "lists")
    moved = ("train/dog/0.jpg", "train/dog/elsewhere/below/0.jpg")  # one image: its folder comes before its link
    assert {entry if entry[0] != moved[1] else (moved[0], 2) for entry in listed["train"]} == expected
    assert len(listed["train"]) == 24 and {len(entries) for entries in listed.values()} == {24}

    plain = succeeds(capsys, "folder", data / "train", "--out", tmp_path / "plain", "--val", 2, "--test", 2)
    drawn = [path for entries in read_lists(tmp_path / "plain").values() for path, _ in entries]
    assert len(drawn) == len(set(drawn)) == 24
    long_tail = succeeds(capsys, "long-tail", data, "--imbalance", 2, "--out", tmp_path / "lt")
    assert "17 training (8 to 4 per class), 24 validation, 24 test" in long_tail
    assert verify([str(data)]) == 0
    verified = capsys.readouterr().out
    outcome = short_run(data, tmp_path / "run")
    assert outcome.status == 0 and results_of(tmp_path / "run")[0]["train_counts"] == [8] * 3
    for text in (said, plain, long_tail, verified, outcome.out):
        assert HIDDEN in text and "left out: 1 files with the ending .jfif" in text, text
        assert "left out: 8 links to what is there without them, such as ant/0 too.jpg" in text, text

    assert predict.main([str(trained["i"] / LAST), str(data / "train"), "--device", "cpu"]) == 1
    found = capsys.readouterr()
    assert len(found.out.splitlines()) == 24 and HIDDEN in found.err and "cat/more/2.jfif" in found.err


def test_photos_in_no_list_are_counted(tmp_path, capsys):
    data = write_folders(tmp_path / "my photos")
    succeeds(capsys, "folder", data)
    out = tmp_path / "lists"
    succeeds(capsys, "folder", data, "--out", out, "--val", 2, "--seed", 5)
    lists = list_flags(out)
    given = dict(zip(SPLITS, lists[1::2], strict=True))
    assert unlisted_note(find_splits(data, {})) == unlisted_note(find_splits(data, given)) == []
    for name in ("new.jpg", "new too.jpg"):
        os.link(data / "cat/0.jpg", data / "cat" / name)
    note = f"2 photos below {data} are in no list"
    assert note in fails(capsys, "folder", data)
    outcome = short_run(data, tmp_path / "run", *lists)
    assert outcome.status == 0 and outcome.out.count(note) == 1
    for flags in ([], lists):
        assert verify([str(data), *map(str, flags)]) == 0
        assert note in capsys.readouterr().out
    (note,) = unlisted_note(find_splits(data, given))
    before = read_lists(out)
    succeeds(capsys, *shlex.split(note.split("; ")[1].removesuffix(" adds them"))[3:])
    assert unlisted_note(find_splits(data, given)) == [] and {*before["val"]} <= {*read_lists(out)["val"]}
    (data / "cat" / "new.jpg").unlink()
    remedy = "run datasets.prepare folder again, with --overwrite and the flags of its last run"
    assert remedy in short_run(data, tmp_path / "gone", *lists).err
    (data / "prepared.json").unlink()  # other lists need not have all images
    assert unlisted_note(find_splits(data, {})) == []


def test_photos_beside_folders_for_splits_are_not_counted(tmp_path, capsys):
    for split in ("train", "val", "test", "unlabeled"):
        write_folders(tmp_path / split)
    succeeds(capsys, "folder", tmp_path)
    assert unlisted_note(find_splits(tmp_path, {})) == []


def test_a_renamed_class_has_its_new_name_in_results_of_old_checkpoints(tmp_path, capsys):
    data, run = write_folders(tmp_path / "photos"), tmp_path / "run"
    succeeds(capsys, "folder", data)
    assert short_run(data, run).status == 0
    (data / "ant").rename(data / "zebra")
    succeeds(capsys, "folder", data, "--overwrite")
    outcome = short_run(data, tmp_path / "evaluation", "--evaluate", "--resume", run / LAST)
    assert outcome.status == 0 and "class 0 is 'ant' in" in outcome.out and "'zebra' in the data" in outcome.out
    (before,), (after,) = results_of(run), results_of(tmp_path / "evaluation")
    assert (before["classes"], after["classes"]) == (["ant", "cat", "dog"], ["zebra", "cat", "dog"])
    assert before["confusion"] == after["confusion"]


def test_files_of_windows_are_no_photos_and_others_are_named(tmp_path, capsys):
    data = write_splits(tmp_path / "data")
    for name in ("Thumbs.db", "desktop.ini", "a.heic", "b.heic"):
        (data / "train/cat" / name).write_bytes(b"none")
    named = "left out: 2 files with the ending .heic, such as cat/a.heic; convert them"
    for said in (short_run(data, tmp_path / "run").out, succeeds(capsys, "folder", data)):
        assert said.count("left out") == 1 and named in said


def test_numbers_and_order_are_those_of_torchvision(tmp_path, capsys):
    """So that an old seed draws the same lists."""
    from torchvision.datasets import ImageFolder

    root = write_folders(tmp_path / "train", ("b-c", "b", "10", "B"), 2)
    for folder in ("b/x/y", "b/x-y"):
        write_folders(root / folder, ("1", "0"), 2)
    write_folders(tmp_path / "val", ("b",), 1)
    succeeds(capsys, "folder", tmp_path)
    theirs = [(os.path.relpath(file, tmp_path), label) for file, label in ImageFolder(root).samples]
    assert read_lists(tmp_path)["train"] == theirs


@pytest.mark.parametrize(
    ("place", "mode"),
    [("train/cat", 0), ("train/ant/deeper", 0o444), ("elsewhere", 0)],  # 444: names can be listed, not files opened
)
def test_a_folder_that_may_not_be_read_is_named_everywhere(tmp_path, capsys, trained, place, mode):
    data = write_splits(tmp_path / "data")
    folder = name = data / place
    if place == "elsewhere":
        folder, name = write_folders(tmp_path / place, ("a",)), data / "train/bee"
        name.symlink_to(folder)
    folder.mkdir(exist_ok=True)
    with refused(folder, mode):
        run = short_run(data, tmp_path / "run")
        assert run.status == 2 and run.err.count("\n") == 1
        errors = [run.err]
        for argv in (["folder", data], ["folder", data / "train"], ["long-tail", data, "--out", tmp_path / "lt"]):
            errors.append(fails(capsys, *argv))
        assert verify([str(data)]) == 2
        assert predict.main([str(trained["i"] / LAST), str(data / "train"), "--device", "cpu"]) == 2
        assert report.main([str(data)]) == 2
        errors += capsys.readouterr().err.splitlines()
    assert len(errors) == 7 and all(f"{name}" in line and "Permission denied" in line for line in errors), errors


def test_a_path_in_a_folder_that_may_not_be_searched_is_not_called_absent(tmp_path, capsys, trained):
    data = write_folders(tmp_path / "data")
    with refused(data):
        assert predict.main([str(trained["i"] / LAST), str(data / "cat/0.jpg"), "--device", "cpu"]) == 2
        assert "Permission denied" in capsys.readouterr().err
        outcome = short_run(data, tmp_path / "run")
        assert outcome.status == 2 and "Permission denied" in outcome.err and str(data) in outcome.err


def test_a_class_folder_that_is_a_broken_link_does_not_renumber_the_others(tmp_path, capsys):
    data = write_splits(tmp_path / "data")
    (data / "train/bee").symlink_to("/gone/bee")
    outcome = short_run(data, tmp_path / "run")
    for error in (outcome.err, fails(capsys, "folder", data), fails(capsys, "folder", data / "train")):
        assert "train/bee: a broken link, to /gone/bee" in error


@pytest.mark.parametrize("place", ["data", "data/train", "data/val.txt"])
def test_what_leads_nowhere_is_no_missing_data(tmp_path, capsys, place):
    data = write_splits(tmp_path / "data")
    if place.endswith(".txt"):
        succeeds(capsys, "folder", data)
    (tmp_path / place).rename(tmp_path / "gone")
    (tmp_path / place).symlink_to("/gone/elsewhere")
    outcome = short_run(data, tmp_path / "run")
    assert outcome.status == 2 and f"{tmp_path / place}: a broken link, to /gone/elsewhere" in outcome.err


def test_photos_that_no_class_has_are_counted(tmp_path, capsys):
    """Those beside the class folders, and behind a link that leads nowhere; other links do not hide an image."""
    data = write_folders(tmp_path / "data")
    (data / "cat/more").symlink_to("/gone/cats")
    (data / "cat/7.jpg").rename(data / "7.jpg")
    for name in ("7.bak", "7.jpg"):
        (data / "cat" / name).symlink_to(tmp_path / "elsewhere.jpg")
    (data / "7.jpg").rename(tmp_path / "elsewhere.jpg")
    (data / "dog/7.jpg").rename(data / "7.jpg")
    said = succeeds(capsys, "folder", data)
    assert "left out: 1 images beside the class folders, such as 7.jpg" in said
    assert "left out: 1 links that lead nowhere, such as cat/more" in said
    listed = [path for entries in read_lists(data).values() for path, _ in entries]
    assert len(listed) == 23 and "cat/7.jpg" in listed


# ---- the numbers and names of the classes


@pytest.mark.parametrize("pattern", ["{}", "class{}", "{}_of_them", "2024_{}"])
def test_names_that_text_orders_otherwise_than_their_numbers_are_told(pattern):
    (note,) = numbering_note(sorted(pattern.format(number) for number in range(5, 11)))
    assert f"warning: class 1 is '{pattern.format(5)}', after '{pattern.format(10)}'" in note
    assert numbering_note(sorted([*map(pattern.format, range(1, 13)), "Class7", "background"]))


def test_numbered_folders_that_text_orders_otherwise_give_a_warning(tmp_path, capsys, trained):
    data = write_splits(tmp_path / "data", [f"class{number}" for number in range(5, 11)])  # as text, 10 comes first
    note = "warning: class 1 is 'class5', after 'class10'"
    assert note in succeeds(capsys, "folder", data, "--out", tmp_path / "lists")
    assert note in succeeds(capsys, "folder", data / "train", "--out", tmp_path / "plain")
    assert note in succeeds(capsys, "long-tail", data, "--imbalance", 2, "--out", tmp_path / "lt")
    verify([str(data)])
    assert note in capsys.readouterr().out
    assert note in short_run(data, tmp_path / "run").out
    evaluate = ["--evaluate", "--resume", trained["i"] / LAST]  # of a run whose classes have no names
    assert note in call("i", stage_flags("i", data, tmp_path / "evaluation", evaluate)).out
    (tmp_path / "lists/classes.txt").unlink()
    evaluate = ["--evaluate", "--resume", tmp_path / "run" / LAST, *list_flags(tmp_path / "lists")]
    outcome = short_run(data, tmp_path / "e", *evaluate)
    assert outcome.status == 0 and note in outcome.out and f" ({tmp_path / 'run' / LAST})\n" in outcome.out


@pytest.mark.parametrize(
    "names",
    [[f"{n:02}" for n in range(5, 11)], ["a1", "a2", "b1"], ["707", "b52", "c3"], ["Z2", "a1"], ["a2", "a1"], None],
)
def test_names_in_one_order_give_no_warning(names):
    assert numbering_note(names) == []


def test_labels_that_do_not_number_the_classes_get_a_hint(plain_tree, tmp_path):
    def run(change, *splits):
        for split in SPLITS:
            entries = [line.split() for line in (plain_tree / f"{split}.txt").read_text().splitlines()]
            lines = [f"{path} {change(int(label)) if split in splits else label}\n" for path, label in entries]
            (tmp_path / f"{split}.txt").write_text("".join(lines))
        flags = ["--epochs", 1, "--con-weight", 0, "--overwrite"]
        return run_stage("i", plain_tree, tmp_path / "run", *flags, *list_flags(tmp_path))

    assert "labels start at 1: subtract 1" in run(lambda label: label + 1, *SPLITS).out
    assert "labels start at 1: subtract 1" in run(lambda label: label + 1, "val").err
    assert "6 labels look like ids: number the classes from 0 to 5" in run(lambda label: 90 + 7 * label, *SPLITS).out
    assert "6 labels look like ids" in run(lambda label: 10**7 + label, *SPLITS).err


def test_classes_with_one_name_are_told_apart(tmp_path, capsys):
    data = write_splits(tmp_path / "data")
    (data / "classes.txt").write_text("crane\nbee\ncrane\n")
    assert short_run(data, tmp_path / "run").status == 0
    photo = str(data / "train/ant/0.jpg")
    for main, argv in (
        (report.main, [str(tmp_path / "run"), "--per-class"]),
        (predict.main, [str(tmp_path / "run" / LAST), photo, "--device", "cpu"]),
    ):
        assert main(argv) == 0
        said = capsys.readouterr().out
        assert "crane (class 0) " in said and "crane (class 2) " in said and "bee (class" not in said


# ---- why files are missing


def in_training_and_verify(root, tmp_path, capsys):
    """What a run and verify say of missing images."""
    outcome = run_stage("i", root, tmp_path / "run", "--overwrite")
    assert outcome.status == 2 and outcome.err.count("\n") == 1, outcome
    assert verify([str(root)]) == 1
    said = capsys.readouterr().out
    for text in (outcome.err, said):
        assert "wrong release" not in text and "correct DIR" not in text, text
    return outcome.err, said


@pytest.fixture
def lists(tmp_path, capsys):
    """Class folders with lists."""
    root = write_splits(tmp_path / "root")
    succeeds(capsys, "folder", root)
    return root


def test_backslashes_in_a_list_are_named(lists, tmp_path, capsys):
    for split in SPLITS:
        (lists / f"{split}.txt").write_text((lists / f"{split}.txt").read_text().replace("/", "\\"))
    for said in in_training_and_verify(lists, tmp_path, capsys):
        assert f"{lists / 'train.txt'} has \\ for /: train\\ant\\0.jpg is train/ant/0.jpg there" in said
    text = (lists / "test.txt").read_text().replace("test", "val")  # in a tree with a folder per split
    for split in SPLITS:
        (lists / f"{split}.txt").write_text(text)
    assert "has \\ for /" in in_training_and_verify(lists, tmp_path, capsys)[1]


def test_backslashes_in_the_names_of_files_are_named(lists, tmp_path, capsys):
    (lists / "train/cat/3.jpg").rename(lists / "train\\cat\\3.jpg")  # as an archive of Windows is unpacked
    for said in in_training_and_verify(lists, tmp_path, capsys):
        assert "train/cat/3.jpg is train\\cat\\3.jpg there" in said


@pytest.mark.parametrize("place", ["train", "train/cat", "train/cat/3.jpg"])
def test_a_link_whose_target_is_elsewhere_is_named(lists, tmp_path, capsys, place):
    (lists / place).rename(tmp_path / "gone")
    (lists / place).symlink_to("/mount/gone")
    for said in in_training_and_verify(lists, tmp_path, capsys):
        assert f"{lists / place}: a broken link, to /mount/gone" in said and "in a container" in said


@pytest.mark.parametrize("mode", [0, 0o644])
def test_a_folder_that_may_not_be_searched_is_named(lists, tmp_path, capsys, mode):
    with refused(lists / "train/cat", mode):
        for said in in_training_and_verify(lists, tmp_path, capsys):
            assert f"{lists / 'train/cat'}: Permission denied" in said


def test_other_capitals_and_forms_of_accents_are_named(lists, capsys):
    (lists / "val/cat").rename(lists / "val/Cat")
    assert verify([str(lists)]) == 1 and "capitals or accents" in capsys.readouterr().out
    (lists / "val/Cat/3.jpg").rename(lists / "val/Cat/e\u0301.jpg")
    (lists / "val.txt").write_text("val/Cat/\u00e9.jpg 1\n")
    assert verify([str(lists)]) == 1
    assert "capitals or accents that" in (said := capsys.readouterr().out) and "(val/Cat/e\u0301.jpg is there)" in said


def test_links_are_relative_if_both_ends_lie_below_one_folder(tmp_path, capsys):
    source = write_splits(tmp_path / "disk/source")
    command = ("long-tail", source, "--imbalance", 2, "--out", tmp_path / "disk/lists")
    out = tmp_path / "disk/lists"
    out.mkdir()
    (out / "train").symlink_to(source / "train")  # as earlier versions made it
    succeeds(capsys, *command)
    assert os.readlink(out / "train") == "../source/train"
    (tmp_path / "disk").rename(tmp_path / "mounted elsewhere")
    assert verify([str(tmp_path / "mounted elsewhere/lists")]) == 0


# ---- pixels


def test_verify_names_dark_and_transparent_images(lists, capsys):
    pixels = np.linspace(0, 4095, 64).reshape(8, 8).astype(np.uint16)  # 12 bits in 16
    Image.fromarray(pixels).save(lists / "train/ant/1.jpg", format="PNG")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8), "RGBA")
    image.save(lists / "train/ant/2.jpg", format="PNG")
    image.putalpha(255)
    image.save(lists / "train/ant/3.jpg", format="PNG")  # opaque
    image.convert("P").save(lists / "train/ant/4.jpg", format="PNG", transparency=0)
    assert verify([str(lists), "--decode"]) == 0
    said = capsys.readouterr().out.split("train: information: ")
    dark, transparent = (next(part for part in said if what in part) for what in ("an eighth", "transparent in part"))
    assert dark.startswith("1 images") and "train/ant/1.jpg" in dark and "levels from 0 to 15 of 255" in dark
    assert transparent.startswith("2 images") and "ant/2.jpg" in transparent and "ant/4.jpg" in transparent
