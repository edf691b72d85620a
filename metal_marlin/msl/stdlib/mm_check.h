#pragma once
// Checked mode: every load, store, copy and atomic of the kernel is compared with what is known of the bytes it
// touches. clang's address sanitizer supplies the calls (every width, with its exact size), its array-bounds and
// alignment sanitizers two more; the answers are ours. One worker runs all threadgroups, one fibre at a time.
//
// Known of each granule of memory: who wrote it last, the last two who read it, and which bytes were written at all.
// Two accesses of different threads, one of them a write, are ordered by a barrier between them that names their
// memory, or by an atomic object that carries one thread's release to the other's acquire; else they race.
// Reports go to memory of the host (runtime/checked.py has the same layouts) and carry addresses of code, which the
// host turns into lines.
#include "mm_config.h"

#ifdef METAL_MARLIN_CHECKED
#pragma OPENCL EXTENSION __cl_clang_function_pointers : enable

enum mm_finding : uint {
  mm_race = 1,
  mm_outside,
  mm_unwritten,
  mm_misaligned,
  mm_array_index,
  mm_const_write,
  mm_lost_barrier,
  mm_two_barriers,
  mm_lost_simdgroup_barrier,
  mm_lost_matrix,
  mm_inactive_lane,
  mm_endless
};
enum mm_access_flags : uint { mm_write = 1, mm_atomic = 2, mm_copy = 4 };

// One access. thread: 1 + its index in the grid of threads, threadgroup after threadgroup; 0 is nobody.
struct mm_mark {
  uint id, epoch;
  uint simd;  // simdgroup barriers so far
  uint code;  // of the access: address in the image
  uchar bytes, atomic;
};
struct mm_cell {
  mm_mark write, read[2];
  uint written, owner;  // bytes that hold something; threadgroup that a cell of threadgroup memory speaks of
};

struct mm_area {
  ulong start, bytes, granule, flags;  // granule: log2 of a cell's bytes; flags: 1 const, 2 nothing written yet
  mm_cell* cells;
};
struct mm_variable {
  ulong start, bytes;
  ulong name;
};

struct mm_report {
  ulong finding, flags, address, size;
  ulong area, offset;  // area: of the buffers, then ~0 threadgroup memory, ~1 none
  ulong id, code, other, other_code;
  ulong epoch, line;
  const char *file, *text;
};

constexpr uint mm_locations = 64;
struct mm_clock {
  uint epoch, id;  // accesses of the threadgroup before this epoch, and of this thread (~0: any) in it
};
struct mm_location {
  ulong address;
  mm_clock* clocks;  // by threadgroup
};

struct mm_check {
  ulong areas, seed, guard, budget, threads, groups, capacity, count;  // threads of a full threadgroup
  mm_report* reports;
  mm_cell* arena_cells;
  mm_clock* clocks;  // mm_locations x groups
  ulong fixed;  // variables the host names: threadgroup arguments
  mm_area area[32];
  mm_variable variable[64];
  // ours
  ulong arena, arena_end, own, own_end;  // own: the scheduler and the stacks
  ulong group, epochs[2];      // barriers of this threadgroup, for threadgroup and for device memory
  uint simd[2][32];            // the same of simdgroup barriers
  ulong skip;                  // the next access of this address belongs to an atomic function
  ulong last, locations, overflow, known, variables;
  mm_location location[mm_locations];
  ulong pending[1024], learnt[1024];  // bits of locations: read, and read before an acquiring fence
  uchar released[1024];
};

struct mm_where {
  uint id, simdgroup, nth;
};
MM_UNCHECKED static mm_check* mm_checks();
MM_UNCHECKED static mm_where mm_here();
MM_UNCHECKED static __attribute__((noreturn)) void mm_abandon();
extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start[];

MM_UNCHECKED static uint mm_code(const void* address) { return (uint)((ulong)address - (ulong)__ehdr_start) - 1; }

MM_OUTLINE mm_report* mm_find(mm_check* c, uint finding, ulong code, ulong other_code, uint flags = 0) {
  for (ulong i = 0; i < c->count; ++i) {
    const mm_report* r = c->reports + i;
    if (r->finding == finding && r->code == code && r->other_code == other_code && r->flags == flags) return nullptr;
  }
  if (c->count == c->capacity) return nullptr;
  mm_report* r = c->reports + c->count++;
  __builtin_memset(r, 0, sizeof(*r));
  r->finding = finding;
  r->code = code;
  r->other_code = other_code;
  r->flags = flags;
  r->id = mm_here().id;
  r->area = ~1ul;
  r->epoch = c->epochs[0];
  return r;
}

MM_OUTLINE bool mm_carried(const mm_check* c, ulong locations, const mm_mark& m, ulong group) {
  for (; locations != 0; locations &= locations - 1) {
    const mm_clock k = c->location[__builtin_ctzl(locations)].clocks[group];
    if (m.epoch < k.epoch || (m.epoch == k.epoch && (k.id == ~0u || k.id == m.id))) return true;
  }
  return false;
}

MM_OUTLINE bool mm_ordered(const mm_check* c, const mm_mark& m, mm_where here, uint space) {
  if (m.id == 0 || m.id == here.id) return true;
  const ulong group = (m.id - 1) / c->threads;
  if (group == c->group) {
    if (m.epoch != c->epochs[space]) return true;
    const uint simdgroup = (uint)((m.id - 1) % c->threads / 32);
    if (simdgroup == here.simdgroup && m.simd != c->simd[space][simdgroup]) return true;
  } else if (space == 0 || c->overflow != 0) {
    return true;
  }
  return mm_carried(c, c->known | c->learnt[here.nth], m, group);
}

MM_OUTLINE void mm_clash(mm_check* c, const mm_mark& m, const mm_mark& now, ulong address, ulong size,
                                 uint flags, ulong area, ulong offset) {
  if (mm_report* r = mm_find(c, mm_race, now.code, m.code, flags)) {
    r->address = address, r->size = size, r->area = area, r->offset = offset;
    r->other = m.id, r->epoch = now.epoch;
  }
}

// One granule's share of an access.
MM_OUTLINE void mm_touch(mm_check* c, mm_cell* cell, mm_mark now, uint flags, uint space, mm_where here,
                                 ulong address, ulong size, ulong area, ulong offset) {
  const bool write = (flags & mm_write) != 0, atomic = (flags & mm_atomic) != 0;
  if (space == 0 && cell->owner != c->group + 1) {
    __builtin_memset(cell, 0, sizeof(*cell));
    cell->owner = (uint)c->group + 1;
  }
  const mm_mark& w = cell->write;
  if ((w.bytes & now.bytes) != 0 && !(atomic && w.atomic) && !mm_ordered(c, w, here, space)) {
    mm_clash(c, w, now, address, size, flags, area, offset);
  }
  if (write) {
    for (int i = 0; i < 2; ++i) {
      const mm_mark& r = cell->read[i];
      if ((r.bytes & now.bytes) != 0 && !(atomic && r.atomic) && !mm_ordered(c, r, here, space)) {
        mm_clash(c, r, now, address, size, flags, area, offset);
      }
    }
    cell->write = now;
    cell->written |= now.bytes;
    return;
  }
  if (cell->read[0].id != now.id && cell->read[0].id != 0) cell->read[1] = cell->read[0];
  cell->read[0] = now;
}

MM_OUTLINE void mm_touch_all(mm_check* c, mm_cell* cells, ulong granule, ulong offset, ulong size, uint flags,
                                     uint space, bool fresh, uint code, ulong address, ulong area) {
  const mm_where here = mm_here();
  const ulong width = 1ul << granule, end = offset + size;
  mm_mark now = {here.id, (uint)c->epochs[space], c->simd[space][here.simdgroup], code, 0,
                 (uchar)((flags & mm_atomic) != 0)};
  ulong empty = 0;
  for (ulong at = offset >> granule; at << granule < end; ++at) {
    const ulong first = at << granule, low = offset > first ? offset - first : 0;
    const ulong high = end < first + width ? end - first : width;
    now.bytes = (uchar)(((1u << high) - 1) & ~((1u << low) - 1));
    mm_touch(c, cells + at, now, flags, space, here, address, size, area, offset);
    const uint missing = now.bytes & ~cells[at].written;
    empty += size <= 4 ? missing != 0 : missing == now.bytes;
    cells[at].written |= now.bytes;
  }
  // Wider reads take padding along, of structs and of vectors of three.
  if (fresh && (flags & mm_write) == 0 && empty != 0 && 2 * empty >= (size >> granule)) {
    if (mm_report* r = mm_find(c, mm_unwritten, code, 0, flags)) {
      r->address = address, r->size = size, r->area = area, r->offset = offset;
    }
  }
}

MM_OUTLINE void mm_beyond(mm_check* c, ulong address, ulong size, uint flags, uint code, ulong area,
                                  ulong offset, bool fatal) {
  if (mm_report* r = mm_find(c, mm_outside, code, 0, flags)) {
    r->address = address, r->size = size, r->area = area, r->offset = offset;
  }
  if (fatal) mm_abandon();
}

MM_OUTLINE void mm_in_arena(mm_check* c, ulong address, ulong size, uint flags, uint code) {
  const ulong offset = address - c->arena;
  bool inside = false;
  for (ulong i = 0; i < c->variables && !inside; ++i) {
    inside = offset >= c->variable[i].start && offset + size <= c->variable[i].start + c->variable[i].bytes;
  }
  if (!inside) return mm_beyond(c, address, size, flags, code, ~0ul, offset, false);
  mm_touch_all(c, c->arena_cells, 2, offset, size, flags, 0, true, code, address, ~0ul);
}

MM_OUTLINE void mm_access(ulong address, ulong size, uint flags, const void* from) {
  mm_check* c = mm_checks();
  if (address == c->skip) {
    c->skip = 0;
    return;
  }
  const uint code = mm_code(from);
  if (c->budget-- == 0) {
    mm_find(c, mm_endless, code, 0);
    mm_abandon();
  }
  if (address - c->arena < c->arena_end - c->arena) return mm_in_arena(c, address, size, flags, code);
  if (address - c->own < c->own_end - c->own || size == 0) return;
  for (ulong k = 0; k < c->areas; ++k) {
    const ulong i = (c->last + k) % c->areas;
    const mm_area& a = c->area[i];
    if (address - (a.start - c->guard) >= a.bytes + 2 * c->guard) continue;
    c->last = i;
    const ulong offset = address - a.start;
    if (offset >= a.bytes || size > a.bytes - offset) {
      const bool fatal = size > c->guard;
      return mm_beyond(c, address, size, flags, code, i, offset, fatal);
    }
    if ((flags & mm_write) != 0 && (a.flags & 1) != 0) {
      if (mm_report* r = mm_find(c, mm_const_write, code, 0)) r->address = address, r->size = size, r->area = i, r->offset = offset;
    }
    return mm_touch_all(c, a.cells, a.granule, offset, size, flags, 1, (a.flags & 2) != 0, code, address, i);
  }
  // what else may be read: constants of the image
  if (address - (ulong)__ehdr_start < c->guard * 16 && (flags & mm_write) == 0) return;
  mm_beyond(c, address, size, flags, code, ~1ul, 0, true);
}

MM_OUTLINE void mm_misplaced(ulong address, ulong size, const void* from) {
  if (mm_report* r = mm_find(mm_checks(), mm_misaligned, mm_code(from), 0)) r->address = address, r->size = size;
  if (size == 16) mm_abandon();  // faults
}

#define MM_CALLBACK extern "C" __attribute__((visibility("hidden"), used, noinline)) MM_UNCHECKED
// Accesses of these sizes are aligned to them; those that are not come as "N".
#define MM_SIZED(n)                                                                                   \
  MM_CALLBACK void __asan_load##n##_noabort(ulong address) {                                          \
    mm_access(address, n, 0, __builtin_return_address(0));                                            \
    if (address % n != 0) mm_misplaced(address, n, __builtin_return_address(0));                      \
  }                                                                                                   \
  MM_CALLBACK void __asan_store##n##_noabort(ulong address) {                                         \
    mm_access(address, n, mm_write, __builtin_return_address(0));                                     \
    if (address % n != 0) mm_misplaced(address, n, __builtin_return_address(0));                      \
  }
MM_SIZED(1) MM_SIZED(2) MM_SIZED(4) MM_SIZED(8) MM_SIZED(16)
#undef MM_SIZED
MM_CALLBACK void __asan_loadN_noabort(ulong address, ulong size) {
  mm_access(address, size, 0, __builtin_return_address(0));
}
MM_CALLBACK void __asan_storeN_noabort(ulong address, ulong size) {
  mm_access(address, size, mm_write, __builtin_return_address(0));
}
MM_CALLBACK void __asan_handle_no_return() {}
MM_CALLBACK void* __asan_memcpy(void* to, const void* from, ulong size) {
  mm_access((ulong)from, size, mm_copy, __builtin_return_address(0));
  mm_access((ulong)to, size, mm_copy | mm_write, __builtin_return_address(0));
  for (ulong i = 0; i < size; ++i) ((volatile char*)to)[i] = ((const char*)from)[i];
  return to;
}
MM_CALLBACK void* __asan_memmove(void* to, const void* from, ulong size) {
  mm_access((ulong)from, size, mm_copy, __builtin_return_address(0));
  mm_access((ulong)to, size, mm_copy | mm_write, __builtin_return_address(0));
  const bool down = (ulong)to > (ulong)from;
  for (ulong k = 0; k < size; ++k) {
    const ulong i = down ? size - 1 - k : k;
    ((volatile char*)to)[i] = ((const char*)from)[i];
  }
  return to;
}
MM_CALLBACK void* __asan_memset(void* to, int value, ulong size) {
  mm_access((ulong)to, size, mm_copy | mm_write, __builtin_return_address(0));
  for (ulong i = 0; i < size; ++i) ((volatile char*)to)[i] = (char)value;
  return to;
}

// --- the undefined-behaviour sanitizer's: where, and of which type
struct mm_source {
  const char* file;
  uint line, column;
};
struct mm_described {
  ushort kind, info;
  char name[1];
};
struct mm_bounds_data {
  mm_source at;
  const mm_described *array, *index;
};
struct mm_type_data {
  mm_source at;
  const mm_described* type;
  uchar log_alignment, kind;
};
MM_CALLBACK void __ubsan_handle_out_of_bounds(const mm_bounds_data* data, ulong index) {
  if (mm_report* r = mm_find(mm_checks(), mm_array_index, mm_code(__builtin_return_address(0)), 0)) {
    r->offset = index, r->file = data->at.file, r->line = data->at.line, r->text = data->array->name;
  }
}
MM_CALLBACK void __ubsan_handle_type_mismatch_v1(const mm_type_data* data, ulong address) {
  if (mm_report* r = mm_find(mm_checks(), mm_misaligned, mm_code(__builtin_return_address(0)), 0)) {
    r->address = address, r->size = 1ul << data->log_alignment;
    r->file = data->at.file, r->line = data->at.line, r->text = data->type->name;
  }
  if (data->log_alignment >= 4) mm_abandon();  // such loads and stores fault
}

// --- what the standard library tells
// Before an atomic operation. `order` as in memory_order; kind: bits of 1 reads, 2 writes, 4 depends on what is there.
#define MM_TOLD static __attribute__((noinline, nomerge, not_tail_called)) MM_UNCHECKED

MM_OUTLINE ulong mm_location_of(mm_check* c, ulong address, bool make) {
  for (ulong i = 0; i < c->locations; ++i) {
    if (c->location[i].address == address) return 1ul << i;
  }
  if (!make) return 0;
  if (c->locations == mm_locations) return c->overflow = 1, 0;
  c->location[c->locations] = {address, c->clocks + c->locations * c->groups};
  return 1ul << c->locations++;
}
MM_UNCHECKED static void mm_join(mm_clock& to, mm_clock from) {
  if (from.epoch == 0) return;
  if (from.epoch == to.epoch) {
    to.id = from.id == to.id ? to.id : ~0u;
  } else if (from.epoch > to.epoch) {
    to = from;
  }
}
MM_TOLD void mm_check_atomic(ulong address, ulong size, uint kind, uint order) {
  mm_check* c = mm_checks();
  if ((kind & 4) != 0) mm_access(address, size, mm_atomic, __builtin_return_address(0));
  if ((kind & 2) != 0) mm_access(address, size, mm_write | mm_atomic, __builtin_return_address(0));
  if ((kind & 3) != 3) c->skip = address;  // plain loads and stores to the compiler
  if (address - c->arena < c->arena_end - c->arena) return;
  const mm_where here = mm_here();
  if ((kind & 1) != 0) {
    const ulong bit = mm_location_of(c, address, false);
    c->pending[here.nth] |= bit;
    if (order != 0) c->learnt[here.nth] |= bit;
  }
  if ((kind & 2) != 0 && (order != 0 || c->released[here.nth] != 0)) {
    const ulong bit = mm_location_of(c, address, true);
    if (bit == 0) return;
    mm_clock* clocks = c->location[__builtin_ctzl(bit)].clocks;
    for (ulong known = c->known | c->learnt[here.nth]; known != 0; known &= known - 1) {
      const mm_clock* from = c->location[__builtin_ctzl(known)].clocks;
      for (ulong g = 0; from != clocks && g < c->groups; ++g) mm_join(clocks[g], from[g]);
    }
    mm_join(clocks[c->group], {(uint)c->epochs[1], here.id});
  }
}
MM_TOLD void mm_check_fence() {
  mm_check* c = mm_checks();
  const uint nth = mm_here().nth;
  c->learnt[nth] |= c->pending[nth];
  c->released[nth] = 1;
}
// flags: bit 0 device memory, bit 1 threadgroup memory (mem_flags)
MM_OUTLINE void mm_check_epoch(mm_check* c, uint flags) {
  c->epochs[0] += flags >> 1 & 1;
  c->epochs[1] += flags & 1;
  // What one thread has read is read for all: whoever fences behind the barrier acquires it.
  ulong read = 0;
  for (ulong i = 0; i < c->threads; ++i) {
    read |= c->pending[i];
    c->known |= (flags & 1) != 0 ? c->learnt[i] : 0;
  }
  for (ulong i = 0; i < c->threads; ++i) c->pending[i] |= read;
}
MM_OUTLINE void mm_check_group(mm_check* c, ulong group, ulong arena, ulong bytes) {
  c->group = group;
  c->epochs[0] = c->epochs[1] = 1;
  c->known = 0;
  c->variables = c->fixed;
  c->arena = arena;
  c->arena_end = arena + bytes;
  for (ulong i = 0; i < 32; ++i) c->simd[0][i] = c->simd[1][i] = 0;
  for (ulong i = 0; i < c->threads; ++i) c->pending[i] = c->learnt[i] = c->released[i] = 0;
}
MM_OUTLINE void mm_check_variable(ulong start, ulong bytes, ulong name) {
  mm_check* c = mm_checks();
  for (ulong i = 0; i < c->variables; ++i) {
    if (c->variable[i].start == start) return;
  }
  if (c->variables < 64) c->variable[c->variables++] = {start, bytes, name};
}
MM_OUTLINE void mm_check_meeting(uint finding, ulong code, ulong other_thread, ulong size) {
  if (mm_report* r = mm_find(mm_checks(), finding, code, 0)) r->other = other_thread, r->size = size;
}

// Item `i` of `n` in the order of this seed.
MM_UNCHECKED static uint mm_shuffled(const mm_check* c, uint i, uint n) {
  const uint turn = (uint)(c->seed * 2654435761ul >> 7) % n;
  return c->seed == 0 ? i : (c->seed & 1) != 0 ? (turn + n - i) % n : (turn + i) % n;
}
#endif
