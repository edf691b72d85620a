#pragma once
#ifdef __METAL_MARLIN_CUDA__
#include "core/nvidia/async_copy.h"
#include "core/nvidia/operand.h"
#include "core/nvidia/wgmma.h"

// Many tokens, sm_90a: a threadgroup takes kRows rows of W and kTokens tokens. Its two groups of four simdgroups take 64 rows each,
// or, where kRows is 64, alternate blocks of 64 k. W as it is stored and x are copied asynchronously, kStages - 2 stages ahead;
// the matrix instruction reads x from threadgroup memory itself while the next block's weights are decoded to its left
// operand. The left operand's lane 4 * r + c has neighbouring columns 2 * c of every 8: byte c of a word of 4-bit codes,
// so lanes 4 * r ... read the same words.
template <typename W, typename T, typename Schedule, typename Epilogue> struct WgmmaGemm {
    typedef typename W::Format Format;
    typedef MmaDecode<Format, T> Decode;
    typedef MmaPair<T> Pair;
    typedef GemmArguments<W, T> Arguments;
    enum : uint {
        kTokens = Schedule::kTokens,
        kRows = Schedule::kRows,
        kStages = Schedule::kDepth,
        kThreads = 256,
        kGroupsN = kRows / 64,
        kGroupsK = 2 / kGroupsN,
        kBlock = 64,
        kBK = kGroupsK * kBlock,
        kPerWord = Format::kPerWord,
        kCodes = kBK * Format::kBits / 8, // bytes of a row and stage
        kWStride = kCodes + 16,
        kX = kGroupsK * kTokens * 2 * kBlock, // bytes of x of a stage
        kStage = (kX + kRows * kWStride + 1023) / 1024 * 1024,
        kWCopies = kRows * kCodes / 16 / kThreads,
        kXCopies = kX / 16 / kThreads,
        kSums = kTokens / 2,
        kYStride = 2 * kRows + 16
    };
    static_assert(kGroupsN * kGroupsK == 2, "WgmmaGemm: two groups");
    static_assert(kRows * kCodes / 16 % kThreads == 0 && kX / 16 % kThreads == 0,
                  "WgmmaGemm: copies of a thread");
    static_assert(kSums * 128 * 4 * (kGroupsK - 1) + kTokens * kYStride <= kStages * kStage,
                  "WgmmaGemm: y takes the place of stages");
    struct alignas(1024) Shared {
        uchar stages[kStages * kStage];
    };
    // Of two rows: one scale a block, or one for every 16 k.
    template <bool kFine> struct Scales {
        enum : uint { kRuns = kFine ? 4 : 1 };
        float scales[2][kRuns], shifts[2][kRuns], offsets[2][kRuns];
    };
    struct Place {
        uint first, token, tid, base;
        uint row; // of W, the lane's first
        uint k;   // the group's within a stage
        uint ws;  // the lane's first row in a stage
        ulong xs; // the group's x in the first stage, described
        uint select;
    };

    static void load(thread const Arguments& a, thread const Place& at, uint k0, uint stage) {
        // 8 threads a row of x and block, 32 rows at a time
        const uint row = at.tid / 8, chunk = at.tid % 8, to = stage + row * 128 + (chunk ^ row % 8) * 16;
        const uint left = max(a.M, at.token + row) - at.token - row; // rows of x from the first on
        device const T* x = a.x + ulong(at.token + row) * a.K + k0 + chunk * 8;
#pragma unroll
        for (uint i = 0; i < kXCopies; ++i) {
            const uint further = i * 32 % kTokens, block = i * 32 / kTokens;
            const bool reads = k0 + block * kBlock + chunk * 8 < a.K && further < left;
            device const T* from = x + (ulong(further) * a.K + block * kBlock);
            AsyncCopy::copy16(to + i * 32 * 128, reads ? from : a.x, reads);
        }
#pragma unroll
        for (uint i = 0; i < kWCopies; ++i) {
            const uint id = at.tid + i * kThreads, row = id / (kCodes / 16), chunk = id % (kCodes / 16);
            const uint k = k0 + chunk * (4 * kPerWord);
            const bool reads = k < a.K;
            device const uint* codes = a.codes + ulong(min(at.first + row, a.N - 1)) * (a.K / kPerWord);
            AsyncCopy::copy16(stage + kX + row * kWStride + chunk * 16, codes + (reads ? k / kPerWord : 0),
                              reads);
        }
    }

    template <bool kFine>
    static void fetch(thread const Arguments& a, uint n, uint k, thread Scales<kFine>& s) {
#pragma unroll
        for (uint h = 0; h < 2; ++h) {
            const typename W::Row row = a.row(min(n + 8 * h, a.N - 1));
#pragma unroll
            for (uint run = 0; run < Scales<kFine>::kRuns; ++run) {
                const uint g = a.group(k + 16 * run);
                s.scales[h][run] = W::Scale::value(row.scales[g]);
                if (W::kAffine) {
                    const typename W::Group group = row.group(g);
                    s.shifts[h][run] = Middle<W>::value - group.zero;
                    s.offsets[h][run] = group.bias;
                }
            }
        }
    }

    static uint join(T a) { return uint(as_type<ushort>(a)) * 0x10001u; }

    // The lane's left operands of a block, four steps of 16 k.
    template <bool kFine>
    static void decode(thread const Place& at, uint ws, thread const Scales<kFine>& s,
                       thread uint (&left)[4][4]) {
        enum : uint { kRuns = Scales<kFine>::kRuns, kWords = kBlock / kPerWord };
#pragma unroll
        for (uint h = 0; h < 2; ++h) {
            uint words[kWords], scales[kRuns], shifts[kRuns], offsets[kRuns];
#pragma unroll
            for (uint i = 0; i < kWords; i += 4) {
                const uint4 v = shared_load16(ws + h * 8 * kWStride + i * 4);
#pragma unroll
                for (uint j = 0; j < 4; ++j) words[i + j] = v[j];
            }
#pragma unroll
            for (uint run = 0; run < kRuns; ++run) {
                scales[run] = join(T(s.scales[h][run]));
                if (W::kAffine) shifts[run] = join(T(s.shifts[h][run]));
                if (W::kBias) offsets[run] = join(T(s.offsets[h][run]));
            }
#pragma unroll
            for (uint i = 0; i < kWords; i += 4) {
                // two codes each of four words, or of two pairs of words
                const uint low = mma_permute(words[i], words[i + 1], at.select);
                const uint high = mma_permute(words[i + 2], words[i + 3], at.select);
                uint w[kPerWord / 2];
                mma_neighbours<Format, T>(mma_permute(low, high, 0x5410), w);
#pragma unroll
                for (uint j = 0; j < kPerWord / 2; ++j) {
                    const uint eight = i * kPerWord / 8 + j; // of k
                    const uint step = eight / 2, run = kFine ? step : 0;
                    uint plain = Decode::plain(w[j]);
                    if (W::kAffine) plain = Pair::plus(plain, shifts[run]);
                    left[step][eight % 2 * 2 + h] = W::kBias ? Pair::fma(plain, scales[run], offsets[run])
                                                             : Pair::times(plain, scales[run]);
                }
            }
        }
    }

    struct Turn {
        uint k, now, ahead;
    };
    static uint after(uint stage) { return stage == (kStages - 1) * kStage ? 0 : stage + kStage; }

    // One stage. The instructions of the stage before may still be running: they read the other left operands.
    template <bool kFine>
    static void step(thread const Arguments& a, thread const Place& at, thread Turn& turn,
                     thread Scales<kFine>& next, thread uint (&left)[4][4], thread float (&d)[kSums]) {
        const Scales<kFine> s = next;
        AsyncCopy::wait<kStages - 3>();
        WgmmaGroup::publish();
        threadgroup_barrier(
            mem_flags::mem_threadgroup); // the stage before the last has been read by everybody
        load(a, at, turn.k + (kStages - 2) * kBK, at.base + turn.ahead);
        AsyncCopy::commit();
        fetch<kFine>(a, at.row, turn.k + kBK + at.k, next);
        decode<kFine>(at, at.ws + turn.now, s, left);
        WgmmaGroup::fence();
#pragma unroll
        for (uint i = 0; i < 4; ++i) Wgmma<T, kTokens>::mma(d, left[i], at.xs + (turn.now >> 4) + 2 * i);
        WgmmaGroup::commit();
        WgmmaGroup::wait<1>();
        turn.k += kBK;
        turn.now = after(turn.now);
        turn.ahead = after(turn.ahead);
    }

    template <bool kFine>
    static void sum(thread const Arguments& a, thread const Place& at, thread float (&d)[kSums]) {
#pragma unroll
        for (uint i = 0; i < kStages - 2; ++i) {
            load(a, at, i * kBK, at.base + i * kStage);
            AsyncCopy::commit();
        }
        Scales<kFine> next;
        fetch<kFine>(a, at.row, at.k, next);
        Turn turn = {0, 0, (kStages - 2) * kStage};
        uint left[2][4][4];
        while (turn.k < a.K) { // a stage behind the end is all zeros
            step<kFine>(a, at, turn, next, left[0], d);
            step<kFine>(a, at, turn, next, left[1], d);
        }
        WgmmaGroup::wait<0>();
        Wgmma<T, kTokens>::hold(d);
        AsyncCopy::wait<0>();
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }

    static void transposed(uint at, uint a, uint b, uint c, uint d) {
        __asm__ volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};"
                         :
                         : "r"(at), "r"(a), "r"(b), "r"(c), "r"(d)
                         : "memory");
    }
    static uint pack(T a, T b) { return uint(as_type<ushort>(a)) | uint(as_type<ushort>(b)) << 16; }

    // Sums become rows of y in threadgroup memory.
    static void put(thread const Place& at, uint lane, uint to, float factor, Epilogue epilogue,
                    thread const float (&d)[kSums]) {
        const uint column = at.row - at.first - lane / 4;
        const uint from = to + (lane / 16 * 8 + lane % 8) * kYStride + (column + lane / 8 % 2 * 8) * 2;
#pragma unroll
        for (uint j = 0; j < kTokens / 8; j += 2) {
            uint v[4];
#pragma unroll
            for (uint i = 0; i < 4; ++i) { // 8 tokens i / 2, 8 rows i % 2
                T y[2];
#pragma unroll
                for (uint e = 0; e < 2; ++e) {
                    const uint token = at.token + (j + i / 2) * 8 + lane % 4 * 2 + e;
                    y[e] = T(epilogue.apply(d[(j + i / 2) * 4 + i % 2 * 2 + e] * factor, token,
                                            at.row + i % 2 * 8));
                }
                v[i] = pack(y[0], y[1]);
            }
            transposed(from + j * 8 * kYStride, v[0], v[1], v[2], v[3]);
        }
    }

    static void write(thread const Arguments& a, thread const Place& at, threadgroup const uchar* from) {
        const bool whole = (ulong(a.y) | a.N * sizeof(T)) % 16 == 0;
        for (uint i = at.tid; i < kTokens * kRows / 8; i += kThreads) {
            const uint m = i / (kRows / 8), n = at.first + i % (kRows / 8) * 8;
            if (at.token + m >= a.M) break;
            threadgroup const T* y = (threadgroup const T*)(from + m * kYStride + i % (kRows / 8) * 16);
            device T* to = a.y + ulong(at.token + m) * a.N + n;
            if (whole) {
                if (n < a.N) *(device uint4*)to = *(threadgroup const uint4*)y;
            } else {
                for (uint j = 0; j < 8; ++j) {
                    if (n + j < a.N) to[j] = y[j];
                }
            }
        }
    }

    static void run(Arguments a, GemmPlace where, threadgroup Shared& sh, Epilogue epilogue) {
        const uint lane = where.lane, group = where.sgid / 4;
        const uint column = (kGroupsN == 2 ? where.sgid : where.sgid % 4) * 16 + lane / 4;
        const uint k = kGroupsK == 2 ? group : 0;
        Place at;
        at.first = where.tgid.x * kRows;
        at.token = where.tgid.y * kTokens;
        at.tid = where.sgid * kSimdWidth + lane;
        at.base = AsyncCopy::address(sh.stages);
        at.row = at.first + column;
        at.k = k * kBlock;
        at.ws = at.base + kX + column * kWStride + k * (kCodes / kGroupsK);
        at.xs = WgmmaGroup::describe(at.base + k * kTokens * 128);
        at.select = kPerWord == 8 ? 0x40 + lane % 4 * 0x11 : 0x10 + lane % 4 * 0x22;
        float d[kSums];
#pragma unroll
        for (uint i = 0; i < kSums; ++i) d[i] = 0;
        if ((1u << a.shift) < kBlock) {
            sum<true>(a, at, d);
        } else {
            sum<false>(a, at, d);
        }
        // the second half of k, register by register
        const uint parts = (kGroupsK - 1) * kSums * 128 * 4;
        if (kGroupsK == 2) {
            threadgroup float* part = (threadgroup float*)sh.stages + at.tid % 128;
            if (group == 1) {
#pragma unroll
                for (uint i = 0; i < kSums; ++i) part[i * 128] = d[i];
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
            if (group == 0) {
#pragma unroll
                for (uint i = 0; i < kSums; ++i) d[i] += part[i * 128];
            }
        }
        if (kGroupsK == 1 || group == 0) put(at, lane, at.base + parts, a.row(0).factor, epilogue, d);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        write(a, at, sh.stages + parts);
    }
};
#endif
