"""benchmarks/study.py trains the cells that are missing, keeps what is done, and averages over seeds."""

import contextlib
import json
import shutil
import statistics
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import study
from benchmarks.study import Cell, Plan
from tests.helpers import ROOT, SCRIPTS, STAGES, assert_mistake, class_image, outcome_of
from tests.helpers_prepare import everything

CELLS = (
    Cell("i", "i"),
    Cell("ii", "ii", "i"),
    Cell("iii", "iii", "ii"),
    Cell("iii_no_kd", "iii", None, "--kd-weight 0"),
)
FLAGS = "--arch resnet8 --image-size 32 -b 16 -j 0 --device cpu --epochs 1 --eval-batch-size 5"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty folder with the scripts, tiny recipes and class folders; the plans are small."""
    random = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 3)):
        for label in range(4):
            (tmp_path / "balanced" / split / f"class{label}").mkdir(parents=True)
            for number in range(count):
                class_image(random, label, 32).save(tmp_path / "balanced" / split / f"class{label}" / f"{number}.png")
    (tmp_path / "recipe").mkdir()
    for stage in STAGES:
        (tmp_path / f"ssd_stage_{stage}.py").symlink_to(ROOT / f"ssd_stage_{stage}.py")
        more = "--moco-k 32 --moco-dim 8" if stage == "i" else ""
        (tmp_path / "recipe" / f"stage_{stage}.txt").write_text(f"{FLAGS} {more}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "RECIPE", "recipe")
    monkeypatch.setattr(study, "LISTS", {"imbalance_100": "--imbalance 4"})
    plans = {"main": Plan("imbalance_100", 1, (0, 1), CELLS[:2], "a title"),
             "more": Plan("imbalance_100", 1, (0,), CELLS, "a title")}  # fmt: skip
    monkeypatch.setattr(study, "PLANS", plans)
    return tmp_path


@pytest.fixture
def in_this_process(monkeypatch):
    """Trains the cells in this process, which need not start one for each."""

    real = study.subprocess.run

    def run(command, **options):
        if command[0] != sys.executable:  # git, for args.json
            return real(command, **options)
        script = {f"ssd_stage_{stage}.py": script for stage, script in SCRIPTS.items()}[command[1]]
        with contextlib.redirect_stdout(options["stdout"]):
            return SimpleNamespace(returncode=script.main(command[2:]))

    monkeypatch.setattr(study.subprocess, "run", run)


def test_missing_cells_are_trained_and_done_ones_are_kept(project, in_this_process, monkeypatch, capsys):
    assert study.main(["main", "--source", "balanced", "--seeds", "0"]) == 0
    group = project / "docs" / "study" / "imbalance_100" / "1_epochs"
    names = {f"{cell}/seed_0/{name}" for cell in ("i", "ii") for name in ("results.json", "log.txt", "args.json")}
    assert set(everything(group)) == names
    (record,) = json.loads((group / "ii" / "seed_0" / "results.json").read_text())
    assert record["classifier"] == "lws" and record["count"] == 12 and "confusion" not in record
    done = everything(group)

    with monkeypatch.context() as patch:
        patch.setattr(study.subprocess, "run", None)  # nothing may be trained
        assert study.main(["main", "--source", "balanced", "--seeds", "0"]) == 0
    assert "all cells of main are done" in capsys.readouterr().out
    assert everything(group) == done

    shutil.rmtree(project / "runs")  # cells whose checkpoint is gone are trained again, but their records stay
    assert study.main(["more", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("/")[2] for line in lines] == ["i", "ii", "iii", "iii_no_kd"]
    assert ["again" in line for line in lines] == [True, True, False, False]
    assert not (project / "runs").exists()
    assert study.main(["more", "--source", "balanced"]) == 0
    assert {name: now for name, now in everything(group).items() if name in done} == done
    assert {"iii/seed_0/results.json", "iii_no_kd/seed_0/results.json"} <= set(everything(group))


def test_plans_are_trained_seed_by_seed(project):
    names = [(job.seed, job.cell.name) for job in study.list_jobs(["main", "more"], None)]
    assert [name for seed, name in names if seed == 1] == ["i", "ii"] and names[-2:] == [(1, "i"), (1, "ii")]
    assert {name for seed, name in names[:-2]} == {cell.name for cell in CELLS}
    assert {job.seed for job in study.list_jobs(["main", "more"], [5])} == {5}


def test_several_cells_are_trained_at_the_same_time_each_after_its_source(project, monkeypatch):
    ended, both = [], threading.Barrier(2, timeout=60)

    def train(job, *_):
        if job.cell.name == "i":
            both.wait()  # of the two seeds
        assert not job.source or job.source.path in ended
        ended.append(job.path)
        return 0.0

    monkeypatch.setattr(study, "train", train)
    study.train_all(study.list_jobs(["main"], None), SimpleNamespace(jobs=2, work=project, flags=[]))
    assert len(ended) == 4


def test_a_cell_is_trained_as_its_plan_says():
    """And no test image takes part in the choice of settings."""

    def words_of(name):
        job = study.Job(study.PLANS[name], 3, study.PLANS[name].cells[0])
        words = job.command(Path("work"), ["-j", "1"])
        flags = ("--epochs", "--bn-splits", "--seed", "--test-list")
        return words, [words[words.index(flag) + 1] if flag in words else None for flag in flags]

    words, values = words_of("parts_50")
    assert "@configs/cifar100_lt_50/stage_i.txt" in words and words[-1] == "work/data/imbalance_50"
    assert values == ["100", "4", "3", None]
    assert words_of("choice")[1] == ["30", "1", "3", "work/data/choice/val.txt"]


def test_a_cell_counts_as_done_once_all_its_files_are_kept(project):
    job = study.Job(study.PLANS["main"], 0, study.PLANS["main"].cells[0])
    folder = project / "work" / job.path
    folder.mkdir(parents=True)
    (folder / "results.json").write_text("[]")
    with pytest.raises(FileNotFoundError):
        study.keep(job, project / "work")
    assert not job.done


def test_the_tables_and_the_plot_average_over_the_seeds(project, capsys, monkeypatch):
    values = {0: 0.25, 1: 0.5}
    for seed, value in values.items():
        folder = project / "docs" / "study" / "imbalance_100" / "1_epochs" / "i" / f"seed_{seed}"
        folder.mkdir(parents=True)
        names = ("overall", "class_mean", "top5", "many", "medium", "few")
        record = {"phase": "test", "classifier": "linear", **dict.fromkeys(names, value)}
        record |= {"per_class": [value, value / 2], "train_counts": [20, 5], "test_counts": [4, 4], "count": 8}
        record |= {"classes": None, "confusion_groups": [[0] * 3] * 3}
        (folder / "results.json").write_text(json.dumps([record]))
    (project / "doc.md").write_text("<!-- table: imbalance_100_1 -->\n<!-- end -->\n")
    assert study.main(["--write", "doc.md"]) == 0
    assert study.main(["--plot", "absent/plot.png"]) == 2
    assert study.main(["--plot", "plot.png"]) == 0 and (project / "plot.png").stat().st_size > 1000
    drawn = []
    monkeypatch.setattr(study, "running_mean", lambda counts, means: drawn.append(means) or (counts, means))
    study.draw(project / "plot.png")
    assert drawn == [[37.5, 18.75]]
    mean, deviation = 100 * statistics.mean(values.values()), 100 * statistics.stdev(values.values())
    row = next(line for line in (project / "doc.md").read_text().splitlines() if line.startswith("| i, linear"))
    assert row.count(f"{mean:.1f} ± {deviation:.1f}") == 6 and "| 2 |" in row


@pytest.mark.parametrize("flags, named", [
    ("--plot plot.png", ["--plot plot.png", "plan main"]),
    ("mian", ["mian", "choose one of main"]),
])  # fmt: skip
def test_mistakes_are_one_line(project, capsys, flags, named):
    assert_mistake(outcome_of(study.main, capsys, *flags.split()), *named)


def test_a_training_that_fails_and_missing_lists_are_named(project, capsys):
    assert study.main(["main"]) == 2 and "error: --source" in capsys.readouterr().err
    assert study.main(["main", "--source", "balanced", "--flags=--lr x"]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "status 2" in err and "output.txt" in err and "failed" in out


def test_a_cell_that_two_plans_need_is_trained_once(project, monkeypatch):
    again = Plan("imbalance_100", 1, (0,), (Cell("ii_other", "ii", "i", "--freeze-bn"),), "a title")
    monkeypatch.setitem(study.PLANS, "again", again)
    needed = study.missing_jobs(study.list_jobs(["main", "again"], [0]), project)
    assert [job.cell.name for job in needed] == ["i", "ii", "ii_other"]
