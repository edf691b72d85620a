"""Atomics: every operation on every type, in device and threadgroup memory, and under contention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

Run = Callable[..., dict[str, torch.Tensor]]

HEAD = """#include <metal_stdlib>
using namespace metal;
"""


def one_thread(msl: Run, msl_type: str, space: str, start: list[float], body: str, results: int) -> tuple[list, list]:
    """Run `body` once over atomics a[0], a[1], … that hold `start`; it sets r[i]. Returns (final values, r)."""
    n, atomic = len(start), f"atomic<{msl_type}>"
    here = {"device": "device atomic<T>* a = given;", "threadgroup": f"threadgroup {atomic} a[{n}];"}[space]
    copy_in = "atomic_store_explicit(&a[i], init[i], memory_order_relaxed);"
    source = f"""{HEAD}
typedef {msl_type} T;
kernel void k(device {atomic}* given [[buffer(0)]], device const T* init [[buffer(1)]], device T* r [[buffer(2)]],
              device T* last [[buffer(3)]]) {{
    {here}
    for (int i = 0; i < {n}; ++i) {copy_in}
    {body}
    for (int i = 0; i < {n}; ++i) last[i] = atomic_load_explicit(&a[i], memory_order_relaxed);
}}"""
    dtype = {
        "int": torch.int32,
        "uint": torch.uint32,
        "bool": torch.bool,
        "ulong": torch.uint64,
        "long": torch.int64,
        "float": torch.float32,
    }[msl_type]
    args = {
        "given": torch.zeros(n, dtype=dtype),
        "init": torch.tensor(start).to(dtype) if dtype != torch.uint64 else torch.tensor(start, dtype=dtype),
        "r": torch.zeros(results, dtype=dtype),
        "last": torch.zeros(n, dtype=dtype),
    }
    out = msl(source, "k", args, threads=1, threads_per_threadgroup=1)
    return out["last"].tolist(), out["r"].tolist()


SPACES = pytest.mark.parametrize("space", ["device", "threadgroup"])
INTEGERS = pytest.mark.parametrize("msl_type", ["int", "uint", "ulong", "long"])


@pytest.mark.lane_agnostic
@SPACES
@INTEGERS
def test_fetch_and_modify(msl: Run, space: str, msl_type: str) -> None:
    body = "\n    ".join(
        f"r[{i}] = atomic_fetch_{name}_explicit(&a[{i}], {operand}, memory_order_relaxed);"
        for i, (name, operand) in enumerate(
            [
                ("add", 5),
                ("sub", 3),
                ("and", 12),
                ("or", 12),
                ("xor", 12),
                ("min", 7),
                ("max", 7),
                ("min", 90),
                ("max", 90),
            ]
        )
    )
    last, r = one_thread(msl, msl_type, space, [10] * 9, body, 9)
    assert r == [10] * 9
    assert last == [15, 7, 8, 14, 6, 7, 10, 10, 90]


@pytest.mark.lane_agnostic
@SPACES
def test_signs_and_wrapping(msl: Run, space: str) -> None:
    body = """r[0] = atomic_fetch_min_explicit(&a[0], -7, memory_order_relaxed);
    r[1] = atomic_fetch_max_explicit(a + 1, -7, memory_order_relaxed);
    r[2] = atomic_fetch_add_explicit(&a[2], 1, memory_order_relaxed);"""
    last, r = one_thread(msl, "int", space, [3, -9, 2**31 - 1], body, 3)
    assert (last, r) == ([-7, -7, -(2**31)], [3, -9, 2**31 - 1])
    body = """r[0] = atomic_fetch_min_explicit(&a[0], 0xffffffffu, memory_order_relaxed);
    r[1] = atomic_fetch_max_explicit(&a[1], 0xfffffff0u, memory_order_relaxed);
    r[2] = atomic_fetch_sub_explicit(&a[2], 1, memory_order_relaxed);"""
    last, r = one_thread(msl, "uint", space, [3, 9, 0], body, 3)
    assert (last, r) == ([3, 0xFFFFFFF0, 0xFFFFFFFF], [3, 9, 0])


@pytest.mark.lane_agnostic
@SPACES
def test_ulong_min_and_max(msl: Run, space: str) -> None:
    body = """atomic_min_explicit(&a[0], ulong(1) << 40, memory_order_relaxed);
    atomic_max_explicit(&a[1], ulong(1) << 40, memory_order_relaxed);
    atomic_max_explicit(&a[2], 5ul, memory_order_relaxed);"""
    last, _ = one_thread(msl, "ulong", space, [2**63, 7, 6], body, 1)
    assert last == [2**40, 2**40, 6]


@pytest.mark.lane_agnostic
@SPACES
def test_float(msl: Run, space: str) -> None:
    body = """r[0] = atomic_fetch_add_explicit(&a[0], 0.25f, memory_order_relaxed);
    r[1] = atomic_fetch_sub_explicit(&a[1], 2, memory_order_relaxed);
    r[2] = atomic_exchange_explicit(&a[2], -0.5f, memory_order_relaxed);
    float seen = 9.0f;
    r[3] = atomic_compare_exchange_weak_explicit(&a[3], &seen, 1.0f, memory_order_relaxed, memory_order_relaxed) ? 0.0f : seen;
    while (!atomic_compare_exchange_weak_explicit(&a[3], &seen, seen * 2.0f, memory_order_relaxed, memory_order_relaxed)) {}"""
    last, r = one_thread(msl, "float", space, [1.5, 1.5, 1.5, 4.0], body, 4)
    assert (last, r) == ([1.75, -0.5, -0.5, 8.0], [1.5, 1.5, 1.5, 4.0])


@pytest.mark.lane_agnostic
@SPACES
@pytest.mark.parametrize("msl_type", ["int", "uint", "ulong", "bool"])
def test_exchange(msl: Run, space: str, msl_type: str) -> None:
    """A weak exchange may fail without reason, so loops around it; with the wrong value it must fail and tell."""
    body = """r[0] = atomic_exchange_explicit(&a[0], T(0), memory_order_relaxed);
    T wrong = T(0);
    r[1] = T(atomic_compare_exchange_weak_explicit(&a[1], &wrong, T(0), memory_order_relaxed, memory_order_relaxed));
    r[2] = wrong;
    T right = T(1);
    while (!atomic_compare_exchange_weak_explicit(&a[2], &right, T(0), memory_order_relaxed, memory_order_relaxed)) {}
    r[3] = right;"""
    # Four of them: NVIDIA exchanges a byte within its word of four, which memcheck wants inside the buffer.
    last, r = one_thread(msl, msl_type, space, [1, 1, 1, 1], body, 4)
    assert (last, r) == ([0, 1, 0, 1], [1, 0, 1, 1])


@pytest.mark.lane_agnostic
def test_names_orders_and_forms(msl: Run) -> None:
    """Named types, metal:: prefixes, members of structs, const objects, fences and orders other than relaxed."""
    source = """#include <metal_stdlib>
#include <metal_atomic>
using namespace metal;
struct Counters { atomic_uint hits; metal::atomic_int balance; atomic_float sum; atomic_bool flag; };
uint peek(device const atomic_uint* from) { return atomic_load_explicit(from, memory_order_relaxed); }
uint bump(volatile device atomic_uint& counter) {
    return atomic_fetch_add_explicit(&counter, 1, metal::memory_order_relaxed);
}
kernel void k(device Counters* c [[buffer(0)]], device uint* out [[buffer(1)]]) {
    out[0] = bump(c->hits) + bump(c[0].hits) + 10 * peek(&c->hits);
    atomic_fetch_sub_explicit(&c->balance, 4, memory_order_relaxed);
    atomic_thread_fence(mem_flags::mem_device, memory_order_seq_cst, thread_scope_device);
    atomic_fetch_add_explicit(&c->sum, 2.5f, memory_order_relaxed);
    atomic_store_explicit(&c->flag, true, memory_order_release);
    out[1] = atomic_load_explicit(&c->flag, memory_order_acquire) ? 7 : 8;
    out[2] = sizeof(atomic_uint) + 10 * sizeof(atomic_ulong) + 100 * sizeof(atomic<float>);
    device atomic_uint* words = (device atomic_uint*)out;
    atomic_fetch_or_explicit(words + 3, 5u, memory_order_acq_rel);
}"""
    counters = torch.tensor([3, 1, 0, 0], dtype=torch.int32)
    args = {"c": counters, "out": torch.zeros(4, dtype=torch.int32)}
    out = msl(source, "k", args, threads=1, threads_per_threadgroup=1)
    assert out["out"].tolist() == [3 + 4 + 50, 7, 4 + 80 + 400, 5]
    assert out["c"][:2].tolist() == [5, -3]
    assert out["c"].view(torch.float32)[2].item() == 2.5
    assert out["c"].view(torch.uint8)[12].item() == 1


# --- contention: many threadgroups on all cores
THREADS = 100 * 256


def test_counters_under_contention(msl: Run) -> None:
    source = f"""{HEAD}
kernel void k(device atomic_uint* n [[buffer(0)]], device atomic_int* m [[buffer(1)]], device atomic_float* f [[buffer(2)]],
              device uchar* seen [[buffer(3)]], device atomic_ulong* wide [[buffer(4)]],
              uint tid [[thread_position_in_grid]]) {{
    seen[atomic_fetch_add_explicit(n, 1u, memory_order_relaxed)] += 1;
    atomic_fetch_add_explicit(n + 1 + tid % 3, tid, memory_order_relaxed);
    atomic_fetch_max_explicit(m, int(tid * 7919 % 25601), memory_order_relaxed);
    atomic_fetch_min_explicit(m + 1, -int(tid * 7919 % 25601), memory_order_relaxed);
    atomic_fetch_xor_explicit(m + 2, int(tid), memory_order_relaxed);
    atomic_fetch_or_explicit(m + 3, 1 << tid % 31, memory_order_relaxed);
    atomic_fetch_add_explicit(f, 0.5f, memory_order_relaxed);
    atomic_max_explicit(wide, ulong(tid) << 33, memory_order_relaxed);
    int expected = atomic_load_explicit(m + 4, memory_order_relaxed);
    while (!atomic_compare_exchange_weak_explicit(m + 4, &expected, expected + 2, memory_order_relaxed,
                                                  memory_order_relaxed)) {{}}
}}"""
    args = {
        "n": torch.zeros(4, dtype=torch.int32),
        "m": torch.zeros(5, dtype=torch.int32),
        "f": torch.zeros(1),
        "seen": torch.zeros(THREADS, dtype=torch.uint8),
        "wide": torch.zeros(1, dtype=torch.int64),
    }
    out = msl(source, "k", args, threads=THREADS, threads_per_threadgroup=256)
    tids = torch.arange(THREADS)
    assert out["n"].tolist() == [THREADS, *(int(tids[tids % 3 == i].sum()) for i in range(3))]
    spread = tids * 7919 % 25601
    xor = 0
    for t in range(THREADS):
        xor ^= t
    assert out["m"].tolist() == [int(spread.max()), -int(spread.max()), xor, 2**31 - 1, 2 * THREADS]
    assert out["f"].item() == THREADS / 2
    assert (out["seen"] == 1).all(), "two threads got the same ticket"
    assert out["wide"].item() == (THREADS - 1) << 33


def test_histogram(msl: Run) -> None:
    """Counted in threadgroup memory, then added to device memory."""
    source = f"""{HEAD}
kernel void k(device const uchar* x [[buffer(0)]], device atomic_uint* bins [[buffer(1)]],
              uint tid [[thread_position_in_grid]], uint local [[thread_index_in_threadgroup]],
              uint n [[threads_per_threadgroup]]) {{
    threadgroup atomic_uint counts[256];
    for (uint i = local; i < 256; i += n) atomic_store_explicit(&counts[i], 0u, memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    atomic_fetch_add_explicit(&counts[x[tid]], 1u, memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = local; i < 256; i += n) {{
        const uint count = atomic_load_explicit(&counts[i], memory_order_relaxed);
        if (count) atomic_fetch_add_explicit(&bins[i], count, memory_order_relaxed);
    }}
}}"""
    x = torch.randint(0, 256, (20001,), generator=torch.Generator().manual_seed(4)).to(torch.uint8)
    args = {"x": x, "bins": torch.zeros(256, dtype=torch.int32)}
    out = msl(source, "k", args, threads=20001, threads_per_threadgroup=192)["bins"]
    assert torch.equal(out.long(), torch.bincount(x.long(), minlength=256))


def test_last_threadgroup_finishes(msl: Run) -> None:
    """The threadgroup that takes the last ticket sees what all the others wrote before theirs."""
    source = f"""{HEAD}
kernel void k(device const float* x [[buffer(0)]], device float* parts [[buffer(1)]],
              device atomic_uint* tickets [[buffer(2)]], device float* y [[buffer(3)]],
              uint tid [[thread_position_in_grid]], uint local [[thread_index_in_threadgroup]],
              uint group [[threadgroup_position_in_grid]], uint groups [[threadgroups_per_grid]]) {{
    threadgroup bool last;
    const float sum = simd_sum(x[tid]);
    if (local == 0) {{
        parts[group] = sum;
        atomic_thread_fence(mem_flags::mem_device, memory_order_seq_cst, thread_scope_device);
        last = atomic_fetch_add_explicit(tickets, 1u, memory_order_relaxed) == groups - 1;
    }}
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (!last) return;
    atomic_thread_fence(mem_flags::mem_device, memory_order_seq_cst, thread_scope_device);
    float total = 0.0f;
    for (uint i = local; i < groups; i += 32) total += ((volatile device float*)parts)[i];
    total = simd_sum(total);
    if (local == 0) y[0] = total;
}}"""
    x = torch.arange(32 * 500, dtype=torch.float32) % 7
    args = {"x": x, "parts": torch.zeros(500), "tickets": torch.zeros(1, dtype=torch.int32), "y": torch.zeros(1)}
    out = msl(source, "k", args, threadgroups=500, threads_per_threadgroup=32)
    assert out["y"].item() == x.sum().item()
