"""Tables of measured choices: who decides, what is timed and when, files."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import metal_marlin
from metal_marlin.cli.commands import app
from metal_marlin.cli.tune import model_shapes
from metal_marlin.errors import ArgumentError, MetalMarlinError
from metal_marlin.formats import codec
from metal_marlin.nn.linear import QuantLinear
from metal_marlin.nn.sparse import SparseLinear
from metal_marlin.ops import candidates, linear_sparse, packed, packed_sparse, packed_tiles, tuned, tuning
from metal_marlin.ops.explain import explain
from metal_marlin.ops.gemm_tiles import fastest
from metal_marlin.ops.linear import linear
from metal_marlin.ops.marlin_gemm import Case
from metal_marlin.ops.packed_plan import Rows, plan
from metal_marlin.ops.tuned import Problem, Table
from metal_marlin.ops.weights import KEYS
from metal_marlin.quant import prune_2_4, quantize_sparse
from metal_marlin.runtime.counters import counters, reset_counters
from metal_marlin.runtime.library import MetalKernelLibrary

HALF = torch.float16
PROBLEM = Problem("fp4", "none", HALF, HALF, 48, 256)
DECODE, GEMM = "decode_gemv_fp4_batched", "marlin_gemm_fp4"
FIRST = f"packed_gemm_fp4__m{packed_tiles.TILES.fastest(8, 48, 256)}"
OTHER = next(k for k in candidates.of_tiles(packed.ROWS, PROBLEM, 8) if k != FIRST)
SPARSE, SPARSE_OTHER, *_ = candidates.of_tiles(packed_sparse.ROWS, PROBLEM, 8)
SCALES = {word: dtype for dtype, word in KEYS.items()} | {"own": torch.uint8}
Timer = Callable[..., float]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tables are kept here, and those that ship are not seen."""
    monkeypatch.setattr(tuned, "default_directory", lambda: tmp_path)
    monkeypatch.setattr(tuned, "_SHIPPED", tmp_path / "shipped")
    monkeypatch.delenv("METAL_MARLIN_TUNED")
    tuned.forget()
    yield tmp_path
    tuned.forget()


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Microseconds that candidates seem to take; 10 where nothing is said."""
    times: dict[str, float] = {}

    def said(calls: Mapping[str, Callable[[int], None]], *_: Any) -> dict[str, float]:
        return {name: call(0) or times.get(name, 10.0) for name, call in calls.items()}

    monkeypatch.setattr(tuning, "_times", said)
    return times


def run(M: int, offset: int = 0) -> list[str]:
    """The kernels that a product launches."""
    x, codes, scales, _ = Case(M, 48, 256, 64).tensors()
    reset_counters()
    linear(x, codes, scales, 64)
    return list(counters())


def run_packed(M: int, compiled: bool = False) -> list[str]:
    x, w = packed.packed(Case(M, 48, 256, 64))
    args = (x, w.codes, w.scales, w.powers, 64)
    reset_counters()
    (torch.compile(packed.linear_packed, backend="eager") if compiled else packed.linear_packed)(*args)
    return list(counters())


def run_sparse(M: int, out: bool = False) -> list[str]:
    x, *w = packed_sparse.packed(linear_sparse.Case(M, 48, 256, 64))
    reset_counters()
    packed_sparse.linear_packed_sparse(x, *w, 64, out=x.new_empty(M, 48) if out else None)
    return list(counters())


def test_a_table_decides(folder: Path) -> None:
    assert run(8) == [DECODE]
    table = Table(tuned.device_key("cpu"))
    table.put(PROBLEM, 8, GEMM)
    table.put(PROBLEM, 32, DECODE)
    table.save(tuned.user_path(table.device))
    assert run(8) == [DECODE]  # tables are read once
    tuned.forget()
    # the next larger number of tokens that was measured; beyond the last, the plan
    assert [run(M) for M in (1, 5, 8, 9, 32, 33)] == [[GEMM], [GEMM], [GEMM], [DECODE], [DECODE], [GEMM]]
    assert [s.kernel for s in explain(8, 48, 256)] == [GEMM]
    assert explain(8, 48, 256)[0].why == "measured on this device"
    assert [s.kernel for s in explain(8, 48, 256, device="cpu")] == [DECODE]


def test_a_table_decides_tiles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_packed(8) == [FIRST]
    key = tuned.device_key("cpu")
    for path, tokens in ((tuned._SHIPPED / f"{key}.json", 32), (tuned.user_path(key), 8)):
        table = Table(key)
        table.put(PROBLEM, tokens, OTHER, "linear_packed")
        table.save(path)
    tuned.forget()
    # the user's table, the one that ships, the fitted times
    assert [run_packed(M) for M in (1, 8, 9, 32)] == [[OTHER]] * 4
    assert run_packed(33) == [f"packed_gemm_fp4__m{packed_tiles.TILES.fastest(33, 48, 256)}"]
    assert run_packed(8, compiled=True) == [OTHER]
    assert run(8) == [DECODE]  # another op
    (step,) = explain(8, 48, 256, layout="mma16")
    assert (step.kernel, step.why) == (OTHER, "measured on this device")
    assert [s.kernel for s in explain(8, 48, 256, layout="mma16", device="cpu")] == [FIRST]
    x, w = packed.packed(Case(8, 48, 256, 64))
    reset_counters()
    packed.linear_packed(x, w.codes, w.scales, w.powers, 64, kernel=FIRST)
    assert list(counters()) == [FIRST]  # who asks for a tile gets it
    monkeypatch.setenv("METAL_MARLIN_TUNED", "off")
    tuned.forget()
    assert run_packed(8) == [FIRST]


def test_a_table_decides_tiles_of_sparse_weights() -> None:
    assert run_sparse(8) == [SPARSE]
    table = Table(tuned.device_key("cpu"))
    table.put(PROBLEM, 8, OTHER, "linear_packed")
    table.put(PROBLEM, 8, SPARSE_OTHER, "linear_packed_sparse")
    table.save(tuned.user_path(table.device))
    tuned.forget()
    assert [run_sparse(8), run_sparse(3, out=True), run_packed(8)] == [[SPARSE_OTHER], [SPARSE_OTHER], [OTHER]]
    (step,) = explain(8, 48, 256, layout="mma16", sparse=True)
    assert (step.kernel, step.why) == (SPARSE_OTHER, "measured on this device")
    x, *w = packed_sparse.packed(linear_sparse.Case(8, 48, 256, 64))
    reset_counters()
    packed_sparse.linear_packed_sparse(x, *w, 64, kernel=SPARSE)
    assert list(counters()) == [SPARSE]


def test_kernels_of_another_version_are_planned_and_tuned_again(timer: dict[str, float]) -> None:
    table, gone = Table(tuned.device_key("cpu")), "packed_gemm_fp4__m7x7"
    table.put(PROBLEM, 8, gone, "linear_packed")
    table.save(tuned.user_path(table.device))
    tuned.forget()
    with pytest.warns(UserWarning, match=rf"the table of choices for cpu names '{gone}' .* until you tune again"):
        assert run_packed(8) == [FIRST]
    timer[OTHER] = 1.0
    with metal_marlin.tune() as session:
        run_packed(8)
    assert [m.chosen for m in session.measured] == [OTHER]
    assert run_packed(8) == [OTHER]


def test_another_size_is_planned() -> None:
    table = Table(tuned.device_key("cpu"))
    for other in (Problem("fp4", "none", HALF, HALF, 49, 256), Problem("int4", "none", HALF, HALF, 48, 256)):
        table.put(other, 8, GEMM)
    table.save(tuned.user_path(table.device))
    tuned.forget()
    assert run(8) == [DECODE]


def test_tune_measures_once_and_uses_what_was_fastest(timer: dict[str, float], folder: Path) -> None:
    timer[GEMM] = 5.0
    with metal_marlin.tune() as session:
        run(7)
        run(8)  # both are measured as 8
    assert [(m.M, m.chosen, m.times) for m in session.measured] == [(8, GEMM, {DECODE: 10.0, GEMM: 5.0})]
    assert run(8) == [GEMM]
    data = json.loads(tuned.user_path(tuned.device_key("cpu")).read_text())
    assert data["linear"] == {"fp4-none-half-half-48x256": {"8": GEMM}}
    assert data["version"] == 1
    timer[DECODE] = 1.0  # in the table already
    with metal_marlin.tune() as session:
        run(8)
    assert session.measured == []


def test_tune_measures_tiles(timer: dict[str, float], folder: Path) -> None:
    timer[OTHER] = 5.0
    with metal_marlin.tune() as session:
        run_packed(7)
        run_packed(8)
    (found,) = session.measured
    assert (found.op, found.M, found.chosen) == ("linear_packed", 8, OTHER)
    assert found.times == {k: timer.get(k, 10.0) for k in candidates.of_tiles(packed.ROWS, PROBLEM, 8)}
    assert run_packed(8) == [OTHER]
    data = json.loads(tuned.user_path(tuned.device_key("cpu")).read_text())
    assert data["linear_packed"] == {"fp4-none-half-half-48x256": {"8": OTHER}}
    assert data["linear"] == {}


@pytest.mark.parametrize("format", packed_sparse.FORMATS)
def test_tune_measures_sparse_layers(format: str, timer: dict[str, float], folder: Path) -> None:
    weight = prune_2_4(torch.randn(32, 128, generator=torch.Generator().manual_seed(0)))
    layer = SparseLinear(quantize_sparse(weight, "2:4", format, 32, scale_dtype=HALF)).prepack()
    problem = Problem(format, "none", HALF, layer.weight_scale.dtype, 32, 128)
    planned, tile, *_ = found = candidates.of_tiles(packed_sparse.ROWS, problem, 32)
    timer[tile] = 1.0
    x = torch.ones(24, 128, dtype=HALF)
    with metal_marlin.tune() as session:
        layer(x)
    assert [(m.op, m.M, m.chosen) for m in session.measured] == [("linear_packed_sparse", 32, tile)]
    assert session.measured[0].times == {k: timer.get(k, 10.0) for k in found}
    reset_counters()
    layer(x)
    assert list(counters()) == [tile]
    data = json.loads(tuned.user_path(tuned.device_key("cpu")).read_text())
    assert data["linear_packed_sparse"] == {str(problem): {"32": tile}}
    assert data["linear"] == data["linear_packed"] == {}
    timer[planned] = 0.5  # in the table already
    with metal_marlin.tune() as session:
        layer(x)
    assert session.measured == []


@pytest.mark.parametrize("format", ["nvfp4", "int4"])
def test_tune_measures_layers_in_operand_order(format: str, timer: dict[str, float]) -> None:
    layer = QuantLinear.from_linear(torch.nn.Linear(128, 32, bias=False, dtype=HALF), format).prepack()
    planned, tile, *_ = candidates.of_tiles(packed.ROWS, Problem(format, "none", HALF, HALF, 32, 128), 32)
    assert planned != tile
    timer[tile] = 1.0
    with metal_marlin.tune() as session:
        layer(torch.ones(24, 128, dtype=HALF))
    assert [(m.op, m.M, m.chosen) for m in session.measured] == [("linear_packed", 32, tile)]


def test_times_of_tiles_are_of_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_SECONDS", 1e-4)
    with metal_marlin.tune() as session:
        run_packed(16)
    assert session.measured[0].times.keys() == set(candidates.of_tiles(packed.ROWS, PROBLEM, 16))
    assert all(0 < t < 1e6 for t in session.measured[0].times.values())


@pytest.mark.parametrize(
    ("op", "module", "first"), [("linear_packed", packed, FIRST), ("linear_packed_sparse", packed_sparse, SPARSE)]
)
def test_wrong_results_of_tiles_have_no_time(op: str, module: Any, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module._run
    monkeypatch.setattr(module, "_run", lambda *args: [real(*args), args[-1].mul_(1.5)])
    with pytest.raises(MetalMarlinError, match=f"{first}: wrong result"):
        tuning.tune_shape(tuning.Session(), op, PROBLEM, 8, 64, torch.device("cpu"))


@pytest.mark.parametrize("rows", [packed.ROWS, packed_sparse.ROWS], ids=lambda rows: rows.op)
def test_rows_of_all_tiles_are_compiled_at_once(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(candidates, "library", lambda *_: SimpleNamespace(compile=compiled.append))
    candidates.compile_tiles(rows, PROBLEM, "somewhere")
    assert sorted(compiled) == sorted(rows.kernel("fp4", tile) for tile in rows.tiles)
    assert set(compiled) <= set(MetalKernelLibrary(rows.family, device="cpu").kernels)


def test_tables_with_fewer_sections_are_read(folder: Path) -> None:
    (folder / "t.json").write_text('{"version": 1, "device": "a", "about": {}, "linear": {"b": {"1": "c"}}}')
    table = Table.load(folder / "t.json")
    assert table.sections == {"linear": {"b": {1: "c"}}, "linear_packed": {}, "linear_packed_sparse": {}}


def test_a_little_faster_is_not_enough(timer: dict[str, float]) -> None:
    timer[GEMM] = 9.9
    with metal_marlin.tune() as session:
        run(8)
    assert session.measured[0].chosen == DECODE


def test_nothing_is_timed_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_times", lambda *_: pytest.fail("timed"))
    assert run(8) == [DECODE]
    with metal_marlin.tune():
        pass
    assert run(8) == [DECODE]


def test_what_was_measured_is_kept_when_the_block_raises(timer: dict[str, float]) -> None:
    timer[GEMM] = 5.0

    def fails() -> None:
        with metal_marlin.tune():
            run(8)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert run(8) == [GEMM]


def test_wrong_results_have_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    real = tuning._times

    def broken(calls: Mapping[str, Callable[[int], None]], out: torch.Tensor, want: torch.Tensor) -> dict[str, float]:
        return real({name: lambda i: [None, out.zero_()][0] for name in calls}, out, want)

    monkeypatch.setattr(tuning, "_times", broken)
    with pytest.raises(MetalMarlinError, match="decode_gemv_fp4_batched: wrong result"), metal_marlin.tune():
        run(8)


def test_of_a_wrong_shape_the_op_says_what_is_wrong() -> None:
    x, codes, scales, _ = Case(8, 48, 256, 64).tensors()
    with pytest.raises(ArgumentError, match=r"shapes x \(\)"), metal_marlin.tune():
        linear(x[0, 0], codes, scales, 64)


def test_times_are_of_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_SECONDS", 1e-4)
    with metal_marlin.tune() as session:
        run(16)
    (found,) = session.measured
    assert found.times.keys() == {DECODE, GEMM}
    assert all(0 < t < 1e6 for t in found.times.values())
    assert found.chosen in found.times


def test_off_and_a_file_of_ones_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(tuned.device_key("cpu"))
    table.put(PROBLEM, 8, GEMM)
    table.save(tuned.user_path(table.device))
    monkeypatch.setenv("METAL_MARLIN_TUNED", "off")
    tuned.forget()
    assert run(8) == [DECODE]
    table.save(folder / "mine.json")
    monkeypatch.setenv("METAL_MARLIN_TUNED", str(folder / "mine.json"))
    tuned.forget()
    assert run(8) == [GEMM]
    table.device = "cuda-9.0-132"
    table.save(folder / "mine.json")
    tuned.forget()
    with pytest.raises(MetalMarlinError, match=r"table for cuda-9\.0-132, this device is cpu"):
        run(8)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no table"),
        ("[]", "no table"),
        ('{"version": 1, "device": "a"}', "no table"),
        ('{"version": 2, "device": "a", "about": {}, "linear": {}}', "version 2"),
        ('{"version": 1, "device": "a", "about": {}, "linear": {"b": {"x": "c"}}}', "no table"),
    ],
)
def test_broken_tables(text: str, said: str, folder: Path) -> None:
    path = tuned.user_path(tuned.device_key("cpu"))
    path.parent.mkdir()
    path.write_text(text)
    tuned.forget()
    with pytest.raises(MetalMarlinError, match=said):
        run(8)
    with pytest.raises(MetalMarlinError, match=re.escape(str(path))):
        Table.load(path)


def test_candidates() -> None:
    assert candidates.of_linear(PROBLEM, 8, "cpu", False) == [DECODE, GEMM]
    assert candidates.of_linear(PROBLEM, 128, "cpu", False) == [GEMM]
    found = candidates.of_linear(PROBLEM, 64, "cuda", True)
    assert found[0] == f"marlin_gemm_fp4__m{fastest(64, PROBLEM.N, PROBLEM.K, hopper=True)}"
    assert {GEMM, DECODE, "marlin_gemm_fp4_32x64x32", "marlin_gemm_fp4__m112x16", "dequantize"} <= set(found)
    assert "marlin_gemm_fp4__m64x64" not in candidates.of_linear(PROBLEM, 64, "cuda", False)
    assert "gemm_fp4_optimized_decode" in candidates.of_linear(PROBLEM, 16, "mps", False)


@pytest.mark.parametrize(("rows", "format"), [(packed.ROWS, "int8"), (packed_sparse.ROWS, "int4")], ids=["all", "2:4"])
def test_candidate_tiles(rows: Rows, format: str) -> None:
    large = Problem(format, "none", HALF, HALF, 4096, 4096)
    tiles = rows.tiles
    for M in tuning.TOKENS:
        first, *more = found = candidates.of_tiles(rows, large, M)
        assert first == f"{rows.name}_{format}__m{tiles.fastest(M, 4096, 4096)}"
        assert more
        assert len(set(found)) == len(found) < len(tiles)
        times = [tiles[k.partition("__m")[2]].time(M, 4096, 4096) for k in found]
        assert max(times) <= max(1.6 * times[0], times[0] + 3)
        assert min(times) == times[0]
    assert not any(k.endswith("x256") for k in candidates.of_tiles(rows, large, 1))
    assert not any(k.endswith("x8") for k in candidates.of_tiles(rows, large, 512))


@pytest.mark.cuda
def test_times_are_of_kernels_on_a_gpu() -> None:
    """What Python takes for a launch is no part of them."""
    wanted = torch.ones(4, 1 << 20, device="cuda", dtype=HALF)
    out = torch.empty_like(wanted)

    def slow(i: int) -> None:
        time.sleep(1e-3)
        out.copy_(wanted)

    def twice(i: int) -> None:
        slow(i)
        out.copy_(wanted)

    times = tuning._times({"copy": slow, "two": twice}, out, wanted.cpu().double())
    assert 1 < times["copy"] < times["two"] < 500
    with pytest.raises(MetalMarlinError, match="copy: wrong result"):
        tuning._times({"copy": lambda i: None}, out, wanted.cpu().double())


def test_shipped_tables_name_kernels_that_exist() -> None:
    shipped = Path(metal_marlin.__file__).parent / "tables"
    project = Path(__file__).parents[2] / "pyproject.toml"
    assert '"tables/*.json"' in project.read_text()
    files = ("marlin_gemm.metal", "decode_gemv.metal", "kernels_autotune.metal", "gemm_fp4_optimized.metal")
    tiled = [
        (rows, set(MetalKernelLibrary(rows.family, device="cpu").kernels)) for rows in (packed.ROWS, packed_sparse.ROWS)
    ]
    known = {row for file in files for row in MetalKernelLibrary(file, device="cpu").kernels} | {tuned.LIBRARY}
    for path in shipped.glob("*.json"):
        table = Table.load(path)
        assert table.device == path.stem
        for name, choices in table.sections["linear"].items():
            format, zeros, dtype, _, size = name.split("-")
            assert zeros in codec(format).zero_kinds
            assert dtype in KEYS.values()
            assert len(size.split("x")) == 2
            assert set(choices) <= set(tuning.TOKENS)
            assert set(choices.values()) <= known
        for rows, known_tiles in tiled:
            for name, choices in table.sections[rows.op].items():
                format, zeros, dtype, scale, size = name.split("-")
                sizes = (*map(int, size.split("x")), SCALES[dtype], SCALES[scale])
                assert set(choices) <= set(tuning.TOKENS)
                for M, kernel in choices.items():
                    assert plan(rows, M, *sizes, format, zeros, kernel).kernel in known_tiles


def test_command(timer: dict[str, float], folder: Path) -> None:
    timer[GEMM] = 5.0
    words = ["tune", "--shape", "48x256", "--device", "cpu", "--tokens", "8", "--group", "64"]
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)[0]["chosen"] == GEMM
    assert run(8) == [GEMM]
    result = CliRunner().invoke(app, [*words, "--out", str(folder / "t.json"), "--format", "int4:point"])
    assert "int4-point-half-half-48x256 on cpu" in result.output
    assert Table.load(folder / "t.json").sections["linear"].keys() == {"int4-point-half-half-48x256"}
    assert Table.load(folder / "t.json").sections["linear_packed"] == {}  # a CPU's layers hold the canonical order


def test_command_for_operand_order(timer: dict[str, float], folder: Path) -> None:
    timer[OTHER] = 5.0
    words = ["tune", "--shape", "48x256", "--device", "cpu", "--tokens", "8", "--group", "64", "--layout", "mma16"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "fp4-none-half-half-48x256 on cpu, layout mma16" in result.output
    assert run_packed(8) == [OTHER]
    assert run(8) == [DECODE]
    out = folder / "t.json"
    result = CliRunner().invoke(
        app, [*words, "--out", str(out), "--format", "int4:packed", "--shape", "24x64", "--json"]
    )
    assert json.loads(result.output[result.output.index("[") :])[0]["problem"] == "int4-point-half-half-48x256"
    assert "int4-packed-half-half-24x64: left out" in result.output
    assert Table.load(out).sections["linear_packed"].keys() == {"int4-point-half-half-48x256"}


def test_command_for_sparse_weights(timer: dict[str, float], folder: Path) -> None:
    timer[SPARSE_OTHER] = 5.0
    words = ["tune", "--shape", "48x256", "--device", "cpu", "--tokens", "8", "--sparse"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "fp4-none-half-half-48x256 on cpu, 2:4 sparse, layout mma16" in result.output
    assert [run_sparse(8), run_packed(8), run(8)] == [[SPARSE_OTHER], [FIRST], [DECODE]]
    out = folder / "t.json"
    more = ["--format", "mxfp4", "--format", "int4", "--format", "int4:point", "--format", "nvfp4", "--format", "int8"]
    more += ["--group", "16", "--shape", "24x64", "--dtype", "bf16", "--layout", "mma16", "--out", str(out)]
    result = CliRunner().invoke(app, words + more)
    assert result.exit_code == 0, result.output
    assert result.output.count("left out") == 8  # all of 24x64; zeros; groups of 16; 8 bits
    table = Table.load(out)
    names = {"mxfp4-none-bf16-own-48x256", "int4-none-bf16-bf16-48x256"}
    assert table.sections["linear_packed_sparse"].keys() == names
    assert table.sections["linear_packed"] == {}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name a model"),
        (["--shape", "48"], "give NxK"),
        (["--shape", "8x8", "--dtype", "int"], "--dtype int"),
        (["--shape", "8x8", "--tokens", "3"], "--tokens 3"),
        (["--shape", "8x8", "--layout", "rows"], "--layout rows"),
        (["--shape", "8x8", "--layout", "canonical", "--sparse"], "--layout canonical"),
    ],
)
def test_bad_input(words: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["tune", "--device", "cpu", *words])
    assert result.exit_code != 0
    assert said in result.output


def test_sizes_of_a_model(tmp_path: Path) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    # q, k, v together; o; gate and up together; down; head
    assert sorted(model_shapes(str(tmp_path))) == [(64, 64), (64, 96), (128, 64), (192, 64)]
