"""A run's plots: losses and accuracies by epoch, accuracy against class frequency, confusion, class counts.

matplotlib is optional, and imported only when something is drawn.
"""

import io
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError, one_line
from ..groups import FEW_BELOW, GROUPS, MANY_ABOVE
from .records import Run, is_accuracy, mean, read_log

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # by Okabe and Ito, for all color vision
SHADES = {"many": "#dcebf7", "medium": "#e3f2e1", "few": "#fdebd8"}
NO_LOSSES = ("epoch", "lr", "images_per_second", "seconds")  # numbers of log.txt that are not losses
SIZE = (5.4, 3.6)  # inches
DPI = 150


class Plot(NamedTuple):
    """A figure of matplotlib, the name of its file without an ending, and a sentence that says what it shows."""

    name: str
    caption: str
    figure: object


def require_matplotlib(flag: str):
    """matplotlib's Figure. Raises UserError naming the flag if it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(f"{flag}: needs matplotlib; pip install matplotlib") from None
    return Figure


def write_plots(run: Run, folder):
    """Draws a run's plots into a folder, as PNG and PDF. Raises UserError if they cannot be written."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for plot in draw(run):
            plot.figure.savefig(folder / f"{plot.name}.png", dpi=DPI)
            plot.figure.savefig(folder / f"{plot.name}.pdf")
    except OSError as error:
        raise UserError(f"--plots {folder}: cannot be written ({one_line(error)})") from None


def save_figure(figure, file, flag: str):
    """Writes a figure to the file of a flag. Raises UserError naming the flag for an ending that is no format."""
    try:
        figure.savefig(file)
    except ValueError as error:
        raise UserError(f"{flag} {file}: {one_line(error)}") from None


def to_png(plot: Plot) -> bytes:
    """The plot as a PNG file."""
    file = io.BytesIO()
    plot.figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def draw(run: Run):
    """Yields a run's plots, as far as its files contain the numbers for them."""
    log = read_log(run.folder)
    losses = loss_curves(log)
    if losses:
        yield Plot("losses", "Losses by epoch", draw_curves(losses, "loss"))
    accuracies = accuracy_curves(log)
    if accuracies:
        figure = draw_curves(accuracies, "accuracy (%)")
        yield Plot("accuracies", "Accuracies by epoch: training, augmented images; validation", figure)
    counts = run.records[0]["train_counts"]
    if counts:
        yield Plot("class_counts", "Training images per class, largest class first", draw_class_counts(counts))
    for record in run.records:
        if record["per_class"] and record["train_counts"]:
            caption = f"Accuracy of every class against its training images, {record['classifier']} classifier"
            yield Plot(f"per_class_{record['classifier']}", caption, draw_per_class(record))
    for record in run.records:
        if record["confusion_groups"]:
            caption = f"Test images of each group predicted as classes of each group, {record['classifier']} classifier"
            yield Plot(f"confusion_{record['classifier']}", caption, draw_confusion(record))


def loss_curves(log: list[dict]) -> dict[str, tuple[list, list]]:
    """Name -> epochs from 1 and values, of each loss in log.txt."""
    curves = {}
    for record in log:
        for name, value in record.items():
            if name not in NO_LOSSES and not name.startswith("top") and is_number(value):
                add_point(curves, name.replace("_", " "), record["epoch"], value)
    return curves


def accuracy_curves(log: list[dict]) -> dict[str, tuple[list, list]]:
    """Name -> epochs from 1 and per cent: top-1 in training, and the mean over classes in validation.

    Logs of earlier versions have no class mean: their overall accuracy is used.
    """
    curves = {}
    for record in log:
        for name, value in record.items():
            if name.startswith("top1_") and is_accuracy(value) and value is not None:
                add_point(curves, f"training, {name.removeprefix('top1_')}", record["epoch"], 100 * value)
        validation = record["val"] if isinstance(record.get("val"), dict) else {}
        for classifier, result in validation.items():
            result = result if isinstance(result, dict) else {}
            key = "class_mean" if "class_mean" in result else "overall"
            value = result.get(key)
            if value is not None and is_accuracy(value):
                name = f"validation {key.replace('_', ' ')}, {classifier}"
                add_point(curves, name, record["epoch"], 100 * value)
    return curves


def is_number(value) -> bool:
    """Whether a value of log.txt can be drawn."""
    return type(value) in (int, float) and abs(value) < 1e30


def add_point(curves: dict, name: str, epoch: int, value: float):
    """Adds a point to the named curve; epochs count from 0 in log.txt, from 1 on screen."""
    epochs, values = curves.setdefault(name, ([], []))
    epochs.append(epoch + 1)
    values.append(value)


def new_axes(**labels):
    """(figure, axes) without the upper and the right border."""
    figure = require_matplotlib("--plots")(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set(**labels)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_curves(curves: dict[str, tuple[list, list]], label: str):
    """One line per name over the epochs; training accuracies are dashed."""
    figure, axes = new_axes(xlabel="epoch", ylabel=label)
    colors = {}
    for name, (epochs, values) in curves.items():
        of_training = name.startswith("training, ")
        color = COLORS[colors.setdefault(name.rpartition(", ")[2], len(colors)) % len(COLORS)]
        marker = "o" if len(epochs) < 10 else None
        style = {"linestyle": "--", "linewidth": 1.2} if of_training else {"linewidth": 2}
        axes.plot(epochs, values, label=literal(name), color=color, marker=marker, markersize=4, **style)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    return figure


def literal(text: str) -> str:
    """Text that matplotlib draws unchanged, without reading formulas in it."""
    return text.replace("$", r"\$")


def running_mean(counts: list[int], accuracies: list[float]) -> tuple[list[int], list[float]]:
    """The classes' mean accuracy around each number of training images, as (numbers, means).

    The mean is over the neighbors in order of these numbers, a tenth of all classes but at least 3, fewer at the ends;
    classes with the same number of images share one mean.
    """
    pairs = sorted(zip(counts, accuracies, strict=True))
    half = max(3, len(pairs) // 10) // 2
    means = {}
    for i, (count, _) in enumerate(pairs):
        means.setdefault(count, []).append(mean([a for _, a in pairs[max(0, i - half) : i + half + 1]]))
    return list(means), [mean(values) for values in means.values()]


def group_of(count: int) -> str:
    """The shot group of a class with count training images."""
    return GROUPS[(count <= MANY_ABOVE) + (count < FEW_BELOW)]


def draw_per_class(record: dict):
    """Accuracy of each class against its training images, with the running mean; shaded by shot group."""
    points = [(n, 100 * a) for n, a in zip(record["train_counts"], record["per_class"], strict=True) if a is not None]
    counts, accuracies = [n for n, _ in points], [a for _, a in points]
    figure, axes = new_axes(xlabel="training images of the class", ylabel="accuracy (%)", ylim=(-3, 103))
    largest = max([*counts, 1])
    axes.set_xscale("symlog", linthresh=1)
    limits = (min([*counts, largest]) / 1.25 - 0.1, largest * 1.25)
    axes.set_xlim(limits)
    edges = {
        "few": (-1, FEW_BELOW - 0.5),
        "medium": (FEW_BELOW - 0.5, MANY_ABOVE + 0.5),
        "many": (MANY_ABOVE + 0.5, 2**60),
    }
    for group, (low, high) in edges.items():
        low, high = max(low, limits[0]), min(high, limits[1])
        if low < high:
            axes.axvspan(low, high, color=SHADES[group], linewidth=0, zorder=0)
        if any(group_of(count) == group for count in counts):
            middle = (max(low, 0.3) * high) ** 0.5
            text = f"{group} {100 * record[group]:.1f}" if record[group] is not None else group
            axes.text(
                middle, 1.01, text, transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize="small"
            )
    size = 26 if len(counts) <= 100 else 10
    axes.scatter(counts, accuracies, s=size, color=COLORS[0], alpha=0.55, linewidths=0, label="classes")
    axes.plot(*running_mean(counts, accuracies), color=COLORS[1], linewidth=2, label="running mean")
    plain_numbers(axes.xaxis)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    return figure


def plain_numbers(axis):
    """Labels a logarithmic axis with plain numbers: 1, 10, 100."""
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def draw_confusion(record: dict):
    """One cell per pair of groups: the share of a group's test images predicted as each group, in per cent."""
    figure, axes = new_axes(xlabel="predicted as a class of", ylabel="test images of")
    rows = record["confusion_groups"]
    shares = [[100 * count / max(sum(row), 1) for count in row] for row in rows]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for i, row in enumerate(rows):
        for j, count in enumerate(row):
            text = f"{shares[i][j]:.0f} %\n({count})" if sum(row) else "-"
            axes.text(j, i, text, ha="center", va="center", color="white" if shares[i][j] > 55 else "black")
    axes.set_xticks(range(3), GROUPS)
    axes.set_yticks(range(3), GROUPS)
    return figure


def draw_class_counts(train_counts: list[int]):
    """Training images per class, largest class first; shaded by shot group."""
    figure, axes = new_axes(xlabel="class, by its number of training images", ylabel="training images")
    counts = sorted(train_counts, reverse=True)
    axes.set_yscale("symlog", linthresh=1)
    first = 0.5
    for group in GROUPS:
        size = sum(group_of(count) == group for count in counts)
        if size:
            axes.axvspan(first, first + size, color=SHADES[group], linewidth=0, zorder=0)
            text = f"{group} {size}"
            middle = first + size / 2
            axes.text(
                middle, 1.01, text, transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize="small"
            )
        first += size
    axes.plot(range(1, len(counts) + 1), counts, color=COLORS[0], linewidth=2, marker="o" if len(counts) < 50 else None)
    axes.set_xlim(0.5, len(counts) + 0.5)
    axes.set_ylim(counts[-1] / 1.5, max(counts[0], 1) * 1.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    plain_numbers(axes.yaxis)
    return figure
