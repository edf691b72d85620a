"""``metal-marlin check``: run one kernel of a file with every access checked, in a child process with limits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from metal_marlin.cli.console import console
from metal_marlin.cli.run import Options, only_kernel, parse_launch, parse_tensors
from metal_marlin.errors import KernelCheckError, MetalMarlinError

_CHILD = "METAL_MARLIN_CHECK_CHILD"


def run(
    options: Options, *, seeds: int, uninitialised: list[str], time_limit: float, memory_limit: int, as_json: bool
) -> int:
    """Exit status: 0 clean, 1 findings, 2 the kernel could not be run (or its child died or took too long)."""
    if os.environ.get(_CHILD):
        print(json.dumps(_check(options, seeds, uninitialised, memory_limit)))
        return 0
    answer = _ask_child(time_limit)
    if as_json:
        print(json.dumps(answer, indent=2))
    else:
        _show(answer)
    return 2 if answer["error"] else 1 if answer["findings"] else 0


def _ask_child(time_limit: float) -> dict[str, Any]:
    """The same command in a process of its own: what a foreign kernel breaks is not ours."""
    environment = {**os.environ, _CHILD: "1"}
    command = [sys.executable, "-m", "metal_marlin", *sys.argv[1:]]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=time_limit)
    except subprocess.TimeoutExpired:
        return {"error": f"the kernel did not end within {time_limit:g} s", "findings": []}
    lines = done.stdout.strip().splitlines()
    try:
        return dict(json.loads(lines[-1]))
    except (IndexError, ValueError):
        said = done.stderr.strip().splitlines()
        died = f"signal {-done.returncode}" if done.returncode < 0 else f"status {done.returncode}"
        return {
            "error": f"the kernel's process ended with {died}: {said[-1] if said else 'no message'}",
            "findings": [],
        }


def _check(options: Options, seeds: int, uninitialised: list[str], memory_limit: int) -> dict[str, Any]:
    _limit_memory(memory_limit)
    from metal_marlin.cli.arguments import parse_constants
    from metal_marlin.runtime.checked import CheckedExecutable
    from metal_marlin.runtime.dispatch import dispatch_kernel
    from metal_marlin.runtime.library import MetalKernelLibrary

    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    try:
        constants = parse_constants(options.constants)
        library = MetalKernelLibrary(options.file, device="cpu", constants=constants, checked=True)
        name = options.kernel or only_kernel(library)
        executable = library.load(name)[1]
        assert isinstance(executable, CheckedExecutable)
        executable.uninitialised = frozenset(uninitialised)
        for seed in range(seeds):
            executable.seed = seed
            try:
                dispatch_kernel(library, name, args=parse_tensors(options), **parse_launch(options))
            except KernelCheckError as error:
                for finding in error.findings:
                    entry = {**finding.to_json(), "seed": seed}  # type: ignore[attr-defined]
                    found.setdefault((entry["kind"], entry["line"], entry["other_line"]), entry)
    except MetalMarlinError as error:
        return {"error": str(error), "findings": list(found.values())}
    return {"error": "", "kernel": name, "seeds": seeds, "findings": list(found.values())}


def _limit_memory(megabytes: int) -> None:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    soft = megabytes << 20
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (soft if hard < 0 else min(soft, hard), hard))


def _show(answer: dict[str, Any]) -> None:
    for f in answer["findings"]:
        console.print(f"{f['file']}:{f['line']}: {f['kind']}: {f['message']}", markup=False, soft_wrap=True)
    if answer["error"]:
        console.print(f"error: {answer['error']}", markup=False, soft_wrap=True, style="red")
    elif not answer["findings"]:
        console.print(f"{answer['kernel']}: clean under {answer['seeds']} schedules", markup=False)
