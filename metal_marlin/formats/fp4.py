"""FP4 (E2M1, OCP Microscaling specification): 16 values, eight codes a word, scale = amax / 6.

Code = sign (bit 3), exponent (bits 2 and 1, bias 1), mantissa (bit 0). Twin of ``src/formats/fp4.h``.
"""

from __future__ import annotations

from metal_marlin.formats.codec import Codec

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = (*MAGNITUDES, *(-m for m in MAGNITUDES))

FP4 = Codec("fp4", 4, VALUES, largest=6.0)
