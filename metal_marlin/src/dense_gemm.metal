// metal-marlin: lanes=any
// Products of dense tiles, and products that are split along K. Sums are float in every row.
//
//   dense_gemm                      y[m, n] = sum over k of x[m, k] * w[n, k], both dense; core/gemm_dense.h, two stages
//   marlin_gemm_fp16_pipelined      the same: what the pipeline of marlin_gemm costs without its codes
//   marlin_gemm_fp16_single_stage   one stage
//   dense_gemm_small_batch_fp4      w in FP4, up to 16 tokens: a tile of 16 x 64, 64 deep; core/gemm.h. _fp32acc never sums
//                                   in half; nor does the plain row: the same arithmetic
//   dense_decode_gemv_fp4           w in FP4, a token a threadgroup; core/gemv.h
//   dense_decode_gemv_fp4_tiled     the pipeline of any simdgroup, x in threadgroup memory, 2048 elements at a time
//   dense_batched_decode_gemv_fp4   up to 8 tokens for one reading of w
//   dense_fused_gate_up_fp4         act(x * gate^T) * (x * up^T), both in FP4: core/gated.h over core/gemm_fused.h;
//                                   act is SiLU, or __egelu, __egelutanh
//   dense_gemm_prefill_splitk_fp4   w in FP4, parts[z] from slice z of K; core/gemm_split.h
//   marlin_gemm_fp4_striped         stream-K: a fixed number of threadgroups share tiles x slices evenly
//   marlin_zero_reduction           parts = 0, before marlin_gemm_fp4_striped
//   dense_splitk_reduce             y = parts[0] + parts[1] + ..., in this order, rounded once
//
// Rows: <kernel>[__[t<dtype>][_e<act>]]. Grid: x covers N, y covers M, z = slices; striped: x = threadgroups; the last two: x covers
// M * N (and all parts), a thread an element. 32 lanes on every device, but for the rows of core/gemm.h and core/gemv.h.
// ops/dense.py, ops/dense_few.py and ops/gated_up.py have the numbers.
#include <metal_stdlib>
#include "core/gated_kernel.h"
#include "core/gemm_dense.h"
#include "core/gemm_kernel.h"
#include "core/gemm_split.h"
#include "core/gemv.h"
#include "core/instantiate.h"
#include "formats/weights.h"
using namespace metal;

struct DenseShape {
    long M, N, K;
    long aligned; // 16-byte loads are possible
};
template <typename T> struct DenseSink {
    device T* y;
    uint M, N;
    void operator()(uint n, uint m, float sum) const {
        if (n < N && m < M) y[ulong(m) * N + n] = T(sum);
    }
};

template <typename T, uint kStages>
[[kernel, max_total_threads_per_threadgroup(128)]] void
dense(device const T* x [[buffer(0)]], device const T* w [[buffer(1)]], device T* y [[buffer(2)]],
      constant DenseShape& shape [[buffer(3)]], uint3 tgid [[threadgroup_position_in_grid]],
      uint sgid [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
    typedef DenseGemm<T, kStages> Core;
    threadgroup typename Core::Shared sh;
    const uint M = uint(shape.M), N = uint(shape.N);
    const DenseArguments<T> a = {x, w, M, N, uint(shape.K), shape.aligned != 0};
    const DenseSink<T> sink = {y, M, N};
    Core::run(a, tgid, sgid, lane, sh, sink);
}

#define SPLIT(entry, call)                                                                                   \
    template <typename W, typename T>                                                                        \
    [[kernel, max_total_threads_per_threadgroup(128)]] void entry(                                           \
        device const T* x [[buffer(0)]], device const uint* codes [[buffer(1)]],                             \
        device const typename W::S* scales [[buffer(2)]], device float* parts [[buffer(3)]],                 \
        constant SplitShape& shape [[buffer(4)]], uint3 tgid [[threadgroup_position_in_grid]],               \
        uint sgid [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {             \
        typedef SplitGemm<W, T> Core;                                                                        \
        threadgroup typename Core::Shared sh;                                                                \
        const GemmArguments<W, T> a(x, codes, scales, scales, (device T*)parts, shape.one);                  \
        const GemmPlace at = {tgid, sgid, lane};                                                             \
        call;                                                                                                \
    }
SPLIT(splitk, Core::slices(a, at, uint(shape.per), parts, sh))
SPLIT(striped, Core::striped(a, at, uint(shape.per), uint(shape.workers), parts, sh))

template <typename Core, typename Q, typename T>
[[kernel]] void dense_gemv(device const T* x [[buffer(0)]], device const uint* codes [[buffer(1)]],
                           device const typename Q::S* scales [[buffer(2)]], device T* y [[buffer(3)]],
                           constant GemvShape& shape [[buffer(4)]],
                           uint3 tgid [[threadgroup_position_in_grid]],
                           uint sgid [[simdgroup_index_in_threadgroup]],
                           uint lane [[thread_index_in_simdgroup]], uint sgs [[simdgroups_per_threadgroup]]) {
    threadgroup typename Core::Shared sh;
    Core::run(GemvArguments<Q, T>(x, codes, scales, scales, y, shape), GemvPlace{tgid, sgid, lane, sgs}, sh);
}
template <typename Q, typename T> using GemvOne = Gemv<Q, T, 1>;
template <typename Q, typename T> using GemvBatch = Gemv<Q, T, 8>;
template <typename Q, typename T> using GemvTiled = SimdGemv<Q, T, 1, 4, 2048>;

struct PartsShape {
    long count; // of sums
    long parts;
};

template <typename T>
[[kernel]] void reduce_parts(device const float* parts [[buffer(0)]], device T* y [[buffer(1)]],
                             constant PartsShape& shape [[buffer(2)]], uint i [[thread_position_in_grid]]) {
    const ulong count = ulong(shape.count);
    if (i >= count) return;
    float sum = parts[i];
    for (uint p = 1; p < uint(shape.parts); ++p) sum += parts[p * count + i];
    y[i] = T(sum);
}

[[host_name("marlin_zero_reduction")]] [[kernel]] void zero_parts(device float* parts [[buffer(0)]],
                                                                  constant PartsShape& shape [[buffer(1)]],
                                                                  uint i [[thread_position_in_grid]]) {
    if (i < ulong(shape.count)) parts[i] = 0;
}

#define DENSE(name, kStages)                                                                                 \
    INSTANTIATE(name, dense<half, kStages>)                                                                  \
    INSTANTIATE(name "__tbf16", dense<bfloat, kStages>)
DENSE("dense_gemm", 2)
INSTANTIATE("dense_gemm__tf32", dense<float, 2>)
DENSE("marlin_gemm_fp16_pipelined", 2)
DENSE("marlin_gemm_fp16_single_stage", 1)

#define ROWS(name, kernel)                                                                                   \
    INSTANTIATE(name, kernel<Fp4<half>, half>)                                                               \
    INSTANTIATE(name "__tbf16", kernel<Fp4<bfloat>, bfloat>)                                                 \
    INSTANTIATE(name "__tf32", kernel<Fp4<float>, float>)
ROWS("dense_gemm_prefill_splitk_fp4", splitk)
ROWS("marlin_gemm_fp4_striped", striped)
INSTANTIATE("dense_splitk_reduce", reduce_parts<half>)
INSTANTIATE("dense_splitk_reduce__tbf16", reduce_parts<bfloat>)
INSTANTIATE("dense_splitk_reduce__tf32", reduce_parts<float>)

typedef Tiled<16, 64, 64, 2, 1, 4> SmallBatch;
#define SMALL(name)                                                                                          \
    INSTANTIATE(name, marlin_gemm<Fp4<half>, half, SmallBatch>)                                              \
    INSTANTIATE(name "__tbf16", marlin_gemm<Fp4<bfloat>, bfloat, SmallBatch>)
SMALL("dense_gemm_small_batch_fp4")
SMALL("dense_gemm_small_batch_fp4_fp32acc")

#define GEMV(name, Core)                                                                                     \
    INSTANTIATE(name, dense_gemv<Core<Fp4<half>, half>, Fp4<half>, half>)                                    \
    INSTANTIATE(name "__tbf16", dense_gemv<Core<Fp4<bfloat>, bfloat>, Fp4<bfloat>, bfloat>)                  \
    INSTANTIATE(name "__tf32", dense_gemv<Core<Fp4<float>, float>, Fp4<float>, float>)
GEMV("dense_decode_gemv_fp4", GemvOne)
GEMV("dense_batched_decode_gemv_fp4", GemvBatch)
GEMV("dense_decode_gemv_fp4_tiled", GemvTiled)

#define GATE_UP(half_key, bfloat_key, Act)                                                                   \
    INSTANTIATE("dense_fused_gate_up_fp4" half_key, gated_up<Fp4<half>, Act, half, Fused<64, 64>>)           \
    INSTANTIATE("dense_fused_gate_up_fp4" bfloat_key, gated_up<Fp4<bfloat>, Act, bfloat, Fused<64, 64>>)
GATE_UP("", "__tbf16", Silu)
GATE_UP("__egelu", "__tbf16_egelu", Gelu)
GATE_UP("__egelutanh", "__tbf16_egelutanh", GeluTanh)
