"""Results as people read them: accuracies by group of classes, in per cent.

python -m utils.report RUN_FOLDER [RUN_FOLDER ...]      one table of several runs' results.json
"""

import json
import sys
from pathlib import Path

from .command_line import ArgumentParser, run_command
from .errors import UserError, one_line

COLUMNS = {"many": "Many", "medium": "Medium", "few": "Few", "overall": "Overall", "top5": "Top-5"}


def percent(value) -> str:
    """An accuracy of [0, 1] in per cent, or - for None."""
    return "-" if value is None else f"{100 * value:.1f}"


def table(results: dict[str, dict]) -> str:
    """A Markdown table in per cent; results: row name -> a record of results.json."""
    rows = [["", *COLUMNS.values()]]
    rows += [[name, *(percent(result[key]) for key in COLUMNS)] for name, result in results.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first, *others = widths
    lines = [" | ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in rows]
    rule = "|".join([":" + "-" * (first + 1), *("-" * (width + 1) + ":" for width in others)])
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])


def main(argv=None) -> int:
    """Prints the table; returns the exit status."""
    parser = ArgumentParser("One table of several runs.", prog="python -m utils.report")
    parser.add_argument("folders", nargs="+", metavar="RUN_FOLDER", help="an --output_dir that holds results.json")
    return run_command(lambda args: print(table(read_rows(args.folders))), parser, argv)


def read_rows(folders) -> dict[str, dict]:
    """The records of the folders' results.json, by row name. Raises UserError naming a file that cannot be read."""
    rows = {}
    for folder in folders:
        file = Path(folder) / "results.json"
        try:
            records = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: cannot be read ({one_line(error)}); finish the run first") from None
        for record in records:
            rows[f"{Path(folder).name}, {record['classifier']} classifier"] = record
    return rows


if __name__ == "__main__":
    sys.exit(main())
