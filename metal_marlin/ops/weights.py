"""What ops share: libraries and plans; over quantised weights: names of rows, 16-byte accesses, weights for cases."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.formats import codec
from metal_marlin.runtime.library import MetalKernelLibrary, checks_wanted

# torch dtype -> how row names say it
KEYS = {torch.float16: "half", torch.bfloat16: "bf16", torch.float32: "f32"}


def row_name(
    op: str,
    base: str,
    known: Sequence[str],
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    format: str,
    zeros: str,
    tile: str = "",
    pattern: str = "",
) -> str:
    """The host name of a kernel's row: ``base`` (one of ``known``) and keys; ``tile`` and ``pattern``: other than the
    usual ones. Raises ArgumentError in the name of ``op`` for what has no row."""
    form = codec(format)
    if base not in known:
        raise ArgumentError(f"{op}: kernel is {base!r}; {format} has {', '.join(known)}")
    if dtype not in KEYS:
        raise ArgumentError(f"{op}: dtype is {dtype}; it is one of {', '.join(map(str, KEYS))}")
    if scale_dtype not in form.scale_dtypes:
        raise ArgumentError(f"{op}: scales is {scale_dtype}; {format} takes {', '.join(map(str, form.scale_dtypes))}")
    form.check_zeros(zeros)
    keys = [] if dtype == torch.float16 else [f"t{KEYS[dtype]}"]
    keys += [f"s{KEYS[scale_dtype]}"] if form.scale_kind == "float" and scale_dtype != dtype else []
    keys += [f"z{zeros}"] if zeros != "none" else []
    keys += [f"p{pattern}"] if pattern else []
    keys += [f"m{tile}"] if tile else []
    return f"{base}__{'_'.join(keys)}" if keys else base


def on_16_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether both tensors start at multiples of 16 bytes."""
    if a.device.type == "mps":  # data_ptr() is a buffer object there
        return a.storage_offset() * a.itemsize % 16 == 0 and b.storage_offset() * b.itemsize % 16 == 0
    return (a.data_ptr() | b.data_ptr()) % 16 == 0


def read_row(name: str) -> tuple[str, torch.dtype, torch.dtype | None, str]:
    """Kernel (with its tile), dtype, dtype of the scales (None: not said) and zeros that a row's name says."""
    base, _, said = name.partition("__")
    keys = {key[0]: key[1:] for key in said.split("_") if key}
    dtypes = {word: dtype for dtype, word in KEYS.items()}
    scales = dtypes[keys["s"]] if "s" in keys else None
    return (
        base + (f"__m{keys['m']}" if "m" in keys else ""),
        dtypes[keys.get("t", "half")],
        scales,
        keys.get("z", "none"),
    )


@functools.lru_cache(maxsize=256)
def library(family: str, device: str, lanes: int | None = None) -> MetalKernelLibrary:
    """The rows of a file of ``src/`` on a device."""
    return MetalKernelLibrary(family, device=device, lanes=lanes)


@functools.cache
def plan_kind(device: str) -> str:
    """The device kind that launches are planned for. A cpu that checks kernels runs them as simdgroups do anywhere,
    as the plans for mps: there is nothing to check in one lane. METAL_MARLIN_CHECKED is read at the first launch."""
    return "mps" if device == "cpu" and checks_wanted() else device


def random_weights(
    format: str, N: int, K: int, group: int, scale_dtype: torch.dtype, zeros: str, rng: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """codes, scales and extra of W [N, K] for cases: every finite code occurs, scales and zeros vary by group as a
    model's do."""
    form = codec(format)
    groups = form.groups_of(K, group)
    finite = torch.tensor([i for i, v in enumerate(form.values) if math.isfinite(v)], dtype=torch.uint8)
    words = form.pack(finite[torch.randint(0, len(finite), (N, K), generator=rng)])
    size, other = (torch.rand(N, groups, generator=rng) for _ in range(2))
    if form.scale_kind == "e8m0":
        return words, (118 + 5 * size).to(torch.uint8), None
    if form.scale_kind == "e4m3":
        return words, (40 + 40 * size).to(torch.uint8), torch.tensor([0.003])
    scales = ((0.012 + 0.12 * size) / max(abs(form.values[i]) for i in finite.tolist())).to(scale_dtype)
    extra: torch.Tensor | None = None
    if zeros == "point":
        extra = (other * (2**form.bits - 1)).to(scale_dtype)
    elif zeros == "bias":
        extra = (scales.float() * -(2**form.bits) * (0.3 + 0.4 * other)).to(scale_dtype)
    elif zeros == "packed":
        extra = form.pack(torch.nn.functional.pad(other * 2**form.bits, (0, -groups % form.unit)).to(torch.uint8))
    return words, scales, extra
