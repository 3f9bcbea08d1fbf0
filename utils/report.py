"""Results as people read them: accuracies by group of classes, in per cent.

python -m utils.report RUN_FOLDER [RUN_FOLDER ...]      one table of several runs' results.json
"""

import argparse
import json
import sys
from pathlib import Path

from .errors import UserError

COLUMNS = {"many": "Many", "medium": "Medium", "few": "Few", "overall": "Overall", "top5": "Top-5"}


def percent(value) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def table(results: dict[str, dict]) -> str:
    """A Markdown table; results: row name -> a record of results.json."""
    rows = [["", *COLUMNS.values()]]
    rows += [[name, *(percent(result[key]) for key in COLUMNS)] for name, result in results.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first, *others = widths
    lines = [" | ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in rows]
    rule = "|".join([":" + "-" * (first + 1), *("-" * (width + 1) + ":" for width in others)])
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])


def named(result: dict) -> str:
    return f"{result['classifier']} classifier"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m utils.report", description="One table of several runs.")
    parser.add_argument("folders", nargs="+", metavar="RUN_FOLDER", help="an --output_dir that holds results.json")
    rows = {}
    try:
        for folder in parser.parse_args(argv).folders:
            file = Path(folder) / "results.json"
            try:
                records = json.loads(file.read_text())
            except (OSError, ValueError) as error:
                raise UserError(f"{file}: cannot be read ({error}); finish the run first") from None
            for result in records:
                rows[f"{Path(folder).name}, {named(result)}"] = result
    except UserError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
