#pragma once
#ifdef __METAL_MARLIN_CPU__
constant constexpr uint kSimdWidth = METAL_MARLIN_LANES;
#endif
