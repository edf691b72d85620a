#pragma once
// INT4: codes 0 ... 15, eight a word, the first in the lowest bits. Twin of metal_marlin/formats/int4.py.
#include <metal_stdlib>
using namespace metal;

// The code itself: weights with a zero or a bias.
struct UINT4 {
    enum : uint { kBits = 4, kPerWord = 8 };
    static float value(uint code) { return float(code & 15); }
    static float2 pair(uint word, uint i) {
        return float2(float((word >> (4 * i)) & 15), float((word >> (4 * i + 16)) & 15));
    }
};

// The code less 8.
struct INT4 {
    enum : uint { kBits = 4, kPerWord = 8 };
    static float value(uint code) { return UINT4::value(code) - 8.0f; }
    static float2 pair(uint word, uint i) { return UINT4::pair(word, i) - 8.0f; }
};
