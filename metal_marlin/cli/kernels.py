"""``metal-marlin kernels``."""

from __future__ import annotations

import textwrap
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from metal_marlin.cli.console import console, print_json, print_plain, print_table
from metal_marlin.ops.explain import explain
from metal_marlin.ops.inventory import KernelInfo, inventory

_NAMED = 20  # missing names that an audit prints unasked


def run(*, as_json: bool, audit: Path | None, every: bool = False) -> int:
    """Exit status: 1 when ``audit`` names a kernel that does not exist; ``every`` prints all of those."""
    found = inventory()
    if audit is not None:
        return _audit(found, audit, as_json, every)
    if as_json:
        print_json([asdict(kernel) for kernel in found])
        return 0
    rows = [[k.name, k.file, k.core or "", k.op or "", len(k.cases), k.bench or "", " ".join(k.devices)] for k in found]
    if not console.is_terminal:
        print_plain(rows)
        return 0
    headings = ["kernel", "file", "core", "op", "cases", "bench", "devices"]
    print_table(headings, rows, right=("cases",), whole="kernel")
    console.print(f"{len(found)} kernels in {len({k.file for k in found})} files")
    return 0


def run_plan(
    M: int, N: int, K: int, *, device: str, format: str, dtype: str, layout: str, sparse: bool, as_json: bool
) -> int:
    """Say what a product launches in canonical order and, where layers hold W so, in operand order. Exit status: 0."""
    name, _, zeros = format.partition(":")
    steps = explain(
        M, N, K, device=device, format=name, zeros=zeros or "none", dtype=dtype, layout=layout, sparse=sparse
    )
    if as_json:
        print_json([asdict(step) for step in steps])
    elif not console.is_terminal:
        print_plain([[s.op, s.kernel, "x".join(map(str, s.threadgroups)), s.threads, s.why] for s in steps])
    else:
        rows = [[s.op, s.kernel, " × ".join(map(str, s.threadgroups)), s.threads or "", s.why] for s in steps]
        print_table(["op", "kernel", "threadgroups", "threads", "why"], rows, right=("threads",), whole="kernel")
    return 0


def read_names(path: Path) -> list[str]:
    """Names of an audit file: one a line, ``#`` starts a comment, order kept, duplicates dropped."""
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return list(dict.fromkeys(line for line in lines if line))


def _families(names: list[str]) -> list[str]:
    """Lines of counts by first word, largest first; a name alone in its family stands for itself."""
    counts = Counter(name.partition("_")[0] for name in names)
    alone = [name for name in names if counts[name.partition("_")[0]] == 1]
    shared = [f"{count}\N{NO-BREAK SPACE}{family}_*" for family, count in counts.most_common() if count > 1]
    lines = textwrap.wrap(", ".join([*shared, *alone]), 100, break_long_words=False, break_on_hyphens=False)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def _audit(found: list[KernelInfo], path: Path, as_json: bool, every: bool) -> int:
    wanted, present = read_names(path), {kernel.name for kernel in found}
    missing = [name for name in wanted if name not in present]
    extra = sorted(present - set(wanted))
    if as_json:
        counts = {"listed": len(wanted), "present": len(wanted) - len(missing)}
        print_json({**counts, "missing": missing, "extra": extra})
    else:
        few = every or len(missing) <= _NAMED
        for line in missing if few else _families(missing):
            print(f"missing: {line}")
        print(
            f"{len(wanted) - len(missing)} of {len(wanted)} listed kernels present, {len(missing)} missing"
            f"{'' if few else ' (--missing names them)'}, {len(extra)} not listed"
        )
    return 1 if missing else 0
