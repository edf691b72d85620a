// metal-marlin: lanes=any
// Many products at once; the grid's z is the product.
//
//   marlin_gemm_batched_fp4        y[b, m, n] = sum over k of x[b, m, k] * w[b, n, k], w in FP4: core/gemm.h, with a stride
//                                  between products for x, codes, scales and y; 0: all have the same
//   marlin_gemm_grouped_attention  s[b, h, i, j] = scale * sum over d of q[b, h, i, d] * k[b, h / ratio, j, d], -inf where
//                                  `causal` and j > i + keys - queries; core/gemm_dense.h, keys as the left operand.
//                                  Tiles that are wholly masked are not multiplied. 32 lanes on every device.
//
// Rows: <kernel>[__t<dtype>]. Grid: x covers N (keys), y covers M (queries), z = products; ops/batched.py has the numbers.
#include <metal_stdlib>
#include "core/gemm.h"
#include "core/gemm_dense.h"
#include "core/instantiate.h"
#include "formats/weights.h"
using namespace metal;

struct BatchedShape {
    GemmShape one;
    long x, codes, scales, y; // elements from a product to the next
};

template <typename W, typename T>
[[kernel, max_total_threads_per_threadgroup(128)]] void
batched_gemm(device const T* x [[buffer(0)]], device const uint* codes [[buffer(1)]],
             device const typename W::S* scales [[buffer(2)]], device T* y [[buffer(3)]],
             constant BatchedShape& shape [[buffer(4)]], uint3 tgid [[threadgroup_position_in_grid]],
             uint sgid [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
    typedef Gemm<W, T, DoubleStage, NoEpilogue> Core;
    threadgroup typename Core::Shared sh;
    const ulong b = tgid.z;
    device const typename W::S* of = scales + b * ulong(shape.scales);
    Core::run(GemmArguments<W, T>(x + b * ulong(shape.x), codes + b * ulong(shape.codes), of, of,
                                  y + b * ulong(shape.y), shape.one),
              GemmPlace{tgid, sgid, lane}, sh, NoEpilogue());
}

struct ScoresShape {
    long queries, keys, width;
    long ratio; // heads of q to a head of k
    long causal;
    long aligned; // 16-byte loads are possible
};
struct ScoresNumbers {
    float scale;
};

template <typename T> struct ScoresSink {
    device T* s;
    uint queries, keys;
    bool causal;
    float scale;
    void operator()(uint key, uint query, float sum) const {
        if (key >= keys || query >= queries) return;
        const bool seen = !causal || key + queries <= query + keys;
        s[ulong(query) * keys + key] = seen ? T(sum * scale) : T(-INFINITY);
    }
};

template <typename T>
[[kernel, max_total_threads_per_threadgroup(128)]] void
grouped_scores(device const T* q [[buffer(0)]], device const T* k [[buffer(1)]], device T* s [[buffer(2)]],
               constant ScoresShape& shape [[buffer(3)]], constant ScoresNumbers& numbers [[buffer(4)]],
               uint3 tgid [[threadgroup_position_in_grid]], uint sgid [[simdgroup_index_in_threadgroup]],
               uint lane [[thread_index_in_simdgroup]]) {
    typedef DenseGemm<T, 2> Core;
    threadgroup typename Core::Shared sh;
    const uint queries = uint(shape.queries), keys = uint(shape.keys), width = uint(shape.width);
    // batches have heads in whole groups: counted through all of them, a head's keys are those of head / ratio
    const ulong head = tgid.z, group = head / ulong(shape.ratio);
    const uint last = min((tgid.y + 1) * Core::kBM, queries) - 1;
    const bool masked = shape.causal != 0 && tgid.x * Core::kBN + queries > last + keys;
    const DenseArguments<T> a = {q + head * queries * width, k + group * keys * width, queries, keys,
                                 masked ? 0 : width,         shape.aligned != 0};
    const ScoresSink<T> sink = {s + head * queries * keys, queries, keys, shape.causal != 0, numbers.scale};
    Core::run(a, tgid, sgid, lane, sh, sink);
}

INSTANTIATE("marlin_gemm_batched_fp4", batched_gemm<Fp4<half>, half>)
INSTANTIATE("marlin_gemm_batched_fp4__tbf16", batched_gemm<Fp4<bfloat>, bfloat>)
INSTANTIATE("marlin_gemm_batched_fp4__tf32", batched_gemm<Fp4<float>, float>)
INSTANTIATE("marlin_gemm_grouped_attention", grouped_scores<half>)
INSTANTIATE("marlin_gemm_grouped_attention__tbf16", grouped_scores<bfloat>)
INSTANTIATE("marlin_gemm_grouped_attention__tf32", grouped_scores<float>)
