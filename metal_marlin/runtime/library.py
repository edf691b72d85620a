"""MetalKernelLibrary: the kernels of MSL sources, compiled a row at a time on first use and cached."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from metal_marlin.errors import ArgumentError, CompilerNotFound, MetalMarlinError, UnknownKernelError
from metal_marlin.msl.clang import Compiler, find_compiler
from metal_marlin.msl.preprocess import Flattener
from metal_marlin.msl.program import RowRequest, Unit
from metal_marlin.msl.reflect import Kernel, Program
from metal_marlin.msl.row import CompiledRow, RowMeta
from metal_marlin.msl.target import Target
from metal_marlin.runtime.cache import RowCache
from metal_marlin.runtime.device import Executable, device_module, resolve_device

SRC = Path(__file__).parent.parent / "src"
Sources = str | Path | Sequence[str | Path] | None


def source_files() -> list[Path]:
    """The `.metal` files that ship with the package."""
    return sorted(SRC.glob("*.metal"))


def get_shader_source(name: str) -> str:
    """Flat source (includes inlined, ASCII, no line markers) of a shipped file or kernel, as Metal would get it.

    `name`: a file of src/ ("decode_gemv" or "decode_gemv.metal") or a kernel it defines.
    Raises UnknownKernelError with the nearest names.
    """
    stem = name.removesuffix(".metal")
    for path in source_files():
        if path.stem == stem:
            return Flattener([SRC], markers=False).file(path)
    library = MetalKernelLibrary(device="cpu")
    return library.unit_of(name).source


def _is_file(source: str | Path) -> bool:
    return isinstance(source, Path) or (source.endswith(".metal") and "\n" not in source)


def _found(path: Path) -> Path:
    places = [path] if path.parent != Path() else [path, SRC / path]
    for place in places:
        if place.is_file():
            return place
    looked = " and ".join(str(p.absolute().parent) for p in places)
    raise ArgumentError(f"source: no file '{path}' (looked in {looked})")


def checks_wanted() -> bool:
    """Whether METAL_MARLIN_CHECKED asks for checked kernels."""
    return os.environ.get("METAL_MARLIN_CHECKED", "") not in ("", "0")


class MetalKernelLibrary:
    """Kernels of Metal sources on one device.

    source: MSL text, a `.metal` file or several (names without a folder are looked up in the package's src/);
        None takes every file of src/.
    device: "cpu", "cuda", "cuda:1", "mps", a torch.device, or None for the best usable one.
    lanes: threads of a simdgroup on the CPU, 32 or 1; None takes 1 where the source declares
        `// metal-marlin: lanes=any` and 32 elsewhere. GPUs have 32.
    constants: function constants by name or index. defines: preprocessor macros. include_dirs: for `#include "…"`.
    Each file is a unit of its own, so one that does not compile leaves the others usable. Thread-safe.
    Raises NoDeviceError; ArgumentError for a file that is not there; MetalCompileError with file and line for a source
    that cannot be read.
    """

    def __init__(
        self,
        source: Sources = None,
        *,
        device: object = None,
        lanes: int | None = None,
        constants: Mapping[str | int, object] | None = None,
        defines: Mapping[str, object] | None = None,
        include_dirs: Sequence[str | Path] = (),
        cache: RowCache | None = None,
        target: Target | None = None,
        checked: bool | None = None,
    ) -> None:
        if lanes not in (None, 1, 32):
            raise MetalMarlinError(f"lanes is 32, 1 or None, not {lanes}")
        if target is None:
            self.device = resolve_device(device)
            target = device_module(self.device.kind).target(self.device.index)
        self.target = target
        self.constants = dict(constants or {})
        self._lanes = lanes
        self.checked = self._resolve_checked(checked, device)
        self._macros = {k: str(int(v)) if isinstance(v, bool) else str(v) for k, v in (defines or {}).items()}
        self._include_dirs = [Path(d) for d in include_dirs] + [SRC]
        self._cache = cache or RowCache()
        self._lock = threading.RLock()
        self._compiler: Compiler | None = None
        self._no_compiler: CompilerNotFound | None = None
        self._loaded: dict[tuple[str, bool, tuple[str, ...]], tuple[RowMeta, Executable]] = {}
        self.dispatch_state: dict[object, object] = {}  # owned by dispatch.py
        _alive.add(self)
        self.units = self._units(source)
        self._owner: dict[str, Unit] = {}
        for unit in self.units if len(self.units) == 1 else ():
            self._index(unit)

    def _resolve_checked(self, checked: bool | None, device: object) -> bool:
        """The argument, else METAL_MARLIN_CHECKED for the cpu. Raises MetalMarlinError where nothing can be checked."""
        if checked and (self.target.kind != "cpu" or self._lanes == 1):
            lanes = self._lanes or 32
            raise MetalMarlinError(f"checked kernels run on the cpu with 32 lanes, not on {self.target} with {lanes}")
        if checked is None:
            return checks_wanted() and self.target.kind == "cpu" and self._lanes != 1
        return checked

    def _units(self, source: Sources) -> list[Unit]:
        if isinstance(source, str) and not _is_file(source):
            return [Unit.from_text(source, "<source>", self._macros, self._include_dirs)]
        files = source_files() if source is None else [source] if isinstance(source, (str, Path)) else list(source)
        return [Unit.from_file(_found(p), self._macros, self._include_dirs) for p in map(Path, files)]

    def lanes(self, unit: Unit) -> int:
        """Simdgroup width a unit is compiled for."""
        if self.target.kind != "cpu" or self.checked:
            return 32
        return self._lanes or (1 if unit.lane_agnostic else 32)

    @property
    def compiler(self) -> Compiler | None:
        """The compiler, or None where there is none (cached and shipped rows still work)."""
        if self._compiler is None and self._no_compiler is None:
            try:
                self._compiler = find_compiler()
            except CompilerNotFound as error:
                self._no_compiler = error
        return self._compiler

    def _stored(self, key_of: Callable[[Target], str]) -> tuple[dict[str, Any], bytes] | None:
        """A cached entry; without a compiler also one for another target whose rows run here, the best there is."""
        if self.compiler is not None:
            return self._cache.get(key_of(self.target), self.compiler.tag)
        targets = (self.target, *self.target.portable())
        return next((found for t in targets if (found := self._cache.get(key_of(t), None)) is not None), None)

    def _need_compiler(self, what: str) -> Compiler:
        compiler = self.compiler
        if compiler is None:
            raise CompilerNotFound(
                f"{what} is not cached for {self.target} and there is no compiler: {self._no_compiler}"
            )
        return compiler

    def program(self, unit: Unit) -> Program:
        """Reflection of a unit, from the cache where an earlier run stored it."""
        lanes = self.lanes(unit)
        with self._lock:
            if unit.has_program(self.target, lanes):
                return unit.program(self.target, lanes)
            found = self._stored(lambda target: unit.program_key(target, lanes))
            if found is not None:
                unit.set_program(self.target, lanes, Program.from_json(found[0]))
            else:
                compiler = None if unit.plain else self._need_compiler(f"the expanded text of {unit.name}")
                program = unit.program(self.target, lanes, compiler)
                if self.compiler is not None:
                    key = unit.program_key(self.target, lanes)
                    self._cache.put(key, self.compiler.tag, program.to_json(), b"")
            return unit.program(self.target, lanes)

    def _index(self, unit: Unit) -> None:
        for name in self.program(unit).kernels:
            other = self._owner.setdefault(name, unit)
            if other is not unit:
                raise MetalMarlinError(f"kernel '{name}' is defined in both {other.name} and {unit.name}")

    @property
    def kernels(self) -> list[str]:
        """Names of all kernels."""
        for unit in self.units:
            self._index(unit)
        return sorted(self._owner)

    def unit_of(self, name: str) -> Unit:
        """The unit that defines a kernel. Raises UnknownKernelError with the nearest names."""
        if name not in self._owner and name not in self.kernels:
            raise UnknownKernelError(name, list(self._owner))
        return self._owner[name]

    def kernel(self, name: str) -> Kernel:
        """What the source says of a kernel: parameters, attributes, file and line."""
        return self.program(self.unit_of(name)).kernels[name]

    def compile(self, name: str, *, tails: bool = False, by_pointer: Iterable[str] = ()) -> CompiledRow:
        """The compiled row, from the cache or the compiler; `tails` and `by_pointer` pick variants (see RowRequest)."""
        unit = self.unit_of(name)
        by_pointer = tuple(by_pointer)

        def request(target: Target) -> RowRequest:
            options = {"lanes": self.lanes(unit), "constants": self.constants, "checked": self.checked}
            return RowRequest(name, target, tails=tails, by_pointer=by_pointer, **options)  # type: ignore[arg-type]

        found = self._stored(lambda target: unit.row_key(request(target)))
        if found is not None:
            return CompiledRow(RowMeta.from_json(found[0]), found[1])
        needless = self.target.kind == "metal" and unit.plain
        compiler = self.compiler if needless else self._need_compiler(f"kernel '{name}'")
        row = unit.compile(request(self.target), compiler)
        if compiler is not None:
            self._cache.put(unit.row_key(request(self.target)), compiler.tag, row.meta.to_json(), row.binary)
        return row

    def load(self, name: str, tails: bool = False, by_pointer: tuple[str, ...] = ()) -> tuple[RowMeta, Executable]:
        """A row ready to launch on this library's device; loaded once."""
        key = (name, tails, by_pointer)
        found = self._loaded.get(key)
        if found is None:
            with self._lock:
                found = self._loaded.get(key)
                if found is None:
                    row = self.compile(name, tails=tails, by_pointer=by_pointer)
                    found = (row.meta, device_module(self.device.kind).load(row, self.device.index))
                    self._loaded[key] = found
        return found

    def __repr__(self) -> str:
        return f"MetalKernelLibrary({', '.join(u.name for u in self.units)}; {self.target})"


_alive: weakref.WeakSet[MetalKernelLibrary] = weakref.WeakSet()


def _fresh_locks() -> None:
    """In a forked child: the thread that held a lock may not have come along."""
    for library in list(_alive):
        library._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_fresh_locks)
