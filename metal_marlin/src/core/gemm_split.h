#pragma once
// The tile pipeline of gemm_tile.h along a part of K, whose sums stay float in device memory until reduce() adds the
// parts in their order: the same bits every time.
//
//   slices   threadgroup (x, y, z) makes tile (x, y) of part z: k from z * per to (z + 1) * per
//   striped  stream-K: tiles x slices of K are units, and `workers` threadgroups take runs of units that differ in
//            length by one at most. A worker's sums of a tile are part p, if it is the p-th that has units of the tile;
//            parts that a tile does not have must be 0, which zero() makes them.
// Sources: own; stream-K: arXiv 2301.03598.
#include <metal_stdlib>
#include "core/gemm.h"
using namespace metal;

struct SplitShape {
    GemmShape one;
    long per;     // k of a slice, a multiple of every device's step
    long workers; // striped: threadgroups
};

template <typename W, typename T> struct SplitGemm : TileGemm<W, T, DoubleStage, NoEpilogue> {
    typedef TileGemm<W, T, DoubleStage, NoEpilogue> Tile;
    typedef typename Tile::Math Math;
    typedef typename Tile::Shared Shared;

    struct Sink {
        device float* part; // [M, N]
        uint N, M, n, m;
        void operator()(uint row, uint column, float sum) const {
            const uint to = n + row, token = m + column;
            if (to < N && token < M) part[ulong(token) * N + to] = sum;
        }
    };

    // k from `from` to `end`, multiples of a step or K.
    static void part(thread const GemmArguments<W, T>& a, GemmPlace at, uint from, uint end, device float* to,
                     threadgroup Shared& sh) {
        const uint tid = at.sgid * kSimdWidth + at.lane;
        const uint row = at.sgid / Tile::Size::kWM * Tile::kRows;
        const uint token = at.sgid % Tile::Size::kWM * Tile::kTokens;
        typename Tile::Sums sums;
        Math::clear(sums);
        typename Tile::Fetched f;
        Tile::fetch(a, at, tid, from, f);
        Tile::put(f, tid, sh.w[0], sh.x[0]);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        uint stage = 0;
        for (uint k = from; k < end; k += Tile::kBK) {
            const bool more = k + Tile::kBK < end;
            if (more) Tile::fetch(a, at, tid, k + Tile::kBK, f);
            Tile::multiply(sh.w[stage] + row * Tile::kStride, sh.x[stage] + token * Tile::kStride, at.lane,
                           sums);
            stage ^= 1;
            if (more) Tile::put(f, tid, sh.w[stage], sh.x[stage]);
            threadgroup_barrier(mem_flags::mem_threadgroup);
        }
        const Sink sink = {to, a.N, a.M, at.tgid.x * Tile::kBN + row, at.tgid.y * Tile::kBM + token};
        Math::each(sums, sh.scratch[at.sgid], at.lane, sink);
    }

    static void slices(GemmArguments<W, T> a, GemmPlace at, uint per, device float* parts,
                       threadgroup Shared& sh) {
        const uint from = at.tgid.z * per;
        part(a, at, from, min(from + per, a.K), parts + ulong(at.tgid.z) * a.M * a.N, sh);
    }

    static void striped(GemmArguments<W, T> a, GemmPlace at, uint per, uint workers, device float* parts,
                        threadgroup Shared& sh) {
        const uint across = (a.N + Tile::kBN - 1) / Tile::kBN, down = (a.M + Tile::kBM - 1) / Tile::kBM;
        const uint count = (a.K + per - 1) / per, worker = at.tgid.x;
        const ulong units = ulong(across) * down * count;
        const ulong end = (worker + 1) * units / workers;
        for (ulong unit = worker * units / workers; unit < end;) {
            const uint tile = uint(unit / count), slice = uint(unit % count);
            const uint many = uint(min(ulong(count - slice), end - unit));
            // the worker of unit u is the last that begins at or before it
            const uint first = uint(((ulong(tile) * count + 1) * workers - 1) / units);
            const GemmPlace place = {uint3(tile % across, tile / across, 0), at.sgid, at.lane};
            part(a, place, slice * per, min((slice + many) * per, a.K),
                 parts + ulong(worker - first) * a.M * a.N, sh);
            unit += many;
        }
    }
};
