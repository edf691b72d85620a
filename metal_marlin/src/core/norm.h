#pragma once
// RMSNorm: y = (x / sqrt(mean(x^2) + eps)) * (weight + offset). With offset 0 the normalised x is rounded to T before the
// weight multiplies it, as the Llama family does; with another (Gemma: 1) there is one rounding.
//
// NormedInput is an input of a product (core/input.h): x is normalised where it is read, so that what is multiplied is
// what rms_norm stores. Its factors, 1 / sqrt(mean + eps) of each token, a threadgroup makes first, for its own tokens.
// Source: arXiv 1910.07467.
#include <metal_stdlib>
#include "core/input.h"
#include "core/reduce.h"
using namespace metal;

struct NormNumbers {
    float eps, offset;
};

template <typename T> static inline T rms_scaled(float x, float factor, float weight, float offset) {
    return offset == 0 ? T(float(T(x * factor)) * weight) : T(x * factor * (weight + offset));
}

template <uint kSimdgroups, uint kTokens> struct NormShared {
    float parts[kSimdgroups][kTokens]; // sums of squares, then factors in the first row
};

template <typename T> struct NormedInput {
    enum : bool { kPlain = false };
    device const T* weight;
    threadgroup const float* factors; // of tokens first, first + 1 ...
    uint first, K;
    float offset;
    bool aligned; // weight starts at a multiple of 16 bytes

    struct Row {
        device const T* weight;
        float factor, offset;
        float at(float x, uint k) const { return float(rms_scaled<T>(x, factor, float(weight[k]), offset)); }
    };
    Row row(uint token) const { return Row{weight, factors[token - first], offset}; }

    static float low(uint two) { return float(as_type<T>(ushort(two & 0xffffu))); }
    static float high(uint two) { return float(as_type<T>(ushort(two >> 16))); }
    static uint join(T a, T b) { return uint(as_type<ushort>(a)) | uint(as_type<ushort>(b)) << 16; }

    // Numbers k ... k + 7 of a token; 0 behind the end.
    uint4 eight(uint4 x, uint token, uint k) const {
        if (k >= K) return x;
        const float factor = factors[token - first];
        uint4 w;
        if (aligned) {
            w = *(device const uint4*)(weight + k);
        } else {
#pragma unroll
            for (uint i = 0; i < 4; ++i) w[i] = join(weight[k + 2 * i], weight[k + 2 * i + 1]);
        }
#pragma unroll
        for (uint i = 0; i < 4; ++i) {
            x[i] = join(rms_scaled<T>(low(x[i]), factor, low(w[i]), offset),
                        rms_scaled<T>(high(x[i]), factor, high(w[i]), offset));
        }
        return x;
    }

    // The input for `tokens` of x [M, K], K a multiple of 8, from `first` on. Every thread of the threadgroup comes here.
    template <uint kSimdgroups, uint kTokens>
    static NormedInput of(device const T* x, device const T* weight, uint first, uint tokens, uint K,
                          bool aligned, constant NormNumbers& numbers, ReducePlace at,
                          threadgroup NormShared<kSimdgroups, kTokens>& sh) {
        for (uint m = 0; m < tokens; ++m) {
            const float own = squares(x + ulong(first + m) * K, K, aligned, at);
            simdgroup_barrier(mem_flags::mem_none); // lanes left its loops at different times
            const float part = simd_sum(own);
            if (at.lane == 0) sh.parts[at.sgid][m] = part;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint m = at.first(); m < kTokens; m += at.stride()) {
            float sum = 0;
            for (uint s = 0; s < at.sgs && m < tokens; ++s) sum += sh.parts[s][m];
            sh.parts[0][m] = precise::rsqrt(sum / float(K) + numbers.eps);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        return NormedInput{weight, sh.parts[0], first, K, numbers.offset, aligned};
    }

    static float squares(device const T* x, uint K, bool aligned, ReducePlace at) {
        float sum = 0;
        if (kSimdWidth == 1 || !aligned) {
            for (uint i = at.first(); i < K; i += at.stride()) sum += float(x[i]) * float(x[i]);
            return sum;
        }
        for (uint i = 8 * at.first(); i < K; i += 8 * at.stride()) {
            const uint4 v = *(device const uint4*)(x + i);
#pragma unroll
            for (uint j = 0; j < 4; ++j) sum += low(v[j]) * low(v[j]) + high(v[j]) * high(v[j]);
        }
        return sum;
    }
};
