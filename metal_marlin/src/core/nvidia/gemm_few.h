#pragma once
#ifdef __METAL_MARLIN_CUDA__
#include "core/nvidia/async_copy.h"
#include "core/nvidia/operand.h"

// Few tokens, where time is what reading W takes. A threadgroup takes strips of 16 rows of W and kTokens tokens; its
// simdgroups take turns along K, 64 bytes of each row a turn, and add their sums at the end. Codes pass through a queue
// of kDepth steps (a strip's turn) in threadgroup memory that belongs to the simdgroup: it keeps enough of W under way
// without a barrier of the threadgroup. x is read once per threadgroup, straight to where the matrix instruction takes it:
// with as many rows in a threadgroup as give every multiprocessor one of them, that costs little beside W.
// Lane 4 * r + c decodes word c of every 16 bytes of rows r and r + 8 and reads the same k of token r: which k a matrix
// step takes does not matter to a dot product, as long as both operands take the same, and 16 bytes of a row, kStep k, are
// multiplied at a time, so scales of groups no finer than that multiply sums, not weights.
template <typename W, typename T, typename Schedule, typename Epilogue> struct FewGemm {
    typedef typename W::Format Format;
    typedef MmaDecode<Format, T> Decode;
    typedef MmaPair<T> Pair;
    typedef GemmArguments<W, T> Arguments;
    enum : uint {
        kTokens = Schedule::kTokens,
        kRows = Schedule::kRows,
        kSimdgroups = Schedule::kSimdgroups,
        kDepth = Schedule::kDepth,
        kThreads = kSimdgroups * kSimdWidth,
        kStrips = kRows / 16,
        kTiles = kTokens / 8,
        kPerWord = Format::kPerWord,
        kPairs = kPerWord / 2,
        kStep = 4 * kPerWord,
        kTurn = 4 * kStep,
        kStride = kSimdgroups * kTurn,
        kRow = 80, // bytes of a row in the queue: 64, and what keeps its readers in different banks
        kSlot = 16 * kRow,
        kSumStride = kRows + 4
    };
    struct alignas(128) Shared {
        union {
            uchar queues[kSimdgroups * kDepth * kSlot];
            float sums[kSimdgroups * kTokens * kSumStride];
        };
    };

    struct Lane {
        uint row, word;    // of the first strip's rows; kPerWord * c
        uint to, from;     // where it copies 16 bytes and where it reads its words, in the first slot
        uint token, id;    // r of its tokens, itself
        uint tokens;       // of the threadgroup's that are some of M
        device const T* x; // of the threadgroup's tokens
    };

    // The same number, but not to the compiler: else it keeps an address of every strip in registers.
    static uint forgotten(uint v) {
        __asm__ volatile("" : "+r"(v));
        return v;
    }
    static uint join(T a) { return uint(as_type<ushort>(a)) * 0x10001u; }

    static uint row(thread const Arguments& a, thread const Lane& lane, uint strip, uint h) {
        return min(lane.row + strip * 16 + h * 8, a.N - 1);
    }

    static void ask(thread const Arguments& a, thread const Lane& lane, uint strip, uint turn, uint slot) {
        const uint k = turn + 4 * lane.word;
        const bool reads = k < a.K;
#pragma unroll
        for (uint h = 0; h < 2; ++h) {
            device const uint* codes = a.codes + ulong(row(a, lane, strip, h)) * (a.K / kPerWord);
            AsyncCopy::copy16(lane.to + slot * kSlot + h * 8 * kRow, codes + (reads ? k / kPerWord : 0), reads);
        }
        AsyncCopy::commit();
    }

    // Of a step: kRuns scales a row, of as many equal parts of the turn. Where kFine, every lane has those of its words:
    // w = (code + shift) * scale + offset, all numbers of T; else sums are multiplied by scale, and offset by the sums of x.
    template <uint kRuns, bool kFine> struct Scales {
        float scale[2][kRuns], offset[2][kRuns], shift[2][kRuns];

        static Scales of(thread const Arguments& a, thread const Lane& lane, uint strip, uint turn) {
            Scales s;
#pragma unroll
            for (uint h = 0; h < 2; ++h) {
                const typename W::Row from = a.row(row(a, lane, strip, h));
#pragma unroll
                for (uint run = 0; run < kRuns; ++run) {
                    const uint g = a.group(turn + run * (kTurn / kRuns) + (kFine ? lane.word : 0));
                    s.scale[h][run] = W::Scale::value(from.scales[g]);
                    if (W::kAffine) {
                        const typename W::Group group = from.group(g);
                        s.offset[h][run] = kFine ? group.bias : Middle<W>::offset(group);
                        s.shift[h][run] = Middle<W>::value - group.zero;
                    }
                }
            }
            return s;
        }
    };

    // Fine scales as T. One need not be a number that T has: it is divided by a power of two, which multiplies the sums.
    // Lanes 4 * r ... add to the same sums; their largest scale gives the power.
    struct Factors {
        uint scale[4], offset[4], shift[4]; // pairs
        float power;

        template <uint kRuns> static Factors of(thread const Scales<kRuns, true>& s, uint h) {
            Factors f;
            uint most = 0;
#pragma unroll
            for (uint run = 0; run < kRuns; ++run) {
                most = max(most, as_type<uint>(s.scale[h][run]) & 0x7f800000u);
                if (W::kBias) most = max(most, as_type<uint>(s.offset[h][run]) & 0x7f800000u);
            }
            most = max(most, simd_shuffle_xor(most, ushort(1)));
            most = min(max(most, simd_shuffle_xor(most, ushort(2))), 252u << 23);
            f.power = as_type<float>(most + (1u << 23));
            const float inverse = as_type<float>((253u << 23) - most);
#pragma unroll
            for (uint run = 0; run < kRuns; ++run) {
                f.scale[run] = join(T(s.scale[h][run] * inverse * Decode::kUnit));
                if (W::kAffine) f.shift[run] = join(T(s.shift[h][run]));
                if (W::kBias) f.offset[run] = join(T(s.offset[h][run] * inverse));
            }
            return f;
        }
        template <uint kRuns> static Factors of(thread const Scales<kRuns, false>&, uint) { return Factors(); }

        uint weight(uint code, uint run) const {
            if (W::kAffine) code = Pair::plus(code, shift[run]);
            return W::kBias ? Pair::fma(code, scale[run], offset[run]) : Pair::times(code, scale[run]);
        }
    };

    // x of the turn, in the order of pairs: codes i and i + kPerWord / 2 of a word are one.
    typedef uint Operand[kTiles][4][kPairs];
    static void operands(thread const Arguments& a, thread const Lane& lane, uint turn, thread Operand& x) {
#pragma unroll
        for (uint tile = 0; tile < kTiles; ++tile) {
            const uint m = tile * 8 + lane.token;
#pragma unroll
            for (uint word = 0; word < 4; ++word) {
                const uint k = turn + word * kStep + lane.word;
                const bool reads = m < lane.tokens && k < a.K;
                uint v[kPairs];
                if (kPerWord == 8) {
                    uint4 from = 0;
                    if (reads) from = *(device const uint4*)(lane.x + (m * a.K + k));
                    v[0] = from.x, v[1] = from.y, v[kPairs - 2] = from.z, v[kPairs - 1] = from.w;
                } else {
                    uint2 from = 0;
                    if (reads) from = *(device const uint2*)(lane.x + (m * a.K + k));
                    v[0] = from.x, v[1] = from.y;
                }
#pragma unroll
                for (uint i = 0; i < kPairs; i += 2) {
                    x[tile][word][i] = mma_permute(v[i / 2], v[kPairs / 2 + i / 2], 0x5410);
                    x[tile][word][i + 1] = mma_permute(v[i / 2], v[kPairs / 2 + i / 2], 0x7632);
                }
            }
        }
    }

    // x of a turn to the first-level cache.
    static void warm(thread const Arguments& a, thread const Lane& lane, uint turn) {
        enum : uint { kLines = kTurn * sizeof(T) / 128 };
#pragma unroll
        for (uint i = 0; i < kLines * kTokens; i += kSimdWidth) {
            const uint m = (i + lane.id) / kLines, k = turn + (i + lane.id) % kLines * (128 / sizeof(T));
            if (m < lane.tokens && k < a.K) prefetch_near(lane.x + (m * a.K + k));
        }
    }

    // A step: a strip's codes of a turn. ones: sums of x over the runs, of which every lane has those it needs.
    template <uint kRuns, bool kFine>
    static void multiply(uint from, thread const Operand& x, thread const Scales<kRuns, kFine>& s,
                         thread const float (&ones)[kRuns][kTiles][4], thread float (&total)[kTiles][4]) {
        uint q[2][4];
        Factors f[2];
#pragma unroll
        for (uint h = 0; h < 2; ++h) {
#pragma unroll
            for (uint word = 0; word < 4; ++word) q[h][word] = shared_load4(from + h * 8 * kRow + word * 16);
        }
        for (uint h = 0; h < 2; ++h) f[h] = Factors::of(s, h);
        float d[kTiles][4];
#pragma unroll
        for (uint word = 0; word < 4; ++word) {
            const uint run = word * kRuns / 4;
            if (word == 0 || !kFine && word * kRuns % 4 == 0) {
#pragma unroll
                for (uint tile = 0; tile < kTiles; ++tile) {
#pragma unroll
                    for (uint e = 0; e < 4; ++e) d[tile][e] = 0;
                }
            }
            uint w[2][kPairs];
#pragma unroll
            for (uint h = 0; h < 2; ++h) {
                Decode::pairs(q[h][word], w[h]);
#pragma unroll
                for (uint i = 0; kFine && i < kPairs; ++i) w[h][i] = f[h].weight(w[h][i], run);
            }
#pragma unroll
            for (uint i = 0; i < kPairs; i += 2) {
#pragma unroll
                for (uint tile = 0; tile < kTiles; ++tile) {
                    Pair::mma(d[tile], w[0][i], w[1][i], w[0][i + 1], w[1][i + 1], x[tile][word][i],
                              x[tile][word][i + 1]);
                }
            }
            if (word == 3 || !kFine && (word + 1) * kRuns % 4 == 0) {
#pragma unroll
                for (uint tile = 0; tile < kTiles; ++tile) {
#pragma unroll
                    for (uint e = 0; e < 4; ++e) {
                        total[tile][e] += (kFine ? f[e / 2].power : s.scale[e / 2][run]) * d[tile][e];
                        if (W::kAffine && !kFine) total[tile][e] += s.offset[e / 2][run] * ones[run][tile][e];
                    }
                }
            }
        }
    }

    // Sums of x, by the matrix instruction: rows of ones.
    template <uint kRuns> static void add_up(thread const Operand& x, thread float (&ones)[kRuns][kTiles][4]) {
        const uint one = join(T(1));
#pragma unroll
        for (uint tile = 0; tile < kTiles; ++tile) {
#pragma unroll
            for (uint run = 0; run < kRuns; ++run) {
#pragma unroll
                for (uint e = 0; e < 4; ++e) ones[run][tile][e] = 0;
            }
#pragma unroll
            for (uint word = 0; word < 4; ++word) {
#pragma unroll
                for (uint i = 0; i < kPairs; i += 2) {
                    Pair::mma(ones[word * kRuns / 4][tile], one, one, one, one, x[tile][word][i],
                              x[tile][word][i + 1]);
                }
            }
        }
    }

    template <uint kRuns, bool kFine>
    static void sum(thread const Arguments& a, Lane lane, uint turn, thread float (&total)[kStrips][kTiles][4]) {
        typedef Scales<kRuns, kFine> Of;
        uint slot = 0, strip_ahead = (kDepth - 1) % kStrips, ahead = turn + (kDepth - 1) / kStrips * kStride;
#pragma unroll
        for (uint i = 0; i < kDepth - 1; ++i) ask(a, lane, i % kStrips, turn + i / kStrips * kStride, i);
        Of next = Of::of(a, lane, 0, turn);
        for (; turn < a.K; turn += kStride) {
            lane.row = forgotten(lane.row);
            Operand x;
            float ones[kRuns][kTiles][4];
            operands(a, lane, turn, x);
            warm(a, lane, turn + kStride);
            if (W::kAffine && !kFine) add_up<kRuns>(x, ones);
#pragma unroll
            for (uint strip = 0; strip < kStrips; ++strip) {
                const Of s = next;
                next = strip + 1 < kStrips ? Of::of(a, lane, strip + 1, turn) : Of::of(a, lane, 0, turn + kStride);
                AsyncCopy::wait<kDepth - 2>();
                simdgroup_barrier(mem_flags::mem_threadgroup); // the slot of the step before has been read
                ask(a, lane, strip_ahead, ahead, (slot + kDepth - 1) % kDepth);
                multiply<kRuns, kFine>(lane.from + slot * kSlot, x, s, ones, total[strip]);
                slot = (slot + 1) % kDepth;
                if (++strip_ahead == kStrips) strip_ahead = 0, ahead += kStride;
            }
        }
        AsyncCopy::wait<0>();
    }

    static Lane lane_of(thread const Arguments& a, GemmPlace at, threadgroup const Shared& sh) {
        const uint r = at.lane / 4, c = at.lane % 4;
        const uint queue = AsyncCopy::address(sh.queues) + at.sgid * kDepth * kSlot + r * kRow;
        Lane lane;
        lane.row = at.tgid.x * kRows + r;
        lane.word = c * kPerWord;
        lane.to = queue + c * 16;
        lane.from = queue + c * 4;
        lane.token = r;
        lane.id = at.lane;
        lane.tokens = min(uint(kTokens), a.M - at.tgid.y * kTokens);
        lane.x = a.x + ulong(at.tgid.y * kTokens) * a.K;
        return lane;
    }

    static void run(Arguments a, GemmPlace at, threadgroup Shared& sh, Epilogue epilogue) {
        const Lane lane = lane_of(a, at, sh);
        float total[kStrips][kTiles][4];
#pragma unroll
        for (uint strip = 0; strip < kStrips; ++strip) {
#pragma unroll
            for (uint tile = 0; tile < kTiles; ++tile) {
#pragma unroll
                for (uint e = 0; e < 4; ++e) total[strip][tile][e] = 0;
            }
        }
        const uint group = 1u << a.shift, turn = at.sgid * kTurn;
        const bool fine = group < (W::kAffine ? uint(kTurn) : uint(kStep)); // sums of x of every run are too many
        if (group >= kTurn) {
            sum<1, false>(a, lane, turn, total);
        } else if (!W::kAffine && !fine) {
            sum<W::kAffine ? 1 : 4, false>(a, lane, turn, total);
        } else {
            sum<4, true>(a, lane, turn, total);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        const float unit = (fine ? 1.0f : Decode::kUnit) * a.row(0).factor;
        const uint first = at.tgid.x * kRows, token = at.tgid.y * kTokens;
        threadgroup float* to = sh.sums + (at.sgid * kTokens + at.lane % 4 * 2) * kSumStride + at.lane / 4;
#pragma unroll
        for (uint strip = 0; strip < kStrips; ++strip) {
#pragma unroll
            for (uint tile = 0; tile < kTiles; ++tile) {
#pragma unroll
                for (uint e = 0; e < 4; ++e) {
                    to[(tile * 8 + e % 2) * kSumStride + strip * 16 + e / 2 * 8] =
                        total[strip][tile][e] * unit;
                }
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint i = at.sgid * kSimdWidth + at.lane; i < kTokens * kRows; i += kThreads) {
            const uint n = first + i % kRows, m = token + i / kRows;
            if (m >= a.M || n >= a.N) continue;
            float y = 0;
#pragma unroll
            for (uint s = 0; s < kSimdgroups; ++s)
                y += sh.sums[(s * kTokens + i / kRows) * kSumStride + i % kRows];
            a.y[ulong(m) * a.N + n] = T(epilogue.apply(y, m, n));
        }
    }
};
#endif
