#pragma once
#if !defined(__METAL_MARLIN_CPU__) && !defined(__METAL_MARLIN_CUDA__)
constant constexpr uint kSimdWidth = 32;
#endif
