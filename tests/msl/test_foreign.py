"""Metal code that was not written for this compiler: the headers that PyTorch ships for its own Metal kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

Run = Callable[..., dict[str, torch.Tensor]]
INCLUDE = Path(torch.__file__).parent / "include"
# A row made elsewhere is of no use here: the text holds this PyTorch's headers.
pytestmark = [
    pytest.mark.usefixtures("compiler"),
    pytest.mark.skipif(
        not (INCLUDE / "c10" / "metal" / "special_math.h").is_file(), reason="this PyTorch ships no Metal headers"
    ),
]

# name, MSL expression of x, torch's function in double, inputs from … to …
SPECIAL = [
    ("erf", torch.special.erf, -4.0, 4.0),
    ("erfinv", torch.special.erfinv, -0.999, 0.999),
    ("i0", torch.special.i0, -20.0, 20.0),
    ("i0e", torch.special.i0e, -20.0, 20.0),
    ("i1", torch.special.i1, -20.0, 20.0),
    ("log_gamma", torch.special.gammaln, 0.1, 30.0),
    ("digamma", torch.special.digamma, 0.1, 30.0),
    ("sinc", torch.special.sinc, -3.0, 3.0),
    ("entr", torch.special.entr, 0.0, 5.0),
    ("erfcx", torch.special.erfcx, -2.0, 30.0),
    ("bessel_j0_forward", torch.special.bessel_j0, -30.0, 30.0),
    ("bessel_y1_forward", torch.special.bessel_y1, 0.5, 30.0),
    ("modified_bessel_k0_forward", torch.special.modified_bessel_k0, 0.1, 20.0),
]


def test_special_functions(msl: Run) -> None:
    n = 1000
    lines = "\n".join(f"y[{k} * n + i] = c10::metal::{name}(x[{k} * n + i]);" for k, (name, *_) in enumerate(SPECIAL))
    source = f"""#include <c10/metal/special_math.h>
    kernel void special(device const float* x, device float* y, constant uint& n, uint i [[thread_position_in_grid]]) {{
    {lines}
    }}"""
    x = torch.stack([torch.linspace(low, high, n) for *_, low, high in SPECIAL])
    args = {"x": x, "y": torch.full_like(x, torch.nan), "n": n}
    y = msl(source, "special", args, threads=n, threads_per_threadgroup=64, include_dirs=[INCLUDE])["y"]
    for row, inputs, (name, function, *_) in zip(y, x, SPECIAL, strict=True):
        expected = function(inputs.double())
        torch.testing.assert_close(
            row.double(), expected, rtol=2e-4, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_threadgroup_sum(msl: Run, threads: int) -> None:
    source = """#include <metal_stdlib>
    #include <c10/metal/reduction_utils.h>
    template <typename T>
    kernel void total(device const T* x, device float* sum, device long* largest,
                      uint t [[thread_index_in_threadgroup]], uint n [[threads_per_threadgroup]]) {
      threadgroup float partial[32];
      const float all = c10::metal::threadgroup_sum<T>(partial, x[t], t, n);
      const auto top = c10::metal::simd_argmax(float(x[t]));
      if (t == 0) { sum[0] = all; largest[0] = top.second; }
    }
    template [[host_name("total_half")]] kernel void total<half>(device const half*, device float*, device long*, uint, uint);
    """
    x = torch.randn(threads).half()
    args = {"x": x, "sum": torch.zeros(1), "largest": torch.zeros(1, dtype=torch.int64)}
    launch = {"threadgroups": 1, "threads_per_threadgroup": threads, "include_dirs": [INCLUDE]}
    out = msl(source, "total_half", args, **launch)
    torch.testing.assert_close(out["sum"][0].double(), x.double().sum(), rtol=1e-5, atol=1e-4)
    assert int(out["largest"]) == int(x[:32].argmax())


UNARY = """#include <metal_stdlib>
#include <c10/metal/indexing.h>
#include <c10/metal/special_math.h>
struct sinc_functor { template <typename T> T operator()(const T x) { return T(c10::metal::sinc(x)); } };
REGISTER_UNARY_OP(sinc, float, float);
REGISTER_UNARY_OP(sinc, half, half);
struct hypot_functor {
  template <typename T> T operator()(const T a, const T b) {
    return T(::metal::precise::sqrt(float(a) * float(a) + float(b) * float(b)));
  }
};
REGISTER_BINARY_OP(hypot, bfloat, bfloat);
"""


@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "float"), (torch.float16, "half")])
def test_unary_kernels(msl: Run, dtype: torch.dtype, name: str) -> None:
    x = torch.linspace(-3, 3, 1001).to(dtype)
    args = {"output": torch.zeros_like(x), "input": x, "numel": x.numel()}
    launch = {"threads": -(-x.numel() // 4), "threads_per_threadgroup": 64, "include_dirs": [INCLUDE]}
    got = msl(UNARY, f"sinc_dense_{name}_{name}", args, **launch)["output"]
    torch.testing.assert_close(
        got, torch.special.sinc(x.double()).to(dtype), rtol=2e-3, atol=1e-6 + 1e-3 * (dtype == torch.float16)
    )


def test_strided_binary_kernel(msl: Run) -> None:
    a, b = torch.randn(6, 5).bfloat16(), torch.randn(5, 6).bfloat16()
    size = a.element_size()
    args = {
        "output": torch.zeros(6, 5, dtype=torch.bfloat16), "input": a, "other": b, "sizes": [5, 6],
        "output_strides": [size, 5 * size], "input_strides": [size, 5 * size], "other_strides": [6 * size, size],
        "ndim": (2, 0, 0),
    }  # fmt: skip
    launch = {"threads": 30, "threads_per_threadgroup": 32, "include_dirs": [INCLUDE]}
    got = msl(UNARY, "hypot_strided_bfloat_bfloat", args, **launch)["output"]
    expected = torch.hypot(a.double(), b.t().double()).bfloat16()
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=0)


def test_additions_to_half_through_compare_and_exchange(msl: Run) -> None:
    source = """#include <metal_stdlib>
    #include <c10/metal/atomic.h>
    kernel void scatter(device ::metal::atomic<uint>* sums, device const half* x, uint i [[thread_position_in_grid]]) {
      c10::metal::atomic_add_helper<half>(sums, long(i % 7), x[i]);
    }"""
    x = torch.ones(700).half()
    args = {"sums": torch.zeros(8).half(), "x": x}
    launch = {"threads": 700, "threads_per_threadgroup": 64, "include_dirs": [INCLUDE]}
    got = msl(source, "scatter", args, **launch)["sums"]
    assert got.tolist() == [100.0] * 7 + [0.0]
