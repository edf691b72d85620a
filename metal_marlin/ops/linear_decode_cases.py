"""Shapes and data of linear_decode for tests and bench: every format, tails, group sizes, dtypes, model shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from metal_marlin.formats import CODECS, codec
from metal_marlin.ops.weights import KEYS, random_weights, read_row


@dataclass(frozen=True)
class Case:
    """x [M, K] · W [N, K]ᵀ, group size g, W in ``format`` with ``zeros``."""

    M: int
    N: int
    K: int
    group: int = 128
    dtype: torch.dtype = torch.float16
    scale_dtype: torch.dtype | None = None  # None: as dtype; formats with scales of their own ignore it
    format: str = "fp4"
    zeros: str = "none"
    model: str = ""  # whose shape it is, for the bench

    def __str__(self) -> str:
        name = "" if self.format == "fp4" else f"-{self.format}"
        zeros = "" if self.zeros == "none" else f"-z{self.zeros}"
        scales = "" if self.scale_dtype is None else f"-s{KEYS[self.scale_dtype]}"
        return f"{self.M}x{self.N}x{self.K}-g{self.group}-{KEYS[self.dtype]}{scales}{name}{zeros}"

    @property
    def scales_in(self) -> torch.dtype:
        """The dtype of the scales."""
        return (self.scale_dtype or self.dtype) if codec(self.format).scale_kind == "float" else torch.uint8

    def tensors(
        self, device: str = "cpu", seed: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """x, codes, scales, extra: every finite code occurs, scales and zeros vary by group as a model's do."""
        rng = torch.Generator().manual_seed(seed)
        x = torch.randn(self.M, self.K, generator=rng).to(self.dtype)
        codes, scales, extra = random_weights(self.format, self.N, self.K, self.group, self.scales_in, self.zeros, rng)
        return x.to(device), codes.to(device), scales.to(device), None if extra is None else extra.to(device)


_DTYPES = tuple(KEYS)
_FLOAT_SCALES = (
    ("int4", "none"),
    ("int4", "point"),
    ("int4", "packed"),
    ("int4", "bias"),
    ("int8", "none"),
    ("uint8", "point"),
    ("uint8", "packed"),
    ("uint8", "bias"),
    ("fp8_e4m3", "none"),
    ("fp8_e5m2", "none"),
    ("int2", "none"),
    ("int3", "none"),
    ("nf3", "none"),
)


def _fp4() -> list[Case]:
    return [
        *(Case(1, 64, 512, dtype=d, scale_dtype=s) for d in _DTYPES for s in _DTYPES),
        *(Case(1, 37, 512, g, d) for g in (16, 32, 64, 128, 256, 512) for d in _DTYPES),
        *(Case(1, 5, K, 128, d) for K in (8, 24, 120, 128, 136, 176, 1000, 1056) for d in _DTYPES),
        *(Case(1, 16, K, K, d) for K in (8, 40, 136, 608) for d in _DTYPES),
        *(Case(1, 3, K, 16, d) for K in (24, 104, 488, 528) for d in _DTYPES),
        *(Case(1, N, 256, 64, d) for N in (1, 3, 4, 15, 16, 17, 257) for d in _DTYPES),
        *(Case(M, 33, 416, 32, d) for M in (2, 3, 7, 8, 9, 17) for d in _DTYPES),
        *(Case(M, 31, 1016, 128, d) for M in (2, 8) for d in _DTYPES),
        *(Case(1, 9, 576, 64, d) for d in _DTYPES),
        Case(1, 8, 17408, 128),
        Case(1, 8, 16448, 64),
        Case(2, 600, 256, 128),
    ]


def _others() -> list[Case]:
    """Few dtypes a format, because each is a kernel to compile: tails, one group, more than 32 groups, many tokens."""
    found: list[Case] = []
    for i, (name, zeros) in enumerate(_FLOAT_SCALES):
        odd = codec(name).unit
        small, middle, long = (K + -K % odd for K in (48, 136, 1000))
        one, other, third = (_DTYPES[(i + j) % 3] for j in range(3))
        found += [
            *(Case(1, 37, 640, g, one, format=name, zeros=zeros) for g in (16, 32, 64, 128, 256)),
            *(Case(1, 5, K, 32, one, format=name, zeros=zeros) for K in (odd, small + odd, 640 - odd, long + odd)),
            *(Case(1, 6, K, K, one, format=name, zeros=zeros) for K in (odd, middle + odd, 608)),
            Case(1, 7, 576, 64, one, format=name, zeros=zeros),
            *(Case(M, 33, 416 + odd, 32, other, format=name, zeros=zeros) for M in (2, 8, 11)),
            Case(3, 19, 640, 128, other, format=name, zeros=zeros),
            Case(1, 33, 256, 64, third, one, name, zeros),
        ]
    found += [Case(1, 5, 16640, 128, torch.bfloat16, format="int4", zeros="point")]
    odd_shapes = (("int3", 256), ("int3", 320), ("nf3", 320))  # of nf3, 256 is above
    found += [Case(1, 33, K, 64, torch.float32, torch.float16, f) for f, K in odd_shapes]
    for name, g in (("mxfp4", 32), ("nvfp4", 16)):
        for d in _DTYPES:
            found += [Case(1, N, K, g, d, format=name) for N, K in ((6, 32), (5, 576), (37, 640), (3, 1056))]
        found += [Case(M, 33, 416, g, d, format=name) for M, d in ((2, torch.bfloat16), (9, torch.bfloat16))]
    return found


def _models() -> list[Case]:
    large = ((4096, 14336), (14336, 4096), (4096, 4096))
    # q and o, k and v, gate and up together, down, head
    small = ((576, 576), (192, 576), (960, 576), (3072, 576), (576, 1536), (49152, 576))
    return [
        *(Case(1, N, K, 128, model="large") for N, K in large),
        *(Case(1, N, K, 64, torch.float32, torch.float16, model="smollm2") for N, K in small),
    ]


def row_case(name: str, format: str | None = None) -> tuple[Case, str]:
    """A small case for a row of decode_gemv or marlin_gemm, and the kernel to ask for; ``format`` where the name does
    not say it."""
    base, dtype, scales, zeros = read_row(name)
    form = (
        codec(format)
        if format
        else max((f for n, f in CODECS.items() if f"_{n}_" in f"{base}_"), key=lambda f: len(f.name))
    )
    group = next(g for g in (64, 32, 16) if g in form.groups)
    return Case(1 if base == f"decode_gemv_{form.name}" else 9, 37, 256, group, dtype, scales, form.name, zeros), base


CASES: tuple[Case, ...] = (*_fp4(), *_others(), *_models())
