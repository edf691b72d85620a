#pragma once
#if !defined(__METAL_MARLIN_CPU__) && !defined(__METAL_MARLIN_CUDA__)
template <typename W, typename T, typename Schedule, typename Epilogue>
using Gemm = typename SimdGemm<W, T, Schedule, Epilogue>::type;
#endif
