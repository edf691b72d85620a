// Products with 2:4 sparse weights in operand order (core/packed.h): on NVIDIA GPUs of compute capability 9.0 by the sparse
// matrix instructions, which take two of every four weights and multiply at twice the rate; on other devices the same
// numbers by plain code.
//
// Rows: packed_sparse_<format>__[t<activations>_]m<rows of W>x<tokens>[x<threadgroups that share K>]; scales are as the
// activations or of the format's own type, activations half by default. Groups of 32 or more.
// Grid: x covers N, y covers M, z the parts of K; ops/packed_tiles.py holds the numbers.
#include <metal_stdlib>
#include "core/instantiate.h"
#include "core/packed.h"
#include "formats/weights.h"
using namespace metal;

// The bound lets assemblers give a thread as many registers as so many threads leave it.
#define ENTRY(threads)                                                                                       \
    template <typename W, typename T, typename Schedule>                                                     \
    [[kernel, max_total_threads_per_threadgroup(threads)]] void packed_sparse_##threads(                     \
        device const T* x [[buffer(0)]], device const uint* codes [[buffer(1)]],                             \
        device const uint* places [[buffer(2)]], device const typename W::S* scales [[buffer(3)]],           \
        device const float* powers [[buffer(4)]], device T* y [[buffer(5)]],                                 \
        constant GemmShape& shape [[buffer(6)]], constant SparsePackedMaps& maps [[buffer(7)]],              \
        uint3 tgid [[threadgroup_position_in_grid]], uint3 grid [[threadgroups_per_grid]],                   \
        uint sgid [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {             \
        typedef PackedGemm<W, T, Schedule, NoEpilogue> Core;                                                 \
        threadgroup typename Core::Shared sh;                                                                \
        Core::run(PackedArguments<W, T>(x, codes, scales, (device const typename W::Bound*)scales, powers,   \
                                        places, y, shape),                                                   \
                  TileWalk<Schedule>(shape, tgid, grid), GemmPlace{tgid, sgid, lane}, sh, NoEpilogue());     \
    }
ENTRY(160)
ENTRY(288)
ENTRY(384)

// size: rows x tokens x parts; depth, ahead, along N, along K
#define TILE(name, size, rows, tokens, parts, depth, ahead, n, k, few, threads, W, T)                        \
    INSTANTIATE(name "m" size,                                                                               \
                packed_sparse_##threads<Sparse<W, 2, 4>, T,                                                  \
                                        PackedTile<rows, tokens, parts, depth, ahead, n, k, few, threads>>)
#define TILES(name, W, T)                                                                                    \
    TILE(name, "32x8", 32, 8, 1, 512, 8, 1, 8, true, 288, W, T)                                              \
    TILE(name, "64x8", 64, 8, 1, 512, 5, 1, 8, true, 288, W, T)                                              \
    TILE(name, "32x16", 32, 16, 1, 512, 7, 1, 8, true, 288, W, T)                                            \
    TILE(name, "64x16", 64, 16, 1, 256, 7, 2, 4, true, 288, W, T)                                            \
    TILE(name, "32x32", 32, 32, 1, 256, 8, 1, 4, true, 160, W, T)                                            \
    TILE(name, "32x32x2", 32, 32, 2, 256, 4, 1, 4, true, 160, W, T)                                          \
    TILE(name, "64x32", 64, 32, 1, 128, 8, 1, 1, false, 160, W, T)                                           \
    TILE(name, "64x64", 64, 64, 1, 128, 5, 1, 1, false, 160, W, T)                                           \
    TILE(name, "64x64x2", 64, 64, 2, 256, 4, 1, 2, false, 288, W, T)                                         \
    TILE(name, "64x128x2", 64, 128, 2, 256, 3, 1, 2, false, 288, W, T)                                       \
    TILE(name, "128x128", 128, 128, 1, 128, 5, 2, 1, false, 384, W, T)                                       \
    TILE(name, "64x256", 64, 256, 1, 128, 3, 1, 1, false, 160, W, T)                                         \
    TILE(name, "128x256", 128, 256, 1, 128, 3, 2, 1, false, 384, W, T)
#define ROWS(name, W)                                                                                        \
    TILES(name "__", W<half>, half)                                                                          \
    TILES(name "__tbf16_", W<bfloat>, bfloat)

ROWS("packed_sparse_fp4", Fp4)
TILES("packed_sparse_mxfp4__", Mxfp4, half)
TILES("packed_sparse_mxfp4__tbf16_", Mxfp4, bfloat)
ROWS("packed_sparse_int4", Int4)
