#pragma once
#if !defined(__METAL_MARLIN_CPU__) && !defined(__METAL_MARLIN_CUDA__)
template <typename T> using TileMath = SimdTileMath<T>;
template <typename T> using TileSize = SimdTileSize<T>;
#endif
