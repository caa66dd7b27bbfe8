"""A table as aligned text, Markdown, LaTeX (booktabs) or HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from tools.report.tables import Table

LATEX = {"\\": r"\textbackslash{}", "±": r"$\pm$", "<": r"$<$", ">": r"$>$", "^": r"\^{}", "~": r"\~{}"}
LATEX |= {mark: f"\\{mark}" for mark in "&%$#_{}"}


def as_text(table: Table) -> str:
    """Columns aligned; this code's rows are marked with >, the paper's own with *."""
    marks = ["*" if i in table.paper else ">" if i in table.ours else " " for i in range(len(table.rows))]
    widths = [max(len(row[i]) for row in [table.columns, *table.rows]) for i in range(len(table.columns))]

    def line(mark: str, cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return f"{mark} {first[0]:<{first[1]}}  " + "  ".join(f"{cell:>{width}}" for cell, width in others)

    lines = [table.title, line(" ", table.columns), "  " + "-" * (sum(widths) + 2 * len(widths) - 2)]
    lines += [line(mark, row) for mark, row in zip(marks, table.rows, strict=True)]
    return "\n".join(part.rstrip() for part in [*lines, *(f"  {note}" for note in table.notes)]) + "\n"


def as_markdown(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    def strong(index: int, cells: Sequence[str]) -> Sequence[str]:
        return [f"**{cell}**" if cell else "" for cell in cells] if index in table.ours else cells

    head = [line(table.columns), line(["---", *["---:"] * (len(table.columns) - 1)])]
    rows = [line(strong(index, row)) for index, row in enumerate(table.rows)]
    notes = [f"\n{note}" for note in table.notes]
    return "\n".join([f"### {table.title}\n", *head, *rows, *notes]) + "\n"


def as_latex(table: Table) -> str:
    """A table environment; it needs \\usepackage{booktabs}. LaTeX numbers its tables itself, so that the
    number in the title would be a second one: it stands in a comment."""

    def line(cells: Sequence[str]) -> str:
        return "  " + " & ".join(escape_latex(cell) for cell in cells) + r" \\"

    rows = [line(row) for row in table.rows]
    for index in sorted(table.ours, reverse=True):
        if index and index - 1 not in table.ours:
            rows.insert(index, r"  \midrule")
    title = re.sub(r"^Table \w+[.:] ", "", table.title)
    caption = escape_latex(" ".join([title[:1].upper() + title[1:] + ".", *table.notes]))
    return "\n".join(
        [
            f"% {table.title}",
            r"\begin{table}",
            r"  \centering\small",
            f"  \\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}",
            r"  \toprule",
            line(table.columns),
            r"  \midrule",
            *rows,
            r"  \bottomrule",
            r"  \end{tabular}",
            f"  \\caption{{{caption}}}",
            r"\end{table}",
            "",
        ]
    )


def escape_latex(text: str) -> str:
    return "".join(LATEX.get(letter, letter) for letter in text)


def as_html(table: Table) -> str:
    """A section with heading, table and notes."""

    def line(cells: Sequence[str], tag: str, kind: str = "") -> str:
        row = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        return f'<tr class="{kind}">{row}</tr>' if kind else f"<tr>{row}</tr>"

    kinds = ["ours" if i in table.ours else "paper" if i in table.paper else "" for i in range(len(table.rows))]
    body = "\n".join(line(row, "td", kind) for row, kind in zip(table.rows, kinds, strict=True))
    notes = "".join(f"<p class=note>{html.escape(note)}</p>" for note in table.notes)
    return (
        f"<h2>{html.escape(table.title)}</h2><div class=wide><table><thead>{line(table.columns, 'th')}</thead>"
        f"<tbody>{body}</tbody></table></div>{notes}"
    )
