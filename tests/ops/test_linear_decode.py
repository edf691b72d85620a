"""linear_decode and its rows: every row, tails and group sizes against float64, bad input, what torch asks of an op."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from metal_marlin import MetalKernelLibrary, dispatch_kernel
from metal_marlin.errors import ArgumentError
from metal_marlin.msl.target import Target
from metal_marlin.ops.linear_decode import CASES, FAMILY, OP, Case, linear_decode, linear_decode_ref, plan
from metal_marlin.runtime import device_cpu

ROOT = Path(__file__).parent.parent.parent
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.cuda)]
SMALL = [case for case in CASES if not case.model]
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
EXACT = torch.tensor(VALUES, dtype=torch.float64)


def weights(codes: torch.Tensor, scales: torch.Tensor, group: int) -> torch.Tensor:
    """[N, K] in float64, with bits taken apart here and not by the codec."""
    words = codes.cpu().long() & 0xFFFFFFFF
    parts = torch.stack([words >> (4 * i) & 15 for i in range(8)], -1).flatten(1)
    column = torch.arange(parts.shape[1]) // group
    return EXACT[parts] * scales.cpu().double()[:, column]


def check(y: torch.Tensor, case: Case, tensors: tuple[torch.Tensor, ...]) -> None:
    """Against the same product of dequantised weights in torch, in the activations' dtype."""
    x, codes, scales = tensors
    W = weights(codes, scales, case.group)
    exact = x.cpu().double() @ W.T
    composed = x @ W.to(x.dtype).to(x.device).T
    unit = ROUNDING[case.dtype]
    size = exact.norm(dim=-1)
    ours, theirs = ((t.cpu().double() - exact).norm(dim=-1) for t in (y, composed))
    assert y.dtype == x.dtype
    assert (ours <= 2 * theirs + unit * size).all(), (ours / size, theirs / size)
    worst = (composed.cpu().double() - exact).abs().max()
    assert (y.cpu().double() - exact).abs().max() <= 8 * worst + unit * exact.abs().max()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_matches_the_reference(case: Case, device: str) -> None:
    tensors = case.tensors(device)
    check(linear_decode(*tensors, case.group), case, tensors)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [c for c in CASES if c.model][:1], ids=str)
def test_model_shape(case: Case, device: str) -> None:
    tensors = case.tensors(device)
    check(linear_decode(*tensors, case.group), case, tensors)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", ["decode_gemv_fp4", "decode_gemv_fp4_batched"])
@pytest.mark.parametrize("scale", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("group", [16, 128])
def test_every_row(dtype: torch.dtype, scale: torch.dtype, kernel: str, group: int, device: str) -> None:
    case = Case(3, 21, 544, group, dtype, scale)
    tensors = case.tensors(device)
    check(linear_decode(*tensors, case.group, kernel=kernel), case, tensors)


def dispatch(library: MetalKernelLibrary, case: Case, tensors: tuple[torch.Tensor, ...], kind: str) -> torch.Tensor:
    """The plan of a device kind, on a library of the test's own."""
    x, codes, scales = tensors
    p = plan(case.M, case.N, case.K, x.dtype, scales.dtype, kind)
    y = x.new_full((case.M, case.N), float("nan"))
    shape = {"M": case.M, "N": case.N, "K": case.K, "group": case.group, "rows": p.rows, "aligned": case.K % 32 == 0}
    args = (x, codes, scales, y, shape)
    dispatch_kernel(library, p.kernel, threadgroups=p.threadgroups, threads_per_threadgroup=p.threads, args=args)
    return y


@pytest.mark.parametrize("case", [*SMALL[::5], Case(5, 70, 1000, 16)], ids=str)
def test_32_lanes_agree_with_one(case: Case) -> None:
    """The pipeline of Apple GPUs, run here by fibres."""
    tensors = case.tensors()
    one = linear_decode(*tensors, case.group)
    y = dispatch(MetalKernelLibrary(FAMILY, device="cpu", lanes=32), case, tensors, "mps")
    check(y, case, tensors)
    near = 16 if case.dtype == torch.float32 else 2  # the order of the sums differs
    assert (y.double() - one.double()).norm() <= near * ROUNDING[case.dtype] * one.double().norm()


@pytest.mark.parametrize("level", ["cpu:x86-64-v3", "cpu:x86-64-v4"])
@pytest.mark.parametrize("case", [*SMALL[::5], Case(5, 70, 1000, 16)], ids=str)
def test_older_cpus(case: Case, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Table look-ups without AVX-512, products without its bfloat instruction."""
    host = Target.host_cpu().arch
    if "x86" not in host or host < level.partition(":")[2]:
        pytest.skip(f"this CPU is {host}")
    monkeypatch.setattr(device_cpu, "target", lambda index: Target.parse(level))
    library = MetalKernelLibrary(FAMILY, device="cpu", lanes=1)
    tensors = case.tensors()
    check(dispatch(library, case, tensors, "cpu"), case, tensors)


@pytest.mark.parametrize("target", ["cpu:aarch64", "cuda:sm_80", "cuda:sm_90a"])
def test_compiles_for_other_targets(target: str) -> None:
    library = MetalKernelLibrary(FAMILY, target=Target.parse(target))
    for name in library.kernels if target == "cuda:sm_80" else library.kernels[::4]:
        assert library.compile(name).binary


def test_cases_reach_every_row() -> None:
    names = {plan(c.M, c.N, c.K, c.dtype, c.scale_dtype or c.dtype, "cpu").kernel for c in CASES}
    names |= {
        plan(1, 1, 8, t, s, "cpu", 1, kernel).kernel
        for t in ROUNDING
        for s in ROUNDING
        for kernel in ("decode_gemv_fp4", "decode_gemv_fp4_batched")
    }
    assert names == set(MetalKernelLibrary(FAMILY, device="cpu").kernels)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("group", [16, 64])
def test_every_code_is_exact(dtype: torch.dtype, group: int, device: str) -> None:
    """x picks one weight of each row: y is that weight, bit for bit (scales are powers of two)."""
    K = 64
    codes = torch.tensor([[0x76543210, -0x01234568] * (K // 16)] * 4, dtype=torch.int32)
    scales = torch.full((4, K // group), 0.25).to(dtype)
    W = weights(codes, scales, group)
    assert set(W[0].tolist()) == {0.25 * v for v in VALUES}
    x = torch.eye(K, dtype=dtype)
    y = linear_decode(x.to(device), codes.to(device), scales.to(device), group).cpu()
    assert torch.equal(y.double() + 0.0, W.T + 0.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-4, 1.0, 2e4])
def test_sizes_of_activations(dtype: torch.dtype, size: float, device: str) -> None:
    """Decoded weights that are held as tiny numbers lose nothing, and long sums of large products do not overflow."""
    case = Case(1, 32, 2048, 128, dtype)
    x, codes, scales = case.tensors(device)
    tensors = ((x.float() * size).clamp(-6e4, 6e4).to(dtype), codes, scales * (0.01 if size > 1 else 1))
    check(linear_decode(*tensors, case.group), case, tensors)


@pytest.mark.parametrize("device", DEVICES)
def test_not_a_number_and_infinity_reach_their_token_only(device: str) -> None:
    x, codes, scales = Case(4, 40, 256).tensors(device)
    x[1, 7], x[2, 250] = float("nan"), float("inf")
    y = linear_decode(x, codes, scales, 128)
    assert y[1].isnan().all()
    assert not y[2].isfinite().all()
    assert torch.equal(y[[0, 3]], linear_decode(x[[0, 3]], codes, scales, 128))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("M", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_writes_its_output_only(M: int, dtype: torch.dtype, device: str) -> None:
    case = Case(M, 77, 320, 64, dtype)
    tensors = case.tensors(device)
    guarded = torch.full((M * 77 + 256,), float("nan"), dtype=dtype, device=device)
    out = guarded[128 : 128 + M * 77].view(M, 77)
    assert linear_decode(*tensors, 64, out=out) is out
    check(out, case, tensors)
    assert guarded[:128].isnan().all()
    assert guarded[-128:].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", [1, 4])
def test_tensors_that_start_anywhere(offset: int, device: str) -> None:
    case = Case(2, 20, 256)
    x, codes, scales = case.tensors(device)
    moved = []
    for t in (x, codes, scales):
        room = t.new_zeros(t.numel() + offset)
        room[offset:] = t.flatten()
        moved.append(room[offset:].view(t.shape))
    check(linear_decode(*moved, 128), case, (x, codes, scales))


@pytest.mark.parametrize("device", DEVICES)
def test_same_bits_again(device: str) -> None:
    tensors = Case(1, 300, 4096).tensors(device)
    first = linear_decode(*tensors, 128)
    assert all(torch.equal(first, linear_decode(*tensors, 128)) for _ in range(5))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 256), (2, 0, 256)])
def test_no_tokens(shape: tuple[int, ...], device: str) -> None:
    _, codes, scales = Case(1, 20, 256).tensors(device)
    y = linear_decode(torch.empty(shape, dtype=torch.float16, device=device), codes, scales, 128)
    assert y.shape == (*shape[:-1], 20)


def test_no_rows() -> None:
    x, codes, scales = Case(3, 4, 256).tensors()
    assert linear_decode(x, codes[:0], scales[:0], 128).shape == (3, 0)


def test_shapes_of_x() -> None:
    x, codes, scales = Case(6, 10, 256).tensors()
    y = linear_decode(x, codes, scales, 128)
    assert torch.equal(linear_decode(x.view(2, 3, 256), codes, scales, 128), y.view(2, 3, 10))
    assert linear_decode(x[0], codes, scales, 128).shape == (10,)


def test_reference_is_the_product() -> None:
    x, codes, scales = Case(2, 9, 88, 16, torch.float32).tensors()
    got = linear_decode_ref(x, codes, scales, 16)
    assert got.dtype == torch.float64
    assert torch.allclose(got, x.double() @ weights(codes, scales, 16).T, rtol=1e-14)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, c, s: (x[:, :96].contiguous(), c, s, 128), "linear_decode: x has K = 96, codes have K = 128"),
        (lambda x, c, s: (x, c, s, 48), "group_size = 48; fp4 takes 16, 32, 64, 128, 256 or K = 128"),
        (
            lambda x, c, s: (x, c, s, 32),
            r"scales have shape \(10, 1\); N = 10, K = 128, group_size = 32 need \(10, 4\)",
        ),
        (lambda x, c, s: (x, c, s[:9], 128), r"scales have shape \(9, 1\); N = 10"),
        (lambda x, c, s: (x.double(), c, s, 128), "x is torch.float64"),
        (lambda x, c, s: (x, c, s.double(), 128), "scales is torch.float64"),
        (lambda x, c, s: (x, c.long(), s, 128), "codes: tensor is torch.int64"),
        (lambda x, c, s: (x.T.contiguous().T, c, s, 128), r"x: tensor of shape \(2, 128\) with strides"),
        (lambda x, c, s: (x, c[0], s, 128), r"codes \(16,\)"),
        (lambda x, c, s: (x[:, :0], c[:, :0], s, 128), "K = 0; fp4 needs a positive multiple of 8"),
    ],
)
def test_bad_input(change: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        linear_decode(*change(*Case(2, 10, 128).tensors()))  # type: ignore[operator]


def test_bad_kernel_and_output() -> None:
    x, codes, scales = Case(2, 10, 128).tensors()
    with pytest.raises(ArgumentError, match="kernel is 'gemv'; decode_gemv_fp4 or"):
        linear_decode(x, codes, scales, 128, kernel="gemv")
    with pytest.raises(ArgumentError, match=r"out is torch.float16 \(2, 11\); needs torch.float16 \(2, 10\)"):
        linear_decode(x, codes, scales, 128, out=x.new_empty(2, 11))


@pytest.mark.parametrize("device", DEVICES)
def test_is_an_op_to_torch(device: str) -> None:
    tensors = (*Case(2, 12, 128).tensors(device), 128, None)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.metal_marlin.linear_decode.default, tensors, test_utils=checks)
    out = tensors[0].new_empty(2, 12)
    torch.library.opcheck(
        torch.ops.metal_marlin.linear_decode_out.default, (*tensors, out), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.cuda
def test_in_a_cuda_graph() -> None:
    x, codes, scales = Case(1, 64, 512).tensors("cuda")
    y = linear_decode(x, codes, scales, 128)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = linear_decode(x, codes, scales, 128)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, y)
    x.mul_(2)
    graph.replay()
    assert torch.equal(captured, linear_decode(x, codes, scales, 128))


def test_works_in_threads_and_inference_mode() -> None:
    tensors = Case(1, 64, 512).tensors()
    y = linear_decode(*tensors, 128)
    code = (
        "import torch, threading\n"
        "from metal_marlin.ops.linear_decode import Case, linear_decode\n"
        "t = Case(1, 64, 512).tensors(); want = linear_decode(*t, 128); bad = []\n"
        "def run():\n"
        "    with torch.inference_mode():\n"
        "        for _ in range(50):\n"
        "            if not torch.equal(linear_decode(*t, 128), want): bad.append(1)\n"
        "w = [threading.Thread(target=run) for _ in range(4)]; [i.start() for i in w]; [i.join() for i in w]\n"
        "assert not bad; print(want.float().sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == y.float().sum().item()


def test_spec_names_what_exists() -> None:
    assert (ROOT / str(OP.bench)).exists()
    assert OP.reference is linear_decode_ref
    assert len({str(case) for case in CASES}) == len(CASES)
