#pragma once
// n:m sparse weights: of every kOf weights along K, kKept are stored; the others are 0. Sparse<Q, kKept, kOf> is Q with
//
//   codes   those of the kept weights alone, in their order
//   places  uint [N, ceil(K / 32 * bits)]: for each of them where it stands among its kOf, in ascending order, of as many
//           bits as that needs (2 of 4 weights, 3 of 8), the first in the lowest ones
// Scales, zeros and biases are of groups of all weights. Formats of four bits. Twin of metal_marlin/formats/sparse.py.
#include "formats/quantized.h"

template <typename Q, uint kKept_, uint kOf_> struct Sparse : Q {
    static_assert(Q::Format::kBits == 4 && (kOf_ == 4 || kOf_ == 8), "Sparse: four bits, of 4 or 8");
    typedef Q Whole;
    enum : uint { kKept = kKept_, kOf = kOf_ };
};

// 16 weights of a row, from a multiple of 16 on.
template <typename W> struct SparseRun {
    typedef typename W::Format Format;
    enum : uint {
        kLength = 16,
        kOf = W::kOf,
        kKept = W::kKept,
        kCodes = kLength * kKept / kOf,
        kBits = kOf == 4 ? 2 : 3, // of a place
        kPlaces = kCodes * kBits
    };
    uint codes, places; // what lies above them is another run's

    // Words of codes and of places of a row.
    static uint code_words(uint K) { return K / kLength * kCodes / 8; }
    static uint place_words(uint K) { return (K / kLength * kPlaces + 31) / 32; }

    static SparseRun load(device const uint* codes, device const uint* places, uint k) {
        const uint code = k / kLength * kCodes, bit = k / kLength * kPlaces;
        SparseRun run;
        run.codes = codes[code / 8] >> (code % 8 * 4);
        run.places = places[bit / 32] >> (bit % 32);
        if (bit % 32 + kPlaces > 32) run.places |= places[bit / 32 + 1] << (32 - bit % 32);
        return run;
    }

    float kept(uint i) const { return Format::value((codes >> (4 * i)) & 15); }
    uint place(uint i) const { return (places >> (kBits * i)) & (kOf - 1); }

    // Weights i and i + 1 of the run, i even.
    float2 two(uint i, typename W::Group group) const {
        float2 w = 0;
        const uint first = i / kOf * kKept, at = i % kOf;
#pragma unroll
        for (uint j = 0; j < kKept; ++j) {
            const float v = group.weight(kept(first + j));
            const uint p = place(first + j);
            w.x = p == at ? v : w.x;
            w.y = p == at + 1 ? v : w.y;
        }
        return w;
    }
};
