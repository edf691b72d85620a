"""The codecs against their formats' definitions: values, words, rounding with its ties, scales, zeros, bad input."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from metal_marlin import MetalKernelLibrary, dispatch_kernel
from metal_marlin.errors import ArgumentError
from metal_marlin.formats import CODECS, codec

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.cuda)]
# sign, exponent (bias 1), mantissa; exponent 0 is subnormal
E2M1 = [
    (-1.0) ** (c >> 3) * (0.5 * (c & 1) if (c >> 1 & 3) == 0 else 2.0 ** ((c >> 1 & 3) - 1) * (1 + 0.5 * (c & 1)))
    for c in range(16)
]
BYTES = torch.arange(256, dtype=torch.uint8)
VALUES = {
    "fp4": E2M1, "mxfp4": E2M1, "nvfp4": E2M1, "int4": list(range(16)), "uint8": list(range(256)),
    "int8": BYTES.view(torch.int8).tolist(), "fp8_e4m3": BYTES.view(torch.float8_e4m3fn).double().tolist(),
    "fp8_e5m2": BYTES.view(torch.float8_e5m2).double().tolist(),
    "int2": [q - 1.5 for q in range(4)], "int3": [q - 3.5 for q in range(8)],
    "nf3": torch.tensor([-1, -0.5350227, -0.2469314, 0, 0.1833375, 0.3819940, 0.6229857, 1]).double().tolist(),
}  # fmt: skip
KINDS = [(name, zeros) for name, c in CODECS.items() for zeros in c.zero_kinds]


def weights(N: int, K: int, seed: int = 0, mean: float = 0.2) -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) + mean


@pytest.mark.parametrize("name", CODECS)
def test_values(name: str) -> None:
    ours, wanted = (torch.tensor(v, dtype=torch.float64) for v in (codec(name).values, VALUES[name]))
    assert torch.equal(ours.isnan(), wanted.isnan())
    bits = [t.nan_to_num(0.5).view(torch.int64) for t in (ours, wanted)]  # −0 is not 0
    assert torch.equal(*bits)


@pytest.mark.parametrize("name", CODECS)
def test_words(name: str) -> None:
    """The first code lies in the lowest bits."""
    form = codec(name)
    codes = torch.randint(0, 1 << form.bits, (3, 64), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    words = form.pack(codes)
    assert (words.dtype, tuple(words.shape)) == (torch.int32, (3, 64 * form.bits // 32))
    for n in range(3):
        row = sum((word & 0xFFFFFFFF) << (32 * w) for w, word in enumerate(words[n].tolist()))
        assert [row >> (form.bits * k) & ((1 << form.bits) - 1) for k in range(64)] == codes[n].tolist()
    assert torch.equal(form.unpack(words), codes)
    unit = {2: 16, 3: 32, 4: 8, 8: 4}[form.bits]
    assert (form.words(unit), form.words(unit + 1), form.columns(64 * form.bits // 32)) == (
        form.bits * unit // 32, form.bits * unit // 16, 64,
    )  # fmt: skip
    with pytest.raises(ArgumentError, match=f"K = 7 is not a multiple of {unit}"):
        form.pack(codes[:, :7])


@pytest.mark.parametrize("name", CODECS)
def test_nearest(name: str) -> None:
    """Every value is its own code; between two the nearer, half-way the even code; none is −0, NaN or infinite."""
    form = codec(name)
    pairs = sorted(
        {v: c for c, v in reversed(list(enumerate(VALUES[name]))) if math.isfinite(v) and str(v) != "-0.0"}.items()
    )
    grid, codes = zip(*pairs, strict=True)
    assert form.nearest(torch.tensor(grid, dtype=torch.float64)).tolist() == list(codes)
    for (a, ca), (b, cb) in itertools.pairwise(pairs):
        middle, step = (a + b) / 2, (b - a) / 16
        near = torch.tensor([middle - step, middle, middle + step], dtype=torch.float64)
        assert form.nearest(near).tolist() == [ca, ca if ca % 2 == 0 else cb, cb]
    beyond = torch.tensor([grid[0] * 4 - 1, grid[-1] * 4 + 1], dtype=torch.float64)
    assert form.nearest(beyond).tolist() == [codes[0], codes[-1]]


@pytest.mark.parametrize(("name", "zeros"), KINDS)
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_round_trip(name: str, zeros: str, scale_dtype: torch.dtype) -> None:
    """Scales by the format's rule; codes nearest under what is stored; decode by the definition."""
    form = codec(name)
    group = form.groups[0] if len(form.groups) == 1 else 64
    w = weights(5, 224 if form.bits < 4 else 200 if len(form.groups) > 1 else 192)  # a shorter last group
    encoded = form.encode(w, group, scale_dtype=scale_dtype, zeros=zeros)
    N, K = w.shape
    count = -(-K // group)
    padded = torch.nn.functional.pad(w.double(), (0, count * group - K)).view(N, count, group)
    amax, low, high = padded.abs().amax(-1), padded.amin(-1), padded.amax(-1)
    extra = encoded.extra
    zero: torch.Tensor | float = 8.0 if (name, zeros) == ("int4", "none") else 0.0
    bias: torch.Tensor | float = 0.0
    if name == "mxfp4":
        scale = torch.exp2(encoded.scales.double() - 127)
        assert torch.equal(scale, torch.exp2(torch.floor(torch.log2(amax)) - 2))
    elif name == "nvfp4":
        assert extra is not None
        assert extra.item() == torch.tensor(amax.max().item() / (6 * 448), dtype=torch.float32).item()
        scale = encoded.scales.view(torch.float8_e4m3fn).double() * extra.double()
        assert ((scale * 6 - amax).abs() <= amax / 16 + 1e-6).all()
    else:
        scale = encoded.scales.double()
        rule = {"fp4": 6, "int4": 7.5, "int8": 127, "fp8_e4m3": 448, "fp8_e5m2": 57344}
        rule |= {"int2": 1.5, "int3": 3.5, "nf3": 1}
        top = (1 << form.bits) - 1
        if zeros == "none":
            wanted = amax / rule[name]
        elif zeros == "bias":
            wanted = (high - low) / top
        else:
            wanted = (high.clamp(min=0) - low.clamp(max=0)) / top
        assert torch.equal(encoded.scales, wanted.to(scale_dtype))
    if zeros == "packed":
        assert extra is not None
        zero = form.unpack(extra)[:, :count].double().unsqueeze(-1)
    elif zeros == "point":
        assert extra is not None
        zero = extra.double().unsqueeze(-1)
    elif zeros == "bias":
        assert extra is not None
        bias = extra.double().unsqueeze(-1)
    values = torch.tensor(VALUES[name], dtype=torch.float64)
    codes = torch.nn.functional.pad(form.unpack(encoded.codes), (0, count * group - K)).view(N, count, group)
    decoded = scale.unsqueeze(-1) * (values[codes.long()] - zero) + bias
    finite = values[values.isfinite()]
    candidates = scale[..., None, None] * (finite - (zero.unsqueeze(-1) if torch.is_tensor(zero) else zero))
    candidates = candidates + (bias.unsqueeze(-1) if torch.is_tensor(bias) else bias)
    best = (candidates - padded.unsqueeze(-1)).abs().amin(-1)
    inside = (torch.arange(count * group) < K).view(1, count, group)
    assert ((decoded - padded).abs() <= best * (1 + 1e-9) + 1e-12)[inside.expand_as(padded)].all()
    flat = decoded.view(N, -1)[:, :K]
    got = form.decode(encoded.codes, encoded.scales, extra, group, zeros)
    assert torch.equal(got, flat)
    half = form.decode(encoded.codes, encoded.scales, extra, group, zeros, torch.float16)
    assert torch.equal(half, flat.half())


@pytest.mark.parametrize(("name", "zeros"), KINDS)
def test_groups_of_zeros_stay_zero(name: str, zeros: str) -> None:
    form = codec(name)
    group = max(form.groups[0], form.unit)
    w = weights(2, 4 * group)
    w[:, group : 2 * group] = 0
    encoded = form.encode(w, group, zeros=zeros)
    decoded = form.decode(*encoded[:3], group, zeros)
    assert not form.unpack(encoded.codes)[:, group : 2 * group].any()
    assert torch.equal(decoded[:, group : 2 * group], torch.zeros(2, group, dtype=torch.float64))
    empty = form.encode(torch.zeros(3, group), group, zeros=zeros)
    assert torch.equal(form.decode(*empty[:3], group, zeros), torch.zeros(3, group, dtype=torch.float64))


@pytest.mark.parametrize(("name", "zeros"), KINDS)
def test_mse_is_never_worse(name: str, zeros: str) -> None:
    form = codec(name)
    group = form.groups[0]
    w = weights(16, 8 * group, 3)
    errors = []
    for method in ("rtn", "mse"):
        encoded = form.encode(w, group, zeros=zeros, method=method)
        errors.append((form.decode(*encoded[:3], group, zeros) - w.double()).view(-1, group).square().sum(1))
    assert (errors[1] <= errors[0] * (1 + 1e-4)).all()
    if form.bits == 4 and form.scale_kind == "float":
        assert errors[1].sum() < 0.99 * errors[0].sum()


def test_rows_are_encoded_in_blocks_alike() -> None:
    w = weights(2100, 512)
    whole = codec("int4").encode(w, 64, zeros="packed")
    part = codec("int4").encode(w[2040:], 64, zeros="packed")
    for a, b in zip(whole, part, strict=True):
        assert a is not None
        assert torch.equal(a[2040:], b)


@pytest.mark.parametrize("device", DEVICES)
def test_every_scale_byte(device: str) -> None:
    """E8M0 and E4M3 scales of the Metal policies, subnormals and NaN too."""
    source = """#include <metal_stdlib>
#include "formats/quantized.h"
using namespace metal;
kernel void scales(device const uchar* bytes [[buffer(0)]], device float* e8m0 [[buffer(1)]],
                   device float* e4m3 [[buffer(2)]], uint i [[thread_position_in_grid]]) {
  e8m0[i] = E8M0::value(bytes[i]);
  e4m3[i] = E4M3::value(bytes[i]);
}
"""
    library = MetalKernelLibrary(source, device=device)
    outs = [torch.zeros(256, device=device) for _ in range(2)]
    dispatch_kernel(library, "scales", threads=256, threads_per_threadgroup=64, args=[BYTES.to(device), *outs])
    powers = torch.tensor([2.0 ** (e - 127) for e in range(255)] + [math.nan], dtype=torch.float64)
    for ours, wanted in zip(outs, (powers, BYTES.view(torch.float8_e4m3fn).double()), strict=True):
        same = (ours.cpu().double() == wanted) | (ours.cpu().isnan() & wanted.isnan())
        assert same.all(), (~same).nonzero()


def test_bad_input() -> None:
    form = codec("fp4")
    w = weights(2, 64)
    cases = [
        (lambda: codec("fp5"), "format = 'fp5'; there are fp4, mxfp4"),
        (lambda: form.encode(w[0], 32), r"shape \(64,\); fp4 encodes \[N, K\]"),
        (lambda: form.encode(w[:, :60], 32), "K = 60; fp4 needs a positive multiple of 8"),
        (lambda: form.encode(w, 48), "group_size = 48; fp4 takes 16, 32, 64, 128, 256 or K = 64"),
        (lambda: codec("mxfp4").encode(w, 64), "group_size = 64; mxfp4 takes 32"),
        (lambda: form.encode(w, 32, zeros="packed"), "zeros = 'packed'; fp4 takes 'none'"),
        (lambda: form.encode(w, 32, scale_dtype=torch.float64), r"scale_dtype = torch\.float64"),
        (lambda: form.encode(w, 32, method="best"), "method = 'best'"),
        (lambda: form.encode(w * 1e-8, 32), r"needs a scale below 2\.38419e-07, which torch\.float16"),
        (lambda: codec("int4").encode(w.abs() * 0 + 1e5, 32, zeros="bias"), r"needs a scale or bias beyond"),
        (lambda: form.encode(w * 1e6, 32), r"needs a scale or bias beyond torch\.float16"),
    ]
    for call, message in cases:
        with pytest.raises(ArgumentError, match=message):
            call()
    w[1, 3] = math.inf
    with pytest.raises(ArgumentError, match=r"weight\[1, 3\] is inf; 1 values are not finite"):
        form.encode(w, 32)
    with pytest.raises(ArgumentError, match="codes: 4 words a row; int3 has multiples of 3"):
        codec("int3").decode(torch.zeros(2, 4, dtype=torch.int32), torch.ones(2, 1, dtype=torch.float16), None, 32)
    encoded = form.encode(weights(2, 64), 32)
    with pytest.raises(ArgumentError, match=r"scales: torch\.float16 \(2, 1\); fp4 of 2 rows with 2 groups needs"):
        form.decode(encoded.codes, encoded.scales[:, :1], None, 32)
    with pytest.raises(ArgumentError, match="extra: fp4 with zeros 'none' has none"):
        form.decode(encoded.codes, encoded.scales, encoded.scales, 32)
