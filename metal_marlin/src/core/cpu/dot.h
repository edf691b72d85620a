#pragma once
// Products of codes and activations on the cpu. A step is 16 words of codes of several rows: 64 bytes, of three-bit
// codes 48, of two-bit ones 32. What a Dot has:
//   kStep, kStored   weights a step; vectors of type Stored that hold as many elements of x in the order that it needs
//   kUnit            products are so much too small, which is left to the scales
//   order(x, to)     makes them of elements converted to float
//   Scales           what add() needs to know of a step's scales
//   add(...)         total[r][m] += scale * (value - middle) * x over the step
#ifdef __METAL_MARLIN_CPU__
#include "core/cpu/wide.h"

// Where there is AVX512-FP16 (Intel), that instruction is no faster than a float's, and look-ups of 16 bits take twice as long.
#if defined(__AVX512BF16__) && !defined(__AVX512FP16__)
#define METAL_MARLIN_PAIRS 1
#else
#define METAL_MARLIN_PAIRS 0
#endif

struct INT8;
struct UINT8;
struct FP8E4M3;
struct FP8E5M2;

// Which of the step's scales, counted from its first one, a word has; one: all have the first.
struct WideScales {
    WideBits which;
    bool one;
};

// A step of kRows rows: their codes, and their scales from the step's first one on (eight can be read).
template <uint kRows> struct WideStep {
    const void* codes[kRows];
    const float* scales[kRows];
};

// Codes of up to four bits: lane j has the sums of word j, eight codes, and its scale. Tables have as many entries as
// the look-up has indices: a code's value again and again, whatever lies above the code.
template <typename Dot, uint kRows, uint kTokens> struct WideWords {
    static void add(typename Dot::Table table, thread const WideStep<kRows>& step, thread const WideScales& s,
                    thread const typename Dot::Stored* x, uint stride, thread Wide (&total)[kRows][kTokens]) {
        WideBits q[kRows];
        Wide part[kRows][kTokens];
#pragma unroll
        for (uint r = 0; r < kRows; ++r) q[r] = wide_words<8 * Dot::kBits>(step.codes[r]);
        Dot::multiply(table, q, x, stride, part);
#pragma unroll
        for (uint r = 0; r < kRows; ++r) {
            const Wide scale = kTokens == 1 && s.one
                                   ? (Wide)step.scales[r][0]
                                   : wide_lookup8(wide_load<HalfWide>(step.scales[r]), s.which);
#pragma unroll
            for (uint m = 0; m < kTokens; ++m) total[r][m] += part[r][m] * scale;
        }
    }
};

// Code i of all words is one vector: shift, look-up, multiply-add.
template <typename Format, typename T> struct WideLookup {
    enum : uint { kStep = 128, kStored = 8, kBits = Format::kBits };
    static constexpr constant float kUnit = 1;
    typedef Wide Stored, Table;
    Table table;

    WideLookup(float middle) {
        for (uint code = 0; code < 16; ++code) table[code] = Format::value(code) - middle;
    }
    static void order(thread const float* from, thread Stored* to) {
        Wide x[8];
        wide_columns(from, x);
#pragma unroll
        for (uint i = 0; i < 8; ++i) to[i] = x[i];
    }
    // sums = or += what each row has in its table, times x
    template <bool kFirst, uint kRows, uint kTokens>
    static void multiply(thread const Table (&tables)[kRows], thread const WideBits (&q)[kRows],
                         thread const Stored* x, uint stride, thread Wide (&sums)[kRows][kTokens]) {
#pragma unroll
        for (uint i = 0; i < 8; ++i) {
            Wide w[kRows];
#pragma unroll
            for (uint r = 0; r < kRows; ++r) w[r] = wide_lookup(tables[r], q[r] >> (kBits * i));
#pragma unroll
            for (uint m = 0; m < kTokens; ++m) {
                const Wide v = x[m * stride + i];
#pragma unroll
                for (uint r = 0; r < kRows; ++r) {
                    sums[r][m] = kFirst && i == 0 ? w[r] * v : sums[r][m] + w[r] * v;
                }
            }
        }
    }
    template <uint kRows, uint kTokens>
    static void multiply(Table table, thread const WideBits (&q)[kRows], thread const Stored* x, uint stride,
                         thread Wide (&sums)[kRows][kTokens]) {
        Table tables[kRows];
#pragma unroll
        for (uint r = 0; r < kRows; ++r) tables[r] = table;
        multiply<true>(tables, q, x, stride, sums);
    }
    template <uint kRows, uint kTokens>
    void add(thread const WideStep<kRows>& step, thread const WideScales& s, thread const Stored* x,
             uint stride, thread Wide (&total)[kRows][kTokens]) const {
        if (kTokens == 1 || !s.one) {
            WideWords<WideLookup, kRows, kTokens>::add(table, step, s, x, stride, total);
            return;
        }
        WideBits q[kRows]; // of many tokens it is the table that is scaled: there are no sums of a group
        Table tables[kRows];
#pragma unroll
        for (uint r = 0; r < kRows; ++r) {
            q[r] = wide_words<8 * kBits>(step.codes[r]);
            tables[r] = table * (Wide)step.scales[r][0];
        }
        multiply<false>(tables, q, x, stride, total);
    }
};

#if METAL_MARLIN_PAIRS
typedef bfloat WideBfloats __attribute__((ext_vector_type(32)));

// Codes i and i + 4 of all words are one vector of bfloat pairs, which an instruction multiplies and adds in float. A
// half is exactly the sum of two bfloats, and every weight is a bfloat: products are exact.
template <typename Format, uint kParts> struct WidePairs {
    enum : uint { kStep = 128, kStored = 4 * kParts, kBits = Format::kBits };
    static constexpr constant float kUnit = 1;
    typedef WideBfloats Stored;
    typedef short Table __attribute__((vector_size(64)));
    Table table;

    WidePairs(float middle) {
        for (uint i = 0; i < 32; ++i) table[i] = as_type<short>(bfloat(Format::value(i & 15) - middle));
    }
    static void order(thread const float* from, thread Stored* to) {
        typedef float Pairs __attribute__((ext_vector_type(32)));
        Wide x[8];
        wide_columns(from, x);
#pragma unroll
        for (uint i = 0; i < 4; ++i) {
            Pairs v =
                __builtin_shufflevector(x[i], x[i + 4], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7,
                                        23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#pragma unroll
            for (uint part = 0; part < kParts; ++part) {
                to[i * kParts + part] = __builtin_convertvector(v, WideBfloats);
                v -= __builtin_convertvector(to[i * kParts + part], Pairs);
            }
        }
    }

    template <uint kRows, uint kTokens>
    static void multiply(Table table, thread const WideBits (&q)[kRows], thread const Stored* x, uint stride,
                         thread Wide (&sums)[kRows][kTokens]) {
        typedef float Floats __attribute__((vector_size(64)));
        typedef bfloat Bfloats __attribute__((vector_size(64)));
        typedef ushort WideShorts __attribute__((ext_vector_type(32)));
        static_assert(kParts <= 2, "WidePairs: a number is the sum of at most two");
        Wide parts[kRows][kTokens][kParts]; // one after the other they would wait for each other
        WideShorts halves[kRows];           // codes 0 ... 3 and 4 ... 7 of a word
#pragma unroll
        for (uint r = 0; r < kRows; ++r) {
            const WideBits upper = (q[r] << (16 - 4 * kBits)) & 0xffff0000u;
            halves[r] = __builtin_bit_cast(WideShorts, kBits == 4 ? q[r] : (q[r] & 0xffffu) | upper);
        }
#pragma unroll
        for (uint i = 0; i < 4; ++i) {
            Bfloats w[kRows];
#pragma unroll
            for (uint r = 0; r < kRows; ++r) {
                const WideShorts codes = halves[r] >> (ushort)(kBits * i);
                w[r] = __builtin_bit_cast(
                    Bfloats, __builtin_ia32_permvarhi512(table, __builtin_bit_cast(Table, codes)));
            }
#pragma unroll
            for (uint m = 0; m < kTokens; ++m) {
#pragma unroll
                for (uint part = 0; part < kParts; ++part) {
                    const Bfloats v = __builtin_bit_cast(Bfloats, x[m * stride + i * kParts + part]);
#pragma unroll
                    for (uint r = 0; r < kRows; ++r) {
                        const Wide before = i == 0 ? (Wide)0.0f : parts[r][m][part];
                        parts[r][m][part] = __builtin_bit_cast(
                            Wide, __builtin_ia32_dpbf16ps_512(__builtin_bit_cast(Floats, before), v, w[r]));
                    }
                }
            }
        }
#pragma unroll
        for (uint r = 0; r < kRows; ++r) {
#pragma unroll
            for (uint m = 0; m < kTokens; ++m) {
                sums[r][m] = kParts == 1 ? parts[r][m][0] : parts[r][m][0] + parts[r][m][kParts - 1];
            }
        }
    }
    template <uint kRows, uint kTokens>
    void add(thread const WideStep<kRows>& step, thread const WideScales& s, thread const Stored* x,
             uint stride, thread Wide (&total)[kRows][kTokens]) const {
        WideWords<WidePairs, kRows, kTokens>::add(table, step, s, x, stride, total);
    }
};
#endif

// 16 codes of eight bits as floats, less the middle of unsigned ones. FP8 codes become halves, whose subnormals are exact.
typedef uchar WideBytes __attribute__((ext_vector_type(16)));
typedef char WideSigned __attribute__((ext_vector_type(16)));
typedef ushort WideHalfBits __attribute__((ext_vector_type(16)));
typedef half WideHalves __attribute__((ext_vector_type(16)));

template <typename Format> struct WideValues;
template <> struct WideValues<INT8> {
    static constexpr constant float kUnit = 1;
    static Wide of(WideBytes q) { return __builtin_convertvector(__builtin_bit_cast(WideSigned, q), Wide); }
};
template <> struct WideValues<UINT8> {
    static constexpr constant float kUnit = 1;
    static Wide of(WideBytes q) { return WideValues<INT8>::of(q ^ (uchar)0x80); }
};
template <> struct WideValues<FP8E5M2> {
    static constexpr constant float kUnit = 1;
    static Wide of(WideBytes q) {
        const WideHalfBits h = __builtin_convertvector(q, WideHalfBits) << (ushort)8;
        return __builtin_convertvector(__builtin_bit_cast(WideHalves, h), Wide);
    }
};
template <> struct WideValues<FP8E4M3> {
    static constexpr constant float kUnit = 256; // what it leaves to the scale
    // NaN has all seven bits set: one more carries into a half's highest exponent bit.
    static Wide of(WideBytes q) {
        typedef short Shorts __attribute__((ext_vector_type(16)));
        const Shorts s = __builtin_convertvector(__builtin_bit_cast(WideSigned, q), Shorts);
        const WideHalfBits h = (__builtin_bit_cast(WideHalfBits, s) << (ushort)7) & (ushort)0xbf80;
        const WideHalfBits nan = (h + (ushort)0x80) & (ushort)0x4000;
        return __builtin_convertvector(__builtin_bit_cast(WideHalves, h | nan), Wide);
    }
};

// Eight-bit codes in the order of memory: 16 of them have one scale.
template <typename Format, typename T> struct WideChunks {
    enum : uint { kStep = 64, kStored = 4 };
    static constexpr constant float kUnit = WideValues<Format>::kUnit;
    typedef Wide Stored;

    WideChunks(float) {}
    static void order(thread const float* from, thread Stored* to) {
        for (uint i = 0; i < 4; ++i) to[i] = wide_load<Wide>(from + 16 * i);
    }
    template <uint kRows, uint kTokens>
    void add(thread const WideStep<kRows>& step, thread const WideScales& s, thread const Stored* x,
             uint stride, thread Wide (&total)[kRows][kTokens]) const {
        const bool apart = kTokens == 1 && s.one; // of many tokens it is the weights that are scaled
        Wide part[kRows][kTokens];
#pragma unroll
        for (uint r = 0; r < kRows; ++r) {
#pragma unroll
            for (uint m = 0; m < kTokens; ++m) part[r][m] = apart ? (Wide)0.0f : total[r][m];
        }
#pragma unroll
        for (uint i = 0; i < 4; ++i) {
#pragma unroll
            for (uint r = 0; r < kRows; ++r) {
                Wide w = WideValues<Format>::of(wide_load<WideBytes>((const char*)step.codes[r] + 16 * i));
                if (!apart) w *= (Wide)step.scales[r][s.one ? 0 : s.which[4 * i]];
#pragma unroll
                for (uint m = 0; m < kTokens; ++m) part[r][m] += w * x[m * stride + i];
            }
        }
#pragma unroll
        for (uint r = 0; r < kRows; ++r) {
            const Wide scale = apart ? (Wide)step.scales[r][0] : (Wide)1.0f;
#pragma unroll
            for (uint m = 0; m < kTokens; ++m) {
                total[r][m] = apart ? total[r][m] + part[r][m] * scale : part[r][m];
            }
        }
    }
};

// Eight scales as they are stored, as floats.
template <typename Scale> struct WideScale;
template <typename S> struct WideScale<FloatScale<S>> {
    typedef S Stored __attribute__((ext_vector_type(8)));
    static HalfWide of(Stored s) { return __builtin_convertvector(s, HalfWide); }
};
template <> struct WideScale<E8M0> {
    typedef uchar Stored __attribute__((ext_vector_type(8)));
    static HalfWide of(Stored s) { // 2^-127 and NaN have the highest bit of a mantissa
        typedef uint Bits __attribute__((ext_vector_type(8)));
        const Bits e = __builtin_convertvector(s, Bits);
        const Bits odd = __builtin_bit_cast(Bits, (e == 0u) | (e == 255u)) & 0x00400000u;
        return __builtin_bit_cast(HalfWide, e << 23u | odd);
    }
};
template <> struct WideScale<E4M3> {
    typedef uchar Stored __attribute__((ext_vector_type(8)));
    static HalfWide of(Stored s) {
        const WideBytes both = __builtin_shufflevector(s, s, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7);
        return WideValues<FP8E4M3>::of(both).lo * WideValues<FP8E4M3>::kUnit;
    }
};

template <typename Format, typename T, bool kOne> struct WideTable {
    typedef WideLookup<Format, T> type;
};
#if METAL_MARLIN_PAIRS
template <typename Format, bool kOne> struct WideTable<Format, bfloat, kOne> {
    typedef WidePairs<Format, 1> type;
};
template <typename Format>
struct WideTable<Format, half, true> { // of many tokens, look-ups are the smaller part
    typedef WidePairs<Format, 2> type;
};
template <bool kOne> struct WideTable<NF3, bfloat, kOne> { // its values are floats
    typedef WideLookup<NF3, bfloat> type;
};
template <> struct WideTable<NF3, half, true> {
    typedef WideLookup<NF3, half> type;
};
#endif
// kOne: for one token
template <typename Format, typename T, uint kBits, bool kOne>
struct WideDotOf : WideTable<Format, T, kOne> {};
template <typename Format, typename T, bool kOne> struct WideDotOf<Format, T, 8, kOne> {
    typedef WideChunks<Format, T> type;
};
#endif
