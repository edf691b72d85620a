// metal-marlin: lanes=any
// Weights of four-bit formats as numbers: y[n, k] = scale * (value(code) - zero) + bias, rounded once to y's dtype.
// What each thread does: core/dequant.h. Grid and sizes: ops/dequantize.py.
//
// Rows: dequant_<format>_<variant>[__t<y>_s<scales>_z<zeros>]; y and scales are half by default.
//   _kernel             a word a thread                    _aligned_kernel   the words of a 16-byte store a thread
//   _bulk               the device's own, any size         _optimal_rowmajor  aligned, the grid's x is the row
//   _optimal, _simdgroup_optimal, _bandwidth_max           a simdgroup takes a run, 2, 8 or 16 stores a lane, coalesced
// On an H200 threads that take several words in turn, whose stores lie apart, reached a third of these.
#include <metal_stdlib>
#include "core/dequant_rows.h"
#include "formats/weights.h"
using namespace metal;

#define INT4_ROWS(name, Core)                                                                                \
    ROWS(name, "", "", Core, Int4)                                                                           \
    ROWS(name, "__zpoint", "_zpoint", Core, Int4Point)                                                       \
    ROWS(name, "__zpacked", "_zpacked", Core, Int4Packed)                                                    \
    ROWS(name, "__zbias", "_zbias", Core, Int4Bias)

ROWS("dequant_fp4_kernel", "", "", DequantPlain, Fp4)
ROWS("dequant_fp4_aligned_kernel", "", "", DequantAligned, Fp4)
ROWS("dequant_fp4_bulk", "", "", Dequant, Fp4)
ROWS("dequant_fp4_optimal", "", "", DequantRunTwo, Fp4)
ROWS("dequant_fp4_optimal_rowmajor", "", "", DequantAlignedRows, Fp4)
ROWS("dequant_fp4_simdgroup_optimal", "", "", DequantRunEight, Fp4)
ROWS("dequant_fp4_bandwidth_max", "", "", DequantRunSixteen, Fp4)
INT4_ROWS("dequant_int4_kernel", DequantPlain)
INT4_ROWS("dequant_int4_aligned_kernel", DequantAligned)
INT4_ROWS("dequant_int4_bulk", Dequant)
ROWS_T("dequant_mxfp4_bulk", Dequant, Mxfp4)
ROWS_T("dequant_nvfp4_bulk", Dequant, Nvfp4)

// All four pairs of a word at once; half numbers.
[[kernel]] void test_fp4_vectorized(device const uint* words [[buffer(0)]], device half* y [[buffer(1)]],
                                    uint i [[thread_position_in_grid]]) {
    uint pairs[4];
    FP4::scaled_pairs(words[i], pairs);
    for (uint j = 0; j < 4; ++j) {
        const half2 v = as_type<half2>(pairs[j]) * half(16384);
        y[8 * i + j] = v.x, y[8 * i + j + 4] = v.y;
    }
}

// A word with one scale, each product rounded once.
[[kernel]] void test_fp4_packed_scaled(device const uint* words [[buffer(0)]],
                                       device const half* scales [[buffer(1)]], device half* y [[buffer(2)]],
                                       uint i [[thread_position_in_grid]]) {
    for (uint j = 0; j < 8; ++j) y[8 * i + j] = half(float(scales[i]) * FP4::value(words[i] >> (4 * j)));
}

// A tile's row of 64 numbers, decoded into threadgroup memory by 8 threads, each written out from another's part.
[[kernel]] void test_fp4_tile_row(device const uint* words [[buffer(0)]], device half* y [[buffer(1)]],
                                  uint row [[threadgroup_position_in_grid]],
                                  uint i [[thread_index_in_threadgroup]]) {
    threadgroup half tile[64];
    for (uint j = 0; j < 8; ++j) tile[8 * i + j] = half(FP4::value(words[8 * row + i] >> (4 * j)));
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint j = 0; j < 8; ++j) y[64 * row + 8 * j + i] = tile[8 * j + i];
}

INSTANTIATE("test_fp4_all_codes", all_codes<FP4>)
INSTANTIATE("test_u4_all_codes", all_codes<UINT4>)
