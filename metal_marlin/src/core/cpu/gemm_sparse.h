#pragma once
#if defined(__METAL_MARLIN_CPU__) && METAL_MARLIN_LANES == 1
// 16 rows a vector: a weight is whichever of its group's kept ones stands there.
template <typename Q, uint kKept, uint kOf, typename T> struct PanelDecoder<Sparse<Q, kKept, kOf>, T> {
    typedef SparseRun<Sparse<Q, kKept, kOf>> Run;
    WideCodes<typename Q::Format> values;

    void decode(thread const GemmArguments<Sparse<Q, kKept, kOf>, T>& a, uint row, uint first, uint, uint k0,
                uint depth, thread Panel& panel) const {
        for (uint v = 0; v < Panel::kVectors; ++v) {
            typename Q::Row rows[16];
            for (uint r = 0; r < 16; ++r) rows[r] = a.row_of(0, row + first + 16 * v + r);
            WideGroups<Q> g;
            uint group = ~0u;
            for (uint k = 0; k < depth; k += Run::kLength) {
                uint codes[16], places[16];
                for (uint r = 0; r < 16; ++r) {
                    const uint n = row + first + 16 * v + r;
                    const Run run = Run::load(a.codes_of(0, n), a.places_of(n), k0 + k);
                    codes[r] = run.codes, places[r] = run.places;
                }
                const uint now = a.group(k0 + k);
                if (now != group) g = WideGroups<Q>::of(rows, group = now);
                expand(wide_load<WideBits>(codes), wide_load<WideBits>(places), g, k, v, panel);
            }
        }
    }

    void expand(WideBits codes, WideBits places, thread const WideGroups<Q>& g, uint k, uint v,
                thread Panel& panel) const {
#pragma unroll
        for (uint i = 0; i < Run::kLength; i += kOf) {
            Wide kept[kKept];
            WideBits place[kKept];
#pragma unroll
            for (uint j = 0; j < kKept; ++j) {
                const uint code = i / kOf * kKept + j;
                kept[j] = g.weights(values.of(codes, code));
                place[j] = (places >> (Run::kBits * code)) & (kOf - 1);
            }
#pragma unroll
            for (uint p = 0; p < kOf; ++p) {
                Wide w = 0;
#pragma unroll
                for (uint j = 0; j < kKept; ++j) w = place[j] == p ? kept[j] : w;
                wide_store(&panel.w[k + i + p][16 * v], w);
            }
        }
    }
};
#endif
