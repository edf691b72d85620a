"""Our own kernels in checked mode: the ones that ship are clean, and mistakes made in their cores are found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from metal_marlin import MetalKernelLibrary, get_shader_source
from metal_marlin.errors import KernelCheckError
from metal_marlin.ops import dequantize, linear_decode, marlin_gemm, norm, norm_linear, selfcheck, weights
from metal_marlin.ops.inventory import inventory, op_specs

ROWS = [(row.file, row.name) for row in inventory() if row.op]


@pytest.fixture(autouse=True)
def checked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("METAL_MARLIN_CHECKED", "1")
    caches: tuple[Any, ...] = (weights.library, weights.plan_kind)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_checks_are_on() -> None:
    assert weights.plan_kind("cpu") == "mps"
    assert weights.library("norm.metal", "cpu").checked


@pytest.mark.parametrize("file", sorted({file for file, _ in ROWS}))
def test_a_row_of_every_kernel_is_clean(file: str) -> None:
    """One row of each kernel of the file: half, without zeros."""
    specs = [spec for spec in op_specs() if file in (spec.family_file, *spec.more_files)]
    specs = [spec for spec in specs if spec.row_case] or specs
    names = [(f, name) for f, name in ROWS if f == file and "__" not in name]
    launched: set[str] = set()
    for spec in specs:
        results = [selfcheck.Result(spec.name)]
        if spec.row_case:
            for _, name in (n for n in names if spec.claims(*n)):
                case, kernel = spec.row_case(name)
                selfcheck._one(spec, case, "cpu", kernel, results[0], name)
        else:
            halves = [case for case in spec.cases if getattr(case, "dtype", None) == torch.float16]
            small = [case for case in halves if not getattr(case, "model", False)]
            for case in small:
                selfcheck._one(spec, case, "cpu", None, results[0])
        assert not results[0].failures
        launched |= results[0].kernels
    assert launched >= {name for _, name in names if not name.startswith("test_")}


@pytest.mark.slow
@pytest.mark.parametrize("op", sorted({spec.name for spec in op_specs()}))
def test_every_row_is_clean(op: str) -> None:
    for result in selfcheck.run([spec for spec in op_specs() if spec.name == op], "cpu", ROWS):
        assert not result.failures
        assert result.cases


@dataclass(frozen=True)
class Wrong:
    """``old``, once in the flat source of ``kernel``, becomes ``new``; ``run`` launches it."""

    name: str
    kernel: str
    old: str
    new: str
    kinds: tuple[str, ...]
    run: Callable[[], object]

    def __str__(self) -> str:
        return f"{self.kernel}: {self.name}".replace(" ", "-")


def gemm(kernel: str, N: int = 70, K: int = 160) -> Callable[[], object]:
    def run() -> object:
        x, codes, scales, _ = marlin_gemm.Case(70, N, K, 32).tensors()
        return marlin_gemm.marlin_gemm(x, codes, scales, 32, kernel=kernel)

    return run


def gemv(kernel: str, K: int = 4160) -> Callable[[], object]:
    def run() -> object:
        x, codes, scales, _ = linear_decode.Case(1, 9, K, 32).tensors()
        return linear_decode.linear_decode(x, codes, scales, 32, kernel=kernel)

    return run


def rms() -> object:
    return norm.rms_norm(torch.randn(2, 600).half(), torch.ones(600).half())


def layer() -> object:
    return norm.layer_norm(torch.randn(2, 600).half(), torch.ones(600).half())


def fused(kernel: str, M: int = 3) -> Callable[[], object]:
    return lambda: norm_linear.run(norm_linear.Case(linear_decode.Case(M, 70, 160, 32)), "cpu", kernel)


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
PARTS = "if (at.lane == 0) sh.parts[at.sgid] = part;"
SUMMED = "for (uint i = 0; i < at.sgs; ++i) sum += sh.parts[i];"
SQUARES = "for (uint i = at.first(); i < width; i += at.stride()) squares += float(x[i])"
FILLED = "put(f, tid, sh.w[0], sh.x[0]);"
NEXT = "if (more) put(f, tid, sh.w[next], sh.x[next]);"
STAGED = "sh.x[i] = tile + i < a.K ? x[tile + i] : T(0);"
FACTOR = "sh.parts[0][m] = precise::rsqrt(sum / float(K) + numbers.eps);"
BOUNDED = "return codes + min(n, N - 1) * ulong"
RACE, OUTSIDE, UNKNOWN = ("race",), ("out-of-bounds",), ("uninitialised-read",)
MISTAKES = [
    Wrong("no barrier before the sum", "rms_norm", f"{PARTS}\n    {BARRIER}", PARTS, RACE, rms),
    Wrong("no barrier after the sum", "layer_norm", f"{SUMMED}\n    {BARRIER}", SUMMED, RACE, layer),
    Wrong("a part nobody wrote", "rms_norm", PARTS, PARTS.replace("== 0", "== 0 && at.sgid > 0"), UNKNOWN, rms),
    Wrong("index swapped", "rms_norm", PARTS, PARTS.replace("[at.sgid]", "[at.lane]"), (*RACE, *UNKNOWN), rms),
    Wrong("one element more", "rms_norm", SQUARES, SQUARES.replace("< width", "<= width"), OUTSIDE, rms),
    Wrong(
        "a simdgroup leaves", "rms_norm", SQUARES, f"if (sgid == 1) return;\n    {SQUARES}", ("divergent-barrier",), rms
    ),
    Wrong("too few parts", "rms_norm", "float parts[32];", "float parts[2];", ("array-index", *OUTSIDE), rms),
    Wrong(
        "no barrier after the first tile",
        "marlin_gemm_fp4",
        f"{FILLED}\n        {BARRIER}",
        FILLED,
        RACE,
        gemm("marlin_gemm_fp4"),
    ),
    Wrong(
        "no barrier after a step",
        "marlin_gemm_fp4",
        f"{NEXT}\n            {BARRIER}",
        NEXT,
        RACE,
        gemm("marlin_gemm_fp4"),
    ),
    Wrong(
        "one stage without its barrier",
        "marlin_gemm_fp4_single_stage",
        f"if (next == stage) {BARRIER}",
        "",
        RACE,
        gemm("marlin_gemm_fp4_single_stage"),
    ),
    Wrong(
        "rows behind W",
        "marlin_gemm_fp4",
        BOUNDED,
        BOUNDED.replace("min(n, N - 1)", "n"),
        OUTSIDE,
        gemm("marlin_gemm_fp4"),
    ),
    Wrong(
        "tokens behind y",
        "marlin_gemm_fp4",
        "if (to < N && token < M)",
        "if (to < N)",
        OUTSIDE,
        gemm("marlin_gemm_fp4"),
    ),
    Wrong(
        "a chunk of x left out",
        "marlin_gemm_fp4",
        "for (uint i = 0; i < kChunks; ++i) {\n            const uint chunk = tid + i * kThreads;\n            threadgroup T* place",
        "for (uint i = 0; i + 1 < kChunks; ++i) {\n            const uint chunk = tid + i * kThreads;\n            threadgroup T* place",
        UNKNOWN,
        gemm("marlin_gemm_fp4"),
    ),
    Wrong(
        "x behind its end",
        "marlin_gemm_fp4",
        "if (k + i * kPer16 / 4 < a.K) v[i]",
        "v[i]",
        OUTSIDE,
        gemm("marlin_gemm_fp4", K=136),
    ),
    Wrong(
        "rows of a tile overlap",
        "marlin_gemm_fp4",
        "kStride = kBK + Size::kPad",
        "kStride = kBK - 8",
        RACE,
        gemm("marlin_gemm_fp4"),
    ),
    Wrong(
        "no barrier before a tile",
        "decode_gemv_fp4_tiled",
        f"device const T* x = a.x + ulong(token) * a.K;\n        {BARRIER}",
        "device const T* x = a.x + ulong(token) * a.K;",
        RACE,
        gemv("decode_gemv_fp4_tiled"),
    ),
    Wrong(
        "no barrier after a tile",
        "decode_gemv_fp4_tiled",
        f"{STAGED}\n        }}\n        {BARRIER}",
        f"{STAGED}\n        }}",
        RACE,
        gemv("decode_gemv_fp4_tiled"),
    ),
    Wrong(
        "a tile behind x",
        "decode_gemv_fp4_tiled",
        STAGED,
        "sh.x[i] = x[tile + i];",
        OUTSIDE,
        gemv("decode_gemv_fp4_tiled"),
    ),
    Wrong(
        "rows behind y",
        "decode_gemv_fp4_tiled",
        "at.lane == 0 && first + r < a.N",
        "at.lane == 0",
        OUTSIDE,
        gemv("decode_gemv_fp4_tiled"),
    ),
    Wrong(
        "every lane stores",
        "decode_gemv_fp4_tiled",
        "at.lane == 0 && first + r < a.N",
        "first + r < a.N",
        RACE,
        gemv("decode_gemv_fp4_tiled"),
    ),
    Wrong(
        "rows behind W",
        "decode_gemv_fp4",
        BOUNDED,
        BOUNDED.replace("min(n, N - 1)", "n"),
        OUTSIDE,
        gemv("decode_gemv_fp4", 256),
    ),
    Wrong(
        "no barrier before the factors",
        "norm_linear_fp4",
        f"{BARRIER}\n        for (uint m = at.first()",
        "for (uint m = at.first()",
        RACE,
        fused("norm_linear_fp4"),
    ),
    Wrong(
        "no barrier after the factors",
        "norm_linear_fp4_decode",
        f"{FACTOR}\n        }}\n        {BARRIER}",
        f"{FACTOR}\n        }}",
        RACE,
        fused("norm_linear_fp4_decode"),
    ),
    Wrong(
        "factors of tokens that are there alone",
        "norm_linear_fp4",
        "for (uint m = at.first(); m < kTokens;",
        "for (uint m = at.first(); m < tokens;",
        UNKNOWN,
        fused("norm_linear_fp4"),
    ),
    Wrong(
        "squares behind x",
        "norm_linear_fp4_decode",
        "for (uint m = 0; m < tokens; ++m) {\n            const float own",
        "for (uint m = 0; m < kTokens; ++m) {\n            const float own",
        OUTSIDE,
        fused("norm_linear_fp4_decode"),
    ),
]


@pytest.mark.parametrize("wrong", MISTAKES, ids=str)
def test_mistakes_in_our_cores_are_found(wrong: Wrong, monkeypatch: pytest.MonkeyPatch) -> None:
    source = get_shader_source(wrong.kernel)
    assert source.count(wrong.old) == 1, source.count(wrong.old)
    library = MetalKernelLibrary(source.replace(wrong.old, wrong.new), device="cpu", checked=True)
    for module in (marlin_gemm, linear_decode, norm, dequantize, norm_linear):
        monkeypatch.setattr(module, "library", lambda *_: library)
    with pytest.raises(KernelCheckError) as caught:
        wrong.run()
    assert {f.kind for f in caught.value.findings} & set(wrong.kinds), str(caught.value)
