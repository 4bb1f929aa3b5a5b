"""Tables in Markdown."""

from __future__ import annotations


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a table: the first column left-aligned, the others right-aligned. Empty columns are left out."""
    shown = [at for at in range(len(header)) if at == 0 or any(row[at] for row in rows)]
    alignment = ["---", *(["---:"] * (len(header) - 1))] if any(header) else ["---"] * len(header)
    return "\n".join(f"| {' | '.join(row[at] for at in shown)} |" for row in [header, alignment, *rows])
