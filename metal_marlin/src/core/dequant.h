#pragma once
// Dequantise core: y[n, k] = scale * (value - zero) + bias of formats/quantized.h, worked out in float, rounded once.
//
//   codes   uint  [N, words of memory]  y  T  [N, K]
//   scales  S     [N, ceil(K / group)]  extra  as the format says
//
// What a thread does is a Core:
//   DequantEach<kWords, kWide>   kWords words of codes next to one another; kWide: 16-byte loads (of 4 words) and stores
//   DequantRows<kWords, kWide>   the same, the grid's x is the row: no division, one row of scales a threadgroup
//   DequantRun<kTurns>           a simdgroup takes a run of words, its lanes neighbours: loads and stores coalesce
//   Dequant                      the device's own: cpu with one lane whole rows in vector registers, else DequantRun
// Sources: own.
#include <metal_stdlib>
#include "core/constants.h"
#include "formats/quantized.h"
using namespace metal;

struct DequantShape {
    long N, K;
    long group;   // weights a scale stands for
    long rows;    // of a threadgroup (cpu with one lane)
    long aligned; // 16-byte loads and stores are possible
    long stream;  // y is larger than caches: do not read it into them (cpu)
};

template <typename Q, typename T> struct DequantArguments {
    typedef typename Q::S S;
    typedef typename Q::Bound E;
    device const uint* codes;
    device const S* scales;
    device const E* extra;
    device T* y;
    uint N, K, words, groups, rows;
    uint shift; // weight k has scale k >> shift
    bool aligned, stream;

    DequantArguments(device const uint* codes, device const S* scales, device const E* extra, device T* y,
                     constant DequantShape& shape)
        : codes(codes), scales(scales), extra(extra), y(y), N(uint(shape.N)), K(uint(shape.K)),
          words(uint(shape.K) / Q::Format::kPerWord),
          groups((uint(shape.K) + uint(shape.group) - 1) / uint(shape.group)), rows(uint(shape.rows)),
          shift(groups == 1 ? 31 : ctz(uint(shape.group))), aligned(shape.aligned != 0),
          stream(shape.stream != 0) {}

    typename Q::Row row(ulong n) const {
        return Q::row(scales, (device const typename Q::E*)extra, n, groups);
    }
};

// tid: in the grid; column: in the grid's y; sg: simdgroup in the grid's x.
struct DequantPlace {
    uint3 tgid;
    uint tid, column, sg, lane;
};

static inline uint4 dequant_bits(thread const float* v) {
    return as_type<uint4>(float4(v[0], v[1], v[2], v[3]));
}
static inline uint4 dequant_bits(thread const half* v) {
    return uint4(as_type<uint>(half2(v[0], v[1])), as_type<uint>(half2(v[2], v[3])),
                 as_type<uint>(half2(v[4], v[5])), as_type<uint>(half2(v[6], v[7])));
}
static inline uint4 dequant_bits(thread const bfloat* v) {
    return uint4(as_type<uint>(bfloat2(v[0], v[1])), as_type<uint>(bfloat2(v[2], v[3])),
                 as_type<uint>(bfloat2(v[4], v[5])), as_type<uint>(bfloat2(v[6], v[7])));
}

// kWords words of a row; they may lie in several groups.
template <typename Q, typename T, uint kWords, bool kWide> struct DequantWords {
    typedef typename Q::Format Format;
    typedef CodeWords<Format> Memory;
    enum : uint { kPerWord = Format::kPerWord, kSize = kWords * kPerWord, kEach = 16 / sizeof(T) };
    uint words[kWords];

    // Words first, first + 1 ... of a matrix, whose rows follow one another without a gap.
    void load(device const uint* codes, ulong first) {
        if (Memory::kSize != 32) {
            for (uint i = 0; i < kWords; ++i) words[i] = Memory::at(codes, uint(first) + i);
            return;
        }
        device const uint* from = codes + first;
        if (kWide && kWords % 4 == 0) {
            for (uint i = 0; i + 3 < kWords; i += 4) {
                const uint4 v = *(device const uint4*)(from + i);
                words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w;
            }
        } else if (kWide && kWords == 2) {
            const uint2 v = *(device const uint2*)from;
            words[0] = v.x, words[kWords - 1] = v.y;
        } else {
            for (uint i = 0; i < kWords; ++i) words[i] = from[i];
        }
    }

    void store(thread const DequantArguments<Q, T>& a, typename Q::Row row, uint k, device T* to) const {
        T values[kSize];
        typename Q::Group group = row.group(k >> a.shift);
        for (uint w = 0; w < kWords; ++w) {
            const uint at = w * kPerWord;
            if (w != 0 && (k + at) >> a.shift != (k + at - 1) >> a.shift)
                group = row.group((k + at) >> a.shift);
            for (uint i = 0; i < kPerWord / 2; ++i) {
                const float2 v = Format::pair(words[w], i);
                values[at + i] = T(group.weight(v.x));
                values[at + i + kPerWord / 2] = T(group.weight(v.y));
            }
        }
        if (kWide) {
            for (uint i = 0; i + kEach <= kSize; i += kEach)
                *(device uint4*)(to + i) = dequant_bits(values + i);
        } else {
            for (uint i = 0; i < kSize; ++i) to[i] = values[i];
        }
    }
};

// Words that fill a 16-byte store.
template <typename Q, typename T> struct DequantUnit {
    enum : uint { kBytes = Q::Format::kPerWord * sizeof(T), kWords = kBytes < 16 ? 16 / kBytes : 1 };
};

template <typename Q, typename T, uint kWords, bool kWide> struct DequantEach {
    static void run(DequantArguments<Q, T> a, DequantPlace at) {
        const uint each = a.words / kWords, n = at.tid / each, w = (at.tid - n * each) * kWords;
        if (n >= a.N) return;
        DequantWords<Q, T, kWords, kWide> part;
        part.load(a.codes, ulong(n) * a.words + w);
        const uint k = w * Q::Format::kPerWord;
        part.store(a, a.row(n), k, a.y + ulong(n) * a.K + k);
    }
};

template <typename Q, typename T, uint kWords, bool kWide> struct DequantRows {
    static void run(DequantArguments<Q, T> a, DequantPlace at) {
        const uint n = at.tgid.x, w = at.column * kWords, k = w * Q::Format::kPerWord;
        if (w >= a.words) return;
        DequantWords<Q, T, kWords, kWide> part;
        part.load(a.codes, ulong(n) * a.words + w);
        part.store(a, a.row(n), k, a.y + ulong(n) * a.K + k);
    }
};

template <typename Q, typename T, uint kTurns> struct DequantRun {
    static void run(DequantArguments<Q, T> a, DequantPlace at) {
        if (a.aligned)
            turns<DequantUnit<Q, T>::kWords, true>(a, at);
        else
            turns<1, false>(a, at);
    }

    template <uint kWords, bool kWide>
    static void turns(thread const DequantArguments<Q, T>& a, DequantPlace at) {
        const uint each = a.words / kWords, all = each * a.N;
        const uint first = at.sg * (kSimdWidth * kTurns) + at.lane;
        DequantWords<Q, T, kWords, kWide> parts[kTurns];
#pragma unroll
        for (uint t = 0; t < kTurns; ++t) { // all loads are under way before the first is used
            const uint u = first + t * kSimdWidth;
            if (u < all) parts[t].load(a.codes, ulong(u) * kWords);
        }
#pragma unroll
        for (uint t = 0; t < kTurns; ++t) {
            const uint u = first + t * kSimdWidth, n = u / each,
                       k = (u - n * each) * (kWords * Q::Format::kPerWord);
            if (u < all) parts[t].store(a, a.row(n), k, a.y + ulong(n) * a.K + k);
        }
    }
};

#include "core/apple/dequant.h"
#include "core/cpu/dequant.h"
#include "core/nvidia/dequant.h"
