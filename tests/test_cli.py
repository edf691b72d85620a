"""The command line: exit status, output, one clear line for an error."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from metal_marlin import __version__
from metal_marlin.cli import app
from metal_marlin.cli import console as console_module
from metal_marlin.cli import doctor as doctor_command
from metal_marlin.cli import kernels as kernels_command
from metal_marlin.cli.arguments import parse_constants, parse_sizes, parse_value, split
from metal_marlin.errors import ArgumentError
from metal_marlin.ops import inventory as inventory_module
from metal_marlin.ops.spec import OpSpec

ROOT = Path(__file__).parent.parent
SAXPY = str(ROOT / "examples" / "saxpy.metal")
SAXPY_RUN = ["run", SAXPY, "--threads", "100", "--threads-per-threadgroup", "32", "--device", "cpu"]
SAXPY_ARGS = ["--arg", "x=ones:100", "--arg", "y=zeros:100", "--arg", "a=2.5"]


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def test_version() -> None:
    result = call("--version")
    assert result.exit_code == 0
    assert result.output.strip() == f"metal-marlin {__version__}"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"]])
def test_help_does_not_import_torch(arguments: list[str]) -> None:
    """Starting takes a fraction of a second: PyTorch is only imported by commands that need it."""
    code = (
        "import sys; from metal_marlin.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "finally: assert 'torch' not in sys.modules, 'torch was imported'"
    )
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "AssertionError" not in result.stderr


def test_script_is_installed_as_module() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "metal_marlin", "--version"], capture_output=True, text=True, cwd=ROOT
    )
    assert result.stdout.strip() == f"metal-marlin {__version__}", result.stderr


class TestRun:
    def test_runs_a_kernel(self, tmp_path: Path) -> None:
        saved = tmp_path / "y.npy"
        result = call(*SAXPY_RUN, *SAXPY_ARGS, "--save", f"y={saved}")
        assert result.exit_code == 0, result.output
        rows = {line.split("│")[1].strip(): line for line in result.output.splitlines() if line.startswith("│")}
        assert "yes" in rows["y"]
        assert "2.5" in rows["y"]
        assert "no" in rows["x"]
        assert torch.equal(parse_value(str(saved), torch.Generator()), torch.full((100,), 2.5))

    def test_reads_npy(self, tmp_path: Path) -> None:
        import numpy as np

        np.save(tmp_path / "x.npy", np.full(100, 4.0, dtype=np.float32))
        result = call(*SAXPY_RUN, "--arg", f"x={tmp_path / 'x.npy'}", "--arg", "y=zeros:100", "--arg", "a=2")
        assert result.exit_code == 0, result.output
        assert "8 8 8" in result.output

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([*SAXPY_RUN, *SAXPY_ARGS, "--kernel", "saxpi"], "saxpy"),
            ([*SAXPY_RUN, "--arg", "x=ones:100"], "y"),
            ([*SAXPY_RUN, *SAXPY_ARGS[:4], "--arg", "a=ones:1x"], "'1x' is not a shape"),
            ([*SAXPY_RUN, *SAXPY_ARGS[:4], "--arg", "a"], "'a' is not NAME=VALUE"),
            ([*SAXPY_RUN, *SAXPY_ARGS, "--threadgroups", "3"], "either --threads or --threadgroups"),
            ([*SAXPY_RUN, *SAXPY_ARGS, "--save", "z=z.npy"], "'z' is not one of the tensors"),
            (
                ["run", SAXPY, *SAXPY_ARGS, "--threads", "7", "--threads-per-threadgroup", "a"],
                "one to three numbers",
            ),
            ([*SAXPY_RUN, *SAXPY_ARGS, "--device", "abacus"], "unknown device 'abacus'"),
        ],
    )
    def test_errors_are_one_line(self, arguments: list[str], message: str) -> None:
        result = call(*arguments)
        assert result.exit_code == 1
        assert message in result.output
        assert "Traceback" not in result.output
        assert result.output.strip().splitlines()[-1].startswith("error: ")

    def test_compile_error_has_file_and_line(self, tmp_path: Path) -> None:
        source = tmp_path / "broken.metal"
        source.write_text("#include <metal_stdlib>\n\nkernel void f(device float* x) {\n    x[0] = nonsense;\n}\n")
        result = call("run", str(source), "--threads", "1", "--threads-per-threadgroup", "1", "--arg", "x=zeros:1")
        assert result.exit_code == 1
        assert "broken.metal:4" in result.output
        assert "nonsense" in result.output
        assert "Traceback" not in result.output


class TestArguments:
    def value(self, text: str) -> Any:
        return parse_value(text, torch.Generator().manual_seed(1))

    @pytest.mark.parametrize(
        ("text", "expected"),
        [("5", 5), ("-3", -3), ("0x10", 16), ("2.5", 2.5), ("1e-3", 1e-3), ("true", True)],
    )
    def test_scalars(self, text: str, expected: object) -> None:
        value = self.value(text)
        assert value == expected
        assert type(value) is type(expected)

    def test_tensors(self) -> None:
        assert torch.equal(self.value("arange:2x3:int32"), torch.arange(6, dtype=torch.int32).reshape(2, 3))
        assert self.value("randn:4x5:bfloat16").dtype is torch.bfloat16
        assert torch.equal(self.value("randn:7"), self.value("randn:7"))
        assert self.value("ones:3").tolist() == [1, 1, 1]

    @pytest.mark.parametrize(
        "text", ["zeros", "zeros:4:float33", "zeros:4:nn", "nines:4", "zeros:4:float32:x", "missing.npy"]
    )
    def test_bad_values(self, text: str) -> None:
        with pytest.raises(ArgumentError, match=r".+"):
            self.value(text)

    def test_sizes_and_constants(self) -> None:
        assert parse_sizes("64,2", "--threads") == (64, 2)
        assert parse_sizes("", "--threads") is None
        assert parse_constants(["3=true", "name=1.5"]) == {3: True, "name": 1.5}
        assert split("x=a=b") == ("x", "a=b")
        with pytest.raises(ArgumentError, match="neither a number"):
            parse_constants(["name=word"])


class TestCompile:
    def test_fills_a_directory(self, tmp_path: Path) -> None:
        out = tmp_path / "rows"
        result = call("compile", "--target", "cpu:x86-64-v3", "--target", "cuda:sm_80", "--out", str(out), SAXPY)
        assert result.exit_code == 0, result.output
        assert "3 of 3 rows" in result.output  # a GPU's rows come with and without exact tails
        before = sorted(path.name for path in out.iterdir())
        assert len(before) >= 3
        assert call("compile", "--target", "cpu:x86-64-v3", "--out", str(out), SAXPY).exit_code == 0
        assert sorted(path.name for path in out.iterdir()) == before

    def test_a_failing_kernel_leaves_the_others(self, tmp_path: Path) -> None:
        source = tmp_path / "two.metal"
        source.write_text(
            "#include <metal_stdlib>\n"
            'template <int N> kernel void f(device float* x) { static_assert(N > 1, "N too small"); x[0] = N; }\n'
            'template [[host_name("good")]] kernel void f<2>(device float*);\n'
            'template [[host_name("bad")]] kernel void f<1>(device float*);\n'
        )
        result = call("compile", "--target", "cpu:x86-64-v3", "--out", str(tmp_path / "rows"), str(source))
        assert result.exit_code == 1
        assert "N too small" in result.output
        assert "1 of 2 rows" in result.output

    def test_unknown_target_and_kernel(self, tmp_path: Path) -> None:
        assert "error: " in call("compile", "--target", "cuda:sm_1", "--out", str(tmp_path / "r"), SAXPY).output
        result = call("compile", "--target", "cuda:sm_80", "--out", str(tmp_path / "r"), SAXPY, "--kernel", "saxpi")
        assert result.exit_code == 1
        assert "saxpy" in result.output


def test_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAL_MARLIN_CACHE", str(tmp_path / "rows"))
    assert call(*SAXPY_RUN, *SAXPY_ARGS).exit_code == 0
    held = json.loads(call("cache", "--json").output)
    assert held["directory"] == str(tmp_path / "rows")
    assert held["files"] >= 1
    assert held["bytes"] > 0
    cleared = call("cache", "--clear")
    assert cleared.exit_code == 0
    assert f"deleted {held['files']}" in cleared.output
    assert json.loads(call("cache", "--json").output)["files"] == 0


class TestDoctor:
    def test_the_cpu_passes(self) -> None:
        result = call("doctor", "--json")
        assert result.exit_code == 0, result.output
        report = json.loads(result.output)
        devices = {device["device"]: device for device in report["devices"]}
        assert devices["cpu"]["status"] == "PASS"
        assert report["compiler"]["status"] == "PASS"
        assert all(d["reason"] for d in devices.values() if d["status"] == "FAIL")
        assert call("doctor").exit_code == 0

    def test_a_wrong_result_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor_command, "_SMOKE", doctor_command._SMOKE.replace("fma(a", "fma(2 * a"))
        result = call("doctor", "--json")
        assert result.exit_code == 1
        assert "instead of" in json.loads(result.output)["devices"][-1]["reason"]

    def test_a_broken_device_is_reported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(kind: str) -> Any:
            raise RuntimeError(f"{kind} exploded")

        monkeypatch.setattr(doctor_command, "device_module", broken)
        result = call("doctor")
        assert result.exit_code == 1
        assert "exploded" in result.output

    def test_no_compiler_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        environment = {"METAL_MARLIN_CLANG": str(tmp_path / "none"), "COLUMNS": "200"}
        result = CliRunner().invoke(app, ["doctor", "--json"], env=environment)
        assert json.loads(result.output)["compiler"]["status"] in ("PASS", "FAIL")


class TestKernels:
    @pytest.fixture
    def rows(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A package with two files and one op."""
        first = tmp_path / "first.metal"
        first.write_text(
            '#include "core/sum.h"\n'
            "template <typename T> kernel void f(device T* x) { x[0] = T(1); }\n"
            'template [[host_name("first_half")]] kernel void f<half>(device half*);\n'
            'template [[host_name("first_float")]] kernel void f<float>(device float*);\n'
        )
        (tmp_path / "core").mkdir()
        (tmp_path / "core" / "sum.h").write_text("#pragma once\n")
        second = tmp_path / "second.metal"
        second.write_text("kernel void second(device float* x) { x[0] = 2; }\n")
        monkeypatch.setattr(inventory_module, "source_files", lambda: [first, second])
        op = OpSpec("fill", "first.metal", torch.nn.functional.softmax, ["n=1", "n=7"], "bench/fill.py")
        monkeypatch.setattr(inventory_module, "op_specs", lambda: [op])

    @pytest.mark.usefixtures("rows")
    def test_json(self) -> None:
        found = {row["name"]: row for row in json.loads(call("kernels", "--json").output)}
        assert sorted(found) == ["first_float", "first_half", "second"]
        assert found["first_half"] == {
            "name": "first_half",
            "file": "first.metal",
            "core": "sum",
            "op": "fill",
            "reference": "torch.nn.functional.softmax",
            "cases": ["n=1", "n=7"],
            "bench": "bench/fill.py",
            "devices": found["second"]["devices"],
        }
        assert {"cpu", "cuda"} <= set(found["second"]["devices"])
        assert found["second"]["op"] is None

    @pytest.mark.usefixtures("rows")
    def test_audit(self, tmp_path: Path) -> None:
        names = tmp_path / "names.txt"
        names.write_text("# all\nfirst_half\nsecond # the other\n\n")
        result = call("kernels", "--audit", str(names))
        assert result.exit_code == 0
        assert "2 of 2 listed kernels present, 0 missing, 1 not listed" in result.output
        names.write_text("first_half\nthird\n")
        result = call("kernels", "--audit", str(names))
        assert result.exit_code == 1
        assert "missing: third" in result.output
        assert json.loads(call("kernels", "--json", "--audit", str(names)).output)["missing"] == ["third"]

    @pytest.mark.usefixtures("rows")
    def test_piped_output_is_plain_lines(self) -> None:
        for columns in ("40", "200"):
            output = CliRunner().invoke(app, ["kernels"], env={"COLUMNS": columns}).output
            assert [line.split("\t")[0] for line in output.splitlines()] == ["first_float", "first_half", "second"]
            assert output.splitlines()[2].split("\t")[1:4] == ["second.metal", "-", "-"]

    @pytest.mark.usefixtures("rows")
    def test_a_narrow_terminal_keeps_names_whole(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shown = Console(file=io.StringIO(), force_terminal=True, width=40, highlight=False)
        monkeypatch.setattr(console_module, "console", shown)
        monkeypatch.setattr(kernels_command, "console", shown)
        assert call("kernels").exit_code == 0
        output = shown.file.getvalue()  # type: ignore[attr-defined]
        assert all(name in output for name in ("first_float", "first_half", "second"))

    @pytest.mark.usefixtures("rows")
    def test_audit_counts_many_missing_names(self, tmp_path: Path) -> None:
        names = tmp_path / "names.txt"
        names.write_text("\n".join([f"third_{n}" for n in range(20)] + ["fourth_0", "second"]))
        brief = call("kernels", "--audit", str(names)).output
        assert brief.splitlines()[0] == "missing: 20 third_*, fourth_0"
        assert "1 of 22 listed kernels present, 21 missing (--missing names them), 2 not listed" in brief
        assert "missing: third_19\n" in call("kernels", "--audit", str(names), "--missing").output

    def test_two_claims_are_an_error(self, rows: None, monkeypatch: pytest.MonkeyPatch) -> None:
        op = OpSpec("other", "first.metal", torch.ones_like, [], kernels=("*_half",))
        also = OpSpec("fill", "first.metal", torch.ones_like, [])
        monkeypatch.setattr(inventory_module, "op_specs", lambda: [op, also])
        result = call("kernels")
        assert result.exit_code == 1
        assert "'first_half' is claimed by other and fill" in result.output

    def test_an_op_without_kernels_is_an_error(self, rows: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(inventory_module, "op_specs", lambda: [OpSpec("lost", "no.metal", torch.ones_like, [])])
        assert "claims no kernel of no.metal" in call("kernels").output

    def test_the_package_itself(self) -> None:
        """Every op module's spec is well formed, and what it names exists."""
        for row in inventory_module.inventory():
            assert row.devices, row
            if row.op is not None:
                assert row.cases, row
            if row.bench is not None:
                assert (ROOT / row.bench).exists(), row


def test_op_specs_come_from_op_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    one = OpSpec("one", "a.metal", torch.ones_like, [])
    two = OpSpec("two", "a.metal", torch.ones_like, [], kernels=("two*", "b"))
    modules = {
        "metal_marlin.ops.x": SimpleNamespace(OP=one),
        "metal_marlin.ops.y": SimpleNamespace(OP=(two,)),
    }
    monkeypatch.setattr(inventory_module.pkgutil, "iter_modules", lambda path: [SimpleNamespace(name=n) for n in "xyz"])
    monkeypatch.setattr(inventory_module.importlib, "import_module", lambda n: modules.get(n, SimpleNamespace()))
    assert inventory_module.op_specs() == [one, two]
    assert two.claims("a.metal", "two_half")
    assert not two.claims("a.metal", "one")
    assert not two.claims("b.metal", "two_half")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama of two layers with a tokenizer of words, made here."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["<eos>", "<unk>", *"the cat sat on a mat and dog ran".split()])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", unk_token="<unk>")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, eos_token_id=0, bos_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_generate_gives_text_and_rates(tiny_model: str) -> None:
    result = call("generate", tiny_model, "the cat", "--tokens", "5", "--json")
    assert result.exit_code == 0, result.output
    reply = json.loads(result.stdout)
    assert reply["prompt"] == 2
    assert 1 <= len(reply["tokens"]) <= 5
    assert reply["prompt_tokens_per_s"] > 0


def test_eval_against_itself(tiny_model: str, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("the cat sat on a mat and the dog ran " * 3)
    result = call(
        "eval", tiny_model, "--text", str(text), "--against", tiny_model, "--window", "8", "--stride", "4", "--json"
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["tokens"] == 29
    assert found["kl"] == pytest.approx(0, abs=1e-9)
    assert found["agreement"] == 1
    assert found["perplexity"] == pytest.approx(11, rel=0.3)  # a model that knows nothing of 11 words


def test_quantize_then_eval_and_generate(tiny_model: str, tmp_path: Path) -> None:
    """What quantize wrote is what replace_linear_layers computes, and every command takes it."""
    import transformers

    from metal_marlin.integrations.replace import dequantize_linear_layers, replace_linear_layers

    target = tmp_path / "small"
    arguments = ["quantize", tiny_model, str(target), "--format", "int8", "--group-size", "32"]
    result = call(*arguments, "--per-layer", "down_proj=fp4:64", "--all")
    assert result.exit_code == 0, result.output
    assert "fp4 g64" in result.output
    assert "int8 g32" in result.output
    assert call(*arguments).exit_code == 1  # exists
    assert call(*arguments, "--force").exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["small"]  # nothing left beside it
    assert call(*arguments, "--force", "--per-layer", "down_proj=fp4:64").exit_code == 0
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    replace_linear_layers(plain, "int8", 32, per_layer={"down_proj": "fp4:64"})
    dequantize_linear_layers(plain)
    plain.save_pretrained(tmp_path / "decoded")
    transformers.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "decoded")
    text = tmp_path / "text"
    text.write_text("the cat sat on a mat and the dog ran " * 3)
    result = call("eval", str(target), "--text", str(text), "--against", str(tmp_path / "decoded"), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["kl"] == pytest.approx(0, abs=1e-6)
    result = call("generate", str(target), "the cat", "--tokens", "3", "--json")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--format", "int8", "--preset", "default"], "not both"),
        (["--group-size", "32", "--preset", "default"], "not both"),
        (["--per-layer", "down_proj"], "PATTERN=FORMAT"),
        (["--format", "int9"], "int9"),
    ],
)
def test_quantize_refuses(tiny_model: str, tmp_path: Path, more: list[str], said: str) -> None:
    result = call("quantize", tiny_model, str(tmp_path / "small"), *more)
    assert result.exit_code == 1
    assert said in result.output
    assert list(tmp_path.iterdir()) == []


def test_import_of_what_is_no_known_layout(tiny_model: str, tmp_path: Path) -> None:
    result = call("import", tiny_model, str(tmp_path / "made"))
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_chat_ends_with_an_empty_line(tiny_model: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "metal_marlin", "chat", tiny_model, "--tokens", "3"],
        input="the cat\n\n", capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stderr
    assert done.stdout.strip()


def test_bench_times_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from metal_marlin.cli import bench
    from metal_marlin.ops import linear_decode

    small = [case for case in linear_decode.CASES if not case.model][:2]
    spec = OpSpec("linear_decode", linear_decode.FAMILY, linear_decode.linear_decode_ref, small)
    monkeypatch.setattr(bench, "op_specs", lambda: [spec])
    path = tmp_path / "rows.csv"
    result = call("bench", "--op", "linear_decode", "--seconds", "0.01", "--json", "--save", str(path))
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [row["case"] for row in rows] == [str(case) for case in small]
    assert all(row["median_us"] > 0 and row["error"] < 0.01 for row in rows)
    assert len(path.read_text().splitlines()) == 3


def test_a_folder_that_is_missing_is_one_line() -> None:
    result = call("generate", "./nowhere", "x")
    assert result.exit_code == 1
    assert "./nowhere" in result.output
    assert "Traceback" not in result.output


def test_bench_names_the_ops_it_knows() -> None:
    result = call("bench", "--op", "nothing")
    assert result.exit_code == 1
    assert "linear_decode" in result.output


RACE = """#include <metal_stdlib>
using namespace metal;
kernel void k(device float* y, constant uint& n, uint i [[thread_position_in_grid]]) {
  if (n > 1) { y[i / n] += 1; } else { y[i] += 1; }
}
"""


class TestCheck:
    def check(self, path: Path, *more: str) -> subprocess.CompletedProcess[str]:
        path.write_text(RACE)
        grid = ["--threads", "8", "--threads-per-threadgroup", "8", "--arg", "y=zeros:8"]
        command = [sys.executable, "-m", "metal_marlin", "check", str(path), *grid, *more]
        return subprocess.run(command, capture_output=True, text=True)

    def test_clean(self, tmp_path: Path) -> None:
        done = self.check(tmp_path / "k.metal", "--arg", "n=1")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "k: clean under 3 schedules" in done.stdout

    def test_findings(self, tmp_path: Path) -> None:
        done = self.check(tmp_path / "k.metal", "--arg", "n=2", "--json")
        assert done.returncode == 1, done.stdout + done.stderr
        answer = json.loads(done.stdout)
        assert {(f["kind"], f["file"], f["line"]) for f in answer["findings"]} == {("race", "k.metal", 4)}
        assert answer["findings"][0]["where"] == "y[0]"

    def test_time_limit(self, tmp_path: Path) -> None:
        done = self.check(tmp_path / "k.metal", "--arg", "n=2", "--time-limit", "0.05")
        assert done.returncode == 2
        assert "did not end within 0.05 s" in done.stdout

    def test_bad_argument(self, tmp_path: Path) -> None:
        done = self.check(tmp_path / "k.metal", "--arg", "m=2")
        assert done.returncode == 2
        assert "unknown argument m" in done.stdout


def test_lint(tmp_path: Path) -> None:
    path = tmp_path / "k.metal"
    path.write_text(RACE + "float table[2] = {1, 2};\n")
    done = subprocess.run([sys.executable, "-m", "metal_marlin", "lint", str(path)], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "program-scope: 'float table [ 2 ]'" in done.stdout
    path.write_text(RACE)
    done = subprocess.run([sys.executable, "-m", "metal_marlin", "lint", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "1 files: 0 findings")
