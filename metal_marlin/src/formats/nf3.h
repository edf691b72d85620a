#pragma once
// NF3: eight numbers, dense where a normal distribution is; codes lie as those of INT3. Twin of
// metal_marlin/formats/nf3.py.
#include <metal_stdlib>
using namespace metal;

struct NF3 {
    enum : uint { kBits = 3, kPerWord = 8 };
    // Choices, not a table: lanes that index memory differently wait for one another.
    static float value(uint code) {
        const float a = code & 1 ? -0.5350227f : -1.0f, b = code & 1 ? 0.0f : -0.2469314f;
        const float c = code & 1 ? 0.3819940f : 0.1833375f, d = code & 1 ? 1.0f : 0.6229857f;
        const float low = code & 2 ? b : a, high = code & 2 ? d : c;
        return code & 4 ? high : low;
    }
    static float2 pair(uint word, uint i) {
        return float2(value(word >> (3 * i)), value(word >> (3 * i + 12)));
    }
};
