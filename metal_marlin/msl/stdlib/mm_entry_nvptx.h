#pragma once
// NVIDIA entry: the positions of a thread from special registers. With MM_TAILS, threadgroups at the upper edges of
// the grid are smaller than launched: positions are recomputed from the linear thread index, surplus threads leave.
#include "mm_config.h"
#include "metal_types"

__asm__(".extern .shared .align 1024 .b8 mm_arena[];");

struct mm_ctx {
#ifdef MM_TAILS
  uint3 total, size, position;
  uint index;

  MM_METHOD mm_ctx(uint x, uint y, uint z) {
    const uint3 nominal = dispatch_threads_per_threadgroup();
    total = (uint3)(x, y, z);
    const uint3 left = total - threadgroup_position_in_grid() * nominal;
    size = (uint3)(min(left.x, nominal.x), min(left.y, nominal.y), min(left.z, nominal.z));
    index = hardware_index();
    position = (uint3)(index % size.x, index / size.x % size.y, index / size.x / size.y);
  }
  MM_METHOD static uint min(uint a, uint b) { return a < b ? a : b; }
  MM_METHOD bool surplus() const { return index >= volume(size); }
  MM_METHOD uint3 threads_per_grid() const { return total; }
  MM_METHOD uint3 threads_per_threadgroup() const { return size; }
  MM_METHOD uint3 thread_position_in_threadgroup() const { return position; }
  MM_METHOD uint thread_index_in_threadgroup() const { return index; }
#else
  MM_METHOD mm_ctx() {}
  MM_METHOD uint3 threads_per_grid() const { return threadgroups_per_grid() * dispatch_threads_per_threadgroup(); }
  MM_METHOD uint3 threads_per_threadgroup() const { return dispatch_threads_per_threadgroup(); }
  MM_METHOD uint3 thread_position_in_threadgroup() const { return hardware_position(); }
  MM_METHOD uint thread_index_in_threadgroup() const { return hardware_index(); }
#endif

  MM_METHOD static uint volume(uint3 v) { return v.x * v.y * v.z; }
  MM_METHOD static uint groups_of(uint width, uint n) { return (n + width - 1) / width; }
  MM_METHOD static uint3 hardware_position() {
    return (uint3)((uint)__nvvm_read_ptx_sreg_tid_x(), (uint)__nvvm_read_ptx_sreg_tid_y(),
                   (uint)__nvvm_read_ptx_sreg_tid_z());
  }
  MM_METHOD static uint hardware_index() {
    const uint3 t = hardware_position();
    return t.x + (uint)__nvvm_read_ptx_sreg_ntid_x() * (t.y + (uint)__nvvm_read_ptx_sreg_ntid_y() * t.z);
  }
  MM_METHOD static __local char* arena() {
    ulong address;
    __asm__("mov.u64 %0, mm_arena;" : "=l"(address));
    return (__local char*)address;
  }

  MM_METHOD static uint3 threadgroup_position_in_grid() {
    return (uint3)((uint)__nvvm_read_ptx_sreg_ctaid_x(), (uint)__nvvm_read_ptx_sreg_ctaid_y(),
                   (uint)__nvvm_read_ptx_sreg_ctaid_z());
  }
  MM_METHOD static uint3 threadgroups_per_grid() {
    return (uint3)((uint)__nvvm_read_ptx_sreg_nctaid_x(), (uint)__nvvm_read_ptx_sreg_nctaid_y(),
                   (uint)__nvvm_read_ptx_sreg_nctaid_z());
  }
  MM_METHOD static uint3 dispatch_threads_per_threadgroup() {
    return (uint3)((uint)__nvvm_read_ptx_sreg_ntid_x(), (uint)__nvvm_read_ptx_sreg_ntid_y(),
                   (uint)__nvvm_read_ptx_sreg_ntid_z());
  }
  MM_METHOD uint3 thread_position_in_grid() const {
    return threadgroup_position_in_grid() * dispatch_threads_per_threadgroup() + thread_position_in_threadgroup();
  }
  MM_METHOD uint3 grid_size() const { return threads_per_grid(); }
  MM_METHOD uint3 grid_origin() const { return (uint3)0u; }
  MM_METHOD uint threads_per_simdgroup() const { return 32; }
  MM_METHOD uint thread_execution_width() const { return 32; }
  MM_METHOD uint thread_index_in_simdgroup() const { return thread_index_in_threadgroup() % 32; }
  MM_METHOD uint simdgroup_index_in_threadgroup() const { return thread_index_in_threadgroup() / 32; }
  MM_METHOD uint simdgroups_per_threadgroup() const { return groups_of(32, volume(threads_per_threadgroup())); }
  MM_METHOD uint dispatch_simdgroups_per_threadgroup() const {
    return groups_of(32, volume(dispatch_threads_per_threadgroup()));
  }
  MM_METHOD uint thread_index_in_quadgroup() const { return thread_index_in_threadgroup() % 4; }
  MM_METHOD uint quadgroup_index_in_threadgroup() const { return thread_index_in_threadgroup() / 4; }
  MM_METHOD uint quadgroups_per_threadgroup() const { return groups_of(4, volume(threads_per_threadgroup())); }
  MM_METHOD uint dispatch_quadgroups_per_threadgroup() const {
    return groups_of(4, volume(dispatch_threads_per_threadgroup()));
  }
};
