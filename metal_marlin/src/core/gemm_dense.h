#pragma once
// The tile pipeline of gemm_tile.h where both operands are dense: y[m, n] = sum over k of x[m, k] * w[n, k]. Sums are
// float. What becomes of a sum is the Sink's affair: sink(n, m, sum), called once for each of kBN x kBM, also beyond N
// and M. With 16-byte loads where `aligned`, else element by element, so that any K and start address works.
// Sources: own.
#include <metal_stdlib>
#include "core/constants.h"
#include "core/tile.h"
using namespace metal;

template <typename T> struct DenseArguments {
    device const T* x; // [M, K]
    device const T* w; // [N, K]
    uint M, N, K;
    bool aligned; // K fills 16 bytes, x and w start at multiples of them
};

template <typename T, uint kStages> struct DenseGemm {
    typedef TileMath<T> Math;
    typedef TileSize<T> Size;
    enum : uint {
        kBN = Size::kBN,
        kBM = Size::kBM,
        kBK = Size::kBK,
        kRows = kBN / Size::kWN, // of a simdgroup
        kTokens = kBM / Size::kWM,
        kStride = kBK + Size::kPad,
        kSimdgroups = Size::kWN * Size::kWM,
        kThreads = kSimdgroups * kSimdWidth,
        kPer16 = 16 / sizeof(T),
        kAcross = kBK / kPer16, // chunks of 16 bytes of a row
        kOfW = kBN * kAcross / kThreads,
        kOfX = kBM * kAcross / kThreads
    };
    struct alignas(16) Shared {
        T w[kStages][kBN * kStride];
        T x[kStages][kBM * kStride];
        float scratch[kSimdgroups][Math::kScratch];
    };
    union Chunk {
        uint4 bits;
        T v[kPer16];
    };
    struct Fetched {
        Chunk w[kOfW], x[kOfX];
    };
    typedef typename Math::template Sums<kRows, kTokens> Sums;

    // Chunks of rows first, first + 1 ... of a matrix; the last row again behind it, 0 behind the end of a row.
    template <uint kCount>
    static void fetch(device const T* matrix, uint first, uint rows, uint K, bool aligned, uint tid, uint k0,
                      thread Chunk (&to)[kCount]) {
#pragma unroll
        for (uint i = 0; i < kCount; ++i) {
            const uint chunk = tid + i * kThreads, k = k0 + chunk % kAcross * kPer16;
            device const T* from = matrix + ulong(min(first + chunk / kAcross, rows - 1)) * K + k;
            if (aligned) {
                to[i].bits = k < K ? *(device const uint4*)from : uint4(0);
            } else {
#pragma unroll
                for (uint j = 0; j < kPer16; ++j) to[i].v[j] = k + j < K ? from[j] : T(0);
            }
        }
    }
    template <uint kCount> static void put(thread const Chunk (&from)[kCount], uint tid, threadgroup T* to) {
#pragma unroll
        for (uint i = 0; i < kCount; ++i) {
            const uint chunk = tid + i * kThreads;
            *(threadgroup uint4*)(to + chunk / kAcross * kStride + chunk % kAcross * kPer16) = from[i].bits;
        }
    }
    static void fetch(thread const DenseArguments<T>& a, uint3 tgid, uint tid, uint k, thread Fetched& f) {
        fetch(a.w, tgid.x * kBN, a.N, a.K, a.aligned, tid, k, f.w);
        fetch(a.x, tgid.y * kBM, a.M, a.K, a.aligned, tid, k, f.x);
    }
    static void multiply(threadgroup const T* ws, threadgroup const T* xs, uint lane, thread Sums& sums) {
#pragma unroll
        for (uint k = 0; k < kBK; k += Math::kStep) {
            typename Math::template Left<kRows> left;
            typename Math::template Right<kTokens> right;
            Math::load(left, ws + k, kStride, lane);
            Math::load(right, xs + k, kStride, lane);
            Math::multiply(sums, left, right);
        }
    }

    // Sums of what a simdgroup makes; `to` gets (n, m, sum).
    template <typename To> struct Placed {
        To to;
        uint n, m;
        void operator()(uint row, uint column, float sum) const { to(n + row, m + column, sum); }
    };

    template <typename To>
    static void run(DenseArguments<T> a, uint3 tgid, uint sgid, uint lane, threadgroup Shared& sh, To to) {
        const uint tid = sgid * kSimdWidth + lane;
        const uint row = sgid / Size::kWM * kRows, token = sgid % Size::kWM * kTokens;
        Sums sums;
        Math::clear(sums);
        Fetched f;
        fetch(a, tgid, tid, 0, f);
        put(f.w, tid, sh.w[0]);
        put(f.x, tid, sh.x[0]);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        uint stage = 0;
        for (uint k = 0; k < a.K; k += kBK) {
            const bool more = k + kBK < a.K;
            const uint next = (stage + 1) % kStages;
            if (more) fetch(a, tgid, tid, k + kBK, f);
            multiply(sh.w[stage] + row * kStride, sh.x[stage] + token * kStride, lane, sums);
            if (next == stage) threadgroup_barrier(mem_flags::mem_threadgroup);
            if (more) {
                put(f.w, tid, sh.w[next]);
                put(f.x, tid, sh.x[next]);
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
            stage = next;
        }
        const Placed<To> placed = {to, tgid.x * kBN + row, tgid.y * kBM + token};
        Math::each(sums, sh.scratch[sgid], lane, placed);
    }
};
