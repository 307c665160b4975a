"""The whole measurement written straight from its definitions: what the package is compared with.

Flat copies of the parameters at every gradient, both end points formed and subtracted, projections on a dense basis,
and five random subspaces per pair, each from the QR factorisation of a P x K Gaussian matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from grokcurv.evaluation import LossFn

RANDOM_SUBSPACES = 5


def gradient(model: nn.Module, loss_fn: LossFn, batch: Any) -> Tensor:
    """(P,) the gradient of the loss on a batch, by one backward pass; it is left in ``.grad`` too."""
    model.zero_grad()
    loss_fn(model, batch).backward()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


def commutator(model: nn.Module, loss_fn: LossFn, pair: Any, eta: float) -> tuple[Tensor, Tensor]:
    """``(defect, delta)`` of one pair of batches."""
    theta = parameters_to_vector(model.parameters()).detach().clone()

    def both(first: Any, second: Any) -> tuple[Tensor, Tensor]:
        """The gradient on the first batch, and that on the second a step along it."""
        g = gradient(model, loss_fn, first)
        vector_to_parameters(theta - eta * g, model.parameters())
        after = gradient(model, loss_fn, second)
        vector_to_parameters(theta, model.parameters())
        return g, after

    (g_a, b2), (g_b, a2) = both(*pair), both(*reversed(pair))
    return defect(theta, g_a, g_b, a2, b2, eta)


def defect(theta: Tensor, g_a: Tensor, g_b: Tensor, a2: Tensor, b2: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """``(defect, delta)`` from the four gradients: both end points, subtracted."""
    delta = (theta - eta * g_a - eta * b2) - (theta - eta * g_b - eta * a2)
    return delta.norm() / ((eta * g_a).norm() * (eta * g_b).norm()), delta


def measure(
    model: nn.Module, loss_fn: LossFn, pairs: list[Any], basis: Tensor, eta: float
) -> list[tuple[float, float, float]]:
    """Defect, share of delta inside the basis (P, K), and its mean share inside random subspaces, of every pair."""
    rows = []
    for pair in pairs:
        value, delta = commutator(model, loss_fn, pair, eta)
        random = [share(delta, torch.linalg.qr(torch.randn_like(basis)).Q) for _ in range(RANDOM_SUBSPACES)]
        rows.append((value.item(), share(delta, basis).item(), torch.stack(random).mean().item()))
    return rows


class UpdateSpectrum:
    """Singular values of the last updates, at every step: flat copies, stacked and decomposed anew."""

    def __init__(self, parameters: list[Tensor], window: int) -> None:
        self.parameters, self.window = parameters, window
        self.before: Tensor | None = None
        self.updates: list[Tensor] = []

    def step(self) -> Tensor:
        theta = torch.cat([parameter.detach().flatten() for parameter in self.parameters])
        if self.before is not None:
            self.updates = [*self.updates, theta - self.before][-self.window :]
        self.before = theta
        return torch.linalg.svdvals(torch.stack(self.updates)) if self.updates else theta.new_zeros(0)


def share(delta: Tensor, basis: Tensor) -> Tensor:
    """The length of delta inside the span of orthonormal columns (P, K), over its own."""
    ratio: Tensor = (basis.T @ delta).norm() / delta.norm()
    return ratio
