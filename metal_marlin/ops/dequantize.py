"""dequantize: quantised weights as numbers; time is what writing them takes."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.formats import CODECS, codec
from metal_marlin.ops.spec import Check, OpSpec, worst
from metal_marlin.ops.weights import KEYS, library, on_16_bytes, plan_kind, random_weights, read_row, row_name
from metal_marlin.runtime.dispatch import dispatch_kernel

__all__ = ["CASES", "OP", "Case", "Plan", "all_codes", "all_codes_ref", "dequantize", "dequantize_ref", "plan"]

FAMILIES = {"fp8_e4m3": "dequant_fp8.metal", "fp8_e5m2": "dequant_fp8.metal"}
FAMILIES |= {"int8": "dequant_int8.metal", "uint8": "dequant_int8.metal"}
FAMILIES |= dict.fromkeys(("int2", "int3", "nf3"), "dequant_sub4bit.metal")
_FOUR = "dequant.metal"
_STREAM = 8 << 20  # bytes of an output that no cache of the CPU is to hold


@dataclass(frozen=True)
class _Way:
    """What a thread of a row does, see core/dequant.h. words: 0 stands for those of a 16-byte store; turns of a lane.
    wide: needs 16-byte loads and stores."""

    core: str = "device"
    words: int = 0
    turns: int = 4
    wide: bool = False


_PLAIN, _ALIGNED, _ROWS = _Way("each", 1), _Way("each", wide=True), _Way("rows", 1)
# rows of one format that have names of their own
_NAMED: dict[str, dict[str, _Way]] = {
    "fp4": {
        "dequant_fp4_kernel": _PLAIN,
        "dequant_fp4_aligned_kernel": _ALIGNED,
        "dequant_fp4_optimal": _Way("run", turns=2),
        "dequant_fp4_optimal_rowmajor": _Way("rows", wide=True),
        "dequant_fp4_simdgroup_optimal": _Way("run", turns=8),
        "dequant_fp4_bandwidth_max": _Way("run", turns=16),
    },
    "int4": {"dequant_int4_kernel": _PLAIN, "dequant_int4_aligned_kernel": _ALIGNED},
    "int8": {"dequant_int8_kernel": _PLAIN, "dequant_int8_aligned_kernel": _ALIGNED, "dequant_int8_2d_kernel": _ROWS},
    "fp8_e4m3": {"dequant_fp8_kernel": _PLAIN, "dequant_fp8_aligned_kernel": _ALIGNED, "dequant_fp8_2d_kernel": _ROWS},
    "fp8_e5m2": {"dequant_fp8_e5m2_kernel": _PLAIN, "dequant_fp8_e5m2_aligned_kernel": _ALIGNED},
}
# kernels that write the number of every code -> file, format whose values those are
_ALL_CODES = {
    "test_fp4_all_codes": (_FOUR, "fp4"),
    "test_u4_all_codes": (_FOUR, "int4"),
    "test_fp8_e4m3_all_codes": ("dequant_fp8.metal", "fp8_e4m3"),
    "test_fp8_e5m2_all_codes": ("dequant_fp8.metal", "fp8_e5m2"),
    "test_int8_all_values": ("dequant_int8.metal", "int8"),
    **{f"test_{f}_all_codes": ("dequant_sub4bit.metal", f) for f in ("int2", "int3", "nf3")},
}


@dataclass(frozen=True)
class Plan:
    """How a call runs: row and its file, grid, ``rows`` a threadgroup (cpu), simdgroup width, 16-byte accesses."""

    kernel: str
    family: str
    threadgroups: tuple[int, int]
    threads: int
    rows: int
    lanes: int
    aligned: bool


def variants(format: str) -> tuple[str, ...]:
    """Kernels of a format, the default first."""
    return (f"dequant_{codec(format).name}_bulk", *_NAMED.get(format, ()))


@functools.lru_cache(maxsize=4096)
def plan(
    N: int,
    K: int,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    device: str,
    pool: int = 1,
    kernel: str | None = None,
    format: str = "fp4",
    zeros: str = "none",
    aligned: bool = True,
) -> Plan:
    """The row and grid for weights [N, K] in ``dtype``; ``device``: cpu, cuda or mps; ``pool``: CPU threads.

    aligned: codes and output start at multiples of 16 bytes. Raises ArgumentError for dtypes and variants that have no
    row, and for variants with 16-byte loads and stores where sizes do not allow them.
    """
    form = codec(format)
    base = kernel or variants(format)[0]
    row = row_name("dequantize", base, variants(format), dtype, scale_dtype, format, zeros)
    way = _NAMED.get(format, {}).get(base, _Way())
    unit = max(1, 16 // (form.per_word * dtype.itemsize))  # words of a 16-byte store
    each = way.words or unit
    fits = aligned and K % (each * form.per_word) == 0
    if way.wide and not fits:
        raise ArgumentError(
            f"dequantize: {base} to {dtype} needs K in multiples of {each * form.per_word} (K = {K}) and tensors that "
            f"start at multiples of 16 bytes{'' if aligned else ', these do not'}"
        )
    words = K // form.per_word
    if N * words >= 1 << 31:
        raise ArgumentError(f"dequantize: N = {N}, K = {K} are {N * words} words; at most {(1 << 31) - 1}")
    family = FAMILIES.get(format, _FOUR)
    if way.core == "device" and device == "cpu":  # 8 threadgroups a thread even out
        rows = max(1, min(256, -(-N // (8 * pool))))
        return Plan(row, family, (-(-N // rows), 1), 1, rows, 1, fits)
    if way.core == "rows":
        return Plan(row, family, (N, -(-words // (128 * each))), 128, 1, 32, fits)
    if way.core == "each":
        return Plan(row, family, (-(-N * words // (256 * each)), 1), 256, 1, 32, fits)
    turn = 256 * way.turns * (each if fits else 1)
    return Plan(row, family, (-(-N * words // turn), 1), 256, 1, 32, fits)


def dequantize_ref(
    codes: torch.Tensor,
    scales: torch.Tensor,
    group_size: int,
    *,
    format: str = "fp4",
    zeros: str = "none",
    extra: torch.Tensor | None = None,
) -> torch.Tensor:
    """The meaning, in float64: [N, K]."""
    return codec(format).decode(codes, scales, extra, group_size, zeros)


def dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor,
    group_size: int,
    *,
    format: str = "fp4",
    zeros: str = "none",
    extra: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float16,
    kernel: str | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weights [N, K] = scale · (value(code) − zero) + bias, worked out in float32, rounded once to ``dtype``.

    codes: int32 [N, K·bits/32]; scales [N, ⌈K/group_size⌉] and extra as ``metal_marlin.formats`` says, on cpu, cuda or
    mps. dtype: half, bfloat16 or float32. kernel: a variant of the family, for measurements. out: where to write;
    its dtype counts then. Raises ArgumentError naming the argument and the numbers.
    """
    if out is None:
        return torch.ops.metal_marlin.dequantize(codes, scales, extra, format, zeros, group_size, dtype, kernel)
    torch.ops.metal_marlin.dequantize_out(codes, scales, extra, format, zeros, group_size, kernel, out)
    return out


def all_codes(kernel: str, device: str = "cpu") -> torch.Tensor:
    """What a ``test_*_all_codes`` kernel says every code stands for, float32 [2^bits]; NaN where the places of a word
    differ too. Raises ArgumentError for other kernels."""
    if kernel not in _ALL_CODES:
        raise ArgumentError(f"kernel = {kernel!r}; there are {', '.join(_ALL_CODES)}")
    family, format = _ALL_CODES[kernel]
    values = torch.full((1 << codec(format).bits,), math.nan, device=device)
    rows = library(family, device, 32)
    dispatch_kernel(rows, kernel, threads=len(values), threads_per_threadgroup=16, args=(values,))
    return values


def all_codes_ref(kernel: str) -> torch.Tensor:
    """The meaning of ``all_codes``, in float64."""
    return torch.tensor(codec(_ALL_CODES[kernel][1]).values, dtype=torch.float64)


def _check(
    codes: torch.Tensor, scales: torch.Tensor, extra: torch.Tensor | None, format: str, zeros: str, group_size: int
) -> tuple[int, int]:
    """N, K. Raises ArgumentError for tensors that do not belong together."""
    form = codec(format)
    if codes.ndim != 2:
        raise ArgumentError(f"dequantize: codes have shape {tuple(codes.shape)}; needs [N, K·{form.bits}/32]")
    N, K = int(codes.shape[0]), form.columns(int(codes.shape[1]))
    form.check(K, group_size)
    form.check_zeros(zeros)
    form.check_tensors(N, form.groups_of(K, group_size), scales, extra, zeros)
    return N, K


def _run(
    codes: torch.Tensor,
    scales: torch.Tensor,
    extra: torch.Tensor | None,
    format: str,
    zeros: str,
    group_size: int,
    kernel: str | None,
    out: torch.Tensor,
) -> None:
    N, K = _check(codes, scales, extra, format, zeros, group_size)
    if out.shape != (N, K):
        raise ArgumentError(f"dequantize: out has shape {tuple(out.shape)}; needs {(N, K)}")
    kind = plan_kind(codes.device.type)
    aligned = on_16_bytes(codes, out)
    # only read on the CPU
    stream = kind == "cpu" and out.nbytes >= _STREAM and (out.data_ptr() | K * out.itemsize) % 64 == 0
    pool = torch.get_num_threads() if kind == "cpu" else 1
    p = plan(N, K, out.dtype, scales.dtype, kind, pool, kernel, format, zeros, aligned)
    if N == 0:
        return
    shape = {"N": N, "K": K, "group": group_size, "rows": p.rows, "aligned": int(p.aligned), "stream": int(stream)}
    dispatch_kernel(
        library(p.family, str(codes.device), p.lanes),
        p.kernel,
        threadgroups=p.threadgroups,
        threads_per_threadgroup=p.threads,
        args=(codes, scales, scales if extra is None else extra, out, shape),
    )


def _new(
    codes: torch.Tensor,
    scales: torch.Tensor,
    extra: torch.Tensor | None,
    format: str,
    zeros: str,
    group_size: int,
    dtype: torch.dtype,
    kernel: str | None,
) -> torch.Tensor:
    out = _fake(codes, scales, extra, format, zeros, group_size, dtype, kernel)
    _run(codes, scales, extra, format, zeros, group_size, kernel, out)
    return out


def _fake(
    codes: torch.Tensor,
    scales: torch.Tensor,
    extra: torch.Tensor | None,
    format: str,
    zeros: str,
    group_size: int,
    dtype: torch.dtype,
    kernel: str | None,
) -> torch.Tensor:
    return codes.new_empty(_check(codes, scales, extra, format, zeros, group_size), dtype=dtype)


_torch = torch.library.Library("metal_marlin", "FRAGMENT")
_ARGUMENTS = "Tensor codes, Tensor scales, Tensor? extra, str format, str zeros, int group_size"
_torch.define(f"dequantize({_ARGUMENTS}, ScalarType dtype, str? kernel) -> Tensor")
_torch.define(f"dequantize_out({_ARGUMENTS}, str? kernel, Tensor(a!) out) -> ()")
for _key in ("CPU", "CUDA", "MPS"):
    _torch.impl("dequantize", _new, _key)
    _torch.impl("dequantize_out", _run, _key)
torch.library.register_fake("metal_marlin::dequantize", _fake, lib=_torch)
torch.library.register_fake("metal_marlin::dequantize_out", lambda *_: None, lib=_torch)


@dataclass(frozen=True)
class Case:
    """Weights [N, K] of a format, group size g, written in ``dtype`` by ``kernel``."""

    N: int
    K: int
    group: int = 128
    dtype: torch.dtype = torch.float16
    scale_dtype: torch.dtype | None = None  # None: as dtype; formats with scales of their own ignore it
    format: str = "fp4"
    zeros: str = "none"
    kernel: str | None = None
    model: str = ""  # whose shape it is, for the bench

    def __str__(self) -> str:
        zeros = "" if self.zeros == "none" else f"-z{self.zeros}"
        scales = "" if self.scale_dtype is None else f"-s{KEYS[self.scale_dtype]}"
        kernel = "" if self.kernel is None else f"-{self.kernel.removeprefix('dequant_')}"
        return f"{self.N}x{self.K}-g{self.group}-{KEYS[self.dtype]}{scales}-{self.format}{zeros}{kernel}"

    @property
    def scales_in(self) -> torch.dtype:
        """The dtype of the scales."""
        return (self.scale_dtype or self.dtype) if codec(self.format).scale_kind == "float" else torch.uint8

    def tensors(self, device: str = "cpu", seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """codes, scales, extra: every code that is a number occurs, scales and zeros vary by group."""
        rng = torch.Generator().manual_seed(seed)
        codes, scales, extra = random_weights(self.format, self.N, self.K, self.group, self.scales_in, self.zeros, rng)
        return codes.to(device), scales.to(device), None if extra is None else extra.to(device)


def _cases() -> list[Case]:
    found: list[Case] = []
    kinds = [(f, z) for f in CODECS if codec(f).scale_kind == "float" for z in codec(f).zero_kinds]
    for i, (f, z) in enumerate(kinds):
        per = codec(f).unit
        one, other = list(KEYS)[i % 3], list(KEYS)[(i + 1) % 3]
        for kernel in variants(f):
            sizes = ((5, 512), (37, 256)) if "uint8" not in kernel else ((5, 512),)
            found += [Case(N, K, 64, one, format=f, zeros=z, kernel=kernel) for N, K in sizes]
            found += [Case(7, 320, 16, d, one, f, z, kernel) for d in KEYS if d != one]
        whole = [K + -K % per for K in (40, 136, 1000)]
        found += [
            Case(9, K, g, other, None, f, z) for K, g in zip((per, *whole), (per, 16, whole[1], 128), strict=True)
        ]
        found += [Case(9, 576 + per, g, other, None, f, z) for g in (32, 64, 256)]
    for f, g in (("mxfp4", 32), ("nvfp4", 16)):
        found += [Case(N, K, g, d, format=f) for d in KEYS for N, K in ((5, 64), (37, 576), (3, 40))]
    return [*found, *(Case(4096, 14336, dtype=d, scale_dtype=torch.float16, model="large") for d in KEYS)]


CASES: tuple[Case, ...] = tuple(_cases())


def _compare(case: Case, device: str, kernel: str | None) -> Check:
    codes, scales, extra = case.tensors(device)
    more = {"format": case.format, "zeros": case.zeros}
    y = dequantize(
        codes, scales, case.group, dtype=case.dtype, kernel=kernel or case.kernel, extra=extra, format=case.format,
        zeros=case.zeros,
    )  # fmt: skip
    codes, scales, extra = case.tensors()
    exact = dequantize_ref(codes, scales, case.group, extra=extra, **more)
    largest = exact.abs().amax(-1, keepdim=True)
    number = torch.finfo(case.dtype)
    allowed = number.eps * exact.abs() + 2.0**-20 * largest + number.smallest_normal * number.eps
    return worst((y.cpu().double() - exact).abs(), allowed)


def _compare_codes(kernel: str, device: str, _: str | None) -> Check:
    """Counts the codes whose numbers differ."""
    y, exact = all_codes(kernel, device).cpu().double(), all_codes_ref(kernel)
    return Check(float((~torch.isclose(y, exact, rtol=0, atol=0, equal_nan=True)).sum()), 0.0)


def _row_case(name: str) -> tuple[Case, str]:
    base, dtype, scales, zeros = read_row(name)
    form = next(f for n, f in CODECS.items() if base in variants(n))
    group = next(g for g in (64, 32, 16) if g in form.groups)
    return Case(37, 256, group, dtype, scales, form.name, zeros, base), base


_BENCH = "bench/dequantize.py"
OP = (
    *(
        OpSpec("dequantize", family, dequantize_ref, CASES, _BENCH, ("dequant_*",), _compare, _row_case)
        for family in (_FOUR, *sorted(set(FAMILIES.values())))
    ),
    *(
        OpSpec(
            "all_codes",
            family,
            all_codes_ref,
            tuple(k for k, v in _ALL_CODES.items() if v[0] == family),
            None,
            ("test_*",),
            _compare_codes,
        )
        for family in (_FOUR, *sorted(set(FAMILIES.values())))
    ),
)
