#pragma once
// Matrix-vector core: y[m, n] = sum over k of x[m, k] * scales[n, k / group] * decode(codes[n, k]), for few tokens m.
// Sums are float; y is rounded once. Every weight is read once for kTokens tokens.
//
//   x       T     [M, K]
//   codes   uint  [N, K / 8]              Format's words, row-major
//   scales  S     [N, ceil(K / group)]    group: 16, 32, 64, 128, ... or K
//   y       T     [M, N]
//
// Gemv<Format, T, S, kTokens> is the device's pipeline:
//   apple   gemv_simd.h: a simdgroup takes kRows rows, a lane 16 bytes of each at a time.
//   nvidia  mma for half and bfloat (weights are the left operand: 1 to 8 tokens cost the same), gemv_simd.h for float.
//   cpu     one lane: a threadgroup takes `rows` rows, 128 weights a step in vector registers; 32 lanes: gemv_simd.h.
// Sources: own.
#include <metal_stdlib>
#include "core/constants.h"
using namespace metal;

struct GemvShape {
    long M, N, K;
    long group; // weights a scale stands for
    long rows;  // of a threadgroup (cpu with one lane)
    long
        aligned; // 16-byte loads are possible: K is a multiple of 32, x and codes start at multiples of 16 bytes
};

template <typename T, typename S> struct GemvArguments {
    device const T* x;
    device const uint* codes;
    device const S* scales;
    device T* y;
    uint M, N, K, groups, rows;
    uint shift; // weight k has scale k >> shift
    bool aligned;

    GemvArguments(device const T* x, device const uint* codes, device const S* scales, device T* y,
                  constant GemvShape& shape)
        : x(x), codes(codes), scales(scales), y(y), M(uint(shape.M)), N(uint(shape.N)), K(uint(shape.K)),
          groups((uint(shape.K) + uint(shape.group) - 1) / uint(shape.group)), rows(uint(shape.rows)),
          shift(groups == 1 ? 31 : ctz(uint(shape.group))), aligned(shape.aligned != 0) {}
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
