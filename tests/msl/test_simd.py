"""simd_*: exchanges, votes, reductions and scans among 32 lanes, all of them active or only some."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

Run = Callable[..., dict[str, torch.Tensor]]
Sources = Callable[[np.ndarray], np.ndarray]

HEAD = """#include <metal_stdlib>
using namespace metal;
"""
TYPES = {
    "char": torch.int8,
    "uchar": torch.uint8,
    "short": torch.int16,
    "ushort": torch.uint16,
    "int": torch.int32,
    "uint": torch.uint32,
    "long": torch.int64,
    "ulong": torch.uint64,
    "half": torch.float16,
    "bfloat": torch.bfloat16,
    "float": torch.float32,
}
FLOATS = ("half", "bfloat", "float")
LANE = np.arange(32)


def run_cases(msl: Run, msl_type: str, x: torch.Tensor, y: torch.Tensor, cases: Sequence[str]) -> list[np.ndarray]:
    """What each expression of x, y, lane gives per thread, in simdgroups of 32; scalars or vectors of msl_type."""
    lines = "\n".join(f"    out[{i} * n + tid] = {case};" for i, case in enumerate(cases))
    source = f"""{HEAD}
kernel void k(device const {msl_type}* xs [[buffer(0)]], device const {msl_type}* ys [[buffer(1)]],
              device {msl_type}* out [[buffer(2)]], uint tid [[thread_position_in_grid]],
              uint n [[threads_per_grid]], uint lane [[thread_index_in_simdgroup]]) {{
    const {msl_type} x = xs[tid], y = ys[tid];
{lines}
}}"""
    n = x.shape[0]
    args = {"xs": x, "ys": y, "out": torch.zeros(len(cases), *x.shape, dtype=x.dtype)}
    got = msl(source, "k", args, threads=n, threads_per_threadgroup=n)["out"]
    return list(numbers(got))


def numbers(t: torch.Tensor) -> np.ndarray:
    """As float32 where NumPy has no such type, else as is."""
    return t.float().numpy() if t.dtype in (torch.bfloat16, torch.float16) else t.numpy()


def groups(values: np.ndarray, width: int = 32) -> np.ndarray:
    return values.reshape(-1, width, *values.shape[1:])


# --- exchanges: (expression, source lane of each lane; None for lanes that must be looked up in `filled`)
SHUFFLES: list[tuple[str, np.ndarray]] = [
    ("simd_shuffle(x, 5)", np.full(32, 5)),
    ("simd_shuffle(x, ushort(31 - lane))", 31 - LANE),
    ("simd_shuffle(x, ushort(lane * 7 % 32))", LANE * 7 % 32),
    ("simd_broadcast(x, 0)", np.zeros(32, int)),
    ("simd_broadcast(x, 31)", np.full(32, 31)),
    ("simd_broadcast_first(x)", np.zeros(32, int)),
    ("simd_shuffle_xor(x, 1)", LANE ^ 1),
    ("simd_shuffle_xor(x, 22)", LANE ^ 22),
    ("simd_shuffle_up(x, 0)", LANE),
    ("simd_shuffle_up(x, 3)", np.where(LANE < 3, LANE, LANE - 3)),
    ("simd_shuffle_up(x, 31)", np.where(LANE < 31, LANE, 0)),
    ("simd_shuffle_down(x, 3)", np.where(LANE > 28, LANE, LANE + 3)),
    ("simd_shuffle_down(x, 31)", np.where(LANE > 0, LANE, 31)),
    ("simd_shuffle_rotate_up(x, 5)", (LANE - 5) % 32),
    ("simd_shuffle_rotate_down(x, 5)", (LANE + 5) % 32),
]
# sources 32 … 63 are lanes of the filling
FILLS: list[tuple[str, np.ndarray]] = [
    ("simd_shuffle_and_fill_up(x, y, 0)", LANE),
    ("simd_shuffle_and_fill_up(x, y, 3)", np.where(LANE < 3, LANE + 61, LANE - 3)),
    ("simd_shuffle_and_fill_down(x, y, 3)", LANE + 3),
    ("simd_shuffle_and_fill_down(x, y, 31)", LANE + 31),
    (
        "simd_shuffle_and_fill_up(x, y, 3, 8)",
        np.where(LANE % 8 < 3, 32 + LANE // 8 * 8 + (LANE - 3) % 8, LANE - 3),
    ),
    (
        "simd_shuffle_and_fill_down(x, y, 1, 2)",
        np.where(LANE % 2 == 1, 32 + LANE // 2 * 2 + (LANE + 1) % 2, LANE + 1),
    ),
]


def check_shuffles(msl: Run, msl_type: str, x: torch.Tensor, y: torch.Tensor) -> None:
    cases = SHUFFLES + FILLS
    got = run_cases(msl, msl_type, x, y, [expression for expression, _ in cases])
    both = np.concatenate([groups(numbers(x)), groups(numbers(y))], axis=1)
    for (expression, source), values in zip(cases, got, strict=True):
        np.testing.assert_array_equal(groups(values), both[:, source], err_msg=f"{msl_type}: {expression}")


@pytest.mark.parametrize("msl_type", TYPES)
def test_shuffles(msl: Run, msl_type: str) -> None:
    first = 0 if msl_type.startswith("u") else -32
    x, y = torch.arange(first, first + 64), torch.arange(64, 128)
    if msl_type in ("long", "ulong"):
        x, y = x * 2**40 + 3, y * 2**33 + 1
    check_shuffles(msl, msl_type, x.to(TYPES[msl_type]), y.to(TYPES[msl_type]))


@pytest.mark.parametrize(
    "msl_type", ["float2", "float4", "half2", "half4", "bfloat2", "uchar2", "uchar4", "long2", "ulong4"]
)
def test_shuffles_of_vectors(msl: Run, msl_type: str) -> None:
    element, size = TYPES[msl_type[:-1]], int(msl_type[-1])
    x = torch.arange(64 * size).reshape(64, size)
    y = (x * 7 + 5) % 251
    check_shuffles(msl, msl_type, (x % 256).to(element), y.to(element))


def test_three_component_vectors(msl: Run) -> None:
    source = f"""{HEAD}
kernel void k(device const float* x, device float* out, uint tid [[thread_position_in_grid]]) {{
    const float3 a = float3(x[tid], -x[tid], x[tid] * 2.0f);
    const half3 h = half3(a);
    const uchar3 c = uchar3(uchar(tid), uchar(tid + 100), uchar(tid * 3));
    const float3 s = simd_shuffle_xor(a, 5), t = simd_sum(a), m = float3(simd_max(h));
    const uchar3 u = simd_broadcast(c, 6);
    for (int i = 0; i < 3; ++i) {{
        out[tid * 12 + i] = s[i];
        out[tid * 12 + 3 + i] = t[i];
        out[tid * 12 + 6 + i] = m[i];
        out[tid * 12 + 9 + i] = float(u[i]);
    }}
}}"""
    x = torch.arange(32, dtype=torch.float32) + 1
    out = msl(source, "k", {"x": x, "out": torch.zeros(32, 4, 3)}, threads=32, threads_per_threadgroup=32)["out"]
    a = np.stack([x.numpy(), -x.numpy(), 2 * x.numpy()], 1)
    np.testing.assert_array_equal(out[:, 0], a[LANE ^ 5])
    np.testing.assert_array_equal(out[:, 1], np.broadcast_to(a.sum(0), (32, 3)))
    np.testing.assert_array_equal(out[:, 2], np.broadcast_to(a.max(0), (32, 3)))
    np.testing.assert_array_equal(out[:, 3], np.broadcast_to([6, 106, 18], (32, 3)))


def test_bool_and_filling_of_another_type(msl: Run) -> None:
    source = f"""{HEAD}
kernel void k(device float* out, uint lane [[thread_index_in_simdgroup]]) {{
    const bool odd = simd_shuffle_down(lane % 2 == 1, 1);
    const bool2 both = simd_broadcast(bool2(lane == 3, lane != 3), 3);
    const half h = simd_shuffle_and_fill_up(half(lane), 0, 1) + simd_shuffle_and_fill_down(half(lane), 100.0f, 1);
    out[lane] = float(odd) + 10.0f * float(both.x) + 100.0f * float(both.y) + 1000.0f * float(h);
}}"""
    out = msl(source, "k", {"out": torch.zeros(32)}, threads=32, threads_per_threadgroup=32)["out"].numpy()
    odd = np.where(LANE < 31, (LANE + 1) % 2, LANE % 2)
    h = np.where(LANE > 0, LANE - 1, 0) + np.where(LANE < 31, LANE + 1, 100)
    np.testing.assert_array_equal(out, odd + 10 + 1000 * h)


# --- reductions and scans
def wrapped(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Exact Python integers brought into the type of `like`."""
    if like.dtype.kind == "f":
        return values.astype(np.float64)
    bits, signed = like.dtype.itemsize * 8, like.dtype.kind == "i"
    low = [int(v) % (1 << bits) for v in values]
    return np.array([v - (1 << bits) if signed and v >> (bits - 1) else v for v in low], dtype=object)


REDUCTIONS: dict[str, Sources] = {
    "simd_sum(x)": lambda v: np.full(32, v.sum()),
    "simd_product(y)": lambda v: np.full(32, np.prod(v)),
    "simd_min(x)": lambda v: np.full(32, v.min()),
    "simd_max(x)": lambda v: np.full(32, v.max()),
    "simd_prefix_inclusive_sum(x)": np.cumsum,
    "simd_prefix_exclusive_sum(x)": lambda v: np.cumsum(v) - v,
    "simd_prefix_inclusive_product(y)": np.cumprod,
    "simd_prefix_exclusive_product(y)": lambda v: np.concatenate([[1], np.cumprod(v)[:-1]]),
}
BITWISE: dict[str, Sources] = {
    "simd_and(x)": lambda v: np.full(32, np.bitwise_and.reduce(v)),
    "simd_or(x)": lambda v: np.full(32, np.bitwise_or.reduce(v)),
    "simd_xor(x)": lambda v: np.full(32, np.bitwise_xor.reduce(v)),
}


@pytest.mark.parametrize("msl_type", TYPES)
def test_reductions_and_scans(msl: Run, msl_type: str) -> None:
    """Over values whose sums and products are exact (floating point) or wrap around (integers)."""
    dtype = TYPES[msl_type]
    rng = np.random.default_rng(11)
    if msl_type in FLOATS:
        x = torch.from_numpy(rng.integers(-4, 5, 64)).to(dtype)
        y = torch.from_numpy(rng.choice([1.0, -1.0, 2.0, 0.5], 64)).to(dtype)
        cases = dict(REDUCTIONS)
    else:
        info = torch.iinfo(dtype)
        x = torch.from_numpy(
            rng.integers(info.min, info.max, 64, dtype=str(dtype).removeprefix("torch."), endpoint=True)
        )
        y = torch.from_numpy(rng.integers(1, 8, 64)).to(dtype)
        cases = REDUCTIONS | BITWISE
    got = run_cases(msl, msl_type, x, y, list(cases))
    for (expression, expected), values in zip(cases.items(), got, strict=True):
        source = numbers(y if "(y)" in expression else x)
        exact = source.astype(np.float64) if msl_type in FLOATS else source.astype(object)
        for lanes, group in zip(groups(exact), groups(values), strict=True):
            want = wrapped(expected(lanes), source)
            assert group.tolist() == want.tolist(), f"{msl_type}: {expression}"


@pytest.mark.parametrize("msl_type", ["float4", "half2", "int2", "uchar4", "ulong2"])
def test_reductions_of_vectors(msl: Run, msl_type: str) -> None:
    element, size = TYPES[msl_type[:-1]], int(msl_type[-1])
    x = (torch.arange(64 * size).reshape(64, size) * 5 % 7).to(element)
    cases = [
        "simd_sum(x)",
        "simd_max(x)",
        "simd_min(y)",
        "simd_prefix_exclusive_sum(x)",
        "simd_prefix_inclusive_sum(y)",
    ]
    total, top, low, before, upto = run_cases(msl, msl_type, x, x, cases)
    v = groups(numbers(x).astype(np.int64))
    np.testing.assert_array_equal(groups(total), np.broadcast_to(v.sum(1, keepdims=True), v.shape))
    np.testing.assert_array_equal(groups(top), np.broadcast_to(v.max(1, keepdims=True), v.shape))
    np.testing.assert_array_equal(groups(low), np.broadcast_to(v.min(1, keepdims=True), v.shape))
    np.testing.assert_array_equal(groups(before), v.cumsum(1) - v)
    np.testing.assert_array_equal(groups(upto), v.cumsum(1))


def butterfly(values: np.ndarray, op: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    for d in (16, 8, 4, 2, 1):
        values = op(values, values[LANE ^ d])
    return values


def doubling(values: np.ndarray) -> np.ndarray:
    for d in (1, 2, 4, 8, 16):
        values = np.where(d <= LANE, np.roll(values, d) + values, values)
    return values


def test_floating_point_order(msl: Run) -> None:
    """Full simdgroups combine in butterfly order, partial ones lane after lane: every device rounds alike."""
    source = f"""{HEAD}
kernel void k(device const float* xs [[buffer(0)]], device float* out [[buffer(1)]],
              uint lane [[thread_index_in_simdgroup]]) {{
    const float x = xs[lane];
    out[lane] = simd_sum(x);
    out[32 + lane] = simd_product(x);
    out[64 + lane] = simd_prefix_inclusive_sum(x);
    if (lane % 3 != 1) {{
        out[96 + lane] = simd_sum(x);
        out[128 + lane] = simd_prefix_inclusive_sum(x);
    }}
}}"""
    x = torch.from_numpy(np.random.default_rng(5).uniform(0.5, 1.5, 32).astype(np.float32))
    out = msl(source, "k", {"xs": x, "out": torch.zeros(160)}, threads=32, threads_per_threadgroup=32)["out"].numpy()
    v = x.numpy()
    some = LANE % 3 != 1
    prefix = np.zeros(32, np.float32)
    total = np.float32(0)
    for i in LANE[some]:
        total = prefix[i] = np.float32(total + v[i])
    np.testing.assert_array_equal(out[:32], butterfly(v, np.add))
    np.testing.assert_array_equal(out[32:64], butterfly(v, np.multiply))
    np.testing.assert_array_equal(out[64:96], doubling(v))
    np.testing.assert_array_equal(out[96:128], np.where(some, total, 0))
    np.testing.assert_array_equal(out[128:], prefix)


def test_infinities_and_halves_round_once(msl: Run) -> None:
    source = f"""{HEAD}
kernel void k(device const float* xs [[buffer(0)]], device float* out [[buffer(1)]],
              uint lane [[thread_index_in_simdgroup]]) {{
    const float x = lane == 7 ? -INFINITY : xs[lane];
    out[lane] = simd_max(x);
    out[32 + lane] = simd_min(x);
    out[64 + lane] = simd_sum(x);
    out[96 + lane] = float(simd_sum(half(xs[lane])));
    out[128 + lane] = float(simd_sum(bfloat(xs[lane])));
}}"""
    x = torch.from_numpy(np.random.default_rng(6).uniform(100, 200, 32).astype(np.float32))
    out = msl(source, "k", {"xs": x, "out": torch.zeros(160)}, threads=32, threads_per_threadgroup=32)["out"].view(
        5, 32
    )
    others = torch.cat([x[:7], x[8:]])
    assert (out[0] == others.max()).all()
    assert (out[1:3] == -torch.inf).all()
    for row, dtype in ((3, torch.float16), (4, torch.bfloat16)):
        exact = x.to(dtype).double().sum()
        assert (out[row] == exact.to(dtype).float()).all(), dtype


# --- votes
def test_votes(msl: Run) -> None:
    source = f"""{HEAD}
kernel void k(device ulong* out [[buffer(0)]], uint tid [[thread_position_in_grid]],
              uint lane [[thread_index_in_simdgroup]]) {{
    const simd_vote odd = simd_ballot(tid % 2 == 1);
    const simd_vote::vote_t bits = static_cast<simd_vote::vote_t>(odd);
    out[tid * 8] = bits;
    out[tid * 8 + 1] = (simd_vote::vote_t)simd_ballot(tid < 40);
    out[tid * 8 + 2] = ulong(odd.any()) + 2 * ulong(odd.all()) + 4 * ulong(simd_ballot(true).all());
    out[tid * 8 + 3] = ulong(simd_any(tid == 45)) + 2 * ulong(simd_all(tid != 45)) + 4 * ulong(simd_any(lane > 40));
    out[tid * 8 + 4] = (simd_vote::vote_t)simd_active_threads_mask();
    out[tid * 8 + 5] = ulong(simd_is_first()) + 2 * ulong(simd_is_helper_thread());
    if (lane >= 9 && lane != 12) {{
        out[tid * 8 + 6] = (simd_vote::vote_t)simd_ballot(lane % 4 == 0) | (simd_vote::vote_t)simd_active_threads_mask() << 32;
        out[tid * 8 + 7] = ulong(simd_is_first()) + 2 * ulong(simd_all(lane >= 9)) + 4 * ulong(simd_any(lane == 12));
    }}
}}"""
    out = torch.zeros(64, 8, dtype=torch.int64)
    got = msl(source, "k", {"out": out}, threads=64, threads_per_threadgroup=64)["out"].numpy().astype(object) % 2**64
    tid = np.arange(64)
    some = (tid % 32 >= 9) & (tid % 32 != 12)
    mask = sum(1 << i for i in range(9, 32) if i != 12)
    fours = sum(1 << i for i in range(16, 32, 4))
    assert (got[:, 0] == 0xAAAAAAAA).all()
    assert (got[:, 1] == np.where(tid < 32, 0xFFFFFFFF, 0xFF)).all()
    assert (got[:, 2] == 5).all()
    assert (got[:, 3] == np.where(tid < 32, 2, 1)).all()
    assert (got[:, 4] == 0xFFFFFFFF).all()
    assert (got[:, 5] == (tid % 32 == 0)).all()
    assert got[:, 6].tolist() == [(fours | mask << 32) if s else 0 for s in some]
    assert (got[:, 7] == np.where(some, 2 + (tid % 32 == 9), 0)).all()


@pytest.mark.lane_agnostic
def test_one_thread_is_a_simdgroup(msl: Run) -> None:
    cases = [
        *("simd_sum(x)", "simd_product(x)", "simd_min(x)", "simd_max(x)", "simd_broadcast(x, 0)"),
        *("simd_broadcast_first(x)", "simd_shuffle(x, 0)", "simd_shuffle_xor(x, 0)", "simd_shuffle_up(x, 1)"),
        *("simd_prefix_inclusive_sum(x)", "simd_prefix_inclusive_product(x)", "simd_all(x != y) ? x : y"),
        *("simd_any(x == y) ? y : x", "float((simd_vote::vote_t)simd_ballot(true)) * x", "simd_is_first() ? x : y"),
        "simd_prefix_exclusive_sum(x) + simd_prefix_exclusive_product(y) * x",
    ]
    for case, value in zip(
        cases, run_cases(msl, "float", torch.tensor([3.5]), torch.tensor([2.0]), cases), strict=True
    ):
        assert value.tolist() == [3.5], case
