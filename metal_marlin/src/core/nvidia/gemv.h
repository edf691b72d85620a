#pragma once
#ifdef __METAL_MARLIN_CUDA__

// What half and bfloat differ in: pairs of decoded weights as matrix operands, and the matrix multiply itself.
template <typename Format, typename T> struct MmaOperand;

template <typename Format> struct MmaOperand<Format, half> {
    static constexpr float kUnit =
        float(1 << Format::kScaledBy); // left in the sums: half subnormals are exact there

    static void pairs(uint word, thread uint (&w)[4]) { Format::scaled_pairs(word, w); }
    static uint scaled(uint pair, uint scale) { return times(times(pair, 0x74007400u), scale); } // 2^14
    static uint times(uint a, uint b) {
        uint d;
        __asm__("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
        return d;
    }
    static void mma(thread float (&d)[4], uint a0, uint a1, uint a2, uint a3, uint b0, uint b1) {
        __asm__("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                "{%0,%1,%2,%3};"
                : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
};

template <typename Format> struct MmaOperand<Format, bfloat> {
    static constexpr float kUnit = 1; // sums 2^-126 too small would lose their low bits

    static void pairs(uint word, thread uint (&w)[4]) {
        Format::scaled_bfloat_pairs(word, w);
        for (uint i = 0; i < 4; ++i) w[i] = times(w[i], 0x7e807e80u); // 2^126
    }
    static uint scaled(uint pair, uint scale) { return times(pair, scale); }
    static uint times(uint a, uint b) {
        uint d;
        __asm__("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000u));
        return d;
    }
    static void mma(thread float (&d)[4], uint a0, uint a1, uint a2, uint a3, uint b0, uint b1) {
        __asm__("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                "{%0,%1,%2,%3};"
                : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
};

// Matrix-vector with the matrix instruction: a threadgroup takes 16 rows, its simdgroups take turns along K, 128 weights
// a turn. A dot product does not care in which order k is visited, so the 16 bytes a lane reads of a row are its
// operands of eight m16n8k16 steps, and x is read in the same order. Lane = 4 * r + c reads weights 32 * c ... of rows
// r and r + 8, and x of token r. What hides the time of a read is other simdgroups: at 64 registers two threadgroups of
// 512 share a multiprocessor, which was faster than fewer simdgroups that read further ahead (H200: 12.1 us against
// 13 to 17 for 4096 x 14336).
template <typename Format, typename T, typename S, uint kTokens> struct MmaGemv {
    enum : uint { kRows = 16, kColumns = 8, kMaxSimdgroups = 16, kStep = 128, kLane = 32 };
    typedef MmaOperand<Format, T> Operand;

    struct Shared {
        float sums[kMaxSimdgroups][kRows][kColumns];
    };

    struct Lane {
        device const uint* codes[2];
        device const S* scales[2];
        device const T* x;
        bool reads_x;
    };
    struct Codes {
        uint4 row[2];
    };
    struct Near { // the same for several threadgroups or turns, so in a cache
        uint4 x[4];
        S scales[2][2];
    };

    static uint4 stream(device const uint* from) {
        uint v[4];
        __asm__("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                : "l"(from));
        return uint4(v[0], v[1], v[2], v[3]);
    }

    static uint halves(uint a, uint b, uint which) {
        uint d;
        __asm__("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(which));
        return d;
    }

    static uint join(T a, T b) { return uint(as_type<ushort>(a)) | uint(as_type<ushort>(b)) << 16; }

    // The lane's 32 codes of both rows from weight k on; 0 behind the end.
    template <bool kAligned>
    static Codes codes(thread const GemvArguments<T, S>& a, thread const Lane& lane, uint k) {
        Codes q;
        for (uint h = 0; h < 2; ++h) {
            q.row[h] = 0;
            if (kAligned) {
                if (k < a.K) q.row[h] = stream(lane.codes[h] + k / 8);
            } else {
                for (uint j = 0; j < 4; ++j) {
                    if (k + 8 * j < a.K) q.row[h][j] = lane.codes[h][k / 8 + j];
                }
            }
        }
        return q;
    }

    template <bool kAligned, bool kFine>
    static Near near(thread const GemvArguments<T, S>& a, thread const Lane& lane, uint k) {
        Near n;
        for (uint h = 0; h < 2; ++h) {
            n.scales[h][0] = lane.scales[h][min(k >> a.shift, a.groups - 1)];
            if (kFine) n.scales[h][1] = lane.scales[h][min((k + 16) >> a.shift, a.groups - 1)];
        }
        for (uint j = 0; j < 4; ++j) {
            n.x[j] = 0;
            if (lane.reads_x && k + 8 * j < a.K) {
                device const T* x = lane.x + k + 8 * j;
                if (kAligned) {
                    n.x[j] = *(device const uint4*)x;
                } else {
                    n.x[j] = uint4(join(x[0], x[1]), join(x[2], x[3]), join(x[4], x[5]), join(x[6], x[7]));
                }
            }
        }
        return n;
    }

    template <bool kFine>
    static void multiply(thread const Codes& q, thread const Near& n, thread float (&total)[4]) {
        float d[4] = {0, 0, 0, 0};
#pragma unroll
        for (uint j = 0; j < 4; ++j) {
            uint w[2][4], b[4];
            const uint4 x = n.x[j]; // codes i and i + 4 of a word are a pair
            b[0] = halves(x.x, x.z, 0x5410);
            b[1] = halves(x.x, x.z, 0x7632);
            b[2] = halves(x.y, x.w, 0x5410);
            b[3] = halves(x.y, x.w, 0x7632);
#pragma unroll
            for (uint h = 0; h < 2; ++h) {
                Operand::pairs(q.row[h][j], w[h]);
                if (kFine) {
                    const T scale = T(float(n.scales[h][j / 2]));
#pragma unroll
                    for (uint i = 0; i < 4; ++i) w[h][i] = Operand::scaled(w[h][i], join(scale, scale));
                }
            }
            Operand::mma(d, w[0][0], w[1][0], w[0][1], w[1][1], b[0], b[1]);
            Operand::mma(d, w[0][2], w[1][2], w[0][3], w[1][3], b[2], b[3]);
        }
        const float low = kFine ? 1.0f : float(n.scales[0][0]), high = kFine ? 1.0f : float(n.scales[1][0]);
        total[0] += low * d[0];
        total[1] += low * d[1];
        total[2] += high * d[2];
        total[3] += high * d[3];
    }

    template <bool kAligned, bool kFine>
    static void sum(thread const GemvArguments<T, S>& a, thread const Lane& lane, GemvPlace at,
                    thread float (&total)[4]) {
        const uint stride = at.sgs * kStep;
        uint k = at.sgid * kStep + kLane * (at.lane % 4);
        Codes next = codes<kAligned>(a, lane, k);
        for (uint turn = at.sgid * kStep; turn < a.K; turn += stride) {
            const Near n = near<kAligned, kFine>(a, lane, k);
            const Codes now = next;
            next = codes<kAligned>(a, lane, k + stride);
            multiply<kFine>(now, n, total);
            k += stride;
        }
    }

    static void run(GemvArguments<T, S> a, GemvPlace at, threadgroup Shared& sh) {
        const uint first = at.tgid.x * kRows, token = at.tgid.y * kTokens;
        const uint r = at.lane / 4, c = at.lane % 4, words = a.K / 8;
        const uint tokens = min(uint(kTokens), a.M - token);
        Lane lane;
        for (uint h = 0; h < 2; ++h) {
            const ulong row = min(first + r + 8 * h, a.N - 1);
            lane.codes[h] = a.codes + row * words;
            lane.scales[h] = a.scales + row * a.groups;
        }
        lane.reads_x = r < tokens;
        lane.x = a.x + ulong(token + (lane.reads_x ? r : 0)) * a.K;

        // Scales of groups that one turn lies in multiply its sums; scales of finer groups multiply the weights, which
        // are then rounded to T, as they are when dequantised.
        float total[4] = {0, 0, 0, 0};
        const bool coarse = a.shift >= 7;
        if (coarse && a.aligned) {
            sum<true, false>(a, lane, at, total);
        } else if (a.aligned) {
            sum<true, true>(a, lane, at, total);
        } else {
            sum<false, true>(a, lane, at, total);
        }
        const float unit = coarse && a.aligned ? Operand::kUnit : 1.0f;
        threadgroup float* to = &sh.sums[at.sgid][r][2 * c];
        to[0] = total[0] * unit;
        to[1] = total[1] * unit;
        to[8 * kColumns] = total[2] * unit;
        to[8 * kColumns + 1] = total[3] * unit;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint i = at.sgid * kSimdWidth + at.lane; i < kRows * tokens; i += at.sgs * kSimdWidth) {
            const uint row = i % kRows, m = i / kRows;
            float y = 0;
#pragma unroll
            for (uint s = 0; s < kMaxSimdgroups; ++s) y += s < at.sgs ? sh.sums[s][row][m] : 0.0f;
            if (first + row < a.N) a.y[ulong(token + m) * a.N + first + row] = T(y);
        }
    }
};

template <typename Format, typename T, typename S, uint kTokens> struct GemvOf {
    typedef MmaGemv<Format, T, S, kTokens> type;
};
template <typename Format, typename S, uint kTokens> struct GemvOf<Format, float, S, kTokens> {
    typedef SimdGemv<Format, float, S, kTokens> type;
};
template <typename Format, typename T, typename S, uint kTokens>
using Gemv = typename GemvOf<Format, T, S, kTokens>::type;
#endif
