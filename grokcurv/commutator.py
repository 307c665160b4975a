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
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice, zip_longest
from typing import Any, Literal

import torch
from torch import Tensor

from grokcurv import ops
from grokcurv.admission import Traits
from grokcurv.device_buffer import capturing, is_asynchronous
from grokcurv.evaluation import Check, LossFn
from grokcurv.flat import Segment
from grokcurv.gradients import Asking, Distributed, GradientEngine, Model, Strategy, Wanted, carry_out
from grokcurv.reference import compute_type
from grokcurv.state import Snapshot
from grokcurv.subspace import Subspace

Method = Literal["difference", "bracket", "published"]
METHODS: tuple[Method, ...] = ("difference", "bracket", "published")

RENAMED: dict[str, Method] = {"reference": "published"}
"""Methods by the names that they had."""

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
"""Where :attr:`CommutatorProbe.errors` has (3,) the distance of a given first gradient from that in float64, the
greatest such distance of the probe's own evaluations beside it, and the gradient's length."""

FLOOR_MARGIN = 3.0
"""How many times its estimated size the error vector is allowed; ``docs/numerics.md`` says why three."""

STALE_MARGIN = 4.0
"""How many times larger an error may be than those of the latest check, in a pair that is not checked itself."""

SATURATED = 0.02
"""Relative error of an evaluation from which on float64's own rounding is looked at: digits may be lost there too."""

FAINT = 1e-9
"""Length of a gradient below which the same is done: where everything is saturated, both precisions may agree on it."""

LAST_BITS = 1e4
"""Roundoffs by which two gradients of one float64 model may differ, relative to their length."""

MOVED = 0.5
"""A check is too old when the parameters have moved by this share of their length since."""

CHANGED = 10.0
"""Or when the length of a gradient has changed by this factor."""

GROWN = 3.0
"""Or when what is in the batches has grown by this one, below :data:`STALE_MARGIN`: a sum errs as what is summed."""

FEW = 16
"""Tensors of fewer integers name things more often than they measure them, and are not looked at for that."""

PADDING = 16
"""Rows of scratch memory begin at multiples of so many numbers, for the kernels' sake."""

ALARM = 8.0
"""A gradient that is given is looked at when the change from it exceeds, or is below, that of the other batch's by this
factor. Honest training was seen to span 0.4 to 2.2."""

SAMPLED = 1 << 12
"""From about so many coordinates it is seen how far the parameters have moved."""


@dataclass(frozen=True, eq=False)
class CommutatorStats:
    """What was measured, one entry per pair of batches. Tensors are float64 and live on the model's device.

    Attributes:
        method: ``"difference"``, ``"bracket"`` or ``"published"``: what ``defect`` is.
        eta: (N,) step length of each pair.
        defect: (N,) ``D = |delta| / (|eta g_A| |eta g_B|)``, in units of one over the loss.
        grad_norm_a, grad_norm_b: (N,) ``|g_A|``, ``|g_B|``.
        grad_cosine: (N,) cosine of the angle between the two gradients; ``grad_cosine_error`` bounds its error.
        bracket_norm: (N,) ``|delta| / eta^2``; the length of ``H_B g_A - H_A g_B``, exactly so for ``"bracket"``.
        noise_floor: (N,) predicted size of the error vector of ``delta`` due to rounding, in units of the defect;
            NaN when the probe was told not to estimate it.
        parallel, residual: (N,) lengths of the parts of ``delta`` inside and outside the basis, or None without one.
        coefficients: (N, K) inner products of ``delta`` with the basis, or None.
        support: (N,) length of ``delta`` on the coordinates where the basis lives, or None.
        energies: (N, S) squared length of ``delta`` on each of the probe's segments, or None.
        exact: (N,) bool, whether the pair was evaluated in float64.
        reference: (N,) the defect by the published float32 formula, from the gradients in the model's own precision
            (NaN for ``"bracket"``).
        delta: (N, P) in the order of ``model.parameters()``, or None.
    """

    method: Method
    eta: Tensor
    defect: Tensor
    grad_norm_a: Tensor
    grad_norm_b: Tensor
    grad_cosine: Tensor
    grad_cosine_error: Tensor
    bracket_norm: Tensor
    noise_floor: Tensor
    exact: Tensor
    reference: Tensor
    parallel: Tensor | None = None
    residual: Tensor | None = None
    coefficients: Tensor | None = None
    support: Tensor | None = None
    energies: Tensor | None = None
    delta: Tensor | None = None

    @property
    def reliable(self) -> Tensor:
        """(N,) whether rounding can be ruled out: ``noise_floor <= defect / 10``. Says nothing of the finite eta.

        A defect that is zero, infinite or NaN never is.
        """
        number = self.defect.isfinite() & (self.defect > 0)
        return number & (self.noise_floor <= self.defect / RELIABLE_RATIO)

    def median(self) -> Tensor:
        """Median of the defect over the pairs: a scalar, NaN if any pair is."""
        return self.quantile(0.5)

    def quantile(self, q: float) -> Tensor:
        """Quantile ``q`` of the defect over the pairs, linearly interpolated: a scalar, NaN if any pair is."""
        return quantile(self.defect, q)

    def __len__(self) -> int:
        return len(self.defect)


def current_method(method: str) -> Method:
    """A method by its name, or, with a warning, by the one that it had in an older version.

    Raises:
        ValueError: none has this name.
    """
    if method in RENAMED:
        warnings.warn(f"method {method!r} is called {RENAMED[method]!r} now", FutureWarning, stacklevel=3)
        method = RENAMED[method]
    for known in METHODS:
        if method == known:
            return known
    raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")


class CommutatorProbe:
    """Measures commutator defects of ``model`` without touching it.

    Parameters, gradients, buffers, training mode and the visible random generators are left exactly as they were.
    Pairs are streamed: beyond the model's own, at most six vectors of P are alive whatever the number of pairs is,
    and one parameter's gradient on its way to them (a kept ``delta`` aside; eight and a half when a bracket is admitted
    or checked). ``errors`` holds what the latest check has found, by the form it was made for: (2, 2), the
    greatest absolute and relative error of the two gradients at theta, and of the two other vectors; and
    ``errors["given"]`` how far a gradient that was given was from that in float64.

    A loss with kinks (ReLU, max-pooling: :meth:`grokcurv.gradients.GradientEngine.is_nonsmooth`) is evaluated in
    float64 throughout, and its gradients are rounded afterwards: near a kink the rounding of an evaluation may switch a
    unit, which changes one gradient of the four by a jump that no check of others shows. A ``first_gradient`` is not
    used.

    Args:
        model: any module. A ``torch.compile``d one is measured through the module it wraps; of one that is trained on
            several processes give :func:`grokcurv.integrations.sharded.distributed`.
        loss_fn: ``loss_fn(model, batch)`` returning a scalar. :func:`grokcurv.cross_entropy64` inside it keeps
            small gradients exact.
        eta: step length, or ``"auto"``: each pair takes the step whose length is 3e-6 of ``|theta|`` (float32; scaled
            with the square root of the unit roundoff for other dtypes), which estimates the bracket.
        method: ``"difference"`` (four gradients a pair), ``"bracket"`` (two gradients and two Hessian-vector
            products; exact, has no eta), or ``"published"`` (the float32 formula of the paper).
        basis: an optional subspace on which every ``delta`` is projected.
        segments: optional segments of the parameter vector whose share of ``delta`` is wanted.
        noise_floor: ``False`` saves the float64 evaluations; nothing is then called reliable, as where the model cannot
            be evaluated in float64.
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
        if eta != "auto" and not (isinstance(eta, int | float) and math.isfinite(eta) and eta > 0):
            raise ValueError(f"eta must be a positive number or 'auto', got {eta!r}")
        if isinstance(model, Distributed):
            self.gradients = model.engine(loss_fn, strategy)
        else:
            self.gradients = GradientEngine(model, loss_fn, strategy=strategy)
        self.eta = eta
        self.method = current_method(method)
        self.noise_floor = noise_floor and self.gradients.checked
        self.errors: dict[str, Tensor] = {}
        # Where they were found: gradients' lengths and some coordinates of theta; magnitudes of what is in the batches.
        self.origins: dict[str, tuple[Tensor, list[float]]] = {}
        self.basis = basis
        self.segments = segments or ()

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The intervals whose energy is reported, as far as they are in the vectors here; given as of all of R^P."""
        return self._segments

    @segments.setter
    def segments(self, segments: Sequence[Segment]) -> None:
        size = self.gradients.segments[-1].stop
        for segment in segments:
            if segment.stop > size:
                raise ValueError(f"segments: {segment.name!r} ends at {segment.stop}, past P = {size}")
        self._segments = tuple(map(self.gradients.partition.local_part, segments))

    def state_dict(self) -> dict[str, Any]:
        """What the latest checks have found, and where."""
        return {"errors": dict(self.errors), "origins": dict(self.origins)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.errors = {form: found.to(self.gradients.device) for form, found in state["errors"].items()}
        self.origins = dict(state["origins"])

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

    def update_basis(self, basis: Subspace) -> None:
        """Go on with a later basis of the same shape; on an accelerator in the memory of the one before.

        A captured measurement looks for it there. A basis that was given is not to be overwritten: use this where the
        one before is nobody else's.
        """
        if is_asynchronous(self.gradients.device) and self._basis is not None:
            self._basis.values.copy_(basis.values)
        else:
            self.basis = basis

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
                gradient. A check finds out how far it is from that in float64, which then takes its place. It must come
                from the same ``loss_fn`` at the same parameters.
            design: ``"independent"``, or ``"chain"`` for pairs (B0, B1), (B1, B2), ... each of which begins with the
                batch object that the one before ended with: the gradient at theta serves both, so that n pairs cost
                3 n + 1 gradients instead of 4 n (not for brackets). Neighbours are then correlated, see
                ``docs/numerics.md``.
            check: evaluate the first pair in float64 too. ``False`` takes the sizes of the errors from the latest pair
                for which that was done, if there is any; on a CPU a pair of which there is doubt is evaluated in
                float64 all the same (``docs/numerics.md`` says when).
            seed: of the model's own randomness (dropout); the same batch meets the same mask at every parameter
                vector of its pair.

        Raises:
            ValueError: no pair, a chain with a gap, or a loss that is not a scalar.
        """
        work = self.measuring(
            source,
            pairs,
            keep_delta=keep_delta,
            method=method,
            first_gradient=first_gradient,
            design=design,
            check=check,
            seed=seed,
        )
        (stats,) = carry_out(self.gradients, [work])
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
        method = current_method(method) if method else self.method
        if design not in DESIGNS:
            raise ValueError(f"design must be one of {', '.join(DESIGNS)}, got {design!r}")
        engine = self.gradients
        if first_gradient is not None and first_gradient.shape != (engine.size,):
            raise ValueError(f"first_gradient must have shape ({engine.size},), got {tuple(first_gradient.shape)}")
        # The first use of a given gradient is always held against float64, whatever check_every says: an error there is
        # one of what the user passes (another loss, a clipped gradient), which no rounding explains.
        form = "bracket" if method == "bracket" else "difference"
        uncompared = first_gradient is not None and form == "difference" and GIVEN not in self.errors
        check = self.noise_floor and (check or form not in self.errors or uncompared)
        shared: _Shared | None = None
        rows = []
        chained, end = design == "chain", None
        for index, pair in enumerate(_take(source, pairs)):
            if chained and index and pair[0] is not end:
                raise ValueError(
                    f"source: pair {index} of a chain must begin with the batch that ended pair {index - 1}"
                )
            end = pair[1]
            # Seeds belong to batches, not to pairs: in a chain the batch that ends one pair begins the next one, and
            # must meet the same masks in both.
            first = 2 * seed + index if chained else 2 * (seed + index)
            known = first_gradient if index == 0 else None
            # The gradient at theta on the batch in the middle of a chain is the second of the pair before: this is the
            # one gradient in four that a chain saves.
            if chained and shared is not None and form == "difference":
                known = shared.work[1]
            with engine.evaluator.session():  # nobody else changes the model until the pair is done
                _note_batches(engine, pair)
                while True:
                    traits = self._admit(form, pair[0], first)
                    shared = shared or self._share(form)
                    generation = engine.evaluator.generation
                    shared.pair, shared.seeds = pair, (first, first + 1)
                    shared.given = known is first_gradient and known is not None
                    row = yield from self._pair(shared, method, keep_delta, known, check and index == 0, traits)
                    if generation == engine.evaluator.generation:
                        break
                    # The model was seen to do what it had not done before, such as to draw: what was computed before
                    # that, or was given, may not be of one function with what came after.
                    known = None
            rows.append(row)
        if not rows:
            raise ValueError("source gave no pair of batches to measure")
        return _concatenate(rows)

    def _admit(self, form: str, batch: Any, seed: int) -> Traits:
        """How the structure of model and batch is evaluated; brackets are looked at if they are to be vouched for."""
        # brackets: true for bracket rows that are to be vouched for; others need no second derivatives, or are called
        # unreliable anyway.
        brackets = form == "bracket" and self.noise_floor
        return self.gradients.admit(batch, seed=seed, exact=self.noise_floor, brackets=brackets)

    def _share(self, form: str) -> _Shared:
        """Memory for one pair: four vectors and a scratch of two, or of one in float64, beyond the model's own."""
        engine = self.gradients
        wide = torch.finfo(torch.float64).bits // torch.finfo(engine.dtype).bits if self.noise_floor else 1
        padded = -(-engine.size // PADDING) * PADDING
        return _Shared(
            form,
            self._segment_table(),
            torch.empty(4, engine.size, dtype=engine.dtype, device=engine.device),
            torch.empty(max(2, wide), padded, dtype=engine.dtype, device=engine.device),
        )

    def _pair(
        self,
        shared: _Shared,
        method: Method,
        keep_delta: bool,
        known: Tensor | None,
        check: bool,
        traits: Traits,
    ) -> Asking[CommutatorStats]:
        """One pair, in the model's own precision, and in float64 where that is due, or where there is doubt."""
        engine = self.gradients
        if shared.form == "bracket" and engine.brackets and traits.brackets is False:
            shared.work.fill_(math.nan)
            return self._stats(shared, self._step(*shared.work[:2]), shared.unknown(math.inf), method, keep_delta)
        evaluate = self._brackets if shared.form == "bracket" else self._differences
        # floored: true where float64 can be evaluated, all of it, and the model repeats itself; only then has a row a
        # floor. wide: true for float64 models, whose own evaluation is the exact one. exactly: true for losses with
        # kinks, all of whose rows are evaluated in float64, since one unit that rounding switches moves a gradient by a
        # jump.
        floored = self.noise_floor and traits.exact and traits.trusted
        wide = engine.dtype == torch.float64
        exactly = floored and traits.nonsmooth and not wide
        published = None
        # First the four vectors in the model's own precision, as the user's training has them, with errors as the
        # latest check found them. That is all, unless a check is due or something in the row says that the latest one
        # does not speak of it.
        if not exactly:
            eta = yield from evaluate(shared, known)
            stats = self._stats(shared, eta, self._expected(shared, floored), method, keep_delta)
            if not floored or not (check or self._doubtful(shared, stats)):
                return stats
            published = stats.reference
            del stats  # and its delta
        # Then the same four in float64, along the float32 directions, each held part by part against what is there and
        # written over it: the row that comes out is the better one, and its error is known, not predicted.
        found = shared.unknown(0.0, 3)
        if wide and not traits.widened:
            # A float64 model has nothing better to be held against: only a gradient that was given is computed again,
            # and may differ in its last bits.
            if shared.given:
                yield [shared.wanted(0, engine.flatten(shared.theta), Check(found))]
                found[1, 0] = LAST_BITS * torch.finfo(torch.float64).eps * found[0, 1]
                self._compare_given(found)
            eta = self._step(*shared.work[:2])
        else:
            kept = known if exactly and not shared.given else None
            keep = (method == "published" or not engine.certifies) and not exactly
            eta = yield from evaluate(shared, kept, Check(found, keep))
            if shared.given and shared.form == "difference" and not exactly:
                self._compare_given(found)
        # What was found becomes the errors of this pair, and the expectation for those that are not checked.
        errors = yield from self._learn(shared, found, check, exactly, method)
        stats = self._stats(shared, eta, errors, method, keep_delta)
        if exactly and not check and self._doubtful(shared, stats):
            errors = yield from self._learn(shared, found, True, exactly, method)
            stats = self._stats(shared, eta, errors, method, keep_delta)
        stats = replace(stats, exact=torch.ones_like(stats.exact))
        # The published formula is one of the model's own precision throughout.
        return stats if published is None or method == "published" else replace(stats, reference=published)

    def _differences(self, shared: _Shared, known: Tensor | None = None, exact: Check | None = None) -> Asking[Tensor]:
        """g_A and g_B at theta, g_A past a step along g_B, g_B past one along g_A; the step's length is returned."""
        engine, (g_a, g_b, _, _) = self.gradients, shared.work
        theta = engine.flatten(shared.theta if exact is None else shared.point)
        if known is None:
            yield [shared.wanted(0, theta, exact), shared.wanted(1, theta, exact)]
        else:
            g_a.copy_(known)
            yield [shared.wanted(1, theta, exact)]
            if exact is not None:  # the end of the pair before, found as this one's was
                exact.found[0] = exact.found[1]
        eta = self._step(g_a, g_b)
        # H_A g_B comes from the gradient on A past a step along g_B, and the other way round: the two steps cross.
        past = ((2, g_b), (3, g_a))
        # Points past a step need a vector each when both gradients are one program; one after the other they share one.
        if engine.strategy == "vmap":
            points = [(index, self._stepped(shared, direction, eta, exact)) for index, direction in past]
            yield [shared.wanted(index, point, exact) for index, point in points]
        else:  # one at a time, in memory for one
            for index, direction in past:
                point = self._stepped(shared, direction, eta, exact, shared.memory(exact))
                yield [shared.wanted(index, point, exact)]
        return eta

    def _stepped(
        self, shared: _Shared, direction: Tensor, eta: Tensor, exact: Check | None, out: Tensor | None = None
    ) -> Tensor:
        """``theta - eta direction``, rounded as the model's parameters are, or in float64 and as good as not at all."""
        if exact is not None:
            out = torch.empty_like(shared.point) if out is None else out
            return self.gradients.step_exactly(out, direction, eta)
        out = torch.empty_like(shared.theta) if out is None else out
        ops.perturb(shared.theta, direction[None], eta, out=out[None])
        return out

    def _brackets(self, shared: _Shared, known: Tensor | None = None, exact: Check | None = None) -> Asking[Tensor]:
        """g_A, g_B, H_A g_B and H_B g_A at the model's own parameters; the step's length is returned."""
        engine, (g_a, g_b, h_a, h_b) = self.gradients, shared.work
        theta = engine.flatten(shared.theta if exact is None else shared.point)
        if known is None:
            yield [shared.wanted(0, theta, exact)]
        else:
            g_a.copy_(known)
        (a, b), seeds = shared.pair, shared.seeds
        engine.product(theta, b, g_a, g_b, h_b, seeds[1], exact and exact.of(slice(1, 4, 2)))
        engine.product(theta, a, g_b, None, h_a, seeds[0], exact and exact.of(slice(2, 3)))
        return self._step(g_a, g_b)

    def _learn(self, shared: _Shared, found: Tensor, check: bool, exactly: bool, method: Method) -> Asking[Tensor]:
        """(4,) the sizes of the errors of a pair that was evaluated in float64; for later pairs, those of its own.

        An evaluation in float64 errs less than one in the model's precision by the ratio of the roundoffs, unless both
        have lost all digits of something: where float32 has lost most of them, and where there is nothing to compare
        with, float64's own error is sampled.
        """
        engine = self.gradients
        distance, length, lost = found.unbind(1)
        wide = engine.dtype == torch.float64
        # float64 errs less than float32 by the ratio of the roundoffs, provided that both lose digits alike. Where
        # float32 has lost most of them (saturated logits), or gradients are so small that both may have underflowed
        # alike, the ratio says nothing, and float64's own rounding is sampled instead.
        relative = distance / length
        own = distance * (torch.finfo(torch.float64).eps / torch.finfo(engine.dtype).eps)
        # On an accelerator nobody looks at the numbers to decide: where a sample would be needed the error counts as
        # large as the vector, and the row is NaN.
        if is_asynchronous(engine.device):
            own = torch.where((relative > SATURATED) | (length < FAINT), length, own)
            sample = exactly and check
        else:
            faint = (relative > SATURATED) | (length < FAINT)
            sample = (exactly and check) or wide or shared.form == "bracket"
            sample = sample or (not capturing(engine.device) and bool(faint.any()))
        if exactly and not check:
            return torch.hypot(lost, self._expected(shared, True))
        noise = None
        if sample and not capturing(engine.device) and engine.device.type != "meta":
            noise = yield from self._sampled(shared, lost)
            own = noise
        # The published formula is reported in the model's own precision, and so is what only a twin can check.
        kept = (method == "published" or not engine.certifies) and not exactly
        errors = distance if kept else torch.maximum(lost, own)
        if exactly or (wide and noise is not None):
            distance = torch.maximum(distance, errors) if wide else errors
            length = _lengths(engine, shared.work)
        relative = (distance / length).nan_to_num(nan=math.inf)
        self._remember(shared, torch.stack([distance, relative], 1).view(2, 2, 2).amax(1))
        return errors

    def _sampled(self, shared: _Shared, lost: Tensor) -> Asking[Tensor]:
        """(4,) how far the evaluations move when float64's rounding errors are made larger at random.

        They are held against vectors that may have been rounded to the model's precision, and have ``lost`` (4,) by it.
        """
        engine, (g_a, g_b, h_a, h_b), seeds = self.gradients, shared.work, shared.seeds
        moved = shared.unknown(0.0, 3)
        shake = torch.Generator(engine.device).manual_seed(seeds[0])
        theta, check = engine.shake_(engine.flatten(shared.point), shake), Check(moved, keep=True, shake=shake)
        if shared.form == "bracket":
            engine.product(theta, shared.pair[1], g_a, g_b, h_b, seeds[1], check.of(slice(1, 4, 2)))
            engine.product(theta, shared.pair[0], g_b, g_a, h_a, seeds[0], check.of(slice(0, 4, 2)))
        else:
            for index in range(2):
                yield [shared.wanted(index, theta, check)]
        # The evaluations were held against vectors that have lost something in rounding; that much of the distance is
        # not of the evaluation.
        noise = (moved[:, 0].square() - lost.square()).clamp_min(0.0).sqrt().nan_to_num(nan=math.inf)
        if shared.form == "difference":
            noise[2:] = noise[:2]
        return noise

    def _expected(self, shared: _Shared, floored: bool) -> Tensor:
        """(4,) errors as large as any that the latest check has found, absolute or relative, and then some."""
        if not self.noise_floor:
            return shared.unknown(math.nan)
        if not floored or shared.form not in self.errors:
            return shared.unknown(math.inf)
        # Late in training gradients shrink and absolute errors with them; early they grow, and errors in proportion.
        # The larger of the two predictions covers both ways, and the margin what lies between two checks.
        absolute, relative = self.errors[shared.form].repeat_interleave(2, 0).unbind(1)
        return STALE_MARGIN * torch.maximum(absolute, relative * _lengths(self.gradients, shared.work))

    def _compare_given(self, found: Tensor) -> None:
        """Note how far a gradient that was given is from float64, and how far the probe's own evaluations are."""
        if GIVEN not in self.errors:
            self.errors[GIVEN] = torch.full((3,), math.nan, dtype=torch.float64, device=found.device)
        # The fourth was taken along the gradient that was given, and errs with it.
        self.errors[GIVEN][0], self.errors[GIVEN][1] = found[0, 0], found[1:3, 0].max()
        self.errors[GIVEN][2] = found[0, 1]

    def _remember(self, shared: _Shared, found: Tensor) -> None:
        """Keep what a check has found, where a captured measurement finds it again, and of where it is true."""
        form = shared.form
        if form not in self.errors:
            self.errors[form] = torch.full_like(found, math.nan)
        self.errors[form].copy_(found)
        if not is_asynchronous(self.gradients.device):
            self.origins[form] = self._whereabouts(shared), _magnitudes(shared.pair)

    def _whereabouts(self, shared: _Shared) -> Tensor:
        """float64: the lengths of the two gradients, and some thousand coordinates of theta, equally spaced."""
        theta = self.gradients.flatten(shared.theta)
        lengths = _lengths(self.gradients, shared.work[:2])
        return torch.cat([lengths, theta[:: max(1, len(theta) // SAMPLED)].to(torch.float64)])

    def _doubtful(self, shared: _Shared, stats: CommutatorStats) -> bool:
        """Whether the latest check is not enough for this pair. On an accelerator nobody waits to see."""
        if is_asynchronous(self.gradients.device) or stats.method == "published":
            return False
        # From the cheapest question to the dearest; the first that is answered with doubt ends it. A row that is not a
        # number, or without gradients, is not made better by float64.
        if not bool(stats.defect.isfinite().all() & (stats.grad_norm_a * stats.grad_norm_b > 0).all()):
            return False
        if not bool(stats.reliable.all()):
            return True
        if shared.given and bool((shared.changes[0] / shared.changes[1]).log().abs() > math.log(ALARM)):
            return True
        if shared.form not in self.origins:
            return True
        # A check speaks of where it was made: of gradients of that length, of parameters near those, of batches of that
        # magnitude. Ranks must decide alike, or one of them would wait for the others' evaluation for ever.
        (origin, before), now = self.origins[shared.form], self._whereabouts(shared)
        if bool((now[:2] / origin[:2]).log().abs().max() > math.log(CHANGED)):
            return True
        norm = self.gradients.partition.norm
        if bool(norm(now[2:] - origin[2:]) > MOVED * norm(origin[2:])):
            return True
        sizes = zip_longest(_magnitudes(shared.pair), before, fillvalue=0.0)
        return self.gradients.anywhere(any(size > GROWN * then for size, then in sizes))

    def _step(self, g_a: Tensor, g_b: Tensor) -> Tensor:
        """(1,) float64: eta, the same whichever batch comes first."""
        if self.eta != "auto":
            return torch.full((1,), self.eta, dtype=torch.float64, device=g_a.device)
        scale = AUTO_STEP * math.sqrt(torch.finfo(g_a.dtype).eps / torch.finfo(torch.float32).eps)
        theta = [p.detach() for p in self.gradients.model.parameters() if p.requires_grad]
        norm = self.gradients.partition.norm
        eta: Tensor = scale * norm(*theta) / (norm(g_a) * norm(g_b)).sqrt()
        return eta[None]

    def _segment_table(self) -> Tensor | None:
        """(S, 2) int64 on the CPU: the probe's segments, then the basis's support."""
        table = [(s.start, s.length) for s in self.segments] + (list(self.basis.support) if self.basis else [])
        return torch.tensor(table, dtype=torch.int64) if table else None

    def _stats(self, shared: _Shared, eta: Tensor, errors: Tensor, method: Method, keep_delta: bool) -> CommutatorStats:
        """What the kernel makes of the four vectors; ``errors`` (4,) are the lengths of theirs."""
        bracket = shared.form == "bracket"
        g_a, g_b, a2, b2 = shared.work
        out = ops.commutator(
            g_a[None],
            g_b[None],
            a2[None],
            b2[None],
            eta,
            form="bracket" if bracket else "difference",
            theta=None if bracket else self.gradients.flatten(shared.theta),
            values=self.basis.values if self.basis else None,
            rows=self.basis.rows if self.basis else None,
            segments=shared.segments,
            keep_delta=keep_delta,
        )
        sums, coefficients, energies = self.gradients.partition.all_reduce_sum(out.sums, out.coefficients, out.energies)
        aa, bb, ab, dd, ha, hb = sums[:, :6].unbind(1)
        shared.changes = ha[0].sqrt(), hb[0].sqrt()
        area = (aa * bb).sqrt()
        defect = dd.sqrt() / (eta.square() * area)
        # Rounding enters through the vectors that are subtracted, through the lengths that are divided by, and through
        # the directions of the steps; an error of a direction changes its difference, or product, in proportion.
        scale = area if bracket else eta * area
        rounding = errors[2:].norm() if bracket else errors.norm()
        n_a, n_b = errors[0] / aa.sqrt(), errors[1] / bb.sqrt()
        directions = torch.hypot(n_b * ha.sqrt(), n_a * hb.sqrt()) / scale
        lengths = defect * torch.hypot(n_a, n_b)
        floor = FLOOR_MARGIN * torch.hypot(torch.hypot(rounding / scale, directions), lengths)
        reference = torch.full_like(defect, math.nan)
        if not bracket:
            rounded, distance = sums[:, 6:8].sqrt().unbind(1)
            reference = rounded / (eta.square() * area + REFERENCE_GUARD)
            if method == "published":
                defect, floor = reference, floor + distance / (eta.square() * area)
        stats = CommutatorStats(
            method=method,
            eta=eta,
            defect=defect,
            grad_norm_a=aa.sqrt(),
            grad_norm_b=bb.sqrt(),
            grad_cosine=ab / area,
            grad_cosine_error=FLOOR_MARGIN * (n_a + n_b),
            bracket_norm=dd.sqrt() / eta.square(),
            noise_floor=floor,
            exact=torch.zeros_like(floor, dtype=torch.bool),
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


@dataclass
class _Shared:
    """What the pairs of one measurement share, and the pair that is its turn.

    Attributes:
        form: ``"difference"`` or ``"bracket"``.
        segments: (S, 2) int64, or None.
        work: (4, P), the vectors of one pair after another.
        scratch: memory for a point and one past a step, or for one of them in float64.
        pair, seeds: the two batches, and the seeds of their randomness.
        given: true for a pair whose first gradient was given, by training.
        changes: () how much the gradient on each batch has changed along the step.
    """

    form: str
    segments: Tensor | None
    work: Tensor
    scratch: Tensor
    pair: Pair = (None, None)
    seeds: tuple[int, int] = (0, 0)
    given: bool = False
    changes: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    @property
    def theta(self) -> Tensor:
        """(P,) where the parameters go; the next use of the scratch in float64 overwrites it."""
        return self.scratch[0, : self.work.shape[1]]

    @property
    def point(self) -> Tensor:
        """(P,) float64, in the memory of everything else in the scratch."""
        return self.scratch.view(-1).view(torch.float64)[: self.work.shape[1]]

    def memory(self, exact: Check | None) -> Tensor:
        """(P,) where a point past a step goes."""
        return self.scratch[1, : self.work.shape[1]] if exact is None else self.point

    def wanted(self, index: int, point: Tensor, check: Check | None) -> Wanted:
        """The gradient at a point that goes to this row: on A, on B, on A past a step, on B past a step."""
        return Wanted(point, self.pair[index % 2], self.work[index], self.seeds[index % 2], check and check.of(index))

    def unknown(self, value: float, columns: int | None = None) -> Tensor:
        """(4,) or (4, columns) float64: one row for each vector of a pair."""
        shape = (4,) if columns is None else (4, columns)
        return torch.full(shape, value, dtype=torch.float64, device=self.work.device)


def _lengths(engine: GradientEngine, rows: Tensor) -> Tensor:
    """(N,) float64"""
    return torch.stack([engine.partition.norm(row) for row in rows])


def _magnitudes(pair: Pair) -> list[float]:
    """Root mean squares of the tensors in two batches, in their order; the greater of the two."""
    return [max(both) for both in zip_longest(*map(_root_mean_squares, pair), fillvalue=0.0)]


def _root_mean_squares(batch: Any) -> Iterator[float]:
    """Of each tensor in a batch; zero where numbers are names, or not laid out one after another."""
    for tensor in Snapshot([batch]).tensors:
        least = 1 if tensor.is_floating_point() or tensor.is_complex() else FEW
        if tensor.is_nested or tensor.layout != torch.strided or tensor.dtype == torch.bool or tensor.numel() < least:
            yield 0.0
            continue
        values = (tensor.detach().abs() if tensor.is_complex() else tensor.detach()).to(torch.float32)
        size = float(torch.linalg.vector_norm(values, dtype=torch.float64)) / math.sqrt(tensor.numel())
        yield size if math.isfinite(size) else math.inf


def _note_batches(engine: GradientEngine, pair: Pair) -> None:
    """Say once that a batch commutes with itself, to those who measure it with itself."""
    a, b = (Snapshot([batch]).tensors for batch in pair)
    if pair[0] is pair[1] or (a and len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))):
        engine.note(
            "batches",
            False,
            "the two batches of a pair are one and the same, and a batch commutes with itself",
            "the defect is zero or NaN; with full batches give a sampler of parts of them: grokcurv.subsample, "
            "grokcurv.halves",
        )


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
