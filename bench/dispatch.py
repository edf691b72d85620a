"""What a launch costs: dispatch_kernel from Python, the executable alone, a CUDA graph replayed; and what a row
costs to compile cold and to load from the cache.

    python bench/dispatch.py [--device cuda] [--precompile cuda:sm_90a=DIR]

--precompile only compiles the kernels used here into DIR, for a machine without a compiler that has
METAL_MARLIN_ROWS=DIR.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch
from common import (
    Candidate,
    Times,
    graph_times,
    host_times,
    record,
    require_correct,
    save,
    synchronize,
    table,
    usable_devices,
)

from metal_marlin import MetalKernelLibrary, dispatch_kernel
from metal_marlin.errors import CompilerNotFound
from metal_marlin.msl.clang import find_compiler
from metal_marlin.msl.target import Target
from metal_marlin.runtime.cache import RowCache
from metal_marlin.runtime.device import device_module, resolve_device

SOURCE = """
#include <metal_stdlib>
using namespace metal;

kernel void empty() {}

kernel void affine(device const float* x [[buffer(0)]], device const float* b [[buffer(1)]],
                   device float* y [[buffer(2)]], constant float& a [[buffer(3)]],
                   uint i [[thread_position_in_grid]]) {
  y[i] = a * x[i] + b[i];
}
"""
GOALS = {"cpu": 6.0, "cuda": 8.0}
COLD_GOAL_MS, LOAD_GOAL_MS = 500.0, 5.0
N = 256


def precompile(option: str) -> None:
    """Compile the kernels of this bench for TARGET into DIR."""
    text, _, folder = option.partition("=")
    library = MetalKernelLibrary(SOURCE, target=Target.parse(text), cache=RowCache(folder))
    for name in library.kernels:
        library.compile(name)


def candidates(device: str) -> dict[str, Candidate]:
    """Launches to compare; the kernel with arguments is checked before anything is timed."""
    library = MetalKernelLibrary(SOURCE, device=device)
    x, b, y = (torch.randn(N, device=device) for _ in range(3))
    y.fill_(float("nan"))
    args = {"x": x, "b": b, "y": y, "a": 1.5}

    def affine(_: int) -> None:
        dispatch_kernel(library, "affine", threads=N, threads_per_threadgroup=N, args=args)

    affine(0)
    synchronize(device)
    require_correct("affine", y, x.double() * 1.5 + b.double(), 1e-6)
    loaded = library.load("empty")[1]
    one = (1, 1, 1)
    return {
        "dispatch_kernel, empty": lambda _: dispatch_kernel(
            library, "empty", threadgroups=1, threads_per_threadgroup=1
        ),
        "dispatch_kernel, 3 tensors and a float": affine,
        "executable alone, empty": lambda _: loaded.launch([], one, one, one, []),
        "torch, one small op": lambda _: torch.add(x, b, out=y),
    }


def launches(device: str) -> list[tuple[str, ...]]:
    """Rows of the table of launch costs."""
    kind = device.partition(":")[0]
    calls = candidates(device)
    rows = []
    measured = {(name, "host"): times for name, times in host_times(calls, device).items()}
    if kind == "cuda":
        measured |= {(name, "graph, per kernel"): times for name, times in graph_times(calls, device).items()}
        measured["replay of a graph", "host"] = _replay(calls["dispatch_kernel, empty"], device)
    for (name, clock), times in measured.items():
        goal = GOALS.get(kind) if (name, clock) == ("dispatch_kernel, empty", "host") else None
        verdict = "" if goal is None else f"{'PASS' if times.median <= goal else 'OVER'} (≤ {goal:g})"
        save("dispatch", clock, name, times, device)
        rows.append((device, name, clock, *(f"{v:.2f}" for v in (times.median, times.p20, times.p80)), verdict))
    return rows


def _replay(call: Candidate, device: str) -> Times:
    """Host time to replay a graph of 64 kernels; the rounds are paced so that the queue never fills."""
    graph = record(call, 64)
    return host_times({"replay": lambda _: graph.replay()}, device, inner=20)["replay"]


def loading(device: str) -> list[tuple[str, ...]]:
    """Milliseconds to compile a row cold (where there is a compiler) and to load it from a warm cache."""
    rows = []
    target = device_module(resolve_device(device).kind).target(resolve_device(device).index)
    cold: list[float] = []
    try:
        find_compiler()
        for i in range(5):
            text = SOURCE + f"// {i} {time.time_ns()}\n"  # never compiled before
            with tempfile.TemporaryDirectory() as folder:
                library = MetalKernelLibrary(text, target=target, cache=RowCache(folder))
                cold.append(_milliseconds(lambda library=library: library.compile("affine")))
    except CompilerNotFound:
        pass
    warm = []
    for _ in range(9):
        library = MetalKernelLibrary(SOURCE, device=device)
        warm.append(_milliseconds(lambda library=library: library.load("affine")))
        synchronize(device)
    for what, samples, goal in (("compile, cold", cold, COLD_GOAL_MS), ("load, cached", warm, LOAD_GOAL_MS)):
        if not samples:
            continue
        times = Times.of([1e3 * s for s in samples])
        save("dispatch", "row", what, times, device)
        middle = statistics.median(samples)
        verdict = f"{'PASS' if middle <= goal else 'OVER'} (≤ {goal:g})"
        rows.append((device, f"row: {what}", f"{middle:.2f}", f"{min(samples):.2f}", f"{max(samples):.2f}", verdict))
    return rows


def _milliseconds(call: object) -> float:
    start = time.perf_counter()
    call()  # type: ignore[operator]
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; all that work here by default")
    parser.add_argument("--precompile", metavar="TARGET=DIR", help="only compile for TARGET into DIR")
    options = parser.parse_args()
    if options.precompile:
        precompile(options.precompile)
        return
    devices = usable_devices(options.device)
    costs = [row for device in devices for row in launches(device)]
    loads = [row for device in devices for row in loading(device)]
    table("launch, µs", [("device", "what", "clock", "median", "p20", "p80", "goal"), *costs])
    table("row, ms", [("device", "what", "median", "min", "max", "goal"), *loads])


if __name__ == "__main__":
    main()
