"""QuantLinear over every format and kind of zeros, at every number of tokens that takes another path, with tails of N and
K, all group sizes and dtypes: every pair of their values occurs, and of formats with numbers of tokens every one."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch

from metal_marlin.formats import CODECS, codec
from metal_marlin.nn.linear import QuantLinear
from metal_marlin.quant import quantize

KINDS = [(name, zeros) for name in CODECS for zeros in codec(name).zero_kinds]
TOKENS = (1, 2, 3, 7, 8, 16, 17, 33, 64, 127, 128, 500)
ROWS = (1, 15, 37, 66, 131)
COLUMNS = (5, 77, 130, 333, 512, 1001)  # those that fill no word of codes are padded
GROUPS = (16, 32, 64, 128, 256, 0)  # 0: K
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@dataclass(frozen=True)
class Case:
    """x [M, K] and W [N, K] in ``kind``, a format and its zeros."""

    kind: tuple[str, str]
    M: int
    N: int
    K: int
    group: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{'-'.join(self.kind)}-{self.M}x{self.N}x{self.K}-g{self.group}-{str(self.dtype)[6:]}"

    @property
    def values(self) -> tuple[object, ...]:
        return self.kind, self.M, self.N, self.K, self.group, self.dtype


def groups(kind: tuple[str, str]) -> tuple[int, ...]:
    """Of a format."""
    form = codec(kind[0])
    return GROUPS if form.scale_kind == "float" else form.groups


def pairs(case: Case) -> set[tuple[int, object, int, object]]:
    return {(i, a, j, b) for (i, a), (j, b) in itertools.combinations(enumerate(case.values), 2)}


def grid() -> list[Case]:
    """A case for every format and number of tokens; the other values go round at different paces."""
    found = []
    for (i, kind), (j, M) in itertools.product(enumerate(KINDS), enumerate(TOKENS)):
        sizes, dtype = groups(kind), DTYPES[(i + j // 4) % 3]
        group = sizes[(i + j // 2) % len(sizes)]
        found.append(Case(kind, M, ROWS[(i + 2 * j) % len(ROWS)], COLUMNS[(i + j) % len(COLUMNS)], group, dtype))
    return found


CASES = grid()


def test_every_pair_occurs() -> None:
    seen = {pair for case in CASES for pair in pairs(case)}
    axes = (KINDS, TOKENS, ROWS, COLUMNS, GROUPS, DTYPES)
    for (i, one), (j, other) in itertools.combinations(enumerate(axes), 2):
        for a, b in itertools.product(one, other):
            possible = not (i == 0 and j == 4) or b in groups(a)  # type: ignore[arg-type]
            assert ((i, a, j, b) in seen) == possible, (a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_near_as_the_composition_of_torch(case: Case, device: str) -> None:
    """Twice the error of decoding to x's dtype and multiplying there, and roundings of sums."""
    format, zeros = case.kind
    rng = torch.Generator().manual_seed(case.M)
    x = torch.randn(case.M, case.K, generator=rng).to(case.dtype)
    W = torch.randn(case.N, case.K, generator=rng) * torch.exp2(torch.randn(case.N, 1, generator=rng))
    weight = quantize(W, format, case.group or case.K, zeros=zeros, scale_dtype=case.dtype)
    decoded = weight.dequantize(torch.float64)
    y = QuantLinear(weight).to(device)(x.to(device)).cpu().double()
    exact, composed = x.double() @ decoded.T, (x @ decoded.to(case.dtype).T).double()
    sums, number = x.double().abs() @ decoded.abs().T, torch.finfo(case.dtype)
    rounding = number.eps * exact.abs() + 2.0**-22 * sums
    over = -1 if case.N >= 8 else (0, 1)  # the error of a token with few outputs is chance
    ours, theirs = ((t - exact).norm(dim=over) for t in (y, composed))
    assert (ours <= 2 * theirs + rounding.norm(dim=over)).all()
    assert (y - exact).abs().max() <= 8 * (composed - exact).abs().max() + rounding.max()
