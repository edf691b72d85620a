#pragma once
#ifdef __METAL_MARLIN_CPU__
template <typename T> using TileMath = SimdTileMath<T>;
template <typename T> using TileSize = SimdTileSize<T>;
#endif
