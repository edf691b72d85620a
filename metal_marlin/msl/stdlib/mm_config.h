#pragma once
// What every header of this library and every translation unit relies on: the dialect's pragmas,
// address spaces, function attributes, and the arithmetic helpers a CPU back end may call by name.

#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#pragma OPENCL EXTENSION cl_khr_fp64 : enable

#if !defined(__METAL_MARLIN_CPU__) && !defined(__METAL_MARLIN_CUDA__)
#ifdef __NVPTX__
#define __METAL_MARLIN_CUDA__ 1
#else
#define __METAL_MARLIN_CPU__ 1
#endif
#endif
#ifndef METAL_MARLIN_LANES
#define METAL_MARLIN_LANES 32
#endif
#ifndef __METAL_VERSION__
#define __METAL_VERSION__ 320
#endif
#ifndef __METAL__
#define __METAL__ 1
#endif
#define __HAVE_BFLOAT__ 1

#define device __global
#define threadgroup __local
#define thread __private

// Library functions are inlined everywhere: the object holds one entry, and an address space that the
// caller knows is lost in an out-of-line __generic parameter.
#ifdef METAL_MARLIN_CHECKED
// What is inlined counts as the line that called it; what is not is nobody's to check.
#define MM_FN static inline __attribute__((always_inline, nodebug))
#define MM_METHOD inline __attribute__((always_inline, nodebug))
#define MM_UNCHECKED __attribute__((nodebug, no_sanitize("kernel-address", "array-bounds", "alignment")))
#else
#define MM_FN static inline __attribute__((always_inline))
#define MM_METHOD inline __attribute__((always_inline))
#define MM_UNCHECKED
#endif

#define METAL_FUNC inline __attribute__((always_inline))
#define METAL_CONST __attribute__((const))
#define METAL_VALID(...)
#define METAL_INTERNAL
#define METAL_THREAD thread
#define METAL_DEVICE device
#define METAL_THREADGROUP threadgroup

typedef __bf16 bfloat;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;

typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;
typedef __SIZE_TYPE__ size_t;
typedef __PTRDIFF_TYPE__ ptrdiff_t;
typedef __INTPTR_TYPE__ intptr_t;
typedef __UINTPTR_TYPE__ uintptr_t;
typedef decltype(nullptr) nullptr_t;

#ifndef NULL
#define NULL nullptr
#endif

#ifdef __METAL_MARLIN_CPU__
// Narrowing conversions for which x86 without AVX512-BF16/FP16 calls the compiler's run-time library. Round
// to nearest, ties to even; a NaN stays a (quiet) NaN. "used": the calls appear after the optimiser has run.
#define MM_LIBCALL extern "C" __attribute__((visibility("hidden"), used, weak))
MM_LIBCALL bfloat __truncsfbf2(float x) {
    const uint u = __builtin_bit_cast(uint, x);
    const uint rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const uint nan = (u >> 16) | 0x40u;
    return __builtin_bit_cast(bfloat, (ushort)((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded));
}
// Rounding to odd keeps what the second, narrower rounding needs to know about the bits dropped here.
MM_FN float _mm_round_to_odd(double x) {
    const float f = (float)x;
    const double back = (double)f;
    const ulong magnitude = ~(1ul << 63);
    const ulong b = __builtin_bit_cast(ulong, back) & magnitude, a = __builtin_bit_cast(ulong, x) & magnitude;
    uint u = __builtin_bit_cast(uint, f);
    if (back == x || x != x || (u & 1u)) return f;
    return __builtin_bit_cast(float, b < a ? u + 1u : u - 1u);
}
MM_LIBCALL bfloat __truncdfbf2(double x) { return __truncsfbf2(_mm_round_to_odd(x)); }
MM_LIBCALL half __truncdfhf2(double x) { return (half)_mm_round_to_odd(x); }
#undef MM_LIBCALL
#endif
