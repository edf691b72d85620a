// metal-marlin: lanes=any
// Decoding, one to a few tokens: y[m, n] = sum over k of x[m, k] * scales[n, k / group] * value(codes[n, k]).
// What each thread does and why it is fast: core/gemv.h. Sums are float, no run of them is half.
//
// Rows: decode_gemv_<format>[_batched][__t<activations>][_s<scales>]; activations and scales are half by default,
// scales are as the activations where no _s says otherwise.
//   decode_gemv_*           one token a threadgroup
//   decode_gemv_*_batched   up to 8 tokens a threadgroup, every weight read once for them
// Grid: x covers N, y covers M; ops/linear_decode.py holds the numbers.
#include <metal_stdlib>
#include "core/gemv.h"
#include "core/instantiate.h"
#include "formats/fp4.h"
using namespace metal;

template <typename Format, typename T, typename S, uint kTokens>
[[kernel]] void
decode_gemv(device const T* x [[buffer(0)]], device const uint* codes [[buffer(1)]],
            device const S* scales [[buffer(2)]], device T* y [[buffer(3)]],
            constant GemvShape& shape [[buffer(4)]], uint3 tgid [[threadgroup_position_in_grid]],
            uint sgid [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
            uint sgs [[simdgroups_per_threadgroup]]) {
    typedef Gemv<Format, T, S, kTokens> Core;
    threadgroup typename Core::Shared sh;
    Core::run(GemvArguments<T, S>(x, codes, scales, y, shape), GemvPlace{tgid, sgid, lane, sgs}, sh);
}

#define ROWS(name, Format, kTokens)                                                                          \
    INSTANTIATE(name, decode_gemv<Format, half, half, kTokens>)                                              \
    INSTANTIATE(name "__sbf16", decode_gemv<Format, half, bfloat, kTokens>)                                  \
    INSTANTIATE(name "__sf32", decode_gemv<Format, half, float, kTokens>)                                    \
    INSTANTIATE(name "__tbf16", decode_gemv<Format, bfloat, bfloat, kTokens>)                                \
    INSTANTIATE(name "__tbf16_shalf", decode_gemv<Format, bfloat, half, kTokens>)                            \
    INSTANTIATE(name "__tbf16_sf32", decode_gemv<Format, bfloat, float, kTokens>)                            \
    INSTANTIATE(name "__tf32", decode_gemv<Format, float, float, kTokens>)                                   \
    INSTANTIATE(name "__tf32_shalf", decode_gemv<Format, float, half, kTokens>)                              \
    INSTANTIATE(name "__tf32_sbf16", decode_gemv<Format, float, bfloat, kTokens>)

ROWS("decode_gemv_fp4", FP4, 1)
ROWS("decode_gemv_fp4_batched", FP4, 8)
