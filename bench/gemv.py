"""Matrix-vector products with quantised weights: GB/s of weights (codes, scales, zeros), every reading from memory.

    python bench/gemv.py [--device cuda] [--format fp4 int4:point int8] [--dtype half bf16 f32] [--scales half]
                         [--tokens 1 8] [--group 128] [--shapes large smollm2] [--kernel decode_gemv_fp4_wide]

Correctness comes first, on the data that is timed. Buffers rotate past the last-level cache; on NVIDIA GPUs the
launches are a CUDA graph's. For comparison in the same run: `dense` is torch with weights in the activations' dtype,
`int4pack` is torch's own int4 product with groups of 128 in bfloat16, its best case; `onnxruntime` its MatMulNBits with
int8 activations, on the CPU where it is installed (with onnx).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from common import (
    Candidate,
    Times,
    copies,
    copy_ceiling,
    graph_times,
    host_times,
    read_ceiling,
    require_correct,
    save,
    sets_needed,
    synchronize,
    table,
    usable_devices,
)
from peers import NAMES, peers

from metal_marlin.formats import codec
from metal_marlin.ops.linear_decode import CASES, Case, linear_decode, linear_decode_ref, plan

DTYPES = {"half": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
LIMITS = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}
GOAL_CASE = "1x4096x14336-g128-half"
GOALS = {"cpu": 18.0, "cuda": 2200.0}  # GB/s; the second on an H100


@dataclass(frozen=True)
class Timed:
    """Something to time: the call, the bytes it has to read, its error (None where there is none to speak of)."""

    call: Candidate
    moved: int
    error: float | None


def wanted_cases(options: argparse.Namespace) -> Iterator[Case]:
    for shape in CASES:
        if shape.model not in options.shapes:
            continue
        for text in options.format:
            name, _, zeros = text.partition(":")
            zeros = zeros or codec(name).zero_kinds[0]
            for dtype in options.dtype or ["half" if shape.model == "large" else "f32"]:
                scales = DTYPES[options.scales] if options.scales else shape.scale_dtype
                if scales == DTYPES[dtype]:
                    scales = None
                group = options.group or shape.group
                if codec(name).scale_kind != "float":
                    scales, group = None, codec(name).groups[0]
                for tokens in options.tokens:
                    yield replace(
                        shape, M=tokens, dtype=DTYPES[dtype], scale_dtype=scales, group=group, format=name, zeros=zeros
                    )


def kernel_name(case: Case, device: str, kernel: str | None = None) -> str:
    kind = device.partition(":")[0]
    return plan(case.M, case.N, case.K, case.dtype, case.scales_in, kind, 1, kernel, case.format, case.zeros).kernel


def weight_bytes(case: Case) -> int:
    """Bytes of codes, scales and zeros, what a call has to read."""
    form = codec(case.format)
    groups = form.groups_of(case.K, case.group)
    extra = {"point": case.scales_in.itemsize, "bias": case.scales_in.itemsize, "packed": form.bits / 8}
    each = case.scales_in.itemsize + extra.get(case.zeros, 0)
    return int(case.N * (case.K * form.bits / 8 + groups * each))


def candidates(case: Case, device: str, sets: int, kernel: str | None) -> dict[str, Timed]:
    """What to time, every result checked."""
    data = [case.tensors(device, seed) for seed in range(sets)]
    outs = [x.new_full((case.M, case.N), float("nan")) for x, *_ in data]

    def ours(i: int) -> None:
        x, codes, scales, extra = data[i]
        linear_decode(
            *(x, codes, scales, case.group),
            format=case.format,
            zeros=case.zeros,
            extra=extra,
            kernel=kernel,
            out=outs[i],
        )

    error = 0.0
    for i in (0, sets - 1):
        ours(i)
        synchronize(device)
        x, codes, scales, extra = data[i]
        wanted = linear_decode_ref(x, codes, scales, case.group, format=case.format, zeros=case.zeros, extra=extra)
        error = max(error, require_correct(str(case), outs[i], wanted, LIMITS[case.dtype]))
    found = {kernel_name(case, device, kernel): Timed(ours, weight_bytes(case), error)}
    W = codec(case.format).decode(*data[0][1:], case.group, case.zeros, case.dtype)
    dense = copies(W, sets_needed(W.nbytes, device))
    found["dense"] = Timed(lambda i: torch.mm(data[i][0], dense[i % len(dense)].T, out=outs[i]), W.nbytes, None)
    others = peers(case.M, case.N, case.K, device, sets)
    return found | {name: Timed(*peer) for name, peer in others.items()}


def measure(case: Case, device: str, ceiling: float, kernel: str | None) -> list[tuple[str, ...]]:
    sets = sets_needed(weight_bytes(case), device)
    found = candidates(case, device, sets, kernel)
    calls = {name: timed.call for name, timed in found.items()}
    if device.startswith("cuda"):
        times = graph_times(calls, device, inner=max(64, sets), sets=sets)
    else:
        times = host_times(calls, device, inner=max(sets, 4), rounds=15, sets=sets)
    return [row(case, device, name, times, found[name], ceiling) for name in times]


def row(case: Case, device: str, name: str, times: dict[str, Times], timed: Timed, ceiling: float) -> tuple[str, ...]:
    t = times[name]
    save("gemv", str(case), name, t, device, moved=timed.moved, ceiling=ceiling, error=timed.error)
    rate = t.gb_per_s(timed.moved)
    ours = name not in NAMES
    goal = GOALS.get(device.partition(":")[0]) if ours and str(case) == GOAL_CASE else None
    verdict = "" if goal is None else f"{'PASS' if rate >= goal else 'BELOW'} (≥ {goal:g})"
    if ours and "int4pack" in times:
        verdict = f"{times['int4pack'].median / t.median:.2f} × int4pack {verdict}"
    shown = "" if timed.error is None else f"{timed.error:.1e}"
    figures = (f"{v:.1f}" for v in (t.median, t.p20, t.p80, rate))
    return (device, str(case), name, *figures, f"{rate / ceiling:.2f}", shown, verdict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; all that work here by default")
    parser.add_argument(
        "--format", nargs="+", default=["fp4"], help="formats; int4:point, :packed, :bias say the zeros"
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="activations; by default the shapes' own")
    parser.add_argument("--scales", choices=DTYPES, help="scales; like the activations, or the shapes' own")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1])
    parser.add_argument("--group", type=int, help="weights a scale; by default the shapes' own")
    parser.add_argument("--shapes", nargs="+", choices=["large", "smollm2"], default=["large"])
    parser.add_argument("--kernel", help="a variant, decode_gemv_fp4_wide")
    options = parser.parse_args()
    heading = ("device", "case", "candidate", "µs", "p20", "p80", "GB/s", "of most", "error", "goal")
    cases = list(wanted_cases(options))
    if not cases:
        sys.exit("no case")
    for device in usable_devices(options.device):
        what, ceiling = ("read", read_ceiling(device)) if device == "cpu" else ("copy", copy_ceiling(device))
        rows: list[tuple[str, ...]] = []
        for case in cases:
            rows += measure(case, device, ceiling, options.kernel)
        table(f"{device}: at most {ceiling:.0f} GB/s ({what})", [heading, *rows])


if __name__ == "__main__":
    main()
