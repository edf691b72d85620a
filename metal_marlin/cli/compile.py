"""``metal-marlin compile``: fill a cache directory ahead of time."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.progress import Progress

from metal_marlin.cli.arguments import parse_constants
from metal_marlin.cli.console import console, size
from metal_marlin.errors import MetalMarlinError
from metal_marlin.msl.target import Target
from metal_marlin.runtime.cache import RowCache
from metal_marlin.runtime.library import MetalKernelLibrary, source_files


def run(
    targets: list[str],
    out: Path,
    files: list[Path],
    kernels: list[str],
    constants: list[str],
    lanes: int | None,
) -> int:
    """Exit status: 1 when a kernel did not compile. The other kernels are stored all the same."""
    start = time.perf_counter()
    cache = RowCache(out)
    jobs: list[tuple[MetalKernelLibrary, str, bool]] = []
    for text in targets:
        library = MetalKernelLibrary(
            list(files or source_files()),
            target=Target.parse(text),
            lanes=lanes,
            constants=parse_constants(constants),
            cache=cache,
        )
        for name in kernels or library.kernels:
            library.kernel(name)  # an unknown name stops here, before any work is done
            jobs.append((library, name, False))
            if library.target.kind == "cuda":
                jobs.append((library, name, True))
    failed = _compile(jobs)
    stored, count = cache.stats()
    console.print(
        f"{len(jobs) - failed} of {len(jobs)} rows for {', '.join(targets)} in {time.perf_counter() - start:.1f} s; "
        f"{out} holds {stored} files, {size(count)}",
        soft_wrap=True,
        markup=False,
    )
    return 1 if failed else 0


def _compile(jobs: list[tuple[MetalKernelLibrary, str, bool]]) -> int:
    """Compile in parallel (each is a process of its own); the number that failed, each reported."""
    failed = 0
    with Progress(console=console, transient=True) as progress, ThreadPoolExecutor(os.cpu_count()) as pool:
        task = progress.add_task("compiling", total=len(jobs))
        running = [(pool.submit(library.compile, name, tails=tails), name) for library, name, tails in jobs]
        for future, name in running:
            try:
                future.result()
            except MetalMarlinError as error:
                failed += 1
                console.print(f"{name}: {error}", style="red", markup=False, soft_wrap=True)
            progress.advance(task)
    return failed
