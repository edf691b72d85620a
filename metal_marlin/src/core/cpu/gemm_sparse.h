#pragma once
#if defined(__METAL_MARLIN_CPU__) && METAL_MARLIN_LANES == 1
// Row by row: each has places of its own.
template <typename Q, uint kKept, uint kOf, typename T> struct PanelDecoder<Sparse<Q, kKept, kOf>, T> {
    typedef SparseRun<Sparse<Q, kKept, kOf>> Run;

    void decode(thread const GemmArguments<Sparse<Q, kKept, kOf>, T>& a, uint row, uint first, uint, uint k0,
                uint depth, thread Panel& panel) const {
        for (uint r = 0; r < Panel::kRows; ++r) {
            const uint n = row + first + r;
            const typename Q::Row of = a.row_of(0, n);
            for (uint k = 0; k < depth; k += Run::kLength) {
                const Run run = Run::load(a.codes_of(0, n), a.places_of(n), k0 + k);
                const typename Q::Group group = of.group(a.group(k0 + k));
                for (uint i = 0; i < Run::kLength; ++i) panel.w[k + i][r] = 0;
                for (uint i = 0; i < Run::kCodes; ++i)
                    panel.w[k + i / kKept * kOf + run.place(i)][r] = group.weight(run.kept(i));
            }
        }
    }
};
#endif
