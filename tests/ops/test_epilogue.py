"""Products with an epilogue in the same launch, and the epilogue alone: against float64, bad input, what torch asks."""

from __future__ import annotations

import pytest
import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.ops import epilogue as ops
from metal_marlin.runtime.counters import counters, reset_counters
from metal_marlin.runtime.library import MetalKernelLibrary

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.cuda)]
SMALL = [case for case in ops.CASES if not case.model]


def meaning(v: torch.Tensor, name: str) -> torch.Tensor:
    """Activations by their definitions, in float64."""
    if name == "silu":
        return v / (1 + torch.exp(-v))
    if name == "gelu":
        return v * 0.5 * torch.erfc(-v / 2**0.5)
    if name == "gelu_tanh":
        return 0.5 * v * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (v + 0.044715 * v**3)))
    if name == "quick_gelu":
        return v / (1 + torch.exp(-1.702 * v))
    return v.clamp_min(0) if name == "relu" else v


def finished(case: ops.Case, v: torch.Tensor, bias: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    v = meaning(v + bias.double() if case.bias else v, case.activation)
    return other.double() + 0.5 * v if case.join == "residual" else v * other.double() if case.join else v


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_product_and_epilogue(case: ops.Case, device: str) -> None:
    x, codes, scales, bias, other = case.tensors()
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    each = codes.long().unsqueeze(-1) >> (4 * torch.arange(8)) & 15
    W = (table[each & 7] * (1 - 2.0 * (each >> 3))).flatten(1)
    W = W * scales.double()[:, torch.arange(case.K) // case.group]
    sums = x.double() @ W.T
    exact = finished(case, sums, bias, other)
    moved = [t.to(device) for t in (x, codes, scales, bias, other)]
    reset_counters()
    kernel = case.kernel or "marlin_gemm_fused_fp4_epilogue_fc"
    y = ops.linear_epilogue(*moved[:3], case.group, kernel=kernel, **case.options(*moved[3:]))  # type: ignore[arg-type]
    assert list(counters()) == [ops.plan(case.dtype, case.activation, case.bias, case.join, case.kernel)]
    eps = torch.finfo(case.dtype).eps
    # weights are rounded, y is: the first error passes the epilogue, whose slope is below 1.2, and the other operand
    product = 1.2 * (2 * eps * (x.double().abs() @ W.abs().T).norm() / sums.numel() ** 0.5 + 1e-5)
    product = product * (other.double().abs() if case.join == "gate" else 1)
    assert ((y.cpu().double() - exact).abs() <= eps * exact.abs() + 4 * product).all()
    assert y.dtype == x.dtype


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", ops.STANDALONE, ids=str)
def test_epilogue_alone(case: ops.Case, device: str) -> None:
    y, bias, other = case.product()
    exact = finished(case, y.double(), bias, other)
    moved = [t.to(device) for t in (y, bias, other)]
    got = ops.epilogue(moved[0], **case.options(*moved[1:]))  # type: ignore[arg-type]
    eps = torch.finfo(case.dtype).eps
    assert ((got.cpu().double() - exact).abs() <= eps * exact.abs() + 2e-6 * (1 + exact.abs())).all()


@pytest.mark.parametrize("lanes", [1, 32])
def test_fixed_and_chosen_have_the_same_bits(lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if lanes == 32:
        monkeypatch.setattr(ops, "plan_kind", lambda _: "mps")
    for act in ops.ACTS:
        case = ops.Case(33, 70, 96, 32, torch.float16, act, True, "residual")
        x, codes, scales, bias, other = case.tensors()
        options = case.options(bias, other)
        fixed = ops.linear_epilogue(x, codes, scales, 32, **options)  # type: ignore[arg-type]
        chosen = ops.linear_epilogue(x, codes, scales, 32, kernel="marlin_gemm_fused_fp4_epilogue", **options)  # type: ignore[arg-type]
        assert torch.equal(fixed, chosen)


@pytest.mark.parametrize("device", DEVICES)
def test_launches(device: str) -> None:
    """One, but on cuda, where two measured faster."""
    case = ops.Case(6, 20, 64, 32, torch.float16, "silu", True, "gate")
    x, codes, scales, bias, other = case.tensors(device)
    reset_counters()
    y = ops.linear_epilogue(x, codes, scales, 32, **case.options(bias, other))  # type: ignore[arg-type]
    fused = ["marlin_gemm_fused_fp4_epilogue_fc__esilubiasgate"]
    assert list(counters()) == (["decode_gemv_fp4_batched", "epilogue_standalone"] if device == "cuda" else fused)
    exact = ops.linear_epilogue_ref(x, codes, scales, 32, **case.options(bias, other))
    assert (y.double() - exact).norm() <= 3e-3 * exact.norm()


def test_rows_are_what_plans_name() -> None:
    names = {ops.plan(c.dtype, c.activation, c.bias, c.join, c.kernel) for c in ops._every()}
    names |= {f"epilogue_standalone{key}" for key in ("", "__tbf16", "__tf32")}
    assert names == set(MetalKernelLibrary(ops.FAMILY, device="cpu").kernels)
    assert len(names) == 72 + 2 + 3


@pytest.mark.parametrize("device", DEVICES)
def test_shapes(device: str) -> None:
    x, codes, scales, bias, other = ops.Case(6, 20, 64).tensors(device)
    flat = ops.linear_epilogue(x, codes, scales, 32, activation="silu", gate=other)
    shaped = ops.linear_epilogue(x.view(2, 3, 64), codes, scales, 32, activation="silu", gate=other.view(2, 3, 20))
    assert torch.equal(shaped, flat.view(2, 3, 20))
    assert ops.linear_epilogue(x[:0], codes, scales, 32, bias=bias).shape == (0, 20)
    assert ops.epilogue(x[:0], activation="relu").shape == (0, 64)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"activation": "swish"}, "activation = 'swish'; there are none, silu"),
        ({"bias": torch.zeros(19, dtype=torch.float16)}, r"bias is torch.float16 \(19,\); needs torch.float16 \(20,\)"),
        ({"residual": torch.zeros(6, 20)}, "residual is torch.float32"),
        ({"gate": torch.zeros(5, 20, dtype=torch.float16)}, r"gate is torch.float16 \(5, 20\)"),
        ({"scales": torch.zeros(20, 2)}, "scales is torch.float32, x is torch.float16"),
        ({"kernel": "marlin_gemm_fp4"}, "kernel is 'marlin_gemm_fp4'"),
    ],
)
def test_bad_input(change: dict[str, object], said: str) -> None:
    x, codes, scales, _, other = ops.Case(6, 20, 64).tensors()
    given: dict[str, object] = {"x": x, "codes": codes, "scales": scales, "group_size": 32, **change}
    with pytest.raises(ArgumentError, match=said):
        ops.linear_epilogue(**given)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="residual and gate are both given"):
        ops.linear_epilogue(x, codes, scales, 32, residual=other, gate=other)
    with pytest.raises(ArgumentError, match="activation = 'swish'"):
        ops.epilogue(x, activation="swish")


@pytest.mark.parametrize("device", DEVICES)
def test_is_an_op_to_torch(device: str) -> None:
    x, codes, scales, bias, other = ops.Case(6, 20, 64).tensors(device)
    arguments = (x, codes, scales, 32, "silu", bias, other, "gate", 1.0, None)
    torch.library.opcheck(torch.ops.metal_marlin.linear_epilogue.default, arguments)
    torch.library.opcheck(torch.ops.metal_marlin.epilogue.default, (other, "relu", bias, None, "", 1.0))
