"""Matrix-vector products with quantised weights: GB/s of weights (codes and scales), every reading from memory.

    python bench/gemv.py [--device cuda] [--dtype half bf16 f32] [--tokens 1 8] [--group 128]
                         [--precompile cuda:sm_90a=DIR]

Correctness comes first, on the data that is timed. Buffers rotate past the last-level cache; on NVIDIA GPUs the
launches are a CUDA graph's. `dense` is torch with weights in the activations' dtype, for comparison.
--precompile only compiles the kernels used here into DIR, for a machine without a compiler that has
METAL_MARLIN_ROWS=DIR.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from common import (
    Candidate,
    copy_ceiling,
    graph_times,
    host_times,
    require_correct,
    save,
    sets_needed,
    synchronize,
    table,
    usable_devices,
)

from metal_marlin import MetalKernelLibrary
from metal_marlin.formats import fp4
from metal_marlin.msl.target import Target
from metal_marlin.ops.linear_decode import CASES, FAMILY, Case, linear_decode, linear_decode_ref, plan
from metal_marlin.runtime.cache import RowCache

DTYPES = {"half": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
LIMITS = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}
GOAL_CASE = "1x4096x14336-g128-half"
GOALS = {"cpu": 18.0, "cuda": 2200.0}  # GB/s; the second on an H100


def precompile(option: str) -> None:
    """Compile every row of the family for TARGET into DIR."""
    text, _, folder = option.partition("=")
    library = MetalKernelLibrary(FAMILY, target=Target.parse(text), cache=RowCache(folder))
    for name in library.kernels:
        library.compile(name)


def weight_bytes(case: Case) -> int:
    """Bytes of codes and scales, what a call has to read."""
    scale = (case.scale_dtype or case.dtype).itemsize
    return case.N * case.K // 2 + case.N * fp4.groups(case.K, case.group) * scale


def candidates(case: Case, device: str, sets: int, dense: bool) -> tuple[dict[str, Candidate], float]:
    """What to time, and the error of ours."""
    data = [case.tensors(device, seed) for seed in range(sets)]
    outs = [x.new_full((case.M, case.N), float("nan")) for x, _, _ in data]

    def ours(i: int) -> None:
        x, codes, scales = data[i]
        linear_decode(x, codes, scales, case.group, out=outs[i])

    error = 0.0
    for i in (0, sets - 1):
        ours(i)
        synchronize(device)
        wanted = linear_decode_ref(*data[i], case.group)
        error = max(error, require_correct(str(case), outs[i], wanted, LIMITS[case.dtype]))
    found: dict[str, Candidate] = {kernel_name(case, device): ours}
    if dense:
        weights = [fp4.decode(codes, scales, case.group, case.dtype) for _, codes, scales in data[:2]]
        found["dense"] = lambda i: torch.mm(data[i][0], weights[i % 2].T, out=outs[i])
    return found, error


def kernel_name(case: Case, device: str) -> str:
    kind = device.partition(":")[0]
    return plan(case.M, case.N, case.K, case.dtype, case.scale_dtype or case.dtype, kind).kernel


def measure(case: Case, device: str, ceiling: float) -> list[tuple[str, ...]]:
    moved = weight_bytes(case)
    sets = sets_needed(moved, device)
    gpu = device.startswith("cuda")
    calls, error = candidates(case, device, sets, dense=True)
    if gpu:
        times = graph_times(calls, device, inner=max(64, sets), sets=sets)
    else:
        times = host_times(calls, device, inner=max(sets, 4), rounds=15, sets=sets)
    rows = []
    for name, t in times.items():
        ours = name != "dense"
        size = moved if ours else case.N * case.K * case.dtype.itemsize
        save("gemv", str(case), name, t, device, moved=size, ceiling=ceiling, error=error if ours else None)
        rate = t.gb_per_s(size)
        goal = GOALS.get(device.partition(":")[0]) if ours and str(case) == GOAL_CASE else None
        verdict = "" if goal is None else f"{'PASS' if rate >= goal else 'BELOW'} (≥ {goal:g})"
        figures = (t.median, t.p20, t.p80, rate)
        shown = f"{error:.1e}" if ours else ""
        rows.append((device, str(case), name, *(f"{v:.1f}" for v in figures), f"{rate / ceiling:.2f}", shown, verdict))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; all that work here by default")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["half"], help="activations and scales")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1])
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--precompile", metavar="TARGET=DIR", help="only compile for TARGET into DIR")
    options = parser.parse_args()
    if options.precompile:
        precompile(options.precompile)
        return
    heading = ("device", "case", "candidate", "µs", "p20", "p80", "GB/s", "of copy", "error", "goal")
    for device in usable_devices(options.device):
        ceiling = copy_ceiling(device)
        rows: list[tuple[str, ...]] = []
        for shape in (case for case in CASES if case.model):
            for dtype in options.dtype:
                for tokens in options.tokens:
                    case = replace(shape, M=tokens, dtype=DTYPES[dtype], group=options.group)
                    rows += measure(case, device, ceiling)
        table(f"{device}: copy {ceiling:.0f} GB/s (read and written)", [heading, *rows])


if __name__ == "__main__":
    main()
