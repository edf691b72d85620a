#pragma once
#ifdef __METAL_MARLIN_CUDA__
#include "core/nvidia/async_copy.h"
#include "core/nvidia/cluster.h"
#include "core/nvidia/operand.h"

// Few tokens, where time is what reading W takes. A threadgroup takes strips of 16 rows of W and kTokens tokens; its
// simdgroups take turns along K, four times 16 bytes of each row a turn, and add their sums at the end. As every lane
// decodes the 16 bytes that it copied itself (which k they are does not matter to a dot product; see core/nvidia/gemv.h),
// codes pass through threadgroup memory without a barrier: a queue of kDepth steps (a strip's turn) a lane, which is what
// keeps enough of W under way. x is read once per threadgroup: with as many rows in a threadgroup as give every
// multiprocessor one of them, that costs little beside W.
template <typename W, typename T, typename Schedule, typename Epilogue> struct FewGemm {
    typedef typename W::Format Format;
    typedef MmaDecode<Format, T> Decode;
    typedef MmaPair<T> Pair;
    typedef GemmArguments<W, T> Arguments;
    typedef Cluster<Schedule::kSplit> Parts;
    enum : uint {
        kTokens = Schedule::kTokens,
        kRows = Schedule::kRows,
        kSimdgroups = Schedule::kSimdgroups,
        kDepth = Schedule::kDepth,
        kSplit = Schedule::kSplit,
        kThreads = kSimdgroups * kSimdWidth,
        kStrips = kRows / 16,
        kTiles = kTokens / 8,
        kPerWord = Format::kPerWord,
        kPairs = kPerWord / 2,
        kLane = 4 * kPerWord, // k of a lane in a turn
        kTurn = 4 * kLane,
        kStride = kSplit * kSimdgroups * kTurn,
        kRuns = kLane / 16, // no scale changes within
        kSlot = 1024,       // bytes of a simdgroup's step
        kSumStride = kRows + 4
    };
    struct alignas(128) Shared {
        union {
            uchar queues[kSimdgroups * kDepth * kSlot];
            float sums[kSimdgroups * kTokens * kSumStride];
        };
    };

    struct Lane {
        uint row, k, queue; // of the first strip's rows; first k; address of its 16 bytes in the first slot
        uint token, tokens; // r of its tokens; of the threadgroup's that are some of M
        device const T* x;  // of the threadgroup's tokens
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

    static void ask(thread const Arguments& a, thread const Lane& lane, uint strip, uint k, uint slot) {
        const bool reads = k < a.K;
#pragma unroll
        for (uint h = 0; h < 2; ++h) {
            device const uint* codes = a.codes + ulong(row(a, lane, strip, h)) * (a.K / kPerWord);
            AsyncCopy::copy16(lane.queue + slot * kSlot + h * 512, codes + (reads ? k / kPerWord : 0), reads);
        }
        AsyncCopy::commit();
    }

    // Of a step: one scale a row, or one for every 16 weights. Fine: w = (code + shift) * scale + offset, all numbers of
    // T; coarse: sums are multiplied by scale, and offset by the sums of x.
    template <bool kFine> struct Scales {
        enum : uint { kCount = kFine ? uint(kRuns) : 1 };
        float scale[2][kCount], offset[2][kCount], shift[2][kCount];

        static Scales of(thread const Arguments& a, thread const Lane& lane, uint strip, uint k) {
            Scales s;
#pragma unroll
            for (uint h = 0; h < 2; ++h) {
                const typename W::Row from = a.row(row(a, lane, strip, h));
#pragma unroll
                for (uint run = 0; run < kCount; ++run) {
                    const uint g = a.group(k + run * 16);
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
        uint scale[kRuns], offset[kRuns], shift[kRuns]; // pairs
        float power;

        template <typename S> static Factors of(thread const S& s, uint h) {
            Factors f;
            uint most = 0;
#pragma unroll
            for (uint run = 0; run < kRuns; ++run) {
                most = max(most, as_type<uint>(s.scale[h][run % S::kCount]) & 0x7f800000u);
                if (W::kBias) most = max(most, as_type<uint>(s.offset[h][run % S::kCount]) & 0x7f800000u);
            }
            most = max(most, simd_shuffle_xor(most, ushort(1)));
            most = min(max(most, simd_shuffle_xor(most, ushort(2))), 252u << 23);
            f.power = as_type<float>(most + (1u << 23));
            const float inverse = as_type<float>((253u << 23) - most);
#pragma unroll
            for (uint run = 0; run < kRuns; ++run) {
                f.scale[run] = join(T(s.scale[h][run % S::kCount] * inverse * Decode::kUnit));
                if (W::kAffine) f.shift[run] = join(T(s.shift[h][run % S::kCount]));
                if (W::kBias) f.offset[run] = join(T(s.offset[h][run % S::kCount] * inverse));
            }
            return f;
        }
        uint weight(uint code, uint run) const {
            if (W::kAffine) code = Pair::plus(code, shift[run]);
            return W::kBias ? Pair::fma(code, scale[run], offset[run]) : Pair::times(code, scale[run]);
        }
    };

    // x of the turn, in the order of pairs: codes i and i + kPerWord / 2 of a word are one.
    typedef uint Operand[kTiles][4][kPairs];
    static void operands(thread const Arguments& a, thread const Lane& lane, uint k, thread Operand& x) {
#pragma unroll
        for (uint tile = 0; tile < kTiles; ++tile) {
            const uint m = tile * 8 + lane.token;
            uint v[kLane / 2];
#pragma unroll
            for (uint j = 0; j < kLane / 8; ++j) {
                uint4 from = 0;
                if (m < lane.tokens && k + 8 * j < a.K)
                    from = *(device const uint4*)(lane.x + (m * a.K + k + 8 * j));
#pragma unroll
                for (uint i = 0; i < 4; ++i) v[4 * j + i] = from[i];
            }
#pragma unroll
            for (uint word = 0; word < 4; ++word) {
#pragma unroll
                for (uint i = 0; i < kPairs; i += 2) {
                    const uint low = v[word * kPairs + i / 2], high = v[word * kPairs + kPairs / 2 + i / 2];
                    x[tile][word][i] = mma_permute(low, high, 0x5410);
                    x[tile][word][i + 1] = mma_permute(low, high, 0x7632);
                }
            }
        }
    }

    // A step: a strip's codes of a turn. ones: sums of x, of which every lane has those it needs.
    template <bool kFine>
    static void multiply(uint from, thread const Operand& x, thread const Scales<kFine>& s,
                         thread const float (&ones)[kTiles][4], thread float (&total)[kTiles][4]) {
        float d[kTiles][4];
        uint4 q[2];
        Factors f[2];
#pragma unroll
        for (uint h = 0; h < 2; ++h) {
            q[h] = shared_load16(from + h * 512);
            if (kFine) f[h] = Factors::of(s, h);
        }
#pragma unroll
        for (uint tile = 0; tile < kTiles; ++tile) {
#pragma unroll
            for (uint e = 0; e < 4; ++e) d[tile][e] = 0;
        }
#pragma unroll
        for (uint word = 0; word < 4; ++word) {
            uint w[2][kPairs];
#pragma unroll
            for (uint h = 0; h < 2; ++h) {
                Decode::pairs(q[h][word], w[h]);
#pragma unroll
                for (uint i = 0; kFine && i < kPairs; ++i) w[h][i] = f[h].weight(w[h][i], word * kRuns / 4);
            }
#pragma unroll
            for (uint i = 0; i < kPairs; i += 2) {
#pragma unroll
                for (uint tile = 0; tile < kTiles; ++tile) {
                    Pair::mma(d[tile], w[0][i], w[1][i], w[0][i + 1], w[1][i + 1], x[tile][word][i],
                              x[tile][word][i + 1]);
                }
            }
        }
#pragma unroll
        for (uint tile = 0; tile < kTiles; ++tile) {
#pragma unroll
            for (uint e = 0; e < 4; ++e) {
                total[tile][e] += (kFine ? f[e / 2].power : s.scale[e / 2][0]) * d[tile][e];
                if (W::kAffine && !kFine) total[tile][e] += s.offset[e / 2][0] * ones[tile][e];
            }
        }
    }

    // Sums of x over the turn, by the matrix instruction: rows of ones.
    static void add_up(thread const Operand& x, thread float (&ones)[kTiles][4]) {
        const uint one = join(T(1));
#pragma unroll
        for (uint tile = 0; tile < kTiles; ++tile) {
#pragma unroll
            for (uint e = 0; e < 4; ++e) ones[tile][e] = 0;
#pragma unroll
            for (uint word = 0; word < 4; ++word) {
#pragma unroll
                for (uint i = 0; i < kPairs; i += 2)
                    Pair::mma(ones[tile], one, one, one, one, x[tile][word][i], x[tile][word][i + 1]);
            }
        }
    }

    template <bool kFine>
    static void sum(thread const Arguments& a, Lane lane, uint turn,
                    thread float (&total)[kStrips][kTiles][4]) {
        typedef Scales<kFine> Of;
        enum : bool { kEarly = !kFine && !W::kAffine }; // others are too many to be asked for early
        uint k = lane.k, ahead = k + (kDepth - 1) / kStrips * kStride, strip_ahead = (kDepth - 1) % kStrips,
             slot = 0;
#pragma unroll
        for (uint i = 0; i < kDepth - 1; ++i) ask(a, lane, i % kStrips, k + i / kStrips * kStride, i);
        for (; turn < a.K; turn += kStride, k += kStride) {
            lane.row = forgotten(lane.row);
            Of scales[kEarly ? uint(kStrips) : 1];
            Operand x;
            float ones[kTiles][4];
#pragma unroll
            for (uint strip = 0; kEarly && strip < kStrips; ++strip)
                scales[strip] = Of::of(a, lane, strip, k);
            operands(a, lane, k, x);
            if (W::kAffine && !kFine) add_up(x, ones);
#pragma unroll
            for (uint strip = 0; strip < kStrips; ++strip) {
                if (!kEarly) scales[0] = Of::of(a, lane, strip, k);
                AsyncCopy::wait<kDepth - 2>();
                multiply<kFine>(lane.queue + slot * kSlot, x, scales[kEarly ? strip : 0], ones, total[strip]);
                // the slot of the step before this one, whose codes have been decoded
                ask(a, lane, strip_ahead, ahead, (slot + kDepth - 1) % kDepth);
                slot = (slot + 1) % kDepth;
                if (++strip_ahead == kStrips) strip_ahead = 0, ahead += kStride;
            }
        }
        AsyncCopy::wait<0>();
    }

    static uint turn_of(GemmPlace at) { return (at.tgid.z * kSimdgroups + at.sgid) * kTurn; }

    static Lane lane_of(thread const Arguments& a, GemmPlace at, threadgroup const Shared& sh) {
        const uint r = at.lane / 4, c = at.lane % 4;
        Lane lane;
        lane.row = at.tgid.x * kRows + r;
        lane.k = turn_of(at) + kLane * c;
        lane.queue = AsyncCopy::address(sh.queues) + at.sgid * kDepth * kSlot + at.lane * 16;
        lane.token = r;
        lane.tokens = min(uint(kTokens), a.M - at.tgid.y * kTokens);
        lane.x = a.x + ulong(at.tgid.y * kTokens) * a.K;
        return lane;
    }

    static void run(Arguments a, GemmPlace at, threadgroup Shared& sh, Epilogue epilogue) {
        if (kSplit > 1) Parts::form();
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
        const bool fine = (1u << a.shift) < kTurn;
        if (fine) {
            sum<true>(a, lane, turn_of(at), total);
        } else {
            sum<false>(a, lane, turn_of(at), total);
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
        if (kSplit > 1) Parts::barrier();
        // each of the threadgroups that share K adds up as many outputs
        const uint rank = kSplit > 1 ? at.tgid.z : 0, sums = AsyncCopy::address(sh.sums);
        for (uint i = rank * kThreads + at.sgid * kSimdWidth + at.lane; i < kTokens * kRows;
             i += kSplit * kThreads) {
            const uint n = first + i % kRows, m = token + i / kRows;
            if (m >= a.M || n >= a.N) continue;
            float y = 0;
#pragma unroll
            for (uint part = 0; part < kSplit; ++part) {
                const uint from = kSplit > 1 ? Parts::address(sums, part) : sums;
#pragma unroll
                for (uint s = 0; s < kSimdgroups; ++s)
                    y += Parts::load(from + ((s * kTokens + i / kRows) * kSumStride + i % kRows) * 4);
            }
            a.y[ulong(m) * a.N + n] = T(epilogue.apply(y, m, n));
        }
        if (kSplit > 1) Parts::barrier(); // nobody leaves before its sums have been read
    }
};
#endif
