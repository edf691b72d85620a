"""MetalMarlinConfig: what a model's ``quantization_config`` says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from metal_marlin.errors import ArgumentError
from metal_marlin.formats import codec
from metal_marlin.integrations.replace import parse_spec
from metal_marlin.quant.presets import preset as find_preset

METHOD = "metal_marlin"
_DTYPES = {"half": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "u8": torch.uint8}


def write_spec(format: str, group_size: int, zeros: str, scale_dtype: torch.dtype) -> str:
    """A layer of an imported checkpoint, as the config's ``layers`` says it: "int4:64:bias:bf16"."""
    return f"{format}:{group_size}:{zeros}:{next(k for k, d in _DTYPES.items() if d == scale_dtype)}"


def read_spec(spec: str) -> tuple[str, int, str, torch.dtype]:
    """Format, group size, zeros and dtype of the scales. Raises ArgumentError."""
    parts = spec.split(":")
    if len(parts) != 4 or not parts[1].isdigit() or parts[3] not in _DTYPES:
        raise ArgumentError(f"layers: {spec!r} is not format:group:zeros:dtype with dtype one of {', '.join(_DTYPES)}")
    return parts[0], int(parts[1]), parts[2], _DTYPES[parts[3]]


def _pairs(per_layer: Mapping[str, str] | Sequence[Sequence[str]] | None) -> list[tuple[str, str]]:
    pairs = per_layer.items() if isinstance(per_layer, Mapping) else per_layer or []
    return [(pattern, spec) for pattern, spec in pairs]


class MetalMarlinConfig(QuantizationConfigMixin):
    """How linear layers are quantised; arguments as ``replace_linear_layers``.

    preset: a name of ``PRESETS``, resolved at once: the file holds format, group_size, per_layer (pairs, the first that
    matches counts, the caller's before the preset's) and skip.
    dequantize: load a checkpoint of ours as a plain model in its dtype. fuse: see ``fusion.fuse``; prepack: put weights
    in the order that the device reads fastest (``nn.prepack.prepack_layers``); both only about running.
    Raises ArgumentError for unknown formats and presets.
    """

    def __init__(
        self,
        format: str = "fp4",
        group_size: int | None = None,
        per_layer: Mapping[str, str] | Sequence[Sequence[str]] | None = None,
        skip: list[str] | None = None,
        scale: str = "rtn",
        preset: str | None = None,
        dequantize: bool = False,
        fuse: bool = True,
        prepack: bool = True,
        **kwargs: Any,
    ) -> None:
        self.quant_method = METHOD
        self.format, self.group_size, self.scale = format, group_size, scale
        self.per_layer, self.skip = dict(_pairs(per_layer)), list(("lm_head",) if skip is None else skip)
        self.given = tuple(self.per_layer) if preset is not None or kwargs.get("quant_method") is None else ()
        self.dequantize, self.fuse, self.prepack = dequantize, fuse, prepack
        # a checkpoint of another kind, whose layers say themselves what they hold; see importers.py
        self.layers: dict[str, str] = dict(kwargs.get("layers") or {})
        if preset is not None:
            chosen = find_preset(preset)
            self.format, self.group_size = chosen.format, chosen.group_size
            self.per_layer |= {p: spec for p, spec in chosen.per_layer.items() if p not in self.per_layer}
            self.skip = list(chosen.skip if skip is None else skip)
        codec(self.format)
        for spec in self.per_layer.values():
            parse_spec(spec, 128)
        if scale not in ("rtn", "mse"):
            raise ArgumentError(f"scale = {scale!r}; it is 'rtn' or 'mse'")

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        kept = ("quant_method", "format", "group_size", "per_layer", "skip", "scale", "layers")
        return {name: getattr(self, name) for name in kept} | {
            "per_layer": [list(pair) for pair in self.per_layer.items()]  # config.json sorts what has names
        }

    def get_loading_attributes(self) -> dict[str, Any]:
        """What the caller of from_pretrained decides for a checkpoint that has a config of its own."""
        return {"dequantize": self.dequantize, "fuse": self.fuse, "prepack": self.prepack}
