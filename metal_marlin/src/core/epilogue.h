#pragma once
// What becomes of sums before they are rounded: v' = act(v + bias[n]), then v' itself, other[m, n] + scale * v' (a residual),
// or v' * other[m, n] (a gated product, whose other half was multiplied before).
#include <metal_stdlib>
#include "policies/activations.h"
using namespace metal;

struct NoEpilogue {
    float apply(float value, uint, uint) const { return value; }
};

enum Join : uint { kAlone, kResidual, kGate };

struct EpilogueShape {
    long act;  // in the order of ops/epilogue.py
    long bias; // there is one
    long join;
};

// What an epilogue reads: bias [N], other [M, N].
template <typename T> struct EpilogueArguments {
    device const T* bias;
    device const T* other;
    uint N;
    float scale;
};

struct Identity {
    static float of(float x) { return x; }
};

// Fixed at compile time.
template <typename T, typename Act, bool kBias, Join kJoin> struct FixedEpilogue {
    EpilogueArguments<T> a;
    FixedEpilogue(EpilogueArguments<T> a) : a(a) {}
    FixedEpilogue(EpilogueArguments<T> a, constant EpilogueShape&) : a(a) {}
    float apply(float value, uint m, uint n) const {
        const float v = Act::of(kBias ? value + float(a.bias[n]) : value);
        if (kJoin == kAlone) return v;
        const float other = float(a.other[ulong(m) * a.N + n]);
        return kJoin == kGate ? v * other : other + a.scale * v;
    }
};

// Chosen by the arguments.
template <typename T> struct AnyEpilogue {
    EpilogueArguments<T> a;
    uint act, join;
    bool bias;
    AnyEpilogue(EpilogueArguments<T> a, constant EpilogueShape& shape)
        : a(a), act(uint(shape.act)), join(uint(shape.join)), bias(shape.bias != 0) {}
    float apply(float value, uint m, uint n) const {
        if (bias) value += float(a.bias[n]);
        switch (act) {
        case 1:
            value = Silu::of(value);
            break;
        case 2:
            value = Gelu::of(value);
            break;
        case 3:
            value = GeluTanh::of(value);
            break;
        case 4:
            value = QuickGelu::of(value);
            break;
        case 5:
            value = Relu::of(value);
            break;
        }
        if (join == kAlone) return value;
        const float other = float(a.other[ulong(m) * a.N + n]);
        return join == kGate ? value * other : other + a.scale * value;
    }
};
