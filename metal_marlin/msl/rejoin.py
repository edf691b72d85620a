"""Marks where lanes of a simdgroup come together again at the end of a loop's iteration.

A GPU runs the lanes that skip a branch no further than the end of that branch. Lanes that are fibres would run on into
the next iteration, and meet there in a collective with lanes that are still in this one. So a loop gets a meeting at
the end of each iteration (`metal::_rejoin()`, nothing on other devices) if its body has a collective that not every
lane need reach: behind a condition, in an inner loop, or in a loop with `continue`.
"""

from __future__ import annotations

import re

from metal_marlin.msl.lexer import Edits, Source

# Fibres meet in the order of code addresses (mm_fibre.h), so rows for the CPU with 32 lanes are compiled with blocks
# left in the order of the source: no placement by frequency, no merging of tails, no exit blocks before loop bodies.
FLAGS = (
    *("-mllvm", "-disable-block-placement", "-mllvm", "-disable-branch-fold"),
    *("-Xclang", "-disable-lifetime-markers"),
)

_COLLECTIVE = re.compile(
    r"(simd|quad)_(sum|product|min|max|and|or|xor|all|any|ballot|is_first|active_threads_mask"
    r"|prefix_\w+|broadcast\w*|shuffle\w*)"
)
_BRANCHES = frozenset(("if", "else", "for", "while", "do", "switch", "?", "&&", "||"))
_NO_FUNCTION = frozenset(("if", "for", "while", "switch", "return", "sizeof", "decltype", "alignof"))


def mark(source: Source, edits: Edits) -> None:
    """Insert the meetings into `edits`; texts without collectives in such loops stay as they are."""
    _Marker(source, edits).run()


class _Marker:
    def __init__(self, source: Source, edits: Edits) -> None:
        self.src = source
        self.edits = edits
        self.calls, self.divergent = self._find_calls()

    def run(self) -> None:
        if not self.calls:
            return
        for i in range(len(self.src)):
            if self.src.at(i) in ("for", "while") and self.src.at(i + 1) == "(" and not self._ends_do(i):
                self._loop(i)
            elif self.src.at(i) == "do":
                self._do(i)

    def _find_calls(self) -> tuple[list[int], set[int]]:
        """Tokens that call a collective, and those of them that call a function with a collective behind a branch."""
        src, functions = self.src, self._functions()
        names: dict[str, bool] = {}
        calls: list[int] = []
        while True:  # functions that call functions that …
            calls = [i for i in range(len(src)) if self._is_call(i, names)]
            found = {
                name: any(src.at(i) in _BRANCHES for i in range(first, last))
                for name, first, last in functions
                if any(first < i < last for i in calls)
            }
            if found.keys() <= names.keys():
                return calls, {i for i in calls if names.get(src.at(i), False)}
            names |= found

    def _is_call(self, i: int, names: dict[str, bool]) -> bool:
        if not self.src.is_name(i) or self.src.at(i + 1) not in ("(", "<"):
            return False
        return self.src.at(i) in names or _COLLECTIVE.fullmatch(self.src.at(i)) is not None

    def _functions(self) -> list[tuple[str, int, int]]:
        """(name, first and last token of the body) of every function definition."""
        src, found = self.src, []
        for i in range(len(src)):
            if src.is_name(i) and src.at(i + 1) == "(" and src.at(i) not in _NO_FUNCTION:
                after = src.match[i + 1] + 1
                after += src.at(after) == "const"
                if src.at(after) == "{":
                    found.append((src.at(i), after, src.match[after]))
        return found

    # --- statements; each returns the token behind its end
    def _end(self, i: int) -> int:
        src, text = self.src, self.src.at(i)
        if text == "{":
            return src.match[i] + 1
        if text in ("if", "for", "while", "switch"):
            head = i + 1 + (src.at(i + 1) == "constexpr")
            end = self._end(src.match[head] + 1)
            return self._end(end + 1) if text == "if" and src.at(end) == "else" else end
        if text == "do":
            end = self._end(i + 1)  # at `while`
            return src.match[end + 1] + 2
        while i < len(src) and src.at(i) != ";":
            i = src.match[i] + 1 if src.at(i) in ("(", "[", "{") else i + 1
        return i + 1

    def _ends_do(self, i: int) -> bool:
        """Whether the `while` at i belongs to a `do`."""
        return any(self._end(j + 1) == i for j in range(i) if self.src.at(j) == "do")

    def _loop(self, i: int) -> None:
        closing = self.src.match[i + 1]
        if not self._apart(closing + 1, self._end(closing + 1)):
            return
        tokens = self.src.tokens
        if self.src.at(i) == "while":
            self.edits.replace(tokens[i].start, tokens[i].end, "for")
            self.edits.insert(tokens[i + 1].end, ";")
            self.edits.insert(tokens[closing].start, "; ::metal::_rejoin()")
            return
        semicolons = [j for j in range(i + 2, closing) if self.src.at(j) == ";"]
        if len(semicolons) == 2:
            last = semicolons[1]
            self.edits.insert(tokens[last].end, " ::metal::_rejoin()" + (", " if last + 1 < closing else ""))

    def _do(self, i: int) -> None:
        end = self._end(i + 1)
        if self.src.at(end) == "while" and self._apart(i + 1, end):
            tokens = self.src.tokens
            self.edits.insert(tokens[end + 1].end, "::metal::_rejoin(), (")
            self.edits.insert(tokens[self.src.match[end + 1]].start, ")")

    def _apart(self, first: int, last: int) -> bool:
        """Whether lanes may part inside a loop body in a way that matters to a collective in it."""
        inside = [i for i in self.calls if first <= i < last]
        if not inside:
            return False
        if any(i in self.divergent for i in inside) or any(self.src.at(i) == "continue" for i in range(first, last)):
            return True
        return any(a <= i < b for a, b in self._conditional(first, last) for i in inside)

    def _conditional(self, first: int, last: int) -> list[tuple[int, int]]:
        """Token ranges of a statement list that a lane need not reach."""
        src, ranges, i = self.src, [], first
        if src.at(first) == "{":
            first, last = first + 1, src.match[first]
            i = first
        while i < last:
            end, text = self._end(i), src.at(i)
            if text == "{":
                ranges += self._conditional(i, end)
            elif text in ("if", "for", "while", "switch") and src.at(i + 1) != "constexpr":
                ranges.append((src.match[i + 1] + 1, end))
                ranges += self._short_circuits(i + 2, src.match[i + 1])
            elif text == "if":  # constexpr
                ranges += self._conditional(src.match[i + 2] + 1, end)
            elif text == "do":
                ranges.append((i, end))
            elif text == "else":
                end = self._end(i + 1)
                ranges += self._conditional(i + 1, end)
            else:
                ranges += self._short_circuits(i, end)
            i = max(end, i + 1)
        return ranges

    def _short_circuits(self, first: int, last: int) -> list[tuple[int, int]]:
        cut = next((i for i in range(first, last) if self.src.at(i) in ("?", "&&", "||")), None)
        return [] if cut is None else [(cut, last)]
