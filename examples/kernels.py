"""Compiles three Metal kernels and runs them from Python, checking each result against PyTorch.

    python examples/kernels.py [--device cpu]

Exits with 1 when a result is wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from metal_marlin import MetalKernelLibrary, dispatch_kernel

HERE = Path(__file__).parent


class Example(NamedTuple):
    """A launch, its output and the value it should have; ``bound`` is the largest error allowed."""

    launch: Callable[[], None]
    output: torch.Tensor
    expected: torch.Tensor
    bound: float
    what: str


def library(name: str, device: str) -> MetalKernelLibrary:
    """The kernels of ``examples/<name>.metal``; each is compiled when it is first launched."""
    return MetalKernelLibrary((HERE / f"{name}.metal").read_text(), device=device)


def saxpy(device: str) -> Example:
    """y = a x + y for a million elements: one thread each."""
    n, a = 1_000_003, 2.5
    x, y = torch.randn(n, device=device), torch.randn(n, device=device)
    expected = a * x.cpu().double() + y.cpu().double()
    lib = library("saxpy", device)

    def launch() -> None:
        dispatch_kernel(lib, "saxpy", threads=n, threads_per_threadgroup=256, args=[x, y, a])

    return Example(launch, y, expected, 1e-5, f"y = a x + y, {n:,} elements")


def reduction(device: str) -> Example:
    """Row sums through threadgroup memory and barriers: one threadgroup a row."""
    rows, columns = 512, 5_000
    x = torch.rand(rows, columns, device=device)
    sums = torch.empty(rows, device=device)
    lib = library("reduction", device)

    def launch() -> None:
        dispatch_kernel(
            lib,
            "sum_rows",
            threadgroups=rows,
            threads_per_threadgroup=256,
            args={"x": x, "sums": sums, "columns": columns},
        )

    return Example(launch, sums, x.cpu().double().sum(1), 1e-2, f"row sums, {rows} x {columns:,}")


def matmul(device: str) -> Example:
    """A matrix product with simdgroup_matrix: one simdgroup an 8x8 tile."""
    M, N, K = 256, 192, 320
    A, B = torch.randn(M, K, device=device), torch.randn(K, N, device=device)
    C = torch.empty(M, N, device=device)
    lib = library("matmul", device)

    def launch() -> None:
        dispatch_kernel(lib, "matmul", threadgroups=(N // 8, M // 8), threads_per_threadgroup=32, args=[A, B, C, N, K])

    return Example(launch, C, A.cpu().double() @ B.cpu().double(), 1e-3, f"C = A B, {M} x {N} x {K}")


def timed(launch: Callable[[], None], device: str) -> float:
    """Seconds for one launch, finished."""
    start = time.perf_counter()
    launch()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 or mps")
    device = parser.parse_args().device
    torch.manual_seed(0)

    console = Console()
    table = Table(title=f"Metal kernels on {device}")
    for heading in ("kernel", "what", "first launch", "next launch", "max error", "result"):
        table.add_column(heading, justify="left" if heading in ("kernel", "what", "result") else "right")
    failures = 0
    for make in (saxpy, reduction, matmul):
        example = make(device)
        first = timed(example.launch, device)
        error = (example.output.cpu().double() - example.expected.cpu().double()).abs().max().item()
        again = timed(example.launch, device)
        correct = error <= example.bound
        failures += not correct
        verdict = "[green]correct[/]" if correct else "[red]WRONG[/]"
        table.add_row(
            make.__name__, example.what, f"{first * 1e3:.1f} ms", f"{again * 1e3:.2f} ms", f"{error:.1e}", verdict
        )
    console.print(table)
    console.print("The first launch includes compiling the kernel, unless the cache has it already.")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
