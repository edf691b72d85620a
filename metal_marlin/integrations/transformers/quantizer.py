"""The quantizer behind quant_method "metal_marlin": quantises while loading, saves, reloads the same bits."""

from __future__ import annotations

from typing import Any

import torch
import transformers.quantizers.auto as auto
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.base import HfQuantizer

from metal_marlin.errors import ArgumentError
from metal_marlin.integrations.replace import dequantize_linear_layers, layer_specs, matches
from metal_marlin.integrations.transformers.config import METHOD, MetalMarlinConfig, read_spec, write_spec
from metal_marlin.integrations.transformers.fusion import fuse
from metal_marlin.nn.linear import QuantLinear
from metal_marlin.nn.prepack import prepack_layers
from metal_marlin.quant.rtn import quantize
from metal_marlin.quant.tensor import NAMES, empty


def install() -> None:
    """Register with transformers; ``register()`` of this package calls it once."""
    auto.register_quantization_config(METHOD)(MetalMarlinConfig)
    auto.register_quantizer(METHOD)(MetalMarlinQuantizer)
    # or what the caller says of a checkpoint with a config of its own is dropped
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (MetalMarlinConfig,)


class MetalMarlinQuantizer(HfQuantizer):
    """Swaps linear layers for QuantLinear before weights arrive; quantises each weight as it does."""

    requires_calibration = False
    _tied: dict[str, tuple[str, int]]

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        places = kwargs.get("device_map")
        if (
            isinstance(places, dict)
            and not self.pre_quantized
            and {"disk", "cpu"} & set(places.values())
            and len(set(places.values())) > 1
        ):
            raise ArgumentError(f"device_map = {places}; layers are quantised on one device, without offloading")

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        config = self.quantization_config
        self._tied = {}
        if config.layers:  # an imported checkpoint
            for name, spec in config.layers.items():
                _swap(model, name, *read_spec(spec))
            return model
        specs = layer_specs(model, config.format, config.group_size, config.skip, config.per_layer)
        for pattern in config.given:
            if not any(matches(name, pattern) for name in specs):
                raise ArgumentError(f"per_layer: {pattern!r} matches no linear layer")
        tied = _tied_layers(model)
        for name, (format, group) in specs.items():
            if name in tied and not self.pre_quantized:  # its weight is the embedding's, which stays: after loading
                self._tied[name] = (format, group)
                continue
            _swap(model, name, format, group)
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        name, _, last = param_name.rpartition(".")
        return last == "weight" and not self.pre_quantized and isinstance(model.get_submodule(name), QuantLinear)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self.quantization_config.scale)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> nn.Module:
        config = self.quantization_config
        for name, (format, group) in self._tied.items():
            head = model.get_submodule(name)
            assert isinstance(head, nn.Linear)
            model.set_submodule(name, QuantLinear.from_linear(head, format, group, config.scale))
            untie(model)
        if config.dequantize and self.pre_quantized:
            dequantize_linear_layers(model, model.dtype)
        elif not _has_offloads(kwargs.get("device_map") or getattr(model, "hf_device_map", None)):
            if config.fuse:
                fuse(model)
            if config.prepack:
                prepack_layers(model, model.dtype)
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        said = str(dtype or torch.float32).removeprefix("torch.")  # a config may hold its name
        dequantize_linear_layers(model, getattr(torch, said))
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _has_offloads(device_map: Any) -> bool:
    """Whether weights wait elsewhere until they are used."""
    places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else set()
    return "disk" in places or ("cpu" in places and len(places) > 1)


def attach(model: Any) -> None:
    """Give a transformers model whose layers were replaced what ``save_pretrained`` and a later load need; take it from
    one that has no layers of ours."""
    layers = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, QuantLinear)}
    if not layers:
        model.hf_quantizer = None
        model.config.__dict__.pop("quantization_config", None)
        return
    config = MetalMarlinConfig(
        layers={n: write_spec(m.format, m.group_size, m.zeros, m.weight_scale.dtype) for n, m in layers.items()}
    )
    if any(name in layers for name in _tied_layers(model)):
        untie(model)
    model.hf_quantizer = MetalMarlinQuantizer(config, pre_quantized=True)
    model.config.quantization_config = config


def _swap(
    model: Any,
    name: str,
    format: str,
    group_size: int,
    zeros: str | None = None,
    scale_dtype: torch.dtype = torch.float16,
) -> None:
    """An empty QuantLinear in place of a linear layer. Raises ArgumentError where there is none."""
    old: Any = model.get_submodule(name)
    if not isinstance(old, nn.Linear):
        raise ArgumentError(
            f"{name}: the checkpoint holds a quantised linear layer, the model has {type(old).__name__}"
        )
    weight = empty((old.out_features, old.in_features), format, group_size, scale_dtype, "meta", zeros)
    bias = None if old.bias is None else torch.empty_like(old.bias, device="meta")
    model.set_submodule(name, QuantLinear(weight, bias))


class _Quantize(ConversionOps):
    """One weight as it is loaded -> codes, scales, extra under the names of QuantLinear's buffers."""

    def __init__(self, scale: str) -> None:
        self.scale = scale

    def convert(
        self, input_dict: dict[str, Any], *args: Any, full_layer_name: str, model: nn.Module, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        prefix = full_layer_name.rpartition(".")[0]
        layer = model.get_submodule(prefix)
        assert isinstance(layer, QuantLinear)
        try:
            found = quantize(weight, layer.format, layer.group_size, self.scale)
        except ArgumentError as error:
            raise ArgumentError(f"{prefix}: {error}") from None
        missing = kwargs.get("missing_keys")
        made = {f"{prefix}.{name}": getattr(found, field) for field, name in NAMES.items()}
        if missing is not None:
            missing -= set(made)
        return {name: tensor for name, tensor in made.items() if tensor is not None}


def _tied_layers(model: nn.Module) -> set[str]:
    """Names of linear layers whose weight is that of an embedding."""
    config = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return set()
    keys = getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or {}
    return {key.removesuffix(".weight") for key in keys}


def untie(model: nn.Module) -> None:
    """The quantised head has a weight of its own: nothing may put the embedding's in its place again."""
    model.config.tie_word_embeddings = False  # type: ignore[union-attr]
    for name in ("all_tied_weights_keys", "_tied_weights_keys"):
        if getattr(model, name, None):
            setattr(model, name, {})
