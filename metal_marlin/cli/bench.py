"""``metal-marlin bench``: the ops with quantised weights, on the shapes that their cases name."""

from __future__ import annotations

import csv
import importlib
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from metal_marlin.cli.console import print_json, print_table
from metal_marlin.errors import ArgumentError, MetalMarlinError
from metal_marlin.formats import codec
from metal_marlin.ops.inventory import op_specs
from metal_marlin.ops.spec import OpSpec

_ROTATED = 256 << 20  # bytes of weights read before the same ones come again: more than caches hold
_COPIES = 64


@dataclass(frozen=True)
class Row:
    """One case: times in microseconds (median, 20th and 80th percentile of calls), GB/s of weights, the error."""

    op: str
    case: str
    device: str
    median_us: float
    p20_us: float
    p80_us: float
    weights_gb_s: float
    error: float


def run(op: str, device: str, seconds: float, as_json: bool, save: Path | None) -> None:
    """Check, then time, the model-shaped cases of every op with quantised weights, or of ``op``."""
    specs = [s for s in op_specs() if hasattr(s.cases[0], "format") and hasattr(s.cases[0], "M")]  # x and weights
    names = [spec.name for spec in specs]
    if op and op not in names:
        raise ArgumentError(f"--op {op}: this command times {', '.join(names)}")
    rows = [
        measure(spec, case, device, seconds)
        for spec in specs
        if op in ("", spec.name)
        for case in [c for c in spec.cases if getattr(c, "model", "")] or spec.cases[:4]
    ]
    values = [asdict(row) for row in rows]
    if save is not None:
        with save.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(values[0]))
            writer.writeheader()
            writer.writerows(values)
    if as_json:
        print_json(values)
        return
    cells = [
        [r.op, r.case, *(f"{v:.1f}" for v in (r.median_us, r.p20_us, r.p80_us, r.weights_gb_s)), f"{r.error:.1e}"]
        for r in rows
    ]
    headings = ["op", "case", "µs", "p20", "p80", "weights GB/s", "error"]
    print_table(headings, cells, right=tuple(headings[2:]), whole="case")


def measure(spec: OpSpec, case: Any, device: str, seconds: float) -> Row:
    """Time one case, after its result was found right."""
    call = getattr(importlib.import_module(f"metal_marlin.ops.{spec.name}"), spec.name)
    x, *weights = (None if t is None else t.to(device) for t in case.tensors())
    error = _error(call, case, x, weights)
    used = sum(t.nbytes for t in weights if t is not None)
    copies = [
        [None if t is None else t.clone() for t in weights] for _ in range(max(1, min(_COPIES, _ROTATED // used)))
    ]
    times: list[float] = []
    finish = _finish(device)
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        codes, scales, extra = copies[len(times) % len(copies)]
        finish()
        start = time.perf_counter()
        call(x, codes, scales, case.group, format=case.format, zeros=case.zeros, extra=extra)
        finish()
        times.append((time.perf_counter() - start) * 1e6)
    parts = statistics.quantiles(times, n=5)
    median = statistics.median(times)
    return Row(spec.name, str(case), device, median, parts[0], parts[3], used / median / 1e3, error)


def _finish(device: str) -> Callable[[], None]:
    if device.startswith("cuda"):
        return torch.cuda.synchronize
    return torch.mps.synchronize if device == "mps" else lambda: None


def _error(call: Callable[..., torch.Tensor], case: Any, x: Any, weights: list[Any]) -> float:
    """‖y − ref‖ / ‖ref‖; MetalMarlinError where it is over twice that of decoding and multiplying in x's dtype."""
    codes, scales, extra = weights
    y = call(x, codes, scales, case.group, format=case.format, zeros=case.zeros, extra=extra).cpu().double()
    extra = None if extra is None else extra.cpu()
    W = codec(case.format).decode(codes.cpu(), scales.cpu(), extra, case.group, case.zeros, torch.float64)
    x = x.cpu()
    expected = x.double() @ W.T
    composed = (x @ W.to(x.dtype).T).double()
    scale = expected.norm()
    error, allowed = ((value - expected).norm() / scale for value in (y, composed))
    if not error <= 2 * allowed + 1e-6:
        raise MetalMarlinError(f"{case}: wrong result: error {error:.2e}, allowed {2 * allowed + 1e-6:.2e}; not timed")
    return error.item()
