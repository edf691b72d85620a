"""What an op module declares about itself; the kernel inventory is derived from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any


@dataclass(frozen=True)
class OpSpec:
    """One op: the meaning behind one or several kernel rows.

    An op module binds a spec (or a tuple of them) to the name ``OP``. Everything that the inventory, the
    tests and the bench know about an op is read from here.

    Attributes:
        name: the op as users call it, ``metal_marlin.ops.<name>``.
        family_file: the ``.metal`` file of ``src/`` that holds its rows, for example ``"decode_gemv.metal"``.
        reference: float64 PyTorch function that defines the result (``<op>_ref``).
        cases: small shapes for tests and model shapes for the bench; each element's ``str()`` is its id.
        bench: path of the bench that times the op, relative to the repository, or None.
        kernels: shell-style patterns of the row names that belong to the op, for files whose rows serve
            several ops. A row may be claimed by one op only.
    """

    name: str
    family_file: str
    reference: Callable[..., Any]
    cases: Sequence[Any]
    bench: str | None = None
    kernels: tuple[str, ...] = ("*",)

    def claims(self, file: str, kernel: str) -> bool:
        """True when the row ``kernel`` of ``file`` (a base name) belongs to this op."""
        return file == self.family_file and any(fnmatchcase(kernel, p) for p in self.kernels)

    @property
    def reference_path(self) -> str:
        """Dotted path of the reference, ``package.module.function``."""
        return f"{self.reference.__module__}.{self.reference.__qualname__}"
