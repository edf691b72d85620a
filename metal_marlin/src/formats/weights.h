#pragma once
// The weights of rows: every format with each kind of scales and zeros that it has. S: dtype of the scales and zeros.
#include "formats/fp4.h"
#include "formats/fp8.h"
#include "formats/int2.h"
#include "formats/int3.h"
#include "formats/int4.h"
#include "formats/int8.h"
#include "formats/nf3.h"
#include "formats/quantized.h"

template <typename S> using Fp4 = Quantized<FP4, FloatScale<S>>;
template <typename S> using Int4 = Quantized<INT4, FloatScale<S>>;
template <typename S> using Int4Point = Quantized<UINT4, FloatScale<S>, ZeroPoint<S>>;
template <typename S> using Int4Packed = Quantized<UINT4, FloatScale<S>, PackedZero<4>>;
template <typename S> using Int4Bias = Quantized<UINT4, FloatScale<S>, Bias<S>>;
template <typename S> using Int8 = Quantized<INT8, FloatScale<S>>;
template <typename S> using Uint8Point = Quantized<UINT8, FloatScale<S>, ZeroPoint<S>>;
template <typename S> using Uint8Packed = Quantized<UINT8, FloatScale<S>, PackedZero<8>>;
template <typename S> using Uint8Bias = Quantized<UINT8, FloatScale<S>, Bias<S>>;
template <typename S> using Int2 = Quantized<INT2, FloatScale<S>>;
template <typename S> using Int3 = Quantized<INT3, FloatScale<S>>;
template <typename S> using Nf3 = Quantized<NF3, FloatScale<S>>;
template <typename S> using Fp8E4M3 = Quantized<FP8E4M3, FloatScale<S>>;
template <typename S> using Fp8E5M2 = Quantized<FP8E5M2, FloatScale<S>>;
typedef Quantized<FP4, E8M0> Mxfp4;
typedef Quantized<FP4, E4M3, TensorScale> Nvfp4;
