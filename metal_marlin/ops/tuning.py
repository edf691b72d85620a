"""Measuring which kernel a product with quantised weights should run: `metal-marlin tune` and `with tune():`."""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from metal_marlin._version import __version__
from metal_marlin.errors import CompilerNotFound, MetalMarlinError
from metal_marlin.formats import CANONICAL, codec, operands
from metal_marlin.ops import linear as _linear
from metal_marlin.ops import linear_decode as _decode
from metal_marlin.ops import marlin_gemm as _gemm
from metal_marlin.ops import packed as _packed
from metal_marlin.ops import packed_tiles, tuned
from metal_marlin.ops.gemm_tiles import TILES, has_tiles
from metal_marlin.ops.product import product_ref
from metal_marlin.ops.tuned import LIBRARY, Problem, Table
from metal_marlin.ops.weights import library, random_weights

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_ROTATED = 256 << 20  # bytes of weights read before the same ones come again: more than caches hold
_COPIES = 16
_ROUNDS, _SECONDS = 7, 0.02  # of a candidate; each round at least so long
_GAIN = 0.98  # a candidate replaces what is planned where it takes at most so much of its time
_LIMITS = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-5}
_FEW = 64  # tokens up to which matrix-vector kernels are candidates
_SLOWER, _LATER = 1.6, 3.0  # a tile is a candidate up to so many times the least fitted time, or so many µs more
_RECORDED = ((256, 64), (1024, 32))  # up to so many tokens, so many calls in a CUDA graph; beyond, _COPIES

Weights = tuple[Any, ...]  # tensors, or None


@dataclass(frozen=True)
class Measured:
    """Microseconds a call of every candidate, and the one that was chosen."""

    problem: Problem
    M: int
    times: dict[str, float]
    chosen: str
    op: str = "linear"


def bucket(M: int) -> int:
    """The number of tokens that is measured for M."""
    return next((tokens for tokens in TOKENS if tokens >= M), TOKENS[-1])


def candidates(problem: Problem, M: int, kind: str, hopper: bool) -> list[str]:
    """Kernels that may be fastest for x [M, K], what is planned untuned first."""
    p, name = problem, f"marlin_gemm_{problem.format}"
    planned = _linear.plan(M, p.N, p.K, p.dtype, p.scale_dtype, kind, p.format, None, hopper)
    tile = ""
    if planned == "marlin_gemm":
        aligned = p.K % 32 == 0
        plan = functools.partial(_gemm.plan, hopper=hopper, aligned=aligned)
        tile = plan(M, p.N, p.K, p.dtype, p.scale_dtype, kind, p.format, p.zeros).tile
    decode = _decode.kernel_for(M, kind, p.format)
    first = {"linear_decode": decode, "marlin_gemm": f"{name}__m{tile}" if tile else name}.get(planned, LIBRARY)
    found = [first, name, *([decode] if M <= _FEW else [])]
    if kind != "cpu":  # where they are the same code
        if p.format == "fp4":
            found += [f"{name}{variant}" for variant in ("_single_stage", "_3stage")]
        if p.dtype == p.scale_dtype != torch.float32:
            named = [k for k, of in _gemm.NAMED.items() if of.format == p.format and not (of.copies and p.K % 32)]
            found += [kernel for kernel in named if not kernel.endswith("_fp32acc")]
    if kind == "cuda" and p.K % 32 == 0 and has_tiles(p.dtype, p.scale_dtype, p.format):
        tiles = [t for t in TILES.values() if t.tokens <= 4 * M and 8 * t.tokens >= M and hopper >= t.hopper]
        found += [f"{name}__m{t}" for t in tiles]
    if kind == "cuda" and M > _FEW // 4:
        found.append(LIBRARY)
    return list(dict.fromkeys(found))


def packed_candidates(problem: Problem, M: int) -> list[str]:
    """Tiles of ``linear_packed`` that may be fastest for x [M, K], what is planned untuned first: not much too large or
    small, nor far slower by their fitted times, which are those of one format."""
    p, tiles = problem, packed_tiles.TILES
    first = tiles.fastest(M, p.N, p.K)
    least = tiles[first].time(M, p.N, p.K)
    suit = [
        name
        for name, tile in tiles.items()
        if tile.tokens <= max(16, 4 * M) and (tile.tokens >= 128 or 4 * tile.tokens >= M)
    ]
    found = [first, *(name for name in suit if tiles[name].time(M, p.N, p.K) <= max(_SLOWER * least, least + _LATER))]
    return [f"packed_gemm_{p.format}__m{name}" for name in dict.fromkeys(found)]


class Session:
    """Times candidates and fills a table; one a device."""

    def __init__(self, path: Path | None = None) -> None:
        self._path, self._busy = path, False
        self._tables: dict[str, Table] = {}
        self.measured: list[Measured] = []

    def see(
        self,
        x: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        extra: torch.Tensor | None,
        format: str,
        zeros: str,
        group_size: int,
    ) -> None:
        """A call of ``linear``: its sizes are measured, with its weights, unless they are in the table already."""
        if self._sees(x):
            problem = Problem(format, zeros, x.dtype, scales.dtype, codes.shape[0], x.shape[-1])
            self.measure(problem, bucket(x.numel() // x.shape[-1]), codes, scales, extra, group_size)

    def see_packed(
        self,
        x: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        powers: torch.Tensor,
        extra: torch.Tensor | None,
        format: str,
        zeros: str,
        group_size: int,
    ) -> None:
        """A call of ``linear_packed``, likewise."""
        if self._sees(x):
            problem = Problem(format, zeros, x.dtype, scales.dtype, codes.shape[0], x.shape[-1])
            self.measure_packed(problem, bucket(x.numel() // x.shape[-1]), codes, scales, powers, extra, group_size)

    def _sees(self, x: torch.Tensor) -> bool:
        return not (self._busy or x.numel() == 0 or (x.is_cuda and torch.cuda.is_current_stream_capturing()))

    def measure(
        self, p: Problem, M: int, codes: torch.Tensor, scales: torch.Tensor, extra: torch.Tensor | None, group_size: int
    ) -> Measured | None:
        """Time every kernel that ``linear`` may run and note the fastest; None if it is known. Raises MetalMarlinError
        if a candidate's result is wrong."""
        kind, index = codes.device.type, codes.device.index or 0

        def names() -> list[str]:
            return candidates(p, M, kind, kind == "cuda" and _gemm.is_hopper(index))

        def run(kernel: str, x: torch.Tensor, weights: Weights, out: torch.Tensor) -> None:
            words, by, more = weights
            asked = None if kernel == LIBRARY else kernel
            _linear._RUNS[_linear.op_of(kernel)](x, words, by, more, p.format, p.zeros, group_size, asked, out)

        def reference(x: torch.Tensor, codes: Any, scales: Any, extra: Any) -> torch.Tensor:
            return product_ref(x, codes, scales, group_size, format=p.format, zeros=p.zeros, extra=extra)

        return self._measure("linear", p, M, (codes, scales, extra), names, run, reference)

    def measure_packed(
        self,
        p: Problem,
        M: int,
        codes: torch.Tensor,
        scales: torch.Tensor,
        powers: torch.Tensor,
        extra: torch.Tensor | None,
        group_size: int,
    ) -> Measured | None:
        """The same for ``linear_packed``, weights in operand order; the problem's zeros are the kernel's."""

        def names() -> list[str]:
            if codes.is_cuda:
                _compile_tiles(p, str(codes.device))
            return packed_candidates(p, M)

        def run(kernel: str, x: torch.Tensor, weights: Weights, out: torch.Tensor) -> None:
            words, by, of_rows, more = weights
            _packed._run(x, words, by, of_rows, more, p.format, p.zeros, group_size, kernel, out)

        def reference(x: torch.Tensor, codes: Any, scales: Any, powers: Any, extra: Any) -> torch.Tensor:
            options = {"format": p.format, "zeros": p.zeros, "extra": extra}
            return _packed.linear_packed_ref(x, codes, scales, powers, group_size, **options)

        return self._measure("linear_packed", p, M, (codes, scales, powers, extra), names, run, reference)

    def _measure(
        self,
        op: str,
        p: Problem,
        M: int,
        held: Weights,
        candidates: Callable[[], list[str]],
        run: Callable[[str, torch.Tensor, Weights, torch.Tensor], None],
        reference: Callable[..., torch.Tensor],
    ) -> Measured | None:
        device = next(t.device for t in held if t is not None)
        table = self._table(device)
        if table.sections[op].get(str(p), {}).get(M) is not None:
            return None
        x = torch.randn(M, p.K, generator=torch.Generator().manual_seed(M)).to(p.dtype).to(device)
        size = sum(t.nbytes for t in held if t is not None)
        copies = min(_COPIES, -(-_ROTATED // max(1, size)))
        weights = [held, *(tuple(None if t is None else t.clone() for t in held) for _ in range(copies - 1))]
        out = torch.empty(M, p.N, dtype=p.dtype, device=device)

        def timed(name: str) -> float:
            return _time(lambda i: run(name, x, weights[i % len(weights)], out), out, want, name)

        self._busy = True
        try:
            names = candidates()
            place = torch.device("cpu") if device.type == "mps" else device  # mps has no float64
            want = reference(x[:16].to(place), *(None if t is None else t.to(place) for t in held)).cpu()
            times = {name: timed(name) for name in names}
        finally:
            self._busy = False
        fastest = min(times, key=lambda name: times[name])
        chosen = fastest if times[fastest] <= _GAIN * times[names[0]] else names[0]
        table.put(p, M, chosen, op)
        result = Measured(p, M, times, chosen, op)
        self.measured.append(result)
        return result

    def _table(self, device: torch.device) -> Table:
        key = tuned.device_key(device.type, device.index or 0)
        if key not in self._tables:
            self._tables[key] = self._open(key)
        return self._tables[key]

    def _open(self, key: str) -> Table:
        path = self._path or tuned.user_path(key)
        table = Table.load(path) if path.is_file() else Table(key)
        if table.device != key:
            raise MetalMarlinError(f"{path}: is a table for {table.device}, this device is {key}")
        return table

    def save(self) -> list[Path]:
        """Write the tables that grew and use them from now on; returns their paths."""
        written = []
        for key, table in self._tables.items():
            if self.measured:
                path = self._path or tuned.user_path(key)
                table.about = {
                    "torch": torch.__version__,
                    "metal_marlin": __version__,
                    "date": time.strftime("%Y-%m-%d"),
                }
                table.save(path)
                written.append(path)
        tuned.forget()
        return written


def _time(call: Callable[[int], None], out: torch.Tensor, want: torch.Tensor, name: str) -> float:
    """Median microseconds of a call whose result is right."""
    synchronize = torch.cuda.synchronize if out.is_cuda else torch.mps.synchronize if out.is_mps else lambda: None
    out.fill_(float("nan"))
    call(0)
    error = float((out[:16].cpu().double() - want).norm() / want.norm().clamp_min(1e-300))
    if not error <= _LIMITS[out.dtype]:
        raise MetalMarlinError(f"{name}: wrong result while tuning, relative error {error:.3g}")
    if out.is_cuda:
        return _time_recorded(call, out)
    calls, samples = 1, []
    for turn in range(_ROUNDS + 1):
        synchronize()
        start = time.perf_counter()
        for i in range(calls):
            call(i)
        synchronize()
        taken = time.perf_counter() - start
        if turn:
            samples.append(taken / calls)
        else:  # the first one warms up and says how many make a round
            calls = max(1, min(1000, round(_SECONDS / max(taken, 1e-7))))
    return 1e6 * statistics.median(samples)


def _time_recorded(call: Callable[[int], None], out: torch.Tensor) -> float:
    """The same on a GPU's clock, of calls in a CUDA graph: those from Python can take longer than small kernels."""
    calls = next((number for most, number in _RECORDED if out.shape[0] <= most), _COPIES)
    graph = torch.cuda.CUDAGraph()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(out.device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for i in range(_COPIES):
                call(i)
        side.synchronize()
        with torch.cuda.graph(graph, stream=side):
            for i in range(calls):
                call(i)
        samples = []
        for turn in range(-1, _ROUNDS):
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn >= 0:
                samples.append(begin.elapsed_time(end) / calls)
    return 1e3 * statistics.median(samples)


@functools.lru_cache(maxsize=256)
def _compile_tiles(p: Problem, device: str) -> None:
    """Compile the rows of all tiles at once, as many at a time as there are processors."""
    of = library(_packed.FAMILY, device)
    sizes = (1, p.N, p.K, p.dtype, p.scale_dtype, p.format, p.zeros)
    rows = [_packed.plan(*sizes, f"packed_gemm_{p.format}__m{tile}").kernel for tile in packed_tiles.TILES]
    with ThreadPoolExecutor(os.cpu_count()) as pool, contextlib.suppress(CompilerNotFound):  # a launch will say so
        list(pool.map(of.compile, rows))


@contextlib.contextmanager
def tune(path: str | Path | None = None) -> Iterator[Session]:
    """Within the block, ``linear`` and ``linear_packed`` (and what is built on them) measure their kernels for every
    new weight and number of tokens, in this thread. At the end the table is written, to ``path`` or the user's place
    for the device, and used.

    Numbers of tokens are rounded up to ``TOKENS``. Sizes already in the table are not measured again. Raises
    MetalMarlinError for a table that cannot be read.
    """
    session = Session(None if path is None else Path(path))
    before, tuned.active.session = tuned.active.session, session
    try:
        yield session
    finally:
        tuned.active.session = before
        session.save()


def tune_shape(
    session: Session, problem: Problem, M: int, group_size: int, device: torch.device, layout: str = CANONICAL
) -> Measured | None:
    """Measure for random weights of these sizes in a layout; None if the table has them."""
    if layout == CANONICAL:
        return session.measure(problem, bucket(M), *_weights(problem, group_size, device), group_size)
    p = replace(problem, zeros="point") if problem.zeros == "packed" else problem
    return session.measure_packed(p, bucket(M), *_packed_weights(problem, group_size, device), group_size)


@functools.lru_cache(maxsize=1)
def _weights(
    p: Problem, group_size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    form = codec(p.format)
    scales = p.scale_dtype if form.scale_kind == "float" else form.scale_dtypes[0]
    rng = torch.Generator().manual_seed(0)
    words, by, extra = random_weights(p.format, p.N, p.K, group_size, scales, p.zeros, rng)
    return words.to(device), by.to(device), None if extra is None else extra.to(device)


@functools.lru_cache(maxsize=1)
def _packed_weights(
    p: Problem, group_size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    codes, scales, extra, powers = operands.pack(codec(p.format), *_weights(p, group_size, device), p.zeros)
    return codes, scales, powers, extra
