// metal-marlin: lanes=any
// The tile pipeline of core/gemm_tile.h with named tiles, each for a number of tokens.
//
// Rows: <name>[__tbf16]; scales are as the activations. Arguments and meaning are those of marlin_gemm.metal.
//   gemm_fp4_optimized           32 tokens x 64 rows of W x 64 k, for some tens of tokens
//   gemm_fp4_optimized_fp32acc   never sums in half; nor does the one above: the same arithmetic
//   gemm_fp4_optimized_decode    16 x 64 x 64, for few tokens
//   gemm_fp4_optimized_large_m   128 x 64 x 32, for many tokens: a decoded weight serves twice as many
// Grid: x covers N, y covers M, a tile a threadgroup; ops/marlin_gemm.py holds the numbers.
#include <metal_stdlib>
#include "core/gemm_kernel.h"
#include "core/instantiate.h"
#include "formats/weights.h"
using namespace metal;

#define ROWS(name, ...)                                                                                      \
    INSTANTIATE(name, marlin_gemm<Fp4<half>, half, __VA_ARGS__>)                                             \
    INSTANTIATE(name "__tbf16", marlin_gemm<Fp4<bfloat>, bfloat, __VA_ARGS__>)

typedef Tiled<32, 64, 64, 2, 1, 4> SomeTokens;
typedef Tiled<16, 64, 64, 2, 1, 4> Decode16;
typedef Tiled<128, 64, 32> LargeM;

ROWS("gemm_fp4_optimized", SomeTokens)
ROWS("gemm_fp4_optimized_fp32acc", SomeTokens)
ROWS("gemm_fp4_optimized_decode", Decode16)
ROWS("gemm_fp4_optimized_large_m", LargeM)
