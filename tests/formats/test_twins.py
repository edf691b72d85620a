"""The Metal policies of the formats: every code in every place of a word, bit for bit."""

from __future__ import annotations

import pytest
import torch

from metal_marlin import MetalKernelLibrary, dispatch_kernel
from metal_marlin.formats import codec

TWIN = """
#include <metal_stdlib>
#include "formats/{file}.h"
#include "formats/code_words.h"
using namespace metal;
typedef CodeWords<{name}> Words;
kernel void decode(device const uint* row [[buffer(0)]], device float* values [[buffer(1)]],
                   device float* pairs [[buffer(2)]], uint i [[thread_position_in_grid]]) {{
  const uint n = {name}::kPerWord, word = Words::at(row, i);
  uint unit[Words::kStored];
  for (uint j = 0; j < Words::kStored; ++j) unit[j] = row[Words::stored(i / Words::kUnit * Words::kUnit * n) + j];
  const uint same = Words::of(unit, i % Words::kUnit);
  for (uint j = 0; j < n; ++j) values[n * i + j] = {name}::value(word >> ({name}::kBits * j));
  for (uint j = 0; j < n / 2; ++j) {{
    const float2 p = {name}::pair(same, j);
    pairs[n * i + j] = p.x;
    pairs[n * i + j + n / 2] = p.y;
  }}
}}
"""
BYTES = torch.arange(256).to(torch.uint8)
WANTED = {
    "INT2": ("int2", "int2", torch.tensor([-1.5, -0.5, 0.5, 1.5])),
    "INT3": ("int3", "int3", torch.tensor([-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])),
    "NF3": ("nf3", "nf3", torch.tensor([-1, -0.5350227, -0.2469314, 0, 0.1833375, 0.3819940, 0.6229857, 1])),
    "FP4": ("fp4", "fp4", torch.tensor([*(MAGNITUDES := (0.0, 0.5, 1, 1.5, 2, 3, 4, 6)), *(-m for m in MAGNITUDES)])),
    "UINT4": ("int4", "int4", torch.arange(16.0)),
    "INT4": ("int4", "int4", torch.arange(16.0) - 8),
    "INT8": ("int8", "int8", BYTES.view(torch.int8).float()),
    "UINT8": ("int8", "uint8", BYTES.float()),
    "FP8E4M3": ("fp8", "fp8_e4m3", BYTES.view(torch.float8_e4m3fn).float()),
    "FP8E5M2": ("fp8", "fp8_e5m2", BYTES.view(torch.float8_e5m2).float()),
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("name", WANTED)
def test_every_code_in_every_place(name: str, device: str) -> None:
    file, format_name, want = WANTED[name]
    form = codec(format_name)
    if name != "INT4":
        assert torch.equal(
            torch.tensor(form.values, dtype=torch.float64).nan_to_num(7e9), want.double().nan_to_num(7e9)
        )
    per, count = form.unit, len(want)
    codes = torch.arange(count).view(-1, 1).repeat(1, per) + torch.arange(per) * 37  # each place runs over all codes
    codes %= count
    words = form.pack(codes.to(torch.uint8)).flatten().to(device)
    values, pairs = (torch.full((count * per,), -1.5e9, device=device) for _ in range(2))
    library = MetalKernelLibrary(TWIN.format(file=file, name=name), device=device)
    threads = count * per // form.per_word
    dispatch_kernel(library, "decode", threads=threads, threads_per_threadgroup=16, args=(words, values, pairs))
    expected = want[codes.flatten()]
    number = ~expected.isnan()
    for got in (values.cpu(), pairs.cpu()):
        assert torch.equal(got.isnan(), ~number)
        assert torch.equal(got[number].view(torch.int32), expected[number].view(torch.int32))
