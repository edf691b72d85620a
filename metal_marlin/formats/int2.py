"""INT2: codes 0…3, sixteen a word, around a zero of 1.5; scale = amax / 1.5. Twin of ``src/formats/int2.h``."""

from __future__ import annotations

from metal_marlin.formats.codec import Codec

INT2 = Codec("int2", 2, tuple(code - 1.5 for code in range(4)), largest=1.5)
