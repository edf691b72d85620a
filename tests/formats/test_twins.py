"""The Metal policies of eight-bit and int4 formats: every code in every place of a word, bit for bit."""

from __future__ import annotations

import pytest
import torch

from metal_marlin import MetalKernelLibrary, dispatch_kernel
from metal_marlin.formats import codec

TWIN = """
#include <metal_stdlib>
#include "formats/{file}.h"
using namespace metal;
kernel void decode(device const uint* words [[buffer(0)]], device float* values [[buffer(1)]],
                   device float* pairs [[buffer(2)]], uint i [[thread_position_in_grid]]) {{
  const uint n = {name}::kPerWord;
  for (uint j = 0; j < n; ++j) values[n * i + j] = {name}::value(words[i] >> ({name}::kBits * j));
  for (uint j = 0; j < n / 2; ++j) {{
    const float2 p = {name}::pair(words[i], j);
    pairs[n * i + j] = p.x;
    pairs[n * i + j + n / 2] = p.y;
  }}
}}
"""
BYTES = torch.arange(256).to(torch.uint8)
WANTED = {
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
        assert torch.equal(torch.tensor(form.values).nan_to_num(7e9), want.nan_to_num(7e9))
    per, count = form.per_word, len(want)
    codes = torch.arange(count).view(-1, 1).repeat(1, per) + torch.arange(per) * 37  # each place runs over all codes
    codes %= count
    words = form.pack(codes.to(torch.uint8)).flatten().to(device)
    values, pairs = (torch.full((count * per,), -1.5e9, device=device) for _ in range(2))
    library = MetalKernelLibrary(TWIN.format(file=file, name=name), device=device)
    dispatch_kernel(library, "decode", threads=count, threads_per_threadgroup=16, args=(words, values, pairs))
    expected = want[codes.flatten()]
    number = ~expected.isnan()
    for got in (values.cpu(), pairs.cpu()):
        assert torch.equal(got.isnan(), ~number)
        assert torch.equal(got[number].view(torch.int32), expected[number].view(torch.int32))
