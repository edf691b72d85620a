#pragma once
// The tile pipeline with its work shared out: simdgroups of one half read and decode the next step while those of the other
// multiply this one. Twice the threads of gemm_tile.h for the same tile.

template <typename W, typename T, typename Epilogue>
struct DivergentGemm : TileGemm<W, T, DoubleStage, Epilogue> {
    typedef TileGemm<W, T, DoubleStage, Epilogue> Tile;
    typedef typename Tile::Math Math;
    typedef typename Tile::Size Size;

    static void run(GemmArguments<W, T> a, GemmPlace at, threadgroup typename Tile::Shared& sh,
                    Epilogue epilogue) {
        const bool multiplies = at.sgid < Tile::kSimdgroups;
        const uint sg = at.sgid % Tile::kSimdgroups, tid = sg * kSimdWidth + at.lane;
        const uint row = sg / Size::kWM * Tile::kRows, token = sg % Size::kWM * Tile::kTokens;
        typename Tile::Sums sums;
        Math::clear(sums);
        typename Tile::Fetched f;
        if (!multiplies) {
            Tile::fetch(a, at, tid, 0, f);
            Tile::put(f, tid, sh.w[0], sh.x[0]);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        uint stage = 0;
        for (uint k = 0; k < a.K; k += Tile::kBK) {
            if (multiplies) {
                Tile::multiply(sh.w[stage] + row * Tile::kStride, sh.x[stage] + token * Tile::kStride,
                               at.lane, sums);
            } else if (k + Tile::kBK < a.K) {
                Tile::fetch(a, at, tid, k + Tile::kBK, f);
                Tile::put(f, tid, sh.w[1 - stage], sh.x[1 - stage]);
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
            stage ^= 1;
        }
        if (!multiplies) return;
        const typename Tile::Sink sink = {
            a.y,     a.N, a.M, at.tgid.x * Tile::kOutputs + row / W::kMatrices, at.tgid.y * Tile::kBM + token,
            epilogue};
        Tile::Place::template outputs<Math>(sums, sh.scratch[sg], at.lane, sink);
    }
};
