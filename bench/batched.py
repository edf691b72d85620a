"""Batched products with FP4 weights and grouped-head scores against torch's own.

    python bench/batched.py [--device cuda]

Correctness comes first, on the data that is timed. torch multiplies dense weights, and masks in a second pass.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from common import (
    Candidate,
    copies,
    graph_times,
    host_times,
    require_correct,
    save,
    sets_needed,
    synchronize,
    table,
    usable_devices,
)

from metal_marlin.formats import codec
from metal_marlin.ops import batched

LIMITS = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}
# op, case, ours, torch's, float64 result of set 0, multiplications and additions, sets
Named = tuple[str, str, Callable[[int], torch.Tensor], Callable[[int], torch.Tensor], torch.Tensor, int, int]


def products(device: str) -> list[Named]:
    found: list[Named] = []
    for case in (c for c in batched.BATCHED_CASES if c.model):
        sets = sets_needed(case.B * case.N * case.K // 2, device)
        data = copies(case.tensors(device), sets)
        pairs = zip(*data[0][1:], strict=True)
        W = torch.stack([codec("fp4").decode(c, s, None, case.group, "none", case.dtype) for c, s in pairs])
        dense = copies(W, sets_needed(W.nbytes, device))

        def ours(i: int, data: list[tuple[torch.Tensor, ...]] = data, g: int = case.group) -> torch.Tensor:
            return batched.batched_linear(*data[i], g)

        def theirs(
            i: int, data: list[tuple[torch.Tensor, ...]] = data, dense: list[torch.Tensor] = dense
        ) -> torch.Tensor:
            return data[i][0] @ dense[i % len(dense)].mT

        exact = batched.batched_linear_ref(*data[0], case.group)
        work = 2 * case.B * case.M * case.N * case.K
        found.append(("batched_linear", str(case), ours, theirs, exact, work, sets))
    return found


def scores(device: str) -> list[Named]:
    found: list[Named] = []
    for case in (c for c in batched.SCORES_CASES if c.model):
        first = case.tensors(device)
        sets = sets_needed(sum(t.nbytes for t in first), device)
        data = copies(first, sets)
        hidden = ~torch.ones(case.queries, case.keys, dtype=torch.bool, device=device).tril(case.keys - case.queries)

        def ours(
            i: int, data: list[tuple[torch.Tensor, torch.Tensor]] = data, causal: bool = case.causal
        ) -> torch.Tensor:
            return batched.grouped_scores(*data[i], None, causal)

        def theirs(
            i: int, data: list[tuple[torch.Tensor, torch.Tensor]] = data, hidden: torch.Tensor = hidden
        ) -> torch.Tensor:
            q, k = data[i]
            s = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5
            return s.masked_fill_(hidden, -torch.inf)

        exact = batched.grouped_scores_ref(*data[0], None, case.causal)
        work = 2 * case.batch * case.heads * case.queries * case.keys * case.width
        found.append(("grouped_scores", str(case), ours, theirs, exact, work, sets))
    return found


def measure(item: Named, device: str) -> list[tuple[str, ...]]:
    op, case, ours, theirs, wanted, work, sets = item
    y = ours(0)
    synchronize(device)
    seen = ~wanted.isinf()
    if not torch.equal(~y.isinf(), seen):
        raise SystemExit(f"{op} {case}: wrong mask; nothing was timed")
    error = require_correct(f"{op} {case}", y[seen], wanted[seen], LIMITS[y.dtype])
    calls: dict[str, Candidate] = {op: ours, "torch": theirs}
    if device.startswith("cuda"):
        times = graph_times(calls, device, inner=max(8, sets), sets=sets)
    else:
        times = host_times(calls, device, inner=1, rounds=5, sets=sets)
    rows = []
    for name, t in times.items():
        save("batched", f"{op}-{case}", name, t, device, operations=work, error=error if name == op else None)
        figures = (t.median, t.p20, t.p80, t.tflop_per_s(work))
        rows.append((device, f"{op} {case}", name, *(f"{v:.1f}" for v in figures)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; all that work here by default")
    options = parser.parse_args()
    heading = ("device", "case", "candidate", "µs", "p20", "p80", "TFLOP/s")
    for device in usable_devices(options.device):
        rows = [row for item in (*products(device), *scores(device)) for row in measure(item, device)]
        table(device, [heading, *rows])


if __name__ == "__main__":
    main()
