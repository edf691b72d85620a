#pragma once
#ifdef __METAL_MARLIN_CUDA__
#include "core/nvidia/operand.h"

// Matrix-vector with the matrix instruction: a threadgroup takes 16 rows, its simdgroups take turns along K, four times
// four words of codes of each row a turn: of 16 bytes, of two- and three-bit codes 8 and 12. A dot product does not care
// in which order k is visited, so what a lane reads of a row are its operands of eight (of 8-bit codes four) m16n8k16
// steps, and x is read in the same order. Lane = 4 * r +
// c reads weights kLane * c ... of rows r and r + 8, and x of token r. What hides the time of a read is other
// simdgroups: at 64 registers two threadgroups of 512 share a multiprocessor, which was faster than fewer simdgroups
// that read further ahead (H200: 12.1 us against 13 to 17 for 4096 x 14336 in fp4).
template <typename Q, typename T, uint kTokens, typename Epilogue> struct MmaGemv {
    typedef typename Q::Format Format;
    typedef typename Q::S S;
    typedef MmaDecode<Format, T> Decode;
    typedef CodeWords<Format> Memory;
    typedef MmaPair<T> Pair;
    typedef GemvArguments<Q, T> Arguments;
    typedef MatrixRows<Q::kMatrices> Place;
    enum : uint {
        kRows = 16,
        kOutputs = kRows / Q::kMatrices,
        kColumns = 8,
        kMaxSimdgroups = 16,
        kPerWord = Format::kPerWord,
        kLane = 4 * kPerWord,
        kLoads = Memory::kSize / 8, // words of memory a lane reads
        kStep = 4 * kLane,
        kXs = kLane / 8,
        kRuns = kLane / 16, // no scale changes within
        kMiddles = Q::kAffine ? uint(kRuns) : 1
    };

    struct Shared {
        float sums[kMaxSimdgroups][kRows][kColumns];
    };

    struct Lane {
        device const uint* codes[2];
        typename Q::Row rows[2];
        device const T* x;
        uint token;
        bool reads_x;
    };
    struct Codes {
        uint row[2][kLoads];
    };
    struct Near { // the same for several threadgroups or turns, so in a cache
        uint4 x[kXs];
        S scales[2][kRuns];
        float offsets[2][kMiddles];
    };

    static void stream(device const uint* from, thread uint (&v)[4]) {
        __asm__("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                : "l"(from));
    }
    static void stream(device const uint* from, thread uint (&v)[2]) {
        __asm__("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0,%1}, [%2];"
                : "=r"(v[0]), "=r"(v[1])
                : "l"(from));
    }
    static void stream(device const uint* from,
                       thread uint (&v)[3]) { // parts of the same lines, which L1 keeps
        for (uint j = 0; j < 3; ++j) {
            __asm__("ld.global.nc.L1::evict_first.L2::128B.u32 %0, [%1];" : "=r"(v[j]) : "l"(from + j));
        }
    }

    static void fetch(device const uint* from) { __asm__ volatile("prefetch.global.L2 [%0];" : : "l"(from)); }

    static uint join(T a, T b) { return uint(as_type<ushort>(a)) | uint(as_type<ushort>(b)) << 16; }

    // The lane's codes of both rows from weight k on; 0 behind the end.
    template <bool kAligned> static Codes codes(thread const Arguments& a, thread const Lane& lane, uint k) {
        Codes q;
        for (uint h = 0; h < 2; ++h) {
            const uint first = Memory::stored(k);
            for (uint j = 0; j < kLoads; ++j) q.row[h][j] = 0;
            if (kAligned) {
                if (k < a.K) stream(lane.codes[h] + first, q.row[h]);
            } else {
                for (uint j = 0; j < kLoads; ++j) {
                    if (first + j < Memory::stored(a.K)) q.row[h][j] = lane.codes[h][first + j];
                }
            }
        }
        return q;
    }

    template <bool kAligned, bool kFine, typename Input>
    static Near near(thread const Arguments& a, thread const Lane& lane, uint k, Input input) {
        Near n;
        for (uint h = 0; h < 2; ++h) {
            for (uint run = 0; run < (kFine ? uint(kRuns) : 1); ++run) {
                const uint g = a.group(k + 16 * run);
                n.scales[h][run] = lane.rows[h].scales[g];
                if (Q::kAffine) n.offsets[h][run] = Middle<Q>::offset(lane.rows[h].group(g));
            }
        }
        for (uint j = 0; j < kXs; ++j) {
            n.x[j] = 0;
            if (kAligned) {
                if (lane.reads_x && k + 8 * j < a.K) n.x[j] = *(device const uint4*)(lane.x + k + 8 * j);
            } else {
                for (uint i = 0; i < 8; i += 4) { // a word has four codes or more
                    if (lane.reads_x && k + 8 * j + i < a.K) {
                        device const T* x = lane.x + k + 8 * j + i;
                        n.x[j][i / 2] = join(x[0], x[1]);
                        n.x[j][i / 2 + 1] = join(x[2], x[3]);
                    }
                }
            }
            if (!Input::kPlain && lane.reads_x) n.x[j] = input.eight(n.x[j], lane.token, k + 8 * j);
        }
        return n;
    }

    // Scales of groups finer than a turn multiply the weights, which are rounded to T as they are when dequantised. A
    // scale need not be a number that T has: it is divided by a power of two, which multiplies the turn's sums. Lanes
    // 4 * r ... add to the same sums; their largest scale gives the power.
    struct Factors {
        uint scales[2][kRuns], offsets[2][kMiddles]; // pairs
        float powers[2];
    };
    static Factors factors(thread const Near& n) {
        Factors f;
        for (uint h = 0; h < 2; ++h) {
            uint most = 0;
            for (uint run = 0; run < kRuns; ++run) {
                most = max(most, as_type<uint>(Q::Scale::value(n.scales[h][run])) & 0x7f800000u);
                if (Q::kAffine) most = max(most, as_type<uint>(n.offsets[h][run]) & 0x7f800000u);
            }
            most = max(most, simd_shuffle_xor(most, ushort(1)));
            most = min(max(most, simd_shuffle_xor(most, ushort(2))), 252u << 23);
            f.powers[h] = as_type<float>(most + (1u << 23));
            const float inverse = as_type<float>((253u << 23) - most);
            for (uint run = 0; run < kRuns; ++run) {
                const T scale = T(Q::Scale::value(n.scales[h][run]) * inverse);
                f.scales[h][run] = join(scale, scale);
                if (Q::kAffine) {
                    const T offset = T(n.offsets[h][run] * inverse);
                    f.offsets[h][run] = join(offset, offset);
                }
            }
        }
        return f;
    }

    // Weights of word j of both rows times x, added to d; where kOnes, x alone is added to sums.
    template <bool kOnes>
    static void word(thread const uint (&w)[2][kPerWord / 2], thread const Near& n, uint j,
                     thread float (&d)[4], thread float (&sums)[4]) {
        const uint one = join(T(1), T(1));
        // codes i and i + kPerWord / 2 of a word are a pair
        uint b[kPerWord / 2];
        if (kPerWord == 8) {
            const uint4 x = n.x[j % kXs];
            b[0] = mma_permute(x.x, x.z, 0x5410);
            b[1] = mma_permute(x.x, x.z, 0x7632);
            b[kPerWord / 2 - 2] = mma_permute(x.y, x.w, 0x5410);
            b[kPerWord / 2 - 1] = mma_permute(x.y, x.w, 0x7632);
        } else {
            const uint low = n.x[j / 2][j % 2 * 2], high = n.x[j / 2][j % 2 * 2 + 1];
            b[0] = mma_permute(low, high, 0x5410);
            b[1] = mma_permute(low, high, 0x7632);
        }
#pragma unroll
        for (uint i = 0; i < kPerWord / 2; i += 2) {
            Pair::mma(d, w[0][i], w[1][i], w[0][i + 1], w[1][i + 1], b[i], b[i + 1]);
            if (kOnes) Pair::mma(sums, one, one, one, one, b[i], b[i + 1]);
        }
    }

    template <bool kFine>
    static void multiply(thread const Codes& q, thread const Near& n, thread float (&total)[4]) {
        enum : bool { kOnes = Q::kAffine && !kFine };
        float d[4] = {0, 0, 0, 0}, sums[4] = {0, 0, 0, 0};
        Factors f;
        if (kFine) f = factors(n);
#pragma unroll
        for (uint j = 0; j < 4; ++j) {
            uint w[2][kPerWord / 2];
#pragma unroll
            for (uint h = 0; h < 2; ++h) {
                Decode::pairs(Memory::of(q.row[h], j), w[h]);
                if (kFine) {
                    const uint run = j * kRuns / 4;
#pragma unroll
                    for (uint i = 0; i < kPerWord / 2; ++i) {
                        const uint plain = Decode::plain(w[h][i]);
                        w[h][i] = Q::kAffine
                                      ? Pair::fma(plain, f.scales[h][run], f.offsets[h][run % kMiddles])
                                      : Pair::times(plain, f.scales[h][run]);
                    }
                }
            }
            word<kOnes>(w, n, j, d, sums);
        }
#pragma unroll
        for (uint h = 0; h < 2; ++h) {
            const float scale = kFine ? f.powers[h] : Q::Scale::value(n.scales[h][0]);
#pragma unroll
            for (uint i = 2 * h; i < 2 * h + 2; ++i) {
                total[i] += scale * d[i];
                if (kOnes) total[i] += n.offsets[h][0] * sums[i];
            }
        }
    }

    template <bool kAligned, bool kFine, typename Input>
    static void sum(thread const Arguments& a, thread const Lane& lane, GemvPlace at,
                    thread float (&total)[4], Input input) {
        const uint stride = at.sgs * kStep;
        uint k = at.sgid * kStep + kLane * (at.lane % 4);
        Codes next;
        if (!kFine) next = codes<kAligned>(a, lane, k);
        for (uint turn = at.sgid * kStep; turn < a.K; turn += stride) {
            Codes now = next;
            if (kFine) now = codes<kAligned>(a, lane, k);
            const Near n = near<kAligned, kFine>(a, lane, k, input);
            if (!kFine) {
                next = codes<kAligned>(a, lane, k + stride);
            } else if (k + stride < a.K) { // registers are short: only to the second-level cache
                for (uint h = 0; h < 2; ++h) fetch(lane.codes[h] + Memory::stored(k + stride));
            }
            multiply<kFine>(now, n, total);
            k += stride;
        }
    }

    static float summed(threadgroup const Shared& sh, uint sgs, uint row, uint m) {
        float y = 0;
#pragma unroll
        for (uint s = 0; s < kMaxSimdgroups; ++s) y += s < sgs ? sh.sums[s][row][m] : 0.0f;
        return y;
    }

    template <typename Input = PlainInput>
    static void run(Arguments a, GemvPlace at, threadgroup Shared& sh, Epilogue epilogue = Epilogue(),
                    Input input = Input()) {
        static_assert(Input::kPlain || kPerWord == 8, "MmaGemv: K is a multiple of 8");
        const uint first = at.tgid.x * kOutputs, token = at.tgid.y * kTokens;
        const uint r = at.lane / 4, c = at.lane % 4;
        const uint tokens = min(uint(kTokens), a.M - token);
        Lane lane;
        for (uint h = 0; h < 2; ++h) {
            const uint matrix = Place::matrix(r + 8 * h, 8), n = first + Place::row(r + 8 * h, 8);
            lane.codes[h] = a.codes_of(matrix, n);
            lane.rows[h] = a.row_of(matrix, n);
        }
        lane.reads_x = r < tokens;
        lane.token = token + (lane.reads_x ? r : 0);
        lane.x = a.x + ulong(lane.token) * a.K;

        float total[4] = {0, 0, 0, 0};
        const bool coarse = (1u << a.shift) >= kStep; // a turn lies in one group
        if (coarse && a.aligned) {
            sum<true, false>(a, lane, at, total, input);
        } else if (a.aligned) {
            sum<true, true>(a, lane, at, total, input);
        } else {
            sum<false, true>(a, lane, at, total, input);
        }
        const float unit = (coarse && a.aligned ? Decode::kUnit : 1.0f) * lane.rows[0].factor;
        threadgroup float* to = &sh.sums[at.sgid][r][2 * c];
        to[0] = total[0] * unit;
        to[1] = total[1] * unit;
        to[8 * kColumns] = total[2] * unit;
        to[8 * kColumns + 1] = total[3] * unit;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint i = at.sgid * kSimdWidth + at.lane; i < kOutputs * tokens; i += at.sgs * kSimdWidth) {
            const uint row = i % kOutputs, m = i / kOutputs;
            float y = summed(sh, at.sgs, row, m);
            if (Q::kMatrices == 2) y = Q::join(y, summed(sh, at.sgs, row + 8, m));
            if (first + row < a.N)
                a.y[ulong(token + m) * a.N + first + row] = T(epilogue.apply(y, token + m, first + row));
        }
    }
};

template <typename Q, typename T, uint kTokens, typename Epilogue> struct GemvOf {
    typedef MmaGemv<Q, T, kTokens, Epilogue> type;
};
template <typename Q, uint kTokens, typename Epilogue> struct GemvOf<Q, float, kTokens, Epilogue> {
    typedef SimdGemv<Q, float, kTokens, 0, 0, Epilogue> type;
};
template <typename Q, typename T, uint kTokens, typename Epilogue = NoEpilogue>
using Gemv = typename GemvOf<Q, T, kTokens, Epilogue>::type;
#endif
