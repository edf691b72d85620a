"""Which row multiplies weights in operand order, and on what grid."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.formats import codec, operands
from metal_marlin.ops import tuned
from metal_marlin.ops.gemm_tiles import MULTIPROCESSORS, multiprocessors
from metal_marlin.ops.packed_tiles import Tiles
from metal_marlin.ops.weights import KEYS, plan_kind, row_name


@dataclass(frozen=True)
class Plan:
    """How a call runs: row, grid, threads, its tile."""

    kernel: str
    threadgroups: tuple[int, int, int]
    threads: int
    tile: str


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of an op: its file, what their names begin with, formats, zeros, tiles."""

    op: str
    family: str
    name: str
    formats: tuple[str, ...]
    zeros: tuple[str, ...]
    tiles: Tiles

    def has(self, dtype: torch.dtype, scale_dtype: torch.dtype, format: str, zeros: str = "none") -> bool:
        """Whether there are rows for x and scales of these dtypes."""
        if format not in self.formats or zeros not in self.zeros or dtype not in (torch.float16, torch.bfloat16):
            return False
        return codec(format).scale_kind != "float" or dtype == scale_dtype

    def take(self, p: tuned.Problem) -> bool:
        """Whether W can be in operand order and there are rows for it then."""
        zeros = operands.kernel_zeros(p.zeros)
        return self.has(p.dtype, p.scale_dtype, p.format, zeros) and operands.fits(codec(p.format), p.N, p.K)

    def kernel(self, format: str, tile: str) -> str:
        """What asks for a tile, such as "packed_gemm_fp4__m32x8"."""
        return f"{self.name}_{format}__m{tile}"

    def knows(self, p: tuned.Problem, kernel: str) -> bool:
        """Whether what a table names is a kernel of this version."""
        return kernel in {self.kernel(p.format, tile) for tile in self.tiles}


@functools.lru_cache(maxsize=4096)
def plan(
    of: Rows,
    M: int,
    N: int,
    K: int,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    format: str = "fp4",
    zeros: str = "none",
    kernel: str | None = None,
    multiprocessors: int = MULTIPROCESSORS,
) -> Plan:
    """The row and grid for x [M, K]; ``kernel`` asks for a tile, as ``Rows.kernel`` says it.
    Raises ArgumentError for what has no row."""
    name, tiles = f"{of.name}_{format}", of.tiles
    base, _, tile = (kernel or name).partition("__m")
    if not of.has(dtype, scale_dtype, format, zeros):
        raise ArgumentError(
            f"{of.op}: x is {dtype}, scales {scale_dtype}, format {format!r}, zeros {zeros!r}; it takes torch.float16 "
            f"and torch.bfloat16, scales alike, formats {', '.join(of.formats)}, zeros {', '.join(of.zeros)}"
        )
    if base != name or (tile and tile not in tiles):
        raise ArgumentError(f"{of.op}: kernel is {kernel!r}; tiles of {name} are {', '.join(tiles)}")
    tile = tile or tiles.fastest(M, N, K)
    row = row_name(of.op, base, (base,), dtype, scale_dtype, format, zeros, tile)
    return Plan(row, tiles.threadgroups(tile, M, N, multiprocessors), tiles[tile].threads, tile)


@functools.lru_cache(maxsize=8192)
def chosen(
    of: Rows,
    M: int,
    N: int,
    K: int,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    device: torch.device,
    format: str,
    zeros: str,
    kernel: str | None = None,
) -> Plan:
    """The plan for a device; where nobody asks for a tile, by a table of measured choices (ops/tuned.py), else the tile
    of least time."""
    if kernel is None and dtype in KEYS:
        problem = tuned.Problem(format, zeros, dtype, scale_dtype, N, K)
        kernel = tuned.choice(problem, M, plan_kind(device.type), device.index or 0, of.op)
        if kernel and not of.knows(problem, kernel):
            warnings.warn(
                f"{of.op}: the table of choices for {device} names {kernel!r} for {problem} and {M} tokens, which this "
                f"version does not have; it is planned as if it were not in the table, until you tune again",
                stacklevel=2,
            )
            kernel = None
    return plan(of, M, N, K, dtype, scale_dtype, format, zeros, kernel, multiprocessors(device))


tuned.caches.append(chosen)
