"""Source lines of code addresses, from the line table that checked rows carry."""

from __future__ import annotations

import bisect
import io
from functools import cached_property

from metal_marlin.errors import MetalMarlinError


class Lines:
    """Address in a shared object's image → (file, line). Needs pyelftools (extra ``compiler``)."""

    def __init__(self, binary: bytes) -> None:
        self._binary = binary

    @cached_property
    def _table(self) -> list[tuple[int, str, int]]:
        try:
            from elftools.elf.elffile import ELFFile
        except ImportError:
            raise MetalMarlinError(
                "checked mode needs pyelftools; install it with: pip install 'metal-marlin[compiler]'"
            ) from None
        rows: list[tuple[int, str, int]] = []
        dwarf = ELFFile(io.BytesIO(self._binary)).get_dwarf_info()
        for unit in dwarf.iter_CUs():
            program = dwarf.line_program_for_CU(unit)
            if program is None:
                continue
            names = [entry.name.decode() for entry in program["file_entry"]]
            first = 0 if program["version"] >= 5 else 1
            for entry in program.get_entries():
                if entry.state is not None:
                    file = "" if entry.state.end_sequence else names[entry.state.file - first]
                    rows.append((entry.state.address, file, entry.state.line))
        return sorted(rows, key=lambda row: row[0])

    def of(self, address: int) -> tuple[str, int]:
        """File and line; ("", 0) where the table says nothing."""
        at = bisect.bisect_right(self._table, address, key=lambda row: row[0]) - 1
        while at > 0 and self._table[at][2] == 0 and self._table[at][1]:  # code the compiler gave no line
            at -= 1
        return self._table[at][1:] if at >= 0 else ("", 0)
