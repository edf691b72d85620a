#pragma once
#if !defined(__METAL_MARLIN_CPU__) && !defined(__METAL_MARLIN_CUDA__)
template <typename Format, typename T, typename S, uint kTokens> using Gemv = SimdGemv<Format, T, S, kTokens>;
#endif
