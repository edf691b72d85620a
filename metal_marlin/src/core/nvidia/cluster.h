#pragma once
// Threadgroups that share their work (PTX ISA: clusters; sm_90).
#ifdef __METAL_MARLIN_CUDA__
// How many threadgroups a multiprocessor should hold, as for kBytes of threadgroup memory each: assemblers give a thread
// as many registers as that leaves it. Said as below.
template <uint kBytes> struct Residency {
    enum : uint { kCount = 228 * 1024 / (kBytes + 1024) };
    static void ask() { __asm__ volatile("// threadgroups of a multiprocessor: %0" : : "n"(kCount)); }
};

// kCount threadgroups along z that run at the same time and may read each other's threadgroup memory.
template <uint kCount> struct Cluster {
    // For the compiler of PTX (msl/program.py): what attributes cannot say.
    static void form() { __asm__ volatile("// threadgroups of a cluster: %0" : : "n"(kCount)); }
    // What all of them wrote before is visible to all.
    static void barrier() {
        __asm__ volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" : : : "memory");
    }
    static uint address(uint at, uint rank) {
        uint there;
        __asm__("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
        return there;
    }
    static float4 load4(uint at) {
        float v[4];
        if (kCount == 1) {
            __asm__ volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
                             : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
                             : "r"(at)
                             : "memory");
        } else {
            __asm__ volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
                             : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
                             : "r"(at)
                             : "memory");
        }
        return float4(v[0], v[1], v[2], v[3]);
    }
    // From an address, or from this threadgroup's own memory where it is alone.
    static float load(uint at) {
        float v;
        if (kCount == 1) {
            __asm__ volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(at) : "memory");
            return v;
        }
        __asm__ volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(at) : "memory");
        return v;
    }
};
#endif
