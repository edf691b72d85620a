"""metal_kernel: a body of MSL as a Python function, the signature written for it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.msl.reflect import POSITIONS
from metal_marlin.runtime.dispatch import Size, dispatch_kernel
from metal_marlin.runtime.library import MetalKernelLibrary

_MSL_TYPES = {
    torch.float16: "half",
    torch.bfloat16: "bfloat",
    torch.float32: "float",
    torch.bool: "bool",
    torch.uint8: "uint8_t",
    torch.int8: "int8_t",
    torch.int16: "int16_t",
    torch.uint16: "uint16_t",
    torch.int32: "int32_t",
    torch.uint32: "uint32_t",
    torch.int64: "int64_t",
    torch.uint64: "uint64_t",
}
_SCALARS = {bool: "bool", int: "int64_t", float: "float"}
_VECTOR_POSITIONS = (
    "position",
    "threads_per_grid",
    "threads_per_threadgroup",
    "threadgroups_per_grid",
    "grid_size",
    "grid_origin",
)


class InlineKernel:
    """What `metal_kernel` returns; call it with tensors. Compiled once per combination of dtypes and templates."""

    def __init__(self, name: str, source: str, inputs: Sequence[str], outputs: Sequence[str], header: str) -> None:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ArgumentError(f"name: '{name}' is not an identifier")
        self.name, self.source, self.header = name, source, header
        self.inputs, self.outputs = list(inputs), list(outputs)
        self._libraries: dict[tuple[Any, ...], MetalKernelLibrary] = {}

    def signature(self, arguments: Sequence[Any], dtypes: Sequence[torch.dtype], template: Mapping[str, Any]) -> str:
        """The whole MSL text for these arguments."""
        params: list[str] = []
        for name, value in zip(self.inputs, arguments, strict=True):
            if isinstance(value, torch.Tensor):
                params.append(f"device const {_msl_type(name, value.dtype)}* {name} [[buffer({len(params)})]]")
                for extra, used in (
                    ("shape", "constant int64_t*"),
                    ("strides", "constant int64_t*"),
                    ("ndim", "constant int64_t&"),
                ):
                    if re.search(rf"\b{name}_{extra}\b", self.source):
                        params.append(f"{used} {name}_{extra} [[buffer({len(params)})]]")
            elif type(value) in _SCALARS:
                params.append(f"constant {_SCALARS[type(value)]}& {name} [[buffer({len(params)})]]")
            else:
                raise ArgumentError(f"{name}: takes a tensor, bool, int or float, not {type(value).__name__}")
        for name, dtype in zip(self.outputs, dtypes, strict=True):
            params.append(f"device {_msl_type(name, dtype)}* {name} [[buffer({len(params)})]]")
        for attribute in sorted(POSITIONS):
            if re.search(rf"\b{attribute}\b", self.source):
                vector = any(part in attribute for part in _VECTOR_POSITIONS)
                params.append(f"{'uint3' if vector else 'uint'} {attribute} [[{attribute}]]")
        lines = ["#include <metal_stdlib>", "using namespace metal;"]
        lines += [_template(key, value) for key, value in template.items()]
        joined = ",\n    ".join(params)
        return "\n".join([*lines, self.header, f"kernel void {self.name}(\n    {joined}) {{\n{self.source}\n}}", ""])

    def __call__(
        self,
        *arguments: Any,
        grid: Size,
        threadgroup: Size,
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[torch.dtype],
        template: Mapping[str, Any] | None = None,
        init_value: float | None = None,
        device: object = None,
    ) -> list[torch.Tensor]:
        """Run on the device of the first tensor (or `device`).

        grid: total threads; threadgroup: threads per threadgroup; template: names to dtypes, bools, floats (`float`)
        or ints (`int`, or `long` where 32 bits do not hold it), visible in the source; init_value: what outputs hold
        before the kernel (else uninitialised). Returns the outputs.
        Raises ArgumentError for wrong counts or types and what dispatch_kernel raises.
        """
        if len(arguments) != len(self.inputs):
            raise ArgumentError(
                f"{self.name} takes {len(self.inputs)} inputs ({', '.join(self.inputs)}), got {len(arguments)}"
            )
        if not len(output_shapes) == len(output_dtypes) == len(self.outputs):
            raise ArgumentError(
                f"{self.name} has {len(self.outputs)} outputs; got {len(output_shapes)} shapes and "
                f"{len(output_dtypes)} dtypes"
            )
        home = next((a.device for a in arguments if isinstance(a, torch.Tensor)), None)
        try:
            home = torch.device(str(device)) if device is not None else home or torch.device("cpu")
        except RuntimeError as error:
            raise ArgumentError(f"device: {error}") from None
        text = self.signature(arguments, output_dtypes, template or {})
        library = self._libraries.get((text, str(home)))
        if library is None:
            library = self._libraries[(text, str(home))] = MetalKernelLibrary(text, device=home)
        outputs = [
            torch.empty(tuple(s), dtype=d, device=home) for s, d in zip(output_shapes, output_dtypes, strict=True)
        ]
        if init_value is not None:
            for tensor in outputs:
                tensor.fill_(init_value)
        values = self._values(arguments) | dict(zip(self.outputs, outputs, strict=True))
        dispatch_kernel(library, self.name, threads=grid, threads_per_threadgroup=threadgroup, args=values)
        return outputs

    def _values(self, arguments: Sequence[Any]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, value in zip(self.inputs, arguments, strict=True):
            values[name] = value.contiguous() if isinstance(value, torch.Tensor) else value
            for extra in ("shape", "strides", "ndim"):
                if isinstance(value, torch.Tensor) and re.search(rf"\b{name}_{extra}\b", self.source):
                    dense = values[name]
                    values[f"{name}_{extra}"] = {
                        "shape": list(dense.shape),
                        "strides": list(dense.stride()),
                        "ndim": dense.ndim,
                    }[extra]
        return values


def _msl_type(name: str, dtype: torch.dtype) -> str:
    if dtype not in _MSL_TYPES:
        raise ArgumentError(f"{name}: Metal has no type for {dtype}")
    return _MSL_TYPES[dtype]


def _template(key: str, value: Any) -> str:
    """The declaration of a template value."""
    if isinstance(value, torch.dtype):
        return f"typedef {_msl_type(key, value)} {key};"
    if isinstance(value, bool):
        return f"constant bool {key} = {str(value).lower()};"
    if isinstance(value, int) and -(2**63) < value < 2**63:
        wide = not -(2**31) <= value < 2**31
        return f"constant {'long' if wide else 'int'} {key} = {int(value)}{'l' * wide};"
    if isinstance(value, float):
        if math.isfinite(value) and abs(value) <= torch.finfo(torch.float32).max:
            return f"constant float {key} = {float(value)!r}f;"
        if not math.isfinite(value):
            return f"constant float {key} = {'NAN' if value != value else 'INFINITY' if value > 0 else '-INFINITY'};"
    raise ArgumentError(f"template {key}: takes a dtype, bool, 64-bit int or 32-bit float, not {value!r}")


def metal_kernel(
    name: str, source: str, inputs: Sequence[str], outputs: Sequence[str], header: str = ""
) -> InlineKernel:
    """A callable from the body of a Metal kernel, for any device.

    source: the body; inputs and outputs are visible by name (`device const T*`, `device T*`; Python numbers as
    `constant T&`), and so are `<input>_shape`, `<input>_strides`, `<input>_ndim` and every thread-position attribute by
    its MSL name (`thread_position_in_grid.x` …). header: MSL before the kernel, for helpers.

        body = "uint i = thread_position_in_grid.x; y[i] = a * x[i];"
        scale = metal_kernel("scale", body, ["x", "a"], ["y"])
        (y,) = scale(x, 2.0, grid=x.numel(), threadgroup=256, output_shapes=[x.shape], output_dtypes=[x.dtype])
    """
    return InlineKernel(name, source, inputs, outputs, header)
