"""The study of docs/study.md: the method and its baselines on CIFAR100-LT, cell by cell.

    python -m benchmarks.study main --source CIFAR100                 trains what is missing of a plan, see PLANS
    python -m benchmarks.study main ablations --dry-run               shows what that would be
    python -m benchmarks.study --write docs/study.md --plot docs/study/per_class.png     tables and plot of what is done

A cell is one training: a stage, a recipe, a seed. It trains in WORK/<group>/<cell>/seed_<n>, where it goes on if it was
stopped; results.json, log.txt and args.json are copied to docs/study/<group>/<cell>/seed_<n> when it ends, and a cell
with results there is not trained again, unless a cell that is missing needs its checkpoint. CIFAR100 contains
train/<class>/<image> and test/<class>/<image>. Run it from the project's folder, so that the recorded paths are short.
"""

import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from datasets.prepare.cli import main as prepare
from utils.checkpoint import LAST
from utils.command_line import ArgumentParser, run_command, whole_number
from utils.distributed import num_cores
from utils.errors import UserError
from utils.log import write_json
from utils.results.plots import new_axes, require_matplotlib, running_mean, save_figure
from utils.results.records import Group, read_runs
from utils.results.tables import COLUMNS, format_accuracy, mean_rows

from .common import Table, publish

RECORDS = Path("docs/study")
KEPT = ("args.json", "log.txt")  # besides results.json, which is copied without its large matrix
LISTS = {  # flags of `python -m datasets.prepare long-tail`
    "choice": "--imbalance 100 --held-out 20 --max-per-class 480",
    "imbalance_100": "--imbalance 100",
    "imbalance_50": "--imbalance 50",
    "imbalance_10": "--imbalance 10",
}
RECIPES = {"imbalance_50": "configs/cifar100_lt_50", "imbalance_10": "configs/cifar100_lt_10"}
RECIPE = "configs/cifar100_lt"  # of the others


class Cell(NamedTuple):
    """One training: its name, stage, the cell whose checkpoint it starts from, and flags beyond the recipe."""

    name: str
    stage: str
    source: str | None = None
    flags: str = ""


MAIN = (
    Cell("ce", "i", None, "--con-weight 0"),
    Cell("ce_lws", "ii", "ce"),
    Cell("i", "i", None, "--con-weight 1"),
    Cell("ii", "ii", "i"),
    Cell("iii", "iii", "ii"),
    Cell("iii_tuned_hard", "ii", "iii", "--classifier hard"),
    Cell("iii_tuned_soft", "ii", "iii", "--classifier soft"),
)
HALF = (
    Cell("i_con_0.5", "i", None, "--con-weight 0.5"),
    Cell("ii_con_0.5", "ii", "i_con_0.5"),
    Cell("iii_con_0.5", "iii", "ii_con_0.5"),
    Cell("iii_con_0.5_tuned_soft", "ii", "iii_con_0.5", "--classifier soft"),
)
CON_1 = (*MAIN[2:5], MAIN[6])  # those of HALF with the published weight
TEACHER_CE = Cell("iii_teacher_ce", "iii", "ce_lws")
PARTS = (*MAIN[:2], *HALF, TEACHER_CE)
ABLATIONS = (
    TEACHER_CE,
    Cell("iii_no_kd", "iii", None, "--kd-weight 0"),
    Cell("ii_freeze_bn", "ii", "i", "--freeze-bn"),
    Cell("ce_lws_freeze_bn", "ii", "ce", "--freeze-bn"),
    Cell("iii_freeze_bn", "iii", "ii_freeze_bn", "--freeze-bn"),
)
TRIALS = (
    *HALF[:2],
    Cell("iii_kd_t_1", "iii", "ii", "--kd_t 1"),
    Cell("iii_kd_t_4", "iii", "ii", "--kd_t 4"),
)


class Plan(NamedTuple):
    """Cells on a data set, each with these seeds; epochs: of stages I and III; splits: --bn-splits of all cells."""

    lists: str
    epochs: int
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]
    title: str
    splits: int = 1

    @property
    def group(self) -> Path:
        """The relative folder of its records; plans of the same lists, epochs and splits share it."""
        return Path(self.lists, f"{self.epochs}_epochs" + (f"_splits_{self.splits}" if self.splits > 1 else ""))


def choice_cells():
    """Stage I under candidate settings, each followed by the candidates of stage II."""
    candidates = {"no_jitter": "--jitter 0", "jitter": "--jitter 0.4"}
    for name, flags in candidates.items():
        yield Cell(f"i_{name}", "i", None, f"{flags} --con-weight 1")
        for lr in ("0.05", "0.2", "1"):
            yield Cell(f"ii_{name}_lr_{lr}", "ii", f"i_{name}", f"{flags} --lr {lr}")


def parts_cells():
    """Stages I and II with BatchNorm by parts, under the published and half the contrastive weight."""
    for weight, splits in itertools.product(("1", "0.5"), (4, 1, 8)):
        name = f"splits_{splits}_con_{weight}"
        yield Cell(f"i_{name}", "i", None, f"--bn-splits {splits} --con-weight {weight}")
        yield Cell(f"ii_{name}", "ii", f"i_{name}", f"--bn-splits {splits}")


PLANS = {
    "choice": Plan("choice", 30, (0,), tuple(choice_cells()), "Settings, on held-out images"),
    "choice_parts": Plan("choice", 30, (0,), tuple(parts_cells()), "Settings, on held-out images"),
    "main": Plan("imbalance_100", 100, (0, 1, 2), MAIN, "Imbalance 100, 100 epochs"),
    "ablations": Plan("imbalance_100", 100, (0, 1, 2), ABLATIONS, "Imbalance 100, 100 epochs"),
    "trials": Plan("imbalance_100", 100, (0,), TRIALS, "Imbalance 100, 100 epochs"),
    "parts": Plan("imbalance_100", 100, (0, 1, 2), PARTS, "BatchNorm in 4 parts, imbalance 100, 100 epochs", 4),
    "parts_con_1": Plan("imbalance_100", 100, (0,), CON_1, "BatchNorm in 4 parts, imbalance 100, 100 epochs", 4),
    "parts_50": Plan("imbalance_50", 100, (0,), PARTS, "BatchNorm in 4 parts, imbalance 50, 100 epochs", 4),
    "parts_10": Plan("imbalance_10", 100, (0,), PARTS, "BatchNorm in 4 parts, imbalance 10, 100 epochs", 4),
    "parts_long": Plan("imbalance_100", 200, (0,), PARTS, "BatchNorm in 4 parts, imbalance 100, 200 epochs", 4),
}


class Job(NamedTuple):
    """A cell of a plan with its seed."""

    plan: Plan
    seed: int
    cell: Cell

    @property
    def path(self) -> Path:
        """The relative folder of its run and of its records."""
        return self.plan.group / self.cell.name / f"seed_{self.seed}"

    @property
    def source(self) -> "Job | None":
        """The job whose checkpoint it starts from; its cell may belong to another plan."""
        cells = {cell.name: cell for plan in PLANS.values() if plan.group == self.plan.group for cell in plan.cells}
        return self._replace(cell=cells[self.cell.source]) if self.cell.source else None

    @property
    def done(self) -> bool:
        return (RECORDS / self.path / "results.json").is_file()

    def finished(self, work: Path) -> bool:
        """Whether its checkpoint is there, for others to start from."""
        return all((work / self.path / name).is_file() for name in ("results.json", LAST))

    def command(self, work: Path, flags: list[str]) -> list[str]:
        """The words of the training's command."""
        stage = self.cell.stage
        data = work / "data" / self.plan.lists
        recipe = RECIPES.get(self.plan.lists, RECIPE)
        words = [sys.executable, f"ssd_stage_{stage}.py", f"@{recipe}/stage_{stage}.txt"]
        if stage != "ii":
            words += ["--epochs", str(self.plan.epochs)]
        words += ["--bn-splits", str(self.plan.splits)]
        if self.source:
            flag = {"ii": "--last_stage_ckpt", "iii": "--teacher_ckpt"}[stage]
            words += [flag, str(work / self.source.path / LAST)]
        if self.plan.lists == "choice":  # no test figure exists before the choice is made
            words += ["--test-list", str(data / "val.txt")]
        words += [*shlex.split(self.cell.flags), "--seed", str(self.seed), "--output_dir", str(work / self.path)]
        return [*words, "--resume", "auto", "--print-freq", "1000000", *flags, str(data)]


def list_jobs(names: list[str], seeds: list[int] | None) -> list[Job]:
    """The jobs of the plans, seed by seed, so that the cells that share a checkpoint follow each other."""
    plans = [(PLANS[name], PLANS[name].seeds if seeds is None else seeds) for name in names]
    every = dict.fromkeys(itertools.chain(*(own for _, own in plans)))
    return [Job(plan, seed, cell) for seed in every for plan, own in plans if seed in own for cell in plan.cells]


def missing_jobs(jobs: list[Job], work: Path) -> list[Job]:
    """Those that are not done, in an order that can be trained, with the finished ones whose checkpoint is gone."""
    needed = {}  # by path: two plans may need the same cell

    def need(job):
        if job.source and not job.source.finished(work):
            need(job.source)
        needed.setdefault(job.path, job)

    for job in jobs:
        if not job.done:
            need(job)
    return list(needed.values())


def prepare_lists(names, source: str | None, work: Path):
    """Makes the lists that are not there yet."""
    for name in sorted(names):
        out = work / "data" / name
        if (out / "test.txt").is_file():
            continue
        if source is None:
            raise UserError("--source: name the folder that holds CIFAR-100's train/ and test/ class folders")
        if prepare(["long-tail", source, *LISTS[name].split(), "--out", str(out)]):
            raise UserError(f"{out}: its lists could not be made; see above")


def keep(job: Job, work: Path):
    """Copies the small files of a finished cell to its records; results.json last, since it marks the cell as done."""
    target = RECORDS / job.path
    target.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        (target / name).write_bytes((work / job.path / name).read_bytes())
    records = json.loads((work / job.path / "results.json").read_text())
    write_json(target / "results.json", [{k: v for k, v in r.items() if k != "confusion"} for r in records])


def train(job: Job, work: Path, flags: list[str], threads: int) -> float:
    """Trains a cell and keeps its records; returns the seconds. Raises UserError if it ends with another status."""
    started = time.monotonic()
    folder = work / job.path
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output.txt").open("a") as output:
        status = subprocess.run(
            job.command(work, flags), stdout=output, stderr=subprocess.STDOUT, check=False,
            env={"OMP_NUM_THREADS": str(threads)} | os.environ,
        ).returncode  # fmt: skip
    if status:
        raise UserError(f"{folder}: ended with status {status}, see output.txt there; the same command continues")
    if not job.done:
        keep(job, work)
    return time.monotonic() - started


def train_all(needed: list[Job], args):
    """Trains the jobs, at most args.jobs at a time, each as soon as the one that it starts from is finished."""
    pending = list(needed)
    running = {}
    threads = max(1, num_cores() // args.jobs)
    with ThreadPoolExecutor(args.jobs) as pool:
        while pending or running:
            unfinished = {job.path for job in [*pending, *running.values()]}
            ready = [job for job in pending if not job.source or job.source.path not in unfinished]
            for job in ready[: args.jobs - len(running)]:
                pending.remove(job)
                running[pool.submit(train, job, args.work, args.flags, threads)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                error = future.exception()
                outcome = f"failed; {len(running)} still running" if error else f"{future.result():.0f} s"
                print(f"{time.strftime('%H:%M:%S')} {job.path}: {outcome}", flush=True)
                if error:  # said before those that still run end, which may take hours
                    raise error


# ---- tables


def read_groups(cells, folder: Path) -> list[Group]:
    """The runs of each cell that has any, all seeds together."""
    found = {cell.name: sorted(folder.glob(f"{cell.name}/seed_*/results.json")) for cell in cells}
    return [Group(name, [read_runs([file.parent])[0] for file in files]) for name, files in found.items() if files]


def tables() -> list[Table]:
    """One table per group of records: accuracies of each cell and classifier, mean and deviation over the seeds."""
    found = []
    for group in dict.fromkeys(plan.group for plan in PLANS.values()):
        plans = [plan for plan in PLANS.values() if plan.group == group]
        rows = [
            (f"{row['run']}, {row['classifier']}", str(row["seeds"]), *(format_accuracy(row, key) for key in COLUMNS))
            for row in mean_rows(read_groups([cell for plan in plans for cell in plan.cells], RECORDS / group))
        ]
        if rows:
            title = f"{plans[0].title}: top-1 of the groups and top-5, in percent"
            headers = ("cell, classifier", "seeds", *COLUMNS.values())
            found.append(Table(str(group).replace("/", "_").removesuffix("_epochs"), title, headers, rows))
    return found


def draw(file: Path):
    """Draws the running mean of the per-class accuracies against the training images per class, mean over the seeds.

    Of the cells of the main plan that are done: cross entropy, stages I and II, and both classifiers of stage III.
    """
    require_matplotlib("--plot")
    plan = PLANS["main"]
    groups = read_groups(plan.cells, RECORDS / plan.group)
    if not groups:
        raise UserError(f"--plot {file}: no cell of the plan main is done yet")
    figure, axes = new_axes(xlabel="training images of the class", ylabel="accuracy (%)")
    for group in groups:
        for number, record in enumerate(group.runs[0].records if group.name in ("ce", "i", "ii", "iii") else ()):
            per_class = [run.records[number]["per_class"] for run in group.runs]
            means = [100 * fmean(values) for values in zip(*per_class, strict=True)]
            curve = running_mean(record["train_counts"], means)
            axes.plot(*curve, label=f"{group.name}, {record['classifier']}", linewidth=2)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    save_figure(figure, file, "--plot")


def get_parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__, prog="python -m benchmarks.study", intermixed=True)
    # fmt: off
    parser.add_argument("plans", nargs="*", metavar="PLAN", help=f"one or more of {', '.join(PLANS)}")
    parser.add_argument("--source", metavar="CIFAR100", help="the class folders, for lists that are not there yet")
    parser.add_argument("--work", type=Path, default=Path("runs/study"),
        help="for lists and runs (default: %(default)s)")
    parser.add_argument("--seeds", nargs="+", type=whole_number(), help="train only these seeds")
    parser.add_argument("--jobs", type=whole_number(1), default=1,
        help="cells to train at the same time, which share the cores (default: %(default)s)")
    parser.add_argument("--flags", type=shlex.split, default=[], help="further flags of every training, in quotes")
    parser.add_argument("--dry-run", action="store_true", help="show what would be trained, and stop")
    parser.add_argument("--plot", type=Path, metavar="FILE.png",
        help="without a plan, draw accuracy against class frequency (needs matplotlib)")
    parser.add_argument("--write", metavar="FILE", help="put the tables into this file, between their marks")
    # fmt: on
    return parser


def study(args):
    """Trains the missing cells of the plans, or prints the tables without a plan."""
    if not args.plans:
        publish(tables(), args.write)
        if args.plot:
            draw(args.plot)
        return
    if unknown := [name for name in args.plans if name not in PLANS]:
        raise UserError(f"{unknown[0][:40]}: no such plan; choose one of {', '.join(PLANS)}")
    needed = missing_jobs(list_jobs(args.plans, args.seeds), args.work)
    for job in needed:
        print(job.path, "again, for its checkpoint" if job.done else "", flush=True)
    if not needed:
        print(f"all cells of {', '.join(args.plans)} are done: their results are in {RECORDS}")
    elif not args.dry_run:
        prepare_lists({job.plan.lists for job in needed}, args.source, args.work)
        train_all(needed, args)


def main(argv=None) -> int:
    return run_command(study, get_parser(), argv, "stopped; the same command continues")


if __name__ == "__main__":
    sys.exit(main())
