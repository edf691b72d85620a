"""QuantizedTensor: a quantised weight matrix and what is needed to read it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.files import whole_file
from metal_marlin.formats import CANONICAL, codec, operands
from metal_marlin.ops import dequantize as _kernels
from metal_marlin.ops.weights import KEYS

FORMAT_VERSION = 1
NAMES = {"codes": "weight", "scales": "weight_scale", "extra": "weight_extra"}  # field -> name in state dicts and files
_HEADER = "metal_marlin"
_BLOCK = 1 << 22  # weights whose float64 copies exist at a time


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """W [N, K] as codes int32 [N, words], scales and extra (see ``metal_marlin.formats``).

    ``shape`` is logical: codes may hold a few more columns (zeros) where K does not fill a word. ``layout``: order of
    the tensors (quant/layouts.py), ``powers`` what a layout adds to them. Raises ArgumentError for tensors that do not
    belong together.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    extra: torch.Tensor | None
    format: str
    group_size: int
    zeros: str
    shape: tuple[int, int]
    layout: str = CANONICAL
    powers: torch.Tensor | None = None

    def __post_init__(self) -> None:
        form, (N, K) = codec(self.format), self.shape
        words = form.words(K)
        if self.codes.dtype != torch.int32 or self.codes.shape != (N, words):
            raise ArgumentError(
                f"codes: {self.codes.dtype} {tuple(self.codes.shape)}; {self.format} of {(N, K)} needs "
                f"torch.int32 {(N, words)}"
            )
        form.check(self.padded, self.group_size)
        form.check_zeros(self.zeros)
        groups = form.groups_of(self.padded, self.group_size)
        form.check_tensors(N, groups, self.scales, self.extra, self.kernel_zeros)
        places = {str(t.device) for t in self._present().values()}
        if len(places) > 1:
            raise ArgumentError(f"codes, scales and extra are on {', '.join(sorted(places))}; they need one device")

    @property
    def padded(self) -> int:
        """Columns that the codes hold: K rounded up to what fills whole words."""
        return codec(self.format).columns(int(self.codes.shape[1]))

    @property
    def kernel_zeros(self) -> str:
        """What kernels find in ``extra``: layouts have a number for each packed zero."""
        return self.zeros if self.layout == CANONICAL else operands.kernel_zeros(self.zeros)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and extra."""
        return sum(t.numel() * t.element_size() for t in self._present().values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a logical weight; 0 for an empty matrix."""
        return 8 * self.nbytes / max(1, self.shape[0] * self.shape[1])

    def __repr__(self) -> str:
        zeros = "" if self.zeros == "none" else f", zeros={self.zeros!r}"
        layout = "" if self.layout == CANONICAL else f", layout={self.layout!r}"
        return (
            f"QuantizedTensor({self.format}, group_size={self.group_size}{zeros}, shape={self.shape}, "
            f"scales={self.scales.dtype}, {self.bits_per_weight:.2f} bits a weight, {self.nbytes:,} bytes, "
            f"device={str(self.device)!r}{layout})"
        )

    def _present(self) -> dict[str, torch.Tensor]:
        fields = {"codes": self.codes, "scales": self.scales, "extra": self.extra, "powers": self.powers}
        return {name: t for name, t in fields.items() if t is not None}

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """On another device; dtypes never change, and self comes back where nothing moves."""
        moved = {name: t.to(device=torch.device(device)) for name, t in self._present().items()}
        if all(moved[name] is t for name, t in self._present().items()):
            return self
        return replace(self, **moved)  # type: ignore[arg-type]

    def canonical(self, purpose: str) -> None:
        """Raise ArgumentError unless the code words are in canonical order."""
        if self.layout != CANONICAL:
            raise ArgumentError(f"layout = {self.layout!r}; {purpose} needs {CANONICAL!r}: unpack() the tensor first")

    def dequantize(self, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        """The weights [N, K] in ``dtype``, each rounded once: by our kernels on a GPU, by torch, without a compiler
        and in float64 too, on the CPU."""
        self.canonical("dequantize")
        N, K = self.shape
        if self.device.type != "cpu" and dtype in KEYS:
            whole = _kernels.dequantize(
                self.codes,
                self.scales,
                self.group_size,
                format=self.format,
                zeros=self.zeros,
                extra=self.extra,
                dtype=dtype,
            )
            return whole[:, :K]
        form, out = codec(self.format), torch.empty(N, K, dtype=dtype, device=self.device)
        step = max(1, _BLOCK // self.padded)
        for first in range(0, N, step):
            part = self[first : first + step]
            decoded = form.decode(part.codes, part.scales, part.extra, self.group_size, self.zeros, dtype)
            out[first : first + step] = decoded[:, :K]
        return out

    def __getitem__(self, rows: slice) -> QuantizedTensor:
        """Rows a:b of N, as views. Raises ArgumentError for anything but a slice of step 1, of a layout's strips."""
        if not isinstance(rows, slice) or rows.step not in (None, 1):
            raise ArgumentError(f"index {rows!r}; a QuantizedTensor takes [a:b], rows of N with step 1")
        first, last, _ = rows.indices(self.shape[0])
        if first % 16 or last % 16:  # a strip of layouts is in one piece
            self.canonical("slicing")
        last = max(first, last)
        whole = self.extra is None or codec(self.format).scale_kind == "e4m3"  # one scale of the whole tensor
        extra = self.extra if whole else self.extra[first:last]  # type: ignore[index]
        return replace(
            self,
            codes=self.codes[first:last],
            scales=self.scales[first:last],
            extra=extra,
            shape=(last - first, self.shape[1]),
            powers=None if self.powers is None else self.powers[first:last],
        )

    def equal(self, other: QuantizedTensor) -> bool:
        """Same metadata and the same bits."""
        if self.metadata() != other.metadata() or (self.extra is None) != (other.extra is None):
            return False
        mine, theirs = self._present(), other._present()
        return all(
            t.dtype == theirs[name].dtype
            and torch.equal(t.contiguous().view(torch.uint8).cpu(), theirs[name].contiguous().view(torch.uint8).cpu())
            for name, t in mine.items()
        )

    def metadata(self) -> dict[str, Any]:
        """What the tensors do not say, for JSON."""
        return {
            "format_version": FORMAT_VERSION,
            "format": self.format,
            "group_size": self.group_size,
            "zeros": self.zeros,
            "shape": list(self.shape),
            "layout": self.layout,
        }

    def tensors(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """Tensors by name: ``prefix`` and weight, weight_scale, weight_extra: names of QuantLinear's state dict."""
        self.canonical("a file")
        return {prefix + NAMES[name]: t for name, t in self._present().items()}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any], prefix: str = ""
    ) -> QuantizedTensor:
        """What ``tensors`` and ``metadata`` gave. Raises ArgumentError naming what is missing or does not fit."""
        version = metadata.get("format_version")
        if version != FORMAT_VERSION:
            raise ArgumentError(f"format_version = {version!r}; this version reads {FORMAT_VERSION}")
        missing = [k for k in ("format", "group_size", "zeros", "shape", "layout") if k not in metadata]
        missing += [prefix + NAMES[k] for k in ("codes", "scales") if prefix + NAMES[k] not in tensors]
        if missing:
            raise ArgumentError(f"missing: {', '.join(missing)}")
        if metadata["layout"] != CANONICAL:
            raise ArgumentError(f"layout = {metadata['layout']!r}; files hold {CANONICAL!r}")
        found = {field: tensors.get(prefix + name) for field, name in NAMES.items()}
        N, K = metadata["shape"]
        return cls(
            **found,  # type: ignore[arg-type]
            format=metadata["format"],
            group_size=metadata["group_size"],
            zeros=metadata["zeros"],
            shape=(N, K),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; a reader sees the old file or the whole new one."""
        save_file = _safetensors().torch.save_file
        self.canonical("a file")
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.tensors().items()}
        with whole_file(path) as file:
            save_file(tensors, str(file), metadata={_HEADER: json.dumps(self.metadata())})

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> QuantizedTensor:
        """Read what ``save`` wrote. Raises ArgumentError naming the file and what is missing or does not fit."""
        with _safetensors().safe_open(str(path), framework="pt", device=str(device)) as file:
            header = (file.metadata() or {}).get(_HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        if header is None:
            raise ArgumentError(f"{path}: its header has no {_HEADER!r}; not a saved QuantizedTensor")
        try:
            return cls.from_tensors(tensors, json.loads(header))
        except ArgumentError as error:
            raise ArgumentError(f"{path}: {error}") from None


def empty(
    shape: tuple[int, int],
    format: str,
    group_size: int,
    scale_dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cpu",
    zeros: str | None = None,
) -> QuantizedTensor:
    """A tensor to be filled: shape (N, K) and everything that follows from it. Raises ArgumentError."""
    form, (N, K) = codec(format), shape
    words = form.words(K)
    kind = form.zero_kinds[0] if zeros is None else zeros
    groups = form.groups_of(form.columns(words), group_size)
    dtype = scale_dtype if form.scale_kind == "float" else torch.uint8
    more = form.extra_shape(N, groups, kind)
    return QuantizedTensor(
        torch.empty(N, words, dtype=torch.int32, device=device),
        torch.empty(N, groups, dtype=dtype, device=device),
        None if more is None else torch.empty(more, dtype=form.extra_dtype(dtype, kind), device=device),
        format,
        group_size,
        kind,
        shape,
    )


def cat(parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """One tensor of all rows. Raises ArgumentError unless format, group size, zeros, K, dtypes and any scale of the
    whole tensor agree."""
    if not parts:
        raise ArgumentError("cat: no tensors")
    first = parts[0]
    for i, part in enumerate(parts):
        part.canonical("cat")
        for name in ("format", "group_size", "zeros"):
            mine, theirs = getattr(first, name), getattr(part, name)
            if mine != theirs:
                raise ArgumentError(f"cat: tensor {i} has {name} {theirs!r}, tensor 0 has {mine!r}")
        if part.shape[1] != first.shape[1] or part.scales.dtype != first.scales.dtype:
            raise ArgumentError(
                f"cat: tensor {i} has K = {part.shape[1]} and {part.scales.dtype} scales, "
                f"tensor 0 K = {first.shape[1]} and {first.scales.dtype}"
            )
    extra = first.extra
    if extra is not None and codec(first.format).scale_kind == "e4m3":
        for i, part in enumerate(parts):
            if part.extra is None or not torch.equal(part.extra, extra):
                raise ArgumentError(f"cat: tensor {i} has another scale of the whole tensor than tensor 0")
    elif extra is not None:
        extra = torch.cat([p.extra for p in parts if p.extra is not None])
    return replace(
        first,
        codes=torch.cat([p.codes for p in parts]),
        scales=torch.cat([p.scales for p in parts]),
        extra=extra,
        shape=(sum(p.shape[0] for p in parts), first.shape[1]),
    )


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise ArgumentError("saving and loading need safetensors: pip install 'metal-marlin[transformers]'") from None
    return safetensors
