#pragma once
// The names that headers shared between host and Metal code use for the vector and matrix types.
#include "../metal_matrix"

#define MM_SIMD_NAMES(T, name) \
  typedef T##2 simd_##name##2; typedef T##2 vector_##name##2; \
  typedef T##3 simd_##name##3; typedef T##3 vector_##name##3; \
  typedef T##4 simd_##name##4; typedef T##4 vector_##name##4; \
  namespace simd { typedef T##2 name##2; typedef T##3 name##3; typedef T##4 name##4; \
                   typedef packed_##T##2 packed_##name##2; typedef packed_##T##4 packed_##name##4; }
MM_SIMD_NAMES(char, char) MM_SIMD_NAMES(uchar, uchar)
MM_SIMD_NAMES(short, short) MM_SIMD_NAMES(ushort, ushort)
MM_SIMD_NAMES(int, int) MM_SIMD_NAMES(uint, uint) MM_SIMD_NAMES(long, long) MM_SIMD_NAMES(ulong, ulong)
MM_SIMD_NAMES(half, half) MM_SIMD_NAMES(float, float)
#undef MM_SIMD_NAMES

#define MM_SIMD_MATRIX(T, shape) \
  typedef T##shape simd_##T##shape; \
  typedef T##shape matrix_##T##shape; \
  namespace simd { using ::T##shape; }
MM_SIMD_MATRIX(float, 2x2) MM_SIMD_MATRIX(float, 2x3) MM_SIMD_MATRIX(float, 2x4) MM_SIMD_MATRIX(float, 3x2)
MM_SIMD_MATRIX(float, 3x3) MM_SIMD_MATRIX(float, 3x4) MM_SIMD_MATRIX(float, 4x2) MM_SIMD_MATRIX(float, 4x3)
MM_SIMD_MATRIX(float, 4x4)
MM_SIMD_MATRIX(half, 2x2) MM_SIMD_MATRIX(half, 3x3) MM_SIMD_MATRIX(half, 4x4)
#undef MM_SIMD_MATRIX
