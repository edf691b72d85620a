#pragma once
// Sparse weights (formats/sparse.h) in the pipelines of gemm.h: what is read, and how it becomes whole rows.
//   places  of kept weights, beside codes
// Sources: own.
#include "core/gemm.h"
#include "formats/sparse.h"

template <typename Q, uint kKept, uint kOf, typename T>
struct GemmArguments<Sparse<Q, kKept, kOf>, T> : GemmArguments<Q, T> {
    typedef SparseRun<Sparse<Q, kKept, kOf>> Run;
    device const uint* places;
    GemmArguments(GemmArguments<Q, T> all, device const uint* places)
        : GemmArguments<Q, T>(all), places(places) {}
    device const uint* codes_of(uint, uint n) const {
        return this->codes + min(n, this->N - 1) * ulong(Run::code_words(this->K));
    }
    device const uint* places_of(uint n) const {
        return places + min(n, this->N - 1) * ulong(Run::place_words(this->K));
    }
};

template <typename Q, uint kKept, uint kOf, uint kWeights> struct TileRun<Sparse<Q, kKept, kOf>, kWeights> {
    typedef SparseRun<Sparse<Q, kKept, kOf>> Run;
    enum : uint { kEach = kWeights < Run::kLength ? kWeights : uint(Run::kLength), kRuns = kWeights / kEach };
    static_assert(kEach % kOf == 0 && kWeights % kEach == 0, "TileRun: runs of sparse weights");
    Run runs[kRuns];
    typename Q::Group groups[kRuns];
    uint first; // weight of a run

    template <typename Arguments> void fetch(thread const Arguments& a, uint matrix, uint n, uint k) {
        device const uint* codes = a.codes_of(matrix, n);
        device const uint* places = a.places_of(n);
        const typename Q::Row of = a.row_of(matrix, n);
        first = kEach < Run::kLength ? k % Run::kLength : 0;
#pragma unroll
        for (uint i = 0; i < kRuns; ++i) {
            const uint from = k - first + i * kEach;
            runs[i] = Run::load(codes, places, min(from, a.K - Run::kLength)); // x is 0 behind the end
            groups[i] = of.group(a.group(from));
        }
    }

    template <typename T> void put(threadgroup T* to) const {
#pragma unroll
        for (uint i = 0; i < kRuns; ++i) {
#pragma unroll
            for (uint j = 0; j < kEach; j += 4) {
                const float2 low = runs[i].two(first + j, groups[i]),
                             high = runs[i].two(first + j + 2, groups[i]);
                *(threadgroup vec<T, 4>*)(to + i * kEach + j) =
                    vec<T, 4>(T(low.x), T(low.y), T(high.x), T(high.y));
            }
        }
    }
};

template <typename Q, uint kKept, uint kOf> struct FusedRow<Sparse<Q, kKept, kOf>> {
    typedef SparseRun<Sparse<Q, kKept, kOf>> Run;
    enum : bool { kNeighbours = true };
    Run runs[2];

    template <typename Arguments> void fetch(thread const Arguments& a, uint matrix, uint n, uint k) {
#pragma unroll
        for (uint i = 0; i < 2; ++i)
            runs[i] = Run::load(a.codes_of(matrix, n), a.places_of(n),
                                min(k + i * Run::kLength, a.K - Run::kLength));
    }
    float2 pair(uint eight, uint i, typename Q::Group group) const {
        return runs[eight / 2].two(eight % 2 * 8 + 2 * i, group);
    }
};

#include "core/cpu/gemm_sparse.h"
