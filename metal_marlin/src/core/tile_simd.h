#pragma once
// TileMath by 8 x 8 simdgroup matrices, for Apple GPUs and wherever they are emulated.
#include <metal_simdgroup_matrix>
using namespace metal;

template <typename T> struct SimdTileMath {
    enum : uint { kStep = 8, kScratch = 64 };
    template <uint R> struct Left {
        simdgroup_matrix<T, 8, 8> m[R / 8];
    };
    template <uint C> struct Right {
        simdgroup_matrix<T, 8, 8> m[C / 8];
    };
    template <uint R, uint C> struct Sums {
        simdgroup_matrix<float, 8, 8> m[R / 8][C / 8];
    };

    template <uint R> static void load(thread Left<R>& tile, threadgroup const T* from, uint stride, uint) {
#pragma unroll
        for (uint r = 0; r < R / 8; ++r) simdgroup_load(tile.m[r], from + 8 * r * stride, stride);
    }
    template <uint C> static void load(thread Right<C>& tile, threadgroup const T* from, uint stride, uint) {
#pragma unroll
        for (uint c = 0; c < C / 8; ++c) {
            simdgroup_load(tile.m[c], from + 8 * c * stride, stride, ulong2(0), true);
        }
    }

    // The lane's row of every eight, which of the row's four pairs of columns it has, and that pair of eight rows j.
    static uint row_of(uint lane) { return (lane & 16) >> 2 | (lane >> 1 & 3); }
    static uint pair_of(uint lane) { return (lane & 8) >> 2 | (lane & 1); }
    template <uint R> static void put(thread Left<R>& tile, uint j, uint, T a, T b) {
        tile.m[j].thread_elements()[0] = a;
        tile.m[j].thread_elements()[1] = b;
    }

    template <uint R, uint C> static void clear(thread Sums<R, C>& sums) {
#pragma unroll
        for (uint r = 0; r < R / 8; ++r) {
#pragma unroll
            for (uint c = 0; c < C / 8; ++c) sums.m[r][c] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        }
    }
    template <uint R, uint C>
    static void multiply(thread Sums<R, C>& sums, thread const Left<R>& left, thread const Right<C>& right) {
#pragma unroll
        for (uint r = 0; r < R / 8; ++r) {
#pragma unroll
            for (uint c = 0; c < C / 8; ++c) {
                simdgroup_multiply_accumulate(sums.m[r][c], left.m[r], right.m[c], sums.m[r][c]);
            }
        }
    }

    // Sums of the first eight of every 16 rows and of those 8 further become one; rows are counted by outputs.
    template <uint R, uint C, typename Sink>
    static void each_joined(thread const Sums<R, C>& sums, threadgroup float* scratch, uint lane, Sink sink) {
        Sums<R / 2, C> joined;
#pragma unroll
        for (uint r = 0; r < R / 16; ++r) {
#pragma unroll
            for (uint c = 0; c < C / 8; ++c) {
                simdgroup_matrix<float, 8, 8> first = sums.m[2 * r][c], second = sums.m[2 * r + 1][c];
#pragma unroll
                for (uint i = 0; i < 2; ++i) {
                    first.thread_elements()[i] =
                        sink.join(first.thread_elements()[i], second.thread_elements()[i]);
                }
                joined.m[r][c] = first;
            }
        }
        each(joined, scratch, lane, sink);
    }

    // Through memory, where every lane may look for itself: which lane holds what is nowhere promised.
    template <uint R, uint C, typename Sink>
    static void each(thread const Sums<R, C>& sums, threadgroup float* scratch, uint lane, Sink sink) {
#pragma unroll
        for (uint r = 0; r < R / 8; ++r) {
#pragma unroll
            for (uint c = 0; c < C / 8; ++c) {
                simdgroup_store(sums.m[r][c], scratch, 8, ulong2(0), true);
                simdgroup_barrier(mem_flags::mem_threadgroup);
                for (uint i = lane; i < 64; i += kSimdWidth) sink(8 * r + i % 8, 8 * c + i / 8, scratch[i]);
                simdgroup_barrier(mem_flags::mem_threadgroup);
            }
        }
    }
};

// Two stages of both operands are 20 KB.
template <typename T> struct SimdTileSize {
    enum : uint {
        kBN = 64,
        kBM = 64,
        kBK = sizeof(T) == 4 ? 16 : 32,
        kWN = 2,
        kWM = 2,
        kPad = 16 / sizeof(T)
    };
};
