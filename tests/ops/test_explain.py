"""What `metal-marlin kernels --plan` says a product launches is what it launches."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from metal_marlin.cli.commands import app
from metal_marlin.errors import ArgumentError
from metal_marlin.ops import linear_sparse, packed, packed_sparse
from metal_marlin.ops.explain import explain
from metal_marlin.ops.linear import linear
from metal_marlin.ops.marlin_gemm import Case
from metal_marlin.runtime.counters import counters, reset_counters

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.cuda)]
NAMES = {"half": torch.float16, "f32": torch.float32}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize(
    ("name", "zeros", "group"), [("fp4", "none", 64), ("int4", "packed", 32), ("nvfp4", "none", 16)]
)
@pytest.mark.parametrize("M", [1, 8, 9, 40])
def test_is_what_runs(M: int, name: str, zeros: str, group: int, dtype: str, device: str) -> None:
    x, codes, scales, extra = Case(M, 48, 256, group, NAMES[dtype], None, name, zeros).tensors(device)
    steps = explain(M, 48, 256, device="cpu" if device == "cpu" else "", format=name, zeros=zeros, dtype=dtype)
    reset_counters()
    linear(x, codes, scales, group, format=name, zeros=zeros, extra=extra)
    assert [s.kernel for s in steps if s.threads] == list(counters())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["half", "bf16"])
@pytest.mark.parametrize(
    ("name", "zeros", "group"),
    [("fp4", "none", 64), ("int4", "packed", 32), ("nvfp4", "none", 16), ("int8", "none", 64)],
)
@pytest.mark.parametrize("M", [1, 9, 40])
def test_of_operand_order_is_what_runs(M: int, name: str, zeros: str, group: int, dtype: str, device: str) -> None:
    number = {"half": torch.float16, "bf16": torch.bfloat16}[dtype]
    x, w = packed.packed(Case(M, 48, 256, group, number, None, name, zeros), device)
    where = "cpu" if device == "cpu" else ""
    (step,) = explain(M, 48, 256, device=where, format=name, zeros=zeros, dtype=dtype, layout="mma16")
    reset_counters()
    packed.linear_packed(x, w.codes, w.scales, w.powers, group, format=name, zeros=w.kernel_zeros, extra=w.extra)
    assert [step.kernel] == list(counters())
    assert step.op == "linear_packed"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["canonical", "mma16"])
@pytest.mark.parametrize("name", ["fp4", "int4", "mxfp4"])
@pytest.mark.parametrize("M", [1, 9, 40])
def test_of_sparse_weights_is_what_runs(M: int, name: str, layout: str, device: str) -> None:
    case = linear_sparse.Case(M, 48, 256, 32, format=name)
    where = "cpu" if device == "cpu" else ""
    (step,) = explain(M, 48, 256, device=where, format=name, layout=layout, sparse=True)
    reset_counters()
    if layout == "canonical":
        x, *w, _ = case.tensors(device)
        linear_sparse.linear_sparse(x, *w, 32, format=name)
    else:
        x, *w = packed_sparse.packed(case, device)
        packed_sparse.linear_packed_sparse(x, *w, 32, format=name)
    assert [step.kernel] == list(counters())
    assert step.op == {"canonical": "linear_sparse", "mma16": "linear_packed_sparse"}[layout]


def test_both_layouts_where_layers_may_hold_both() -> None:
    def of(N: int, K: int, device: str, **options: Any) -> list[str]:
        return [step.op for step in explain(100, N, K, device=device, layout="", **options)]

    assert of(4096, 4096, "cuda:sm_90a") == ["marlin_gemm", "linear_packed"]
    assert of(4096, 4096, "cuda:sm_90a", dtype="f32") == ["marlin_gemm"]
    assert of(4100, 4096, "cuda:sm_90a") == of(4096, 4128, "cuda:sm_90a") == ["marlin_gemm"]
    assert of(4096, 4096, "cuda:sm_80") == ["dequantize", "torch.mm"]
    assert of(4096, 4096, "cpu") == ["marlin_gemm"]
    assert of(4096, 4096, "cuda:sm_90a", sparse=True) == ["linear_sparse", "linear_packed_sparse"]
    assert of(4096, 4096, "cuda:sm_90a", sparse=True, format="nvfp4") == ["linear_sparse"]
    assert of(4096, 4096, "cuda:sm_90a", sparse=True, format="int4", zeros="packed") == ["linear_sparse"]
    assert of(4096, 4096, "cpu", sparse=True) == ["linear_sparse"]


def test_of_other_devices() -> None:
    def of(M: int, N: int, K: int, device: str, **options: str) -> list[str]:
        return [step.kernel for step in explain(M, N, K, device=device, **options)]

    assert of(1, 4096, 4096, "cuda:sm_90a") == ["decode_gemv_fp4"]
    assert of(16, 14336, 4096, "cuda:sm_80") == ["marlin_gemm_fp4__m112x16"]
    assert of(500, 4096, 4096, "cuda:sm_90a", dtype="bf16") == ["marlin_gemm_fp4__tbf16_m64x256"]
    assert of(500, 4096, 4096, "cuda:sm_80") == ["dequant_fp4_bulk", "the library's"]
    assert of(500, 4096, 4096, "metal", format="uint8") == ["marlin_gemm_uint8__zpacked"]


@pytest.mark.parametrize(
    ("sizes", "options", "said"),
    [
        ((0, 8, 8), {}, "M, N, K are 0, 8, 8"),
        ((1, 8, 12), {}, "K = 12 is no multiple of 8"),
        ((1, 8, 8), {"dtype": "int"}, "dtype is 'int'"),
        ((1, 8, 8), {"format": "fp5"}, "fp5"),
        ((1, 8, 8), {"layout": "rows"}, "layout is 'rows'"),
        ((1, 24, 64), {"layout": "mma16"}, r"W is \[24, 64\]"),
        ((1, 16, 64), {"layout": "mma16", "dtype": "f32"}, r"x is torch\.float32"),
        ((1, 8, 24), {"sparse": True}, "K = 24 is no multiple of 16"),
        ((1, 16, 64), {"sparse": True, "format": "int8"}, "format 'int8', pattern 2:4"),
        ((1, 16, 64), {"sparse": True, "format": "nvfp4", "layout": "mma16"}, "fp4, mxfp4, int4"),
    ],
)
def test_bad_input(sizes: tuple[int, int, int], options: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        explain(*sizes, device="cpu", **options)


def test_command() -> None:
    def call(*words: str) -> str:
        result = CliRunner().invoke(app, ["kernels", "--plan", *words])
        assert result.exit_code == 0, result.output
        return result.output

    found = json.loads(call("64", "4096", "4096", "--device", "cuda:sm_90a", "--format", "int4:point", "--json"))
    assert [(s["op"], s["kernel"], s["threadgroups"], s["threads"]) for s in found] == [
        ("marlin_gemm", "marlin_gemm_int4__zpoint_m64x64x2", [64, 1, 2], 256),
        ("linear_packed", "packed_gemm_int4__zpoint_m64x64x2", [64, 1, 2], 288),
    ]
    assert call("8", "64", "64", "--device", "cuda:sm_90a", "--layout", "canonical").count("\n") == 1
    assert call("8", "64", "64", "--device", "cpu", "--layout", "mma16").startswith("linear_packed\tpacked_gemm_fp4__m")
    said = call("512", "4096", "4096", "--device", "cuda:sm_90a", "--sparse").splitlines()
    assert [line.split("\t")[0] for line in said] == ["linear_sparse", "linear_packed_sparse"]
    assert call("1", "64", "64", "--device", "cpu").startswith("linear_decode\tdecode_gemv_fp4\t")
