// metal-marlin: lanes=any
// Decoding, one to a few tokens: y[m, n] = sum over k of x[m, k] * w[n, k], w = scale * (value(code) - zero) + bias.
// What each thread does and why it is fast: core/gemv.h. Sums are float, no run of them is half.
//
// Rows: decode_gemv_<format>[_<variant>][__t<activations>_s<scales>_z<zeros>]; activations and scales are half by
// default, scales are as the activations where no _s says otherwise, zeros absent where no _z does.
//   decode_gemv_*           one token a threadgroup
//   decode_gemv_*_batched   up to 8 tokens a threadgroup, every weight read once for them
//   decode_gemv_fp4_simd    the plain pipeline of any simdgroup, on every device
//   decode_gemv_fp4_wide    the same, 32 bytes of a row a lane
//   decode_gemv_fp4_tiled   the same, x in threadgroup memory, 4096 elements at a time
// Grid: x covers N, y covers M; ops/linear_decode.py holds the numbers.
#include <metal_stdlib>
#include "core/gemv.h"
#include "core/instantiate.h"
#include "formats/weights.h"
using namespace metal;

template <typename Core, typename Q, typename T>
[[kernel]] void
decode_gemv(device const T* x [[buffer(0)]], device const uint* codes [[buffer(1)]],
            device const typename Q::S* scales [[buffer(2)]],
            device const typename Q::Bound* extra [[buffer(3)]], device T* y [[buffer(4)]],
            constant GemvShape& shape [[buffer(5)]], uint3 tgid [[threadgroup_position_in_grid]],
            uint sgid [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
            uint sgs [[simdgroups_per_threadgroup]]) {
    threadgroup typename Core::Shared sh;
    Core::run(GemvArguments<Q, T>(x, codes, scales, extra, y, shape), GemvPlace{tgid, sgid, lane, sgs}, sh);
}

template <typename Q, typename T> using GemvOne = Gemv<Q, T, 1>;
template <typename Q, typename T> using GemvBatch = Gemv<Q, T, 8>;
template <typename Q, typename T> using GemvSimd = SimdGemv<Q, T, 1>;
template <typename Q, typename T> using GemvWide = SimdGemv<Q, T, 1, 8>;
template <typename Q, typename T> using GemvTiled = SimdGemv<Q, T, 1, 4, 4096>;

#define ROW(name, Core, Q, T) INSTANTIATE(name, decode_gemv<Core<Q, T>, Q, T>)

// every dtype of activations
#define ROWS_T(name, Core, Q)                                                                                \
    ROW(name, Core, Q, half)                                                                                 \
    ROW(name "__tbf16", Core, Q, bfloat)                                                                     \
    ROW(name "__tf32", Core, Q, float)

// scales like the activations
#define ROWS_S(name, Core, Q)                                                                                \
    ROW(name, Core, Q<half>, half)                                                                           \
    ROW(name "__tbf16", Core, Q<bfloat>, bfloat)                                                             \
    ROW(name "__tf32", Core, Q<float>, float)

// every pair of dtypes; first, z: what names without and with other keys say of zeros
#define ROWS_TS(name, first, z, Core, Q)                                                                     \
    ROW(name first, Core, Q<half>, half)                                                                     \
    ROW(name "__sbf16" z, Core, Q<bfloat>, half)                                                             \
    ROW(name "__sf32" z, Core, Q<float>, half)                                                               \
    ROW(name "__tbf16" z, Core, Q<bfloat>, bfloat)                                                           \
    ROW(name "__tbf16_shalf" z, Core, Q<half>, bfloat)                                                       \
    ROW(name "__tbf16_sf32" z, Core, Q<float>, bfloat)                                                       \
    ROW(name "__tf32" z, Core, Q<float>, float)                                                              \
    ROW(name "__tf32_shalf" z, Core, Q<half>, float)                                                         \
    ROW(name "__tf32_sbf16" z, Core, Q<bfloat>, float)

#define FORMATS(variant, Core)                                                                               \
    ROWS_TS("decode_gemv_fp4" variant, "", "", Core, Fp4)                                                    \
    ROWS_T("decode_gemv_mxfp4" variant, Core, Mxfp4)                                                         \
    ROWS_T("decode_gemv_nvfp4" variant, Core, Nvfp4)                                                         \
    ROWS_TS("decode_gemv_int4" variant, "", "", Core, Int4)                                                  \
    ROWS_TS("decode_gemv_int4" variant, "__zpoint", "_zpoint", Core, Int4Point)                              \
    ROWS_TS("decode_gemv_int4" variant, "__zpacked", "_zpacked", Core, Int4Packed)                           \
    ROWS_TS("decode_gemv_int4" variant, "__zbias", "_zbias", Core, Int4Bias)                                 \
    ROWS_TS("decode_gemv_int8" variant, "", "", Core, Int8)                                                  \
    ROWS_TS("decode_gemv_uint8" variant, "__zpoint", "_zpoint", Core, Uint8Point)                            \
    ROWS_TS("decode_gemv_uint8" variant, "__zpacked", "_zpacked", Core, Uint8Packed)                         \
    ROWS_TS("decode_gemv_uint8" variant, "__zbias", "_zbias", Core, Uint8Bias)                               \
    ROWS_TS("decode_gemv_fp8_e4m3" variant, "", "", Core, Fp8E4M3)                                           \
    ROWS_TS("decode_gemv_fp8_e5m2" variant, "", "", Core, Fp8E5M2)                                           \
    ROWS_TS("decode_gemv_int2" variant, "", "", Core, Int2)                                                  \
    ROWS_TS("decode_gemv_int3" variant, "", "", Core, Int3)                                                  \
    ROWS_TS("decode_gemv_nf3" variant, "", "", Core, Nf3)

FORMATS("", GemvOne)
FORMATS("_batched", GemvBatch)
ROWS_S("decode_gemv_fp4_simd", GemvSimd, Fp4)
ROWS_S("decode_gemv_fp4_wide", GemvWide, Fp4)
ROWS_S("decode_gemv_fp4_tiled", GemvTiled, Fp4)
