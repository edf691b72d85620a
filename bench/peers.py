"""Products of other libraries that the benches time beside ours, with data of their own that is checked first."""

from __future__ import annotations

import torch
from common import Candidate, require_correct

GROUP = 128


def has_int4pack(N: int, K: int, device: str) -> bool:
    """Whether torch has an int4 product for W [N, K] on this device."""
    return device.partition(":")[0] in ("cpu", "cuda") and K % GROUP == 0 and N % 64 == 0


def int4pack(M: int, N: int, K: int, device: str, sets: int) -> tuple[Candidate, int, float]:
    """torch's int4 product: bfloat16, w = (q - 8) * scale + zero in groups of 128; bytes of W; its error."""
    rng = torch.Generator().manual_seed(1)
    groups = K // GROUP
    scales = (0.002 + 0.02 * torch.rand(groups, N, generator=rng)).bfloat16()
    q = torch.randint(0, 16, (N, K), generator=rng, dtype=torch.int32)
    both = torch.stack([scales, torch.zeros_like(scales)], -1).contiguous().to(device)
    x = torch.randn(M, K, generator=rng).bfloat16().to(device)
    if device == "cpu":
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
    else:  # two codes a byte, the first in the upper bits
        packed = torch.ops.aten._convert_weight_to_int4pack((q[:, ::2] << 4 | q[:, 1::2]).to(torch.uint8).to(device), 8)
        product = torch.ops.aten._weight_int4pack_mm
    copies = [packed, *(packed.clone() for _ in range(sets - 1))]
    wanted = x[:64].cpu().double() @ ((q.double() - 8) * scales.double().T.repeat_interleave(GROUP, 1)).T
    error = require_correct("int4pack", product(x, copies[-1], GROUP, both)[:64].cpu(), wanted, 2e-2)
    return lambda i: product(x, copies[i], GROUP, both), N * K // 2 + 4 * N * groups, error
