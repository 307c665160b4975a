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

From logits alone, two losses of Nanda et al. (section 5) say what the key frequencies do. The logit of each answer is,
over all pairs of the group, projected on 1 and on the waves of the pair's right answer at the key frequencies. The
restricted loss (:func:`restricted_loss`) is the cross-entropy of what is left; it falls while the network learns to add
by angles. The excluded loss (:func:`excluded_loss`) is that of the logits without the waves, on the training pairs; it
rises once the training pairs are answered by angles, too, and not by heart. Which frequencies are key is a matter of
the network that has grokked: its own (:func:`key_frequencies`) are given for every earlier step.

Numbers outside the group (0, with ``mul`` and ``div``) are left out, as operands and as answers. The quadratic and the
cubic operations have no ``fourier_logits``: exp(2 pi i f a^2 / p) is, transformed over a, equally large at every
frequency (a Gauss sum), so that no few components can stand for their answers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from grokcurv.tasks.modular.model import MLP, Transformer

KEY_FREQUENCIES = 5
"""How many frequencies are key: as many as Nanda et al. found in their network."""

GROUPS = ("add", "sub", "mul", "div")
"""The operations of a cyclic group."""

PIECE = 16_384
"""Rows that are held in float64 at a time."""

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

    An embedding on one circle, and logits that treat all three frequencies alike:

    >>> from grokcurv.tasks import table
    >>> pairs, answers = table("add", 7)
    >>> angle = 2 * math.pi * torch.arange(7) / 7
    >>> shares = FourierShares("add", 7, torch.stack([angle.cos(), angle.sin()], 1), k=1)
    >>> shares.add(torch.eye(7)[answers], answers)
    >>> shares.read().round(decimals=4).tolist()
    [1.0, 0.3333]

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


def key_frequencies(logits: Tensor, answers: Tensor, k: int = KEY_FREQUENCIES, op: str = "add") -> Tensor:
    """The k frequencies on whose waves the logits have the most energy, ascending; (k,) int64 on the logits' device.

    Less their mean over the answers, which the soft-max cannot see. All, where there are no more. Logits without
    structure have strongest frequencies too.

    Args and errors as of :func:`restricted_loss`.
    """
    order, means = _means(logits, answers, op)
    means = means - means.mean(1, keepdim=True)
    frequencies = torch.arange(1, len(order) // 2 + 1, device=means.device)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    parts = waves(order, frequencies, means.shape[1])[1:] @ means
    energy = parts.square().sum(1).view(2, len(frequencies)).sum(0)  # of cosine and sine
    found: Tensor = frequencies[energy.topk(min(k, len(frequencies))).indices].sort().values
    return found


def restricted_loss(
    logits: Tensor, answers: Tensor, frequencies: Tensor | list[int] | None = None, op: str = "add"
) -> Tensor:
    """Mean cross-entropy (nats) of the logits restricted to 1 and the waves of the key frequencies; () float64.

    Nanda et al., arXiv 2301.05217, section 5: over all pairs (a, b), of each answer's logits only the parts along 1 and
    along the cosine and the sine of 2 pi f (a + b) / p are kept, f a key frequency. Here a + b is the right answer of
    the group: a - b for ``sub``; for ``mul`` and ``div``, with p prime, the exponent of the answer to a primitive root,
    modulo p - 1, and pairs that are outside the group (a = 0, with ``div``) do not count. The soft-max is over all p
    answers. With all frequencies this is the loss of the mean logits of each right answer.

    Args:
        logits: (..., p), at all pairs of the operation, in any order: (p, p, p), or (rows, p) as at the pairs of
            ``table``.
        answers: (...) int64, the right answers.
        frequencies: (k,) between 1 and n / 2, n the order of the group; by default the logits' own
            :func:`key_frequencies`.
        op: add, sub, mul or div; the answers of others spread evenly over all frequencies.

    Raises:
        ValueError: an operation that is no group's, p that is not prime for ``mul`` or ``div``, shapes that do not fit,
            pairs that are not all there, or frequencies that are none.

    Example:
        A network that adds by the angles of frequencies 1 and 3, and knows some answers by heart:

        >>> import torch
        >>> from grokcurv.tasks import table
        >>> from grokcurv.tasks.modular.fourier import excluded_loss, key_frequencies, restricted_loss
        >>> pairs, answers = table("add", 13)
        >>> apart = (pairs.sum(1, keepdim=True) - torch.arange(13)) * (2 * torch.pi / 13)
        >>> logits = 6 * (apart.cos() + (3 * apart).cos())
        >>> train = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[:60]
        >>> logits[train, answers[train]] += 5
        >>> key = key_frequencies(logits, answers, k=2)
        >>> key.tolist()
        [1, 3]
        >>> loss = torch.nn.functional.cross_entropy(logits, answers)
        >>> bool(restricted_loss(logits, answers, key) < 1.5 * loss)  # these two frequencies are enough
        True
        >>> bool(excluded_loss(logits, answers, train, key) < 1)  # what it knows by heart is enough for these pairs
        True
        >>> bool(excluded_loss(logits, answers, slice(None), key) > 1)  # and not for all
        True
    """
    order, means = _means(logits, answers, op)
    kept = waves(order, _checked(frequencies, logits, answers, op, len(order)), means.shape[1])
    # Every answer of the group has as many pairs, so that the mean over answers is that over pairs.
    parts = kept.T @ (kept @ means) / len(order)
    return functional.cross_entropy(parts[order], order)


def excluded_loss(
    logits: Tensor,
    answers: Tensor,
    train: Tensor | slice,
    frequencies: Tensor | list[int] | None = None,
    op: str = "add",
) -> Tensor:
    """Mean cross-entropy (nats), on the training pairs, of the logits without the waves of the key frequencies.

    () float64. Nanda et al., arXiv 2301.05217, section 5; all key frequencies are taken away at once. The projection is
    over all pairs, as in :func:`restricted_loss`, where arguments, errors and an example are; what is constant over the
    pairs stays.

    Args:
        train: which of the rows count: (...) bool, as ``answers`` is, or their numbers (m,), as of the flattened
            rows. Those outside the group do not.
    """
    order, means = _means(logits, answers, op)
    taken = waves(order, _checked(frequencies, logits, answers, op, len(order)), means.shape[1])[1:]
    parts = taken.T @ (taken @ means) / len(order)
    rows, right = logits.reshape(-1, logits.shape[-1]), answers.reshape(-1)
    train = train.reshape(-1) if isinstance(train, Tensor) else train
    rows, right = rows[train], right[train]
    inside = torch.isin(right, order)
    rows, right = rows[inside], right[inside]
    if not len(right):
        raise ValueError("train chooses no pair of the group")
    total = parts.new_zeros(())
    for x, y in zip(rows.split(PIECE), right.split(PIECE), strict=True):
        total += functional.cross_entropy(x.to(torch.float64) - parts[y], y, reduction="sum")
    return total / len(right)


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


def _means(logits: Tensor, answers: Tensor, op: str) -> tuple[Tensor, Tensor]:
    """The group's elements (n,) and, by right answer, the mean logits over its pairs: (p, p) float64, 0 outside."""
    p = logits.shape[-1] if logits.dim() else 0
    if op not in GROUPS:
        raise ValueError(f"op must be one of {', '.join(GROUPS)}, the operations of a group; got {op!r}")
    if logits.dim() < 2 or logits.shape[:-1] != answers.shape:
        raise ValueError(
            f"logits must be (..., p) and answers (...), got {tuple(logits.shape)} and {tuple(answers.shape)}"
        )
    if (order := elements(op, p)) is None:
        raise ValueError(f"p must be prime for op {op!r}, or its numbers are no cyclic group; got {p} logits")
    order = order.to(logits.device)
    sums = torch.zeros(p, p, dtype=torch.float64, device=logits.device)
    counts = torch.zeros(p, dtype=torch.int64, device=logits.device)
    rows, right = logits.reshape(-1, p), answers.reshape(-1)
    for x, y in zip(rows.split(PIECE), right.split(PIECE), strict=True):
        sums.index_add_(0, y, x.to(torch.float64))
        counts += torch.bincount(y, minlength=p)
    n = len(order)
    if not bool((counts[order] == n).all()):
        raise ValueError(
            f"logits must be at all {n}^2 pairs of the group of {op!r}, {n} of each answer; "
            f"got from {int(counts[order].min())} to {int(counts[order].max())}"
        )
    means = torch.zeros_like(sums)
    means[order] = sums[order] / n
    return order, means


def _checked(frequencies: Tensor | list[int] | None, logits: Tensor, answers: Tensor, op: str, n: int) -> Tensor:
    """The frequencies that are given, or the logits' own."""
    if frequencies is None:
        return key_frequencies(logits, answers, op=op)
    given = torch.as_tensor(frequencies, device=logits.device)
    if given.dim() != 1 or given.is_floating_point() or not bool(((given >= 1) & (given <= n // 2)).all()):
        raise ValueError(f"frequencies must be whole numbers from 1 to {n // 2}, (k,); got {given.tolist()}")
    unique: Tensor = given.unique()
    return unique
