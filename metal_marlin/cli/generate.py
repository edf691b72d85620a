"""``metal-marlin generate`` and ``metal-marlin chat``."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass

from metal_marlin.cli.console import print_json, size
from metal_marlin.cli.models import Reply, load, memory, prompt_tokens, reply_to


@dataclass(frozen=True)
class Options:
    """What both commands are told."""

    model: str
    tokens: int
    temperature: float
    seed: int
    device: str
    dtype: str


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def generate(options: Options, prompt: str, *, raw: bool, as_json: bool) -> None:
    """Answer one prompt; ``raw`` continues the text without the chat template."""
    model, tokenizer = load(options.model, options.device, options.dtype)
    ids = (
        tokenizer(prompt, return_tensors="pt")["input_ids"]
        if raw
        else prompt_tokens(tokenizer, [{"role": "user", "content": prompt}])
    )
    reply = reply_to(
        model,
        tokenizer,
        ids,
        tokens=options.tokens,
        temperature=options.temperature,
        seed=options.seed,
        show=(lambda _: None) if as_json else _show,
    )
    if as_json:
        rates = {"prompt_tokens_per_s": reply.prompt_rate, "decode_tokens_per_s": reply.decode_rate}
        print_json({**asdict(reply), **rates, "memory": memory(model)})
        return
    print()
    _summary(reply, memory(model))


def chat(options: Options, system: str) -> None:
    """Answer line after line until an empty line or the end of input; the conversation is kept."""
    model, tokenizer = load(options.model, options.device, options.dtype)
    messages = [{"role": "system", "content": system}] if system else []
    used = memory(model)
    while (line := _ask()) is not None:
        messages.append({"role": "user", "content": line})
        reply = reply_to(
            model,
            tokenizer,
            prompt_tokens(tokenizer, messages),
            tokens=options.tokens,
            temperature=options.temperature,
            seed=options.seed,
            show=_show,
        )
        print()
        _summary(reply, used)
        messages.append({"role": "assistant", "content": reply.text})


def _ask() -> str | None:
    try:
        line = input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None
    return line or None


def _summary(reply: Reply, used: int) -> None:
    print(f"[{reply.summary()}; weights {size(used)}]", file=sys.stderr)
