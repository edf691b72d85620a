"""Tokens of Metal Shading Language source, with the position of each, and edits that keep line numbers."""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass, field
from typing import NamedTuple

from metal_marlin.errors import MetalCompileError

_TOKEN = re.compile(
    r"""(?P<skip>\s+|//[^\n]*|/\*.*?\*/)
      |(?P<hash>\#(?:[^\n\\]|\\.)*)
      |(?P<string>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')
      |(?P<name>[A-Za-z_]\w*)
      |(?P<number>\.?\d(?:[eEpP][+-]|[\w.'])*)
      |(?P<punct>::|->\*|->|\+\+|--|&&|\|\||<<=|<=|>=|==|!=|[-+*/%&|^]=|.)""",
    re.X | re.S | re.M,
)
_MARKER = re.compile(r'[ \t]*#\s*(?:line\s+)?(\d+)\s+"((?:\\.|[^"\\])*)"')
_OPEN, _CLOSE = "([{", ")]}"


class Token(NamedTuple):
    kind: str  # "name", "number", "string", "punct"
    text: str
    start: int
    end: int


class Source:
    """A text as a token list; brackets are matched and every position maps to a file and line.

    Preprocessor lines are not tokens; the `# 12 "file"` markers among them are honoured by `where`.
    Raises MetalCompileError for brackets that do not match.
    """

    def __init__(self, text: str, name: str = "<source>") -> None:
        self.text = text
        self.name = name
        self.tokens: list[Token] = []
        self._markers: list[tuple[int, int, str]] = [(0, 1, name)]  # offset of the line, its number, its file
        self._scan()
        self.match = self._match_brackets()

    def _scan(self) -> None:
        for found in _TOKEN.finditer(self.text):
            kind = found.lastgroup
            if kind == "hash":
                marker = _MARKER.match(found.group())
                if marker:
                    self._markers.append((found.end() + 1, int(marker[1]), marker[2]))
            elif kind != "skip" and kind is not None:
                self.tokens.append(Token(kind, found.group(), found.start(), found.end()))

    def _match_brackets(self) -> dict[int, int]:
        match: dict[int, int] = {}
        stack: list[int] = []
        for i, token in enumerate(self.tokens):
            if token.kind != "punct":
                continue
            if token.text in _OPEN:
                stack.append(i)
            elif token.text in _CLOSE:
                if not stack or _OPEN.index(self.tokens[stack[-1]].text) != _CLOSE.index(token.text):
                    raise MetalCompileError(f"{self.where(i)}: unmatched '{token.text}'")
                match[i] = stack[-1]
                match[stack.pop()] = i
        if stack:
            raise MetalCompileError(f"{self.where(stack[-1])}: '{self.tokens[stack[-1]].text}' is never closed")
        return match

    def __len__(self) -> int:
        return len(self.tokens)

    def at(self, i: int) -> str:
        """Text of token i, empty beyond either end."""
        return self.tokens[i].text if 0 <= i < len(self.tokens) else ""

    def is_name(self, i: int) -> bool:
        return 0 <= i < len(self.tokens) and self.tokens[i].kind == "name"

    def slice(self, first: int, last: int) -> str:
        """Text of tokens first … last-1, joined by single blanks (comments and line breaks gone)."""
        return " ".join(t.text for t in self.tokens[first:last])

    def location(self, i: int) -> tuple[str, int]:
        """File and line of token i."""
        offset = self.tokens[min(i, len(self.tokens) - 1)].start if self.tokens else 0
        where = bisect.bisect_right(self._markers, offset, key=lambda m: m[0]) - 1
        base, line, file = self._markers[max(where, 0)]
        return file, line + self.text.count("\n", base, offset)

    def where(self, i: int) -> str:
        file, line = self.location(i)
        return f"{file}:{line}"

    def close_angle(self, i: int) -> int | None:
        """Index of the `>` that closes the `<` at i, or None when it is a comparison."""
        depth = 0
        while i < len(self.tokens):
            text = self.tokens[i].text
            if text == "<":
                depth += 1
            elif text == ">":
                depth -= 1
                if depth == 0:
                    return i
            elif text in "([":
                i = self.match[i]
            elif text in ")]{};" or text in ("&&", "||"):
                return None
            i += 1
        return None

    def open_angle(self, i: int) -> int | None:
        """Index of the `<` that the `>` at i closes, or None."""
        depth = 0
        while i >= 0:
            text = self.tokens[i].text
            if text == ">":
                depth += 1
            elif text == "<":
                depth -= 1
                if depth == 0:
                    return i
            elif text in ")]":
                i = self.match[i]
            elif text in "([{};":
                return None
            i -= 1
        return None

    def split(self, first: int, last: int, separator: str = ",") -> list[tuple[int, int]]:
        """Token ranges between separators in [first, last), brackets and template arguments skipped."""
        parts: list[tuple[int, int]] = []
        start = i = first
        while i < last:
            text = self.tokens[i].text
            if text in _OPEN:
                i = self.match[i]
            elif text == "<":
                closed = self.close_angle(i)
                if closed is not None and closed < last:
                    i = closed
            elif text == separator:
                parts.append((start, i))
                start = i + 1
            i += 1
        if start < last or parts:
            parts.append((start, last))
        return parts

    def is_attribute(self, i: int) -> bool:
        """Whether `[[` starts at token i."""
        return (
            self.at(i) == "["
            and self.at(i + 1) == "["
            and self.tokens[i].end == self.tokens[i + 1].start
            and self.match[i] == self.match[i + 1] + 1
        )


@dataclass
class Edits:
    """Replacements on a text; line breaks inside a replaced range are kept so that lines stay in place."""

    text: str
    items: list[tuple[int, int, str]] = field(default_factory=list)

    def replace(self, start: int, end: int, new: str) -> None:
        self.items.append((start, end, new))

    def insert(self, at: int, new: str) -> None:
        self.items.append((at, at, new))

    def apply(self) -> str:
        out: list[str] = []
        position = 0
        for start, end, new in sorted(self.items, key=lambda item: (item[0], item[1])):
            if start < position:  # inside a range that is already gone
                continue
            out += [self.text[position:start], new, "\n" * self.text.count("\n", start, end)]
            position = end
        out.append(self.text[position:])
        return "".join(out)
