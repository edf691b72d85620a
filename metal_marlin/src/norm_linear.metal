// metal-marlin: lanes=any
// RMSNorm and the products that follow it, one launch: y = norm(x) W^T, W in four bits, y = residual + norm(x) W^T, or
// q, k and v of three W. x is normalised and rounded where it is read, as core/norm.h says, so what is multiplied is what
// rms_norm stores; a threadgroup makes the factors of its tokens first. Sums are float until y is rounded.
//
//   norm_linear[_residual]_<format>, norm_qkv_fp4  the pipeline of core/gemm_fused.h
//   the same with _decode                          core/gemv.h, up to 8 tokens; __m1: one
// Rows: <kernel>[__t<dtype>_z<zeros>_m1]; scales, weight and residual are as the activations. Grid: x covers N (of q, then
// of k, then of v), y covers M. ops/norm_linear.py holds the numbers.
#include <metal_stdlib>
#include "core/epilogue.h"
#include "core/gemm.h"
#include "core/gemv.h"
#include "core/instantiate.h"
#include "core/norm.h"
#include "formats/weights.h"
using namespace metal;

template <typename Core, uint kSimdgroups, uint kTokens> struct NormedShared {
    typename Core::Shared core;
    NormShared<kSimdgroups, kTokens> norm;
};
template <typename T, Join kJoin> using Finish = FixedEpilogue<T, Identity, false, kJoin>;

// Many and Few<kTokens>: the cores, their shapes, and tokens of a threadgroup.
template <typename W, typename T, Join kJoin> struct Many {
    typedef Gemm<W, T, Fused<64, 64>, Finish<T, kJoin>> Core;
    typedef GemmArguments<W, T> Arguments;
    typedef GemmShape Shape;
    typedef NormedShared<Core, Core::kSimdgroups, Core::kMostTokens> Shared;
    static uint tokens(constant Shape& shape) { return uint(shape.tokens); }
    static GemmPlace place(uint3 tgid, ReducePlace at) { return GemmPlace{tgid, at.sgid, at.lane}; }
};
template <typename W, typename T, Join kJoin, uint kTokens> struct Few {
    typedef Gemv<W, T, kTokens, Finish<T, kJoin>> Core;
    typedef GemvArguments<W, T> Arguments;
    typedef GemvShape Shape;
    typedef NormedShared<Core, 16, kTokens> Shared;
    static uint tokens(constant Shape&) { return kTokens; }
    static GemvPlace place(uint3 tgid, ReducePlace at) { return GemvPlace{tgid, at.sgid, at.lane, at.sgs}; }
};

template <typename Way, typename T>
static inline NormedInput<T> normed(device const T* x, device const T* weight,
                                    constant typename Way::Shape& shape, constant NormNumbers& numbers,
                                    uint block, ReducePlace at, threadgroup typename Way::Shared& sh) {
    const uint most = Way::tokens(shape), first = block * most;
    return NormedInput<T>::of(x, weight, first, min(most, uint(shape.M) - first), uint(shape.K),
                              shape.aligned != 0, numbers, at, sh.norm);
}

// The bound lets assemblers give a thread as many registers as so many threads leave it.
#define ENTRY(entry, ...)                                                                                    \
    template <typename Way, typename W, typename T, Join kJoin>                                              \
    __VA_ARGS__ void entry(                                                                                  \
        device const T* x [[buffer(0)]], device const uint* codes [[buffer(1)]],                             \
        device const T* scales [[buffer(2)]], device const typename W::Bound* extra [[buffer(3)]],           \
        device T* y [[buffer(4)]], constant typename Way::Shape& shape [[buffer(5)]],                        \
        device const T* weight [[buffer(6)]], constant NormNumbers& numbers [[buffer(7)]],                   \
        device const T* residual [[buffer(8)]], uint3 tgid [[threadgroup_position_in_grid]],                 \
        uint sgid [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],               \
        uint sgs [[simdgroups_per_threadgroup]]) {                                                           \
        threadgroup typename Way::Shared sh;                                                                 \
        const ReducePlace at = {sgid, lane, sgs};                                                            \
        const NormedInput<T> input = normed<Way>(x, weight, shape, numbers, tgid.y, at, sh);                 \
        const EpilogueArguments<T> more = {residual, residual, uint(shape.N), 1.0f};                         \
        Way::Core::run(typename Way::Arguments(x, codes, scales, extra, y, shape), Way::place(tgid, at),     \
                       sh.core, Finish<T, kJoin>(more), input);                                              \
    }
ENTRY(norm_linear, [[kernel, max_total_threads_per_threadgroup(128)]])
ENTRY(norm_linear_few, [[kernel]])

struct QkvRows {
    long k, v; // rows of W of k and of v; those of q are the rest of N
};
#define QKV(entry, ...)                                                                                      \
    template <typename Way, typename W, typename T>                                                          \
    __VA_ARGS__ void entry(                                                                                  \
        device const T* x [[buffer(0)]], device const uint* q_codes [[buffer(1)]],                           \
        device const T* q_scales [[buffer(2)]], device const uint* k_codes [[buffer(3)]],                    \
        device const T* k_scales [[buffer(4)]], device const uint* v_codes [[buffer(5)]],                    \
        device const T* v_scales [[buffer(6)]], device T* q [[buffer(7)]], device T* k [[buffer(8)]],        \
        device T* v [[buffer(9)]], constant typename Way::Shape& shape [[buffer(10)]],                       \
        device const T* weight [[buffer(11)]], constant NormNumbers& numbers [[buffer(12)]],                 \
        constant QkvRows& rows [[buffer(13)]], uint3 tgid [[threadgroup_position_in_grid]],                  \
        uint sgid [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],               \
        uint sgs [[simdgroups_per_threadgroup]]) {                                                           \
        threadgroup typename Way::Shared sh;                                                                 \
        const ReducePlace at = {sgid, lane, sgs};                                                            \
        const uint each = uint(shape.rows), of_k = uint(rows.k), of_v = uint(rows.v);                        \
        const uint of_q = uint(shape.N) - of_k - of_v;                                                       \
        const uint before_k = (of_q + each - 1) / each, before_v = before_k + (of_k + each - 1) / each;      \
        const bool is_q = tgid.x < before_k, is_k = tgid.x < before_v;                                       \
        typename Way::Arguments a(x,                                                                         \
                                  is_q   ? q_codes                                                           \
                                  : is_k ? k_codes                                                           \
                                         : v_codes,                                                          \
                                  is_q   ? q_scales                                                          \
                                  : is_k ? k_scales                                                          \
                                         : v_scales,                                                         \
                                  is_q   ? q_scales                                                          \
                                  : is_k ? k_scales                                                          \
                                         : v_scales,                                                         \
                                  is_q   ? q                                                                 \
                                  : is_k ? k                                                                 \
                                         : v,                                                                \
                                  shape);                                                                    \
        a.N = is_q ? of_q : is_k ? of_k : of_v;                                                              \
        const uint3 tile = uint3(tgid.x - (is_q ? 0 : is_k ? before_k : before_v), tgid.y, 0);               \
        const NormedInput<T> input = normed<Way>(x, weight, shape, numbers, tgid.y, at, sh);                 \
        const EpilogueArguments<T> none = {x, x, a.N, 1.0f};                                                 \
        Way::Core::run(a, Way::place(tile, at), sh.core, Finish<T, kAlone>(none), input);                    \
    }
QKV(norm_qkv, [[kernel, max_total_threads_per_threadgroup(128)]])
QKV(norm_qkv_few, [[kernel]])

#define ROW(name, key, one, W, T, kJoin)                                                                     \
    INSTANTIATE(name key, norm_linear<Many<W<T>, T, kJoin>, W<T>, T, kJoin>)                                 \
    INSTANTIATE(name "_decode" key, norm_linear_few<Few<W<T>, T, kJoin, 8>, W<T>, T, kJoin>)                 \
    INSTANTIATE(name "_decode" key one, norm_linear_few<Few<W<T>, T, kJoin, 1>, W<T>, T, kJoin>)
#define ROWS(format, key, later, one, W)                                                                     \
    ROW("norm_linear_" format, key, one, W, half, kAlone)                                                    \
    ROW("norm_linear_" format, "__tbf16" later, "_m1", W, bfloat, kAlone)                                    \
    ROW("norm_linear_residual_" format, key, one, W, half, kResidual)                                        \
    ROW("norm_linear_residual_" format, "__tbf16" later, "_m1", W, bfloat, kResidual)

// key, later: zeros, where the dtype is not said before and where it is
ROWS("fp4", "", "", "__m1", Fp4)
ROWS("int4", "", "", "__m1", Int4)
ROWS("int4", "__zpoint", "_zpoint", "_m1", Int4Point)
ROWS("int4", "__zpacked", "_zpacked", "_m1", Int4Packed)
ROWS("int4", "__zbias", "_zbias", "_m1", Int4Bias)

#define QKV_ROWS(key, one, T)                                                                                \
    INSTANTIATE("norm_qkv_fp4" key, norm_qkv<Many<Fp4<T>, T, kAlone>, Fp4<T>, T>)                            \
    INSTANTIATE("norm_qkv_fp4_decode" key, norm_qkv_few<Few<Fp4<T>, T, kAlone, 8>, Fp4<T>, T>)               \
    INSTANTIATE("norm_qkv_fp4_decode" key one, norm_qkv_few<Few<Fp4<T>, T, kAlone, 1>, Fp4<T>, T>)
QKV_ROWS("", "__m1", half)
QKV_ROWS("__tbf16", "_m1", bfloat)
