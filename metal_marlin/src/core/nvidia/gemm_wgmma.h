#pragma once
#ifdef __METAL_MARLIN_CUDA__
#include "core/nvidia/async_copy.h"
#include "core/nvidia/barrier.h"
#include "core/nvidia/cluster.h"
#include "core/nvidia/operand.h"
#include "core/nvidia/wgmma.h"

// Many tokens, sm_90a: a threadgroup takes kRows rows of W and kTokens tokens, for one of kSplit parts of K. Its two
// groups of four simdgroups take 64 rows each or, where kRows is 64, alternate blocks of 64 k. The matrix instruction
// reads x from threadgroup memory, where the tensor copy unit puts blocks of it ahead, while a group decodes its next
// weights to the left operand. Codes pass through a queue that belongs to the simdgroup, so nothing makes simdgroups wait
// for each other but a block of x that is to be overwritten. The left operand's lane 4 * r + c has neighbouring columns
// 2 * c of every 8: byte c of a word of 4-bit codes, so lanes 4 * r ... read the same words.
// Weights are rounded to T after their scale, which half could not hold for every scale: scales are divided by a power of
// two of their row, which multiplies its sums.
template <typename W, typename T, typename Schedule, typename Epilogue> struct WgmmaGemm {
    typedef typename W::Format Format;
    typedef MmaNeighbours<Format, T> Decode;
    typedef MmaPair<T> Pair;
    typedef GemmArguments<W, T> Arguments;
    enum : uint {
        kTokens = Schedule::kTokens,
        kRows = Schedule::kRows,
        kStages = Schedule::kDepth,
        kSplit = Schedule::kSplit,
        kSimdgroups = 8,
        kThreads = kSimdgroups * kSimdWidth,
        kGroupsN = kRows / 64,
        kGroupsK = 2 / kGroupsN,
        kBlock = 64,
        kStride = kSplit * kGroupsK * kBlock, // k between a group's blocks
        kPerWord = Format::kPerWord,
        kRow = kBlock * Format::kBits / 8, // bytes of a row's codes of a block
        kSlot = 16 * kRow,
        kDepth = kPerWord == 8 ? 8 : 4, // slots of a queue
        kCopies = kSlot / 16 / kSimdWidth,
        kStage = kTokens * 2 * kBlock, // bytes of a block of x
        kSums = kTokens / 2,
        kYStride = 2 * kRows + 16
    };
    static_assert(kGroupsN * kGroupsK == 2, "WgmmaGemm: two groups");
    static_assert(kSplit == 1 || kGroupsK == 2, "WgmmaGemm: room for one part's sums");
    static_assert(kStages % kGroupsK == 0, "WgmmaGemm: as many stages for each group");
    static_assert(kSums * 128 * 4 * (kGroupsK - 1) + kTokens * kYStride <= kStages * kStage,
                  "WgmmaGemm: y takes the place of stages");
    struct alignas(1024) Shared {
        uchar stages[kStages * kStage];
        uchar queues[kSimdgroups * kDepth * kSlot];
        ulong full[kStages], empty[kStages];
    };
    // Of two rows: kRuns scales a block, for 64, 32 or 16 k each.
    template <uint kRuns> struct Scales {
        float scales[2][kRuns], shifts[2][kRuns], offsets[2][kRuns];
    };
    struct Place {
        uint first, token, tid, lane;
        uint row;         // of W, the lane's first
        uint k;           // the group's first
        uint stage;       // the group's first
        uint stages;      // address of the first
        uint full, empty; // of the first stage
        uint to, from;    // where the lane copies codes and where its first row's are, in the first slot
        uint end;         // k at which the last block of an even number ends, for every group
        ulong map;        // of x
        uint select;
        bool leads;                 // simdgroup that asks for its group's x, or for that of both groups
        float power[2], inverse[2]; // of the lane's rows
    };
    struct Turn {
        uint k, stage, parity, slot;
    };
    struct Ahead {
        device const uint* codes[kCopies]; // what the lane copies next
        uint k, slot;
    };

    static uint join(T a) { return uint(as_type<ushort>(a)) * 0x10001u; }

    // Codes of a block, one after the other; a lane copies 16 bytes of each of kCopies rows.
    static void ask(thread const Arguments& a, thread const Place& at, thread Ahead& next) {
        const bool reads = next.k < a.K;
#pragma unroll
        for (uint i = 0; i < kCopies; ++i) {
            device const uint* from = reads ? next.codes[i] : a.codes;
            AsyncCopy::copy16(at.to + next.slot * kSlot + i * 512, from, reads);
            next.codes[i] += kStride / kPerWord;
        }
        AsyncCopy::commit();
        next.k += kStride;
        next.slot = (next.slot + 1) % kDepth;
    }
    static Ahead first(thread const Arguments& a, thread const Place& at) {
        enum : uint { kChunks = kRow / 16 };
        Ahead next;
        next.k = at.k + at.lane % kChunks * (4 * kPerWord);
        next.slot = 0;
#pragma unroll
        for (uint i = 0; i < kCopies; ++i) {
            const uint row =
                min(at.row - at.lane / 4 + at.lane / kChunks + i * (kSimdWidth / kChunks), a.N - 1);
            next.codes[i] = a.codes + (ulong(row) * a.K + next.k) / kPerWord;
        }
        return next;
    }

    // By a simdgroup.
    static void load(thread const Place& at, uint k, uint stage) {
        copy_box(at.stages + stage * kStage, at.map, k, at.token, at.full + stage * 8, kStage);
    }

    // Powers of two above the largest scales of a lane's rows; lanes 4 * r ... share them.
    static void normalise(thread const Arguments& a, thread Place& at) {
#pragma unroll
        for (uint h = 0; h < 2; ++h) {
            const typename W::Row row = a.row(min(at.row + 8 * h, a.N - 1));
            uint most = 0;
            for (uint g = at.lane % 4; g < a.groups; g += 4) {
                most = max(most, as_type<uint>(float(W::Scale::value(row.scales[g]))) & 0x7f800000u);
                if (W::kBias) most = max(most, as_type<uint>(float(row.group(g).bias)) & 0x7f800000u);
            }
            most = max(most, simd_shuffle_xor(most, ushort(1)));
            most = min(max(most, simd_shuffle_xor(most, ushort(2))), 252u << 23);
            at.power[h] = as_type<float>(most + (1u << 23));
            at.inverse[h] = as_type<float>((253u << 23) - most);
        }
    }

    template <uint kRuns>
    static void fetch(thread const Arguments& a, thread const Place& at, uint k, thread Scales<kRuns>& s) {
#pragma unroll
        for (uint h = 0; h < 2; ++h) {
            const typename W::Row row = a.row(min(at.row + 8 * h, a.N - 1));
#pragma unroll
            for (uint run = 0; run < kRuns; ++run) {
                const uint g = a.group(k + kBlock / kRuns * run);
                s.scales[h][run] = W::Scale::value(row.scales[g]);
                if (W::kAffine) {
                    const typename W::Group group = row.group(g);
                    s.shifts[h][run] = -group.zero;
                    s.offsets[h][run] = group.bias;
                }
            }
        }
    }

    // The lane's left operands of a block, four steps of 16 k.
    template <uint kRuns>
    static void decode(thread const Place& at, uint from, thread const Scales<kRuns>& s,
                       thread uint (&left)[4][4]) {
        enum : uint { kWords = kBlock / kPerWord };
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
                scales[run] = join(T(s.scales[h][run] * (at.inverse[h] * Decode::kUnit)));
                if (W::kZero) shifts[run] = join(T(s.shifts[h][run]));
                if (W::kBias) offsets[run] = join(T(s.offsets[h][run] * at.inverse[h]));
            }
#pragma unroll
            for (uint i = 0; i < kWords; i += 4) {
                // two codes each of four words, or of two pairs of words
                const uint low = mma_permute(words[i], words[i + 1], at.select);
                const uint high = mma_permute(words[i + 2], words[i + 3], at.select);
                uint w[kPerWord / 2];
                Decode::pairs(mma_permute(low, high, 0x5410), w);
#pragma unroll
                for (uint j = 0; j < kPerWord / 2; ++j) {
                    const uint eight = i * kPerWord / 8 + j; // of k
                    const uint step = eight / 2, run = step * kRuns / 4;
                    if (W::kZero) w[j] = Pair::plus(w[j], shifts[run]);
                    left[step][eight % 2 * 2 + h] = W::kBias ? Pair::fma(w[j], scales[run], offsets[run])
                                                             : Pair::times(w[j], scales[run]);
                }
            }
        }
    }

    // A block. The instructions of the block before may still be running: they read the other left operands.
    template <uint kRuns>
    static void step(thread const Arguments& a, thread const Place& at, thread Turn& turn,
                     thread Ahead& ahead, thread Scales<kRuns>& scales, thread uint (&left)[4][4],
                     thread float (&d)[kSums]) {
        const Scales<kRuns> s = scales;
        fetch<kRuns>(a, at, turn.k + 2 * kStride, scales);
        AsyncCopy::wait<kDepth - 2>();
        simdgroup_barrier(mem_flags::mem_threadgroup); // the slot of the block before has been read
        ask(a, at, ahead);
        decode<kRuns>(at, at.from + turn.slot * kSlot, s, left);
        PhaseBarrier::wait(at.full + turn.stage * 8, turn.parity);
        WgmmaGroup::fence();
#pragma unroll
        for (uint i = 0; i < 4; ++i)
            Wgmma<T, kTokens>::mma(d, left[i], WgmmaGroup::describe(at.stages + turn.stage * kStage) + 2 * i);
        WgmmaGroup::commit();
        WgmmaGroup::wait<1>();
        // Stages that the group has read: of the block before, and of the one before that, which the other group too has
        // read by now or soon.
        const uint before = turn.stage < kGroupsK ? turn.stage + kStages - kGroupsK : turn.stage - kGroupsK;
        const uint old = kGroupsN == 1 ? before : before == 0 ? kStages - 1 : before - 1;
        enum : uint { kLag = kGroupsN * kStride };
        if (at.lane == 0 && turn.k >= kStride) PhaseBarrier::arrive(at.empty + before * 8);
        const uint k = turn.k + kStages / kGroupsK * kStride - kLag;
        if (at.leads && turn.k >= kLag && k < at.end) {
            PhaseBarrier::wait(at.empty + old * 8, old < turn.stage ? turn.parity : turn.parity ^ 1);
            load(at, k, old);
        }
        turn.k += kStride;
        turn.slot = (turn.slot + 1) % kDepth;
        turn.stage += kGroupsK;
        if (turn.stage >= kStages) turn.stage -= kStages, turn.parity ^= 1;
    }

    template <uint kRuns>
    static void sum(thread const Arguments& a, thread Place& at, thread float (&d)[kSums]) {
        if (at.leads) {
#pragma unroll
            for (uint i = 0; i < kStages / kGroupsK; ++i) {
                if (at.k + i * kStride < at.end) load(at, at.k + i * kStride, at.stage + i * kGroupsK);
            }
        }
        Ahead ahead = first(a, at);
#pragma unroll
        for (uint i = 0; i < kDepth - 1; ++i) ask(a, at, ahead);
        normalise(a, at);
        Scales<kRuns> scales[2];
        fetch<kRuns>(a, at, at.k, scales[0]);
        fetch<kRuns>(a, at, at.k + kStride, scales[1]);
        Turn turn = {at.k, at.stage, 0, 0};
        uint left[2][4][4];
        while (turn.k < at.end) { // a block behind K is all zeros
            step<kRuns>(a, at, turn, ahead, scales[0], left[0], d);
            step<kRuns>(a, at, turn, ahead, scales[1], left[1], d);
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
                    y[e] = T(epilogue.apply(d[(j + i / 2) * 4 + i % 2 * 2 + e] * (at.power[i % 2] * factor),
                                            token, at.row + i % 2 * 8));
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
        const uint lane = where.lane, strip = (kGroupsN == 2 ? where.sgid : where.sgid % 4) * 16;
        const uint queue = AsyncCopy::address(sh.queues) + where.sgid * kDepth * kSlot;
        Place at;
        at.first = where.tgid.x * kRows;
        at.token = where.tgid.y * kTokens;
        at.tid = where.sgid * kSimdWidth + lane;
        at.lane = lane;
        at.row = at.first + strip + lane / 4;
        at.stage = kGroupsK == 2 ? where.sgid / 4 : 0;
        at.k = (where.tgid.z * kGroupsK + at.stage) * kBlock;
        at.leads = where.sgid % (kGroupsK == 2 ? 4 : 8) == 0;
        at.stages = AsyncCopy::address(sh.stages);
        at.full = AsyncCopy::address(sh.full);
        at.empty = AsyncCopy::address(sh.empty);
        at.to = queue + lane * 16;
        at.from = queue + lane / 4 * kRow;
        at.end = (a.K + 2 * kStride - 1) / (2 * kStride) * (2 * kStride);
        at.map = descriptor_at<6>();
        at.select = kPerWord == 8 ? 0x40 + lane % 4 * 0x11 : 0x10 + lane % 4 * 0x22;
        return at;
    }

    // Adds what the other parts of K came to; the first of them has the sum. Every part has it in the same place.
    static void gather(uint from, uint rank, thread float (&d)[kSums]) {
        Cluster<kSplit>::barrier();
        if (rank == 0) {
            for (uint part = 1; part < kSplit; ++part) {
                const uint other = Cluster<kSplit>::address(from, part);
#pragma unroll
                for (uint i = 0; i < kSums; ++i) d[i] += Cluster<kSplit>::load(other + i * 512);
            }
        }
        Cluster<kSplit>::barrier(); // nobody leaves before its sums have been read
    }

    static void run(Arguments a, GemmPlace where, threadgroup Shared& sh, Epilogue epilogue) {
        if (kSplit > 1) Cluster<kSplit>::form();
        Place at = place(a, where, sh);
        if (at.tid == 0) {
            for (uint i = 0; i < kStages; ++i) {
                PhaseBarrier::start(at.full + i * 8, 1);
                PhaseBarrier::start(at.empty + i * 8, kGroupsN * 4);
            }
            PhaseBarrier::publish();
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        float d[kSums];
#pragma unroll
        for (uint i = 0; i < kSums; ++i) d[i] = 0;
        if (a.shift >= 6) {
            sum<1>(a, at, d);
        } else if (a.shift == 5) {
            sum<2>(a, at, d);
        } else {
            sum<4>(a, at, d);
        }
        // the second half of k, register by register
        const uint parts = (kGroupsK - 1) * kSums * 128 * 4, group = where.sgid / 4;
        threadgroup float* part = (threadgroup float*)sh.stages + at.tid % 128;
        if (kGroupsK == 2) {
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
        if (kSplit > 1) {
            if (group == 0 && where.tgid.z != 0) {
#pragma unroll
                for (uint i = 0; i < kSums; ++i) part[i * 128] = d[i];
            }
            gather(at.stages + at.tid % 128 * 4, group == 0 ? where.tgid.z : 1, d);
            if (where.tgid.z != 0) return;
        }
        if (kGroupsK == 1 || group == 0) put(at, at.stages + parts, a.row(0).factor, epilogue, d);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        write(a, at, sh.stages + parts);
    }
};
#endif
