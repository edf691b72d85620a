"""linear_decode and its rows: every row, tails and group sizes against float64, bad input, what torch asks of an op."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from metal_marlin import MetalKernelLibrary, dispatch_kernel
from metal_marlin.errors import ArgumentError
from metal_marlin.msl.target import Target
from metal_marlin.ops.linear_decode import CASES, FAMILY, OP, Case, linear_decode, linear_decode_ref, plan
from metal_marlin.runtime import device_cpu

ROOT = Path(__file__).parent.parent.parent
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.cuda)]
SMALL = [case for case in CASES if not case.model]
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
DTYPES = list(ROUNDING)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
ZEROS = {"int4": ("none", "point", "packed", "bias"), "uint8": ("point", "packed", "bias")}
FORMATS = [
    (f, z)
    for f in ("fp4", "mxfp4", "nvfp4", "int4", "int8", "uint8", "fp8_e4m3", "fp8_e5m2", "int2", "int3", "nf3")
    for z in ZEROS.get(f, ("none",))
]


def small_float(byte: int, mantissa: int, nan: set[int], inf: set[int]) -> float:
    """A byte of FP8: sign, exponent, so many bits of mantissa; the bias is half the exponents."""
    sign, low = (-1.0 if byte & 128 else 1.0), byte & 127
    if low in nan or low in inf:
        return math.nan if low in nan else sign * math.inf
    bias = 2 ** (6 - mantissa) - 1
    exponent, fraction = low >> mantissa, (low & (2**mantissa - 1)) / 2**mantissa
    return sign * (fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias))


E4M3 = [small_float(i, 3, {0x7F}, set()) for i in range(256)]
E5M2 = [small_float(i, 2, {0x7D, 0x7E, 0x7F}, {0x7C}) for i in range(256)]
VALUES = {
    **dict.fromkeys(("fp4", "mxfp4", "nvfp4"), E2M1),
    "int4": range(16),
    "int8": [i - 256 * (i > 127) for i in range(256)],
    "uint8": range(256),
    "fp8_e4m3": E4M3,
    "fp8_e5m2": E5M2,
    "int2": [q - 1.5 for q in range(4)],
    "int3": [q - 3.5 for q in range(8)],
    "nf3": torch.tensor([-1, -0.5350227, -0.2469314, 0, 0.1833375, 0.3819940, 0.6229857, 1]).tolist(),
}
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]


def parts(words: torch.Tensor, bits: int) -> torch.Tensor:
    """What words hold, the lowest bits first, with bits taken apart here and not by the codec."""
    unsigned = words.cpu().long() & 0xFFFFFFFF
    single = (unsigned.unsqueeze(-1) >> torch.arange(32) & 1).flatten(-2)
    return (single.unflatten(-1, (-1, bits)) << torch.arange(bits)).sum(-1)


def packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The reverse of parts."""
    single = (codes.unsqueeze(-1) >> torch.arange(bits) & 1).flatten(-2)
    words = (single.unflatten(-1, (-1, 32)) << torch.arange(32)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def weights(case: Case, tensors: Tensors, *, largest: bool = False) -> torch.Tensor:
    """[N, K] in float64 by the definition of the format; or the magnitudes that its parts may have on the way."""
    _, codes, scales, extra = (None if t is None else t.cpu() for t in tensors)
    assert codes is not None
    assert scales is not None
    values = torch.tensor(list(VALUES[case.format]), dtype=torch.float64)
    bits = len(values).bit_length() - 1
    column = torch.arange(case.K) // case.group
    if case.format == "mxfp4":
        scale = torch.tensor([2.0 ** (e - 127) for e in range(255)] + [math.nan], dtype=torch.float64)[scales.long()]
    elif case.format == "nvfp4":
        scale = torch.tensor(E4M3, dtype=torch.float64)[scales.long()] * extra.double()  # type: ignore[union-attr]
    else:
        scale = scales.double()
    zero = torch.full_like(scale, 8 if (case.format, case.zeros) == ("int4", "none") else 0)
    bias = torch.zeros_like(scale)
    if case.zeros != "none":
        assert extra is not None
        if case.zeros == "bias":
            bias = extra.double()
        else:
            zero = extra.double() if case.zeros == "point" else parts(extra, bits)[:, : scale.shape[1]].double()
    W = values[parts(codes, bits)]
    if largest:
        scale, W, zero, bias = scale.abs(), W.abs(), -zero.abs(), bias.abs()
    return scale[:, column] * (W - zero[:, column]) + bias[:, column]


def multiply(case: Case, tensors: Tensors, **options: object) -> torch.Tensor:
    x, codes, scales, extra = tensors
    return linear_decode(
        x,
        codes,
        scales,
        case.group,
        format=case.format,
        zeros=case.zeros,
        extra=extra,
        **options,  # type: ignore[arg-type]
    )


def check(y: torch.Tensor, case: Case, tensors: Tensors) -> None:
    """Against the same product of dequantised weights in torch, in the activations' dtype."""
    x = tensors[0]
    W = weights(case, tensors)
    exact = x.cpu().double() @ W.T
    composed = x @ W.to(x.dtype).to(x.device).T
    unit, size = ROUNDING[case.dtype], exact
    if case.dtype == torch.float32:
        # torch's sums of short rows can be right to the last bit, and zeros are taken off the sums here: a rounding of
        # the largest partial sums is granted
        size = x.cpu().double().abs() @ weights(case, tensors, largest=True).T
    ours, theirs = ((t.cpu().double() - exact).norm(dim=-1) for t in (y, composed))
    assert y.dtype == x.dtype
    assert (ours <= 2 * theirs + unit * size.norm(dim=-1)).all(), (ours, theirs, size)
    worst = (composed.cpu().double() - exact).abs().max()
    assert (y.cpu().double() - exact).abs().max() <= 8 * worst + unit * size.abs().max()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_matches_the_reference(case: Case, device: str) -> None:
    tensors = case.tensors(device)
    check(multiply(case, tensors), case, tensors)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [c for c in CASES if c.model == "large"][:1], ids=str)
def test_model_shape(case: Case, device: str) -> None:
    tensors = case.tensors(device)
    check(multiply(case, tensors), case, tensors)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", ["decode_gemv_fp4", "decode_gemv_fp4_batched"])
@pytest.mark.parametrize("scale", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [16, 128])
def test_every_pair_of_dtypes(dtype: torch.dtype, scale: torch.dtype, kernel: str, group: int, device: str) -> None:
    case = Case(3, 21, 544, group, dtype, scale)
    tensors = case.tensors(device)
    check(multiply(case, tensors, kernel=kernel), case, tensors)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant", ["simd", "wide", "tiled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K", "group"), [(21, 544, 16), (5, 24, 128), (3, 9224, 64), (17, 8192, 128)])
def test_variants(N: int, K: int, group: int, dtype: torch.dtype, variant: str, device: str) -> None:
    case = Case(2, N, K, group, dtype)
    tensors = case.tensors(device)
    check(multiply(case, tensors, kernel=f"decode_gemv_fp4_{variant}"), case, tensors)


def dispatch(library: MetalKernelLibrary, case: Case, tensors: Tensors, kind: str) -> torch.Tensor:
    """The plan of a device kind, on a library of the test's own."""
    x, codes, scales, extra = tensors
    p = plan(case.M, case.N, case.K, x.dtype, scales.dtype, kind, 1, None, case.format, case.zeros)
    y = x.new_full((case.M, case.N), float("nan"))
    words = 4 if len(VALUES[case.format]) == 256 else 8
    shape = {"M": case.M, "N": case.N, "K": case.K, "group": case.group, "rows": p.rows}
    shape["aligned"] = case.K % (4 * words) == 0
    args = (x, codes, scales, scales if extra is None else extra, y, shape)
    dispatch_kernel(library, p.kernel, threadgroups=p.threadgroups, threads_per_threadgroup=p.threads, args=args)
    return y


NEW = [c for c in SMALL if c.format in ("int2", "int3", "nf3")]
FEW = [*SMALL[::31], *NEW[::4], Case(5, 70, 1000, 16), Case(1, 6, 608, 608, format="int4", zeros="packed")]


@pytest.mark.parametrize("case", FEW, ids=str)
def test_32_lanes_agree_with_one(case: Case) -> None:
    """The pipeline of Apple GPUs, run here by fibres."""
    tensors = case.tensors()
    one = multiply(case, tensors)
    y = dispatch(MetalKernelLibrary(FAMILY, device="cpu", lanes=32), case, tensors, "mps")
    check(y, case, tensors)
    near = 16 if case.dtype == torch.float32 else 2  # the order of the sums differs
    assert (y.double() - one.double()).norm() <= near * ROUNDING[case.dtype] * one.double().norm()


@pytest.mark.parametrize("variant", ["simd", "wide", "tiled"])
def test_variants_with_32_lanes(variant: str) -> None:
    case = Case(1, 19, 9224, 64)
    x, codes, scales, _ = tensors = case.tensors()
    p = plan(1, case.N, case.K, x.dtype, scales.dtype, "mps", kernel=f"decode_gemv_fp4_{variant}")
    y = x.new_full((1, case.N), float("nan"))
    shape = {"M": 1, "N": case.N, "K": case.K, "group": 64, "rows": p.rows, "aligned": 0}
    library = MetalKernelLibrary(FAMILY, device="cpu", lanes=32)
    args = (x, codes, scales, scales, y, shape)
    dispatch_kernel(library, p.kernel, threadgroups=p.threadgroups, threads_per_threadgroup=p.threads, args=args)
    check(y, case, tensors)


@pytest.mark.parametrize("level", ["cpu:x86-64-v3", "cpu:x86-64-v4"])
@pytest.mark.parametrize("case", FEW[1::3], ids=str)
def test_older_cpus(case: Case, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Table look-ups without AVX-512, products without its bfloat instruction."""
    host = Target.host_cpu().arch
    if "x86" not in host or host < level.partition(":")[2]:
        pytest.skip(f"this CPU is {host}")
    monkeypatch.setattr(device_cpu, "target", lambda index: Target.parse(level))
    library = MetalKernelLibrary(FAMILY, device="cpu", lanes=1)
    tensors = case.tensors()
    check(dispatch(library, case, tensors, "cpu"), case, tensors)


@pytest.mark.parametrize("target", ["cpu:aarch64", "cuda:sm_80", "cuda:sm_90a"])
def test_compiles_for_other_targets(target: str) -> None:
    library = MetalKernelLibrary(FAMILY, target=Target.parse(target))
    for name in library.kernels[:: 19 if target == "cuda:sm_80" else 37]:
        assert library.compile(name).binary


def test_two_tokens_on_a_cpu() -> None:
    for device, wanted in {"cpu": "decode_gemv_fp4", "cuda": "decode_gemv_fp4_batched"}.items():
        p = plan(2, 64, 128, torch.float16, torch.float16, device)
        assert (p.kernel, p.threadgroups[1]) == (wanted, 2 if device == "cpu" else 1)


def test_plans_name_every_row() -> None:
    names = set()
    for name, zeros in FORMATS:
        bytes_ = name in ("mxfp4", "nvfp4")
        for t in DTYPES:
            for s in [torch.uint8] if bytes_ else DTYPES:
                for M in (1, 3):
                    names.add(plan(M, 1, 32, t, s, "cpu", 1, None, name, zeros).kernel)
    for variant in ("simd", "wide", "tiled"):
        names |= {plan(1, 1, 8, t, t, "cpu", 1, f"decode_gemv_fp4_{variant}").kernel for t in DTYPES}
    assert names == set(MetalKernelLibrary(FAMILY, device="cpu").kernels)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group", [16, 64])
@pytest.mark.parametrize(("form", "zeros"), FORMATS)
def test_every_code_is_exact(form: str, zeros: str, group: int, device: str) -> None:
    """x picks one weight of each row: y is that weight, bit for bit (scales are powers of two), NaN where it is."""
    dtype = next(c.dtype for c in SMALL if (c.format, c.zeros) == (form, zeros) and c.M > 1)
    bits = len(VALUES[form]).bit_length() - 1
    K = 256 if bits == 8 else 64
    if form in ("mxfp4", "nvfp4"):
        group = 32 if form == "mxfp4" else 16
    case = Case(K, 2, K, group, dtype, format=form, zeros=zeros)
    per = 32 // bits
    each = torch.arange(2 * K).view(2, K) % 2**bits
    codes = packed(each, bits)
    groups = K // group
    scales, extra = torch.full((2, groups), 0.25).to(dtype), None
    if form == "mxfp4":
        scales = torch.full((2, groups), 125, dtype=torch.uint8)
    elif form == "nvfp4":
        scales, extra = torch.full((2, groups), 0x38, dtype=torch.uint8), torch.tensor([0.25])
    elif zeros == "packed":
        extra = torch.full((2, -(-groups // per)), 0x33333333, dtype=torch.int32)
    elif zeros != "none":
        extra = torch.full((2, groups), 3.0 if zeros == "point" else -0.75).to(dtype)
    x = torch.eye(K, dtype=dtype)
    W = weights(case, (x, codes, scales, extra))
    W = W.to(dtype).double() if form == "nf3" else W  # whose values are numbers of float alone
    assert len(set(W[0].nan_to_num(9e9).tolist())) >= 2**bits - 8 * (bits > 3)
    # the rows of weights that are not finite spoil sums of others: each is compared where it is picked
    keep = W.isfinite().all(1) | torch.tensor(form not in ("fp8_e4m3", "fp8_e5m2"))
    moved = [None if t is None else t.to(device) for t in (x, codes, scales, extra)]
    y = multiply(case, moved).cpu().double()  # type: ignore[arg-type]
    if keep.all():
        assert torch.equal(y + 0.0, W.T + 0.0)
    else:
        assert y.isnan().all()  # every row has a NaN, and 0 times NaN is NaN
        finite = W.isfinite()
        moved[1] = packed(torch.where(finite, each, 0), bits).to(device)
        y = multiply(case, moved).cpu().double()  # type: ignore[arg-type]
        assert torch.equal(y + 0.0, torch.where(finite, W, 0.0).T + 0.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("form", "code"), [("fp8_e4m3", 0x7F), ("fp8_e4m3", 0xFF), ("fp8_e5m2", 0x7E)])
@pytest.mark.parametrize("place", [0, 3, 66, 127, 130])
def test_codes_that_are_not_numbers(place: int, form: str, code: int, dtype: torch.dtype, device: str) -> None:
    case = Case(1, 3, 132, 64, dtype, format=form)
    x, codes, scales, _ = case.tensors()
    codes.view(torch.uint8)[1, place] = code
    y = multiply(case, (x.to(device), codes.to(device), scales.to(device), None)).cpu()
    assert y.isnan().tolist() == [[False, True, False]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [2.0**-120, 6e-8, 3e-5, 6e4, 2.0**100])
@pytest.mark.parametrize("group", [16, 64, 128])
def test_sizes_of_scales(group: int, size: float, dtype: torch.dtype, device: str) -> None:
    """Scales that half has not, as float; x brings the results back to where the activations' dtype is exact."""
    case = Case(1, 24, 640, group, dtype, torch.float32)
    x, codes, scales, _ = case.tensors()
    scales = torch.exp2(torch.log2(scales).round()) * size
    back = 2.0 ** round(math.log2(1 / size))
    if dtype == torch.float16:
        back = min(max(back, 2.0**-10), 2.0**10)
    x = (x.double() * back).to(dtype)
    W = weights(case, (x, codes, scales, None))
    exact = x.double() @ W.T
    y = multiply(case, (x.to(device), codes.to(device), scales.to(device), None)).cpu()
    limit = torch.finfo(dtype).max
    inside = exact.abs() < limit
    near = 4 * ROUNDING[dtype] * exact.norm() + torch.finfo(dtype).smallest_normal * ROUNDING[dtype] * 8
    assert ((y.double() - exact)[inside].abs() <= near).all()
    assert y[~inside].isinf().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("exponent", [0, 1, 7, 127, 200, 254])
def test_exponents_of_mxfp4(exponent: int, dtype: torch.dtype, device: str) -> None:
    """2^±127 beside a much smaller group: the large one is what counts, and comes out as it is."""
    case = Case(1, 5, 96, 32, dtype, format="mxfp4")
    x, codes, scales, _ = case.tensors()
    scales[:, 1], scales[:, ::2] = exponent, max(exponent - 30, 0)
    x = x * (2.0**-10 if exponent > 200 else 1)
    exact = x.double() @ weights(case, (x, codes, scales, None)).T
    y = multiply(case, (x.to(device), codes.to(device), scales.to(device), None)).cpu()
    near = 4 * ROUNDING[dtype] * exact.abs() + torch.finfo(dtype).smallest_normal  # bfloats may be flushed
    inside = exact.abs() < torch.finfo(dtype).max
    assert ((y.double() - exact).abs() <= near + 4 * ROUNDING[dtype] * exact.norm())[inside].all()
    assert not y[~inside].isfinite().any()
    scales[2, 1] = 255
    assert multiply(case, (x.to(device), codes.to(device), scales.to(device), None))[0, 2].isnan()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-4, 1.0, 2e4])
def test_sizes_of_activations(dtype: torch.dtype, size: float, device: str) -> None:
    """Decoded weights that are held as tiny numbers lose nothing, and long sums of large products do not overflow."""
    case = Case(1, 32, 2048, 128, dtype)
    x, codes, scales, _ = case.tensors(device)
    tensors = ((x.float() * size).clamp(-6e4, 6e4).to(dtype), codes, scales * (0.01 if size > 1 else 1), None)
    check(multiply(case, tensors), case, tensors)


@pytest.mark.parametrize("device", DEVICES)
def test_not_a_number_and_infinity_reach_their_token_only(device: str) -> None:
    x, codes, scales, _ = Case(4, 40, 256).tensors(device)
    x[1, 7], x[2, 250] = float("nan"), float("inf")
    y = linear_decode(x, codes, scales, 128)
    assert y[1].isnan().all()
    assert not y[2].isfinite().all()
    assert torch.equal(y[[0, 3]], linear_decode(x[[0, 3]], codes, scales, 128))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("M", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_writes_its_output_only(M: int, dtype: torch.dtype, device: str) -> None:
    case = Case(M, 77, 320, 64, dtype)
    tensors = case.tensors(device)
    guarded = torch.full((M * 77 + 256,), float("nan"), dtype=dtype, device=device)
    out = guarded[128 : 128 + M * 77].view(M, 77)
    assert multiply(case, tensors, out=out) is out
    check(out, case, tensors)
    assert guarded[:128].isnan().all()
    assert guarded[-128:].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", [1, 4])
def test_tensors_that_start_anywhere(offset: int, device: str) -> None:
    case = Case(2, 20, 256)
    x, codes, scales, _ = case.tensors(device)
    moved = []
    for t in (x, codes, scales):
        room = t.new_zeros(t.numel() + offset)
        room[offset:] = t.flatten()
        moved.append(room[offset:].view(t.shape))
    check(linear_decode(*moved, 128), case, (x, codes, scales, None))


@pytest.mark.parametrize("device", DEVICES)
def test_same_bits_again(device: str) -> None:
    tensors = Case(1, 300, 4096).tensors(device)[:3]
    first = linear_decode(*tensors, 128)
    assert all(torch.equal(first, linear_decode(*tensors, 128)) for _ in range(5))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 256), (2, 0, 256)])
def test_no_tokens(shape: tuple[int, ...], device: str) -> None:
    _, codes, scales, _ = Case(1, 20, 256).tensors(device)
    y = linear_decode(torch.empty(shape, dtype=torch.float16, device=device), codes, scales, 128)
    assert y.shape == (*shape[:-1], 20)


def test_no_rows() -> None:
    x, codes, scales, _ = Case(3, 4, 256).tensors()
    assert linear_decode(x, codes[:0], scales[:0], 128).shape == (3, 0)


def test_shapes_of_x() -> None:
    x, codes, scales, _ = Case(6, 10, 256).tensors()
    y = linear_decode(x, codes, scales, 128)
    assert torch.equal(linear_decode(x.view(2, 3, 256), codes, scales, 128), y.view(2, 3, 10))
    assert linear_decode(x[0], codes, scales, 128).shape == (10,)


def test_reference_is_the_product() -> None:
    case = Case(2, 9, 88, 16, torch.float32)
    x, codes, scales, _ = tensors = case.tensors()
    got = linear_decode_ref(x, codes, scales, 16)
    assert got.dtype == torch.float64
    assert torch.allclose(got, x.double() @ weights(case, tensors).T, rtol=1e-14)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, c, s: (x[:, :96].contiguous(), c, s, 128), "linear_decode: x has K = 96, codes have K = 128"),
        (lambda x, c, s: (x, c, s, 48), "group_size = 48; fp4 takes 16, 32, 64, 128, 256 or K = 128"),
        (
            lambda x, c, s: (x, c, s, 32),
            r"scales have shape \(10, 1\); N = 10, K = 128, group_size = 32 need \(10, 4\)",
        ),
        (lambda x, c, s: (x, c, s[:9], 128), r"scales have shape \(9, 1\); N = 10"),
        (lambda x, c, s: (x.double(), c, s, 128), "dtype is torch.float64"),
        (lambda x, c, s: (x, c, s.double(), 128), "scales is torch.float64"),
        (lambda x, c, s: (x, c.long(), s, 128), "codes: tensor is torch.int64"),
        (lambda x, c, s: (x.T.contiguous().T, c, s, 128), r"x: tensor of shape \(2, 128\) with strides"),
        (lambda x, c, s: (x, c[0], s, 128), r"codes \(16,\)"),
        (lambda x, c, s: (x[:, :0], c[:, :0], s, 128), "K = 0; fp4 needs a positive multiple of 8"),
    ],
)
def test_bad_input(change: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        linear_decode(*change(*Case(2, 10, 128).tensors()[:3]))  # type: ignore[operator]


def test_bad_kernel_and_output() -> None:
    x, codes, scales, _ = Case(2, 10, 128).tensors()
    with pytest.raises(ArgumentError, match="kernel is 'gemv'; fp4 has decode_gemv_fp4,"):
        linear_decode(x, codes, scales, 128, kernel="gemv")
    with pytest.raises(ArgumentError, match=r"out is torch.float16 \(2, 11\); needs torch.float16 \(2, 10\)"):
        linear_decode(x, codes, scales, 128, out=x.new_empty(2, 11))


@pytest.mark.parametrize(
    ("form", "zeros", "change", "message"),
    [
        ("fp5", "none", lambda e: e, "format = 'fp5'"),
        ("int4", "half", lambda e: e, "zeros = 'half'; int4 takes 'none', 'point', 'packed', 'bias'"),
        ("fp4", "point", lambda e: e, "zeros = 'point'; fp4 takes 'none'"),
        ("int4", "point", lambda e: None, r"extra is None; int4 with zeros = 'point' needs torch.float16 \(10, 2\)"),
        ("int4", "point", lambda e: e.float(), r"extra is torch.float32 \(10, 2\); int4 with"),
        ("int4", "packed", lambda e: e, r"needs torch.int32 \(10, 1\)"),
        ("int4", "none", lambda e: e, "int4 with zeros = 'none' needs None"),
    ],
)
def test_bad_format(form: str, zeros: str, change: object, message: str) -> None:
    x, codes, scales, extra = Case(2, 10, 256, format="int4", zeros="point").tensors()
    with pytest.raises(ArgumentError, match=message):
        linear_decode(x, codes, scales, 128, format=form, zeros=zeros, extra=change(extra))  # type: ignore[operator]


@pytest.mark.parametrize(("name", "extra"), [("mxfp4", None), ("nvfp4", torch.ones(1))])
def test_bytes_as_scales(name: str, extra: torch.Tensor | None) -> None:
    case = Case(1, 6, 64, 32 if name == "mxfp4" else 16, format=name)
    x, codes, scales, _ = case.tensors()
    with pytest.raises(ArgumentError, match=f"scales is torch.float16; {name} takes"):
        linear_decode(x, codes, scales.half(), case.group, format=name, extra=extra)


@pytest.mark.parametrize("device", DEVICES)
def test_is_an_op_to_torch(device: str) -> None:
    x, codes, scales, _ = Case(2, 12, 128).tensors(device)
    tensors = (x, codes, scales, None, "fp4", "none", 128, None)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.metal_marlin.linear_decode.default, tensors, test_utils=checks)
    out = x.new_empty(2, 12)
    torch.library.opcheck(
        torch.ops.metal_marlin.linear_decode_out.default, (*tensors, out), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.cuda
def test_in_a_cuda_graph(recorded: Callable[..., Callable[[], torch.Tensor]]) -> None:
    x, codes, scales, _ = Case(1, 64, 512).tensors("cuda")
    y = linear_decode(x, codes, scales, 128)
    replay = recorded(lambda: linear_decode(x, codes, scales, 128))
    assert torch.equal(replay(), y)
    x.mul_(2)
    assert torch.equal(replay(), linear_decode(x, codes, scales, 128))


def test_works_in_threads_and_inference_mode() -> None:
    tensors = Case(1, 64, 512).tensors()[:3]
    y = linear_decode(*tensors, 128)
    code = (
        "import torch, threading\n"
        "from metal_marlin.ops.linear_decode import Case, linear_decode\n"
        "t = Case(1, 64, 512).tensors()[:3]; want = linear_decode(*t, 128); bad = []\n"
        "def run():\n"
        "    with torch.inference_mode():\n"
        "        for _ in range(50):\n"
        "            if not torch.equal(linear_decode(*t, 128), want): bad.append(1)\n"
        "w = [threading.Thread(target=run) for _ in range(4)]; [i.start() for i in w]; [i.join() for i in w]\n"
        "assert not bad; print(want.float().sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == y.float().sum().item()


def test_spec_names_what_exists() -> None:
    assert (ROOT / str(OP.bench)).exists()
    assert OP.reference is linear_decode_ref
    assert len({str(case) for case in CASES}) == len(CASES)
