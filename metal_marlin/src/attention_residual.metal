// metal-marlin: lanes=any
// What follows attention (and an MLP) in a transformer's block, one launch: y = residual + x W^T, W in four bits; scaled:
// y = residual + scale * x W^T. Sums are float until y is rounded (core/epilogue.h).
//
//   linear_residual[_scaled]_<format>         the pipeline of core/gemm_fused.h
//   linear_residual[_scaled]_<format>_decode  core/gemv.h, up to 8 tokens; __m1: one
// Rows: <kernel>[__t<dtype>_z<zeros>_m1]; scales are as the activations. Arguments are those of marlin_gemm.metal, then
// residual [M, N] (T) and the scale, which rows without scaled do not read. Grid: x covers N, y covers M.
// ops/linear_residual.py holds the numbers.
#include <metal_stdlib>
#include "core/epilogue.h"
#include "core/gemm.h"
#include "core/gemv.h"
#include "core/instantiate.h"
#include "formats/weights.h"
using namespace metal;

template <typename T> using AddResidual = FixedEpilogue<T, Identity, false, kResidual>;

template <typename W, typename T, bool kScaled>
[[kernel, max_total_threads_per_threadgroup(128)]] void
linear_residual(device const T* x [[buffer(0)]], device const uint* codes [[buffer(1)]],
                device const T* scales [[buffer(2)]], device const typename W::Bound* extra [[buffer(3)]],
                device T* y [[buffer(4)]], constant GemmShape& shape [[buffer(5)]],
                device const T* residual [[buffer(6)]], constant float& scale [[buffer(7)]],
                uint3 tgid [[threadgroup_position_in_grid]], uint sgid [[simdgroup_index_in_threadgroup]],
                uint lane [[thread_index_in_simdgroup]]) {
    typedef Gemm<W, T, Fused<64, 64>, AddResidual<T>> Core;
    threadgroup typename Core::Shared sh;
    const EpilogueArguments<T> more = {residual, residual, uint(shape.N), kScaled ? scale : 1.0f};
    Core::run(GemmArguments<W, T>(x, codes, scales, extra, y, shape), GemmPlace{tgid, sgid, lane}, sh,
              AddResidual<T>(more));
}

template <typename W, typename T, bool kScaled, uint kTokens>
[[kernel]] void
linear_residual_few(device const T* x [[buffer(0)]], device const uint* codes [[buffer(1)]],
                    device const T* scales [[buffer(2)]], device const typename W::Bound* extra [[buffer(3)]],
                    device T* y [[buffer(4)]], constant GemvShape& shape [[buffer(5)]],
                    device const T* residual [[buffer(6)]], constant float& scale [[buffer(7)]],
                    uint3 tgid [[threadgroup_position_in_grid]], uint sgid [[simdgroup_index_in_threadgroup]],
                    uint lane [[thread_index_in_simdgroup]], uint sgs [[simdgroups_per_threadgroup]]) {
    typedef Gemv<W, T, kTokens, AddResidual<T>> Core;
    threadgroup typename Core::Shared sh;
    const EpilogueArguments<T> more = {residual, residual, uint(shape.N), kScaled ? scale : 1.0f};
    Core::run(GemvArguments<W, T>(x, codes, scales, extra, y, shape), GemvPlace{tgid, sgid, lane, sgs}, sh,
              AddResidual<T>(more));
}

#define ROW(name, key, one, W, T, kScaled)                                                                   \
    INSTANTIATE(name key, linear_residual<W<T>, T, kScaled>)                                                 \
    INSTANTIATE(name "_decode" key, linear_residual_few<W<T>, T, kScaled, 8>)                                \
    INSTANTIATE(name "_decode" key one, linear_residual_few<W<T>, T, kScaled, 1>)
#define ROWS(format, key, later, one, W)                                                                     \
    ROW("linear_residual_" format, key, one, W, half, false)                                                 \
    ROW("linear_residual_" format, "__tbf16" later, "_m1", W, bfloat, false)                                 \
    ROW("linear_residual_scaled_" format, key, one, W, half, true)                                           \
    ROW("linear_residual_scaled_" format, "__tbf16" later, "_m1", W, bfloat, true)

// key, later: zeros, where the dtype is not said before and where it is
ROWS("fp4", "", "", "__m1", Fp4)
ROWS("int4", "", "", "__m1", Int4)
ROWS("int4", "__zpoint", "_zpoint", "_m1", Int4Point)
ROWS("int4", "__zpacked", "_zpacked", "_m1", Int4Packed)
ROWS("int4", "__zbias", "_zbias", "_m1", Int4Bias)
