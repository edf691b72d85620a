#pragma once
// The tile pipeline. A threadgroup makes kBM x kBN of y; in every step along K its threads read kBK of each row of W and
// x into registers while simdgroups multiply what is in threadgroup memory, then decode and store it for the next step.

// What a thread reads of W in a step and decodes: a run of kWeights weights within one row.
template <typename W, uint kWeights> struct TileRun {
    typedef typename W::Format Format;
    typedef CodeWords<Format> Memory;
    enum : uint {
        kPerWord = Format::kPerWord,
        kWords = kWeights / kPerWord,
        kRun = kWeights < 16 ? kWeights : 16 // of weights with one scale
    };
    static_assert(kWords >= 1 && kWeights % kRun == 0, "TileRun: words of codes");
    uint words[kWords];
    typename W::Group groups[kWeights / kRun];

    template <typename Arguments> void fetch(thread const Arguments& a, uint matrix, uint n, uint k) {
        fetch_words(a.codes_of(matrix, n), k, a.K, a.aligned);
        const typename W::Row of = a.row_of(matrix, n);
#pragma unroll
        for (uint i = 0; i < kWeights / kRun; ++i) groups[i] = of.group(a.group(k + i * kRun));
    }

    template <typename T> void put(threadgroup T* to) const {
#pragma unroll
        for (uint j = 0; j < kWords; ++j) {
            T w[kPerWord];
#pragma unroll
            for (uint i = 0; i < kPerWord / 2; ++i) {
                const float2 v = Format::pair(words[j], i);
                w[i] = T(groups[j * kPerWord / kRun].weight(v.x));
                w[i + kPerWord / 2] = T(groups[j * kPerWord / kRun].weight(v.y));
            }
#pragma unroll
            for (uint i = 0; i < kPerWord; i += 4) {
                *(threadgroup vec<T, 4>*)(to + j * kPerWord + i) =
                    vec<T, 4>(w[i], w[i + 1], w[i + 2], w[i + 3]);
            }
        }
    }

private:
    // Words of codes of W from weight k of a row on; 0 behind the end.
    void fetch_words(device const uint* row, uint k, uint K, bool aligned) {
        const uint first = k / kPerWord;
        device const uint* from = row + first;
        if (Memory::kSize != 32) {
#pragma unroll
            for (uint j = 0; j < kWords; ++j)
                words[j] = k + j * kPerWord < K ? Memory::at(row, first + j) : 0;
        } else if (aligned && kWords % 4 == 0) {
#pragma unroll
            for (uint j = 0; j < kWords; j += 4) {
                const uint4 v = k + j * kPerWord < K ? *(device const uint4*)(from + j) : uint4(0);
#pragma unroll
                for (uint i = 0; i < 4 && i < kWords; ++i) words[j + i] = v[i];
            }
        } else if (aligned && kWords % 2 == 0) {
#pragma unroll
            for (uint j = 0; j < kWords; j += 2) {
                const uint2 v = k + j * kPerWord < K ? *(device const uint2*)(from + j) : uint2(0);
#pragma unroll
                for (uint i = 0; i < 2 && i < kWords; ++i) words[j + i] = v[i];
            }
        } else {
#pragma unroll
            for (uint j = 0; j < kWords; ++j) words[j] = k + j * kPerWord < K ? from[j] : 0;
        }
    }
};

template <typename W, typename T, typename Schedule, typename Epilogue> struct TileGemm {
    typedef TileMath<T> Math;
    typedef typename Schedule::template Size<T> Size;
    typedef MatrixRows<W::kMatrices> Place;
    enum : uint {
        kBN = Size::kBN,
        kBM = Size::kBM,
        kBK = Size::kBK,
        kRows = kBN / Size::kWN, // of a simdgroup
        kTokens = kBM / Size::kWM,
        kOutputs = kBN / W::kMatrices,
        kStride = kBK + Size::kPad,
        kSimdgroups = Size::kWN * Size::kWM,
        kThreads = kSimdgroups * kSimdWidth,
        kWeights = kBN * kBK / kThreads, // of a thread and step
        kPer16 = 16 / sizeof(T),
        kChunks = kBM * kBK / kThreads / kPer16 // of x, 16 bytes each
    };
    static_assert(kBK % kWeights == 0, "TileGemm: a thread's share of W");
    static_assert(kChunks >= 1 && kBK % kPer16 == 0 && kBK % Math::kStep == 0,
                  "TileGemm: a thread's share of x");

    struct alignas(16) Shared {
        T w[Schedule::kStages][kBN * kStride];
        T x[Schedule::kStages][kBM * kStride];
        float scratch[kSimdgroups][Math::kScratch];
    };
    // A thread's share of a step.
    struct Fetched {
        TileRun<W, kWeights> weights;
        uint4 x[kChunks];
    };
    struct Sink {
        device T* y;
        uint N, M, n, m; // of y; of the simdgroup's first output
        Epilogue epilogue;
        float join(float a, float b) const { return W::join(a, b); }
        void operator()(uint row, uint column, float sum) const {
            const uint to = n + row, token = m + column;
            if (to < N && token < M) y[ulong(token) * N + to] = T(epilogue.apply(sum, token, to));
        }
    };

    static uint bits(device const float* x) { return as_type<uint>(x[0]); }
    template <typename H> static uint bits(device const H* x) {
        return uint(as_type<ushort>(x[0])) | uint(as_type<ushort>(x[1])) << 16;
    }

    static uint4 fetch_x(thread const GemmArguments<W, T>& a, uint token, uint k) {
        device const T* from = a.x + ulong(min(token, a.M - 1)) * a.K + k;
        uint4 v = 0;
        if (a.aligned) {
            if (k < a.K) v = *(device const uint4*)from;
        } else {
#pragma unroll
            for (uint i = 0; i < 4; ++i) { // K is even
                if (k + i * kPer16 / 4 < a.K) v[i] = bits(from + i * kPer16 / 4);
            }
        }
        return v;
    }

    static void fetch(thread const GemmArguments<W, T>& a, GemmPlace at, uint tid, uint k0,
                      thread Fetched& f) {
        const uint row = tid / (kBK / kWeights), k = k0 + tid % (kBK / kWeights) * kWeights;
        const uint matrix = Place::matrix(row, 8), n = at.tgid.x * kOutputs + Place::row(row, 8);
        f.weights.fetch(a, matrix, n, k);
#pragma unroll
        for (uint i = 0; i < kChunks; ++i) {
            const uint chunk = tid + i * kThreads;
            f.x[i] =
                fetch_x(a, at.tgid.y * kBM + chunk / (kBK / kPer16), k0 + chunk % (kBK / kPer16) * kPer16);
        }
    }

    static void put(thread const Fetched& f, uint tid, threadgroup T* ws, threadgroup T* xs) {
        f.weights.put(ws + tid / (kBK / kWeights) * kStride + tid % (kBK / kWeights) * kWeights);
#pragma unroll
        for (uint i = 0; i < kChunks; ++i) {
            const uint chunk = tid + i * kThreads;
            threadgroup T* place = xs + chunk / (kBK / kPer16) * kStride + chunk % (kBK / kPer16) * kPer16;
            *(threadgroup uint4*)place = f.x[i];
        }
    }

    typedef typename Math::template Sums<kRows, kTokens> Sums;

    static void multiply(threadgroup const T* ws, threadgroup const T* xs, uint lane, thread Sums& sums) {
#pragma unroll
        for (uint k = 0; k < kBK; k += Math::kStep) {
            typename Math::template Left<kRows> left;
            typename Math::template Right<kTokens> right;
            Math::load(left, ws + k, kStride, lane);
            Math::load(right, xs + k, kStride, lane);
            Math::multiply(sums, left, right);
        }
    }

    static void run(GemmArguments<W, T> a, GemmPlace at, threadgroup Shared& sh, Epilogue epilogue) {
        const uint tid = at.sgid * kSimdWidth + at.lane;
        const uint row = at.sgid / Size::kWM * kRows, token = at.sgid % Size::kWM * kTokens;
        Sums sums;
        Math::clear(sums);
        Fetched f;
        fetch(a, at, tid, 0, f);
        put(f, tid, sh.w[0], sh.x[0]);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        uint stage = 0;
        for (uint k = 0; k < a.K; k += kBK) {
            const bool more = k + kBK < a.K;
            const uint next = (stage + 1) % Schedule::kStages;
            if (more) fetch(a, at, tid, k + kBK, f);
            multiply(sh.w[stage] + row * kStride, sh.x[stage] + token * kStride, at.lane, sums);
            if (next == stage) threadgroup_barrier(mem_flags::mem_threadgroup);
            if (more) put(f, tid, sh.w[next], sh.x[next]);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            stage = next;
        }
        const Sink sink = {
            a.y, a.N, a.M, at.tgid.x * kOutputs + row / W::kMatrices, at.tgid.y * kBM + token, epilogue};
        Place::template outputs<Math>(sums, sh.scratch[at.sgid], at.lane, sink);
    }
};
