"""Results as people read them: accuracies by group of classes, in per cent.

python -m utils.report RUN_FOLDER [RUN_FOLDER ...]      one table of several runs' results.json
"""

import json
import sys
from pathlib import Path

from .command_line import ArgumentParser, run_command
from .errors import UserError, one_line
from .metrics import FEW_BELOW

COLUMNS = {
    "many": "Many", "medium": "Medium", "few": "Few", "class_mean": "Class mean", "overall": "Overall", "top5": "Top-5",
}  # fmt: skip
HANDFUL = 50  # test images of few-shot classes, below which a table says how many there are


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
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:]), *few_note(results)])


def few_note(results: dict[str, dict]) -> list[str]:
    """The line below a table whose few-shot accuracies rest on a handful of test images, if they do."""
    numbers = set()
    for result in results.values():
        classes = zip(result.get("train_counts", ()), result.get("test_counts", ()), strict=False)
        numbers.add(sum(tested for trained, tested in classes if trained < FEW_BELOW))
    few = sorted(number for number in numbers if 0 < number < HANDFUL)
    if not few:
        return []
    number = f"{few[0]}" if len(few) == 1 else f"{few[0]} to {few[-1]}"
    return ["", f"Few: {number} test images in all few-shot classes together; read this column with care."]


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
            rows[f"{Path(folder).name}, {record['classifier']} classifier"] = with_class_mean(record)
    return rows


def with_class_mean(record: dict) -> dict:
    """A record of results.json that has a class mean, which earlier versions did not write."""
    known = [accuracy for accuracy in record["per_class"] if accuracy is not None]
    return {"class_mean": sum(known) / len(known) if known else None} | record


if __name__ == "__main__":
    sys.exit(main())
