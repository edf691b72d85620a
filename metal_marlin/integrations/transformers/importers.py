"""import_checkpoint: quantised checkpoints of other libraries, their codes kept, for our kernels.

Layouts, each by the rules its library publishes:
  mlx               MLX affine: weight uint32 [N, K·bits/32], scales and biases [N, K/g]; w = q · scale + bias
  pack-quantized    compressed-tensors: weight_packed int32, codes offset by half their range, weight_scale [N, K/g],
                    weight_zero_point packed along N
  nvfp4-pack-quantized  weight_packed uint8 [N, K/2], weight_scale E4M3 [N, K/16], weight_global_scale, a divisor
  mxfp4             weight_blocks uint8 [N, K/32, 16] and weight_scales uint8 [N, K/32], or weight_packed, weight_scale
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.formats import codec
from metal_marlin.integrations.transformers.config import METHOD, write_spec
from metal_marlin.quant.tensor import QuantizedTensor

_SHARD = 2 << 30  # bytes of a file
_EMBEDDING = ("embed_tokens", "wte", "word_embeddings")


@dataclass
class Imported:
    """Layers by name with their format, and tensors that were copied as they are."""

    layout: str
    layers: dict[str, str] = field(default_factory=dict)
    copied: int = 0


class _Tensors:
    """The tensors of a folder's safetensors files, read one by one."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ArgumentError(f"{folder}: holds no safetensors files")
        self._open: list[Any] = [safe_open(str(file), framework="pt") for file in files]
        self._home = {name: handle for handle in self._open for name in handle.keys()}  # noqa: SIM118
        self.left = set(self._home)

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def take(self, name: str) -> torch.Tensor:
        """A tensor that has now been dealt with. Raises ArgumentError where there is none."""
        if name not in self._home:
            raise ArgumentError(f"{name}: missing in the safetensors files")
        self.left.discard(name)
        return self._home[name].get_tensor(name)


def import_checkpoint(source: str | Path, target: str | Path) -> Imported:
    """Write ``source`` anew as a checkpoint of ours, without requantising; ``from_pretrained(target)`` loads it.

    source: a folder with config.json and safetensors files of one of the layouts above. target: a folder that does not
    exist yet; it appears when it is complete. Tokenizer and other files are copied. Raises ArgumentError for layouts,
    bit widths and tensors that have no counterpart here (reordered groups, experts), naming them.
    """
    source, target = Path(source), Path(target)
    if target.exists():
        raise ArgumentError(f"target: {target} exists")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    layout, settings = _layout(config)
    tensors, found = _Tensors(source), Imported(layout)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as made:
        folder = Path(made) / "model"
        folder.mkdir()
        _write(_converted(tensors, layout, settings, found), folder)
        for file in source.iterdir():
            if file.is_file() and file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
                shutil.copy2(file, folder)
        config.pop("quantization", None)
        if "lm_head" in found.layers:  # it has a weight of its own now
            config["tie_word_embeddings"] = False
        config["quantization_config"] = {"quant_method": METHOD, "layers": found.layers}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        folder.rename(target)
    return found


def _layout(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and settings of the layout that a config.json declares. Raises ArgumentError."""
    if "quantization" in config:
        return "mlx", dict(config["quantization"])
    said = config.get("quantization_config") or {}
    method = said.get("quant_method")
    if method == "compressed-tensors":
        kind = said.get("format")
        if kind in ("pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized"):
            return kind.replace("mxfp4-pack-quantized", "mxfp4"), said
        raise ArgumentError(f"config.json: compressed-tensors format {kind!r} has no counterpart here")
    if method == "mxfp4":
        return "mxfp4", said
    if method is None and "bits" in said and "group_size" in said:
        return "mlx", said
    raise ArgumentError(f"config.json: quantization {method!r} is none of mlx, compressed-tensors, mxfp4")


# A layout: names beside <layer>. that mark a quantised layer, and what makes our tensor of them.
_Read = Callable[[_Tensors, str, dict[str, Any]], QuantizedTensor]


def _converted(
    tensors: _Tensors, layout: str, settings: dict[str, Any], found: Imported
) -> Iterator[tuple[str, torch.Tensor]]:
    marks = {"mlx": (".scales",), "mxfp4": (".weight_blocks", ".weight_packed")}.get(layout, (".weight_packed",))
    read: _Read = {
        "mlx": _mlx,
        "pack-quantized": _packed,
        "nvfp4-pack-quantized": _nvfp4,
        "mxfp4": _mxfp4,
    }[layout]
    names = sorted(tensors.left)
    for mark in marks:
        for name in [n for n in names if n.endswith(mark)]:
            layer = name.removesuffix(mark)
            weight = read(tensors, layer, settings)
            if layer.rpartition(".")[2] in _EMBEDDING:  # looked up, not multiplied
                yield f"{layer}.weight", weight.dequantize(weight.scales.dtype)
                continue
            found.layers[layer] = write_spec(weight.format, weight.group_size, weight.zeros, weight.scales.dtype)
            yield from weight.tensors(f"{layer}.").items()
    for name in sorted(tensors.left):
        experts = name.endswith(("_blocks", "_scales")) and f"{name.rpartition('_')[0]}_blocks" in tensors
        if experts or name.endswith((".weight_g_idx", ".g_idx")):
            raise ArgumentError(f"{name}: experts and reordered groups have no counterpart here yet")
        found.copied += 1
        yield name, tensors.take(name)
    if not found.layers:
        raise ArgumentError(f"no layer of layout {layout} in the safetensors files")


def _made(
    codes: torch.Tensor,
    scales: torch.Tensor,
    extra: torch.Tensor | None,
    format: str,
    zeros: str,
    where: str,
    K: int | None = None,
    said: Any = None,
) -> QuantizedTensor:
    """K: the logical one, None where codes hold no more. said: the group size of the checkpoint's config, if any."""
    if scales.ndim != 2 or scales.shape[0] != codes.shape[0]:
        raise ArgumentError(f"{where}: scales of shape {tuple(scales.shape)}; {codes.shape[0]} rows need [N, groups]")
    padded = codec(format).columns(codes.shape[1])
    K = padded if K is None else K
    groups = int(scales.shape[1])
    group, rest = (padded, 0) if groups == 1 else divmod(K, groups)
    if isinstance(said, int) and said > 0 and -(-K // said) == groups:
        group, rest = (padded if groups == 1 else said), 0
    if rest:
        raise ArgumentError(f"{where}: {groups} groups do not divide K = {K}, and its group size is not said")
    try:
        return QuantizedTensor(codes, scales, extra, format, group, zeros, (codes.shape[0], K))
    except ArgumentError as error:
        raise ArgumentError(f"{where}: {error}") from None


def _mlx(tensors: _Tensors, layer: str, settings: dict[str, Any]) -> QuantizedTensor:
    own = settings.get(layer)
    own = own if isinstance(own, dict) else settings
    bits, mode = int(own.get("bits", 4)), own.get("mode", "affine")
    if mode != "affine":
        raise ArgumentError(f"{layer}: MLX mode {mode!r} has no counterpart here; affine has")
    formats = {4: "int4", 8: "uint8"}
    if bits not in formats:
        raise ArgumentError(f"{layer}: {bits} bits; MLX checkpoints of 4 and 8 bits have a counterpart here")
    codes = tensors.take(f"{layer}.weight").view(torch.int32)
    scales, biases = (tensors.take(f"{layer}.{name}") for name in ("scales", "biases"))
    return _made(codes, scales, biases, formats[bits], "bias", layer)


def _packed(tensors: _Tensors, layer: str, settings: dict[str, Any]) -> QuantizedTensor:
    if f"{layer}.weight_g_idx" in tensors:
        raise ArgumentError(f"{layer}.weight_g_idx: reordered groups have no counterpart here")
    codes, scales = tensors.take(f"{layer}.weight_packed"), tensors.take(f"{layer}.weight_scale")
    N, K = (int(n) for n in tensors.take(f"{layer}.weight_shape"))
    bits = next((b for b in (4, 8) if codes.shape[1] == -(-K * b // 32)), 0)
    if not bits:
        raise ArgumentError(f"{layer}: {codes.shape[1]} words for K = {K}; 4 and 8 bits have a counterpart here")
    schemes = [scheme.get("weights") or {} for scheme in (settings.get("config_groups") or {}).values()]
    said = next((s.get("group_size") for s in schemes if s.get("num_bits", bits) == bits), None)
    name = f"{layer}.weight_zero_point"
    form = codec("int4" if bits == 4 else "uint8")
    if name in tensors:  # packed along N
        points = tensors.take(name)
        if points.dtype != torch.int32 or points.ndim != 2:
            raise ArgumentError(f"{name}: {points.dtype} {tuple(points.shape)}; needs int32 [N / {form.unit}, groups]")
        by_group = form.unpack(points.T.contiguous())[:, :N].T
        padding = -by_group.shape[1] % form.unit
        zeros = form.pack(torch.nn.functional.pad(by_group, (0, padding)))
        return _made(codes, scales, zeros, form.name, "packed", layer, K, said)
    if bits == 4:
        return _made(codes, scales, None, "int4", "none", layer, K, said)
    flipped = codes ^ torch.tensor(-0x7F7F7F80, dtype=torch.int32)  # offset 128 is two's complement's first bit
    return _made(flipped, scales, None, "int8", "none", layer, K, said)


def _nvfp4(tensors: _Tensors, layer: str, settings: dict[str, Any]) -> QuantizedTensor:
    codes = tensors.take(f"{layer}.weight_packed").contiguous().view(torch.int32)
    scales = tensors.take(f"{layer}.weight_scale").view(torch.uint8)
    total = 1 / tensors.take(f"{layer}.weight_global_scale").float().reshape(1)
    if f"{layer}.input_global_scale" in tensors:  # of activations, which stay as they are here
        tensors.take(f"{layer}.input_global_scale")
    return _made(codes, scales, total, "nvfp4", "none", layer)


def _mxfp4(tensors: _Tensors, layer: str, settings: dict[str, Any]) -> QuantizedTensor:
    blocked = f"{layer}.weight_blocks" in tensors
    codes = tensors.take(f"{layer}.weight_blocks" if blocked else f"{layer}.weight_packed")
    scales = tensors.take(f"{layer}.weight_scales" if blocked else f"{layer}.weight_scale")
    if codes.ndim != (3 if blocked else 2):
        raise ArgumentError(
            f"{layer}: codes of shape {tuple(codes.shape)}; linear layers alone have a counterpart here"
        )
    words = codes.flatten(1).contiguous().view(torch.int32)
    return _made(words, scales.view(torch.uint8), None, "mxfp4", "none", layer)


def _write(tensors: Iterator[tuple[str, torch.Tensor]], folder: Path) -> None:
    """Safetensors files of about _SHARD bytes, with an index where there are several."""
    from safetensors.torch import save_file

    parts: list[dict[str, torch.Tensor]] = [{}]
    files: dict[str, str] = {}
    size = 0

    def flush() -> None:
        name = f"model-{len(set(files.values())) + 1:05d}.safetensors"
        save_file(parts[0], folder / name, metadata={"format": "pt"})
        files.update(dict.fromkeys(parts[0], name))
        parts[0] = {}

    for name, tensor in tensors:
        if parts[0] and size + tensor.nbytes > _SHARD:
            flush()
            size = 0
        parts[0][name] = tensor.contiguous()
        size += tensor.nbytes
    flush()
    if len(set(files.values())) == 1:
        (folder / next(iter(files.values()))).rename(folder / "model.safetensors")
        return
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
