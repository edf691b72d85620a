#pragma once
// A lane's codes of a block of 16 rows and 64 k in operand order, and of them the left operands of the steps of 16 k. Where
// what lies: core/packed.h.
#ifdef __METAL_MARLIN_CUDA__
#include "core/nvidia/async_copy.h"
#include "core/nvidia/operand.h"

// The operand of a step, four pairs. Decode: RingDecode or RingCodes; they are the same for two and three bits.
template <typename Format, typename T> struct MmaStep {
    template <typename Decode, uint kCount>
    static void operand(thread const uint (&words)[kCount], uint step, thread uint (&w)[4]) {
        enum : uint { kPairs = Format::kPerWord / 2, kWords = 4 / kPairs };
#pragma unroll
        for (uint i = 0; i < kWords; ++i) {
            uint v[kPairs];
            Decode::pairs(words[step * kWords + i], v);
#pragma unroll
            for (uint j = 0; j < kPairs; ++j) w[i * kPairs + j] = v[j];
        }
    }
};

// FP4: products move a sign and a size at once, as multiplying takes other units than bitwise instructions do.
template <> struct MmaStep<FP4, half> {
    template <typename Decode, uint kCount>
    static void operand(thread const uint (&words)[kCount], uint step, thread uint (&w)[4]) {
        const uint q = words[step];
        w[0] = q & 0x8e008e00u;
        w[1] = (q << 3) & 0x8e008e00u;
        w[2] = ((q & 0x40384038u) * 66) & 0x8e008e00u;
        w[3] = ((q & 0x20072007u) * 516) & 0x8e008e00u;
    }
};
template <> struct MmaStep<FP4, bfloat> {
    template <typename Decode, uint kCount>
    static void operand(thread const uint (&words)[kCount], uint step, thread uint (&w)[4]) {
        const uint q = words[step];
        w[0] = number(q, q >> 3), w[1] = number(q << 3, q);
        w[2] = number(q << 1, q << 3), w[3] = number(q << 2, q << 6);
    }
    static uint number(uint sign, uint size) {
        return MmaPair<bfloat>::times((sign & 0x80008000u) | (size & 0x01c001c0u), 0x7e807e80u); // 2^126
    }
};

// What codes mean here: as MmaDecode and MmaCodes say, but where compute capability 9.0 has an instruction for it.
template <typename Format, typename T> struct RingDecode : MmaDecode<Format, T> {};
template <typename Format, typename T> struct RingCodes : MmaCodes<Format, T> {};
template <> struct RingDecode<FP8E4M3, half> : MmaPlain {
    static uint two(uint bytes) {
        uint halves;
        __asm__("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(ushort(bytes)));
        return halves;
    }
    static void pairs(uint word, thread uint (&w)[2]) {
        const uint ordered = mma_permute(word, 0, 0x3120); // those of a pair side by side
        w[0] = two(ordered), w[1] = two(ordered >> 16);
    }
};
template <> struct RingCodes<FP8E4M3, half> : RingDecode<FP8E4M3, half> {};

// A half's mantissa holds four fields from bit 2 on. With the bytes of both halves exchanged, it holds the others.
template <> struct MmaStep<INT2, half> {
    template <typename Decode>
    static void operand(thread const uint (&words)[2], uint step, thread uint (&w)[4]) {
        const uint word = words[step / 2], turned = mma_permute(word, 0, 0x2301);
#pragma unroll
        for (uint i = 0; i < 4; ++i) {
            const uint field = step % 2 * 4 + i;
            w[i] = field - 1 < 4 ? Decode::number(word, 2 * field)
                                 : Decode::number(turned, field == 0 ? 8 : 2 * field - 8);
        }
    }
};
// A bfloat's holds three, from bit 1 on.
template <> struct MmaStep<INT2, bfloat> {
    template <typename Decode>
    static void operand(thread const uint (&words)[2], uint step, thread uint (&w)[4]) {
        const uint word = words[step / 2];
#pragma unroll
        for (uint i = 0; i < 4; ++i) {
            const uint field = step % 2 * 4 + i;
            w[i] = Decode::number(field < 3 ? word << 1 : word >> (field / 3 * 6 - 1), 1 + field % 3 * 2);
        }
    }
};

template <typename T> struct MmaStep<INT3, T> {
    template <typename Decode>
    static void operand(thread const uint (&words)[3], uint step, thread uint (&w)[4]) {
#pragma unroll
        for (uint i = 0; i < 3; ++i)
            w[i] = step < 3 ? Decode::field(words[step], i) : Decode::field(words[i], 4);
        w[3] = step < 3 ? Decode::field(words[step], 3) : Decode::number(last(words), 1);
    }
    // The first bits as a field, brought together by choices of bits: an instruction each.
    static uint last(thread const uint (&words)[3]) {
        const uint two = ((words[0] << 1) & 0x00020002u) | ((words[1] << 2) & ~0x00020002u);
        return (two & 0x00060006u) | ((words[2] << 3) & ~0x00060006u);
    }
};

template <typename T> struct MmaStep<NF3, T> {
    template <typename Decode>
    static void operand(thread const uint (&words)[3], uint step, thread uint (&w)[4]) {
        const uint digits = (step < 3 ? words[step] : last(words)) & 0x77777777u;
        Decode::look_up(digits, w[0], w[1]);
        Decode::look_up(digits >> 16, w[2], w[3]);
    }
    static uint last(thread const uint (&words)[3]) {
        const uint two = ((words[0] >> 3) & 0x11111111u) | ((words[1] >> 2) & ~0x11111111u);
        return (two & 0x33333333u) | ((words[2] >> 1) & ~0x33333333u);
    }
};

// A number of 16 bits, or a byte, from its bits.
template <typename S> struct FromBits {
    static S number(uint bits) { return as_type<S>(ushort(bits)); }
};
template <> struct FromBits<uchar> {
    static uchar number(uint bits) { return uchar(bits); }
};

// Of formats with groups of their own, which weight k has scale k >> shift; 0: any.
template <typename Scale> struct OwnGroup {
    enum : uint { shift = 0 };
};
template <> struct OwnGroup<E8M0> {
    enum : uint { shift = 5 };
};
template <> struct OwnGroup<E4M3> {
    enum : uint { shift = 4 };
};

// Two scales that lie side by side.
template <typename Scale> struct ScalePair {
    typedef typename Scale::Stored S;
    static float2 values(uint both) {
        enum : uint { kBits = 8 * sizeof(S) };
        return float2(Scale::value(FromBits<S>::number(both & ((1u << kBits) - 1))),
                      Scale::value(FromBits<S>::number(both >> kBits)));
    }
};
template <> struct ScalePair<E4M3> {
    static float2 values(uint both) {
        const uint two = RingDecode<FP8E4M3, half>::two(both);
        return float2(float(as_type<half>(ushort(two))), float(as_type<half>(ushort(two >> 16))));
    }
};

template <> struct ScalePair<E8M0> { // both at once as bfloats, 0 to 2^-127 and 255 to NaN
    static float2 values(uint both) {
        const uint bits = mma_permute(both, 0, 0x4140) << 7;
        uint sizes;
        __asm__("max.u16x2 %0, %1, %2;" : "=r"(sizes) : "r"(bits), "r"(0x00400040u));
        sizes |= (bits + 0x00800080u) >> 9 & 0x00400040u; // of 255, carries out of the exponent
        return float2(as_type<float>(sizes << 16), as_type<float>(sizes & 0xffff0000u));
    }
};

// Whether pairs of MmaDecode times a scale are numbers of T, and those products, by one of two scales.
template <typename Format, typename Scale, typename T> struct ExactProduct {
    enum : bool { value = false };
    static uint times(uint pair, uint, uint) { return pair; }
};
template <> struct ExactProduct<FP4, E4M3, half> { // multiples of 2^-24 of at most six bits
    enum : bool { value = true };
    // (The assembler lets a product pick what is said so; a permutation it would keep.)
    static uint times(uint pair, uint both, uint which) {
        const uint two = RingDecode<FP8E4M3, half>::two(both);
        uint same;
        if (which == 0)
            __asm__("{ .reg .b16 a, b; mov.b32 {a, b}, %1; mov.b32 %0, {a, a}; }" : "=r"(same) : "r"(two));
        else
            __asm__("{ .reg .b16 a, b; mov.b32 {a, b}, %1; mov.b32 %0, {b, b}; }" : "=r"(same) : "r"(two));
        return MmaPair<half>::times(pair, same);
    }
};

// kCount words a lane, in threadgroup memory.
template <typename Format, typename T, uint kCount> struct PackedCodes {
    uint words[kCount];

    // from: address of the block
    static PackedCodes load(uint from, uint lane) {
        typedef LaneWords<kCount> Words;
        PackedCodes codes;
#pragma unroll
        for (uint i = 0; i < kCount; i += Words::kTogether) {
            const uint at = from + Words::at(lane, i) * 4;
            if (Words::kTogether == 4) {
                const uint4 v = shared_load16(at);
#pragma unroll
                for (uint j = 0; j < 4; ++j) codes.words[i + j] = v[j];
            } else if (i + 1 < kCount) {
                const uint2 v = shared_load8(at);
                codes.words[i] = v.x, codes.words[i + 1] = v.y;
            } else {
                codes.words[i] = shared_load4(at);
            }
        }
        return codes;
    }
    template <typename Decode>
    static void operand(thread const PackedCodes& codes, uint step, thread uint (&w)[4]) {
        MmaStep<Format, T>::template operand<Decode>(codes.words, step, w);
    }
};
#endif
