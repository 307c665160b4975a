r"""Fourier progress: how far a network embeds its numbers, and answers, by a few frequencies.

Addition and subtraction modulo p are those of the cyclic group Z_p. Multiplication and division of 1, ..., p - 1, for
prime p, are those of the exponents modulo p - 1: with a primitive root g, the number g^j is element j. In a cyclic
group of order n a network can add by angles: it embeds a and b by the cosines and sines of 2 pi f a / n and
2 pi f b / n at a few frequencies f, and its logit of c at (a, b) is a sum of cos(2 pi f (a + b - c) / n) over these
(Nanda et al., arXiv 2301.05217, section 4). Two shares of energy (squared length), 0 to 1, follow it there:

``fourier_embedding``
    of the embedding, less its mean over the numbers: on its :data:`KEY_FREQUENCIES` strongest frequencies, which are
    called key. Defined for every operation; over Z_p for those that are no group's. Chance: :func:`random_share`.

``fourier_logits``
    of the logits at all pairs (a, b) of the group, in training or not, less their mean over the answers c, which the
    soft-max cannot see, and less each answer's mean over the pairs: on the waves cos(2 pi f r / n) and
    sin(2 pi f r / n) of the pair's right answer r, f a key frequency. Transformed over a and b, these are the
    components at (f, f) and (-f, -f), at (f, -f) and (-f, f) for the inverse operations: logits that depend on the pair
    through its answer alone have no others. Logits without structure have 2 k / (n^2 - 1) of their energy on those of k
    frequencies: 1.1e-3 for p = 97.

Numbers outside the group (0, with ``mul`` and ``div``) are left out, as operands and as answers. The quadratic and the
cubic operations have no ``fourier_logits``: exp(2 pi i f a^2 / p) is, transformed over a, equally large at every
frequency (a Gauss sum), so that no few components can stand for their answers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from grokcurv.tasks.modular.model import MLP, Transformer

KEY_FREQUENCIES = 5
"""How many frequencies are key: as many as Nanda et al. found in their network."""

GROUPS = ("add", "sub", "mul", "div")
"""The operations of a cyclic group."""

ROUNDING = 1e-12
"""Energy that is left without the means counts as rounding if it is no more than this part of what was there."""


def elements(op: str, p: int) -> Tensor | None:
    """The numbers (n,) in the order of the group in which ``op`` is seen, int64 on the CPU.

    0, ..., p - 1; for ``mul`` and ``div`` the powers of the least primitive root, or None for a p that is not prime:
    then 1, ..., p - 1 are not all powers of one number.
    """
    if op not in ("mul", "div"):
        return torch.arange(p)
    for root in range(1, p):
        powers, power = [1], root
        while power != 1 and len(powers) < p:
            powers.append(power)
            power = power * root % p
        if len(powers) == p - 1:
            return torch.tensor(powers)
    return None


def embedding_of(model: nn.Module) -> Tensor:
    """(p, width) what a network of this package makes of each number before it meets another.

    A transformer's token embedding, without the tokens of the operator and of ``=``; for an MLP, whose first layer
    reads two one-hot numbers, the columns of its weight for the one and for the other side by side.
    """
    if isinstance(model, MLP):
        first = next(model.hidden.parameters()).detach()
        embedding: Tensor = first.unflatten(1, (2, model.p)).permute(2, 1, 0).flatten(1)
    else:
        assert isinstance(model, Transformer)
        embedding = model.tok_emb.weight.detach()[: model.p]
    return embedding


def energies(embedding: Tensor, order: Tensor) -> Tensor:
    """(n // 2 + 1,) float64: energy at each frequency of the rows ``order`` (n,) of an embedding (p, width).

    Frequency 0 is their mean. f and n - f count as one, so that the energies add up to the whole (Parseval).
    """
    transform = torch.fft.rfft(embedding[order].to(torch.float64), dim=0, norm="ortho")
    energy: Tensor = transform.abs().square().sum(1)
    energy[1 : (len(order) + 1) // 2] *= 2
    return energy


def waves(order: Tensor, frequencies: Tensor, p: int) -> Tensor:
    """(1 + 2 k, p) float64: at each number 1, the cosines and the sines of k frequencies; 0 outside ``order`` (n,).

    The squares of a row add up to n. (The sine of n / 2 is zero.)
    """
    n = len(order)
    turns = torch.outer(frequencies, torch.arange(n, device=order.device)) % n
    angles = turns.to(torch.float64) * (2 * math.pi / n)
    scale = angles.new_full((len(frequencies), 1), math.sqrt(2.0)).masked_fill(2 * frequencies[:, None] == n, 1.0)
    table = angles.new_zeros(1 + 2 * len(frequencies), p)
    table[:, order] = torch.cat([angles.new_ones(1, n), scale * angles.cos(), scale * angles.sin()])
    return table


class FourierShares:
    """Both shares at one evaluation, whose logits may come in pieces.

    Args:
        op, p: the task.
        embedding: (p, width), as :func:`embedding_of` gives it.
        k: how many frequencies are key; all, where there are no more.
    """

    def __init__(self, op: str, p: int, embedding: Tensor, k: int = KEY_FREQUENCIES) -> None:
        self._embedding = torch.full((), math.nan, dtype=torch.float64, device=embedding.device)
        self._waves: Tensor | None = None
        order = elements(op, p)
        if order is None:
            return
        order = order.to(embedding.device)
        energy = energies(embedding, order)
        key = energy[1:].topk(min(k, len(energy) - 1))
        self._embedding = _share(key.values.sum(), energy[1:].sum(), energy.sum())
        if op in GROUPS:
            self._waves = waves(order, key.indices + 1, p)
            self._sums = energy.new_zeros(len(self._waves), len(order))
            self._energy = energy.new_zeros(())

    def add(self, logits: Tensor, answers: Tensor) -> None:
        """Take the logits (rows, p) at some of the pairs, and their right answers (rows,)."""
        if self._waves is None:
            return
        n = self._sums.shape[1]
        x = logits[:, -n:].to(torch.float64, copy=True)  # of the answers in the group
        x -= x.mean(1, keepdim=True)
        at = self._waves[:, answers]
        self._sums += at @ x
        self._energy += at[0] @ torch.linalg.vector_norm(x, dim=1).square()

    def read(self) -> Tensor:
        """(2,) float64, once every pair was added: ``fourier_embedding``, ``fourier_logits``; NaN where not defined."""
        logits = torch.full_like(self._embedding, math.nan)
        if self._waves is not None:
            # Every answer has n pairs, so the square of a wave adds up to n^2 over the pairs.
            energy = self._sums.square().sum(1) / self._sums.shape[1] ** 2
            logits = _share(energy[1:].sum(), self._energy - energy[0], self._energy)
        return torch.stack([self._embedding, logits])


def random_share(n: int, width: int, k: int = KEY_FREQUENCIES) -> float:
    r"""Mean of ``fourier_embedding`` over embeddings of independent normal numbers, in a group of odd order n.

    It is above k of m = (n - 1) / 2 frequencies, since the strongest count: 0.120 and not 0.104 for n = 97, width 128
    and k = 5. The m energies are independent Gamma(width) variables, their shares are independent of their sum. With
    Q their quantile function the k largest have the mean sum :math:`m \int_0^1 Q(u)\, I_u(m - k, k)\, du`, where the
    incomplete beta function I is the probability that fewer than k of the others are larger.

    Raises:
        ValueError: n is even, when one frequency has half the numbers of the others, or below 3.
    """
    from scipy.integrate import quad
    from scipy.special import betainc, gammaincinv

    if n < 3 or n % 2 == 0:
        raise ValueError(f"n must be odd and at least 3, got {n}")
    m = (n - 1) // 2
    if k >= m:
        return 1.0
    mean, _ = quad(lambda u: gammaincinv(width, u) * betainc(m - k, k, u), 0, 1)
    return float(mean) / width


def _share(part: Tensor, whole: Tensor, before: Tensor) -> Tensor:
    """``part / whole``; NaN where ``whole``, what is left of ``before`` without the means, is rounding."""
    return torch.where(whole > ROUNDING * before, part / whole, math.nan)
