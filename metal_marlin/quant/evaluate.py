"""What quantisation costs: perplexity of a causal language model on a text, divergence from the original."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from metal_marlin.errors import ArgumentError

WINDOW, STRIDE = 512, 256


@dataclass(frozen=True)
class Evaluation:
    """``tokens`` predicted, ``perplexity`` over them; against an original: mean KL in nats a token, top-1 agreement."""

    tokens: int
    perplexity: float
    window: int
    stride: int
    kl: float | None = None
    agreement: float | None = None


def windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first) slices: tokens first … end − 1 are predicted, each of 1 … length − 1 exactly once."""
    if window < 2 or not 1 <= stride < window:
        raise ArgumentError(f"window = {window}, stride = {stride}; 1 <= stride < window is needed")
    if length < 2:
        raise ArgumentError(f"the text has {length} tokens; at least 2 are needed")
    first = 1
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        yield begin, end, first
        if end == length:
            return
        first = end


def evaluate(
    model: torch.nn.Module,
    tokens: torch.Tensor,
    *,
    original: torch.nn.Module | None = None,
    window: int = WINDOW,
    stride: int = STRIDE,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Perplexity exp(mean −ln p(token | those before it in its window)) of ``model`` on ``tokens``.

    tokens: integers [T] of one text. Windows of ``window`` tokens start ``stride`` apart; a token is predicted once, in
    the first window that holds it, so all but those of the first window see at least window − stride tokens.
    original: another model over the same vocabulary; adds the mean of KL(original ‖ model) in nats and the share of
    positions at which both have the same most likely token. progress: called with (done, all) tokens.
    Sums are float64, logits as the models give them, widened to float32. Raises ArgumentError for bad numbers.
    """
    if tokens.ndim != 1:
        raise ArgumentError(f"tokens has shape {tuple(tokens.shape)}; one text, [T], is needed")
    total = tokens.numel()
    loss = kl = same = 0.0
    with torch.no_grad():
        for begin, end, first in windows(total, window, stride):
            part = tokens[begin:end]
            ours = _log_probabilities(model, part)[first - begin - 1 : -1]
            loss -= ours.gather(1, tokens[first:end].to(ours.device)[:, None]).double().sum().item()
            if original is not None:
                theirs = _log_probabilities(original, part)[first - begin - 1 : -1].to(ours.device)
                kl += F.kl_div(ours, theirs, reduction="none", log_target=True).double().sum().item()
                same += (ours.argmax(1) == theirs.argmax(1)).sum().item()
            if progress is not None:
                progress(end - 1, total - 1)
    count = total - 1
    mean = loss / count
    perplexity = math.exp(mean) if mean < 700 else math.inf
    if original is None:
        return Evaluation(count, perplexity, window, stride)
    return Evaluation(count, perplexity, window, stride, kl / count, same / count)


def _log_probabilities(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Float32 [T, vocabulary] of a model called as transformers' causal models are."""
    device = next(model.parameters()).device
    logits = model(tokens[None].to(device), use_cache=False).logits[0]
    return F.log_softmax(logits.float(), dim=-1)
