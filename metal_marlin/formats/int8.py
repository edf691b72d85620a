"""INT8: two's complement bytes −128…127, four a word; scale = amax / 127. Twin of INT8 in ``src/formats/int8.h``."""

from __future__ import annotations

from metal_marlin.formats.codec import Codec

INT8 = Codec("int8", 8, tuple(float(code - 256 * (code > 127)) for code in range(256)), largest=127.0)
