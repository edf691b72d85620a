#pragma once
// Kernels around Gemm, for files of rows: marlin_gemm<W, T, Schedule> for 128 threads, _256 and _512 for as many,
// _map for 256 and a descriptor of x for its copy unit (runtime/tensor_map.py).
#include "core/gemm.h"

// The bound lets assemblers give a thread as many registers as so many threads leave it.
#define ENTRY(entry, threads, ...)                                                                           \
    template <typename W, typename T, typename Schedule>                                                     \
    [[kernel, max_total_threads_per_threadgroup(threads)]] void entry(                                       \
        device const T* x [[buffer(0)]], device const uint* codes [[buffer(1)]],                             \
        device const typename W::S* scales [[buffer(2)]],                                                    \
        device const typename W::Bound* extra [[buffer(3)]], device T* y [[buffer(4)]],                      \
        constant GemmShape& shape [[buffer(5)]], uint3 tgid [[threadgroup_position_in_grid]],                \
        uint sgid [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]] __VA_ARGS__) { \
        typedef Gemm<W, T, Schedule, NoEpilogue> Core;                                                       \
        threadgroup typename Core::Shared sh;                                                                \
        Core::run(GemmArguments<W, T>(x, codes, scales, extra, y, shape), GemmPlace{tgid, sgid, lane}, sh,   \
                  NoEpilogue());                                                                             \
    }
ENTRY(marlin_gemm, 128)
ENTRY(marlin_gemm_256, 256)
ENTRY(marlin_gemm_512, 512)
ENTRY(marlin_gemm_map, 256, , constant TensorMap& x_map [[buffer(6)]])
#undef ENTRY
