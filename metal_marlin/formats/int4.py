"""INT4: unsigned codes 0…15, eight a word; the zero is 8, or a float, or packed, or there is a bias instead.

Without zeros the range is symmetric, scale = 2 amax / 15; with zeros or biases scale = (max − min) / 15.
Twin of ``src/formats/int4.h``: its INT4 is the code less 8, its UINT4 the code.
"""

from __future__ import annotations

from metal_marlin.formats.codec import Codec

INT4 = Codec(
    "int4",
    4,
    tuple(float(code) for code in range(16)),
    zero_kinds=("none", "point", "packed", "bias"),
    middle=8,
    largest=7.5,
)
