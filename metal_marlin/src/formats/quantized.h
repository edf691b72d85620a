#pragma once
// A quantised weight: w = scale * (value(code) - zero) + bias, with one scale, zero and bias per group along K.
// Cores take Quantized<Format, Scale, Extra> as their weights policy. Twin of metal_marlin/formats/codec.py.
//
//   Format  what a code means: kBits, kPerWord, value(code), pair(word, i); see formats/fp4.h
//   Scale   how scales are stored: FloatScale<half | bfloat | float>, E8M0, E4M3
//   Extra   what the kernel's `extra` argument holds: NoExtra (anything, never read), TensorScale (float [1], a factor
//           of every scale), ZeroPoint<T> ([N, groups]), PackedZero<bits> (uint [N, ceil(groups * bits / 32)], least
//           significant first), Bias<T> ([N, groups])
#include <metal_stdlib>
#include "formats/code_words.h"
using namespace metal;

template <typename T> struct FloatScale {
    typedef T Stored;
    static float value(T stored) { return float(stored); }
};
// From its bits: of half(float(a half) * float(a bfloat)) clang makes a product of halves, and bfloats reach further.
template <> struct FloatScale<bfloat> {
    typedef bfloat Stored;
    static float value(bfloat stored) { return as_type<float>(uint(as_type<ushort>(stored)) << 16); }
};

// 2^(e - 127); 255 is NaN (OCP MX specification). 2^-127 is a subnormal float.
struct E8M0 {
    typedef uchar Stored;
    static float value(uchar e) {
        return as_type<float>(e == 0 ? 0x00400000u : e == 255 ? 0x7fc00000u : uint(e) << 23);
    }
};

// A byte of FP8 E4M3: placed where a half has its exponent and mantissa it is 2^8 too small.
struct E4M3 {
    typedef uchar Stored;
    static float value(uchar e) {
        const float v = float(as_type<half>(ushort((e & 0x80u) << 8 | (e & 0x7fu) << 7))) * 256.0f;
        return (e & 0x7fu) == 0x7fu ? as_type<float>(0x7fc00000u) : v;
    }
};

struct NoExtra {
    typedef uchar Stored;
    enum : bool { kFactor = false, kZero = false, kBias = false };
    static float at(device const Stored*, ulong, uint, uint) { return 0; }
};

struct TensorScale {
    typedef float Stored;
    enum : bool { kFactor = true, kZero = false, kBias = false };
    static float at(device const Stored*, ulong, uint, uint) { return 0; }
};

template <typename T> struct ZeroPoint {
    typedef T Stored;
    enum : bool { kFactor = false, kZero = true, kBias = false };
    static float at(device const T* extra, ulong n, uint g, uint groups) {
        return float(extra[n * groups + g]);
    }
};

template <uint kBits> struct PackedZero {
    typedef uint Stored;
    enum : bool { kFactor = false, kZero = true, kBias = false };
    enum : uint { kPerWord = 32 / kBits };
    static float at(device const uint* extra, ulong n, uint g, uint groups) {
        const uint word = extra[n * ((groups + kPerWord - 1) / kPerWord) + g / kPerWord];
        return float((word >> (g % kPerWord * kBits)) & ((1u << kBits) - 1));
    }
};

template <typename T> struct Bias {
    typedef T Stored;
    enum : bool { kFactor = false, kZero = false, kBias = true };
    static float at(device const T* extra, ulong n, uint g, uint groups) {
        return float(extra[n * groups + g]);
    }
};

template <typename Format_, typename Scale_, typename Extra_ = NoExtra> struct Quantized {
    typedef Format_ Format;
    typedef Scale_ Scale;
    typedef Extra_ Extra;
    typedef typename Scale_::Stored S;
    typedef typename Extra_::Stored E;
    enum : bool { kZero = Extra_::kZero, kBias = Extra_::kBias, kAffine = kZero || kBias };
    enum : uint { kMatrices = 1 }; // core/gated.h has two
    static float join(float sum, float) { return sum; }
    // What a kernel's extra argument points to: where it is never read, the host binds the scales once more.
    typedef conditional_t<(kAffine || Extra_::kFactor), E, S> Bound;

    // Group g of a row.
    struct Group {
        float scale, zero, bias; // zero and bias are 0 where the format has none
        float weight(float value) const { return scale * (value - zero) + bias; }
        float offset() const { return bias - scale * zero; } // w = scale * value + offset
    };

    // Row n of the scales and of what comes with them.
    struct Row {
        device const S* scales;
        device const E* extra;
        ulong n;
        uint groups;
        float factor;

        float scale(uint g) const { return Scale::value(scales[g]) * factor; }
        Group group(uint g) const {
            const float v = Extra::at(extra, n, g, groups);
            return Group{scale(g), kZero ? v : 0.0f, kBias ? v : 0.0f};
        }
    };

    static Row row(device const S* scales, device const E* extra, ulong n, uint groups) {
        return Row{scales + n * groups, extra, n, groups, Extra::kFactor ? float(extra[0]) : 1.0f};
    }
};

// Codes of formats with zeros or biases are unsigned. Their sums are taken of value - kMiddle, which is small and exact,
// and what is left of the offset is small too: less is lost when the two are added.
template <typename Q> struct Middle {
    static constexpr constant float value = Q::kAffine ? float(1 << (Q::Format::kBits - 1)) : 0.0f;
    static float offset(typename Q::Group g) { return g.bias + g.scale * (value - g.zero); }
};
