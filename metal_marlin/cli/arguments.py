"""Values given on the command line: scalars, generated tensors, ``.npy`` files, grids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from metal_marlin.errors import ArgumentError

Scalar = bool | int | float
_FILLS = ("zeros", "ones", "rand", "randn", "randint", "arange")
_HELP = f"NAME=VALUE with VALUE a number, true, false, FILE.npy, or FILL:SHAPE[:DTYPE], FILL one of {', '.join(_FILLS)}"


def split(text: str) -> tuple[str, str]:
    """``("n", "5")`` of ``n=5``. Raises ArgumentError."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise ArgumentError(f"'{text}' is not {_HELP}")
    return name.strip(), value.strip()


def parse_scalar(text: str) -> Scalar | None:
    """The number or bool that the text spells, or None."""
    if text in ("true", "false"):
        return text == "true"
    for kind, base in ((int, (0,)), (float, ())):
        try:
            return kind(text, *base)
        except ValueError:
            continue
    return None


def parse_constants(texts: list[str]) -> dict[str | int, object]:
    """Function constants by name or index. Raises ArgumentError."""
    found: dict[str | int, object] = {}
    for text in texts:
        name, value = split(text)
        scalar = parse_scalar(value)
        if scalar is None:
            raise ArgumentError(f"function constant '{name}': '{value}' is neither a number nor true or false")
        found[int(name) if name.isdigit() else name] = scalar
    return found


def parse_sizes(text: str, option: str) -> tuple[int, ...] | None:
    """One to three positive numbers of ``64,32,1``; None for an empty text. Raises ArgumentError."""
    if not text:
        return None
    parts = text.replace("x", ",").split(",")
    if len(parts) > 3 or not all(part.strip().isdigit() for part in parts):
        raise ArgumentError(f"{option} takes one to three numbers such as 64,32,1, not '{text}'")
    return tuple(int(part) for part in parts)


def parse_value(text: str, generator: torch.Generator) -> Scalar | torch.Tensor:
    """A scalar, or a tensor on the CPU. Raises ArgumentError."""
    scalar = parse_scalar(text)
    if scalar is not None:
        return scalar
    if text.endswith(".npy"):
        return _load(Path(text))
    fill, *rest = text.split(":")
    if fill not in _FILLS or not 1 <= len(rest) <= 2:
        raise ArgumentError(f"'{text}' is not {_HELP}")
    return _generate(fill, _shape(rest[0]), _dtype(rest[1] if len(rest) == 2 else "float32"), generator)


def _shape(text: str) -> list[int]:
    if not all(part.isdigit() for part in text.split("x")):
        raise ArgumentError(f"'{text}' is not a shape such as 1024 or 4x256")
    return [int(part) for part in text.split("x")]


def _dtype(name: str) -> torch.dtype:
    dtype: Any = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ArgumentError(f"'{name}' is not a torch dtype such as float32, bfloat16 or int32")
    return dtype


def _generate(fill: str, shape: list[int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    count = 1
    for extent in shape:
        count *= extent
    if fill in ("zeros", "ones"):
        return torch.full(shape, 1 if fill == "ones" else 0).to(dtype)
    if fill == "arange":
        return torch.arange(count).reshape(shape).to(dtype)
    if fill == "randint":
        return torch.randint(0, 100, shape, generator=generator).to(dtype)
    return (torch.randn if fill == "randn" else torch.rand)(shape, generator=generator).to(dtype)


def _load(path: Path) -> torch.Tensor:
    try:
        import numpy as np
    except ImportError:
        raise ArgumentError(f"reading {path} needs numpy: pip install numpy") from None
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, ValueError, TypeError) as error:
        raise ArgumentError(f"{path}: {error}") from None
