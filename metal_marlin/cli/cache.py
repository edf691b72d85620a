"""``metal-marlin cache``."""

from __future__ import annotations

from metal_marlin.cli.console import console, print_json, size
from metal_marlin.runtime.cache import RowCache


def run(*, clear: bool, as_json: bool) -> None:
    cache = RowCache()
    files, count = cache.stats()
    if clear:
        cache.clear()
    if as_json:
        print_json({"directory": str(cache.directory), "files": files, "bytes": count, "cleared": clear})
        return
    what = "deleted" if clear else "holds"
    console.print(f"{cache.directory}: {what} {files} compiled kernels, {size(count)}", soft_wrap=True)
