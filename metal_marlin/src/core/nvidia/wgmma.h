#pragma once
// The matrix instruction of sm_90a: four simdgroups multiply 64 rows from registers with kN columns in threadgroup
// memory. Wgmma<T, kN>::mma(d, a, right): d[4 * j + e] holds row lane / 4 + e / 2 * 8 of the simdgroup's 16 and column
// 8 * j + lane % 4 * 2 + e % 2; a is the left operand of m16n8k16; right: see describe().
// sparse<step>(d, a, places, right): 32 k, of every four of which a has two; places: see SparsePlaces.
#ifdef __METAL_MARLIN_CUDA__
struct WgmmaGroup {
    static void fence() { __asm__ volatile("wgmma.fence.sync.aligned;" : : : "memory"); }
    static void commit() { __asm__ volatile("wgmma.commit_group.sync.aligned;" : : : "memory"); }
    template <uint kPending> static void wait() {
        __asm__ volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(kPending) : "memory");
    }
    // What was copied to threadgroup memory becomes visible to the instruction.
    static void publish() { __asm__ volatile("fence.proxy.async.shared::cta;" : : : "memory"); }
    // Rows of 128 bytes, k contiguous, whose 16-byte chunk c lies at c ^ row % 8; 8 rows follow each other in 1024
    // bytes, at a multiple of which they begin. 16 k further: + 2.
    static uint describe(uint at) { return (at & 0x3ffff) >> 4 | 1u << 16; } // and 64 | 1 << 30 above
};

template <typename T, uint kN> struct Wgmma;

// clang-format off
#define WGMMA_NUMBERS_32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define WGMMA_SUMS_32(d, i) "+f"(d[i + 0]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7]), "+f"(d[i + 8]), "+f"(d[i + 9]), "+f"(d[i + 10]), "+f"(d[i + 11]), "+f"(d[i + 12]), "+f"(d[i + 13]), "+f"(d[i + 14]), "+f"(d[i + 15])
#define WGMMA_NUMBERS_64 WGMMA_NUMBERS_32 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define WGMMA_SUMS_64(d, i) WGMMA_SUMS_32(d, i), WGMMA_SUMS_32(d, i + 16)
#define WGMMA_NUMBERS_128 WGMMA_NUMBERS_64 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define WGMMA_SUMS_128(d, i) WGMMA_SUMS_64(d, i), WGMMA_SUMS_64(d, i + 32)
#define WGMMA_NUMBERS_256 WGMMA_NUMBERS_128 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define WGMMA_SUMS_256(d, i) WGMMA_SUMS_128(d, i), WGMMA_SUMS_128(d, i + 64)
#define WGMMA_OF(T, type, n, a0, a1, a2, a3, right, places, step)                                              \
    template <> struct Wgmma<T, n> {                                                                           \
        static void mma(thread float (&d)[n / 2], thread const uint (&a)[4], uint from) {                     \
            __asm__ volatile("{ .reg .b64 t; mov.b64 t, {%" #right ", 0x40000040}; wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {"              \
                             WGMMA_NUMBERS_##n "}, {%" #a0 ",%" #a1 ",%" #a2 ",%" #a3 "}, t"            \
                             ", 1, 1, 1, 0; }"                                                                   \
                             : WGMMA_SUMS_##n(d, 0)                                                            \
                             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(from));                         \
        }                                                                                                      \
        template <uint kStep> static void sparse(thread float (&d)[n / 2], thread const uint (&a)[4], uint at, uint from) { \
            __asm__ volatile("{ .reg .b64 t; mov.b64 t, {%" #right ", 0x40000040}; wgmma.mma_async.sp.sync.aligned.m64n" #n "k32.f32." type "." type " {" \
                             WGMMA_NUMBERS_##n "}, {%" #a0 ",%" #a1 ",%" #a2 ",%" #a3 "}, t, %" #places ", %" #step       \
                             ", 1, 1, 1, 0; }"                                                                   \
                             : WGMMA_SUMS_##n(d, 0)                                                            \
                             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(from), "r"(at), "n"(kStep));    \
        }                                                                                                      \
        /* after wait<0>: sums are in registers from here on */                                                \
        static void hold(thread float (&d)[n / 2]) { __asm__ volatile("" : WGMMA_SUMS_##n(d, 0) : : "memory"); } \
    };
WGMMA_OF(half, "f16", 32, 16, 17, 18, 19, 20, 21, 22)
WGMMA_OF(bfloat, "bf16", 32, 16, 17, 18, 19, 20, 21, 22)
WGMMA_OF(half, "f16", 64, 32, 33, 34, 35, 36, 37, 38)
WGMMA_OF(bfloat, "bf16", 64, 32, 33, 34, 35, 36, 37, 38)
WGMMA_OF(half, "f16", 128, 64, 65, 66, 67, 68, 69, 70)
WGMMA_OF(bfloat, "bf16", 128, 64, 65, 66, 67, 68, 69, 70)
WGMMA_OF(half, "f16", 256, 128, 129, 130, 131, 132, 133, 134)
WGMMA_OF(bfloat, "bf16", 256, 128, 129, 130, 131, 132, 133, 134)
// clang-format on
#endif
