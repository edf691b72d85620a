"""Timing for the benches: correctness first, buffers that rotate past the last-level cache, interleaved
candidates, medians with p20 and p80, and one CSV row per result in bench/results/<device>.csv.

A candidate is a function of one integer, the number of the buffer set it shall use. Times are microseconds.
"""

from __future__ import annotations

import copy
import csv
import datetime
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

import metal_marlin

Candidate = Callable[[int], object]
T = TypeVar("T")
RESULTS = Path(os.environ.get("METAL_MARLIN_BENCH_RESULTS") or Path(__file__).parent / "results")
COLUMNS = [
    "date", "device", "bench", "case", "candidate", "median_us", "p20_us", "p80_us", "rounds", "gb_per_s",
    "tflop_per_s", "share_of_ceiling", "error", "command", "python", "torch", "cuda", "metal_marlin",
]  # fmt: skip


@dataclass(frozen=True)
class Times:
    """Microseconds a call over `rounds` rounds."""

    median: float
    p20: float
    p80: float
    rounds: int

    @staticmethod
    def of(samples: list[float]) -> Times:
        ordered = sorted(samples)
        last = len(ordered) - 1
        low, high = ordered[round(0.2 * last)], ordered[round(0.8 * last)]
        return Times(statistics.median(ordered), low, high, len(ordered))

    def gb_per_s(self, moved: int) -> float:
        """GB/s where a call moves so many bytes."""
        return moved / self.median / 1e3

    def tflop_per_s(self, operations: int) -> float:
        """TFLOP/s where a call does so many operations."""
        return operations / self.median / 1e6


def relative_error(got: torch.Tensor, reference: torch.Tensor) -> float:
    """‖got − reference‖ / ‖reference‖ in float64; infinite where `got` holds a NaN or the shapes differ."""
    if got.shape != reference.shape or not bool(torch.isfinite(got).all()):
        return math.inf
    want = reference.double()
    return float((got.to(want.device).double() - want).norm() / want.norm().clamp_min(1e-300))


def require_correct(name: str, got: torch.Tensor, reference: torch.Tensor, limit: float) -> float:
    """The relative error; ends the bench when it is above `limit`, because a wrong result has no speed."""
    error = relative_error(got, reference)
    if not error <= limit:
        sys.exit(f"{name}: wrong result, relative error {error:.3g} is above {limit:.3g}; nothing was timed")
    return error


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device.startswith("mps"):
        torch.mps.synchronize()


def cache_bytes(device: str) -> int:
    """Bytes of the last-level cache: the L2 of a GPU, the largest cache a CPU names."""
    if device.startswith("cuda"):
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip()).groups()  # type: ignore[union-attr]
        sizes.append(int(number) * 1024 ** " KMG".index(unit or " "))
    return max(sizes) or 32 << 20


def sets_needed(set_bytes: int, device: str) -> int:
    """How many buffer sets of `set_bytes` to rotate through so that none is still cached: 3 × the cache, at most 64."""
    return max(2, min(64, -(-3 * cache_bytes(device) // max(1, set_bytes))))


def copies(data: T, count: int) -> list[T]:
    """Buffer sets of the same numbers: a tensor, or several, so many times. Strides stay as they are."""
    return [data, *(copy.deepcopy(data) for _ in range(count - 1))]


def host_times(
    candidates: Mapping[str, Candidate],
    device: str,
    *,
    inner: int = 500,
    rounds: int = 25,
    sets: int = 1,
    apart: str = "onnxruntime",
) -> dict[str, Times]:
    """Time on the host's clock: the whole call on a CPU; on a GPU the launch, which waits for no kernel. The candidate
    ``apart`` comes last and alone: its threads go on spinning when it has returned. The first calls after
    another candidate are not timed: they wake threads, and caches are full of the other's data. A round goes on with
    the set after the last round's."""
    if apart in candidates and len(candidates) > 1:
        rest = {name: call for name, call in candidates.items() if name != apart}
        together = host_times(rest, device, inner=inner, rounds=rounds, sets=sets)
        alone = host_times({apart: candidates[apart]}, device, inner=inner, rounds=rounds, sets=sets)
        return {**together, **alone}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    first = min(4, inner // 3)
    for turn in range(-2, rounds):  # two rounds warm up
        at = turn * (first + inner)
        for name, call in _rotated(candidates, turn):
            for i in range(at, at + first):
                call(i % sets)
            synchronize(device)
            start = time.perf_counter()
            for i in range(at + first, at + first + inner):
                call(i % sets)
            taken = time.perf_counter() - start
            if turn >= 0:
                samples[name].append(taken / inner * 1e6)
    synchronize(device)
    return {name: Times.of(values) for name, values in samples.items()}


def launches(tokens: int, sets: int) -> int:
    """How many launches of a product a graph holds: of a small one many, as a graph's start is timed too."""
    return max(64 if tokens <= 256 else 16, sets)


def graph_times(
    candidates: Mapping[str, Candidate],
    device: str,
    *,
    inner: int = 64,
    rounds: int = 25,
    sets: int = 1,
    rest: float = 0.0,
) -> dict[str, Times]:
    """Time on an NVIDIA GPU's clock: `inner` calls recorded in a CUDA graph, replayed without Python. `rest`: seconds
    of idleness before each replay, after which a card's limit of power has not lowered the clock yet."""
    with torch.cuda.device(device):
        graphs = {name: record(call, inner, sets) for name, call in candidates.items()}
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        samples: dict[str, list[float]] = {name: [] for name in graphs}
        for turn in range(-2, rounds):
            for name, graph in _rotated(graphs, turn):
                time.sleep(rest)
                begin.record()
                graph.replay()
                end.record()
                end.synchronize()
                if turn >= 0:
                    samples[name].append(begin.elapsed_time(end) * 1e3 / inner)
    return {name: Times.of(values) for name, values in samples.items()}


def record(call: Candidate, inner: int, sets: int = 1) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `inner` calls on the current device."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for i in range(sets):
            call(i)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(inner):
            call(i % sets)
    return graph


def _rotated(items: Mapping[str, T], turn: int) -> list[tuple[str, T]]:
    """All items, each round starting with another one: none always runs after the same neighbour."""
    pairs = list(items.items())
    return pairs[turn % len(pairs) :] + pairs[: turn % len(pairs)]


def copy_ceiling(device: str) -> float:
    """GB/s of a large copy on the device, counting bytes read and bytes written."""
    size = max(1 << 26, 4 * cache_bytes(device))
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    sink = torch.empty_like(source)
    if device.startswith("cuda"):
        times = graph_times({"copy": lambda _: sink.copy_(source)}, device, inner=4)
    else:
        times = host_times({"copy": lambda _: sink.copy_(source)}, device, inner=2, rounds=9)
    return times["copy"].gb_per_s(2 * size)


def read_ceiling(device: str) -> float:
    """GB/s of reading a large tensor once, as its largest element is found."""
    size = max(1 << 28, 8 * cache_bytes(device)) // 4
    source = torch.ones(size, device=device)  # written, or pages of nothing would be read from a cache
    times = host_times({"read": lambda _: source.max()}, device, inner=1, rounds=9)
    return times["read"].gb_per_s(4 * size)


def device_name(device: str) -> str:
    """What a device's results file is called: the GPU's or CPU's model."""
    if device.startswith("cuda"):
        return _slug(torch.cuda.get_device_name(device))
    if device.startswith("mps"):
        return "apple-gpu"
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.exists() else None
    return _slug(f"{found[1] if found else model} {torch.get_num_threads()} threads")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", text.lower())).strip("-")


def save(
    bench: str,
    case: str,
    candidate: str,
    times: Times,
    device: str,
    *,
    moved: int = 0,
    operations: int = 0,
    ceiling: float = 0.0,
    error: float | None = None,
) -> None:
    """Append a row to the device's file. `moved`: bytes a call; `operations`: flops a call; `ceiling`: the
    measured GB/s (with `moved`) or TFLOP/s that the result is a share of."""
    rate = times.gb_per_s(moved) if moved else times.tflop_per_s(operations)
    row = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "device": device_name(device),
        "bench": bench,
        "case": case,
        "candidate": candidate,
        "median_us": f"{times.median:.3f}",
        "p20_us": f"{times.p20:.3f}",
        "p80_us": f"{times.p80:.3f}",
        "rounds": times.rounds,
        "gb_per_s": f"{times.gb_per_s(moved):.1f}" if moved else "",
        "tflop_per_s": f"{times.tflop_per_s(operations):.2f}" if operations else "",
        "share_of_ceiling": f"{rate / ceiling:.3f}" if ceiling else "",
        "error": "" if error is None else f"{error:.3g}",
        "command": " ".join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": cuda_version(device),
        "metal_marlin": metal_marlin.__version__,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{row['device']}.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def cuda_version(device: str) -> str:
    """The CUDA release the driver supports."""
    if not device.startswith("cuda"):
        return ""
    from metal_marlin.runtime._driver import driver

    return "{}.{}".format(*driver().version)


def usable_devices(asked: str | None = None) -> list[str]:
    """Devices to measure: the one asked for, else every one that works here."""
    from metal_marlin.runtime.device import device_module, kinds

    return [asked] if asked else [kind for kind in kinds() if device_module(kind).probe() is None]


def table(title: str, rows: list[tuple[str, ...]]) -> None:
    """Print aligned columns; the first row is the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print(f"\n{title}")
    for row in rows:
        cells = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  " + "  ".join(cells))
