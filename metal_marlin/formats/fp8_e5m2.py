"""FP8 E5M2 (IEEE): sign, five exponent bits (bias 15), two mantissa bits; 57344 at most, infinities and NaNs.

Four codes a word; scale = amax / 57344. Twin of FP8E5M2 in ``src/formats/fp8.h``.
"""

from __future__ import annotations

import math

from metal_marlin.formats.codec import Codec


def value(code: int) -> float:
    """The number that a byte stands for."""
    sign, exponent, mantissa = (-1.0 if code & 0x80 else 1.0), code >> 2 & 31, code & 3
    if exponent == 31:
        return math.nan if mantissa else sign * math.inf
    return sign * (math.ldexp(mantissa, -16) if exponent == 0 else math.ldexp(4 + mantissa, exponent - 17))


FP8_E5M2 = Codec("fp8_e5m2", 8, tuple(map(value, range(256))), largest=57344.0)
