#pragma once
// CPU, 32 lanes: how a worker runs the threads of its threadgroups as fibres. Included by mm_entry_cpu.h.
#include "mm_fibre.h"

struct mm_worker {
  mm_simdgroup* group;  // the one that runs
  mm_place place;
  mm_share share;
  uint3 position;  // of the next thread to start; threads start in order
  uint groups;     // simdgroups of this threadgroup
  ulong main_sp;
  ulong stacks;
  uint made;  // stacks in use so far
  mm_lane* free;
  mm_simdgroup simdgroup[1024 / 32];
};

MM_FN ulong mm_round_up(ulong n, ulong to) { return (n + to - 1) / to * to; }
MM_FN ulong mm_arena_stride(const mm_launch* L) { return mm_round_up(L->arena_bytes, 1024); }
MM_FN ulong mm_stacks_offset(const mm_launch* L) {
  return mm_round_up(mm_arena_stride(L) + sizeof(mm_worker), mm_stack_bytes);
}
MM_FN ulong mm_worker_bytes(const mm_launch* L) {
  return mm_stacks_offset(L) + (ulong)L->tptg[0] * L->tptg[1] * L->tptg[2] * mm_stack_bytes;
}

MM_FN mm_simdgroup* mm_group_of(mm_lane* self) { return self->worker->group; }

// Prepares the simdgroups of the worker's next threadgroup. False: there is none.
MM_OUTLINE bool mm_next_threadgroup(mm_worker* w) {
  if (!w->share.take(w->place)) return false;
  const uint threads = mm_ctx::volume(w->place.size);
  w->groups = (threads + 31) / 32;
  for (uint i = 0; i < w->groups; ++i) {
    mm_simdgroup* g = &w->simdgroup[i];
    g->blocked = g->at_barrier = g->ready = g->started = 0;
    g->size = threads - i * 32 < 32 ? threads - i * 32 : 32;
  }
  w->group = w->simdgroup;
  w->position = (uint3)0u;
  return true;
}

// The running simdgroup has only finished lanes and lanes at a threadgroup barrier: the next simdgroup, the next epoch
// when all have been there, or the next threadgroup. False: no work is left.
MM_OUTLINE bool mm_turn(mm_worker* w) {
  if (++w->group < w->simdgroup + w->groups) return true;
  uint waiting = 0;
  for (uint i = 0; i < w->groups; ++i) {
    mm_simdgroup* g = &w->simdgroup[i];
    waiting |= g->at_barrier;
    g->ready = g->at_barrier;
    g->at_barrier = 0;
  }
  w->group = w->simdgroup;
  return waiting != 0 || mm_next_threadgroup(w);
}

// What to continue with: a stack pointer, or mm_start for "start the next lane of the running simdgroup".
constexpr ulong mm_start = 1;
MM_FN ulong mm_pick(mm_worker* w) {
  for (;;) {
    mm_simdgroup* g = w->group;
    if (g->ready != 0) {
      const uint lane = __builtin_ctz(g->ready);
      g->ready &= g->ready - 1;
      return g->sp[lane];
    }
    if (g->started < g->size) return mm_start;
    if (g->blocked != 0) {
      mm_release(g);
    } else if (!mm_turn(w)) {
      return w->main_sp;
    }
  }
}

// The body of every fibre: starts lanes one after the other on the same stack for as long as none has to wait.
static __attribute__((noinline)) void mm_fibre() {
  mm_lane* self = mm_self();
  mm_worker* w = self->worker;
  const mm_launch* L = w->place.launch;
  for (;;) {
    mm_simdgroup* g = w->group;
    while (g->started < g->size) {
      self->index = g->started++;
      self->call = self->place = 0;
      const mm_ctx c = {w->place, w->position, (uint)(g - w->simdgroup) * 32 + self->index};
      if (++w->position.x == w->place.size.x) {
        w->position.x = 0;
        if (++w->position.y == w->place.size.y) w->position.y = 0, ++w->position.z;
      }
      mm_invoke(L, c);
    }
    const ulong to = mm_pick(w);
    if (to == mm_start) continue;
    self->next_free = w->free;
    w->free = self;
    mm_switch(&self->sp, to);
  }
}

MM_OUTLINE ulong mm_free_stack(mm_worker* w) {
  if (mm_lane* lane = w->free) {
    w->free = lane->next_free;
    return lane->sp;
  }
  mm_lane* lane = mm_lane_of(w->stacks + w->made++ * mm_stack_bytes);
  lane->worker = w;
  return mm_first_frame(lane, (ulong)&mm_fibre);
}

static __attribute__((noinline)) void mm_wait(mm_lane* self, mm_simdgroup* group) {
  mm_worker* w = self->worker;
  ulong* saved = &group->sp[self->index];
  *saved = 0;
  ulong to = mm_pick(w);
  if (to == 0) return;  // alone in being released
  if (to == mm_start) to = mm_free_stack(w);
  mm_switch(saved, to);
}

static void mm_work(void* shared) {
  mm_run* run = (mm_run*)shared;
  const mm_launch* L = run->launch;
  const ulong number = __atomic_fetch_add(&run->workers, 1u, __ATOMIC_RELAXED);
  char* block = L->workspace + number * L->workspace_stride;
  mm_worker* w = (mm_worker*)(block + mm_arena_stride(L));
  w->place = {L, (__local char*)block, (uint3)0u, (uint3)0u};
  w->share = {run, 0, 0};
  w->stacks = (ulong)block + mm_stacks_offset(L);
  w->made = 0;
  w->free = nullptr;
  if (mm_next_threadgroup(w)) mm_switch(&w->main_sp, mm_free_stack(w));
}
