// C[M,N] = A[M,K] B[K,N] in float, all row-major, M, N and K multiples of 8.
// One simdgroup an 8x8 tile of C: the matrices lie spread over the simdgroup's lanes, eight columns of A and
// eight rows of B at a time.
#include <metal_stdlib>
using namespace metal;

kernel void matmul(device const float* A [[buffer(0)]], device const float* B [[buffer(1)]],
                   device float* C [[buffer(2)]], constant uint& N [[buffer(3)]],
                   constant uint& K [[buffer(4)]], uint2 tile [[threadgroup_position_in_grid]]) {
    const ulong row = tile.y * 8, column = tile.x * 8;

    simdgroup_matrix<float, 8, 8> a, b;
    simdgroup_matrix<float, 8, 8> sum = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    for (uint k = 0; k < K; k += 8) {
        simdgroup_load(a, A + row * K + k, K);
        simdgroup_load(b, B + ulong(k) * N + column, N);
        simdgroup_multiply_accumulate(sum, a, b, sum);
    }
    simdgroup_store(sum, C + row * N + column, N);
}
