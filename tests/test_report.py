"""Tables, plots and the HTML page of finished runs, compared with numbers computed by hand."""

import csv
import io
import json
import re
import sys
from functools import partial
from html import unescape
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers import LAST, ROOT, assert_mistake, call, outcome_of, stage_flags
from utils import report
from utils.checkpoint import set_aside
from utils.results.plots import draw, read_curves, running_mean
from utils.results.records import distinct_names, read_runs
from utils.results.tables import list_numbers, table

# Three classes, one per shot group: 4, 2 and 2 test images, of which 3, 1 and 0 are right.
RECORD = {
    "phase": "test", "classifier": "linear", "overall": 0.5, "class_mean": 1.25 / 3, "top5": 1.0,
    "many": 0.75, "medium": 0.5, "few": 0.0, "per_class": [0.75, 0.5, 0.0], "train_counts": [200, 50, 5],
    "test_counts": [4, 2, 2], "classes": ["cat", "dog", "fox"], "count": 8,
    "confusion_groups": [[3, 1, 0], [1, 1, 0], [0, 2, 0]], "confusion": [[3, 1, 0], [1, 1, 0], [0, 2, 0]],
}  # fmt: skip
EPOCH = {"epoch": 0, "lr": 0.1, "loss": 2.0, "top1_linear": 0.3, "top5_linear": 0.6,
         "val": {"linear": {"overall": 0.4, "class_mean": 0.3, "top5": 0.9}}, "seconds": 1.0}  # fmt: skip
HOSTILE = '"><script>alert(1)</script>&$x$|\n\x1b[31m'
MISSING = object()


def write_run(folder: Path, *records: dict, args=None, log=()) -> Path:
    """A run folder with the files that are given."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(list(records) or [RECORD]))
    if args is not None:
        (folder / "args.json").write_text(json.dumps(args))
    if log:
        (folder / "log.txt").write_text("".join(json.dumps(record) + "\n" for record in log))
    return folder


def arguments(seed: int, folder: Path, **others) -> dict:
    """The args.json of a run, whose identity is the learning rate."""
    given = {"program": "ssd_stage_i.py", "output_dir": str(folder), "lr": 0.1, "data": f"/data{seed}", "seed": seed}
    environment = {"torch": "2.14.1", "started": f"2025-01-0{seed + 1}"}
    return given | {"environment": environment, "identity": {"lr": 0.2}, "starts_from": ["last_stage_ckpt"]} | others


@pytest.fixture
def said(capsys):
    """Calls the report; returns (status, stdout, stderr)."""
    return partial(outcome_of, report.main, capsys)


@pytest.fixture
def averaged(tmp_path, said):
    """Calls the report with --mean; returns the names of the rows, the number of seeds of each, and stderr.

    runs: folder -> further arguments, None for no args.json; below: the end of the folders to report, instead of all.
    """

    def run(runs: dict, below=""):
        for seed, (name, others) in enumerate(runs.items()):
            args = None if others is None else arguments(seed, tmp_path / name) | others
            write_run(tmp_path / name, (others or {}).get("record", RECORD), args=args)
        status, out, err = said(*(tmp_path / name for name in runs if name.endswith(below)), "--mean", "--json")
        assert status == 0
        rows = json.loads(out)
        return [row["run"] for row in rows], [row["seeds"] for row in rows], err

    return run


def first_cells(out: str) -> list[str]:
    return [line.split("|")[1].strip() for line in out.splitlines()[2:] if line.startswith("|")]


@pytest.mark.parametrize("paths, names", [
    (["/r/s0/i", "/r/s1/i", "/r/s1/ii"], ["s0/i", "s1/i", "ii"]),
    (["/a/s/i", "/b/s/i"], ["a/s/i", "b/s/i"]),
    (["/i", "/s/i"], ["/i", "s/i"]),
    (["/"], ["/"]),
])  # fmt: skip
def test_names_are_the_shortest_distinct_ends_of_paths(paths, names):
    assert distinct_names([Path(path).parts for path in paths]) == names


def test_a_folder_of_runs_stands_for_its_runs(tmp_path, said, monkeypatch):
    for name in ("b/stage_i", "a/deep/er/stage_i", "c"):
        write_run(tmp_path / "runs" / name)
    (tmp_path / "runs" / "empty").mkdir()
    cells = first_cells(said(tmp_path / "runs", tmp_path / "runs" / "c")[1])  # c is named twice, but is one run
    assert cells == [f"{name}, linear classifier" for name in ("er/stage_i", "b/stage_i", "c")]
    monkeypatch.chdir(tmp_path / "runs" / "c")
    assert first_cells(said(".")[1]) == ["c, linear classifier"]


# Tables


def test_the_report_prints_percent_and_a_dash_for_null(tmp_path, said):
    hard = RECORD | {"classifier": "hard", "class_mean": 0.375, "per_class": [0.75, None, 0.0], "medium": None}
    assert said(write_run(tmp_path / "run", RECORD, hard))[1] == (
        "|                        | Many | Medium | Few | Class mean | Overall | Top-5 |\n"
        "|:-----------------------|-----:|-------:|----:|-----------:|--------:|------:|\n"
        "| run, linear classifier | 75.0 |   50.0 | 0.0 |       41.7 |    50.0 | 100.0 |\n"
        "| run, hard classifier   | 75.0 |      - | 0.0 |       37.5 |    50.0 | 100.0 |\n\n"
        "Few: 2 test images in all few-shot classes together; read this column with care.\n"
    )


def test_the_table_says_if_few_shot_classes_have_fewer_than_50_test_images():
    def below(*test_counts):
        rows = {str(i): RECORD | {"train_counts": [500, 19, 3], "test_counts": n} for i, n in enumerate(test_counts)}
        return table(rows).splitlines()[2 + len(rows) :]

    assert below([9, 40, 10]) == [] == below([9, 25, 25]) == below([9, 0, 0])
    assert below([9, 25, 24])[1].startswith("Few: 49 test images") and len(below([9, 25, 24])) == 2
    assert below([9, 40, 40], [9, 3, 4], [9, 1, 0], [9, 4, 3])[1].startswith("Few: 1 to 7 test images")


def test_rows_of_other_test_lists_are_marked(tmp_path, said):
    few = [{"test_checksum": 7}, {"test_checksum": 8}, {}, {"test_checksum": 7}, {"test_counts": [4, 2, 9]}]
    runs = [write_run(tmp_path / f"r{i}", RECORD | more) for i, more in enumerate(few)]
    (runs[2] / "args.json").write_text(json.dumps({"list_checksums": {"test": 7}}))  # of an earlier version
    out = said(*runs)[1]
    assert first_cells(out) == [f"r{i}, linear classifier{mark}" for i, mark in enumerate(("", " *", "", "", " **"))]
    assert "*: tested on another list" in out
    assert [row["test_list"] for row in json.loads(said(*runs, "--json")[1])] == [1, 2, 1, 1, 3]
    assert "another list" not in said(runs[0], runs[3])[1]


def test_a_row_without_a_checksum_counts_as_of_the_list_with_as_many_images_per_class():
    records = [{"test_counts": [4, 2], "test_checksum": 7}] * 2 + [{"test_counts": [4, 2]}]
    assert list_numbers(records) == [1, 1, 1]


@pytest.mark.parametrize(("mean", "said_so"), [(0.2, True), (1 / 3, True), (0.34, False), (None, False)])
def test_a_class_mean_at_or_below_chance_is_called_that(tmp_path, said, mean, said_so):
    out = said(write_run(tmp_path / "run", RECORD | {"class_mean": mean}))[1]
    assert ("Class mean at or below chance (33.3): run, linear classifier." in out) == said_so


def test_csv_and_json_hold_the_same_numbers_in_full(tmp_path, said):
    run = write_run(tmp_path / 'a, "b"', RECORD, RECORD | {"classifier": "hard", "few": None})
    from_json = json.loads(said(run, "--json")[1])
    from_csv = list(csv.DictReader(io.StringIO(said(run, "--csv")[1])))
    assert [list(row) for row in from_csv] == [list(row) for row in from_json]
    assert from_json[0]["run"] == 'a, "b"' and from_json[0]["class_mean"] == 1.25 / 3
    for text, exact in zip(from_csv, from_json, strict=True):
        for name, value in exact.items():
            assert (float(text[name]) == value) if isinstance(value, float) else (text[name] == str(value or ""))


def test_flags_that_contradict_each_other_are_refused(tmp_path, said):
    for flags in (("--csv", "--json"), ("--per-class", "--mean")):
        assert_mistake(said(write_run(tmp_path / "run"), *flags), *flags)


# Means over seeds


def test_mean_prints_mean_and_sample_standard_deviation_over_seeds(tmp_path, said):
    for seed, few in enumerate((0.1, 0.2, 0.6)):
        folder = tmp_path / f"s{seed}" / "stage_i"
        write_run(folder, RECORD | {"few": few}, args=arguments(seed, folder))
    status, out, err = said(tmp_path, "--mean", "--json")
    (row,) = json.loads(out)
    assert (status, err, row["run"], row["classifier"], row["seeds"]) == (0, "", "stage_i", "linear", 3)
    assert row["few"] == pytest.approx(0.3) and row["few_std"] == pytest.approx(0.07**0.5)  # (0.04 + 0.01 + 0.09) / 2
    assert row["many"] == 0.75 and row["many_std"] == 0
    line = said(tmp_path, "--mean")[1].splitlines()[2]
    assert [cell.strip() for cell in line.split("|")][1:6] == [
        "stage_i, linear classifier", "3", "75.0 ± 0.0", "50.0 ± 0.0", "30.0 ± 26.5",
    ]  # fmt: skip
    assert json.loads(said(tmp_path / "s0", "--mean", "--json")[1])[0]["few_std"] is None


def test_means_are_of_one_classifier(tmp_path, said):
    for seed in (0, 1):
        folder = tmp_path / f"s{seed}"
        soft = RECORD | {"classifier": "soft", "many": 0.25}
        write_run(folder, RECORD | {"classifier": "hard"}, soft, args=arguments(seed, folder))
    rows = json.loads(said(tmp_path, "--mean", "--json")[1])
    assert [(row["classifier"], row["many"]) for row in rows] == [("hard", 0.75), ("soft", 0.25)]


@pytest.mark.parametrize("runs, names, seeds, note", [
    ({"s0": {"workers": 3}, "s1": {}, "s2": {"lr": 0.5}}, ["s{0,1}", "s2"], [2, 1], []),
    ({"a/s0": {}, "a/s1": {}, "b/s1": {"lr": 0.5}}, ["s{0,1}", "b/s1"], [2, 1], []),  # there is an s1 in the group
    ({"s1": {}, "s2": {"lr": 0.5}}, ["s1", "s2"], [1, 1], ["no two runs differ only in their seed; s1 and s2", "lr"]),
    ({"s1": {}, "s2": {HOSTILE: 1, "identity": {HOSTILE: 0}}}, ["s1", "s2"], [1, 1], ["script"]),
    ({"s1": {}, "s2": {"program": "b.py", "identity": {"program": "a.py"}}}, ["s1", "s2"], [1, 1], []),  # two stages
    ({"s0": {}, "s1": None, "s2": {"identity": None, "starts_from": None}, "s3": {}},
     ["s{0,3}", "s1", "s2"], [2, 1, 1], ["s1, s2: ", "identity"]),
    ({"a": {"seed": 3}, "b": {"seed": 3}}, ["a", "b"], [1, 1], ["b: ", "the seed of another run"]),
    ({"x/i": {}, "y/i": {}}, ["i"], [2], []),  # the name is what the folders share
    ({"x": {}, "s/i": {}}, ["x + i"], [2], []),
    ({"s": {}, "s1": {}}, ["s{,1}"], [2], []),
])  # fmt: skip
def test_runs_that_differ_in_their_seed_alone_are_averaged_and_others_keep_their_rows(
    averaged, runs, names, seeds, note
):
    *found, err = averaged(runs)
    assert found == [names, seeds] and "\x1b" not in err and all(word in err for word in note)
    assert (err.startswith("note: "), err.count("\n")) == ((True, 1) if note else (False, 0))


def test_other_data_under_the_same_arguments_keep_their_rows(averaged):
    record = RECORD | {"test_checksum": 0}
    for other in ({"train_counts": [300, 50, 5]}, {"count": 9}, {"classifier": "hard"}, {"test_checksum": 1}):
        _, seeds, err = averaged({"s0": {"record": record}, "s1": {"record": record | other}})
        assert seeds == [1, 1] and err.endswith("differ in images\n")


@pytest.mark.parametrize("old, new, seeds", [
    ({}, {"tf32": False}, [2]),  # the flag did not exist when the run began: it counts as its default
    ({}, {"tf32": True}, [1, 1]),
    ({"tf32": True}, {"tf32": True}, [2]),  # it existed, and has become a part of the identity
    ({"tf32": True}, {"tf32": False}, [1, 1]),
])  # fmt: skip
def test_a_flag_that_is_new_in_the_identity_is_compared(averaged, old, new, seeds):
    identity = {"identity": {"lr": 0.2, "tf32": False}}
    assert averaged({"old": old, "new": new | identity})[1] == seeds
    assert averaged({"new": new | identity, "old": old})[1] == seeds


def test_runs_that_started_from_different_runs_keep_their_rows(averaged):
    """The arguments of stage II are the same; those of the runs it started from differ, and all folders were moved."""
    runs = {}
    for name, weight in (("contrast", 1.0), ("plain", 0.0)):
        for seed in (0, 1):
            was = f"/former/{name}{seed}"
            first = {"con_weight": weight, "identity": {"lr": 0.2, "con_weight": 1.0}, "seed": seed}
            second = {"last_stage_ckpt": f"{was}/i/{LAST}", "program": "ssd_stage_ii.py", "seed": 7}
            runs[f"{name}{seed}/i"] = first | {"output_dir": f"{was}/i"}
            runs[f"{name}{seed}/ii"] = second | {"output_dir": f"{was}/ii"}
    assert averaged(runs, below="ii") == (["contrast{0,1}/ii", "plain{0,1}/ii"], [2, 2], "")
    del runs["contrast1/ii"], runs["plain0/ii"]
    assert averaged(runs, below="ii")[2].endswith("differ in last_stage_ckpt: con_weight\n")


@pytest.mark.parametrize("sources, seeds", [
    (("a/last", "b/last"), [1, 1]),  # their args.json has no identity: only the same folder is the same run
    (("a/last", "a/last"), [2]),
    (("gone/last", "/away/last"), [2]),  # nothing but the file's name is known
    (("gone/last", "/away/best"), [1, 1]),
    (("", None), [2]),
    (("s0/last", "s1/last"), [1, 1]),  # each names itself, which must end
])  # fmt: skip
def test_checkpoints_are_compared_by_what_is_known_of_them(tmp_path, averaged, sources, seeds):
    for name in "ab":
        write_run(tmp_path / name, args={"lr": 0.1})
    runs = {}
    for i, source in enumerate(sources):
        checkpoint = source and str(tmp_path / source)
        runs[f"s{i}"] = {"last_stage_ckpt": checkpoint, "output_dir": "/former/run"}  # moved without them
    assert averaged(runs)[1] == seeds


# Classes


def test_classes_are_listed_worst_first_with_their_most_common_mistake(tmp_path, said):
    assert said(write_run(tmp_path / "run"), "--per-class")[1] == (
        "run, linear classifier\n\n"
        "| Class | Training images | Test images | Accuracy | Most common mistake |\n"
        "|:------|----------------:|------------:|---------:|:--------------------|\n"
        "| fox   |               5 |           2 |      0.0 | dog (2)             |\n"
        "| dog   |              50 |           2 |     50.0 | cat (1)             |\n"
        "| cat   |             200 |           4 |     75.0 | dog (1)             |\n\n"
    )


def test_classes_without_names_are_numbered_and_need_no_confusion(tmp_path, said):
    record = RECORD | {"per_class": [1.0, None, 1.0], "classes": None}
    del record["confusion"]  # above 1,000 classes
    rows = json.loads(said("--per-class", write_run(tmp_path / "run", record), "--json")[1])
    assert [row["class"] for row in rows] == ["class 2", "class 0", "class 1"]  # the rarer first; without images: last
    assert all(row["mistake"] is None for row in rows)


def test_class_names_do_not_break_the_table(tmp_path, said):
    record = RECORD | {"classes": [HOSTILE, "dog", "fox"]}
    out = said("--per-class", write_run(tmp_path / "run", record))[1]
    lines = out.splitlines()
    assert len(lines) == 8 and "\x1b" not in out
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines[2:7]} == {6}


# Files that are not valid results


@pytest.mark.parametrize("name, value", [
    *((name, MISSING) for name in RECORD if name not in ("phase", "confusion")),
    ("overall", 55.3), ("overall", "0.5"), ("few", float("nan")), ("classifier", "../hard"), ("classifier", 1),
    ("classes", ["cat"]), ("classes", "cat"), ("per_class", [0.5, 0.5]), ("per_class", []), ("count", None),
    ("train_counts", [1, 2, -3]), ("train_counts", [1, 2, 10**30]), ("test_counts", [1, True, 1]),
    ("test_checksum", "x"), ("test_trained_on", -1), ("test_trained_on", [1]), ("confusion", [[1, 2], [3, 4]]),
    ("confusion", [[1], [2, 3], [4]]), ("confusion_groups", [[1, 2, 3]]),
])  # fmt: skip
def test_an_entry_that_is_missing_or_invalid_is_named(tmp_path, said, name, value):
    record = {key: now for key, now in (RECORD | {name: value}).items() if now is not MISSING}
    run = write_run(tmp_path / "run", record)
    named = "_counts" if value == [0.5, 0.5] else name  # of two classes, which the counts do not fit
    assert_mistake(said(tmp_path), run / "results.json", named)


@pytest.mark.parametrize("file, flags, contents", [
    ("results.json", [], [b"", b"{", b"[]", b"{}", b"null", b"[1]", b"[" * 100_000, b"[NaN]", b"\xff\xfe\x00"]),
    ("args.json", ["--mean"], [b"{", b"[]", b"3"]),
])  # fmt: skip
def test_a_damaged_file_ends_in_one_line(tmp_path, said, file, flags, contents):
    run = write_run(tmp_path / "run")
    for content in contents:
        (run / file).write_bytes(content)
        assert_mistake(said(run, *flags), run / file)
    assert said(run)[0] == (2 if file == "results.json" else 0)


def test_folders_without_results_end_in_one_line(tmp_path, said):
    assert_mistake(said(tmp_path / "none"), tmp_path / "none")
    assert_mistake(said(tmp_path), tmp_path, "results.json")
    (tmp_path / "results.json").mkdir()
    assert_mistake(said(tmp_path), "results.json")


def test_the_records_of_the_study_can_be_read(said):
    """They have no confusion matrix, and those of earlier commits no identity."""
    runs = read_runs([ROOT / "docs" / "study"])
    assert all(record["confusion"] is None for run in runs for record in run.records)
    assert said(runs[0].folder, "--mean")[0] == said(runs[0].folder, "--per-class")[0] == 0


# Plots


def is_drawn(file: Path) -> bool:
    """Whether a PNG file has more than a few colors."""
    with Image.open(file) as image:
        return image.format == "PNG" and len(image.convert("RGB").getcolors(2**24)) > 10


NAMES = ["losses", "accuracies", "class_counts", "per_class_linear", "confusion_linear",
         "confusion_classes_linear"]  # fmt: skip


def test_plots_are_drawn_with_several_runs_in_a_folder_for_each(tmp_path, said):
    runs = tmp_path / "runs"
    write_run(runs / "s0" / "i", log=[EPOCH, EPOCH | {"epoch": 1, "loss": 1.0}])
    write_run(runs / "s1" / "i", RECORD, RECORD | {"classifier": "hard"})
    assert said(runs, "--plots", tmp_path / "both")[0] == 0
    files = sorted((tmp_path / "both" / "s0" / "i").iterdir())
    assert [file.name for file in files] == sorted(f"{name}.{kind}" for name in NAMES for kind in ("pdf", "png"))
    for file in files:
        assert is_drawn(file) if file.suffix == ".png" else file.read_bytes().startswith(b"%PDF")
    drawn = {file.stem for file in (tmp_path / "both" / "s1" / "i").iterdir()}
    assert drawn == {*NAMES[2:], "per_class_hard", "confusion_hard", "confusion_classes_hard"}  # without log.txt


@pytest.mark.parametrize(("classes", "named"), [(30, True), (31, False)])
def test_plots_name_up_to_30_classes(tmp_path, classes, named):
    names = [f"Größe $ {label} " + "x" * 40 for label in range(classes)]
    eye = [[4 * (i == j) for j in range(classes)] for i in range(classes)]
    every = {"per_class": [1.0] * classes, "train_counts": [*range(classes)], "test_counts": [4] * classes}
    run = write_run(tmp_path / "run", RECORD | every | {"classes": names, "count": 4 * classes, "confusion": eye})
    figures = {name: figure for name, _, figure in draw(read_runs([run])[0])}
    figures["class_counts"].savefig(tmp_path / "counts.png")
    assert is_drawn(tmp_path / "counts.png") and ("confusion_classes_linear" in figures) == named
    ticks = [label.get_text() for label in figures["class_counts"].axes[0].get_xticklabels()]
    assert (len(ticks) == classes and ticks[0].startswith(rf"Größe \$ {classes - 1} x")) == named
    if named:
        axes = figures["confusion_classes_linear"].axes[0]
        shown = [label.get_text() for label in axes.get_yticklabels()]
        assert shown == [label.get_text() for label in axes.get_xticklabels()] and shown[0].startswith(r"Größe \$ 0 x")
        assert [text.get_text() for text in axes.texts] == ["100"] * classes


def test_every_further_number_of_an_epoch_is_drawn_as_a_loss(tmp_path, said):
    """Whatever a researcher logs: numbers that cannot be drawn, and anything else, are left out."""
    more = {"topology": 3, "_a_b": -1.5, "$x^$": 1.0, "flag": True, "text": "low", "none": None, "big": 1e400}
    later = EPOCH | {"epoch": 1, "loss": float("nan"), "val": {"linear": {"class_mean": None}}}
    run = write_run(tmp_path / "run", log=[EPOCH | more, later])
    with (run / "log.txt").open("a") as log:
        log.write('[1]\n"text"\n{"epoch": "one"}\n{"loss": 1}\n{"epoch": 2, "lo')  # a crash cut it short
    losses, accuracies = read_curves(run)
    assert losses == {"loss": {1: 2.0}, "topology": {1: 3}, " a b": {1: -1.5}, "$x^$": {1: 1.0}}
    assert accuracies == {"training, linear": {1: 30.0, 2: 30.0}, "validation class mean, linear": {1: 30.0}}
    assert said(run, "--plots", tmp_path / "out")[0] == 0
    assert is_drawn(tmp_path / "out" / "losses.png")


@pytest.mark.parametrize("counts", [[0, 0, 0], [0, 50, 5], [1, 1, 1], [10**9, 10**5, 1]])
def test_plots_are_drawn_for_any_training_counts(tmp_path, counts):
    accuracies = [None, 0.5 if counts[1] else None, None]
    write_run(tmp_path / "run", RECORD | {"train_counts": counts, "per_class": accuracies, "many": None})
    for name, _, figure in draw(read_runs([tmp_path / "run"])[0]):
        if name in ("class_counts", "per_class_linear"):  # the others do not show them
            figure.savefig(tmp_path / f"{name}.png")
    assert len(files := list(tmp_path.glob("*.png"))) == 2 and all(map(is_drawn, files))


def test_the_running_mean_is_the_one_computed_by_hand():
    assert running_mean([8, 1, 4, 2], [0.4, 0.0, 0.3, 0.1]) == (
        [1, 2, 4, 8], [pytest.approx(value) for value in (0.05, 0.4 / 3, 0.8 / 3, 0.35)],
    )  # fmt: skip
    counts, means = running_mean([5, 5, 5], [0.0, 0.3, 0.6])
    assert counts == [5] and means == [pytest.approx((0.15 + 0.3 + 0.45) / 3)]


class Broken:
    """A module that fails as packages do that were compiled for another numpy."""

    def __getattr__(self, name):
        raise TypeError("of another\nversion")


@pytest.mark.parametrize("module", [None, Broken(), "old"], ids=["missing", "broken", "old"])
@pytest.mark.parametrize("flag", ["--plots", "--html"])
def test_a_matplotlib_that_cannot_be_used_is_named(tmp_path, said, monkeypatch, module, flag):
    if module == "old":
        monkeypatch.setattr(pytest.importorskip("matplotlib"), "__version_info__", (3, 6, 3), raising=False)
    else:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", module)
    assert_mistake(said(write_run(tmp_path / "run"), flag, tmp_path / "out"), flag, "pip install matplotlib")
    assert not (tmp_path / "out").exists()
    assert said(tmp_path / "run", "--per-class")[0] == 0


def test_a_stage_draws_its_plots_at_the_end(plain_tree, tmp_path):
    assert call("i", stage_flags("i", plain_tree, tmp_path, ["--plots", "--con-weight", 0, "--epochs", 1])).status == 0
    assert {file.stem for file in (tmp_path / "plots").iterdir()} == set(NAMES)


@pytest.mark.parametrize("flag", ["--plots", "--html"])
def test_an_output_that_cannot_be_written_ends_in_one_line(tmp_path, said, flag):
    (tmp_path / "file").write_text("")
    assert_mistake(said(write_run(tmp_path / "run"), flag, tmp_path / "file" / "out"), flag, "file/out")


def test_a_run_that_was_set_aside_below_a_folder_comes_back(tmp_path, said):
    set_aside(write_run(tmp_path / "runs" / "a"))
    write_run(tmp_path / "runs" / "b")
    status, out, _ = said(tmp_path / "runs")
    assert status == 0 and "| a," in out and "| b," in out


# The page


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of two seeds with hostile names."""
    root = tmp_path_factory.mktemp("page")
    for seed in (0, 1):
        folder = root / "runs" / f"s{seed}" / "<b>i&amp;"
        record = RECORD | {"classes": [HOSTILE, "</td>", "a&b"]}
        write_run(folder, record, args=arguments(seed, folder, note=HOSTILE, **{HOSTILE: [1]}), log=[EPOCH])
    assert report.main([str(root / "runs"), "--mean", "--html", str(root / "page.html")]) == 0
    return (root / "page.html").read_text()


def texts_of(page: str) -> list[str]:
    return [unescape(text) for text in re.findall(r">([^<]*)<", page)]


def test_the_page_refers_to_no_other_file(page):
    addresses = re.findall(r'<[^>]* (?:src|href)="([^"]*)"', page)
    assert addresses and all(address.startswith(("data:image/png;base64,", "#")) for address in addresses)
    assert not re.search(r"://|url\(|@import|<[^>]* (srcset|action|data|poster|background)=", page)
    assert not {"link", "iframe", "object", "embed", "base", "form"} & set(re.findall(r"<(\w+)", page))


def test_the_page_escapes_every_name(page):
    assert page.count("<script>") == 1 and not re.search(r"<b>|<[^>]* on\w+=|\x1b", page)
    shown = HOSTILE.replace("\n", "\\n").replace("\x1b", "\\x1b")
    texts = texts_of(page)
    assert texts.count(shown) == 2 * 1 + 2 + 1  # a class, an argument per run, its name
    assert {"s0/<b>i&amp;, linear classifier", "</td>", "a&b"} <= set(texts)


def test_the_page_contains_tables_plots_arguments_and_versions(page):
    assert page.count("<img ") == 2 * len(NAMES)
    few = "Few: 2 test images in all few-shot classes together; read this column with care."
    contained = {few, "Seeds", "50.0 ± 0.0", "Class mean", "41.7", "Most common mistake", "2.14.1", "ssd_stage_i.py"}
    assert contained <= set(texts_of(page))
    rows = re.findall(r"<tr( class=bold)?><td>(\w+)</td>", page[page.index("Arguments and versions") :])
    assert [name for bold, name in rows if bold] == ["output_dir", "data", "seed", "started"]  # what differs is first
    assert [name for _, name in rows][:3] == ["output_dir", "data", "seed"]


def test_the_page_needs_only_results_json(tmp_path, said):
    assert said(write_run(tmp_path / "run"), "--html", tmp_path / "page.html")[0] == 0
    assert "run, linear classifier" in texts_of((tmp_path / "page.html").read_text())
