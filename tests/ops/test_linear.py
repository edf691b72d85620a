"""linear: which kernel a number of tokens gets, that the result is its result, gradients, and what torch asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.ops.linear import FEW_TOKENS, linear, linear_ref, plan
from metal_marlin.ops.linear_decode import linear_decode
from metal_marlin.ops.marlin_gemm import Case, marlin_gemm
from metal_marlin.runtime.counters import counters, reset_counters

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.cuda)]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KINDS = [("fp4", "none", 64), ("nvfp4", "none", 16), ("int4", "packed", 32), ("uint8", "bias", 64), ("nf3", "none", 32)]
LIMITS = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 2e-6}


def launched(run: Callable[[], object]) -> set[str]:
    reset_counters()
    run()
    return set(counters())


def exact(case: Case, tensors: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """x times fp4 weights in float64, with bits taken apart here."""
    x, codes, scales = (t.cpu() for t in tensors[:3] if t is not None)
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    table = torch.tensor([*magnitudes, *(-m for m in magnitudes)], dtype=torch.float64)
    words = codes.long() & 0xFFFFFFFF
    W = table[torch.stack([words >> (4 * i) & 15 for i in range(8)], -1).flatten(1)]
    return x.double() @ (W * scales.double()[:, torch.arange(W.shape[1]) // case.group]).T


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 2, 8, 9, 16, 17, 65])
def test_matches_the_definition(M: int, dtype: torch.dtype, device: str) -> None:
    case = Case(M, 70, 200, 32, dtype)
    tensors = case.tensors(device)
    y, want = linear(*tensors[:3], 32), exact(case, tensors)
    assert y.dtype == dtype
    assert (y.cpu().double() - want).norm() <= LIMITS[dtype] * want.norm()


@pytest.mark.parametrize(("name", "zeros", "group"), KINDS)
def test_few_tokens_are_decoded_and_more_are_tiled(name: str, zeros: str, group: int) -> None:
    few = FEW_TOKENS["cpu"]
    for M, op, family in (
        (1, linear_decode, "decode_gemv"),
        (few, linear_decode, "decode_gemv"),
        (few + 1, marlin_gemm, "marlin_gemm"),
    ):
        case = Case(M, 33, 128, group, torch.float16, None, name, zeros)
        x, codes, scales, extra = case.tensors()
        options = {"format": name, "zeros": zeros, "extra": extra}
        found: list[torch.Tensor] = []
        rows = launched(lambda: found.append(linear(x, codes, scales, group, **options)))  # type: ignore[arg-type]  # noqa: B023
        assert len(rows) == 1
        assert rows.pop().startswith(f"{family}_{name}")
        assert torch.equal(found[0], op(x, codes, scales, group, **options))  # type: ignore[arg-type]


@pytest.mark.cuda
@pytest.mark.parametrize(("name", "zeros", "group"), KINDS)
@pytest.mark.parametrize("M", [1, 8, 9, 32, 33, 200])
def test_every_number_of_tokens_on_a_gpu(M: int, name: str, zeros: str, group: int) -> None:
    """Whatever is planned gives the product of the decoded weights."""
    case = Case(M, 70, 256, group, torch.float16, None, name, zeros)
    x, codes, scales, extra = case.tensors("cuda")
    options = {"format": name, "zeros": zeros, "extra": extra}
    y, want = linear(x, codes, scales, group, **options), linear_ref(x, codes, scales, group, **options)  # type: ignore[arg-type]
    assert (y.double() - want).norm() <= 1e-3 * want.norm()


def op_for(M: int, N: int = 4096, K: int = 4096, device: str = "cuda", **options: object) -> str:
    given = {"dtype": torch.float16, "scale_dtype": torch.float16, "hopper": True, **options}
    return plan(M, N, K, device=device, **given)  # type: ignore[arg-type]


def test_plan() -> None:
    for device, few in FEW_TOKENS.items():
        options = {"device": device, "dtype": torch.float32}
        assert op_for(0, **options) == op_for(1, **options) == op_for(few, **options) == "linear_decode"
        assert op_for(few + 1, **options) == op_for(4096, **options) == "marlin_gemm"
    assert [M for M in range(9, 40) if op_for(M, device="cpu") == "linear_decode"] == [*range(12, 17), *range(20, 33)]
    bfloats = {"device": "cpu", "dtype": torch.bfloat16, "scale_dtype": torch.bfloat16}
    assert op_for(48, **bfloats) == "linear_decode"
    assert op_for(49, **bfloats) == op_for(17, format="int8", **bfloats) == "marlin_gemm"
    assert op_for(1, device="cpu", kernel="marlin_gemm_fp4") == "marlin_gemm"
    assert op_for(999, device="cpu", kernel="decode_gemv_fp4_batched") == "linear_decode"


def test_plan_on_nvidia_gpus() -> None:
    assert op_for(8) == "linear_decode"
    assert op_for(9) == op_for(2, N=14336) == op_for(2047) == "marlin_gemm"
    assert op_for(2048) == "dequantize"
    # no tiles: another format, scales of another dtype, K that is no multiple of 32, another GPU for many tokens
    for options in ({"format": "int3"}, {"scale_dtype": torch.float32}, {"K": 4104}):
        assert op_for(32, **options) == "linear_decode"
        assert op_for(33, **options) == "dequantize"
    assert op_for(32, hopper=False) == "marlin_gemm"
    assert op_for(33, hopper=False) == "dequantize"
    # decoded weights would take more than 512 MiB
    assert op_for(4096, N=1 << 18) == "marlin_gemm"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "zeros", "group"), KINDS)
def test_decoded_for_the_library(
    name: str, zeros: str, group: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metal_marlin.ops.linear.plan", lambda *_: "dequantize")
    case = Case(40, 33, 128, group, torch.float16, None, name, zeros)
    x, codes, scales, extra = case.tensors(device)
    options = {"format": name, "zeros": zeros, "extra": extra}
    found: list[torch.Tensor] = []
    call = lambda: found.append(linear(x.view(2, 20, 128), codes, scales, group, **options))  # type: ignore[arg-type]  # noqa: E731
    assert all(row.startswith("dequant_") for row in launched(call))
    want = linear_ref(x, codes, scales, group, **options)  # type: ignore[arg-type]
    assert found[0].shape == (2, 20, 33)
    assert (found[0].view(40, 33).double() - want).norm() <= 1e-3 * want.norm()


def test_asked_for_a_kernel() -> None:
    x, codes, scales, _ = Case(3, 20, 128).tensors()
    for kernel in ("decode_gemv_fp4_batched", "marlin_gemm_fp4", "marlin_gemm_fp4_single_stage"):
        assert launched(lambda: linear(x, codes, scales, 128, kernel=kernel)) == {kernel}  # noqa: B023
    with pytest.raises(ArgumentError, match="gemm_fp5"):
        linear(x, codes, scales, 128, kernel="gemm_fp5")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(128,), (1, 128), (2, 3, 128), (4, 1, 5, 128), (0, 128), (2, 0, 128)])
def test_any_leading_dimensions(shape: tuple[int, ...], device: str) -> None:
    case = Case(1, 20, 128)
    _, codes, scales, _ = case.tensors(device)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).half().to(device)
    y, want = linear(x, codes, scales, 128), exact(case, (x, codes, scales))
    assert y.shape == (*shape[:-1], 20)
    assert (y.cpu().double() - want).norm() <= 1e-3 * want.norm()


@pytest.mark.parametrize("M", [1, 40])
def test_writes_where_it_is_told(M: int) -> None:
    x, codes, scales, _ = Case(M, 20, 128).tensors()
    around = torch.full((M * 20 + 64,), float("nan"), dtype=x.dtype)
    out = around[32:-32].view(M, 20)
    assert linear(x, codes, scales, 128, out=out) is out
    assert torch.equal(out, linear(x, codes, scales, 128))
    assert around[:32].isnan().all()
    assert around[-32:].isnan().all()


@pytest.mark.parametrize("M", [1, 40])
@pytest.mark.parametrize("change", ["x", "scales", "group", "extra", "format"])
def test_bad_input(change: str, M: int) -> None:
    x, codes, scales, _ = Case(M, 20, 128).tensors()
    bad: dict[str, tuple[Callable[[], object], str]] = {
        "x": (lambda: linear(x[:, :96].contiguous(), codes, scales, 128), "x has K = 96, codes have K = 128"),
        "scales": (lambda: linear(x, codes, scales[:9], 128), r"scales have shape \(9, 1\); N = 20"),
        "group": (lambda: linear(x, codes, scales, 48), "group_size = 48"),
        "extra": (lambda: linear(x, codes, scales, 128, format="int4", zeros="point"), "extra is"),
        "format": (lambda: linear(x, codes, scales, 128, format="fp5"), "fp5"),
    }
    run, message = bad[change]
    with pytest.raises(ArgumentError, match=message):
        run()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "zeros", "group"), KINDS)
def test_gradient_of_x(name: str, zeros: str, group: int, device: str) -> None:
    case = Case(12, 24, 128, group, torch.float32, None, name, zeros)
    x, codes, scales, extra = case.tensors(device)
    options = {"format": name, "zeros": zeros, "extra": extra}
    grad = torch.randn(12, 24, generator=torch.Generator().manual_seed(2)).to(device)
    x.requires_grad_()
    linear(x, codes, scales, group, **options).backward(grad)  # type: ignore[arg-type]
    twin = x.detach().cpu().double().requires_grad_()
    cpu = {**options, "extra": None if extra is None else extra.cpu()}
    linear_ref(twin, codes.cpu(), scales.cpu(), group, **cpu).backward(grad.cpu().double())  # type: ignore[arg-type]
    assert x.grad is not None
    assert twin.grad is not None
    assert (x.grad.cpu().double() - twin.grad).norm() <= 2e-6 * twin.grad.norm()


def test_without_gradients() -> None:
    x, codes, scales, _ = Case(2, 20, 128).tensors()
    y = linear(x, codes, scales, 128)
    parameter = torch.nn.Parameter(x)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            got = linear(parameter, codes, scales, 128)
            assert not got.requires_grad
            assert torch.equal(got, y)
    assert linear(parameter, codes, scales, 128).requires_grad


def test_no_gradient_through_out() -> None:
    x, codes, scales, _ = Case(2, 20, 128).tensors()
    with pytest.raises(ArgumentError, match="out is given, and x requires a gradient"):
        linear(x.requires_grad_(), codes, scales, 128, out=torch.empty(2, 20, dtype=x.dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("M", [1, 40])
def test_is_an_op_to_torch(M: int, device: str) -> None:
    x, codes, scales, extra = Case(M, 20, 128, 64, torch.float32, None, "int4", "point").tensors(device)
    arguments = (x, codes, scales, extra, "int4", "point", 64, None)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.metal_marlin.linear.default, arguments, test_utils=checks)
    torch.library.opcheck(
        torch.ops.metal_marlin.linear_out.default,
        (*arguments, x.new_empty(M, 20)),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compiles_as_one_graph() -> None:
    x, codes, scales, _ = Case(3, 20, 128, 64, torch.float32).tensors()

    def twice(x: torch.Tensor) -> torch.Tensor:
        return linear(x * 2, codes, scales, 64) + linear(x, codes, scales, 64)

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), twice(x))
        many = x.repeat(20, 1)
        assert torch.equal(compiled(many), twice(many))


def test_fake_tensors_have_the_shape_of_y() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, codes, scales, _ = Case(3, 20, 128).tensors()
    with FakeTensorMode() as mode:
        x, codes, scales = (mode.from_tensor(t) for t in (x, codes, scales))
        y = linear(x, codes, scales, 128)
    assert y.shape == (3, 20)
    assert y.dtype == torch.float16


@pytest.mark.cuda
@pytest.mark.parametrize("M", [1, 40])
def test_in_a_cuda_graph(M: int, recorded: Callable[..., Callable[[], torch.Tensor]]) -> None:
    x, codes, scales, _ = Case(M, 64, 512).tensors("cuda")
    y = linear(x, codes, scales, 128)
    assert torch.equal(recorded(lambda: linear(x, codes, scales, 128))(), y)
