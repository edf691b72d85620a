"""NVFP4: FP4 codes in groups of 16, each with an FP8 E4M3 scale, and one float scale t for the tensor.

weight = t · s · value; t = amax / (6 · 448), s = E4M3(amax of the group / (6 t)).
"""

from __future__ import annotations

from metal_marlin.formats.codec import Codec
from metal_marlin.formats.fp4 import VALUES

NVFP4 = Codec("nvfp4", 4, VALUES, scale_kind="e4m3", groups=(16,), largest=6.0)
