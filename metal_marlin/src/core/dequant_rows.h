#pragma once
// The dequantise kernels' entry points and the macros of their rows, for the three files of the family.
#include "core/dequant.h"
#include "core/instantiate.h"

template <typename Core, typename Q, typename T>
[[kernel]] void
dequant(device const uint* codes [[buffer(0)]], device const typename Q::S* scales [[buffer(1)]],
        device const typename Q::Bound* extra [[buffer(2)]], device T* y [[buffer(3)]],
        constant DequantShape& shape [[buffer(4)]], uint3 tgid [[threadgroup_position_in_grid]],
        uint3 tid [[thread_position_in_grid]], uint sgid [[simdgroup_index_in_threadgroup]],
        uint lane [[thread_index_in_simdgroup]], uint sgs [[simdgroups_per_threadgroup]]) {
    Core::run(
        DequantArguments<Q, T>(codes, scales, extra, y, shape),
        DequantPlace{tgid, tid.x, (tgid.y * sgs + sgid) * kSimdWidth + lane, tgid.x * sgs + sgid, lane});
}

// The number behind every code: a thread a code, taken from every place of a word; NaN where places differ.
template <typename Format>
[[kernel]] void all_codes(device float* values [[buffer(0)]], uint code [[thread_position_in_grid]]) {
    if (code >= 1u << Format::kBits) return;
    const float v = Format::value(code);
    bool same = true;
    for (uint i = 0; i < Format::kPerWord / 2; ++i) {
        const float2 low = Format::pair(code << (i * Format::kBits), i);
        const float2 high = Format::pair(code << ((i + Format::kPerWord / 2) * Format::kBits), i);
        same = same && as_type<uint>(low.x) == as_type<uint>(v) && as_type<uint>(high.y) == as_type<uint>(v);
    }
    values[code] = same ? v : NAN;
}

template <typename Q, typename T> using DequantPlain = DequantEach<Q, T, 1, false>;
template <typename Q, typename T> using DequantAligned = DequantEach<Q, T, DequantUnit<Q, T>::kWords, true>;
template <typename Q, typename T> using DequantPlainRows = DequantRows<Q, T, 1, false>;
template <typename Q, typename T>
using DequantAlignedRows = DequantRows<Q, T, DequantUnit<Q, T>::kWords, true>;
template <typename Q, typename T> using DequantRunTwo = DequantRun<Q, T, 2>;
template <typename Q, typename T> using DequantRunEight = DequantRun<Q, T, 8>;
template <typename Q, typename T> using DequantRunSixteen = DequantRun<Q, T, 16>;

#define ROW(name, Core, Q, T) INSTANTIATE(name, dequant<Core<Q, T>, Q, T>)

// every dtype of y
#define ROWS_T(name, Core, Q)                                                                                \
    ROW(name, Core, Q, half)                                                                                 \
    ROW(name "__tbf16", Core, Q, bfloat)                                                                     \
    ROW(name "__tf32", Core, Q, float)

// every pair of dtypes; first, z: what names without and with other keys say of zeros
#define ROWS(name, first, z, Core, Q)                                                                        \
    ROW(name first, Core, Q<half>, half)                                                                     \
    ROW(name "__sbf16" z, Core, Q<bfloat>, half)                                                             \
    ROW(name "__sf32" z, Core, Q<float>, half)                                                               \
    ROW(name "__tbf16" z, Core, Q<bfloat>, bfloat)                                                           \
    ROW(name "__tbf16_shalf" z, Core, Q<half>, bfloat)                                                       \
    ROW(name "__tbf16_sf32" z, Core, Q<float>, bfloat)                                                       \
    ROW(name "__tf32" z, Core, Q<float>, float)                                                              \
    ROW(name "__tf32_shalf" z, Core, Q<half>, float)                                                         \
    ROW(name "__tf32_sbf16" z, Core, Q<bfloat>, float)
