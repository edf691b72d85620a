"""Barriers: loops, several simdgroups, dynamic threadgroup memory, 3-D and edge threadgroups, lanes that left."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

Run = Callable[..., dict[str, torch.Tensor]]

HEAD = """#include <metal_stdlib>
using namespace metal;
"""


@pytest.mark.parametrize("threads", [1, 31, 32, 33, 100, 256, 1000, 1024])
def test_tree_reduction(msl: Run, threads: int) -> None:
    """The textbook reduction in threadgroup memory, and simd_sum followed by one simdgroup."""
    source = f"""{HEAD}
kernel void k(device const int* x [[buffer(0)]], device int* y [[buffer(1)]], uint tid [[thread_index_in_threadgroup]],
              uint n [[threads_per_threadgroup]], uint lane [[thread_index_in_simdgroup]],
              uint sgid [[simdgroup_index_in_threadgroup]], uint sgs [[simdgroups_per_threadgroup]],
              uint group [[threadgroup_position_in_grid]]) {{
    threadgroup int all[1024], partial[32];
    const int v = x[group * n + tid];
    all[tid] = v;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint stride = 512; stride > 0; stride >>= 1) {{
        if (tid < stride && tid + stride < n) all[tid] += all[tid + stride];
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }}
    const int sum = simd_sum(v);
    if (lane == 0) partial[sgid] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (sgid == 0) {{
        const int total = simd_sum(lane < sgs ? partial[lane] : 0);
        if (lane == 0) y[group * 2] = all[0], y[group * 2 + 1] = total;
    }}
}}"""
    x = torch.randint(-1000, 1000, (5, threads), generator=torch.Generator().manual_seed(threads)).int()
    args = {"x": x, "y": torch.zeros(5, 2, dtype=torch.int32)}
    out = msl(source, "k", args, threadgroups=5, threads_per_threadgroup=threads)["y"]
    assert torch.equal(out, x.sum(1, keepdim=True).int().expand(5, 2))


def test_uniform_loop_exchanges_between_simdgroups(msl: Run) -> None:
    """Each round every thread reads what a thread of another simdgroup wrote in the round before."""
    source = f"""{HEAD}
kernel void k(device int* y [[buffer(0)]], constant int& rounds [[buffer(1)]], uint tid [[thread_index_in_threadgroup]],
              uint n [[threads_per_threadgroup]]) {{
    threadgroup int box[2][160];
    int v = int(tid);
    for (int r = 0; r < rounds; ++r) {{
        box[r & 1][tid] = v;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        v = box[r & 1][(tid + 37) % n] + 1;
    }}
    y[tid] = v;
}}"""
    out = msl(
        source,
        "k",
        {"y": torch.zeros(160, dtype=torch.int32), "rounds": 23},
        threadgroups=1,
        threads_per_threadgroup=160,
    )
    assert out["y"].tolist() == [(t + 23 * 37) % 160 + 23 for t in range(160)]


def test_barrier_in_nested_calls_and_branches(msl: Run) -> None:
    """Barriers in functions, and in branches that all threads of a threadgroup take."""
    source = f"""{HEAD}
static int rotate(threadgroup int* box, int v, uint tid, uint n, int by) {{
    threadgroup_barrier(mem_flags::mem_threadgroup);
    box[tid] = v;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return box[(tid + by) % n];
}}
kernel void k(device int* y [[buffer(0)]], uint tid [[thread_index_in_threadgroup]], uint n [[threads_per_threadgroup]],
              uint group [[threadgroup_position_in_grid]]) {{
    threadgroup int box[96];
    int v = int(tid);
    if (group % 2 == 0) {{
        v = rotate(box, v, tid, n, 1);
        v = rotate(box, v, tid, n, 2);
    }} else {{
        for (uint i = 0; i < group; ++i) v = rotate(box, v, tid, n, 5);
    }}
    y[group * n + tid] = v;
}}"""
    out = msl(source, "k", {"y": torch.zeros(6, 96, dtype=torch.int32)}, threadgroups=6, threads_per_threadgroup=96)[
        "y"
    ]
    for group in range(6):
        by = 3 if group % 2 == 0 else 5 * group
        assert out[group].tolist() == [(t + by) % 96 for t in range(96)]


@pytest.mark.parametrize("threads", [(7, 5, 3), (8, 4, 4), (33, 2, 1)])
def test_three_dimensions_and_edges(msl: Run, threads: tuple[int, int, int]) -> None:
    """Edge threadgroups are smaller; every threadgroup sums the positions of exactly its own threads."""
    source = f"""{HEAD}
kernel void k(device int* y [[buffer(0)]], uint3 p [[thread_position_in_grid]], uint3 grid [[threads_per_grid]],
              uint3 size [[threads_per_threadgroup]], uint tid [[thread_index_in_threadgroup]]) {{
    threadgroup int box[64];
    const uint n = size.x * size.y * size.z;
    const int at = int(p.x + grid.x * (p.y + grid.y * p.z));
    box[tid] = at + 1;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    int sum = 0;
    for (uint i = 0; i < n; ++i) sum += box[i];
    y[at] = sum;
}}"""
    shape = tuple(reversed(threads))
    tptg = (4, 2, 3)
    out = msl(source, "k", {"y": torch.zeros(shape, dtype=torch.int32)}, threads=threads, threads_per_threadgroup=tptg)[
        "y"
    ]
    at = torch.arange(1, out.numel() + 1).reshape(shape)
    want = torch.zeros_like(at)
    for z in range(0, shape[0], 3):
        for y in range(0, shape[1], 2):
            for x in range(0, shape[2], 4):
                block = (slice(z, z + 3), slice(y, y + 2), slice(x, x + 4))
                want[block] = at[block].sum()
    assert torch.equal(out.long(), want)


def test_lanes_that_returned_are_not_waited_for(msl: Run) -> None:
    """Metal leaves barriers after a return undefined; what runs everywhere is simdgroup functions among the rest."""
    source = f"""{HEAD}
kernel void k(device int* y [[buffer(0)]], uint tid [[thread_index_in_threadgroup]],
              uint lane [[thread_index_in_simdgroup]]) {{
    if (tid % 5 == 2 || tid >= 70) {{ y[tid] = -1; return; }}
    int v = simd_sum(1);
    simdgroup_barrier(mem_flags::mem_none);
    if (lane % 2) v += 100 * simd_sum(1);
    y[tid] = v + 10000 * simd_sum(1);
}}"""
    out = msl(source, "k", {"y": torch.zeros(96, dtype=torch.int32)}, threadgroups=1, threads_per_threadgroup=96)[
        "y"
    ].tolist()
    there = [t % 5 != 2 and t < 70 for t in range(96)]
    for t in range(96):
        group = range(t // 32 * 32, t // 32 * 32 + 32)
        rest, odd = sum(there[i] for i in group), sum(there[i] and i % 2 == 1 for i in group)
        assert out[t] == (10001 * rest + (100 * odd if t % 2 else 0) if there[t] else -1), t


def test_simdgroup_barrier_orders_threadgroup_memory(msl: Run) -> None:
    source = f"""{HEAD}
kernel void k(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
              uint tid [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
              uint sgid [[simdgroup_index_in_threadgroup]]) {{
    threadgroup float box[4][32];
    float v = x[tid];
    for (uint d = 1; d < 32; d *= 2) {{
        box[sgid][lane] = v;
        simdgroup_barrier(mem_flags::mem_threadgroup);
        v += lane >= d ? box[sgid][lane - d] : 0.0f;
        simdgroup_barrier(mem_flags::mem_threadgroup);
    }}
    y[tid] = v;
}}"""
    x = torch.randint(-9, 10, (4, 32), generator=torch.Generator().manual_seed(1)).float()
    out = msl(source, "k", {"x": x, "y": torch.zeros(4, 32)}, threadgroups=1, threads_per_threadgroup=128)["y"]
    assert torch.equal(out, x.cumsum(1))


def test_producers_and_consumers(msl: Run) -> None:
    """Simdgroup 0 fills a ring of tiles, the others use them; a barrier per stage."""
    source = f"""{HEAD}
kernel void k(device const int* x [[buffer(0)]], device int* y [[buffer(1)]], uint tid [[thread_index_in_threadgroup]],
              uint lane [[thread_index_in_simdgroup]], uint sgid [[simdgroup_index_in_threadgroup]]) {{
    threadgroup int ring[2][64];
    int acc = 0;
    for (uint stage = 0; stage <= 10; ++stage) {{
        if (sgid == 0) {{
            if (stage < 10) for (uint i = lane; i < 64; i += 32) ring[stage & 1][i] = x[stage * 64 + i];
        }} else if (stage > 0) {{
            int part = ring[(stage - 1) & 1][lane] * int(sgid) + ring[(stage - 1) & 1][lane + 32];
            acc += simd_sum(part);
        }}
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }}
    if (sgid > 0 && lane == 0) y[sgid - 1] = acc;
}}"""
    x = torch.randint(-100, 100, (10, 64), generator=torch.Generator().manual_seed(2)).int()
    out = msl(
        source, "k", {"x": x, "y": torch.zeros(3, dtype=torch.int32)}, threadgroups=1, threads_per_threadgroup=128
    )["y"]
    low, high = int(x[:, :32].sum()), int(x[:, 32:].sum())
    assert out.tolist() == [low * s + high for s in (1, 2, 3)]


def test_dynamic_threadgroup_memory(msl: Run) -> None:
    """Two arguments of sizes given at the launch beside a static array: disjoint, and as long as asked for."""
    source = f"""{HEAD}
kernel void k(device int* y [[buffer(0)]], threadgroup int* a [[threadgroup(0)]], threadgroup short* b [[threadgroup(1)]],
              uint tid [[thread_index_in_threadgroup]], uint n [[threads_per_threadgroup]],
              uint group [[threadgroup_position_in_grid]]) {{
    threadgroup int fixed[64];
    for (uint i = 0; i < 3; ++i) a[i * n + tid] = int(i * n + tid + group);
    b[tid] = short(1000 + tid);
    fixed[tid] = -int(tid);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    int sum = 0;
    for (uint i = 0; i < 3 * n; ++i) sum += a[i];
    y[group * n + tid] = sum * 10000 + b[n - 1 - tid] + fixed[(tid + 1) % n];
}}"""
    args = {"y": torch.zeros(9, 50, dtype=torch.int32)}
    sizes = {"a": 50 * 3 * 4, "b": 50 * 2}
    out = msl(source, "k", args, threadgroups=9, threads_per_threadgroup=50, threadgroup_memory=sizes)["y"]
    for group in range(9):
        total = sum(range(150)) + 150 * group
        assert out[group].tolist() == [total * 10000 + 1049 - t - (t + 1) % 50 for t in range(50)]


def test_collectives_between_barriers(msl: Run) -> None:
    """Simdgroups that take different numbers of collectives between two barriers."""
    source = f"""{HEAD}
kernel void k(device int* y [[buffer(0)]], uint tid [[thread_index_in_threadgroup]],
              uint lane [[thread_index_in_simdgroup]], uint sgid [[simdgroup_index_in_threadgroup]]) {{
    threadgroup int box[8];
    int v = int(lane);
    for (uint round = 0; round < 4; ++round) {{
        for (uint i = 0; i < sgid + round; ++i) v = simd_shuffle_rotate_down(v, 1);
        if (lane == 0) box[sgid] = v;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        v += 100 * box[(sgid + 1) % 5];
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }}
    y[tid] = v;
}}"""
    out = msl(source, "k", {"y": torch.zeros(5, 32, dtype=torch.int32)}, threadgroups=1, threads_per_threadgroup=160)[
        "y"
    ]
    v = torch.arange(32).repeat(5, 1)
    for turn in range(4):
        v = torch.stack([v[s].roll(-(s + turn)) for s in range(5)])
        v = v + 100 * v[:, 0].roll(-1)[:, None]
    assert torch.equal(out.long(), v)


@pytest.mark.lane_agnostic
def test_one_thread_per_threadgroup(msl: Run) -> None:
    source = f"""{HEAD}
kernel void k(device const float* x [[buffer(0)]], device float* y [[buffer(1)]], uint i [[threadgroup_position_in_grid]],
              uint lanes [[threads_per_simdgroup]], uint n [[threads_per_threadgroup]]) {{
    threadgroup float box[4];
    for (int j = 0; j < 4; ++j) {{
        box[j] = x[i * 4 + j];
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }}
    simdgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);
    y[i] = simd_sum(box[0] + box[1] + box[2] + box[3]) * float(n);
}}"""
    x = torch.randint(-9, 10, (1000, 4), generator=torch.Generator().manual_seed(3)).float()
    out = msl(source, "k", {"x": x, "y": torch.zeros(1000)}, threads=1000, threads_per_threadgroup=1)["y"]
    assert torch.equal(out, x.sum(1))
