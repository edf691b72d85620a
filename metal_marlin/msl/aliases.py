"""Names that stand for types: `using X =`, `typedef … X;` and template type parameters, each where it is in force.

A name may be a type in one place and a value in another (`template <typename F>` here, `template <int (*F)(int)>`
there). Beyond the braces that hold its declaration (an inherited member, `Traits::type`) it is taken for a type unless
the text declares a value of that name somewhere.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field

from metal_marlin.msl.lexer import Source

_NOT_A_TYPE = frozenset("return else case goto using typename class typedef struct namespace new delete".split())
_AFTER_VALUE = frozenset(("=", ";", ",", ")", "[", "(", "{", ">"))


@dataclass
class Alias:
    """Where a name is in force (token ranges), in scopes of which names, and whether it names a vector."""

    ranges: list[tuple[int, int]] = field(default_factory=list)
    scopes: set[str] = field(default_factory=set)
    vector: bool = False


class Aliases:
    """The type aliases of a text. `vectors` are the built-in vector types' names."""

    def __init__(self, source: Source, vectors: Set[str]) -> None:
        self.src = source
        self.vectors = vectors
        self.names: dict[str, Alias] = {}
        self.templates = {"vec"}  # `template <…> using X = …`
        self._ends = self._enclosing_ends()
        declared: set[int] = set()
        for i in range(len(source)):
            self._declaration(i, declared)
        self._values = {source.at(i) for i in range(len(source)) if i not in declared and self._is_value(i)}

    def is_type(self, i: int) -> bool:
        """Whether token i names a type by one of these aliases."""
        alias = self.names.get(self.src.at(i))
        if alias is None:
            return False
        if self.src.at(i) not in self._values:
            return True
        if self.src.at(i - 1) == "::":
            return self.src.at(i - 2) in alias.scopes
        return any(first <= i < last for first, last in alias.ranges)

    def is_vector(self, i: int) -> bool:
        """Whether token i names a vector type, built in or by an alias of one."""
        name = self.src.at(i)
        return name in self.vectors or (name in self.names and self.names[name].vector and self.is_type(i))

    def in_function(self, i: int) -> bool:
        """Whether token i stands in the body of a function."""
        src, end = self.src, self._ends[i]
        if end == len(src):
            return False
        before = src.match[end] - 1
        return src.at(before) in (")", "{", "}", ";", ":", "]", "else", "do", "const", "thread", "noexcept", "constant")

    def _enclosing_ends(self) -> list[int]:
        """For every token the closing brace around it."""
        src, ends, stack = self.src, [], [len(self.src)]
        for i in range(len(src)):
            if src.at(i) == "}":
                stack.pop()
            ends.append(stack[-1])
            if src.at(i) == "{":
                stack.append(src.match[i])
        return ends

    def _declaration(self, i: int, declared: set[int]) -> None:
        src, text = self.src, self.src.at(i)
        if text == "using" and src.is_name(i + 1) and src.at(i + 2) == "=":
            stop = next((j for j in range(i, len(src)) if src.at(j) == ";"), i)
            self._add(i + 1, self._ends[i], declared, self._names_vector(i + 3, stop))
        elif text == "typedef" and src.at(i + 1) not in ("struct", "union", "class", "enum"):
            stop = next((j for j in range(i, len(src)) if src.at(j) == ";"), i)
            if src.is_name(stop - 1):
                self._add(stop - 1, self._ends[i], declared, self._names_vector(i + 1, stop - 1))
        elif text == "template" and src.at(i + 1) == "<":
            closed = src.close_angle(i + 1)
            if closed is None:
                return
            if src.at(closed + 1) == "using":
                self.templates.add(src.at(closed + 2))
            for j in range(i + 2, closed):
                if src.at(j) in ("typename", "class") and src.is_name(j + 1) and src.at(j + 2) in (",", ">", "="):
                    self._add(j + 1, self._template_end(closed), declared, False)

    def _add(self, name: int, end: int, declared: set[int], vector: bool) -> None:
        declared.add(name)
        alias = self.names.setdefault(self.src.at(name), Alias())
        alias.ranges.append((name, end))
        if end < len(self.src) and end == self._ends[name]:
            alias.scopes.add(self.src.at(self.src.match[end] - 1))
        alias.vector = alias.vector or vector

    def _names_vector(self, first: int, last: int) -> bool:
        words = [self.src.at(j) for j in range(first, last)]
        plain = [w for w in words if w not in ("const", "metal", "::", "typename")]
        return bool(plain) and (plain[0] == "vec" or (len(plain) == 1 and plain[0] in self.vectors))

    def _template_end(self, closed: int) -> int:
        """Token behind the declaration whose template parameters close at `closed`."""
        src, j = self.src, closed + 1
        while j < len(src) and src.at(j) not in (";", "{"):
            j = src.match[j] + 1 if src.at(j) in ("(", "[") else j + 1
        return src.match[j] + 1 if src.at(j) == "{" else j

    def _is_value(self, i: int) -> bool:
        """Whether token i is declared as a variable, function or parameter that is no type."""
        src = self.src
        if src.at(i) not in self.names or src.at(i + 1) not in _AFTER_VALUE:
            return False
        before = src.at(i - 1)
        if before in ("*", "&"):
            return src.at(i - 2) == "(" or src.is_name(i - 2)
        return src.is_name(i - 1) and before not in _NOT_A_TYPE
