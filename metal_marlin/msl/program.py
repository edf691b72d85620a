"""One MSL text on its way to a row: flat source, expanded source, reflection, translation unit, cache key."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from metal_marlin.errors import ArgumentError, MetalCompileError, UnknownKernelError
from metal_marlin.msl.clang import Compiler, find_compiler, flags
from metal_marlin.msl.entry import arena_bytes, entry_text, read_types, strip_types
from metal_marlin.msl.lexer import Source
from metal_marlin.msl.metal import metal_row
from metal_marlin.msl.preprocess import Flattener, needs_preprocessor
from metal_marlin.msl.reflect import FunctionConstant, Program, Reflection
from metal_marlin.msl.rewrite import rewrite
from metal_marlin.msl.row import CompiledRow, RowMeta
from metal_marlin.msl.target import Target

STDLIB = Path(__file__).with_name("stdlib")
_LANES_ANY = re.compile(r"^//\s*metal-marlin:\s*lanes=any\s*$", re.M)
_STANDARD_MACROS = {"__METAL__": "1", "__METAL_VERSION__": "320", "__HAVE_BFLOAT__": "1"}


@functools.lru_cache(maxsize=1)
def frontend_hash() -> str:
    """Digest of this front end (but for the lint, which compiles nothing) and its standard library: a changed header or
    rewrite rule makes new cache keys."""
    digest = hashlib.sha256()
    for folder, pattern in ((Path(__file__).parent, "*.py"), (STDLIB, "**/*")):
        for path in sorted(p for p in folder.glob(pattern) if p.is_file() and p.name != "lint.py"):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def device_macros(target: Target, lanes: int) -> dict[str, str]:
    """How a source (only core/<device>/ should ask) and the standard library learn where they run. Metal adds none."""
    if target.kind == "metal":
        return {}
    return {f"__METAL_MARLIN_{target.kind.upper()}__": "1", "METAL_MARLIN_LANES": str(lanes)}


class Unit:
    """A flat MSL text. `source` is what Metal gets; keys depend on content, never on where files lie."""

    def __init__(
        self,
        marked: str,
        source: str,
        name: str,
        defines: Mapping[str, str],
        headers: Sequence[str],
        missing: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.missing = tuple(missing)
        self.headers = tuple(dict.fromkeys(["metal_stdlib", *headers]))
        self.source = source
        self.defines = dict(defines)
        self._marked = marked
        self._reflections: dict[tuple[str, int], Reflection] = {}
        self._programs: dict[tuple[str, int], Program] = {}
        self.plain = not (defines or needs_preprocessor(source))

    @staticmethod
    def from_text(text: str, name: str, defines: Mapping[str, str], include_dirs: Sequence[Path]) -> Unit:
        return Unit._flat(lambda flattener: flattener.text(text, name), name, defines, include_dirs)

    @staticmethod
    def from_file(path: Path, defines: Mapping[str, str], include_dirs: Sequence[Path]) -> Unit:
        return Unit._flat(lambda flattener: flattener.file(path), str(path), defines, include_dirs)

    @staticmethod
    def _flat(
        flatten: Callable[[Flattener], str],
        name: str,
        defines: Mapping[str, str],
        include_dirs: Sequence[Path],
    ) -> Unit:
        flattener = Flattener(include_dirs)
        marked = flatten(flattener)
        source = flatten(Flattener(include_dirs, markers=False))
        return Unit(marked, source, name, defines, flattener.standard, flattener.missing)

    @property
    def lane_agnostic(self) -> bool:
        """Whether the text declares `// metal-marlin: lanes=any`."""
        return _LANES_ANY.search(self.source) is not None

    def _variant(self, target: Target, lanes: int) -> tuple[str, int]:
        """What the expanded text depends on; one for all where nothing needs the preprocessor."""
        return ("", 0) if self.plain else (str(target), lanes)

    def program_key(self, target: Target, lanes: int) -> str:
        return _digest("program", self.source, self.defines, self._variant(target, lanes), frontend_hash())

    def reflection(self, target: Target, lanes: int, compiler: Compiler | None) -> Reflection:
        """Tokens and declarations as `target` sees them; needs a compiler where the text has macros."""
        variant = self._variant(target, lanes)
        if variant not in self._reflections:
            text = re.sub(r"^[ \t]*#[ \t]*pragma[ \t]+METAL\b.*$", "", self._marked, flags=re.M)
            if not self.plain:
                compiler = compiler or find_compiler()
                text = compiler.preprocess(text, target, self._macros(target, lanes))
            self._reflections[variant] = Reflection(Source(text, self.name))
        return self._reflections[variant]

    def _macros(self, target: Target, lanes: int) -> dict[str, str]:
        return {**_STANDARD_MACROS, **device_macros(target, lanes), **self.defines}

    def program(self, target: Target, lanes: int, compiler: Compiler | None = None) -> Program:
        variant = self._variant(target, lanes)
        if variant not in self._programs:
            self._programs[variant] = self.reflection(target, lanes, compiler).program
        return self._programs[variant]

    def has_program(self, target: Target, lanes: int) -> bool:
        return self._variant(target, lanes) in self._programs

    def set_program(self, target: Target, lanes: int, program: Program) -> None:
        """Use a reflection that an earlier run stored."""
        self._programs[self._variant(target, lanes)] = program

    def row_key(self, request: RowRequest) -> str:
        program = self.program_key(request.target, request.lanes)
        return _digest("row", program, request.describe(), flags(request.target, checked=request.checked))

    def compile(self, request: RowRequest, compiler: Compiler | None) -> CompiledRow:
        """Compile one row (for Metal: read it; `compiler` may then be None where the text is plain).

        Raises MetalCompileError with the .metal file and line.
        """
        reflection = self.reflection(request.target, request.lanes, compiler)
        program = reflection.program
        if request.name not in program.kernels:
            raise UnknownKernelError(request.name, list(program.kernels))
        if request.target.kind == "metal":
            macros = "".join(f"#define {name} {value}\n" for name, value in self.defines.items())
            return metal_row(reflection, request.name, macros + self.source)
        if self.missing:
            raise MetalCompileError(self.missing[0])
        assert compiler is not None
        kernel = program.kernels[request.name]
        body = rewrite(reflection.source, reflection, resolve_constants(program.constants, request.constants))
        entry = entry_text(kernel, program, request.target.kind, by_pointer=request.by_pointer)
        headers = "".join(f"#include <{h}>\n" for h in self.headers)
        text = f'#include "mm_config.h"\n{headers}#include "mm_entry.h"\n{body}\n{entry}'
        defines = {**_STANDARD_MACROS, **device_macros(request.target, request.lanes)}
        defines |= {"MM_TAILS": "1"} if request.tails else {}
        defines |= {"METAL_MARLIN_CHECKED": "1"} if request.checked else {}
        options = {"stdlib_dir": STDLIB, "name": request.name, "checked": request.checked}
        binary = compiler.compile(text, request.target, defines=defines, **options)  # type: ignore[arg-type]
        params, shared = read_types(binary, kernel, program), arena_bytes(binary)
        if request.target.kind == "cuda":
            ptx = _portable(strip_types(binary.decode()), request.target.arch)
            binary = _bound_threads(ptx, kernel.max_threads).encode()
        meta = RowMeta(
            name=request.name,
            target=str(request.target),
            lanes=request.lanes,
            params=params,
            dynamic=tuple((p.name, p.index) for p in kernel.dynamic),
            threadgroup_bytes=shared,
            max_threads=kernel.max_threads,
            tails=request.tails,
            by_pointer=request.by_pointer,
            checked=request.checked,
        )
        return CompiledRow(meta, binary)


class RowRequest:
    """What makes a row: kernel name, target, lanes, function constants, tail handling, arguments by pointer, checks."""

    def __init__(
        self,
        name: str,
        target: Target,
        *,
        lanes: int = 32,
        constants: Mapping[str | int, object] | None = None,
        tails: bool = False,
        by_pointer: Iterable[str] = (),
        checked: bool = False,
    ) -> None:
        self.name = name
        self.target = target
        self.lanes = lanes if target.kind == "cpu" else 32
        self.constants = dict(constants or {})
        self.tails = tails and target.kind == "cuda"  # on the CPU one object serves both
        self.by_pointer = tuple(sorted(by_pointer)) if target.kind == "cuda" else ()
        self.checked = checked and target.kind == "cpu" and self.lanes == 32

    def describe(self) -> list[object]:
        constants = sorted((str(k), repr(v)) for k, v in self.constants.items())
        return [self.name, str(self.target), self.lanes, constants, self.tails, self.by_pointer, self.checked]


def resolve_constants(declared: Iterable[FunctionConstant], given: Mapping[str | int, object]) -> dict[str, str]:
    """Literals by name. Raises MetalCompileError for a constant that the source does not declare, ArgumentError for a
    value that its type does not hold or one given twice."""
    declared = list(declared)
    out: dict[str, str] = {}
    for key, value in given.items():
        found = next((c for c in declared if key in (c.name, c.index)), None)
        if found is None:
            names = ", ".join(f"{c.name} ({c.index})" for c in declared) or "none"
            raise MetalCompileError(f"no function constant {key!r}; the source declares: {names}")
        if found.name in out:
            raise ArgumentError(f"function constant '{found.name}' is given twice, by name and by index {found.index}")
        out[found.name] = f"::metal::_make<{found.type}>({_literal(_checked(found, value))})"
    return out


def _ranges() -> dict[str, tuple[int, int]]:
    out = {"bool": (0, 1), "unsigned": (0, 2**32 - 1), "size_t": (0, 2**64 - 1)}
    for bits, name in ((8, "char"), (16, "short"), (32, "int"), (64, "long")):
        out |= dict.fromkeys((name, f"int{bits}_t"), (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1))
        out |= dict.fromkeys((f"u{name}", f"unsigned {name}", f"uint{bits}_t"), (0, 2**bits - 1))
    return out


_RANGES = _ranges()
_FLOATS = {"half": "<e", "float": "<f", "bfloat": "<f"}


def _checked(constant: FunctionConstant, value: object) -> object:
    """The value as its declared type has it; types that are not Metal's own are the compiler's to check."""
    spelled = " ".join(re.sub(r"\bconst\b|\bmetal\b|::", " ", constant.type).split())
    base, lanes = spelled[:-1], spelled[-1:]
    if lanes not in ("2", "3", "4"):
        base, lanes = spelled, "1"
    if base not in _RANGES and base not in _FLOATS:
        return value
    if not isinstance(value, (list, tuple)):
        return _fitted(constant.name, base, value)
    if len(value) != int(lanes):
        raise ArgumentError(f"function constant '{constant.name}': {spelled} takes {lanes} numbers, got {value!r}")
    return [_fitted(constant.name, base, v) for v in value]


def _fitted(name: str, kind: str, value: object) -> object:
    if kind in _RANGES:
        least, most = _RANGES[kind]
        whole = int(value) if isinstance(value, float) and value.is_integer() else value
        if isinstance(whole, int) and least <= whole <= most:
            return bool(whole) if kind == "bool" else whole
        raise ArgumentError(f"function constant '{name}': {value!r} does not fit {kind} ({least} to {most})")
    try:
        struct.pack(_FLOATS[kind], value)
    except (struct.error, OverflowError):
        raise ArgumentError(f"function constant '{name}': {value!r} does not fit {kind}") from None
    return value


def _literal(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        if value == -(2**63):
            return f"({value + 1}l - 1)"
        return f"{value}" if abs(value) < 2**31 else f"{value}ul" if value > 0 else f"{value}l"
    if isinstance(value, float):
        if value != value:
            return "NAN"
        return f"{value.hex()}f" if abs(value) != float("inf") else f"({'-' if value < 0 else ''}INFINITY)"
    if isinstance(value, (tuple, list)):
        return ", ".join(_literal(v) for v in value)
    raise MetalCompileError(f"function constants are bools, integers, floats or tuples of them, not {type(value)}")


# PTX ISA that first has an instruction of inline assembly.
_SINCE = {"wgmma.mma_async.sp": "8.2", "mma.sp::ordered_metadata": "8.5"}


def _portable(ptx: str, arch: str) -> str:
    """State PTX ISA 8.0 up to sm_90a, so that drivers since CUDA 12.0 take it, or the first that has every instruction;
    clang always states its newest."""
    if int(re.sub(r"\D", "", arch)) > 90:
        return ptx
    ptx = re.sub(r'^\s*\.pragma "used_bytes_mask [^"]*";\n', "", ptx, flags=re.M)  # a hint, newer than 8.0
    version = max(["8.0", *(first for word, first in _SINCE.items() if word in ptx)])
    return re.sub(r"^\.version \d+\.\d+", f".version {version}", ptx, count=1, flags=re.M)


def _bound_threads(ptx: str, limit: int | None) -> str:
    """State the entry's `max_total_threads_per_threadgroup`, which clang drops outside CUDA, and what comments of the
    kernel's say (src/core/nvidia/cluster.h): the threadgroups along z of a cluster, and how many threadgroups a
    multiprocessor should hold."""
    cluster = re.search(r"^\s*// threadgroups of a cluster: (\d+)$", ptx, flags=re.M)
    held = re.search(r"^\s*// threadgroups of a multiprocessor: (\d+)$", ptx, flags=re.M)
    bounds = f"\n.maxntid {limit}, 1, 1" if limit is not None else ""
    bounds += f"\n.minnctapersm {held[1]}" if held and limit is not None else ""
    bounds += f"\n.reqnctapercluster 1, 1, {cluster[1]}" if cluster else ""
    return re.sub(r"(\.entry mm_entry\([^)]*\))", rf"\1{bounds}", ptx, count=1)
