"""Tables of results: accuracies by group of classes, and by class, in percent."""

from ..errors import UserError
from ..groups import FEW_BELOW, percent
from .records import ACCURACIES, Run, class_mean

COLUMNS = {
    "many": "Many",
    "medium": "Medium",
    "few": "Few",
    "class_mean": "Class mean",
    "overall": "Overall",
    "top5": "Top-5",
}
FEW_TEST_IMAGES = 50  # test images of few-shot classes; with fewer, a table says how many there are


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
