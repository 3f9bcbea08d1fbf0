"""Tables of results: accuracies by group of classes, in percent.

python -m utils.report RUN [RUN ...]                    one table of several runs' results.json
python -m utils.report RUNS --mean                      mean and standard deviation over the seeds
python -m utils.report RUN --per-class                  every class, the worst first, and its most common mistake
python -m utils.report RUNS --plots OUT --html FILE     curves as PNG and PDF, and all of it on one page (matplotlib)

RUN is an --output_dir, or a folder that has several of them below it.
"""

import csv
import json
import sys
from pathlib import Path

from .command_line import ArgumentParser, non_empty, run_command
from .errors import UserError, printable
from .results import page, plots, tables
from .results.records import Run, read_runs
from .results.seeds import Group, group_by_seed


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
        page.write_page(args.html, runs, groups)
    print_tables(args, runs, groups)


def print_tables(args, runs: list[Run], groups: list[Group] | None):
    """Prints the table, or the tables of classes, in the requested format."""
    if args.per_class:
        found = [tables.class_rows(run, record) for run in runs for record in run.records]
    else:
        found = [tables.summary_rows(runs) if groups is None else tables.mean_rows(groups)]
    every_row = [row for rows in found for row in rows]
    if args.csv:
        writer = csv.DictWriter(sys.stdout, every_row[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(every_row)
    elif args.json:
        print(json.dumps(every_row, indent=1))
    elif args.per_class:
        for rows in found:
            print(f"{rows[0]['run']}, {rows[0]['classifier']} classifier\n")
            print(tables.markdown(tables.CLASS_COLUMNS, tables.class_cells(rows), texts=(0, 4)) + "\n")
    else:
        lines = tables.notes(tables.collect_records(runs))
        print("\n".join([tables.markdown(*tables.summary_cells(found[0])), *lines]))


def main(argv=None) -> int:
    """Prints the tables; returns the exit status."""
    return run_command(report, get_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
