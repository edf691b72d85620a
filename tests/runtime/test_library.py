"""MetalKernelLibrary: finding a compiler, errors with file and line, machines without one, units, devices."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from metal_marlin import MetalKernelLibrary, dispatch_kernel, get_shader_source
from metal_marlin.errors import (
    ArgumentError,
    CompilerNotFound,
    MetalCompileError,
    MetalMarlinError,
    NoDeviceError,
    UnknownKernelError,
)
from metal_marlin.msl import clang, target
from metal_marlin.msl.clang import Compiler, find_compiler
from metal_marlin.msl.target import Target
from metal_marlin.runtime import device as devices
from metal_marlin.runtime import device_cpu, library
from metal_marlin.runtime.cache import RowCache

GOOD = "kernel void fill(device float* y, uint i [[thread_position_in_grid]]) { y[i] = 3; }\n"
posix_shell = pytest.mark.skipif(os.name != "posix", reason="the stand-in compiler is a shell script")


@pytest.fixture
def cache(tmp_path: Path) -> RowCache:
    return RowCache(tmp_path / "rows")


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("METAL_MARLIN_CLANG", raising=False)
    monkeypatch.setattr(clang, "_ziglang", lambda: None)
    monkeypatch.setattr(shutil, "which", lambda *args, **kwargs: None)


def fill(made: MetalKernelLibrary, n: int = 5) -> list[float]:
    y = torch.zeros(n)
    dispatch_kernel(made, "fill", threads=n, threads_per_threadgroup=4, args=[y])
    return y.tolist()


# --- which compiler


def test_no_compiler_says_what_to_install(no_compiler: None, cache: RowCache) -> None:
    with pytest.raises(CompilerNotFound, match=r"pip install 'metal-marlin\[compiler\]'.*METAL_MARLIN_CLANG"):
        find_compiler()
    made = MetalKernelLibrary(GOOD, device="cpu", cache=cache)
    assert made.kernels == ["fill"]  # plain text can be read without one
    with pytest.raises(CompilerNotFound, match=r"kernel 'fill' is not cached for cpu:.* no compiler.*pip install"):
        fill(made)
    with pytest.raises(CompilerNotFound, match="the expanded text of <source> is not cached"):
        MetalKernelLibrary("#define N 3\n" + GOOD, device="cpu", cache=cache)


def test_compiled_rows_need_no_compiler(cache: RowCache, compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "#define VALUE 7\n" + GOOD.replace("3", "VALUE")  # has macros: what it declares is stored, too
    MetalKernelLibrary(text, device="cpu", cache=cache).compile("fill")
    monkeypatch.setattr(library, "find_compiler", lambda: (_ for _ in ()).throw(CompilerNotFound("none")))
    assert fill(MetalKernelLibrary(text, device="cpu", cache=cache)) == [7] * 5
    monkeypatch.setenv("METAL_MARLIN_ROWS", str(cache.directory))
    assert fill(MetalKernelLibrary(text, device="cpu", cache=RowCache(cache.directory.parent / "mine"))) == [7] * 5


def test_rows_of_an_older_target_serve_where_there_is_no_compiler(
    cache: RowCache, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "#define VALUE 7\n" + GOOD.replace("3", "VALUE")

    def made(name: str) -> MetalKernelLibrary:
        return MetalKernelLibrary(text, target=Target.parse(name), cache=cache)

    for name in ("cuda:sm_80", "cpu:x86-64-v3"):
        made(name).compile("fill")
    assert made("cuda:sm_90a").compile("fill").meta.target == "cuda:sm_90a"  # with a compiler, its own
    cache.clear()
    for name in ("cuda:sm_80", "cpu:x86-64-v3"):
        made(name).compile("fill")
    monkeypatch.setattr(library, "find_compiler", lambda: (_ for _ in ()).throw(CompilerNotFound("none")))
    assert made("cuda:sm_90a").compile("fill").meta.target == "cuda:sm_80"
    assert fill(MetalKernelLibrary(text, device="cpu", cache=cache)) == [7] * 5
    with pytest.raises(CompilerNotFound, match="is not cached for cpu:aarch64"):
        made("cpu:aarch64")


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("cuda:sm_90a", ["cuda:sm_90", "cuda:sm_89", "cuda:sm_86", "cuda:sm_80"]),
        ("cuda:sm_89", ["cuda:sm_86", "cuda:sm_80"]),
        ("cuda:sm_80", []),
        ("cuda:sm_120", ["cuda:sm_90", "cuda:sm_89", "cuda:sm_86", "cuda:sm_80"]),
        ("cpu:x86-64-v4+avx512bf16", ["cpu:x86-64-v4", "cpu:x86-64-v3"]),
        ("cpu:x86-64-v3", []),
        ("cpu:aarch64+bf16", ["cpu:aarch64"]),
        ("metal", []),
    ],
)
def test_targets_whose_rows_run_elsewhere_too(name: str, others: list[str]) -> None:
    assert [str(t) for t in Target.parse(name).portable()] == others


def stand_in(folder: Path, version: str, linker: bool = True) -> Path:
    folder.mkdir()
    for name, text in {"clang": f"echo '{version}'", **({"ld.lld": "exit 1"} if linker else {})}.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    return folder / "clang"


@posix_shell
@pytest.mark.parametrize(
    ("version", "linker", "tag"),
    [
        ("Debian clang version 23.1.7 (3)", True, "clang-23.1.7"),
        ("clang version 22.0.0", True, "clang-22.0.0"),
        ("clang version 21.1.8", True, None),
        ("clang version 23.1.7", False, None),
        ("gcc (GCC) 14.2", True, None),
    ],
)
def test_a_chosen_clang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, linker: bool, tag: str | None
) -> None:
    path = stand_in(tmp_path / "bin", version, linker)
    monkeypatch.setenv("METAL_MARLIN_CLANG", str(path))
    monkeypatch.setenv("PATH", "/bin" if shutil.which("ld.lld", path="/bin") is None else "")
    if tag is not None:
        assert find_compiler().tag == tag
        return
    with pytest.raises(CompilerNotFound, match=r"METAL_MARLIN_CLANG=.* is not a working clang >= 22 with ld.lld"):
        find_compiler()


@posix_shell
def test_the_order_of_compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = stand_in(tmp_path / "old", "clang version 18.0.0"), stand_in(tmp_path / "new", "clang version 24.1.0")
    new.rename(new.with_name("clang-24"))
    monkeypatch.setenv("PATH", os.pathsep.join([str(old.parent), str(new.parent)]))
    monkeypatch.delenv("METAL_MARLIN_CLANG", raising=False)
    if importlib.util.find_spec("ziglang") is not None:
        assert find_compiler().tag.startswith("zig-")
    monkeypatch.setattr(clang, "_ziglang", lambda: None)
    assert find_compiler().tag == "clang-24.1.0"
    monkeypatch.setenv("METAL_MARLIN_CLANG", str(old))
    with pytest.raises(CompilerNotFound):  # a choice that does not work is not passed over
        find_compiler()


# --- errors in a source


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        (GOOD.replace("3", "missing"), "<source>:3", "missing"),
        (GOOD.replace("float*", "flaot*"), "<source>:3", "flaot"),
        (GOOD.replace("= 3;", "= 3"), "<source>:3", "';'"),
        ("#define V nothing\n" + GOOD.replace("3", "V"), "<source>:4", "nothing"),
        ("#define F(a) (a + undeclared)\n\n" + GOOD.replace("3", "F(2)"), "<source>:5", "undeclared"),
    ],
)
def test_errors_carry_the_line_of_a_text(cache: RowCache, compiler: Compiler, text: str, where: str, what: str) -> None:
    made = MetalKernelLibrary("\n\n" + text, device="cpu", cache=cache)
    with pytest.raises(MetalCompileError) as caught:
        made.compile("fill")
    lines = [line.strip().partition(": ")[2] for line in str(caught.value).splitlines()]
    assert not [line for line in lines[1:] if line and line in lines[0]]  # said once
    message = str(caught.value).splitlines()[0]
    assert where in message, message
    assert what in message, message
    assert "kernel 'fill' does not compile" in message


def test_errors_carry_file_and_line_through_includes(tmp_path: Path, cache: RowCache, compiler: Compiler) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "inner.h").write_text("#pragma once\n\n\ninline float value() { return wrong_name; }\n")
    (tmp_path / "outer.h").write_text('// a comment\n#include "deep/inner.h"\n')
    source = tmp_path / "shader.metal"
    source.write_text(
        '#include <metal_stdlib>\n#include "outer.h"\n#include "outer.h"\n' + GOOD.replace("3", "value()")
    )
    with pytest.raises(MetalCompileError, match=r"deep/inner\.h:4.*wrong_name"):
        MetalKernelLibrary(source, device="cpu", cache=cache).compile("fill")
    (tmp_path / "deep" / "inner.h").write_text("inline float value() { return 1; }\n#define M 1\n")
    source.write_text(source.read_text().replace("value()", "valu()"))
    with pytest.raises(MetalCompileError, match=r"shader\.metal:4.*valu"):
        MetalKernelLibrary(source, device="cpu", cache=cache).compile("fill")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('\n#include "nowhere.h"\n', r'<source>:2: cannot find "nowhere\.h" \(searched '),
        (
            "kernel void k(texture2d<float> t [[texture(0)]]) {}",
            r"<source>:1: .*'t'.*textures and samplers are not supported",
        ),
        ("\n\nvertex float4 v() { return 0; }", "<source>:3: only compute kernels"),
        (GOOD + "\n" + GOOD, "<source>:3: kernel 'fill' was already defined at <source>:1"),
        (
            "kernel void k(device float* a [[buffer(1)]],\n device float* b [[buffer(1)]]) {}",
            "'a' and 'b' share index 1",
        ),
    ],
)
def test_sources_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(MetalCompileError, match=message):
        MetalKernelLibrary(text, device="cpu")


def test_an_error_is_not_cached(tmp_path: Path, cache: RowCache, compiler: Compiler) -> None:
    source = tmp_path / "k.metal"
    source.write_text(GOOD.replace("3", "three"))
    for _ in range(2):
        with pytest.raises(MetalCompileError, match=r"k\.metal:1"):
            MetalKernelLibrary(source, device="cpu", cache=cache).compile("fill")
    source.write_text(GOOD)
    assert fill(MetalKernelLibrary(source, device="cpu", cache=cache)) == [3] * 5


def test_unknown_function_constants(cache: RowCache, compiler: Compiler) -> None:
    text = "constant int n [[function_constant(4)]];\n" + GOOD
    with pytest.raises(MetalCompileError, match=r"no function constant 'm'; the source declares: n \(4\)"):
        MetalKernelLibrary(text, device="cpu", constants={"m": 1}, cache=cache).compile("fill")


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("int", 1.5, r"'n': 1\.5 does not fit int \(-2147483648 to 2147483647\)"),
        ("uchar", 300, r"'n': 300 does not fit uchar \(0 to 255\)"),
        ("metal::uint", -1, "'n': -1 does not fit uint"),
        ("uint16_t", 2**16, "'n': 65536 does not fit uint16_t"),
        ("unsigned int", 2**32, "'n': 4294967296 does not fit unsigned int"),
        ("bool", 2, r"'n': 2 does not fit bool \(0 to 1\)"),
        ("int", "3", "'n': '3' does not fit int"),
        ("float", 1e300, r"'n': 1e\+300 does not fit float"),
        ("half", 70000, "'n': 70000 does not fit half"),
        ("float2", (1, 1e39), r"'n': 1e\+39 does not fit float"),
        ("int2", (1, 2, 3), r"'n': int2 takes 2 numbers, got \(1, 2, 3\)"),
    ],
)
def test_function_constants_that_do_not_fit(
    cache: RowCache, compiler: Compiler, kind: str, value: object, message: str
) -> None:
    text = f"#include <metal_stdlib>\nconstant {kind} n [[function_constant(4)]];\n" + GOOD
    with pytest.raises(ArgumentError, match=message):
        MetalKernelLibrary(text, device="cpu", constants={"n": value}, cache=cache).compile("fill")


@pytest.mark.parametrize(
    ("kind", "value", "want"),
    [("int", 2.0, 2), ("int", True, 1), ("bool", 1, 1), ("float", 3, 3), ("uint", 2**32 - 1, 2.0**32),
     ("long", -(2**63), -(2.0**63)), ("ulong", 2**63, 2.0**63), ("half", 0.5, 0.5), ("short", -7, -7)],
)  # fmt: skip
def test_function_constants_that_fit(
    cache: RowCache, compiler: Compiler, kind: str, value: object, want: float
) -> None:
    text = f"constant {kind} n [[function_constant(4)]];\n" + GOOD.replace("3", "n")
    assert fill(MetalKernelLibrary(text, device="cpu", constants={4: value}, cache=cache)) == [want] * 5


def test_a_function_constant_given_twice(cache: RowCache, compiler: Compiler) -> None:
    text = "constant int n [[function_constant(4)]];\n" + GOOD
    with pytest.raises(ArgumentError, match="'n' is given twice, by name and by index 4"):
        MetalKernelLibrary(text, device="cpu", constants={"n": 1, 4: 2}, cache=cache).compile("fill")


def test_standard_headers_that_are_not_here(tmp_path: Path, cache: RowCache, compiler: Compiler) -> None:
    source = tmp_path / "k.metal"
    source.write_text("#include <metal_stdlib>\n#include <metal_numeric>\n" + GOOD)
    with pytest.raises(MetalCompileError, match=r"k\.metal:2: standard header <metal_numeric> is not supported here"):
        MetalKernelLibrary(source, device="cpu", cache=cache).compile("fill")
    assert "#include <metal_numeric>" in MetalKernelLibrary(source, device="cpu", cache=cache).units[0].source
    source.write_text("#include <metal_stdlib>\n#if __METAL_VERSION__ >= 400\n#include <metal_tensor>\n#endif\n" + GOOD)
    assert fill(MetalKernelLibrary(source, device="cpu", cache=cache)) == [3] * 5
    source.write_text(source.read_text().replace("400", "300"))
    with pytest.raises(MetalCompileError, match=r"k\.metal:3.*'metal_tensor' file not found"):
        MetalKernelLibrary(source, device="cpu", cache=cache).compile("fill")


# --- devices


FLAGS = frozenset("avx avx2 bmi1 bmi2 f16c fma abm movbe xsave sse4_2".split())


def test_cpus() -> None:
    assert str(target.cpu_from_flags(FLAGS)) == "cpu:x86-64-v3"
    assert str(target.cpu_from_flags(FLAGS | {"avx_vnni", "avx512vbmi"})) == "cpu:x86-64-v3+avxvnni"
    more = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_bf16"}
    assert str(target.cpu_from_flags(FLAGS | more)) == "cpu:x86-64-v4+avx512bf16"
    assert str(target.cpu_from_flags(FLAGS - {"abm"} | {"lzcnt"})) == "cpu:x86-64-v3"
    with pytest.raises(NoDeviceError, match=r"below x86-64-v3, which the cpu device needs: it lacks avx2, f16c"):
        target.cpu_from_flags(FLAGS - {"f16c", "avx2"})


def test_an_old_cpu_is_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "_cpu_flags", lambda: FLAGS - {"avx2"})
    monkeypatch.setattr(target.platform, "machine", lambda: "x86_64")
    target._host_cpu.cache_clear()
    try:
        assert "it lacks avx2" in (device_cpu.probe() or "")
        with pytest.raises(NoDeviceError, match=r"no device: cpu: this CPU is below x86-64-v3.* it lacks avx2"):
            MetalKernelLibrary(GOOD, device="cpu")
        monkeypatch.setattr(target.platform, "machine", lambda: "riscv64")
        target._host_cpu.cache_clear()
        assert device_cpu.probe() == "the cpu device knows x86-64 and aarch64, not riscv64"
    finally:
        target._host_cpu.cache_clear()


def test_devices_that_are_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoDeviceError, match="unknown device 'tpu'; known: cuda, mps, cpu"):
        MetalKernelLibrary(GOOD, device="tpu")
    for kind in devices.kinds():
        monkeypatch.setattr(devices.device_module(kind), "probe", lambda kind=kind: f"no {kind} today")
    with pytest.raises(NoDeviceError, match="no device: cuda: no cuda today"):
        MetalKernelLibrary(GOOD, device=torch.device("cuda", 1))
    with pytest.raises(NoDeviceError, match="no device: cuda: no cuda today; mps: no mps today; cpu: no cpu today"):
        MetalKernelLibrary(GOOD)


@pytest.mark.parametrize("name", ["cpu:x", "cpu:1", "cpu:", "cpu:-1", "cuda:one", "mps:2"])
def test_device_indices_that_do_not_exist(name: str) -> None:
    with pytest.raises(ArgumentError, match=rf"device '{name}': (.* is not a number|there is one \w+ device)"):
        MetalKernelLibrary(GOOD, device=name)


def test_device_indices() -> None:
    assert str(MetalKernelLibrary(GOOD, device=torch.device("cpu", 0)).device) == "cpu"


@pytest.mark.parametrize("text", ["cpu:x86-64-v2", "cuda:90", "cuda:sm_9", "gpu", "cpu:"])
def test_targets_that_do_not_exist(text: str) -> None:
    with pytest.raises(ArgumentError, match="expected cpu, cpu:<level>"):
        Target.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cuda:sm_52", "sm_80 is the oldest"),
        ("cuda:sm_70", "sm_80 is the oldest"),
        ("cpu:x86-64-v3+bogus", "x86-64-v3 has no feature 'bogus'; known: aes, "),
        ("cpu:x86-64-v3+f16c+bf16", "x86-64-v3 has no feature 'bf16'"),
        ("cpu:x86-64-v3+", "x86-64-v3 has no feature ''"),
        ("cpu:aarch64+f16c", "aarch64 has no feature 'f16c'"),
    ],
)
def test_targets_that_no_kernel_runs_on(text: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Target.parse(text)


# --- units


def test_files_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match=rf"no file 'nope\.metal' \(looked in {tmp_path} and {library.SRC}\)"):
        MetalKernelLibrary("nope.metal", device="cpu")
    with pytest.raises(ArgumentError, match=rf"no file 'sub/nope\.metal' \(looked in {tmp_path}/sub\)"):
        MetalKernelLibrary(["sub/nope.metal"], device="cpu")


def test_several_files_are_units_of_their_own(tmp_path: Path, cache: RowCache, compiler: Compiler) -> None:
    (tmp_path / "a.metal").write_text(GOOD)
    (tmp_path / "b.metal").write_text(GOOD.replace("fill", "broken").replace("3", "oops"))
    made = MetalKernelLibrary([tmp_path / "a.metal", tmp_path / "b.metal"], device="cpu", cache=cache)
    assert made.kernels == ["broken", "fill"]
    with pytest.raises(MetalCompileError, match=r"b\.metal:1.*oops"):
        made.compile("broken")
    assert fill(made) == [3] * 5
    (tmp_path / "c.metal").write_text(GOOD)
    with pytest.raises(MetalMarlinError, match=r"kernel 'fill' is defined in both .*a\.metal and .*c\.metal"):
        MetalKernelLibrary([tmp_path / "a.metal", tmp_path / "c.metal"], device="cpu", cache=cache).kernels  # noqa: B018


def test_macros_and_include_folders(tmp_path: Path, cache: RowCache, compiler: Compiler) -> None:
    (tmp_path / "inc").mkdir()
    (tmp_path / "inc" / "v.h").write_text("#ifdef FLAG\n#define V (FLAG + 0.5f)\n#else\n#define V 1\n#endif\n")
    text = '#include "v.h"\n' + GOOD.replace("3", "V")
    options = {"device": "cpu", "cache": cache, "include_dirs": [tmp_path / "inc"]}
    assert fill(MetalKernelLibrary(text, **options)) == [1] * 5  # type: ignore[arg-type]
    assert fill(MetalKernelLibrary(text, defines={"FLAG": 4}, **options)) == [4.5] * 5  # type: ignore[arg-type]
    assert fill(MetalKernelLibrary(text, defines={"FLAG": True}, **options)) == [1.5] * 5  # type: ignore[arg-type]


def test_lanes_are_1_or_32() -> None:
    with pytest.raises(MetalMarlinError, match="lanes is 32, 1 or None, not 16"):
        MetalKernelLibrary(GOOD, device="cpu", lanes=16)


def test_one_lane_takes_threadgroups_of_one_thread(cache: RowCache, compiler: Compiler) -> None:
    made = MetalKernelLibrary(GOOD, device="cpu", lanes=1, cache=cache)
    y = torch.zeros(4)
    dispatch_kernel(made, "fill", threads=4, threads_per_threadgroup=1, args=[y])
    assert y.tolist() == [3] * 4
    with pytest.raises(ArgumentError, match=r"compiled for 1 lane on the cpu.*threads_per_threadgroup is \(32, 1, 1\)"):
        dispatch_kernel(made, "fill", threads=64, threads_per_threadgroup=32, args=[y])


def test_the_op_is_a_public_name() -> None:
    import metal_marlin
    from metal_marlin.ops.linear_decode import linear_decode

    assert metal_marlin.linear_decode is linear_decode
    assert all(getattr(metal_marlin, name) for name in metal_marlin.__all__)


def test_the_flat_source_of_what_ships() -> None:
    for path in library.source_files():
        flat = get_shader_source(path.stem)
        assert flat.isascii()
        assert '#include "' not in flat
        assert not [line for line in flat.splitlines() if line.startswith("# ")]
        assert flat == get_shader_source(path.name)
    with pytest.raises(UnknownKernelError):
        get_shader_source("no_such_kernel")


def test_a_library_says_what_it_is() -> None:
    assert (
        repr(MetalKernelLibrary(GOOD, target=Target.parse("cuda:sm_80"))) == "MetalKernelLibrary(<source>; cuda:sm_80)"
    )
    assert sys.modules["metal_marlin"].__version__
