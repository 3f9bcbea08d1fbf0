"""Names of classes: where they are read from, and how they reach checkpoints and results of all stages."""

import shutil

import pytest
import torch

from datasets.lists import ImageList
from datasets.splits import SPLITS, Split, find_class_names, find_splits
from tests.helpers import COUNTS, LAST, PREVIOUS, checkpoint, results_of, run_stage, same, source, train, train_all
from utils.groups import MAX_NAMES, tell_names_apart

NAMES = ["ant", "bee", "Großer Panda", "crane", "crane", "zebra, plains"]  # two kinds of crane


def with_names(tree, folder, content):
    """The same tree, with a classes.txt."""
    folder.mkdir()
    for file in tree.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "classes.txt").write_bytes(content if isinstance(content, bytes) else "\n".join(content).encode())
    return folder


@pytest.fixture(scope="module")
def named_tree(plain_tree, tmp_path_factory):
    return with_names(plain_tree, tmp_path_factory.mktemp("names") / "named", NAMES)


@pytest.fixture(scope="module")
def named(named_tree, tmp_path_factory):
    """Folders of all stages, trained on data with names."""
    return train_all(named_tree, tmp_path_factory.mktemp("runs"), "--epochs", 1)


def names_in(folder):
    """The names in the checkpoints and results of a run, which must be the same."""
    (names,) = {tuple(record["classes"]) for record in results_of(folder)}
    assert all(checkpoint(folder, file.name)["classes"] == list(names) for file in folder.glob("*.tar"))
    return list(names)


def test_names_that_look_alike_are_told_apart_by_their_class():
    shown = ["crane (class 0)", "crane (class 1)", "(class 2)", "(class 3)", "ant", "ant (class 0) (class 5)"]
    assert tell_names_apart(["crane", " crane", "", " ", "ant", "ant (class 0)"]) == shown


def test_class_names_pass_through_all_stages(named):
    assert all(names_in(folder) == NAMES for folder in named.values())


def test_names_of_folders_are_utf8_in_any_locale(tmp_path):
    train = Split("train", str(tmp_path), ImageList.from_entries("list", [("a", 0)]), folders=["V\udcc3\udcb6gel"])
    assert find_class_names(tmp_path, train, 1) == (["Vögel"], None)


def test_class_names_come_from_the_checkpoint_if_the_data_have_none(named, plain_tree, tmp_path):
    assert names_in(train("ii", plain_tree, tmp_path / "ii", "--epochs", 1, *source("ii", named))) == NAMES
    evaluation = train("i", plain_tree, tmp_path / "e", "--resume", named["i"] / LAST, "--evaluate")
    assert results_of(evaluation)[0]["classes"] == NAMES


@pytest.mark.parametrize(("stage", "following"), [("i", "ii"), ("ii", "iii")])
def test_checkpoints_without_class_names_take_those_of_the_data(trained, named_tree, tmp_path, stage, following):
    old = checkpoint(trained[stage], PREVIOUS)
    for name in ("classes", "best_metric"):
        del old[name]
    torch.save(old, tmp_path / "old.tar")
    outcome = run_stage(stage, named_tree, tmp_path / "run", "--cos", "--resume", tmp_path / "old.tar")
    assert (outcome.status, outcome.err) == (0, "") and "warning" not in outcome.out
    assert names_in(tmp_path / "run") == NAMES
    assert same(checkpoint(tmp_path / "run")["state_dict"], checkpoint(trained[stage])["state_dict"])
    flag = source(following, {stage: tmp_path})[0]
    run = train(following, named_tree, tmp_path / following, "--epochs", 1, flag, tmp_path / "old.tar")
    assert names_in(run) == NAMES


def test_class_names_in_another_order_give_one_warning(named, named_tree, plain_tree, tmp_path):
    resume = ["--resume", named["i"] / LAST]
    other = with_names(plain_tree, tmp_path / "other", ["ant", "crane", "bee", *NAMES[3:]])
    for flags in (["--epochs", 2], ["--evaluate"]):
        outcome = run_stage("i", other, tmp_path / f"{len(flags)}", *resume, *flags)
        (line,) = [line for line in outcome.out.splitlines() if line.startswith("warning: class")]
        assert outcome.status == 0 and f"class 1 is 'bee' in {resume[1]}, and 'crane' in the data" in line
    assert "warning" not in run_stage("i", named_tree, tmp_path / "same", *resume, "--evaluate").out


def test_a_wrong_number_of_class_names_gives_a_warning_and_they_are_ignored(plain_tree, tmp_path):
    short = with_names(plain_tree, tmp_path / "short", NAMES[:5])
    outcome = run_stage("i", short, tmp_path / "run", "--epochs", 1, "--con-weight", 0)
    (line,) = [line for line in outcome.out.splitlines() if "names for" in line]
    assert outcome.status == 0 and f"{short / 'classes.txt'}: 5 names for 6 classes" in line
    assert results_of(tmp_path / "run")[0]["classes"] is None and checkpoint(tmp_path / "run")["classes"] is None


def test_class_folders_name_their_classes(reorganized_tree, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for split in SPLITS:
        (data / split).symlink_to(reorganized_tree / split)
    run = train("i", data, tmp_path / "i", "--epochs", 1, "--con-weight", 0)
    assert names_in(run) == [f"class{c}" for c in range(6)]
    (result,) = results_of(run)
    assert result["train_counts"] == list(COUNTS["train"]) and result["count"] == sum(COUNTS["test"])
    (data / "classes.txt").write_text("\n".join(NAMES))
    assert found(data, 6) == (NAMES, None)


def found(root, num_classes, **given):
    return find_class_names(root, find_splits(root, given, check=())["train"], num_classes)


def test_class_names_next_to_the_training_list_come_first(named_tree, plain_tree, tmp_path):
    assert found(plain_tree, 6) == (None, None)
    assert found(named_tree, 6) == (NAMES, None)
    lists = tmp_path / "lists"
    lists.mkdir()
    shutil.copy(plain_tree / "train.txt", lists)
    assert found(named_tree, 6, train=lists / "train.txt") == (NAMES, None)
    (lists / "classes.txt").write_text("abcdef".replace("", "\n").strip())
    assert found(named_tree, 6, train=lists / "train.txt") == (list("abcdef"), None)


@pytest.mark.parametrize(
    "content",
    [b"a\r\nb\r\n\xc3\xa9\r\n", b"\xef\xbb\xbfa\nb\n\xc3\xa9", b"a\nb\n\xc3\xa9\n\n\n"],
    ids=["CRLF", "BOM", "blank"],
)
def test_class_names_are_read_with_any_line_ending(plain_tree, tmp_path, content):
    assert found(with_names(plain_tree, tmp_path / "tree", content), 3) == (["a", "b", "é"], None)


def test_invalid_or_too_large_files_of_class_names_do_not_stop_a_run(plain_tree, tmp_path):
    named_tree = with_names(plain_tree, tmp_path / "tree", b"a\n\xff\xfe\n")
    assert found(named_tree, 2) == (["a", "\ufffd\ufffd"], None)
    (named_tree / "classes.txt").write_bytes(b"a" * (MAX_NAMES + 1))
    names, note = found(named_tree, 1)
    assert names is None and str(named_tree / "classes.txt") in note and "\n" not in note
