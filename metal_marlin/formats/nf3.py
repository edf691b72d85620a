"""NF3: eight values that are dense where a normal distribution is, 32 codes in three words; scale = amax.

The values are float32 numbers. Twin of ``src/formats/nf3.h``.
"""

from __future__ import annotations

import torch

from metal_marlin.formats.codec import Codec

VALUES = (-1.0, -0.5350227, -0.2469314, 0.0, 0.1833375, 0.3819940, 0.6229857, 1.0)

NF3 = Codec("nf3", 3, tuple(torch.tensor(VALUES, dtype=torch.float32).tolist()), largest=1.0)
