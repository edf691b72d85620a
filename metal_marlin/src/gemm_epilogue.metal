// metal-marlin: lanes=any
// Products with FP4 weights whose sums become outputs in the same launch (core/epilogue.h), and that step alone.
//
//   marlin_gemm_fused_fp4_epilogue     the pipeline of core/gemm_fused.h; the epilogue is chosen by arguments
//   marlin_gemm_fused_fp4_epilogue_fc  the epilogue is fixed: e<act>[bias][residual|gate] in the row's name, none without e
//   epilogue_standalone                over a product that is in memory already
// Rows: <kernel>[__[t<dtype>][_e<epilogue>]]; scales are as the activations. Arguments are those of marlin_gemm.metal, then bias
// [N], other [M, N] (both T; x and y where there is none) and the choice. Grid: x covers N, y covers M; of the last kernel
// x covers a row, y = rows. ops/epilogue.py holds the numbers.
#include <metal_stdlib>
#include "core/epilogue.h"
#include "core/gemm.h"
#include "core/instantiate.h"
#include "formats/weights.h"
using namespace metal;

template <typename T, typename Epilogue>
[[kernel, max_total_threads_per_threadgroup(128)]] void
gemm_epilogue(device const T* x [[buffer(0)]], device const uint* codes [[buffer(1)]],
              device const T* scales [[buffer(2)]], device T* y [[buffer(3)]],
              constant GemmShape& shape [[buffer(4)]], device const T* bias [[buffer(5)]],
              device const T* other [[buffer(6)]], constant EpilogueShape& epilogue [[buffer(7)]],
              constant float& scale [[buffer(8)]], uint3 tgid [[threadgroup_position_in_grid]],
              uint sgid [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
    typedef Gemm<Fp4<T>, T, Fused<64, 64>, Epilogue> Core;
    threadgroup typename Core::Shared sh;
    const EpilogueArguments<T> more = {bias, other, uint(shape.N), scale};
    Core::run(GemmArguments<Fp4<T>, T>(x, codes, scales, scales, y, shape), GemmPlace{tgid, sgid, lane}, sh,
              Epilogue(more, epilogue));
}

struct EpilogueRun {
    long width;
    long run; // outputs of a threadgroup
};

template <typename T>
[[kernel]] void
epilogue_standalone(device const T* x [[buffer(0)]], device T* y [[buffer(1)]],
                    constant EpilogueRun& shape [[buffer(2)]], device const T* bias [[buffer(3)]],
                    device const T* other [[buffer(4)]], constant EpilogueShape& epilogue [[buffer(5)]],
                    constant float& scale [[buffer(6)]], uint2 tgid [[threadgroup_position_in_grid]],
                    uint tid [[thread_index_in_threadgroup]], uint2 size [[threads_per_threadgroup]]) {
    const uint width = uint(shape.width), begin = tgid.x * uint(shape.run);
    const EpilogueArguments<T> more = {bias, other, width, scale};
    const AnyEpilogue<T> finish(more, epilogue);
    const uint end = min(begin + uint(shape.run), width), stride = kSimdWidth == 1 ? 1 : size.x;
    const ulong row = ulong(tgid.y) * width;
    for (uint n = begin + tid; n < end; n += stride)
        y[row + n] = T(finish.apply(float(x[row + n]), tgid.y, n));
}

#define FIXED(half_key, bfloat_key, Act, kBias, kJoin)                                                       \
    INSTANTIATE("marlin_gemm_fused_fp4_epilogue_fc" half_key,                                                \
                gemm_epilogue<half, FixedEpilogue<half, Act, kBias, kJoin>>)                                 \
    INSTANTIATE("marlin_gemm_fused_fp4_epilogue_fc" bfloat_key,                                              \
                gemm_epilogue<bfloat, FixedEpilogue<bfloat, Act, kBias, kJoin>>)
#define KEYED(key, Act, kBias, kJoin) FIXED("__e" key, "__tbf16_e" key, Act, kBias, kJoin)
#define JOINED(key, Act)                                                                                     \
    KEYED(key "residual", Act, false, kResidual)                                                             \
    KEYED(key "gate", Act, false, kGate)                                                                     \
    KEYED(key "bias", Act, true, kAlone)                                                                     \
    KEYED(key "biasresidual", Act, true, kResidual)                                                          \
    KEYED(key "biasgate", Act, true, kGate)
#define ACTIVATED(key, Act)                                                                                  \
    KEYED(key, Act, false, kAlone)                                                                           \
    JOINED(key, Act)

FIXED("", "__tbf16", Identity, false, kAlone)
JOINED("none", Identity)
ACTIVATED("silu", Silu)
ACTIVATED("gelu", Gelu)
ACTIVATED("gelutanh", GeluTanh)
ACTIVATED("quickgelu", QuickGelu)
ACTIVATED("relu", Relu)

INSTANTIATE("marlin_gemm_fused_fp4_epilogue", gemm_epilogue<half, AnyEpilogue<half>>)
INSTANTIATE("marlin_gemm_fused_fp4_epilogue__tbf16", gemm_epilogue<bfloat, AnyEpilogue<bfloat>>)
INSTANTIATE("epilogue_standalone", epilogue_standalone<half>)
INSTANTIATE("epilogue_standalone__tbf16", epilogue_standalone<bfloat>)
INSTANTIATE("epilogue_standalone__tf32", epilogue_standalone<float>)
