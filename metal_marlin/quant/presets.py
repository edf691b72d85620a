"""Presets: which layers of a model take which format."""

from __future__ import annotations

from dataclasses import dataclass, field

from metal_marlin.errors import ArgumentError


@dataclass(frozen=True)
class Preset:
    """``format`` and ``group_size`` (None: the format's usual one) of every linear layer, but for ``per_layer``
    (pattern -> "format" or "format:group") and ``skip`` (patterns, left alone). Patterns: ``replace_linear_layers``."""

    format: str
    group_size: int | None = None
    per_layer: dict[str, str] = field(default_factory=dict)
    skip: tuple[str, ...] = ()


PRESETS: dict[str, Preset] = {
    "fp4": Preset("fp4", 64, {"lm_head": "int8:64"}),
    "int8": Preset("int8", 64),
    "default": Preset("fp4", 64, {"down_proj": "int8:64", "v_proj": "int8:64", "lm_head": "int8:64"}),
}


def preset(name: str) -> Preset:
    """The preset of that name. Raises ArgumentError with the known names."""
    if name not in PRESETS:
        raise ArgumentError(f"preset = {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
