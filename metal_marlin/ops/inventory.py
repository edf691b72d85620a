"""The kernels that ship with the package and what each belongs to, derived from ``src/`` and the op modules."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import metal_marlin.ops
from metal_marlin.errors import MetalMarlinError
from metal_marlin.msl.target import Target
from metal_marlin.ops.spec import OpSpec
from metal_marlin.runtime.device import kinds
from metal_marlin.runtime.library import MetalKernelLibrary, source_files

# The oldest target of each compiled device: a row that exists there exists everywhere.
_BASE_TARGETS = {"cpu": "cpu:x86-64-v3", "cuda": "cuda:sm_80"}
_CORE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"core/(\w+)\.h"', re.M)


@dataclass(frozen=True)
class KernelInfo:
    """One row: ``file`` of src/, ``core`` header its algorithm lives in, ``op`` that launches it, dotted path of the
    ``reference``, ids of the ``cases``, path of the ``bench``, ``devices`` that have the row. None, empty: no op yet.
    """

    name: str
    file: str
    core: str | None
    op: str | None
    reference: str | None
    cases: tuple[str, ...]
    bench: str | None
    devices: tuple[str, ...]


def op_specs() -> list[OpSpec]:
    """Specs of every op module (its ``OP``: one OpSpec or a tuple of them)."""
    found: list[OpSpec] = []
    for module in sorted(info.name for info in pkgutil.iter_modules(metal_marlin.ops.__path__)):
        declared = getattr(importlib.import_module(f"metal_marlin.ops.{module}"), "OP", ())
        found += [declared] if isinstance(declared, OpSpec) else list(declared)
    return found


def inventory() -> list[KernelInfo]:
    """Every row of ``src/``, in the order of names.

    Raises MetalCompileError for a file that cannot be read, MetalMarlinError when two ops claim a row or a spec claims
    none, and CompilerNotFound when a file with macros is neither cached nor expandable here.
    """
    specs = op_specs()
    rows = [row for path in source_files() for row in _rows(path, specs)]
    for spec in specs:
        for file in (spec.family_file, *spec.more_files):
            if not any(spec.claims(row.file, row.name) for row in rows if row.file == file):
                raise MetalMarlinError(f"op '{spec.name}' claims no kernel of {file}")
    return sorted(rows, key=lambda row: row.name)


def _rows(path: Path, specs: list[OpSpec]) -> Iterator[KernelInfo]:
    core = _CORE.search(path.read_text(encoding="utf-8"))
    for name, devices in _devices(path).items():
        owners = [spec for spec in specs if spec.claims(path.name, name)]
        if len(owners) > 1:
            raise MetalMarlinError(f"kernel '{name}' is claimed by {' and '.join(spec.name for spec in owners)}")
        op = owners[0] if owners else None
        yield KernelInfo(
            name=name,
            file=path.name,
            core=core[1] if core else None,
            op=op.name if op else None,
            reference=op.reference_path if op else None,
            cases=tuple(str(case) for case in op.cases) if op else (),
            bench=op.bench if op else None,
            devices=devices,
        )


def _devices(path: Path) -> dict[str, tuple[str, ...]]:
    """Devices by row name. What Metal sees cannot be expanded here: it has the rows that all others have."""
    by_kind = {k: MetalKernelLibrary(path, target=Target.parse(t)).kernels for k, t in _BASE_TARGETS.items()}
    names = sorted({name for kernels in by_kind.values() for name in kernels})
    return {
        name: tuple(
            kind
            for kind in kinds()
            if all(name in kernels for compiled, kernels in by_kind.items() if kind in (compiled, "mps"))
        )
        for name in names
    }
