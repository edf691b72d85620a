"""Kernels under their own names in torch.profiler."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

from metal_marlin import MetalKernelLibrary, dispatch_kernel, metal_kernel

SOURCE = """
kernel void first_of_two(device float* y, uint i [[thread_position_in_grid]]) { y[i] += 1; }
template <typename T> kernel void family(device T* y, uint i [[thread_position_in_grid]]) { y[i] += 2; }
template [[host_name("family_float")]] [[kernel]] void family<float>(device float* y, uint i [[thread_position_in_grid]]);
"""


def test_names_in_the_trace(device: str) -> None:
    library = MetalKernelLibrary(SOURCE, device=device)
    scale = metal_kernel("scaled_inline", "y[thread_position_in_grid.x] = 4;", [], ["y"])
    y = torch.zeros(64, device=device)

    def work() -> None:
        for name in ("first_of_two", "family_float", "first_of_two"):
            dispatch_kernel(library, name, threads=64, threads_per_threadgroup=32, args=[y])
        scale(grid=64, threadgroup=64, output_shapes=[(64,)], output_dtypes=[torch.float32], device=device)
        if device == "cuda":
            torch.cuda.synchronize()

    work()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as trace:
        work()
    assert y.tolist() == [8] * 64
    counts = {"first_of_two": 2, "family_float": 1, "scaled_inline": 1}
    host = [e.name for e in trace.events() if e.device_type == torch.autograd.DeviceType.CPU]
    assert {name: host.count(name) for name in counts} == counts
    if device == "cuda":
        gpu = [e.name for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        assert {name: sum(name in seen for seen in gpu) >= n for name, n in counts.items()} == dict.fromkeys(
            counts, True
        )
    averages = {e.key: e.count for e in trace.key_averages()}
    assert averages["first_of_two"] >= 2


def test_the_trace_has_the_time_of_the_kernel() -> None:
    source = "kernel void slow(device float* y) { float s = 0; for (int i = 0; i < 3000000; i++) s = s * 0.5f + y[i & 7]; y[8] = s; }"
    library = MetalKernelLibrary(source, device="cpu")
    y = torch.ones(9)
    dispatch_kernel(library, "slow", threads=1, threads_per_threadgroup=1, args=[y])
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        dispatch_kernel(library, "slow", threads=1, threads_per_threadgroup=1, args=[y])
    (event,) = [e for e in trace.events() if e.name == "slow"]
    assert event.cpu_time_total > 500  # microseconds: three million dependent steps take milliseconds
    assert float(y[8]) == 2
