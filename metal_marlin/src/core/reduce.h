#pragma once
// Sums over a threadgroup, the same bits every time: lanes by simd_sum, simdgroups in their order.
#include <metal_stdlib>
#include "core/constants.h"
using namespace metal;

// Where a thread stands: sgs simdgroups of a threadgroup.
struct ReducePlace {
    uint sgid, lane, sgs;
    uint first() const { return sgid * kSimdWidth + lane; }
    // threads of a threadgroup; with one lane a constant, so that loops over a row become vector code
    uint stride() const { return kSimdWidth == 1 ? 1 : sgs * kSimdWidth; }
};

struct ReduceShared {
    float parts[32];
};

// The sum of every thread's value, for all of them. `sh` may be used again at once.
static inline float threadgroup_sum(float value, ReducePlace at, threadgroup ReduceShared& sh) {
    if (kSimdWidth == 1) return value;
    simdgroup_barrier(mem_flags::mem_none); // lanes come from loops of different lengths
    const float part = simd_sum(value);
    if (at.sgs == 1) return part;
    if (at.lane == 0) sh.parts[at.sgid] = part;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float sum = 0;
    for (uint i = 0; i < at.sgs; ++i) sum += sh.parts[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return sum;
}
