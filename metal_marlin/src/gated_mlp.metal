// metal-marlin: lanes=any
// Gated feed-forward layers with FP4 weights: y = (act(x * gate^T) * (x * up^T)) * down^T [+ residual], in parts.
//
//   gated_up_fp4                  act(x * gate^T) * (x * up^T), act = SiLU: both products in one launch; core/gated.h over
//                                 the tile pipeline of marlin_gemm_fp4
//   gated_up_geglu_fp4            act = GELU: by erf; __egelutanh by tanh
//   gated_mlp_fp4_decode          the same for decoding, a token a threadgroup: core/gated.h over the pipeline of
//                                 decode_gemv_fp4; a product with down follows (decode_gemv_fp4)
//   gated_mlp_fp4_decode_batched  up to 8 tokens for one reading of both weights
//   gated_mlp_fp4                 (act(gate) * up) * down^T of both products in memory: what is multiplied is formed where
//                                 it is read; GatedInput of core/gated.h over core/gemm_fused.h
//   gated_mlp_residual_fp4        the same, residual added before y is rounded
// Rows: <kernel>[__[t<dtype>][_e<activation>]], SiLU by default where it is not said; scales are as the activations. Grid: x covers outputs, y covers M.
// ops/gated_up.py and ops/gated_mlp.py hold the numbers.
#include <metal_stdlib>
#include "core/gated_kernel.h"
#include "core/instantiate.h"
#include "formats/weights.h"
using namespace metal;

#define GATED_UP(half_name, bfloat_name, Act)                                                                \
    INSTANTIATE(half_name, gated_up<Fp4<half>, Act, half, DoubleStage>)                                      \
    INSTANTIATE(bfloat_name, gated_up<Fp4<bfloat>, Act, bfloat, DoubleStage>)
GATED_UP("gated_up_fp4", "gated_up_fp4__tbf16", Silu)
GATED_UP("gated_up_geglu_fp4", "gated_up_geglu_fp4__tbf16", Gelu)
GATED_UP("gated_up_geglu_fp4__egelutanh", "gated_up_geglu_fp4__tbf16_egelutanh", GeluTanh)

#define DECODE(half_key, bfloat_key, Act)                                                                    \
    INSTANTIATE("gated_mlp_fp4_decode" half_key, gated_up_gemv<Fp4<half>, Act, half, 1>)                     \
    INSTANTIATE("gated_mlp_fp4_decode" bfloat_key, gated_up_gemv<Fp4<bfloat>, Act, bfloat, 1>)               \
    INSTANTIATE("gated_mlp_fp4_decode_batched" half_key, gated_up_gemv<Fp4<half>, Act, half, 8>)             \
    INSTANTIATE("gated_mlp_fp4_decode_batched" bfloat_key, gated_up_gemv<Fp4<bfloat>, Act, bfloat, 8>)
DECODE("", "__tbf16", Silu)
DECODE("__egelu", "__tbf16_egelu", Gelu)
DECODE("__egelutanh", "__tbf16_egelutanh", GeluTanh)

#define DOWN(half_key, bfloat_key, Act)                                                                      \
    INSTANTIATE("gated_mlp_fp4" half_key, gated_down<Fp4<half>, Act, half, kAlone>)                          \
    INSTANTIATE("gated_mlp_fp4" bfloat_key, gated_down<Fp4<bfloat>, Act, bfloat, kAlone>)                    \
    INSTANTIATE("gated_mlp_residual_fp4" half_key, gated_down<Fp4<half>, Act, half, kResidual>)              \
    INSTANTIATE("gated_mlp_residual_fp4" bfloat_key, gated_down<Fp4<bfloat>, Act, bfloat, kResidual>)
DOWN("", "__tbf16", Silu)
DOWN("__egelu", "__tbf16_egelu", Gelu)
DOWN("__egelutanh", "__tbf16_egelutanh", GeluTanh)
