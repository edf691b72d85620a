#pragma once
// Matrix-vector core: y[m, n] = sum over k of x[m, k] * w[n, k] for few tokens m, where w = scale * (value - zero) + bias
// is what formats/quantized.h says. Sums are float; y is rounded once. Every weight is read once for kTokens tokens.
//
//   x       T     [M, K]
//   codes   uint  [N, K * bits / 32]      words of memory, row-major; formats/code_words.h
//   scales  S     [N, ceil(K / group)]    group: 16, 32, 64, 128, ... or K
//   extra   E     zeros, biases, a factor; anything where the format has none
//   y       T     [M, N]
//
// Gemv<Q, T, kTokens, Epilogue> is the device's pipeline for Q = Quantized<Format, Scale, Extra>:
//   apple   gemv_simd.h: a simdgroup takes kRows rows, a lane 16 bytes of each at a time.
//   nvidia  mma for half and bfloat (weights are the left operand: 1 to 8 tokens cost the same), gemv_simd.h for float.
//   cpu     one lane: a threadgroup takes `rows` rows, 64 bytes a step in vector registers; 32 lanes: gemv_simd.h.
// Sources: own.
#include <metal_stdlib>
#include "core/constants.h"
#include "core/epilogue.h"
#include "core/input.h"
#include "core/matrices.h"
#include "formats/nf3.h" // for nvidia/operand.h: what is included under an #if is nowhere else
#include "formats/quantized.h"
using namespace metal;

struct GemvShape {
    long M, N, K;
    long group; // weights a scale stands for
    long rows;  // of a threadgroup (cpu with one lane)
    long
        aligned; // 16-byte loads are possible: of rows of codes and of x, which also start at multiples of 16 bytes
};

template <typename Q, typename T> struct GemvArguments {
    typedef typename Q::S S;
    typedef typename Q::Bound E;
    device const T* x;
    device const uint* codes;
    device const S* scales;
    device const E* extra;
    device T* y;
    uint M, N, K, groups, rows;
    uint shift; // weight k has scale k >> shift
    bool aligned;

    GemvArguments(device const T* x, device const uint* codes, device const S* scales, device const E* extra,
                  device T* y, constant GemvShape& shape)
        : x(x), codes(codes), scales(scales), extra(extra), y(y), M(uint(shape.M)), N(uint(shape.N)),
          K(uint(shape.K)), groups((uint(shape.K) + uint(shape.group) - 1) / uint(shape.group)),
          rows(uint(shape.rows)), shift(groups == 1 ? 31 : ctz(uint(shape.group))),
          aligned(shape.aligned != 0) {}

    typename Q::Row row(ulong n) const {
        return Q::row(scales, (device const typename Q::E*)extra, n, groups);
    }
    uint group(uint k) const { return min(k >> shift, groups - 1); }

    // As in GemmArguments.
    device const uint* codes_of(uint, uint n) const {
        return codes + min(n, N - 1) * ulong(CodeWords<typename Q::Format>::stored(K));
    }
    typename Q::Row row_of(uint, uint n) const { return row(min(n, N - 1)); }
};

// Where a thread stands; sgs: simdgroups of a threadgroup.
struct GemvPlace {
    uint3 tgid;
    uint sgid, lane, sgs;
};

#include "core/gemv_simd.h"

#include "core/apple/gemv.h"
#include "core/cpu/gemv.h"
#include "core/nvidia/gemv.h"
