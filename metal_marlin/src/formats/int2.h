#pragma once
// INT2: codes 0 ... 3 less 1.5, sixteen a word of memory, the first in the lowest bits. Twin of
// metal_marlin/formats/int2.py.
#include <metal_stdlib>
using namespace metal;

struct INT2 {
    enum : uint { kBits = 2, kPerWord = 8 };
    static float value(uint code) { return float(code & 3) - 1.5f; }
    static float2 pair(uint word, uint i) {
        return float2(value(word >> (2 * i)), value(word >> (2 * i + 8)));
    }
};
