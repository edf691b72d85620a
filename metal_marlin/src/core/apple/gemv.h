#pragma once
#if !defined(__METAL_MARLIN_CPU__) && !defined(__METAL_MARLIN_CUDA__)
template <typename Q, typename T, uint kTokens, typename Epilogue = NoEpilogue>
using Gemv = SimdGemv<Q, T, kTokens, 0, 0, Epilogue>;
#endif
