#pragma once
// Two matrices in one product: y[m, n] = act(sum over k of x[m, k] * gate[n, k]) * (sum over k of x[m, k] * up[n, k]).
// GateUp<Q, Act> is a weights policy for the pipelines of gemm.h and gemv.h: tiles hold as many rows of the one as of the
// other, alternating (core/matrices.h), so that x is read once for both and neither product is ever in memory.
//
//   codes, scales        the gate's, as in gemm.h; N: rows of each matrix and outputs
//   up_codes, up_scales  of the same shapes
// Sums are float, so is what becomes of them; y is rounded once. Formats without a factor of the whole tensor.
// Sources: own.
#include <metal_stdlib>
#include "core/gemm.h"
#include "core/gemv.h"
#include "policies/activations.h"
using namespace metal;

template <typename Q, typename Act> struct GateUp : Q {
    static_assert(!Q::Extra::kFactor && !Q::kAffine, "GateUp: scales alone");
    enum : uint { kMatrices = 2 };
    static float join(float gate, float up) { return Act::of(gate) * up; }
};

// The other matrix, and where row n of either is.
template <typename Q> struct UpMatrix {
    device const uint* codes;
    device const typename Q::S* scales;

    static ulong offset(uint n, uint N, uint K) {
        return min(n, N - 1) * ulong(CodeWords<typename Q::Format>::stored(K));
    }
    static typename Q::Row row(device const typename Q::S* scales, uint n, uint N, uint groups) {
        return Q::row(scales, (device const typename Q::E*)scales, min(n, N - 1), groups);
    }
};

template <typename Q, typename Act, typename T>
struct GemmArguments<GateUp<Q, Act>, T> : GemmArguments<Q, T> {
    UpMatrix<Q> up;
    GemmArguments(GemmArguments<Q, T> gate, UpMatrix<Q> up) : GemmArguments<Q, T>(gate), up(up) {}
    device const uint* codes_of(uint matrix, uint n) const {
        return (matrix ? up.codes : this->codes) + up.offset(n, this->N, this->K);
    }
    typename Q::Row row_of(uint matrix, uint n) const {
        return up.row(matrix ? up.scales : this->scales, n, this->N, this->groups);
    }
};
template <typename Q, typename Act, typename T>
struct GemvArguments<GateUp<Q, Act>, T> : GemvArguments<Q, T> {
    UpMatrix<Q> up;
    GemvArguments(GemvArguments<Q, T> gate, UpMatrix<Q> up) : GemvArguments<Q, T>(gate), up(up) {}
    device const uint* codes_of(uint matrix, uint n) const {
        return (matrix ? up.codes : this->codes) + up.offset(n, this->N, this->K);
    }
    typename Q::Row row_of(uint matrix, uint n) const {
        return up.row(matrix ? up.scales : this->scales, n, this->N, this->groups);
    }
};
