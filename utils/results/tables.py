"""Tables of results: accuracies by group of classes, and by class, in percent."""

from collections import Counter
from statistics import fmean, stdev

from ..groups import FEW_BELOW, percent
from .records import ACCURACIES, Group, Run

COLUMNS = {
    "many": "Many",
    "medium": "Medium",
    "few": "Few",
    "class_mean": "Class mean",
    "overall": "Overall",
    "top5": "Top-5",
}
CLASS_COLUMNS = ["Class", "Training images", "Test images", "Accuracy", "Most common mistake"]
FEW_TEST_IMAGES = 50  # test images of few-shot classes; with fewer, a table says how many there are


def table(results: dict[str, dict]) -> str:
    """A Markdown table in percent, with its notes; results: row name -> a record of results.json."""
    rows = [[name, *(percent(result[key]) for key in COLUMNS)] for name, result in results.items()]
    return "\n".join([markdown(["", *COLUMNS.values()], rows), *notes(results)])


def notes(results: dict[str, dict]) -> list[str]:
    """The lines below a table on what its accuracies cannot tell, after an empty one; results: row name -> a record."""
    lines = few_note(results.values())
    if max(list_numbers(results.values()), default=1) > 1:
        lines.append("*: tested on another list than most rows, each number of * on its own; do not compare them.")
    rows = {}  # what is true of a row -> the names of such rows
    for name, record in results.items():
        chance = 1 / len(record["per_class"])
        if record["class_mean"] is not None and record["class_mean"] <= chance < 1:
            rows.setdefault(f"Class mean at or below chance ({percent(chance)})", []).append(name)
        if seen := record.get("test_trained_on"):
            what = f"{seen} of {record['count']} test images were trained on, by the run or one that it came from"
            rows.setdefault(what, []).append(name)
    lines += [f"{text}: {'; '.join(names)}." for text, names in rows.items()]
    return ["", *lines] if lines else []


def list_numbers(records) -> list[int]:
    """Which test list each record is of: 1 is that of most, 2 the next.

    Without a checksum it is the one with these numbers of images.
    """
    records = [(tuple(record["test_counts"]), record.get("test_checksum")) for record in records]
    known = {counts: checksum for counts, checksum in records if checksum is not None}
    lists = [known.get(counts, counts) if checksum is None else checksum for counts, checksum in records]
    order = [one for one, _ in Counter(lists).most_common()]
    return [order.index(one) + 1 for one in lists]


def few_note(records) -> list[str]:
    """The line if few-shot accuracies come from a handful of test images, else none."""
    numbers = set()
    for record in records:
        classes = zip(record["train_counts"], record["test_counts"], strict=True)
        numbers.add(sum(tested for trained, tested in classes if trained < FEW_BELOW))
    few = sorted(number for number in numbers if 0 < number < FEW_TEST_IMAGES)
    if not few:
        return []
    number = f"{few[0]}" if len(few) == 1 else f"{few[0]} to {few[-1]}"
    return [f"Few: {number} test images in all few-shot classes together; read this column with care."]


def markdown(header: list[str], rows: list[list[str]], texts: tuple[int, ...] = (0,)) -> str:
    """A Markdown table; texts: the numbers of the columns to align left; the others are aligned right."""
    rows = [header, *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pads = [str.ljust if i in texts else str.rjust for i in range(len(widths))]
    lines = [" | ".join(pad(cell, width) for pad, cell, width in zip(pads, row, widths, strict=True)) for row in rows]
    rule = "|".join(f":{'-' * (n + 1)}" if i in texts else f"{'-' * (n + 1)}:" for i, n in enumerate(widths))
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])


def collect_records(runs: list[Run]) -> dict[str, dict]:
    """Row name -> record of each classifier of the runs."""
    return {row_name(run.name, record["classifier"]): record for run in runs for record in run.records}


def row_name(run: str, classifier: str) -> str:
    return f"{run}, {classifier} classifier"


def summary_rows(runs: list[Run]) -> list[dict]:
    """One row per run and classifier: run, classifier, accuracies in [0, 1], test_list (list_numbers), trained_on."""
    pairs = [(run, record) for run in runs for record in run.records]
    numbers = list_numbers([record for _, record in pairs])
    return [
        {"run": run.name, "classifier": record["classifier"]}
        | {name: record[name] for name in ACCURACIES}
        | {"test_list": number, "test_trained_on": record["test_trained_on"]}
        for (run, record), number in zip(pairs, numbers, strict=True)
    ]


def mean_rows(groups: list[Group]) -> list[dict]:
    """One row per group and classifier: run, classifier, seeds, each accuracy's mean, its deviation as NAME_std.

    It is the sample standard deviation (n - 1), None for a single seed.
    """
    rows = []
    numbers = iter(list_numbers([record for group in groups for record in group.runs[0].records]))
    for group in groups:
        for record in group.runs[0].records:
            same = [r for run in group.runs for r in run.records if r["classifier"] == record["classifier"]]
            row = {"run": group.name, "classifier": record["classifier"], "seeds": len(group.runs)}
            for name in ACCURACIES:
                values = [r[name] for r in same if r[name] is not None]
                row[name] = fmean(values) if values else None
                row[f"{name}_std"] = stdev(values) if len(values) > 1 else None
            rows.append(row | {"test_list": next(numbers)})
    return rows


def summary_cells(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of summary_rows or of mean_rows, in percent."""
    seeds = ["Seeds"] if "seeds" in rows[0] else []
    cells = []
    for row in rows:
        name = f"{row_name(row['run'], row['classifier'])} {'*' * (row['test_list'] - 1)}".rstrip()
        cells.append([name, *(str(row["seeds"]) for _ in seeds), *(format_accuracy(row, key) for key in COLUMNS)])
    return ["", *seeds, *COLUMNS.values()], cells


def format_accuracy(row: dict, key: str) -> str:
    """An accuracy of a row in percent, with its deviation if the row has one."""
    deviation = row.get(f"{key}_std")
    return percent(row[key]) + ("" if deviation is None else f" ± {percent(deviation)}")


def class_rows(run: Run, record: dict) -> list[dict]:
    """One row per class of a classifier, the worst first: class, images, accuracy, and the most common mistake.

    mistake is the class that most images of this class were wrongly predicted as, mistake_images their number; None
    without a confusion matrix or a mistake. Classes with the same accuracy are sorted by training images; those
    without test images come last.
    """
    names = record["classes"]
    rows = []
    for label, accuracy in enumerate(record["per_class"]):
        taken_for = record["confusion"][label] if record["confusion"] else []
        wrong = [0 if i == label else count for i, count in enumerate(taken_for)]
        most = max(wrong, default=0)
        rows.append({
            "run": run.name,
            "classifier": record["classifier"],
            "class": names[label],
            "train_images": record["train_counts"][label],
            "test_images": record["test_counts"][label],
            "accuracy": accuracy,
            "mistake": names[wrong.index(most)] if most else None,
            "mistake_images": most or None,
        })  # fmt: skip
    return sorted(rows, key=lambda row: (row["accuracy"] is None, row["accuracy"], row["train_images"]))


def class_cells(rows: list[dict]) -> list[list[str]]:
    """Cells of class_rows under CLASS_COLUMNS, accuracies in percent."""
    cells = []
    for row in rows:
        mistake = "-" if row["mistake"] is None else f"{row['mistake']} ({row['mistake_images']})"
        images = [str(row["train_images"]), str(row["test_images"])]
        cells.append([row["class"], *images, percent(row["accuracy"]), mistake])
    return cells
