#pragma once
// FP4 (E2M1, OCP MX specification): sign, two exponent bits, one mantissa bit; 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their
// negatives. Eight codes a word, the first in the lowest bits. Twin of metal_marlin/formats/fp4.py.
#include <metal_stdlib>
using namespace metal;

struct FP4 {
    enum : uint { kBits = 4, kPerWord = 8 };

    // The bits of half numbers 2^14 too small: exponent and mantissa of a code stand where a half has its lowest
    // exponent bits and highest mantissa bit, so that code 1 is a subnormal. Codes i and i + 4 of a word.
    static half2 scaled_pair(uint word, uint i) {
        const uint t = word << (12 - 4 * i);
        return as_type<half2>((t & 0x80008000u) | ((t >> 3) & 0x0e000e00u));
    }
    enum : uint { kScaledBy = 14 }; // scaled_pair holds values * 2^-14

    // All four pairs of a word, as bits: shifts and masks are shared by codes 1, 3, 5, 7 and by 0, 2, 4, 6.
    static void scaled_pairs(uint word, thread uint (&pairs)[4]) {
        const uint odd = (word & 0x80808080u) | ((word >> 3) & 0x7f7f7f7fu);
        const uint even = ((word << 4) & 0x80808080u) | ((word << 1) & 0x7f7f7f7fu);
        pairs[0] = (even << 8) & 0x8e008e00u;
        pairs[1] = (odd << 8) & 0x8e008e00u;
        pairs[2] = even & 0x8e008e00u;
        pairs[3] = odd & 0x8e008e00u;
    }

    // The same for bfloat, whose exponent has three bits more: values * 2^-126.
    static void scaled_bfloat_pairs(uint word, thread uint (&pairs)[4]) {
        for (uint i = 0; i < 4; ++i) {
            const uint t = word << (12 - 4 * i);
            pairs[i] = (t & 0x80008000u) | ((t >> 6) & 0x01c001c0u);
        }
    }

    static float2 pair(uint word, uint i) { return float2(scaled_pair(word, i)) * 16384.0f; }

    static float value(uint code) { return pair(code, 0).x; }
};
