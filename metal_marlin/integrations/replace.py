"""replace_linear_layers: a model's nn.Linear layers become QuantLinear."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import nn

from metal_marlin.errors import ArgumentError
from metal_marlin.formats import codec
from metal_marlin.nn.linear import QuantLinear
from metal_marlin.quant.layouts import unpack
from metal_marlin.quant.presets import preset as find_preset
from metal_marlin.quant.rtn import group_of
from metal_marlin.quant.tensor import QuantizedTensor

_ROWS = 1 << 22  # weights compared at a time


@dataclass(frozen=True)
class LayerReport:
    """A replaced layer. ``error``: ‖W − Ŵ‖ / ‖W‖."""

    name: str
    format: str
    group_size: int
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    error: float


@dataclass(frozen=True)
class Report:
    """What was replaced, and what was not and why. Bytes before count a weight shared with other layers, too."""

    layers: list[LayerReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def bytes_before(self) -> int:
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        return sum(layer.bytes_after for layer in self.layers)

    def __str__(self) -> str:
        lines = [
            f"{r.name}: {r.format} g{r.group_size}, {r.bits_per_weight:.2f} bits, {r.bytes_before:,} -> "
            f"{r.bytes_after:,} bytes, error {r.error:.4f}"
            for r in self.layers
        ]
        lines.append(f"{len(self.layers)} layers, {self.bytes_before:,} -> {self.bytes_after:,} bytes")
        return "\n".join(lines + [f"skipped {name}: {why}" for name, why in self.skipped.items()])


def matches(name: str, pattern: str) -> bool:
    """Whether a module's dotted name, or the end of it from a dot on, matches a glob; "re:…" is searched for."""
    if pattern.startswith("re:"):
        return re.search(pattern[3:], name) is not None
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def parse_spec(spec: str, K: int) -> tuple[str, int]:
    """Format and group size of "format", "format:group" or "format:K". Raises ArgumentError."""
    format, _, group = spec.partition(":")
    codec(format)
    if group and group != "K" and not group.isdigit():
        raise ArgumentError(f"{spec!r}: a layer is 'format', 'format:group' or 'format:K'")
    return format, group_of(format, (K if group == "K" else int(group)) if group else None)


def replace_linear_layers(
    model: nn.Module,
    format: str = "fp4",
    group_size: int | None = None,
    skip: Sequence[str] | None = None,
    per_layer: Mapping[str, str] | None = None,
    preset: str | None = None,
    scale: str = "rtn",
    progress: Callable[[int, int, str], None] | None = None,
) -> Report:
    """Replace the nn.Linear layers of ``model``, in place; each old weight is freed before the next is quantised.

    group_size: as in ``quantize``. skip: patterns of layers left alone; None: the preset's, or ("lm_head",) without
    one. per_layer: pattern -> "format", "format:group" or "format:K"; the first match counts, before the preset's.
    preset: a name of ``PRESETS``, in place of format and group_size. progress: called with (done, of, name).
    Patterns: globs of the dotted name or of its last parts ("v_proj", "layers.0.*"); "re:…" a regular expression.
    A weight shared with an embedding stays there as it is. Subclasses with a forward of their own, layers inside
    nn.MultiheadAttention (which reads their weights) and other modules with matrices are listed as skipped. Hooks of
    replaced layers go with them. A transformers model can be saved and loaded again afterwards, after ``register()``.
    Raises ArgumentError, before anything is replaced, where nothing would be, a ``per_layer`` pattern matches no layer
    or a format or group does not fit; a weight that is not finite is found on the way, and named.
    """
    chosen = find_preset(preset) if preset is not None else None
    skip = skip if skip is not None else chosen.skip if chosen is not None else ("lm_head",)
    linears, skipped = _linears(model, skip)
    given = dict(per_layer or {})
    for pattern in given:
        if not any(matches(name, pattern) for name in linears):
            raise ArgumentError(f"per_layer: {pattern!r} matches no linear layer")
    rules = {**given, **{p: s for p, s in (chosen.per_layer if chosen else {}).items() if p not in given}}
    base = (chosen.format, chosen.group_size) if chosen is not None else (format, group_size)
    for name, layer in linears.items():
        if layer.weight.is_meta or not layer.weight.is_floating_point():
            weight = layer.weight
            raise ArgumentError(f"{name}: weight is {weight.dtype} on {weight.device}; load the model first")
    specs = {name: _spec(name, layer, rules, base) for name, layer in linears.items()}
    if not specs:
        ours = sum(isinstance(module, QuantLinear) for module in model.modules())
        raise ArgumentError(
            f"model: its {ours} linear layers are quantised already"
            if ours
            else f"model: nothing to replace; skipped: {skipped or 'nothing'}"
        )
    report = Report(skipped=skipped)
    aliases: dict[int, list[str]] = {}
    for name, layer in linears.items():
        aliases.setdefault(id(layer), []).append(name)
    del layer
    linears.clear()  # a layer must not outlive its replacement
    for done, names in enumerate(aliases.values()):
        report.layers.append(_replace(model, names, *specs[names[0]], scale))
        if progress is not None:
            progress(done + 1, len(aliases), names[0])
    _tell_transformers(model)
    return report


def _tell_transformers(model: nn.Module) -> None:
    """So that ``save_pretrained`` writes what ``from_pretrained`` reads."""
    library = sys.modules.get("transformers")
    if library is not None and isinstance(model, library.PreTrainedModel):
        from metal_marlin.integrations.transformers.quantizer import attach

        attach(model)


def layer_specs(
    model: nn.Module, format: str, group_size: int | None, skip: Sequence[str], per_layer: Mapping[str, str]
) -> dict[str, tuple[str, int]]:
    """Format and group size of each layer that ``replace_linear_layers`` would replace; weights may be on meta."""
    linears, _ = _linears(model, skip)
    return {name: _spec(name, layer, per_layer, (format, group_size)) for name, layer in linears.items()}


def dequantize_linear_layers(model: nn.Module, dtype: torch.dtype = torch.float32) -> int:
    """Replace every QuantLinear of ``model`` by an nn.Linear with the decoded weights in ``dtype``; returns how many.

    What comes out computes in torch what the codes say: the yardstick for our kernels.
    """
    layers = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, QuantLinear)]
    made: dict[int, nn.Linear] = {}
    for name, layer in layers:
        if id(layer) not in made:
            weight, bias = unpack(layer.quantized()).dequantize(dtype), layer.bias
            plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
            plain.weight = nn.Parameter(weight, requires_grad=False)
            if isinstance(bias, torch.Tensor):
                plain.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
            made[id(layer)] = plain.train(layer.training)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, made[id(layer)])
    if made:
        _tell_transformers(model)
    return len(made)


def _linears(model: nn.Module, skip: Sequence[str]) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """Layers to replace by name, and of others with matrices why not."""
    found: dict[str, nn.Linear] = {}
    skipped: dict[str, str] = {}
    inside = tuple(n + "." for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention))
    for name, module in model.named_modules(remove_duplicate=False):
        if not name or isinstance(module, QuantLinear):
            continue
        if isinstance(module, nn.Linear):
            if any(matches(name, pattern) for pattern in skip):
                skipped[name] = "skip"
            elif type(module).forward is not nn.Linear.forward:
                skipped[name] = f"{type(module).__name__} has a forward of its own"
            elif inside and name.startswith(inside):
                skipped[name] = "MultiheadAttention reads its weight"
            else:
                found[name] = module
        elif any(p.ndim >= 2 for p in module.parameters(recurse=False)):
            skipped[name] = f"{type(module).__name__} is not a linear layer"
    return found, skipped


def _spec(name: str, layer: nn.Linear, rules: Mapping[str, str], base: tuple[str, int | None]) -> tuple[str, int]:
    """Format and group size of a layer. Raises ArgumentError naming it where they do not fit."""
    rule = next((spec for pattern, spec in rules.items() if matches(name, pattern)), None)
    try:
        K = layer.in_features
        format, group = parse_spec(rule, K) if rule is not None else (base[0], group_of(*base))
        padded = K + -K % codec(format).unit
        codec(format).check(padded, padded if group == K else group)
    except ArgumentError as error:
        raise ArgumentError(f"{name}: {error}") from None
    return format, group


def _replace(model: nn.Module, names: Sequence[str], format: str, group: int, scale: str) -> LayerReport:
    old = model.get_submodule(names[0])
    assert isinstance(old, nn.Linear)
    try:
        new = QuantLinear.from_linear(old, format, group, scale)
    except ArgumentError as error:
        raise ArgumentError(f"{names[0]}: {error}") from None
    weight = new.quantized()
    report = LayerReport(
        names[0],
        format,
        weight.group_size,
        weight.bits_per_weight,
        old.weight.numel() * old.weight.element_size(),
        weight.nbytes,
        relative_error(old.weight.detach(), weight),
    )
    for name in names:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, new)
    return report


def relative_error(weight: torch.Tensor, quantized: QuantizedTensor) -> float:
    """‖W − Ŵ‖ / ‖W‖ in the Frobenius norm; 0 for a weight of zeros kept as such."""
    wrong = whole = 0.0
    step = max(1, _ROWS // max(1, weight.shape[1]))
    for first in range(0, weight.shape[0], step):
        exact = weight[first : first + step].float()
        wrong += float((exact - quantized[first : first + step].dequantize(torch.float32)).square().sum())
        whole += float(exact.square().sum())
    return (wrong / whole) ** 0.5 if whole else float(wrong > 0)
