#pragma once
// CPU entry: the launch descriptor, the positions of a thread, and the loop over threadgroups. The generated text
// behind this header defines mm_invoke.
#include "mm_config.h"
#include "metal_types"
#include "metal_compute"

#pragma OPENCL EXTENSION __cl_clang_function_pointers : enable

typedef void (*mm_parallel)(void (*)(void*), void*, uint, uint);

// Filled by the host; same order and natural alignment there.
struct mm_launch {
  void** args;
  uint grid[3];     // threadgroups
  uint tptg[3];     // threads of a full threadgroup
  uint threads[3];  // threads in all: threadgroups at the upper edges may be smaller
  uint arena_bytes;
  uint nthreads;
  mm_parallel gomp;  // GOMP_parallel, or null: run on the caller
  char* workspace;   // nthreads blocks, each: arena, scheduler, stacks
  ulong workspace_stride;
  uint next;
  uint status;
  struct mm_check* check;  // checked rows only
};

// The threadgroup that runs.
struct mm_place {
  const mm_launch* launch;
  __local char* arena;
  uint3 group, size;  // position in the grid of threadgroups; its threads
};

struct mm_ctx {
  const mm_place& at;
  uint3 position;
  uint index;

  MM_METHOD static uint3 three(const uint* p) { return (uint3)(p[0], p[1], p[2]); }
  MM_METHOD static uint volume(uint3 v) { return v.x * v.y * v.z; }
  MM_METHOD static uint groups_of(uint width, uint n) { return (n + width - 1) / width; }

  MM_METHOD __local char* arena() const { return at.arena; }
  MM_METHOD uint3 thread_position_in_threadgroup() const { return position; }
  MM_METHOD uint thread_index_in_threadgroup() const { return index; }
  MM_METHOD uint3 threadgroup_position_in_grid() const { return at.group; }
  MM_METHOD uint3 threadgroups_per_grid() const { return three(at.launch->grid); }
  MM_METHOD uint3 threads_per_grid() const { return three(at.launch->threads); }
  MM_METHOD uint3 threads_per_threadgroup() const { return at.size; }
  MM_METHOD uint3 dispatch_threads_per_threadgroup() const { return three(at.launch->tptg); }
  MM_METHOD uint3 thread_position_in_grid() const { return at.group * dispatch_threads_per_threadgroup() + position; }
  MM_METHOD uint3 grid_size() const { return threads_per_grid(); }
  MM_METHOD uint3 grid_origin() const { return (uint3)0u; }
  MM_METHOD uint threads_per_simdgroup() const { return METAL_MARLIN_LANES; }
  MM_METHOD uint thread_execution_width() const { return METAL_MARLIN_LANES; }
  MM_METHOD uint thread_index_in_simdgroup() const { return index % METAL_MARLIN_LANES; }
  MM_METHOD uint simdgroup_index_in_threadgroup() const { return index / METAL_MARLIN_LANES; }
  MM_METHOD uint simdgroups_per_threadgroup() const { return groups_of(METAL_MARLIN_LANES, volume(at.size)); }
  MM_METHOD uint dispatch_simdgroups_per_threadgroup() const {
    return groups_of(METAL_MARLIN_LANES, volume(dispatch_threads_per_threadgroup()));
  }
  MM_METHOD uint thread_index_in_quadgroup() const { return index % 4; }
  MM_METHOD uint quadgroup_index_in_threadgroup() const { return index / 4; }
  MM_METHOD uint quadgroups_per_threadgroup() const { return groups_of(4, volume(at.size)); }
  MM_METHOD uint dispatch_quadgroups_per_threadgroup() const {
    return groups_of(4, volume(dispatch_threads_per_threadgroup()));
  }
};

static __attribute__((always_inline)) void mm_invoke(const mm_launch* L, const mm_ctx& c);

// One launch as its workers share it.
struct mm_run {
  mm_launch* launch;
  ulong total, chunk;
  ulong next;   // threadgroup nobody has taken yet
  uint workers; // that have started
};

// Threadgroups of one worker: chunks taken in order, so that a threadgroup may wait for what earlier ones publish.
struct mm_share {
  mm_run* run;
  ulong next, end;

  MM_METHOD bool take(mm_place& place) {
    const mm_launch* L = run->launch;
    const uint* grid = L->grid;
    if (next == end) {
      next = __atomic_fetch_add(&run->next, run->chunk, __ATOMIC_RELAXED);
      if (next >= run->total) return end = next, false;
      end = next + run->chunk < run->total ? next + run->chunk : run->total;
      place.group = (uint3)((uint)(next % grid[0]), (uint)(next / grid[0] % grid[1]), (uint)(next / grid[0] / grid[1]));
    } else if (++place.group.x == grid[0]) {
      place.group.x = 0;
      if (++place.group.y == grid[1]) place.group.y = 0, ++place.group.z;
    }
    ++next;
#ifdef METAL_MARLIN_CHECKED
    const ulong n = mm_shuffled(L->check, (uint)(next - 1), (uint)run->total);
    place.group = (uint3)((uint)(n % grid[0]), (uint)(n / grid[0] % grid[1]), (uint)(n / grid[0] / grid[1]));
#endif
    place.size = (uint3)(edge(L, 0, place.group.x), edge(L, 1, place.group.y), edge(L, 2, place.group.z));
    return true;
  }
  MM_METHOD static uint edge(const mm_launch* L, int d, uint group) {
    const uint left = L->threads[d] - group * L->tptg[d];
    return left < L->tptg[d] ? left : L->tptg[d];
  }
};

#if METAL_MARLIN_LANES == 1
MM_FN ulong mm_worker_bytes(const mm_launch* L) { return L->arena_bytes; }

static void mm_work(void* shared) {
  mm_run* run = (mm_run*)shared;
  const mm_launch* L = run->launch;
  const ulong worker = __atomic_fetch_add(&run->workers, 1u, __ATOMIC_RELAXED);
  mm_place place = {L, (__local char*)(L->workspace + worker * L->workspace_stride), (uint3)0u, (uint3)0u};
  mm_share share = {run, 0, 0};
  while (share.take(place)) {
    const mm_ctx c = {place, (uint3)0u, 0};
    mm_invoke(L, c);
  }
}
#else
#include "mm_scheduler.h"
#endif

extern "C" MM_UNCHECKED __attribute__((visibility("default"))) ulong mm_workspace_bytes(const mm_launch* L) {
  return mm_worker_bytes(L);
}

extern "C" MM_UNCHECKED __attribute__((visibility("default"))) int mm_launch_kernel(mm_launch* L) {
  const ulong total = (ulong)L->grid[0] * L->grid[1] * L->grid[2];
  const ulong threads = L->nthreads > 1 && L->gomp ? L->nthreads : 1;
  const ulong chunk = threads == 1 ? total : total / (8 * threads);
  mm_run run = {L, total, chunk ? chunk : 1, 0, 0};
  if (threads == 1) {
    mm_work(&run);
  } else {
    L->gomp(mm_work, &run, (uint)threads, 0);
  }
  return (int)L->status;
}
