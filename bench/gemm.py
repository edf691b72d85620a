"""Products with quantised weights for many tokens: TFLOP/s, beside torch with dense weights of the same dtype.

    python bench/gemm.py [--device cuda] [--dtype half bf16 f32] [--format fp4 int4] [--tokens 16 128 512 4096]
                         [--shapes large smollm2 4096x14336] [--group 128] [--kernel marlin_gemm_fp4_single_stage]
                         [--peers humming gemlite int4pack]

Correctness comes first, on the data that is timed. A shape is NxK or the name of a model's shapes. `linear` is what
users call; up to 128 tokens the matrix-vector kernel is timed too: where the two cross is what the numbers
of ops/linear.py should say. `dense` is torch.matmul with dequantised weights (on NVIDIA GPUs `dense_bf16` too), others
are products of other libraries with four bits and groups of 128, those that are installed or just those that --peers
names: `int4pack` torch's own int4 product in bfloat16, `humming` and `gemlite` (bench/peers_cuda.py), `onnxruntime` its
MatMulNBits with int8 activations on the CPU. --tiles times every tile that suits the tokens. Buffers rotate past the
last-level cache; on NVIDIA GPUs the launches are a CUDA graph's, one after the other, or with --rest each graph's after
some idleness: what many tokens take before the card's limit of power lowers its clock. The last table says how many
times as fast as the fastest of the others ours is, `linear` or `linear_packed`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import re

import torch
from common import (
    Candidate,
    Times,
    copies,
    graph_times,
    host_times,
    launches,
    require_correct,
    save,
    sets_needed,
    synchronize,
    table,
    usable_devices,
)
from peers import NAMES, PEERS, peers

from metal_marlin.formats import CODECS, codec
from metal_marlin.ops import packed_tiles
from metal_marlin.ops.gemm_tiles import TILES, Tile, has_tiles
from metal_marlin.ops.linear import linear
from metal_marlin.ops.marlin_gemm import CASES, Case
from metal_marlin.ops.packed import FORMATS, has_rows, linear_packed
from metal_marlin.quant import QuantizedTensor, prepack

DTYPES = {"half": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
PACKED = {f"packed_gemm_{form}__m{name}": tile for form in FORMATS for name, tile in packed_tiles.TILES.items()}
LIMITS = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}
GOAL = {"cpu": 0.5, "cuda": 0.3}  # share of dense at 128 tokens and more; the second without wgmma


def shapes(asked: list[str]) -> list[Case]:
    """Cases named by a model, or given as NxK."""
    found: list[Case] = []
    for name in asked:
        size = re.fullmatch(r"(\d+)x(\d+)", name)
        if size:
            found.append(Case(512, int(size[1]), int(size[2]), model="asked"))
        else:
            found += [case for case in CASES if case.model == name]
    return found


def tiles(case: Case) -> list[str]:
    """Rows whose tiles are not much too large or too small."""
    if not has_tiles(case.dtype, case.scales_in, case.format):
        return []
    found = [f"marlin_gemm_{case.format}__m{t}" for t in TILES.values() if case.M / 4 <= t.tokens <= 4 * case.M]
    return found + [k for k in PACKED if k.startswith(f"packed_gemm_{case.format}_") and suits(PACKED[k], case.M)]


def suits(tile: Tile, M: int) -> bool:
    """Whether it is not much too large or too small."""
    return tile.tokens <= max(16, 4 * M) and (tile.tokens >= M / 4 or tile.tokens >= 128)


def group_of(name: str, group: int) -> int:
    return {"mxfp4": 32, "nvfp4": 16}.get(name, group)


def has_packed(case: Case, device: str) -> bool:
    """Whether layers would hold W in operand order."""
    hopper = device.startswith("cuda") and torch.cuda.get_device_capability(device) == (9, 0)
    return hopper and has_rows(case.dtype, case.scales_in, case.format) and case.N % 16 == case.K % 64 == 0


def packed_of(case: Case, parts: tuple[torch.Tensor | None, ...]) -> QuantizedTensor:
    """Codes, scales and extra in operand order."""
    return prepack(QuantizedTensor(*parts, case.format, case.group, case.zeros, (case.N, case.K)), "mma16")


class Weights:
    """W of a shape and format as every product takes it, made once; sets are the same numbers elsewhere."""

    def __init__(self, case: Case, device: str, only: str) -> None:
        self.device, self.form, self.case = device, codec(case.format), case
        self.sets = sets_needed(case.N * case.K * self.form.bits // 8, device)
        _, *parts = case.tensors(device)
        self.W = self.form.decode(*parts, case.group, case.zeros, case.dtype)
        self.dense = copies(self.W, sets_needed(self.W.nbytes, device))
        self.packed: list[QuantizedTensor] = []
        if has_packed(case, device):
            first = packed_of(case, parts)
            tensors = zip(*(copies(t, self.sets) for t in (first.codes, first.scales, first.extra)), strict=True)
            self.packed = [dataclasses.replace(first, codes=c, scales=s, extra=e) for c, s, e in tensors]
        needed = self.sets if "linear".startswith(only) or not only.startswith(("linear_", "packed_")) else 1
        self.canonical = list(zip(*(copies(t, needed) for t in parts), strict=True))

    def product(self, kernel: str, x: torch.Tensor, out: torch.Tensor) -> Candidate:
        """``linear`` or ``linear_packed``, or one of their kernels."""
        case, options = self.case, {"format": self.case.format, "out": out}

        def canonical(i: int) -> None:
            codes, scales, extra = self.canonical[i % len(self.canonical)]
            asked = None if kernel == "linear" else kernel
            linear(x, codes, scales, case.group, zeros=case.zeros, extra=extra, kernel=asked, **options)

        def packed(i: int) -> None:
            w = self.packed[i]
            more = {"zeros": w.kernel_zeros, "extra": w.extra, "kernel": None if kernel == "linear_packed" else kernel}
            linear_packed(x, w.codes, w.scales, w.powers, case.group, **more, **options)

        return packed if kernel == "linear_packed" or kernel in PACKED else canonical


def candidates(
    case: Case, weights: Weights, kernels: list[str], only: str, others: list[str] | None
) -> tuple[dict[str, Candidate], float]:
    """What to time, of ours what starts with ``only``, of other libraries ``others``, and the largest error of ours."""
    device, dense = weights.device, weights.dense
    x = torch.randn(case.M, case.K, generator=torch.Generator().manual_seed(case.M)).to(case.dtype).to(device)
    out = x.new_full((case.M, case.N), float("nan"))
    ours = ["linear", *(["linear_packed"] if weights.packed else []), *kernels]
    ours = [name for name in ours if name.startswith(only) and (weights.packed or name not in PACKED)]
    found = {name: weights.product(name, x, out) for name in ours}
    error, wanted = 0.0, x.float() @ weights.W.float().T
    for name, call in found.items():
        for i in {0, weights.sets - 1}:
            out.fill_(float("nan"))
            call(i)
            synchronize(device)
            error = max(error, require_correct(f"{case} {name}", out, wanted, LIMITS[case.dtype]))
    found |= {name: peer[0] for name, peer in peers(case.M, case.N, case.K, device, weights.sets, others).items()}
    found["dense"] = lambda i: torch.matmul(x, dense[i % len(dense)].T, out=out)
    if device.startswith("cuda") and case.dtype == torch.float16:  # which may be faster
        b, of, to = x.bfloat16(), [d.bfloat16() for d in dense], out.bfloat16()
        found["dense_bf16"] = lambda i: torch.matmul(b, of[i % len(of)].T, out=to)
    return found, error


def measure(
    case: Case,
    weights: Weights,
    kernels: list[str],
    only: str = "",
    others: list[str] | None = None,
    rest: float = 0.0,
) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Rows of the table, and the row of the last one, if there is one."""
    operations, device, sets = 2 * case.M * case.N * case.K, weights.device, weights.sets
    calls, error = candidates(case, weights, kernels, only, others)
    if device.startswith("cuda"):
        inner = sets if rest else launches(case.M, sets)
        times = graph_times(calls, device, inner=inner, sets=sets, rest=rest)
    else:
        inner = max(1, min(64, int(1e10 / operations)))
        times = host_times(calls, device, inner=inner, rounds=15, sets=sets)
    rows: list[tuple[str, ...]] = []
    for name, t in times.items():
        dense = name in NAMES
        save("gemm", str(case), name, t, device, operations=operations, error=None if dense else error)
        share = times["dense"].median / t.median
        goal = None if dense or case.M < 128 else GOAL.get(device.partition(":")[0])
        verdict = "" if goal is None else f"{'PASS' if share >= goal else 'BELOW'} (≥ {goal:g})"
        figures = (f"{t.median:.1f}", f"{t.p20:.1f}", f"{t.p80:.1f}", f"{t.tflop_per_s(operations):.3f}")
        rows.append((str(case), name, *figures, f"{share:.2f}", "" if dense else f"{error:.1e}", verdict))
    return rows, beside(case, times)


def beside(case: Case, times: dict[str, Times]) -> list[tuple[str, ...]]:
    """Ours, the fastest of the others, and how many times as fast ours is."""
    ours, others = ([n for n in names if n in times] for names in (("linear", "linear_packed"), NAMES))
    if not ours or not others:
        return []
    mine, other = (min(names, key=lambda name: times[name].median) for names in (ours, others))
    a, b = times[mine].median, times[other].median
    return [(str(case), mine, f"{a:.1f}", other, f"{b:.1f}", f"{b / a:.2f}")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; all that work here by default")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="activations and scales; half, on a cpu f32")
    parser.add_argument("--format", nargs="+", choices=CODECS, default=["fp4"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[16, 128, 512])
    parser.add_argument("--shapes", nargs="+", default=["large"], help="large, smollm2, NxK")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--kernel", nargs="+", default=[], help="variants to time as well")
    parser.add_argument("--tiles", action="store_true", help="time every tile that suits the tokens")
    parser.add_argument("--only", default="", help="of ours, time what starts so, such as packed_gemm")
    parser.add_argument("--peers", nargs="*", choices=PEERS, help="other libraries; by default all installed")
    parser.add_argument("--rest", type=float, default=0, help="ms of idleness before each replay, on NVIDIA GPUs")
    options = parser.parse_args()
    heading = ("case", "candidate", "µs", "p20", "p80", "TFLOP/s", "of dense", "error", "goal")
    for device in usable_devices(options.device):
        rows: list[tuple[str, ...]] = []
        last = [("case", "ours", "µs", "best of the others", "µs", "times as fast")]
        for shape, name in itertools.product(shapes(options.shapes), options.format):
            zeros, group = codec(name).zero_kinds[0], group_of(name, options.group)
            for dtype in options.dtype or (["f32"] if device == "cpu" else ["half"]):
                case = Case(1, shape.N, shape.K, group, DTYPES[dtype], None, name, zeros, shape.model)
                weights = Weights(case, device, options.only)
                for tokens in options.tokens:
                    case = dataclasses.replace(case, M=tokens)
                    kernels = [f"marlin_gemm_{name}", *(k for k in options.kernel if f"_{name}" in k)]
                    kernels += [f"decode_gemv_{name}_batched"] if tokens <= 128 else []
                    kernels += tiles(case) if options.tiles else []
                    found, ratio = measure(case, weights, kernels, options.only, options.peers, options.rest / 1e3)
                    rows, last = rows + found, last + ratio
        table(device, [heading, *rows])
        table(f"{device}: beside the best of the others", last)


if __name__ == "__main__":
    main()
