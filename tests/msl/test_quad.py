"""quad_*: exchanges, votes, reductions and scans among four neighbouring lanes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

Run = Callable[..., dict[str, torch.Tensor]]

HEAD = """#include <metal_stdlib>
using namespace metal;
"""
TYPES = {
    "char": torch.int8,
    "ushort": torch.uint16,
    "int": torch.int32,
    "uint": torch.uint32,
    "long": torch.int64,
    "half": torch.float16,
    "bfloat": torch.bfloat16,
    "float": torch.float32,
    "half4": torch.float16,
    "float2": torch.float32,
    "float4": torch.float32,
    "int2": torch.int32,
}
Q = np.arange(4)
# (expression, source of each lane of the quad; 4 … 7 are lanes of the filling)
SHUFFLES: list[tuple[str, np.ndarray]] = [
    ("quad_broadcast(x, 2)", np.full(4, 2)),
    ("quad_broadcast_first(x)", np.zeros(4, int)),
    ("quad_shuffle(x, ushort(3 - q))", 3 - Q),
    ("quad_shuffle_xor(x, 1)", Q ^ 1),
    ("quad_shuffle_xor(x, 3)", Q ^ 3),
    ("quad_shuffle_up(x, 1)", np.array([0, 0, 1, 2])),
    ("quad_shuffle_up(x, 3)", np.array([0, 1, 2, 0])),
    ("quad_shuffle_down(x, 1)", np.array([1, 2, 3, 3])),
    ("quad_shuffle_down(x, 2)", np.array([2, 3, 2, 3])),
    ("quad_shuffle_rotate_up(x, 1)", (Q - 1) % 4),
    ("quad_shuffle_rotate_down(x, 1)", (Q + 1) % 4),
    ("quad_shuffle_and_fill_up(x, y, 1)", np.array([7, 0, 1, 2])),
    ("quad_shuffle_and_fill_down(x, y, 3)", np.array([3, 4, 5, 6])),
    ("quad_shuffle_and_fill_up(x, y, 1, 2)", np.array([5, 0, 7, 2])),
    ("quad_shuffle_and_fill_down(x, y, 1, 2)", np.array([1, 4, 3, 6])),
]


def run_cases(msl: Run, msl_type: str, x: torch.Tensor, y: torch.Tensor, cases: Sequence[str]) -> np.ndarray:
    lines = "\n".join(f"    out[{i} * n + tid] = {case};" for i, case in enumerate(cases))
    source = f"""{HEAD}
kernel void k(device const {msl_type}* xs [[buffer(0)]], device const {msl_type}* ys [[buffer(1)]],
              device {msl_type}* out [[buffer(2)]], uint tid [[thread_position_in_grid]],
              uint n [[threads_per_grid]], uint q [[thread_index_in_quadgroup]]) {{
    const {msl_type} x = xs[tid], y = ys[tid];
{lines}
}}"""
    args = {"xs": x, "ys": y, "out": torch.zeros(len(cases), *x.shape, dtype=x.dtype)}
    got = msl(source, "k", args, threads=x.shape[0], threads_per_threadgroup=x.shape[0])["out"]
    return got.double().numpy() if got.dtype.is_floating_point else got.numpy()


def quads(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1, 4, *values.shape[1:])


def values_of(msl_type: str, first: int) -> torch.Tensor:
    size = int(msl_type[-1]) if msl_type[-1].isdigit() else 0
    return torch.arange(first, first + 64 * max(size, 1)).reshape(64, *([size] if size else [])).to(TYPES[msl_type])


@pytest.mark.parametrize("msl_type", TYPES)
def test_shuffles(msl: Run, msl_type: str) -> None:
    x, y = values_of(msl_type, 0), values_of(msl_type, 50)
    got = run_cases(msl, msl_type, x, y, [expression for expression, _ in SHUFFLES])
    both = np.concatenate([quads(x.double().numpy()), quads(y.double().numpy())], axis=1)
    for (expression, source), values in zip(SHUFFLES, got, strict=True):
        np.testing.assert_array_equal(quads(values), both[:, source], err_msg=f"{msl_type}: {expression}")


@pytest.mark.parametrize("msl_type", TYPES)
def test_reductions_and_scans(msl: Run, msl_type: str) -> None:
    x = (values_of(msl_type, 0).long() * 5 % 7 + 1).to(TYPES[msl_type])
    # every product must be exact in the narrowest type
    y = (values_of(msl_type, 0).long() * 3 % 4 + 1).clamp(max=2 if msl_type == "bfloat" else 3).to(TYPES[msl_type])
    cases: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "quad_sum(x)": lambda v: v.sum(1, keepdims=True),
        "quad_min(x)": lambda v: v.min(1, keepdims=True),
        "quad_max(x)": lambda v: v.max(1, keepdims=True),
        "quad_product(y)": lambda v: v.prod(1, keepdims=True),
        "quad_prefix_inclusive_sum(x)": lambda v: v.cumsum(1),
        "quad_prefix_exclusive_sum(x)": lambda v: v.cumsum(1) - v,
        "quad_prefix_inclusive_product(y)": lambda v: v.cumprod(1),
        "quad_prefix_exclusive_product(y)": lambda v: v.cumprod(1) / v,
    }
    if not TYPES[msl_type].is_floating_point:
        cases |= {
            "quad_and(x)": lambda v: np.bitwise_and.reduce(v.astype(int), 1, keepdims=True),
            "quad_or(x)": lambda v: np.bitwise_or.reduce(v.astype(int), 1, keepdims=True),
            "quad_xor(x)": lambda v: np.bitwise_xor.reduce(v.astype(int), 1, keepdims=True),
        }
    got = run_cases(msl, msl_type, x, y, list(cases))
    for (expression, expected), values in zip(cases.items(), got, strict=True):
        v = quads((y if "(y)" in expression else x).double().numpy())
        np.testing.assert_array_equal(
            quads(values), np.broadcast_to(expected(v), v.shape), err_msg=f"{msl_type}: {expression}"
        )


def test_floating_point_order(msl: Run) -> None:
    x = torch.from_numpy(np.random.default_rng(3).uniform(0.5, 1.5, 64).astype(np.float32))
    full, scan = run_cases(msl, "float", x, x, ["quad_sum(x)", "quad_prefix_inclusive_sum(x)"])
    v = quads(x.numpy())
    np.testing.assert_array_equal(quads(full)[:, 0], (v[:, 0] + v[:, 2]) + (v[:, 1] + v[:, 3]))
    np.testing.assert_array_equal(quads(scan)[:, 3], ((v[:, 0] + v[:, 1]) + v[:, 2]) + v[:, 3])


def test_votes(msl: Run) -> None:
    source = f"""{HEAD}
kernel void k(device uint* out [[buffer(0)]], uint tid [[thread_position_in_grid]],
              uint q [[thread_index_in_quadgroup]]) {{
    const quad_vote some = quad_ballot((tid / 4 >> q & 1) != 0);
    uint r = uint((quad_vote::vote_t)some);
    r |= uint(some.all()) << 4 | uint(some.any()) << 5 | uint(quad_all(tid < 62)) << 6 | uint(quad_any(tid == 9)) << 7;
    r |= uint((quad_vote::vote_t)quad_active_threads_mask()) << 8 | uint(quad_is_first()) << 12;
    r |= uint(quad_is_helper_thread()) << 13;
    if (q > 1) r |= uint((quad_vote::vote_t)quad_active_threads_mask()) << 16 | uint(quad_is_first()) << 20;
    out[tid] = r;
}}"""
    out = msl(source, "k", {"out": torch.zeros(64, dtype=torch.int32)}, threads=64, threads_per_threadgroup=64)["out"]
    for tid, got in enumerate(out.tolist()):
        quad, q = tid // 4, tid % 4
        want = (
            quad
            | (quad == 15) << 4
            | (quad != 0) << 5
            | (quad != 15) << 6
            | (quad == 2) << 7
            | 15 << 8
            | (q == 0) << 12
        )
        if q > 1:
            want |= 12 << 16 | (q == 2) << 20
        assert got == want, tid


@pytest.mark.parametrize("threads", [64, 38], ids=["full", "tail"])
def test_active_lanes_only(msl: Run, threads: int) -> None:
    """Quads of which some lanes are elsewhere, next to whole ones and to empty ones."""
    source = f"""{HEAD}
kernel void k(device int* out [[buffer(0)]], uint tid [[thread_position_in_grid]],
              uint q [[thread_index_in_quadgroup]]) {{
    const int v = int(tid) + 1;
    int r = quad_sum(v);
    if ((tid * 7) % 5 != 1) {{
        r += 1000 * quad_sum(v) + 1000000 * quad_prefix_inclusive_sum(1) + 10000000 * quad_broadcast_first(v);
    }} else {{
        r += 1000 * quad_max(v) + 1000000 * quad_prefix_exclusive_sum(1);
    }}
    out[tid] = r;
}}"""
    out = torch.zeros(64, dtype=torch.int32)
    got = msl(source, "k", {"out": out}, threads=threads, threads_per_threadgroup=64)["out"].tolist()
    want = [0] * 64
    for tid in range(threads):
        quad = [t for t in range(tid // 4 * 4, tid // 4 * 4 + 4) if t < threads]
        mine = [t for t in quad if (t * 7 % 5 != 1) == (tid * 7 % 5 != 1)]
        before = sum(t < tid for t in mine)
        if tid * 7 % 5 != 1:
            extra = 1000 * sum(t + 1 for t in mine) + 1000000 * (before + 1) + 10000000 * (mine[0] + 1)
        else:
            extra = 1000 * (mine[-1] + 1) + 1000000 * before
        want[tid] = sum(t + 1 for t in quad) + extra
    assert got == want


@pytest.mark.lane_agnostic
def test_one_thread_is_a_quadgroup(msl: Run) -> None:
    cases = [
        *("quad_sum(x)", "quad_product(x)", "quad_min(x)", "quad_max(x)", "quad_broadcast(x, 0)", "quad_shuffle(x, 0)"),
        *(
            "quad_broadcast_first(x)",
            "quad_shuffle_xor(x, 0)",
            "quad_prefix_inclusive_sum(x)",
            "quad_is_first() ? x : y",
        ),
        *(
            "quad_all(x > y) ? x : y",
            "float((quad_vote::vote_t)quad_ballot(true)) * x",
            "quad_prefix_exclusive_sum(x) + x",
        ),
    ]
    got = run_cases(msl, "float", torch.tensor([3.5]), torch.tensor([2.0]), cases)
    assert got.tolist() == [[3.5]] * len(cases)
