"""``metal-marlin run``: one kernel of a file, from the shell."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from metal_marlin.cli.arguments import parse_constants, parse_sizes, parse_value, split
from metal_marlin.cli.console import console, print_table
from metal_marlin.errors import ArgumentError
from metal_marlin.runtime.dispatch import dispatch_kernel
from metal_marlin.runtime.library import MetalKernelLibrary


@dataclass(frozen=True)
class Options:
    """What the command line said; texts are not parsed yet."""

    file: Path
    kernel: str
    threads: str
    threadgroups: str
    threads_per_threadgroup: str
    args: list[str]
    threadgroup_memory: list[str]
    constants: list[str]
    device: str | None
    lanes: int | None
    seed: int
    save: list[str]


def run(options: Options) -> None:
    """Raises ArgumentError and whatever compiling and launching raise."""
    library = MetalKernelLibrary(
        options.file, device=options.device, lanes=options.lanes, constants=parse_constants(options.constants)
    )
    name = options.kernel or only_kernel(library)
    device = torch.device(str(library.device))
    values = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in parse_tensors(options).items()}
    before = {key: value.clone() for key, value in values.items() if isinstance(value, torch.Tensor)}
    launch = parse_launch(options)

    start = time.perf_counter()
    dispatch_kernel(library, name, args=values, **launch)
    _synchronize(device)
    seconds = time.perf_counter() - start

    rows = [_summary(key, value, before[key]) for key, value in values.items() if key in before]
    print_table(["tensor", "dtype", "shape", "written", "min", "max", "mean", "first values"], rows)
    console.print(f"{name} on {library.target}: {seconds * 1e3:.2f} ms with compiling and loading", markup=False)
    for text in options.save:
        _save(text, values)


def only_kernel(library: MetalKernelLibrary) -> str:
    """The library's only kernel. Raises ArgumentError where there are several."""
    names = library.kernels
    if len(names) != 1:
        raise ArgumentError(f"--kernel says which to run; the file has: {', '.join(names) or 'no kernel'}")
    return names[0]


def parse_tensors(options: Options) -> dict[str, Any]:
    """The arguments of --arg, tensors on the CPU. Raises ArgumentError."""
    generator = torch.Generator().manual_seed(options.seed)
    return {name: parse_value(value, generator) for name, value in map(split, options.args)}


def parse_launch(options: Options) -> dict[str, Any]:
    """Grid and threadgroup memory as dispatch_kernel takes them."""
    per_group = parse_sizes(options.threads_per_threadgroup, "--threads-per-threadgroup")
    threads = parse_sizes(options.threads, "--threads")
    groups = parse_sizes(options.threadgroups, "--threadgroups")
    if per_group is None or (threads is None) == (groups is None):
        raise ArgumentError("give --threads-per-threadgroup and either --threads or --threadgroups")
    grid = {"threads": threads} if threads else {"threadgroups": groups}
    memory = {}
    for name, value in map(split, options.threadgroup_memory):
        if not value.isdigit():
            raise ArgumentError(f"--threadgroup-memory {name}: '{value}' is not a number of bytes")
        memory[int(name) if name.isdigit() else name] = int(value)
    return {**grid, "threads_per_threadgroup": per_group, "threadgroup_memory": memory}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _summary(name: str, after: torch.Tensor, before: torch.Tensor) -> list[str]:
    """Cells of one row; NaNs count as unchanged where they were NaN before."""
    after, before = after.cpu(), before.cpu()
    dtype, shape = str(after.dtype).removeprefix("torch."), "x".join(map(str, after.shape)) or "scalar"
    if not after.numel():
        return [name, dtype, shape, "no", "", "", "", ""]
    written = not torch.equal(after.view(torch.uint8), before.view(torch.uint8)) if after.dim() else after != before
    wide = after.double().flatten()
    figures = [f"{figure.item():.6g}" for figure in (wide.min(), wide.max(), wide.mean())]
    first = " ".join(f"{value:.6g}" for value in wide[:6].tolist())
    return [
        name,
        dtype,
        shape,
        "yes" if written else "no",
        *figures,
        first + (" …" if wide.numel() > 6 else ""),
    ]


def _save(text: str, values: dict[str, Any]) -> None:
    name, path = split(text)
    tensor = values.get(name)
    if not isinstance(tensor, torch.Tensor):
        raise ArgumentError(f"--save {text}: '{name}' is not one of the tensors given with --arg")
    import numpy as np

    np.save(path, tensor.cpu().numpy())
    console.print(f"{name} saved to {path}", markup=False, soft_wrap=True)
