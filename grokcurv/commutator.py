r"""Commutator defects: how much two gradient steps fail to commute.

For two batches A, B and a step length :math:`\eta`, with :math:`g_A(\theta)` the gradient on A,

.. math::
    \theta_{AB} = \theta - \eta g_A(\theta) - \eta g_B(\theta - \eta g_A(\theta)), \qquad
    \delta = \theta_{AB} - \theta_{BA}, \qquad D = \frac{|\delta|}{|\eta g_A|\,|\eta g_B|}

(Xu, arXiv 2602.16746, section 3). To leading order :math:`\delta = \eta^2 (H_B g_A - H_A g_B)`, the Lie bracket of
the two gradient fields. Subtracting the two end points in float32 mostly measures the rounding of the parameters;
the same :math:`\delta` is a difference of gradients, which is what is computed here. See ``docs/numerics.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from grokcurv import ops
from grokcurv.flat import Segment
from grokcurv.gradients import (
    Asking,
    Distributed,
    GradientEngine,
    LossFn,
    Model,
    Strategy,
    Vectors,
    Wanted,
    carry_out,
)
from grokcurv.records import capturing
from grokcurv.reference import compute_type
from grokcurv.subspace import Subspace

Method = Literal["difference", "bracket", "reference"]
METHODS: tuple[Method, ...] = ("difference", "bracket", "reference")

Design = Literal["independent", "chain"]
DESIGNS: tuple[Design, ...] = ("independent", "chain")

Pair = tuple[Any, Any]
Sampler = Callable[[], Pair]

REFERENCE_GUARD = 1e-12
"""Added to the denominator by the published float32 formula, and by nothing else here."""

AUTO_STEP = 3e-6
"""``eta="auto"``: length of the step relative to the length of theta, for float32."""

RELIABLE_RATIO = 10.0
"""A defect is called reliable when it is at least this many times its noise floor."""

GIVEN = "given"
"""Where :attr:`CommutatorProbe.errors` has the distance of a given first gradient from the probe's own."""

FLOOR_MARGIN = 3.0
"""How many times its estimated size the error vector is allowed; ``docs/numerics.md`` says why three."""


@dataclass(frozen=True, eq=False)
class CommutatorStats:
    """What was measured, one entry per pair of batches. Tensors are float64 and live on the model's device.

    Attributes:
        method: ``"difference"``, ``"bracket"`` or ``"reference"``: what ``defect`` is.
        eta: (N,) step length of each pair.
        defect: (N,) ``D = |delta| / (|eta g_A| |eta g_B|)``, in units of one over the loss.
        grad_norm_a, grad_norm_b: (N,) ``|g_A|``, ``|g_B|``.
        grad_cosine: (N,) cosine of the angle between the two gradients.
        bracket_norm: (N,) ``|delta| / eta^2``; the length of ``H_B g_A - H_A g_B``, exactly so for ``"bracket"``.
        noise_floor: (N,) predicted size of the error vector of ``delta`` due to rounding, in units of the defect;
            NaN when the probe was told not to estimate it.
        parallel, residual: (N,) lengths of the parts of ``delta`` inside and outside the basis, or None without one.
        coefficients: (N, K) inner products of ``delta`` with the basis, or None.
        support: (N,) length of ``delta`` on the coordinates where the basis lives, or None.
        energies: (N, S) squared length of ``delta`` on each of the probe's segments, or None.
        reference: (N,) the defect by the published float32 formula, from the same gradients (NaN for ``"bracket"``).
        delta: (N, P) in the order of ``model.parameters()``, or None.
    """

    method: Method
    eta: Tensor
    defect: Tensor
    grad_norm_a: Tensor
    grad_norm_b: Tensor
    grad_cosine: Tensor
    bracket_norm: Tensor
    noise_floor: Tensor
    reference: Tensor
    parallel: Tensor | None = None
    residual: Tensor | None = None
    coefficients: Tensor | None = None
    support: Tensor | None = None
    energies: Tensor | None = None
    delta: Tensor | None = None

    @property
    def reliable(self) -> Tensor:
        """(N,) whether rounding can be ruled out: ``noise_floor <= defect / 10``. Says nothing of the finite eta."""
        return self.noise_floor <= self.defect / RELIABLE_RATIO

    def median(self) -> Tensor:
        """Median of the defect over the pairs: a scalar, NaN if any pair is."""
        return self.quantile(0.5)

    def quantile(self, q: float) -> Tensor:
        """Quantile ``q`` of the defect over the pairs, linearly interpolated: a scalar, NaN if any pair is."""
        return quantile(self.defect, q)

    def __len__(self) -> int:
        return len(self.defect)


class CommutatorProbe:
    """Measures commutator defects of ``model`` without touching it.

    Parameters, gradients, buffers, training mode and the visible random generators are left exactly as they were.
    Pairs are streamed: beyond the model's own, at most six vectors of P are alive whatever the number of pairs is,
    and one parameter's gradient on its way to them (a kept ``delta`` and the float64 evaluation behind the noise floor
    aside). ``errors`` holds what that evaluation last found, by the form it was made for: (2,) absolute and relative;
    and ``errors["given"]`` how far a gradient that was given was from the probe's own.

    A loss with kinks (ReLU, max-pooling: :meth:`grokcurv.gradients.GradientEngine.kinked`) is evaluated in float64
    throughout, and its gradients are rounded afterwards: near a kink the rounding of an evaluation may switch a unit,
    which changes one gradient of the four by a jump that no check of others shows. A ``first_gradient`` is not used.

    Args:
        model: any module. A ``torch.compile``d one is measured through the module it wraps; of one that is trained on
            several processes give :func:`grokcurv.integrations.sharded.distributed`.
        loss_fn: ``loss_fn(model, batch)`` returning a scalar. :func:`grokcurv.cross_entropy64` inside it keeps
            small gradients exact.
        eta: step length, or ``"auto"``: each pair takes the step whose length is 3e-6 of ``|theta|`` (float32; scaled
            with the square root of the unit roundoff for other dtypes), which estimates the bracket.
        method: ``"difference"`` (four gradients a pair), ``"bracket"`` (two gradients and two Hessian-vector
            products; exact, has no eta), or ``"reference"`` (the published float32 formula).
        basis: an optional subspace on which every ``delta`` is projected.
        segments: optional segments of the parameter vector whose share of ``delta`` is wanted.
        noise_floor: ``False`` saves the float64 evaluations, one pair per call of :meth:`measure` or, with kinks, all;
            nothing is then called reliable, as where the model cannot be evaluated in float64.
        strategy: of the gradients, see :class:`grokcurv.gradients.GradientEngine`.

    Raises:
        ValueError: an unknown method, a step that is not positive, a model without trainable parameters, a basis or
            segments that do not fit it.
    """

    def __init__(
        self,
        model: Model,
        loss_fn: LossFn,
        *,
        eta: float | Literal["auto"] = 1e-3,
        method: Method = "difference",
        basis: Subspace | None = None,
        segments: Sequence[Segment] | None = None,
        noise_floor: bool = True,
        strategy: Strategy = "auto",
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        if eta != "auto" and not (isinstance(eta, int | float) and math.isfinite(eta) and eta > 0):
            raise ValueError(f"eta must be a positive number or 'auto', got {eta!r}")
        if isinstance(model, Distributed):
            self.gradients = model.engine(loss_fn, strategy)
        else:
            self.gradients = GradientEngine(model, loss_fn, strategy=strategy)
        self.eta = eta
        self.method: Method = method
        self.noise_floor = noise_floor and self.gradients.checked
        self.errors: dict[str, Tensor] = {}
        self.basis = basis
        size = self.gradients.segments[-1].stop
        for segment in segments or ():
            if segment.stop > size:
                raise ValueError(f"segments: {segment.name!r} ends at {segment.stop}, past P = {size}")
        self.segments = tuple(map(self.gradients.coordinates.at_hand, segments or ()))

    @property
    def basis(self) -> Subspace | None:
        """The subspace on which every ``delta`` is projected; may be replaced between measurements."""
        return self._basis

    @basis.setter
    def basis(self, basis: Subspace | None) -> None:
        if basis is not None:
            if basis.size != self.gradients.size:
                raise ValueError(f"basis lives in R^{basis.size}, the model has P = {self.gradients.size} parameters")
            basis = basis.to(self.gradients.device, compute_type(self.gradients.dtype))
        self._basis = basis

    def measure(
        self,
        source: Iterable[Pair] | Sampler,
        pairs: int | None = None,
        *,
        keep_delta: bool = False,
        method: Method | None = None,
        first_gradient: Tensor | None = None,
        design: Design = "independent",
        check: bool = True,
        seed: int = 0,
    ) -> CommutatorStats:
        """Measure the commutator of each pair of batches at the model's present parameters.

        Args:
            source: pairs ``(batch_a, batch_b)``, or a function of no arguments that draws one.
            pairs: how many to take; required for a function.
            keep_delta: return every ``delta`` as well, N vectors of P.
            method: instead of the probe's own.
            first_gradient: (P,) the gradient on the first pair's ``batch_a``, if it is already known. It saves one
                gradient, except at a check: then it is computed all the same, and the distance between the two enters
                the floor from there on. It must come from the same ``loss_fn`` at the same parameters.
            design: ``"independent"``, or ``"chain"`` for pairs (B0, B1), (B1, B2), ... each of which begins with the
                batch object that the one before ended with: the gradient at theta serves both, so that n pairs cost
                3 n + 1 gradients instead of 4 n (not for brackets). Neighbours are then correlated, see
                ``docs/numerics.md``.
            check: make the float64 evaluations behind the noise floor. ``False`` takes the sizes of the errors from the
                latest ones, where there are any; the floor then speaks of those parameters, not of these. A loss with
                kinks has none: see the class.
            seed: of the model's own randomness (dropout); the same batch meets the same mask at every parameter
                vector of its pair.

        Raises:
            ValueError: no pair, a chain with a gap, or a loss that is not a scalar.
        """
        (stats,) = carry_out(
            self.gradients,
            [
                self.measuring(
                    source,
                    pairs,
                    keep_delta=keep_delta,
                    method=method,
                    first_gradient=first_gradient,
                    design=design,
                    check=check,
                    seed=seed,
                )
            ],
        )
        return stats

    def measuring(
        self,
        source: Iterable[Pair] | Sampler,
        pairs: int | None = None,
        *,
        keep_delta: bool = False,
        method: Method | None = None,
        first_gradient: Tensor | None = None,
        design: Design = "independent",
        check: bool = True,
        seed: int = 0,
    ) -> Asking[CommutatorStats]:
        """:meth:`measure`, stopping where it needs gradients, so that several probes' can be computed at once."""
        method = method or self.method
        for name, value, known_values in (("method", method, METHODS), ("design", design, DESIGNS)):
            if value not in known_values:
                raise ValueError(f"{name} must be one of {', '.join(known_values)}, got {value!r}")
        size, dtype, device = self.gradients.size, self.gradients.dtype, self.gradients.device
        if first_gradient is not None and first_gradient.shape != (size,):
            raise ValueError(f"first_gradient must have shape ({size},), got {tuple(first_gradient.shape)}")
        form = "bracket" if method == "bracket" else "difference"
        uncompared = first_gradient is not None and form == "difference" and GIVEN not in self.errors
        check = self.noise_floor and (check or form not in self.errors or uncompared)
        if form not in self.errors:  # one tensor for good, so that a captured measurement finds the latest errors
            self.errors[form] = torch.full((2,), math.nan, dtype=torch.float64, device=device)
        shared = _Shared(self._segment_table(), self.errors[form])
        if method != "bracket":
            shared.theta = self.gradients.flatten()
            shared.work = torch.empty(4, size, dtype=dtype, device=device)
        if first_gradient is not None and self.noise_floor:
            shared.given = self.errors.setdefault(GIVEN, torch.full_like(self.errors[form], math.nan))
        rows = []
        chained, end = design == "chain", None
        for index, pair in enumerate(_take(source, pairs)):
            first = 2 * seed + index if chained else 2 * (seed + index)
            seeds = (first, first + 1)
            exactly = self.noise_floor and dtype != torch.float64 and self.gradients.kinked(pair[0], seed=first)
            known = first_gradient if index == 0 and not exactly else None
            if chained and index:
                if pair[0] is not end:
                    raise ValueError(
                        f"source: pair {index} of a chain must begin with the batch that ended pair {index - 1}"
                    )
                known = shared.work[1] if form == "difference" else None
            end = pair[1]
            if exactly:
                measured = yield from self._rounded(shared, pair, seeds, known, form)
            elif form == "bracket":
                measured = self._brackets(shared, pair, seeds, check and index == 0)
            else:
                measured = yield from self._differences(shared, pair, seeds, known, check and index == 0)
            rows.append(self._stats(shared, measured, method, keep_delta))
            shared.given = None
            del measured  # before the next pair's vectors are allocated
        if not rows:
            raise ValueError("source gave no pair of batches to measure")
        return _concatenate(rows)

    def _differences(
        self, shared: _Shared, pair: Pair, seeds: Pair, known: Tensor | None, check: bool
    ) -> Asking[tuple[Tensor, Vectors]]:
        """The step, and g_A and g_B at theta, g_A past a step along g_B, g_B past one along g_A."""
        theta, (batch_a, batch_b) = shared.theta, pair
        g_a, g_b, a2, b2 = shared.work
        at_theta = [Wanted(theta, batch_a, g_a, seeds[0]), Wanted(theta, batch_b, g_b, seeds[1])]
        compare = known is not None and check and not capturing(theta.device)
        if known is not None and not compare:
            g_a.copy_(known)
            del at_theta[0]
        yield at_theta
        if known is not None and compare:
            self.errors[GIVEN].copy_(self._rounding_error(known, g_a))
            shared.given = None
        eta = self._step(g_a, g_b)
        if self.gradients.strategy == "vmap":
            past_b, past_a = ops.perturb(theta, torch.stack([g_b, g_a]), eta.expand(2).contiguous())
            yield [Wanted(past_b, batch_a, a2, seeds[0]), Wanted(past_a, batch_b, b2, seeds[1])]
        else:  # one at a time, in memory for one
            stepped = torch.empty_like(theta)
            for direction, batch, seed, out in ((g_b, batch_a, seeds[0], a2), (g_a, batch_b, seeds[1], b2)):
                ops.perturb(theta, direction[None], eta, out=stepped[None])
                yield [Wanted(stepped, batch, out, seed)]
        if check:
            errors = []
            for found, direction, batch, seed in ((a2, g_b, batch_a, seeds[0]), (b2, g_a, batch_b, seeds[1])):
                # In the other precision; the step itself is not rounded.
                stepped = (theta.to(torch.float64) - eta * direction).to(other_dtype(theta.dtype))
                exact = torch.empty_like(stepped)
                yield [Wanted(stepped, batch, exact, seed)]
                errors.append(self._rounding_error(found, exact))
            shared.error.copy_(rms(errors))
        return eta, (g_a, g_b, a2, b2)

    def _brackets(self, shared: _Shared, pair: Pair, seeds: Pair, check: bool) -> tuple[Tensor, Vectors]:
        """The step, and g_A, g_B, H_A g_B and H_B g_A at the model's own parameters."""
        vectors = self.gradients.hessian_vectors(None, pair, seeds=seeds)
        if check:
            theta = self.gradients.flatten().to(other_dtype(self.gradients.dtype))
            exact = self.gradients.hessian_vectors(theta, pair, seeds=seeds)
            shared.error.copy_(rms(map(self._rounding_error, vectors[2:], exact[2:])))
        return self._step(*vectors[:2]), vectors

    def _rounded(
        self, shared: _Shared, pair: Pair, seeds: Pair, known: Tensor | None, form: str
    ) -> Asking[tuple[Tensor, Vectors]]:
        """As :meth:`_differences` or :meth:`_brackets`, by float64 evaluations whose rounding is all the error."""
        theta = self.gradients.flatten().to(torch.float64)
        shared.given = None
        shared.error[0], shared.error[1] = 0.0, torch.finfo(self.gradients.dtype).eps / 2
        if form == "bracket":
            exact = self.gradients.hessian_vectors(theta, pair, seeds=seeds)
            vectors = tuple(vector.to(self.gradients.dtype) for vector in exact)
            return self._step(*vectors[:2]), vectors
        (batch_a, batch_b), (g_a, g_b, a2, b2) = pair, shared.work
        gradient = torch.empty_like(theta)
        if known is not None:
            g_a.copy_(known)
        else:
            yield [Wanted(theta, batch_a, gradient, seeds[0])]
            g_a.copy_(gradient)
        yield [Wanted(theta, batch_b, gradient, seeds[1])]
        g_b.copy_(gradient)
        eta = self._step(g_a, g_b)
        for direction, batch, seed, out in ((g_b, batch_a, seeds[0], a2), (g_a, batch_b, seeds[1], b2)):
            yield [Wanted(theta - eta * direction, batch, gradient, seed)]
            out.copy_(gradient)
        return eta, (g_a, g_b, a2, b2)

    def _step(self, g_a: Tensor, g_b: Tensor) -> Tensor:
        """(1,) float64: eta, the same whichever batch comes first."""
        if self.eta != "auto":
            return torch.full((1,), self.eta, dtype=torch.float64, device=g_a.device)
        scale = AUTO_STEP * math.sqrt(torch.finfo(g_a.dtype).eps / torch.finfo(torch.float32).eps)
        theta = [p.detach() for p in self.gradients.model.parameters() if p.requires_grad]
        norm = self.gradients.coordinates.norm
        eta: Tensor = scale * norm(*theta) / (norm(g_a) * norm(g_b)).sqrt()
        return eta[None]

    def _segment_table(self) -> Tensor | None:
        """(S, 2) int64 on the CPU: the probe's segments, then the basis's support."""
        table = [(s.start, s.length) for s in self.segments] + (list(self.basis.support) if self.basis else [])
        return torch.tensor(table, dtype=torch.int64) if table else None

    def _stats(
        self, shared: _Shared, measured: tuple[Tensor, Vectors], method: Method, keep_delta: bool
    ) -> CommutatorStats:
        bracket = method == "bracket"
        eta, (g_a, g_b, a2, b2) = measured
        out = ops.commutator(
            g_a[None],
            g_b[None],
            a2[None],
            b2[None],
            eta,
            form="bracket" if bracket else "difference",
            theta=None if bracket else shared.theta,
            values=self.basis.values if self.basis else None,
            rows=self.basis.rows if self.basis else None,
            segments=shared.segments,
            keep_delta=keep_delta,
        )
        sums, coefficients, energies = self.gradients.coordinates.total(out.sums, out.coefficients, out.energies)
        aa, bb, ab, dd, ha, hb = sums[:, :6].unbind(1)
        area = (aa * bb).sqrt()
        defect = dd.sqrt() / (eta.square() * area)
        if bracket:
            floor = FLOOR_MARGIN * shared.error_size(ha, hb) / area
            reference = torch.full_like(defect, math.nan)
        else:
            floor = FLOOR_MARGIN * shared.difference_error(aa, bb) / (eta * area)
            rounded, distance = sums[:, 6:8].sqrt().unbind(1)
            reference = rounded / (eta.square() * area + REFERENCE_GUARD)
            if method == "reference":
                defect, floor = reference, floor + distance / (eta.square() * area)
        stats = CommutatorStats(
            method=method,
            eta=eta,
            defect=defect,
            grad_norm_a=aa.sqrt(),
            grad_norm_b=bb.sqrt(),
            grad_cosine=ab / area,
            bracket_norm=dd.sqrt() / eta.square(),
            noise_floor=floor,
            reference=reference,
            energies=energies[:, : len(self.segments)] if self.segments else None,
            delta=out.delta if keep_delta else None,
        )
        if self.basis is None:
            return stats
        inside = coefficients.square().sum(1)
        return replace(
            stats,
            parallel=inside.sqrt(),
            residual=(dd - inside).clamp_min(0).sqrt(),
            coefficients=coefficients,
            support=energies[:, len(self.segments) :].sum(1).sqrt(),
        )

    def _rounding_error(self, values: Tensor, other: Tensor) -> Tensor:
        """(2,) float64: absolute and relative error of ``values`` in the 2-norm, from an evaluation in ``other_dtype``.

        Where that evaluation is the less precise one, its own error is seen instead, and is scaled by the ratio of the
        unit roundoffs: rounding errors are proportional to it.
        """
        scale = min(1.0, torch.finfo(values.dtype).eps / torch.finfo(other.dtype).eps)
        exact, norm = other.to(torch.float64), self.gradients.coordinates.norm
        error = scale * norm(exact - values)
        return torch.stack([error, error / norm(exact)])


def commutator_defect(
    model: Model,
    loss_fn: LossFn,
    batch_a: Any,
    batch_b: Any,
    *,
    eta: float | Literal["auto"] = 1e-3,
    method: Method = "difference",
) -> CommutatorStats:
    """Measure one pair of batches and keep ``delta``: :class:`CommutatorProbe` in one call, with its arguments."""
    return CommutatorProbe(model, loss_fn, eta=eta, method=method).measure([(batch_a, batch_b)], keep_delta=True)


def quantile(values: Tensor, q: float) -> Tensor:
    """Quantile ``q`` over the last dimension, linearly interpolated; NaN if any value is."""
    return torch.quantile(values, q, dim=-1)


def other_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision in which a gradient of ``dtype`` is checked: float64, and float32 for float64 itself."""
    return torch.float32 if dtype == torch.float64 else torch.float64


def rms(rows: Iterable[Tensor]) -> Tensor:
    """Root mean square over the rows."""
    return torch.stack(list(rows)).square().mean(0).sqrt()


@dataclass
class _Shared:
    """What the pairs of one measurement share.

    Attributes:
        segments: (S, 2) int64, or None.
        error: (2,) rms absolute and relative error of the two vectors that were checked last.
        given: (2,) absolute and relative distance of a given first gradient from the probe's own, while one is used.
        theta: (P,), the parameters; not needed for brackets.
        work: (4, P), the gradients of one pair after another; brackets bring their own.
    """

    segments: Tensor | None
    error: Tensor
    given: Tensor | None = None
    theta: Tensor = field(default_factory=lambda: torch.empty(0))
    work: Tensor = field(default_factory=lambda: torch.empty(0))

    def error_size(self, a2: Tensor, b2: Tensor) -> Tensor:
        """Length of the errors of two vectors of squared norms ``a2`` and ``b2`` taken together."""
        return (_squared_error(self.error, a2) + _squared_error(self.error, b2)).sqrt()

    def difference_error(self, a2: Tensor, b2: Tensor) -> Tensor:
        """Length of the errors of two gradients on A and two on B; of the first one's distance besides, if given."""
        squared = 2.0 * self.error_size(a2, b2).square()
        return (squared if self.given is None else squared + _squared_error(self.given, a2)).sqrt()


def _squared_error(error: Tensor, squared_norm: Tensor) -> Tensor:
    """As large as the error found earlier, in absolute or in relative size, whichever is more."""
    absolute, relative = error.square()
    return torch.maximum(absolute, relative * squared_norm)


def _take(source: Iterable[Pair] | Sampler, pairs: int | None) -> Iterable[Pair]:
    if pairs is not None and pairs < 1:
        raise ValueError(f"pairs must be at least 1, got {pairs}")
    if not callable(source):
        return islice(source, pairs)
    if pairs is None:
        raise ValueError("pairs must be given when the pairs are drawn by a function")
    return (source() for _ in range(pairs))


def _concatenate(rows: Sequence[CommutatorStats]) -> CommutatorStats:
    def joined(name: str) -> Any:
        values = [getattr(row, name) for row in rows]
        return torch.cat(values) if isinstance(values[0], Tensor) else values[0]

    return CommutatorStats(**{column.name: joined(column.name) for column in fields(CommutatorStats)})
