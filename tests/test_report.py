"""Tables, plots and the HTML page of finished runs, compared with numbers computed by hand."""

import csv
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import ssd_stage_i
import ssd_stage_ii
import ssd_stage_iii
from tests.helpers import LAST, call, stage_flags
from utils import report
from utils.command_line import has_value
from utils.results.records import distinct_names, read_runs
from utils.results.seeds import CHECKPOINTS, IGNORED, checkpoint_folder, pattern

# Three classes, one per shot group: 4, 2 and 2 test images, of which 3, 1 and 0 are right.
RECORD = {
    "phase": "test", "classifier": "linear", "overall": 0.5, "class_mean": 1.25 / 3, "top5": 1.0,
    "many": 0.75, "medium": 0.5, "few": 0.0, "per_class": [0.75, 0.5, 0.0], "train_counts": [200, 50, 5],
    "test_counts": [4, 2, 2], "classes": ["cat", "dog", "fox"], "count": 8,
    "confusion_groups": [[3, 1, 0], [1, 1, 0], [0, 2, 0]], "confusion": [[3, 1, 0], [1, 1, 0], [0, 2, 0]],
}  # fmt: skip
LATER = ("class_mean", "test_counts", "classes", "confusion")  # entries that earlier versions did not write
OLD = {name: value for name, value in RECORD.items() if name not in LATER}
EPOCH = {"epoch": 0, "lr": 0.1, "loss": 2.0, "top1_linear": 0.3, "top5_linear": 0.6,
         "val": {"linear": {"overall": 0.4, "class_mean": 0.3, "top5": 0.9}}, "seconds": 1.0}  # fmt: skip
HOSTILE = '"><script>alert(1)</script>&$x$|\n\x1b[31m'


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
    """The args.json of a run of stage I."""
    environment = {"torch": "2.14.1", "started": f"2025-01-0{seed + 1}"}
    given = {"program": "ssd_stage_i.py", "output_dir": str(folder), "lr": 0.1, "data": f"/data{seed}"}
    return given | {"seed": seed, "environment": environment} | others


@pytest.fixture
def said(capsys):
    """Calls the report; returns (status, stdout, stderr)."""

    def run(*argv):
        status = report.main([str(word) for word in argv])
        return (status, *capsys.readouterr())

    return run


def refused(outcome) -> str:
    """The one line on stderr of a report that was refused."""
    status, out, err = outcome
    assert status == 2 and out == "" and err.count("\n") == 1, err
    return err


def first_cells(out: str) -> list[str]:
    return [line.split("|")[1].strip() for line in out.splitlines()[2:] if line.startswith("|")]


# Names


@pytest.mark.parametrize("paths, names", [
    (["/r/s0/i", "/r/s1/i"], ["s0/i", "s1/i"]),
    (["/r/s0/i", "/r/s1/ii"], ["i", "ii"]),
    (["/r/s0/i", "/r/s1/i", "/r/s1/ii"], ["s0/i", "s1/i", "ii"]),
    (["/a/s/i", "/b/s/i"], ["a/s/i", "b/s/i"]),
    (["/i", "/s/i"], ["/i", "s/i"]),
    (["/r"], ["r"]),
    (["/"], ["/"]),
])  # fmt: skip
def test_names_are_the_shortest_distinct_ends_of_paths(paths, names):
    assert distinct_names([Path(path).parts for path in paths]) == names


def test_no_run_is_dropped(tmp_path, said):
    folders = [write_run(tmp_path / f"s{i}" / "stage_i") for i in range(3)]
    status, out, _ = said(*folders)
    assert status == 0 and first_cells(out) == [f"s{i}/stage_i, linear classifier" for i in range(3)]


def test_a_run_in_the_current_folder_is_named_after_the_folder(tmp_path, said, monkeypatch):
    monkeypatch.chdir(write_run(tmp_path / "mine"))
    assert first_cells(said(".")[1]) == ["mine, linear classifier"]


def test_a_folder_of_runs_stands_for_its_runs(tmp_path, said):
    for name in ("b/stage_i", "a/deep/er/stage_i", "c"):
        write_run(tmp_path / "runs" / name)
    (tmp_path / "runs" / "empty").mkdir()
    cells = first_cells(said(tmp_path / "runs", tmp_path / "runs" / "c")[1])  # c is named twice, but is one run
    assert cells == [f"{name}, linear classifier" for name in ("er/stage_i", "b/stage_i", "c")]


def test_the_report_prints_per_cent(tmp_path, said):
    old = {**OLD, "classifier": "hard", "per_class": [0.75, None, 0.0], "medium": None}
    assert said(write_run(tmp_path / "run", RECORD, old))[1] == (
        "|                        | Many | Medium | Few | Class mean | Overall | Top-5 |\n"
        "|:-----------------------|-----:|-------:|----:|-----------:|--------:|------:|\n"
        "| run, linear classifier | 75.0 |   50.0 | 0.0 |       41.7 |    50.0 | 100.0 |\n"
        "| run, hard classifier   | 75.0 |      - | 0.0 |       37.5 |    50.0 | 100.0 |\n\n"
        "Few: 2 test images in all few-shot classes together; read this column with care.\n"
    )


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


def test_runs_that_differ_in_more_than_the_seed_keep_their_rows(tmp_path, said):
    for seed, lr in ((0, 0.1), (1, 0.1), (2, 0.5)):
        write_run(tmp_path / f"s{seed}", args=arguments(seed, tmp_path / f"s{seed}", lr=lr))
    rows = json.loads(said(tmp_path, "--mean", "--json")[1])
    assert [(row["run"], row["seeds"], row["few_std"]) for row in rows] == [("s{0,1}", 2, 0), ("s2", 1, None)]
    _, _, err = said(tmp_path / "s1", tmp_path / "s2", "--mean")
    assert err == "note: no two runs differ only in their seed; s1 and s2 differ in lr\n"
    write_run(tmp_path / "s2", args=arguments(2, tmp_path / "s2", **{HOSTILE: 1}))
    _, _, err = said(tmp_path / "s1", tmp_path / "s2", "--mean")
    assert err.count("\n") == 1 and "\x1b" not in err


def test_a_flag_that_an_earlier_version_did_not_have_is_taken_at_its_default(tmp_path, said):
    for seed, flags in enumerate(({}, {"accum_steps": 1, "sync_bn": False}, {"accum_steps": 2, "sync_bn": False})):
        write_run(tmp_path / f"s{seed}", args=arguments(seed, tmp_path / f"s{seed}", **flags))
    rows = json.loads(said(tmp_path, "--mean", "--json")[1])
    assert [(row["run"], row["seeds"]) for row in rows] == [("s{0,1}", 2), ("s2", 1)]


def test_a_single_run_is_told_from_those_of_a_group(tmp_path, said):
    for name, lr in (("a", 0.1), ("b", 0.5)):
        for seed in (0, 1) if name == "a" else (1,):
            write_run(tmp_path / name / f"s{seed}", args=arguments(seed, tmp_path / name / f"s{seed}", lr=lr))
    rows = json.loads(said(tmp_path, "--mean", "--json")[1])
    assert [row["run"] for row in rows] == ["s{0,1}", "b/s1"]


def test_other_data_under_the_same_arguments_keep_their_rows(tmp_path, said):
    for seed, counts in enumerate(([200, 50, 5], [300, 50, 5])):
        folder = tmp_path / f"s{seed}"
        write_run(folder, RECORD | {"train_counts": counts}, args=arguments(seed, folder))
    _, out, err = said(tmp_path, "--mean", "--json")
    assert len(json.loads(out)) == 2 and "linear train_counts" in err


def test_runs_that_started_from_different_runs_keep_their_rows(tmp_path, said):
    """The arguments of stage II are the same; those of the runs it started from differ, and all folders were moved."""
    for seed in (0, 1):
        for name, weight in (("plain", 0.0), ("contrast", 1.0)):
            was = Path("/former") / f"{name}{seed}"
            here = tmp_path / f"{name}{seed}"
            write_run(here / "i", args=arguments(seed, was / "i", con_weight=weight))
            second = arguments(7, was / "ii", last_stage_ckpt=str(was / "i" / LAST), program="ssd_stage_ii.py")
            write_run(here / "ii", args=second)
    folders = sorted(tmp_path.glob("*/ii"))
    rows = json.loads(said(*folders, "--mean", "--json")[1])
    assert [(row["run"], row["seeds"]) for row in rows] == [("contrast{0,1}/ii", 2), ("plain{0,1}/ii", 2)]


def test_runs_with_the_same_seed_are_not_averaged(tmp_path, said):
    for name in "ab":
        write_run(tmp_path / name, args=arguments(3, tmp_path / name))
    status, out, err = said(tmp_path, "--mean", "--json")
    assert status == 0 and [row["seeds"] for row in json.loads(out)] == [1, 1]
    assert err == "note: b: has the arguments and the seed of another run; not averaged\n"


def test_runs_without_arguments_are_not_averaged(tmp_path, said):
    for name in "ab":
        write_run(tmp_path / name)
    _, out, err = said(tmp_path, "--mean", "--json")
    assert len(json.loads(out)) == 2 and err.count("no args.json") == 2


@pytest.mark.parametrize("folders, name", [
    (["/r/s0/i", "/r/s1/i"], "r/s{0,1}/i"),
    (["/r/a_i", "/r/b_i"], "r/{a,b}_i"),
    (["/r/i"], "r/i"),
    (["/r/x", "/r/s/i"], "x + i"),
    (["/r/s", "/r/s1"], "r/s{,1}"),
])  # fmt: skip
def test_groups_are_named_by_what_their_folders_share(folders, name):
    assert "/".join(pattern([Path(folder) for folder in folders])).removeprefix("//") == name


def test_flags_of_one_run_alone_do_not_keep_seeds_apart():
    """They are the flags that a checkpoint does not keep, except those that are compared in another way."""
    kept = {"start_epoch", "num_classes", "compile", "multiprocessing_distributed", "nproc", "world_size", "pretrained"}
    for script in (ssd_stage_i, ssd_stage_ii, ssd_stage_iii):
        parser = script.get_parser()
        run_only = set(filter(has_value, parser._actions))
        run_only = {action.dest for action in run_only} - set(parser.saved_actions())
        assert run_only - kept - set(CHECKPOINTS) <= IGNORED


def test_checkpoints_elsewhere_are_found_where_they_were():
    assert checkpoint_folder(Path("/no/run"), "/was/run", "/other/i/last.pth.tar") == Path("/other/i")
    assert checkpoint_folder(Path("/no/run"), "/was/run", "last.pth.tar") == Path()


def test_runs_that_do_not_say_where_they_started_are_averaged(tmp_path, said):
    for seed in (0, 1):
        folder = tmp_path / f"s{seed}" / "stage_ii"
        write_run(folder, args=arguments(seed, folder, last_stage_ckpt=""))
    status, out, err = said(tmp_path, "--mean", "--json")
    assert (status, err) == (0, "") and [row["seeds"] for row in json.loads(out)] == [2]


# Formats


def test_csv_and_json_hold_the_same_numbers_in_full(tmp_path, said):
    run = write_run(tmp_path / 'a, "b"', RECORD, RECORD | {"classifier": "hard", "few": None})
    from_json = json.loads(said(run, "--json")[1])
    from_csv = list(csv.DictReader(io.StringIO(said(run, "--csv")[1])))
    assert [list(row) for row in from_csv] == [list(row) for row in from_json]
    assert from_json[0]["run"] == 'a, "b"' and from_json[0]["class_mean"] == 1.25 / 3
    for text, exact in zip(from_csv, from_json, strict=True):
        for name, value in exact.items():
            assert (float(text[name]) == value) if isinstance(value, float) else (text[name] == (value or ""))


def test_csv_and_json_contradict_each_other(tmp_path, said):
    assert "--csv" in refused(said(write_run(tmp_path / "run"), "--csv", "--json"))


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


def test_classes_of_old_results_are_numbered(tmp_path, said):
    record = OLD | {"per_class": [1.0, None, 1.0]}
    rows = json.loads(said("--per-class", write_run(tmp_path / "run", record), "--json")[1])
    assert [row["class"] for row in rows] == ["class 2", "class 0", "class 1"]  # the rarer first; without images: last
    assert all(row["test_images"] is row["mistake"] is None for row in rows)


def test_per_class_without_accuracies_per_class_is_refused(tmp_path, said):
    record = {name: value for name, value in OLD.items() if name != "per_class"}
    record = {name: value for name, value in record.items() if name != "train_counts"}
    assert "results.json" in refused(said("--per-class", write_run(tmp_path / "run", record)))


def test_per_class_and_mean_contradict_each_other(tmp_path, said):
    assert "--per-class" in refused(said(write_run(tmp_path / "run"), "--per-class", "--mean"))


def test_class_names_do_not_break_the_table(tmp_path, said):
    record = RECORD | {"classes": [HOSTILE, "dog", "fox"]}
    out = said("--per-class", write_run(tmp_path / "run", record))[1]
    lines = out.splitlines()
    assert len(lines) == 8 and "\x1b" not in out
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines[2:7]} == {6}


def test_class_names_are_escaped_on_a_terminal_that_cannot_show_them(tmp_path, monkeypatch):
    record = RECORD | {"classes": ["Füchse", "\ud800", "狐"]}
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert report.main(["--per-class", str(write_run(tmp_path / "run", record))]) == 0
    terminal.flush()
    assert "| F\\xfcchse " in terminal.buffer.getvalue().decode("ascii")


# Files that are not valid results


@pytest.mark.parametrize("content", [
    "", "{", "[]", "{}", "null", "[1]", "[" * 100_000, '[{"classifier": "hard"}]', "[NaN]",
    json.dumps([RECORD | {"overall": 55.3}]),
    json.dumps([RECORD | {"overall": "0.5"}]),
    json.dumps([RECORD | {"few": float("nan")}]),
    json.dumps([RECORD | {"classifier": "../hard"}]),
    json.dumps([RECORD | {"classes": ["cat"]}]),
    json.dumps([RECORD | {"per_class": [0.5, 0.5]}]),
    json.dumps([RECORD | {"train_counts": [1, 2, -3]}]),
    json.dumps([RECORD | {"train_counts": [1, 2, 10**30]}]),
    json.dumps([RECORD | {"confusion": [[1, 2], [3, 4]]}]),
    json.dumps([RECORD | {"confusion_groups": [[1, 2, 3]]}]),
    b"\xff\xfe\x00",
])  # fmt: skip
def test_a_file_without_valid_results_ends_in_one_line(tmp_path, said, content):
    file = write_run(tmp_path / "run") / "results.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert str(file) in refused(said(tmp_path / "run"))
    assert str(file) in refused(said(tmp_path))


def test_folders_without_results_end_in_one_line(tmp_path, said):
    assert str(tmp_path / "none") in refused(said(tmp_path / "none"))
    assert "results.json" in refused(said(tmp_path))
    (tmp_path / "results.json").mkdir()
    assert "results.json" in refused(said(tmp_path))


def test_a_damaged_args_json_ends_in_one_line(tmp_path, said):
    run = write_run(tmp_path / "run")
    (run / "args.json").write_text("{")
    assert said(run)[0] == 0
    assert "args.json" in refused(said(run, "--mean"))


# Plots


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib")


def is_drawn(file: Path) -> bool:
    """Whether a PNG file has more than one color."""
    from PIL import Image

    with Image.open(file) as image:
        return image.format == "PNG" and len(image.convert("RGB").getcolors(2**24)) > 10


NAMES = ["losses", "accuracies", "class_counts", "per_class_linear", "confusion_linear"]


def test_plots_are_drawn(tmp_path, said, matplotlib):
    run = write_run(tmp_path / "run", log=[EPOCH, EPOCH | {"epoch": 1, "loss": 1.0}])
    with (run / "log.txt").open("a") as log:
        log.write('{"epoch": 2, "lo')  # a crash cut it short
    assert said(run, "--plots", tmp_path / "out" / "plots")[0] == 0
    files = sorted((tmp_path / "out" / "plots").iterdir())
    assert [file.name for file in files] == sorted(f"{name}.{kind}" for name in NAMES for kind in ("pdf", "png"))
    for file in files:
        assert is_drawn(file) if file.suffix == ".png" else file.read_bytes().startswith(b"%PDF")


def test_plots_of_several_runs_have_one_folder_per_run(tmp_path, said, matplotlib):
    write_run(tmp_path / "runs" / "s0" / "i", RECORD, RECORD | {"classifier": "hard"})
    write_run(tmp_path / "runs" / "s1" / "i", OLD)
    assert said(tmp_path / "runs", "--plots", tmp_path / "out")[0] == 0
    drawn = {name: {file.stem for file in (tmp_path / "out" / name / "i").glob("*.png")} for name in ("s0", "s1")}
    assert drawn["s1"] == set(NAMES[2:])  # without log.txt
    assert drawn["s0"] == {*NAMES[2:], "per_class_hard", "confusion_hard"}


def test_invalid_lines_of_log_txt_are_skipped(tmp_path, said, matplotlib):
    odd = ["text", [1], {"epoch": "one"}, {"epoch": 0, "loss": "low", "val": 3, "top1_linear": 7, "$x": 1e400},
           {"epoch": 1, "loss": None, "val": {"linear": [1]}}, {"epoch": 2, "$x^": 1.0}]  # fmt: skip
    run = write_run(tmp_path / "run", log=odd)
    assert said(run, "--plots", tmp_path / "out")[0] == 0
    assert {file.stem for file in (tmp_path / "out").iterdir()} == {"losses", *NAMES[2:]}


@pytest.mark.parametrize("counts", [[0, 0, 0], [0, 50, 5], [1, 1, 1], [10**9, 10**5, 1]])
def test_plots_are_drawn_for_any_training_counts(tmp_path, said, matplotlib, counts):
    run = write_run(tmp_path / "run", RECORD | {"train_counts": counts, "per_class": [None, 0.5, None], "many": None})
    assert said(run, "--plots", tmp_path / "out")[0] == 0
    assert all(map(is_drawn, (tmp_path / "out").glob("*.png")))


def test_the_running_mean_is_the_one_computed_by_hand():
    from utils.results.plots import running_mean

    assert running_mean([8, 1, 4, 2], [0.4, 0.0, 0.3, 0.1]) == (
        [1, 2, 4, 8], [pytest.approx(value) for value in (0.05, 0.4 / 3, 0.8 / 3, 0.35)],
    )  # fmt: skip
    counts, means = running_mean([5, 5, 5], [0.0, 0.3, 0.6])
    assert counts == [5] and means == [pytest.approx((0.15 + 0.3 + 0.45) / 3)]


def test_shot_groups_are_those_of_the_evaluation():
    import torch

    from utils.groups import GROUPS, shot_groups
    from utils.results.plots import group_of

    counts = [0, 1, 19, 20, 100, 101, 10**6]
    assert [group_of(count) for count in counts] == [GROUPS[i] for i in shot_groups(torch.tensor(counts))]


@pytest.mark.parametrize("flag", ["--plots", "--html"])
def test_a_missing_matplotlib_ends_in_one_line(tmp_path, said, monkeypatch, flag):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    line = refused(said(write_run(tmp_path / "run"), flag, tmp_path / "out"))
    assert flag in line and "pip install matplotlib" in line and not (tmp_path / "out").exists()
    assert said(tmp_path / "run", "--per-class")[0] == 0


@pytest.mark.parametrize("flag", ["--plots", "--html"])
def test_an_output_that_cannot_be_written_ends_in_one_line(tmp_path, said, matplotlib, flag):
    (tmp_path / "file").write_text("")
    assert flag in refused(said(write_run(tmp_path / "run"), flag, tmp_path / "file" / "out"))


def test_a_stage_draws_its_plots_at_the_end(plain_tree, tmp_path, matplotlib):
    assert call("i", stage_flags("i", plain_tree, tmp_path, ["--plots", "--con-weight", 0])).status == 0
    assert {file.stem for file in (tmp_path / "plots").iterdir()} == set(NAMES)


def test_a_stage_without_matplotlib_stops_before_it_trains(plain_tree, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    outcome = call("i", stage_flags("i", plain_tree, tmp_path / "run", ["--plots"]))
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and "pip install matplotlib" in outcome.err
    assert not (tmp_path / "run").exists()


# The page


class Page(HTMLParser):
    """Collects a page's elements, texts, and the addresses that it refers to."""

    ADDRESSES = ("src", "href", "srcset", "action", "data", "poster", "background")

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.texts, self.handlers = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in self.ADDRESSES]
        self.handlers += [name for name, _ in attributes if name.startswith("on")]

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def page(tmp_path, said, matplotlib):
    """The page of two seeds and a run with hostile names, parsed, and its text."""
    for seed in (0, 1):
        folder = tmp_path / "runs" / f"s{seed}" / "<b>i&amp;"
        record = RECORD | {"classes": [HOSTILE, "</td>", "a&b"]}
        given = arguments(seed, folder, dist_url="tcp://10.0.0.1:2", note=HOSTILE)
        write_run(folder, record, args=given | {HOSTILE: [1]}, log=[EPOCH])
    status, _, err = said(tmp_path / "runs", "--mean", "--html", tmp_path / "page.html")
    assert (status, err) == (0, "")
    text = (tmp_path / "page.html").read_text()
    return Page(text), text


def test_the_page_contains_no_external_address(page):
    parsed, text = page
    assert parsed.addresses and all(address.startswith(("data:image/png;base64,", "#")) for address in parsed.addresses)
    assert "://" not in text and "url(" not in text and "@import" not in text
    assert not {"link", "iframe", "object", "embed", "base", "form"} & set(parsed.tags)


def test_the_page_escapes_every_name(page):
    parsed, text = page
    assert parsed.tags.count("script") == 1 and not parsed.handlers and "b" not in parsed.tags
    assert "\x1b" not in text
    shown = HOSTILE.replace("\n", "\\n").replace("\x1b", "\\x1b")
    assert sum(shown == part for part in parsed.texts) == 2 * 1 + 2 + 1  # a class, an argument per run, its name
    assert "s0/<b>i&amp;, linear classifier" in parsed.texts and "</td>" in parsed.texts and "a&b" in parsed.texts


def test_the_page_contains_tables_plots_arguments_and_versions(page):
    parsed, _ = page
    assert parsed.tags.count("img") == 2 * len(NAMES)
    for text in (
        "Seeds",
        "50.0 ± 0.0",
        "Class mean",
        "41.7",
        "Few: 2 test images in all few-shot classes together; read this column with care.",
        "Most common mistake",
        "2.14.1",
        "ssd_stage_i.py",
    ):
        assert text in parsed.texts


def test_the_page_needs_only_results_json(tmp_path, said, matplotlib):
    record = {name: OLD[name] for name in ("classifier", "overall", "top5", "many", "medium", "few")}
    assert said(write_run(tmp_path / "run", record), "--html", tmp_path / "page.html")[0] == 0
    assert "run, linear classifier" in Page((tmp_path / "page.html").read_text()).texts


def test_runs_are_read_as_they_were_written(tmp_path):
    (run,) = read_runs([write_run(tmp_path / "run", OLD)])
    assert run.records == [OLD | {
        "class_mean": pytest.approx(1.25 / 3), "test_counts": None, "confusion": None,
        "classes": ["class 0", "class 1", "class 2"],
    }]  # fmt: skip
