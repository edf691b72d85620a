#pragma once
// FP8, four codes a word, the first in the lowest bits. Twins of metal_marlin/formats/fp8_e4m3.py and fp8_e5m2.py.
#include <metal_stdlib>
using namespace metal;

// OCP "fn": 448 at most, S.1111.111 is NaN. Where a half has its exponent and mantissa the bits are 2^8 too small.
struct FP8E4M3 {
    enum : uint { kBits = 8, kPerWord = 4 };
    static float value(uint code) {
        const half scaled = as_type<half>(ushort((code & 0x80u) << 8 | (code & 0x7fu) << 7));
        return (code & 0x7fu) == 0x7fu ? NAN : float(scaled) * 256.0f;
    }
    static float2 pair(uint word, uint i) {
        return float2(value(word >> (8 * i)), value(word >> (8 * i + 16)));
    }
};

// IEEE: a half without its last eight bits.
struct FP8E5M2 {
    enum : uint { kBits = 8, kPerWord = 4 };
    static float value(uint code) { return float(as_type<half>(ushort((code & 0xffu) << 8))); }
    static float2 pair(uint word, uint i) {
        return float2(value(word >> (8 * i)), value(word >> (8 * i + 16)));
    }
};
