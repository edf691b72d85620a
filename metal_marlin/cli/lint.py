"""``metal-marlin lint``: what Apple's compiler or torch.mps.compile_shader would refuse in .metal files."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.progress import track

from metal_marlin.cli.console import console, print_json
from metal_marlin.msl.clang import find_compiler
from metal_marlin.msl.lint import MOST_THREADGROUP_BYTES, LintFinding, lint, lint_ascii
from metal_marlin.msl.program import Unit
from metal_marlin.msl.target import Target
from metal_marlin.runtime.library import SRC, MetalKernelLibrary, source_files


def run(files: list[Path], *, torch_rules: bool, every_row: bool, measure: bool, as_json: bool) -> int:
    """Exit status: 1 when a rule is broken."""
    found: list[LintFinding] = []
    for path in files or source_files():
        found += lint_file(path, torch_rules=torch_rules)
        if measure:
            found += measured(path, every_row=every_row)
    if not files:
        for header in sorted(SRC.rglob("*.h")):
            found += lint_ascii(header.read_text(encoding="utf-8"), str(header))
    if as_json:
        print_json([finding.__dict__ for finding in found])
    else:
        for finding in found:
            console.print(str(finding), markup=False, soft_wrap=True)
        console.print(f"{len(files or source_files())} files: {len(found)} findings", markup=False)
    return 1 if found else 0


def lint_file(path: Path, *, torch_rules: bool) -> list[LintFinding]:
    """Rules that read the text. Raises MetalCompileError for a text that cannot be read."""
    unit = Unit.from_file(path, {}, [path.parent, SRC])
    reflection = unit.reflection(Target.parse("metal"), 32, None if unit.plain else find_compiler())
    return lint_ascii(path.read_text(encoding="utf-8"), str(path)) + lint(
        reflection.source, reflection.program, torch=torch_rules
    )


def _is_plain(name: str) -> bool:
    """Whether a row's name says no more than its dtype: scales and zeros take no threadgroup memory."""
    keys = name.partition("__")[2]
    return not keys or (keys.startswith("t") and "_" not in keys)


def measured(path: Path, *, every_row: bool) -> list[LintFinding]:
    """Threadgroup memory of the file's rows as the compiler lays it out, 32 lanes; of a row a kernel and dtype."""
    library = MetalKernelLibrary(path, target=Target.parse("cpu:x86-64-v3"), lanes=32, include_dirs=[path.parent])
    names = [name for name in library.kernels if every_row or _is_plain(name)]
    with ThreadPoolExecutor(max_workers=2) as pool:
        rows = track(
            pool.map(library.compile, names), f"measuring {path.name}", len(names), console=console, transient=True
        )
        sizes = {row.name: row.meta.threadgroup_bytes for row in rows}
    return [
        LintFinding(
            "threadgroup-memory",
            library.kernel(name).file,
            library.kernel(name).line,
            f"'{name}' has {size} bytes; Apple GPUs have {MOST_THREADGROUP_BYTES}",
        )
        for name, size in sizes.items()
        if size > MOST_THREADGROUP_BYTES
    ]
