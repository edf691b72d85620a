"""The mps device's pure functions, and its launches against a stand-in for torch.mps (no Mac is needed)."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from metal_marlin import MetalKernelLibrary, dispatch_kernel
from metal_marlin.errors import ArgumentError, CompilerNotFound, MetalCompileError, MetalMarlinError, NoDeviceError
from metal_marlin.msl.clang import Compiler
from metal_marlin.msl.row import CompiledRow, ParamMeta, RowMeta, TypeMeta
from metal_marlin.msl.target import Target
from metal_marlin.runtime import device_mps
from metal_marlin.runtime import library as library_module
from metal_marlin.runtime.cache import RowCache

FLOAT = TypeMeta("f", 32, 0, 4, 4)
PARAMS = TypeMeta("struct", 0, 0, 24, 8)
SOURCE = "kernel void scale() {}"


def param(name: str, index: int, kind: str = "buffer", type_: TypeMeta = FLOAT) -> ParamMeta:
    return ParamMeta(name, index, kind, False, True, type_)


def row(*params: ParamMeta, dynamic: tuple[tuple[str, int], ...] = (), source: str = SOURCE) -> CompiledRow:
    return CompiledRow(RowMeta("scale", "metal:apple", 32, params, dynamic, 0), source.encode())


@pytest.mark.parametrize(
    "value",
    [
        struct.pack("<i", -5),
        struct.pack("<I", 2**32 - 1),
        struct.pack("<q", -(2**63)),
        struct.pack("<Q", 2**64 - 1),
        struct.pack("<e", 1.5),
        struct.pack("<f", float("nan")),
        struct.pack("<4f", 1, -2, 3, 0),
        struct.pack("<qfB3x", 7, 0.5, 255),
        b"\1",
        bytes(range(256)) * 16,
    ],
)
def test_a_value_is_bound_by_its_bytes(value: bytes) -> None:
    words = device_mps.argument(value)
    assert isinstance(words, list)
    bound = struct.pack(f"<{len(words)}q", *words)  # what compile_shader does with a list of integers
    assert bound[: len(value)] == value
    assert len(bound) < len(value) + 8


def test_values_too_large_for_the_argument_table_are_refused() -> None:
    with pytest.raises(ArgumentError, match="4097 bytes; Metal binds 1 to 4096, pass a tensor"):
        device_mps.argument(bytes(4097))


def test_tensors_are_bound_as_they_are_and_must_be_contiguous() -> None:
    x = torch.arange(6).reshape(2, 3)
    assert device_mps.argument(x[1]) is not None
    with pytest.raises(ArgumentError, match=r"shape \(3, 2\) with strides \(1, 3\) is not contiguous"):
        device_mps.argument(x.T)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(param("x", 0), dynamic=(("tile", 0),)), r"size of threadgroup arguments \(tile\)"),
        (row(param("x", 0), source="constant int n [[ function_constant(0)]];"), "no function constants"),
        (row(param("x", 0), param("y", 2)), r"without gaps, the kernel has \[0, 2\]"),
        (row(*(param(f"x{i}", i) for i in range(32))), "31 arguments at most, the kernel has 32"),
        (row(param("p", 0, "value", TypeMeta("struct", 0, 0, 5000, 8))), "4096 bytes by value, p has 5000"),
    ],
)
def test_what_compile_shader_cannot_do_is_refused(bad: CompiledRow, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        device_mps.load(bad, 0)


@pytest.mark.parametrize("tptg", [(0, 1, 1), (1025, 1, 1), (32, 32, 2)])
def test_threadgroups_have_limits(tptg: device_mps.Dim3) -> None:
    with pytest.raises(ArgumentError, match="Metal allows 1 to 1024"):
        device_mps.check_group("scale", tptg, 1024)


class FakeKernel:
    max_threads_per_threadgroup = 512

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append((args, kwargs))


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    """compile_shader that knows one kernel, `scale`, and takes only SOURCE."""
    kernel = FakeKernel()

    def compile_shader(source: str) -> SimpleNamespace:
        if source != SOURCE:
            raise SyntaxError("program_source:1:8: error: unknown type name 'vod'")
        return SimpleNamespace(scale=kernel)

    monkeypatch.setattr(torch.mps, "compile_shader", compile_shader, raising=False)
    device_mps._library.cache_clear()
    return kernel


def test_launch_binds_by_index_and_passes_total_threads(metal: FakeKernel) -> None:
    executable = device_mps.load(row(param("n", 1, "value", PARAMS), param("x", 0)), 0)
    x = torch.zeros(4)
    executable.launch([struct.pack("<3q", 1, 2, 3), x], (2, 1, 1), (32, 1, 1), (40, 1, 1), [])
    ((args, kwargs),) = metal.calls
    assert args[0] is x
    assert args[1] == [1, 2, 3]
    assert kwargs == {"threads": (40, 1, 1), "group_size": (32, 1, 1)}


def test_launch_of_nothing_and_of_too_much(metal: FakeKernel) -> None:
    executable = device_mps.load(row(), 0)
    executable.launch([], (0, 1, 1), (32, 1, 1), (0, 1, 1))
    assert metal.calls == []
    with pytest.raises(ArgumentError, match="1 to 512 for this kernel"):
        executable.launch([], (1, 1, 1), (513, 1, 1), (513, 1, 1))


def test_metals_errors_are_compile_errors(metal: FakeKernel) -> None:
    with pytest.raises(MetalCompileError, match="'scale': program_source:1:8: error: unknown type name 'vod'"):
        device_mps.load(row(source="kernel vod scale() {}"), 0)


def test_probe_and_target() -> None:
    if torch.backends.mps.is_available():
        pytest.skip("this is a Mac")
    assert "MPS" in (device_mps.probe() or "") or "Apple" in (device_mps.probe() or "")
    assert str(device_mps.target(0)) == "metal:apple"
    with pytest.raises(NoDeviceError, match="mps:1"):
        device_mps.target(1)


def fake_mps_tensor(**changes: Any) -> Any:
    storage = SimpleNamespace(data_ptr=lambda: 0x5000)
    return SimpleNamespace(
        **{
            "device": torch.device("mps"),
            "is_contiguous": lambda: True,
            "shape": (2,),
            "stride": lambda: (3,),
            "untyped_storage": lambda: storage,
            "storage_offset": lambda: 6,
            "element_size": lambda: 2,
            **changes,
        }
    )


def test_buffer_and_byte_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "objc", SimpleNamespace(objc_object=lambda c_void_p: ("buffer", c_void_p)))
    assert device_mps.mps_tensor_to_metal_buffer(fake_mps_tensor()) == (("buffer", 0x5000), 12)


def test_buffers_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="on cpu; only tensors on mps"):
        device_mps.mps_tensor_to_metal_buffer(torch.zeros(1))
    with pytest.raises(ArgumentError, match=r"strides \(3,\) is not contiguous"):
        device_mps.mps_tensor_to_metal_buffer(fake_mps_tensor(is_contiguous=lambda: False))
    monkeypatch.setitem(sys.modules, "objc", None)
    with pytest.raises(MetalMarlinError, match=r"metal-marlin\[metal\]"):
        device_mps.mps_tensor_to_metal_buffer(fake_mps_tensor())


# --- from MSL text to Metal, with a stand-in for torch.mps and no compiler

TEXT = """
#include <metal_stdlib>
using namespace metal;
struct IntParams { long rows, columns; long offset; };
struct Mixed { uchar tag; float3 v; packed_float3 w; half2 h; };
struct Arrays { int a[3]; };
kernel void typed(device const half4* x [[buffer(1)]], device float* y [[buffer(0)]], constant IntParams& p [[buffer(2)]],
                  constant float& a [[buffer(3)]], constant Mixed& m [[buffer(4)]], device const metal::vec<uint, 2>* v,
                  constant Arrays& arrays, uint i [[thread_position_in_grid]]) {}
template <typename T, int N> kernel void family(device const T* x, device packed_half3* y, device vec<T, 4>* z,
                                                constant bool& flag) {}
template [[host_name("family_half")]] [[kernel]] void family<half, 4>(device const half*, device packed_half3*,
                                                                      device vec<half, 4>*, constant bool&);
"""


@pytest.fixture
def mps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A Mac without a compiler: `seen` text, and calls by kernel name."""
    record: dict[str, Any] = {"texts": [], "calls": []}

    class Library:
        def __init__(self, text: str) -> None:
            record["texts"].append(text)

        def __getattr__(self, name: str) -> Any:
            def call(*args: Any, **kwargs: Any) -> None:
                record["calls"].append((name, args, kwargs))

            call.max_threads_per_threadgroup = 1024  # type: ignore[attr-defined]
            return call

    monkeypatch.setattr(torch.mps, "compile_shader", Library, raising=False)
    monkeypatch.setattr(device_mps, "probe", lambda: None)
    monkeypatch.setattr(library_module, "find_compiler", lambda: (_ for _ in ()).throw(CompilerNotFound("none")))
    monkeypatch.setenv("METAL_MARLIN_CACHE", str(tmp_path / "rows"))
    device_mps._library.cache_clear()
    return record


def test_a_plain_text_needs_no_compiler(mps: dict[str, Any]) -> None:
    library = MetalKernelLibrary(TEXT, device="mps")
    assert library.kernels == ["family_half", "typed"]
    meta = library.load("typed")[0]
    types = {p.name: str(p.type) for p in meta.params}
    assert types["x"] == "float16x4"
    assert types["y"] == types["a"] == "float32"
    assert types["v"] == "uint32x2"
    assert {p.name: p.index for p in meta.params} == {"x": 1, "y": 0, "p": 2, "a": 3, "m": 4, "v": 5, "arrays": 6}
    fields = {p.name: [(f.name, f.offset, f.type.size) for f in p.fields] for p in meta.params if p.kind == "value"}
    assert fields["p"] == [("rows", 0, 8), ("columns", 8, 8), ("offset", 16, 8)]
    assert fields["m"] == [("tag", 0, 1), ("v", 16, 16), ("w", 32, 12), ("h", 44, 4)]
    assert fields["arrays"] == []
    assert [str(p.type) for p in library.load("family_half")[0].params] == [
        "float16", "float16x3", "float16x4", "bool8",
    ]  # fmt: skip
    assert mps["texts"] == [library.units[0].source]  # one compilation for the family, of the text as it is


def test_layouts_read_from_the_text_are_the_compilers(tmp_path: Path, compiler: object) -> None:
    """Where clang is at hand it states the same types, offsets and sizes."""
    made = [
        MetalKernelLibrary(TEXT, target=Target.parse(t), cache=RowCache(tmp_path)) for t in ("metal", "cpu:x86-64-v3")
    ]
    for name in ("typed", "family_half"):
        read, stated = ({p.name: p for p in library.compile(name).meta.params} for library in made)
        assert read.keys() == stated.keys()
        for key, param in read.items():
            if key != "arrays":
                assert param == stated[key]


def test_dispatch_hands_over_tensors_and_bytes(mps: dict[str, Any]) -> None:
    library = MetalKernelLibrary(TEXT, device="mps")
    args: dict[str, Any] = {
        "x": torch.zeros(8, dtype=torch.float16),
        "y": torch.zeros(9)[1:],  # the offset goes through setBuffer:offset:
        "p": {"rows": 3, "columns": -1, "offset": 2**40},
        "a": 1.5,
        "m": {"tag": 7, "v": (1, 2, 3), "w": (4, 5, 6), "h": (0.5, -2)},
        "v": torch.zeros(4, dtype=torch.int32),
        "arrays": torch.zeros(3, dtype=torch.int32),
    }
    shape = {"threads": (40, 2), "threads_per_threadgroup": (32, 1)}
    with pytest.raises(ArgumentError, match="x: tensor is on cpu, the library runs on mps:0"):
        dispatch_kernel(library, "typed", args=args, **shape)
    library.dispatch_state["typed"].device = torch.device("cpu")  # type: ignore[attr-defined]
    dispatch_kernel(library, "typed", args=args, **shape)
    ((name, passed, options),) = mps["calls"]
    assert name == "typed"
    assert options == {"threads": (40, 2, 1), "group_size": (32, 1, 1)}
    assert passed[0] is args["y"]
    assert passed[1] is args["x"]
    assert passed[2] == [3, -1, 2**40]
    assert struct.pack("<q", *passed[3])[:4] == struct.pack("<f", 1.5)
    assert struct.pack("<6q", *passed[4]) == struct.pack("<B15x3f4x3f2e", 7, 1, 2, 3, 4, 5, 6, 0.5, -2)
    with pytest.raises(ArgumentError, match="arrays: is struct of 0 bytes, not a struct whose fields are known"):
        dispatch_kernel(library, "typed", args={**args, "arrays": {"a": (1, 2, 3)}}, **shape)
    with pytest.raises(ArgumentError, match=r"x: tensor is torch\.float32"):
        dispatch_kernel(library, "typed", args={**args, "x": torch.zeros(8)}, **shape)


def test_texts_with_macros_need_a_compiler_or_a_stored_row(
    mps: dict[str, Any], monkeypatch: pytest.MonkeyPatch, compiler: Compiler
) -> None:
    text = "#define T float\nkernel void k(device T* y, uint i [[thread_position_in_grid]]) { y[i] = N; }"
    with pytest.raises(CompilerNotFound, match="the expanded text of <source> is not cached for metal:apple"):
        MetalKernelLibrary(text, device="mps", defines={"N": 3})
    with monkeypatch.context() as patch:
        patch.setattr(library_module, "find_compiler", lambda: compiler)
        MetalKernelLibrary(text, target=Target.parse("metal"), defines={"N": 3}).compile("k")
    library = MetalKernelLibrary(text, device="mps", defines={"N": 3})
    assert str(library.load("k")[0].params[0].type) == "float32"
    assert mps["texts"] == ["#define N 3\n" + text]
