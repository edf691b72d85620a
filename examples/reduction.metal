// sums[row] = sum of x[row, 0 .. columns-1], one threadgroup a row.
// Threads add up a strided share each, then halve the number of partial sums in threadgroup memory.
#include <metal_stdlib>
using namespace metal;

constant constexpr uint kThreads = 256; // a power of two, and the launch's threads per threadgroup

kernel void sum_rows(device const float* x [[buffer(0)]], device float* sums [[buffer(1)]],
                     constant uint& columns [[buffer(2)]], uint row [[threadgroup_position_in_grid]],
                     uint tid [[thread_index_in_threadgroup]]) {
    threadgroup float partial[kThreads];

    float sum = 0.0f;
    for (uint column = tid; column < columns; column += kThreads) sum += x[ulong(row) * columns + column];
    partial[tid] = sum;

    for (uint half_width = kThreads / 2; half_width > 0; half_width /= 2) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (tid < half_width) partial[tid] += partial[tid + half_width];
    }
    if (tid == 0) sums[row] = partial[0];
}
