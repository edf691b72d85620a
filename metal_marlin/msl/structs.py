"""Data members of the structs of an MSL text: names and, for structs in structs, paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from metal_marlin.msl.lexer import Source

_DEPTH = 4


def flatten(structs: Mapping[str, Sequence[tuple[str, str]]]) -> dict[str, tuple[str, ...]]:
    """Per struct the paths of its members ("inner.v"), from (type name, field name) pairs by struct name."""

    def paths(name: str, depth: int) -> list[str]:
        out: list[str] = []
        for type_name, field in structs.get(name, []):
            inner = paths(type_name, depth + 1) if type_name in structs and depth < _DEPTH else []
            out += [f"{field}.{p}" for p in inner] or [field]
        return out

    return {name: tuple(paths(name, 0)) for name in structs}


def members(src: Source, i: int, end: int) -> list[tuple[int, int]]:
    """Data-member declarations of a struct body; methods, aliases and static members are skipped."""
    found, start = [], i
    while i < end:
        text = src.at(i)
        if text == "{":
            i = src.match[i]
            if src.at(i + 1) != ";":
                start = i + 1
        elif text == "(":
            i = src.match[i]
        elif text == ";":
            words = [src.at(j) for j in range(start, i)]
            if words and not {"(", "using", "typedef", "static", "template", "friend", "static_assert"} & set(words):
                found.append((start, i))
            start = i + 1
        elif text == ":" and src.at(i - 1) in ("public", "private", "protected"):
            start = i + 1
        i += 1
    return found


def fields(src: Source, a: int, b: int) -> list[tuple[str, str]]:
    """(type name, field name) for each declarator of a member declaration."""
    parts, out, type_name = src.split(a, b), [], ""
    for n, (s, e) in enumerate(parts):
        stop = next((j for j in range(s, e) if src.at(j) in ("[", "=", "{", ":")), e)
        if n == 0:
            type_name = next((src.at(j) for j in range(stop - 2, s - 1, -1) if src.is_name(j)), "")
        if src.is_name(stop - 1):
            out.append((type_name, src.at(stop - 1)))
    return out
