"""Runs on one HTML page that refers to no other file: tables, plots, arguments and versions."""

import base64
import html
import json

from ..errors import UserError, one_line, printable
from ..files import atomic_write
from ..groups import FEW_BELOW, MANY_ABOVE
from .plots import draw, to_png
from .records import Run, read_args
from .seeds import Group, mean_rows
from .tables import CLASS_COLUMNS, class_cells, class_rows, few_note, summary_cells, summary_rows

LEFT_OUT = ("environment", "dist_url")  # of the arguments: they have their own table, or are addresses
OPEN_UP_TO = 30  # classes; longer tables are collapsed
HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>Results</title>
<style>
:root { color-scheme: light; --line: #d9dde3; --soft: #f4f6f8; --ink: #1c2127; --dim: #5b6570; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 24px 20px 60px; color: var(--ink); background: #fff;
 font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7em; margin: 0 0 .2em; }
h2 { font-size: 1.3em; margin: 2.2em 0 .6em; padding-top: .6em; border-top: 2px solid var(--line);
 overflow-wrap: anywhere; }
h3 { font-size: 1.05em; margin: 1.6em 0 .5em; }
p.note { color: var(--dim); margin: .3em 0 .8em; }
nav a { display: inline-block; margin: 0 12px 4px 0; color: var(--accent); overflow-wrap: anywhere; }
.scroll { overflow-x: auto; max-width: 100%; border: 1px solid var(--line); border-radius: 6px; }
.tall { max-height: 560px; overflow-y: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 12px; text-align: left; white-space: nowrap; }
th, .sortable td:last-child { white-space: normal; }
th { background: var(--soft); position: sticky; top: 0; border-bottom: 1px solid var(--line); font-weight: 600; }
tr + tr td { border-top: 1px solid #eceff2; }
tbody tr:hover td { background: #f8fafc; }
td.wrap { white-space: normal; overflow-wrap: anywhere; min-width: 8em; max-width: 28em; }
.number { text-align: right; }
.differs td { font-weight: 600; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--accent); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 370px), 1fr)); gap: 16px; }
figure { margin: 0; padding: 8px; border: 1px solid var(--line); border-radius: 6px; display: flex;
 flex-direction: column; justify-content: space-between; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { color: var(--dim); font-size: .87em; padding: 4px 4px 0; }
.tables { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 560px), 1fr)); gap: 0 16px;
 align-items: start; }
.tables > * { min-width: 0; }
details { margin: 10px 0; }
summary { cursor: pointer; font-weight: 600; margin-bottom: 6px; }
@media (max-width: 600px) {
 body { padding: 14px 10px 40px; font-size: 14px; }
 table { font-size: 12px; line-height: 1.35; }
 th, td { padding: 4px; }
 td:first-child { white-space: normal; min-width: 5em; }
}
@media print { .scroll, .tall { overflow: visible; max-height: none; } }
</style>
</head>
<body>
"""
SORTING = """<script>
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => row.cells[column].dataset.value;
    const order = (a, b) => {
      if ((a === "") !== (b === "")) return a === "" ? 1 : -1;  // cells without a value stay last
      const numbers = head.classList.contains("number");
      const sign = numbers ? a - b : a.localeCompare(b);
      return down ? -sign : sign;
    };
    body.append(...[...body.rows].sort((a, b) => order(key(a), key(b))));
  }));
}
</script>
"""


def write_page(file, runs: list[Run], groups: list[Group] | None):
    """Writes the page; groups: of runs that differ only in their seed, or None for no table of means.

    Raises UserError if the file cannot be written.
    """
    text = page(runs, groups)
    try:
        with atomic_write(file) as out:
            out.write(text.encode())
    except OSError as error:
        raise UserError(f"--html {file}: cannot be written ({one_line(error)})") from None


def page(runs: list[Run], groups: list[Group] | None) -> str:
    """The page's text; every name from a file is escaped in it."""
    parts = [
        HEAD,
        "<h1>Results on the test images</h1>\n",
        '<p class="note">Accuracies in per cent. Many-, medium- and few-shot: the mean over classes with more than '
        f"{MANY_ABOVE}, {FEW_BELOW} to {MANY_ABOVE}, and fewer than {FEW_BELOW} training images.</p>\n",
    ]
    if groups is not None:
        parts += ["<h3>Mean ± standard deviation over seeds</h3>\n", data_table(*summary_cells(mean_rows(groups)))]
        parts.append("<h3>Single runs</h3>\n")
    parts.append(data_table(*summary_cells(summary_rows(runs))))
    notes = few_note([record for run in runs for record in run.records])
    parts += [f'<p class="note">{html.escape(note)}</p>\n' for note in notes if note]
    if len(runs) > 1:
        links = [f'<a href="#run{i}">{html.escape(run.name)}</a>' for i, run in enumerate(runs)]
        parts.append(f"<nav><p>{' '.join(links)}</p></nav>\n")
    for i, run in enumerate(runs):
        parts += [
            f'<section id="run{i}">\n<h2>{html.escape(run.name)}</h2>\n',
            plots_of(run),
            classes_of(run),
            "</section>\n",
        ]
    parts += [settings_of(runs), SORTING, "</body>\n</html>\n"]
    return "".join(parts)


def data_table(header: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    head = "".join(f"<th{number_class(i)}>{html.escape(text)}</th>" for i, text in enumerate(header))
    body = "".join(
        "<tr>" + "".join(f"<td{number_class(i)}>{html.escape(text)}</td>" for i, text in enumerate(row)) + "</tr>\n"
        for row in rows
    )
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>\n'


def number_class(column: int) -> str:
    """The class attribute of a cell in a column, for a table whose first column is text."""
    return ' class="number"' if column else ""


def plots_of(run: Run) -> str:
    """A run's plots as figures that hold their images."""
    figures = []
    for plot in draw(run):
        image = base64.b64encode(to_png(plot)).decode()
        caption = html.escape(plot.caption)
        figures.append(f'<figure><img alt="{caption}" src="data:image/png;base64,{image}">')
        figures.append(f"<figcaption>{caption}</figcaption></figure>\n")
    return f'<div class="plots">\n{"".join(figures)}</div>\n'


def classes_of(run: Run) -> str:
    """A run's tables of classes, one for each classifier that has accuracies per class."""
    tables = []
    for record in run.records:
        if record["per_class"]:
            title = f"Classes, {html.escape(record['classifier'])} classifier"
            opened = " open" if len(record["per_class"]) <= OPEN_UP_TO else ""
            table = class_table(class_rows(run, record))
            tables.append(f"<details{opened}><summary>{title}</summary>\n{table}</details>\n")
    return f'<div class="tables">\n{"".join(tables)}</div>\n'


def class_table(rows: list[dict]) -> str:
    """A table of classes, sortable by a click on the head of a column."""
    keys = ("class", "train_images", "test_images", "accuracy", "mistake")
    kinds = ["", " class=number", " class=number", " class=number", ""]
    head = "".join(
        f'<th{kind}><button type="button">{name}</button></th>' for kind, name in zip(kinds, CLASS_COLUMNS, strict=True)
    )
    lines = []
    for row, cells in zip(rows, class_cells(rows), strict=True):
        values = ["" if row[key] is None else html.escape(str(row[key])) for key in keys]
        line = "".join(
            f'<td{kind} data-value="{value}">{html.escape(cell)}</td>'
            for kind, value, cell in zip(kinds, values, cells, strict=True)
        )
        lines.append(f"<tr>{line}</tr>\n")
    return (
        f'<div class="scroll tall"><table class="sortable">\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{''.join(lines)}</tbody>\n</table></div>\n"
    )


def settings_of(runs: list[Run]) -> str:
    """Tables of the runs' arguments and versions, one column per run; rows in which the runs differ come first."""
    args = [read_args(run.folder) for run in runs]
    if not any(args):
        return ""
    arguments = [{name: value for name, value in one.items() if name not in LEFT_OUT} for one in args]
    versions = [one["environment"] if isinstance(one.get("environment"), dict) else {} for one in args]
    parts = ["<section>\n<h2>Arguments and versions</h2>\n"]
    if len(runs) > 1:
        parts.append('<p class="note">Rows in which the runs differ come first, in bold.</p>\n')
    for title, columns in (("Arguments", arguments), ("Versions", versions)):
        table = settings_table([run.name for run in runs], columns)
        parts.append(
            f"<details{' open' if title == 'Versions' else ''}><summary>{title}</summary>\n{table}</details>\n"
        )
    return "".join([*parts, "</section>\n"])


def settings_table(names: list[str], columns: list[dict]) -> str:
    """A table of settings: one row for each name in any of the columns."""
    rows = []
    for name in dict.fromkeys(name for column in columns for name in column):
        values = [as_text(column.get(name)) for column in columns]
        cells = "".join(f'<td class="wrap">{html.escape(value)}</td>' for value in values)
        differs = len(set(values)) > 1
        rows.append(
            (
                not differs,
                f"<tr{' class=differs' if differs else ''}><td>{html.escape(printable(name))}</td>{cells}</tr>\n",
            )
        )
    body = "".join(row for _, row in sorted(rows, key=lambda row: row[0]))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ["", *names])
    return (
        f'<div class="scroll tall"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>\n'
    )


def as_text(value) -> str:
    """An argument as it is shown."""
    return printable(value if isinstance(value, str) else json.dumps(value))
