"""The cuda device: against a fake driver, and (marked cuda) on a GPU with PTX written by hand."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from metal_marlin import MetalKernelLibrary
from metal_marlin.errors import ArgumentError, DriverError, NoDeviceError
from metal_marlin.msl.row import CompiledRow, ParamMeta, RowMeta, TypeMeta
from metal_marlin.msl.target import Target
from metal_marlin.runtime import _driver, _ptx, device_cuda
from metal_marlin.runtime.cache import RowCache
from metal_marlin.runtime.profiling import launch_traced

sys.path.insert(0, str(Path(__file__).parent))
from fake_cuda import FakeCuda

FLOAT = TypeMeta("f", 32, 0, 4, 4)
FLOAT3 = TypeMeta("f", 32, 3, 16, 16)
UCHAR = TypeMeta("u", 8, 0, 1, 1)
ONES = (1, 1, 1)

HEAD = b".version 8.0\n.target sm_80\n.address_size 64\n"
# y[i] += a * x[i] for i < n; the parameters' alignments leave gaps
SAXPY = (
    HEAD
    + b"""
.visible .entry mm_entry(
    .param .u64 .ptr .global .align 1 mm_entry_param_0,
    .param .u8 mm_entry_param_1,
    .param .align 16 .b8 mm_entry_param_2[16],
    .param .u64 .ptr .global .align 1 mm_entry_param_3,
    .param .u32 mm_entry_param_4
)
{
    .reg .pred %p<2>;
    .reg .f32 %f<5>;
    .reg .b32 %r<6>;
    .reg .b64 %rd<6>;
    ld.param.u64 %rd1, [mm_entry_param_0];
    ld.param.f32 %f1, [mm_entry_param_2+4];
    ld.param.u64 %rd2, [mm_entry_param_3];
    ld.param.u32 %r1, [mm_entry_param_4];
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ntid.x;
    mov.u32 %r4, %tid.x;
    mad.lo.s32 %r5, %r2, %r3, %r4;
    setp.ge.u32 %p1, %r5, %r1;
    @%p1 bra done;
    mul.wide.u32 %rd3, %r5, 4;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
    ld.global.f32 %f2, [%rd4];
    ld.global.f32 %f3, [%rd5];
    fma.rn.f32 %f4, %f1, %f2, %f3;
    st.global.f32 [%rd5], %f4;
done:
    ret;
}
"""
)
SAXPY_SIZES = [8, 1, 16, 8, 4]
EMPTY = HEAD + b".visible .entry mm_entry()\n{\n    ret;\n}\n"


def param(name: str, kind: str, type_: TypeMeta) -> ParamMeta:
    return ParamMeta(name, 0, kind, False, True, type_)


def row(text: bytes, name: str = "saxpy", **meta: object) -> CompiledRow:
    empty = {"params": (), "dynamic": (), "threadgroup_bytes": 0}
    return CompiledRow(RowMeta(name, "cuda:sm_80", 32, **{**empty, **meta}), text)  # type: ignore[arg-type]


def saxpy_row(**meta: object) -> CompiledRow:
    buffers = param("x", "buffer", FLOAT), param("y", "buffer", FLOAT)
    values = param("flag", "value", UCHAR), param("a", "value", FLOAT3)
    params = (buffers[0], *values, buffers[1])
    return row(SAXPY, params=params, dynamic=(("scratch", 0),), **meta)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """The driver replaced; torch's current device is 0 and its stream on device n is 90 + n."""
    cuda = FakeCuda(sizes=SAXPY_SIZES)
    install(monkeypatch, cuda)
    return cuda


def install(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> None:
    monkeypatch.setattr(_driver, "_driver", _driver.Driver(cuda))
    monkeypatch.setattr(device_cuda, "_torch_state", lambda: (lambda: 0, lambda index: 90 + index))
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)


def launch(
    executable: device_cuda.Executable,
    grid: device_cuda.Dim3 = ONES,
    tptg: device_cuda.Dim3 = ONES,
    **kw: object,
) -> None:
    values = kw.pop("values", [0x1000, b"\7", struct.pack("<4f", 1, 2, 3, 0), 0x2000])
    threads = kw.pop("threads", tuple(g * t for g, t in zip(grid, tptg, strict=True)))
    executable.launch(values, grid, tptg, threads, kw.pop("dynamic", [100]))  # type: ignore[arg-type]


# --- PTX text


def test_entry_takes_the_kernels_name() -> None:
    entry = _ptx.parse(SAXPY, "gemv<float, 4>")
    assert entry.symbol == "gemv_float__4_"
    assert b"mm_entry" not in entry.text
    assert b"[gemv_float__4__param_2+4]" in entry.text
    assert (entry.isa, entry.arch) == ((8, 0), "sm_80")
    assert [(p.size, p.align) for p in entry.params] == [(8, 8), (1, 1), (16, 16), (8, 8), (4, 4)]


@pytest.mark.parametrize(
    ("name", "symbol"),
    [
        ("4bit", "k_4bit"),
        ("WARP_SZ", "WARP_SZ_"),
        ("done", "done_"),
        ("", "k_"),
        ("é", "k__"),
        ("_x", "k__x"),
    ],
)
def test_symbols_are_ptx_identifiers_of_their_own(name: str, symbol: str) -> None:
    assert _ptx.parse(SAXPY, name).symbol == symbol


def test_a_function_that_starts_like_the_entry_keeps_its_name() -> None:
    text = HEAD + b".func mm_entry_helper()\n{ ret; }\n.visible .entry mm_entry()\n{ call mm_entry_helper; ret; }\n"
    assert _ptx.parse(text, "k").text.count(b"mm_entry_helper") == 2


@pytest.mark.parametrize("text", [b"", b"\x7fELF", HEAD, SAXPY.replace(b".u8", b".texref")])
def test_what_is_not_a_generated_module_is_refused(text: bytes) -> None:
    with pytest.raises(DriverError, match="kernel 'k'"):
        _ptx.parse(text, "k")


def test_isa_and_architecture_rules() -> None:
    assert _ptx.cuda_for((7, 8)) == (12, 0)
    assert _ptx.cuda_for((8, 0)) == (12, 0)
    assert _ptx.cuda_for((8, 8)) == (12, 9)
    assert _ptx.cuda_for((9, 9)) == (13, 0)
    assert _ptx.runs_on("sm_80", (9, 0))
    assert _ptx.runs_on("sm_90a", (9, 0))
    assert not _ptx.runs_on("sm_90a", (10, 0))
    assert not _ptx.runs_on("sm_90", (8, 9))
    assert _ptx.runs_on("sm_100", (12, 0))


# --- launches through the fake driver


def test_launch_hands_over_shape_stream_and_arguments(fake: FakeCuda) -> None:
    executable = device_cuda.load(saxpy_row(threadgroup_bytes=20), 0)
    launch(executable, (3, 2, 1), (64, 2, 1))
    (seen,) = fake.launches
    assert (seen.symbol, seen.grid, seen.block, seen.stream) == ("saxpy", (3, 2, 1), (64, 2, 1), 90)
    assert seen.shared == 32 + 100  # declared memory, rounded up to 16, then the argument
    vector = struct.pack("<4f", 1, 2, 3, 0)
    assert seen.params == [
        struct.pack("<Q", 0x1000),
        b"\7",
        vector,
        struct.pack("<Q", 0x2000),
        struct.pack("<I", 32),
    ]
    assert seen.context == 1000
    launch(executable, (3, 2, 1), (64, 2, 1), values=[1, b"\1", bytes(16), 2])
    assert fake.launches[1].params[0] == struct.pack("<Q", 1)
    assert fake.calls.count("cuModuleLoadDataEx") == 1


def test_tails_pass_the_total(fake: FakeCuda) -> None:
    text = SAXPY.replace(b"_param_4\n", b"_param_4, .param .u32 b, .param .u32 c, .param .u32 d\n")
    fake.sizes = [*SAXPY_SIZES, 4, 4, 4]
    tailed = CompiledRow(saxpy_row(tails=True).meta, text)
    launch(device_cuda.load(tailed, 0), (2, 1, 1), (32, 1, 1), threads=(40, 1, 1))
    assert [int.from_bytes(p, "little") for p in fake.launches[0].params[5:]] == [40, 1, 1]
    with pytest.raises(ArgumentError, match="without tails"):
        launch(device_cuda.load(saxpy_row(), 0), (2, 1, 1), (32, 1, 1), threads=(40, 1, 1))


def test_a_value_by_pointer_travels_as_an_address(fake: FakeCuda) -> None:
    text = SAXPY.replace(b".align 16 .b8 mm_entry_param_2[16]", b".u64 mm_entry_param_2")
    fake.sizes = [8, 1, 8, 8, 4]
    by_pointer = CompiledRow(saxpy_row(by_pointer=("a",)).meta, text)
    launch(device_cuda.load(by_pointer, 0), values=[1, b"\0", 0x3000, 2])
    assert fake.launches[0].params[2] == struct.pack("<Q", 0x3000)


def test_a_kernel_without_parameters(fake: FakeCuda) -> None:
    fake.sizes = []
    device_cuda.load(row(EMPTY, "nop"), 0).launch([], ONES, ONES, ONES, [])
    assert fake.launches[0].symbol == "nop"


def test_nothing_to_run_launches_nothing(fake: FakeCuda) -> None:
    launch(device_cuda.load(saxpy_row(), 0), (0, 1, 1), (32, 1, 1))
    assert fake.launches == []


def test_other_device_and_fresh_threads_get_the_right_context(fake: FakeCuda) -> None:
    first, second = (device_cuda.load(saxpy_row(), index) for index in (0, 1))
    launch(first)
    launch(second)
    assert [(seen.context, seen.stream) for seen in fake.launches] == [(1000, 90), (1001, 91)]
    assert fake.contexts == [1000]  # what was current before is current again
    bound = fake.calls.count("cuCtxSetCurrent")
    worker = threading.Thread(target=launch, args=(first,))
    worker.start()
    worker.join()
    assert fake.calls.count("cuCtxSetCurrent") == bound + 1


def test_threads_share_an_executable(fake: FakeCuda) -> None:
    executable = device_cuda.load(saxpy_row(), 0)

    def work(start: int) -> None:
        for i in range(50):
            launch(executable, (i % 3 + 1, 1, 1), values=[start + i, b"\1", bytes(16), start + i])

    workers = [threading.Thread(target=work, args=(1000 * n,)) for n in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seen = sorted(int.from_bytes(one.params[0], "little") for one in fake.launches)
    assert seen == sorted(1000 * n + i for n in range(8) for i in range(50))
    assert all(one.params[0] == one.params[3] for one in fake.launches)


# --- loading


def test_large_blocks_are_assembled_for(fake: FakeCuda) -> None:
    fake.max_threads = 256
    executable = device_cuda.load(saxpy_row(), 0)
    launch(executable, tptg=(256, 1, 1))
    launch(executable, tptg=(300, 1, 1))
    launch(executable, tptg=(300, 1, 1))
    assert [options.get(1) for _, options in fake.assembled] == [None, 384]


def test_shared_memory_beyond_the_default_is_asked_for(fake: FakeCuda) -> None:
    executable = device_cuda.load(saxpy_row(), 0)
    launch(executable, dynamic=[49152])
    assert fake.shared_limits == {}
    launch(executable, dynamic=[100_000])
    launch(executable, dynamic=[60_000])
    assert list(fake.shared_limits.values()) == [100_000]
    with pytest.raises(ArgumentError, match=r"232464 bytes of threadgroup memory .* has at most 232448"):
        launch(executable, dynamic=[232464])


def test_capture_is_tolerated_while_loading(fake: FakeCuda) -> None:
    device_cuda.load(saxpy_row(), 0)
    exchanged = [i for i, name in enumerate(fake.calls) if name == "cuThreadExchangeStreamCaptureMode"]
    assert len(exchanged) == 2
    assert exchanged[0] < fake.calls.index("cuModuleLoadDataEx") < exchanged[1]


# --- errors


@pytest.mark.parametrize(
    ("grid", "tptg", "message"),
    [
        (
            (1, 65536, 1),
            ONES,
            r"\(1, 65536, 1\) threadgroups; cuda allows at most \(2147483647, 65535, 65535\)",
        ),
        (ONES, (1, 1, 65), r"threads_per_threadgroup \(1, 1, 65\)"),
        (ONES, (0, 1, 1), r"threads_per_threadgroup \(0, 1, 1\)"),
        (ONES, (64, 32, 1), r"2048 threads per threadgroup \(64, 32, 1\); the GPU allows 1024"),
    ],
)
def test_limits_are_named(fake: FakeCuda, grid: device_cuda.Dim3, tptg: device_cuda.Dim3, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        launch(device_cuda.load(saxpy_row(), 0), grid, tptg)


def test_a_declared_limit_is_named(fake: FakeCuda) -> None:
    with pytest.raises(ArgumentError, match="the kernel declares 64 at most"):
        launch(device_cuda.load(saxpy_row(max_threads=64), 0), tptg=(65, 1, 1))


@pytest.mark.parametrize(
    ("values", "dynamic", "message"),
    [
        ([1], [16], "1 arguments and 1 threadgroup sizes were given, 4 and 1 are needed"),
        ([1, b"\0", bytes(16), 2], [], "0 threadgroup sizes"),
        ([1, b"\0", bytes(12), 2], [16], "argument 'a' is not 16 bytes of float32x3"),
    ],
)
def test_arguments_that_do_not_match(
    fake: FakeCuda, values: list[int | bytes], dynamic: list[int], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        launch(device_cuda.load(saxpy_row(), 0), values=values, dynamic=dynamic)


def test_launch_errors_say_what_was_launched(fake: FakeCuda) -> None:
    executable = device_cuda.load(saxpy_row(), 0)
    fake.fail["cuLaunchKernelEx"] = 700
    with pytest.raises(DriverError) as caught:
        launch(executable, (7, 1, 1), (32, 1, 1))
    text = str(caught.value)
    for part in (
        "'saxpy'",
        "cuda:0",
        "CUDA_ERROR_ILLEGAL_ADDRESS (700): what it means",
        "(7, 1, 1)",
        "100 bytes",
    ):
        assert part in text
    assert "CUDA_LAUNCH_BLOCKING" in text


def test_assembler_errors_carry_the_log(fake: FakeCuda) -> None:
    with pytest.raises(DriverError, match=r"(?s)CUDA_ERROR_INVALID_PTX.*line 3: unknown symbol"):
        device_cuda.load(CompiledRow(saxpy_row().meta, SAXPY + b"broken"), 0)


def test_old_drivers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DriverError, match=r"supports CUDA 11\.8, but the kernels need 12\.0 or newer"):
        _driver.Driver(FakeCuda(driver_version=11080))
    install(monkeypatch, FakeCuda(driver_version=12020))
    newer = CompiledRow(saxpy_row().meta, SAXPY.replace(b".version 8.0", b".version 8.8"))
    with pytest.raises(DriverError, match=r"kernel 'saxpy': .*supports CUDA 12\.2, but the kernels need 12\.9"):
        device_cuda.load(newer, 0)


def test_rows_for_another_gpu_are_refused(fake: FakeCuda) -> None:
    fake.capability = (8, 6)
    hopper = CompiledRow(saxpy_row().meta, SAXPY.replace(b"sm_80", b"sm_90a"))
    with pytest.raises(DriverError, match=r"compiled for sm_90a; cuda:0 .* capability 8\.6"):
        device_cuda.load(hopper, 0)


def test_inconsistent_rows_are_refused(fake: FakeCuda) -> None:
    with pytest.raises(DriverError, match=r"has parameters of \[\] bytes, the description says \[8, 1, 16, 8, 4\]"):
        device_cuda.load(CompiledRow(saxpy_row().meta, EMPTY), 0)


@pytest.mark.parametrize(
    ("capability", "arch"), [((8, 0), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((12, 0), "sm_90")]
)
def test_targets(fake: FakeCuda, capability: tuple[int, int], arch: str) -> None:
    fake.capability = capability
    assert str(device_cuda.target(0)) == f"cuda:{arch}"


def test_missing_and_old_devices(fake: FakeCuda) -> None:
    fake.capability = (7, 5)
    with pytest.raises(NoDeviceError, match=r"capability 7\.5; 8\.0 is the oldest"):
        device_cuda.target(0)
    with pytest.raises(NoDeviceError, match=r"there is no cuda:2: 2 NVIDIA"):
        device_cuda.target(2)


def test_no_gpu_is_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeCuda(fail={"cuInit": 100}))
    with pytest.raises(NoDeviceError, match="no NVIDIA GPU is visible"):
        device_cuda.target(0)


def test_probe_answers_and_never_starts_cuda(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_cuda.probe() is None
    assert "cuInit" not in fake.calls
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
        assert "it was forked" in (device_cuda.probe() or "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert device_cuda.probe() == "no NVIDIA GPU is visible"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1 // 0)
    assert "CUDA does not work here" in (device_cuda.probe() or "")
    monkeypatch.setattr(_driver, "_driver", None)
    monkeypatch.setattr(_driver, "_open_library", lambda: _driver.Driver(FakeCuda(driver_version=11040)))
    assert "11.4" in (device_cuda.probe() or "")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert device_cuda.probe() == "this PyTorch is built without CUDA"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is a POSIX call")
@pytest.mark.parametrize("started", [False, True])
def test_a_forked_child_gets_an_error_only_after_cuda_started(fake: FakeCuda, started: bool) -> None:
    executable = device_cuda.load(saxpy_row(), 0) if started else None
    receive, send = multiprocessing.Pipe(duplex=False)
    pid = os.fork()
    if pid == 0:
        try:
            if executable is None:
                send.send("fresh" if _driver._driver is None else "kept")
            else:
                launch(executable)
                send.send("launched")
        except DriverError as error:
            send.send(str(error))
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    answer = receive.recv()
    assert "forked" in answer if started else answer == "fresh"
    if started:
        poisoned = _driver.Driver(FakeCuda())
        poisoned.poison()
        with pytest.raises(DriverError, match="spawn"):
            poisoned.device(0)


def test_launches_show_in_the_profilers_trace() -> None:
    seen: list[int] = []
    launch_traced("my_kernel", seen.append, 1)
    with torch.profiler.profile() as profile:
        launch_traced("my_kernel", seen.append, 2)
    assert seen == [1, 2]
    assert [event.name for event in profile.events()].count("my_kernel") == 1


# --- on a GPU


@pytest.fixture
def gpu() -> int:
    reason = device_cuda.probe()
    if reason is not None:
        pytest.skip(reason)
    return torch.cuda.current_device()


def run_saxpy(
    executable: device_cuda.Executable, device: str = "cuda", n: int = 1000
) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = torch.randn(n, device=device), torch.randn(n, device=device)
    want = (x.double() * 2 + y.double()).float()
    saxpy(executable, x, y)
    return y, want


def saxpy(executable: device_cuda.Executable, x: torch.Tensor, y: torch.Tensor, a: float = 2.0) -> None:
    """The PTX reads n where a real kernel has the offset of its threadgroup argument: n = declared bytes."""
    grid = (-(-x.numel() // 128), 1, 1)
    values = [x.data_ptr(), b"\0", struct.pack("<4f", 0, a, 0, 0), y.data_ptr()]
    executable.launch(values, grid, (128, 1, 1), (grid[0] * 128, 1, 1), [16])


def gpu_row(n: int = 1008) -> CompiledRow:
    return saxpy_row(threadgroup_bytes=n)


@pytest.mark.cuda
def test_gpu_runs_on_the_current_stream(gpu: int) -> None:
    executable = device_cuda.load(gpu_row(), gpu)
    torch.testing.assert_close(*run_saxpy(executable, n=1008))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        got, want = run_saxpy(executable, n=1008)
    side.synchronize()
    torch.testing.assert_close(got, want)


@pytest.mark.cuda
def test_gpu_graph_capture_and_replay(gpu: int) -> None:
    x, y = torch.ones(1008, device="cuda"), torch.zeros(1008, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # the first use of the kernel: loading must not end the capture
        saxpy(device_cuda.load(gpu_row(), gpu), x, y)
    assert float(y.sum()) == 0
    for _ in range(3):
        graph.replay()
    assert torch.equal(y, torch.full_like(y, 6))


@pytest.mark.cuda
def test_gpu_threads_and_devices(gpu: int) -> None:
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            executable = device_cuda.load(gpu_row(), index)
            for _ in range(20):
                got, want = run_saxpy(executable, f"cuda:{index}", 1008)
                torch.testing.assert_close(got, want)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(n % torch.cuda.device_count(),)) for n in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []


@pytest.mark.cuda
def test_gpu_large_shared_memory_and_errors(gpu: int) -> None:
    executable = device_cuda.load(gpu_row(100_000), gpu)
    torch.testing.assert_close(*run_saxpy(executable, n=100_000))
    with pytest.raises(ArgumentError, match="threadgroup memory"):
        saxpy(device_cuda.load(gpu_row(300_000), gpu), *torch.ones(2, 8, device="cuda"))
    broken = CompiledRow(gpu_row().meta, SAXPY.replace(b"fma.rn.f32", b"fma.nonsense"))
    with pytest.raises(DriverError, match=r"(?s)assembling 'saxpy'.*nonsense"):
        device_cuda.load(broken, gpu)


@pytest.mark.cuda
def test_gpu_profiler_shows_the_kernels_name(gpu: int) -> None:
    executable = device_cuda.load(CompiledRow(gpu_row().meta, SAXPY), gpu)
    x, y = torch.ones(1008, device="cuda"), torch.zeros(1008, device="cuda")
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        launch_traced("saxpy (host)", saxpy, executable, x, y)
        torch.cuda.synchronize()
    names = {event.name for event in profile.events()}
    assert {"saxpy", "saxpy (host)"} <= names


def _child_launches(executable: device_cuda.Executable, send: object) -> None:
    try:
        executable.launch([], ONES, ONES, ONES, [])
        send.send("launched")  # type: ignore[attr-defined]
    except DriverError as error:
        send.send(str(error))  # type: ignore[attr-defined]


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_gpu_forked_child(gpu: int) -> None:
    executable = device_cuda.load(row(EMPTY, "nop"), gpu)
    executable.launch([], ONES, ONES, ONES, [])
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_child_launches, args=(executable, send))
    child.start()
    assert receive.poll(30)
    assert "forked" in receive.recv()
    child.join()


# --- rows of the real front end

REAL = """
#include <metal_stdlib>
using namespace metal;
struct Mixed { uint n; float3 v; bool flag; };
[[max_total_threads_per_threadgroup(256)]]
kernel void mixed(device const float* x [[buffer(3)]], device float* y [[buffer(0)]], constant Mixed& m [[buffer(1)]],
                  constant uchar& c [[buffer(2)]], threadgroup float* a [[threadgroup(0)]],
                  threadgroup float* b [[threadgroup(1)]], uint i [[thread_position_in_grid]],
                  uint t [[thread_index_in_threadgroup]]) {
  threadgroup float tile[33];
  tile[t % 33] = x[i];
  a[t] = x[i];
  b[t] = m.v.y;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (i < m.n && m.flag) y[i] = tile[t % 33] + a[t] * b[t] + c;
}
kernel void nothing() {}
"""


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("tails", [False, True])
@pytest.mark.parametrize("by_pointer", [(), ("m",), ("c", "m")])
def test_real_rows_launch(
    fake: FakeCuda, tmp_path: Path, compiler: object, arch: str, tails: bool, by_pointer: tuple[str, ...]
) -> None:
    cache = RowCache(tmp_path / "rows")
    library = MetalKernelLibrary(REAL, target=Target.parse(f"cuda:{arch}"), cache=cache)
    compiled = library.compile("mixed", tails=tails, by_pointer=by_pointer)
    assert compiled.meta.threadgroup_bytes == 33 * 4
    value = struct.pack("<I12x4f?15x", 9, 1, 2, 3, 0, True)
    arguments: list[int | bytes] = [0x1000, 0x2000, value, b"\7"]
    for slot, name in ((2, "m"), (3, "c")):
        if name in by_pointer:
            arguments[slot] = 0x3000 + slot
    want = [a if isinstance(a, bytes) else struct.pack("<Q", a) for a in arguments]
    want += [struct.pack("<I", n) for n in (144, 144 + 112)]
    if tails:
        want += [struct.pack("<I", n) for n in (70, 1, 1)]
    fake.sizes = [len(w) for w in want]
    executable = device_cuda.load(compiled, 0)
    executable.launch(arguments, (3, 1, 1), (32, 1, 1), (70, 1, 1) if tails else (96, 1, 1), [100, 64])
    (seen,) = fake.launches
    assert seen.symbol == "mixed"
    assert seen.params == want
    assert seen.shared == 144 + 112 + 64
    with pytest.raises(ArgumentError, match=r"257 threads .* declares 256 at most"):
        executable.check((1, 1, 1), (257, 1, 1))


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="ptxas is not installed")
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a", "sm_120"])
@pytest.mark.parametrize("name", ["mixed", "nothing"])
def test_real_rows_assemble(tmp_path: Path, compiler: object, arch: str, name: str) -> None:
    target = Target.parse(f"cuda:{arch if arch == 'sm_90a' else 'sm_80'}")  # sm_80's text serves every later GPU
    library = MetalKernelLibrary(REAL, target=target, cache=RowCache(tmp_path / "rows"))
    for tails in (False, True):
        entry = _ptx.parse(library.compile(name, tails=tails).binary, name)
        assert entry.isa == (8, 0)
        text = tmp_path / "row.ptx"
        text.write_bytes(entry.text)
        command = ["ptxas", f"-arch={arch}", "-v", str(text), "-o", str(tmp_path / "row.cubin")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"Compiling entry function '{name}' for '{arch}'" in done.stderr
        assert "0 bytes spill stores" in done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is a POSIX call")
def test_a_forked_child_never_waits_for_a_lock(fake: FakeCuda) -> None:
    executable = device_cuda.load(saxpy_row(), 0)
    with executable._lock:  # another thread's, as far as the child knows
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)
            try:
                launch(executable, (5, 1, 1))
            except DriverError as error:
                os._exit(0 if "forked" in str(error) else 2)
            os._exit(3)
        assert os.waitpid(pid, 0)[1] == 0


def test_launching_is_cheap(fake: FakeCuda) -> None:
    """What Python does for a launch, the driver's own time aside (a no-op here)."""
    executable = device_cuda.load(saxpy_row(), 0)
    executable._driver.thread.bound = True
    executable._driver.launch = lambda *_: 0
    values = [0x1000, b"\7", struct.pack("<4f", 1, 2, 3, 0), 0x2000]
    args = values, (3, 1, 1), (64, 1, 1), (192, 1, 1), [100]
    samples = []
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(1000):
            executable.launch(*args)
        samples.append((time.perf_counter() - start) * 1e3)
    print(f"{min(samples):.2f} µs a launch")
    assert min(samples) < 8
