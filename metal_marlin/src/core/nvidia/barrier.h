#pragma once
// Barriers in threadgroup memory that threads arrive at and copies of the tensor copy unit complete, and that unit's copy
// (PTX ISA: mbarrier, cp.async.bulk.tensor; sm_90). A phase completes when `arrivals` have arrived and, where bytes are
// expected, those have been copied; phases alternate between parity 0 and 1.
#ifdef __METAL_MARLIN_CUDA__
struct PhaseBarrier {
    static void start(uint at, uint arrivals) {
        __asm__ volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(at), "r"(arrivals) : "memory");
    }
    // What was started becomes visible to the copy unit.
    static void publish() { __asm__ volatile("fence.mbarrier_init.release.cluster;" : : : "memory"); }
    static void arrive(uint at) {
        __asm__ volatile("{ .reg .b64 t; mbarrier.arrive.shared::cta.b64 t, [%0]; }" : : "r"(at) : "memory");
    }
    // And that so many bytes will have been copied.
    static void expect(uint at, uint bytes) {
        __asm__ volatile("{ .reg .b64 t; mbarrier.arrive.expect_tx.shared::cta.b64 t, [%0], %1; }"
                         :
                         : "r"(at), "r"(bytes)
                         : "memory");
    }
    static void wait(uint at, uint parity) {
        uint done;
        do {
            __asm__ volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; "
                             "selp.u32 %0, 1, 0, p; }"
                             : "=r"(done)
                             : "r"(at), "r"(parity)
                             : "memory");
        } while (done == 0);
    }
};

// A box of a matrix, as a descriptor made by the host says (runtime/tensor_map.py), to threadgroup memory; zeros where
// the matrix ends. A simdgroup calls, one of its threads copies; the barrier expects that arrival and the bytes.
static inline void copy_box(uint to, ulong map, uint column, uint row, uint barrier, uint bytes) {
    __asm__ volatile("{ .reg .pred p; .reg .b64 t; elect.sync _|p, 0xffffffff; "
                     "@p mbarrier.arrive.expect_tx.shared::cta.b64 t, [%4], %5; "
                     "@p cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                     "[%0], [%1, {%2, %3}], [%4]; }"
                     :
                     : "r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier), "r"(bytes)
                     : "memory");
}

// One thread of the simdgroup, the same each time: the compiler of PTX knows then that one thread copies.
static inline bool elect_one() {
    uint chosen;
    __asm__ volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.b32 %0, 1, 0, p; }" : "=r"(chosen));
    return chosen != 0;
}
// Of three dimensions, by the calling thread alone; the barrier expects the bytes already.
static inline void copy_box3(uint to, ulong map, uint c0, uint c1, uint c2, uint barrier) {
    __asm__ volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
                     "[%0], [%1, {%2, %3, %4}], [%5];"
                     :
                     : "r"(to), "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(barrier)
                     : "memory");
}

// A launch may start while the one before it still runs (runtime/device_cuda.py); what that one wrote is there after wait().
struct LaunchOrder {
    static void wait() { __asm__ volatile("griddepcontrol.wait;" : : : "memory"); }
    static void let_next_start() { __asm__ volatile("griddepcontrol.launch_dependents;" : : : "memory"); }
};

// Registers of a thread, changed for all of four simdgroups.
struct Registers {
    template <uint kCount> static void take() {
        __asm__ volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(kCount));
    }
    template <uint kCount> static void give() {
        __asm__ volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(kCount));
    }
};

// Address of the descriptor: the entry's parameter of that number, of which the compiler would make a copy elsewhere.
template <uint kParameter> static inline ulong descriptor_at();
template <> inline ulong descriptor_at<6>() {
    ulong at;
    __asm__ volatile("{ .reg .b64 t; mov.b64 t, mm_entry_param_6; cvta.param.u64 %0, t; }" : "=l"(at));
    return at;
}
template <> inline ulong descriptor_at<7>() {
    ulong at;
    __asm__ volatile("{ .reg .b64 t; mov.b64 t, mm_entry_param_7; cvta.param.u64 %0, t; }" : "=l"(at));
    return at;
}
#endif
