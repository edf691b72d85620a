"""Measuring which kernel a product with quantised weights should run: `metal-marlin tune` and `with tune():`."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from metal_marlin._version import __version__
from metal_marlin.errors import MetalMarlinError
from metal_marlin.formats import operands
from metal_marlin.ops import tuned
from metal_marlin.ops.candidates import OPS, Weights, forget
from metal_marlin.ops.tuned import Problem, Table

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_ROTATED = 256 << 20  # bytes of weights read before the same ones come again: more than caches hold
_COPIES = 16
_ROUNDS, _SECONDS = 7, 0.02  # of a candidate; each round at least so long
_GAIN = 0.98  # a candidate replaces what is planned where it takes at most so much of its time
_LIMITS = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-5}
_RECORDED = ((256, 64), (1024, 32))  # up to so many tokens, so many calls in a CUDA graph; beyond, _COPIES


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


class Session:
    """Times candidates and fills a table; one a device."""

    def __init__(self, path: Path | None = None) -> None:
        self._path, self._busy = path, False
        self._tables: dict[str, Table] = {}
        self.measured: list[Measured] = []

    def see(
        self,
        op: str,
        x: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        more: Weights,
        format: str,
        zeros: str,
        group_size: int,
    ) -> None:
        """A call of an op: its sizes are measured, with its weights, unless they are in the table already."""
        if self._busy or x.numel() == 0 or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        problem = Problem(format, zeros, x.dtype, scales.dtype, codes.shape[0], x.shape[-1])
        self.measure(op, problem, bucket(x.numel() // x.shape[-1]), (codes, scales, *more), group_size)

    def measure(self, op: str, p: Problem, M: int, held: Weights, group_size: int) -> Measured | None:
        """Time every kernel that an op may run and note the fastest; None if it is known. Zeros of the problem are the
        kernel's. Raises MetalMarlinError if a candidate's result is wrong."""
        of = OPS[op]
        device = held[0].device
        table = self._table(device)
        found = table.sections[op].get(str(p), {}).get(M)
        if found is not None and of.knows(p, found):
            return None
        x = torch.randn(M, p.K, generator=torch.Generator().manual_seed(M)).to(p.dtype).to(device)
        size = sum(t.nbytes for t in held if t is not None)
        copies = min(_COPIES, -(-_ROTATED // max(1, size)))
        weights = [held, *(tuple(None if t is None else t.clone() for t in held) for _ in range(copies - 1))]
        out = torch.empty(M, p.N, dtype=p.dtype, device=device)

        def call(name: str, i: int) -> None:
            of.run(p, group_size, name, out, x, *weights[i % len(weights)])

        self._busy = True
        try:
            names = of.candidates(p, M, device)
            place = torch.device("cpu") if device.type == "mps" else device  # mps has no float64
            placed = (None if t is None else t.to(place) for t in held)
            want = of.reference(p, group_size, x[:16].to(place), *placed).cpu()
            times = _times({name: functools.partial(call, name) for name in names}, out, want)
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
        forget()
        return written


def _times(calls: Mapping[str, Callable[[int], None]], out: torch.Tensor, want: torch.Tensor) -> dict[str, float]:
    """Median microseconds of calls whose results are right."""
    for name, call in calls.items():
        out.fill_(float("nan"))
        call(0)
        error = float((out[:16].cpu().double() - want).norm() / want.norm().clamp_min(1e-300))
        if not error <= _LIMITS[out.dtype]:
            raise MetalMarlinError(f"{name}: wrong result while tuning, relative error {error:.3g}")
    if out.is_cuda:
        return _times_recorded(calls, out)
    synchronize = torch.mps.synchronize if out.is_mps else lambda: None
    return {name: _timed(call, synchronize) for name, call in calls.items()}


def _timed(call: Callable[[int], None], synchronize: Callable[[], None]) -> float:
    """Median microseconds on the host's clock."""
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


def _times_recorded(calls: Mapping[str, Callable[[int], None]], out: torch.Tensor) -> dict[str, float]:
    """The same on a GPU's clock, of calls in CUDA graphs: those from Python can take longer than small kernels. They
    take turns: where power or heat lowers the clock, it does so for all."""
    count = next((number for most, number in _RECORDED if out.shape[0] <= most), _COPIES)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(out.device):
        graphs = {name: _recorded(call, count) for name, call in calls.items()}
        names = list(graphs)
        for turn in range(-1, _ROUNDS):
            at = turn % len(names)
            for name in names[at:] + names[:at]:
                begin.record()
                graphs[name].replay()
                end.record()
                end.synchronize()
                if turn >= 0:
                    samples[name].append(begin.elapsed_time(end) / count)
    return {name: 1e3 * statistics.median(taken) for name, taken in samples.items()}


def _recorded(call: Callable[[int], None], count: int) -> torch.cuda.CUDAGraph:
    """So many calls in a CUDA graph."""
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(_COPIES):
            call(i)
    side.synchronize()
    with torch.cuda.graph(graph, stream=side):
        for i in range(count):
            call(i)
    return graph


@contextlib.contextmanager
def tune(path: str | Path | None = None) -> Iterator[Session]:
    """Within the block, ``linear``, ``linear_packed`` and ``linear_packed_sparse`` (and what is built on them) measure
    their kernels for every new weight and number of tokens, in this thread. At the end the table is written, to
    ``path`` or the user's place for the device, and used.

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
    session: Session, op: str, problem: Problem, M: int, group_size: int, device: torch.device
) -> Measured | None:
    """Measure an op for random weights of these sizes; None if the table has them."""
    weights = OPS[op].weights(problem, group_size, device)
    if op != "linear":
        problem = replace(problem, zeros=operands.kernel_zeros(problem.zeros))
    return session.measure(op, problem, bucket(M), weights, group_size)
