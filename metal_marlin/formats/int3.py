"""INT3: codes 0…7, 32 in three words, around a zero of 3.5; scale = amax / 3.5. Twin of ``src/formats/int3.h``."""

from __future__ import annotations

from metal_marlin.formats.codec import Codec

INT3 = Codec("int3", 3, tuple(code - 3.5 for code in range(8)), largest=3.5)
