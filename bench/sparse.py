"""Products with 2:4 sparse quantised weights: µs, beside dense quantised weights of the same format.

    python bench/sparse.py [--device cuda] [--dtype half bf16] [--format fp4 mxfp4 int4] [--tokens 1 16 512]
                           [--shapes large 4096x14336] [--group 128] [--tiles]

Correctness comes first, on the data that is timed. On GPUs of compute capability 9.0 both are in operand order; --tiles
times every tile that suits the tokens. `canonical` is linear_sparse, and on other devices `dense` is linear. Buffers
rotate past the last-level cache; on NVIDIA GPUs the launches are a CUDA graph's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from common import (
    Candidate,
    copies,
    graph_times,
    host_times,
    launches,
    require_correct,
    save,
    sets_needed,
    synchronize,
    table,
    usable_devices,
)
from gemm import DTYPES, LIMITS, group_of, packed_of, shapes, suits

from metal_marlin.formats import codec, operands
from metal_marlin.formats.sparse import FORMATS
from metal_marlin.ops.linear import linear
from metal_marlin.ops.linear_sparse import Case, linear_sparse, weights
from metal_marlin.ops.packed import linear_packed
from metal_marlin.ops.packed_sparse import FORMATS as PACKED
from metal_marlin.ops.packed_sparse import linear_packed_sparse
from metal_marlin.ops.packed_tiles import SPARSE

Product = Callable[[int], torch.Tensor]


class Weights:
    """W of a shape, sparse and with all weights kept, and x of most tokens; sets are the same numbers elsewhere."""

    def __init__(self, case: Case, device: str) -> None:
        hopper = device.startswith("cuda") and torch.cuda.get_device_capability(device) == (9, 0)
        self.packed, self.device = hopper and case.format in PACKED, device
        self.sets = sets_needed(case.N * case.K * 3 // 8, device)
        self.x, *parts = case.tensors(device)
        self.W = weights(case, device)[1].float()
        self.sparse, self.dense = copies(tuple(parts), self.sets), copies(case.dense.tensors(device)[1:], self.sets)
        if self.packed:
            codes, places, scales = self.sparse[0][:3]
            self.ordered = copies(operands.pack_sparse(codec(case.format), codes, places, scales), self.sets)
            whole = packed_of(case.dense, self.dense[0])
            self.dense = copies((whole.codes, whole.scales, whole.powers), self.sets)


def candidates(case: Case, of: Weights, tiles: list[str]) -> tuple[dict[str, Candidate], float]:
    """What to time, and the largest error of the sparse products."""
    x = of.x[: case.M].contiguous()
    out = x.new_empty(case.M, case.N)
    options: dict[str, Any] = {"format": case.format}

    def canonical(i: int) -> torch.Tensor:
        codes, places, scales, extra = of.sparse[i]
        return linear_sparse(x, codes, places, scales, case.group, extra=extra, **options)

    def packed(kernel: str | None) -> Product:
        return lambda i: linear_packed_sparse(x, *of.ordered[i], case.group, kernel=kernel, **options)

    def dense(i: int) -> None:
        if of.packed:
            linear_packed(x, *of.dense[i], case.group, out=out, **options)
        else:
            codes, scales, extra = of.dense[i]
            linear(x, codes, scales, case.group, extra=extra, out=out, **options)

    found: dict[str, Product] = {"canonical": canonical}
    if of.packed:
        found |= {kernel or "linear_packed_sparse": packed(kernel) for kernel in (None, *tiles)}
    wanted, error = x.float() @ of.W.T, 0.0
    for name, call in found.items():
        got = call(of.sets - 1)
        synchronize(of.device)
        error = max(error, require_correct(f"{case} {name}", got, wanted, LIMITS[case.dtype]))
    return {**found, "dense": dense}, error


def measure(case: Case, of: Weights, tiled: bool) -> list[tuple[str, ...]]:
    tiles = [f"packed_sparse_{case.format}__m{t}" for t in SPARSE.values() if suits(t, case.M)] if tiled else []
    calls, error = candidates(case, of, tiles)
    if of.device.startswith("cuda"):
        times = graph_times(calls, of.device, inner=launches(case.M, of.sets), sets=of.sets)
    else:
        inner = max(1, min(64, int(5e9 / (case.M * case.N * case.K))))
        times = host_times(calls, of.device, inner=inner, rounds=9, sets=of.sets)
    rows: list[tuple[str, ...]] = []
    for name, t in times.items():
        save("sparse", str(case), name, t, of.device, operations=2 * case.M * case.N * case.K, error=error)
        speed = times["dense"].median / t.median
        rows.append(
            (str(case), name, f"{t.median:.1f}", f"{t.p20:.1f}", f"{t.p80:.1f}", f"{speed:.2f}", f"{error:.1e}")
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; all that work here by default")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="activations and scales; half, on a cpu f32")
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=["fp4"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 512])
    parser.add_argument("--shapes", nargs="+", default=["large"], help="large, smollm2, NxK")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--tiles", action="store_true", help="time every tile that suits the tokens")
    options = parser.parse_args()
    for device in usable_devices(options.device):
        rows: list[tuple[str, ...]] = []
        for shape in shapes(options.shapes):
            for name in options.format:
                for dtype in options.dtype or (["f32"] if device == "cpu" else ["half"]):
                    group = group_of(name, options.group)
                    most = Case(max(options.tokens), shape.N, shape.K, group, DTYPES[dtype], name, model=shape.model)
                    of = Weights(most, device)
                    for tokens in options.tokens:
                        rows += measure(replace(most, M=tokens), of, options.tiles)
        table(device, [("case", "candidate", "µs", "p20", "p80", "of dense", "error"), *rows])


if __name__ == "__main__":
    main()
