"""Pruning to n:m sparsity: of every m weights along K, n are kept."""

from __future__ import annotations

import torch

from metal_marlin.errors import ArgumentError

_BLOCK = 128  # columns whose errors are gathered before the others are corrected


def prune_2_4(weight: torch.Tensor, hessian: torch.Tensor | None = None, damping: float = 0.01) -> torch.Tensor:
    """``prune_n_m`` with two of every four weights."""
    return prune_n_m(weight, 2, 4, hessian, damping)


def prune_n_m(
    weight: torch.Tensor, n: int, m: int, hessian: torch.Tensor | None = None, damping: float = 0.01
) -> torch.Tensor:
    """W [N, K] with at most n of every m weights along K other than 0, in W's dtype; a last shorter group keeps n too.

    Without ``hessian`` the n of largest magnitude stay as they are. With it (sum of x xᵀ over inputs x, [K, K],
    symmetric) those stay whose loss would add most to the squared error of W x, and the weights to their right make up
    for what is lost. damping: share of the mean diagonal that is added to it.
    Raises ArgumentError for shapes, n and m that do not fit, values that are not finite, and a Hessian that is not
    positive definite with its damping. Source: SparseGPT, arXiv 2301.00774.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ArgumentError(f"weight: {weight.dtype} {tuple(weight.shape)}; it is floating point [N, K]")
    if not 0 < n < m or m > _BLOCK or _BLOCK % m:
        raise ArgumentError(f"n = {n}, m = {m}; needs 0 < n < m, m a divisor of {_BLOCK}")
    if not bool(torch.isfinite(weight).all()):
        raise ArgumentError(f"weight: {int((~torch.isfinite(weight)).sum())} values are not finite")
    K, padding = weight.shape[1], -weight.shape[1] % m
    padded = torch.nn.functional.pad(weight, (0, padding))
    if hessian is None:
        kept = largest(padded.double().abs(), n, m)
        return torch.where(kept, padded, 0)[:, :K]
    if hessian.shape != (K, K):
        raise ArgumentError(f"hessian: shape {tuple(hessian.shape)}; a weight with K = {K} needs {(K, K)}")
    factor = _factor(hessian.double(), damping, padding)
    return _corrected(padded.double(), factor, n, m)[:, :K].to(weight.dtype)


def largest(size: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """True for the n largest of every m along the last dimension, the first of those that are equal."""
    groups = size.unflatten(-1, (-1, m))
    places = groups.argsort(dim=-1, descending=True, stable=True)[..., :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, places, True).flatten(-2)


def _factor(hessian: torch.Tensor, damping: float, padding: int) -> torch.Tensor:
    """The upper Cholesky factor of the inverse; inputs that are never there, and those of ``padding`` more columns,
    count as if each was alone."""
    more = damping * hessian.diagonal().mean()
    hessian = torch.nn.functional.pad(hessian, (0, padding, 0, padding))
    hessian = hessian + torch.diag(torch.where(hessian.diagonal() == 0, 1.0, 0.0) + more)
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        return torch.linalg.cholesky(inverse, upper=True)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ArgumentError(f"hessian: not positive definite with damping = {damping}: {error}") from None


def _corrected(weight: torch.Tensor, factor: torch.Tensor, n: int, m: int) -> torch.Tensor:
    weight = weight.clone()
    for first in range(0, weight.shape[1], _BLOCK):
        last = min(first + _BLOCK, weight.shape[1])
        block, upper = weight[:, first:last], factor[first:last, first:last]
        errors = torch.zeros_like(block)
        for i in range(last - first):
            if i % m == 0:
                kept = largest((block[:, i : i + m] / upper.diagonal()[i : i + m]) ** 2, n, m)
            errors[:, i] = torch.where(kept[:, i % m], 0, block[:, i]) / upper[i, i]
            block[:, i:] -= errors[:, i : i + 1] * upper[i : i + 1, i:]
            block[:, i] = torch.where(kept[:, i % m], block[:, i], 0)
        weight[:, last:] -= errors @ factor[first:last, last:]
    return weight
