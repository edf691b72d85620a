"""dequantize and its rows: every row against the definition of its format, codes one by one, bad input."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from metal_marlin import MetalKernelLibrary, dispatch_kernel
from metal_marlin.errors import ArgumentError
from metal_marlin.ops.dequantize import CASES, OP, Case, all_codes, dequantize, plan, variants

ROOT = Path(__file__).parent.parent.parent
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.cuda)]
SMALL = [case for case in CASES if not case.model]
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
SMALLEST = {torch.float16: 2.0**-25, torch.bfloat16: 2.0**-126, torch.float32: 2.0**-126}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E4M3 = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double().tolist()
E5M2 = torch.arange(256).to(torch.uint8).view(torch.float8_e5m2).double().tolist()
SIGNED = [float(i - 256 * (i > 127)) for i in range(256)]
VALUES = {
    **dict.fromkeys(("fp4", "mxfp4", "nvfp4"), E2M1),
    "int4": [float(i) for i in range(16)],
    "int8": SIGNED,
    "uint8": [float(i) for i in range(256)],
    "fp8_e4m3": E4M3,
    "fp8_e5m2": E5M2,
    "int2": [q - 1.5 for q in range(4)],
    "int3": [q - 3.5 for q in range(8)],
    "nf3": torch.tensor([-1, -0.5350227, -0.2469314, 0, 0.1833375, 0.3819940, 0.6229857, 1]).tolist(),
}
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def parts(words: torch.Tensor, bits: int) -> torch.Tensor:
    unsigned = words.long() & 0xFFFFFFFF
    single = (unsigned.unsqueeze(-1) >> torch.arange(32) & 1).flatten(-2)
    return (single.unflatten(-1, (-1, bits)) << torch.arange(bits)).sum(-1)


def weights(case: Case, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] in float64 by the definition of the format; the largest term that it is a sum of."""
    codes, scales, extra = (None if t is None else t.cpu() for t in tensors)
    assert codes is not None
    assert scales is not None
    values = torch.tensor(VALUES[case.format], dtype=torch.float64)
    bits = len(values).bit_length() - 1
    column = torch.arange(case.K) // case.group
    scale = scales.double()
    if case.format == "mxfp4":
        scale = torch.exp2(scale - 127)
    elif case.format == "nvfp4":
        assert extra is not None
        scale = torch.tensor(E4M3, dtype=torch.float64)[scales.long()] * extra.double()
    zero = torch.full_like(scale, 8 if (case.format, case.zeros) == ("int4", "none") else 0)
    bias = torch.zeros_like(scale)
    if case.zeros != "none":
        assert extra is not None
        if case.zeros == "bias":
            bias = extra.double()
        else:
            zero = extra.double() if case.zeros == "point" else parts(extra, bits)[:, : scale.shape[1]].double()
    product = scale[:, column] * (values[parts(codes, bits)] - zero[:, column])
    return product + bias[:, column], torch.maximum(product.abs(), bias.abs()[:, column])


def run(case: Case, tensors: Tensors, **options: object) -> torch.Tensor:
    codes, scales, extra = tensors
    options = {"dtype": case.dtype, "kernel": case.kernel, **options}
    more = {"format": case.format, "zeros": case.zeros, "extra": extra, **options}
    return dequantize(codes, scales, case.group, **more)  # type: ignore[arg-type]


def check(y: torch.Tensor, case: Case, tensors: Tensors) -> None:
    """Rounded once: equal where a float holds the weight exactly, else within two roundings of its terms to float."""
    exact, largest = weights(case, tensors)
    assert y.dtype == case.dtype
    if case.zeros in ("none", "packed") and case.format != "nvfp4" and case.scales_in != torch.float32:
        assert torch.equal(y.cpu(), exact.to(case.dtype))
    near = ROUNDING[case.dtype] * exact.abs() + 3 * 2.0**-24 * largest + SMALLEST[case.dtype]
    assert ((y.cpu().double() - exact).abs() <= near).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_matches_the_definition(case: Case, device: str) -> None:
    tensors = case.tensors(device)
    check(run(case, tensors), case, tensors)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("kernel", "values"),
    [
        ("test_fp4_all_codes", E2M1),
        ("test_u4_all_codes", VALUES["int4"]),
        ("test_fp8_e4m3_all_codes", E4M3),
        ("test_fp8_e5m2_all_codes", E5M2),
        ("test_int8_all_values", SIGNED),
        *((f"test_{name}_all_codes", VALUES[name]) for name in ("int2", "int3", "nf3")),
    ],
)
def test_every_code(kernel: str, values: list[float], device: str) -> None:
    got, want = all_codes(kernel, device).cpu(), torch.tensor(values)
    number = ~want.isnan()
    assert torch.equal(got.isnan(), ~number)
    assert torch.equal(got[number].view(torch.int32), want[number].view(torch.int32))  # -0 too


def words_of_four_bits(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Words, and the E2M1 numbers in them."""
    words = torch.randint(-(2**31), 2**31, (count,), generator=torch.Generator().manual_seed(2)).to(torch.int32)
    return words, torch.tensor(E2M1, dtype=torch.float64)[parts(words, 4)].view(count, 8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", ["test_fp4_vectorized", "test_fp4_packed_scaled", "test_fp4_tile_row"])
def test_words(kernel: str, device: str) -> None:
    words, want = words_of_four_bits(64)
    scales = torch.linspace(0.01, 3, 64).half()
    y = torch.full((64, 8), math.nan, dtype=torch.float16, device=device)
    scaled = kernel == "test_fp4_packed_scaled"
    args = [words.to(device), *([scales.to(device)] if scaled else []), y]
    library = MetalKernelLibrary("dequant.metal", device=device, lanes=32)
    dispatch_kernel(library, kernel, threads=64, threads_per_threadgroup=8, args=args) if kernel.endswith(
        ("vectorized", "scaled")
    ) else dispatch_kernel(library, kernel, threadgroups=8, threads_per_threadgroup=8, args=args)
    assert torch.equal(y.cpu(), (want * scales.double().unsqueeze(1) if scaled else want).half())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "bits"), [("int2", 2), ("int3", 3), ("nf3", 3)])
def test_words_of_fewer_bits(name: str, bits: int, device: str) -> None:
    rng = torch.Generator().manual_seed(2)
    words = torch.randint(-(2**31), 2**31, (8 * bits,), generator=rng).to(torch.int32)
    want = torch.tensor(VALUES[name], dtype=torch.float64)[parts(words, bits)].view(32, 8)
    scales = torch.linspace(0.01, 3, 32).half()
    y = torch.full((32, 8), math.nan, dtype=torch.float16, device=device)
    library = MetalKernelLibrary("dequant_sub4bit.metal", device=device, lanes=32)
    args = (words.to(device), scales.to(device), y)
    dispatch_kernel(library, f"test_{name}_packed_scaled", threads=32, threads_per_threadgroup=8, args=args)
    assert torch.equal(y.cpu(), (want * scales.double().unsqueeze(1)).float().half())


@pytest.mark.parametrize("device", DEVICES)
def test_bytes_with_scale_and_zero(device: str) -> None:
    library = MetalKernelLibrary("dequant_int8.metal", device=device, lanes=32)
    for kernel, numbers, want in (
        ("test_int8_symmetric", [0.375], 0.375 * torch.tensor(SIGNED)),
        ("test_int8_asymmetric", [0.375, 131.0], 0.375 * (torch.arange(256.0) - 131)),
    ):
        y = torch.full((256,), math.nan, device=device)
        given = torch.tensor(numbers, device=device)
        dispatch_kernel(library, kernel, threads=256, threads_per_threadgroup=64, args=(given, y))
        assert torch.equal(y.cpu(), want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", variants("fp4"))
def test_writes_its_output_only(kernel: str, device: str) -> None:
    case = Case(7, 320, 16, kernel=kernel)
    tensors = case.tensors(device)
    guarded = torch.full((7 * 320 + 256,), math.nan, dtype=torch.float16, device=device)
    out = guarded[128:-128].view(7, 320)
    assert run(case, tensors, out=out) is out
    check(out, case, tensors)
    assert guarded[:128].isnan().all()
    assert guarded[-128:].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_larger_than_caches_and_odd_addresses(dtype: torch.dtype, device: str) -> None:
    case = Case(1100, 4096, 128, dtype, torch.float16)  # streams past the caches on the cpu
    tensors = case.tensors(device)
    check(run(case, tensors), case, tensors)
    room = torch.zeros(1100 * 4096 + 1, dtype=dtype, device=device)
    check(run(case, tensors, out=room[1:].view(1100, 4096)), case, tensors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "dequant_int4_kernel"}, "kernel is 'dequant_int4_kernel'; fp4 has dequant_fp4_bulk,"),
        ({"dtype": torch.float64}, "dtype is torch.float64"),
        ({"format": "fp5"}, "format = 'fp5'"),
        ({"zeros": "point"}, "zeros = 'point'; fp4 takes 'none'"),
        ({"extra": torch.ones(1)}, "extra: fp4"),
        ({"out": torch.empty(3, 8)}, r"out has shape \(3, 8\); needs \(3, 136\)"),
    ],
)
def test_bad_input(options: dict[str, object], message: str) -> None:
    case = Case(3, 136, 16)
    with pytest.raises(ArgumentError, match=message):
        run(case, case.tensors(), **options)


def test_too_many_words() -> None:
    with pytest.raises(ArgumentError, match="at most 2147483647"):
        plan(1 << 20, 1 << 15, torch.float16, torch.float16, "cuda")


@pytest.mark.parametrize("device", DEVICES)
def test_is_an_op_to_torch(device: str) -> None:
    codes, scales, _ = Case(6, 128).tensors(device)
    checks = ("test_schema", "test_faketensor")
    arguments = (codes, scales, None, "fp4", "none", 128, torch.bfloat16, None)
    torch.library.opcheck(torch.ops.metal_marlin.dequantize.default, arguments, test_utils=checks)
    assert dequantize(codes[:0], scales[:0], 128).shape == (0, 128)


def test_spec_names_what_exists() -> None:
    assert all(spec.bench is None or (ROOT / spec.bench).exists() for spec in OP)
    assert len({str(case) for case in CASES}) == len(CASES)
