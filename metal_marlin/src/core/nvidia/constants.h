#pragma once
#ifdef __METAL_MARLIN_CUDA__
constant constexpr uint kSimdWidth = 32;
#endif
