"""Errors of the library. Messages name the argument and the numbers; none is ever replaced by a fallback."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class MetalMarlinError(RuntimeError):
    """Base of every error raised here."""


class NoDeviceError(MetalMarlinError):
    """The device asked for is not here, or too old."""


class CompilerNotFound(MetalMarlinError):
    """A row must be compiled and there is no compiler; says what to install."""


class MetalCompileError(MetalMarlinError):
    """The MSL source is wrong; carries the .metal file and line."""


class DriverError(MetalMarlinError):
    """A device's driver refused a call."""


class ArgumentError(MetalMarlinError, ValueError):
    """An argument does not fit; names it and the numbers."""


class KernelCheckError(MetalMarlinError):
    """Checked mode found something; ``findings`` (runtime/checked.py) hold kernel, line, threads and address."""

    def __init__(self, kernel: str, findings: Sequence[object]) -> None:
        self.kernel, self.findings = kernel, tuple(findings)
        count = f"{len(self.findings)} finding" + "s" * (len(self.findings) > 1)
        super().__init__("\n".join([f"kernel '{kernel}': {count} of the checker", *map(str, self.findings)]))


class UnknownKernelError(MetalMarlinError, KeyError):
    """No kernel of that name; lists the nearest ones."""

    def __init__(self, name: str, known: Sequence[str]) -> None:
        near = difflib.get_close_matches(name, known, n=5, cutoff=0.4)
        hint = f"; nearest: {', '.join(near)}" if near else f"; there are {len(known)} kernels" if known else ""
        self.message = f"unknown kernel '{name}'{hint}"
        super().__init__(self.message)

    def __str__(self) -> str:  # KeyError would quote the message
        return self.message
