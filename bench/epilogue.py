"""Products with an epilogue in the same launch: microseconds, beside the product and its epilogue as two launches.

    python bench/epilogue.py [--device cuda]

Correctness comes first, on the data that is timed. `torch` is its product with dequantised weights, then its functions.
"""

from __future__ import annotations

import argparse

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
from metal_marlin.ops import epilogue as ops
from metal_marlin.ops.activation import ACTIVATIONS
from metal_marlin.ops.linear import linear


def candidates(case: ops.Case, device: str, sets: int) -> dict[str, Candidate]:
    data = copies(case.tensors(device), sets)
    W = codec("fp4").decode(*data[0][1:3], None, case.group, "none", case.dtype)
    dense = copies(W, sets_needed(W.nbytes, device))

    def fused(kernel: str | None) -> Candidate:
        def run(i: int) -> torch.Tensor:
            x, codes, scales, bias, other = data[i]
            return ops.linear_epilogue(x, codes, scales, case.group, kernel=kernel, **case.options(bias, other))  # type: ignore[arg-type]

        return run

    def two(i: int) -> torch.Tensor:
        x, codes, scales, bias, other = data[i]
        return ops.epilogue(linear(x, codes, scales, case.group), **case.options(bias, other))  # type: ignore[arg-type]

    def library(i: int) -> torch.Tensor:
        x, _, _, bias, other = data[i]
        y = torch.nn.functional.linear(x, dense[i % len(dense)], bias if case.bias else None)
        y = y if case.activation == "none" else ACTIVATIONS[case.activation](y)  # type: ignore[operator]
        return torch.add(other, y, alpha=0.5) if case.join == "residual" else y * other if case.join else y

    x, codes, scales, bias, other = data[0]
    wanted = ops.linear_epilogue_ref(x, codes, scales, case.group, **case.options(bias, other))
    found: dict[str, Candidate] = {
        "marlin_gemm_fused_fp4_epilogue_fc": fused("marlin_gemm_fused_fp4_epilogue_fc"),
        "marlin_gemm_fused_fp4_epilogue": fused("marlin_gemm_fused_fp4_epilogue"),
        "linear, epilogue_standalone": two,
    }
    for name, call in found.items():
        y = call(0)
        synchronize(device)
        assert isinstance(y, torch.Tensor)
        require_correct(f"{case} {name}", y, wanted, 2e-3)
    return {**found, "torch": library}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; all that work here by default")
    options = parser.parse_args()
    for device in usable_devices(options.device):
        rows = []
        for case in (c for c in ops.CASES if c.model):
            sets = sets_needed(case.N * case.K // 2, device)
            calls = candidates(case, device, sets)
            if device.startswith("cuda"):
                times = graph_times(calls, device, inner=max(8, sets), sets=sets)
            else:
                times = host_times(calls, device, inner=1, rounds=7, sets=sets)
            for name, t in times.items():
                save("epilogue", str(case), name, t, device, operations=2 * case.M * case.N * case.K)
                rows.append((str(case), name, f"{t.median:.1f}", f"{t.p20:.1f}", f"{t.p80:.1f}"))
        table(device, [("case", "candidate", "µs", "p20", "p80"), *rows])


if __name__ == "__main__":
    main()
