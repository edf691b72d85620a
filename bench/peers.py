"""Products of other libraries that the benches time beside ours, with data of their own that is checked first."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import Candidate, require_correct
from peers_cuda import GROUP, gemlite, has_gemlite, has_humming, humming


@dataclass(frozen=True)
class Peer:
    """A product of another library: whether it runs for W [N, K] on a device; what makes a candidate for M, N, K, a
    device and so many copies of W, with the bytes of W and its error; most tokens for which it is timed unasked."""

    has: Callable[[int, int, str], bool]
    make: Callable[[int, int, int, str, int], tuple[Candidate, int, float]]
    most: int


def has_int4pack(N: int, K: int, device: str) -> bool:
    """Whether torch has an int4 product for W [N, K] on this device."""
    return device.partition(":")[0] in ("cpu", "cuda") and K % GROUP == 0 and N % 64 == 0


def int4pack(M: int, N: int, K: int, device: str, sets: int) -> tuple[Candidate, int, float]:
    """torch's int4 product: bfloat16, w = (q - 8) * scale + zero in groups of 128; bytes of W; its error."""
    weight, both, copies = _int4pack_weight(N, K, device, sets)
    cpu = device == "cpu"
    product = torch.ops.aten._weight_int4pack_mm_for_cpu if cpu else torch.ops.aten._weight_int4pack_mm
    x = torch.randn(M, K, generator=torch.Generator(device).manual_seed(2), device=device).bfloat16()
    wanted = x[:64].double() @ weight.double().T
    error = require_correct("int4pack", product(x, copies[-1], GROUP, both)[:64], wanted, 2e-2)
    return lambda i: product(x, copies[i], GROUP, both), N * K // 2 + 2 * both.numel(), error


@functools.lru_cache(maxsize=1)
def _int4pack_weight(N: int, K: int, device: str, sets: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """W, its scales and zeros, and copies of its codes."""
    rng = torch.Generator(device).manual_seed(1)
    scales = (0.002 + 0.02 * torch.rand(K // GROUP, N, generator=rng, device=device)).bfloat16()
    q = torch.randint(0, 16, (N, K), generator=rng, dtype=torch.int32, device=device)
    if device == "cpu":
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    else:  # two codes a byte, the first in the upper bits
        packed = torch.ops.aten._convert_weight_to_int4pack((q[:, ::2] << 4 | q[:, 1::2]).to(torch.uint8), 8)
    weight = (q.float() - 8) * scales.float().T.repeat_interleave(GROUP, 1)
    both = torch.stack([scales, torch.zeros_like(scales)], -1).contiguous()
    return weight, both, [packed, *(packed.clone() for _ in range(sets - 1))]


def has_onnxruntime(N: int, K: int, device: str) -> bool:
    """Whether onnxruntime is installed (with onnx, which writes its model) and multiplies on this device."""
    found = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime"))
    return device == "cpu" and K % GROUP == 0 and found


def onnxruntime(M: int, N: int, K: int, device: str, sets: int) -> tuple[Candidate, int, float]:
    """onnxruntime's MatMulNBits with accuracy_level 4: x float32, rounded to int8 inside; w = (q - 8) * scale in groups
    of 128; bytes of W; its error."""
    rng = torch.Generator().manual_seed(1)
    scales = 0.002 + 0.02 * torch.rand(N, K // GROUP, generator=rng)
    q = torch.randint(0, 16, (N, K), generator=rng, dtype=torch.uint8)
    x = torch.randn(M, K, generator=rng)
    model = _onnx_model((q[:, ::2] | q[:, 1::2] << 4).view(N, K // GROUP, GROUP // 2), scales.flatten(), N, K)
    sessions = [_onnx_session(model) for _ in range(sets)]
    inputs = {"x": x.numpy()}
    wanted = x.double() @ ((q.double() - 8) * scales.double().repeat_interleave(GROUP, 1)).T
    got = torch.from_numpy(sessions[-1].run(None, inputs)[0])
    error = require_correct("onnxruntime", got, wanted, 2e-2)
    return lambda i: sessions[i].run(None, inputs), N * K // 2 + 4 * scales.numel(), error


def _onnx_model(codes: torch.Tensor, scales: torch.Tensor, N: int, K: int) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scales"],
        ["y"],
        domain="com.microsoft",
        K=K,
        N=N,
        bits=4,
        block_size=GROUP,
        accuracy_level=4,
    )
    shapes = {"x": ["M", K], "y": ["M", N]}
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    tensors = [numpy_helper.from_array(t.numpy(), name) for t, name in ((codes, "codes"), (scales, "scales"))]
    graph = helper.make_graph([node], "product", [values["x"]], [values["y"]], tensors)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    return model


@functools.cache
def _onnx_runtime() -> Any:
    """The library with one pool for all sessions: each would have threads that spin while others work."""
    import onnxruntime as runtime

    runtime.set_global_thread_pool_sizes(torch.get_num_threads(), 1)
    return runtime


def _onnx_session(model: bytes) -> Any:
    runtime = _onnx_runtime()
    options = runtime.SessionOptions()
    options.use_per_session_threads = False
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


PEERS = {
    "int4pack": Peer(has_int4pack, int4pack, 256),
    "onnxruntime": Peer(has_onnxruntime, onnxruntime, 256),
    "humming": Peer(has_humming, humming, 1 << 20),
    "gemlite": Peer(has_gemlite, gemlite, 256),
}
NAMES = ("dense", "dense_bf16", *PEERS)  # candidates that are not ours


def peers(
    M: int, N: int, K: int, device: str, sets: int, asked: list[str] | None = None
) -> dict[str, tuple[Candidate, int, float]]:
    """Candidates, bytes of W and errors of the peers ``asked`` for, which must be there; None: of those that are."""
    if asked is None:
        asked = [name for name, peer in PEERS.items() if peer.most >= M and peer.has(N, K, device)]
    for name in asked:
        if not PEERS[name].has(N, K, device):
            sys.exit(f"--peers {name}: it is not installed, or has no product for W [{N}, {K}] on {device}")
    return {name: PEERS[name].make(M, N, K, device, sets) for name in asked}
