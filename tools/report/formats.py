"""A table as aligned text, Markdown or LaTeX (booktabs)."""

from __future__ import annotations

import re

from tabulate import LATEX_ESCAPE_RULES, tabulate

from tools.report.tables import Table


def as_text(table: Table) -> str:
    """Columns aligned; this code's rows are marked with >, the paper's own with *."""
    marks = ["*" if i in table.paper else ">" if i in table.ours else "" for i in range(len(table.rows))]
    rows = [[mark, *row] for mark, row in zip(marks, table.rows, strict=True)]
    body = draw(["", *table.columns], rows, "simple", names=2)
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


def draw(columns: list[str], rows: list[list[str]], kind: str, names: int = 1) -> str:
    """The table by tabulate: the first `names` columns at the left, cells at the right."""
    align = ["left"] * names + ["right"] * (len(columns) - names)
    return tabulate(rows, columns, kind, disable_numparse=True, colalign=align)


FORMATS = {"text": as_text, "markdown": as_markdown, "latex": as_latex}
