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


def print_table(headings: list[str], rows: list[list[Any]], right: tuple[str, ...] = ()) -> None:
    """A table of plain cells; names in ``right`` are aligned to the right. Cells are never read as markup."""
    table = Table()
    for heading in headings:
        table.add_column(heading, justify="right" if heading in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    console.print(table)


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
