#pragma once
// How sums of a tile in operand order become outputs (core/nvidia/packed.h).
#ifdef __METAL_MARLIN_CUDA__
#include "core/nvidia/async_copy.h"
#include "core/nvidia/cluster.h"

template <typename Ring, typename T, typename Epilogue> struct RingOutputs {
    typedef typename Ring::Arguments Arguments;
    typedef typename Ring::Place Place;
    typedef typename Ring::Parts Parts;
    enum : uint {
        kRows = Ring::kRows,
        kTokens = Ring::kTokens,
        kSplit = Ring::kSplit,
        kAlongK = Ring::kAlongK,
        kWorkers = Ring::kWorkers,
        kOutputsAt = Ring::kStages * Ring::kStage,
        kSumStride = Ring::kSumStride
    };

    // Those that multiply wait for each other.
    static void meet() { __asm__ volatile("bar.sync 1, %0;" : : "n"(kWorkers) : "memory"); }

    static void put(thread const Place& at, uint strip, uint tile, thread const float (&d)[4]) {
        const uint to =
            at.stages +
            ((at.along_k * kTokens + tile * 8 + at.lane % 4 * 2) * kSumStride + strip * 16 + at.lane / 4) * 4;
#pragma unroll
        for (uint e = 0; e < 4; ++e) shared_store(to + (e % 2 * kSumStride + e / 2 * 8) * 4, d[e]);
    }

    static uint pack(T a, T b) { return uint(as_type<ushort>(a)) | uint(as_type<ushort>(b)) << 16; }

    // Adds up what was put, a threadgroup of a cluster its share.
    static void add(thread const Arguments& a, thread const Place& at, Epilogue epilogue) {
        if (kSplit > 1)
            Parts::barrier();
        else
            meet();
        const uint tid = at.simdgroup * kSimdWidth + at.lane, quads = kRows / 4;
        for (uint i = at.rank * kWorkers + tid; i < kTokens * quads; i += kSplit * kWorkers) {
            const uint row = i / quads, m = at.token + row, n = at.first + i % quads * 4;
            if (m >= a.M) break;
            if (n >= a.N) continue;
            float4 v = 0;
            for (uint part = 0; part < kSplit; ++part) {
                const uint sums = kSplit > 1 ? Parts::address(at.stages, part) : at.stages;
#pragma unroll
                for (uint k = 0; k < kAlongK; ++k)
                    v += Parts::load4(sums + ((k * kTokens + row) * kSumStride + i % quads * 4) * 4);
            }
#pragma unroll
            for (uint e = 0; e < 4; ++e) v[e] = epilogue.apply(v[e], m, n + e);
            *(device uint2*)(a.y + ulong(m) * a.N + n) = uint2(pack(T(v.x), T(v.y)), pack(T(v.z), T(v.w)));
        }
        if (kSplit > 1) Parts::barrier(); // nobody leaves before its sums have been read
    }

    // Every simdgroup has whole sums: they are rounded at once and, 16 tokens at a time, turned to rows of y.
    template <uint kCount>
    static void write(thread const Arguments& a, thread const Place& at, Epilogue epilogue,
                      thread const float (&power)[2], thread const float (&d)[kCount]) {
        const uint lane = at.lane, first = at.first + at.along_n * 16;
        // rows of 32 bytes, whose 16-byte chunk c lies at c ^ row / 4 % 2
        const uint outputs = at.stages + kOutputsAt + at.simdgroup * 512, row = lane / 16 * 8 + lane % 8;
        const uint to = outputs + row * 32 + ((lane / 8 ^ lane / 4) % 2 << 4);
        const uint token = lane / 2, from = outputs + token * 32 + ((lane ^ token / 4) % 2 << 4);
        device T* y = a.y + ulong(at.token + token) * a.N + first + lane % 2 * 8;
#pragma unroll
        for (uint j = 0; j < kCount / 4; j += 2) {
            uint v[4];
#pragma unroll
            for (uint i = 0; i < 4; ++i) { // 8 tokens i / 2, 8 rows i % 2
                T number[2];
#pragma unroll
                for (uint e = 0; e < 2; ++e) {
                    const uint m = at.token + (j + i / 2) * 8 + lane % 4 * 2 + e;
                    number[e] = T(epilogue.apply(d[(j + i / 2) * 4 + i % 2 * 2 + e] * power[i % 2], m,
                                                 first + lane / 4 + i % 2 * 8));
                }
                v[i] = pack(number[0], number[1]);
            }
            shared_transposed(to, v);
            simdgroup_barrier(mem_flags::mem_threadgroup);
            if (at.token + j * 8 + token < a.M && first < a.N)
                *(device uint4*)(y + ulong(j * 8) * a.N) = shared_load16(from);
            simdgroup_barrier(mem_flags::mem_threadgroup);
        }
    }
};
#endif
