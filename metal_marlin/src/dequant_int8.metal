// metal-marlin: lanes=any
// Eight-bit integer weights as numbers: y[n, k] = scale * (code - zero) + bias, rounded once to y's dtype.
// Variants as in dequant.metal; _2d_kernel: a word a thread, the grid's x is the row.
#include <metal_stdlib>
#include "core/dequant_rows.h"
#include "formats/weights.h"
using namespace metal;

ROWS("dequant_int8_kernel", "", "", DequantPlain, Int8)
ROWS("dequant_int8_aligned_kernel", "", "", DequantAligned, Int8)
ROWS("dequant_int8_2d_kernel", "", "", DequantPlainRows, Int8)
ROWS("dequant_int8_bulk", "", "", Dequant, Int8)
ROWS("dequant_uint8_bulk", "__zpoint", "_zpoint", Dequant, Uint8Point)
ROWS("dequant_uint8_bulk", "__zpacked", "_zpacked", Dequant, Uint8Packed)
ROWS("dequant_uint8_bulk", "__zbias", "_zbias", Dequant, Uint8Bias)

// Every signed code with a scale, every unsigned one with scale and zero: a thread a code.
[[kernel]] void test_int8_symmetric(device const float* scale [[buffer(0)]], device float* y [[buffer(1)]],
                                    uint code [[thread_position_in_grid]]) {
    y[code] = scale[0] * INT8::value(code);
}
[[kernel]] void test_int8_asymmetric(device const float* scale_zero [[buffer(0)]],
                                     device float* y [[buffer(1)]], uint code [[thread_position_in_grid]]) {
    y[code] = scale_zero[0] * (UINT8::value(code) - scale_zero[1]);
}
INSTANTIATE("test_int8_all_values", all_codes<INT8>)
