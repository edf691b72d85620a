#pragma once
// INT8 and UINT8: bytes, four a word, the first in the lowest bits. Twins of metal_marlin/formats/int8.py and uint8.py.
#include <metal_stdlib>
using namespace metal;

// Two's complement.
struct INT8 {
    enum : uint { kBits = 8, kPerWord = 4 };
    static float value(uint code) { return float(char(uchar(code))); }
    static float2 pair(uint word, uint i) {
        return float2(value(word >> (8 * i)), value(word >> (8 * i + 16)));
    }
};

struct UINT8 {
    enum : uint { kBits = 8, kPerWord = 4 };
    static float value(uint code) { return float(code & 255); }
    static float2 pair(uint word, uint i) {
        return float2(value(word >> (8 * i)), value(word >> (8 * i + 16)));
    }
};
