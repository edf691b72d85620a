"""``metal-marlin doctor``: what works on this machine, each device tried with a small kernel."""

from __future__ import annotations

import platform
import sys
from typing import Any

import torch

from metal_marlin._version import __version__
from metal_marlin.cli.console import console, print_json, print_table, size, status
from metal_marlin.errors import MetalMarlinError
from metal_marlin.msl.clang import find_compiler
from metal_marlin.runtime.cache import RowCache
from metal_marlin.runtime.device import device_module, kinds
from metal_marlin.runtime.dispatch import dispatch_kernel
from metal_marlin.runtime.library import MetalKernelLibrary

# Reads, writes, a scalar, and a collective: the last fails loudly where simdgroups do not work.
_SMOKE = """
#include <metal_stdlib>
using namespace metal;
kernel void smoke(device const float* x, device float* y, constant float& a, uint i [[thread_position_in_grid]]) {
    y[i] = fma(a, x[i], simd_sum(1.0f));
}
"""


def run(*, as_json: bool) -> int:
    """Exit status: 1 when no device runs the smoke kernel."""
    devices = [_device(kind) for kind in kinds()]
    report = {"versions": versions(), "compiler": compiler(), "cache": _cache(), "devices": devices}
    if as_json:
        print_json(report)
    else:
        _show(report)
    return 0 if any(device["status"] == "PASS" for device in devices) else 1


def versions() -> dict[str, str]:
    return {
        "metal-marlin": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def _result(reason: str | None, **details: Any) -> dict[str, Any]:
    return {"status": "PASS" if reason is None else "FAIL", "reason": reason, **details}


def compiler() -> dict[str, Any]:
    try:
        compiler = find_compiler()
    except MetalMarlinError as error:
        return _result(str(error), version=None, command=None)
    return _result(None, version=compiler.tag, command=" ".join(compiler.command))


def _cache() -> dict[str, Any]:
    try:
        cache = RowCache()
        files, count = cache.stats()
    except (MetalMarlinError, OSError) as error:
        return _result(str(error), directory=None)
    return _result(None, directory=str(cache.directory), files=files, bytes=count)


def _device(kind: str) -> dict[str, Any]:
    """Probe, then compile and run the smoke kernel. Anything that goes wrong is the reason of a FAIL."""
    target = None
    try:
        reason = device_module(kind).probe()
        if reason is None:
            library = MetalKernelLibrary(_SMOKE, device=kind)
            target = str(library.target)
            reason = _smoke(library)
    except Exception as error:  # a report on a broken machine must not break
        reason = f"{type(error).__name__}: {error}" if not isinstance(error, MetalMarlinError) else str(error)
    return _result(reason, device=kind, target=target)


def _smoke(library: MetalKernelLibrary) -> str | None:
    """None when 64 threads computed what they should, else what is wrong."""
    x = torch.arange(64, dtype=torch.float32, device=str(library.device))
    y = torch.full_like(x, float("nan"))
    dispatch_kernel(library, "smoke", threads=64, threads_per_threadgroup=64, args=[x, y, 0.5])
    expected = torch.arange(64) * 0.5 + 32
    if torch.equal(y.cpu(), expected):
        return None
    return f"the smoke kernel gave {y[:4].tolist()} … instead of {expected[:4].tolist()} …"


def _show(report: dict[str, Any]) -> None:
    console.print("  ".join(f"{name} {version}" for name, version in report["versions"].items()), soft_wrap=True)
    compiler, cache = report["compiler"], report["cache"]
    rows: list[list[Any]] = []
    for device in report["devices"]:
        rows.append(
            [
                device["device"],
                _mark(device),
                device["reason"] or f"smoke kernel correct on {device['target']}",
            ]
        )
    rows.append(["compiler", _mark(compiler), compiler["reason"] or f"{compiler['version']} ({compiler['command']})"])
    kept = "" if cache["reason"] else f"{cache['directory']}: {cache['files']} files, {size(cache['bytes'])}"
    rows.append(["cache", _mark(cache), cache["reason"] or kept])
    print_table(["what", "", "details"], rows)
    if sys.platform == "darwin":
        console.print("Apple GPUs: the project's own checks have no Mac; please report what you see.")


def _mark(result: dict[str, Any]) -> Any:
    return status(result["status"] == "PASS")
