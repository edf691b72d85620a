#pragma once
// Where the codes of a row lie: code k in its bits k * kBits ... (k + 1) * kBits - 1. Formats decode words of kPerWord
// codes: eight, of eight bits four. Of four and eight bits those are the words of memory; of two and three bits they are
// 16 and 24 bits that begin anywhere in one, and what lies above them in a word of codes is not theirs.
#include <metal_stdlib>
using namespace metal;

template <typename Format> struct CodeWords {
    enum : uint {
        kPerWord = Format::kPerWord,
        kSize = kPerWord * Format::kBits, // bits of a word of codes
        kUnit = kSize == 32 ? 1
        : kSize == 16       ? 2
                            : 4, // of them fill kStored words of memory
        kStored = kUnit * kSize / 32
    };

    // Words of memory before code k of a row, which starts a unit.
    static uint stored(uint k) { return k / (kPerWord * kUnit) * kStored; }

    // Word j of a row.
    static uint at(device const uint* row, uint j) {
        device const uint* from = row + ulong(j / kUnit) * kStored;
        const uint bit = j % kUnit * kSize;
        return bit % 32 + kSize > 32 ? joined(from[bit / 32], from[bit / 32 + 1], bit % 32)
                                     : from[bit / 32] >> (bit % 32);
    }

    // Word j of those that kCount words of memory hold from the start of a unit.
    template <uint kCount> static uint of(thread const uint (&words)[kCount], uint j) {
        const uint bit = j * kSize;
        return bit % 32 + kSize > 32 ? joined(words[bit / 32], words[bit / 32 + 1], bit % 32)
                                     : words[bit / 32] >> (bit % 32);
    }

private:
    static uint joined(uint low, uint high, uint shift) { return low >> shift | high << (32 - shift); }
};
