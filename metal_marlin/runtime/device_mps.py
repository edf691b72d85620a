"""The mps device: Metal's own compiler and torch's own stream, through ``torch.mps.compile_shader``.

No Mac runs this project's checks: this module stays small, and what can run elsewhere is a pure function with
tests. A row's ``binary`` is the family's flat MSL text, which Metal compiles once per process.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from metal_marlin.errors import ArgumentError, MetalCompileError, MetalMarlinError, NoDeviceError
from metal_marlin.msl.target import Target

if TYPE_CHECKING:
    from metal_marlin.msl.row import CompiledRow, ParamMeta

# Metal's limits: arguments of a kernel, bytes passed without a buffer, threads of a threadgroup.
_MAX_ARGUMENTS, _MAX_BYTES, _MAX_THREADS = 31, 4096, 1024
_FUNCTION_CONSTANT = re.compile(r"\[\[\s*function_constant\s*\(")

Dim3 = tuple[int, int, int]


def probe() -> str | None:
    """Return None where this device can be used, else the reason why not. Never raises."""
    if not torch.backends.mps.is_built():
        return "this PyTorch is built without MPS (Apple GPUs)"
    if not torch.backends.mps.is_available():
        return "no Apple GPU, or macOS is older than 14"
    if not hasattr(torch.mps, "compile_shader"):
        return "torch.mps.compile_shader needs PyTorch 2.7 or newer"
    return None


def target(index: int) -> Target:
    """Return the one target there is: Metal compiles for the GPU it runs on. NoDeviceError for index > 0."""
    if index:
        raise NoDeviceError(f"there is no mps:{index}: PyTorch knows one Apple GPU")
    return Target("metal", "apple")


def load(row: CompiledRow, index: int) -> Executable:
    """Compile the row's family with Metal, once per process and text.

    Raises MetalCompileError with Metal's message, ArgumentError for what compile_shader cannot bind.
    """
    target(index)
    source = row.binary.decode()
    reject_unsupported(row.name, row.meta.params, row.meta.dynamic, source)
    try:
        kernel = getattr(_library(source), row.name)
    except (SyntaxError, RuntimeError, AttributeError) as error:
        raise MetalCompileError(f"Metal does not compile kernel {row.name!r}: {error}") from error
    return Executable(row, kernel)


@functools.lru_cache(maxsize=256)
def _library(source: str) -> Any:
    return torch.mps.compile_shader(source)


class Executable:
    """A kernel of a Metal library."""

    takes_tensors = True  # an MPS tensor has no address that a kernel could use

    def __init__(self, row: CompiledRow, kernel: Any) -> None:
        self.name = row.name
        self._kernel = kernel
        self._limit = int(min(row.meta.max_threads or _MAX_THREADS, kernel.max_threads_per_threadgroup))
        slots = [param.index for param in row.meta.params]
        self._order = sorted(range(len(slots)), key=slots.__getitem__)

    def check(self, grid: Dim3, tptg: Dim3) -> None:
        """Raise ArgumentError for a shape of launch that Metal does not allow."""
        check_group(self.name, tptg, self._limit)

    def launch(
        self,
        values: Sequence[torch.Tensor | bytes],
        grid: Dim3,
        tptg: Dim3,
        threads: Dim3,
        dynamic: Sequence[int] = (),
    ) -> None:
        """Encode into torch's current command buffer.

        ``values``: tensors for buffers and bytes of values, in parameter order; the rest as for every device.
        ``threads`` need not be a multiple of ``tptg``: Metal makes the edge threadgroups smaller.
        """
        if 0 in threads:
            return
        self.check(grid, tptg)
        arguments = [argument(values[i]) for i in self._order]
        self._kernel(*arguments, threads=threads, group_size=tptg)


def argument(value: torch.Tensor | bytes) -> torch.Tensor | list[int]:
    """Return a value in the form in which compile_shader binds exactly its bytes.

    compile_shader copies a list of Python integers as int64[] into the argument table. The words of a value's
    bytes are such a list, so half, bfloat, vectors and structs need no conversion and lose no bit. Zeros fill
    the last word: Metal reads as many bytes as the kernel's type has.
    """
    if isinstance(value, torch.Tensor):
        if not value.is_contiguous():
            raise ArgumentError(f"tensor of shape {tuple(value.shape)} with strides {value.stride()} is not contiguous")
        return value
    if not 0 < len(value) <= _MAX_BYTES:
        raise ArgumentError(f"a value of {len(value)} bytes; Metal binds 1 to {_MAX_BYTES}, pass a tensor")
    padded = value.ljust(-(-len(value) // 8) * 8, b"\0")
    return [int.from_bytes(padded[i : i + 8], "little", signed=True) for i in range(0, len(padded), 8)]


def check_group(name: str, tptg: Dim3, limit: int) -> None:
    """Raise ArgumentError unless a threadgroup of ``tptg`` threads has 1 to ``limit``."""
    count = tptg[0] * tptg[1] * tptg[2]
    if min(tptg) < 1 or count > limit:
        raise ArgumentError(
            f"{name}: {count} threads per threadgroup {tptg}; Metal allows 1 to {limit} for this kernel"
        )


def reject_unsupported(name: str, params: Sequence[ParamMeta], dynamic: Sequence[tuple[str, int]], source: str) -> None:
    """Raise ArgumentError for what Metal can do but torch.mps.compile_shader offers no way to ask for."""
    said = f"kernel {name!r} cannot run on mps: torch.mps.compile_shader"
    if dynamic:
        names = ", ".join(item for item, _ in dynamic)
        raise ArgumentError(f"{said} sets no size of threadgroup arguments ({names}); declare an array in the kernel")
    if _FUNCTION_CONSTANT.search(source):
        raise ArgumentError(f"{said} sets no function constants; use a template or a macro")
    slots = sorted(param.index for param in params)
    if slots != list(range(len(slots))):
        raise ArgumentError(f"{said} binds buffers 0, 1, 2, … without gaps, the kernel has {slots}")
    if len(slots) > _MAX_ARGUMENTS:
        raise ArgumentError(f"{said} binds {_MAX_ARGUMENTS} arguments at most, the kernel has {len(slots)}")
    large = next((p for p in params if p.kind == "value" and p.type.size > _MAX_BYTES), None)
    if large is not None:
        raise ArgumentError(f"{said} passes at most {_MAX_BYTES} bytes by value, {large.name} has {large.type.size}")


def mps_tensor_to_metal_buffer(tensor: torch.Tensor) -> tuple[Any, int]:
    """Return the id<MTLBuffer> that holds an MPS tensor and its byte offset there, without a copy.

    For Metal code of your own through PyObjC. The buffer is PyTorch's: keep the tensor alive, and call
    ``torch.mps.synchronize()`` before another queue reads what torch has written.
    Raises ArgumentError for a tensor that is not on mps or not contiguous, MetalMarlinError without PyObjC.
    """
    if tensor.device.type != "mps":
        raise ArgumentError(f"the tensor is on {tensor.device}; only tensors on mps live in a Metal buffer")
    if not tensor.is_contiguous():
        raise ArgumentError(f"tensor of shape {tuple(tensor.shape)} with strides {tensor.stride()} is not contiguous")
    try:
        import objc
    except ImportError:
        raise MetalMarlinError("PyObjC is missing: pip install 'metal-marlin[metal]'") from None
    # On mps a storage's "data pointer" is the buffer object itself.
    buffer = objc.objc_object(c_void_p=tensor.untyped_storage().data_ptr())
    return buffer, int(tensor.storage_offset()) * tensor.element_size()
