"""gated_up and its rows against float64 by the definitions of FP4 and of the activations; views, bad input, torch."""

from __future__ import annotations

import itertools

import pytest
import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.ops import gated_mlp as mlps
from metal_marlin.ops import gated_up as ups
from metal_marlin.ops.gated_mlp import gated_mlp, gated_mlp_ref
from metal_marlin.ops.gated_up import Case, gated_up
from metal_marlin.ops.linear_decode_cases import Case as Product
from metal_marlin.runtime.counters import counters
from metal_marlin.runtime.library import MetalKernelLibrary

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.cuda)]
EPS = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
UPS = [case for case in ups.CASES if not case.model]


def weights(codes: torch.Tensor, scales: torch.Tensor, group: int) -> torch.Tensor:
    """[N, K] by the format's definition and not by the codec."""
    nibbles = (codes.cpu().long().unsqueeze(-1) >> 4 * torch.arange(8)) & 15
    W = VALUES[nibbles.flatten(-2)]
    return W * scales.cpu().double()[..., torch.arange(W.shape[1]) // group]


def meaning(v: torch.Tensor, name: str) -> torch.Tensor:
    """Activations by their definitions."""
    if name == "silu":
        return v / (1 + torch.exp(-v))
    if name == "gelu":
        return v * 0.5 * torch.erfc(-v / 2**0.5)
    return 0.5 * v * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (v + 0.044715 * v**3)))


def gated(case: Case, tensors: tuple[torch.Tensor, ...], dtype: torch.dtype) -> torch.Tensor:
    """The result in ``dtype``, of weights rounded to it; every step rounded as torch does."""
    x = tensors[0].cpu().to(dtype)
    gate, up = (x @ weights(*tensors[i : i + 2], case.group).to(dtype).T for i in (1, 3))
    return (meaning(gate.double(), case.activation).to(dtype) * up).double()


def close(y: torch.Tensor, exact: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> bool:
    """Per row twice the error of torch's composition and a rounding; nowhere more than 8 times its largest."""
    error, their = (y.cpu().double() - exact).abs(), (theirs - exact).abs()
    rows = error.norm(dim=-1) <= 2 * their.norm(dim=-1) + EPS[dtype] * exact.norm(dim=-1) + 1e-6
    return bool(rows.all()) and bool((error <= 8 * their.max() + EPS[dtype] * exact.abs() + 1e-6).all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", UPS, ids=str)
def test_every_row(case: Case, device: str) -> None:
    tensors = case.tensors(device)
    exact, theirs = gated(case, tensors, torch.float64), gated(case, tensors, case.dtype)
    for kernel in (k for k, (acts, _) in ups.KERNELS.items() if case.activation in acts):
        before = counters()
        y = gated_up(*tensors, case.group, activation=case.activation, kernel=kernel)
        assert list(counters() - before) == [ups.plan("test", case.dtype, case.dtype, case.activation, kernel).name]
        assert y.dtype == case.dtype
        assert close(y, exact, theirs, case.dtype), kernel
        assert torch.equal(y, gated_up(*tensors, case.group, activation=case.activation, kernel=kernel))


def test_simdgroups_of_32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ups, "plan_kind", lambda _: "mps")
    for case in UPS:
        test_every_row(case, "cpu")


@pytest.mark.parametrize("device", DEVICES)
def test_its_own_choice(device: str) -> None:
    """For few tokens the decoding rows, else the row of the activation, but on cuda two products and what follows."""
    rows = (("silu", "gated_up_fp4"), ("gelu", "gated_up_geglu_fp4"), ("gelu_tanh", "gated_up_geglu_fp4"))
    few = ((1, ups.DECODE), (2, f"{ups.DECODE}_batched"), (8, f"{ups.DECODE}_batched"))
    for M, (activation, row) in itertools.product((9, 40), rows):
        case = Case(M, 70, 96, 32, torch.float16, activation)
        tensors = case.tensors(device)
        before = counters()
        y = gated_up(*tensors, 32, activation=activation)
        launched = {name.partition("__")[0]: n for name, n in (counters() - before).items()}
        if device == "cuda":
            assert launched.pop("epilogue_standalone") == 1
            assert sum(launched.values()) == 2
        else:
            assert launched == {row: 1}
        exact, theirs = gated(case, tensors, torch.float64), gated(case, tensors, case.dtype)
        assert close(y, exact, 2 * theirs - exact, case.dtype)
    for M, row in few:
        before = counters()
        gated_up(*Case(M, 70, 96).tensors(device), 32)
        assert list(counters() - before) == [row]
    if device == "cpu":  # as linear, which reads weights again there for up to 32 tokens in bfloat16
        before = counters()
        gated_up(*Case(20, 70, 96, 32, torch.bfloat16).tensors(), 32)
        assert list(counters() - before) == [f"{ups.DECODE}_batched__tbf16"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", [None, *(k for k, (acts, _) in ups.KERNELS.items() if "silu" in acts)])
def test_halves_of_one_matrix_and_odd_starts(kernel: str | None, device: str) -> None:
    case = Case(6, 21, 40, 40)
    x, gate, gate_scales, up, up_scales = case.tensors(device)
    plain = gated_up(x, gate, gate_scales, up, up_scales, 40, kernel=kernel)
    codes, scales = torch.cat((gate, up)), torch.cat((gate_scales, up_scales))
    moved = torch.cat((x.new_zeros(1), x.flatten()))[1:].view(6, 40)
    assert torch.equal(gated_up(moved, codes[:21], scales[:21], codes[21:], scales[21:], 40, kernel=kernel), plain)
    shaped = gated_up(x.view(2, 3, 40), gate, gate_scales, up, up_scales, 40, kernel=kernel)
    assert torch.equal(shaped, plain.view(2, 3, 21))
    assert gated_up(x[:0], gate, gate_scales, up, up_scales, 40, kernel=kernel).shape == (0, 21)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", EPS)
def test_every_row_has_its_activation(dtype: torch.dtype, device: str) -> None:
    """At -2.5 GELU by erf and by tanh are 3 % apart."""
    x, ones = torch.zeros(2, 8, dtype=dtype, device=device), torch.ones(8, 1, dtype=dtype, device=device)
    x[:, 0] = 1.25
    minus_two, one = (torch.full((8, 1), code, dtype=torch.int32, device=device) for code in (-0x33333334, 0x22222222))
    for act in ups.ACTS:
        h = 1.25 * meaning(torch.tensor(-2.5, dtype=torch.float64), act).item()
        for kernel in (k for k, (acts, _) in ups.KERNELS.items() if act in acts):
            y = gated_up(x, minus_two, ones, one, ones, 8, activation=act, kernel=kernel)
            assert (y.double() / h - 1).abs().max() <= EPS[dtype], kernel
        for kernel in (None, *mlps.DOWN):
            residual = torch.full((2, 8), -0.5, dtype=dtype, device=device) if kernel == mlps.DOWN[1] else None
            more = {"activation": act, "residual": residual, "kernel": kernel}
            y = gated_mlp(x, minus_two, ones, one, ones, one, ones, 8, **more)  # type: ignore[arg-type]
            wanted = 8 * h + (0 if residual is None else -0.5)
            assert (y.double() / wanted - 1).abs().max() <= 1.5 * EPS[dtype], kernel


def test_large_numbers() -> None:
    """A gate far below 0 is shut, not NaN."""
    x, gate, gate_scales, up, up_scales = Case(3, 9, 64).tensors()
    gate = torch.full_like(gate, -0x22222223)  # 0xdddddddd: every code is -3
    y = gated_up(x.abs() * 64, gate, (gate_scales + 1), up, up_scales, 32)
    assert torch.equal(y, torch.zeros_like(y))


def test_rows_are_what_plans_name() -> None:
    for file in {file for _, file in ups.KERNELS.values()}:
        kernels = {k: acts for k, (acts, where) in ups.KERNELS.items() if where == file}
        wanted = {ups.plan("", d, d, act, k).name for d in EPS for k, acts in kernels.items() for act in acts}
        found = {row for row in MetalKernelLibrary(file, device="cpu").kernels if row.partition("__")[0] in kernels}
        assert found == wanted


def test_checked_mode_is_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = {file: MetalKernelLibrary(file, device="cpu", lanes=32, checked=True) for _, file in ups.KERNELS.values()}
    monkeypatch.setattr(ups, "library", lambda file, *_: checked[file])
    monkeypatch.setattr(ups, "plan_kind", lambda _: "mps")
    for kernel, (acts, _) in ups.KERNELS.items():
        for dtype, K in ((torch.float16, 328), (torch.bfloat16, 96)):
            case = Case(3, 37, K, 64 if K % 64 else 32, dtype, acts[-1])
            tensors = case.tensors()
            y = gated_up(*tensors, case.group, activation=case.activation, kernel=kernel)
            assert close(y, gated(case, tensors, torch.float64), gated(case, tensors, dtype), dtype)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"activation": "swish"}, "gated_up: activation = 'swish'; there are silu, gelu, gelu_tanh"),
        ({"kernel": "gated_up_geglu_fp4"}, "kernel is .gated_up_geglu_fp4.; fp4 has gated_up_fp4, dense_fused"),
        ({"x": torch.zeros(6, 64)}, "x is torch.float32, scales are torch.float16"),
        ({"x": torch.zeros(6, 72).half()}, "gated_up, gate: x has K = 72, codes have K = 64"),
        ({"up_codes": torch.zeros(20, 9, dtype=torch.int32)}, "gated_up, up: x has K = 64, codes have K = 72"),
        ({"up_scales": torch.zeros(20, 3).half()}, r"gated_up, up: scales have shape \(20, 3\)"),
        ({"up_scales": torch.zeros(20, 2)}, "scales torch.float16, up N = 20, scales torch.float32"),
        (
            {"up_codes": torch.zeros(19, 8, dtype=torch.int32), "up_scales": torch.zeros(19, 2).half()},
            "gate has N = 20, scales torch.float16, up N = 19",
        ),
    ],
)
def test_bad_input(change: dict[str, object], said: str) -> None:
    names = ("x", "gate_codes", "gate_scales", "up_codes", "up_scales")
    given = {**dict(zip(names, Case(6, 20, 64).tensors(), strict=True)), "group_size": 32, **change}
    with pytest.raises(ArgumentError, match=said):
        gated_up(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", DEVICES)
def test_is_an_op_to_torch(device: str) -> None:
    tensors = Case(6, 20, 64).tensors(device)
    torch.library.opcheck(torch.ops.metal_marlin.gated_up.default, (*tensors, 32, "silu", None))
    compiled = torch.compile(lambda x: gated_up(x, *tensors[1:], 32) + 1, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tensors[0]), gated_up(*tensors, 32) + 1)


MLPS = [case for case in mlps.CASES if not case.model]


def layer(case: mlps.Case, tensors: tuple[torch.Tensor, ...], dtype: torch.dtype) -> torch.Tensor:
    """``gated`` for a whole layer."""
    one = Case(case.M, case.F, case.K, case.group, case.dtype, case.activation)
    h = gated(one, (tensors[0], tensors[1], tensors[2], tensors[3], tensors[4]), dtype).to(dtype)
    y = h @ weights(*tensors[5:7], case.group).to(dtype).T
    return (tensors[7].cpu().to(dtype) + y if case.residual else y).double()


def half_of(kernel: str | None, M: int) -> bool:
    """Whether ``gated_mlp`` takes it for so many tokens."""
    return M <= 8 or not (kernel or "").startswith(ups.DECODE)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", MLPS, ids=str)
def test_layer(case: mlps.Case, device: str) -> None:
    tensors = case.tensors(device)
    exact, theirs = layer(case, tensors, torch.float64), layer(case, tensors, case.dtype)
    firsts = [k for k, (acts, _) in ups.KERNELS.items() if case.activation in acts and half_of(k, case.M)]
    for kernel in (None, *firsts, mlps.DOWN[case.residual]):
        before = counters()
        y = gated_mlp(*tensors[:7], case.group, kernel=kernel, **case.options(tensors[7]))  # type: ignore[arg-type]
        launched = counters() - before
        if kernel in mlps.DOWN:
            assert launched[mlps.row_of(kernel, case.dtype, case.activation)] == 1
            assert sum(launched.values()) == 3 or device == "cuda"
        elif kernel is not None:
            row = ups.plan("test", case.dtype, case.dtype, case.activation, kernel).name
            assert launched[row] == 1
            assert device == "cuda" or sum(launched.values()) == 2 + (case.residual and case.M <= 8)
        assert y.dtype == case.dtype
        assert close(y, exact, theirs, case.dtype), kernel


def test_layer_by_simdgroups_of_32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ups, "plan_kind", lambda _: "mps")
    monkeypatch.setattr(mlps, "plan_kind", lambda _: "mps")
    for case in MLPS:
        test_layer(case, "cpu")


def test_layer_is_clean_in_checked_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = MetalKernelLibrary(mlps.FAMILY, device="cpu", lanes=32, checked=True)
    monkeypatch.setattr(mlps, "library", lambda *_: checked)
    monkeypatch.setattr(mlps, "plan_kind", lambda _: "mps")
    for case in (
        mlps.Case(3, 64, 104, 67, 32, d, a, r) for d, a, r in zip(EPS, ups.ACTS[1:], (False, True), strict=True)
    ):
        tensors = case.tensors()
        y = gated_mlp(*tensors[:7], 32, kernel=mlps.DOWN[case.residual], **case.options(tensors[7]))  # type: ignore[arg-type]
        assert close(y, layer(case, tensors, torch.float64), layer(case, tensors, case.dtype), case.dtype)


def test_rows_of_layers() -> None:
    wanted = {mlps.row_of(kernel, dtype, act) for kernel in mlps.DOWN for dtype in EPS for act in ups.ACTS}
    rows = MetalKernelLibrary(mlps.FAMILY, device="cpu").kernels
    assert {row for row in rows if row.partition("__")[0] in mlps.DOWN} == wanted


@pytest.mark.parametrize("device", DEVICES)
def test_decoding_is_two_launches(device: str) -> None:
    for M, tail in ((1, ""), (5, "_batched")):
        *tensors, _ = mlps.Case(M, 64, 96, 33).tensors(device)
        before = counters()
        gated_mlp(*tensors, 32)
        assert counters() - before == {f"gated_mlp_fp4_decode{tail}": 1, f"decode_gemv_fp4{tail}": 1}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("M", [1, 6, 12])
def test_layer_shapes(M: int, device: str) -> None:
    """Groups of down of their own, batches, nothing."""
    case = mlps.Case(M, 40, 24, 9, 40)
    x, *first = Case(M, 24, 40, 40).tensors(device)
    down = Product(1, 9, 24, 16).tensors(device)[1:3]
    wanted = gated_mlp_ref(x, *first, *down, 40, down_group_size=16)
    y = gated_mlp(x, *first, *down, 40, down_group_size=16)
    assert (y.double() - wanted).norm() <= 4e-3 * wanted.norm()
    shaped = gated_mlp(x.view(1, M, 40), *first, *down, 40, down_group_size=16, residual=y.view(1, M, 9))
    assert torch.allclose(shaped.view(M, 9).double(), y.double() + wanted, rtol=4e-3, atol=4e-3)
    assert gated_mlp(x[:0], *first, *down, 40, down_group_size=16).shape == (0, case.N)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"down_codes": torch.zeros(9, 7, dtype=torch.int32)}, "gated_mlp, down: x has K = 24, codes have K = 56"),
        ({"down_scales": torch.zeros(9, 1)}, "x is torch.float16, down_scales are torch.float32"),
        (
            {"residual": torch.zeros(12, 8).half()},
            r"residual is torch.float16 \(12, 8\); needs torch.float16 \(12, 9\)",
        ),
        ({"kernel": "gated_mlp_fp4_decode"}, "kernel is 'gated_mlp_fp4_decode', M = 12; it takes at most 8 tokens"),
        ({"gate_codes": torch.zeros(24, 6, dtype=torch.int32)}, "gated_mlp, gate: x has K = 32, codes have K = 48"),
        ({"kernel": "gated_mlp_residual_fp4"}, "residual is None; that takes 'gated_mlp_fp4'"),
        (
            {"kernel": "gated_mlp_fp4", "residual": torch.zeros(12, 9).half()},
            "residual is given; that takes 'gated_mlp_residual_fp4'",
        ),
        ({"kernel": "marlin_gemm_fp4"}, "gated_mlp: kernel is 'marlin_gemm_fp4'"),
        ({"activation": "relu"}, "activation = 'relu'; there are silu, gelu, gelu_tanh"),
    ],
)
def test_bad_layers(change: dict[str, object], said: str) -> None:
    names = ("x", "gate_codes", "gate_scales", "up_codes", "up_scales", "down_codes", "down_scales")
    given = dict(zip(names, mlps.Case(12, 32, 24, 9).tensors(), strict=False))
    with pytest.raises(ArgumentError, match=said):
        gated_mlp(**{**given, "group_size": 32, **change})  # type: ignore[arg-type]


def test_a_layer_is_an_op_to_torch() -> None:
    *tensors, residual = mlps.Case(12, 32, 64, 9).tensors()
    torch.library.opcheck(torch.ops.metal_marlin.gated_mlp.default, (*tensors, 32, 32, "silu", residual, None))
    compiled = torch.compile(lambda x: gated_mlp(x, *tensors[1:], 32) + 1, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tensors[0]), gated_mlp(*tensors, 32) + 1)
