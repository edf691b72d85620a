#pragma once
// Vectors of what one lane owns on the cpu: 16 floats or words, for which clang picks the instructions.
#ifdef __METAL_MARLIN_CPU__

typedef float Wide __attribute__((ext_vector_type(16)));
typedef uint WideBits __attribute__((ext_vector_type(16)));
typedef float HalfWide __attribute__((ext_vector_type(8)));
typedef uint HalfWideBits __attribute__((ext_vector_type(8)));

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

// 16 words of codes in the order of memory (formats/code_words.h): of kSize bits each, others above them.
template <uint kSize> static inline WideBits wide_words(const void* from) {
    typedef uchar Bytes __attribute__((ext_vector_type(64)));
    typedef ushort Shorts __attribute__((ext_vector_type(16)));
    if (kSize == 32) return wide_load<WideBits>(from);
    if (kSize == 16) return __builtin_convertvector(wide_load<Shorts>(from), WideBits);
    WideBits q = 0;
    __builtin_memcpy(&q, from, 48);
    // four words of memory, of which the first three are needed, then the bytes of each word of codes
    q = __builtin_shufflevector(q, q, 0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12);
    const Bytes b = __builtin_bit_cast(Bytes, q);
    return __builtin_bit_cast(
        WideBits, __builtin_shufflevector(b, b, 0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12, 16, 17, 18,
                                          19, 19, 20, 21, 22, 22, 23, 24, 25, 25, 26, 27, 28, 32, 33, 34, 35,
                                          35, 36, 37, 38, 38, 39, 40, 41, 41, 42, 43, 44, 48, 49, 50, 51, 51,
                                          52, 53, 54, 54, 55, 56, 57, 57, 58, 59, 60));
}

// Of vectors q[i] and q[i + s], blocks of s lanes beside the diagonal change places.
constexpr int wide_from_left(int lane, int s) { return lane & s ? 16 + lane - s : lane; }
constexpr int wide_from_right(int lane, int s) { return lane & s ? 16 + lane : lane + s; }
#define WIDE_LANES(from, s)                                                                                  \
    from(0, s), from(1, s), from(2, s), from(3, s), from(4, s), from(5, s), from(6, s), from(7, s),          \
        from(8, s), from(9, s), from(10, s), from(11, s), from(12, s), from(13, s), from(14, s), from(15, s)
template <int s, typename V, int kCount> static inline void wide_exchange(thread V (&q)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        if (i & s) continue;
        const V a = q[i], b = q[i + s];
        q[i] = __builtin_shufflevector(a, b, WIDE_LANES(wide_from_left, s));
        q[i + s] = __builtin_shufflevector(a, b, WIDE_LANES(wide_from_right, s));
    }
}
template <int s> static inline void wide_fold(thread Wide (&v)[16]) {
#pragma unroll
    for (int i = 0; i < s; ++i) {
        v[i] = __builtin_shufflevector(v[i], v[i + s], WIDE_LANES(wide_from_left, s)) +
               __builtin_shufflevector(v[i], v[i + s], WIDE_LANES(wide_from_right, s));
    }
}
#undef WIDE_LANES

// Lane i: the sum of v[i].
static inline Wide wide_sums(thread Wide (&v)[16]) {
    wide_fold<8>(v), wide_fold<4>(v), wide_fold<2>(v), wide_fold<1>(v);
    return v[0];
}

// Lane j of to[i] is element 8 j + i.
static inline void wide_columns(thread const float* from, thread Wide (&to)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = wide_load<Wide>(from + 16 * i);
    wide_exchange<4>(to), wide_exchange<2>(to), wide_exchange<1>(to);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        to[i] = __builtin_shufflevector(to[i], to[i], 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
    }
}

static inline float wide_sum(Wide v) {
    const HalfWide a = v.lo + v.hi;
    const float4 b = a.lo + a.hi;
    return (b.x + b.y) + (b.z + b.w);
}

// table[index], lane by lane; index < 8
static inline Wide wide_lookup8(HalfWide table, WideBits index) {
#if defined(__AVX512F__)
    return wide_lookup(__builtin_shufflevector(table, table, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7),
                       index);
#elif defined(__AVX2__)
    typedef float Floats __attribute__((vector_size(32)));
    typedef int Ints __attribute__((vector_size(32)));
    struct Halves {
        Floats at[2];
    };
    struct Indices {
        Ints at[2];
    };
    const Floats t = __builtin_bit_cast(Floats, table);
    const Indices i = __builtin_bit_cast(Indices, index);
    const Halves out = {{__builtin_ia32_permvarsf256(t, i.at[0]), __builtin_ia32_permvarsf256(t, i.at[1])}};
    return __builtin_bit_cast(Wide, out);
#else
    Wide out;
    for (int i = 0; i < 16; ++i) out[i] = table[index[i] & 7];
    return out;
#endif
}

#endif
