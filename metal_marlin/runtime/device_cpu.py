"""The cpu device: rows as shared objects, threadgroups over torch's own OpenMP pool.

A launch runs to its end before it returns. Any number of Python threads may launch at once: each has its own
workspace (threadgroup memory and fibre stacks). In a forked child the pool's threads are gone, so kernels run on
the calling thread there.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import struct
import sys
import tempfile
import threading
from pathlib import Path

import torch

from metal_marlin.errors import ArgumentError, DriverError, NoDeviceError
from metal_marlin.msl.row import CompiledRow, RowMeta
from metal_marlin.msl.target import Target

_STACK_ALIGN = 256 << 10
_MAX_THREADS = 1024
MAX_ARENA = 256 << 10  # more than any GPU has; kernels need not fit Metal's 32 KiB here, but must fit somewhere
_MAX_GRID = 2**32 - 1
_BLOCKS_KEPT = 1024
Dim3 = tuple[int, int, int]
# args, grid[3], tptg[3], threads[3], arena_bytes, nthreads, gomp, workspace, workspace_stride, next, status, check
_LAUNCH = struct.Struct("@P3I3I3IIIPPQIIP")


def probe() -> str | None:
    """None where this device works, else why not."""
    if not sys.platform.startswith("linux"):
        return "the cpu device runs on Linux (x86-64-v3 or aarch64)"
    try:
        Target.host_cpu()
    except NoDeviceError as error:
        return str(error)
    return None


def target(index: int) -> Target:
    """The CPU's resolved feature set; `index` is ignored."""
    return Target.host_cpu()


def load(row: CompiledRow, index: int) -> Executable:
    """Map the row's shared object into the process (from memory, not from a file others could swap)."""
    if row.meta.checked:
        from metal_marlin.runtime.checked import CheckedExecutable

        return CheckedExecutable(row)
    return Executable(row)


class _Pool:
    """GOMP_parallel of the libgomp that torch brought along; 0 where there is none, or after a fork."""

    def __init__(self) -> None:
        self.address = self._find()
        os.register_at_fork(after_in_child=self._forget)

    def _find(self) -> int:
        shipped = sorted(Path(torch.__file__).parent.joinpath("lib").glob("libgomp*.so*"))
        shipped += sorted(Path(torch.__file__).parent.parent.joinpath("torch.libs").glob("libgomp*.so*"))
        for name in [*map(str, shipped), "libgomp.so.1"]:
            try:
                return ctypes.cast(ctypes.CDLL(name).GOMP_parallel, ctypes.c_void_p).value or 0
            except (OSError, AttributeError):
                continue
        return 0

    def _forget(self) -> None:
        self.address = 0


_pool: _Pool | None = None
_local = threading.local()


def _workspace(size: int) -> int:
    """Address of at least `size` bytes of this thread's workspace, aligned for fibre stacks.

    Workspaces that became too small stay mapped: launches prepared earlier still point to them.
    """
    if getattr(_local, "size", -1) < size:
        size = max(size, 2 * getattr(_local, "size", 0))
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        area = mmap.mmap(-1, size + _STACK_ALIGN, flags=flags)
        start = ctypes.addressof(ctypes.c_char.from_buffer(area))
        _local.maps = [*getattr(_local, "maps", ()), area]
        _local.base = (start + _STACK_ALIGN - 1) // _STACK_ALIGN * _STACK_ALIGN
        _local.size = size
    return int(_local.base)


def _map(row: CompiledRow) -> ctypes.CDLL:
    """Load a shared object from memory. dlopen takes a name it has seen for the library it knows, so each is new."""
    handle = os.memfd_create(f"metal-marlin-{row.name[:200]}")
    try:
        with tempfile.TemporaryDirectory(prefix="metal-marlin-") as folder, os.fdopen(handle, "wb") as file:
            file.write(row.binary)
            file.flush()
            link = Path(folder) / "row.so"
            link.symlink_to(f"/proc/self/fd/{handle}")
            return ctypes.CDLL(str(link))
    except OSError as error:
        raise DriverError(f"kernel '{row.name}': its shared object cannot be loaded: {error}") from None


class _Frame(threading.local):
    """This thread's argument array and prepared launch blocks of one executable."""

    def __init__(self, slots: int) -> None:
        self.args = (ctypes.c_void_p * max(slots, 1))()
        self.values: dict[bytes, tuple[int, object]] = {}  # aligned copies of values: address, buffer
        self.older = self.values
        self.blocks: dict[tuple[object, ...], tuple[int, object]] = {}  # launch shape -> address, buffer


class Executable:
    """A row mapped into this process."""

    def __init__(self, row: CompiledRow) -> None:
        global _pool
        _pool = _pool or _Pool()
        self.meta: RowMeta = row.meta
        self._library = _map(row)
        self._launch = self._library.mm_launch_kernel
        self._launch.argtypes, self._launch.restype = [ctypes.c_void_p], ctypes.c_int
        self._bytes = self._library.mm_workspace_bytes
        self._bytes.argtypes, self._bytes.restype = [ctypes.c_void_p], ctypes.c_uint64
        self._frame = _Frame(len(row.meta.params) + len(row.meta.dynamic))
        self._alignment = max((p.type.align for p in row.meta.params), default=1)

    def launch(
        self,
        arguments: list[int | bytes],
        grid: Dim3,
        tptg: Dim3,
        threads: Dim3,
        dynamic: list[int],
    ) -> None:
        frame = self._frame
        args = frame.args
        for i, argument in enumerate(arguments):
            args[i] = self._value(frame, argument) if isinstance(argument, bytes) else argument
        shape = (grid, tptg, threads, tuple(dynamic), torch.get_num_threads(), _pool.address)  # type: ignore[union-attr]
        block = frame.blocks.get(shape)
        if block is None:
            block = self._block(frame, *shape)
        raise_status(self.meta.name, self._launch(block[0]))

    def _value(self, frame: _Frame, value: bytes) -> int:
        """Address of a copy of `value`, which kernels only read: launches mostly repeat the values of earlier ones."""
        found = frame.values.get(value)
        if found is None:
            keep: list[object] = []
            found = aligned(value, keep, self._alignment), keep
            if len(frame.values) >= _BLOCKS_KEPT:  # this launch may use some of them already
                frame.older, frame.values = frame.values, {}
            frame.values[value] = found
        return found[0]

    def run_once(self, arguments: list[int], grid: Dim3, tptg: Dim3, threads: Dim3, arena: int, check: int) -> int:
        """Launch on the calling thread, with the state of a checker; returns the status."""
        args = (ctypes.c_void_p * max(len(arguments), 1))(*arguments)
        head = (ctypes.addressof(args), *grid, *tptg, *threads, arena, 1, 0)
        buffer = ctypes.create_string_buffer(_LAUNCH.size)
        _LAUNCH.pack_into(buffer, 0, *head, 0, 0, 0, 0, check)
        stride = -(-int(self._bytes(ctypes.addressof(buffer))) // _STACK_ALIGN) * _STACK_ALIGN
        _LAUNCH.pack_into(buffer, 0, *head, _workspace(stride), stride, 0, 0, check)
        return int(self._launch(ctypes.addressof(buffer)))

    def _block(
        self,
        frame: _Frame,
        grid: Dim3,
        tptg: Dim3,
        threads: Dim3,
        dynamic: tuple[int, ...],
        pool_threads: int,
        gomp: int,
    ) -> tuple[int, object]:
        """The launch block of a shape; offsets of dynamic threadgroup arguments go behind the bound arguments."""
        arena, bound = self.meta.threadgroup_bytes, len(self.meta.params)
        for i, size in enumerate(dynamic, bound):
            arena = (arena + 15) & ~15
            frame.args[i] = arena
            arena += size
        if arena > MAX_ARENA:
            raise ArgumentError(
                f"threadgroup_memory: kernel '{self.meta.name}' needs {arena} bytes with its own variables; the limit "
                f"is {MAX_ARENA} on the cpu (32768 on Apple GPUs)"
            )
        count = min(pool_threads, math.prod(grid)) if gomp else 1
        head = (ctypes.addressof(frame.args), *grid, *tptg, *threads, arena, count, gomp)
        buffer = ctypes.create_string_buffer(_LAUNCH.size)
        address = ctypes.addressof(buffer)
        _LAUNCH.pack_into(buffer, 0, *head, 0, 0, 0, 0, 0)
        stride = -(-int(self._bytes(address)) // _STACK_ALIGN) * _STACK_ALIGN
        _LAUNCH.pack_into(buffer, 0, *head, _workspace(stride * count), stride, 0, 0, 0)
        if len(frame.blocks) >= _BLOCKS_KEPT or dynamic:
            frame.blocks.clear()
        frame.blocks[(grid, tptg, threads, dynamic, pool_threads, gomp)] = (address, buffer)
        return address, buffer

    def check(self, grid: Dim3, tptg: Dim3) -> None:
        """Raise ArgumentError for a grid this device cannot run."""
        size = math.prod(tptg)
        if size > _MAX_THREADS:
            raise ArgumentError(f"threads_per_threadgroup = {tptg} is {size} threads; the limit is {_MAX_THREADS}")
        if self.meta.lanes == 1 and size != 1:
            raise ArgumentError(
                f"kernel '{self.meta.name}' is compiled for 1 lane on the cpu, where a threadgroup is one thread; "
                f"threads_per_threadgroup is {tptg}"
            )
        if math.prod(grid) > _MAX_GRID:
            raise ArgumentError(f"grid {grid} is {math.prod(grid)} threadgroups; the limit is {_MAX_GRID}")


def raise_status(name: str, status: int) -> None:
    """Raise DriverError unless a launch's status is 0."""
    if status:
        raise DriverError(
            f"kernel '{name}': no thread of a threadgroup can go on (a barrier or simdgroup function that some threads "
            f"never reach); status {status}"
        )


def aligned(value: bytes, keep: list[object], alignment: int) -> int:
    """Address of a copy of `value` at a multiple of `alignment` bytes (a power of two; at least 16), alive as long as
    `keep`."""
    alignment = max(alignment, 16)
    buffer = ctypes.create_string_buffer(len(value) + alignment)
    keep.append(buffer)
    address = (ctypes.addressof(buffer) + alignment - 1) & -alignment
    ctypes.memmove(address, value, len(value))
    return address
