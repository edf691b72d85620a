"""Runs the small cases of ops, and every kernel, against float64 references, and goes on after failures."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from metal_marlin.formats import codec
from metal_marlin.ops.spec import Check, OpSpec, worst
from metal_marlin.runtime.counters import counters


@dataclass(frozen=True)
class Failure:
    """``what``: the error found and allowed, or the first line of an exception. ``kernel``: "" where none ran."""

    op: str
    kernel: str
    case: str
    what: str


@dataclass
class Result:
    """Of one op: cases run, the kernels that they launched, failures, seconds (compilation included)."""

    op: str
    cases: int = 0
    kernels: set[str] = field(default_factory=set)
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0


def product_check(op: Callable[..., torch.Tensor], case: Any, device: str, kernel: str | None) -> Check:
    """Per row within twice the error of decoding and multiplying in x's dtype, and roundings of partial sums."""
    x, codes, scales, extra = case.tensors()
    more = {"format": case.format, "zeros": case.zeros}
    moved = [None if t is None else t.to(device) for t in (x, codes, scales, extra)]
    y = op(*moved[:3], case.group, extra=moved[3], kernel=kernel, **more)
    return rounded_check(y, x, codec(case.format).decode(codes, scales, extra, case.group, case.zeros, torch.float64))


def rounded_check(y: torch.Tensor, x: torch.Tensor, W: torch.Tensor) -> Check:
    """Per row of y within twice the error of multiplying x with W [N, K] (float64) in x's dtype, and roundings of
    partial sums."""
    y, exact = y.cpu().double(), x.double() @ W.T
    theirs = ((x @ W.to(x.dtype).T).double() - exact).norm(dim=-1)
    sums, number = (x.double().abs() @ W.abs().T).norm(dim=-1), torch.finfo(x.dtype)
    return worst((y - exact).norm(dim=-1), 2 * theirs + number.eps * exact.norm(dim=-1) + 2.0**-22 * sums)


def run(specs: Sequence[OpSpec], device: str, rows: Sequence[tuple[str, str]] = ()) -> list[Result]:
    """Every small case of the ops on a device, then one for each of ``rows`` (file, kernel) that none has launched."""
    results = {spec.name: Result(spec.name) for spec in specs}
    done: set[tuple[str, Any]] = set()
    for spec in specs:
        start = time.perf_counter()
        for case in spec.cases:
            if not getattr(case, "model", False) and (spec.name, case) not in done:
                done.add((spec.name, case))
                _one(spec, case, device, None, results[spec.name])
        results[spec.name].seconds += time.perf_counter() - start
    for spec in specs:
        start = time.perf_counter()
        for file, row in rows:
            if spec.row_case is not None and spec.claims(file, row) and row not in results[spec.name].kernels:
                case, kernel = spec.row_case(row)
                _one(spec, case, device, kernel, results[spec.name], row)
        results[spec.name].seconds += time.perf_counter() - start
    return list(results.values())


def _one(spec: OpSpec, case: Any, device: str, kernel: str | None, result: Result, row: str | None = None) -> None:
    if spec.check is None:
        return
    before = counters()
    try:
        found = spec.check(case, device, kernel)
        wrong = "" if found.passed else f"error {found.error:.3g}, allowed {found.allowed:.3g}"
    except Exception as error:  # a report on a broken machine must not break
        wrong = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    launched = set(counters() - before)
    if row is not None and row not in launched and not wrong:
        wrong = f"launched {', '.join(sorted(launched)) or 'nothing'} instead of {row}"
    result.cases += 1
    result.kernels |= launched
    if wrong:
        result.failures.append(Failure(spec.name, ", ".join(sorted(launched)) or row or "", str(case), wrong))
