"""Checked launches on the cpu: guarded copies of every buffer, what is known of each byte, and findings.

The other half is msl/stdlib/mm_check.h, which has the same layouts. A launch runs on one worker, its threads in an
order that the seed permutes; results are written back, as without checks, unless the launch had to be abandoned.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from metal_marlin.errors import ArgumentError, KernelCheckError
from metal_marlin.msl.lines import Lines
from metal_marlin.msl.row import CompiledRow, ParamMeta
from metal_marlin.runtime import device_cpu
from metal_marlin.runtime.device_cpu import Dim3

FINDINGS = (
    "",
    "race",
    "out-of-bounds",
    "uninitialised-read",
    "misaligned",
    "array-index",
    "write-to-const",
    "divergent-barrier",
    "divergent-barrier",
    "divergent-simdgroup-barrier",
    "divergent-simdgroup-matrix",
    "inactive-lane",
    "endless",
)
SEED = "METAL_MARLIN_CHECK_SEED"
_TWO_BARRIERS, _RACE = 8, 1
_WRITE, _ATOMIC = 1, 2
_GUARD = 1 << 20  # bytes around each buffer in which a stray access does no harm
_BUDGET = 2_000_000_000  # accesses
_CAPACITY = 64
_LOCATIONS = 64
_CELL, _CLOCK = 68, 8
_STATE_BYTES = 64 << 10
_ARENA, _NOWHERE = 2**64 - 1, 2**64 - 2
_RED_ZONE = 64
_GRANULES = {8: 0, 16: 1}

_u64 = ctypes.c_uint64


class _Area(ctypes.Structure):
    _fields_ = [(name, _u64) for name in ("start", "bytes", "granule", "flags", "cells")]


class _Variable(ctypes.Structure):
    _fields_ = [("start", _u64), ("bytes", _u64), ("name", ctypes.c_char_p)]


class _Report(ctypes.Structure):
    _fields_ = [
        *((name, _u64) for name in "finding flags address size area offset".split()),
        *((name, _u64) for name in "thread code other other_code epoch line".split()),
        ("file", ctypes.c_char_p),
        ("text", ctypes.c_char_p),
    ]


class _Check(ctypes.Structure):
    _fields_ = [
        *((name, _u64) for name in "areas seed guard budget threads groups capacity count".split()),
        *((name, _u64) for name in "reports arena_cells clocks fixed".split()),
        ("area", _Area * 32),
        ("variable", _Variable * 64),
    ]


@dataclass(frozen=True)
class Finding:
    """What a checked launch found, once per place in the source.

    kind: one of FINDINGS. file, line: of the access or barrier; other_file, other_line: of the one it clashes with.
    thread, other_thread: position in the threadgroup and threadgroup, as "(1, 0, 0) of threadgroup (0, 0, 0)"; empty
    where there is none. where: buffer[index], threadgroup memory by variable, or an address. epoch: barriers of the
    threadgroup that went before, counted from 1.
    """

    kernel: str
    kind: str
    message: str
    file: str
    line: int
    thread: str = ""
    where: str = ""
    epoch: int = 0
    other_thread: str = ""
    other_file: str = ""
    other_line: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.kind}: {self.message}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Buffer:
    """Guarded copy of the tensors whose memory overlaps."""

    start: int  # of the original
    size: int
    names: list[str]
    element: int
    granule: int
    const: bool
    copy: int = 0


class CheckedExecutable(device_cpu.Executable):
    """A checked row. ``uninitialised``: names of buffers whose content before the launch must not be read."""

    takes_tensors = True

    def __init__(self, row: CompiledRow) -> None:
        super().__init__(row)
        self.uninitialised: frozenset[str] = frozenset()
        self.seed = int(os.environ.get(SEED, "0"))
        self._lines = Lines(row.binary)

    def launch(
        self,
        arguments: list[Any],
        grid: Dim3,
        tptg: Dim3,
        threads: Dim3,
        dynamic: list[int],
    ) -> None:
        """Run with every access checked. Raises KernelCheckError with the findings, after results are written back."""
        run = _Launch(self, arguments, grid, tptg, threads, dynamic)
        status = run.go()
        findings = run.findings()
        if findings:
            raise KernelCheckError(self.meta.name, findings)
        device_cpu.raise_status(self.meta.name, status)


class _Launch:
    def __init__(
        self,
        executable: CheckedExecutable,
        arguments: Sequence[Any],
        grid: Dim3,
        tptg: Dim3,
        threads: Dim3,
        dynamic: Sequence[int],
    ) -> None:
        self.executable, self.meta = executable, executable.meta
        self.grid, self.tptg, self.threads = grid, tptg, threads
        self.dynamic = list(dynamic)
        self.keep: list[Any] = []
        self.check = _Check.from_buffer(self._memory(_STATE_BYTES))
        self.buffers, self.placed = self._buffers(arguments)
        self.addresses = [self._address(p, v) for p, v in zip(self.meta.params, arguments, strict=True)]

    def _memory(self, size: int) -> mmap.mmap:
        """Zeroed pages that cost nothing until they are touched."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        area = mmap.mmap(-1, max(size, 1), flags=flags)
        self.keep.append(area)
        return area

    def _zeros(self, size: int) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self._memory(size)))

    def _buffers(self, arguments: Sequence[Any]) -> tuple[list[_Buffer], dict[int, _Buffer]]:
        spans = []
        for i, (param, value) in enumerate(zip(self.meta.params, arguments, strict=True)):
            start, size = self._span(param, value)
            if size:
                spans.append((start, size, i, param))
        buffers: list[_Buffer] = []
        placed: dict[int, _Buffer] = {}
        for start, size, i, param in sorted(spans, key=lambda span: span[:3]):
            last = buffers[-1] if buffers else None
            granule = 2 if param.type.kind == "struct" else _GRANULES.get(param.type.bits, 2)
            if last is None or start >= last.start + last.size:
                last = _Buffer(start, size, [], max(param.type.size, 1), granule, True)
                buffers.append(last)
            last.size = max(last.size, start + size - last.start)
            last.names.append(param.name)
            last.granule = min(last.granule, granule)
            last.const = last.const and param.const
            placed[i] = last
        for i, buffer in enumerate(buffers):
            self._copy(i, buffer)
        return buffers, placed

    def _span(self, param: ParamMeta, value: Any) -> tuple[int, int]:
        if isinstance(value, torch.Tensor):
            return value.data_ptr(), value.nbytes
        if isinstance(value, bytes):
            return device_cpu.aligned(value, self.keep, param.type.align), len(value)
        return 0, 0

    def _copy(self, i: int, buffer: _Buffer) -> None:
        """A copy with guards at both ends, aligned as the original."""
        base = self._zeros(2 * _GUARD + buffer.size + 8192)
        buffer.copy = base + _GUARD + (buffer.start - base - _GUARD) % 4096
        ctypes.memmove(buffer.copy, buffer.start, buffer.size)
        empty = set(buffer.names) <= self.executable.uninitialised
        cells = self._zeros((buffer.size // (1 << buffer.granule) + 1) * _CELL)
        self.check.area[i] = _Area(buffer.copy, buffer.size, buffer.granule, buffer.const | empty << 1, cells)

    def _address(self, param: ParamMeta, value: Any) -> int:
        i = next(k for k, p in enumerate(self.meta.params) if p is param)
        if i not in self.placed:
            return 0
        buffer = self.placed[i]
        start = value.data_ptr() if isinstance(value, torch.Tensor) else buffer.start
        return buffer.copy + start - buffer.start

    def go(self) -> int:
        check, groups = self.check, math.prod(self.grid)
        check.areas, check.seed, check.guard, check.budget = len(self.buffers), self.executable.seed, _GUARD, _BUDGET
        check.threads, check.groups, check.capacity = math.prod(self.tptg), groups, _CAPACITY
        self.reports = (_Report * _CAPACITY).from_buffer(self._memory(ctypes.sizeof(_Report) * _CAPACITY))
        check.reports = ctypes.addressof(self.reports)
        check.clocks = self._zeros(_LOCATIONS * groups * _CLOCK)
        arena, offsets = self.meta.threadgroup_bytes, []
        for i, size in enumerate(self.dynamic):
            arena = -(-(arena + _RED_ZONE) // 16) * 16
            offsets.append(arena)
            check.variable[i] = _Variable(arena, size, self.meta.dynamic[i][0].encode())
            arena += size
        check.fixed = len(offsets)
        arena += _RED_ZONE
        if arena > device_cpu.MAX_ARENA:
            raise ArgumentError(f"threadgroup_memory: kernel '{self.meta.name}' needs {arena} bytes when checked")
        check.arena_cells = self._zeros((arena + (128 << 10)) // 4 * _CELL)
        status = self.executable.run_once(
            [*self.addresses, *offsets], self.grid, self.tptg, self.threads, arena, ctypes.addressof(check)
        )
        for buffer in self.buffers:
            if not buffer.const:
                ctypes.memmove(buffer.start, buffer.copy, buffer.size)
        return status

    def findings(self) -> list[Finding]:
        found: dict[tuple[Any, ...], Finding] = {}
        for report in self.reports[: self.check.count]:
            finding = self._finding(report)
            if finding is not None:
                key = (
                    finding.kind,
                    finding.where.partition("[")[0],
                    finding.file,
                    finding.line,
                    finding.other_file,
                    finding.other_line,
                )
                found.setdefault(key, finding)
        return list(found.values())

    def _finding(self, r: _Report) -> Finding | None:
        file, line = (r.file.decode(), r.line) if r.file else self.executable._lines.of(r.code)
        other_file, other_line = self.executable._lines.of(r.other_code) if r.other_code else ("", 0)
        if r.finding == _TWO_BARRIERS and (file, line) == (other_file, other_line):
            return None  # one barrier of the source that the compiler has twice
        thread = self._thread(r.thread)
        return Finding(
            kernel=self.meta.name,
            kind=FINDINGS[r.finding],
            message=self._message(r, thread, other_file, other_line),
            file=file,
            line=line,
            thread=thread,
            where=self._where(r),
            epoch=r.epoch,
            other_thread=self._thread(r.other),
            other_file=other_file,
            other_line=other_line,
        )

    def _thread(self, number: int) -> str:
        if number == 0:
            return ""
        group, local = divmod(number - 1, math.prod(self.tptg))
        at = _unravel(group, self.grid)
        size = tuple(min(t, n - g * t) for t, n, g in zip(self.tptg, self.threads, at, strict=True))
        return f"{_unravel(local, size)} of threadgroup {at}"

    def _where(self, r: _Report) -> str:
        if r.area < len(self.buffers):
            buffer = self.buffers[r.area]
            offset = r.offset - (2**64 if r.offset >= 2**63 else 0)
            index, rest = divmod(offset, buffer.element)
            return f"{'/'.join(buffer.names)}[{index}]" + (f" + {rest} bytes" if rest else "")
        if r.area == _ARENA:
            for v in list(self.check.variable):
                if v.bytes and v.name and v.start - _RED_ZONE <= r.offset < v.start + v.bytes + _RED_ZONE:
                    return f"threadgroup {v.name.decode()} + {r.offset - v.start} bytes of {v.bytes}"
            return f"threadgroup memory + {r.offset} bytes"
        return f"address 0x{r.address:x}" if r.address else ""

    def _message(self, r: _Report, thread: str, other_file: str, other_line: int) -> str:
        kind, where = FINDINGS[r.finding], self._where(r)
        verb = ("atomic " if r.flags & _ATOMIC else "") + ("write" if r.flags & _WRITE else "read")
        access = f"{verb} of {r.size} bytes at {where} by thread {thread}"
        other = f"thread {self._thread(r.other)}" if r.other else ""
        if kind == "race":
            return (
                f"{access} and an access by {other} at {other_file}:{other_line} have nothing between them "
                f"(epoch {r.epoch})"
            )
        typed = r.text.decode() if r.text else ""
        texts = {
            "out-of-bounds": f"{access}{self._limits(r)}",
            "uninitialised-read": f"{access}, which nobody wrote",
            "misaligned": f"{where or 'an access'} is not aligned to {r.size} bytes, thread {thread}",
            "array-index": f"index {_signed(r.offset)} of {typed or 'an array'}, thread {thread}",
            "write-to-const": f"{access}, which the kernel declares const",
            "divergent-barrier": f"{r.size} threads wait at this barrier, but {other} does not come",
            "divergent-simdgroup-barrier": f"{r.size} lanes meet at this barrier, but {other} does not come",
            "divergent-simdgroup-matrix": f"{r.size} lanes multiply matrices; all 32 must, and {other} does not",
            "inactive-lane": f"thread {thread} reads a value of lane {r.size}, which is not active here",
            "endless": f"the launch does not end; thread {thread} was here after {_BUDGET} accesses",
        }
        if r.finding == _TWO_BARRIERS:
            return f"some threads wait at this barrier, others at {other_file}:{other_line}"
        return texts[kind]

    def _limits(self, r: _Report) -> str:
        if r.area < len(self.buffers):
            return f"; the buffer has {self.buffers[r.area].size} bytes"
        return "; no buffer is there" if r.area == _NOWHERE else ""


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def _unravel(index: int, shape: Sequence[int]) -> tuple[int, int, int]:
    x, y, _ = shape
    return index % x, index // x % y, index // x // y
