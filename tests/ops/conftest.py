"""Fixtures of the ops' tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from metal_marlin.ops import packed_plan
from metal_marlin.ops.linear_decode_cases import Case

_FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


@pytest.fixture
def weight() -> Callable[..., torch.Tensor]:
    """W [N, K] of a case of linear_decode in float64, by the definitions of fp4 and int4 and not by the codecs."""
    return _weight


def _weight(case: Case, codes: torch.Tensor, scales: torch.Tensor, extra: torch.Tensor | None) -> torch.Tensor:
    group, s = torch.arange(case.K) // case.group, scales.double()
    values = _FP4[_nibbles(codes)] if case.format == "fp4" else _nibbles(codes).double()
    if case.format == "fp4":
        return s[:, group] * values
    if extra is None:
        return s[:, group] * (values - 8)
    if case.zeros == "packed":
        return s[:, group] * (values - _nibbles(extra)[:, group])
    more = extra.double()[:, group]
    return s[:, group] * values + more if case.zeros == "bias" else s[:, group] * (values - more)


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    return ((words.long().unsqueeze(-1) >> 4 * torch.arange(8)) & 15).flatten(-2)


@pytest.fixture
def multiprocessors(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Plans of weights in operand order are made for so many."""

    def pretend(count: int) -> None:
        monkeypatch.setattr(packed_plan, "multiprocessors", lambda _: count)
        packed_plan.chosen.cache_clear()

    yield pretend
    packed_plan.chosen.cache_clear()
