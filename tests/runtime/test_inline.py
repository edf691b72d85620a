"""metal_kernel: a body of MSL as a Python function."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from metal_marlin import metal_kernel
from metal_marlin.errors import ArgumentError, MetalCompileError
from metal_marlin.msl.clang import Compiler


def test_a_body_becomes_a_function(device: str) -> None:
    body = "uint i = thread_position_in_grid.x; y[i] = a * x[i];"
    scale = metal_kernel("scale", body, ["x", "a"], ["y"])
    x = torch.randn(1000, device=device)
    (y,) = scale(x, 2.5, grid=x.numel(), threadgroup=256, output_shapes=[x.shape], output_dtypes=[x.dtype])
    assert y.device == x.device
    assert torch.equal(y, 2.5 * x)


TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_dtype(device: str, dtype: torch.dtype) -> None:
    body = "uint i = thread_position_in_grid.x; sum[i] = x[i] + x[i]; first[i] = x[0];"
    double = metal_kernel("double_it", body, ["x"], ["sum", "first"])
    x = torch.arange(-20, 20, device=device).to(dtype)
    got = double(x, grid=40, threadgroup=32, output_shapes=[(40,), (5, 8)], output_dtypes=[dtype, dtype])
    assert torch.equal(got[0], x + x)
    assert got[1].shape == (5, 8)
    assert torch.equal(got[1], x[0].expand(5, 8))


def test_one_kernel_takes_several_dtypes(device: str) -> None:
    negate = metal_kernel("negate", "uint i = thread_position_in_grid.x; y[i] = -x[i];", ["x"], ["y"])
    for dtype in (torch.float32, torch.float16, torch.float32, torch.int32):
        x = torch.arange(8, device=device).to(dtype)
        (y,) = negate(x, grid=8, threadgroup=8, output_shapes=[(8,)], output_dtypes=[dtype])
        assert torch.equal(y, -x)
    assert len(negate._libraries) == 3


def test_shapes_strides_and_positions_are_there_by_name(device: str) -> None:
    body = """
    uint2 at = thread_position_in_grid.xy;
    uint i = at.y * threads_per_grid.x + at.x;
    y[i] = x[at.x * x_strides[0] + at.y * x_strides[1]];
    if (i == 0) { facts[0] = x_shape[0]; facts[1] = x_shape[1]; facts[2] = x_ndim; facts[3] = threads_per_simdgroup; }
    """
    transpose = metal_kernel("transposed", body, ["x"], ["y", "facts"])
    x = torch.randn(6, 10, device=device)
    y, facts = transpose(
        x, grid=(6, 10), threadgroup=(4, 4), output_shapes=[(10, 6), (4,)], output_dtypes=[x.dtype, torch.int32]
    )
    assert torch.equal(y, x.T)
    assert facts.tolist() == [6, 10, 2, 32]


def test_inputs_need_not_be_contiguous(device: str) -> None:
    copy = metal_kernel("copy", "uint i = thread_position_in_grid.x; y[i] = x[i];", ["x"], ["y"])
    x = torch.randn(4, 6, device=device).T
    (y,) = copy(x, grid=24, threadgroup=24, output_shapes=[x.shape], output_dtypes=[x.dtype])
    assert torch.equal(y, x)


def test_numbers_templates_and_headers(device: str) -> None:
    header = "template <typename T> T twice(T v) { return v + v; }"
    body = "uint i = thread_position_in_grid.x; y[i] = T(flag ? twice(x[i]) * N + n : 0) + (EXTRA ? 1 : 0);"
    kernel = metal_kernel("mixed", body, ["x", "n", "flag"], ["y"], header)
    x = torch.arange(8, dtype=torch.float32, device=device)
    options: dict[str, Any] = {"grid": 8, "threadgroup": 8, "output_shapes": [(8,)], "output_dtypes": [torch.float16]}
    (y,) = kernel(x, -3, True, template={"T": torch.float16, "N": 5, "EXTRA": False}, **options)
    assert torch.equal(y, (2 * x * 5 - 3).half())
    (y,) = kernel(x, -3, False, template={"T": torch.float16, "N": 5, "EXTRA": True}, **options)
    assert y.tolist() == [1] * 8


def test_template_numbers_keep_their_value(device: str) -> None:
    body = "y[0] = F; y[1] = float(N >> 30); y[2] = float(sizeof(N)); y[3] = float(sizeof(M)); y[4] = M; y[5] = I;"
    kernel = metal_kernel("numbers", body, [], ["y"])
    template = {"F": 0.1, "N": -(2**40), "M": -7, "I": float("-inf")}
    options: dict[str, Any] = {"grid": 1, "threadgroup": 1, "output_shapes": [(6,)], "output_dtypes": [torch.float32]}
    (y,) = kernel(template=template, device=device, **options)
    assert torch.equal(y.cpu(), torch.tensor([0.1, -1024, 8, 4, -7, float("-inf")]))
    for wrong in (2**63, 1e39, "int", None, (1, 2)):
        with pytest.raises(ArgumentError, match="template N: takes a dtype, bool, 64-bit int or 32-bit float, not"):
            kernel(template={**template, "N": wrong}, device=device, **options)
    with pytest.raises(ArgumentError, match=r"device: .*abacus"):
        kernel(template=template, device="abacus", **options)


def test_what_outputs_hold_before(device: str) -> None:
    body = "uint i = thread_position_in_grid.x; if (i % 2) y[i] = 1;"
    odd = metal_kernel("odd", body, [], ["y"])
    options: dict[str, Any] = {"output_shapes": [(6,)], "output_dtypes": [torch.float32], "device": device}
    assert odd(grid=6, threadgroup=6, init_value=7, **options)[0].tolist() == [7, 1, 7, 1, 7, 1]
    assert odd(grid=0, threadgroup=6, init_value=0, **options)[0].tolist() == [0] * 6


def test_collectives_and_threadgroup_memory(device: str) -> None:
    body = """
    threadgroup float parts[4];
    float sum = simd_sum(x[thread_position_in_grid.x]);
    if (thread_index_in_simdgroup == 0) parts[simdgroup_index_in_threadgroup] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (thread_index_in_threadgroup == 0) y[threadgroup_position_in_grid.x] = parts[0] + parts[1] + parts[2] + parts[3];
    """
    total = metal_kernel("total", body, ["x"], ["y"])
    x = torch.arange(384, dtype=torch.float32, device=device)
    (y,) = total(x, grid=384, threadgroup=128, output_shapes=[(3,)], output_dtypes=[torch.float32])
    assert y.tolist() == x.view(3, 128).sum(1).tolist()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((), {}, r"k takes 1 inputs \(x\), got 0"),
        ((torch.zeros(4), 1), {}, "got 2"),
        (("x",), {}, "x: takes a tensor, bool, int or float, not str"),
        ((torch.zeros(4, dtype=torch.float64),), {}, r"x: Metal has no type for torch\.float64"),
        ((torch.zeros(4),), {"output_dtypes": [torch.complex64]}, r"y: Metal has no type for torch\.complex64"),
        ((torch.zeros(4),), {"output_shapes": []}, "k has 1 outputs; got 0 shapes and 1 dtypes"),
        ((torch.zeros(4),), {"threadgroup": 2048}, "2048"),
    ],
)
def test_wrong_calls(arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    kernel = metal_kernel("k", "y[0] = x[0];", ["x"], ["y"])
    known = {"grid": 1, "threadgroup": 1, "output_shapes": [(1,)], "output_dtypes": [torch.float32]}
    with pytest.raises(ArgumentError, match=message):
        kernel(*arguments, **{**known, **options})


def test_wrong_names_and_bodies(compiler: Compiler) -> None:
    with pytest.raises(ArgumentError, match="'two words' is not an identifier"):
        metal_kernel("two words", "", [], [])
    broken = metal_kernel("broken", "y[0] = nothing;", [], ["y"])
    with pytest.raises(MetalCompileError, match=r"kernel 'broken' does not compile.*nothing"):
        broken(grid=1, threadgroup=1, output_shapes=[(1,)], output_dtypes=[torch.float32])
