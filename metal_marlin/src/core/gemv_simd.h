#pragma once
// The matrix-vector pipeline for any simdgroup: a simdgroup takes kRows rows of W and kTokens rows of x; its lanes
// walk along K, each with kWords words of every row at a time; one simd_sum a row and token at the end.

template <typename Format, typename T, typename S, uint kTokens> struct SimdGemv {
    enum : uint {
        kRows = 4,
        kWords = kTokens == 1 ? 4 : 1,
        kPerWord = Format::kPerWord,
        kStep = kWords * kPerWord,
        kRun = 16 // no scale changes within
    };
    struct Shared {
        uint nothing;
    };
    struct Words {
        uint w[kWords];
    };

    static Words load(device const uint* from, uint count, bool aligned) {
        Words words;
        if (kWords == 4 && aligned) {
            const uint4 v = *(device const uint4*)from;
#pragma unroll
            for (uint j = 0; j < kWords; ++j) words.w[j] = v[j];
        } else {
#pragma unroll
            for (uint j = 0; j < kWords; ++j) words.w[j] = j < count ? from[j] : 0;
        }
        return words;
    }

    static void run(GemvArguments<T, S> a, GemvPlace at, threadgroup Shared&) {
        const uint first = (at.tgid.x * at.sgs + at.sgid) * kRows, token = at.tgid.y * kTokens;
        float total[kRows][kTokens];
#pragma unroll
        for (uint r = 0; r < kRows; ++r) {
#pragma unroll
            for (uint m = 0; m < kTokens; ++m) total[r][m] = 0;
        }
        const uint words = a.K / kPerWord;
        for (uint k = at.lane * kStep; k < a.K; k += kSimdWidth * kStep) {
            const uint left = min(uint(kWords), words - k / kPerWord);
            float xs[kTokens][kStep];
#pragma unroll
            for (uint m = 0; m < kTokens; ++m) {
                device const T* x = a.x + ulong(min(token + m, a.M - 1)) * a.K + k;
                if (a.aligned) {
#pragma unroll
                    for (uint i = 0; i < kStep; i += 4) {
                        const vec<T, 4> v = *(device const vec<T, 4>*)(x + i);
#pragma unroll
                        for (uint j = 0; j < 4; ++j) xs[m][i + j] = float(v[j]);
                    }
                } else {
#pragma unroll
                    for (uint i = 0; i < kStep; ++i) xs[m][i] = i < left * kPerWord ? float(x[i]) : 0.0f;
                }
            }
#pragma unroll
            for (uint r = 0; r < kRows; ++r) {
                const ulong row = min(first + r, a.N - 1);
                const Words w = load(a.codes + row * words + k / kPerWord, left, a.aligned);
                step(w, a.scales + row * a.groups, k, a, xs, total[r]);
            }
        }
#pragma unroll
        for (uint r = 0; r < kRows; ++r) {
#pragma unroll
            for (uint m = 0; m < kTokens; ++m) {
                const float sum = simd_sum(total[r][m]);
                if (at.lane == 0 && first + r < a.N && token + m < a.M) {
                    a.y[ulong(token + m) * a.N + first + r] = T(sum);
                }
            }
        }
    }

    static void step(Words words, device const S* scales, uint k, thread const GemvArguments<T, S>& a,
                     thread const float (&xs)[kTokens][kStep], thread float (&total)[kTokens]) {
#pragma unroll
        for (uint from = 0; from < kStep; from += kRun) {
            // words behind the end are 0, and so is what they are multiplied by
            const float scale = float(scales[min((k + from) >> a.shift, a.groups - 1)]);
#pragma unroll
            for (uint m = 0; m < kTokens; ++m) {
                float dot = 0;
#pragma unroll
                for (uint j = from / kPerWord;
                     j < (kStep < kRun ? uint(kWords) : from / kPerWord + kRun / kPerWord); ++j) {
#pragma unroll
                    for (uint i = 0; i < 4; ++i) {
                        const float2 v = Format::pair(words.w[j], i);
                        dot += v.x * xs[m][j * kPerWord + i] + v.y * xs[m][j * kPerWord + i + 4];
                    }
                }
                total[m] += scale * dot;
            }
        }
    }
};
