#pragma once
// Copies from device to threadgroup memory that go on while the thread does other things. A thread's copies are
// waited for in groups, in the order of commit().
#ifdef __METAL_MARLIN_CUDA__
struct AsyncCopy {
    static uint address(threadgroup const void* p) { return (uint)(ulong)p; }
    // 16 bytes; zeros where `reads` is false, and then `from` is only an address.
    static void copy16(uint to, device const void* from, bool reads) {
        __asm__ volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                         :
                         : "r"(to), "l"(from), "r"(reads ? 16 : 0)
                         : "memory");
    }
    static void commit() { __asm__ volatile("cp.async.commit_group;" : : : "memory"); }
    // Until at most `kPending` groups are under way.
    template <uint kPending> static void wait() {
        __asm__ volatile("cp.async.wait_group %0;" : : "n"(kPending) : "memory");
    }
};

static inline uint4 shared_load16(uint at) {
    uint v[4];
    __asm__ volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                     : "r"(at)
                     : "memory");
    return uint4(v[0], v[1], v[2], v[3]);
}
static inline uint shared_load4(uint at) {
    uint v;
    __asm__ volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
    return v;
}
static inline uint shared_load2(uint at) {
    ushort v;
    __asm__ volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(at) : "memory");
    return v;
}
static inline void shared_store(uint at, float v) {
    __asm__ volatile("st.shared.f32 [%0], %1;" : : "r"(at), "f"(v) : "memory");
}
// Four matrices of 8 x 8 numbers of 16 bits, each transposed.
static inline void shared_transposed(uint at, thread const uint (&v)[4]) {
    __asm__ volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};"
                     :
                     : "r"(at), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
                     : "memory");
}
static inline uint2 shared_load8(uint at) {
    uint v[2];
    __asm__ volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "r"(at) : "memory");
    return uint2(v[0], v[1]);
}
static inline void shared_matrices(uint at, thread uint (&v)[4]) {
    __asm__ volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                     : "r"(at)
                     : "memory");
}

// To the first-level cache.
static inline void prefetch_near(device const void* from) {
    __asm__ volatile("prefetch.global.L1 [%0];" : : "l"(from));
}
#endif
