"""A table as aligned text, Markdown, LaTeX (booktabs) or CSV."""

from __future__ import annotations

import csv
import io
import re

from tabulate import LATEX_ESCAPE_RULES, tabulate

from tools.report.tables import Table

FORMULA = re.compile(r"[=+@\t\r-](?![\d.]*$)")  # what a spreadsheet computes at the start of a cell, unless a number


def as_text(table: Table) -> str:
    """Columns aligned; this code's rows are marked with >, the paper's own with *."""
    marks = ["*" if i in table.paper else ">" if i in table.ours else "" for i in range(len(table.rows))]
    rows = [[mark, *row] for mark, row in zip(marks, table.rows, strict=True)]
    body = draw(["", *table.columns], rows, "simple", ["left", "left"])
    return "\n".join([table.title, body, *(f"  {note}" for note in table.notes), ""])


def as_markdown(table: Table) -> str:
    rows = [[cell.replace("|", "\\|") for cell in row] for row in table.rows]
    rows = [[f"**{cell}**" if cell and i in table.ours else cell for cell in row] for i, row in enumerate(rows)]
    parts = [f"### {table.title}\n", draw(table.columns, rows, "pipe"), *(f"\n{note}" for note in table.notes), ""]
    return "\n".join(parts)


def as_latex(table: Table) -> str:
    """A table environment; it needs \\usepackage{booktabs}. LaTeX numbers its tables itself, so that the number in the
    title would be a second one: it stands in a comment."""
    title = re.sub(r"^Table \w+[.:] ", "", table.title)
    caption = " ".join([title[:1].upper() + title[1:] + ".", *table.notes])
    caption = "".join(LATEX_ESCAPE_RULES.get(letter, letter) for letter in caption)
    body = draw(table.columns, table.rows, "latex_booktabs")
    begin, end = "\\begin{table}\n\\centering\\small", "\\end{table}\n"
    return "\n".join([f"% {table.title}", begin, body, f"\\caption{{{caption}}}", end])


def as_csv(table: Table) -> str:
    """The title, columns and rows; a cell that a spreadsheet would take for a formula begins with an apostrophe."""
    rows = [[f"'{cell}" if FORMULA.match(cell) else cell for cell in row] for row in table.rows]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([[table.title], table.columns, *rows])
    return text.getvalue()


def draw(columns: list[str], rows: list[list[str]], kind: str, left: list[str] | None = None) -> str:
    """The table by tabulate: names at the left, cells at the right."""
    left = left or ["left"]
    align = [*left, *["right"] * (len(columns) - len(left))]
    return tabulate(rows, columns, kind, disable_numparse=True, colalign=align)


FORMATS = {"text": as_text, "markdown": as_markdown, "latex": as_latex, "csv": as_csv}
