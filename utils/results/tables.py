"""Tables of results: accuracies by group of classes, and by class, in percent."""

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
    """A Markdown table in percent, with few_note; results: row name -> a record of results.json."""
    rows = [[name, *(percent(result[key]) for key in COLUMNS)] for name, result in results.items()]
    return "\n".join([markdown(["", *COLUMNS.values()], rows), *few_note(list(results.values()))])


def few_note(records: list[dict]) -> list[str]:
    """The lines below a table if its few-shot accuracies come from a handful of test images, else none."""
    numbers = set()
    for record in records:
        classes = zip(record["train_counts"], record["test_counts"], strict=True)
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
    rule = "|".join(f":{'-' * (n + 1)}" if i in texts else f"{'-' * (n + 1)}:" for i, n in enumerate(widths))
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])


def summary_rows(runs: list[Run]) -> list[dict]:
    """One row per run and classifier: run, classifier, accuracies in [0, 1]."""
    return [
        {"run": run.name, "classifier": record["classifier"]} | {name: record[name] for name in ACCURACIES}
        for run in runs
        for record in run.records
    ]


def mean_rows(groups: list[Group]) -> list[dict]:
    """One row per group and classifier: run, classifier, seeds, each accuracy's mean, its deviation as NAME_std.

    It is the sample standard deviation (n - 1), None for a single seed.
    """
    rows = []
    for group in groups:
        for record in group.runs[0].records:
            same = [r for run in group.runs for r in run.records if r["classifier"] == record["classifier"]]
            row = {"run": group.name, "classifier": record["classifier"], "seeds": len(group.runs)}
            for name in ACCURACIES:
                values = [r[name] for r in same if r[name] is not None]
                row[name] = fmean(values) if values else None
                row[f"{name}_std"] = stdev(values) if len(values) > 1 else None
            rows.append(row)
    return rows


def summary_cells(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of summary_rows or of mean_rows, in percent."""
    seeds = ["Seeds"] if "seeds" in rows[0] else []
    cells = []
    for row in rows:
        name = f"{row['run']}, {row['classifier']} classifier"
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
    names, rows = record["classes"], []
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
