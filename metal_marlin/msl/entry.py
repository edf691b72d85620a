"""The entry of one row: binds arguments, fills thread positions, and carries the table of types for the host.

The compiler states types and sizes: an entry holds an array of integers (`mm_types`) that `read_types` finds in the
compiled object or PTX. Layout: magic, then per bound parameter [enabled, kind, bits, components, size, alignment,
fields], then per field [offset, kind, bits, components, size, alignment].
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable

from metal_marlin.errors import MetalCompileError
from metal_marlin.msl.reflect import Kernel, Param, Program
from metal_marlin.msl.rewrite import renamed
from metal_marlin.msl.row import FieldMeta, ParamMeta, TypeMeta

_MAGIC = (0x6D6D7479, 0x70657331, 0x2D6D6D31, 0x726F7773)
_KINDS = ("struct", "u", "i", "f", "bf", "b")
_QUIET = '#pragma clang diagnostic ignored "-Winvalid-offsetof"'  # structs with bases have offsets too
_ARENA = b"MM_ARENA"


def entry_text(kernel: Kernel, program: Program, target: str, *, by_pointer: Iterable[str] = ()) -> str:
    """C++ for OpenCL text of the entry for `target` ("cpu" or "cuda").

    `by_pointer` names `constant T&` parameters that are bound to device memory instead of being passed by value
    (CUDA only; on the CPU every argument is an address).
    """
    lines = ["", '# 1 "<entry>"', "#undef constant", _QUIET, f"typedef decltype(::{kernel.callee}) mm_function;"]
    lines.append(_type_table(kernel, program))
    build = _cpu_entry if target == "cpu" else _cuda_entry
    return renamed("\n".join([*lines, *build(kernel, frozenset(by_pointer)), ""]))


def _type_table(kernel: Kernel, program: Program) -> str:
    rows = [", ".join(f"(int)0x{word:x}" for word in _MAGIC)]
    for position, param in enumerate(kernel.params):
        if param.role not in ("buffer", "value"):
            continue
        fields = program.structs.get(param.struct, ())
        rows.append(f"(int)bool({param.condition or 'true'}), MM_TYPE_ROW(MM_P{position}), {len(fields)}")
        for path in fields:
            member = f"decltype(((__private MM_P{position}*)0)->{path})"
            rows.append(f"(int)__builtin_offsetof(MM_P{position}, {path}), MM_TYPE_ROW({member})")
    aliases = "\n".join(
        f"typedef mm_target<{i + 1}, mm_function> MM_P{i};"
        for i, p in enumerate(kernel.params)
        if p.role in ("buffer", "value")
    )
    body = ",\n  ".join(rows)
    return (
        f'{aliases}\nextern "C" __attribute__((used, visibility("default"))) constexpr int mm_types[] = {{\n  {body}}};'
    )


def _argument(index: int, param: Param, address: str) -> str:
    """The expression that passes a bound parameter living at `address`."""
    kind = f"mm_param<{index + 1}, mm_function>"
    pointer = param.type.split()[-1] != "&"
    expression = f"({kind})({address})" if pointer else f"mm_refer<{kind}>({address})"
    if param.condition:
        missing = f"({kind})0" if pointer else f"mm_refer<{kind}>(0)"
        expression = f"({param.condition}) ? {expression} : {missing}"
    return expression


def _position(index: int, param: Param) -> str:
    return f"mm_position<mm_param<{index + 1}, mm_function>>(c.{param.position}())"


def _cpu_entry(kernel: Kernel, by_pointer: frozenset[str]) -> list[str]:
    arguments, slot, dynamic = ["c.arena()"], 0, len(kernel.bound)
    for i, param in enumerate(kernel.params):
        if param.role == "position":
            arguments.append(_position(i, param))
        elif param.role == "threadgroup":  # args beyond the bound ones are byte offsets into the arena
            arguments.append(_argument(i, param, f"c.arena() + (ulong)L->args[{dynamic}]"))
            dynamic += 1
        else:
            arguments.append(_argument(i, param, f"L->args[{slot}]"))
            slot += 1
    call = ",\n    ".join(arguments)
    return [
        '#include "mm_entry_cpu.h"',
        "static void mm_invoke(const mm_launch* L, const mm_ctx& c) {",
        f"  ::{kernel.callee}(\n    {call});",
        "}",
    ]


def _cuda_entry(kernel: Kernel, by_pointer: frozenset[str]) -> list[str]:
    arguments, declared, blobs, slot, dynamic = ["c.arena()"], [], [], 0, 0
    for i, param in enumerate(kernel.params):
        if param.role == "position":
            arguments.append(_position(i, param))
        elif param.role == "threadgroup":
            arguments.append(_argument(i, param, f"c.arena() + d{dynamic}"))
            dynamic += 1
        elif param.role == "value" and param.name not in by_pointer:
            # bytes, since OpenCL takes no type with a bool in it as a kernel parameter
            blobs.append(f"struct alignas(alignof(MM_P{i})) mm_blob{i} {{ uchar bytes[sizeof(MM_P{i})]; }};")
            declared.append(f"mm_blob{i} a{slot}")
            arguments.append(_argument(i, param, f"&a{slot}"))
            slot += 1
        else:
            declared.append(f"__global char* a{slot}")
            arguments.append(_argument(i, param, f"a{slot}"))
            slot += 1
    declared += [f"uint d{k}" for k in range(dynamic)]
    call = ",\n    ".join(arguments)
    return [
        '#include "mm_entry_nvptx.h"',
        *blobs,
        "#ifdef MM_TAILS",
        f"#define MM_TOTALS {', ' if declared else ''}uint t0, uint t1, uint t2",
        "#else",
        "#define MM_TOTALS",
        "#endif",
        f'extern "C" __attribute__((nvptx_kernel)) void mm_entry({", ".join(declared)} MM_TOTALS) {{',
        "#ifdef MM_TAILS",
        "  const mm_ctx c(t0, t1, t2);",
        "  if (c.surplus()) return;",
        "#else",
        "  const mm_ctx c;",
        "#endif",
        f"  ::{kernel.callee}(\n    {call});",
        "}",
    ]


def read_types(binary: bytes, kernel: Kernel, program: Program) -> tuple[ParamMeta, ...]:
    """Types of the bound parameters as the compiler stated them. Raises MetalCompileError if the table is absent."""
    words = _ptx_words(binary)
    if words is None:
        words = _object_words(binary)
    if words is None:
        raise MetalCompileError(f"{kernel.file}:{kernel.line}: the compiled row '{kernel.name}' carries no type table")
    at = iter(words)

    def type_meta() -> TypeMeta:
        kind, bits, components, size, alignment = (next(at) for _ in range(5))
        return TypeMeta(_KINDS[kind], bits, components, size, alignment)

    out = []
    for param in kernel.bound:
        enabled, kind = next(at), type_meta()
        count = next(at)
        assert count == len(program.structs.get(param.struct, ()))
        fields = tuple(FieldMeta(path, next(at), type_meta()) for path in program.structs.get(param.struct, ()))
        out.append(ParamMeta(param.name, param.index, param.role, param.const, bool(enabled), kind, fields))
    return tuple(out)


def arena_bytes(binary: bytes) -> int:
    """Threadgroup memory that the compiled row declares, in bytes."""
    stated = [int(n) for n in re.findall(rb"// mm_arena_bytes (\d+)", binary)]
    start = binary.find(_ARENA)
    while start >= 0:
        stated.append(struct.unpack_from("<I", binary, start + len(_ARENA))[0])
        start = binary.find(_ARENA, start + 1)
    return max(stated, default=0)


def _object_words(binary: bytes) -> tuple[int, ...] | None:
    start = binary.find(struct.pack("<4I", *_MAGIC))
    if start < 0:
        return None
    usable = (len(binary) - start) // 4 * 4
    return struct.unpack_from(f"<{usable // 4}i", binary, start)[4:]


def _ptx_words(binary: bytes) -> tuple[int, ...] | None:
    found = re.search(rb"mm_types\[(\d+)\] = \{([^}]*)\}", binary)
    if found is None:
        return None
    numbers = [int(n) for n in found[2].split(b",")]
    numbers += [0] * (int(found[1]) - len(numbers))  # trailing zeros are not printed
    if numbers[0] != _MAGIC[0]:  # as bytes
        numbers = list(struct.unpack(f"<{len(numbers) // 4}i", bytes(numbers)))
    return tuple(numbers[4:])


def strip_types(ptx: str) -> str:
    """PTX without the table, which only the host reads."""
    return re.sub(r"^[^\n]*\bmm_types\[\d*\] = \{[^}]*\};\n", "", ptx, flags=re.M)
