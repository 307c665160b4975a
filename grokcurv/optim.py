"""Optimisers of many runs at once: runs of one architecture are the rows of a buffer, and one step moves them all.

What a run is trained with, its learning rate, decay or largest norm, is its own number in a tensor on the device. A
step is the same few operations for any number of rows. It looks at no number and copies nothing from the host, so that
a CUDA graph can hold it; replays follow settings that are changed in place. No row enters the arithmetic of another,
and on the CPU each run gets bit for bit what it would get alone.

Runs with different optimisers in one program are sorted by kind, and each kind steps its own block of rows:

>>> theta, gradient = torch.zeros(5, 32), torch.ones(5, 32)
>>> optimizers = AdamW(theta[:3], gradient[:3], lr=[1e-3, 3e-3, 1e-2]), SGD(theta[3:], gradient[3:], lr=0.1)
>>> for optimizer in optimizers:
...     optimizer.clip()
...     optimizer.step()
>>> theta[:, 0]
tensor([-0.0010, -0.0030, -0.0100, -0.1000, -0.1000])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from grokcurv.flat import Segment

Setting = float | Sequence[Any] | Tensor
"""One number for all runs, or one for each of them."""

EPSILON = 1e-8
"""Of AdamW, beside the root of the second moment: torch's default."""

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of X, XX'X and (XX')^2 X in a step of Muon's iteration."""

ADJUSTMENTS: Mapping[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}
"""Of Muon's learning rate to the shape of a matrix, by their names in torch."""

NEWTON_SCHULZ_STEPS = 5
"""Of that iteration."""

CHUNK = 4096
"""Coordinates whose squares are summed in the dtype of the rows."""

Range = tuple[Callable[[Tensor], Tensor], str]

NOT_NEGATIVE: Range = (lambda x: (x >= 0) & (x < math.inf), "be a number, not negative")
SHARE: Range = (lambda x: (x >= 0) & (x < 1), "lie in [0, 1)")
LIMIT: Range = (lambda x: x > 0, "be positive, inf where there is no limit")
FLAG: Range = (lambda x: (x == 0) | (x == 1), "be true or false")


class Optimizer:
    """What all optimisers of rows have: clipping, warm-up, counts and checkpoints.

    Every attribute that is a tensor has a row for each of the R runs. Settings are float64; change them in place.

    >>> optimizer = SGD(torch.zeros(2, 3), torch.ones(2, 3), lr=[0.1, 0.2], warmup=[1, 4])
    >>> optimizer.step()
    >>> optimizer.theta[:, 0], optimizer.warmup_factor.tolist()
    (tensor([-0.1000, -0.0500]), [1.0, 0.5])

    Args:
        theta: (R, P) parameters, float32 or float64; every step changes them in place.
        gradient: (R, P) of the same dtype, on the same device: where the gradients are found.
        lr: learning rates after the warm-up.
        weight_decay: as the optimiser has it.
        warmup: W, in steps: the step from count t to t + 1 has ``lr * min(1, (t + 1) / W)``.
        max_norm: the largest norm of a run's gradient, inf for a run that has none; None where no run has one.

    Attributes:
        count: (R,) float64, how many steps each run has taken.

    Raises:
        TypeError: another dtype, or a setting that is no number.
        ValueError: shapes or devices that do not fit, or a setting out of its range; the message names it.
    """

    STATE: ClassVar[tuple[str, ...]] = ("count",)
    """Names of what a checkpoint holds."""

    def __init__(
        self,
        theta: Tensor,
        gradient: Tensor,
        *,
        lr: Setting = 1e-3,
        weight_decay: Setting = 0.0,
        warmup: Setting = 0,
        max_norm: Setting | None = None,
    ) -> None:
        if theta.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"theta must be float32 or float64; got {theta.dtype}")
        if theta.dim() != 2:
            raise ValueError(f"theta must have shape (R, P); got {tuple(theta.shape)}")
        self.theta, self.gradient = theta, gradient
        self._check_like("gradient", gradient, theta.shape)
        self.count = torch.zeros(len(theta), dtype=torch.float64, device=theta.device)
        self.lr = self._setting("lr", lr, NOT_NEGATIVE)
        self.weight_decay = self._setting("weight_decay", weight_decay, NOT_NEGATIVE)
        self.warmup = self._setting("warmup", warmup, NOT_NEGATIVE)
        self.max_norm = None if max_norm is None else self._setting("max_norm", max_norm, LIMIT)

    @property
    def warmup_factor(self) -> Tensor:
        """(R,) float64: what the next step takes of the learning rate."""
        return ((self.count + 1) / self.warmup).clamp(max=1.0)

    @torch.no_grad()
    def clip(self) -> None:
        """Scale gradients in place to their largest norms, as ``torch.nn.utils.clip_grad_norm_`` does."""
        if self.max_norm is None:
            return
        self.gradient.mul_(clip_scale(self.gradient, self.max_norm))

    @torch.no_grad()
    def step(self) -> None:
        """One step of every run along its gradient, which stays as it is."""
        factor = self.warmup_factor
        self.count.add_(1.0)
        self._update(factor)

    def _update(self, factor: Tensor) -> None:
        """Move theta, with this share (R,) of the learning rates; the step is counted already."""
        raise NotImplementedError  # this class has what all share; the step itself is each optimiser's own

    def state_dict(self, run: int) -> dict[str, Tensor]:
        """What a checkpoint of a run holds beside its parameters: copies of its rows; no settings."""
        return {name: getattr(self, name)[run].clone() for name in self.STATE}

    @torch.no_grad()
    def load_state_dict(self, run: int, state: Mapping[str, Tensor]) -> None:
        """Put :meth:`state_dict` of any run of such an optimiser into a run's rows.

        Raises:
            ValueError: other names or shapes.
        """
        if state.keys() != set(self.STATE):
            raise ValueError(f"state must hold {', '.join(self.STATE)}; got {', '.join(state)}")
        for name, value in state.items():
            row = getattr(self, name)[run]
            if value.shape != row.shape:
                raise ValueError(f"state: {name} must have shape {tuple(row.shape)}; got {tuple(value.shape)}")
            row.copy_(value)

    @torch.no_grad()
    def keep(self, runs: Sequence[int], theta: Tensor, gradient: Tensor) -> None:
        """Go on with some runs alone, whose parameters and gradients move to other rows.

        The rows may lie in the same memory: ``keep([0, 3], theta[:2], gradient[:2])`` lets the others go, and the
        blocks of a program close up one after the other. A graph that was captured before has the old rows.

        Args:
            runs: which, in the order in which they go on.
            theta: (len(runs), P), overwritten.
            gradient: as theta.

        Raises:
            ValueError: a run that is not there; rows that do not fit.
        """
        if not all(0 <= run < len(self.theta) for run in runs):
            raise ValueError(f"runs must lie in 0..{len(self.theta) - 1}; got {list(runs)}")
        for name, rows in (("theta", theta), ("gradient", gradient)):
            self._check_like(name, rows, (len(runs), self.theta.shape[1]))
        index = torch.tensor(runs, dtype=torch.int64, device=self.theta.device)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[index])
        self.theta, self.gradient = theta.copy_(self.theta), gradient.copy_(self.gradient)

    def _check_like(self, name: str, rows: Tensor, shape: Sequence[int]) -> None:
        """Raise a ValueError unless rows have this shape, and the dtype and device of theta."""
        wanted = (tuple(shape), self.theta.dtype, self.theta.device)
        got = (tuple(rows.shape), rows.dtype, rows.device)
        if got != wanted:
            raise ValueError(f"{name} must have shape {', '.join(map(str, wanted))}; got {', '.join(map(str, got))}")

    def _setting(self, name: str, value: Setting, allowed: Range, *tail: int) -> Tensor:
        """(R, *tail) float64 on the device, from one value for all runs or one for each."""
        try:
            given = torch.as_tensor(value, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{name} must be a number, or one for each run; got {value!r}") from error
        shape = (len(self.theta), *tail)
        if given.shape not in (tail, shape):
            raise ValueError(f"{name} must have shape {tail} or {shape}; got {tuple(given.shape)}")
        inside, words = allowed
        if not inside(given).all():
            raise ValueError(f"{name} must {words}; got {given[~inside(given)].tolist()}")
        return given.to(self.theta.device).expand(shape).clone()


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101), in the order of torch's operations.

    Args:
        betas: (2,) for all runs or (R, 2), of the first and the second moment.
        **common: of :class:`Optimizer`.
    """

    STATE = ("count", "exp_avg", "exp_avg_sq")

    def __init__(
        self,
        theta: Tensor,
        gradient: Tensor,
        *,
        betas: Setting = (0.9, 0.999),
        weight_decay: Setting = 1e-2,
        **common: Any,
    ) -> None:
        super().__init__(theta, gradient, weight_decay=weight_decay, **common)
        self.betas = self._setting("betas", betas, SHARE, 2)
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(theta), torch.zeros_like(theta)

    def _update(self, factor: Tensor) -> None:
        _adamw_(self, self.theta, self.gradient, factor * self.lr)


class SGD(Optimizer):
    """Gradient descent with momentum, as ``torch.optim.SGD`` without dampening: the decay is part of the gradient.

    Args:
        momentum: of each run.
        nesterov: whether the step looks ahead along the momentum (Sutskever et al., ICML 2013).
        **common: of :class:`Optimizer`.
    """

    STATE = ("count", "momentum_buffer")

    def __init__(
        self, theta: Tensor, gradient: Tensor, *, momentum: Setting = 0.0, nesterov: Setting = False, **common: Any
    ) -> None:
        super().__init__(theta, gradient, **common)
        self.momentum = self._setting("momentum", momentum, SHARE)
        self.nesterov = self._setting("nesterov", nesterov, FLAG).bool()
        self.momentum_buffer = torch.zeros_like(theta)

    def _update(self, factor: Tensor) -> None:
        """One step of each run, with learning rates times ``factor``."""
        length, decay, momentum = _columns(self.theta, -factor * self.lr, self.weight_decay, self.momentum)
        direction = torch.addcmul(self.gradient, decay, self.theta)
        self.momentum_buffer.mul_(momentum).add_(direction)
        ahead = direction.addcmul_(momentum, self.momentum_buffer)
        self.theta.addcmul_(length, torch.where(self.nesterov[:, None], ahead, self.momentum_buffer))


class Muon(Optimizer):
    """Momentum whose update of a matrix is orthogonalised (Jordan et al. 2024), and AdamW for all other coordinates.

    As ``torch.optim.Muon``, but :func:`orthogonalize` computes in the dtype of theta where torch takes bfloat16.

    >>> theta, gradient = torch.zeros(1, 4), torch.tensor([[3.0, 0.0, 0.0, 0.1]])
    >>> optimizer = Muon(theta, gradient, [Segment("W", 0, 4, (2, 2))], lr=1.0)
    >>> optimizer.step()
    >>> sigma = torch.linalg.svdvals(theta.view(2, 2))  # near one, both of them
    >>> bool(((0.6 < sigma) & (sigma < 1.3)).all())
    True

    Args:
        segments: the matrices, disjoint, each of a shape of two numbers. A fused ``in_proj_weight`` is three of them;
            of projections that are fused under other names, give the parts (:func:`grokcurv.flat.attention_segments`).
        momentum: of the matrices.
        nesterov: whether what is orthogonalised looks ahead along the momentum.
        weight_decay: decoupled; of the matrices with ``lr``, of the others with ``adamw_lr``.
        adjust_lr_fn: what a matrix of A rows and B columns makes of ``lr``: ``"original"`` multiplies by
            ``sqrt(max(1, A / B))``, ``"match_rms_adamw"`` by ``0.2 sqrt(max(A, B))`` (Liu et al., arXiv 2502.16982).
        adamw_lr: of the others.
        betas: of the others, as :class:`AdamW`.
        **common: of :class:`Optimizer`. ``lr`` is that of the matrices; warm-up and clipping are for all.

    Raises:
        ValueError: segments that are no matrices, overlap or leave 0..P, or an unknown ``adjust_lr_fn``.
    """

    STATE = ("count", "momentum_buffer", "exp_avg", "exp_avg_sq")

    def __init__(
        self,
        theta: Tensor,
        gradient: Tensor,
        segments: Iterable[Segment],
        *,
        momentum: Setting = 0.95,
        nesterov: Setting = True,
        weight_decay: Setting = 0.1,
        adjust_lr_fn: Literal["original", "match_rms_adamw"] = "original",
        adamw_lr: Setting = 1e-3,
        betas: Setting = (0.9, 0.999),
        **common: Any,
    ) -> None:
        super().__init__(theta, gradient, weight_decay=weight_decay, **common)
        if adjust_lr_fn not in ADJUSTMENTS:
            raise ValueError(f"adjust_lr_fn must be one of {', '.join(ADJUSTMENTS)}; got {adjust_lr_fn!r}")
        self.momentum = self._setting("momentum", momentum, SHARE)
        self.nesterov = self._setting("nesterov", nesterov, FLAG).bool()
        self.adamw_lr = self._setting("adamw_lr", adamw_lr, NOT_NEGATIVE)
        self.betas = self._setting("betas", betas, SHARE, 2)
        self.adjust_lr_fn = adjust_lr_fn
        self.groups, self.others = _sort(segments, theta.shape[1])
        self.matrices = [there for group in self.groups.values() for there in group]
        self.momentum_buffer = theta.new_zeros(len(theta), sum(_lengths(self.matrices)))
        self.exp_avg, self.exp_avg_sq = (theta.new_zeros(len(theta), sum(_lengths(self.others))) for _ in range(2))

    def _update(self, factor: Tensor) -> None:
        """One step of each run: matrices by Muon, all other parameters by AdamW."""
        self._update_matrices(factor * self.lr)
        others, gradient = (_gather(rows, self.others) for rows in (self.theta, self.gradient))
        _adamw_(self, others, gradient, factor * self.adamw_lr)
        for there, part in zip(self.others, others.split(_lengths(self.others), 1), strict=True):
            self.theta[:, there] = part

    def _update_matrices(self, rate: Tensor) -> None:
        """One step of each matrix: momentum, made orthogonal, scaled by its shape, with decoupled decay."""
        ahead = self.momentum.masked_fill(~self.nesterov, 1.0)
        shrink, length, new, ahead = _columns(self.theta, 1 - rate * self.weight_decay, -rate, 1 - self.momentum, ahead)
        gradient = _gather(self.gradient, self.matrices)
        self.momentum_buffer.lerp_(gradient, new)
        update = gradient.lerp_(self.momentum_buffer, ahead)
        widths = [sum(_lengths(group)) for group in self.groups.values()]
        for ((rows, columns), group), part in zip(self.groups.items(), update.split(widths, 1), strict=True):
            matrices = part.clone(memory_format=torch.contiguous_format)
            moves = orthogonalize(matrices.view(len(part) * len(group), rows, columns))
            moves = moves.reshape(len(part), len(group), rows * columns)
            moves = moves * (length * ADJUSTMENTS[self.adjust_lr_fn](rows, columns))[:, None]
            for there, move in zip(group, moves.unbind(1), strict=True):
                self.theta[:, there].mul_(shrink).add_(move)


def orthogonalize(matrices: Tensor) -> Tensor:
    """``U S V'`` with S about 1 for each ``U D V'`` of n matrices (n, a, b), by five steps of Newton and Schulz.

    ``X <- 3.4445 X - 4.7750 XX'X + 2.0315 (XX')^2 X`` from ``X / max(|X|, 1e-7)``: the coefficients of Jordan et al.
    (https://kellerjordan.github.io/posts/muon/). Singular values above 0.002 |X| end between 0.68 and 1.21. float32 or
    float64, computed in it; |X| is the Frobenius norm.
    """
    (_, a, b), (first, third, fifth) = matrices.shape, NEWTON_SCHULZ
    lengths = row_norms(matrices.flatten(1)).clamp(min=1e-7)
    # The CPU's products depend on where in memory their factors begin: with zeros at its edges, each one of n does so
    # at a multiple of 16 numbers.
    x = nn.functional.pad(matrices / lengths.to(matrices.dtype)[:, None, None], (0, -b % 4, 0, -a % 4))
    x = x.mT if a > b else x
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth), x, beta=first)
    return (x.mT if a > b else x)[:, :a, :b]


def row_norms(rows: Tensor) -> Tensor:
    """Lengths (R,) of rows (R, P), float64: from those of chunks in the dtype of the rows, whatever P is."""
    whole = rows.shape[1] // CHUNK
    chunks, rest = rows[:, : whole * CHUNK].unflatten(1, (whole, CHUNK)), rows[:, None, whole * CHUNK :]
    parts = [torch.linalg.vector_norm(part, dim=2) for part in (chunks, rest)]
    lengths: Tensor = torch.linalg.vector_norm(torch.cat(parts, 1), dim=1, dtype=torch.float64)
    return lengths


def clip_scale(gradient: Tensor, max_norm: Tensor) -> Tensor:
    """(R, 1) what clipping gradients (R, P) to norms (R,) multiplies them by, in their dtype."""
    scale = (max_norm / (row_norms(gradient) + 1e-6)).clamp(max=1.0)
    # Without a limit nothing is touched, not even where a norm that is not finite makes the quotient NaN.
    return scale.masked_fill_(max_norm == math.inf, 1.0).to(gradient.dtype)[:, None]


def _adamw_(optimizer: AdamW | Muon, theta: Tensor, gradient: Tensor, rate: Tensor) -> None:
    """One step of AdamW on rows (R, n), which the optimiser has the moments of, with rate (R,)."""
    mean, square, betas = optimizer.exp_avg, optimizer.exp_avg_sq, optimizer.betas
    # The powers are taken two in a row, too few for the CPU's vectors, which would round those of many runs otherwise
    # than those of one. Counts are float64 for that: converted ones would be written out, and all powers be one row.
    corrections = 1 - betas ** optimizer.count[:, None]
    values = 1 - betas[:, 0], betas[:, 1], 1 - betas[:, 1], -rate / corrections[:, 0], corrections[:, 1].sqrt()
    shrink, new, old_square, new_square, length, root = _columns(theta, 1 - rate * optimizer.weight_decay, *values)
    theta.mul_(shrink)
    mean.lerp_(gradient, new)
    square.mul_(old_square).addcmul_(new_square * gradient, gradient)
    theta.addcdiv_(length * mean, square.sqrt().div_(root).add_(EPSILON))


def _columns(theta: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Each of the values (R,) as a column (R, 1) for the rows of theta, rounded to its dtype."""
    return torch.stack(values).to(theta.dtype)[..., None].unbind()


def _sort(segments: Iterable[Segment], size: int) -> tuple[dict[tuple[int, int], list[slice]], list[slice]]:
    """Where matrices lie in 0..size, by shape, and where the other coordinates do."""
    groups: dict[tuple[int, int], list[slice]] = {}
    others, end = [], 0
    for segment in sorted(segments, key=lambda s: s.start):
        if len(segment.shape) != 2 or math.prod(segment.shape) != segment.length:
            raise ValueError(f"segments must be matrices, of a shape of two numbers; got {segment}")
        if not end <= segment.start <= segment.stop <= size:
            raise ValueError(f"segments must be disjoint and lie in 0..{size}; got {segment}")
        rows, columns = segment.shape
        parts = 3 if segment.name.endswith("in_proj_weight") and rows % 3 == 0 else 1
        length = segment.length // parts
        starts = [segment.start + index * length for index in range(parts)]
        groups.setdefault((rows // parts, columns), []).extend(slice(start, start + length) for start in starts)
        others.append(slice(end, segment.start))
        end = segment.stop
    others.append(slice(end, size))
    return groups, [there for there in others if there.start < there.stop]


def _lengths(places: Iterable[slice]) -> list[int]:
    return [there.stop - there.start for there in places]


def _gather(rows: Tensor, places: Iterable[slice]) -> Tensor:
    """A copy (R, n) of some columns."""
    return torch.cat([rows[:, :0], *(rows[:, there] for there in places)], 1)
