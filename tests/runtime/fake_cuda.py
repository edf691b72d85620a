"""A CUDA driver made of ctypes callbacks: real marshalling through the C calling convention, no GPU.

`FakeCuda` keeps what was launched. Attributes set what it answers: `capability`, `driver_version`, `fail`
(status by function name), `max_threads` (threads per block that registers allow unless assembled for more).
"""

from __future__ import annotations

import ctypes
import struct
from ctypes import CFUNCTYPE, c_int
from dataclasses import dataclass, field
from typing import Any

from metal_marlin.runtime import _driver

NAMES = {1: b"CUDA_ERROR_INVALID_VALUE", 218: b"CUDA_ERROR_INVALID_PTX", 700: b"CUDA_ERROR_ILLEGAL_ADDRESS"}


@dataclass
class Launch:
    """One launch as the driver saw it: the entry's symbol, its shape and the bytes of its parameters."""

    symbol: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    stream: int
    params: list[bytes]
    context: int


@dataclass
class FakeCuda:
    """`sizes`: bytes of each parameter of the kernel that will be launched."""

    sizes: list[int] = field(default_factory=list)
    capability: tuple[int, int] = (9, 0)
    driver_version: int = 13000
    devices: int = 2
    max_threads: int = 1024
    fail: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.calls: list[str] = []
        self.launches: list[Launch] = []
        self.assembled: list[tuple[bytes, dict[int, int]]] = []
        self.contexts = [0]  # current one last; the bottom stands for "none"
        self.shared_limits: dict[int, int] = {}
        self._symbols: list[str] = []
        self._threads: list[int] = []
        self._keep: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)
        handler = getattr(type(self), "_" + name.removesuffix("_v2"), None)

        def called(*args: Any) -> int:
            self.calls.append(name)
            if self.fail.get(name):
                return self.fail[name]
            return (handler(self, *args) if handler else 0) or 0

        function = CFUNCTYPE(c_int, *_driver.SIGNATURES[name])(called)
        self._keep.append(function)
        setattr(self, name, function)
        return function

    def _cuDriverGetVersion(self, out: Any) -> None:  # noqa: N802
        out[0] = self.driver_version

    def _cuGetErrorName(self, status: int, out: Any) -> None:  # noqa: N802
        out[0] = NAMES.get(status, b"CUDA_ERROR_OTHER")

    def _cuGetErrorString(self, status: int, out: Any) -> None:  # noqa: N802
        out[0] = b"what it means"

    def _cuDeviceGetCount(self, out: Any) -> None:  # noqa: N802
        out[0] = self.devices

    def _cuDeviceGet(self, out: Any, index: int) -> None:  # noqa: N802
        out[0] = index

    def _cuDeviceGetName(self, out: Any, size: int, device: int) -> None:  # noqa: N802
        pass  # a c_char_p argument arrives as a copy; the name stays empty

    def _cuDeviceGetAttribute(self, out: Any, number: int, device: int) -> None:  # noqa: N802
        out[0] = {75: self.capability[0], 76: self.capability[1], 8: 49152, 97: 232448}[number]

    def _cuDevicePrimaryCtxRetain(self, out: Any, device: int) -> None:  # noqa: N802
        out[0] = 1000 + device

    def _cuCtxSetCurrent(self, context: int) -> None:  # noqa: N802
        self.contexts[-1] = context

    def _cuCtxPushCurrent(self, context: int) -> None:  # noqa: N802
        self.contexts.append(context)

    def _cuCtxPopCurrent(self, out: Any) -> None:  # noqa: N802
        self.contexts.pop()

    def _cuModuleLoadDataEx(self, out: Any, text: bytes, count: int, keys: Any, values: Any) -> int:  # noqa: N802
        options = {keys[i]: values[i] for i in range(count)}
        if b"broken" in text:
            ctypes.memmove(options[5], b"ptxas: line 3: unknown symbol\0", 30)
            return 218
        self.assembled.append((text, options))
        self._symbols.append(text.split(b".entry ")[1].split(b"(")[0].decode())
        self._threads.append(max(options.get(1, 0), self.max_threads))
        out[0] = 500 + len(self._symbols)
        return 0

    def _cuModuleGetFunction(self, out: Any, module: int, name: bytes) -> int:  # noqa: N802
        out[0] = module
        return 0 if self._symbols[module - 501].encode() == name else 500

    def _cuFuncGetAttribute(self, out: Any, number: int, function: int) -> None:  # noqa: N802
        out[0] = {0: self._threads[function - 501], 4: 40}.get(number, 0)

    def _cuFuncSetAttribute(self, function: int, number: int, value: int) -> None:  # noqa: N802
        self.shared_limits[function] = value

    def _cuLaunchKernelEx(self, config: int, function: int, params: int, extra: int) -> None:  # noqa: N802
        fields = struct.unpack("<7I4xQQI4x", ctypes.string_at(config, 56))
        assert extra is None
        assert fields[8:] == (0, 0)
        pointers = (ctypes.c_void_p * len(self.sizes)).from_address(params) if self.sizes else ()
        values = [ctypes.string_at(at, size) for at, size in zip(pointers, self.sizes, strict=True)]
        symbol = self._symbols[function - 501]
        context = self.contexts[-1]
        self.launches.append(Launch(symbol, fields[:3], fields[3:6], fields[6], fields[7], values, context))
