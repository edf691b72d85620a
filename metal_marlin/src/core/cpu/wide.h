#pragma once
// Vectors of what one lane owns on the cpu: 16 floats or words, for which clang picks the instructions.
#ifdef __METAL_MARLIN_CPU__

typedef float Wide __attribute__((ext_vector_type(16)));
typedef uint WideBits __attribute__((ext_vector_type(16)));
typedef float HalfWide __attribute__((ext_vector_type(8)));

template <typename V> static inline V wide_load(const void* from) {
    V v;
    __builtin_memcpy(&v, from, sizeof(v));
    return v;
}
template <typename V> static inline void wide_store(void* to, V v) { __builtin_memcpy(to, &v, sizeof(v)); }

// table[index & 15], lane by lane
static inline Wide wide_lookup(Wide table, WideBits index) {
#if defined(__AVX512F__)
    typedef float Floats __attribute__((vector_size(64)));
    typedef int Ints __attribute__((vector_size(64)));
    return __builtin_bit_cast(Wide, __builtin_ia32_permvarsf512(__builtin_bit_cast(Floats, table),
                                                                __builtin_bit_cast(Ints, index)));
#elif defined(__AVX2__)
    typedef float Floats __attribute__((vector_size(32)));
    typedef int Ints __attribute__((vector_size(32)));
    struct Halves {
        Floats at[2];
    };
    struct Indices {
        Ints at[2];
    };
    const Halves t = __builtin_bit_cast(Halves, table);
    const Indices low = __builtin_bit_cast(Indices, index), high = __builtin_bit_cast(Indices, index << 28);
    Halves out;
    for (int h = 0; h < 2; ++h) {
        const Floats a = __builtin_ia32_permvarsf256(t.at[0], low.at[h]);
        const Floats b = __builtin_ia32_permvarsf256(t.at[1], low.at[h]);
        out.at[h] = __builtin_ia32_blendvps256(a, b, __builtin_bit_cast(Floats, high.at[h]));
    }
    return __builtin_bit_cast(Wide, out);
#else
    Wide out;
    for (int i = 0; i < 16; ++i) out[i] = table[index[i] & 15];
    return out;
#endif
}

static inline float wide_sum(Wide v) {
    const HalfWide a = v.lo + v.hi;
    const float4 b = a.lo + a.hi;
    return (b.x + b.y) + (b.z + b.w);
}

// 128 weights of 16 words times 128 elements of x, in 16 sums: lane j has those of word j. kStored vectors hold the
// elements in the order in which the codes come out; order() makes them of x's 128, converted to float.
typedef float WideRow __attribute__((ext_vector_type(128)));

// Code i of all words is one vector: shift, look-up, multiply-add.
template <typename Format, typename T> struct WideDot {
    enum : uint { kStored = 8 };
    typedef Wide Stored;
    Wide table;

    WideDot() {
        for (uint code = 0; code < 16; ++code) table[code] = Format::value(code);
    }
    template <int i> static void column(WideRow x, thread Stored* to) {
        to[i] = __builtin_shufflevector(x, x, i, i + 8, i + 16, i + 24, i + 32, i + 40, i + 48, i + 56,
                                        i + 64, i + 72, i + 80, i + 88, i + 96, i + 104, i + 112, i + 120);
    }
    static void order(WideRow x, thread Stored* to) {
        column<0>(x, to), column<1>(x, to), column<2>(x, to), column<3>(x, to);
        column<4>(x, to), column<5>(x, to), column<6>(x, to), column<7>(x, to);
    }
    template <uint kRows, uint kTokens>
    void multiply(thread const WideBits (&q)[kRows], thread const Stored* x, uint stride,
                  thread Wide (&sums)[kRows][kTokens]) const {
#pragma unroll
        for (uint i = 0; i < 8; ++i) {
            Wide w[kRows];
#pragma unroll
            for (uint r = 0; r < kRows; ++r) w[r] = wide_lookup(table, q[r] >> (4 * i));
#pragma unroll
            for (uint m = 0; m < kTokens; ++m) {
                const Wide v = x[m * stride + i];
#pragma unroll
                for (uint r = 0; r < kRows; ++r) sums[r][m] = i == 0 ? w[r] * v : sums[r][m] + w[r] * v;
            }
        }
    }
};

#if defined(__AVX512BF16__)
typedef bfloat WideBfloats __attribute__((ext_vector_type(32)));

// Codes i and i + 4 of all words are one vector of bfloat pairs, which an instruction multiplies and adds in float. A
// half is exactly the sum of two bfloats, and every weight is a bfloat: products are exact.
template <typename Format, uint kParts> struct WidePairDot {
    enum : uint { kStored = 4 * kParts };
    typedef WideBfloats Stored;
    typedef short Shorts __attribute__((vector_size(64)));
    Shorts table;

    WidePairDot() {
        for (uint i = 0; i < 32; ++i) table[i] = as_type<short>(bfloat(Format::value(i & 15)));
    }
    template <int i> static void column(WideRow x, thread Stored* to) {
        typedef float Pairs __attribute__((ext_vector_type(32)));
        Pairs v = __builtin_shufflevector(
            x, x, i, i + 4, i + 8, i + 12, i + 16, i + 20, i + 24, i + 28, i + 32, i + 36, i + 40, i + 44,
            i + 48, i + 52, i + 56, i + 60, i + 64, i + 68, i + 72, i + 76, i + 80, i + 84, i + 88, i + 92,
            i + 96, i + 100, i + 104, i + 108, i + 112, i + 116, i + 120, i + 124);
#pragma unroll
        for (uint part = 0; part < kParts; ++part) {
            to[i * kParts + part] = __builtin_convertvector(v, WideBfloats);
            v -= __builtin_convertvector(to[i * kParts + part], Pairs);
        }
    }
    static void order(WideRow x, thread Stored* to) {
        column<0>(x, to), column<1>(x, to), column<2>(x, to), column<3>(x, to);
    }

    template <uint kRows, uint kTokens>
    void multiply(thread const WideBits (&q)[kRows], thread const Stored* x, uint stride,
                  thread Wide (&sums)[kRows][kTokens]) const {
        typedef float Floats __attribute__((vector_size(64)));
        typedef bfloat Bfloats __attribute__((vector_size(64)));
        typedef ushort WideShorts __attribute__((ext_vector_type(32)));
#pragma unroll
        for (uint i = 0; i < 4; ++i) {
            Bfloats w[kRows];
#pragma unroll
            for (uint r = 0; r < kRows; ++r) {
                const WideShorts codes = __builtin_bit_cast(WideShorts, q[r]) >> (ushort)(4 * i);
                w[r] = __builtin_bit_cast(
                    Bfloats, __builtin_ia32_permvarhi512(table, __builtin_bit_cast(Shorts, codes)));
            }
#pragma unroll
            for (uint m = 0; m < kTokens; ++m) {
#pragma unroll
                for (uint part = 0; part < kParts; ++part) {
                    const Bfloats v = __builtin_bit_cast(Bfloats, x[m * stride + i * kParts + part]);
#pragma unroll
                    for (uint r = 0; r < kRows; ++r) {
                        const Wide before = i == 0 && part == 0 ? (Wide)0.0f : sums[r][m];
                        sums[r][m] = __builtin_bit_cast(
                            Wide, __builtin_ia32_dpbf16ps_512(__builtin_bit_cast(Floats, before), v, w[r]));
                    }
                }
            }
        }
    }
};
template <typename Format> struct WideDot<Format, bfloat> : WidePairDot<Format, 1> {};
template <typename Format> struct WideDot<Format, half> : WidePairDot<Format, 2> {};
#endif

#endif
