#pragma once
#ifdef __METAL_MARLIN_CUDA__
#include "core/nvidia/async_copy.h"
#include "core/nvidia/operand.h"

// Few tokens: a threadgroup takes kBN rows of W and kBM tokens; its simdgroups share the depth of a stage, kBlock each, and
// add their sums at the end. W as it is stored and x are copied asynchronously, kStages - 1 stages ahead. A dot product
// does not care in which order k is visited: lane 4 * r + c takes word c of four neighbouring words of rows r and r + 8,
// whose neighbouring codes are its operands of a matrix step, and the same run of x of token r, one load. Rows of both
// lie in threadgroup memory as in device memory, with as much behind them as keeps these loads free of bank conflicts.
template <typename W, typename T, typename Schedule, typename Epilogue> struct FewGemm {
    typedef typename W::Format Format;
    typedef MmaDecode<Format, T> Decode;
    typedef MmaPair<T> Pair;
    typedef GemmArguments<W, T> Arguments;
    enum : uint {
        kBM = Schedule::kTokens,
        kBN = Schedule::kRows,
        kStages = Schedule::kDepth,
        kSimdgroups = 8,
        kThreads = kSimdgroups * kSimdWidth,
        kStrips = kBN / 16,
        kTiles = kBM / 8,
        kBlock = 64,
        kBK = kSimdgroups * kBlock,
        kPerWord = Format::kPerWord,
        kPairs = kPerWord / 2,
        kStep = 4 * kPerWord, // k of four words
        kSteps = kBlock / kStep,
        kLoads = kSteps / 2,              // of W, two steps each
        kCodes = kBK * Format::kBits / 8, // bytes of a row and stage
        kWStride = kCodes + 16,
        kXStride = 2 * kBK + 8 * kPerWord,
        kStage = kBN * kWStride + kBM * kXStride,
        kWCopies = kBN * kCodes / 16 / kThreads,
        kXCopies = kBM * kBK / 8 / kThreads,
        kSumStride = kBN + 4
    };
    static_assert(kBN * kCodes / 16 % kThreads == 0 && kBM * kBK / 8 % kThreads == 0,
                  "FewGemm: copies of a thread");
    static_assert(kSimdgroups * kBM * kSumStride * 4 <= kStages * kStage,
                  "FewGemm: sums take the place of stages");
    struct alignas(128) Shared {
        uchar stages[kStages * kStage];
    };
    // Of a block and lane: one scale a row, or one for every step.
    template <bool kFine> struct Scales {
        enum : uint { kRuns = kFine ? uint(kSteps) : 1 };
        float scales[kStrips][2][kRuns], offsets[kStrips][2][kRuns];
    };

    static void load(thread const Arguments& a, uint first, uint token, uint tid, uint k0, uint stage) {
#pragma unroll
        for (uint i = 0; i < kWCopies; ++i) {
            const uint id = tid + i * kThreads, row = id / (kCodes / 16), chunk = id % (kCodes / 16);
            const uint k = k0 + chunk * (4 * kPerWord);
            const bool reads = k < a.K;
            device const uint* codes = a.codes + ulong(min(first + row, a.N - 1)) * (a.K / kPerWord);
            AsyncCopy::copy16(stage + row * kWStride + chunk * 16, codes + (reads ? k / kPerWord : 0), reads);
        }
        // a row of x takes kBK / 8 threads, kPass rows at a time
        enum : uint { kPass = kThreads / (kBK / 8) };
        const uint row = tid / (kBK / 8), chunk = tid % (kBK / 8);
        const uint to = stage + kBN * kWStride + row * kXStride + chunk * 16;
        const uint left = max(a.M, token + row) - token - row; // rows of x from the first on
        const bool inside = k0 + chunk * 8 < a.K;
        device const T* x = a.x + ulong(token + row) * a.K + k0 + chunk * 8;
#pragma unroll
        for (uint i = 0; i < kXCopies; ++i) {
            const bool reads = inside && i * kPass < left;
            device const T* from = x + ulong(i * kPass) * a.K;
            AsyncCopy::copy16(to + i * kPass * kXStride, reads ? from : a.x, reads);
        }
    }

    // Scales of a row lie together: the second-level cache gets them before they are asked for.
    static void warm(thread const Arguments& a, uint first, uint tid) {
        const uint row = first + tid / 8, line = 64 / sizeof(typename W::S);
        if (tid / 8 < kBN && row < a.N) {
            for (uint g = tid % 8 * line; g < a.groups; g += 8 * line)
                prefetch(a.scales + ulong(row) * a.groups + g);
        }
    }

    template <bool kFine>
    static void fetch(thread const Arguments& a, uint first, uint lane, uint k, thread Scales<kFine>& s) {
#pragma unroll
        for (uint strip = 0; strip < kStrips; ++strip) {
#pragma unroll
            for (uint h = 0; h < 2; ++h) {
                const typename W::Row row = a.row(min(first + strip * 16 + h * 8 + lane / 4, a.N - 1));
#pragma unroll
                for (uint run = 0; run < Scales<kFine>::kRuns; ++run) {
                    const uint g = a.group(k + run * kStep + (kFine ? lane % 4 * kPerWord : 0));
                    s.scales[strip][h][run] = W::Scale::value(row.scales[g]);
                    if (W::kAffine) s.offsets[strip][h][run] = Middle<W>::offset(row.group(g));
                }
            }
        }
    }

    static uint join(T a) { return uint(as_type<ushort>(a)) * 0x10001u; }

    // Scales that multiply weights, which are rounded to T as they are when dequantised. A scale need not be a number
    // that T has: it is divided by a power of two, which multiplies the sums. Lanes 4 * r ... add to the same sums.
    template <bool kFine>
    static float factors(thread const Scales<kFine>& s, uint strip, uint h, thread uint (&scales)[kSteps],
                         thread uint (&offsets)[kSteps]) {
        uint most = 0;
#pragma unroll
        for (uint run = 0; run < kSteps; ++run) {
            most = max(most, as_type<uint>(s.scales[strip][h][run]) & 0x7f800000u);
            if (W::kAffine) most = max(most, as_type<uint>(s.offsets[strip][h][run]) & 0x7f800000u);
        }
        most = max(most, simd_shuffle_xor(most, ushort(1)));
        most = min(max(most, simd_shuffle_xor(most, ushort(2))), 252u << 23);
        const float inverse = as_type<float>((253u << 23) - most);
#pragma unroll
        for (uint run = 0; run < kSteps; ++run) {
            scales[run] = join(T(s.scales[strip][h][run] * inverse));
            if (W::kAffine) offsets[run] = join(T(s.offsets[strip][h][run] * inverse));
        }
        return as_type<float>(most + (1u << 23));
    }

    static void operand(uint at, thread uint (&x)[kPairs]) {
        if (kPerWord == 8) {
            const uint4 v = shared_load16(at);
            x[0] = v.x, x[1] = v.y, x[kPairs - 2] = v.z, x[kPairs - 1] = v.w;
        } else {
            const uint2 v = shared_load8(at);
            x[0] = v.x, x[1] = v.y;
        }
    }

    // A simdgroup's block of a stage: ws is where its lane's matrices of W begin, xs its lane's x.
    template <bool kFine>
    static void multiply(uint ws, uint xs, thread const Scales<kFine>& s,
                         thread float (&total)[kStrips][kTiles][4]) {
        enum : bool { kOnes = W::kAffine && !kFine };
        float d[kStrips][kTiles][4], ones[kTiles][4], powers[kStrips][2];
        uint q[kStrips][kLoads][4], scales[kStrips][2][kSteps], offsets[kStrips][2][kSteps];
        const uint one = join(T(1));
#pragma unroll
        for (uint tile = 0; tile < kTiles; ++tile) {
#pragma unroll
            for (uint e = 0; e < 4; ++e) {
                ones[tile][e] = 0;
#pragma unroll
                for (uint strip = 0; strip < kStrips; ++strip) d[strip][tile][e] = 0;
            }
        }
#pragma unroll
        for (uint strip = 0; strip < kStrips; ++strip) {
#pragma unroll
            for (uint i = 0; i < kLoads; ++i)
                shared_matrices(ws + strip * 16 * kWStride + i * 32, q[strip][i]);
            if (kFine) {
#pragma unroll
                for (uint h = 0; h < 2; ++h) {
                    powers[strip][h] = factors<kFine>(s, strip, h, scales[strip][h], offsets[strip][h]);
                }
            }
        }
#pragma unroll
        for (uint step = 0; step < kSteps; ++step) {
            uint x[kTiles][kPairs];
#pragma unroll
            for (uint tile = 0; tile < kTiles; ++tile)
                operand(xs + tile * 8 * kXStride + step * kStep * 2, x[tile]);
#pragma unroll
            for (uint strip = 0; strip < kStrips; ++strip) {
                uint w[2][kPairs];
#pragma unroll
                for (uint h = 0; h < 2; ++h) {
                    mma_neighbours<Format, T>(q[strip][step / 2][step % 2 * 2 + h], w[h]);
#pragma unroll
                    for (uint i = 0; kFine && i < kPairs; ++i) {
                        const uint plain = Decode::plain(w[h][i]), scale = scales[strip][h][step];
                        w[h][i] = W::kAffine ? Pair::fma(plain, scale, offsets[strip][h][step])
                                             : Pair::times(plain, scale);
                    }
                }
#pragma unroll
                for (uint i = 0; i < kPairs; i += 2) {
#pragma unroll
                    for (uint tile = 0; tile < kTiles; ++tile) {
                        Pair::mma(d[strip][tile], w[0][i], w[1][i], w[0][i + 1], w[1][i + 1], x[tile][i],
                                  x[tile][i + 1]);
                        if (kOnes && strip == 0) {
                            Pair::mma(ones[tile], one, one, one, one, x[tile][i], x[tile][i + 1]);
                        }
                    }
                }
            }
        }
#pragma unroll
        for (uint strip = 0; strip < kStrips; ++strip) {
#pragma unroll
            for (uint tile = 0; tile < kTiles; ++tile) {
#pragma unroll
                for (uint e = 0; e < 4; ++e) {
                    const float scale = kFine ? powers[strip][e / 2] : s.scales[strip][e / 2][0];
                    total[strip][tile][e] += scale * d[strip][tile][e];
                    if (kOnes) total[strip][tile][e] += s.offsets[strip][e / 2][0] * ones[tile][e];
                }
            }
        }
    }

    template <bool kFine>
    static void sum(thread const Arguments& a, uint first, uint token, GemmPlace at, uint base,
                    thread float (&total)[kStrips][kTiles][4]) {
        const uint tid = at.sgid * kSimdWidth + at.lane, lane = at.lane;
        const uint ws = base + (lane / 8 % 2 * 8 + lane % 8) * kWStride + at.sgid * (kCodes / kSimdgroups) +
                        lane / 16 * 16;
        const uint xs =
            base + kBN * kWStride + lane / 4 * kXStride + (at.sgid * kBlock + lane % 4 * kPerWord) * 2;
#pragma unroll
        for (uint i = 0; i < kStages - 1; ++i) {
            if (i * kBK < a.K) load(a, first, token, tid, i * kBK, base + i * kStage);
            AsyncCopy::commit();
        }
        Scales<kFine> next;
        fetch<kFine>(a, first, lane, at.sgid * kBlock, next);
        uint now = 0, ahead = (kStages - 1) * kStage;
        for (uint k = 0; k < a.K; k += kBK) {
            const Scales<kFine> s = next;
            AsyncCopy::wait<kStages - 2>();
            threadgroup_barrier(mem_flags::mem_threadgroup); // also: nobody reads what is overwritten now
            if (k + (kStages - 1) * kBK < a.K)
                load(a, first, token, tid, k + (kStages - 1) * kBK, base + ahead);
            AsyncCopy::commit();
            fetch<kFine>(a, first, lane, k + kBK + at.sgid * kBlock, next);
            if (k + at.sgid * kBlock < a.K) multiply<kFine>(ws + now, xs + now, s, total);
            now = now == (kStages - 1) * kStage ? 0 : now + kStage;
            ahead = ahead == (kStages - 1) * kStage ? 0 : ahead + kStage;
        }
    }

    static void run(Arguments a, GemmPlace at, threadgroup Shared& sh, Epilogue epilogue) {
        const uint first = at.tgid.x * kBN, token = at.tgid.y * kBM, tid = at.sgid * kSimdWidth + at.lane;
        float total[kStrips][kTiles][4];
#pragma unroll
        for (uint strip = 0; strip < kStrips; ++strip) {
#pragma unroll
            for (uint tile = 0; tile < kTiles; ++tile) {
#pragma unroll
                for (uint e = 0; e < 4; ++e) total[strip][tile][e] = 0;
            }
        }
        warm(a, first, tid);
        const bool fine = (1u << a.shift) < kBlock;
        if (fine) {
            sum<true>(a, first, token, at, AsyncCopy::address(sh.stages), total);
        } else {
            sum<false>(a, first, token, at, AsyncCopy::address(sh.stages), total);
        }
        AsyncCopy::wait<0>();
        threadgroup_barrier(mem_flags::mem_threadgroup);
        const float unit = (fine ? 1.0f : Decode::kUnit) * a.row(0).factor;
        threadgroup float* sums = (threadgroup float*)sh.stages;
        threadgroup float* to = sums + (at.sgid * kBM + at.lane % 4 * 2) * kSumStride + at.lane / 4;
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
        for (uint i = tid; i < kBM * kBN; i += kThreads) {
            const uint row = i % kBN, m = i / kBN;
            if (token + m >= a.M || first + row >= a.N) continue;
            float y = 0;
#pragma unroll
            for (uint s = 0; s < kSimdgroups; ++s) y += sums[(s * kBM + m) * kSumStride + row];
            a.y[ulong(token + m) * a.N + first + row] = T(epilogue.apply(y, token + m, first + row));
        }
    }
};
#endif
