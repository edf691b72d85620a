"""Norms and gated activations: microseconds and GB/s against torch's own.

    python bench/norm.py [--device cuda]

Correctness comes first, on the data that is timed. Bytes are those of inputs and outputs, each once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
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

from metal_marlin.ops import activation, norm

LIMITS = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}
Named = tuple[str, str, int, Callable[[int], torch.Tensor], Callable[[int], torch.Tensor], torch.Tensor]


def norms(device: str) -> list[Named]:
    """op, case, bytes, ours, torch's, float64 result of set 0."""
    found: list[Named] = []
    for case in (c for c in norm.CASES if c.model):
        moved = 2 * case.rows * case.width * case.dtype.itemsize
        data = [case.tensors(device, seed) for seed in range(sets_needed(moved, device))]

        def ours(i: int, data: list[tuple[torch.Tensor, ...]] = data) -> torch.Tensor:
            return norm.rms_norm(data[i][0], data[i][2])

        def theirs(i: int, data: list[tuple[torch.Tensor, ...]] = data) -> torch.Tensor:
            return F.rms_norm(data[i][0], data[i][2].shape, data[i][2], 1e-6)

        found.append(("rms_norm", str(case), moved, ours, theirs, norm.rms_norm_ref(data[0][0], data[0][2])))
    return found


def gates(device: str) -> list[Named]:
    found: list[Named] = []
    for case in (c for c in activation.CASES if c.model):
        moved = 3 * case.rows * case.width * case.dtype.itemsize
        data = [case.tensor(2, device, seed) for seed in range(sets_needed(moved, device))]

        def ours(i: int, data: list[torch.Tensor] = data) -> torch.Tensor:
            return activation.gated_activation(data[i])

        def theirs(i: int, data: list[torch.Tensor] = data) -> torch.Tensor:
            gate, up = data[i].chunk(2, -1)
            return F.silu(gate) * up

        found.append(("gated_activation", str(case), moved, ours, theirs, activation.gated_activation_ref(data[0])))
    return found


def measure(item: Named, device: str, ceiling: float) -> list[tuple[str, ...]]:
    op, case, moved, ours, theirs, wanted = item
    y = ours(0)
    synchronize(device)
    error = require_correct(f"{op} {case}", y, wanted, LIMITS[y.dtype])
    sets = sets_needed(moved, device)
    calls: dict[str, Candidate] = {op: ours, "torch": theirs}
    if device.startswith("cuda"):
        times = graph_times(calls, device, inner=max(64, sets), sets=sets)
    else:
        times = host_times(calls, device, inner=max(sets, 200 if moved < 1 << 20 else 4), rounds=15, sets=sets)
    rows = []
    for name, t in times.items():
        save("norm", f"{op}-{case}", name, t, device, moved=moved, ceiling=ceiling, error=error if name == op else None)
        rate = t.gb_per_s(moved)
        figures = (t.median, t.p20, t.p80, rate)
        rows.append((device, f"{op} {case}", name, *(f"{v:.1f}" for v in figures), f"{rate / ceiling:.2f}"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; all that work here by default")
    options = parser.parse_args()
    heading = ("device", "case", "candidate", "µs", "p20", "p80", "GB/s", "of copy")
    for device in usable_devices(options.device):
        ceiling = copy_ceiling(device)
        rows = [row for item in (*norms(device), *gates(device)) for row in measure(item, device, ceiling)]
        table(f"{device}: copy {ceiling:.0f} GB/s (read and written)", [heading, *rows])


if __name__ == "__main__":
    main()
