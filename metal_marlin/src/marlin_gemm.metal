// metal-marlin: lanes=any
// Products with quantised weights for many tokens: y[m, n] = sum over k of x[m, k] * w[n, k].
// What each thread does and why it is fast: core/gemm.h. Sums are float in every row, so a plain row has the accuracy of
// its _fp32acc twin.
//
// Rows: marlin_gemm_<format>[_<variant>][__t<activations>_s<scales>_z<zeros>]; activations and scales are half by
// default, scales are as the activations where no _s says otherwise, zeros absent where no _z does.
//   marlin_gemm_*                 two stages: weights are read and decoded while those before them are multiplied
//   marlin_gemm_fp4_single_stage  one stage
//   marlin_gemm_fp4_fp32acc       never sums in half
// Grid: x covers N, y covers M; ops/marlin_gemm.py holds the numbers.
#include <metal_stdlib>
#include "core/gemm.h"
#include "core/instantiate.h"
#include "formats/weights.h"
using namespace metal;

template <typename W, typename T, typename Schedule>
[[kernel]] void
marlin_gemm(device const T* x [[buffer(0)]], device const uint* codes [[buffer(1)]],
            device const typename W::S* scales [[buffer(2)]],
            device const typename W::Bound* extra [[buffer(3)]], device T* y [[buffer(4)]],
            constant GemmShape& shape [[buffer(5)]], uint3 tgid [[threadgroup_position_in_grid]],
            uint sgid [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
    typedef Gemm<W, T, Schedule, NoEpilogue> Core;
    threadgroup typename Core::Shared sh;
    Core::run(GemmArguments<W, T>(x, codes, scales, extra, y, shape), GemmPlace{tgid, sgid, lane}, sh,
              NoEpilogue());
}

// Scales of a float type: W is a template of it. z: what follows the other keys, and first where there is none.
#define ROWS(name, W, Schedule, first, z)                                                                    \
    INSTANTIATE(name first, marlin_gemm<W<half>, half, Schedule>)                                            \
    INSTANTIATE(name "__sbf16" z, marlin_gemm<W<bfloat>, half, Schedule>)                                    \
    INSTANTIATE(name "__sf32" z, marlin_gemm<W<float>, half, Schedule>)                                      \
    INSTANTIATE(name "__tbf16" z, marlin_gemm<W<bfloat>, bfloat, Schedule>)                                  \
    INSTANTIATE(name "__tbf16_shalf" z, marlin_gemm<W<half>, bfloat, Schedule>)                              \
    INSTANTIATE(name "__tbf16_sf32" z, marlin_gemm<W<float>, bfloat, Schedule>)                              \
    INSTANTIATE(name "__tf32" z, marlin_gemm<W<float>, float, Schedule>)                                     \
    INSTANTIATE(name "__tf32_shalf" z, marlin_gemm<W<half>, float, Schedule>)                                \
    INSTANTIATE(name "__tf32_sbf16" z, marlin_gemm<W<bfloat>, float, Schedule>)

// Scales of the format's own type.
#define ROWS_OWN(name, W, Schedule)                                                                          \
    INSTANTIATE(name, marlin_gemm<W, half, Schedule>)                                                        \
    INSTANTIATE(name "__tbf16", marlin_gemm<W, bfloat, Schedule>)                                            \
    INSTANTIATE(name "__tf32", marlin_gemm<W, float, Schedule>)

ROWS("marlin_gemm_fp4", Fp4, DoubleStage, "", "")
ROWS("marlin_gemm_fp4_fp32acc", Fp4, DoubleStage, "", "")
ROWS("marlin_gemm_fp4_single_stage", Fp4, SingleStage, "", "")
ROWS_OWN("marlin_gemm_mxfp4", Mxfp4, DoubleStage)
ROWS_OWN("marlin_gemm_nvfp4", Nvfp4, DoubleStage)
ROWS("marlin_gemm_int4", Int4, DoubleStage, "", "")
ROWS("marlin_gemm_int4", Int4Point, DoubleStage, "__zpoint", "_zpoint")
ROWS("marlin_gemm_int4", Int4Packed, DoubleStage, "__zpacked", "_zpacked")
ROWS("marlin_gemm_int4", Int4Bias, DoubleStage, "__zbias", "_zbias")
ROWS("marlin_gemm_int8", Int8, DoubleStage, "", "")
ROWS("marlin_gemm_uint8", Uint8Point, DoubleStage, "__zpoint", "_zpoint")
ROWS("marlin_gemm_uint8", Uint8Packed, DoubleStage, "__zpacked", "_zpacked")
ROWS("marlin_gemm_uint8", Uint8Bias, DoubleStage, "__zbias", "_zbias")
ROWS("marlin_gemm_fp8_e4m3", Fp8E4M3, DoubleStage, "", "")
ROWS("marlin_gemm_fp8_e5m2", Fp8E5M2, DoubleStage, "", "")
ROWS("marlin_gemm_int2", Int2, DoubleStage, "", "")
ROWS("marlin_gemm_int3", Int3, DoubleStage, "", "")
ROWS("marlin_gemm_nf3", Nf3, DoubleStage, "", "")
