#pragma once
#if defined(__METAL_MARLIN_CPU__) && METAL_MARLIN_LANES != 1
template <typename Format, typename T, typename S, uint kTokens> using Gemv = SimdGemv<Format, T, S, kTokens>;
#endif

#if defined(__METAL_MARLIN_CPU__) && METAL_MARLIN_LANES == 1
#include "core/cpu/wide.h"

// One lane, 4-bit codes. A step takes 128 weights of a row: code i of all 16 words is one vector (shift, table look-up,
// multiply-add). x is brought into that order once for all rows of the threadgroup.
template <typename Format, typename T, typename S, uint kTokens> struct WideGemv {
    enum : uint {
        kStep = 128,
        kRows = kTokens == 1 ? 4 : 1, // together: their multiply-adds share what is read of x
        kBlock = 16384,               // of K, the part of x in reordered form
        kMost = 256,                  // rows a pass over K
        kAhead = 3072                 // bytes that are fetched in advance along a row
    };
    static_assert(Format::kBits == 4, "WideGemv: the table has 16 entries");
    struct Shared {
        uint nothing;
    };
    struct Pass {
        float xs[kTokens][kBlock];
        float sums[kMost][kTokens];
    };

    static void run(GemvArguments<T, S> a, GemvPlace at, threadgroup Shared&) {
        const uint begin = at.tgid.x * a.rows, end = min(begin + a.rows, a.N), token = at.tgid.y * kTokens;
        Wide table;
        for (uint code = 0; code < 16; ++code) table[code] = Format::value(code);
        Pass pass;
        for (uint row = begin; row < end; row += kMost) {
            const uint count = min(uint(kMost), end - row);
            for (uint k = 0; k < a.K; k += kBlock) {
                reorder(a, token, k, pass);
                uint r = 0;
                if (a.groups == 1 || a.group % kStep == 0) {
                    for (; r + kRows <= count; r += kRows) rows<kRows, false>(a, table, row, r, k, pass);
                    for (; r < count; ++r) rows<1, false>(a, table, row, r, k, pass);
                } else {
                    for (; r < count; ++r) rows<1, true>(a, table, row, r, k, pass);
                }
            }
            for (uint m = 0; m < kTokens && token + m < a.M; ++m) {
                for (uint r = 0; r < count; ++r) a.y[ulong(token + m) * a.N + row + r] = T(pass.sums[r][m]);
            }
        }
    }

    // 16 * i + j of each step: x[8 * j + i]; 0 behind the end of K
    static void reorder(thread const GemvArguments<T, S>& a, uint token, uint k, thread Pass& pass) {
        typedef T Elements __attribute__((ext_vector_type(128)));
        typedef float Floats __attribute__((ext_vector_type(128)));
        const uint size = min(uint(kBlock), a.K - k);
        for (uint m = 0; m < kTokens; ++m) {
            device const T* x = a.x + ulong(min(token + m, a.M - 1)) * a.K + k;
            for (uint from = 0; from < size; from += kStep) {
                Elements v = 0;
                if (size - from >= kStep) {
                    __builtin_memcpy(&v, x + from, sizeof(v));
                } else {
                    __builtin_memcpy(&v, x + from, (size - from) * sizeof(T));
                }
                const Floats f = __builtin_convertvector(v, Floats);
                thread float* to = pass.xs[m] + from;
#define MM_COLUMN(i)                                                                                         \
    wide_store(to + 16 * i, __builtin_shufflevector(f, f, i, i + 8, i + 16, i + 24, i + 32, i + 40, i + 48,  \
                                                    i + 56, i + 64, i + 72, i + 80, i + 88, i + 96, i + 104, \
                                                    i + 112, i + 120))
                MM_COLUMN(0);
                MM_COLUMN(1);
                MM_COLUMN(2);
                MM_COLUMN(3);
                MM_COLUMN(4);
                MM_COLUMN(5);
                MM_COLUMN(6);
                MM_COLUMN(7);
#undef MM_COLUMN
            }
        }
    }

    // A scale for each of the 16 words from weight k on.
    template <bool kFine> static Wide scale(device const S* scales, uint k, thread const GemvArguments<T, S>& a) {
        if (!kFine) return (Wide)float(scales[a.groups == 1 ? 0 : k / a.group]);
        Wide few = 0;
        WideBits which;
        const uint first = k / a.group, per = kStep / a.group, count = min(per, a.groups - first);
        for (uint i = 0; i < 8; ++i) few[i] = i < count ? float(scales[first + i]) : 0.0f;
        for (uint j = 0; j < 16; ++j) which[j] = j * per / 16;
        return wide_lookup(few, which);
    }

    template <uint kCount, bool kFine>
    static void rows(thread const GemvArguments<T, S>& a, Wide table, uint row, uint r0, uint k0, thread Pass& pass) {
        const uint words = a.K / 8, size = min(uint(kBlock), a.K - k0);
        Wide total[kCount][kTokens];
        device const uint* codes[kCount];
        device const S* scales[kCount];
#pragma unroll
        for (uint r = 0; r < kCount; ++r) {
            codes[r] = a.codes + ulong(row + r0 + r) * words + k0 / 8;
            scales[r] = a.scales + ulong(row + r0 + r) * a.groups;
#pragma unroll
            for (uint m = 0; m < kTokens; ++m) total[r][m] = 0;
        }
        for (uint k = 0; k < size; k += kStep) {
#pragma unroll
            for (uint r = 0; r < kCount; ++r) {
                WideBits q = 0;
                if (size - k >= kStep) {
                    q = wide_load(codes[r] + k / 8);
                } else {
                    __builtin_memcpy(&q, codes[r] + k / 8, (size - k) / 2);
                }
                __builtin_prefetch((device const char*)(codes[r] + k / 8) + kAhead);
                Wide part[kTokens];
#pragma unroll
                for (uint i = 0; i < 8; ++i) {
                    const Wide w = wide_lookup(table, q >> (4 * i));
#pragma unroll
                    for (uint m = 0; m < kTokens; ++m) {
                        const Wide x = wide_load(pass.xs[m] + k + 16 * i);
                        part[m] = i == 0 ? w * x : part[m] + w * x;
                    }
                }
                const Wide s = scale<kFine>(scales[r], k0 + k, a);
#pragma unroll
                for (uint m = 0; m < kTokens; ++m) total[r][m] += part[m] * s;
            }
        }
#pragma unroll
        for (uint r = 0; r < kCount; ++r) {
#pragma unroll
            for (uint m = 0; m < kTokens; ++m) {
                const float sum = wide_sum(total[r][m]);
                pass.sums[r0 + r][m] = k0 == 0 ? sum : pass.sums[r0 + r][m] + sum;
            }
        }
    }
};

template <typename Format, typename T, typename S, uint kTokens> using Gemv = WideGemv<Format, T, S, kTokens>;
#endif
