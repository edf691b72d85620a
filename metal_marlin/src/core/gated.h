#pragma once
// Two matrices in one product: y[m, n] = act(sum over k of x[m, k] * gate[n, k]) * (sum over k of x[m, k] * up[n, k]).
// GateUp<Q, Act> is a weights policy for the pipelines of gemm.h and gemv.h: tiles hold as many rows of the one as of the
// other, alternating (core/matrices.h), so that x is read once for both and neither product is ever in memory.
//
//   codes, scales        the gate's, as in gemm.h; N: rows of each matrix and outputs
//   up_codes, up_scales  of the same shapes
// Sums are float, so is what becomes of them; y is rounded once. Formats without a factor of the whole tensor.
//
// GatedInput<T, Act> is an input (core/input.h) of the product that follows: x holds the gate's product, `up` the other one
// [M, K], and act(x) * up is what is multiplied, rounded to T where pipelines multiply in T. It is worked out again for
// every tile of rows of W.
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

template <typename T, typename Act> struct GatedInput {
    enum : bool { kPlain = false };
    device const T* up;
    uint M, K;
    bool aligned; // K fills 16 bytes, up starts at a multiple of them

    struct Row {
        device const T* up;
        float at(float gate, uint k) const { return Act::of(gate) * float(up[k]); }
    };
    Row row(uint token) const { return Row{up + ulong(token) * K}; }

    static float number(uint bits) { return float(as_type<T>(ushort(bits & 0xffffu))); }
    static uint two(uint gate, float first, float second) {
        const T low = T(Act::of(number(gate)) * first), high = T(Act::of(number(gate >> 16)) * second);
        return uint(as_type<ushort>(low)) | uint(as_type<ushort>(high)) << 16;
    }
    // Of tokens and k behind the end, what is no sum's.
    uint4 eight(uint4 gate, uint token, uint k) const {
        if (token >= M || k >= K) return uint4(0);
        device const T* from = up + ulong(token) * K + k;
        if (aligned) {
            const uint4 more = *(device const uint4*)from;
#pragma unroll
            for (uint i = 0; i < 4; ++i) gate[i] = two(gate[i], number(more[i]), number(more[i] >> 16));
        } else {
#pragma unroll
            for (uint i = 0; i < 4; ++i) gate[i] = two(gate[i], float(from[2 * i]), float(from[2 * i + 1]));
        }
        return gate;
    }
};
