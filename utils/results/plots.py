"""A run's plots: losses and accuracies by epoch, accuracy against class frequency, confusion, class counts."""

from pathlib import Path
from statistics import fmean

import numpy as np
import torch

from ..errors import UserError, one_line, optional_package
from ..groups import FEW_BELOW, GROUPS, MANY_ABOVE, percent, shot_groups
from .records import Run, read_log

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # by Okabe and Ito, for all color vision
SHADES = {"many": "#dcebf7", "medium": "#e3f2e1", "few": "#fdebd8"}
MAX_NAMED = 30  # classes up to which plots have their names
BOOKKEEPING = ("epoch", "lr", "images_per_second", "seconds")  # numbers in log.txt that are not losses


def require_matplotlib(flag: str):
    """matplotlib's Figure; matplotlib is optional. Raises UserError naming the flag if it is missing, old or broken."""
    with optional_package(flag, "matplotlib"):
        import matplotlib
        from matplotlib.backends import backend_agg, backend_pdf  # noqa: F401
        from matplotlib.figure import Figure

        if matplotlib.__version_info__ < (3, 7):  # for legends outside the axes
            raise ImportError(f"{matplotlib.__version__} is too old, 3.7 is needed")
    return Figure


def write_plots(run: Run, folder: Path):
    """Draws a run's plots into a folder, as PNG and PDF. Raises UserError if they cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, _, figure in draw(run):
            figure.savefig(folder / f"{name}.png")
            figure.savefig(folder / f"{name}.pdf")
    except OSError as error:
        raise UserError(
            f"--plots {folder}: cannot be written ({one_line(error)}); correct that, or leave it out"
        ) from None


def save_figure(figure, file, flag: str):
    """Writes a figure to the file of a flag. Raises UserError naming the flag for an ending that is no format."""
    try:
        figure.savefig(file)
    except ValueError as error:
        raise UserError(f"{flag} {file}: {one_line(error)}") from None


def draw(run: Run):
    """Yields (name, caption, figure) of a run's plots; those of its epochs only if log.txt has numbers for them."""
    losses, accuracies = read_curves(run.folder)
    if losses:
        yield "losses", "Losses by epoch", draw_curves(losses, "loss")
    if accuracies:
        yield "accuracies", "Accuracies by epoch, training and validation", draw_curves(accuracies, "accuracy (%)")
    yield "class_counts", "Training images per class, largest first", draw_class_counts(run.records[0])
    for record in run.records:
        name = record["classifier"]
        caption = f"Accuracy of every class against its training images, {name} classifier"
        yield f"per_class_{name}", caption, draw_per_class(record)
        caption = f"Test images of each group predicted as classes of each group, {name} classifier"
        yield f"confusion_{name}", caption, draw_confusion(record["confusion_groups"])
        if record["confusion"] and len(record["classes"]) <= MAX_NAMED:
            caption = f"Test images of each class predicted as each class, in percent, {name} classifier"
            yield f"confusion_classes_{name}", caption, draw_class_confusion(record)


def read_curves(folder: Path) -> tuple[dict[str, dict], dict[str, dict]]:
    """Losses, and accuracies in percent, from log.txt: name -> {epoch: value}.

    A loss is every number of an epoch that is neither bookkeeping nor an accuracy (top1_*, top5_*). Accuracies are
    top-1 in training, and the mean over classes in validation.
    """
    losses = {}
    accuracies = {}
    for record in read_log(folder):
        epoch = record["epoch"]
        for name, value in record.items():
            if name in BOOKKEEPING or type(value) not in (int, float) or not abs(value) < 1e30:  # NaN too
                continue
            if name.startswith("top1_"):
                accuracies.setdefault(f"training, {name.removeprefix('top1_')}", {})[epoch] = 100 * value
            elif not name.startswith("top5_"):
                losses.setdefault(name.replace("_", " "), {})[epoch] = value
        for name, result in record.get("val", {}).items():
            if result["class_mean"] is not None:
                accuracies.setdefault(f"validation class mean, {name}", {})[epoch] = 100 * result["class_mean"]
    return losses, accuracies


def new_axes(**labels):
    """(figure, axes) without the upper and the right border."""
    figure = require_matplotlib("--plots")(figsize=(5.4, 3.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set(**labels)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_curves(curves: dict[str, dict], label: str):
    """One line per name over the epochs; training accuracies are dashed."""
    figure, axes = new_axes(xlabel="epoch", ylabel=label)
    colors = {}
    for name, points in curves.items():
        color = COLORS[colors.setdefault(name.rpartition(", ")[2], len(colors)) % len(COLORS)]
        style = {"linestyle": "--", "linewidth": 1.2} if name.startswith("training, ") else {"linewidth": 2}
        style |= {"marker": "o" if len(points) < 10 else None, "markersize": 4}
        axes.plot(list(points), list(points.values()), label=name.replace("$", r"\$"), color=color, **style)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    return figure


def running_mean(counts: list[int], accuracies: list[float]) -> tuple[list[int], list[float]]:
    """The classes' mean accuracy around each number of training images, as (numbers, means).

    The mean is over the neighbors in order of these numbers, a tenth of all classes but at least 3, fewer at the ends;
    classes with the same number of images share one mean.
    """
    pairs = sorted(zip(counts, accuracies, strict=True))
    half = max(3, len(pairs) // 10) // 2
    means = {}
    for i, (count, _) in enumerate(pairs):
        means.setdefault(count, []).append(fmean(a for _, a in pairs[max(0, i - half) : i + half + 1]))
    return list(means), [fmean(values) for values in means.values()]


def shade(axes, group: str, low: float, high: float, middle: float, text: str):
    """Shades a group's part of the x axis, with a text above it."""
    axes.axvspan(low, high, color=SHADES[group], linewidth=0, zorder=0)
    above = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom", "fontsize": "small"}
    axes.text(middle, 1.01, text, **above)


def draw_per_class(record: dict):
    """Accuracy of each class against its training images, with the running mean; shaded by shot group."""
    tested = [label for label, accuracy in enumerate(record["per_class"]) if accuracy is not None]
    counts = [record["train_counts"][label] for label in tested]
    accuracies = [100 * record["per_class"][label] for label in tested]
    figure, axes = new_axes(xlabel="training images of the class", ylabel="accuracy (%)", ylim=(-3, 103))
    limits = min(counts, default=1) / 1.25 - 0.1, max([*counts, 1]) * 1.25
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(limits)
    edges = np.clip([limits[1], MANY_ABOVE + 0.5, FEW_BELOW - 0.5, limits[0]], *limits)
    for group, high, low in zip(GROUPS, edges, edges[1:], strict=False):
        if low < high:
            shade(axes, group, low, high, (max(low, 0.3) * high) ** 0.5, f"{group} {percent(record[group])}")
    axes.scatter(counts, accuracies, s=20, color=COLORS[0], alpha=0.55, linewidths=0, label="classes")
    axes.plot(*running_mean(counts, accuracies), color=COLORS[1], linewidth=2, label="running mean")
    axes.xaxis.set_major_formatter("{x:g}")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    return figure


def draw_shares(rows: list[list[int]], names, show, fontsize=None, **labels):
    """(figure, axes) of one cell per pair of names: the share of a row's test images predicted as each, in percent.

    show(share, count, images of the row): what the cell says.
    """
    figure, axes = new_axes(**labels)
    shares = [[100 * count / max(sum(row), 1) for count in row] for row in rows]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for i, j in np.ndindex(len(names), len(names)):
        if text := show(shares[i][j], rows[i][j], sum(rows[i])):
            color = "white" if shares[i][j] > 55 else "black"
            axes.text(j, i, text, ha="center", va="center", color=color, fontsize=fontsize)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    return figure, axes


def draw_confusion(rows: list[list[int]]):
    """One cell per pair of groups: the share of a group's test images predicted as each group, in percent."""

    def show(share, count, images):
        return f"{share:.0f} %\n({count})" if images else "-"

    return draw_shares(rows, GROUPS, show, xlabel="predicted as a class of", ylabel="test images of")[0]


def short_names(record: dict) -> list[str]:
    """The names of a record's classes as axes show them."""
    return [(name if len(name) <= 24 else f"{name[:22]}…").replace("$", r"\$") for name in record["classes"]]


def draw_class_confusion(record: dict):
    """One cell per pair of classes: the share of a class's test images predicted as each class, in percent."""
    names = short_names(record)

    def show(share, count, images):
        return f"{share:.0f}" if count else ""

    labels = {"xlabel": "predicted as", "ylabel": "test images of"}
    figure, axes = draw_shares(record["confusion"], names, show, fontsize=6, **labels)
    figure.set_size_inches(2.4 + 0.24 * len(names), 2.4 + 0.24 * len(names))
    axes.tick_params(labelsize="x-small")
    axes.tick_params(axis="x", rotation=90)
    return figure


def draw_class_counts(record: dict):
    """Training images per class, largest class first, with names for up to MAX_NAMED; shaded by shot group."""
    figure, axes = new_axes(xlabel="class, by its number of training images", ylabel="training images")
    order = sorted(range(len(record["classes"])), key=lambda label: -record["train_counts"][label])
    counts = [record["train_counts"][label] for label in order]
    sizes = torch.bincount(shot_groups(torch.tensor(counts)), minlength=len(GROUPS)).tolist()
    first = 0.5
    for group, size in zip(GROUPS, sizes, strict=True):
        if size:
            shade(axes, group, first, first + size, first + size / 2, f"{group} {size}")
        first += size
    axes.plot(range(1, len(counts) + 1), counts, color=COLORS[0], linewidth=2, marker="." if len(counts) < 50 else None)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_xlim(0.5, len(counts) + 0.5)
    axes.set_ylim(counts[-1] / 1.5, max(counts[0], 1) * 1.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(order) <= MAX_NAMED:
        names = short_names(record)
        axes.set_xticks(range(1, len(order) + 1), [names[label] for label in order], rotation=90, fontsize="x-small")
    axes.yaxis.set_major_formatter("{x:g}")
    return figure
