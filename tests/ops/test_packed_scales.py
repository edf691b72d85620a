"""linear_packed, linear_sparse and linear_packed_sparse with scales at the ends of what their dtypes hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

from metal_marlin.formats import codec, operands, sparse
from metal_marlin.ops.linear_decode_cases import Case
from metal_marlin.ops.linear_sparse import linear_sparse
from metal_marlin.ops.packed import linear_packed
from metal_marlin.ops.packed_sparse import linear_packed_sparse
from metal_marlin.quant import prune_2_4

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
TOKENS = (3, 20, 64, 200)  # of tiles of each kind
SIZES = [
    *((torch.float16, size) for size in (6e-8, 3e-5, 1.0, 6e4)),
    *((torch.bfloat16, size) for size in (2.0**-120, 6e-8, 1.0, 6e4, 2.0**100)),
]
PRODUCTS = [
    *(("linear_packed", f) for f in ("fp4", "int8", "uint8", "fp8_e4m3", "int2", "int3", "nf3")),
    *((op, f) for op in ("linear_sparse", "linear_packed_sparse") for f in ("fp4", "int4")),
]
Multiply = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Weight:
    """W [N, K] decoded in float64, and how an op multiplies by it."""

    decoded: torch.Tensor
    multiply: Multiply


def weight(op: str, case: Case, scales: torch.Tensor, device: str) -> Weight:
    """The case's codes with other scales; of sparse weights two of every four."""
    form, group, format = codec(case.format), case.group, case.format
    _, codes, _, extra = case.tensors()
    if op == "linear_packed":
        W = form.decode(codes, scales, extra, group, case.zeros)
        held = [None if t is None else t.to(device) for t in operands.pack(form, codes, scales, extra, case.zeros)]
        words, by, more, powers = held
        options = {"format": format, "zeros": case.zeros, "extra": more}
        return Weight(W, lambda x: linear_packed(x, words, by, powers, group, **options))  # type: ignore[arg-type]
    of = sparse.pattern("2:4")
    kept = prune_2_4(torch.rand(case.N, case.K, generator=torch.Generator().manual_seed(1)) + 0.1) != 0
    codes, places = sparse.compress(form, of, codes, kept)
    W = sparse.decode(form, of, codes, places, scales, None, case.K, group)
    if op == "linear_sparse":
        tensors = [t.to(device) for t in (codes, places, scales)]
        return Weight(W, lambda x: linear_sparse(x, *tensors, group, format=format))
    tensors = [t.to(device) for t in operands.pack_sparse(form, codes, places, scales)]
    return Weight(W, lambda x: linear_packed_sparse(x, *tensors, group, format=format))


def products(x: torch.Tensor, w: Weight, device: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """y and what it should be, for several numbers of tokens."""
    for M in TOKENS:
        yield w.multiply(x[:M].to(device)).cpu().double(), x[:M].double() @ w.decoded.T


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize(("dtype", "size"), SIZES, ids=str)
@pytest.mark.parametrize(("op", "format"), PRODUCTS)
def test_sizes_of_scales(op: str, format: str, dtype: torch.dtype, size: float, group: int, device: str) -> None:
    """In every row beside groups a thousand times smaller; results that x's dtype does not hold are infinite."""
    zeros = "point" if format == "uint8" else "none"
    case = Case(max(TOKENS), 64, 512, group, dtype, None, format, zeros)
    x, _, scales, _ = case.tensors()
    scales = torch.full_like(scales, size)
    scales[:, 1::2] /= 1024
    x = x * (min(1 / size, 2.0**10) if size < 1 else 2.0**-10)
    number = torch.finfo(dtype)
    for y, exact in products(x, weight(op, case, scales, device), device):
        size_of = exact.abs() / number.max
        near = 2 * number.eps * exact.norm(dim=-1).max() + number.smallest_normal * number.eps
        assert ((y - exact).abs() <= near)[size_of < 1 - number.eps].all()
        assert y[size_of > 1 + number.eps].isinf().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("exponent", [1, 7, 127, 200, 240])
@pytest.mark.parametrize("op", ["linear_packed", "linear_sparse", "linear_packed_sparse"])
def test_exponents_of_mxfp4(op: str, exponent: int, device: str) -> None:
    """Up to where decoded weights still have room in float, beside a much smaller group: the large one is what
    counts, and comes out as it is."""
    case = Case(max(TOKENS), 64, 256, 32, torch.bfloat16, format="mxfp4")
    x, _, scales, _ = case.tensors()
    scales[:, 1::2], scales[:, ::2] = exponent, max(exponent - 30, 0)
    x = x * (2.0**-20 if exponent > 200 else 1)
    number = torch.finfo(torch.bfloat16)
    for y, exact in products(x, weight(op, case, scales, device), device):
        assert ((y - exact).norm(dim=-1) <= 2 * number.eps * exact.norm(dim=-1) + 1e-37).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bf16"])
def test_ends_of_nvfp4(dtype: torch.dtype, device: str) -> None:
    """Rows with a scale each: zero, the smallest, the largest below normal numbers, 2^-6, 448, NaN."""
    case, bytes_of = Case(max(TOKENS), 96, 512, 16, dtype, None, "nvfp4"), torch.tensor([0, 1, 7, 8, 126, 127])
    x, _, scales, _ = case.tensors()
    kind = torch.arange(case.N) % 6
    scales[:] = bytes_of[kind].to(torch.uint8).view(-1, 1)
    for y, exact in products(x / 16, weight("linear_packed", case, scales, device), device):
        assert (y[:, kind == 0] == 0).all()
        assert y[:, kind == 5].isnan().all()
        error, size = ((v[:, kind != 5]).norm(dim=0) for v in (y - exact, exact))
        assert (error <= 2 * torch.finfo(dtype).eps * size + 2.0**-24).all()


@pytest.mark.parametrize(("exponent", "size"), [(0, 120), (127, -126), (241, -20), (254, -20), (254, -133)])
@pytest.mark.parametrize("op", ["linear_packed", "linear_packed_sparse"])
def test_every_exponent_in_plain_code(op: str, exponent: int, size: int) -> None:
    """Also those that leave a weight no room in float, where x [about 2^size] makes results finite."""
    case = Case(max(TOKENS), 64, 256, 32, torch.bfloat16, format="mxfp4")
    x, _, scales, _ = case.tensors()
    scales[:, 1::2], scales[:, ::2] = exponent, max(exponent - 30, 0)
    x = (x.double() * 2.0**size).bfloat16()
    x[0] = 0
    number = torch.finfo(torch.bfloat16)
    for y, exact in products(x, weight(op, case, scales, "cpu"), "cpu"):
        assert ((y - exact).norm(dim=-1) <= 2 * number.eps * exact.norm(dim=-1)).all()
