#pragma once
#ifdef __METAL_MARLIN_CUDA__
#include "core/nvidia/gemm_few.h"
#include "core/nvidia/gemm_wgmma.h"

// Which pipeline a schedule is here: asynchronous copies are this device's. float has no matrix instruction that keeps its precision.
template <typename W, typename T, typename Schedule, typename Epilogue> struct GemmOf {
    typedef typename SimdGemm<W, T, Schedule, Epilogue>::type type;
};
template <typename W, typename T, uint kRows, uint kTokens, uint kSimdgroups, uint kDepth, typename Epilogue>
struct GemmOf<W, T, FewTokens<kRows, kTokens, kSimdgroups, kDepth, 1>, Epilogue> {
    typedef FewGemm<W, T, FewTokens<kRows, kTokens, kSimdgroups, kDepth>, Epilogue> type;
};
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
template <typename W, typename T, uint kRows, uint kTokens, uint kSimdgroups, uint kDepth, uint kSplit,
          typename Epilogue>
struct GemmOf<W, T, FewTokens<kRows, kTokens, kSimdgroups, kDepth, kSplit>, Epilogue> {
    typedef FewGemm<W, T, FewTokens<kRows, kTokens, kSimdgroups, kDepth, kSplit>, Epilogue> type;
};
template <typename W, typename T, uint kRows, uint kTokens, uint kDepth, uint kSplit, typename Epilogue>
struct GemmOf<W, T, ManyTokens<kRows, kTokens, kDepth, kSplit>, Epilogue> {
    typedef WgmmaGemm<W, T, ManyTokens<kRows, kTokens, kDepth, kSplit>, Epilogue> type;
};
#endif
template <typename W, typename T, typename Schedule, typename Epilogue>
using Gemm = typename GemmOf<W, T, Schedule, Epilogue>::type;
#endif
