"""What an op module declares about itself; the kernel inventory is derived from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch


@dataclass(frozen=True)
class Check:
    """How far a result is from its reference, at the place that is closest to (or furthest over) what is allowed."""

    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # False for NaN


def worst(error: torch.Tensor, allowed: torch.Tensor) -> Check:
    """The check of the place where the error is the largest part of what is allowed, NaN first; empty passes."""
    if not error.numel():
        return Check(0.0, 0.0)
    error, allowed = error.flatten(), allowed.expand_as(error).flatten()
    place = ((error + 1e-300) / (allowed + 1e-300)).nan_to_num(nan=torch.inf).argmax()
    return Check(error[place].item(), allowed[place].item())


@dataclass(frozen=True)
class OpSpec:
    """One op: the meaning behind one or several kernel rows.

    An op module binds a spec (or a tuple of them) to the name ``OP``. Everything that the inventory, the
    tests and the bench know about an op is read from here.

    Attributes:
        name: the op as users call it, ``metal_marlin.ops.<name>``.
        family_file: the ``.metal`` file of ``src/`` that holds its rows, for example ``"decode_gemv.metal"``.
        more_files: further files whose rows are all the op's.
        reference: float64 PyTorch function that defines the result (``<op>_ref``).
        cases: small shapes for tests and model shapes for the bench; each element's ``str()`` is its id.
        bench: path of the bench that times the op, relative to the repository, or None.
        kernels: shell-style patterns of the row names that belong to the op, for files whose rows serve
            several ops. A row may be claimed by one op only.
        check: runs a case on a device, by a kernel of the family or the op's choice (None), and compares it with
            the reference; None: ``metal-marlin selftest`` leaves the op out.
        row_case: a case, and the kernel to ask for, that launch the row of a name; for rows that no case needs.
    """

    name: str
    family_file: str
    reference: Callable[..., Any]
    cases: Sequence[Any]
    bench: str | None = None
    kernels: tuple[str, ...] = ("*",)
    check: Callable[[Any, str, str | None], Check] | None = None
    row_case: Callable[[str], tuple[Any, str]] | None = None
    more_files: tuple[str, ...] = ()

    def claims(self, file: str, kernel: str) -> bool:
        """True when the row ``kernel`` of ``file`` (a base name) belongs to this op."""
        if file in self.more_files:
            return True
        return file == self.family_file and any(fnmatchcase(kernel, p) for p in self.kernels)

    @property
    def reference_path(self) -> str:
        """Dotted path of the reference, ``package.module.function``."""
        return f"{self.reference.__module__}.{self.reference.__qualname__}"
