"""Tiles of linear_packed, and which of them suits a product."""

from __future__ import annotations

from metal_marlin.ops.gemm_tiles import Tile

__all__ = ["DEPTHS", "TILES", "fastest"]

# Of each tile, k of a stage. Times: FP4 and half on an H200, as bench/results has them.
_TILES = (
    (Tile(32, 8, 288, 3.7, 0.039), 512),
    (Tile(64, 8, 288, 4.0, 0.090), 512),
    (Tile(32, 16, 288, 1.5, 0.0735), 512),
    (Tile(64, 16, 288, 0.0, 0.128), 256),
    (Tile(32, 32, 160, 1.2, 0.098), 256),
    (Tile(32, 32, 160, 1.5, 0.080, parts=2), 256),
    (Tile(64, 32, 160, 15.0, 0.0565, wgmma=True), 128),
    (Tile(64, 64, 160, 11.5, 0.159, held=2, wgmma=True), 128),
    (Tile(64, 64, 288, 2.0, 0.137, parts=2, wgmma=True), 256),
    (Tile(64, 128, 288, 4.9, 0.133, parts=2, wgmma=True), 256),
    (Tile(128, 128, 288, 0.0, 0.490, held=2, wgmma=True), 128),
    (Tile(64, 256, 160, 4.0, 0.520, wgmma=True), 128),
    (Tile(128, 256, 384, 1.0, 0.742, wgmma=True), 128),
)
TILES = {str(tile): tile for tile, _ in _TILES}
DEPTHS = {str(tile): depth for tile, depth in _TILES}  # k of a stage


def fastest(M: int, N: int, K: int) -> str:
    """The tile of least time for x [M, K] and W [N, K]."""
    return str(min(TILES.values(), key=lambda tile: tile.time(M, N, K)))
