#pragma once
// Rows of W that come from kMatrices matrices of one shape: 1, or 2, of which `apart` rows alternate. A pipeline works on
// local rows of a threadgroup, asks its arguments for row n of a matrix (codes_of, row_of), and makes one output of the
// sums of rows that are `apart` apart (W::join).
#include <metal_stdlib>
using namespace metal;

template <uint kMatrices> struct MatrixRows {
    static uint matrix(uint, uint) { return 0; }
    static uint row(uint local, uint) { return local; }
    template <typename Math, typename Sums, typename Sink>
    static void outputs(thread const Sums& sums, threadgroup float* scratch, uint lane, Sink sink) {
        Math::each(sums, scratch, lane, sink);
    }
};
template <> struct MatrixRows<2> {
    static uint matrix(uint local, uint apart) { return local / apart % 2; }
    static uint row(uint local, uint apart) { return local / (2 * apart) * apart + local % apart; }
    template <typename Math, typename Sums, typename Sink>
    static void outputs(thread const Sums& sums, threadgroup float* scratch, uint lane, Sink sink) {
        Math::each_joined(sums, scratch, lane, sink);
    }
};
