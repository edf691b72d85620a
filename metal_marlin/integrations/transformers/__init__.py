"""transformers: the quantizer ``metal_marlin``, fusion of decoder models, foreign checkpoints on our kernels.

``register()`` once before ``from_pretrained``: transformers finds no plug-ins by itself.
"""

from __future__ import annotations

import importlib
import re

from metal_marlin.errors import MetalMarlinError

OLDEST, NEWEST = (5, 20), (5, 25)  # verified: from the first up to, without, the second
_registered = False


def register() -> None:
    """Make transformers know ``MetalMarlinConfig`` and quant_method "metal_marlin"; any number of times.

    Raises MetalMarlinError where transformers is absent or of a version whose private names are not known to fit.
    """
    global _registered
    if _registered:
        return
    try:
        version = str(importlib.import_module("transformers").__version__)
    except ImportError as error:
        raise MetalMarlinError(f"{error}; install it with: pip install 'metal-marlin[transformers]'") from None
    found = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if not OLDEST <= found < NEWEST:
        low, high = (".".join(map(str, v)) for v in (OLDEST, NEWEST))
        raise MetalMarlinError(f"transformers {version} is installed; metal-marlin is verified with >= {low}, < {high}")
    importlib.import_module("metal_marlin.integrations.transformers.quantizer").install()
    _registered = True
