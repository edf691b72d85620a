#pragma once
// Codes as operands of the matrix instruction, for half and bfloat. MmaDecode<Format, T>::pairs gives the values of a
// word in pairs, codes i and i + kPerWord / 2, less the middle of unsigned codes and times 1 / kUnit; plain() takes that
// factor out. All of it is exact.
#ifdef __METAL_MARLIN_CUDA__

struct INT4;
struct UINT4;
struct INT8;
struct UINT8;
struct FP8E4M3;
struct FP8E5M2;

// What half and bfloat differ in.
template <typename T> struct MmaPair;

template <> struct MmaPair<half> {
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

static inline uint mma_permute(uint a, uint b, uint which) {
    uint d;
    __asm__("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(which));
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
template <> struct MmaDecode<INT4, half> : MmaPlain {
    static void pairs(uint word, thread uint (&w)[4]) {
#pragma unroll
        for (uint i = 0; i < 2; ++i) {
            const uint t = word >> (8 * i);
            w[2 * i] = MmaPair<half>::minus((t & 0x000f000fu) | 0x64006400u, 0x64086408u);
            w[2 * i + 1] = MmaPair<half>::fma((t & 0x00f000f0u) | 0x64006400u, 0x2c002c00u, 0xd480d480u);
        }
    }
};
template <> struct MmaDecode<INT4, bfloat> : MmaPlain {
    static void pairs(uint word, thread uint (&w)[4]) {
#pragma unroll
        for (uint i = 0; i < 4; ++i) {
            w[i] = MmaPair<bfloat>::minus(((word >> (4 * i)) & 0x000f000fu) | 0x43004300u, 0x43084308u);
        }
    }
};
template <> struct MmaDecode<UINT4, half> : MmaDecode<INT4, half> {};
template <> struct MmaDecode<UINT4, bfloat> : MmaDecode<INT4, bfloat> {};

// 1024 + u with u = q + 128 of a signed byte.
template <uint kFlip> struct MmaBytes : MmaPlain {
    static void pairs(uint word, thread uint (&w)[2]) {
#pragma unroll
        for (uint i = 0; i < 2; ++i) {
            const uint u = ((word >> (8 * i)) & 0x00ff00ffu) ^ (0x64006400u | kFlip << 16 | kFlip);
            w[i] = MmaPair<half>::minus(u, 0x64806480u);
        }
    }
};
template <> struct MmaDecode<INT8, half> : MmaBytes<0x80> {};
template <> struct MmaDecode<UINT8, half> : MmaBytes<0> {};

// A bfloat has seven bits: 2^23 + u as a float, whose upper half is exact after the subtraction.
template <uint kFlip> struct MmaWideBytes : MmaPlain {
    static uint number(uint flipped, uint i) {
        return as_type<uint>(as_type<float>(mma_permute(flipped, 0x4b000000u, 0x7440u + i)) - 8388736.0f);
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

// A word's codes 2 * i and 2 * i + 1 as pair i: neighbours along k.
template <typename Format, typename T>
static inline void mma_neighbours(uint word, thread uint (&w)[Format::kPerWord / 2]) {
    uint p[Format::kPerWord / 2];
    MmaDecode<Format, T>::pairs(word, p);
    enum : uint { kHalf = Format::kPerWord / 4 };
#pragma unroll
    for (uint i = 0; i < kHalf; ++i) {
        w[i] = mma_permute(p[2 * i], p[2 * i + 1], 0x5410);
        w[i + kHalf] = mma_permute(p[2 * i], p[2 * i + 1], 0x7632);
    }
}
#endif
