"""SparseTensor: an n:m sparse quantised weight matrix, of which the kept weights are stored."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.formats import CANONICAL, MMA16, codec, operands, sparse
from metal_marlin.formats.sparse import pattern
from metal_marlin.quant.rtn import quantize


@dataclass(frozen=True, eq=False)
class SparseTensor:
    """W [N, K]: codes int32 [N, words] of the kept weights, places int32 (``metal_marlin.formats.sparse``), scales and
    extra of groups of all weights, as a ``QuantizedTensor`` has them.

    ``shape`` is logical: codes may stand for a few more columns (zeros) where K does not fill a word. ``layout``: order
    of the tensors, ``powers`` what a layout adds to them. Raises ArgumentError for tensors that do not belong together.
    """

    codes: torch.Tensor
    places: torch.Tensor
    scales: torch.Tensor
    extra: torch.Tensor | None
    format: str
    group_size: int
    zeros: str
    pattern: str
    shape: tuple[int, int]
    layout: str = CANONICAL
    powers: torch.Tensor | None = None

    def __post_init__(self) -> None:
        of, N, padded = pattern(self.pattern), self.shape[0], self.padded
        if self.format not in sparse.FORMATS:
            raise ArgumentError(f"format = {self.format!r}; sparse weights have {', '.join(sparse.FORMATS)}")
        for name, tensor, words in (
            ("codes", self.codes, of.stored(padded) // 8),
            ("places", self.places, of.words(padded)),
        ):
            if tensor.dtype != torch.int32 or tensor.shape != (N, words):
                raise ArgumentError(
                    f"{name}: {tensor.dtype} {tuple(tensor.shape)}; {self.pattern} of {self.shape} needs "
                    f"torch.int32 {(N, words)}"
                )
        form = codec(self.format)
        form.check(padded, self.group_size)
        form.check_zeros(self.zeros)
        form.check_tensors(N, form.groups_of(padded, self.group_size), self.scales, self.extra, self.zeros)
        if self.layout not in (CANONICAL, MMA16) or (self.powers is None) != (self.layout == CANONICAL):
            given = "no powers" if self.powers is None else "powers"
            raise ArgumentError(f"layout = {self.layout!r} with {given}; it is {CANONICAL!r}, or {MMA16!r} with powers")
        devices = sorted({str(t.device) for t in self._present().values()})
        if len(devices) > 1:
            raise ArgumentError(f"codes, places, scales and extra are on {', '.join(devices)}; they need one device")

    @property
    def padded(self) -> int:
        """Columns that the codes stand for."""
        return self.shape[1] + -self.shape[1] % pattern(self.pattern).unit

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self._present().values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a logical weight; 0 for an empty matrix."""
        return 8 * self.nbytes / max(1, self.shape[0] * self.shape[1])

    def __repr__(self) -> str:
        return (
            f"SparseTensor({self.pattern} {self.format}, group_size={self.group_size}, zeros={self.zeros!r}, "
            f"shape={self.shape}, {self.bits_per_weight:.2f} bits a weight, {self.nbytes:,} bytes, "
            f"device={str(self.device)!r}, layout={self.layout!r})"
        )

    def _present(self) -> dict[str, torch.Tensor]:
        fields = {name: getattr(self, name) for name in ("codes", "places", "scales", "extra", "powers")}
        return {name: t for name, t in fields.items() if t is not None}

    def to(self, device: torch.device | str) -> SparseTensor:
        """On another device; dtypes never change."""
        return replace(self, **{name: t.to(device) for name, t in self._present().items()})  # type: ignore[arg-type]

    def dequantize(self, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        """The weights [N, K] in ``dtype``, each rounded once, 0 where none was kept."""
        whole, form, of = self.unpack(), codec(self.format), pattern(self.pattern)
        tensors = (whole.codes, whole.places, whole.scales, whole.extra)
        return sparse.decode(form, of, *tensors, self.padded, self.group_size, self.zeros, dtype)[:, : self.shape[1]]

    def fits(self, layout: str = MMA16) -> bool:
        """Whether the tensor can be in that layout."""
        form = codec(self.format)
        plain = self.zeros == "none" and form.scale_kind != "e4m3" and self.group_size >= operands.SPARSE_GROUP
        return layout == MMA16 and self.pattern == "2:4" and plain and operands.fits(form, *self.shape)

    def prepack(self, layout: str = MMA16) -> SparseTensor:
        """The tensor in operand order, as ``linear_packed_sparse`` takes it, or in canonical order. Raises
        ArgumentError where it has none."""
        if layout == self.layout:
            return self
        if layout == CANONICAL:
            return self.unpack()
        if not self.fits(layout):
            raise ArgumentError(
                f"layout = {layout!r}; {MMA16!r} takes 2:4 without zeros in groups of 32 or more, N % 16 = 0 and "
                f"K % 64 = 0, this is {self!r}"
            )
        codes, places, scales, powers = operands.pack_sparse(codec(self.format), self.codes, self.places, self.scales)
        return replace(self, codes=codes, places=places, scales=scales, powers=powers, layout=layout)

    def unpack(self) -> SparseTensor:
        """The tensor in canonical order."""
        if self.layout == CANONICAL:
            return self
        codes, places, scales = operands.unpack_sparse(codec(self.format), self.codes, self.places, self.scales)
        return replace(self, codes=codes, places=places, scales=scales, powers=None, layout=CANONICAL)


def quantize_sparse(
    weight: torch.Tensor,
    pattern: str = "2:4",
    format: str = "fp4",
    group_size: int | None = None,
    scale: str = "rtn",
    zeros: str | None = None,
    scale_dtype: torch.dtype | None = None,
) -> SparseTensor:
    """Quantise a pruned W [N, K] (``prune_n_m``) and store what is not 0; other arguments as of ``quantize``.

    Raises ArgumentError for weights with more than n of m that are not 0, with the first place, for formats that are
    not of four bits, and what ``quantize`` refuses.
    """
    of = sparse.pattern(pattern)
    if format not in sparse.FORMATS:
        raise ArgumentError(f"format = {format!r}; sparse weights have {', '.join(sparse.FORMATS)}")
    if weight.ndim != 2 or weight.shape[1] == 0:
        raise ArgumentError(f"weight: shape {tuple(weight.shape)}; quantize_sparse takes [N, K] with K > 0")
    N, K = weight.shape
    kept = torch.nn.functional.pad(weight != 0, (0, -K % of.unit))
    count = kept.unflatten(1, (-1, of.of)).sum(-1)
    if (many := (count > of.kept).nonzero()).shape[0]:
        row, group = many[0].tolist()
        raise ArgumentError(
            f"weight: row {row} has {int(count[row, group])} weights that are not 0 in columns {group * of.of} to "
            f"{group * of.of + of.of - 1}; {of} keeps {of.kept}: prune_n_m makes it so"
        )
    size = kept.shape[1] if group_size == K else group_size
    padded = torch.nn.functional.pad(weight.detach(), (0, kept.shape[1] - K))
    whole = quantize(padded, format, size, scale, zeros, scale_dtype)
    codes, places = sparse.compress(codec(format), of, whole.codes, kept)
    return SparseTensor(
        codes, places, whole.scales, whole.extra, format, whole.group_size, whole.zeros, str(of), (int(N), int(K))
    )
