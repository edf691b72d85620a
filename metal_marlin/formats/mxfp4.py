"""MXFP4 (OCP Microscaling): FP4 codes in groups of 32, each with a power of two as scale, 2^(byte − 127)."""

from __future__ import annotations

from metal_marlin.formats.codec import Codec
from metal_marlin.formats.fp4 import VALUES

MXFP4 = Codec("mxfp4", 4, VALUES, scale_kind="e8m0", groups=(32,), largest=6.0)
