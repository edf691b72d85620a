"""Threadgroup variables of a kernel as references into the arena: memory of one threadgroup that the launch supplies.

Offsets are constants of the text, counted by the compiler, which knows the sizes; MM_ARENA (mm_entry.h) leaves how much
a kernel needs in the compiled row.
"""

from __future__ import annotations

from metal_marlin.errors import MetalCompileError
from metal_marlin.msl.lexer import Edits, Source
from metal_marlin.msl.reflect import Definition


def lay_out(source: Source, edits: Edits, definition: Definition) -> None:
    """Rewrite every threadgroup declaration in the kernel's body. Raises MetalCompileError for what it cannot read."""
    _Arena(source, edits, definition.body).run()


class _Arena:
    def __init__(self, source: Source, edits: Edits, body: int) -> None:
        self.src = source
        self.edits = edits
        self.body = body

    def run(self) -> None:
        src = self.src
        i, count, end = self.body + 1, 0, "0"
        while i < src.match[self.body]:
            if src.at(i) == "threadgroup":
                first = self._declaration_start(i)
                if first is not None:
                    i, count, end = self._threadgroup(first, i, count, end)
            i += 1

    def _declaration_start(self, i: int) -> int | None:
        """First token of the declaration whose specifiers hold the `threadgroup` at i; None inside other things."""
        src, j = self.src, i
        while src.at(j - 1) not in ("{", "}", ";"):
            j = src.match[j - 1] if src.at(j - 1) == ")" else j - 1
            if not src.is_name(j) and src.at(j) not in ("(", "::"):
                return None
        return None if src.at(j) in ("for", "if", "while", "switch", "return", "using", "typedef") else j

    def _threadgroup(self, head: int, i: int, count: int, end: str) -> tuple[int, int, str]:
        """Turn the declaration at `head` with its `threadgroup` at i into arena references; returns its last token,
        the next number, the arena's end."""
        src, stop = self.src, i
        while src.at(stop) != ";":
            stop = src.match[stop] + 1 if src.at(stop) in ("(", "[", "{") else stop + 1
        if any(src.at(j) in ("*", "&") for j in range(i + 1, stop) if self._outside(i, j)):
            return i, count, end  # a pointer or reference to threadgroup memory
        layout, local, type_end = "", "", 0
        for a, b in src.split(i + 1, stop):
            name = next((j - 1 for j in range(a, b) if src.at(j) == "[" and src.is_name(j - 1)), b - 1)
            type_end = type_end or name
            specifiers, aligned = self._specifiers([*range(head, i), *range(i + 1, type_end)])
            if "=" in (src.at(j) for j in range(a, b)) or not src.is_name(name) or not specifiers:
                raise MetalCompileError(f"{src.where(i)}: cannot read this threadgroup declaration")
            kind, offset, after = f"mm_tg{count}_t", f"mm_tg{count}", f"mm_tg{count}_end"
            layout += f"typedef {specifiers} {kind} {src.slice(name + 1, b)}{aligned}; "
            layout += f"constexpr uint {offset} = mm_align({end} + MM_RED_ZONE, alignof({kind})); "
            layout += f"constexpr uint {after} = {offset} + sizeof({kind}); "
            layout += f"MM_ARENA({after}); "
            layout += f'MM_VARIABLE({offset}, sizeof({kind}), "{src.at(name)}"); '
            local += f"__local {kind}& {src.at(name)} = *(__local {kind}*)(mm_arena + {offset}); "
            count, end = count + 1, after
        anchor = self._statement_start(head)
        if anchor == head:
            local = layout + local
        else:  # the layout of a nested declaration stands where later declarations see it
            self.edits.insert(src.tokens[anchor].start, layout)
        self.edits.replace(src.tokens[head].start, src.tokens[stop].end, local)
        return stop, count, end

    def _specifiers(self, tokens: list[int]) -> tuple[str, str]:
        """The words of the type, and the attribute that stands for an `alignas` among them."""
        src, words, aligned, skipped = self.src, [], "", -1
        for j in tokens:
            if src.at(j) == "alignas":
                skipped = src.match[j + 1]
                aligned = f" __attribute__((aligned{src.slice(j + 1, skipped + 1)}))"
            elif j > skipped:
                words.append(src.at(j))
        return " ".join(words), aligned

    def _outside(self, i: int, j: int) -> bool:
        """Whether token j is not inside brackets or template arguments opened after i."""
        k = i + 1
        while k < j:
            text = self.src.at(k)
            closed = self.src.close_angle(k) if text == "<" else self.src.match[k] if text in ("(", "[", "{") else None
            if closed is not None and closed > j:
                return False
            k = k + 1 if closed is None else closed + 1
        return True

    def _statement_start(self, i: int) -> int:
        """First token of the statement of the kernel's outermost block that contains token i."""
        src, j, start = self.src, self.body + 1, self.body + 1
        while j < i:
            text = src.at(j)
            if text in ("(", "[", "{"):
                closed = src.match[j]
                if closed > i:
                    return start
                j = closed
                if text == "{" and src.at(closed + 1) not in ("else", ";", "while", ")", ",", "."):
                    start = closed + 1
            elif text == ";":
                start = j + 1
            j += 1
        return i
