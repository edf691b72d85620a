"""UINT8: bytes 0…255, four a word, with a zero (float or packed) or a bias; scale = (max − min) / 255.

Twin of UINT8 in ``src/formats/int8.h``.
"""

from __future__ import annotations

from metal_marlin.formats.codec import Codec

UINT8 = Codec("uint8", 8, tuple(map(float, range(256))), zero_kinds=("packed", "point", "bias"), largest=255.0)
