"""What is measured of each op that tables have a section for: which kernels, how they run, with which weights."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from metal_marlin.errors import CompilerNotFound
from metal_marlin.formats import codec, operands, sparse
from metal_marlin.ops import linear as _linear
from metal_marlin.ops import linear_decode as _decode
from metal_marlin.ops import linear_sparse
from metal_marlin.ops import marlin_gemm as _gemm
from metal_marlin.ops import packed as _packed
from metal_marlin.ops import packed_sparse as _sparse
from metal_marlin.ops.gemm_tiles import TILES, has_tiles
from metal_marlin.ops.packed_plan import Rows
from metal_marlin.ops.packed_plan import plan as plan_tile
from metal_marlin.ops.product import product_ref
from metal_marlin.ops.tuned import LIBRARY, Problem
from metal_marlin.ops.weights import library, random_weights

_FEW = 64  # tokens up to which matrix-vector kernels are candidates
_SLOWER, _LATER = 1.6, 3.0  # a tile is a candidate up to so many times the least fitted time, or so many µs more

Weights = tuple[Any, ...]  # codes, scales and what else an op takes: tensors, or None


@dataclass(frozen=True)
class Op:
    """How an op is measured: kernels for so many tokens, what is planned untuned first; a run of one, of problem, group
    size, kernel, out, x and the weights; its meaning, of problem, group size, x and the weights; random weights for a
    group size; whether what a table names is a kernel of this version."""

    candidates: Callable[[Problem, int, torch.device], list[str]]
    run: Callable[..., None]
    reference: Callable[..., torch.Tensor]
    weights: Callable[[Problem, int, torch.device], Weights]
    knows: Callable[[Problem, str], bool] = lambda p, kernel: True


def of_linear(problem: Problem, M: int, kind: str, hopper: bool) -> list[str]:
    """Kernels that may be fastest for x [M, K], what is planned untuned first."""
    p, name = problem, f"marlin_gemm_{problem.format}"
    planned = _linear.plan(M, p.N, p.K, p.dtype, p.scale_dtype, kind, p.format, None, hopper)
    tile = ""
    if planned == "marlin_gemm":
        aligned = p.K % 32 == 0
        plan = functools.partial(_gemm.plan, hopper=hopper, aligned=aligned)
        tile = plan(M, p.N, p.K, p.dtype, p.scale_dtype, kind, p.format, p.zeros).tile
    decode = _decode.kernel_for(M, kind, p.format)
    first = {"linear_decode": decode, "marlin_gemm": f"{name}__m{tile}" if tile else name}.get(planned, LIBRARY)
    found = [first, name, *([decode] if M <= _FEW else [])]
    if kind != "cpu":  # where they are the same code
        if p.format == "fp4":
            found += [f"{name}{variant}" for variant in ("_single_stage", "_3stage")]
        if p.dtype == p.scale_dtype != torch.float32:
            named = [k for k, of in _gemm.NAMED.items() if of.format == p.format and not (of.copies and p.K % 32)]
            found += [kernel for kernel in named if not kernel.endswith("_fp32acc")]
    if kind == "cuda" and p.K % 32 == 0 and has_tiles(p.dtype, p.scale_dtype, p.format):
        tiles = [t for t in TILES.values() if t.tokens <= 4 * M and 8 * t.tokens >= M and hopper >= t.hopper]
        found += [f"{name}__m{t}" for t in tiles]
    if kind == "cuda" and M > _FEW // 4:
        found.append(LIBRARY)
    return list(dict.fromkeys(found))


def of_tiles(rows: Rows, problem: Problem, M: int) -> list[str]:
    """Tiles of an op in operand order that may be fastest for x [M, K], what is planned untuned first: not much too
    large or small, nor far slower by their fitted times, which are those of one format."""
    p, tiles = problem, rows.tiles
    first = tiles.fastest(M, p.N, p.K)
    least = tiles[first].time(M, p.N, p.K)
    suit = [
        name
        for name, tile in tiles.items()
        if tile.tokens <= max(16, 4 * M) and (tile.tokens >= 128 or 4 * tile.tokens >= M)
    ]
    found = [first, *(name for name in suit if tiles[name].time(M, p.N, p.K) <= max(_SLOWER * least, least + _LATER))]
    return [rows.kernel(p.format, name) for name in dict.fromkeys(found)]


@functools.lru_cache(maxsize=256)
def compile_tiles(rows: Rows, p: Problem, device: str) -> None:
    """Compile the rows of all tiles at once, as many at a time as there are processors."""
    sizes = (1, p.N, p.K, p.dtype, p.scale_dtype, p.format, p.zeros)
    names = [plan_tile(rows, *sizes, rows.kernel(p.format, tile)).kernel for tile in rows.tiles]
    of = library(rows.family, device)
    with ThreadPoolExecutor(os.cpu_count()) as pool, contextlib.suppress(CompilerNotFound):  # a launch will say so
        list(pool.map(of.compile, names))


def _kernels(p: Problem, M: int, device: torch.device) -> list[str]:
    return of_linear(p, M, device.type, device.type == "cuda" and _gemm.is_hopper(device.index or 0))


def _tiles(rows: Rows, p: Problem, M: int, device: torch.device) -> list[str]:
    if device.type == "cuda":
        compile_tiles(rows, p, str(device))
    return of_tiles(rows, p, M)


def _run_linear(p: Problem, group: int, kernel: str, out: torch.Tensor, x: torch.Tensor, *weights: Any) -> None:
    codes, scales, extra = weights
    asked = None if kernel == LIBRARY else kernel
    _linear._RUNS[_linear.op_of(kernel)](x, codes, scales, extra, p.format, p.zeros, group, asked, out)


def _run_packed(p: Problem, group: int, kernel: str, out: torch.Tensor, x: torch.Tensor, *weights: Any) -> None:
    codes, scales, powers, extra = weights
    _packed._run(x, codes, scales, powers, extra, p.format, p.zeros, group, kernel, out)


def _run_sparse(p: Problem, group: int, kernel: str, out: torch.Tensor, x: torch.Tensor, *weights: Any) -> None:
    codes, scales, places, powers = weights
    _sparse._run(x, codes, places, scales, powers, p.format, group, kernel, out)


def _ref_linear(p: Problem, group: int, x: torch.Tensor, codes: Any, scales: Any, extra: Any) -> torch.Tensor:
    return product_ref(x, codes, scales, group, format=p.format, zeros=p.zeros, extra=extra)


def _ref_packed(p: Problem, group: int, x: torch.Tensor, *weights: Any) -> torch.Tensor:
    codes, scales, powers, extra = weights
    return _packed.linear_packed_ref(x, codes, scales, powers, group, format=p.format, zeros=p.zeros, extra=extra)


def _ref_sparse(p: Problem, group: int, x: torch.Tensor, *weights: Any) -> torch.Tensor:
    codes, scales, places, powers = weights
    return _sparse.linear_packed_sparse_ref(x, codes, places, scales, powers, group, format=p.format)


@functools.lru_cache(maxsize=1)
def _weights(p: Problem, group: int, device: torch.device) -> Weights:
    rng = torch.Generator().manual_seed(0)
    words, by, extra = random_weights(p.format, p.N, p.K, group, p.scale_dtype, p.zeros, rng)
    return words.to(device), by.to(device), None if extra is None else extra.to(device)


@functools.lru_cache(maxsize=1)
def _packed_weights(p: Problem, group: int, device: torch.device) -> Weights:
    codes, scales, extra = _weights(p, group, device)
    codes, scales, extra, powers = operands.pack(codec(p.format), codes, scales, extra, p.zeros)
    return codes, scales, powers, extra


@functools.lru_cache(maxsize=1)
def _sparse_weights(p: Problem, group: int, device: torch.device) -> Weights:
    form, of = codec(p.format), sparse.pattern("2:4")
    codes, scales, _ = _weights(p, group, torch.device("cpu"))
    codes, places = sparse.compress(form, of, codes, linear_sparse.random_kept(p.N, p.K, of))
    codes, places, scales, powers = operands.pack_sparse(form, codes, places, scales)
    return codes.to(device), scales.to(device), places.to(device), powers.to(device)


OPS = {
    "linear": Op(_kernels, _run_linear, _ref_linear, _weights),
    "linear_packed": Op(
        functools.partial(_tiles, _packed.ROWS), _run_packed, _ref_packed, _packed_weights, _packed.ROWS.knows
    ),
    "linear_packed_sparse": Op(
        functools.partial(_tiles, _sparse.ROWS), _run_sparse, _ref_sparse, _sparse_weights, _sparse.ROWS.knows
    ),
}


def forget() -> None:
    """Let go of the weights made last."""
    for made in (_weights, _packed_weights, _sparse_weights):
        made.cache_clear()
