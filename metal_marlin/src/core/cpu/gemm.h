#pragma once
#if defined(__METAL_MARLIN_CPU__) && METAL_MARLIN_LANES != 1
template <typename W, typename T, typename Schedule, typename Epilogue>
using Gemm = typename SimdGemm<W, T, Schedule, Epilogue>::type;
#endif

#if defined(__METAL_MARLIN_CPU__) && METAL_MARLIN_LANES == 1
#include "core/cpu/wide.h"

// Values of code i of 16 words.
template <typename Format, bool kTable = (Format::kBits <= 4)> struct WideCodes { // arithmetic, lane by lane
    enum : uint { kBits = Format::kBits };
    Wide of(WideBits words, uint i) const {
        uint code[16];
        float value[16];
        wide_store(code, (words >> (i * kBits)) & ((1u << kBits) - 1));
        for (uint l = 0; l < 16; ++l) value[l] = Format::value(code[l]);
        return wide_load<Wide>(value);
    }
};
template <typename Format>
struct WideCodes<Format, true> { // of fewer than four bits the table repeats itself
    Wide table;
    WideCodes() {
        for (uint code = 0; code < 16; ++code) table[code] = Format::value(code);
    }
    Wide of(WideBits words, uint i) const { return wide_lookup(table, words >> (i * Format::kBits)); }
};

// Rows of 16 x 16 words become columns.
static inline void wide_transpose(thread WideBits (&q)[16]) {
    wide_exchange<8>(q), wide_exchange<4>(q), wide_exchange<2>(q), wide_exchange<1>(q);
}

// kDepth of kPanel rows of W, decoded to float, 16 rows a vector.
struct Panel {
    enum : uint {
#if defined(__AVX512F__)
        kVectors = 4, // of 32 registers, 24 for sums
#else
        kVectors = 1,
#endif
        kRows = 16 * kVectors,
        kDepth = 256
    };
    float w[kDepth][kRows];
};

// A group of 16 rows.
template <typename W> struct WideGroups {
    Wide scale, zero, bias;

    static WideGroups of(thread const typename W::Row (&rows)[16], uint g) {
        float scale[16], zero[16], bias[16];
        for (uint r = 0; r < 16; ++r) {
            const typename W::Group group = rows[r].group(g);
            scale[r] = group.scale, zero[r] = group.zero, bias[r] = group.bias;
        }
        return {wide_load<Wide>(scale), wide_load<Wide>(zero), wide_load<Wide>(bias)};
    }
    Wide weights(Wide w) const {
        if (W::kZero) w -= zero;
        w *= scale;
        if (W::kBias) w += bias;
        return w;
    }
};

template <typename W, typename T> struct PanelDecoder {
    typedef typename W::Format Format;
    typedef CodeWords<Format> Memory;
    typedef MatrixRows<W::kMatrices> Place;
    enum : uint { kPerWord = Format::kPerWord };
    static_assert(Panel::kDepth % (16 * kPerWord) == 0,
                  "PanelDecoder: words of codes are decoded 16 at a time");
    WideCodes<Format> codes;

    // Weights k0 ... k0 + depth of Panel::kRows rows from `first` on of the threadgroup's, which begin with `row`; `apart` rows
    // of one matrix, then those of the other.
    void decode(thread const GemmArguments<W, T>& a, uint row, uint first, uint apart, uint k0, uint depth,
                thread Panel& panel) const {
        const uint words = depth / kPerWord, stored = Memory::stored(depth);
        for (uint v = 0; v < Panel::kVectors; ++v) {
            typename W::Row rows[16];
            device const uint* from[16];
            for (uint r = 0; r < 16; ++r) {
                const uint local = first + 16 * v + r;
                const uint matrix = Place::matrix(local, apart), n = row + Place::row(local, apart);
                rows[r] = a.row_of(matrix, n);
                from[r] = a.codes_of(matrix, n) + Memory::stored(k0);
            }
            WideGroups<W> g;
            uint group = ~0u;
            for (uint j0 = 0; j0 < words; j0 += 16) {
                const uint count = min(16u, words - j0), begin = Memory::stored(j0 * kPerWord);
                WideBits q[16];
                for (uint r = 0; r < 16; ++r) {
                    WideBits rest = 0;
                    const void* codes_at = from[r] + begin;
                    if (count < 16) {
                        __builtin_memcpy(&rest, codes_at, (stored - begin) * sizeof(uint));
                        codes_at = &rest;
                    }
                    q[r] = wide_words<Memory::kSize>(codes_at);
                }
                wide_transpose(q);
                for (uint j = 0; j < count; ++j) {
                    const uint k = (j0 + j) * kPerWord, now = a.group(k0 + k);
                    if (now != group) g = WideGroups<W>::of(rows, group = now);
#pragma unroll
                    for (uint i = 0; i < kPerWord; ++i) {
                        wide_store(&panel.w[k + i][16 * v], g.weights(codes.of(q[j], i)));
                    }
                }
            }
        }
    }
};

// One lane. A threadgroup takes `rows` rows of W for `tokens` tokens. A panel is decoded and multiplied with all the tokens:
// kTokens x kVectors sums stay in registers along it. Weights are not rounded; there is nothing to fetch ahead, so every
// schedule is this one.
template <typename W, typename T, typename Schedule, typename Epilogue> struct PanelGemm {
    enum : uint {
        kSimdgroups = 1,
        kVectors = Panel::kVectors,
        kPanel = Panel::kRows,
        kTokens = 6,
        kDepth = Panel::kDepth,
        kStride = kDepth + 16, // rows of x begin in different sets of a cache
        kMostTokens = 256,
        kMostRows = 64
    };
    struct Shared {
        uint nothing;
    };
    struct alignas(64) Block {
        Panel panel;
        float sums[kMostTokens][kMostRows];
        float x[kMostTokens][kStride];
    };

    template <typename Input = PlainInput>
    static void run(GemmArguments<W, T> a, GemmPlace at, threadgroup Shared&, Epilogue epilogue,
                    Input input = Input()) {
        const uint row = at.tgid.x * a.rows, rows = min(a.rows, a.N - row);
        const uint other = (W::kMatrices - 1) * rows, all = other + rows;
        const uint token = at.tgid.y * a.tokens, tokens = min(a.tokens, a.M - token);
        const PanelDecoder<W, T> decoder;
        Block block;
        for (uint k = 0; k < a.K; k += kDepth) {
            const uint depth = min(uint(kDepth), a.K - k);
            for (uint m = 0; m < tokens; ++m) {
                device const T* x = a.x + ulong(token + m) * a.K + k;
                const typename Input::Row in = input.row(token + m);
                for (uint i = 0; i < depth; ++i) block.x[m][i] = in.at(float(x[i]), k + i);
            }
            for (uint r = 0; r < all; r += kPanel) {
                decoder.decode(a, row, r, rows, k, depth, block.panel);
                uint m = 0;
                for (; m + kTokens <= tokens; m += kTokens) multiply<kTokens>(block, m, r, depth, k == 0);
                for (; m + 2 <= tokens; m += 2) multiply<2>(block, m, r, depth, k == 0);
                for (; m < tokens; ++m) multiply<1>(block, m, r, depth, k == 0);
            }
        }
        for (uint m = 0; m < tokens; ++m) {
            device T* y = a.y + ulong(token + m) * a.N + row;
            for (uint r = 0; r < rows; ++r) {
                const float sum = W::join(block.sums[m][r], block.sums[m][other + r]);
                y[r] = T(epilogue.apply(sum, token + m, row + r));
            }
        }
    }

    // Sums of a panel are added to those before them: shorter sums are more accurate.
    template <uint kCount> static void multiply(thread Block& block, uint m, uint r, uint depth, bool first) {
        Wide sums[kCount][kVectors];
#pragma unroll
        for (uint t = 0; t < kCount; ++t) {
#pragma unroll
            for (uint v = 0; v < kVectors; ++v) sums[t][v] = 0;
        }
        for (uint k = 0; k < depth; ++k) {
            Wide w[kVectors];
#pragma unroll
            for (uint v = 0; v < kVectors; ++v) w[v] = wide_load<Wide>(&block.panel.w[k][16 * v]);
#pragma unroll
            for (uint t = 0; t < kCount; ++t) {
                const Wide x = (Wide)block.x[m + t][k];
#pragma unroll
                for (uint v = 0; v < kVectors; ++v) sums[t][v] += w[v] * x;
            }
        }
#pragma unroll
        for (uint t = 0; t < kCount; ++t) {
#pragma unroll
            for (uint v = 0; v < kVectors; ++v) {
                thread float* to = &block.sums[m + t][r + 16 * v];
                wide_store(to, first ? sums[t][v] : wide_load<Wide>(to) + sums[t][v]);
            }
        }
    }
};

template <typename W, typename T, typename Schedule, typename Epilogue>
using Gemm = PanelGemm<W, T, Schedule, Epilogue>;
#endif
