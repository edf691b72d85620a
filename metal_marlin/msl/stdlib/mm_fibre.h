#pragma once
// CPU, 32 lanes: every thread of a threadgroup is a fibre of one worker, and lanes meet in collectives.
//
// A lane that calls a collective stages its value and yields. When every unfinished lane of its simdgroup has yielded,
// the lanes that wait first in the order of the source (the others have already left what lies before) are released
// together: their values are published and they form the active mask. The source's order comes from the rewriter
// (msl/rejoin.py); where it says nothing, the order of code addresses takes its place.
// That order is the source's, as long as the compiler keeps it (FLAGS in msl/rejoin.py) and loops whose lanes may part
// end each iteration in a meeting (metal::_rejoin).
// One simdgroup runs at a time, until its lanes have finished or wait at a threadgroup barrier.
#include "mm_config.h"

// A call that must stay where the source has it: its return address tells collectives apart.
#define MM_SITE MM_UNCHECKED static __attribute__((noinline, nomerge, not_tail_called, convergent))
#define MM_OUTLINE MM_UNCHECKED static __attribute__((noinline))

constexpr ulong mm_stack_bytes = 256 << 10;
constexpr uint mm_slot_bytes = 32;  // the largest value a lane may publish: a vector of four 64-bit integers

struct mm_worker;

#include "mm_check.h"

// What a fibre knows about itself; lies at the top of its stack.
struct mm_lane {
  mm_worker* worker;
  mm_lane* next_free;
  ulong sp;
  ulong call;  // where the source calls the function that runs now, and where what it calls next is called
  ulong place; // of the collective that comes next
  uint index;  // in its simdgroup
};

struct mm_simdgroup {
  alignas(64) uchar published[32 * mm_slot_bytes];  // dense: values[lane]
  uchar large[32 * mm_slot_bytes];                  // staged values of more than 8 bytes
  ulong small[32];                                  // staged values of up to 8 bytes
  ulong site[32];                                   // where each blocked lane waits: return address
  ulong place[32];                                  // and place in the source
  ulong sp[32];                                     // stack pointers of blocked lanes
  uchar bytes[32];                                  // size of each staged value
  uint active;                                      // lanes released together with the published values
  uint fresh;                                       // nobody has reduced the published values yet
  uint blocked, at_barrier, ready;                  // masks of lanes
  uint size, started;
#ifdef METAL_MARLIN_CHECKED
  uchar meeting[32];  // mm_finding if some lanes of the simdgroup stay away
  uchar flags[32];    // mem_flags of each lane's barrier
#endif
};

// Stacks lie at equal offsets from powers of two; without different offsets inside them, their hot lines would all
// fall into the same few cache sets.
MM_FN mm_lane* mm_lane_of(ulong stack) {
  constexpr ulong colours = 64, step = 17 * 64;
  return (mm_lane*)(stack + mm_stack_bytes - 64 - (stack / mm_stack_bytes % colours) * step);
}
MM_FN mm_lane* mm_self() { return mm_lane_of((ulong)__builtin_frame_address(0) & ~(mm_stack_bytes - 1)); }

// Saves the callee-saved registers and the stack pointer (to *save), and continues where `to` was saved.
extern "C" __attribute__((visibility("hidden"))) void mm_switch(ulong* save, ulong to);
#if defined(__x86_64__)
__asm__(
    ".pushsection .text.mm_switch,\"ax\",@progbits\n.p2align 4\n.hidden mm_switch\n.globl mm_switch\n"
    ".type mm_switch,@function\nmm_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  retq\n.size mm_switch, .-mm_switch\n.popsection\n");
#elif defined(__aarch64__)
__asm__(
    ".pushsection .text.mm_switch,\"ax\",@progbits\n.p2align 4\n.hidden mm_switch\n.globl mm_switch\n"
    ".type mm_switch,@function\nmm_switch:\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp]\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n  stp x25, x26, [sp, #48]\n"
    "  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n"
    "  stp d12, d13, [sp, #128]\n  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n  str x9, [x0]\n  mov sp, x1\n"
    "  ldp x19, x20, [sp]\n  ldp x21, x22, [sp, #16]\n  ldp x23, x24, [sp, #32]\n  ldp x25, x26, [sp, #48]\n"
    "  ldp x27, x28, [sp, #64]\n  ldp x29, x30, [sp, #80]\n  ldp d8, d9, [sp, #96]\n  ldp d10, d11, [sp, #112]\n"
    "  ldp d12, d13, [sp, #128]\n  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n  ret\n.size mm_switch, .-mm_switch\n.popsection\n");
#else
#error "fibres need a context switch for this architecture"
#endif

// The stack pointer of a fibre that has not run yet and starts in `entry`.
MM_FN ulong mm_first_frame(mm_lane* lane, ulong entry) {
  ulong* top = (ulong*)((ulong)lane & ~63ul);
#if defined(__x86_64__)
  ulong* sp = top - 8;  // six registers, the return address, and the slot that keeps `entry` aligned as if called
  for (int i = 0; i < 8; ++i) sp[i] = 0;
  sp[6] = entry;
#else
  ulong* sp = top - 20;
  for (int i = 0; i < 20; ++i) sp[i] = 0;
  sp[11] = entry;
#endif
  return (ulong)sp;
}

// Ends a lane's turn after it has recorded what it waits for; returns when it has been released.
MM_UNCHECKED static void mm_wait(mm_lane* self, mm_simdgroup* group);
MM_FN mm_simdgroup* mm_group_of(mm_lane* self);

template <class T> struct mm_meeting {
  mm_simdgroup* group;
  ulong lane;
};

// Where lanes of one simdgroup meet: each brings `value`; afterwards published holds those of the active lanes.
template <class T> MM_SITE mm_meeting<T> mm_meet(T value) {
  static_assert(sizeof(T) <= mm_slot_bytes, "a simdgroup function takes values of at most 32 bytes");
  mm_lane* self = mm_self();
  mm_simdgroup* group = mm_group_of(self);
  const ulong lane = self->index;
  if constexpr (sizeof(T) <= 8) {
    __builtin_memcpy(&group->small[lane], &value, sizeof(T));
  } else {
    __builtin_memcpy(group->large + lane * mm_slot_bytes, &value, sizeof(T));
  }
  group->bytes[lane] = sizeof(T);
#ifdef METAL_MARLIN_CHECKED
  group->meeting[lane] = 0;
#endif
  group->site[lane] = (ulong)__builtin_return_address(0);
  group->place[lane] = self->place;
  group->blocked |= 1u << lane;
  mm_wait(self, group);
  return {group, lane};
}

// The same without a value.
MM_SITE mm_meeting<void> mm_meet() {
  mm_lane* self = mm_self();
  mm_simdgroup* group = mm_group_of(self);
  const ulong lane = self->index;
  group->bytes[lane] = 0;
  group->site[lane] = (ulong)__builtin_return_address(0);
  group->place[lane] = self->place;
  group->blocked |= 1u << lane;
#ifdef METAL_MARLIN_CHECKED
  group->meeting[lane] = 0;
#endif
  mm_wait(self, group);
  return {group, lane};
}

// flags: metal::mem_flags, which only the checker asks for
MM_SITE void mm_barrier(uint flags) {
  mm_lane* self = mm_self();
  mm_simdgroup* group = mm_group_of(self);
#ifdef METAL_MARLIN_CHECKED
  group->site[self->index] = (ulong)__builtin_return_address(0);
  group->flags[self->index] = (uchar)flags;
#endif
  group->at_barrier |= 1u << self->index;
  mm_wait(self, group);
}

template <class E> MM_FN void mm_publish_small(mm_simdgroup* group) {
  E* to = (E*)group->published;
  for (int i = 0; i < 32; ++i) to[i] = (E)group->small[i];
}
MM_OUTLINE void mm_publish(mm_simdgroup* group, uint bytes) {
  if (bytes == 4) return mm_publish_small<uint>(group);
  if (bytes == 8) return mm_publish_small<ulong>(group);
  if (bytes == 2) return mm_publish_small<ushort>(group);
  if (bytes == 1) return mm_publish_small<uchar>(group);
  for (uint i = 0; i < 32; ++i) {
    __builtin_memcpy(group->published + i * bytes, group->large + i * mm_slot_bytes, bytes);
  }
}

#ifdef METAL_MARLIN_CHECKED
MM_OUTLINE void mm_check_release(mm_simdgroup* group, uint together, ulong site);
#endif
// Every unfinished lane is blocked: release those that wait at the lowest address.
MM_OUTLINE void mm_release(mm_simdgroup* group) {
  ulong first = ~0ul, lowest = ~0ul;
  for (int i = 0; i < 32; ++i) {
    const ulong place = (group->blocked >> i & 1) != 0 ? group->place[i] : ~0ul;
    first = place < first ? place : first;
  }
  for (int i = 0; i < 32; ++i) {
    const bool here = (group->blocked >> i & 1) != 0 && group->place[i] == first;
    const ulong site = here ? group->site[i] : ~0ul;
    lowest = site < lowest ? site : lowest;
  }
  uint together = 0;
  for (int i = 0; i < 32; ++i) together |= (uint)(group->site[i] == lowest) << i;
  together &= group->blocked;
#ifdef METAL_MARLIN_CHECKED
  mm_check_release(group, together, lowest);
#endif
  const uint bytes = group->bytes[__builtin_ctz(together)];
  if (bytes != 0) mm_publish(group, bytes);
  group->active = together;
  group->fresh = 1;
  group->ready = together;
  group->blocked &= ~together;
}

#ifdef METAL_MARLIN_CHECKED
MM_SITE void mm_check_simdgroup_barrier(uint flags) {
  mm_lane* self = mm_self();
  mm_simdgroup* group = mm_group_of(self);
  const ulong lane = self->index;
  group->bytes[lane] = 0;
  group->site[lane] = (ulong)__builtin_return_address(0);
  group->flags[lane] = (uchar)flags;
  group->place[lane] = self->place;
  group->meeting[lane] = mm_lost_simdgroup_barrier;
  group->blocked |= 1u << lane;
  mm_wait(self, group);
}
// A shuffle reads `lane`, which must have come with a value.
MM_TOLD void mm_check_lane(uint active, uint lane) {
  if ((active >> lane & 1) != 0) return;
  mm_check_meeting(mm_inactive_lane, mm_code(__builtin_return_address(0)), 0, lane);
}
#endif
