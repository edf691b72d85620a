"""Methods that return `thread` references or pointers.

In C++ for OpenCL `this` is a generic pointer, from which no reference into thread memory can be had. Such a method can
only be meant for objects in thread memory, so it gets that qualifier: `thread T& at(int i)` becomes
`thread T& at(int i) __private`.
"""

from __future__ import annotations

from metal_marlin.msl.lexer import Edits, Source


def qualify(source: Source, edits: Edits) -> None:
    """Insert the qualifiers into `edits`."""
    scopes = [False]  # of every open brace: is it a struct's?
    for i in range(len(source)):
        text = source.at(i)
        if text == "{":
            scopes.append(_opens_struct(source, i))
        elif text == "}":
            scopes.pop()
        elif text == "thread" and scopes[-1]:
            body = _body_of_method(source, i)
            if body is not None:
                edits.insert(source.tokens[body].start, "__private ")


def _opens_struct(source: Source, i: int) -> bool:
    j = i - 1
    while j >= 0 and source.at(j) not in (";", "{", "}", "(", ")"):
        if source.at(j) in ("struct", "class", "union"):
            return True
        j -= 1
    return False


def _body_of_method(source: Source, i: int) -> int | None:
    """The `{` of the method whose return type, a reference or pointer, has its `thread` at token i."""
    j = i - 1
    while source.at(j) not in (";", "{", "}", ":", ""):
        if source.at(j) in ("static", "friend"):  # no object
            return None
        j -= 1
    j = i + 1
    while source.is_name(j) or source.at(j) in ("::", "<"):
        j = (source.close_angle(j) or j) + 1 if source.at(j) == "<" else j + 1
    if source.at(j) not in ("&", "*"):
        return None
    while source.at(j) in ("&", "*", "const"):
        j += 1
    if source.at(j) == "operator":  # operator[] (…), operator() (…), operator= (…)
        j = source.match[j + 1] if source.at(j + 1) in ("(", "[") else j + 1
    if source.at(j + 1) != "(":
        return None
    after = source.match[j + 1] + 1
    after += source.at(after) == "const"
    return after if source.at(after) == "{" else None
