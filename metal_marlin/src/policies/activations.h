#pragma once
// Activation functions on floats, as PyTorch defines them.
#include <metal_stdlib>
using namespace metal;

struct Silu {
    static float of(float x) { return x / (1.0f + exp(-x)); }
};
// x * Phi(x). MSL has no erf: below 1 a polynomial, beyond exp(-z^2) times one in 1 / (1 + z / 2), own least-squares
// fits to 30 digits; erf within 1.5e-7, erfc within 2.1e-6 of itself.
struct Gelu {
    static float erfc(float z) { // z >= 0
        const float u = z * z, t = 1.0f / (1.0f + 0.5f * z);
        float near = -9.673591193859465e-06f;
        near = fma(near, u, 0.00011268253729213029f);
        near = fma(near, u, -0.0008484396385028958f);
        near = fma(near, u, 0.005221053492277861f);
        near = fma(near, u, -0.026865437626838684f);
        near = fma(near, u, 0.11283782869577408f);
        near = fma(near, u, -0.37612637877464294f);
        near = fma(near, u, 1.128379225730896f);
        float far = -0.06355845183134079f;
        far = fma(far, t, 0.31204256415367126f);
        far = fma(far, t, -0.5496821403503418f);
        far = fma(far, t, 0.35204124450683594f);
        far = fma(far, t, -0.07807070016860962f);
        far = fma(far, t, 0.224693164229393f);
        far = fma(far, t, 0.2372930943965912f);
        far = fma(far, t, 0.2832891345024109f);
        far = fma(far, t, 0.2820087969303131f);
        far = fma(far, t, 2.708369493120699e-06f);
        return z < 1.0f ? 1.0f - z * near : exp(-u) * far;
    }
    static float of(float x) {
        const float half_tail = 0.5f * erfc(fabs(x) * 0.70710678f);
        return x * (x < 0 ? half_tail : 1.0f - half_tail);
    }
};
struct GeluTanh {
    static float of(float x) { return 0.5f * x * (1.0f + tanh(0.79788456f * (x + 0.044715f * x * x * x))); }
};
struct QuickGelu {
    static float of(float x) { return x / (1.0f + exp(-1.702f * x)); }
};
struct Relu {
    static float of(float x) { return x > 0 ? x : x != x ? x : 0.0f; }
};
