#pragma once
// NF3: eight numbers, dense where a normal distribution is; codes lie as those of INT3. Twin of
// metal_marlin/formats/nf3.py.
#include <metal_stdlib>
using namespace metal;

struct NF3 {
    enum : uint { kBits = 3, kPerWord = 8 };
    // Choices, not a table: lanes that index memory differently wait for one another. The highest bit comes first: with
    // choices by the lowest bit inside, NVIDIA's assembler (CUDA 13.0, sm_90a) loses bits of codes that lie in two words.
    static float value(uint code) {
        if (code & 4) return code & 2 ? (code & 1 ? 1.0f : 0.6229857f) : (code & 1 ? 0.3819940f : 0.1833375f);
        return code & 2 ? (code & 1 ? 0.0f : -0.2469314f) : (code & 1 ? -0.5350227f : -1.0f);
    }
    static float2 pair(uint word, uint i) {
        return float2(value(word >> (3 * i)), value(word >> (3 * i + 12)));
    }
};
