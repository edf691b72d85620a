// Products with quantised weights in operand order (core/packed.h): what a product is on NVIDIA GPUs of compute capability
// 9.0, for any number of tokens; on other devices the same numbers by plain code.
//
// Rows: packed_gemm_<format>__[t<activations>_][z<zeros>_]m<rows of W>x<tokens>[x<threadgroups that share K>][d]; scales are
// as the activations or of the format's own type, activations half by default. 32x8d has twice the stages ahead, for long K.
// Grid: x covers N, y covers M, z the parts of K; ops/packed_tiles.py holds the numbers.
#include <metal_stdlib>
#include "core/instantiate.h"
#include "core/packed.h"
#include "formats/weights.h"
using namespace metal;

// The bound lets assemblers give a thread as many registers as so many threads leave it.
#define ENTRY(threads)                                                                                       \
    template <typename W, typename T, typename Schedule>                                                     \
    [[kernel, max_total_threads_per_threadgroup(threads)]] void packed_gemm_##threads(                       \
        device const T* x [[buffer(0)]], device const uint* codes [[buffer(1)]],                             \
        device const typename W::S* scales [[buffer(2)]],                                                    \
        device const typename W::Bound* extra [[buffer(3)]], device const float* powers [[buffer(4)]],       \
        device T* y [[buffer(5)]], constant GemmShape& shape [[buffer(6)]],                                  \
        constant PackedMaps& maps [[buffer(7)]], uint3 tgid [[threadgroup_position_in_grid]],                \
        uint3 grid [[threadgroups_per_grid]], uint sgid [[simdgroup_index_in_threadgroup]],                  \
        uint lane [[thread_index_in_simdgroup]]) {                                                           \
        typedef PackedGemm<W, T, Schedule, NoEpilogue> Core;                                                 \
        threadgroup typename Core::Shared sh;                                                                \
        Core::run(PackedArguments<W, T>(x, codes, scales, extra, powers, nullptr, y, shape),                 \
                  TileWalk<Schedule>(shape, tgid, grid), GemmPlace{tgid, sgid, lane}, sh, NoEpilogue());     \
    }
ENTRY(160)
ENTRY(288)
ENTRY(384)

// size: rows x tokens x parts; depth, ahead, along N, along K
#define TILE(name, size, rows, tokens, parts, depth, ahead, n, k, few, threads, W, T)                        \
    INSTANTIATE(                                                                                             \
        name "m" size,                                                                                       \
        packed_gemm_##threads<W, T, PackedTile<rows, tokens, parts, depth, ahead, n, k, few, threads>>)
#define TILES(name, W, T)                                                                                    \
    TILE(name, "32x8", 32, 8, 1, 512, 6, 1, 8, true, 288, W, T)                                              \
    TILE(name, "32x8d", 32, 8, 1, 512, 12, 1, 8, true, 288, W, T)                                            \
    TILE(name, "64x8", 64, 8, 1, 512, 4, 1, 8, true, 288, W, T)                                              \
    TILE(name, "32x16", 32, 16, 1, 512, 7, 1, 8, true, 288, W, T)                                            \
    TILE(name, "112x8", 112, 8, 1, 512, 6, 1, 8, true, 288, W, T)                                            \
    TILE(name, "64x16", 64, 16, 1, 512, 3, 2, 4, true, 288, W, T)                                            \
    TILE(name, "32x32", 32, 32, 1, 256, 6, 1, 4, true, 160, W, T)                                            \
    TILE(name, "32x32x2", 32, 32, 2, 256, 5, 1, 4, true, 160, W, T)                                          \
    TILE(name, "64x32", 64, 32, 1, 128, 6, 1, 1, false, 160, W, T)                                           \
    TILE(name, "64x64", 64, 64, 1, 128, 4, 1, 1, false, 160, W, T)                                           \
    TILE(name, "64x64x2", 64, 64, 2, 256, 4, 1, 2, false, 288, W, T)                                         \
    TILE(name, "64x128x2", 64, 128, 2, 256, 3, 1, 2, false, 288, W, T)                                       \
    TILE(name, "128x128", 128, 128, 1, 128, 4, 2, 1, false, 384, W, T)                                       \
    TILE(name, "64x256", 64, 256, 1, 128, 3, 1, 1, false, 160, W, T)                                         \
    TILE(name, "128x256", 128, 256, 1, 128, 3, 2, 1, false, 384, W, T)
#define ROWS(name, W, z)                                                                                     \
    TILES(name "__" z, W<half>, half)                                                                        \
    TILES(name "__tbf16_" z, W<bfloat>, bfloat)
#define ROWS_OWN(name, W)                                                                                    \
    TILES(name "__", W, half)                                                                                \
    TILES(name "__tbf16_", W, bfloat)

ROWS("packed_gemm_fp4", Fp4, "")
ROWS_OWN("packed_gemm_mxfp4", Mxfp4)
ROWS_OWN("packed_gemm_nvfp4", Nvfp4)
ROWS("packed_gemm_int4", Int4, "")
ROWS("packed_gemm_int4", Int4Point, "zpoint_")
ROWS("packed_gemm_int4", Int4Bias, "zbias_")
ROWS("packed_gemm_int8", Int8, "")
ROWS("packed_gemm_uint8", Uint8Point, "zpoint_")
ROWS("packed_gemm_uint8", Uint8Bias, "zbias_")
ROWS("packed_gemm_fp8_e4m3", Fp8E4M3, "")
ROWS("packed_gemm_fp8_e5m2", Fp8E5M2, "")
ROWS("packed_gemm_int2", Int2, "")
ROWS("packed_gemm_int3", Int3, "")
ROWS("packed_gemm_nf3", Nf3, "")
