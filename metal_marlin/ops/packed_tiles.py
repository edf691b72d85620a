"""Tiles of linear_packed and linear_packed_sparse, and which of them suits a product."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from metal_marlin.ops.gemm_tiles import Tile

__all__ = ["SPARSE", "TILES", "Tiles"]


class Tiles(Mapping[str, Tile]):
    """Tiles by name, and of each how many k a stage has."""

    def __init__(self, *tiles: tuple[Tile, int]) -> None:
        self._tiles = {str(tile): tile for tile, _ in tiles}
        self.depths = {str(tile): depth for tile, depth in tiles}

    def __getitem__(self, name: str) -> Tile:
        return self._tiles[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tiles)

    def __len__(self) -> int:
        return len(self._tiles)

    def fastest(self, M: int, N: int, K: int) -> str:
        """The tile of least time for x [M, K] and W [N, K]."""
        return str(min(self.values(), key=lambda tile: tile.time(M, N, K)))


# Times: FP4 and half on an H200, as bench/results has them.
TILES = Tiles(
    (Tile(32, 8, 288, 2.9, 0.0502, held=2), 512),
    (Tile(64, 8, 288, 2.1, 0.0707), 512),
    (Tile(32, 16, 288, 3.1, 0.0487), 512),
    (Tile(64, 16, 288, 3.35, 0.0737), 256),
    (Tile(32, 32, 160, 2.9, 0.0700), 256),
    (Tile(32, 32, 160, 4.2, 0.0299, parts=2), 256),
    (Tile(64, 32, 160, 7.4, 0.0681, wgmma=True), 128),
    (Tile(64, 64, 160, 6.3, 0.1184, held=2, wgmma=True), 128),
    (Tile(64, 64, 288, 4.6, 0.0687, parts=2, wgmma=True), 256),
    (Tile(64, 128, 288, 4.0, 0.1107, parts=2, wgmma=True), 256),
    (Tile(128, 128, 288, 0.0, 0.4362, wgmma=True), 128),
    (Tile(64, 256, 160, 0.0, 0.3970, wgmma=True), 128),
    (Tile(128, 256, 384, 0.0, 0.7879, wgmma=True), 128),
)
SPARSE = Tiles(
    (Tile(32, 8, 288, 2.55, 0.0310), 512),
    (Tile(64, 8, 288, 1.96, 0.0535), 512),
    (Tile(112, 8, 288, 2.0, 0.0900), 512),
    (Tile(32, 16, 288, 2.82, 0.0385), 512),
    (Tile(64, 16, 288, 1.57, 0.0812), 256),
    (Tile(32, 32, 160, 2.64, 0.0639), 256),
    (Tile(32, 32, 160, 3.6, 0.0253, parts=2, held=2), 256),
    (Tile(64, 32, 160, 4.21, 0.0669, wgmma=True), 128),
    (Tile(64, 64, 160, 2.72, 0.1116, held=2, wgmma=True), 128),
    (Tile(64, 64, 288, 4.32, 0.0511, parts=2, wgmma=True), 256),
    (Tile(64, 128, 288, 4.1, 0.0813, parts=2, wgmma=True), 256),
    (Tile(128, 128, 288, 1.12, 0.2838, wgmma=True), 128),
    (Tile(64, 256, 160, 0.66, 0.2878, wgmma=True), 128),
    (Tile(128, 256, 384, 0.89, 0.4474, wgmma=True), 128),
)
