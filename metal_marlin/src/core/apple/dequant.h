#pragma once
#if !defined(__METAL_MARLIN_CPU__) && !defined(__METAL_MARLIN_CUDA__)
template <typename Q, typename T> using Dequant = DequantRun<Q, T, 4>;
#endif
