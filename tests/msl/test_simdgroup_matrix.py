"""simdgroup_matrix: the published lane map, loads and stores, products in every mix of element types."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

Run = Callable[..., dict[str, torch.Tensor]]

HEAD = """#include <metal_stdlib>
using namespace metal;
"""
TYPES = {"half": torch.float16, "bfloat": torch.bfloat16, "float": torch.float32}
ROUNDING = {"half": 2**-11, "bfloat": 2**-8, "float": 2**-24}


@pytest.fixture
def lanes(msl: Run) -> int:
    """Threads of a simdgroup on this device."""
    return 1 if msl.backend == "cpu1" else 32  # type: ignore[attr-defined]


def matrix(seed: int, msl_type: str, *shape: int) -> torch.Tensor:
    return torch.randn(shape or (8, 8), generator=torch.Generator().manual_seed(seed)).to(TYPES[msl_type])


@pytest.mark.parametrize("msl_type", TYPES)
def test_lane_map(msl: Run, msl_type: str) -> None:
    """Lane l holds two neighbours of one row, where MLX and llama.cpp expect them; elements can be set there."""
    source = f"""{HEAD}
kernel void k(device const {msl_type}* x [[buffer(0)]], device {msl_type}* seen [[buffer(1)]],
              device {msl_type}* y [[buffer(2)]], uint lane [[thread_index_in_simdgroup]]) {{
    simdgroup_matrix<{msl_type}, 8, 8> m, n;
    simdgroup_load(m, x, 8);
    seen[lane * 2] = m.thread_elements()[0];
    seen[lane * 2 + 1] = m.thread_elements()[1];
    typedef vec<{msl_type}, 2> pair;
    reinterpret_cast<thread pair&>(n.thread_elements()) = pair({msl_type}(lane), m.thread_elements().y);
    thread auto& elements = n.thread_elements();
    elements[1] = elements[1] * {msl_type}(2);
    simdgroup_store(n, y, 8);
}}"""
    x = matrix(1, msl_type)
    args = {"x": x, "seen": torch.zeros(64, dtype=x.dtype), "y": torch.zeros(64, dtype=x.dtype)}
    out = msl(source, "k", args, threads=32, threads_per_threadgroup=32)
    for lane in range(32):
        q = lane // 4
        row, col = (q & 4) + lane // 2 % 4, (q & 2) * 2 + lane % 2 * 2
        assert out["seen"][lane * 2 : lane * 2 + 2].tolist() == x[row, col : col + 2].tolist(), lane
        assert out["y"][row * 8 + col : row * 8 + col + 2].tolist() == [lane, 2 * x[row, col + 1].item()], lane


@pytest.mark.lane_agnostic
@pytest.mark.parametrize("msl_type", TYPES)
def test_constructors(msl: Run, lanes: int, msl_type: str) -> None:
    source = f"""{HEAD}
typedef simdgroup_matrix<{msl_type}, 8, 8> mat;
kernel void k(device {msl_type}* y [[buffer(0)]]) {{
    mat zero = mat(0), diagonal(3);
    mat copy = diagonal;
    mat array[2] = {{mat({msl_type}(-1.5f)), make_filled_simdgroup_matrix<{msl_type}, 8, 8>({msl_type}(2.5f))}};
    simdgroup_store(zero, y, 8);
    simdgroup_store(copy, y + 64, 8);
    for (int i = 0; i < 2; ++i) simdgroup_store(array[i], y + 128 + 64 * i, 8);
    simdgroup_{msl_type}8x8 filled = make_filled_simdgroup_matrix<{msl_type}, 8, 8>(7);
    simdgroup_store(filled, y + 256);
}}"""
    y = torch.full((5, 8, 8), 9.0, dtype=TYPES[msl_type])
    out = msl(source, "k", {"y": y}, threads=lanes, threads_per_threadgroup=lanes)["y"].float()
    eye = torch.eye(8)
    want = torch.stack([0 * eye, 3 * eye, -1.5 * eye, torch.full((8, 8), 2.5), torch.full((8, 8), 7.0)])
    assert torch.equal(out, want)


@pytest.mark.lane_agnostic
@pytest.mark.parametrize("msl_type", TYPES)
def test_loads_and_stores(msl: Run, lanes: int, msl_type: str) -> None:
    """Strides, origins (column, row) in memory, transposition; device and threadgroup memory; nothing else is written."""
    source = f"""{HEAD}
kernel void k(device const {msl_type}* x [[buffer(0)]], device {msl_type}* y [[buffer(1)]],
              uint tid [[thread_index_in_threadgroup]], uint n [[threads_per_threadgroup]]) {{
    threadgroup {msl_type} tile[24 * 20];
    simdgroup_matrix<{msl_type}, 8, 8> m;
    simdgroup_load(m, x, 20, ulong2(5, 3));
    simdgroup_store(m, y, 20, ulong2(1, 2));
    simdgroup_load(m, x, 20, ulong2(5, 3), true);
    simdgroup_store(m, y, 20, ulong2(10, 2), false);
    simdgroup_load(m, x + 21, 20, 0, false);
    simdgroup_store(m, y + 12 * 20, 20, ulong2(0, 0), true);
    for (uint i = tid; i < 24 * 20; i += n) tile[i] = x[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    simdgroup_load(m, tile + 7, 20, ulong2(0, 9), true);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    simdgroup_store(m, tile, 20, ulong2(3, 0));
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const threadgroup {msl_type}* from = tile;
    simdgroup_load(m, from, 20, ulong2(3, 0));
    simdgroup_store(m, y, 20, ulong2(11, 12));
}}"""
    x = matrix(2, msl_type, 24, 20)
    y = torch.full((24, 20), float("nan"), dtype=x.dtype)
    out = msl(source, "k", {"x": x, "y": y}, threads=lanes, threads_per_threadgroup=lanes)["y"]
    want = y.clone()
    want[2:10, 1:9] = x[3:11, 5:13]
    want[2:10, 10:18] = x[3:11, 5:13].T
    want[12:20, 0:8] = x[1:9, 1:9].T
    want[12:20, 11:19] = x[9:17, 7:15].T
    assert torch.equal(out.float().nan_to_num(99.0), want.float().nan_to_num(99.0))


@pytest.mark.lane_agnostic
@pytest.mark.parametrize(
    ("a", "b", "c", "d"),
    [
        ("float", "float", "float", "float"),
        ("half", "half", "float", "float"),
        ("half", "half", "half", "half"),
        ("bfloat", "bfloat", "float", "float"),
        ("bfloat", "bfloat", "bfloat", "bfloat"),
        ("half", "float", "float", "float"),
        ("float", "bfloat", "float", "half"),
    ],
)
def test_products(msl: Run, lanes: int, a: str, b: str, c: str, d: str) -> None:
    source = f"""{HEAD}
kernel void k(device const {a}* as [[buffer(0)]], device const {b}* bs [[buffer(1)]],
              device const {c}* cs [[buffer(2)]], device {d}* y [[buffer(3)]]) {{
    simdgroup_matrix<{a}, 8, 8> A;
    simdgroup_matrix<{b}, 8, 8> B;
    simdgroup_matrix<{c}, 8, 8> C;
    simdgroup_matrix<{d}, 8, 8> D, E;
    simdgroup_load(A, as);
    simdgroup_load(B, bs);
    simdgroup_load(C, cs);
    simdgroup_multiply_accumulate(D, A, B, C);
    simdgroup_multiply(E, A, B);
    simdgroup_store(D, y);
    simdgroup_store(E, y + 64);
}}"""
    A, B, C = matrix(3, a), matrix(4, b), matrix(5, c)
    args = {"as": A, "bs": B, "cs": C, "y": torch.zeros(2, 8, 8, dtype=TYPES[d])}
    out = msl(source, "k", args, threads=lanes, threads_per_threadgroup=lanes)["y"].double()
    product = A.double() @ B.double()
    want = torch.stack([product + C.double(), product])
    scale = torch.stack([A.double().abs() @ B.double().abs() + C.double().abs(), A.double().abs() @ B.double().abs()])
    assert ((out - want).abs() <= ROUNDING[d] * want.abs() + 2**-21 * scale).all()


@pytest.mark.lane_agnostic
def test_operator_and_aliasing(msl: Run, lanes: int) -> None:
    """The destination may be an operand; integers are exact."""
    source = f"""{HEAD}
kernel void k(device const float* x [[buffer(0)]], device float* y [[buffer(1)]]) {{
    simdgroup_float8x8 a, b;
    simdgroup_load(a, x);
    simdgroup_load(b, x + 64);
    simdgroup_store(a * b * a, y);
    simdgroup_float8x8 c = a;
    simdgroup_multiply(c, c, c);
    simdgroup_store(c, y + 64);
    simdgroup_multiply_accumulate(b, a, b, b);
    simdgroup_store(b, y + 128);
}}"""
    x = torch.randint(-4, 5, (2, 8, 8), generator=torch.Generator().manual_seed(6)).float()
    out = msl(source, "k", {"x": x, "y": torch.zeros(3, 8, 8)}, threads=lanes, threads_per_threadgroup=lanes)["y"]
    a, b = x
    assert torch.equal(out, torch.stack([a @ b @ a, a @ a, a @ b + b]))


@pytest.mark.parametrize("msl_type", ["half", "bfloat", "float"])
def test_tiled_product(msl: Run, msl_type: str) -> None:
    """A 64 x 64 x 48 product by four simdgroups, each with a 4 x 4 block of matrices, operands in threadgroup memory."""
    source = f"""{HEAD}
typedef {msl_type} T;
struct Tile {{
    simdgroup_matrix<float, 8, 8> acc[4][4];
    void clear() {{
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 4; ++j) acc[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }}
    void step(const threadgroup T* xs, const threadgroup T* ws) {{
        simdgroup_matrix<T, 8, 8> a[4], b;
        for (int i = 0; i < 4; ++i) simdgroup_load(a[i], xs + i * 8 * 16, 16);
        for (int j = 0; j < 4; ++j) {{
            simdgroup_load(b, ws + j * 8 * 16, 16, ulong2(0, 0), true);
            for (int i = 0; i < 4; ++i) simdgroup_multiply_accumulate(acc[i][j], a[i], b, acc[i][j]);
        }}
    }}
}};
kernel void k(device const T* x [[buffer(0)]], device const T* w [[buffer(1)]], device float* y [[buffer(2)]],
              uint tid [[thread_index_in_threadgroup]], uint sgid [[simdgroup_index_in_threadgroup]]) {{
    threadgroup T xs[64 * 16], ws[64 * 16];
    const uint row = sgid / 2 * 32, col = sgid % 2 * 32;
    Tile tile;
    tile.clear();
    for (uint k0 = 0; k0 < 48; k0 += 16) {{
        for (uint i = tid; i < 64 * 16; i += 128) {{
            xs[i] = x[i / 16 * 48 + k0 + i % 16];
            ws[i] = w[i / 16 * 48 + k0 + i % 16];
        }}
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint k = 0; k < 16; k += 8) tile.step(xs + row * 16 + k, ws + col * 16 + k);
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }}
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) simdgroup_store(tile.acc[i][j], y, 64, ulong2(col + j * 8, row + i * 8));
}}"""
    x, w = matrix(7, msl_type, 64, 48), matrix(8, msl_type, 64, 48)
    args = {"x": x, "w": w, "y": torch.zeros(64, 64)}
    out = msl(source, "k", args, threadgroups=1, threads_per_threadgroup=128)["y"].double()
    want, scale = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T
    assert ((out - want).abs() <= 2**-19 * scale).all()


@pytest.mark.slow
def test_many_threadgroups(msl: Run) -> None:
    """Chains of products in many threadgroups at once do not disturb each other."""
    source = f"""{HEAD}
kernel void k(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
              uint group [[threadgroup_position_in_grid]], uint sgid [[simdgroup_index_in_threadgroup]]) {{
    simdgroup_float8x8 a, p(1);
    simdgroup_load(a, x + (group * 3 + sgid) * 64);
    for (uint i = 0; i < 1 + group % 4; ++i) p = p * a;
    simdgroup_store(p, y + (group * 3 + sgid) * 64);
}}"""
    x = torch.randint(-1, 2, (200, 3, 8, 8), generator=torch.Generator().manual_seed(9)).float()
    out = msl(source, "k", {"x": x, "y": torch.zeros_like(x)}, threadgroups=200, threads_per_threadgroup=96)["y"]
    for group in range(200):
        assert torch.equal(out[group], torch.linalg.matrix_power(x[group].double(), 1 + group % 4).float())
