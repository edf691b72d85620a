#pragma once
// The kernel around Gemm with two matrices, for files of rows.
#include "core/gated.h"

template <typename Q, typename Act, typename T, typename Schedule>
[[kernel, max_total_threads_per_threadgroup(128)]] void
gated_up(device const T* x [[buffer(0)]], device const uint* codes [[buffer(1)]],
         device const typename Q::S* scales [[buffer(2)]], device const uint* up_codes [[buffer(3)]],
         device const typename Q::S* up_scales [[buffer(4)]], device T* y [[buffer(5)]],
         constant GemmShape& shape [[buffer(6)]], uint3 tgid [[threadgroup_position_in_grid]],
         uint sgid [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
    typedef GateUp<Q, Act> W;
    typedef Gemm<W, T, Schedule, NoEpilogue> Core;
    threadgroup typename Core::Shared sh;
    const GemmArguments<Q, T> gate(x, codes, scales, scales, y, shape);
    Core::run(GemmArguments<W, T>(gate, up_codes, up_scales), GemmPlace{tgid, sgid, lane}, sh, NoEpilogue());
}
