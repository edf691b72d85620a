#pragma once
#if defined(__METAL_MARLIN_CPU__) && METAL_MARLIN_LANES != 1
template <typename Q, typename T> using Dequant = DequantRun<Q, T, 4>;
#endif

#if defined(__METAL_MARLIN_CPU__) && METAL_MARLIN_LANES == 1
#include "core/cpu/wide.h"

typedef uchar DequantBytes __attribute__((ext_vector_type(16)));
typedef uchar DequantEight __attribute__((ext_vector_type(8)));

// 16 codes, with others above them.
template <uint kBits> static inline WideBits dequant_codes(device const uchar* from) {
    if (kBits == 4) {
        const DequantEight two = wide_load<DequantEight>(from), low = two & uchar(15), high = two >> uchar(4);
        const DequantBytes codes =
            __builtin_shufflevector(low, high, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
        return __builtin_convertvector(codes, WideBits);
    }
    ulong bits = 0;
    __builtin_memcpy(&bits, from, 2 * kBits);
    const HalfWideBits low = uint(bits), high = uint(bits >> (8 * kBits)), place = {0, 1, 2, 3, 4, 5, 6, 7};
    const HalfWideBits a = low >> (place * kBits), b = high >> (place * kBits);
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

// Weights of 16 codes that lie in one group. Up to four bits: the group's weights are a table, of fewer bits repeated.
template <typename Q, uint kBits> struct DequantVector {
    Wide values, table;
    DequantVector() {
        for (uint code = 0; code < 16; ++code) values[code] = Q::Format::value(code);
    }
    void enter(typename Q::Group g) { table = g.scale * (values - g.zero) + g.bias; }
    Wide weights(device const uchar* from) const { return wide_lookup(table, dequant_codes<kBits>(from)); }
};
template <typename Q> struct DequantVector<Q, 8> {
    typename Q::Group group;
    void enter(typename Q::Group g) { group = g; }
    Wide weights(device const uchar* from) const {
        const DequantBytes codes = wide_load<DequantBytes>(from);
        Wide v;
#pragma unroll
        for (uint i = 0; i < 16; ++i) v[i] = Q::Format::value(codes[i]);
        return group.scale * (v - group.zero) + group.bias;
    }
};

// A threadgroup takes `rows` rows, 16 weights a step: never in two groups, which are multiples of 16 or the whole row.
template <typename Q, typename T> struct Dequant {
    typedef T Vector __attribute__((ext_vector_type(16)));
    enum : uint { kBits = Q::Format::kBits, kPerWord = Q::Format::kPerWord };

    static void run(DequantArguments<Q, T> a, DequantPlace at) {
        const uint begin = at.tgid.x * a.rows, end = min(begin + a.rows, a.N);
        DequantVector<Q, kBits> vector;
        for (uint n = begin; n < end; ++n) {
            if (a.stream)
                row<true>(a, vector, n);
            else
                row<false>(a, vector, n);
        }
#if defined(__SSE2__)
        if (a.stream) __builtin_ia32_sfence(); // others may read what passed the caches by
#endif
    }

    template <bool kStream>
    static void row(thread const DequantArguments<Q, T>& a, thread DequantVector<Q, kBits>& vector, uint n) {
        const typename Q::Row row = a.row(n);
        device const uint* words = a.codes + ulong(n) * CodeWords<typename Q::Format>::stored(a.K);
        device const uchar* codes = (device const uchar*)words;
        device T* to = a.y + ulong(n) * a.K;
        const uint whole = a.K / 16 * 16;
        for (uint g = 0; g < a.groups; ++g) {
            vector.enter(row.group(g));
            const uint begin = g << (a.shift & 31), end = g + 1 == a.groups ? whole : (g + 1) << a.shift;
            for (uint k = begin; k < end; k += 16) {
                const Vector w = __builtin_convertvector(vector.weights(codes + k * kBits / 8), Vector);
                if (kStream)
                    __builtin_nontemporal_store(w, (Vector*)(to + k));
                else
                    wide_store(to + k, w);
            }
        }
        if (whole < a.K) {
            const typename Q::Group group = row.group(min(whole >> a.shift, a.groups - 1));
            for (uint k = whole; k < a.K; ++k) {
                const uint code =
                    CodeWords<typename Q::Format>::at(words, k / kPerWord) >> (k % kPerWord * kBits);
                to[k] = T(group.weight(Q::Format::value(code)));
            }
        }
    }
};
#endif
