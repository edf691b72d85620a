"""Correct kernels, and the mistakes that turn each into a wrong one. A mistake is (old text, new text, kind found)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"


@dataclass(frozen=True)
class Mistake:
    """`old` occurs once in the program. `kinds`: findings of which at least one must be made."""

    name: str
    old: str
    new: str
    kinds: tuple[str, ...]
    buffers: dict[str, int] | None = None  # elements of buffers that are shorter than the program needs


@dataclass(frozen=True)
class Program:
    name: str
    source: str
    args: Callable[[], dict[str, Any]]
    launch: dict[str, Any]
    expected: Callable[[dict[str, Any]], dict[str, torch.Tensor]]
    mistakes: tuple[Mistake, ...]
    uninitialised: tuple[str, ...] = ()


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


REDUCTION = Program(
    "reduction",
    HEAD
    + """kernel void k(device const float* x [[buffer(0)]], device float* y [[buffer(1)]], constant uint& n [[buffer(2)]],
              uint tgid [[threadgroup_position_in_grid]], uint tid [[thread_index_in_threadgroup]]) {
  threadgroup float sums[128];
  threadgroup float total[1];
  const uint i = tgid * 128 + tid;
  sums[tid] = i < n ? x[i] : 0.0f;
  threadgroup_barrier(mem_flags::mem_threadgroup); // one
  for (uint width = 64; width > 0; width /= 2) {
    if (tid < width) sums[tid] += sums[tid + width];
    threadgroup_barrier(mem_flags::mem_threadgroup); // two
  }
  if (tid == 0) total[0] = sums[0];
  threadgroup_barrier(mem_flags::mem_threadgroup); // three
  if (tid == 0) y[tgid] = total[0];
}
""",
    lambda: {"x": randn(300), "y": torch.zeros(3), "n": 300},
    {"threadgroups": 3, "threads_per_threadgroup": 128},
    lambda a: {"y": torch.stack([part.sum() for part in a["x"].split(128)])},
    (
        Mistake("no barrier after the load", "threadgroup_barrier(mem_flags::mem_threadgroup); // one", "", ("race",)),
        Mistake("no barrier in the loop", "threadgroup_barrier(mem_flags::mem_threadgroup); // two", "", ("race",)),
        Mistake(
            "only device memory is fenced",
            "threadgroup_barrier(mem_flags::mem_threadgroup); // one",
            "threadgroup_barrier(mem_flags::mem_device);",
            ("race",),
        ),
        Mistake(
            "a simdgroup's barrier for a threadgroup's",
            "threadgroup_barrier(mem_flags::mem_threadgroup); // two",
            "simdgroup_barrier(mem_flags::mem_threadgroup);",
            ("race",),
        ),
        Mistake(
            "early return",
            "const uint i = tgid * 128 + tid;",
            "const uint i = tgid * 128 + tid; if (i >= n) return;",
            ("divergent-barrier",),
        ),
        Mistake(
            "a barrier for some",
            "if (tid < width) sums[tid] += sums[tid + width];",
            "if (tid < width) { sums[tid] += sums[tid + width]; threadgroup_barrier(mem_flags::mem_threadgroup); }",
            ("divergent-barrier",),
        ),
        Mistake("one element too far", "sums[tid + width]", "sums[tid + width + 1]", ("array-index", "race")),
        Mistake("everybody writes", "if (tid == 0) y[tgid] = total[0];", "y[tgid] = total[0];", ("race",)),
        Mistake(
            "part of the tile is never written",
            "sums[tid] = i < n ? x[i] : 0.0f;",
            "if (i < n) sums[tid] = x[i];",
            ("uninitialised-read",),
        ),
        Mistake("the bound is gone", "i < n ? x[i] : 0.0f", "x[i]", ("out-of-bounds",)),
        Mistake("a total nobody wrote", "if (tid == 0) total[0] = sums[0];", "", ("uninitialised-read",)),
        Mistake("short output", "", "", ("out-of-bounds",), {"y": 2}),
        Mistake("short input", "", "", ("out-of-bounds",), {"x": 299}),
    ),
)

TRANSPOSE = Program(
    "transpose",
    HEAD
    + """struct Tile { float at[16][17]; };
void fill(threadgroup Tile& tile, device const float* x, uint width, uint2 from, uint2 tid) {
  tile.at[tid.y][tid.x] = x[(from.y + tid.y) * width + from.x + tid.x];
}
kernel void k(device const float* x [[buffer(0)]], device float* y [[buffer(1)]], constant uint2& size [[buffer(2)]],
              uint2 tgid [[threadgroup_position_in_grid]], uint2 tid [[thread_position_in_threadgroup]]) {
  threadgroup Tile tile;
  fill(tile, x, size.x, tgid * 16, tid);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[(tgid.x * 16 + tid.y) * size.y + tgid.y * 16 + tid.x] = tile.at[tid.x][tid.y];
}
""",
    lambda: {"x": randn(32, 48), "y": torch.zeros(48, 32), "size": (48, 32)},
    {"threadgroups": (3, 2), "threads_per_threadgroup": (16, 16)},
    lambda a: {"y": a["x"].T.contiguous()},
    (
        Mistake("no barrier", "threadgroup_barrier(mem_flags::mem_threadgroup);", "", ("race",)),
        Mistake("swapped sizes", "* size.y +", "* size.x +", ("out-of-bounds", "race")),
        Mistake(
            "swapped threadgroup",
            "(tgid.x * 16 + tid.y) * size.y + tgid.y * 16",
            "(tgid.y * 16 + tid.y) * size.y + tgid.x * 16",
            ("race", "out-of-bounds"),
        ),
        Mistake("swapped tile index", "tile.at[tid.y][tid.x] =", "tile.at[tid.y][tid.y] =", ("race",)),
        Mistake("beyond a member array", "tile.at[tid.x][tid.y]", "tile.at[tid.x + 1][tid.y]", ("out-of-bounds",)),
        Mistake(
            "half a tile",
            "fill(tile, x, size.x, tgid * 16, tid);",
            "if (tid.y < 8) fill(tile, x, size.x, tgid * 16, tid);",
            ("uninitialised-read",),
        ),
        Mistake(
            "vector loads that are not aligned",
            "x[(from.y + tid.y) * width + from.x + tid.x]",
            "(*(device const float4*)(x + (from.y + tid.y) * width + from.x + tid.x)).x",
            ("misaligned",),
        ),
    ),
)

HISTOGRAM = Program(
    "histogram",
    HEAD
    + """kernel void k(device const uchar* x [[buffer(0)]], device atomic_uint* bins [[buffer(1)]],
              device uint* widest [[buffer(2)]], constant uint& n [[buffer(3)]], uint i [[thread_position_in_grid]],
              uint tid [[thread_index_in_threadgroup]], uint size [[threads_per_threadgroup]]) {
  threadgroup atomic_uint mine[16];
  if (tid < 16) atomic_store_explicit(&mine[tid], 0, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup); // one
  if (i < n) atomic_fetch_add_explicit(&mine[x[i] & 15], 1, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup); // two
  if (tid < 16) {
    const uint count = atomic_load_explicit(&mine[tid], memory_order_relaxed);
    atomic_fetch_add_explicit(&bins[tid], count, memory_order_relaxed);
  }
  if (i == 0) widest[0] = size;
}
""",
    lambda: {
        "x": (torch.arange(500) * 7 % 251).to(torch.uint8),
        "bins": torch.zeros(16, dtype=torch.int32),
        "widest": torch.zeros(1, dtype=torch.int32),
        "n": 500,
    },
    {"threads": 512, "threads_per_threadgroup": 64},
    lambda a: {"bins": torch.bincount(a["x"].long() & 15, minlength=16).int()},
    (
        Mistake(
            "a plain add in threadgroup memory",
            "if (i < n) atomic_fetch_add_explicit(&mine[x[i] & 15], 1, memory_order_relaxed);",
            "if (i < n) ((threadgroup uint*)mine)[x[i] & 15] += 1;",
            ("race",),
        ),
        Mistake(
            "a plain add in device memory",
            "atomic_fetch_add_explicit(&bins[tid], count, memory_order_relaxed);",
            "((device uint*)bins)[tid] += count;",
            ("race",),
        ),
        Mistake(
            "bins are not cleared",
            "if (tid < 16) atomic_store_explicit(&mine[tid], 0, memory_order_relaxed);",
            "",
            ("uninitialised-read",),
        ),
        Mistake("too many bins", "x[i] & 15", "x[i] & 31", ("array-index", "out-of-bounds")),
        Mistake(
            "a plain store races with atomics",
            "if (tid < 16) atomic_store_explicit(&mine[tid], 0, memory_order_relaxed);\n  "
            "threadgroup_barrier(mem_flags::mem_threadgroup); // one",
            "if (tid < 16) ((threadgroup uint*)mine)[tid] = 0;",
            ("race",),
        ),
        Mistake(
            "a plain read races with atomics",
            "threadgroup_barrier(mem_flags::mem_threadgroup); // two\n  if (tid < 16) {\n    const uint count = "
            "atomic_load_explicit(&mine[tid], memory_order_relaxed);",
            "if (tid < 16) {\n    const uint count = ((threadgroup uint*)mine)[tid];",
            ("race",),
        ),
        Mistake(
            "all threads write one word", "if (i == 0) widest[0] = size;", "if (tid == 0) widest[0] = size;", ("race",)
        ),
        Mistake("short bins", "", "", ("out-of-bounds",), {"bins": 15}),
    ),
)

MATMUL = Program(
    "matmul",
    HEAD
    + """kernel void k(device const float* a [[buffer(0)]], device const float* b [[buffer(1)]], device float* c [[buffer(2)]],
              constant uint& K [[buffer(3)]], uint sgid [[simdgroup_index_in_threadgroup]],
              uint tid [[thread_index_in_threadgroup]]) {
  threadgroup float tile[2][64];
  simdgroup_float8x8 sum = make_filled_simdgroup_matrix<float, 8, 8>(0.0f), left, right;
  if (tid < 64) tile[0][tid] = b[tid];
  uint turn = 0;
  for (uint k = 0; k < K; k += 8) {
    threadgroup_barrier(mem_flags::mem_threadgroup); // full
    if (k + 8 < K && tid < 64) tile[1 - turn][tid] = b[(k + 8) * 8 + tid];
    simdgroup_load(left, a + sgid * 8 * K + k, K);
    simdgroup_load(right, tile[turn], 8);
    simdgroup_multiply_accumulate(sum, left, right, sum);
    turn = 1 - turn;
  }
  simdgroup_store(sum, c + sgid * 64, 8);
}
""",
    lambda: {"a": randn(16, 32), "b": randn(32, 8), "c": torch.zeros(16, 8), "K": 32},
    {"threadgroups": 1, "threads_per_threadgroup": 64},
    lambda a: {"c": a["a"] @ a["b"]},
    (
        Mistake(
            "one buffer for two",
            "tile[1 - turn][tid] = b[(k + 8) * 8 + tid]",
            "tile[turn][tid] = b[(k + 8) * 8 + tid]",
            ("race",),
        ),
        Mistake("no barrier", "threadgroup_barrier(mem_flags::mem_threadgroup); // full", "", ("race",)),
        Mistake("the last tile is loaded too", "if (k + 8 < K && tid < 64)", "if (tid < 64)", ("out-of-bounds",)),
        Mistake("a matrix too far", "a + sgid * 8 * K + k, K", "a + sgid * 8 * K + k + 8, K", ("out-of-bounds",)),
        Mistake("rows too long", "c + sgid * 64, 8", "c + sgid * 64, 9", ("out-of-bounds", "race")),
        Mistake(
            "half the lanes multiply",
            "simdgroup_multiply_accumulate(sum, left, right, sum);",
            "if (tid % 2 == 0) simdgroup_multiply_accumulate(sum, left, right, sum);",
            ("divergent-simdgroup-matrix",),
        ),
        Mistake("both simdgroups store the same", "c + sgid * 64, 8", "c, 8", ("race",)),
        Mistake(
            "an uninitialised tile",
            "if (tid < 64) tile[0][tid] = b[tid];",
            "if (tid < 56) tile[0][tid] = b[tid];",
            ("uninitialised-read",),
        ),
        Mistake(
            "the wrong stage is read",
            "simdgroup_load(right, tile[turn], 8);",
            "simdgroup_load(right, tile[1 - turn], 8);",
            ("race", "uninitialised-read"),
        ),
    ),
)

SCAN = Program(
    "look-back scan",
    HEAD
    + """kernel void k(device const uint* x [[buffer(0)]], device uint* y [[buffer(1)]], device uint* prefix [[buffer(2)]],
              device atomic_uint* flags [[buffer(3)]], device atomic_uint* tickets [[buffer(4)]],
              uint tid [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup uint mine, before;
  if (tid == 0) mine = atomic_fetch_add_explicit(tickets, 1, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup); // ticket
  const uint value = x[mine * 32 + tid], sum = simd_prefix_inclusive_sum(value);
  if (tid == 31) {
    uint sofar = 0;
    if (mine > 0) {
      while (atomic_load_explicit(&flags[mine - 1], memory_order_relaxed) == 0) {}
      atomic_thread_fence(mem_flags::mem_device, memory_order_seq_cst, thread_scope_device); // acquire
      sofar = prefix[mine - 1];
    }
    prefix[mine] = sofar + sum;
    atomic_thread_fence(mem_flags::mem_device, memory_order_seq_cst, thread_scope_device); // release
    atomic_store_explicit(&flags[mine], 1, memory_order_relaxed);
    before = sofar;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup); // before
  y[mine * 32 + tid] = before + sum;
}
""",
    lambda: {
        "x": (torch.arange(32 * 9) % 11).int(),
        "y": torch.zeros(32 * 9, dtype=torch.int32),
        "prefix": torch.zeros(9, dtype=torch.int32),
        "flags": torch.zeros(9, dtype=torch.int32),
        "tickets": torch.zeros(1, dtype=torch.int32),
    },
    {"threadgroups": 9, "threads_per_threadgroup": 32},
    lambda a: {"y": a["x"].cumsum(0).int()},
    (
        Mistake(
            "no acquire",
            "atomic_thread_fence(mem_flags::mem_device, memory_order_seq_cst, thread_scope_device); // acquire",
            "",
            ("race",),
        ),
        Mistake(
            "no release",
            "atomic_thread_fence(mem_flags::mem_device, memory_order_seq_cst, thread_scope_device); // release",
            "",
            ("race",),
        ),
        Mistake(
            "nobody waits",
            "while (atomic_load_explicit(&flags[mine - 1], memory_order_relaxed) == 0) {}",
            "",
            ("race",),
        ),
        Mistake(
            "flags that are no atomics",
            "atomic_store_explicit(&flags[mine], 1, memory_order_relaxed);",
            "((device uint*)flags)[mine] = 1;",
            ("race",),
        ),
        Mistake(
            "a ticket without a barrier",
            "threadgroup_barrier(mem_flags::mem_threadgroup); // ticket",
            "",
            ("race", "uninitialised-read"),
        ),
        Mistake(
            "a prefix without a barrier",
            "threadgroup_barrier(mem_flags::mem_threadgroup); // before",
            "",
            ("race", "uninitialised-read"),
        ),
        Mistake(
            "a plain counter",
            "mine = atomic_fetch_add_explicit(tickets, 1, memory_order_relaxed)",
            "mine = ((device uint*)tickets)[0]++",
            ("race",),
        ),
    ),
    ("y", "prefix"),
)

WINDOW = Program(
    "window",
    HEAD
    + """kernel void k(device const half* x [[buffer(0)]], device half* y [[buffer(1)]], device float* sums [[buffer(2)]],
              constant uint& n [[buffer(3)]], threadgroup half* tile [[threadgroup(0)]],
              uint i [[thread_position_in_grid]], uint tid [[thread_index_in_threadgroup]],
              uint size [[threads_per_threadgroup]], uint lane [[thread_index_in_simdgroup]],
              uint sgid [[simdgroup_index_in_threadgroup]]) {
  tile[tid + 1] = i < n ? x[i] : half(0);
  if (tid == 0) tile[0] = i > 0 ? x[i - 1] : half(0);
  if (tid == size - 1) tile[size + 1] = i + 1 < n ? x[i + 1] : half(0);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float taps[3];
  for (uint k = 0; k < 3; ++k) taps[k] = float(tile[tid + k]);
  const float v = 0.25f * taps[0] + 0.5f * taps[1] + 0.25f * taps[2];
  const float next = simd_shuffle_down(v, 1);
  if (i < n) y[i] = half(lane < 31 && i + 1 < n ? next : v);
  const float total = simd_sum(i < n ? v : 0.0f);
  if (lane == 0) sums[i / 32] = total;
}
""",
    lambda: {"x": randn(200).half(), "y": torch.zeros(200).half(), "sums": torch.zeros(8), "n": 200},
    {"threadgroups": 4, "threads_per_threadgroup": 64, "threadgroup_memory": {"tile": 66 * 2}},
    lambda a: {"sums": window(a["x"].float())},
    (
        Mistake(
            "the window is one too wide",
            "for (uint k = 0; k < 3; ++k)",
            "for (uint k = 0; k < 4; ++k)",
            ("array-index", "out-of-bounds", "uninitialised-read"),
        ),
        Mistake("before the first element", "i > 0 ? x[i - 1] : half(0)", "x[i - 1]", ("out-of-bounds",)),
        Mistake("behind the last element", "i + 1 < n ? x[i + 1] : half(0)", "x[i + 1]", ("out-of-bounds",)),
        Mistake(
            "no right edge",
            "if (tid == size - 1) tile[size + 1] = i + 1 < n ? x[i + 1] : half(0);",
            "",
            ("uninitialised-read",),
        ),
        Mistake("no barrier", "threadgroup_barrier(mem_flags::mem_threadgroup);", "", ("race", "uninitialised-read")),
        Mistake(
            "a shuffle among few",
            "const float next = simd_shuffle_down(v, 1);",
            "float next = 0; if (i < n - 5) next = simd_shuffle_down(v, 1);",
            ("inactive-lane",),
        ),
        Mistake(
            "a shuffle of every other lane",
            "const float next = simd_shuffle_down(v, 1);",
            "float next = 0; if (lane % 2 == 0) next = simd_shuffle_down(v, 1);",
            ("inactive-lane",),
        ),
        Mistake(
            "a simdgroup's barrier for some lanes",
            "const float total =",
            "if (i < n) simdgroup_barrier(mem_flags::mem_none); const float total =",
            ("divergent-simdgroup-barrier",),
        ),
        Mistake(
            "every lane writes the sum", "if (lane == 0) sums[i / 32] = total;", "sums[i / 32] = total;", ("race",)
        ),
        Mistake(
            "a write through const",
            "if (lane == 0) sums[i / 32] = total;",
            "if (lane == 0) sums[i / 32] = total; if (i == 0) ((device half*)x)[0] = half(0);",
            ("write-to-const", "race"),
        ),
        Mistake("short threadgroup memory", "", "", ("out-of-bounds",), {"tile": 64 * 2}),
    ),
)


def window(x: torch.Tensor) -> torch.Tensor:
    padded = torch.nn.functional.pad(x, (1, 1 + 256 - len(x)))
    v = 0.25 * padded[:-2] + 0.5 * padded[1:-1] + 0.25 * padded[2:]
    v[len(x) :] = 0
    return v.view(8, 32).sum(1)


PROGRAMS = (REDUCTION, TRANSPOSE, HISTOGRAM, MATMUL, SCAN, WINDOW)
