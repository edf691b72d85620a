"""Tiles of marlin_gemm for NVIDIA GPUs, and which of them suits a product."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from metal_marlin.formats import codec

__all__ = ["FORMATS", "TILES", "Tile", "fastest", "has_tiles"]


@dataclass(frozen=True)
class Tile:
    """Rows of W and tokens of a threadgroup, its threads, how many threadgroups share K, how many of them a
    multiprocessor holds, and how long one runs: ``start`` + ``step`` for every 64 k, in µs (FP4 and half on an H200,
    fitted to bench/results). ``wgmma``: core/nvidia/gemm_wgmma.h, else gemm_few.h. ``deep``: more stages ahead.
    ``halves``: the last tiles may be halves, of half the tokens (TileWalk of core/packed.h)."""

    rows: int
    tokens: int
    threads: int
    start: float
    step: float
    parts: int = 1
    held: int = 1
    wgmma: bool = False
    deep: bool = False
    halves: bool = False

    def __str__(self) -> str:
        return f"{self.rows}x{self.tokens}{f'x{self.parts}' if self.parts > 1 else ''}{'d' if self.deep else ''}"

    @property
    def hopper(self) -> bool:
        """Whether it needs compute capability 9.0."""
        return self.wgmma or self.parts > 1

    def count(self, M: int, N: int) -> int:
        """Tiles of y [M, N]."""
        return -(-N // self.rows) * -(-M // self.tokens)

    def time(self, M: int, N: int, K: int) -> float:
        """What a product takes, in µs."""
        waves = self.count(M, N) * self.parts / MULTIPROCESSORS
        if self.halves:  # N by halves of tiles, of which a round has twice as many
            waves = max(1.0, math.ceil(-(-N // self.rows) * -(-2 * M // self.tokens) / MULTIPROCESSORS) / 2)
        elif self.held == 1:
            waves = math.ceil(waves)
        else:
            waves = max(1.0, waves)
        return self.start + self.step * K / 64 * waves


MULTIPROCESSORS = 132  # of an H100 or H200


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; for others what tiles are made for."""
    if device.type != "cuda":
        return MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


_TILES = (
    Tile(16, 8, 512, 3.7, 0.053, held=2),
    Tile(32, 8, 512, 3.8, 0.062),
    Tile(64, 8, 256, 3.6, 0.118),
    Tile(112, 8, 256, 4.5, 0.175),
    Tile(16, 16, 512, 5.0, 0.060, held=2),
    Tile(32, 16, 512, 4.3, 0.070),
    Tile(64, 16, 256, 4.9, 0.113),
    Tile(112, 16, 256, 5.0, 0.205),
    Tile(32, 32, 256, 5.9, 0.116),
    Tile(64, 32, 256, 7.6, 0.094, parts=2),
    Tile(64, 32, 256, 3.3, 0.221, held=2, wgmma=True),
    Tile(64, 64, 256, 3.7, 0.245, held=2, wgmma=True),
    Tile(64, 64, 256, 5.4, 0.135, parts=2, held=2, wgmma=True),
    Tile(64, 128, 256, 4.5, 0.274, wgmma=True),
    Tile(64, 128, 256, 6.8, 0.154, parts=2, wgmma=True),
    Tile(64, 256, 256, 4.3, 0.405, wgmma=True),
    Tile(128, 128, 256, 4.5, 0.511, wgmma=True),
    Tile(128, 256, 256, 5.8, 0.726, wgmma=True),
)
_FEW = 32  # tokens for which GPUs without wgmma use tiles
TILES = {str(tile): tile for tile in _TILES}
FORMATS = ("fp4", "mxfp4", "nvfp4", "int4", "int8", "uint8", "fp8_e4m3", "fp8_e5m2")


def has_tiles(dtype: torch.dtype, scale_dtype: torch.dtype, format: str) -> bool:
    """Whether there are rows of ``TILES`` for these."""
    if format not in FORMATS or dtype == torch.float32:
        return False
    return codec(format).scale_kind != "float" or dtype == scale_dtype


def fastest(M: int, N: int, K: int, hopper: bool) -> str:
    """The tile of least time for x [M, K] and W [N, K]; "": none suits."""
    usable = [tile for tile in _TILES if hopper or not (tile.hopper or M > _FEW)]
    return str(min(usable, key=lambda tile: tile.time(M, N, K))) if usable else ""
