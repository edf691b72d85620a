// metal-marlin: lanes=any
// Products with quantised weights for many tokens: y[m, n] = sum over k of x[m, k] * w[n, k].
// What each thread does and why it is fast: core/gemm.h. Sums are float in every row, so a plain row has the accuracy of
// its _fp32acc twin.
//
// Rows: marlin_gemm_<format>[_<variant>][__t<activations>_s<scales>_z<zeros>]; activations and scales are half by
// default, scales are as the activations where no _s says otherwise, zeros absent where no _z does.
//   marlin_gemm_*                 two stages: weights are read and decoded while those before them are multiplied
//   marlin_gemm_fp4_single_stage  one stage; _3stage three
//   marlin_gemm_fp4_fp32acc       never sums in half
//   marlin_gemm_fused_<format>    weights are decoded in registers, as operands
//   marlin_gemm_divergent_fp4     half of the simdgroups decode, the others multiply
//   marlin_gemm_fp4_async         two stages filled by asynchronous copies, which also fetch x; _async_deep eight
// Grid: x covers N, y covers M; ops/marlin_gemm.py holds the numbers.
#include <metal_stdlib>
#include "core/gemm_kernel.h"
#include "core/instantiate.h"
#include "formats/weights.h"
using namespace metal;

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
ROWS("marlin_gemm_fp4_3stage", Fp4, TripleStage, "", "")
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

// Scales as the activations.
#define ROWS_FUSED(name, W, first, z)                                                                        \
    INSTANTIATE(name first, marlin_gemm<W<half>, half, Fused<64, 64>>)                                       \
    INSTANTIATE(name "__tbf16" z, marlin_gemm<W<bfloat>, bfloat, Fused<64, 64>>)

#define ROWS_OF(name, entry, ...)                                                                            \
    INSTANTIATE(name, entry<Fp4<half>, half, __VA_ARGS__>)                                                   \
    INSTANTIATE(name "__tbf16", entry<Fp4<bfloat>, bfloat, __VA_ARGS__>)

ROWS_FUSED("marlin_gemm_fused_fp4", Fp4, "", "")
ROWS_FUSED("marlin_gemm_fused_fp4_fp32acc", Fp4, "", "")
ROWS_FUSED("marlin_gemm_fused_u4", Int4, "", "")
ROWS_FUSED("marlin_gemm_fused_u4", Int4Point, "__zpoint", "_zpoint")
ROWS_FUSED("marlin_gemm_fused_u4", Int4Packed, "__zpacked", "_zpacked")
ROWS_FUSED("marlin_gemm_fused_u4", Int4Bias, "__zbias", "_zbias")

ROWS_OF("marlin_gemm_divergent_fp4", marlin_gemm_256, Divergent)
ROWS_OF("marlin_gemm_fp4_async", marlin_gemm_256, FewTokens<32, 32, 8, 2>)
ROWS_OF("marlin_gemm_fp4_async_deep", marlin_gemm_256, FewTokens<32, 32, 8, 8>)

// Tiles with asynchronous copies; m: rows of W and tokens of a threadgroup, and how many of them share K (ops/gemm_tiles.py).
#define FEW(name, rows, tokens, threads, W, T)                                                               \
    INSTANTIATE(name "m" #rows "x" #tokens,                                                                  \
                marlin_gemm_##threads<W, T, FewTokens<rows, tokens, threads / 32, 8>>)
#define FEW_SPLIT(name, rows, tokens, threads, parts, W, T)                                                  \
    INSTANTIATE(name "m" #rows "x" #tokens "x" #parts,                                                       \
                marlin_gemm_##threads<W, T, FewTokens<rows, tokens, threads / 32, 8, parts>>)
#define MANY(name, rows, tokens, depth, W, T)                                                                \
    INSTANTIATE(name "m" #rows "x" #tokens, marlin_gemm_map<W, T, ManyTokens<rows, tokens, depth>>)
#define MANY_SPLIT(name, rows, tokens, depth, parts, W, T)                                                   \
    INSTANTIATE(name "m" #rows "x" #tokens "x" #parts,                                                       \
                marlin_gemm_map<W, T, ManyTokens<rows, tokens, depth, parts>>)
#define TILES(name, W, T)                                                                                    \
    FEW(name, 16, 8, 512, W, T)                                                                              \
    FEW(name, 32, 8, 512, W, T)                                                                              \
    FEW(name, 64, 8, 256, W, T)                                                                              \
    FEW(name, 112, 8, 256, W, T)                                                                             \
    FEW(name, 16, 16, 512, W, T)                                                                             \
    FEW(name, 32, 16, 512, W, T)                                                                             \
    FEW(name, 64, 16, 256, W, T)                                                                             \
    FEW(name, 112, 16, 256, W, T)                                                                            \
    FEW(name, 32, 32, 256, W, T)                                                                             \
    FEW_SPLIT(name, 64, 32, 256, 2, W, T)                                                                    \
    MANY(name, 64, 32, 8, W, T)                                                                              \
    MANY(name, 64, 64, 8, W, T)                                                                              \
    MANY_SPLIT(name, 64, 64, 8, 2, W, T)                                                                     \
    MANY(name, 64, 128, 8, W, T)                                                                             \
    MANY_SPLIT(name, 64, 128, 8, 2, W, T)                                                                    \
    MANY(name, 64, 256, 6, W, T)                                                                             \
    MANY(name, 128, 128, 6, W, T)                                                                            \
    MANY(name, 128, 256, 5, W, T)
#define ROWS_TILES(name, W, z)                                                                               \
    TILES(name "__" z, W<half>, half)                                                                        \
    TILES(name "__tbf16_" z, W<bfloat>, bfloat)
#define ROWS_TILES_OWN(name, W)                                                                              \
    TILES(name "__", W, half)                                                                                \
    TILES(name "__tbf16_", W, bfloat)

ROWS_TILES("marlin_gemm_fp4", Fp4, "")
ROWS_TILES("marlin_gemm_int4", Int4, "")
ROWS_TILES("marlin_gemm_int4", Int4Point, "zpoint_")
ROWS_TILES("marlin_gemm_int4", Int4Packed, "zpacked_")
ROWS_TILES("marlin_gemm_int4", Int4Bias, "zbias_")
ROWS_TILES("marlin_gemm_int8", Int8, "")
ROWS_TILES("marlin_gemm_uint8", Uint8Point, "zpoint_")
ROWS_TILES("marlin_gemm_uint8", Uint8Packed, "zpacked_")
ROWS_TILES("marlin_gemm_uint8", Uint8Bias, "zbias_")
ROWS_TILES("marlin_gemm_fp8_e4m3", Fp8E4M3, "")
ROWS_TILES("marlin_gemm_fp8_e5m2", Fp8E5M2, "")
ROWS_TILES_OWN("marlin_gemm_mxfp4", Mxfp4)
ROWS_TILES_OWN("marlin_gemm_nvfp4", Nvfp4)
