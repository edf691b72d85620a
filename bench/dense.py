"""Products of dense tiles, and FP4 products split along K or of few tokens, against torch's own.

    python bench/dense.py [--device cuda]

Correctness comes first, on the data that is timed. torch multiplies dense weights of the activations' type.
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
from metal_marlin.ops import dense, dense_few
from metal_marlin.ops.linear_decode import linear_decode
from metal_marlin.ops.marlin_gemm import marlin_gemm

LIMITS = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}
# op and case, candidates, float64 result of set 0, multiplications and additions, sets
Named = tuple[str, dict[str, Candidate], torch.Tensor, int, int]


def products(device: str) -> list[Named]:
    found: list[Named] = []
    for case in (c for c in dense.DENSE_CASES if c.model):
        sets = sets_needed(case.N * case.K * case.dtype.itemsize, device)
        data = copies(case.tensors(device), sets)
        calls: dict[str, Candidate] = {
            name: lambda i, name=name, data=data: dense.dense_linear(*data[i], kernel=name) for name in dense.DENSE
        }
        calls["torch"] = lambda i, data=data: data[i][0] @ data[i][1].T
        work = 2 * case.M * case.N * case.K
        found.append((f"dense_linear-{case}", calls, dense.dense_linear_ref(*data[0]), work, sets))
    return found


def split(device: str) -> list[Named]:
    found: list[Named] = []
    for case in (c for c in dense.SPLIT_CASES if c.model):
        sets = sets_needed(case.N * case.K // 2, device)
        data = copies(case.tensors(device)[:3], sets)
        dense_W = codec("fp4").decode(*data[0][1:], None, case.group, "none", case.dtype)
        W = copies(dense_W, sets_needed(dense_W.nbytes, device))
        g = case.group
        calls: dict[str, Candidate] = {
            name: lambda i, name=name, data=data, g=g: dense.linear_split(*data[i], g, kernel=name)
            for name in dense.SPLIT
        }
        calls["marlin_gemm"] = lambda i, data=data, g=g: marlin_gemm(*data[i], g)
        calls["torch"] = lambda i, data=data, W=W: data[i][0] @ W[i % len(W)].T
        exact = dense.product_ref(*data[0], g)
        found.append((f"linear_split-{case}", calls, exact, 2 * case.M * case.N * case.K, sets))
    return found


def few(device: str) -> list[Named]:
    found: list[Named] = []
    for case in (c for c in dense_few.CASES if c.model):
        sets = sets_needed(case.N * case.K // 2, device)
        data = copies(case.tensors(device)[:3], sets)
        g = case.group
        calls: dict[str, Candidate] = {
            name: lambda i, name=name, data=data, g=g: dense_few.linear_few(*data[i], g, kernel=name)
            for name in (*dense_few.GEMV, *dense_few.SMALL)
        }
        calls["linear_decode"] = lambda i, data=data, g=g: linear_decode(*data[i], g)
        work = 2 * case.M * case.N * case.K
        found.append((f"linear_few-{case}", calls, dense.product_ref(*data[0], g), work, sets))
    return found


def measure(item: Named, device: str) -> list[tuple[str, ...]]:
    case, calls, wanted, work, sets = item
    errors = {}
    for name, call in calls.items():
        y = call(0)
        assert isinstance(y, torch.Tensor)
        synchronize(device)
        errors[name] = require_correct(f"{case} {name}", y, wanted, LIMITS[y.dtype])
    if device.startswith("cuda"):
        times = graph_times(calls, device, inner=max(8, sets), sets=sets)
    else:
        times = host_times(calls, device, inner=1, rounds=5, sets=sets)
    rows = []
    for name, t in times.items():
        save("dense", case, name, t, device, operations=work, error=errors[name])
        rows.append((device, case, name, *(f"{v:.1f}" for v in (t.median, t.p20, t.p80, t.tflop_per_s(work)))))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; all that work here by default")
    options = parser.parse_args()
    heading = ("device", "case", "candidate", "µs", "p20", "p80", "TFLOP/s")
    for device in usable_devices(options.device):
        rows = [row for item in (*products(device), *split(device), *few(device)) for row in measure(item, device)]
        table(device, [heading, *rows])


if __name__ == "__main__":
    main()
