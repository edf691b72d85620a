#pragma once
#ifdef __METAL_MARLIN_CUDA__
#include "core/nvidia/async_copy.h"
#include "core/nvidia/barrier.h"
#include "core/nvidia/operand.h"
#include "core/nvidia/wgmma.h"

// Many tokens, sm_90a: a threadgroup takes kRows rows of W and kTokens tokens. Its two groups of four simdgroups take 64
// rows each or, where kRows is 64, alternate blocks of 64 k. The matrix instruction reads x from threadgroup memory, where
// the tensor copy unit puts it kStages - 2 stages ahead, while the next block's weights are decoded to its left operand.
// Codes pass through a queue that belongs to the simdgroup, so nothing makes simdgroups wait for each other but a stage
// of x that is to be overwritten. The left operand's lane 4 * r + c has neighbouring columns 2 * c of every 8: byte c of a
// word of 4-bit codes, so lanes 4 * r ... read the same words.
template <typename W, typename T, typename Schedule, typename Epilogue> struct WgmmaGemm {
    typedef typename W::Format Format;
    typedef MmaDecode<Format, T> Decode;
    typedef MmaPair<T> Pair;
    typedef GemmArguments<W, T> Arguments;
    enum : uint {
        kTokens = Schedule::kTokens,
        kRows = Schedule::kRows,
        kStages = Schedule::kDepth,
        kSimdgroups = 8,
        kThreads = kSimdgroups * kSimdWidth,
        kGroupsN = kRows / 64,
        kGroupsK = 2 / kGroupsN,
        kBlock = 64,
        kStride = kGroupsK * kBlock, // k of a stage
        kPerWord = Format::kPerWord,
        kRow = kBlock * Format::kBits / 8, // bytes of a row's codes of a block
        kSlot = 16 * kRow,
        kDepth = 8, // slots of a queue
        kCopies = kSlot / 16 / kSimdWidth,
        kBox = kTokens * 2 * kBlock, // bytes of a block of x
        kStage = kGroupsK * kBox,
        kSums = kTokens / 2,
        kYStride = 2 * kRows + 16
    };
    static_assert(kGroupsN * kGroupsK == 2, "WgmmaGemm: two groups");
    static_assert(kSums * 128 * 4 * (kGroupsK - 1) + kTokens * kYStride <= kStages * kStage,
                  "WgmmaGemm: y takes the place of stages");
    struct alignas(1024) Shared {
        uchar stages[kStages * kStage];
        uchar queues[kSimdgroups * kDepth * kSlot];
        ulong full[kStages], empty[kStages];
    };
    // Of two rows: one scale a block, or one for every 16 k.
    template <bool kFine> struct Scales {
        enum : uint { kRuns = kFine ? 4 : 1 };
        float scales[2][kRuns], shifts[2][kRuns], offsets[2][kRuns];
    };
    struct Place {
        uint first, token, tid, lane;
        uint row;         // of W, the lane's first
        uint k;           // the group's within a stage
        uint stages;      // address of the first
        uint full, empty; // of the first stage
        uint to, from;    // where the lane copies codes and where its first row's are, in the first slot
        uint from_row;    // of W, whose codes it copies first
        uint end;         // k at which the last stage of an even number ends
        ulong map;        // of x
        ulong right;      // the group's x in the first stage, described
        uint select;
    };
    struct Turn {
        uint k, stage, parity, slot;
    };

    static uint join(T a) { return uint(as_type<ushort>(a)) * 0x10001u; }

    // Codes of a block; a lane copies 16 bytes of each of kCopies rows.
    static void ask(thread const Arguments& a, thread const Place& at, uint k, uint slot) {
        enum : uint { kChunks = kRow / 16 };
        k += at.k + at.lane % kChunks * (4 * kPerWord);
        const bool reads = k < a.K;
#pragma unroll
        for (uint i = 0; i < kCopies; ++i) {
            const uint row = min(at.from_row + i * (kSimdWidth / kChunks), a.N - 1);
            device const uint* codes = a.codes + ulong(row) * (a.K / kPerWord);
            AsyncCopy::copy16(at.to + slot * kSlot + i * 512, codes + (reads ? k / kPerWord : 0), reads);
        }
        AsyncCopy::commit();
    }

    // x of a stage, by one thread.
    static void load(thread const Place& at, uint k, uint stage) {
        PhaseBarrier::expect(at.full + stage * 8, kStage);
#pragma unroll
        for (uint i = 0; i < kGroupsK; ++i)
            copy_box(at.stages + stage * kStage + i * kBox, at.map, k + i * kBlock, at.token, at.full + stage * 8);
    }

    template <bool kFine>
    static void fetch(thread const Arguments& a, thread const Place& at, uint k, thread Scales<kFine>& s) {
#pragma unroll
        for (uint h = 0; h < 2; ++h) {
            const typename W::Row row = a.row(min(at.row + 8 * h, a.N - 1));
#pragma unroll
            for (uint run = 0; run < Scales<kFine>::kRuns; ++run) {
                const uint g = a.group(k + at.k + 16 * run);
                s.scales[h][run] = W::Scale::value(row.scales[g]);
                if (W::kAffine) {
                    const typename W::Group group = row.group(g);
                    s.shifts[h][run] = Middle<W>::value - group.zero;
                    s.offsets[h][run] = group.bias;
                }
            }
        }
    }

    // The lane's left operands of a block, four steps of 16 k.
    template <bool kFine>
    static void decode(thread const Place& at, uint from, thread const Scales<kFine>& s,
                       thread uint (&left)[4][4]) {
        enum : uint { kRuns = Scales<kFine>::kRuns, kWords = kBlock / kPerWord };
#pragma unroll
        for (uint h = 0; h < 2; ++h) {
            uint words[kWords], scales[kRuns], shifts[kRuns], offsets[kRuns];
#pragma unroll
            for (uint i = 0; i < kWords; i += 4) {
                const uint4 v = shared_load16(from + h * 8 * kRow + i * 4);
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

    // One stage. The instructions of the stage before may still be running: they read the other left operands.
    template <bool kFine>
    static void step(thread const Arguments& a, thread const Place& at, thread Turn& turn,
                     thread Scales<kFine>& next, thread uint (&left)[4][4], thread float (&d)[kSums]) {
        const Scales<kFine> s = next;
        fetch<kFine>(a, at, turn.k + kStride, next);
        AsyncCopy::wait<kDepth - 2>();
        simdgroup_barrier(mem_flags::mem_threadgroup); // the slot of the stage before has been read
        ask(a, at, turn.k + (kDepth - 1) * kStride, (turn.slot + kDepth - 1) % kDepth);
        decode<kFine>(at, at.from + turn.slot * kSlot, s, left);
        PhaseBarrier::wait(at.full + turn.stage * 8, turn.parity);
        WgmmaGroup::fence();
#pragma unroll
        for (uint i = 0; i < 4; ++i)
            Wgmma<T, kTokens>::mma(d, left[i], at.right + turn.stage * (kStage >> 4) + 2 * i);
        WgmmaGroup::commit();
        WgmmaGroup::wait<1>();
        const uint before = turn.stage == 0 ? kStages - 1 : turn.stage - 1;
        if (at.lane == 0 && turn.k != 0) PhaseBarrier::arrive(at.empty + before * 8);
        // The stage before that is read by others for little longer, so that waiting for them costs little.
        if (at.tid == 0 && turn.k >= 2 * kStride && turn.k + (kStages - 2) * kStride < at.end) {
            const uint old = before == 0 ? kStages - 1 : before - 1;
            PhaseBarrier::wait(at.empty + old * 8, old < turn.stage ? turn.parity : turn.parity ^ 1);
            load(at, turn.k + (kStages - 2) * kStride, old);
        }
        turn.k += kStride;
        turn.slot = (turn.slot + 1) % kDepth;
        if (++turn.stage == kStages) turn.stage = 0, turn.parity ^= 1;
    }

    template <bool kFine>
    static void sum(thread const Arguments& a, thread const Place& at, thread float (&d)[kSums]) {
        if (at.tid == 0) {
#pragma unroll
            for (uint i = 0; i < kStages; ++i) {
                if (i * kStride < at.end) load(at, i * kStride, i);
            }
        }
#pragma unroll
        for (uint i = 0; i < kDepth - 1; ++i) ask(a, at, i * kStride, i);
        Scales<kFine> next;
        fetch<kFine>(a, at, 0, next);
        Turn turn = {0, 0, 0, 0};
        uint left[2][4][4];
        while (turn.k < at.end) { // a stage behind K is all zeros
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
    static void put(thread const Place& at, uint to, float factor, Epilogue epilogue,
                    thread const float (&d)[kSums]) {
        const uint lane = at.lane, column = at.row - at.first - lane / 4;
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

    static Place place(thread const Arguments& a, GemmPlace where, threadgroup const Shared& sh) {
        enum : uint { kChunks = kRow / 16 };
        const uint lane = where.lane, strip = (kGroupsN == 2 ? where.sgid : where.sgid % 4) * 16;
        const uint queue = AsyncCopy::address(sh.queues) + where.sgid * kDepth * kSlot;
        Place at;
        at.first = where.tgid.x * kRows;
        at.token = where.tgid.y * kTokens;
        at.tid = where.sgid * kSimdWidth + lane;
        at.lane = lane;
        at.row = at.first + strip + lane / 4;
        at.k = kGroupsK == 2 ? where.sgid / 4 * kBlock : 0;
        at.stages = AsyncCopy::address(sh.stages);
        at.full = AsyncCopy::address(sh.full);
        at.empty = AsyncCopy::address(sh.empty);
        at.to = queue + lane * 16;
        at.from = queue + lane / 4 * kRow;
        at.from_row = at.first + strip + lane / kChunks;
        at.end = (a.K + 2 * kStride - 1) / (2 * kStride) * (2 * kStride);
        at.map = descriptor_at<6>();
        at.right = WgmmaGroup::describe(at.stages + at.k / kBlock * kBox);
        at.select = kPerWord == 8 ? 0x40 + lane % 4 * 0x11 : 0x10 + lane % 4 * 0x22;
        return at;
    }

    static void run(Arguments a, GemmPlace where, threadgroup Shared& sh, Epilogue epilogue) {
        const Place at = place(a, where, sh);
        if (at.tid == 0) {
            for (uint i = 0; i < kStages; ++i) {
                PhaseBarrier::start(at.full + i * 8, 1);
                PhaseBarrier::start(at.empty + i * 8, kSimdgroups);
            }
            PhaseBarrier::publish();
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        float d[kSums];
#pragma unroll
        for (uint i = 0; i < kSums; ++i) d[i] = 0;
        if ((1u << a.shift) < kBlock) {
            sum<true>(a, at, d);
        } else {
            sum<false>(a, at, d);
        }
        // the second half of k, register by register
        const uint parts = (kGroupsK - 1) * kSums * 128 * 4, group = where.sgid / 4;
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
        if (kGroupsK == 1 || group == 0) put(at, at.stages + parts, a.row(0).factor, epilogue, d);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        write(a, at, sh.stages + parts);
    }
};
#endif
