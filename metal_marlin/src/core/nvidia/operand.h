#pragma once
// Codes as operands of the matrix instruction, for half and bfloat. MmaDecode<Format, T>::pairs gives the values of a
// word of codes in pairs, i and i + kPerWord / 2, less the middle of unsigned codes and times 1 / kUnit; plain() takes
// that factor out. All of it is exact but for NF3, whose values half and bfloat do not have.
#ifdef __METAL_MARLIN_CUDA__
struct FP4;
struct INT2;
struct INT3;
struct INT4;
struct UINT4;
struct INT8;
struct UINT8;
struct FP8E4M3;
struct FP8E5M2;

// What half and bfloat differ in.
template <typename T> struct MmaPair;

template <> struct MmaPair<half> {
    enum : uint { kMantissa = 10, kBias = 15 };
    static uint times(uint a, uint b) {
        uint d;
        __asm__("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
        return d;
    }
    static uint fma(uint a, uint b, uint c) {
        uint d;
        __asm__("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
        return d;
    }
    static uint plus(uint a, uint b) {
        uint d;
        __asm__("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
        return d;
    }
    static uint minus(uint a, uint b) {
        uint d;
        __asm__("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
        return d;
    }
    static void mma(thread float (&d)[4], uint a0, uint a1, uint a2, uint a3, uint b0, uint b1) {
        __asm__("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                "{%0,%1,%2,%3};"
                : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
};

template <> struct MmaPair<bfloat> { // sm_80 has fma only
    enum : uint { kMantissa = 7, kBias = 127 };
    static uint times(uint a, uint b) { return fma(a, b, 0x80008000u); }
    static uint fma(uint a, uint b, uint c) {
        uint d;
        __asm__("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
        return d;
    }
    static uint plus(uint a, uint b) { return fma(a, 0x3f803f80u, b); }
    static uint minus(uint a, uint b) { return plus(a, b ^ 0x80008000u); }
    static void mma(thread float (&d)[4], uint a0, uint a1, uint a2, uint a3, uint b0, uint b1) {
        __asm__("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                "{%0,%1,%2,%3};"
                : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
};

// 32 k of weights of which every four have two: those are w, and where they stand is in the words of lanes kStep * 2 and
// kStep * 2 + 1 of every four, as SparsePlaces says.
template <typename T> struct SparseMma;
#define SPARSE_MMA(T, type)                                                                                  \
    template <> struct SparseMma<T> {                                                                        \
        template <uint kStep>                                                                                \
        static void mma(thread float (&d)[4], thread const uint (&w)[4], thread const uint (&x)[4],          \
                        uint places) {                                                                       \
            __asm__("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." type "." type ".f32 "      \
                    "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, %13;"                \
                    : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                         \
                    : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "r"(x[0]), "r"(x[1]), "r"(x[2]),           \
                      "r"(x[3]), "r"(places), "n"(kStep));                                                   \
        }                                                                                                    \
    };
SPARSE_MMA(half, "f16")
SPARSE_MMA(bfloat, "bf16")
#undef SPARSE_MMA

static inline uint mma_permute(uint a, uint b, uint which) {
    uint d;
    __asm__("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(which));
    return d;
}

// (bits & mask) | more. Of two constants the assembler would make two instructions.
static inline uint mma_insert(uint bits, uint mask, uint more) {
    uint d;
    __asm__("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(bits), "r"(mask), "r"(more));
    return d;
}

template <typename Format, typename T> struct MmaDecode;

// FP4, whose header has the bits: values of a half are 2^14 too small, of a bfloat 2^126, which sums could not bear.
template <typename Format> struct MmaDecode<Format, half> {
    static constexpr float kUnit = float(1 << Format::kScaledBy);
    static void pairs(uint word, thread uint (&w)[4]) { Format::scaled_pairs(word, w); }
    static uint plain(uint pair) { return MmaPair<half>::times(pair, 0x74007400u); }
};
template <typename Format> struct MmaDecode<Format, bfloat> {
    static constexpr float kUnit = 1;
    static void pairs(uint word, thread uint (&w)[4]) {
        Format::scaled_bfloat_pairs(word, w);
        for (uint i = 0; i < 4; ++i) w[i] = MmaPair<bfloat>::times(w[i], 0x7e807e80u);
    }
    static uint plain(uint pair) { return pair; }
};

struct MmaPlain {
    static constexpr float kUnit = 1;
    static uint plain(uint pair) { return pair; }
};

// The bits of 1024 + q, or of 1024 + 16 q; of a bfloat 128 + q.
template <typename T, uint kMiddle> struct MmaNibbles;
template <uint kMiddle> struct MmaNibbles<half, kMiddle> : MmaPlain {
    static void pairs(uint word, thread uint (&w)[4]) {
#pragma unroll
        for (uint i = 0; i < 2; ++i) {
            const uint t = word >> (8 * i);
            w[2 * i] = MmaPair<half>::minus(mma_insert(t, 0x000f000fu, 0x64006400u),
                                            0x64006400u | kMiddle * 0x10001u);
            w[2 * i + 1] = MmaPair<half>::fma(mma_insert(t, 0x00f000f0u, 0x64006400u), 0x2c002c00u,
                                              0xd400d400u | kMiddle * 0x100010u);
        }
    }
};
template <uint kMiddle> struct MmaNibbles<bfloat, kMiddle> : MmaPlain {
    static void pairs(uint word, thread uint (&w)[4]) {
#pragma unroll
        for (uint i = 0; i < 4; ++i) {
            w[i] = MmaPair<bfloat>::minus(mma_insert(word >> (4 * i), 0x000f000fu, 0x43004300u),
                                          0x43004300u | kMiddle * 0x10001u);
        }
    }
};
template <> struct MmaDecode<INT4, half> : MmaNibbles<half, 8> {};
template <> struct MmaDecode<INT4, bfloat> : MmaNibbles<bfloat, 8> {};
template <> struct MmaDecode<UINT4, half> : MmaNibbles<half, 8> {};
template <> struct MmaDecode<UINT4, bfloat> : MmaNibbles<bfloat, 8> {};

// Eight codes q of two or three bits as 2 * q - kTwice. Those of a pair are brought to the same bits of both halves, as
// many next to one another as a mantissa holds. There, bits from `at` on are 2^kMantissa + q * 2^at with an exponent
// above them, and one multiply-add takes all but 2 * q away. The lowest bit of a mantissa is left alone: 2^kMantissa +
// kTwice / 2 would not be a number.
template <typename T, uint kBits, uint kTwice> struct MmaFields {
    typedef MmaPair<T> Pair;
    enum : uint { kMantissa = Pair::kMantissa, kBias = Pair::kBias, kTogether = (kMantissa - 1) / kBits };
    static constexpr float kUnit = 0.5f;

    static constexpr uint both(uint bits) { return bits << 16 | bits; }
    static uint number(uint bits, uint at) {
        return Pair::fma(
            mma_insert(bits, both(((1u << kBits) - 1) << at), both((kBias + kMantissa) << kMantissa)),
            both((kBias + 1 - at) << kMantissa),
            both(0x8000u | (kBias + kMantissa + 1 - at) << kMantissa | kTwice << (at - 1)));
    }
    // Of fields from bit 1 on.
    static uint field(uint halves, uint i) {
        return number(halves >> (i / kTogether * kTogether * kBits), 1 + i % kTogether * kBits);
    }
    static void pairs(uint word, thread uint (&w)[4]) {
        const uint halves = mma_permute(word << 1, word << (17 - 4 * kBits), 0x7610);
#pragma unroll
        for (uint i = 0; i < 4; ++i) w[i] = field(halves, i);
    }
    static uint plain(uint pair) { return Pair::times(pair, both((kBias - 1) << kMantissa)); }
};
template <> struct MmaDecode<INT2, half> : MmaFields<half, 2, 3> {};
template <> struct MmaDecode<INT2, bfloat> : MmaFields<bfloat, 2, 3> {};
template <> struct MmaDecode<INT3, half> : MmaFields<half, 3, 7> {};
template <> struct MmaDecode<INT3, bfloat> : MmaFields<bfloat, 3, 7> {};

// NF3, whose values are rounded to T: an instruction looks four codes up in eight bytes, of which two registers hold the
// lower ones of the values and two the upper ones.
template <typename T> struct MmaNormal : MmaPlain {
    static uint bytes(uint first, uint shift) {
        uint found = 0;
#pragma unroll
        for (uint i = 0; i < 4; ++i) {
            found |= (uint(as_type<ushort>(T(NF3::value(first + i)))) >> shift & 0xffu) << (8 * i);
        }
        return found;
    }
    static void two(uint word, thread uint& a, thread uint& b) { // codes 0, 4, 1 and 5, a digit each
        look_up((word & 0x7u) | (word >> 8 & 0x70u) | (word << 5 & 0x700u) | (word >> 3 & 0x7000u), a, b);
    }
    static void look_up(uint digits, thread uint& a, thread uint& b) { // of the four lowest digits
        const uint low = mma_permute(bytes(0, 0), bytes(4, 0), digits);
        const uint high = mma_permute(bytes(0, 8), bytes(4, 8), digits);
        a = mma_permute(low, high, 0x5140), b = mma_permute(low, high, 0x7362);
    }
    static void pairs(uint word, thread uint (&w)[4]) { two(word, w[0], w[1]), two(word >> 6, w[2], w[3]); }
};
template <> struct MmaDecode<NF3, half> : MmaNormal<half> {};
template <> struct MmaDecode<NF3, bfloat> : MmaNormal<bfloat> {};

// 1024 + u with u = q + 128 of a signed byte.
template <uint kFlip, uint kMiddle = 128> struct MmaBytes : MmaPlain {
    static void pairs(uint word, thread uint (&w)[2]) {
        const uint flipped = word ^ kFlip * 0x01010101u;
#pragma unroll
        for (uint i = 0; i < 2; ++i) {
            w[i] = MmaPair<half>::minus(mma_insert(flipped >> (8 * i), 0x00ff00ffu, 0x64006400u),
                                        0x64006400u | kMiddle * 0x10001u);
        }
    }
};
template <> struct MmaDecode<INT8, half> : MmaBytes<0x80> {};
template <> struct MmaDecode<UINT8, half> : MmaBytes<0> {};

// A bfloat has seven bits: 2^23 + u as a float, whose upper half is exact after the subtraction.
template <uint kFlip, uint kMiddle = 128> struct MmaWideBytes : MmaPlain {
    static uint number(uint flipped, uint i) {
        const float all = as_type<float>(mma_permute(flipped, 0x4b000000u, 0x7440u + i));
        return as_type<uint>(all - float(8388608 + kMiddle));
    }
    static void pairs(uint word, thread uint (&w)[2]) {
        const uint flipped = word ^ kFlip;
#pragma unroll
        for (uint i = 0; i < 2; ++i) w[i] = mma_permute(number(flipped, i), number(flipped, i + 2), 0x7632);
    }
};
template <> struct MmaDecode<INT8, bfloat> : MmaWideBytes<0x80808080u> {};
template <> struct MmaDecode<UINT8, bfloat> : MmaWideBytes<0> {};

// Bytes i and i + 2 of a word as the upper bytes of a pair.
static inline uint mma_upper(uint word, uint i) { return (i == 0 ? word << 8 : word) & 0xff00ff00u; }

template <> struct MmaDecode<FP8E5M2, half> : MmaPlain {
    static void pairs(uint word, thread uint (&w)[2]) {
        for (uint i = 0; i < 2; ++i) w[i] = mma_upper(word, i);
    }
};

// Below, exponent and mantissa move to where T has them, which makes values too small; what is not finite has all
// exponent bits set (of E4M3, all bits): one more at the lowest of them carries out.
template <> struct MmaDecode<FP8E5M2, bfloat> : MmaPlain {
    static void pairs(uint word, thread uint (&w)[2]) {
        for (uint i = 0; i < 2; ++i) {
            const uint t = mma_upper(word, i), size = (t & 0x7f007f00u) >> 3;
            const uint carry = (size + 0x00800080u) & 0x10001000u, most = (carry << 3) - (carry >> 5);
            w[i] = MmaPair<bfloat>::times((t & 0x80008000u) | size | most, 0x77807780u); // 2^112
        }
    }
};
template <> struct MmaDecode<FP8E4M3, half> {
    static constexpr float kUnit = 256;
    static void pairs(uint word, thread uint (&w)[2]) {
        for (uint i = 0; i < 2; ++i) {
            const uint t = mma_upper(word, i), size = (t & 0x7f007f00u) >> 1;
            w[i] = (t & 0x80008000u) | size | ((size + 0x00800080u) & 0x40004000u);
        }
    }
    static uint plain(uint pair) { return MmaPair<half>::times(pair, 0x5c005c00u); } // 2^8
};
template <> struct MmaDecode<FP8E4M3, bfloat> : MmaPlain {
    static void pairs(uint word, thread uint (&w)[2]) {
        for (uint i = 0; i < 2; ++i) {
            const uint t = mma_upper(word, i), size = (t & 0x7f007f00u) >> 4;
            const uint carry = (size + 0x00100010u) & 0x08000800u, most = (carry << 4) - (carry >> 4);
            w[i] = MmaPair<bfloat>::times((t & 0x80008000u) | size | most, 0x7b807b80u); // 2^120
        }
    }
};

// Like MmaDecode, but unsigned codes are themselves: zeros that are no whole numbers are taken from them, and that is
// rounded once.
template <typename Format, typename T> struct MmaCodes : MmaDecode<Format, T> {};
template <typename T> struct MmaCodes<UINT4, T> : MmaNibbles<T, 0> {};
template <> struct MmaCodes<UINT8, half> : MmaBytes<0, 0> {};
template <> struct MmaCodes<UINT8, bfloat> : MmaWideBytes<0, 0> {};

// A word's codes 2 * i and 2 * i + 1 as pair i: neighbours along k; values times 1 / kUnit. Unsigned codes are
// themselves, as above.
template <typename Format, typename T> struct MmaNeighbours {
    static constexpr float kUnit = MmaDecode<Format, T>::kUnit;
    static void pairs(uint word, thread uint (&w)[Format::kPerWord / 2]) {
        uint p[Format::kPerWord / 2];
        MmaDecode<Format, T>::pairs(word, p);
        enum : uint { kHalf = Format::kPerWord / 4 };
#pragma unroll
        for (uint i = 0; i < kHalf; ++i) {
            w[i] = mma_permute(p[2 * i], p[2 * i + 1], 0x5410);
            w[i + kHalf] = mma_permute(p[2 * i], p[2 * i + 1], 0x7632);
        }
    }
};

// Codes of four bits become bytes first, those of even and of odd places apart.
template <> struct MmaNeighbours<FP4, half> {
    static constexpr float kUnit = 16384;
    static void pairs(uint word, thread uint (&w)[4]) {
        const uint even = ((word << 4) & 0x80808080u) | ((word << 1) & 0x0e0e0e0eu);
        const uint odd = (word & 0x80808080u) | ((word >> 3) & 0x0e0e0e0eu);
        const uint low = mma_permute(even, odd, 0x5140), high = mma_permute(even, odd, 0x7362);
        w[0] = mma_permute(low, 0, 0x1404), w[1] = mma_permute(low, 0, 0x3424);
        w[2] = mma_permute(high, 0, 0x1404), w[3] = mma_permute(high, 0, 0x3424);
    }
};
// kUpper: the upper byte of 2^kMantissa; kMiddle: what codes are less.
template <typename T, uint kUpper, uint kMiddle> struct MmaIntegers {
    static constexpr float kUnit = 1;
    static void pairs(uint word, thread uint (&w)[4]) {
        const uint even = word & 0x0f0f0f0fu, odd = (word >> 4) & 0x0f0f0f0fu, upper = kUpper * 0x01010101u;
        const uint low = mma_permute(even, odd, 0x5140), high = mma_permute(even, odd, 0x7362);
        w[0] = mma_permute(low, upper, 0x4140), w[1] = mma_permute(low, upper, 0x4342);
        w[2] = mma_permute(high, upper, 0x4140), w[3] = mma_permute(high, upper, 0x4342);
#pragma unroll
        for (uint i = 0; i < 4; ++i) w[i] = MmaPair<T>::minus(w[i], (kUpper << 8 | kMiddle) * 0x10001u);
    }
};
template <> struct MmaNeighbours<INT4, half> : MmaIntegers<half, 0x64, 8> {};
template <> struct MmaNeighbours<UINT4, half> : MmaIntegers<half, 0x64, 0> {};
template <> struct MmaNeighbours<INT4, bfloat> : MmaIntegers<bfloat, 0x43, 8> {};
template <> struct MmaNeighbours<UINT4, bfloat> : MmaIntegers<bfloat, 0x43, 0> {};

template <uint kFlip, uint kMiddle> struct MmaNeighbourBytes {
    static constexpr float kUnit = 1;
    static void pairs(uint word, thread uint (&w)[2]) {
        const uint u = word ^ kFlip * 0x01010101u;
        w[0] = MmaPair<half>::minus(mma_permute(u, 0x64646464u, 0x4140), (0x6400 | kMiddle) * 0x10001u);
        w[1] = MmaPair<half>::minus(mma_permute(u, 0x64646464u, 0x4342), (0x6400 | kMiddle) * 0x10001u);
    }
};
template <> struct MmaNeighbours<INT8, half> : MmaNeighbourBytes<0x80, 0x80> {};
template <> struct MmaNeighbours<UINT8, half> : MmaNeighbourBytes<0, 0> {};
template <uint kFlip, uint kMiddle> struct MmaNeighbourWideBytes {
    static constexpr float kUnit = 1;
    static void pairs(uint word, thread uint (&w)[2]) {
        typedef MmaWideBytes<kFlip, kMiddle> Bytes;
        const uint u = word ^ kFlip;
        w[0] = mma_permute(Bytes::number(u, 0), Bytes::number(u, 1), 0x7632);
        w[1] = mma_permute(Bytes::number(u, 2), Bytes::number(u, 3), 0x7632);
    }
};
template <> struct MmaNeighbours<INT8, bfloat> : MmaNeighbourWideBytes<0x80808080u, 128> {};
template <> struct MmaNeighbours<UINT8, bfloat> : MmaNeighbourWideBytes<0, 0> {};
#endif
