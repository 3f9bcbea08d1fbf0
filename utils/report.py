"""Tables of results: accuracies by group of classes, in per cent.

python -m utils.report RUN [RUN ...]                    one table of several runs' results.json
python -m utils.report RUNS --mean                      mean and standard deviation over the seeds
python -m utils.report RUN --per-class                  every class, the worst first, and its most common mistake
python -m utils.report RUNS --plots OUT --html FILE     curves as PNG and PDF, and all of it on one page (matplotlib)

RUN is an --output_dir, or a folder that has several of them below it.
"""

import csv
import io
import json
import sys
from pathlib import Path

from .command_line import ArgumentParser, non_empty, run_command
from .errors import UserError, printable
from .metrics import FEW_BELOW
from .runs import ACCURACIES, Run, class_mean, read_runs
from .seeds import group_by_seed, mean_rows

COLUMNS = {
    "many": "Many",
    "medium": "Medium",
    "few": "Few",
    "class_mean": "Class mean",
    "overall": "Overall",
    "top5": "Top-5",
}
FEW_TEST_IMAGES = 50  # test images of few-shot classes; with fewer, a table says how many there are


def percent(value) -> str:
    """An accuracy of [0, 1] in per cent, or - for None."""
    return "-" if value is None else f"{100 * value:.1f}"


def table(results: dict[str, dict]) -> str:
    """A Markdown table in per cent, with few_note; results: row name -> a record of results.json."""
    results = {name: result | {"class_mean": class_mean(result)} for name, result in results.items()}
    rows = [[name, *(percent(result[key]) for key in COLUMNS)] for name, result in results.items()]
    return "\n".join([markdown(["", *COLUMNS.values()], rows), *few_note(list(results.values()))])


def few_note(records: list[dict]) -> list[str]:
    """The lines below a table if its few-shot accuracies come from a handful of test images, else none."""
    numbers = set()
    for record in records:
        classes = zip(record.get("train_counts") or (), record.get("test_counts") or (), strict=False)
        numbers.add(sum(tested for trained, tested in classes if trained < FEW_BELOW))
    few = sorted(number for number in numbers if 0 < number < FEW_TEST_IMAGES)
    if not few:
        return []
    number = f"{few[0]}" if len(few) == 1 else f"{few[0]} to {few[-1]}"
    return ["", f"Few: {number} test images in all few-shot classes together; read this column with care."]


def markdown(header: list[str], rows: list[list[str]], texts: tuple[int, ...] = (0,)) -> str:
    """A Markdown table; texts: the numbers of the columns to align left; the others are aligned right."""
    rows = [header, *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pads = [str.ljust if i in texts else str.rjust for i in range(len(widths))]
    lines = [" | ".join(pad(cell, width) for pad, cell, width in zip(pads, row, widths, strict=True)) for row in rows]
    rule = "|".join(
        ":" + "-" * (width + 1) if pad is str.ljust else "-" * (width + 1) + ":"
        for pad, width in zip(pads, widths, strict=True)
    )
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])


def summary_rows(runs: list[Run]) -> list[dict]:
    """One row per run and classifier: run, classifier, accuracies in [0, 1]."""
    return [
        {"run": run.name, "classifier": record["classifier"]} | {name: record[name] for name in ACCURACIES}
        for run in runs
        for record in run.records
    ]


def summary_cells(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of summary_rows or of seeds.mean_rows, in per cent."""
    seeds = ["Seeds"] if any("seeds" in row for row in rows) else []
    cells = []
    for row in rows:
        name = f"{row['run']}, {row['classifier']} classifier"
        cells.append([name, *(str(row["seeds"]) for _ in seeds), *(format_accuracy(row, key) for key in COLUMNS)])
    return ["", *seeds, *COLUMNS.values()], cells


def format_accuracy(row: dict, key: str) -> str:
    """An accuracy in per cent, with its standard deviation if the row has one."""
    deviation = row.get(f"{key}_std")
    return percent(row[key]) + ("" if deviation is None else f" ± {percent(deviation)}")


def class_rows(run: Run, record: dict) -> list[dict]:
    """One row per class of a classifier, the worst first: class, images, accuracy, and the most common mistake.

    mistake is the class that most images of this class were wrongly predicted as, mistake_images their number. Classes
    with the same accuracy are sorted by training images; those without test images come last. Raises UserError if
    results.json has no accuracies per class.
    """
    accuracies, names = record["per_class"], record["classes"]
    if not accuracies:
        raise UserError(f"{run.folder / 'results.json'}: has no accuracies per class; evaluate the run again")
    rows = []
    for label, accuracy in enumerate(accuracies):
        taken_for = record["confusion"][label] if record["confusion"] else []
        wrong = [0 if i == label else count for i, count in enumerate(taken_for)]
        most = max(wrong, default=0)
        rows.append({
            "run": run.name,
            "classifier": record["classifier"],
            "class": names[label],
            "train_images": record["train_counts"][label] if record["train_counts"] else None,
            "test_images": record["test_counts"][label] if record["test_counts"] else None,
            "accuracy": accuracy,
            "mistake": names[wrong.index(most)] if most else None,
            "mistake_images": most or None,
        })  # fmt: skip
    return sorted(rows, key=lambda row: (row["accuracy"] is None, row["accuracy"], row["train_images"] or 0))


CLASS_COLUMNS = ["Class", "Training images", "Test images", "Accuracy", "Most common mistake"]


def class_cells(rows: list[dict]) -> list[list[str]]:
    """Cells of class_rows under CLASS_COLUMNS, accuracies in per cent."""
    cells = []
    for row in rows:
        images = ["-" if row[name] is None else str(row[name]) for name in ("train_images", "test_images")]
        mistake = "-" if row["mistake"] is None else f"{row['mistake']} ({row['mistake_images']})"
        cells.append([row["class"], *images, percent(row["accuracy"]), mistake])
    return cells


def to_csv(rows: list[dict]) -> str:
    """Rows with the same keys as CSV, numbers in full, None as an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def get_parser() -> ArgumentParser:
    description = __doc__.partition("\n\n")[2]
    parser = ArgumentParser(description, intermixed=True, prog="python -m utils.report")
    # fmt: off
    parser.add_argument("folders", nargs="+", metavar="RUN",
        help="an --output_dir that holds results.json, or a folder with several of them below it")
    parser.add_argument("--mean", action="store_true",
        help="one row for runs that differ only in their seed: mean and sample standard deviation")
    parser.add_argument("--per-class", action="store_true",
        help="one table of all classes per classifier, the worst first: training and test images, accuracy, and the "
        "class that it is most often mistaken for, with the number of these images")
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument("--csv", action="store_true",
        help="print the table as CSV, accuracies in [0, 1] with all digits")
    formats.add_argument("--json", action="store_true", help="print the table as a JSON list, likewise")
    parser.add_argument("--plots", type=non_empty, metavar="OUT",
        help="draw each run's curves into this folder, as PNG and PDF (pip install matplotlib)")
    parser.add_argument("--html", type=non_empty, metavar="FILE",
        help="write tables, curves and arguments to one page that refers to no other file (pip install matplotlib)")
    # fmt: on
    return parser


def report(args):
    """Prints the tables and writes the files that the command line asks for."""
    if args.mean and args.per_class:
        raise UserError("--per-class: shows single runs, and contradicts --mean; leave one of them out")
    if args.plots or args.html:
        from . import html_report, plots  # which most reports do not need

        plots.require_matplotlib("--plots" if args.plots else "--html")
    runs = read_runs(args.folders)
    groups = None
    if args.mean:
        groups, notes = group_by_seed(runs)
        for note in notes:
            print(f"note: {printable(note)}", file=sys.stderr)
    if args.plots:
        for run in runs:
            folder = Path(args.plots, run.name.lstrip("/")) if len(runs) > 1 else Path(args.plots)
            plots.write_plots(run, folder)
    if args.html:
        html_report.write_page(args.html, runs, groups)
    write_tables(args, runs, groups)


def write_tables(args, runs: list[Run], groups):
    """Prints the table, or the tables of classes, in the requested format."""
    if args.per_class:
        tables = [class_rows(run, record) for run in runs for record in run.records]
    else:
        tables = [mean_rows(groups) if args.mean else summary_rows(runs)]
    if args.csv:
        sys.stdout.write(to_csv([row for rows in tables for row in rows]))
    elif args.json:
        print(json.dumps([row for rows in tables for row in rows], indent=1))
    elif args.per_class:
        for rows in tables:
            print(f"{rows[0]['run']}, {rows[0]['classifier']} classifier\n")
            print(markdown(CLASS_COLUMNS, class_cells(rows), texts=(0, 4)) + "\n")
    else:
        records = [record for run in runs for record in run.records]
        print("\n".join([markdown(*summary_cells(tables[0])), *few_note(records)]))


def main(argv=None) -> int:
    """Prints the tables; returns the exit status."""
    return run_command(report, get_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
