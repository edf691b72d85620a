"""n:m sparsity: of every m weights along K, n are kept, and where they stood. Twin of ``src/formats/sparse.h``."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.formats.codec import Codec

FORMATS = ("fp4", "mxfp4", "nvfp4", "int4")  # of four bits
_BLOCK = 1 << 22  # places that are packed at a time


@dataclass(frozen=True)
class Pattern:
    """``kept`` of every ``of`` weights."""

    kept: int
    of: int

    def __str__(self) -> str:
        return f"{self.kept}:{self.of}"

    @property
    def bits(self) -> int:
        """Of a place."""
        return (self.of - 1).bit_length()

    @property
    def unit(self) -> int:
        """What K must be a multiple of: weights whose kept codes of four bits fill a word."""
        return 8 * self.of // self.kept

    def stored(self, K: int) -> int:
        """Kept weights of a row."""
        return K // self.of * self.kept

    def words(self, K: int) -> int:
        """uint32 words of a row's places."""
        return -(-self.stored(K) * self.bits // 32)

    def pack(self, places: torch.Tensor) -> torch.Tensor:
        """int32 [N, words] of places uint8 [N, K · n / m], the first in the lowest bits."""
        shifts = torch.arange(self.bits, device=places.device)
        powers = (1 << torch.arange(32, device=places.device)).long()
        parts = []
        for rows in places.split(max(1, _BLOCK // max(1, places.shape[1]))):
            bits = (rows.unsqueeze(-1) >> shifts & 1).flatten(1).long()
            bits = torch.nn.functional.pad(bits, (0, -bits.shape[1] % 32)).unflatten(1, (-1, 32))
            parts.append((bits * powers).sum(-1).to(torch.int32))
        return torch.cat(parts)

    def unpack(self, words: torch.Tensor, K: int) -> torch.Tensor:
        """Places uint8 [N, K · n / m] of what ``pack`` made."""
        shifts = torch.arange(32, dtype=torch.int32, device=words.device)
        powers = (1 << torch.arange(self.bits, device=words.device)).to(torch.uint8)
        parts = []
        for rows in words.split(max(1, _BLOCK // max(1, 32 * words.shape[1]))):
            bits = (rows.unsqueeze(-1) >> shifts & 1).flatten(1)[:, : self.stored(K) * self.bits].to(torch.uint8)
            parts.append((bits.unflatten(1, (-1, self.bits)) * powers).sum(-1).to(torch.uint8))
        return torch.cat(parts)

    def places(self, kept: torch.Tensor) -> torch.Tensor:
        """Places uint8 [N, K · n / m], ascending, of the weights where ``kept`` [N, K] is true, at most n of every m;
        where there are fewer, the first others fill up."""
        groups = kept.unflatten(1, (-1, self.of))
        first = (~groups).to(torch.uint8).argsort(dim=-1, stable=True)[..., : self.kept]
        return first.sort(-1).values.to(torch.uint8).flatten(1)

    def columns(self, places: torch.Tensor) -> torch.Tensor:
        """Columns int64 [N, K · n / m] of kept weights."""
        starts = torch.arange(places.shape[1], device=places.device) // self.kept * self.of
        return places.long() + starts


PATTERNS = {str(p): p for p in (Pattern(1, 4), Pattern(2, 4), Pattern(2, 8), Pattern(4, 8))}


def pattern(name: str) -> Pattern:
    """The pattern called ``name``. Raises ArgumentError naming those that there are."""
    if name not in PATTERNS:
        raise ArgumentError(f"pattern = {name!r}; there are {', '.join(PATTERNS)}")
    return PATTERNS[name]


def compress(form: Codec, of: Pattern, codes: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept codes int32 [N, K · n / m / 8] and places int32 of codes [N, K / 8]; ``kept`` [N, K] is false where weights
    are 0."""
    places = of.places(kept)
    return form.pack(form.unpack(codes).gather(1, of.columns(places)).contiguous()), of.pack(places)


def decode(
    form: Codec,
    of: Pattern,
    codes: torch.Tensor,
    places: torch.Tensor,
    scales: torch.Tensor,
    extra: torch.Tensor | None,
    K: int,
    group_size: int,
    zeros: str = "none",
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Weights [N, K] in ``dtype``, as ``Codec.decode`` works them out, 0 where none was kept."""
    columns = of.columns(of.unpack(places, K))
    whole = torch.zeros(codes.shape[0], K, dtype=torch.uint8, device=codes.device)
    whole.scatter_(1, columns, form.unpack(codes))
    weight = form.decode(form.pack(whole), scales, extra, group_size, zeros, dtype)
    return torch.where(torch.zeros_like(weight, dtype=torch.bool).scatter_(1, columns, True), weight, 0)
