// metal-marlin: lanes=any
// FP8 weights as numbers: y[n, k] = scale * value(code), rounded once to y's dtype. dequant_fp8_* is E4M3.
// Variants as in dequant.metal; _2d_kernel: a word a thread, the grid's x is the row.
#include <metal_stdlib>
#include "core/dequant_rows.h"
#include "formats/weights.h"
using namespace metal;

ROWS("dequant_fp8_kernel", "", "", DequantPlain, Fp8E4M3)
ROWS("dequant_fp8_aligned_kernel", "", "", DequantAligned, Fp8E4M3)
ROWS("dequant_fp8_2d_kernel", "", "", DequantPlainRows, Fp8E4M3)
ROWS("dequant_fp8_e5m2_kernel", "", "", DequantPlain, Fp8E5M2)
ROWS("dequant_fp8_e5m2_aligned_kernel", "", "", DequantAligned, Fp8E5M2)
ROWS("dequant_fp8_e4m3_bulk", "", "", Dequant, Fp8E4M3)
ROWS("dequant_fp8_e5m2_bulk", "", "", Dequant, Fp8E5M2)
INSTANTIATE("test_fp8_e4m3_all_codes", all_codes<FP8E4M3>)
INSTANTIATE("test_fp8_e5m2_all_codes", all_codes<FP8E5M2>)
