"""NVIDIA's driver through ctypes: the calls that load PTX and launch it, in torch's primary contexts.

No CUDA toolkit and no package beyond the driver itself is needed. The module keeps one `Driver` per process;
a child forked after the driver was initialised gets an error, because CUDA does not survive a fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator
from ctypes import POINTER, byref, c_char_p, c_int, c_uint, c_void_p
from dataclasses import dataclass
from typing import Any

import torch

from metal_marlin.errors import DriverError, NoDeviceError
from metal_marlin.runtime import _ptx

_OUT = POINTER(c_void_p)
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuInit": (c_uint,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (_OUT, c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (_OUT,),
    "cuThreadExchangeStreamCaptureMode": (POINTER(c_int),),
    "cuModuleLoadDataEx": (_OUT, c_char_p, c_uint, POINTER(c_int), _OUT),
    "cuModuleGetFunction": (_OUT, c_void_p, c_char_p),
    "cuFuncGetAttribute": (POINTER(c_int), c_int, c_void_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuLaunchKernelEx": (c_void_p, c_void_p, c_void_p, c_void_p),
    "cuTensorMapEncodeTiled": (c_void_p, c_int, c_uint, *[c_void_p] * 5, *[c_int] * 4),
}

_MAJOR, _MINOR, _SHARED_OPTIN, _SHARED_DEFAULT = 75, 76, 97, 8
_JIT_THREADS, _JIT_ERROR_LOG, _JIT_ERROR_LOG_BYTES = 1, 5, 6
_CAPTURE_RELAXED, _LOG_BYTES = 2, 16384
NOT_INITIALIZED, NO_DEVICE = 3, 100
INVALID_CONTEXT, INVALID_HANDLE = 201, 400

FORKED = (
    "CUDA cannot be used in this process: it was forked from one in which CUDA was already initialised. "
    "Start workers with the 'spawn' or 'forkserver' method, or fork before the first use of the GPU"
)


@dataclass(frozen=True)
class Device:
    """One GPU: bytes of shared memory per block without and with opting in, and the context torch uses."""

    index: int
    name: str
    capability: tuple[int, int]
    shared_default: int
    shared_limit: int
    context: c_void_p


class Driver:
    """The loaded driver library. ``version`` is the CUDA release it supports, such as (13, 0)."""

    def __init__(self, library: Any) -> None:
        self.thread = threading.local()  # attribute `bound`: a context of ours is current in this thread
        self._library = library
        self._lock = threading.Lock()
        self._devices: dict[int, Device] = {}
        self._forked = False
        self.initialised = False
        number = c_int()
        self._function("cuDriverGetVersion")(byref(number))
        self.version = (number.value // 1000, number.value % 1000 // 10)
        if self.version < _ptx.OLDEST_CUDA:
            raise DriverError(too_old(self.version, _ptx.OLDEST_CUDA))
        self._functions = {name: self._function(name) for name in SIGNATURES}
        self.launch = self._functions["cuLaunchKernelEx"]

    def _function(self, name: str) -> Any:
        function = getattr(self._library, name)
        function.argtypes, function.restype = SIGNATURES[name], c_int
        return function

    def poison(self) -> None:
        """Make every further use raise: this process is a forked child of one that had initialised CUDA."""
        self._forked = True

        def refuse(*_: object) -> int:
            raise DriverError(FORKED)

        self.launch = refuse

    def refuse_fork(self) -> None:
        """Raise DriverError in a forked child of a process that had initialised CUDA."""
        if self._forked:
            raise DriverError(FORKED)

    def status(self, name: str, *args: Any) -> int:
        """Call the driver function ``name`` and return its status."""
        self.refuse_fork()
        return int(self._functions[name](*args))

    def call(self, name: str, *args: Any, doing: str) -> None:
        """Call the driver function ``name``; raise DriverError, saying what was being done, if it fails."""
        status = self.status(name, *args)
        if status:
            raise DriverError(f"{doing}: {name} failed with {self.describe(status)}")

    def describe(self, status: int) -> str:
        """Return an error's name and the driver's description of it."""
        name, text = c_char_p(), c_char_p()
        self._functions["cuGetErrorName"](status, byref(name))
        self._functions["cuGetErrorString"](status, byref(text))
        said = (name.value or b"CUDA error").decode(), (text.value or b"no description").decode()
        found = f"{said[0]} ({status}): {said[1]}"
        if status == NOT_INITIALIZED:
            found += " (in a forked child of a process that uses CUDA? Use the 'spawn' start method)"
        return found

    def device(self, index: int) -> Device:
        """Return GPU ``index``, initialising CUDA. Raises NoDeviceError when there is none of that index."""
        known = self._devices.get(index)
        if known is not None and not self._forked:
            return known
        if self._forked or torch.cuda._is_in_bad_fork():
            raise DriverError(FORKED)
        with self._lock:
            self._initialise()
            if index not in self._devices:
                self._devices[index] = self._open(index)
            return self._devices[index]

    def _initialise(self) -> None:
        if self.initialised:
            return
        status = self.status("cuInit", 0)
        if status == NO_DEVICE:
            raise NoDeviceError(f"no NVIDIA GPU is visible: {self.describe(status)}")
        if status:
            raise DriverError(f"CUDA does not start: cuInit failed with {self.describe(status)}")
        self.initialised = True

    def _open(self, index: int) -> Device:
        doing = f"opening cuda:{index}"
        count, handle, context = c_int(), c_int(), c_void_p()
        self.call("cuDeviceGetCount", byref(count), doing=doing)
        if not 0 <= index < count.value:
            raise NoDeviceError(f"there is no cuda:{index}: {count.value} NVIDIA GPU(s) are visible")
        self.call("cuDeviceGet", byref(handle), index, doing=doing)
        name = ctypes.create_string_buffer(256)
        self.call("cuDeviceGetName", name, 256, handle, doing=doing)
        self.call("cuDevicePrimaryCtxRetain", byref(context), handle, doing=doing)

        def attribute(number: int) -> int:
            value = c_int()
            self.call("cuDeviceGetAttribute", byref(value), number, handle, doing=doing)
            return value.value

        return Device(
            index,
            name.value.decode(),
            (attribute(_MAJOR), attribute(_MINOR)),
            attribute(_SHARED_DEFAULT),
            attribute(_SHARED_OPTIN),
            context,
        )

    def bind(self, device: Device) -> None:
        """Make ``device``'s context this thread's current one."""
        self.call("cuCtxSetCurrent", device.context, doing=f"using cuda:{device.index}")
        self.thread.bound = True

    @contextlib.contextmanager
    def using(self, device: Device) -> Iterator[None]:
        """Make ``device``'s context current in the block, and restore the previous one."""
        self.call("cuCtxPushCurrent_v2", device.context, doing=f"using cuda:{device.index}")
        try:
            yield
        finally:
            self.status("cuCtxPopCurrent_v2", byref(c_void_p()))

    @contextlib.contextmanager
    def capture_tolerant(self) -> Iterator[None]:
        """Allow loading while a CUDA graph is captured: it touches no stream, so the capture stays valid."""
        mode = c_int(_CAPTURE_RELAXED)
        self.call("cuThreadExchangeStreamCaptureMode", byref(mode), doing="loading a kernel")
        try:
            yield
        finally:
            self.status("cuThreadExchangeStreamCaptureMode", byref(mode))

    def assemble(self, entry: _ptx.Entry, device: Device, threads: int) -> c_void_p:
        """Assemble PTX for ``device``, which is current, and return the loaded module.

        ``threads``: block size that must fit, 0 for none. Raises DriverError with the assembler's log. The driver keeps
        machine code on disk itself. Its linker (cuLink*), which would hand the code over, is no way to get it: it caps
        registers at 168 whatever the block size, and then wgmma instructions wait for each other.
        """
        doing = f"assembling {entry.symbol!r} ({entry.arch}) for {device.name}"
        log = ctypes.create_string_buffer(_LOG_BYTES)
        options = {_JIT_ERROR_LOG: ctypes.addressof(log), _JIT_ERROR_LOG_BYTES: _LOG_BYTES}
        if threads:
            options[_JIT_THREADS] = threads
        keys, values = (c_int * len(options))(*options), (c_void_p * len(options))(*options.values())
        module = c_void_p()
        status = self.status("cuModuleLoadDataEx", byref(module), entry.text + b"\0", len(options), keys, values)
        if status:
            said = log.value.decode(errors="replace").strip() or "(the assembler left no log)"
            raise DriverError(f"{doing}: cuModuleLoadDataEx failed with {self.describe(status)}\n{said}")
        return module


def too_old(have: tuple[int, int], need: tuple[int, int]) -> str:
    """Return the message for a driver of CUDA release ``have`` where ``need`` is the oldest that works."""
    return (
        f"the NVIDIA driver supports CUDA {have[0]}.{have[1]}, but the kernels need {need[0]}.{need[1]} "
        "or newer: update the driver"
    )


_driver: Driver | None = None
_driver_lock = threading.Lock()


def driver() -> Driver:
    """Return this process's driver, loading it on first use (CUDA itself is not initialised by that).

    Raises NoDeviceError when no NVIDIA driver is installed, DriverError when it is too old.
    """
    global _driver
    if _driver is None:
        with _driver_lock:
            if _driver is None:
                _driver = Driver(_open_library())
    return _driver


def _open_library() -> Any:
    names = ("nvcuda.dll",) if os.name == "nt" else ("libcuda.so.1", "libcuda.so")
    for name in names:
        try:
            return ctypes.CDLL(name)  # on 64-bit Windows the driver's calling convention is C's too
        except OSError:
            continue
    raise NoDeviceError(f"no NVIDIA driver is installed: {names[0]} was not found")


def _after_fork() -> None:
    global _driver, _driver_lock
    _driver_lock = threading.Lock()  # another thread may have held it
    if _driver is not None and _driver.initialised:
        _driver.poison()
    else:
        _driver = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
