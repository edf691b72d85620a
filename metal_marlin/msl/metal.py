"""Rows for Apple GPUs: Metal compiles the flat text itself, so no compiler is needed here.

What the host must know of a parameter (element type, layout of a struct) is read from the text. Where the text does
not say it plainly, the type is `UNKNOWN`: tensors of any dtype may be bound there, and nothing but tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from metal_marlin.msl.lexer import Source
from metal_marlin.msl.reflect import Param, Reflection
from metal_marlin.msl.row import CompiledRow, FieldMeta, ParamMeta, RowMeta, TypeMeta

UNKNOWN = TypeMeta("struct", 0, 0, 0, 1)
_SCALARS = {
    "bool": ("b", 8),
    **{name: ("i", bits) for name, bits in (("char", 8), ("short", 16), ("int", 32), ("long", 64))},
    **{f"u{name}": ("u", bits) for name, bits in (("char", 8), ("short", 16), ("int", 32), ("long", 64))},
    **{f"int{bits}_t": ("i", bits) for bits in (8, 16, 32, 64)},
    **{f"uint{bits}_t": ("u", bits) for bits in (8, 16, 32, 64)},
    "size_t": ("u", 64),
    "ptrdiff_t": ("i", 64),
    "half": ("f", 16),
    "float": ("f", 32),
    "bfloat": ("bf", 16),
}
_VECTOR = re.compile(r"(packed_)?([a-z]+)([234])")
_QUALIFIERS = frozenset("device constant const volatile thread threadgroup restrict struct metal ::".split())


def type_of(words: Sequence[str], arguments: Mapping[str, str]) -> TypeMeta:
    """The type that `words` name, for template arguments by name; UNKNOWN for what is no scalar or vector."""
    plain = [arguments.get(w, w) for w in words if w not in _QUALIFIERS]
    name = "".join(plain)
    generic = re.fullmatch(r"vec<(\w+),([234])>", name)
    name = generic[1] + generic[2] if generic else name
    if name in _SCALARS:
        kind, bits = _SCALARS[name]
        return TypeMeta(kind, bits, 0, bits // 8, bits // 8)
    vector = _VECTOR.fullmatch(name)
    if vector is None or vector[2] not in _SCALARS:
        return UNKNOWN
    (kind, bits), lanes = _SCALARS[vector[2]], int(vector[3])
    if vector[1]:
        return TypeMeta(kind, bits, lanes, lanes * bits // 8, bits // 8)
    size = (4 if lanes == 3 else lanes) * bits // 8  # a 3-vector takes the room of a 4-vector
    return TypeMeta(kind, bits, lanes, size, size)


def struct_of(source: Source, name: str) -> tuple[TypeMeta, tuple[FieldMeta, ...]]:
    """Layout of a struct whose members are all plain scalars and vectors; UNKNOWN and no fields otherwise."""
    start = next((i for i in range(len(source)) if source.at(i) == "struct" and source.at(i + 1) == name), None)
    if start is None or source.at(start + 2) != "{":
        return UNKNOWN, ()
    fields: list[FieldMeta] = []
    end, align, i, last = 0, 1, start + 3, source.match[start + 2]
    while i < last:
        stop = next(j for j in range(i, last + 1) if source.at(j) in (";", "}"))
        words = [source.at(j) for j in range(i, stop)]
        first = words.index(",") - 1 if "," in words and "<" not in words else len(words) - 1
        declared, names = type_of(words[:first], {}), words[first::2]
        if declared is UNKNOWN or not all(re.fullmatch(r"\w+", w) for w in names) or "=" in words or "[" in words:
            return UNKNOWN, ()
        for field in names:
            end = -(-end // declared.align) * declared.align
            fields.append(FieldMeta(field, end, declared))
            end += declared.size
        align, i = max(align, declared.align), stop + 1
    size = -(-end // align) * align
    return TypeMeta("struct", 8 * size, 0, size, align), tuple(fields)


def template_arguments(reflection: Reflection, callee: str) -> dict[str, str]:
    """Template arguments of a row by parameter name: {"T": "half"} of `scale<half>`."""
    function, _, given = callee.partition("<")
    definition, source = reflection.definitions.get(function.strip()), reflection.source
    if definition is None or not definition.template or not given:
        return {}
    first = definition.first + 1
    last = source.close_angle(first)
    if last is None:
        return {}
    names = [source.at(b - 1) for a, b in source.split(first + 1, last) if "=" not in source.slice(a, b)]
    values = [v.strip() for v in given.rstrip().removesuffix(">").split(",")]
    return dict(zip(names, values, strict=False)) if "<" not in given else {}


def metal_row(reflection: Reflection, name: str, text: str) -> CompiledRow:
    """The row of kernel `name`: what its text says, and the text that Metal gets."""
    kernel = reflection.program.kernels[name]
    arguments = template_arguments(reflection, kernel.callee)

    def meta(param: Param) -> ParamMeta:
        words = param.type.split()
        sign = "*" if "*" in words else "&"
        kind, fields = type_of(words[: len(words) - 1 - words[::-1].index(sign)], arguments), ()
        if param.struct:
            kind, fields = struct_of(reflection.source, param.struct)  # type: ignore[assignment]
        return ParamMeta(param.name, param.index, param.role, param.const, True, kind, fields)

    dynamic = tuple((p.name, p.index) for p in kernel.dynamic)
    params = tuple(map(meta, kernel.bound))
    return CompiledRow(RowMeta(name, "metal:apple", 32, params, dynamic, 0, kernel.max_threads), text.encode())
