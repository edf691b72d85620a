"""``metal-marlin selftest``: every op on one device against float64, as a report to attach to an issue."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from metal_marlin.cli.console import print_json
from metal_marlin.cli.doctor import compiler, versions
from metal_marlin.errors import ArgumentError, MetalMarlinError
from metal_marlin.files import whole_file
from metal_marlin.ops import selfcheck
from metal_marlin.ops.inventory import inventory, op_specs
from metal_marlin.ops.spec import OpSpec


def run(device: str, ops: list[str], report: Path | None, as_json: bool, checked: bool = False) -> int:
    """Exit status: 1 when a case failed."""
    specs = op_specs()
    unknown = set(ops) - {spec.name for spec in specs}
    if unknown:
        names = sorted({spec.name for spec in specs})
        raise ArgumentError(f"--op {', '.join(sorted(unknown))}: there are {', '.join(names)}")
    if checked:
        if device != "cpu":
            raise ArgumentError(f"--checked --device {device}: kernels are checked on the cpu")
        os.environ["METAL_MARLIN_CHECKED"] = "1"
    chosen = [spec for spec in specs if not ops or spec.name in ops]
    rows = _rows(device, chosen)
    results = selfcheck.run(chosen, device, rows or ())
    ran = {kernel for result in results for kernel in result.kernels}
    answer: dict[str, Any] = {
        "versions": {**versions(), "compiler": compiler()["version"] or "none"},
        "device": f"{device}, checked" if checked else device,
        "chip": _chip(device),
        "ops": [{**asdict(r), "kernels": len(r.kernels), "failures": len(r.failures)} for r in results],
        "failures": [asdict(f) for r in results for f in r.failures],
        "not_run": None if rows is None else [name for _, name in rows if name not in ran],
    }
    text = _markdown(answer)
    if report is not None:
        with whole_file(report) as file:
            file.write_text(text, encoding="utf-8")
    if as_json:
        print_json(answer)
    else:
        print(text, end="")
    return 1 if answer["failures"] else 0


def _chip(device: str) -> str:
    if device.startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def _rows(device: str, specs: list[OpSpec]) -> list[tuple[str, str]] | None:
    """File and name of the ops' kernels on the device; None where that takes a compiler that is not here."""
    kind, names = device.partition(":")[0], {spec.name for spec in specs}
    try:
        return [(row.file, row.name) for row in inventory() if row.op in names and kind in row.devices]
    except MetalMarlinError:
        return None


def _markdown(answer: dict[str, Any]) -> str:
    lines = ["## metal-marlin selftest", ""]
    lines += [f"- {name}: {value}" for name, value in answer["versions"].items()]
    lines += [f"- device: {answer['device']} ({answer['chip']})"]
    cases, failed = sum(op["cases"] for op in answer["ops"]), len(answer["failures"])
    left = answer["not_run"]
    said = (
        "unknown which kernels no case ran (no compiler)"
        if left is None
        else f"{len(left)} kernels not run by any case"
    )
    lines += [f"- {cases} cases, {failed} failed; {said}{': ' if left else ''}{', '.join(left or [])}", ""]
    lines += ["| op | cases | kernels | failed | seconds |", "| --- | --: | --: | --: | --: |"]
    for op in answer["ops"]:
        lines.append(f"| {op['op']} | {op['cases']} | {op['kernels']} | {op['failures']} | {op['seconds']:.1f} |")
    lines += [""] if failed else []
    for f in answer["failures"]:
        lines.append(f"- {f['op']} {f['case']} ({f['kernel'] or 'no kernel ran'}): {f['what']}")
    return "\n".join(lines) + "\n"
