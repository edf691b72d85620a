#pragma once
#if defined(__METAL_MARLIN_CPU__) && METAL_MARLIN_LANES != 1
template <typename Q, typename T, uint kTokens, typename Epilogue = NoEpilogue>
using Gemv = SimdGemv<Q, T, kTokens, 0, 0, Epilogue>;
#endif

#if defined(__METAL_MARLIN_CPU__) && METAL_MARLIN_LANES == 1
#include "core/cpu/dot.h"

// One lane. A step takes 16 words of codes of a row, see dot.h; x is brought into the order that this needs once for all rows of
// the threadgroup, and summed by group where weights have an offset. Scales of kRows rows are made floats before their
// codes are read, many at once.
template <typename Q, typename T, uint kTokens, typename Epilogue> struct WideGemv {
    typedef typename WideDotOf<typename Q::Format, T, Q::Format::kBits, kTokens == 1>::type Dot;
    typedef typename Dot::Stored Stored;
    typedef CodeWords<typename Q::Format> Memory;
    typedef MatrixRows<Q::kMatrices> Place;
    enum : uint {
        kStep = Dot::kStep,
        kPerWord = Q::Format::kPerWord,
        kBits = Q::Format::kBits,
        kStepBytes = kStep * kBits / 8,
        kRows = kTokens == 1 ? 4 : 2,                     // together: they share what is read of x
        kElement = Dot::kStored * sizeof(Stored) / kStep, // bytes of an element of x
        // of K, the part of x in reordered form: of 8 tokens 32 KB, twice as much where half of it is read a product
        kBlock = kTokens == 1 ? 16384
        : kElement == 2       ? 4096
                              : 1024,
        kStored = (kBlock / kStep + 1) * Dot::kStored,
        kGroups = kBlock / 16 + 16,       // a step reads eight scales, used or not
        kMost = kTokens == 1 ? 256 : 512, // rows a pass over K
        kOutputs = kMost / Q::kMatrices,
        kAhead = 3072, // bytes that are fetched in advance along a row of which the pass takes a block
        kFar = 16384   // bytes that are fetched in advance in the order of memory, where it takes whole rows
    };
    struct Shared {
        uint nothing;
    };
    struct Pass {
        Stored xs[kTokens][kStored];
        float sums[kMost + kRows][kTokens];
        float grouped[Q::kAffine ? uint(kTokens) : 1][kGroups]; // sums of x
        float scales[kRows][kGroups], offsets[kRows][kGroups];
    };
    // The block of K that starts at k. Its last step may start within the step before, and then skips what that one
    // has: it is read as one piece, like the others.
    struct Block {
        uint k, size, whole, last; // last: where the last step starts, counted from k
        bool piece;
        uint first, groups; // groups that lie in it
        WideScales scales, last_scales;
        WideBits kept; // bits of the last step's words of memory
    };

    template <typename Input = PlainInput>
    static void run(GemvArguments<Q, T> a, GemvPlace at, threadgroup Shared&, Epilogue epilogue = Epilogue(),
                    Input input = Input()) {
        const uint begin = at.tgid.x * a.rows, end = min(begin + a.rows, a.N), token = at.tgid.y * kTokens;
        const Dot dot(Middle<Q>::value);
        Pass pass;
        for (uint row = begin; row < end; row += kOutputs) {
            const uint count = min(uint(kOutputs), end - row), other = (Q::kMatrices - 1) * count;
            for (uint k = 0; k < a.K; k += kBlock) {
                const Block block = block_at(a, k);
                if (row == begin || a.K > kBlock) reorder(a, token, block, pass, input);
                rows(a, dot, row, count, block, pass);
            }
            for (uint m = 0; m < kTokens && token + m < a.M; ++m) {
                device T* y = a.y + ulong(token + m) * a.N + row;
                for (uint r = 0; r < count; ++r) {
                    const float v = Q::join(pass.sums[r][m], pass.sums[other + r][m]);
                    y[r] = T(epilogue.apply(v, token + m, row + r));
                }
            }
        }
    }

    static Block block_at(thread const GemvArguments<Q, T>& a, uint k) {
        Block b;
        b.k = k;
        b.size = min(uint(kBlock), a.K - k);
        b.whole = b.size / kStep * kStep;
        b.piece = a.K >= kStep && a.K % 16 == 0;
        b.last = b.piece ? b.size - kStep : b.whole; // may be before the block
        b.first = k >> a.shift;
        b.groups = a.group(k + b.size - 1) - b.first + 1;
        const uint none = b.whole - b.last;
        for (uint j = 0; j < 16; ++j) {
            b.scales.which[j] = j * kPerWord >> a.shift;
            const uint i =
                max(j * kPerWord, none) - none; // counted from where the last step's own part starts
            b.last_scales.which[j] = min(i, b.size - b.whole - 1) >> a.shift;
            const uint skipped = max(none * kBits, 32 * j) - 32 * j;
            b.kept[j] = skipped < 32 ? ~0u << skipped : 0;
        }
        b.scales.one = b.last_scales.one = kStep >> a.shift <= 1;
        return b;
    }

    template <typename Input>
    static void reorder(thread const GemvArguments<Q, T>& a, uint token, thread const Block& b,
                        thread Pass& pass, Input input) {
        for (uint m = 0; m < kTokens; ++m) {
            const typename Input::Row in = input.row(min(token + m, a.M - 1));
            device const T* x = a.x + ulong(min(token + m, a.M - 1)) * a.K + b.k;
            for (uint from = 0; from < b.size; from += kStep) {
                float part[kStep];
                if (from < b.whole) {
                    for (uint i = 0; i < kStep; ++i) part[i] = in.at(float(x[from + i]), b.k + from + i);
                } else {
                    for (uint i = 0; i < kStep; ++i) part[i] = 0;
                    for (uint i = from; i < b.size; ++i) part[i - b.last] = in.at(float(x[i]), b.k + i);
                }
                Dot::order(part, pass.xs[m] + from / kStep * Dot::kStored);
            }
            if (Q::kAffine) {
                for (uint g = 0; g < b.groups; ++g) {
                    const ulong begin = ulong(b.first + g) << a.shift, end = ulong(b.first + g + 1)
                                                                             << a.shift;
                    float sum = 0;
                    for (uint i = uint(max(begin, ulong(b.k)) - b.k); i < min(end - b.k, ulong(b.size));
                         ++i) {
                        sum += in.at(float(x[i]), b.k + i);
                    }
                    pass.grouped[m][g] = sum;
                }
            }
        }
    }

    // Scales (and offsets) of the block's groups of a row.
    static void convert(typename Q::Row row, thread const Block& b, thread float* scales,
                        thread float* offsets) {
        for (uint g = 0; g < b.groups;
             g += 8) { // the last eight overlap those before: no loop over single ones
            const uint at = b.groups < 8 ? 0 : min(g, b.groups - 8), count = min(8u, b.groups);
            typename WideScale<typename Q::Scale>::Stored stored = 0;
            if (count == 8) {
                __builtin_memcpy(&stored, row.scales + b.first + at, sizeof(stored));
            } else {
                for (uint i = 0; i < count; ++i) stored[i] = row.scales[b.first + i];
            }
            wide_store(scales + at, WideScale<typename Q::Scale>::of(stored) * (row.factor * Dot::kUnit));
        }
        if (Q::kAffine) {
            for (uint g = 0; g < b.groups; ++g) offsets[g] = Middle<Q>::offset(row.group(b.first + g));
        }
    }

    // Codes of the last step, those that the step before has as 0.
    static void last(device const uint* thread const (&codes)[kRows], thread const Block& b,
                     thread WideStep<kRows>& step, thread WideBits (&part)[kRows]) {
        for (uint r = 0; r < kRows; ++r) {
            const uint end = Memory::stored(b.size);
            part[r] = 0;
            if (b.piece) {
                __builtin_memcpy(&part[r], codes[r] + end - kStepBytes / 4, kStepBytes);
                part[r] &= b.kept;
            } else {
                const uint whole = Memory::stored(b.whole);
                for (uint j = whole; j < end; ++j) part[r][j - whole] = codes[r][j];
            }
            step.codes[r] = &part[r];
        }
    }

    // Sums of `count` rows of each matrix, one after the other, over the block. The last rows are done again where kRows does not divide count, so that
    // there is one loop.
    static void rows(thread const GemvArguments<Q, T>& a, thread const Dot& dot, uint row, uint count,
                     thread const Block& b, thread Pass& pass) {
        const uint words = Memory::stored(a.K), width = Memory::stored(b.size) * 4,
                   together = kRows * words * 4;
        // Whole rows to come are fetched in the order of memory, into the second cache: in the first one, which x fills, they would not
        // last. Of blocks of rows, each row is fetched along itself, and behind its end the next one.
        const bool whole = b.size == a.K;
        const uint ahead = min(uint(kAhead), width);
        const uint next = max(1u, (whole ? uint(kFar) : kRows * kAhead) / together) * together;
        const uint apart = whole ? uint(kStepBytes) : words * 4;
        const uint all = count * Q::kMatrices;
        for (uint r0 = 0; r0 < all; r0 += kRows) {
            device const uint* codes[kRows];
            WideStep<kRows> step;
            Wide total[kRows][kTokens];
#pragma unroll
            for (uint r = 0; r < kRows; ++r) {
                const uint local = min(r0 + r, all - 1);
                const uint matrix = Place::matrix(local, count), n = row + Place::row(local, count);
                codes[r] = a.codes_of(matrix, n) + Memory::stored(b.k);
                convert(a.row_of(matrix, n), b, pass.scales[r], pass.offsets[r]);
#pragma unroll
                for (uint m = 0; m < kTokens; ++m) total[r][m] = 0;
            }
            for (uint k = 0; k < b.size; k += kStep) { // one loop, so that a step is compiled once
                const uint then = k / kStep * kStepBytes + ahead;
                const uint at = whole          ? next + k / kStep * kRows * kStepBytes
                                : then < width ? then
                                               : then - width + next;
                device const char* fetch = (device const char*)codes[0] + at;
                WideBits part[kRows];
#pragma unroll
                for (uint r = 0; r < kRows; ++r) {
                    step.codes[r] = codes[r] + k / kStep * (kStepBytes / 4);
                    step.scales[r] = pass.scales[r] + (((b.k + k) >> a.shift) - b.first);
                    __builtin_prefetch(fetch + r * apart, 0, 2);
                }
                if (k == b.whole) last(codes, b, step, part);
                dot.add(step, k == b.whole ? b.last_scales : b.scales, pass.xs[0] + k / kStep * Dot::kStored,
                        kStored, total);
            }
            float sums[kRows][kTokens];
            if (kRows * kTokens == 16) {
                wide_store(sums, wide_sums(*(thread Wide(*)[16])total));
            } else {
                for (uint i = 0; i < kRows * kTokens; ++i) sums[0][i] = wide_sum(total[0][i]);
            }
            for (uint r = 0; r < kRows; ++r) {
                for (uint m = 0; m < kTokens; ++m) {
                    float sum = sums[r][m];
                    if (Q::kAffine) {
                        for (uint g = 0; g < b.groups; ++g) sum += pass.offsets[r][g] * pass.grouped[m][g];
                    }
                    pass.sums[r0 + r][m] = b.k == 0 ? sum : pass.sums[r0 + r][m] + sum;
                }
            }
        }
    }
};

template <typename Q, typename T, uint kTokens, typename Epilogue = NoEpilogue>
using Gemv = WideGemv<Q, T, kTokens, Epilogue>;
#endif
