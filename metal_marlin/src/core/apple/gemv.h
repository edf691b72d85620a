#pragma once
#if !defined(__METAL_MARLIN_CPU__) && !defined(__METAL_MARLIN_CUDA__)
template <typename Q, typename T, uint kTokens> using Gemv = SimdGemv<Q, T, kTokens>;
#endif
