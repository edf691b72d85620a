#pragma once
// The matrix-vector pipeline for any simdgroup: a simdgroup takes kRows rows of W and kTokens rows of x; its lanes
// walk along K, each with kWords words of codes of every row at a time; one simd_sum a row and token at the end.
//   kWords  16 bytes of a row a lane are one load; 32 are two, with fewer rows
//   kTile   0: x is read from device memory; else the threadgroup brings kTile elements of it into its own memory first,
//           for all of its simdgroups
template <typename Q, typename T, uint kTokens, uint kWords_ = 0, uint kTile = 0,
          typename Epilogue = NoEpilogue>
struct SimdGemv {
    typedef typename Q::Format Format;
    typedef CodeWords<Format> Memory;
    typedef MatrixRows<Q::kMatrices> Place;
    enum : uint {
        kPerWord = Format::kPerWord,
        kWords = kWords_ ? kWords_
        : kTokens == 1   ? 4
                         : 8 / kPerWord,
        kRows = kWords > 4 ? 2 : 4,
        kOutputs = kRows / Q::kMatrices,
        kStep = kWords * kPerWord,
        kRun = kStep < 16 ? kStep : 16, // no scale changes within
        kRuns = kStep / kRun,
        kStaged = kTile ? kTile : 1
    };
    static_assert(kTile == 0 || kTokens == 1, "SimdGemv: a tile is of one token");
    static_assert(kTile % (kSimdWidth * kStep) == 0, "SimdGemv: lanes take whole turns of a tile");
    struct Shared {
        T x[kStaged];
    };
    struct Words {
        uint w[kWords];
    };
    struct Inputs {
        float x[kTokens][kStep], sum[kTokens][kRuns];
    };

    // Words first, first + 1 ... of a row that has `count`.
    static Words load(device const uint* row, uint first, uint count, bool aligned) {
        Words words;
        device const uint* from = row + Memory::stored(first * kPerWord);
        const uint left = count - first;
        if (Memory::kSize == 32 && kWords % 4 == 0 && aligned) {
#pragma unroll
            for (uint i = 0; i < kWords / 4; ++i) {
                uint4 v = 0;
                if (4 * i < left) v = *(device const uint4*)(from + 4 * i);
#pragma unroll
                for (uint j = 0; j < 4; ++j) words.w[4 * i + j] = v[j];
            }
        } else if (kWords % Memory::kUnit == 0) { // whole units, as rows have
            enum : uint { kLoads = (kWords * Memory::kSize + 31) / 32 };
            uint memory[kLoads];
#pragma unroll
            for (uint j = 0; j < kLoads; ++j) {
                memory[j] = j / Memory::kStored * Memory::kUnit < left ? from[j] : 0;
            }
#pragma unroll
            for (uint j = 0; j < kWords; ++j) words.w[j] = Memory::of(memory, j);
        } else {
#pragma unroll
            for (uint j = 0; j < kWords; ++j) words.w[j] = j < left ? Memory::at(row, first + j) : 0;
        }
        return words;
    }

    // Elements of x that lie behind the end are 0.
    static void read(device const T* x, uint count, bool aligned, thread float (&to)[kStep]) {
        if (aligned) {
#pragma unroll
            for (uint i = 0; i < kStep; i += 4) {
                vec<T, 4> v = vec<T, 4>(T(0));
                if (i < count) v = *(device const vec<T, 4>*)(x + i);
#pragma unroll
                for (uint j = 0; j < 4; ++j) to[i + j] = float(v[j]);
            }
        } else {
#pragma unroll
            for (uint i = 0; i < kStep; ++i) to[i] = i < count ? float(x[i]) : 0.0f;
        }
    }

    template <typename Input>
    static Inputs inputs(thread const GemvArguments<Q, T>& a, uint token, uint k, uint tile,
                         threadgroup const Shared& sh, Input input) {
        Inputs in;
#pragma unroll
        for (uint m = 0; m < kTokens; ++m) {
            if (kTile) {
#pragma unroll
                for (uint i = 0; i < kStep; ++i) in.x[m][i] = float(sh.x[k - tile + i]);
            } else {
                const uint row = min(token + m, a.M - 1);
                read(a.x + ulong(row) * a.K + k, a.K - k, a.aligned, in.x[m]);
                if (!Input::kPlain) {
                    const typename Input::Row of = input.row(row);
#pragma unroll
                    for (uint i = 0; i < kStep; ++i) {
                        if (k + i < a.K) in.x[m][i] = of.at(in.x[m][i], k + i);
                    }
                }
            }
            if (Q::kAffine) {
#pragma unroll
                for (uint run = 0; run < kRuns; ++run) {
                    in.sum[m][run] = 0;
#pragma unroll
                    for (uint i = 0; i < kRun; ++i) in.sum[m][run] += in.x[m][run * kRun + i];
                }
            }
        }
        return in;
    }

    static void stage(thread const GemvArguments<Q, T>& a, uint token, uint tile, GemvPlace at,
                      threadgroup Shared& sh) {
        device const T* x = a.x + ulong(token) * a.K;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint i = at.sgid * kSimdWidth + at.lane; i < kStaged; i += at.sgs * kSimdWidth) {
            sh.x[i] = tile + i < a.K ? x[tile + i] : T(0);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }

    template <typename Input = PlainInput>
    static void run(GemvArguments<Q, T> a, GemvPlace at, threadgroup Shared& sh,
                    Epilogue epilogue = Epilogue(), Input input = Input()) {
        static_assert(Input::kPlain || kTile == 0, "SimdGemv: a tile holds x as it is");
        const uint first = (at.tgid.x * at.sgs + at.sgid) * kOutputs, token = at.tgid.y * kTokens;
        float total[kRows][kTokens];
#pragma unroll
        for (uint r = 0; r < kRows; ++r) {
#pragma unroll
            for (uint m = 0; m < kTokens; ++m) total[r][m] = 0;
        }
        const uint length = kTile ? uint(kTile) : a.K;
        for (uint tile = 0; tile < a.K; tile += length) {
            if (kTile) stage(a, token, tile, at, sh);
            const uint end = min(a.K, tile + length);
            for (uint k = tile + at.lane * kStep; k < end; k += kSimdWidth * kStep) {
                const Inputs in = inputs(a, token, k, tile, sh, input);
#pragma unroll
                for (uint r = 0; r < kRows; ++r) {
                    const uint matrix = Place::matrix(r, kOutputs), n = first + Place::row(r, kOutputs);
                    const Words w = load(a.codes_of(matrix, n), k / kPerWord, a.K / kPerWord, a.aligned);
                    step(w, a, a.row_of(matrix, n), k, in, total[r]);
                }
            }
        }
        simdgroup_barrier(mem_flags::mem_none); // lanes left the loop at different times
#pragma unroll
        for (uint r = 0; r < kOutputs; ++r) {
#pragma unroll
            for (uint m = 0; m < kTokens; ++m) {
                float sum = simd_sum(total[r][m]);
                if (Q::kMatrices == 2) sum = Q::join(sum, simd_sum(total[(r + kOutputs) % kRows][m]));
                if (at.lane == 0 && first + r < a.N && token + m < a.M) {
                    a.y[ulong(token + m) * a.N + first + r] = T(epilogue.apply(sum, token + m, first + r));
                }
            }
        }
    }

    // Words behind the end are 0, and so is what they are multiplied by.
    static void step(Words words, thread const GemvArguments<Q, T>& a, typename Q::Row row, uint k,
                     thread const Inputs& in, thread float (&total)[kTokens]) {
#pragma unroll
        for (uint run = 0; run < kRuns; ++run) {
            const typename Q::Group group = row.group(a.group(k + run * kRun));
#pragma unroll
            for (uint m = 0; m < kTokens; ++m) {
                float dot = 0;
#pragma unroll
                for (uint j = run * kRun / kPerWord; j < (run + 1) * kRun / kPerWord; ++j) {
#pragma unroll
                    for (uint i = 0; i < kPerWord / 2; ++i) {
                        const float2 v = Format::pair(words.w[j], i);
                        dot += v.x * in.x[m][j * kPerWord + i];
                        dot += v.y * in.x[m][j * kPerWord + i + kPerWord / 2];
                    }
                }
                total[m] += group.scale * dot;
                if (Q::kAffine) total[m] += group.offset() * in.sum[m][run];
            }
        }
    }
};
