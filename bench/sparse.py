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
from typing import Any

import torch
from common import (
    Candidate,
    graph_times,
    host_times,
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
from metal_marlin.ops.packed_tiles import TILES

Product = Callable[[int], torch.Tensor]


def copies(tensors: tuple[Any, ...], sets: int) -> list[tuple[Any, ...]]:
    """The same numbers in memory of their own, strides kept."""
    return [tuple(None if t is None else t.clone() for t in tensors) for _ in range(sets)]


def dense(case: Case, device: str, sets: int, packed: bool) -> Candidate:
    """The product with as many weights that are all kept."""
    whole = case.dense
    data = copies(whole.tensors(device), sets)
    out = data[0][0].new_empty(case.M, case.N)
    if not packed:
        return lambda i: linear(*data[i][:3], case.group, format=case.format, extra=data[i][3], out=out)
    w = packed_of(whole, data[0])
    assert w.powers is not None
    ordered = copies((w.codes, w.scales, w.powers), sets)
    return lambda i: linear_packed(data[i][0], *ordered[i], case.group, format=case.format, out=out)


def packed(case: Case, data: list[tuple[torch.Tensor, ...]], kernel: str | None) -> Product:
    return lambda i: linear_packed_sparse(*data[i], case.group, format=case.format, kernel=kernel)


def candidates(case: Case, device: str, sets: int, tiles: list[str]) -> tuple[dict[str, Candidate], float]:
    """What to time, and the largest error of the sparse products. Sets hold the same weights in memory of their own."""
    data = copies(case.tensors(device), sets)
    found: dict[str, Product] = {
        "canonical": lambda i: linear_sparse(*data[i][:4], case.group, format=case.format, extra=data[i][4])
    }
    hopper = device.startswith("cuda") and torch.cuda.get_device_capability(device) == (9, 0)
    if hopper and case.format in PACKED:
        x, codes, places, scales, _ = data[0]
        sparse = copies((x, *operands.pack_sparse(codec(case.format), codes, places, scales)), sets)
        found |= {kernel or "linear_packed_sparse": packed(case, sparse, kernel) for kernel in (None, *tiles)}
    x, W = weights(case, device)
    wanted, error = x.float() @ W.float().T, 0.0
    for name, call in found.items():
        got = call(sets - 1)
        synchronize(device)
        error = max(error, require_correct(f"{case} {name}", got, wanted, LIMITS[case.dtype]))
    return {**found, "dense": dense(case, device, sets, hopper and case.format in PACKED)}, error


def measure(case: Case, device: str, tiled: bool) -> list[tuple[str, ...]]:
    moved = case.N * case.K * 3 // 8 + case.M * (case.N + case.K) * case.dtype.itemsize
    sets = sets_needed(moved, device, most=8)
    tiles = [f"packed_sparse_{case.format}__m{t}" for t in TILES.values() if suits(t, case.M)] if tiled else []
    calls, error = candidates(case, device, sets, tiles)
    if device.startswith("cuda"):
        times = graph_times(calls, device, inner=max(16, sets), sets=sets)
    else:
        times = host_times(
            calls, device, inner=max(1, min(64, int(5e9 / (case.M * case.N * case.K)))), rounds=9, sets=sets
        )
    rows: list[tuple[str, ...]] = []
    for name, t in times.items():
        save("sparse", str(case), name, t, device, operations=2 * case.M * case.N * case.K, error=error)
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
                    for tokens in options.tokens:
                        group = group_of(name, options.group)
                        case = Case(tokens, shape.N, shape.K, group, DTYPES[dtype], name, model=shape.model)
                        rows += measure(case, device, options.tiles)
        table(device, [("case", "candidate", "µs", "p20", "p80", "of dense", "error"), *rows])


if __name__ == "__main__":
    main()
