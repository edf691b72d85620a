#pragma once
// INT3: codes 0 ... 7 less 3.5, 32 in three words of memory, the first in the lowest bits. Twin of
// metal_marlin/formats/int3.py.
#include <metal_stdlib>
using namespace metal;

struct INT3 {
    enum : uint { kBits = 3, kPerWord = 8 };
    static float value(uint code) { return float(code & 7) - 3.5f; }
    static float2 pair(uint word, uint i) {
        return float2(value(word >> (3 * i)), value(word >> (3 * i + 12)));
    }
};
