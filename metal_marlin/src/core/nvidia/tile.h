#pragma once
#ifdef __METAL_MARLIN_CUDA__

// mma.sync m16n8k16. Operands come by ldmatrix, four 8 x 8 matrices at a time. Rows of threadgroup memory whose
// distance is an odd multiple of 16 bytes lie in different banks.
template <typename T> struct MmaTileMath {
    enum : uint { kStep = 16, kScratch = 1 };
    template <uint R> struct Left {
        uint v[R / 16][4]; // rows 0, 8, 0, 8 and k 0, 0, 8, 8 further
    };
    template <uint C> struct Right {
        uint v[C / 8][2]; // k 0, 8 further
    };
    template <uint R, uint C> struct Sums {
        float v[R / 16][C / 8][4]; // lane = 4 * row + column / 2, then rows 8 further
    };

    static void fragments(threadgroup const T* row, thread uint& a, thread uint& b, thread uint& c,
                          thread uint& d) {
        __asm__ volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                         : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
                         : "r"((uint)(ulong)row)
                         : "memory");
    }
    template <uint R>
    static void load(thread Left<R>& tile, threadgroup const T* from, uint stride, uint lane) {
        threadgroup const T* row = from + lane % 16 * stride + lane / 16 * 8;
#pragma unroll
        for (uint r = 0; r < R / 16; ++r) {
            fragments(row + 16 * r * stride, tile.v[r][0], tile.v[r][1], tile.v[r][2], tile.v[r][3]);
        }
    }
    template <uint C>
    static void load(thread Right<C>& tile, threadgroup const T* from, uint stride, uint lane) {
        static_assert(C % 16 == 0, "Right: two matrices at a time");
        threadgroup const T* row = from + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8;
#pragma unroll
        for (uint c = 0; c < C / 8; c += 2) {
            fragments(row + 8 * c * stride, tile.v[c][0], tile.v[c][1], tile.v[c + 1][0], tile.v[c + 1][1]);
        }
    }

    // The lane's row of every eight, which of the row's four pairs of columns it has, and that pair of eight rows j and
    // eight columns e.
    static uint row_of(uint lane) { return lane / 4; }
    static uint pair_of(uint lane) { return lane % 4; }
    template <uint R> static void put(thread Left<R>& tile, uint j, uint e, T a, T b) {
        tile.v[j / 2][j % 2 + 2 * e] = uint(as_type<ushort>(a)) | uint(as_type<ushort>(b)) << 16;
    }

    template <uint R, uint C> static void clear(thread Sums<R, C>& sums) {
#pragma unroll
        for (uint r = 0; r < R / 16; ++r) {
#pragma unroll
            for (uint c = 0; c < C / 8; ++c) {
#pragma unroll
                for (uint i = 0; i < 4; ++i) sums.v[r][c][i] = 0;
            }
        }
    }

    static void mma(thread float (&d)[4], thread const uint (&a)[4], thread const uint (&b)[2], half) {
        __asm__("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                "{%0,%1,%2,%3};"
                : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
    static void mma(thread float (&d)[4], thread const uint (&a)[4], thread const uint (&b)[2], bfloat) {
        __asm__("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                "{%0,%1,%2,%3};"
                : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
    template <uint R, uint C>
    static void multiply(thread Sums<R, C>& sums, thread const Left<R>& left, thread const Right<C>& right) {
#pragma unroll
        for (uint r = 0; r < R / 16; ++r) {
#pragma unroll
            for (uint c = 0; c < C / 8; ++c) mma(sums.v[r][c], left.v[r], right.v[c], T(0));
        }
    }

    template <uint R, uint C, typename Sink>
    static void each(thread const Sums<R, C>& sums, threadgroup float*, uint lane, Sink sink) {
        const uint row = lane / 4, column = lane % 4 * 2;
#pragma unroll
        for (uint r = 0; r < R / 16; ++r) {
#pragma unroll
            for (uint c = 0; c < C / 8; ++c) {
#pragma unroll
                for (uint i = 0; i < 4; ++i) {
                    sink(16 * r + row + i / 2 * 8, 8 * c + column + i % 2, sums.v[r][c][i]);
                }
            }
        }
    }
    template <uint R, uint C, typename Sink>
    static void each_joined(thread const Sums<R, C>& sums, threadgroup float*, uint lane, Sink sink) {
        const uint row = lane / 4, column = lane % 4 * 2;
#pragma unroll
        for (uint r = 0; r < R / 16; ++r) {
#pragma unroll
            for (uint c = 0; c < C / 8; ++c) {
#pragma unroll
                for (uint i = 0; i < 2; ++i) {
                    sink(8 * r + row, 8 * c + column + i, sink.join(sums.v[r][c][i], sums.v[r][c][i + 2]));
                }
            }
        }
    }
};

// float: no matrix instruction keeps its precision. A lane has rows lane / 4 + 8 * i and columns lane % 4 + 4 * j.
template <> struct MmaTileMath<float> {
    enum : uint { kStep = 4, kScratch = 1 };
    template <uint R> struct Left {
        float4 v[R / 8];
    };
    template <uint C> struct Right {
        float4 v[C / 4];
    };
    template <uint R, uint C> struct Sums {
        float v[R / 8][C / 4];
    };

    template <uint R>
    static void load(thread Left<R>& tile, threadgroup const float* from, uint stride, uint lane) {
#pragma unroll
        for (uint i = 0; i < R / 8; ++i) {
            tile.v[i] = *(threadgroup const float4*)(from + (lane / 4 + 8 * i) * stride);
        }
    }
    template <uint C>
    static void load(thread Right<C>& tile, threadgroup const float* from, uint stride, uint lane) {
#pragma unroll
        for (uint j = 0; j < C / 4; ++j) {
            tile.v[j] = *(threadgroup const float4*)(from + (lane % 4 + 4 * j) * stride);
        }
    }
    template <uint R, uint C> static void clear(thread Sums<R, C>& sums) {
#pragma unroll
        for (uint i = 0; i < R / 8; ++i) {
#pragma unroll
            for (uint j = 0; j < C / 4; ++j) sums.v[i][j] = 0;
        }
    }
    template <uint R, uint C>
    static void multiply(thread Sums<R, C>& sums, thread const Left<R>& left, thread const Right<C>& right) {
#pragma unroll
        for (uint k = 0; k < kStep; ++k) {
#pragma unroll
            for (uint i = 0; i < R / 8; ++i) {
#pragma unroll
                for (uint j = 0; j < C / 4; ++j)
                    sums.v[i][j] = fma(left.v[i][k], right.v[j][k], sums.v[i][j]);
            }
        }
    }
    template <uint R, uint C, typename Sink>
    static void each(thread const Sums<R, C>& sums, threadgroup float*, uint lane, Sink sink) {
#pragma unroll
        for (uint i = 0; i < R / 8; ++i) {
#pragma unroll
            for (uint j = 0; j < C / 4; ++j) sink(lane / 4 + 8 * i, lane % 4 + 4 * j, sums.v[i][j]);
        }
    }
};

template <typename T> using TileMath = MmaTileMath<T>;

// Two stages of both operands are 36 KB: six threadgroups share a multiprocessor of the larger GPUs.
template <typename T> struct TileSize {
    enum : uint { kBN = 64, kBM = 64, kBK = 128 / sizeof(T), kWN = 2, kWM = 2, kPad = 16 / sizeof(T) };
};
#endif
