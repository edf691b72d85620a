"""Devices by name: one module `device_<kind>.py` each, with `probe`, `target` and `load`."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol

from metal_marlin.errors import ArgumentError, NoDeviceError


class Executable(Protocol):
    """A loaded row. Where it has a true attribute `takes_tensors`, buffers are passed as tensors, not as addresses."""

    def check(self, grid: tuple[int, int, int], tptg: tuple[int, int, int]) -> None:
        """Raise ArgumentError for a launch shape that the device cannot run; called once for each new one."""

    def launch(
        self,
        arguments: list[int | bytes],
        grid: tuple[int, int, int],
        tptg: tuple[int, int, int],
        threads: tuple[int, int, int],
        dynamic: list[int],
    ) -> None:
        """Enqueue (cuda, mps) or run (cpu). `arguments`: an address per buffer, the bytes of a value, in parameter
        order; `grid` threadgroups; `tptg` threads per threadgroup; `threads` in all; `dynamic` byte sizes."""


@dataclass(frozen=True)
class DeviceId:
    """A kind and an index, as in "cuda:1"."""

    kind: str
    index: int = 0

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


def kinds() -> list[str]:
    """Device kinds that have a module here, best first."""
    found = sorted(p.stem.removeprefix("device_") for p in Path(__file__).parent.glob("device_*.py"))
    return sorted(found, key=lambda kind: kind == "cpu")


@functools.cache
def device_module(kind: str) -> ModuleType:
    """The module of a device kind. Raises NoDeviceError for a kind that does not exist."""
    if kind not in kinds():
        raise NoDeviceError(f"unknown device '{kind}'; known: {', '.join(kinds())}")
    return importlib.import_module(f"metal_marlin.runtime.device_{kind}")


def resolve_device(name: object = None) -> DeviceId:
    """Device from "cuda:1", "cpu", a torch.device, or None (best usable one: cuda, mps, cpu).

    Raises NoDeviceError with the reason when it cannot be used here, ArgumentError for an index that none has.
    """
    if name is None:
        for kind in kinds():
            if device_module(kind).probe() is None:
                return resolve_device(kind)
        reasons = "; ".join(f"{kind}: {device_module(kind).probe()}" for kind in kinds())
        raise NoDeviceError(f"no device: {reasons}")
    kind, colon, index = str(name).partition(":")
    probe = device_module(kind).probe
    if colon and not (index.isascii() and index.isdigit()):
        raise ArgumentError(f"device '{name}': '{index}' is not a number")
    if kind != "cuda" and int(index or 0):
        raise ArgumentError(f"device '{name}': there is one {kind} device, '{kind}'")
    reason = probe()
    if reason is not None:
        raise NoDeviceError(f"no device: {kind}: {reason}")
    if not index and kind == "cuda":
        import torch

        index = str(torch.cuda.current_device())
    return DeviceId(kind, int(index or 0))
