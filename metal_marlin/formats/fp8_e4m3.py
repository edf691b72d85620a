"""FP8 E4M3 (OCP "fn"): sign, four exponent bits (bias 7), three mantissa bits.

448 at most, S.1111.111 is NaN, no infinity. Four codes a word; scale = amax / 448.
Twin of FP8E4M3 in ``src/formats/fp8.h``.
"""

from __future__ import annotations

import math

from metal_marlin.formats.codec import Codec


def value(code: int) -> float:
    """The number that a byte stands for."""
    sign, exponent, mantissa = (-1.0 if code & 0x80 else 1.0), code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10))


FP8_E4M3 = Codec("fp8_e4m3", 8, tuple(map(value, range(256))), largest=448.0)
