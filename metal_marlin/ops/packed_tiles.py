"""Tiles of linear_packed, and which of them suits a product."""

from __future__ import annotations

from metal_marlin.ops.gemm_tiles import Tile

__all__ = ["DEPTHS", "TILES", "fastest"]

# Rows, tokens, threads; start and step as in gemm_tiles; parts. Of each, k of a stage.
_TILES = (
    (Tile(32, 8, 288, 3.0, 0.044), 512),
    (Tile(64, 8, 288, 3.3, 0.080), 512),
    (Tile(32, 16, 288, 3.3, 0.050), 512),
    (Tile(64, 16, 288, 3.5, 0.085), 256),
    (Tile(32, 32, 160, 3.5, 0.060), 256),
    (Tile(32, 32, 160, 4.0, 0.050, parts=2), 256),
    (Tile(64, 32, 160, 3.5, 0.090, wgmma=True), 128),
    (Tile(64, 64, 160, 3.5, 0.110, wgmma=True), 128),
    (Tile(64, 64, 288, 4.0, 0.070, parts=2, wgmma=True), 256),
    (Tile(64, 128, 288, 4.0, 0.110, parts=2, wgmma=True), 256),
    (Tile(128, 128, 288, 4.0, 0.170, wgmma=True), 128),
    (Tile(64, 256, 160, 4.0, 0.300, wgmma=True), 128),
    (Tile(128, 256, 384, 5.0, 0.600, wgmma=True), 128),
)
TILES = {str(tile): tile for tile, _ in _TILES}
DEPTHS = {str(tile): depth for tile, depth in _TILES}  # k of a stage


def fastest(M: int, N: int, K: int) -> str:
    """The tile of least time for x [M, K] and W [N, K]."""
    return str(min(TILES.values(), key=lambda tile: tile.time(M, N, K)))
