#pragma once
#if defined(__METAL_MARLIN_CPU__) && METAL_MARLIN_LANES != 1
template <typename Format, typename T, typename S, uint kTokens> using Gemv = SimdGemv<Format, T, S, kTokens>;
#endif

#if defined(__METAL_MARLIN_CPU__) && METAL_MARLIN_LANES == 1
#include "core/cpu/wide.h"

// One lane, 4-bit codes. A step takes 128 weights of a row, see WideDot; x is brought into the order that this needs
// once for all rows of the threadgroup.
template <typename Format, typename T, typename S, uint kTokens> struct WideGemv {
    typedef WideDot<Format, T> Dot;
    typedef typename Dot::Stored Stored;
    enum : uint {
        kStep = 128,
        kRows = kTokens == 1 ? 4 : 2, // together: they share what is read of x
        kBlock = 16384,               // of K, the part of x in reordered form
        kStored = kBlock / kStep * Dot::kStored,
        kMost = 256,  // rows a pass over K
        kAhead = 3072 // bytes that are fetched in advance along a row
    };
    static_assert(Format::kBits == 4, "WideGemv: the table has 16 entries");
    struct Shared {
        uint nothing;
    };
    struct Pass {
        Stored xs[kTokens][kStored];
        float sums[kMost + kRows][kTokens];
    };

    static void run(GemvArguments<T, S> a, GemvPlace at, threadgroup Shared&) {
        const uint begin = at.tgid.x * a.rows, end = min(begin + a.rows, a.N), token = at.tgid.y * kTokens;
        const Dot dot;
        Pass pass;
        for (uint row = begin; row < end; row += kMost) {
            const uint count = min(uint(kMost), end - row);
            for (uint k = 0; k < a.K; k += kBlock) {
                reorder(a, token, k, pass);
                if (a.shift >= 7) {
                    rows<false>(a, dot, row, count, k, pass);
                } else {
                    rows<true>(a, dot, row, count, k, pass);
                }
            }
            for (uint m = 0; m < kTokens && token + m < a.M; ++m) {
                for (uint r = 0; r < count; ++r) a.y[ulong(token + m) * a.N + row + r] = T(pass.sums[r][m]);
            }
        }
    }

    static void reorder(thread const GemvArguments<T, S>& a, uint token, uint k, thread Pass& pass) {
        typedef T Elements __attribute__((ext_vector_type(128)));
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
                Dot::order(__builtin_convertvector(v, WideRow), pass.xs[m] + from / kStep * Dot::kStored);
            }
        }
    }

    // A scale for each of the 16 words from weight k on.
    template <bool kFine>
    static Wide scale(device const S* scales, uint k, thread const GemvArguments<T, S>& a) {
        if (!kFine) return (Wide) float(scales[k >> a.shift]);
        Wide few = 0;
        WideBits which;
        const uint first = k >> a.shift, per = kStep >> a.shift, count = min(per, a.groups - first);
        for (uint i = 0; i < 8; ++i) few[i] = i < count ? float(scales[first + i]) : 0.0f;
        for (uint j = 0; j < 16; ++j) which[j] = j * per / 16;
        return wide_lookup(few, which);
    }

    // Sums of `count` rows over the block of K that starts at k0. The last rows are done again where kRows does not
    // divide count, so that there is one loop.
    template <bool kFine>
    static void rows(thread const GemvArguments<T, S>& a, thread const Dot& dot, uint row, uint count,
                     uint k0, thread Pass& pass) {
        const uint words = a.K / 8, size = min(uint(kBlock), a.K - k0), whole = size / kStep * kStep;
        const uint width = size / 2, ahead = min(uint(kAhead), width);
        for (uint r0 = 0; r0 < count; r0 += kRows) {
            device const uint* codes[kRows];
            device const S* scales[kRows];
            Wide total[kRows][kTokens];
#pragma unroll
            for (uint r = 0; r < kRows; ++r) {
                const ulong at = row + min(r0 + r, count - 1);
                codes[r] = a.codes + at * words + k0 / 8;
                scales[r] = a.scales + at * a.groups;
#pragma unroll
                for (uint m = 0; m < kTokens; ++m) total[r][m] = 0;
            }
            WideBits q[kRows];
            for (uint k = 0; k < whole; k += kStep) {
                // behind the end of these rows it is the next ones
                const uint then = k / 2 + ahead,
                           fetch = then < width ? then : then - width + kRows * words * 4;
#pragma unroll
                for (uint r = 0; r < kRows; ++r) {
                    q[r] = wide_load<WideBits>(codes[r] + k / 8);
                    __builtin_prefetch((device const char*)codes[r] + fetch);
                }
                add<kFine>(a, dot, q, scales, k0, k, pass, total);
            }
            if (whole < size) {
#pragma unroll
                for (uint r = 0; r < kRows; ++r) {
                    q[r] = 0;
                    __builtin_memcpy(&q[r], codes[r] + whole / 8, (size - whole) / 2);
                }
                add<kFine>(a, dot, q, scales, k0, whole, pass, total);
            }
#pragma unroll
            for (uint r = 0; r < kRows; ++r) {
#pragma unroll
                for (uint m = 0; m < kTokens; ++m) {
                    const float sum = wide_sum(total[r][m]);
                    pass.sums[r0 + r][m] = k0 == 0 ? sum : pass.sums[r0 + r][m] + sum;
                }
            }
        }
    }

    template <bool kFine>
    static void add(thread const GemvArguments<T, S>& a, thread const Dot& dot,
                    thread const WideBits (&q)[kRows], device const S* thread const (&scales)[kRows], uint k0,
                    uint k, thread const Pass& pass, thread Wide (&total)[kRows][kTokens]) {
        Wide part[kRows][kTokens];
        dot.multiply(q, pass.xs[0] + k / kStep * Dot::kStored, kStored, part);
#pragma unroll
        for (uint r = 0; r < kRows; ++r) {
            const Wide s = scale<kFine>(scales[r], k0 + k, a);
#pragma unroll
            for (uint m = 0; m < kTokens; ++m) total[r][m] += part[r][m] * s;
        }
    }
};

template <typename Format, typename T, typename S, uint kTokens> using Gemv = WideGemv<Format, T, S, kTokens>;
#endif
