"""``metal-marlin kernels``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from metal_marlin.cli.console import console, print_json, print_table
from metal_marlin.ops.inventory import KernelInfo, inventory


def run(*, as_json: bool, audit: Path | None) -> int:
    """Exit status: 1 when ``audit`` names a kernel that does not exist."""
    found = inventory()
    if audit is not None:
        return _audit(found, audit, as_json)
    if as_json:
        print_json([asdict(kernel) for kernel in found])
        return 0
    print_table(
        ["kernel", "file", "core", "op", "cases", "bench", "devices"],
        [[k.name, k.file, k.core or "", k.op or "", len(k.cases), k.bench or "", " ".join(k.devices)] for k in found],
        right=("cases",),
    )
    console.print(f"{len(found)} kernels in {len({k.file for k in found})} files")
    return 0


def read_names(path: Path) -> list[str]:
    """Names of an audit file: one a line, ``#`` starts a comment, order kept, duplicates dropped."""
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return list(dict.fromkeys(line for line in lines if line))


def _audit(found: list[KernelInfo], path: Path, as_json: bool) -> int:
    wanted, present = read_names(path), {kernel.name for kernel in found}
    missing = [name for name in wanted if name not in present]
    extra = sorted(present - set(wanted))
    if as_json:
        counts = {"listed": len(wanted), "present": len(wanted) - len(missing)}
        print_json({**counts, "missing": missing, "extra": extra})
    else:
        for name in missing:
            console.print(f"missing: {name}", markup=False)
        console.print(
            f"{len(wanted) - len(missing)} of {len(wanted)} listed kernels present, {len(missing)} missing, "
            f"{len(extra)} not listed"
        )
    return 1 if missing else 0
