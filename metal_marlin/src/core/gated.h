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
#include "policies/activations.h"
using namespace metal;

template <typename Q, typename Act> struct GateUp : Q {
    static_assert(!Q::Extra::kFactor && !Q::kAffine, "GateUp: scales alone");
    enum : uint { kMatrices = 2 };
    static float join(float gate, float up) { return Act::of(gate) * up; }
};

template <typename Q, typename Act, typename T>
struct GemmArguments<GateUp<Q, Act>, T> : GemmArguments<Q, T> {
    device const uint* up_codes;
    device const typename Q::S* up_scales;

    GemmArguments(GemmArguments<Q, T> gate, device const uint* up_codes,
                  device const typename Q::S* up_scales)
        : GemmArguments<Q, T>(gate), up_codes(up_codes), up_scales(up_scales) {}

    device const uint* codes_of(uint matrix, uint n) const {
        return (matrix ? up_codes : this->codes) +
               min(n, this->N - 1) * ulong(CodeWords<typename Q::Format>::stored(this->K));
    }
    typename Q::Row row_of(uint matrix, uint n) const {
        return Q::row(matrix ? up_scales : this->scales, (device const typename Q::E*)this->extra,
                      min(n, this->N - 1), this->groups);
    }
};
