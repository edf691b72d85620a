#pragma once
// What a simdgroup multiplies: sums[R, C] += left[R, kStep] * right[C, kStep]^T, both row-major in threadgroup memory,
// k contiguous. Only the device's tile.h knows which lane holds what.
//
//   TileMath<T>          T: half, bfloat or float; sums are float
//     kStep              how many k a multiply takes
//     kScratch           floats of threadgroup memory a simdgroup needs for each()
//     Left<R>, Right<C>  operands; load(tile, from, stride, lane)
//     put(left, j, e, a, b)  a lane's part of it, for half and bfloat: columns 2 * pair_of(lane) and the next of eight
//                        columns e, row row_of(lane) of eight rows j
//     Sums<R, C>         clear(sums); multiply(sums, left, right); each(sums, scratch, lane, sink) calls
//                        sink(row, column, value) once for every sum; each_joined(...), for half and bfloat, once
//                        for every two of rows 8 apart, with sink.join(first, second), and rows 8 r ... are rows
//                        16 r ... and 16 r + 8 ...
//   TileSize<T>          tile of a threadgroup: kBN rows of the left operand, kBM of the right one, kBK deep;
//                        simdgroups kWN x kWM; kPad elements behind every row of threadgroup memory
#include <metal_stdlib>
#include "core/constants.h"
#include "core/tile_simd.h"

#include "core/apple/tile.h"
#include "core/cpu/tile.h"
#include "core/nvidia/tile.h"
