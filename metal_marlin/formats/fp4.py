"""FP4 (E2M1): 16 values, eight codes a 32-bit word, one scale per group along K.

Code = sign (bit 3), exponent (bits 2 and 1, bias 1), mantissa (bit 0), as in the OCP Microscaling specification.
A weight tensor [N, K] is ``codes`` int32 [N, K/8] (the bits of unsigned words; code i of a word in bits 4i…4i+3) and
``scales`` [N, ⌈K/g⌉]. Twin of ``src/formats/fp4.h``.
"""

from __future__ import annotations

import torch

from metal_marlin.errors import ArgumentError

NAME = "fp4"
PER_WORD = 8
GROUPS = (16, 32, 64, 128, 256)  # or K
LARGEST = 6.0
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = (*MAGNITUDES, *(-m for m in MAGNITUDES))
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_group(K: int, group_size: int) -> None:
    """Raise ArgumentError unless K fills words and ``group_size`` is 16, 32, 64, 128, 256 or K."""
    if K < PER_WORD or K % PER_WORD:
        raise ArgumentError(f"K = {K}; fp4 needs a positive multiple of {PER_WORD}")
    if group_size != K and group_size not in GROUPS:
        raise ArgumentError(f"group_size = {group_size}; fp4 takes {', '.join(map(str, GROUPS))} or K = {K}")


def groups(K: int, group_size: int) -> int:
    """Scales of a row of K weights."""
    return -(-K // group_size)


def nearest(values: torch.Tensor) -> torch.Tensor:
    """uint8 codes of the nearest values, ties to the even code; beyond ±6 it is ±6, and no code is −0."""
    magnitude = values.abs()
    grid = torch.tensor(MAGNITUDES, dtype=values.dtype, device=values.device)
    halfway = (grid[1:] + grid[:-1]) / 2
    below, above = (torch.bucketize(magnitude, halfway, right=right) for right in (False, True))
    code = torch.where(below % 2 == 0, below, above)
    return torch.where((values < 0) & (code > 0), code + 8, code).to(torch.uint8)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes 0…15 [..., K] to int32 words [..., K/8]. Raises ArgumentError where K is not a multiple of 8."""
    if codes.shape[-1] % PER_WORD:
        raise ArgumentError(f"codes: K = {codes.shape[-1]} is not a multiple of {PER_WORD}")
    shifts = torch.arange(0, 32, 4, device=codes.device, dtype=torch.int64)
    words = (codes.long().unflatten(-1, (-1, PER_WORD)) << shifts).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack(words: torch.Tensor) -> torch.Tensor:
    """int32 words [..., K/8] to uint8 codes [..., K]."""
    shifts = torch.arange(0, 32, 4, device=words.device, dtype=torch.int32)
    return ((words.view(torch.int32).unsqueeze(-1) >> shifts) & 15).to(torch.uint8).flatten(-2)


def encode(
    weight: torch.Tensor, group_size: int, scale_dtype: torch.dtype = torch.float16
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round-to-nearest: weights [N, K] to ``codes`` int32 [N, K/8] and ``scales`` [N, ⌈K/g⌉], scale = amax/6.

    Codes are nearest under the scale as stored. An all-zero group has scale 0 and codes 0. Raises ArgumentError for
    shapes and group sizes that do not fit, values that are not finite, and scales beyond ``scale_dtype``.
    """
    if weight.ndim != 2:
        raise ArgumentError(f"weight: shape {tuple(weight.shape)}; fp4 encodes [N, K]")
    if scale_dtype not in SCALE_DTYPES:
        raise ArgumentError(f"scale_dtype = {scale_dtype}; fp4 takes {', '.join(map(str, SCALE_DTYPES))}")
    N, K = weight.shape
    check_group(K, group_size)
    exact = weight.double()
    if not bool(torch.isfinite(exact).all()):
        raise ArgumentError("weight: holds values that are not finite")
    count = groups(K, group_size)
    grouped = torch.nn.functional.pad(exact, (0, count * group_size - K)).view(N, count, group_size)
    scales = (grouped.abs().amax(-1) / LARGEST).to(scale_dtype)
    if not bool(torch.isfinite(scales).all()):
        raise ArgumentError(f"weight: largest value {exact.abs().max():g} needs a scale beyond {scale_dtype}")
    divisor = scales.double().unsqueeze(-1)
    codes = nearest(torch.where(divisor > 0, grouped / divisor.clamp_min(1e-300), 0.0))
    return pack(codes.view(N, -1)[:, :K]), scales


def decode(
    codes: torch.Tensor, scales: torch.Tensor, group_size: int, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Weights [N, K] in ``dtype``, rounded once: value(code) · scale is exact in float64."""
    values = torch.tensor(VALUES, dtype=torch.float64, device=codes.device)[unpack(codes).long()]
    K = values.shape[-1]
    check_group(K, group_size)
    if scales.shape != (codes.shape[0], groups(K, group_size)):
        raise ArgumentError(
            f"scales: shape {tuple(scales.shape)}; codes of {codes.shape[0]} rows with K = {K}, group_size = "
            f"{group_size} need {(codes.shape[0], groups(K, group_size))}"
        )
    return (values * scales.double().repeat_interleave(group_size, -1)[:, :K]).to(dtype)
