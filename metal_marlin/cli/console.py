"""Output that every command shares."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

console = Console(highlight=False)


def print_json(value: object) -> None:
    """One JSON document on standard output, whatever the terminal's width."""
    print(json.dumps(value, indent=2))


def print_table(headings: list[str], rows: list[list[Any]], right: tuple[str, ...] = (), whole: str = "") -> None:
    """A table of plain cells; names in ``right`` are aligned to the right, the column ``whole`` is never wrapped.
    Cells are never read as markup."""
    table = Table()
    for i, heading in enumerate(headings):
        width = max((len(str(row[i])) for row in rows), default=0) if heading == whole else None
        table.add_column(
            heading,
            justify="right" if heading in right else "left",
            overflow="fold",
            min_width=width,
            no_wrap=bool(width),
        )
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    console.print(table)


def print_plain(rows: list[list[Any]]) -> None:
    """Lines of cells between tabs, for other programs; an empty cell is a dash."""
    for row in rows:
        print("\t".join(str(cell) if cell != "" else "-" for cell in row))


def status(passed: bool) -> Text:
    """PASS in green or FAIL in red."""
    return Text("PASS", style="green") if passed else Text("FAIL", style="red")


def size(count: int) -> str:
    """Bytes for people: ``12.3 KiB``."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"
