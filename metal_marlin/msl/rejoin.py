"""Tells fibres what lockstep tells the lanes of a GPU: who meets whom in a collective of divergent code.

A GPU runs the lanes that skip a branch no further than the end of that branch. Lanes that are fibres run on until
their next collective, so among lanes that wait at different ones those come first that are first in the source. Every
call of a collective therefore states its number in the source (`metal::_at`), and so does every call of a function
with collectives (`metal::_call`), which finds that number when it starts (`metal::_enter`).

Numbers tell nothing of iterations: a loop gets a meeting at the end of each (`metal::_rejoin()`) if its body has a
collective that not every lane need reach: behind a condition, in an inner loop, or in a loop with `continue`.
All of this is nothing on devices without fibres.
"""

from __future__ import annotations

import re

from metal_marlin.msl.lexer import Edits, Source

_COLLECTIVE = re.compile(
    r"(simd|quad)_(sum|product|min|max|and|or|xor|all|any|ballot|is_first|active_threads_mask"
    r"|prefix_\w+|broadcast\w*|shuffle\w*)"
)
_BRANCHES = frozenset(("if", "else", "for", "while", "do", "switch", "?", "&&", "||"))
_BEFORE_CALL = frozenset(("return", "else", "do", "case", "template", "throw"))
_NO_FUNCTION = frozenset(("if", "for", "while", "switch", "return", "sizeof", "decltype", "alignof"))


def mark(source: Source, edits: Edits) -> None:
    """Insert the meetings into `edits`; texts without collectives in such loops stay as they are."""
    _Marker(source, edits).run()


class _Marker:
    def __init__(self, source: Source, edits: Edits) -> None:
        self.src = source
        self.edits = edits
        self.functions = self._functions()
        self.calls, self.divergent = self._find_calls()

    def run(self) -> None:
        if not self.calls:
            return
        loops = self._loops()
        self._number_calls(loops)
        for i in loops:
            if self.src.at(i) == "do":
                self._do(i)
            else:
                self._loop(i)

    def _loops(self) -> list[int]:
        """The `for`, `while` and `do` of every loop."""
        src = self.src
        ends = {self._end(i + 1) for i in range(len(src)) if src.at(i) == "do"}  # each at the `while` of its `do`
        return [i for i in range(len(src)) if src.at(i) in ("for", "while", "do") and i not in ends]

    def _find_calls(self) -> tuple[list[int], set[int]]:
        """Tokens that call a collective, and those of them that call a function with a collective behind a branch."""
        src, functions = self.src, self.functions
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
        src = self.src
        if not src.is_name(i) or not (src.at(i) in names or _COLLECTIVE.fullmatch(src.at(i))):
            return False
        opened = i + 1
        if src.at(opened) == "<":
            opened = (src.close_angle(opened) or i) + 1
        return src.at(opened) == "(" and not self._is_declared(i, opened)

    def _is_declared(self, i: int, opened: int) -> bool:
        """Whether the name at i with its parameter list at `opened` is being declared, not called."""
        src, after = self.src, self.src.match[opened] + 1
        after += src.at(after) == "const"
        if src.at(after) == "{" and src.at(i - 1) not in ("(", ","):
            return True
        return (src.is_name(i - 1) and src.at(i - 1) not in _BEFORE_CALL) or src.at(i - 1) == "~"

    def _number_calls(self, loops: list[int]) -> None:
        src, tokens = self.src, self.src.tokens
        marked: set[int] = set()
        # a loop's meeting stands at its end, an inner loop's before the outer one's
        events = sorted([(i, 1, 0) for i in self.calls] + [(self._last(i), 0, -i) for i in loops])
        self.numbers = {event: number for number, event in enumerate(events, 1)}
        for i in self.calls:
            number = self.numbers[(i, 1, 0)]
            body = max((first for _, first, last in self.functions if first < i < last), default=None)
            if body is None:
                continue
            marked.add(body)
            what = "_at" if _COLLECTIVE.fullmatch(src.at(i)) else "_call"
            end = i + 1 if src.at(i + 1) == "(" else (src.close_angle(i + 1) or i) + 1
            self.edits.insert(tokens[self._start(i)].start, f"(::metal::{what}(mm_call, {number}), ")
            self.edits.insert(tokens[src.match[end]].end, ")")
        for body in marked:
            self.edits.insert(tokens[body].end, " const ulong mm_call = ::metal::_enter(); ")

    def _start(self, i: int) -> int:
        """First token of the postfix expression that calls the name at i: `a.b[1].f`, `N::T<2>::template f`."""
        src = self.src
        while True:
            if src.at(i - 1) == "template":
                i -= 1
            if src.at(i - 1) not in (".", "->", "::"):
                return i
            before = self._operand(i - 2)
            if before is None:  # of the global namespace
                return i - 1
            i = before

    def _operand(self, last: int) -> int | None:
        """First token of the operand that ends at token `last`."""
        src, first = self.src, None
        while True:
            text = src.at(last)
            opened = src.match[last] if text in (")", "]") else src.open_angle(last) if text == ">" else None
            if opened is None:
                return last if src.is_name(last) and text not in _BEFORE_CALL else first
            first, last = opened, opened - 1

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

    def _last(self, i: int) -> int:
        """The token before which the loop at i meets: behind its body, or the `while` of a `do`."""
        return self._end(i + 1) if self.src.at(i) == "do" else self._end(self.src.match[i + 1] + 1)

    def _meeting(self, loop: int) -> str:
        if not any(first < loop < end for _, first, end in self.functions):
            return "::metal::_rejoin()"
        return f"::metal::_at(mm_call, {self.numbers[(self._last(loop), 0, -loop)]}), ::metal::_rejoin()"

    def _loop(self, i: int) -> None:
        closing = self.src.match[i + 1]
        if not self._apart(closing + 1, self._end(closing + 1)):
            return
        tokens, meeting = self.src.tokens, self._meeting(i)
        if self.src.at(i) == "while":
            self.edits.replace(tokens[i].start, tokens[i].end, "for")
            self.edits.insert(tokens[i + 1].end, ";")
            self.edits.insert(tokens[closing].start, f"; {meeting}")
            return
        semicolons = [j for j in range(i + 2, closing) if self.src.at(j) == ";"]
        if len(semicolons) == 2:
            last = semicolons[1]
            self.edits.insert(tokens[last].end, f" {meeting}" + (", " if last + 1 < closing else ""))

    def _do(self, i: int) -> None:
        end = self._end(i + 1)
        if self.src.at(end) == "while" and self._apart(i + 1, end):
            tokens = self.src.tokens
            self.edits.insert(tokens[end + 1].end, f"{self._meeting(i)}, (")
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
