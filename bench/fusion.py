"""Products with four-bit weights fused with what stands before or after them: microseconds, beside the same as several
launches and torch's with dequantised weights.

    python bench/fusion.py [--device cuda]

Correctness comes first, on the data that is timed.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
from common import (
    Candidate,
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
from metal_marlin.ops import linear_residual, norm_linear, norm_qkv
from metal_marlin.ops.epilogue import epilogue
from metal_marlin.ops.linear import linear
from metal_marlin.ops.norm import rms_norm

# id, bytes of a set, multiplications and additions, candidates over so many sets of data
Named = tuple[str, int, int, Callable[[str, int], dict[str, Candidate]]]


def residuals() -> list[Named]:
    def candidates(case: linear_residual.Case, device: str, sets: int) -> dict[str, Candidate]:
        p = case.product
        data = copies(case.tensors(device), sets)
        dense = dense_copies([data[0][1:3]], p, device)

        def fused(kernel: str | None) -> Candidate:
            def run(i: int) -> torch.Tensor:
                x, codes, scales, _, residual = data[i]
                return linear_residual.linear_residual(x, codes, scales, p.group, residual, kernel=kernel)

            return run

        def two(i: int) -> torch.Tensor:
            x, codes, scales, _, residual = data[i]
            return epilogue(linear(x, codes, scales, p.group), residual=residual)

        def library(i: int) -> torch.Tensor:
            return data[i][4] + torch.nn.functional.linear(data[i][0], dense[i % len(dense)])

        x, codes, scales, _, residual = data[0]
        wanted = linear_residual.linear_residual_ref(x, codes, scales, p.group, residual)
        rows = [f"linear_residual_fp4{few}" for few in ("", *(["_decode"] if p.M <= 8 else []))]
        ours = {**{name: fused(name) for name in rows}, "linear_residual": fused(None), "linear, epilogue": two}
        correct(str(case), ours, wanted, device)
        return {**ours, "torch": library}

    return [named(case, candidates) for case in linear_residual.CASES if case.model]


def norms() -> list[Named]:
    def candidates(case: norm_linear.Case, device: str, sets: int) -> dict[str, Candidate]:
        p = case.product
        data = copies(case.tensors(device), sets)
        dense = dense_copies([data[0][2:4]], p, device)

        def fused(kernel: str | None) -> Candidate:
            return lambda i: norm_linear.norm_linear(*data[i][:4], p.group, residual=data[i][5], kernel=kernel)

        def apart(i: int) -> torch.Tensor:
            x, weight, codes, scales, _, residual = data[i]
            y = linear(rms_norm(x, weight), codes, scales, p.group)
            return y if residual is None else epilogue(y, residual=residual)

        def library(i: int) -> torch.Tensor:
            normed = torch.nn.functional.rms_norm(data[i][0], (p.K,), data[i][1], 1e-6)
            y, residual = torch.nn.functional.linear(normed, dense[i % len(dense)]), data[i][5]
            return y if residual is None else residual + y

        rows = norm_linear.kernels("fp4", case.added)[: 2 if p.M <= 8 else 1]
        steps = "rms_norm, linear, epilogue" if case.added else "rms_norm, linear"
        ours = {**{name: fused(name) for name in rows}, "norm_linear": fused(None), steps: apart}
        correct(str(case), ours, norm_linear.norm_linear_ref(*data[0][:4], p.group, residual=data[0][5]), device)
        return {**ours, "torch": library}

    return [named(case, candidates) for case in norm_linear.CASES if case.model]


def attention() -> list[Named]:
    def candidates(case: norm_qkv.Case, device: str, sets: int) -> dict[str, Candidate]:
        data = copies(case.tensors(device), sets)
        dense = dense_copies(data[0][2], case, device)

        def fused(kernel: str | None) -> Candidate:
            def run(i: int) -> torch.Tensor:
                x, weight, (q, k, v) = data[i]
                return torch.cat(norm_qkv.norm_qkv(x, weight, q, k, v, case.group, kernel=kernel), -1)

            return run

        def four(i: int) -> torch.Tensor:
            normed = rms_norm(*data[i][:2])
            return torch.cat([linear(normed, *w, case.group) for w in data[i][2]], -1)

        def library(i: int) -> torch.Tensor:
            normed = torch.nn.functional.rms_norm(data[i][0], (case.K,), data[i][1], 1e-6)
            return torch.nn.functional.linear(normed, dense[i % len(dense)])

        rows = ["norm_qkv_fp4", *(["norm_qkv_fp4_decode"] if case.M <= 8 else [])]
        ours = {**{name: fused(name) for name in rows}, "norm_qkv": fused(None), "rms_norm, 3 linear": four}
        x, weight, (q, k, v) = data[0]
        correct(str(case), ours, torch.cat(norm_qkv.norm_qkv_ref(x, weight, q, k, v, case.group), -1), device)
        return {**ours, "torch, one W": library}

    return [
        (str(c), sum(c.rows) * c.K // 2, 2 * c.M * sum(c.rows) * c.K, functools.partial(candidates, c))
        for c in norm_qkv.CASES
        if c.model
    ]


def named(case: Any, candidates: Callable[[Any, str, int], dict[str, Candidate]]) -> Named:
    p = case.product
    return str(case), p.N * p.K // 2, 2 * p.M * p.N * p.K, functools.partial(candidates, case)


def dense_copies(weights: list[tuple[torch.Tensor, torch.Tensor]], case: Any, device: str) -> list[torch.Tensor]:
    """Sets of the weights, one above the other, as torch multiplies them."""
    W = torch.cat([codec("fp4").decode(*w, None, case.group, "none", case.dtype) for w in weights])
    return copies(W, sets_needed(W.nbytes, device))


def correct(case: str, ours: dict[str, Candidate], wanted: torch.Tensor, device: str) -> None:
    for name, call in ours.items():
        y = call(0)
        synchronize(device)
        assert isinstance(y, torch.Tensor)
        require_correct(f"{case} {name}", y, wanted, 2e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; all that work here by default")
    options = parser.parse_args()
    for device in usable_devices(options.device):
        rows = []
        for case, size, operations, candidates in (*residuals(), *norms(), *attention()):
            sets = sets_needed(size, device)
            calls = candidates(device, sets)
            if device.startswith("cuda"):
                times = graph_times(calls, device, inner=max(8, sets), sets=sets)
            else:
                times = host_times(calls, device, inner=1, rounds=7, sets=sets)
            for name, t in times.items():
                save("fusion", case, name, t, device, operations=operations)
                rows.append((case, name, f"{t.median:.1f}", f"{t.p20:.1f}", f"{t.p80:.1f}"))
        table(device, [("case", "candidate", "µs", "p20", "p80"), *rows])


if __name__ == "__main__":
    main()
