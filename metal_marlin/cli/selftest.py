"""``metal-marlin selftest``: every op on one device against float64, as a report to attach to an issue."""

from __future__ import annotations

import os
import platform
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from metal_marlin.cli.console import print_json
from metal_marlin.cli.doctor import _compiler, _versions
from metal_marlin.errors import ArgumentError, MetalMarlinError
from metal_marlin.ops import selfcheck
from metal_marlin.ops.inventory import inventory, op_specs


def run(device: str, ops: list[str], report: Path | None, as_json: bool) -> int:
    """Exit status: 1 when a case failed."""
    specs = op_specs()
    unknown = set(ops) - {spec.name for spec in specs}
    if unknown:
        names = sorted({spec.name for spec in specs})
        raise ArgumentError(f"--op {', '.join(sorted(unknown))}: there are {', '.join(names)}")
    results = selfcheck.run([s for s in specs if not ops or s.name in ops], device)
    answer: dict[str, Any] = {
        "versions": {**_versions(), "compiler": _compiler()["version"] or "none"},
        "device": device,
        "chip": _chip(device),
        "ops": [{**asdict(r), "kernels": len(r.kernels), "failures": len(r.failures)} for r in results],
        "failures": [asdict(f) for r in results for f in r.failures],
        "not_run": _not_run(device, results),
    }
    text = _markdown(answer)
    if report is not None:
        _write(report, text)
    if as_json:
        print_json(answer)
    else:
        print(text, end="")
    return 1 if answer["failures"] else 0


def _chip(device: str) -> str:
    if device.startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def _not_run(device: str, results: list[selfcheck.Result]) -> list[str]:
    """Kernels of these ops that no case launched."""
    kind, ran = device.partition(":")[0], {k for r in results for k in r.kernels}
    names = {r.op for r in results}
    try:
        return [row.name for row in inventory() if row.op in names and kind in row.devices and row.name not in ran]
    except MetalMarlinError:  # without a compiler and a cache the rows are not known
        return []


def _markdown(answer: dict[str, Any]) -> str:
    lines = ["## metal-marlin selftest", ""]
    lines += [f"- {name}: {value}" for name, value in answer["versions"].items()]
    lines += [f"- device: {answer['device']} ({answer['chip']})"]
    cases, failed = sum(op["cases"] for op in answer["ops"]), len(answer["failures"])
    lines += [f"- {cases} cases, {failed} failed; {len(answer['not_run'])} kernels not run by any case", ""]
    lines += ["| op | cases | kernels | failed | seconds |", "| --- | --: | --: | --: | --: |"]
    for op in answer["ops"]:
        lines.append(f"| {op['op']} | {op['cases']} | {op['kernels']} | {op['failures']} | {op['seconds']:.1f} |")
    lines += [""] if failed else []
    for f in answer["failures"]:
        lines.append(f"- {f['op']} {f['case']} ({f['kernel'] or 'no kernel ran'}): {f['what']}")
    return "\n".join(lines) + "\n"


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
