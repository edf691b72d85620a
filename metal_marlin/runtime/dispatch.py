"""dispatch_kernel: bind arguments to a kernel's parameters and launch it."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.msl.row import ParamMeta
from metal_marlin.runtime import counters
from metal_marlin.runtime.marshal import accepted_dtypes, check_tensor, pack_type, pack_value, scalar_packer
from metal_marlin.runtime.profiling import launch_traced

if TYPE_CHECKING:
    from metal_marlin.runtime.library import MetalKernelLibrary

Size = int | Sequence[int]
Dim3 = tuple[int, int, int]
_GRIDS_KEPT = 4096
_MEMORY = 2**31 - 1  # bytes; drivers count in 32 bits, and each device has its own, far lower limit
_MISSING = object()
_NUMBERS = (int, float)
_INTS = {int}


def dispatch_kernel(
    library: MetalKernelLibrary,
    name: str,
    *,
    threads: Size | None = None,
    threadgroups: Size | None = None,
    threads_per_threadgroup: Size,
    args: Sequence[Any] | Mapping[str, Any] = (),
    threadgroup_memory: Mapping[str | int, int] | None = None,
) -> None:
    """Launch kernel `name` of `library`.

    threads: total threads, 1 to 3 numbers (edge threadgroups are smaller where they do not divide), or
    threadgroups: number of threadgroups. threads_per_threadgroup: 1 to 3 numbers.
    args: by name (dict) or by buffer index (sequence; None where an index is unused): contiguous tensors on the
        library's device for buffers; numbers, sequences (vectors), dicts (structs) or tensors for `constant T&`;
        lists of numbers for `constant T*`, which are copied to the device.
    threadgroup_memory: bytes of each `[[threadgroup(n)]]` argument, by name or index.
    On the cpu the call returns when the kernel has run; on cuda and mps it is enqueued on torch's current stream.
    A grid with a zero launches nothing. Raises UnknownKernelError, ArgumentError naming the argument and the numbers,
    MetalCompileError, DriverError.
    """
    state = library.dispatch_state
    grid = None
    if (
        (type(threads_per_threadgroup) is int or _is_ints(threads_per_threadgroup))
        and (threads is None or type(threads) is int or _is_ints(threads))
        and (threadgroups is None or type(threadgroups) is int or _is_ints(threadgroups))
    ):
        grid = state.get((threads, threadgroups, threads_per_threadgroup))
    if grid is None:
        grid = _grid(state, threads, threadgroups, threads_per_threadgroup)
    binding = state.get(name)
    if binding is None:
        binding = state[name] = Binding(library, name)
    binding.run(args, grid, threadgroup_memory)  # type: ignore[attr-defined]


def _is_ints(size: Size) -> bool:
    """Whether a grid may be looked up by `size`: 4.0 and True equal integers, and lists do not hash."""
    return type(size) is tuple and {*map(type, size)} == _INTS


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _dim3(value: Size, what: str) -> Dim3:
    numbers = tuple(value) if isinstance(value, Sequence) else (value,)
    if not 1 <= len(numbers) <= 3 or not all(map(_is_size, numbers)):
        raise ArgumentError(f"{what} must be 1 to 3 non-negative integers, got {value!r}")
    return (*numbers, 1, 1)[:3]  # type: ignore[return-value]


class Grid:
    """A launch shape: threadgroups, threads per threadgroup, total threads."""

    __slots__ = ("groups", "tails", "threads", "tptg")

    def __init__(self, threads: Size | None, threadgroups: Size | None, tptg: Size) -> None:
        self.tptg = _dim3(tptg, "threads_per_threadgroup")
        if 0 in self.tptg:
            raise ArgumentError(f"threads_per_threadgroup must be positive, got {tptg!r}")
        if (threads is None) == (threadgroups is None):
            raise ArgumentError("give either threads (in all) or threadgroups, not both and not neither")
        if threads is not None:
            self.threads = _dim3(threads, "threads")
            self.groups: Dim3 = tuple(-(-n // t) for n, t in zip(self.threads, self.tptg, strict=True))  # type: ignore[assignment]
        else:
            self.groups = _dim3(threadgroups, "threadgroups")  # type: ignore[arg-type]
            self.threads = tuple(n * t for n, t in zip(self.groups, self.tptg, strict=True))  # type: ignore[assignment]
        self.tails = any(n % t for n, t in zip(self.threads, self.tptg, strict=True))


def _grid(state: dict[Any, Any], threads: Size | None, threadgroups: Size | None, tptg: Size) -> Grid:
    grid = Grid(threads, threadgroups, tptg)
    key = tuple(tuple(v) if isinstance(v, Sequence) else v for v in (threads, threadgroups, tptg))
    return state.setdefault(key, grid) if len(state) < _GRIDS_KEPT else state.get(key, grid)


def _no_memory(param: ParamMeta, tensor: torch.Tensor) -> str:
    kind = tensor.layout if tensor.layout != torch.strided else type(tensor).__name__
    return f"{param.name}: takes a dense tensor, which {kind} is not"


class _Slot:
    """One bound parameter, prepared for the hot path."""

    __slots__ = ("align", "allowed", "guarded", "param", "quick", "value")

    def __init__(self, param: ParamMeta, addressed: bool) -> None:
        self.param = param
        self.value = param.kind == "value"
        self.allowed = accepted_dtypes(param.type)
        self.align = param.type.align if addressed else 1
        self.guarded = not param.const
        self.quick = scalar_packer(param.type) if self.value else None

    def pack(self, value: Any) -> bytes:
        if type(value) is bytes and len(value) == self.param.type.size:
            return value
        if self.quick is not None and type(value) in _NUMBERS:
            try:
                return self.quick(value)
            except (struct.error, OverflowError):  # a fraction for an integer that is whole, or an error to be told
                pass
        return pack_value(self.param, value)


class Binding:
    """A kernel of a library with its parameters looked up once."""

    def __init__(self, library: MetalKernelLibrary, name: str) -> None:
        self.library = library
        self.name = name
        self.count = counters.of(name).tick
        self.meta, executable = library.load(name)
        self.tensors = getattr(executable, "takes_tensors", False)
        self.slots = [_Slot(p, not self.tensors) for p in self.meta.params]
        self.names = {s.param.name: i for i, s in enumerate(self.slots) if s.param.enabled}
        self.device = (
            torch.device(library.device.kind, library.device.index)
            if library.device.kind != "cpu"
            else torch.device("cpu")
        )
        self.by_pointer_matters = library.device.kind == "cuda"
        self._executables: dict[tuple[bool, tuple[str, ...]], Any] = {(False, ()): executable}
        self._ready: dict[tuple[Grid, tuple[str, ...]], Any] = {}  # launches whose shape was checked
        self._order = [s.param.index for s in self.slots]
        self._size = max(self._order, default=-1) + 1
        self._gaps = sorted(set(range(self._size)) - set(self._order))
        self._least = max((s.param.index for s in self.slots if s.param.enabled), default=-1) + 1

    def run(self, args: Sequence[Any] | Mapping[str, Any], grid: Grid, memory: Mapping[str | int, int] | None) -> None:
        if type(args) is dict or isinstance(args, Mapping):
            values = self._by_name(args)
        else:
            values = self._by_index(args)
        keep: list[torch.Tensor] = []
        bound: list[int | bytes] = []
        pointers: tuple[str, ...] = ()
        device, tensors = self.device, self.tensors
        for slot, value in zip(self.slots, values, strict=True):
            if isinstance(value, torch.Tensor):
                try:
                    address = value.data_ptr()
                except RuntimeError:
                    raise ArgumentError(_no_memory(slot.param, value)) from None
                if (
                    value.device != device
                    or not value.is_contiguous()
                    or (slot.allowed is not None and value.dtype not in slot.allowed)
                    or address % slot.align
                    or (slot.guarded and value.requires_grad)
                ):
                    check_tensor(slot.param, value, device, slot.allowed)
                bound.append(value if tensors else address)  # type: ignore[arg-type]
                if slot.value:
                    if value.nbytes < slot.param.type.size:
                        raise ArgumentError(
                            f"{slot.param.name}: tensor has {value.nbytes} bytes, the kernel reads "
                            f"{slot.param.type.size}"
                        )
                    pointers += (slot.param.name,)
            elif slot.value and value is not None:
                bound.append(slot.pack(value))
            else:
                bound.append(self._other(slot.param, value, keep))
        dynamic = self._dynamic(memory) if memory or self.meta.dynamic else []
        if not self.by_pointer_matters:
            pointers = ()
        executable = self._ready.get((grid, pointers)) or self._prepare(grid, pointers)
        if 0 not in grid.groups:
            launch_traced(self.name, executable.launch, bound, grid.groups, grid.tptg, grid.threads, dynamic)
            self.count()

    def _prepare(self, grid: Grid, pointers: tuple[str, ...]) -> Any:
        """The executable for a launch shape, which is checked against the kernel's and the device's limits."""
        key = (grid.tails, pointers)
        executable = self._executables.get(key)
        if executable is None:
            executable = self._executables[key] = self.library.load(self.name, *key)[1]
        limit, size = self.meta.max_threads, math.prod(grid.tptg)
        if limit is not None and size > limit:
            raise ArgumentError(
                f"threads_per_threadgroup = {grid.tptg} is {size} threads; kernel '{self.name}' states "
                f"max_total_threads_per_threadgroup = {limit}"
            )
        executable.check(grid.groups, grid.tptg)
        if len(self._ready) < _GRIDS_KEPT:
            self._ready[(grid, pointers)] = executable
        return executable

    def _by_name(self, args: Mapping[str, Any]) -> list[Any]:
        values = [args.get(s.param.name, _MISSING) for s in self.slots]
        if len(args) != len(self.names) or any(v is _MISSING for v in values):
            unknown = [str(n) for n in args if n not in {s.param.name for s in self.slots}]
            missing = [n for n in self.names if n not in args]
            if unknown or missing:
                raise ArgumentError(
                    f"kernel '{self.name}': "
                    + "; ".join(
                        f"{what} argument {', '.join(n)}"
                        for what, n in (("unknown", unknown), ("missing", missing))
                        if n
                    )
                    + f"; it takes {', '.join(self.names) or 'none'}"
                )
            values = [None if v is _MISSING else v for v in values]
        return values

    def _by_index(self, args: Sequence[Any]) -> list[Any]:
        if type(args) not in (list, tuple) and (isinstance(args, (str, bytes)) or not isinstance(args, Sequence)):
            raise ArgumentError(
                f"args: kernel '{self.name}' takes a dict by name or a sequence by index, not {type(args).__name__}"
            )
        if not self._least <= len(args) <= self._size:
            raise ArgumentError(
                f"kernel '{self.name}' takes {self._size} arguments by buffer index, got {len(args)}: {self._takes()}"
            )
        for i in self._gaps:
            if i < len(args) and args[i] is not None:
                raise ArgumentError(
                    f"args[{i}]: kernel '{self.name}' has no argument with buffer index {i}; it takes {self._takes()}"
                )
        return [args[i] if i < len(args) else None for i in self._order]

    def _takes(self) -> str:
        return ", ".join(f"{s.param.name} ({s.param.index})" for s in self.slots) or "none"

    def _other(self, param: ParamMeta, value: Any, keep: list[torch.Tensor]) -> int | bytes:
        """Arguments that are neither tensors nor values."""
        if value is None:
            if param.enabled:
                raise ArgumentError(f"{param.name}: is None, but kernel '{self.name}' uses it")
            return b"\0" * max(param.type.size, 1) if param.kind == "value" else 0
        if param.const and isinstance(value, (list, tuple)):
            data = b"".join(pack_type(param.type, v, param.name) for v in value)
            # a copy on the cpu too: torch's own memory starts at a multiple of 64 bytes
            tensor = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8).to(self.device, copy=True)
            keep.append(tensor)
            return tensor if self.tensors else tensor.data_ptr()  # type: ignore[return-value]
        raise ArgumentError(
            f"{param.name}: kernel '{self.name}' takes a tensor on {self.device} here, not {type(value).__name__}"
        )

    def _dynamic(self, memory: Mapping[str | int, int] | None) -> list[int]:
        if not isinstance(memory or {}, Mapping):
            raise ArgumentError(f"threadgroup_memory: takes a dict of bytes by name or index, got {memory!r}")
        given = dict(memory or {})
        sizes: list[int] = []
        for name, index in self.meta.dynamic:
            size = given.pop(name, given.pop(index, None))
            if size is None or not _is_size(size) or size > _MEMORY:
                raise ArgumentError(
                    f"threadgroup_memory: kernel '{self.name}' needs the bytes of '{name}' (index {index}), got {size}"
                )
            sizes.append(size)
        if given:
            raise ArgumentError(f"threadgroup_memory: kernel '{self.name}' has no threadgroup argument {list(given)}")
        return sizes
