// metal-marlin: lanes=any
// Norms of rows x [rows, width]; a threadgroup takes a row, its threads turns along it. Sums are float.
//
//   rms_norm           y = (x / sqrt(mean(x^2) + eps)) * (weight + offset)
//   rms_norm_residual  h = x + residual, rounded and stored in `sum`; y = rms_norm of the rounded h
//   layer_norm         y = (x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias
//
// Roundings of rms_norm: core/norm.h. Layer norm takes the mean first and the squares of what is left after it, so that a
// large mean costs no digits. Source: RMSNorm, arXiv 1910.07467; layer norm, arXiv 1607.06450.
// Rows: <name>[__t<dtype>]; weight and bias are T. Grid: x = rows; ops/norm.py holds the number of threads.
#include <metal_stdlib>
#include "core/instantiate.h"
#include "core/norm.h"
#include "core/reduce.h"
using namespace metal;

struct NormShape {
    long width;
    long bias; // layer_norm: 0 where there is none
};
template <typename T>
static inline void scale_row(device const T* x, device const T* weight, device T* y, uint width, float factor,
                             float offset, ReducePlace at) {
    if (offset == 0) {
        for (uint i = at.first(); i < width; i += at.stride()) {
            y[i] = rms_scaled<T>(float(x[i]), factor, float(weight[i]), 0.0f);
        }
    } else {
        for (uint i = at.first(); i < width; i += at.stride()) {
            y[i] = rms_scaled<T>(float(x[i]), factor, float(weight[i]), offset);
        }
    }
}

template <typename T>
[[kernel]] void
rms_norm(device const T* x [[buffer(0)]], device const T* weight [[buffer(1)]], device T* y [[buffer(2)]],
         constant NormShape& shape [[buffer(3)]], constant NormNumbers& numbers [[buffer(4)]],
         uint row [[threadgroup_position_in_grid]], uint sgid [[simdgroup_index_in_threadgroup]],
         uint lane [[thread_index_in_simdgroup]], uint sgs [[simdgroups_per_threadgroup]]) {
    threadgroup ReduceShared sh;
    const ReducePlace at = {sgid, lane, sgs};
    const uint width = uint(shape.width);
    x += ulong(row) * width;
    float squares = 0;
    for (uint i = at.first(); i < width; i += at.stride()) squares += float(x[i]) * float(x[i]);
    const float factor = precise::rsqrt(threadgroup_sum(squares, at, sh) / float(width) + numbers.eps);
    scale_row(x, weight, y + ulong(row) * width, width, factor, numbers.offset, at);
}

template <typename T>
[[kernel]] void
rms_norm_residual(device const T* x [[buffer(0)]], device const T* residual [[buffer(1)]],
                  device const T* weight [[buffer(2)]], device T* y [[buffer(3)]],
                  device T* sum [[buffer(4)]], constant NormShape& shape [[buffer(5)]],
                  constant NormNumbers& numbers [[buffer(6)]], uint row [[threadgroup_position_in_grid]],
                  uint sgid [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
                  uint sgs [[simdgroups_per_threadgroup]]) {
    threadgroup ReduceShared sh;
    const ReducePlace at = {sgid, lane, sgs};
    const uint width = uint(shape.width);
    const ulong start = ulong(row) * width;
    float squares = 0;
    for (uint i = at.first(); i < width; i += at.stride()) {
        const T h = T(float(x[start + i]) + float(residual[start + i]));
        sum[start + i] = h;
        squares += float(h) * float(h);
    }
    const float factor = precise::rsqrt(threadgroup_sum(squares, at, sh) / float(width) + numbers.eps);
    scale_row((device const T*)sum + start, weight, y + start, width, factor, numbers.offset, at);
}

template <typename T>
[[kernel]] void
layer_norm(device const T* x [[buffer(0)]], device const T* weight [[buffer(1)]],
           device const T* bias [[buffer(2)]], device T* y [[buffer(3)]],
           constant NormShape& shape [[buffer(4)]], constant NormNumbers& numbers [[buffer(5)]],
           uint row [[threadgroup_position_in_grid]], uint sgid [[simdgroup_index_in_threadgroup]],
           uint lane [[thread_index_in_simdgroup]], uint sgs [[simdgroups_per_threadgroup]]) {
    threadgroup ReduceShared sh;
    const ReducePlace at = {sgid, lane, sgs};
    const uint width = uint(shape.width);
    x += ulong(row) * width;
    y += ulong(row) * width;
    float sum = 0;
    for (uint i = at.first(); i < width; i += at.stride()) sum += float(x[i]);
    const float mean = threadgroup_sum(sum, at, sh) / float(width);
    float squares = 0, rest = 0; // of the mean, whose own rounding a large one would show
    for (uint i = at.first(); i < width; i += at.stride()) {
        const float d = float(x[i]) - mean;
        squares += d * d;
        rest += d;
    }
    rest = threadgroup_sum(rest, at, sh) / float(width);
    const float variance = max(threadgroup_sum(squares, at, sh) / float(width) - rest * rest, 0.0f);
    const float factor = precise::rsqrt(variance + numbers.eps);
    const bool biased = shape.bias != 0;
    for (uint i = at.first(); i < width; i += at.stride()) {
        const float v = (float(x[i]) - mean - rest) * factor * float(weight[i]);
        y[i] = T(biased ? v + float(bias[i]) : v);
    }
}

#define ROWS(name)                                                                                           \
    INSTANTIATE(#name, name<half>)                                                                           \
    INSTANTIATE(#name "__tbf16", name<bfloat>)                                                               \
    INSTANTIATE(#name "__tf32", name<float>)

ROWS(rms_norm)
ROWS(rms_norm_residual)
ROWS(layer_norm)
