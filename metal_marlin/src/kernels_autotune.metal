// metal-marlin: lanes=any
// Candidates of the tuner (metal-marlin tune): the tile pipeline of core/gemm_tile.h with other tiles.
//
// Rows: marlin_gemm_fp4_<tokens>x<rows of W>x<k>[__tbf16]; scales are as the activations. Arguments and meaning are those of
// marlin_gemm.metal. Grid: x covers N, y covers M, a tile a threadgroup; ops/marlin_gemm.py holds the numbers.
#include <metal_stdlib>
#include "core/gemm_kernel.h"
#include "core/instantiate.h"
#include "formats/weights.h"
using namespace metal;

#define ROWS(tokens, rows, depth, stages)                                                                    \
    INSTANTIATE("marlin_gemm_fp4_" #tokens "x" #rows "x" #depth,                                             \
                marlin_gemm<Fp4<half>, half, Tiled<tokens, rows, depth, stages>>)                            \
    INSTANTIATE("marlin_gemm_fp4_" #tokens "x" #rows "x" #depth "__tbf16",                                   \
                marlin_gemm<Fp4<bfloat>, bfloat, Tiled<tokens, rows, depth, stages>>)

ROWS(32, 32, 32, 2)
ROWS(64, 32, 32, 2)
ROWS(32, 64, 32, 2)
ROWS(64, 64, 16, 2)
ROWS(64, 64, 32, 2)
ROWS(64, 64, 64, 1) // two stages are more than an Apple GPU's 32 KB
ROWS(128, 64, 32, 2)
ROWS(64, 128, 32, 2)
ROWS(128, 128, 16, 2)
