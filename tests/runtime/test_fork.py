"""A forked child works or gets a clear error; it never hangs."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from metal_marlin import MetalKernelLibrary, dispatch_kernel
from metal_marlin.msl.clang import Compiler
from metal_marlin.runtime import cache as cache_module
from metal_marlin.runtime.cache import RowCache

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is a POSIX call"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork"),
]
SOURCE = """
kernel void sums(device const float* x, device float* y, uint i [[thread_position_in_grid]],
                 uint t [[thread_index_in_threadgroup]], uint g [[threadgroup_position_in_grid]]) {
  threadgroup float parts[32];
  parts[t] = x[i];
  threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  float sum = 0;
  for (int k = 0; k < 32; k++) sum += parts[k];
  y[i] = sum;
}
kernel void other(device float* y, uint i [[thread_position_in_grid]]) { y[i] = 7; }
"""
GROUPS, LIMIT_S = 64, 60


def in_child(work: Callable[[], object]) -> str:
    """What `work` returned or raised in a forked child; "hangs" if it takes longer than LIMIT_S."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pid = os.fork()
    if pid == 0:
        try:
            text = str(work())
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writing, text.encode()[:4000])
        os._exit(0)
    os.close(writing)
    deadline = time.monotonic() + LIMIT_S
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "hangs"
        time.sleep(0.01)
    with os.fdopen(reading) as file:
        return file.read()


X = [float(i % 32 + i // 32) for i in range(32 * GROUPS)]
WANT = [float(sum(range(32)) + 32 * (i // 32)) for i in range(32 * GROUPS)]


def sums(library: MetalKernelLibrary) -> str:
    # tensors from Python lists: a child must not need torch's own thread pool
    x, y = torch.tensor(X), torch.tensor([0.0] * len(X))
    dispatch_kernel(library, "sums", threadgroups=GROUPS, threads_per_threadgroup=32, args=[x, y])
    return "right" if y.tolist() == WANT else "wrong"


def other(library: MetalKernelLibrary) -> str:
    y = torch.tensor([0.0] * 8)
    dispatch_kernel(library, "other", threads=8, threads_per_threadgroup=8, args=[y])
    return str(y.tolist() == [7] * 8)


def test_children_of_a_process_that_used_kernels() -> None:
    library = MetalKernelLibrary(SOURCE, device="cpu")
    assert sums(library) == "right"  # the pool's threads exist now
    assert in_child(lambda: sums(library)) == "right"
    assert in_child(lambda: other(library)) == "True"  # loaded in the child
    assert in_child(lambda: in_child(lambda: sums(library))) == "right"
    assert sums(library) == "right"


def test_children_compile(tmp_path: Path, compiler: Compiler) -> None:
    library = MetalKernelLibrary(SOURCE, device="cpu", cache=RowCache(tmp_path / "rows"))
    assert in_child(lambda: sums(library)) == "right"
    assert sums(library) == "right"


def test_a_fork_while_another_thread_compiles(
    tmp_path: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiling thread holds the library's lock and is not there in the child."""
    library = MetalKernelLibrary(SOURCE, device="cpu", cache=RowCache(tmp_path / "rows"))
    held, go_on, put, parent = threading.Event(), threading.Event(), RowCache.put, os.getpid()

    def slow_put(self: RowCache, *args: object) -> None:
        if os.getpid() == parent:
            held.set()
            go_on.wait(LIMIT_S)
        put(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(cache_module.RowCache, "put", slow_put)
    results: list[str] = []
    thread = threading.Thread(target=lambda: results.append(sums(library)))
    thread.start()
    assert held.wait(LIMIT_S)
    try:
        assert in_child(lambda: sums(library)) == "right"
    finally:
        go_on.set()
        thread.join(LIMIT_S)
    assert results == ["right"]


def test_a_fork_while_other_threads_dispatch() -> None:
    library = MetalKernelLibrary(SOURCE, device="cpu")
    stop = threading.Event()
    results: set[str] = set()

    def work() -> None:
        while not stop.is_set():
            results.add(sums(library))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        answers = {in_child(lambda: sums(library)) for _ in range(5)}
    finally:
        stop.set()
        for thread in threads:
            thread.join(LIMIT_S)
    assert answers == {"right"}
    assert results == {"right"}


@pytest.mark.cuda
def test_children_of_a_process_that_used_the_gpu() -> None:
    library = MetalKernelLibrary(SOURCE, device="cuda")
    y = torch.zeros(8, device="cuda")

    def run() -> str:
        dispatch_kernel(library, "other", threads=8, threads_per_threadgroup=8, args=[y])
        return "ran"

    assert run() == "ran"
    answer = in_child(run)
    assert answer.startswith("DriverError: CUDA cannot be used in this process: it was forked"), answer
    assert "spawn" in answer
    new_library = in_child(lambda: MetalKernelLibrary(SOURCE, device="cuda"))
    assert "fork" in new_library, new_library
    torch.cuda.synchronize()
    assert y.tolist() == [7] * 8
