"""Launch counters: every launch counts once, under its kernel's name, from any thread."""

from __future__ import annotations

import threading

import torch

from metal_marlin import MetalKernelLibrary, dispatch_kernel
from metal_marlin.runtime.counters import counters, reset_counters

SOURCE = """
kernel void counted_a(device float* y, uint i [[thread_position_in_grid]]) { y[i] = 1; }
kernel void counted_b(device float* y, uint i [[thread_position_in_grid]]) { y[i] = 2; }
"""


def launch(library: MetalKernelLibrary, name: str, times: int, threads: int = 4) -> None:
    y = torch.zeros(4)
    for _ in range(times):
        dispatch_kernel(library, name, threads=threads, threads_per_threadgroup=4, args=[y])


def test_launches_are_counted_by_name() -> None:
    library, other = MetalKernelLibrary(SOURCE, device="cpu"), MetalKernelLibrary(SOURCE, device="cpu", lanes=32)
    reset_counters()
    launch(library, "counted_a", 3)
    launch(other, "counted_a", 2)
    launch(library, "counted_b", 1)
    launch(library, "counted_b", 5, threads=0)  # nothing runs
    for _ in range(2):  # reading changes nothing
        assert counters() == {"counted_a": 5, "counted_b": 1}
    assert counters(reset=True)["counted_a"] == 5
    assert counters() == {}
    launch(library, "counted_b", 2)
    assert counters() == {"counted_b": 2}


def test_threads_lose_no_count() -> None:
    library = MetalKernelLibrary(SOURCE, device="cpu")
    launch(library, "counted_a", 1)
    reset_counters()
    threads = [threading.Thread(target=launch, args=(library, "counted_a", 200)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counters()["counted_a"] == 800
