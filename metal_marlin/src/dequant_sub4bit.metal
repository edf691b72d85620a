// metal-marlin: lanes=any
// Weights of two and three bits as numbers: y[n, k] = scale * value(code), rounded once to y's dtype.
// What each thread does: core/dequant.h. Rows and keys as in dequant.metal.
#include <metal_stdlib>
#include "core/dequant_rows.h"
#include "formats/weights.h"
using namespace metal;

ROWS("dequant_int2_bulk", "", "", Dequant, Int2)
ROWS("dequant_int3_bulk", "", "", Dequant, Int3)
ROWS("dequant_nf3_bulk", "", "", Dequant, Nf3)

INSTANTIATE("test_int2_all_codes", all_codes<INT2>)
INSTANTIATE("test_int3_all_codes", all_codes<INT3>)
INSTANTIATE("test_nf3_all_codes", all_codes<NF3>)

// Words of eight codes, each with one scale; products are rounded once.
template <typename Format>
[[kernel]] void packed_scaled(device const uint* codes [[buffer(0)]], device const half* scales [[buffer(1)]],
                              device half* y [[buffer(2)]], uint i [[thread_position_in_grid]]) {
    const uint word = CodeWords<Format>::at(codes, i);
    for (uint j = 0; j < 8; ++j)
        y[8 * i + j] = half(float(scales[i]) * Format::value(word >> (Format::kBits * j)));
}
INSTANTIATE("test_int2_packed_scaled", packed_scaled<INT2>)
INSTANTIATE("test_int3_packed_scaled", packed_scaled<INT3>)
INSTANTIATE("test_nf3_packed_scaled", packed_scaled<NF3>)
