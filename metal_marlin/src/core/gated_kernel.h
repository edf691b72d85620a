#pragma once
// Kernels around Gemm and Gemv with two matrices, and around Gemm with an input of two products, for files of rows.
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
    const UpMatrix<Q> up = {up_codes, up_scales};
    Core::run(GemmArguments<W, T>(gate, up), GemmPlace{tgid, sgid, lane}, sh, NoEpilogue());
}

template <typename Q, typename Act, typename T, uint kTokens>
[[kernel]] void
gated_up_gemv(device const T* x [[buffer(0)]], device const uint* codes [[buffer(1)]],
              device const typename Q::S* scales [[buffer(2)]], device const uint* up_codes [[buffer(3)]],
              device const typename Q::S* up_scales [[buffer(4)]], device T* y [[buffer(5)]],
              constant GemvShape& shape [[buffer(6)]], uint3 tgid [[threadgroup_position_in_grid]],
              uint sgid [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
              uint sgs [[simdgroups_per_threadgroup]]) {
    typedef GateUp<Q, Act> W;
    typedef Gemv<W, T, kTokens> Core;
    threadgroup typename Core::Shared sh;
    const GemvArguments<Q, T> gate(x, codes, scales, scales, y, shape);
    const UpMatrix<Q> up = {up_codes, up_scales};
    Core::run(GemvArguments<W, T>(gate, up), GemvPlace{tgid, sgid, lane, sgs}, sh);
}

template <typename W, typename Act, typename T, Join kJoin>
[[kernel, max_total_threads_per_threadgroup(128)]] void
gated_down(device const T* gate [[buffer(0)]], device const T* up [[buffer(1)]],
           device const uint* codes [[buffer(2)]], device const typename W::S* scales [[buffer(3)]],
           device T* y [[buffer(4)]], constant GemmShape& shape [[buffer(5)]],
           device const T* residual [[buffer(6)]], uint3 tgid [[threadgroup_position_in_grid]],
           uint sgid [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
    typedef FixedEpilogue<T, Identity, false, kJoin> Finish;
    typedef Gemm<W, T, Fused<64, 64>, Finish> Core;
    threadgroup typename Core::Shared sh;
    const EpilogueArguments<T> more = {residual, residual, uint(shape.N), 1.0f};
    const GatedInput<T, Act> input = {up, uint(shape.M), uint(shape.K), shape.aligned != 0};
    Core::run(GemmArguments<W, T>(gate, codes, scales, scales, y, shape), GemmPlace{tgid, sgid, lane}, sh,
              Finish(more), input);
}
