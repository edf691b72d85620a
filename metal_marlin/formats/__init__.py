"""Quantisation formats: one codec a format, twin of the policy struct in ``src/formats``."""

from __future__ import annotations

from metal_marlin.errors import ArgumentError
from metal_marlin.formats.codec import Codec, Encoded
from metal_marlin.formats.fp4 import FP4
from metal_marlin.formats.fp8_e4m3 import FP8_E4M3
from metal_marlin.formats.fp8_e5m2 import FP8_E5M2
from metal_marlin.formats.int2 import INT2
from metal_marlin.formats.int3 import INT3
from metal_marlin.formats.int4 import INT4
from metal_marlin.formats.int8 import INT8
from metal_marlin.formats.mxfp4 import MXFP4
from metal_marlin.formats.nf3 import NF3
from metal_marlin.formats.nvfp4 import NVFP4
from metal_marlin.formats.uint8 import UINT8

__all__ = ["CANONICAL", "CODECS", "MMA16", "Codec", "Encoded", "codec"]

CANONICAL = "canonical"  # layout tag of what files hold: row-per-output, little-endian, least significant code first
MMA16 = "mma16"  # that of operand order: src/core/packed.h
_ALL = (FP4, MXFP4, NVFP4, INT4, INT8, UINT8, FP8_E4M3, FP8_E5M2, INT2, INT3, NF3)
CODECS: dict[str, Codec] = {c.name: c for c in _ALL}


def codec(name: str) -> Codec:
    """The codec of a format. Raises ArgumentError with the known names."""
    found = CODECS.get(name)
    if found is None:
        raise ArgumentError(f"format = {name!r}; there are {', '.join(CODECS)}")
    return found
