#pragma once
// Matrix-matrix core: y[m, n] = sum over k of x[m, k] * w[n, k], where w = scale * (value(code) - zero) + bias.
// Weights are the left operand; sums are float and y is rounded once.
//
//   x       T     [M, K]
//   codes   uint  [N, K * bits / 32]      words of memory, row-major; formats/code_words.h
//   scales  S     [N, ceil(K / group)]    group: 16, 32, 64, 128, ... or K
//   extra   E     what W::Extra says
//   y       T     [M, N]
//
// Gemm<W, T, Schedule, Epilogue> is the device's pipeline. W: a Quantized (formats/quantized.h).
//   apple, nvidia, cpu with 32 lanes  gemm_tile.h: weights are decoded into threadgroup memory, rounded to T as
//                                     dequantised weights are; simdgroups multiply tiles of it (core/tile.h)
//   cpu, one lane                     cpu/gemm.h: weights are decoded to float, once for all tokens of a block
// Sources: own.
#include <metal_stdlib>
#include "core/constants.h"
#include "core/epilogue.h"
#include "core/input.h"
#include "core/matrices.h"
#include "core/tile.h"
#include "formats/nf3.h" // for nvidia/operand.h: what is included under an #if is nowhere else
#include "formats/quantized.h"
using namespace metal;

struct GemmShape {
    long M, N, K;
    long group;  // weights a scale stands for
    long rows;   // rows of W of a threadgroup
    long tokens; // rows of x of a threadgroup
    long
        aligned; // 16-byte loads are possible: K is a multiple of 32, x and codes start at multiples of 16 bytes
};

// Where x lies, for a device's tensor copy unit: opaque, made by the host (runtime/tensor_map.py); others never read it.
struct alignas(64) TensorMap {
    long words[16];
};

template <typename W, typename T> struct GemmArguments {
    typedef typename W::Bound E;
    device const T* x;
    device const uint* codes;
    device const typename W::S* scales;
    device const E* extra;
    device T* y;
    uint M, N, K, groups, rows, tokens;
    uint shift; // weight k has scale k >> shift
    bool aligned;

    GemmArguments(device const T* x, device const uint* codes, device const typename W::S* scales,
                  device const E* extra, device T* y, constant GemmShape& shape)
        : x(x), codes(codes), scales(scales), extra(extra), y(y), M(uint(shape.M)), N(uint(shape.N)),
          K(uint(shape.K)), groups((uint(shape.K) + uint(shape.group) - 1) / uint(shape.group)),
          rows(uint(shape.rows)), tokens(uint(shape.tokens)),
          shift(groups == 1 ? 31 : ctz(uint(shape.group))), aligned(shape.aligned != 0) {}

    typename W::Row row(ulong n) const {
        return W::row(scales, (device const typename W::E*)extra, n, groups);
    }
    uint group(uint k) const { return min(k >> shift, groups - 1); }

    // Of a row of W as pipelines ask for it, the last one again behind the end; `matrix`: core/matrices.h.
    device const uint* codes_of(uint, uint n) const {
        return codes + min(n, N - 1) * ulong(CodeWords<typename W::Format>::stored(K));
    }
    typename W::Row row_of(uint, uint n) const { return row(min(n, N - 1)); }
};

// Where a thread stands.
struct GemmPlace {
    uint3 tgid;
    uint sgid, lane;
};

// Schedules: how many stages of both operands threadgroup memory holds (with one, reading waits for multiplying), and the
// tile of the pipeline with stages: the device's usual one, or kTokens x kRows x kDepth by kWM x kWN simdgroups.
struct UsualTile {
    template <typename T> using Size = TileSize<T>;
};
struct SingleStage : UsualTile {
    enum : uint { kStages = 1 };
};
struct DoubleStage : UsualTile {
    enum : uint { kStages = 2 };
};
struct TripleStage : UsualTile {
    enum : uint { kStages = 3 };
};
template <uint kTokens_, uint kRows_, uint kDepth_, uint kStages_ = 2, uint kWM_ = 2, uint kWN_ = 2>
struct Tiled {
    enum : uint { kStages = kStages_ };
    template <typename T> struct Size {
        enum : uint {
            kBN = kRows_,
            kBM = kTokens_,
            kBK = kDepth_,
            kWN = kWN_,
            kWM = kWM_,
            kPad = 16 / sizeof(T)
        };
    };
};
// Weights are decoded in registers, as operands (gemm_fused.h).
template <uint kRows_, uint kTokens_> struct Fused : DoubleStage {
    enum : uint { kRows = kRows_, kTokens = kTokens_ };
};
// Half of the simdgroups decode, the others multiply (gemm_divergent.h).
struct Divergent : DoubleStage {};
// Asynchronous copies, kDepth stages; kRows of W and kTokens of a threadgroup. Devices without such copies have the
// two stages above.
template <uint kRows_, uint kTokens_, uint kSimdgroups_, uint kDepth_, uint kSplit_ = 1>
struct FewTokens : DoubleStage {
    enum : uint {
        kRows = kRows_,
        kTokens = kTokens_,
        kSimdgroups = kSimdgroups_,
        kDepth = kDepth_,
        kSplit = kSplit_
    };
};
// kSplit: threadgroups along z that share K.
template <uint kRows_, uint kTokens_, uint kDepth_, uint kSplit_ = 1> struct ManyTokens : DoubleStage {
    enum : uint { kRows = kRows_, kTokens = kTokens_, kDepth = kDepth_, kSplit = kSplit_ };
};

#include "core/gemm_tile.h"

#include "core/gemm_divergent.h"
#include "core/gemm_fused.h"

// Which pipeline a schedule is on any device.
template <typename W, typename T, typename Schedule, typename Epilogue> struct SimdGemm {
    typedef TileGemm<W, T, Schedule, Epilogue> type;
};
template <typename W, typename T, uint kRows, uint kTokens, typename Epilogue>
struct SimdGemm<W, T, Fused<kRows, kTokens>, Epilogue> {
    typedef FusedGemm<W, T, Fused<kRows, kTokens>, Epilogue> type;
};
template <typename W, typename T, typename Epilogue> struct SimdGemm<W, T, Divergent, Epilogue> {
    typedef DivergentGemm<W, T, Epilogue> type;
};

#include "core/apple/gemm.h"
#include "core/cpu/gemm.h"
#include "core/nvidia/gemm.h"
