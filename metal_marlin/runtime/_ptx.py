"""What the cuda device reads in a PTX text, and the kernel's name written into it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from metal_marlin.errors import DriverError

ENTRY = b"mm_entry"

# CUDA release whose driver first accepts a PTX ISA version.
_CUDA_OF_ISA = {
    (8, 0): (12, 0),
    (8, 1): (12, 1),
    (8, 2): (12, 2),
    (8, 3): (12, 3),
    (8, 4): (12, 4),
    (8, 5): (12, 5),
    (8, 6): (12, 7),
    (8, 7): (12, 8),
    (8, 8): (12, 9),
    (9, 0): (13, 0),
}
OLDEST_CUDA = _CUDA_OF_ISA[8, 0]

_VERSION = re.compile(rb"^\s*\.version\s+(\d+)\.(\d+)", re.M)
_TARGET = re.compile(rb"^\s*\.target\s+(sm_\d+[af]?)", re.M)
_SIGNATURE = re.compile(rb"\.entry\s+mm_entry\s*\((.*?)\)", re.S)
_PARAM = re.compile(rb"\.param\s+(?:\.align\s+(\d+)\s+)?\.[busf](\d+)\s[^\[]*(?:\[(\d+)\])?$", re.S)


@dataclass(frozen=True)
class Param:
    """One parameter of the entry: bytes and alignment in the launch's parameter block."""

    size: int
    align: int


@dataclass(frozen=True)
class Entry:
    """A PTX module with one kernel: the entry's name and parameters, .version and .target."""

    text: bytes
    symbol: str
    params: tuple[Param, ...]
    isa: tuple[int, int]
    arch: str


def parse(text: bytes, name: str) -> Entry:
    """Read the generated module ``text`` and rename its entry after the kernel ``name``.

    Profilers show the entry's symbol, so the generator's ``mm_entry`` would make all kernels look alike.
    Raises DriverError when ``text`` is not PTX with one ``mm_entry``.
    """
    version, target, signature = (p.search(text) for p in (_VERSION, _TARGET, _SIGNATURE))
    if version is None or target is None or signature is None:
        raise DriverError(f"kernel {name!r}: its binary is not PTX with an entry mm_entry")
    params = tuple(_param(item, name) for item in signature[1].split(b",") if item.strip())
    symbol = symbol_for(name, text)
    renamed = re.sub(rb"(?<![\w$.%])mm_entry(?=_param_\d|(?![\w$]))", symbol.encode(), text)
    return Entry(renamed, symbol, params, (int(version[1]), int(version[2])), target[1].decode())


def symbol_for(name: str, text: bytes = b"") -> str:
    """Return ``name`` as a PTX identifier that ``text`` does not use already."""
    symbol = re.sub(r"[^A-Za-z0-9_]", "_", name)
    if not symbol or not symbol[0].isalpha():
        symbol = "k_" + symbol
    while symbol == "WARP_SZ" or re.search(rb"(?<![\w$.%])" + symbol.encode() + rb"(?![\w$.])", text):
        symbol += "_"
    return symbol


def cuda_for(isa: tuple[int, int]) -> tuple[int, int]:
    """Return the oldest CUDA release (major, minor) whose driver takes PTX of version ``isa``."""
    known = [cuda for version, cuda in _CUDA_OF_ISA.items() if version >= isa]
    return min(known) if known else max(_CUDA_OF_ISA.values())


def runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether PTX for ``arch`` can be assembled for a device: an ``a`` suffix binds it to one capability."""
    digits = arch[3:].rstrip("af")
    needed = (int(digits[:-1]), int(digits[-1]))
    return needed == capability if arch.endswith("a") else needed <= capability


def _param(item: bytes, name: str) -> Param:
    match = _PARAM.match(item.strip())
    if match is None:
        raise DriverError(f"kernel {name!r}: cannot read parameter {item.strip().decode(errors='replace')!r}")
    width = int(match[2]) // 8
    return Param(width * int(match[3] or 1), int(match[1] or width))
