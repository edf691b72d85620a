#pragma once
// Weights in operand order: what lanes of a simdgroup take as their left operands of a matrix instruction lies together,
// so that one 16-byte load is a lane's share of 16 rows and 64 k (of eight bits, 32 k; of two bits, 8 bytes; of three, 8
// and 4).
// y[m, n] = sum over k of x[m, k] * w[n, k], with the same numbers as core/gemm.h.
//
//   codes   [N / 16][K / 64][bits / 4][lane]  16 bytes: words in the order of the steps of 16 k, one a step of four bits,
//           two of eight. Lane 4 * r + c has rows r and r + 8 and, of each step, k 2c, 2c + 1, 2c + 8, 2c + 9. Codes i
//           and i + kPerWord / 2 of a word are neighbours along k; such pairs follow as (r, 2c), (r + 8, 2c), (r, 2c + 8),
//           (r + 8, 2c + 8), those of eight bits two a word. Of two and three bits: a lane has kBits words a block, first
//           two of every lane, then one; LaneCodes has the places of its pairs.
//   scales  S [groups][N / 16][8][2]          of rows r and r + 8; zeros and biases likewise
//   powers  float [N]                         powers of two above every scale and bias of a row
//
//   places  of 2:4 sparse weights: where in [N / 16][K / 64][lane] is a word; see SparsePlaces
//
// Sparse weights have half as many codes: 8 bytes a lane and 64 k, two steps of 32 k, of whose kept weights lane 4 * r + c has
// the same numbers 2c, 2c + 1, 2c + 8, 2c + 9. N is a multiple of 16 and K of 64. Twin: metal_marlin/formats/operands.py. Sources: own (the measured prototype).
#include <metal_stdlib>
#include "core/epilogue.h"
#include "core/gemm.h"
#include "formats/fp4.h"
#include "formats/int2.h"
#include "formats/int3.h"
#include "formats/nf3.h"
#include "formats/quantized.h"
#include "formats/sparse.h"
using namespace metal;

// Descriptors for the tensor copy unit of NVIDIA GPUs; others never read them.
struct alignas(64) PackedMaps {
    long words[64]; // x, codes, scales, extra; 16 each
};

struct alignas(64) SparsePackedMaps {
    long words[80]; // and places
};

// How many k there are for one that is stored.
template <typename W> struct Spread {
    enum : uint { value = 1 };
};
template <typename Q> struct Spread<Sparse<Q, 2, 4>> {
    enum : uint { value = 2 };
};

// The kCount words that a lane has of a block are read kTogether at once, and such words of all lanes lie together.
template <uint kCount> struct LaneWords {
    enum : uint { kTogether = kCount < 4 ? 2 : 4 };
    static uint at(uint lane, uint word) {
        const uint first = word / kTogether * kTogether;
        return 32 * first + lane * min(uint(kTogether), kCount - first) + word - first;
    }
};

// Codes i and i + kPerWord / 2 of a word. Of FP4, a half of a word has the sign and the size of code i where a number of 16
// bits has them after the fewest steps: signs are bits 15, 12, 14 and 13, sizes bits 9, 6, 3 and 0 and the two above.
template <typename Format> struct WordCodes {
    static float2 pair(uint word, uint i) { return Format::pair(word, i); }
};
template <> struct WordCodes<FP4> {
    static float2 pair(uint word, uint i) {
        const uint sign = i == 0 ? 15 : i == 1 ? 12 : 16 - i, size = 9 - 3 * i;
        const uint codes = ((word >> sign & 0x00010001u) << 3) | (word >> size & 0x00070007u);
        return float2(FP4::value(codes), FP4::value(codes >> 16));
    }
};

// Pair `at` of a lane's 16, four a step, of the words of a block. Below, places are those that cost a GPU the least to
// bring the two codes to the same bits of both halves of a register, or four codes to a digit each.
template <typename Format> struct LaneCodes {
    enum : uint { kPairs = Format::kPerWord / 2 };
    static float2 pair(device const uint* block, uint lane, uint at) {
        return WordCodes<Format>::pair(block[LaneWords<Format::kBits>::at(lane, at / kPairs)], at % kPairs);
    }
};

// Two bits: codes of pair i of a word are bits 2 * i and 2 * i + 1 of its halves.
template <> struct LaneCodes<INT2> {
    static float2 pair(device const uint* block, uint lane, uint at) {
        const uint word = block[LaneWords<2>::at(lane, at / 8)] >> (at % 8 * 2);
        return float2(INT2::value(word), INT2::value(word >> 16));
    }
};

// Three bits: from the second on, halves of word i have codes of the pairs of step i, and one of pair i of the last step;
// the first bits of the three words are those of the last pair.
template <> struct LaneCodes<INT3> {
    static float2 pair(device const uint* block, uint lane, uint at) {
        const uint step = at / 4, i = at % 4;
        uint code = 0;
        if (at == 15) {
            for (uint b = 0; b < 3; ++b) code |= (block[LaneWords<3>::at(lane, b)] & 0x00010001u) << b;
        } else {
            code = block[LaneWords<3>::at(lane, step < 3 ? step : i)] >> (step < 3 ? 1 + 3 * i : 13);
        }
        return float2(INT3::value(code), INT3::value(code >> 16));
    }
};

// NF3: digits 2 * i and 2 * i + 1 of word s are codes of pair i of step s, in their lower three bits; their highest bits,
// of all three words, are the codes of the last step.
template <> struct LaneCodes<NF3> {
    static float2 pair(device const uint* block, uint lane, uint at) {
        const uint step = at / 4, i = at % 4;
        uint digits = 0;
        if (step < 3) {
            digits = block[LaneWords<3>::at(lane, step)];
        } else {
            for (uint b = 0; b < 3; ++b) digits |= (block[LaneWords<3>::at(lane, b)] >> 3 & 0x11111111u) << b;
        }
        digits >>= 8 * i;
        return float2(NF3::value(digits), NF3::value(digits >> 4));
    }
};

// The word of lane 4 * r + c has those of step c / 2: bits 0 ... 15 are of row r, 16 ... 31 of row r + 8, four bits for every
// four weights of 16, the first of which is 16 * (c % 2). It is what the sparse matrix instruction takes.
struct SparsePlaces {
    static uint lane(uint r, uint step, uint far) { return 4 * r + 2 * step + far; }
    static uint four(uint word, uint h, uint i) { return word >> (16 * h + 4 * i) & 15; }
};

template <typename W, typename T> struct PackedArguments {
    typedef typename W::S S;
    typedef typename W::Bound E;
    device const T* x;
    device const uint* codes;
    device const S* scales;
    device const E* extra;
    device const float* powers;
    device const uint* places; // of sparse weights
    device T* y;
    uint M, N, K, groups, group;
    uint shift; // weight k has scale k >> shift

    PackedArguments(device const T* x, device const uint* codes, device const S* scales,
                    device const E* extra, device const float* powers, device const uint* places, device T* y,
                    constant GemmShape& shape)
        : x(x), codes(codes), scales(scales), extra(extra), powers(powers), places(places), y(y),
          M(uint(shape.M)), N(uint(shape.N)), K(uint(shape.K)),
          groups((uint(shape.K) + uint(shape.group) - 1) / uint(shape.group)), group(uint(shape.group)),
          shift(groups == 1 ? 31 : ctz(uint(shape.group))) {}

    float factor() const { return W::Extra::kFactor ? float(extra[0]) : 1.0f; }
};

// kRows of W and kTokens of a threadgroup; kDepth of k a stage, at most kAhead stages; simdgroups that multiply: kAlongN by
// kAlongK of them, or of groups of four where the instruction takes four; kSplit threadgroups along z share K.
template <uint kRows_, uint kTokens_, uint kSplit_, uint kDepth_, uint kAhead_, uint kAlongN_, uint kAlongK_,
          bool kFew_, uint kThreads_>
struct PackedTile {
    enum : uint {
        kRows = kRows_,
        kTokens = kTokens_,
        kSplit = kSplit_,
        kDepth = kDepth_,
        kAhead = kAhead_,
        kAlongN = kAlongN_,
        kAlongK = kAlongK_,
        kThreads = kThreads_
    };
    enum : bool { kFew = kFew_ };
};

// The tiles of a threadgroup, or of those along z that share K: the first, and every `step`th after it. Neighbours along N
// come first. Large tiles can be halved, to half the tokens. Whole ones come first; then both halves of those that are
// left after whole rounds, if that makes the last rounds shorter; then those of the last tokens, if a half holds them.
template <typename Schedule> struct TileWalk {
    enum : bool { kHalves = !Schedule::kFew && Schedule::kSplit == 1 && Schedule::kTokens == 256 };
    enum : uint {
        kRows = Schedule::kRows,
        kTokens = Schedule::kTokens,
        kHalf = kHalves ? kTokens / 2 : kTokens
    };
    uint at, step, across, whole, pairs, count;
    TileWalk(constant GemmShape& shape, uint3 tgid, uint3 grid)
        : at(tgid.y * grid.x + tgid.x), step(grid.x * grid.y), across((uint(shape.N) + kRows - 1) / kRows),
          whole(across * ((uint(shape.M) + kTokens - 1) / kTokens)), pairs(0), count(whole) {
        if (!kHalves) return;
        const uint last = (uint(shape.M) - 1) % kTokens < kHalf ? across : 0;
        whole -= last;
        const uint left = whole % step, more = left + last;
        // rounds of halves, with those that are left halved and whole
        if ((left + more + step - 1) / step < 2 + (more > step ? (more - 1) / step : 0)) pairs = left;
        whole -= pairs, count += pairs;
    }
    bool more() const { return at < count; }
    void next() { at += step; }
    bool halved() const { return kHalves && at >= whole; }
    uint part() const { return at - whole; } // which
    uint tile() const { return halved() ? whole + (part() < 2 * pairs ? part() / 2 : part() - pairs) : at; }
    uint row() const { return tile() % across * kRows; }
    uint token() const {
        return tile() / across * kTokens + (halved() && part() < 2 * pairs ? part() % 2 * kHalf : 0);
    }
    uint tokens() const { return halved() ? uint(kHalf) : uint(kTokens); }
};

// The definition in plain code, for devices without a pipeline of their own: simdgroups take turns at strips; a lane adds
// its part of the products of its two rows with eight tokens.
template <typename W, typename T, typename Schedule, typename Epilogue> struct SimdPacked {
    typedef PackedArguments<W, T> Arguments;
    typedef typename W::Format Format;
    enum : uint { kTokens = 8 };
    struct Shared {};

    // A weight without bias is `unit` times as large as scale * (code - zero): 6 * 2^127 is no float. Products with x are
    // multiplied by it in an fma, or a compiler may choose to multiply the numbers of a weight first.
    struct Numbers {
        float scale, unit, zero, bias;
    };
    static Numbers numbers(thread const Arguments& a, uint strip, uint row, uint k) {
        const ulong i = ulong(k >> a.shift) * a.N + strip * 16 + row % 8 * 2 + row / 8;
        Numbers v = {W::Scale::value(a.scales[i]) * a.factor(), 1, 0, 0};
        if (!W::kBias && v.scale > 1) v.unit = v.scale, v.scale = 1;
        if (W::kZero) v.zero = float(a.extra[i]);
        if (W::kBias) v.bias = float(a.extra[i]);
        return v;
    }

    // A step of 32 k of sparse weights.
    static void sparse_step(thread const Arguments& a, uint strip, uint k, uint token, uint lane,
                            thread float (&sums)[2][kTokens]) {
        const uint r = lane / 4, c = lane % 4, s = k % 64 / 32;
        const ulong block = ulong(strip) * (a.K / 64) + k / 64;
        const uint word = a.codes[block * 64 + lane * 2 + s];
        for (uint h = 0; h < 2; ++h) {
            const Numbers v = numbers(a, strip, r + 8 * h, k);
            float2 w[2];
            uint four[2];
            for (uint far = 0; far < 2; ++far) {
                w[far] = v.scale * WordCodes<Format>::pair(word, 2 * far + h);
                four[far] = SparsePlaces::four(a.places[block * 32 + SparsePlaces::lane(r, s, far)], h, c);
            }
            for (uint i = 0; i < kTokens; ++i) {
                if (token + i >= a.M) break;
                device const T* x = a.x + ulong(token + i) * a.K + k + 4 * c;
                const float product = w[0].x * float(x[four[0] & 3]) + w[0].y * float(x[four[0] >> 2]) +
                                      w[1].x * float(x[16 + (four[1] & 3)]) +
                                      w[1].y * float(x[16 + (four[1] >> 2)]);
                sums[h][i] = fma(v.unit, product, sums[h][i]);
            }
        }
    }

    // A step of 16 k.
    static void step(thread const Arguments& a, uint strip, uint k, uint token, uint lane,
                     thread float (&sums)[2][kTokens]) {
        const uint r = lane / 4, c = lane % 4;
        device const uint* block = a.codes + (ulong(strip) * (a.K / 64) + k / 64) * (32 * Format::kBits);
        for (uint h = 0; h < 2; ++h) {
            const Numbers v = numbers(a, strip, r + 8 * h, k);
            float2 w[2];
            for (uint far = 0; far < 2; ++far) {
                const float2 code = LaneCodes<Format>::pair(block, lane, k % 64 / 16 * 4 + 2 * far + h);
                w[far] = v.scale * (code - v.zero) + v.bias;
            }
            for (uint i = 0; i < kTokens; ++i) {
                if (token + i >= a.M) break;
                device const T* x = a.x + ulong(token + i) * a.K + k + 2 * c;
                const float product =
                    w[0].x * float(x[0]) + w[0].y * float(x[1]) + w[1].x * float(x[8]) + w[1].y * float(x[9]);
                sums[h][i] = fma(v.unit, product, sums[h][i]);
            }
        }
    }

    // 16 rows and eight tokens.
    static void strip(thread const Arguments& a, uint strip, uint token, uint lane, Epilogue epilogue) {
        float sums[2][kTokens] = {};
        for (uint k = 0; k < a.K; k += 16 * Spread<W>::value) {
            if (Spread<W>::value == 1)
                step(a, strip, k, token, lane, sums);
            else
                sparse_step(a, strip, k, token, lane, sums);
        }
        for (uint h = 0; h < 2; ++h) {
            for (uint i = 0; i < kTokens; ++i) {
                float v = sums[h][i];
                v += simd_shuffle_xor(v, ushort(1));
                v += simd_shuffle_xor(v, ushort(2));
                const uint n = strip * 16 + lane / 4 + 8 * h, m = token + i;
                if (lane % 4 == 0 && m < a.M) a.y[ulong(m) * a.N + n] = T(epilogue.apply(v, m, n));
            }
        }
    }

    static void run(Arguments a, TileWalk<Schedule> tiles, GemmPlace at, threadgroup Shared&,
                    Epilogue epilogue) {
        if (at.tgid.z != 0) return;
        for (; tiles.more(); tiles.next()) {
            const uint end = min(tiles.row() + uint(Schedule::kRows), a.N) / 16,
                       last = min(tiles.token() + tiles.tokens(), a.M);
            for (uint s = tiles.row() / 16 + at.sgid; s < end; s += Schedule::kThreads / 32) {
                for (uint token = tiles.token(); token < last; token += kTokens)
                    strip(a, s, token, at.lane, epilogue);
            }
        }
    }
};

#include "core/nvidia/packed.h"
