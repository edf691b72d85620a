"""Models and tokenizers for the commands: loading, sizes, generation with timings."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from metal_marlin.errors import ArgumentError


def transformers() -> Any:
    """The transformers library; ArgumentError that says what to install where it is missing."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ArgumentError(f"{error}; this command needs: pip install 'metal-marlin[transformers,compiler]'") from None


def load(model: str, device: str = "cpu", dtype: str = "auto") -> tuple[Any, Any]:
    """(model, tokenizer) of a folder or hub name, in evaluation mode on ``device``; ours too, after register()."""
    library = transformers()
    if not Path(model).is_dir() and (model.startswith((".", "/")) or Path(model).exists()):
        raise ArgumentError(f"{model}: no such folder of a model")
    _register()
    try:
        tokenizer = library.AutoTokenizer.from_pretrained(model)
        loaded = library.AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    except (OSError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"{model}: {str(error).strip().splitlines()[0]}") from None
    return loaded.to(device).eval(), tokenizer


def _register() -> None:
    name = "metal_marlin.integrations.transformers"
    try:
        found = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise
        return
    found.register()


def memory(model: torch.nn.Module) -> int:
    """Bytes of parameters and buffers; tensors that share memory count once."""
    storages = {t.untyped_storage() for t in (*model.parameters(), *model.buffers())}
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def prompt_tokens(tokenizer: Any, messages: list[dict[str, str]]) -> torch.Tensor:
    """[1, T] of a conversation by the chat template, or of the last message's text where there is none."""
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    return tokenizer(messages[-1]["content"], return_tensors="pt")["input_ids"]


@dataclass
class Reply:
    """What a model said. ``decode_rate`` leaves out the first token, which the prompt's forward makes."""

    prompt: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def prompt_rate(self) -> float:
        """Tokens/s of reading the prompt."""
        return self.prompt / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens/s of the tokens after the first."""
        return (len(self.tokens) - 1) / self.decode_seconds if self.decode_seconds else 0.0

    def summary(self) -> str:
        """One line for people."""
        return (
            f"prompt {self.prompt} tokens, {self.prompt_rate:.1f} tokens/s; "
            f"reply {len(self.tokens)} tokens, {self.decode_rate:.1f} tokens/s"
        )


class _Streamer:
    """Receives tokens from generate(): times them and hands on text once its characters are whole."""

    def __init__(self, tokenizer: Any, reply: Reply, show: Callable[[str], None]) -> None:
        self._tokenizer, self._reply, self._show = tokenizer, reply, show
        self._asked = False
        self._start = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        if not self._asked:  # the first call brings the prompt back
            self._asked = True
            return
        reply, now = self._reply, time.perf_counter() - self._start
        if reply.tokens:
            reply.decode_seconds = now - reply.prompt_seconds
        else:
            reply.prompt_seconds = now
        reply.tokens += value.flatten().tolist()
        self._print(final=False)

    def end(self) -> None:
        self._print(final=True)

    def _print(self, final: bool) -> None:
        text = self._tokenizer.decode(self._reply.tokens, skip_special_tokens=True)
        if not final and text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character whose bytes come in several tokens
            return
        shown = self._reply.text
        self._reply.text = text
        self._show(text[len(shown) :])


def reply_to(
    model: Any,
    tokenizer: Any,
    ids: torch.Tensor,
    *,
    tokens: int = 200,
    temperature: float = 0.0,
    seed: int = 0,
    show: Callable[[str], None] = lambda _: None,
) -> Reply:
    """Generate up to ``tokens`` tokens after ids [1, T], calling ``show`` with pieces of text as they come.

    temperature 0: the most likely token each time.
    """
    if tokens < 1 or temperature < 0:
        raise ArgumentError(f"tokens = {tokens}, temperature = {temperature}; tokens >= 1, temperature >= 0 are needed")
    reply = Reply(ids.shape[1])
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature}
    ids = ids.to(model.device)
    with torch.no_grad():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=_Streamer(tokenizer, reply, show),
            **sampling,
        )
    return reply
