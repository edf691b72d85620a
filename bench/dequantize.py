"""Dequantisation: GB/s of numbers written, every output beyond the caches.

    python bench/dequantize.py [--device cuda] [--format fp4 int4:point int8] [--dtype half bf16 f32] [--group 128]
                               [--kernel dequant_fp4_optimal all] [--size 4096x14336]

Correctness comes first, on the data that is timed. The ceiling is what filling a tensor of the same size reaches in the
same run. Buffers rotate past the last-level cache; on NVIDIA GPUs the launches are a CUDA graph's. --kernel all takes
every variant of the formats.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from common import (
    Candidate,
    Times,
    copies,
    graph_times,
    host_times,
    require_correct,
    save,
    sets_needed,
    synchronize,
    table,
    usable_devices,
)

from metal_marlin.formats import codec
from metal_marlin.ops.dequantize import Case, Plan, dequantize, dequantize_ref, plan, variants

DTYPES = {"half": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
LIMITS = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-6}
GOAL = {"cpu": 0.6, "cuda": 0.8}  # of the write ceiling


def wanted_cases(options: argparse.Namespace) -> Iterator[Case]:
    N, K = map(int, options.size.split("x"))
    for text in options.format:
        name, _, zeros = text.partition(":")
        zeros = zeros or codec(name).zero_kinds[0]
        floats = codec(name).scale_kind == "float"
        group = options.group if floats else codec(name).groups[0]
        for kernel in variants(name) if "all" in options.kernel else options.kernel or variants(name)[:1]:
            if kernel in variants(name):
                for dtype in options.dtype:
                    scales = torch.float16 if floats and dtype != "half" else None
                    yield Case(N, K, group, DTYPES[dtype], scales, name, zeros, kernel, "large")


def planned(case: Case, device: str) -> Plan:
    kind = device.partition(":")[0]
    return plan(case.N, case.K, case.dtype, case.scales_in, kind, 1, case.kernel, case.format, case.zeros)


def candidates(case: Case, device: str) -> tuple[dict[str, Candidate], float, int]:
    """Our kernel, checked, and a fill of the same outputs; the error; sets."""
    codes, scales, extra = first = case.tensors(device)
    out = torch.full((case.N, case.K), float("nan"), dtype=case.dtype, device=device)
    data = copies(first, sets_needed(codes.nbytes, device))
    outs = copies(out, sets_needed(out.nbytes, device))
    sets = max(len(data), len(outs))

    def ours(i: int) -> None:
        codes, scales, extra = data[i % len(data)]
        options = {"format": case.format, "zeros": case.zeros, "extra": extra, "kernel": case.kernel}
        dequantize(codes, scales, case.group, out=outs[i % len(outs)], **options)  # type: ignore[arg-type]

    error, wanted = 0.0, dequantize_ref(codes, scales, case.group, format=case.format, zeros=case.zeros, extra=extra)
    for i in (0, sets - 1):
        ours(i)
        synchronize(device)
        error = max(error, require_correct(str(case), outs[i % len(outs)], wanted, LIMITS[case.dtype]))
    return {planned(case, device).kernel: ours, "fill": lambda i: outs[i % len(outs)].fill_(1.0)}, error, sets


def measure(case: Case, device: str) -> list[tuple[str, ...]]:
    moved = case.N * case.K * case.dtype.itemsize
    calls, error, sets = candidates(case, device)
    if device.startswith("cuda"):
        times = graph_times(calls, device, inner=max(16, sets), sets=sets)
    else:
        times = host_times(calls, device, inner=sets, rounds=9, sets=sets)
    ceiling = times["fill"].gb_per_s(moved)
    return [row(case, device, name, t, moved, ceiling, None if name == "fill" else error) for name, t in times.items()]


def row(
    case: Case, device: str, name: str, t: Times, moved: int, ceiling: float, error: float | None
) -> tuple[str, ...]:
    save("dequantize", str(case), name, t, device, moved=moved, ceiling=ceiling, error=error)
    share = t.gb_per_s(moved) / ceiling
    goal = None if error is None else GOAL.get(device.partition(":")[0])
    verdict = "" if goal is None else f"{'PASS' if share >= goal else 'BELOW'} (≥ {goal:g})"
    figures = (f"{v:.1f}" for v in (t.median, t.p20, t.p80, t.gb_per_s(moved)))
    return (device, str(case), name, *figures, f"{share:.2f}", "" if error is None else f"{error:.1e}", verdict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; all that work here by default")
    parser.add_argument(
        "--format", nargs="+", default=["fp4"], help="formats; int4:point, :packed, :bias say the zeros"
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="of what is written")
    parser.add_argument("--group", type=int, default=128, help="weights a scale")
    parser.add_argument("--kernel", nargs="+", default=[], help="variants; all: every one of the formats")
    parser.add_argument("--size", default="4096x14336", help="NxK")
    options = parser.parse_args()
    cases = list(wanted_cases(options))
    if not cases:
        parser.error("no case: no such kernel of these formats")
    heading = ("device", "case", "candidate", "µs", "p20", "p80", "GB/s", "of fill", "error", "goal")
    for device in usable_devices(options.device):
        rows: list[tuple[str, ...]] = []
        for case in cases:
            rows += measure(case, device)
        table(f"{device}: GB/s written", [heading, *rows])


if __name__ == "__main__":
    main()
