"""Tiles of linear_packed and linear_packed_sparse, and which of them suits a product."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from metal_marlin.ops.gemm_tiles import MULTIPROCESSORS, Tile

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

    def threadgroups(self, name: str, M: int, N: int, multiprocessors: int = MULTIPROCESSORS) -> tuple[int, int, int]:
        """The grid: where tiles do not share K, no more threadgroups than run at the same time; they walk on."""
        tile = self[name]
        if tile.wgmma and tile.parts == 1:
            return (min(tile.count(M, N), multiprocessors * tile.held), 1, 1)
        return (-(-N // tile.rows), -(-M // tile.tokens), tile.parts)

    def fastest(self, M: int, N: int, K: int) -> str:
        """The tile of least time for x [M, K] and W [N, K]."""
        return str(min(self.values(), key=lambda tile: tile.time(M, N, K)))


# Times: FP4 and half on an H200, as bench/results has them.
TILES = Tiles(
    (Tile(32, 8, 288, 2.0, 0.0530, held=2), 512),
    (Tile(32, 8, 288, 3.05, 0.0375, deep=True), 512),
    (Tile(64, 8, 288, 2.1, 0.0707), 512),
    (Tile(32, 16, 288, 3.1, 0.0487), 512),
    (Tile(112, 8, 288, 5.2, 0.0960), 512),
    (Tile(64, 16, 288, 3.0, 0.0700), 512),
    (Tile(32, 32, 160, 2.5, 0.0620), 256),
    (Tile(32, 32, 160, 4.1, 0.0258, parts=2), 256),
    (Tile(64, 32, 160, 6.4, 0.0810, held=2, wgmma=True), 128),
    (Tile(64, 64, 160, 6.3, 0.1184, held=2, wgmma=True), 128),
    (Tile(64, 64, 288, 4.6, 0.0687, parts=2, wgmma=True), 256),
    (Tile(64, 128, 288, 4.0, 0.1107, parts=2, wgmma=True), 256),
    (Tile(128, 128, 384, 0.0, 0.4362, wgmma=True), 128),
    (Tile(64, 256, 160, 0.0, 0.3970, wgmma=True, halves=True), 128),
    (Tile(128, 256, 384, 0.0, 0.7879, wgmma=True, halves=True), 128),
)
SPARSE = Tiles(
    (Tile(32, 8, 288, 2.61, 0.0308), 512),
    (Tile(64, 8, 288, 1.71, 0.0524), 512),
    (Tile(32, 16, 288, 2.61, 0.0374), 512),
    (Tile(64, 16, 288, 1.26, 0.0743), 256),
    (Tile(32, 32, 160, 2.38, 0.0532), 256),
    (Tile(32, 32, 160, 4.34, 0.0212, parts=2), 256),
    (Tile(64, 32, 160, 4.12, 0.0715, held=2, wgmma=True), 128),
    (Tile(64, 64, 160, 2.9, 0.1056, held=2, wgmma=True), 128),
    (Tile(64, 64, 288, 3.96, 0.0528, parts=2, wgmma=True), 256),
    (Tile(64, 128, 288, 3.75, 0.0824, parts=2, wgmma=True), 256),
    (Tile(128, 128, 384, 1.04, 0.2917, wgmma=True), 128),
    (Tile(64, 256, 160, 0.45, 0.2947, wgmma=True, halves=True), 128),
    (Tile(128, 256, 384, 0.3, 0.4483, wgmma=True, halves=True), 128),
)
