// metal-marlin: lanes=any
// Products with n:m sparse quantised weights: y[m, n] = sum over k of x[m, k] * w[n, k], where of every m weights along K
// at most n are not 0 and n are stored (formats/sparse.h). Weights become whole tiles again before they are multiplied, so
// what sparsity saves here is reading; what saves multiplications as well is packed_sparse.metal.
//
// Rows: marlin_gemm_sparse_<format>[__t<activations>_z<zeros>_p<n>of<m>]; scales are as the activations or of the format's
// own type, activations half by default, 2 of 4 where no _p says otherwise.
//   marlin_gemm_sparse_<format>   2 of 4
//   marlin_gemm_sparse_fp4_fused  weights are decoded in registers, as operands
//   marlin_gemm_sparse_nm         FP4, any pattern
// Grid: x covers N, y covers M; ops/linear_sparse.py holds the numbers.
#include <metal_stdlib>
#include "core/gemm_sparse.h"
#include "core/instantiate.h"
#include "formats/weights.h"
using namespace metal;

template <typename W, typename T, typename Schedule>
[[kernel, max_total_threads_per_threadgroup(128)]] void
sparse_gemm(device const T* x [[buffer(0)]], device const uint* codes [[buffer(1)]],
            device const uint* places [[buffer(2)]], device const typename W::S* scales [[buffer(3)]],
            device const typename W::Bound* extra [[buffer(4)]], device T* y [[buffer(5)]],
            constant GemmShape& shape [[buffer(6)]], uint3 tgid [[threadgroup_position_in_grid]],
            uint sgid [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
    typedef Gemm<W, T, Schedule, NoEpilogue> Core;
    threadgroup typename Core::Shared sh;
    const GemmArguments<typename W::Whole, T> all(x, codes, scales, extra, y, shape);
    Core::run(GemmArguments<W, T>(all, places), GemmPlace{tgid, sgid, lane}, sh, NoEpilogue());
}

#define ROW(name, W, kept, of, T, Schedule) INSTANTIATE(name, sparse_gemm<Sparse<W, kept, of>, T, Schedule>)
// Scales as the activations. z: what follows the other keys, and first where there is none.
#define ROWS(name, W, first, z, kept, of)                                                                    \
    ROW(name first, W<half>, kept, of, half, DoubleStage)                                                    \
    ROW(name "__tbf16" z, W<bfloat>, kept, of, bfloat, DoubleStage)                                          \
    ROW(name "__tf32" z, W<float>, kept, of, float, DoubleStage)
#define ROWS_OWN(name, W)                                                                                    \
    ROW(name, W, 2, 4, half, DoubleStage)                                                                    \
    ROW(name "__tbf16", W, 2, 4, bfloat, DoubleStage)                                                        \
    ROW(name "__tf32", W, 2, 4, float, DoubleStage)

ROWS("marlin_gemm_sparse_fp4", Fp4, "", "", 2, 4)
ROWS_OWN("marlin_gemm_sparse_mxfp4", Mxfp4)
ROWS_OWN("marlin_gemm_sparse_nvfp4", Nvfp4)
ROWS("marlin_gemm_sparse_int4", Int4, "", "", 2, 4)
ROWS("marlin_gemm_sparse_int4", Int4Point, "__zpoint", "_zpoint", 2, 4)
ROWS("marlin_gemm_sparse_int4", Int4Packed, "__zpacked", "_zpacked", 2, 4)
ROWS("marlin_gemm_sparse_int4", Int4Bias, "__zbias", "_zbias", 2, 4)

typedef Fused<64, 64> InRegisters;
ROW("marlin_gemm_sparse_fp4_fused", Fp4<half>, 2, 4, half, InRegisters)
ROW("marlin_gemm_sparse_fp4_fused__tbf16", Fp4<bfloat>, 2, 4, bfloat, InRegisters)

ROWS("marlin_gemm_sparse_nm", Fp4, "", "", 2, 4)
ROWS("marlin_gemm_sparse_nm", Fp4, "__p1of4", "_p1of4", 1, 4)
ROWS("marlin_gemm_sparse_nm", Fp4, "__p2of8", "_p2of8", 2, 8)
ROWS("marlin_gemm_sparse_nm", Fp4, "__p4of8", "_p4of8", 4, 8)
