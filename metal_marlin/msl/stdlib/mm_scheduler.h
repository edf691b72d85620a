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
  uint turn;  // checked: simdgroups that had theirs in this epoch
  mm_simdgroup simdgroup[1024 / 32];
};

MM_FN ulong mm_round_up(ulong n, ulong to) { return (n + to - 1) / to * to; }
#ifdef METAL_MARLIN_CHECKED
constexpr ulong mm_arena_guard = 64 << 10;  // behind it, where what lies beyond may be read and written
#else
constexpr ulong mm_arena_guard = 0;
#endif
MM_FN ulong mm_arena_stride(const mm_launch* L) { return mm_round_up(L->arena_bytes, 1024) + mm_arena_guard; }
MM_FN ulong mm_stacks_offset(const mm_launch* L) {
  return mm_round_up(mm_arena_stride(L) + sizeof(mm_worker), mm_stack_bytes);
}
MM_FN ulong mm_worker_bytes(const mm_launch* L) {
  return mm_stacks_offset(L) + (ulong)L->tptg[0] * L->tptg[1] * L->tptg[2] * mm_stack_bytes;
}

MM_FN mm_simdgroup* mm_group_of(mm_lane* self) { return self->worker->group; }

#ifdef METAL_MARLIN_CHECKED
MM_UNCHECKED static mm_check* mm_checks() { return mm_self()->worker->place.launch->check; }
MM_UNCHECKED static mm_where mm_here() {
  const mm_lane* self = mm_self();
  const mm_worker* w = self->worker;
  const uint simdgroup = (uint)(w->group - w->simdgroup), nth = simdgroup * 32 + self->index;
  const mm_check* c = w->place.launch->check;
  return {(uint)(c->group * c->threads) + nth + 1, simdgroup, nth};
}
MM_UNCHECKED static __attribute__((noreturn)) void mm_abandon() {
  mm_lane* self = mm_self();
  ((mm_launch*)self->worker->place.launch)->status = 2;
  mm_switch(&self->sp, self->worker->main_sp);
  __builtin_unreachable();
}

MM_OUTLINE void mm_check_release(mm_simdgroup* group, uint together, ulong site) {
  const uint lane = __builtin_ctz(together), all = group->size == 32 ? ~0u : (1u << group->size) - 1;
  mm_check* c = mm_checks();
  const uint finding = group->meeting[lane], simdgroup = mm_here().simdgroup;
  const ulong first = c->group * c->threads + simdgroup * 32 + 1;
  if (group->bytes[lane] != 0 || finding == 0) return;
  const uint missing = finding == mm_lost_matrix ? ~together : all & ~together;
  if (missing != 0) {
    mm_check_meeting(finding, mm_code((const void*)site), first + __builtin_ctz(missing), __builtin_popcount(together));
  }
  if (finding == mm_lost_simdgroup_barrier) {
    c->simd[0][simdgroup] += group->flags[lane] >> 1 & 1;
    c->simd[1][simdgroup] += group->flags[lane] & 1;
  }
}

// All unfinished threads of the threadgroup wait at a barrier: all must be there, at the same one.
MM_OUTLINE void mm_check_barrier(mm_worker* w) {
  mm_check* c = w->place.launch->check;
  uint waiting = 0, flags = 0;
  ulong site = 0, missing = 0, other = 0;
  for (uint i = 0; i < w->groups; ++i) {
    const mm_simdgroup* g = &w->simdgroup[i];
    for (uint lane = 0; lane < g->size; ++lane) {
      const ulong id = c->group * c->threads + i * 32 + lane + 1;
      if ((g->at_barrier >> lane & 1) == 0) {
        missing = missing == 0 ? id : missing;
        continue;
      }
      ++waiting;
      flags |= g->flags[lane];
      if (site != 0 && site != g->site[lane]) other = g->site[lane];
      site = site == 0 ? g->site[lane] : site;
    }
  }
  if (waiting == 0) return;
  if (missing != 0) mm_check_meeting(mm_lost_barrier, mm_code((const void*)site), missing, waiting);
  if (other != 0) {
    if (mm_report* r = mm_find(c, mm_two_barriers, mm_code((const void*)site), mm_code((const void*)other))) r->size = waiting;
  }
  mm_check_epoch(c, flags);
}
#endif

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
#ifdef METAL_MARLIN_CHECKED
  w->turn = 0;
  w->group = w->simdgroup + mm_shuffled(w->place.launch->check, 0, w->groups);
  const mm_launch* L = w->place.launch;
  const uint3 at = w->place.group;
  mm_check_group(L->check, at.x + (ulong)L->grid[0] * (at.y + (ulong)L->grid[1] * at.z), (ulong)w->place.arena,
                 mm_arena_stride(L));
#endif
  return true;
}

// The running simdgroup has only finished lanes and lanes at a threadgroup barrier: the next simdgroup, the next epoch
// when all have been there, or the next threadgroup. False: no work is left.
MM_OUTLINE bool mm_turn(mm_worker* w) {
#ifdef METAL_MARLIN_CHECKED
  if (++w->turn < w->groups) {
    w->group = w->simdgroup + mm_shuffled(w->place.launch->check, w->turn, w->groups);
    return true;
  }
  w->turn = 0;
  mm_check_barrier(w);
#else
  if (++w->group < w->simdgroup + w->groups) return true;
#endif
  uint waiting = 0;
  for (uint i = 0; i < w->groups; ++i) {
    mm_simdgroup* g = &w->simdgroup[i];
    waiting |= g->at_barrier;
    g->ready = g->at_barrier;
    g->at_barrier = 0;
  }
  w->group = w->simdgroup;
#ifdef METAL_MARLIN_CHECKED
  w->group += mm_shuffled(w->place.launch->check, 0, w->groups);
#endif
  return waiting != 0 || mm_next_threadgroup(w);
}

// What to continue with: a stack pointer, or mm_start for "start the next lane of the running simdgroup".
constexpr ulong mm_start = 1;
MM_FN ulong mm_pick(mm_worker* w) {
  for (;;) {
    mm_simdgroup* g = w->group;
    if (g->ready != 0) {
#ifdef METAL_MARLIN_CHECKED
      const uint lane = (w->place.launch->check->seed & 1) != 0 ? 31 - __builtin_clz(g->ready) : __builtin_ctz(g->ready);
      g->ready &= ~(1u << lane);
      return g->sp[lane];
#else
      const uint lane = __builtin_ctz(g->ready);
      g->ready &= g->ready - 1;
      return g->sp[lane];
#endif
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
MM_UNCHECKED static __attribute__((noinline)) void mm_fibre() {
  mm_lane* self = mm_self();
  mm_worker* w = self->worker;
  const mm_launch* L = w->place.launch;
  for (;;) {
    mm_simdgroup* g = w->group;
    while (g->started < g->size) {
      self->index = g->started++;
      self->call = self->place = 0;
#ifdef METAL_MARLIN_CHECKED
      self->index = mm_shuffled(L->check, self->index, g->size);
      const uint index = (uint)(g - w->simdgroup) * 32 + self->index;
      const uint3 size = w->place.size;
      const mm_ctx checked = {w->place, (uint3)(index % size.x, index / size.x % size.y, index / size.x / size.y), index};
      mm_invoke(L, checked);
      continue;
#endif
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

MM_UNCHECKED static __attribute__((noinline)) void mm_wait(mm_lane* self, mm_simdgroup* group) {
  mm_worker* w = self->worker;
  ulong* saved = &group->sp[self->index];
  *saved = 0;
  ulong to = mm_pick(w);
  if (to == 0) return;  // alone in being released
  if (to == mm_start) to = mm_free_stack(w);
  mm_switch(saved, to);
}

MM_UNCHECKED static void mm_work(void* shared) {
  mm_run* run = (mm_run*)shared;
  const mm_launch* L = run->launch;
  const ulong number = __atomic_fetch_add(&run->workers, 1u, __ATOMIC_RELAXED);
  char* block = L->workspace + number * L->workspace_stride;
  mm_worker* w = (mm_worker*)(block + mm_arena_stride(L));
  w->place = {L, (__local char*)block, (uint3)0u, (uint3)0u};
  w->share = {run, 0, 0};
  w->stacks = (ulong)block + mm_stacks_offset(L);
  w->made = 0;
#ifdef METAL_MARLIN_CHECKED
  L->check->own = (ulong)w;
  L->check->own_end = (ulong)block + mm_worker_bytes(L);
#endif
  w->free = nullptr;
  if (mm_next_threadgroup(w)) mm_switch(&w->main_sp, mm_free_stack(w));
}
