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
last-level cache; on NVIDIA GPUs the launches are a CUDA graph's. The last table says how many times as fast as the
fastest of the others ours is, `linear` or `linear_packed`.
"""

from __future__ import annotations

import argparse
import re

import torch
from common import (
    Candidate,
    Times,
    graph_times,
    host_times,
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


def packed_of(case: Case, data: tuple[torch.Tensor | None, ...]) -> QuantizedTensor:
    _, codes, scales, extra = data
    return prepack(
        QuantizedTensor(codes, scales, extra, case.format, case.group, case.zeros, (case.N, case.K)), "mma16"
    )


def packed(
    kernel: str,
    case: Case,
    data: list[tuple[torch.Tensor, ...]],
    weights: list[QuantizedTensor],
    outs: list[torch.Tensor],
) -> Candidate:
    asked = None if kernel == "linear_packed" else kernel

    def run(i: int) -> None:
        w = weights[i]
        more = {"format": case.format, "zeros": w.kernel_zeros, "extra": w.extra, "kernel": asked, "out": outs[i]}
        linear_packed(data[i][0], w.codes, w.scales, w.powers, case.group, **more)

    return run


def dense_products(
    case: Case, device: str, xs: list[torch.Tensor], dense: list[torch.Tensor], outs: list[torch.Tensor]
) -> dict[str, Candidate]:
    """torch's product of the activations' dtype, and of bfloat16 where that may be faster than half."""
    found: dict[str, Candidate] = {"dense": lambda i: torch.matmul(xs[i], dense[i % len(dense)].T, out=outs[i])}
    if device.startswith("cuda") and case.dtype == torch.float16:
        x, w, out = xs[0].bfloat16(), [d.bfloat16() for d in dense], outs[0].bfloat16()
        found["dense_bf16"] = lambda i: torch.matmul(x, w[i % len(w)].T, out=out)
    return found


def candidates(
    case: Case, device: str, sets: int, kernels: list[str], only: str, others: list[str] | None
) -> tuple[dict[str, Candidate], float]:
    """What to time, of ours what starts with ``only``, of other libraries ``others``, and the largest error of ours."""
    data = [case.tensors(device, seed) for seed in range(min(2, sets))]
    data += [tuple(None if t is None else t.clone() for t in data[i % 2]) for i in range(2, sets)]
    outs = [d[0].new_full((case.M, case.N), float("nan")) for d in data]
    form = codec(case.format)
    options = {"format": case.format, "zeros": case.zeros}

    def ours(kernel: str | None) -> Candidate:
        def run(i: int) -> None:
            x, codes, scales, extra = data[i]
            linear(x, codes, scales, case.group, extra=extra, kernel=kernel, out=outs[i], **options)

        return run

    found: dict[str, Candidate] = {"linear": ours(None), **{k: ours(k) for k in kernels if k not in PACKED}}
    if has_packed(case, device):
        weights = [packed_of(case, d) for d in data]
        found |= {
            k: packed(k, case, data, weights, outs) for k in ("linear_packed", *(k for k in kernels if k in PACKED))
        }
    found = {name: call for name, call in found.items() if name.startswith(only)}
    dense = [form.decode(*d[1:], case.group, case.zeros, case.dtype) for d in data[:2]]
    error = 0.0
    for i in {0, min(1, sets - 1)}:
        wanted = data[i][0].float() @ dense[i].float().T
        for name, call in found.items():
            outs[i].fill_(float("nan"))
            call(i)
            synchronize(device)
            error = max(error, require_correct(f"{case} {name}", outs[i], wanted, LIMITS[case.dtype]))
    found |= {name: peer[0] for name, peer in peers(case.M, case.N, case.K, device, sets, others).items()}
    return found | dense_products(case, device, [d[0] for d in data], dense, outs), error


def measure(
    case: Case, device: str, kernels: list[str], only: str = "", others: list[str] | None = None
) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Rows of the table, and the row of the last one, if there is one."""
    operations = 2 * case.M * case.N * case.K
    moved = case.N * case.K * codec(case.format).bits // 8 + case.M * (case.N + case.K) * case.dtype.itemsize
    sets = sets_needed(moved, device, most=8)
    calls, error = candidates(case, device, sets, kernels, only, others)
    if device.startswith("cuda"):
        times = graph_times(calls, device, inner=max(16, sets), sets=sets)
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
    options = parser.parse_args()
    heading = ("case", "candidate", "µs", "p20", "p80", "TFLOP/s", "of dense", "error", "goal")
    for device in usable_devices(options.device):
        rows: list[tuple[str, ...]] = []
        last = [("case", "ours", "µs", "best of the others", "µs", "times as fast")]
        for shape in shapes(options.shapes):
            for name in options.format:
                zeros = codec(name).zero_kinds[0]
                for dtype in options.dtype or (["f32"] if device == "cpu" else ["half"]):
                    for tokens in options.tokens:
                        group = group_of(name, options.group)
                        case = Case(tokens, shape.N, shape.K, group, DTYPES[dtype], None, name, zeros, shape.model)
                        kernels = [f"marlin_gemm_{name}", *(k for k in options.kernel if f"_{name}" in k)]
                        kernels += [f"decode_gemv_{name}_batched"] if tokens <= 128 else []
                        kernels += tiles(case) if options.tiles else []
                        found, ratio = measure(case, device, kernels, options.only, options.peers)
                        rows, last = rows + found, last + ratio
        table(device, [heading, *rows])
        table(f"{device}: beside the best of the others", last)


if __name__ == "__main__":
    main()
