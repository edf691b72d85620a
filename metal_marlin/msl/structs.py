"""Data members of the structs of an MSL text: names and, for structs in structs, paths."""

from __future__ import annotations

import re
from collections.abc import Mapping

from metal_marlin.msl.lexer import Source

_DEPTH = 4
_LONGEST = 16  # arrays of structs beyond this stay opaque: each member of each element costs a row of the type table
_KEYS = ("struct", "class", "union")

Field = tuple[str, str, str]  # type name, field name, array bounds as written
Structs = Mapping[str, list[Field] | None]  # None: a struct whose members cannot be told


def flatten(structs: Structs) -> dict[str, tuple[str, ...]]:
    """Per struct the paths of its members ("inner.v", "items[0].v")."""

    def paths(name: str, depth: int) -> list[str]:
        out: list[str] = []
        for type_name, field, bounds in structs.get(name) or []:
            inner = paths(type_name, depth + 1) if type_name in structs and depth < _DEPTH else []
            out += [f"{place}.{p}" for place in _places(field, bounds) for p in inner] or [field]
        return out

    return {name: tuple(paths(name, 0)) for name in structs if not name.startswith("@")}


def _places(field: str, bounds: str) -> list[str]:
    if not bounds:
        return [field]
    count = re.fullmatch(r"\[ ?(\d+) ?\]", bounds)
    return [f"{field}[{k}]" for k in range(int(count[1]))] if count and int(count[1]) <= _LONGEST else []


def describe(src: Source, i: int, end: int, structs: dict[str, list[Field] | None]) -> list[Field] | None:
    """Members of the struct body [i, end); structs declared in it are added to `structs`. None: cannot be told."""
    out: list[Field] = []
    for a, b in members(src, i, end):
        brace = next((j for j in range(a, b) if src.at(j) == "{"), b)
        if src.at(a) not in _KEYS or brace == b:
            if any(src.at(j) == ":" for j in range(a, b)):  # a bit-field has no offset
                return None
            out += fields(src, a, b)
            continue
        named, closed = src.at(a + 1) if src.is_name(a + 1) else "", src.match[brace]
        inner = None if src.at(a) == "union" else describe(src, brace + 1, closed, structs)
        structs[named or f"@{brace}"] = inner
        if closed + 1 < b:
            found = fields(src, closed + 1, b)
            out += [(named or f"@{brace}", field, bounds) for _, field, bounds in found]
        elif not named:
            if inner is None:
                return None
            out += inner
    return out


def inherit(bases: list[str], own: list[Field] | None, structs: Structs) -> list[Field] | None:
    """Members of a struct with those of its bases first."""
    parts = [*(structs.get(name) for name in bases), own]
    return None if None in parts else [f for part in parts for f in part or ()]


def outer(words: list[str]) -> int:
    """How many words stand before template arguments or array bounds; none for an array, which is no struct."""
    return 0 if "[" in words else words.index("<") if "<" in words else len(words)


def members(src: Source, i: int, end: int) -> list[tuple[int, int]]:
    """Data-member declarations of a struct body; methods, aliases and static members are skipped."""
    found, start = [], i
    while i < end:
        text = src.at(i)
        if text == "{":
            i = src.match[i]
            if src.at(i + 1) != ";" and src.at(start) not in _KEYS:
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


def fields(src: Source, a: int, b: int) -> list[Field]:
    """Type name, field name and bounds for each declarator of a member declaration."""
    parts, type_name = src.split(a, b), ""
    out: list[Field] = []
    for n, (s, e) in enumerate(parts):
        stop = next((j for j in range(s, e) if src.at(j) in ("[", "=", "{", ":")), e)
        if n == 0:
            type_name = next((src.at(j) for j in range(stop - 2, s - 1, -1) if src.is_name(j)), "")
        if src.is_name(stop - 1):
            last = next((j for j in range(stop, e) if src.at(j) in ("=", "{")), e)
            out.append((type_name, src.at(stop - 1), src.slice(stop, last)))
    return out
