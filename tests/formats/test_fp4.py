"""The FP4 codec: every code, rounding with its ties, scales, and the Metal policy as its twin."""

from __future__ import annotations

import pytest
import torch

from metal_marlin import MetalKernelLibrary, dispatch_kernel
from metal_marlin.errors import ArgumentError
from metal_marlin.formats import fp4

# sign, exponent (bias 1), mantissa; exponent 0 is subnormal
E2M1 = [
    (-1.0) ** (c >> 3) * (0.5 * (c & 1) if (c >> 1 & 3) == 0 else 2.0 ** ((c >> 1 & 3) - 1) * (1 + 0.5 * (c & 1)))
    for c in range(16)
]
TWIN = """
#include <metal_stdlib>
#include "formats/fp4.h"
using namespace metal;
kernel void decode(device const uint* words [[buffer(0)]], device float* values [[buffer(1)]],
                   device float* pairs [[buffer(2)]], device ushort* bfloats [[buffer(3)]],
                   uint i [[thread_position_in_grid]]) {
  const uint word = words[i];
  for (uint j = 0; j < FP4::kPerWord; ++j) values[8 * i + j] = FP4::value(word >> (4 * j));
  uint h[4], b[4];
  FP4::scaled_pairs(word, h);
  FP4::scaled_bfloat_pairs(word, b);
  for (uint j = 0; j < 4; ++j) {
    const float2 p = FP4::pair(word, j), q = float2(as_type<half2>(h[j])) * 16384.0f;
    pairs[16 * i + j] = p.x;
    pairs[16 * i + j + 4] = p.y;
    pairs[16 * i + j + 8] = q.x;
    pairs[16 * i + j + 12] = q.y;
    bfloats[8 * i + j] = ushort(b[j]);
    bfloats[8 * i + j + 4] = ushort(b[j] >> 16);
  }
}
"""


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view({4: torch.int32, 8: torch.int64}[t.element_size()])


def test_values_are_e2m1() -> None:
    assert list(fp4.VALUES) == E2M1
    assert torch.equal(bits(torch.tensor(fp4.VALUES)), bits(torch.tensor(E2M1)))  # -0 too


@pytest.mark.parametrize(
    ("device", "lanes"), [("cpu", 1), ("cpu", 32), pytest.param("cuda", None, marks=pytest.mark.cuda)]
)
def test_the_metal_policy_is_the_twin(device: str, lanes: int | None) -> None:
    """Every code in every place of a word, among every neighbour."""
    codes = torch.tensor(
        [[c if i == p else n for i in range(8)] for p in range(8) for c in range(16) for n in range(16)]
    )
    words = fp4.pack(codes).flatten().to(device)
    values, pairs = (torch.full((n, codes.numel()), float("nan"), device=device) for n in (1, 2))
    bfloats = torch.zeros(codes.numel(), dtype=torch.int16, device=device)
    library = MetalKernelLibrary(TWIN, device=device, lanes=lanes)
    args = (words, values, pairs, bfloats)
    dispatch_kernel(library, "decode", threads=len(words), threads_per_threadgroup=1, args=args)
    wanted = torch.tensor(E2M1)[codes.flatten()]
    assert torch.equal(bits(values.cpu().flatten()), bits(wanted))
    assert torch.equal(bits(pairs.cpu().view(-1, 2, 8)), bits(wanted.view(-1, 1, 8).expand(-1, 2, 8)))
    exact = bfloats.cpu().view(torch.bfloat16).double() * 2.0**126
    assert torch.equal(bits(exact), bits(wanted.double()))


def test_pack_and_unpack() -> None:
    codes = torch.randint(0, 16, (5, 48), generator=torch.Generator().manual_seed(1))
    words = fp4.pack(codes)
    assert words.dtype == torch.int32
    expected = [
        [sum(int(c) << (4 * i) for i, c in enumerate(row[8 * w : 8 * w + 8])) for w in range(6)] for row in codes
    ]
    assert (words.long() & 0xFFFFFFFF).tolist() == expected
    assert torch.equal(fp4.unpack(words).long(), codes)


def test_nearest_is_nearest_and_ties_are_even() -> None:
    magnitudes = torch.tensor(E2M1[:8], dtype=torch.float64)
    values = torch.cat([torch.linspace(-8, 8, 6401, dtype=torch.float64), (magnitudes[1:] + magnitudes[:-1]) / 2])
    codes = fp4.nearest(values).long()
    got = torch.tensor(E2M1, dtype=torch.float64)[codes]
    assert torch.equal((got - values).abs(), (torch.tensor(E2M1, dtype=torch.float64) - values[:, None]).abs().amin(1))
    assert (codes[-7:] % 2 == 0).all()
    assert not (codes == 8).any()


@pytest.mark.parametrize("dtype", fp4.SCALE_DTYPES, ids=str)
@pytest.mark.parametrize(("K", "group"), [(64, 16), (200, 32), (256, 256), (24, 24), (136, 128)])
def test_round_trip(K: int, group: int, dtype: torch.dtype) -> None:
    weight = torch.randn(7, K, generator=torch.Generator().manual_seed(2)) * 0.1
    weight[3] = 0
    codes, scales = fp4.encode(weight, group, dtype)
    assert codes.shape == (7, K // 8)
    assert scales.shape == (7, -(-K // group))
    assert scales.dtype == dtype
    assert not codes[3].any()
    assert not scales[3].any()
    back = fp4.decode(codes, scales, group)
    size = torch.stack([w.abs().amax(-1) for w in weight.double().split(group, -1)], -1).repeat_interleave(group, -1)
    # the widest gap, 4 to 6, is 2/6 of the largest value; the scale's own rounding comes on top
    assert ((back - weight.double()).abs() <= size[:, :K] * (1 / 6 + 2.0**-7)).all()
    again, same = fp4.encode(back, group, dtype)
    assert torch.equal(fp4.decode(again, same, group), back) or dtype != torch.float32


def test_exact_weights_survive() -> None:
    weight = torch.tensor(E2M1[:8] + E2M1[9:] + [6.0]).repeat(3, 2) * 0.5
    codes, scales = fp4.encode(weight, 16)
    assert (scales == 0.5).all()
    assert torch.equal(fp4.decode(codes, scales, 16).float(), weight)


@pytest.mark.parametrize(
    ("weight", "group", "dtype", "message"),
    [
        (torch.zeros(2, 12), 16, torch.float16, "K = 12; fp4 needs a positive multiple of 8"),
        (torch.zeros(2, 64), 24, torch.float16, "group_size = 24; fp4 takes 16, 32, 64, 128, 256 or K = 64"),
        (torch.zeros(64), 16, torch.float16, r"weight: shape \(64,\)"),
        (torch.full((1, 16), float("nan")), 16, torch.float16, "not finite"),
        (torch.full((1, 16), 1e9), 16, torch.float16, r"largest value 1e\+09 needs a scale beyond torch.float16"),
        (torch.zeros(1, 16), 16, torch.float64, "scale_dtype = torch.float64"),
    ],
)
def test_bad_weights(weight: torch.Tensor, group: int, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        fp4.encode(weight, group, dtype)


def test_bad_scales() -> None:
    with pytest.raises(
        ArgumentError, match=r"scales: shape \(2, 3\); codes of 2 rows with K = 64, group_size = 16 need"
    ):
        fp4.decode(torch.zeros(2, 8, dtype=torch.int32), torch.zeros(2, 3), 16)
