"""The cuda device: a row's PTX, assembled by NVIDIA's driver and launched on torch's current stream.

Launches are asynchronous, take torch's context and stream as they are, never synchronise with the host and
may be captured in a CUDA graph. Any number of threads may launch one `Executable`.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Sequence
from ctypes import byref, c_int, c_void_p
from typing import TYPE_CHECKING, Any

import torch

from metal_marlin.errors import ArgumentError, DriverError, MetalMarlinError, NoDeviceError
from metal_marlin.msl.target import Target
from metal_marlin.runtime import _driver, _ptx

if TYPE_CHECKING:
    from metal_marlin.msl.row import CompiledRow, ParamMeta

OLDEST_CAPABILITY = (8, 0)
# PTX 8.0 knows no architecture after this one; newer GPUs assemble it.
_NEWEST_PORTABLE = (9, 0)
_MAX_THREADS = 1024
_MAX_BLOCK = (1024, 1024, 64)
_MAX_GRID = (2**31 - 1, 65535, 65535)
_ATTRIBUTES = {"max_threads": 0, "shared_bytes": 1, "local_bytes": 3, "registers": 4}
_SET_DYNAMIC_SHARED = 8
# Faults of an earlier kernel, which the driver reports at whatever call comes next.
_STICKY = {700, 702, 709, 710, 714, 715, 716, 717, 718, 719}
_PLANS_KEPT = 1024

# CUlaunchConfig: grid, block, shared bytes, padding, stream, attributes (none), their number, padding.
_CONFIG = struct.Struct("<7I4xQQI4x")
_put_stream = struct.Struct("<Q").pack_into
_STREAM_AT = 32
# CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION: a launch starts while the one before it ends, if that one lets
# it, and waits for what it wrote by griddepcontrol.wait. Of kernels that have the instruction.
_EARLY = ctypes.create_string_buffer(struct.pack("<I4xI60x", 6, 1), 72)
_WAITS = b"griddepcontrol.wait"

Dim3 = tuple[int, int, int]
Values = Sequence[int | bytes]


def probe() -> str | None:
    """Return None where this device can be used, else the reason why not. Never raises, never starts CUDA."""
    try:
        if not torch.backends.cuda.is_built():
            return "this PyTorch is built without CUDA"
        if torch.version.hip is not None:
            return "this PyTorch is built for AMD GPUs; Metal Marlin's cuda device needs an NVIDIA GPU"
        driver = _driver.driver()
        driver.refuse_fork()
        if torch.cuda._is_in_bad_fork():  # torch had started CUDA, we had not
            return _driver.FORKED
        if torch.cuda.device_count() == 0:
            return "no NVIDIA GPU is visible"
        if torch.cuda.is_initialized():
            target(torch.cuda.current_device())
    except MetalMarlinError as error:
        return str(error)
    except Exception as error:  # a broken driver installation can fail in any way, and asking must be safe
        return f"CUDA does not work here: {error}"
    return None


def target(index: int) -> Target:
    """Return what kernels are compiled for on GPU ``index``. Raises NoDeviceError for one too old."""
    device = _driver.driver().device(index)
    capability = device.capability
    if capability < OLDEST_CAPABILITY:
        have, need = (f"{major}.{minor}" for major, minor in (capability, OLDEST_CAPABILITY))
        raise NoDeviceError(f"cuda:{index} ({device.name}) has compute capability {have}; {need} is the oldest usable")
    if capability == (9, 0):
        return Target.parse("cuda:sm_90a")
    major, minor = min(capability, _NEWEST_PORTABLE)
    return Target.parse(f"cuda:sm_{major}{minor}")


def load(row: CompiledRow, index: int) -> Executable:
    """Load a compiled row on GPU ``index``.

    The driver keeps the machine code (its compute cache): only the first load on a machine assembles the PTX.
    Raises DriverError when the driver is too old for the PTX or rejects it, or the row is for another GPU.
    """
    driver = _driver.driver()
    device = driver.device(index)
    entry = _ptx.parse(row.binary, row.name)
    need = _ptx.cuda_for(entry.isa)
    if driver.version < need:
        raise DriverError(f"kernel {row.name!r}: {_driver.too_old(driver.version, need)}")
    if not _ptx.runs_on(entry.arch, device.capability):
        major, minor = device.capability
        raise DriverError(
            f"kernel {row.name!r} is compiled for {entry.arch}; cuda:{index} ({device.name}) has compute "
            f"capability {major}.{minor}"
        )
    return Executable(row, entry, device, driver)


class _Slot:
    """The memory one launch hands to the driver; reused as soon as the driver has returned."""

    def __init__(self, config: bytes, params: bytes, offsets: tuple[int, ...]) -> None:
        self.config = ctypes.create_string_buffer(config, len(config))
        self.params = ctypes.create_string_buffer(params, max(1, len(params)))
        start = ctypes.addressof(self.params)
        self._pointers = (c_void_p * max(1, len(offsets)))(*(start + offset for offset in offsets))
        self.config_at = c_void_p(ctypes.addressof(self.config))
        self.pointers_at = c_void_p(ctypes.addressof(self._pointers))


class _Plan:
    """Everything about a launch but its arguments and stream: the function and slots filled in advance."""

    def __init__(self, function: c_void_p, config: bytes, params: bytes, offsets: tuple[int, ...]) -> None:
        self.function = function
        self._template = (config, params, offsets)
        # pop and append are atomic: several threads share a plan without a lock.
        self.slots = [self.new_slot()]

    def new_slot(self) -> _Slot:
        return _Slot(*self._template)


class Executable:
    """A row loaded on one GPU.

    Its module is never unloaded: a captured CUDA graph may still launch it. ``resources`` holds what the
    assembler made of it: registers and local (spilled) bytes a thread, static shared bytes, threads a block.
    """

    def __init__(
        self,
        row: CompiledRow,
        entry: _ptx.Entry,
        device: _driver.Device,
        driver: _driver.Driver,
    ) -> None:
        self.name = row.name
        self.symbol = entry.symbol
        self._meta = row.meta
        self._entry, self._device, self._driver = entry, device, driver
        self._index = device.index
        self._lock = threading.Lock()
        self._plans: dict[tuple[Any, ...], _Plan] = {}
        self._variants: dict[int, tuple[c_void_p, dict[str, int]]] = {}
        self._shared_allowed: dict[int, int] = {}
        self._current_device, self._current_stream = _torch_state()
        self._early = _WAITS in row.binary
        self._kinds = tuple(map(self._kind, row.meta.params))
        self._format, self._offsets = _layout(row, entry, self._kinds)
        self._pack = struct.Struct("<" + " ".join(self._format[1:].split()[: len(self._kinds)])).pack_into
        self.resources = self._variant(0)[1]

    def launch(self, values: Values, grid: Dim3, tptg: Dim3, threads: Dim3, dynamic: Sequence[int]) -> None:
        """Launch on torch's current stream.

        ``values``: device addresses of buffers and bytes of values, in parameter order. ``grid``: number of
        threadgroups; ``tptg``: threads per threadgroup; ``threads``: all threads, fewer than the grid's where
        the row was compiled with tails. ``dynamic``: bytes of each threadgroup argument.
        Raises ArgumentError for what the GPU's limits forbid, DriverError for what the driver reports.
        """
        key = (grid, tptg, threads, *dynamic)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._make_plan(key, values)
            if plan is None:
                return
        try:
            slot = plan.slots.pop()
        except IndexError:
            slot = plan.new_slot()
        self._pack(slot.params, 0, *values)
        driver = self._driver
        try:
            _put_stream(slot.config, _STREAM_AT, self._current_stream(self._index))
            here = self._current_device() == self._index
        except RuntimeError:  # torch's words for a forked child; ours say what to do
            driver.refuse_fork()
            raise
        if here and getattr(driver.thread, "bound", False):
            status = driver.launch(slot.config_at, plan.function, slot.pointers_at, None)
        else:
            status = self._launch_elsewhere(plan, slot)
        if status in (_driver.INVALID_CONTEXT, _driver.INVALID_HANDLE):  # another library changed the context
            with driver.using(self._device):
                status = driver.launch(slot.config_at, plan.function, slot.pointers_at, None)
        plan.slots.append(slot)
        if status:
            raise DriverError(self._explain(status, grid, tptg, dynamic))

    def _launch_elsewhere(self, plan: _Plan, slot: _Slot) -> int:
        """Launch from a thread whose current context is another, or none yet."""
        driver = self._driver
        args = slot.config_at, plan.function, slot.pointers_at, None
        if self._current_device() == self._index:
            driver.bind(self._device)
            return int(driver.launch(*args))
        with driver.using(self._device):
            return int(driver.launch(*args))

    def _make_plan(self, key: tuple[Any, ...], values: Values) -> _Plan | None:
        """Check a launch's shape against the limits and prepare it. None: there is nothing to run."""
        self._driver.refuse_fork()  # the lock below may have been held when this process was forked
        grid, tptg, threads, *dynamic = key
        self.check(grid, tptg)
        if 0 in grid or 0 in threads:
            return None
        if threads != tuple(map(int.__mul__, grid, tptg)) and not self._meta.tails:
            raise ArgumentError(
                f"{self.name}: {threads} threads are no multiple of {tptg}; the row is compiled without tails"
            )
        self._check_values(values, dynamic)
        declared = self._meta.threadgroup_bytes
        offsets, shared = arena(declared, dynamic)
        if shared > self._device.shared_limit:
            raise ArgumentError(
                f"{self.name}: {shared} bytes of threadgroup memory ({declared} declared, "
                f"arguments of {list(dynamic)}); cuda:{self._index} ({self._device.name}) has at most "
                f"{self._device.shared_limit}"
            )
        count = tptg[0] * tptg[1] * tptg[2]
        with self._lock:
            function, resources = self._variant(0)
            if count > resources["max_threads"]:
                function, resources = self._variant(-(-count // 128) * 128)
            self._allow_shared(function, shared)
            zeros = [b"" if kind == "value" else 0 for kind in self._kinds]
            params = struct.pack(self._format, *zeros, *offsets, *(threads if self._meta.tails else ()))
            attributes = (ctypes.addressof(_EARLY), 1) if self._early else (0, 0)
            plan = _Plan(function, _CONFIG.pack(*grid, *tptg, shared, 0, *attributes), params, self._offsets)
            if len(self._plans) >= _PLANS_KEPT:
                self._plans.clear()
            self._plans[key] = plan
        return plan

    def check(self, grid: Dim3, tptg: Dim3) -> None:
        """Raise ArgumentError, with the numbers, for a shape that this kernel or the GPU does not allow."""
        name, count = self.name, tptg[0] * tptg[1] * tptg[2]
        limit = self._meta.max_threads
        if min(tptg) < 1 or any(map(int.__gt__, tptg, _MAX_BLOCK)):
            raise ArgumentError(f"{name}: threads_per_threadgroup {tptg}; each must be 1 to {_MAX_BLOCK}")
        if count > min(limit or _MAX_THREADS, _MAX_THREADS):
            why = f"the GPU allows {_MAX_THREADS}" if limit is None else f"the kernel declares {limit} at most"
            raise ArgumentError(f"{name}: {count} threads per threadgroup {tptg}; {why}")
        if min(grid) < 0 or any(map(int.__gt__, grid, _MAX_GRID)):
            raise ArgumentError(f"{name}: {grid} threadgroups; cuda allows at most {_MAX_GRID}")

    def _check_values(self, values: Values, dynamic: Sequence[int]) -> None:
        """Once per shape of launch: struct would cut bytes that are too long without a word."""
        params, sizes = self._meta.params, self._meta.dynamic
        if len(values) != len(params) or len(dynamic) != len(sizes):
            raise ArgumentError(
                f"{self.name}: {len(values)} arguments and {len(dynamic)} threadgroup sizes were given, "
                f"{len(params)} and {len(sizes)} are needed"
            )
        for param, kind, value in zip(params, self._kinds, values, strict=True):
            if kind == "value" and param.enabled and len(value) != param.type.size:  # type: ignore[arg-type]
                wanted = f"{param.type.size} bytes of {param.type}"
                raise ArgumentError(f"{self.name}: argument {param.name!r} is not {wanted}")

    def _kind(self, param: ParamMeta) -> str:
        """How a parameter reaches the entry: a value that may be too large for it travels as an address."""
        return "buffer" if param.name in self._meta.by_pointer else param.kind

    def _variant(self, threads: int) -> tuple[c_void_p, dict[str, int]]:
        """Return a function and its resources, assembled so that blocks of ``threads`` fit (0: no demand)."""
        if threads not in self._variants:
            with self._driver.capture_tolerant(), self._driver.using(self._device):
                function = self._load_module(threads)
                resources = {key: self._attribute(function, number) for key, number in _ATTRIBUTES.items()}
            if resources["max_threads"] < threads:
                raise ArgumentError(
                    f"{self.name}: threadgroups of {threads} threads do not fit cuda:{self._index}, which "
                    f"runs {resources['max_threads']} ({resources['registers']} registers a thread)"
                )
            self._variants[threads] = function, resources
        return self._variants[threads]

    def _load_module(self, threads: int) -> c_void_p:
        entry, function = self._entry, c_void_p()
        module = self._driver.assemble(entry, self._device, threads)
        doing = f"looking up {self.symbol!r}"
        self._driver.call("cuModuleGetFunction", byref(function), module, entry.symbol.encode(), doing=doing)
        return function

    def _attribute(self, function: c_void_p, number: int) -> int:
        value, doing = c_int(), f"reading {self.name!r}"
        self._driver.call("cuFuncGetAttribute", byref(value), number, function, doing=doing)
        return value.value

    def _allow_shared(self, function: c_void_p, size: int) -> None:
        handle = function.value or 0
        if size <= self._shared_allowed.get(handle, self._device.shared_default):
            return
        with self._driver.using(self._device):
            doing = f"giving {self.name!r} {size} bytes of shared memory"
            self._driver.call("cuFuncSetAttribute", function, _SET_DYNAMIC_SHARED, size, doing=doing)
        self._shared_allowed[handle] = size

    def _explain(self, status: int, grid: Dim3, tptg: Dim3, dynamic: Sequence[int]) -> str:
        shared = arena(self._meta.threadgroup_bytes, dynamic)[1]
        text = (
            f"launching {self.name!r} on cuda:{self._index} failed with {self._driver.describe(status)}; "
            f"grid {grid}, threads per threadgroup {tptg}, threadgroup memory {shared} bytes, "
            f"{self.resources['registers']} registers a thread"
        )
        if status in _STICKY:
            text += ". An earlier kernel may be the cause: set CUDA_LAUNCH_BLOCKING=1 to see which"
        return text


def _torch_state() -> tuple[Any, Any]:
    """Return torch's functions for the current device and, given a device, its current stream's handle."""
    device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
    stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return device, stream or (lambda index: torch.cuda.current_stream(index).cuda_stream)


def arena(static: int, dynamic: Sequence[int]) -> tuple[list[int], int]:
    """Lay out a threadgroup's memory: what the kernel declares, then each threadgroup argument.

    Returns the arguments' byte offsets and the total size in bytes.
    """
    offsets, end = [], static
    for size in dynamic:
        start = -(-end // 16) * 16
        offsets.append(start)
        end = start + size
    return offsets, end


def _layout(row: CompiledRow, entry: _ptx.Entry, kinds: tuple[str, ...]) -> tuple[str, tuple[int, ...]]:
    """Return the struct format of the entry's parameter block and each parameter's offset in it.

    Sizes and alignments are the PTX's own; what reflection says is checked against them.
    """
    extras = len(row.meta.dynamic) + (3 if row.meta.tails else 0)
    wanted = [8 if kind == "buffer" else p.type.size for kind, p in zip(kinds, row.meta.params, strict=True)]
    wanted += [4] * extras
    sizes = [p.size for p in entry.params]
    if len(wanted) != len(sizes) or any(w > size for w, size in zip(wanted, sizes, strict=True)):
        raise DriverError(
            f"kernel {row.name!r}: its entry has parameters of {sizes} bytes, the description says {wanted}: "
            "the stored row is inconsistent, clear the cache"
        )
    text, offsets, end = "<", [], 0
    for kind, param in zip([*kinds, *["uint"] * extras], entry.params, strict=True):
        at = -(-end // param.align) * param.align
        code = {"buffer": "Q", "uint": "I"}.get(kind) or f"{param.size}s"
        text += f"{at - end}x{code} "
        offsets.append(at)
        end = at + param.size
    return text, tuple(offsets)
