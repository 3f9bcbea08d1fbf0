"""Runs on one HTML page that refers to no other file: tables, plots, arguments and versions."""

import base64
import io
import json
from html import escape
from pathlib import Path
from string import Template

from ..errors import UserError, one_line, printable
from ..files import atomic_write
from ..groups import FEW_BELOW, MANY_ABOVE
from .plots import draw
from .records import Group, Run, read_args
from .tables import (
    CLASS_COLUMNS,
    class_cells,
    class_rows,
    collect_records,
    mean_rows,
    notes,
    summary_cells,
    summary_rows,
)

TEMPLATE = Path(__file__).with_name("page.html")
OPEN_UP_TO = 30  # classes; longer tables are collapsed


def write_page(file, runs: list[Run], groups: list[Group] | None):
    """Writes the page; groups: of runs that differ only in their seed, or None for no table of means.

    Raises UserError if the file cannot be written.
    """
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        many=MANY_ABOVE,
        few=FEW_BELOW,
        summary=format_summary(runs, groups),
        links="".join(f'<a href="#run{i}">{escape(run.name)}</a>\n' for i, run in enumerate(runs)),
        runs="".join(format_run(run, f"run{i}") for i, run in enumerate(runs)),
        settings=format_settings(runs),
    )
    try:
        with atomic_write(file) as out:
            out.write(text.encode())
    except OSError as error:
        raise UserError(f"--html {file}: cannot be written ({one_line(error)}); name another file") from None


def format_summary(runs: list[Run], groups: list[Group] | None) -> str:
    """The tables of accuracies, as on the terminal, with their note."""
    tables = format_table(*summary_cells(summary_rows(runs)))
    if groups is not None:
        means = format_table(*summary_cells(mean_rows(groups)))
        tables = f"<h3>Mean ± standard deviation over seeds</h3>\n{means}<h3>Single runs</h3>\n{tables}"
    lines = notes(collect_records(runs))[1:]
    return tables + "".join(f'<p class="note">{escape(line)}</p>\n' for line in lines)


def format_run(run: Run, anchor: str) -> str:
    """The section of a run: its plots, and a table of classes for each classifier."""
    figures = []
    for _, caption, figure in draw(run):
        png = io.BytesIO()
        figure.savefig(png, format="png")
        source = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
        caption = escape(caption)
        figures.append(f'<figure><img alt="{caption}" src="{source}"><figcaption>{caption}</figcaption></figure>\n')
    tables = []
    for record in run.records:
        table = format_table(CLASS_COLUMNS, class_cells(class_rows(run, record)), "classes")
        is_open = len(record["per_class"]) <= OPEN_UP_TO
        tables.append(format_details(f"Classes, {record['classifier']} classifier", table, is_open))
    return (
        f'<section id="{anchor}">\n<h2>{escape(run.name)}</h2>\n<div class="plots">\n{"".join(figures)}</div>\n'
        f'<div class="tables">\n{"".join(tables)}</div>\n</section>\n'
    )


def format_settings(runs: list[Run]) -> str:
    """Tables of the runs' arguments and versions, one column per run; rows in which the runs differ come first."""
    files = [read_args(run.folder) for run in runs]
    arguments = [{name: value for name, value in file.items() if not isinstance(value, dict)} for file in files]
    versions = [file.get("environment", {}) for file in files]
    details = []
    for title, columns in (("Arguments", arguments), ("Versions", versions)):
        rows = []
        for name in dict.fromkeys(name for column in columns for name in column):
            values = [column.get(name) for column in columns]
            texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
            rows.append([printable(text) for text in (name, *texts)])
        rows.sort(key=lambda row: len(set(row[1:])) == 1)
        differing = sum(len(set(row[1:])) > 1 for row in rows)
        table = format_table([title, *(run.name for run in runs)], rows, "settings", bold=differing)
        details.append(format_details(title, table, title == "Versions"))
    return "".join(details)


def format_details(title: str, content: str, is_open: bool) -> str:
    return f"<details{' open' if is_open else ''}><summary>{escape(title)}</summary>\n{content}</details>\n"


def format_table(header: list[str], rows: list[list[str]], kind: str = "accuracies", bold: int = 0) -> str:
    """A table that a click on a column's head sorts; kind: its class in the template; bold: number of first rows."""
    head = "".join(f'<th><button type="button">{escape(text)}</button></th>' for text in header)
    lines = ["".join(f"<td>{escape(text)}</td>" for text in row) for row in rows]
    lines = [f"<tr{' class=bold' if i < bold else ''}>{line}</tr>\n" for i, line in enumerate(lines)]
    return (
        f'<div class="scroll"><table class="{kind}">\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{''.join(lines)}</tbody>\n</table></div>\n"
    )
