"""Tables of measured choices: which kernel an op of ``OPS`` runs where somebody has timed it.

A table belongs to a kind of device. The user's own (`metal-marlin tune`, `with tune():`) is read before the one that
ships with the package; METAL_MARLIN_TUNED names another file, or is "off". Without an entry `plan` decides.
"""

from __future__ import annotations

import bisect
import functools
import json
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from metal_marlin.errors import MetalMarlinError
from metal_marlin.files import whole_file
from metal_marlin.msl.target import Target
from metal_marlin.ops.weights import KEYS
from metal_marlin.runtime.cache import default_directory

VERSION = 1
OPS = ("linear", "linear_packed", "linear_packed_sparse")  # each a section of a table
Choices = dict[str, dict[int, str]]  # problem -> tokens measured -> kernel, or ``LIBRARY``
LIBRARY = "dequantize"  # in place of a kernel: decode W into memory, torch multiplies
_ENV = "METAL_MARLIN_TUNED"
_SHIPPED = Path(__file__).parent.parent / "tables"


@dataclass(frozen=True)
class Problem:
    """What a choice is for, but for the number of tokens: W [N, K] in a format, dtypes of x and of the scales."""

    format: str
    zeros: str
    dtype: torch.dtype
    scale_dtype: torch.dtype
    N: int
    K: int

    def __str__(self) -> str:
        scales = KEYS.get(self.scale_dtype, "own")
        return f"{self.format}-{self.zeros}-{KEYS[self.dtype]}-{scales}-{self.N}x{self.K}"


@dataclass
class Table:
    """Choices for one kind of device, by op."""

    device: str
    about: dict[str, str] = field(default_factory=dict)
    sections: dict[str, Choices] = field(default_factory=lambda: {op: {} for op in OPS})

    def choice(self, problem: Problem, M: int, op: str = "linear") -> str | None:
        """What was fastest for the next larger number of tokens measured; None beyond the largest, or without any."""
        found = self.sections[op].get(str(problem))
        if not found or M < 1:
            return None
        tokens = sorted(found)
        at = bisect.bisect_left(tokens, M)
        return found[tokens[at]] if at < len(tokens) else None

    def put(self, problem: Problem, M: int, kernel: str, op: str = "linear") -> None:
        """Note that ``kernel`` is fastest for M tokens."""
        self.sections[op].setdefault(str(problem), {})[M] = kernel

    def save(self, path: Path) -> None:
        """Write the table, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        data: dict[str, Any] = {"version": VERSION, "device": self.device, "about": self.about}
        for op, section in self.sections.items():
            data[op] = {name: {str(m): k for m, k in sorted(of.items())} for name, of in sorted(section.items())}
        text = json.dumps(data, indent=1)
        with whole_file(path) as file:
            file.write_text(text + "\n", encoding="utf-8")

    @staticmethod
    def load(path: Path) -> Table:
        """Raises MetalMarlinError, naming the file, for what is no table of this version."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["version"] != VERSION:
                raise MetalMarlinError(
                    f"{path}: is a table of version {data['version']}, this is {VERSION}; tune again"
                )
            found = {op: data[op] if op == "linear" else data.get(op, {}) for op in OPS}  # the first had no other
            sections = {
                op: {name: {int(m): str(k) for m, k in of.items()} for name, of in section.items()}
                for op, section in found.items()
            }
            return Table(str(data["device"]), dict(data["about"]), sections)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise MetalMarlinError(f"{path}: is no table of tuned choices ({error}); delete it or tune again") from None


def device_key(kind: str, index: int = 0) -> str:
    """What a table is for: cpu by instructions and threads, cuda by compute capability and multiprocessors."""
    if kind == "cpu":
        return f"{Target.host_cpu()}-{torch.get_num_threads()}".replace(":", "-")  # also a file's name
    if kind == "cuda":
        at = torch.cuda.get_device_properties(index)
        return f"cuda-{at.major}.{at.minor}-{at.multi_processor_count}"
    return kind


def user_path(key: str) -> Path:
    """Where the user's table for a device is kept."""
    return default_directory() / "tuned" / f"{key}.json"


@functools.lru_cache(maxsize=32)
def tables(key: str) -> tuple[Table, ...]:
    """Tables for a device, the first that has an entry counts. Raises MetalMarlinError for one that cannot be read or,
    named by METAL_MARLIN_TUNED, is for another device."""
    asked = os.environ.get(_ENV, "")
    if asked == "off":
        return ()
    if asked:
        table = Table.load(Path(asked))
        if table.device != key:
            raise MetalMarlinError(f"{_ENV}={asked}: is a table for {table.device}, this device is {key}")
        return (table,)
    paths = (user_path(key), _SHIPPED / f"{key}.json")
    return tuple(Table.load(path) for path in paths if path.is_file())


def choice(problem: Problem, M: int, kind: str, index: int, op: str = "linear") -> str | None:
    """The kernel of ``op`` that a table names for x [M, K] on a device; None: `plan` decides."""
    for table in tables(device_key(kind, index)):
        found = table.choice(problem, M, op)
        if found is not None:
            return found
    return None


caches: list[Any] = [tables]  # functions that remember choices


def forget() -> None:
    """Read the tables again at the next call."""
    for function in caches:
        function.cache_clear()


class _Active(threading.local):
    session: Any = None


active = _Active()  # the session of `with tune():` in this thread
