"""Gated feed-forward layers with FP4 weights: microseconds, beside the same in separate launches.

    python bench/gated.py [--device cuda]

Correctness comes first, on the data that is timed. `torch` multiplies dequantised weights.
"""

from __future__ import annotations

import argparse

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
from metal_marlin.ops import gated_mlp as mlps
from metal_marlin.ops import gated_up as ups
from metal_marlin.ops.activation import ACTIVATIONS
from metal_marlin.ops.epilogue import epilogue
from metal_marlin.ops.linear import linear

# case, candidates, float64 result of set 0, multiplications and additions, bytes, sets
Named = tuple[str, dict[str, Candidate], torch.Tensor, int, int, int]


def _dense(weights: tuple[torch.Tensor, ...], group: int, device: str) -> list[tuple[torch.Tensor, ...]]:
    """Sets of the weights, whose codes and scales follow each other, as torch multiplies them."""
    pairs = zip(weights[::2], weights[1::2], strict=True)
    W = tuple(codec("fp4").decode(c, s, None, group, "none", s.dtype) for c, s in pairs)
    return copies(W, sets_needed(sum(w.nbytes for w in W), device))


def gate_and_up(case: ups.Case, device: str) -> Named:
    moved, g = case.N * case.K + 2 * case.M * (case.N + case.K), case.group
    sets = sets_needed(case.N * case.K, device)
    data = copies(case.tensors(device), sets)
    dense = _dense(data[0][1:], g, device)

    def one(kernel: str | None) -> Candidate:
        return lambda i: ups.gated_up(*data[i], g, activation=case.activation, kernel=kernel)

    def apart(i: int) -> torch.Tensor:
        x, gate, gate_scales, up, up_scales = data[i]
        return epilogue(linear(x, gate, gate_scales, g), activation=case.activation, gate=linear(x, up, up_scales, g))

    def library(i: int) -> torch.Tensor:
        gate, up = dense[i % len(dense)]
        return ACTIVATIONS[case.activation](data[i][0] @ gate.T) * (data[i][0] @ up.T)  # type: ignore[operator]

    kernels = [k for k, (acts, _) in ups.KERNELS.items() if case.activation in acts]
    calls = {k: one(k) for k in kernels if k.startswith(ups.DECODE) == (case.M <= ups.FEW)}
    calls |= {"gated_up": one(None), "linear, linear, epilogue_standalone": apart, "torch": library}
    wanted = ups.gated_up_ref(*data[0], g, case.activation)
    return f"gated_up-{case}", calls, wanted, 4 * case.M * case.N * case.K, moved, sets


def layers(case: mlps.Case, device: str) -> Named:
    weights = (2 * case.K + case.N) * case.F
    moved, g = weights // 2 + 2 * case.M * (case.K + 2 * case.N), case.group
    sets = sets_needed(weights // 2, device)
    data = copies(case.tensors(device), sets)
    dense = _dense(data[0][1:7], g, device)

    def one(kernel: str | None) -> Candidate:
        return lambda i: mlps.gated_mlp(*data[i][:7], g, kernel=kernel, **case.options(data[i][7]))  # type: ignore[arg-type]

    def apart(i: int) -> torch.Tensor:
        x, *w, residual = data[i]
        h = epilogue(linear(x, w[0], w[1], g), activation=case.activation, gate=linear(x, w[2], w[3], g))
        y = linear(h, w[4], w[5], g)
        return epilogue(y, residual=residual) if case.residual else y

    def library(i: int) -> torch.Tensor:
        gate, up, down = dense[i % len(dense)]
        y = (ACTIVATIONS[case.activation](data[i][0] @ gate.T) * (data[i][0] @ up.T)) @ down.T  # type: ignore[operator]
        return data[i][7] + y if case.residual else y

    calls: dict[str, Candidate] = {"gated_mlp": one(None)}
    few, many = (ups.DECODE, f"{ups.DECODE}_batched"), ("gated_up_fp4", "dense_fused_gate_up_fp4")
    calls |= {k: one(k) for k in (few if case.M <= ups.FEW else (*many, mlps.DOWN[case.residual]))}
    calls |= {"linear and epilogue_standalone": apart, "torch": library}
    wanted = mlps.gated_mlp_ref(*data[0][:7], g, **case.options(data[0][7]))  # type: ignore[arg-type]
    return f"gated_mlp-{case}", calls, wanted, 2 * case.M * weights, moved, sets


def measure(item: Named, device: str) -> list[tuple[str, ...]]:
    case, calls, wanted, work, moved, sets = item
    errors = {}
    for name, call in calls.items():
        y = call(0)
        assert isinstance(y, torch.Tensor)
        synchronize(device)
        errors[name] = require_correct(f"{case} {name}", y, wanted, 4e-3)
    if device.startswith("cuda"):
        times = graph_times(calls, device, inner=max(8, sets), sets=sets)
    else:
        times = host_times(calls, device, inner=1, rounds=7, sets=sets)
    rows = []
    for name, t in times.items():
        save("gated", case, name, t, device, operations=work, moved=moved, error=errors[name])
        rows.append((device, case, name, *(f"{v:.1f}" for v in (t.median, t.p20, t.p80, t.tflop_per_s(work)))))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; all that work here by default")
    options = parser.parse_args()
    heading = ("device", "case", "candidate", "µs", "p20", "p80", "TFLOP/s")
    for device in usable_devices(options.device):
        items = [gate_and_up(case, device) for case in ups.CASES if case.model]
        items += [layers(case, device) for case in mlps.CASES if case.model]
        table(device, [heading, *(row for item in items for row in measure(item, device))])


if __name__ == "__main__":
    main()
