"""A small language model with quantised weights, answering on the CPU through the library's Metal kernels.

    python examples/demo.py [--prompt TEXT] [--tokens N] [--chat]

Exits with 1 when a linear layer did not run in our kernels, or the result differs from the decoded weights'.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from smollm2 import source_model

from metal_marlin.cli.console import size
from metal_marlin.cli.models import Reply, load, memory, prompt_tokens, reply_to
from metal_marlin.integrations.replace import dequantize_linear_layers, replace_linear_layers
from metal_marlin.integrations.transformers.fusion import fuse
from metal_marlin.nn.linear import QuantLinear
from metal_marlin.quant.evaluate import evaluate
from metal_marlin.runtime.counters import counters, reset_counters

TEXT = Path(__file__).parent / "pride_and_prejudice.txt"
PRESETS = {"int8 g64": "int8", "fp4 g64, lm_head int8": "fp4", "default: v and down int8 too": "default"}
TOLERANCE = 0.005  # of the perplexity, between our kernels and the decoded weights in torch
LINEAR = ("decode_gemv", "marlin_gemm")  # how kernels of the linear op begin
console = Console(highlight=False)


def show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def answer(model: Any, tokenizer: Any, title: str, prompt: str, tokens: int) -> Reply:
    """Stream one reply, after a short one that loads kernels and warms up."""
    ids = prompt_tokens(tokenizer, [{"role": "user", "content": prompt}])
    reply_to(model, tokenizer, ids, tokens=2)
    console.rule(title)
    reply = reply_to(model, tokenizer, ids, tokens=tokens, show=show)
    print(f"\n[{reply.summary()}]")
    return reply


def linear_launches(counts: Counter[str]) -> int:
    """Launches of kernels that multiply by quantised weights."""
    return sum(count for name, count in counts.items() if name.startswith(LINEAR))


def linear_kernels(model: torch.nn.Module) -> tuple[int, int]:
    """Linear layers with quantised weights, and launches that a forward makes for them: one a group of fused layers."""
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    return len(layers), len({id(layer.group or layer) for layer in layers})


def counted(model: torch.nn.Module) -> Counter[str]:
    """Forwards of a model from now on, under "forwards"."""
    calls: Counter[str] = Counter()
    model.register_forward_pre_hook(lambda *_: calls.update(forwards=1))
    return calls


def quality(model: Any, tokenizer: Any) -> bool:
    """The table of perplexities; False where our kernels differ from the decoded weights."""
    ids = torch.tensor(tokenizer(TEXT.read_text(encoding="utf-8"))["input_ids"])
    table = Table(title=f"Pride and Prejudice (Jane Austen, 1813), chapter 1, {len(ids)} tokens, windows of 512")
    for heading in ("weights", "size", "perplexity", "change", "KL, nats/token", "decoded in torch"):
        table.add_column(heading, justify="left" if heading == "weights" else "right")
    source = evaluate(model, ids).perplexity
    table.add_row("source: Q4_1 decoded to float32", size(memory(model)), f"{source:.2f}", "", "", "")
    right = True
    for name, preset in PRESETS.items():
        ours = copy.deepcopy(model)
        replace_linear_layers(ours, preset=preset)
        decoded = copy.deepcopy(ours)
        dequantize_linear_layers(decoded)
        torch_only = evaluate(decoded, ids).perplexity
        fuse(ours)
        found, used = evaluate(ours, ids, original=model), memory(ours)
        right &= abs(found.perplexity / torch_only - 1) <= TOLERANCE
        change = f"{found.perplexity / source - 1:+.1%}"
        table.add_row(name, size(used), f"{found.perplexity:.2f}", change, f"{found.kl:.3f}", f"{torch_only:.2f}")
    console.print(table)
    console.print("The source is itself a 4-bit model (Q4_1), so the changes come on top of that loss.")
    return right


def converse(model: Any, tokenizer: Any, tokens: int) -> None:
    """Read prompts until an empty line."""
    messages: list[dict[str, str]] = []
    while line := input("> ").strip():
        messages.append({"role": "user", "content": line})
        reply = reply_to(model, tokenizer, prompt_tokens(tokenizer, messages), tokens=tokens, show=show)
        print(f"\n[{reply.summary()}]")
        messages.append({"role": "assistant", "content": reply.text})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompt", default="What is the capital of France? Then tell me three things to see there.")
    parser.add_argument("--tokens", type=int, default=64, help="most tokens of a reply")
    parser.add_argument("--chat", action="store_true", help="talk with the quantised model afterwards")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    model, tokenizer = load(str(source_model()), dtype="float32")
    ours = copy.deepcopy(model)
    replace_linear_layers(ours, preset="default")
    fuse(ours)
    layers, kernels = linear_kernels(ours)
    before = answer(model, tokenizer, "float32, transformers", options.prompt, options.tokens)
    calls = counted(ours)
    reset_counters()
    after = answer(ours, tokenizer, "quantised, Metal kernels", options.prompt, options.tokens)
    counts = counters()
    console.rule()
    ratio = after.decode_rate / before.decode_rate if before.decode_rate else float("nan")
    print(f"decode: {before.decode_rate:.1f} -> {after.decode_rate:.1f} tokens/s ({ratio:.2f} x, in this run)")
    print(f"weights: {size(memory(model))} -> {size(memory(ours))}")
    right = quality(model, tokenizer)
    launched, expected = linear_launches(counts), kernels * calls["forwards"]
    for name, count in counts.most_common():
        print(f"{count:8d}  {name}")
    print(f"{layers} linear layers in {kernels} launches a forward: those of one input and format run together")
    print(f"{launched} launches of linear kernels; {kernels} x {calls['forwards']} forwards = {expected}")
    if not right:
        print(f"WRONG: a perplexity differs from that of the decoded weights by more than {TOLERANCE:.1%}")
    if launched != expected:
        print("WRONG: not every linear layer ran in our kernels")
    if options.chat and sys.stdin.isatty():
        converse(ours, tokenizer, options.tokens)
    return 0 if right and launched == expected else 1


if __name__ == "__main__":
    sys.exit(main())
