"""Buffers of layers over quantised weights, whose dtypes belong to the weight: a rounded scale is another weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn


def keep_dtypes(layer: nn.Module, names: Iterable[str], change: Callable[[], object]) -> None:
    """``change`` (a module's own ``_apply``) the layer; the buffers ``names`` move with it, in the dtypes they have."""
    kept = {name: layer._buffers[name] for name in names}
    change()
    for name, old in kept.items():
        new = layer._buffers[name]
        if old is not None and new is not None and new.dtype != old.dtype:
            layer._buffers[name] = old.to(new.device)


def other_dtype(layer: nn.Module, names: Iterable[str], state: Mapping[str, torch.Tensor], prefix: str) -> str | None:
    """What is wrong with a state dict whose tensors loading would round to a buffer's dtype without a word."""
    for name in names:
        mine, given = layer._buffers[name], state.get(prefix + name)
        if mine is not None and given is not None and mine.dtype != given.dtype:
            return f"{prefix}{name}: {given.dtype}; this {layer.format} layer needs {mine.dtype}"
    return None
