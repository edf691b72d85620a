#pragma once
// The fused pipeline: weights of four bits go from device memory to registers and are decoded as the matrix instruction's
// left operand, so threadgroup memory holds x alone. A simdgroup takes kRows / 4 rows of W and all kTokens tokens, hence each
// weight is decoded once. A lane's pair of neighbouring columns of every eight is codes i and i + 4 of the eight, which
// decode together; x is stored in that order (to a dot product it does not matter, as long as both operands have the same).

// 32 weights of a row, as a lane has them; pair(): two of eight, neighbours where kNeighbours says so, else i and i + 4.
template <typename W> struct FusedRow {
    typedef typename W::Format Format;
    static_assert(Format::kPerWord == 8 && Format::kBits == 4, "FusedRow: four bits");
    enum : bool { kNeighbours = false };
    uint4 words;

    template <typename Arguments> void fetch(thread const Arguments& a, uint matrix, uint n, uint k) {
        device const uint* from = a.codes_of(matrix, n) + k / 8;
        words = 0;
        if (a.aligned) {
            if (k < a.K) words = *(device const uint4*)from;
        } else {
#pragma unroll
            for (uint i = 0; i < 4; ++i) {
                if (k + 8 * i < a.K) words[i] = from[i];
            }
        }
    }
    float2 pair(uint eight, uint i, typename W::Group group) const {
        const float2 v = Format::pair(words[eight], i);
        return float2(group.weight(v.x), group.weight(v.y));
    }
};

template <typename W, typename T, typename Schedule, typename Epilogue> struct FusedGemm {
    typedef TileMath<T> Math;
    typedef TileGemm<W, T, Schedule, Epilogue> Plain;
    typedef GemmArguments<W, T> Arguments;
    typedef MatrixRows<W::kMatrices> Place;
    enum : uint {
        kSimdgroups = 4,
        kMostTokens = Schedule::kTokens,
        kThreads = kSimdgroups * kSimdWidth,
        kBN = Schedule::kRows,
        kBM = Schedule::kTokens,
        kBK = 32, // 16 bytes of codes
        kRows = kBN / kSimdgroups,
        kEights = kRows / 8, // rows of a lane
        kStride = kBK + 16 / sizeof(T),
        kChunks = kBM * kBK * sizeof(T) / 16 / kThreads
    };
    static_assert(sizeof(T) == 2 && kChunks >= 1, "FusedGemm: half and bfloat, 16 bytes of x a thread");
    struct alignas(16) Shared {
        T x[2][kBM * kStride];
        float scratch[kSimdgroups][Math::kScratch];
    };
    struct Fetched {
        FusedRow<W> rows[kEights];
        typename W::Group groups[kEights][2]; // of 16 weights
        uint4 x[kChunks];
    };
    typedef typename Math::template Sums<kRows, kBM> Sums;

    static void fetch(thread const Arguments& a, GemmPlace at, uint k, thread Fetched& f) {
        const uint first = at.sgid * kRows + Math::row_of(at.lane);
#pragma unroll
        for (uint j = 0; j < kEights; ++j) {
            const uint matrix = Place::matrix(first + 8 * j, 8);
            const uint n = at.tgid.x * (kBN / W::kMatrices) + Place::row(first + 8 * j, 8);
            f.rows[j].fetch(a, matrix, n, k);
            const typename W::Row of = a.row_of(matrix, n);
#pragma unroll
            for (uint i = 0; i < 2; ++i) f.groups[j][i] = of.group(a.group(k + 16 * i));
        }
#pragma unroll
        for (uint i = 0; i < kChunks; ++i) {
            const uint chunk = at.sgid * kSimdWidth + at.lane + i * kThreads;
            f.x[i] = Plain::fetch_x(a, at.tgid.y * kBM + chunk / 4, k + chunk % 4 * 8);
        }
    }

    template <typename Input>
    static void put(thread const Fetched& f, GemmPlace at, uint k, threadgroup T* xs, Input input) {
#pragma unroll
        for (uint i = 0; i < kChunks; ++i) {
            const uint chunk = at.sgid * kSimdWidth + at.lane + i * kThreads;
            const uint4 x = input.eight(f.x[i], at.tgid.y * kBM + chunk / 4, k + chunk % 4 * 8);
            threadgroup T* to = xs + chunk / 4 * kStride + chunk % 4 * 8;
            if (FusedRow<W>::kNeighbours) {
                *(threadgroup uint4*)to = x;
                continue;
            }
            const uint2 low = x.xy, high = x.zw; // numbers 0 ... 3 and 4 ... 7
            const uint2 even = (low & 0xffffu) | (high << 16), odd = (low >> 16) | (high & 0xffff0000u);
            *(threadgroup uint4*)to = uint4(even.x, odd.x, even.y, odd.y);
        }
    }

    static void multiply(thread const Fetched& f, threadgroup const T* xs, uint lane, thread Sums& sums) {
        enum : uint { kWords = Math::kStep / 8 };
        const uint pair = Math::pair_of(lane);
#pragma unroll
        for (uint word = 0; word < 4; word += kWords) {
            typename Math::template Left<kRows> left;
            typename Math::template Right<kBM> right;
#pragma unroll
            for (uint j = 0; j < kEights; ++j) {
#pragma unroll
                for (uint e = 0; e < kWords; ++e) {
                    const float2 w = f.rows[j].pair(word + e, pair, f.groups[j][(word + e) / 2]);
                    Math::put(left, j, e, T(w.x), T(w.y));
                }
            }
            Math::load(right, xs + word * 8, kStride, lane);
            Math::multiply(sums, left, right);
        }
    }

    template <typename Input = PlainInput>
    static void run(Arguments a, GemmPlace at, threadgroup Shared& sh, Epilogue epilogue,
                    Input input = Input()) {
        Sums sums;
        Math::clear(sums);
        Fetched now;
        fetch(a, at, 0, now);
        put(now, at, 0, sh.x[0], input);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        uint stage = 0;
        for (uint k = 0; k < a.K; k += kBK) {
            const bool more = k + kBK < a.K;
            Fetched next = now;
            if (more) fetch(a, at, k + kBK, next);
            multiply(now, sh.x[stage], at.lane, sums);
            stage ^= 1;
            if (more) put(next, at, k + kBK, sh.x[stage], input);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            now = next;
        }
        const typename Plain::Sink sink = {
            a.y, a.N, a.M, (at.tgid.x * kBN + at.sgid * kRows) / W::kMatrices, at.tgid.y * kBM, epilogue};
        Place::template outputs<Math>(sums, sh.scratch[at.sgid], at.lane, sink);
    }
};
