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
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from grokcurv import ops
from grokcurv.admission import Traits
from grokcurv.checks import GIVEN, Checks
from grokcurv.device_buffer import is_asynchronous
from grokcurv.evaluation import LOCK, Check, LossFn
from grokcurv.flat import Segment
from grokcurv.gradients import PIECE, Distributed, GradientEngine, Model, Strategy, repeated
from grokcurv.pairs import NumberedPair, PairOfRuns, Pairs, Sums, in_quadrature, rows_of
from grokcurv.pairs import Pair as Pair
from grokcurv.pairs import Sampler as Sampler
from grokcurv.reference import Form, compute_type
from grokcurv.state import Snapshot
from grokcurv.subspace import Subspace

Method = Literal["difference", "bracket", "published"]
METHODS: tuple[Method, ...] = ("difference", "bracket", "published")

RENAMED: dict[str, Method] = {"reference": "published"}
"""Methods by the names that they had."""

Design = Literal["independent", "chain"]
DESIGNS: tuple[Design, ...] = ("independent", "chain")

AUTO_STEP = 3e-6
"""``eta="auto"``: length of the step relative to the length of theta, for float32."""

RELIABLE_RATIO = 10.0
"""A defect is called reliable when it is at least this many times its noise floor."""

FLOOR_MARGIN = 3.0
"""How many times its estimated size the error vector is allowed; ``docs/numerics.md`` says why three."""

LAST_BITS = 1e4
"""Roundoffs by which two gradients of one float64 model may differ, relative to their length."""

PADDING = 16
"""Rows of scratch memory begin at multiples of so many numbers, for the kernels' sake."""

TOGETHER = 1 << 25
"""Bytes of a run's vectors up to which its pairs are evaluated together."""


@dataclass(frozen=True, eq=False)
class CommutatorStats:
    """What was measured, one entry per pair of batches. Tensors are float64 and live where the model's vectors do.

    ==========================  =======  ================  ===========================================================
    attribute                   shape    unit              what it is
    ==========================  =======  ================  ===========================================================
    ``method``                                             ``"difference"``, ``"bracket"`` or ``"published"``
    ``eta``                     (N,)     theta^2 / loss    step length of each pair
    ``defect``                  (N,)     1 / theta         ``D = |delta| / (|eta g_A| |eta g_B|)``
    ``noise_floor``             (N,)     1 / theta         predicted size of the error vector of delta due to rounding,
                                                           over the same; NaN if the probe does not estimate it
    ``reference``               (N,)     1 / theta         the defect by the published float32 formula, from gradients
                                                           in the model's own precision (NaN for ``"bracket"``)
    ``exact``                   (N,)     bool              whether the pair was evaluated in float64
    ``grad_norm_a``, ``_b``     (N,)     loss / theta      ``|g_A|``, ``|g_B|``
    ``grad_cosine``             (N,)     1                 of the angle between the two gradients
    ``grad_cosine_error``       (N,)     1                 bounds its error
    ``bracket_norm``            (N,)     loss^2 / theta^3  ``|delta| / eta^2``; the length of ``H_B g_A - H_A g_B``,
                                                           exactly so for ``"bracket"``
    ``delta``                   (N, P)   theta             in the order of ``model.parameters()``
    ``parallel``, ``residual``  (N,)     theta             lengths of the parts of delta inside and outside the basis
    ``coefficients``            (N, K)   theta             inner products of delta with the basis
    ``support``                 (N,)     theta             length of delta on the coordinates where the basis lives
    ``energies``                (N, S)   theta^2           squared length of delta on each of the probe's segments
    ``product_norm_a``, ``_b``  (N,)     loss^2 / theta^3  ``|H_A g_B|``, ``|H_B g_A|``, of the two vectors whose
                                                           difference is the bracket: exactly so for ``"bracket"``, to
                                                           first order in eta otherwise
    ``product_error_a``,        (N,)     loss^2 / theta^3  lengths that rounding may have given to their errors
    ``_b``
    ``rayleigh_a``, ``_b``      (N,)     loss / theta^2    ``g_B' H_A g_B / |g_B|^2``, ``g_A' H_B g_A / |g_A|^2``,
                                                           likewise
    ==========================  =======  ================  ===========================================================

    What needs a basis, segments, ``anatomy`` or ``keep_delta`` is None without.
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
    product_norm_a: Tensor | None = None
    product_norm_b: Tensor | None = None
    product_error_a: Tensor | None = None
    product_error_b: Tensor | None = None
    rayleigh_a: Tensor | None = None
    rayleigh_b: Tensor | None = None

    @cached_property
    def reliable(self) -> Tensor:
        """(N,) whether rounding can be ruled out: ``noise_floor <= defect / 10``. Says nothing of the finite eta.

        A defect that is zero, infinite or NaN never is.
        """
        number = (self.defect > 0) & (self.defect < math.inf)
        return number & (self.noise_floor <= self.defect / RELIABLE_RATIO)

    def median(self) -> Tensor:
        """Median of the defect over the pairs: a scalar, NaN if any pair is."""
        return self.quantile(0.5)

    def quantile(self, q: float) -> Tensor:
        """Quantile ``q`` of the defect over the pairs, linearly interpolated: a scalar, NaN if any pair is."""
        return torch.quantile(self.defect, q)

    def __len__(self) -> int:
        return len(self.defect)

    def __getitem__(self, rows: slice) -> CommutatorStats:
        """Some of the pairs."""
        return self.each(lambda x: x[rows])

    def each(self, change: Callable[..., Tensor], *others: CommutatorStats) -> CommutatorStats:
        """With each of its tensors changed; ``change`` gets that of the others beside it."""
        names = (f.name for f in fields(self) if isinstance(getattr(self, f.name), Tensor))
        changed: dict[str, Any] = {x: change(*(getattr(stats, x) for stats in (self, *others))) for x in names}
        return replace(self, **changed)


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
    Pairs are streamed: beyond the model's own, at most six vectors of P are alive whatever the number of pairs is, and
    one parameter's gradient on its way to them, or all of it up to 2^20 parameters (a kept ``delta`` aside; eight and a
    half in float64 brackets, at admission, in a check, and in every pair of a loss with kinks: autograd has a part of
    each parameter's product early and the other late); short vectors, of several pairs, are evaluated together, in at
    most 32 MB for each run. ``errors`` holds what the latest check of each run has found, by the form it was made for:
    (R, 2, 2), the greatest absolute and relative error of the two gradients at theta, and of the two other vectors; and
    ``errors["given"]`` how far a gradient that was given was from that in float64.

    A loss with kinks (ReLU, max-pooling: :meth:`grokcurv.gradients.GradientEngine.is_nonsmooth`) is evaluated in
    float64 throughout, and its gradients are rounded afterwards: near a kink the rounding of an evaluation may switch a
    unit, which changes one gradient of the four by a jump that no check of others shows. A ``first_gradient`` is not
    used.

    With the losses ``(w'a)^2 / 2`` and ``(w'b)^2 / 2`` the bracket is ``(a'b) ((w'a) b - (w'b) a)``, here w turned by a
    right angle:

    >>> import torch, grokcurv as gc
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> loss_fn = lambda model, x: 0.5 * model(x).square().sum()
    >>> probe = gc.CommutatorProbe(model, loss_fn, method="bracket")
    >>> stats = probe.measure([(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0]))])
    >>> (stats.bracket_norm / model.weight.norm()).round(decimals=5).tolist()
    [1.0]

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
        anatomy: also say what the bracket is the difference of: ``product_norm_a`` and so on. No gradient more; two
            passes over two of the four vectors.
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
        anatomy: bool = False,
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
        self.checks = Checks(self.gradients)
        self._refresh: Callable[[], object] | None = None
        self.basis = basis
        self.segments, self.anatomy = segments or (), anatomy

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
        """What the latest checks have found, and where; of several runs, for the first."""
        return self.checks.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.checks.load_state_dict(state)

    @property
    def errors(self) -> dict[str, Tensor]:
        """What the latest checks have found: :class:`grokcurv.checks.Checks`."""
        return self.checks.errors

    @property
    def basis(self) -> Subspace | None:
        """The subspace on which every ``delta`` is projected; may be replaced between measurements.

        Of several runs, that of the first.
        """
        return self.bases[0] if self.bases else None

    @basis.setter
    def basis(self, basis: Subspace | None) -> None:
        self._basis = None if basis is None else self._fitting(basis)

    @property
    def bases(self) -> tuple[Subspace, ...]:
        """For each run its subspace; none if there is none."""
        if self._refresh is not None:
            self._refresh()
        return () if self._basis is None else tuple(map(self._basis.of, range(self.gradients.runs)))

    def follow(self, refresh: Callable[[], object]) -> None:
        """Have ``refresh`` called before bases are looked at: it may :meth:`update_bases`."""
        self._refresh = refresh

    def update_bases(self, bases: Subspace) -> None:
        """Go on with later bases, those of all runs in one; on an accelerator in the memory of those before.

        A captured measurement looks for them there. Bases that were given are not to be overwritten: use this where the
        ones before are nobody else's.
        """
        if is_asynchronous(self.gradients.device) and self._basis is not None:
            self._basis.values.copy_(bases.values)
        else:
            self._basis = self._fitting(bases)

    def _fitting(self, basis: Subspace) -> Subspace:
        """The basis where this probe's vectors are, in the dtype that it computes in."""
        if basis.size != self.gradients.size:
            raise ValueError(f"basis lives in R^{basis.size}, the model has P = {self.gradients.size} parameters")
        return basis.to(self.gradients.device, compute_type(self.gradients.dtype))

    def keep(self, runs: list[int]) -> None:
        """Go on with these runs alone, renumbered in this order, as the engine does."""
        self._basis = self._basis.of(runs) if self._basis else None
        self.checks.keep(runs)

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
        if first_gradient is not None and first_gradient.shape != (self.gradients.size,):
            raise ValueError(
                f"first_gradient must have shape ({self.gradients.size},), got {tuple(first_gradient.shape)}"
            )
        return self.measure_runs(
            (([a], [b]) for a, b in _take(source, pairs)),
            keep_delta=keep_delta,
            method=method,
            first_gradients=() if first_gradient is None else (self.gradients.place.bring(first_gradient)[None],),
            design=design,
            check=check,
            seed=seed,
        )

    def measure_runs(
        self,
        source: Iterable[PairOfRuns],
        runs: Sequence[int] | None = None,
        *,
        keep_delta: bool = False,
        method: Method | None = None,
        first_gradients: Sequence[Tensor] = (),
        design: Design = "independent",
        check: bool = True,
        seed: int = 0,
    ) -> CommutatorStats:
        """:meth:`measure` for an engine of several runs: row ``k R + r`` is pair k of run r.

        Args:
            source: K pairs, each of R batches and R batches.
            runs: which of the engine's runs are measured, R of them; all by default.
            first_gradients: (R, P), as ``first_gradient``; or this and that on the first pair's second batches.
            keep_delta, method, design, check, seed: as for :meth:`measure`.
        """
        engine = self.gradients
        method = current_method(method) if method else self.method
        if design not in DESIGNS:
            raise ValueError(f"design must be one of {', '.join(DESIGNS)}, got {design!r}")
        # The first use of a given gradient is always held against float64, whatever check_every says: an error there is
        # one of what the user passes (another loss, a clipped gradient), which no rounding explains.
        form: Form = "bracket" if method == "bracket" else "difference"
        uncompared = first_gradients and form == "difference" and GIVEN not in self.checks.errors
        check = self.noise_floor and (check or form not in self.checks.errors or bool(uncompared))
        runs = tuple(range(engine.runs) if runs is None else runs)
        chained = design == "chain"
        pairs: Pairs | None = None
        rows: list[CommutatorStats] = []
        # All is done outside the caller's torch.autocast, which would round what is computed from the gradients; a
        # loss_fn that is to be evaluated under it enters it itself.
        numbered = enumerate(_linked(source) if chained else source)
        # So many pairs of each run are evaluated together: one where vectors are long, which are streamed.
        together = max(1, TOGETHER // (7 * engine.size * engine.dtype.itemsize))
        with engine.place.without_autocast(), LOCK, torch.inference_mode(False):
            # A pair that is checked comes first and alone: the others are judged by what it shows.
            while taken := list(islice(numbered, 1 if check and not rows else together)):
                with engine.evaluator.session():  # nobody else changes the model until the pairs are done
                    for traits, those in self._admitted(form, taken, chained, seed):
                        engine.traits = traits
                        first = those[0].number == 0
                        # The gradient at theta on the batch in the middle of a chain is the second of the pair before:
                        # this is the one gradient in four that a chain saves.
                        linked = (pairs.ends,) if chained and pairs is not None and form == "difference" else ()
                        known = first_gradients if first else linked
                        while True:
                            generation = engine.evaluator.generation
                            pairs = self._prepare(form, runs, those, chained, pairs)
                            found = self._measured(pairs, method, keep_delta, known, first and check)
                            if generation == engine.evaluator.generation:
                                break
                            # The model was seen to do what it had not done before, such as to draw: what was computed
                            # before that, or was given, may not be of one function with what came after.
                            known = ()
                        rows += found
        if not rows:
            raise ValueError("source gave no pair of batches to measure")
        return rows[0] if len(rows) == 1 else rows[0].each(lambda *parts: torch.cat(parts), *rows[1:])

    def admit(self, pair: PairOfRuns, *, seed: int = 0, brackets: bool = False) -> None:
        """Find out how the model is to be evaluated, as the first measurement of a pair does, and measure nothing.

        Args:
            pair: a batch of each run, and another; the first is looked at.
            seed: as for :meth:`measure`.
            brackets: look at second derivatives too, as the first bracket does.
        """
        engine = self.gradients
        with engine.place.without_autocast(), LOCK, torch.inference_mode(False), engine.evaluator.session():
            engine.admit(pair[0][0], seed=2 * seed, exact=self.noise_floor, brackets=brackets)

    def _admitted(
        self, form: Form, taken: Sequence[tuple[int, PairOfRuns]], chained: bool, seed: int
    ) -> list[tuple[Traits, list[NumberedPair]]]:
        """The pairs, those of one structure in a row together, with how it is evaluated."""
        # brackets: true for bracket rows that are to be vouched for; others need no second derivatives, or are called
        # unreliable anyway.
        brackets = form == "bracket" and self.noise_floor
        groups: list[tuple[Traits, list[NumberedPair]]] = []
        for index, (a, b) in taken:
            # Seeds belong to batches, not to pairs: in a chain the batch that ends one pair begins the next one, and
            # must meet the same masks in both.
            first = 2 * seed + index if chained else 2 * (seed + index)
            for pair in zip(a, b, strict=True):
                _note_batches(self.gradients, pair)
            traits = self.gradients.admit(a[0], seed=first, exact=self.noise_floor, brackets=brackets)
            if not groups or groups[-1][0] is not traits:
                groups.append((traits, []))
            groups[-1][1].append(NumberedPair(index, (a, b), (first, first + 1)))
        return groups

    def _prepare(
        self, form: Form, runs: tuple[int, ...], those: list[NumberedPair], chained: bool, before: Pairs | None
    ) -> Pairs:
        """Memory for some pairs, that of the ones before if it fits: four vectors for each, and a scratch for one point
        in float64, or for as many as there are in the model's own precision, beyond the model's own."""
        engine, vectors = self.gradients, len(those) * len(runs)
        if before is not None and before.work.shape[1] == vectors:
            return replace(before, those=those, begun=0, given=0)
        wide = torch.finfo(torch.float64).bits // torch.finfo(engine.dtype).bits if self.noise_floor else 1
        points = 1 if form == "bracket" else 2  # products are taken where the gradients are, without a step
        padded = -(-engine.size // PADDING) * PADDING
        work = torch.empty(4, vectors, engine.size, dtype=engine.dtype, device=engine.device)
        scratch = torch.empty(max(points, wide), padded, dtype=engine.dtype, device=engine.device)
        return Pairs(form, self._segment_table(), runs, those, chained, work, scratch)

    def _measured(
        self, pairs: Pairs, method: Method, keep_delta: bool, known: Sequence[Tensor], check: bool
    ) -> list[CommutatorStats]:
        """The rows of some pairs, in the model's own precision, and in float64 where that is due, or in doubt."""
        engine, traits, runs = self.gradients, self.gradients.traits, len(pairs.runs)
        if pairs.form == "bracket" and engine.brackets and traits.brackets is False:
            pairs.work.fill_(math.nan)
            eta, errors = self._step(pairs), pairs.unknown(math.inf)
            return [self._stats(pairs, self._sums(pairs, eta, keep_delta), errors, method)]
        # floored: true where float64 can be evaluated, all of it, and the model repeats itself; only then has a row a
        # floor. exactly: true for losses with kinks, all of whose rows are evaluated in float64, since one unit that
        # rounding switches moves a gradient by a jump; what training has computed is no good there.
        floored = self.noise_floor and traits.exact and traits.trusted
        exactly = floored and traits.nonsmooth and engine.dtype != torch.float64
        pairs.given = len(known) if pairs.those[0].number == 0 else 0
        pairs.begun = 0 if exactly and pairs.given else len(known)
        for row, gradients in zip(pairs.work, known[: pairs.begun], strict=False):
            row[:runs].copy_(gradients)
        if exactly:
            rows = []
            for v in range(len(pairs)):
                one = pairs.part(v, v + 1)
                if pairs.chained and v >= runs:
                    one.work[0].copy_(pairs.work[1, v - runs : v - runs + 1])
                    one.begun = 1
                rows.append(self._certified(one, method, keep_delta, check and v < runs))
            return rows
        # First the four vectors in the model's own precision, as the user's training has them. A row of these, with
        # errors as the latest check found them, is all, unless a check is due or something in the row says that the
        # latest one does not speak of it.
        eta, due = self._evaluated(pairs), check and floored
        sums = self._sums(pairs, eta, keep_delta and not due)
        published = sums.published
        done: dict[int, CommutatorStats] = {}
        if not due:
            if floored:
                errors = self.checks.expected(pairs)
            else:
                errors = pairs.unknown(math.inf if self.noise_floor else math.nan)
            stats = self._stats(pairs, sums, errors, method)
            doubtful = self._doubtful(pairs, stats, sums) if floored else [False]
            if not any(doubtful):
                return [stats]
            done = {v: stats[v : v + 1] for v, doubt in enumerate(doubtful) if not doubt}
            del stats
        del sums  # and a delta
        # Then the same four in float64, along the float32 directions: the row that comes out is the better one, and its
        # error is known, not predicted.
        together = len(pairs) if due and engine.strategy == "vmap" else 1
        for v in range(0, len(pairs), together):
            if v not in done:
                part = replace(pairs.part(v, v + together), begun=0)
                done[v] = self._certified(part, method, keep_delta, check, published[v : v + together])
        return [done[v] for v in sorted(done)]

    def _certified(
        self, pairs: Pairs, method: Method, keep_delta: bool, check: bool, published: Tensor | None = None
    ) -> CommutatorStats:
        """The rows of pairs that are evaluated in float64, all four vectors held part by part against what is there.

        ``published`` are their defects by the published formula; None for losses with kinks, of which nothing is there.
        """
        engine, traits, exactly = self.gradients, self.gradients.traits, published is None
        # keep: true for what is reported in the model's own precision, as the published formula is, and so is what only
        # a twin can check.
        keep = (method == "published" or not engine.certifies) and not exactly
        found = pairs.unknown(0.0, 3)
        along = check and not exactly and engine.strategy == "vmap" and pairs.form == "difference"
        # wide: true for float64 models, whose own evaluation is the exact one. They have nothing better to be held
        # against: only a gradient that was given is computed again, and may differ in its last bits.
        wide = engine.dtype == torch.float64
        if wide and not traits.widened:
            if pairs.given:
                self._gradients(pairs, self._thetas(pairs), range(pairs.given), Check(found))
                found[pairs.given, :, 0] = LAST_BITS * torch.finfo(torch.float64).eps * found[0, :, 1]
                self.checks.compare_given(pairs, found)
            eta = self._step(pairs)
        else:
            eta = self._evaluated(pairs, Check(found, keep), along)
            if pairs.given and pairs.form == "difference" and not exactly:
                self.checks.compare_given(pairs, found)
        sums = self._sums(pairs, eta, keep_delta)
        # What was found becomes the errors of these pairs, and the expectation for those that are not checked.
        errors = self.checks.learn(pairs, found, check, exactly, keep, self._sampled)
        # Steps along gradients of the model's own precision have gone astray by as much as those were off.
        steps = torch.maximum(errors[:2], found[:2, :, 0]) if along else None
        stats = self._stats(pairs, sums, errors, method, steps, exact=True)
        if exactly and not check and any(self._doubtful(pairs, stats, sums)):
            errors = self.checks.learn(pairs, found, True, exactly, keep, self._sampled)
            stats = self._stats(pairs, sums, errors, method, exact=True)
        # The published formula is one of the model's own precision throughout.
        return stats if published is None or method == "published" else replace(stats, reference=published)

    def _doubtful(self, pairs: Pairs, stats: CommutatorStats, sums: Sums) -> list[bool]:
        """For each pair, whether the latest check is not enough for it; of the published formula nobody asks."""
        if stats.method == "published":
            return [False] * len(pairs)
        return self.checks.doubtful(pairs, sums, stats.defect, stats.reliable)

    def _evaluated(self, pairs: Pairs, exact: Check | None = None, along: bool = False) -> Tensor:
        """Fill the four vectors of all pairs; (N,) the steps' lengths."""
        return self._brackets(pairs, exact) if pairs.form == "bracket" else self._differences(pairs, exact, along)

    def _differences(self, pairs: Pairs, exact: Check | None, along: bool) -> Tensor:
        """g_A and g_B at theta, g_A past a step along g_B, g_B past one along g_A.

        ``along``: the steps are along the gradients that are there already, so that all four are one program.
        """
        (g_a, g_b, _, _), runs = pairs.work, len(pairs.runs)
        if not along:
            self._gradients(pairs, self._thetas(pairs, exact), range(2), exact)
        if exact is not None and pairs.begun:  # the end of the pair before, found as this one's was
            exact.found[0] = exact.found[1]
        if pairs.chained and len(pairs) > runs:
            g_a[runs:].copy_(g_b[:-runs])
        eta = self._step(pairs)
        # H_A g_B comes from the gradient on A past a step along g_B, and the other way round: the two steps cross.
        if self.gradients.strategy == "vmap":
            which = range(0 if along else 2, 4)
            self._gradients(pairs, self._points(pairs, eta, exact, len(which)), which, exact)
            return eta
        # One after the other, in memory for one.
        for index, direction in ((2, 1), (3, 0)):
            batches, seeds = pairs.batches(index % 2), pairs.seeds(index % 2)
            for v, (batch, seed) in enumerate(zip(batches, seeds, strict=True)):
                point = self._point(pairs.part(v, v + 1), direction, eta[v : v + 1], exact)
                check = exact and exact.of((index, v))
                self.gradients.gradient(point, batch, pairs.work[index, v], seed=seed, check=check)
        return eta

    def _gradients(self, pairs: Pairs, points: Tensor, which: range, exact: Check | None) -> None:
        """Gradients at points (a row of R, or one for each vector), into these of the four vectors of each pair."""
        whole, wanted = slice(0, len(pairs)), [(index % 2, pairs.wanted(index)) for index in which]
        batches, seeds = ([x for ab, place in wanted for x in of(ab)[place]] for of in (pairs.batches, pairs.seeds))
        blocks = [(slice(index, index + 1), place) for index, (_, place) in zip(which, wanted, strict=True)]
        if all(place == whole for _, place in blocks):  # one delivery
            blocks = [(slice(which.start, which.stop), whole)]
        out = [pairs.work[block].view(-1, pairs.work.shape[2]) for block in blocks]
        checks = [exact and replace(exact, found=exact.found[block].view(-1, 3)) for block in blocks]
        self.gradients.gradients(points, batches, out, seeds=seeds, checks=checks)

    def _thetas(self, pairs: Pairs, exact: Check | None = None) -> Tensor:
        """(R, P) the parameters, in float64 for a check; in the scratch if they are of one run."""
        return self.gradients.thetas(pairs.runs, pairs.theta if exact is None else pairs.point)

    def _points(self, pairs: Pairs, eta: Tensor, exact: Check | None, count: int) -> Tensor:
        """``theta - eta g_B`` and ``theta - eta g_A``, rounded as the parameters are, or as good as not.

        Two blocks (N, P), or the last of four in float64, the others of which are theta.
        """
        thetas, n = self._thetas(pairs, exact), len(pairs)
        directions = pairs.work[1], pairs.work[0]
        if exact is not None:
            points = thetas.repeat(count * len(pairs.those), 1)
            for past, along in zip(points[-2 * n :].split(n), directions, strict=True):
                past.sub_(eta[:, None] * along)
            return points
        points, thetas = thetas.new_empty(2 * n, thetas.shape[1]), self._spread(thetas, n)
        for past, along in zip(points.split(n), directions, strict=True):
            ops.perturb(thetas, along, eta, out=past)
        return points

    def _point(self, pairs: Pairs, direction: int, eta: Tensor, exact: Check | None) -> Tensor:
        """(P,) the same of one pair alone, in the scratch."""
        theta, along = self._thetas(pairs, exact), pairs.work[direction]
        if exact is not None:
            for piece, step in zip(theta.split(PIECE, 1), along.split(PIECE, 1), strict=True):
                piece.sub_(eta * step)
            return theta[0]
        return ops.perturb(theta[0], along, eta, out=pairs.past)[0]

    @staticmethod
    def _spread(rows: Tensor, count: int) -> Tensor:
        """(P,) what all vectors share, or (count, P), a row for each, of the rows (R, P) of all runs."""
        return rows[0] if len(rows) == 1 else repeated(rows, count).contiguous()

    def _brackets(self, pairs: Pairs, exact: Check | None) -> Tensor:
        """g_A, g_B, H_A g_B and H_B g_A at the parameters."""
        engine, thetas = self.gradients, self._thetas(pairs, exact)
        self._gradients(pairs, thetas, range(1), exact)
        batches, seeds = (list(zip(of(0), of(1), strict=True)) for of in (pairs.batches, pairs.seeds))
        for v, ((a, b), (seed_a, seed_b)) in enumerate(zip(batches, seeds, strict=True)):
            g_a, g_b, h_a, h_b = pairs.work[:, v]
            theta = thetas[v % len(thetas)]
            engine.product(theta, b, g_a, g_b, h_b, seed_b, exact and exact.of((slice(1, 4, 2), v)))
            engine.product(theta, a, g_b, None, h_a, seed_a, exact and exact.of((slice(2, 3), v)))
        return self._step(pairs)

    def _sampled(self, pairs: Pairs, lost: Tensor, often: int) -> Tensor:
        """(4,) how far one pair's evaluations move when float64's rounding errors are made larger at random.

        They are held against vectors that may have been rounded to the model's precision, and have ``lost`` (4,) by it.
        The farthest of so many times.
        """
        shake = torch.Generator(self.gradients.device).manual_seed(pairs.those[0].seeds[0])
        return torch.stack([self._moved(pairs, lost, shake) for _ in range(often)]).amax(0)

    def _moved(self, pairs: Pairs, lost: Tensor, shake: torch.Generator) -> Tensor:
        """:meth:`_sampled`, once."""
        engine, seeds, (pair,) = self.gradients, pairs.those[0].seeds, pairs.those
        moved = pairs.unknown(0.0, 3)
        theta = engine.shake_(self._thetas(pairs, Check(moved))[0], shake)
        check = Check(moved, keep=True, shake=shake)
        if pairs.form == "bracket":
            (a,), (b,) = pair.batches
            g_a, g_b, h_a, h_b = pairs.work[:, 0]
            engine.product(theta, b, g_a, g_b, h_b, seeds[1], check.of((slice(1, 4, 2), 0)))
            engine.product(theta, a, g_b, g_a, h_a, seeds[0], check.of((slice(0, 4, 2), 0)))
        else:
            self._gradients(replace(pairs, begun=0), theta[None], range(2), check)
        # The evaluations were held against vectors that have lost something in rounding; that much of the distance is
        # not of the evaluation.
        noise = (moved[:, 0, 0].square() - lost.square()).clamp_min(0.0).sqrt().nan_to_num(nan=math.inf)
        if pairs.form == "difference":
            noise[2:] = noise[:2]
        return noise

    def _step(self, pairs: Pairs) -> Tensor:
        """(N,) float64: eta, the same whichever batch comes first."""
        if self.eta != "auto":
            return torch.full((len(pairs),), self.eta, dtype=torch.float64, device=pairs.work.device)
        scale = AUTO_STEP * math.sqrt(torch.finfo(pairs.work.dtype).eps / torch.finfo(torch.float32).eps)
        n_a, n_b = (self.gradients.partition.norms(rows) for rows in pairs.work[:2])
        theta = self.gradients.theta_norms(pairs.runs).repeat(len(pairs.those))
        return scale * theta / (n_a * n_b).sqrt()

    def _segment_table(self) -> Tensor | None:
        """(S, 2) int64 on the CPU: the probe's segments, then the basis's support, but for what is in pieces."""
        support = self.basis.support if self.basis and not self.basis.scattered else ()
        table = [*((s.start, s.length) for s in self.segments if not s.pieces), *support]
        return torch.tensor(table, dtype=torch.int64) if table else None

    def _sums(self, pairs: Pairs, eta: Tensor, keep_delta: bool) -> Sums:
        """What the kernel makes of the four vectors."""
        g_a, g_b, a2, b2 = pairs.work
        out = ops.commutator(
            g_a,
            g_b,
            a2,
            b2,
            eta,
            form=pairs.form,
            theta=None if pairs.form == "bracket" else self._spread(self._thetas(pairs), len(pairs)),
            values=self._basis_values(pairs),
            rows=self._basis.rows if self._basis else None,
            segments=pairs.segments,
            keep_delta=keep_delta,
        )
        own = [out.sums, out.coefficients, self._with_pieces(out.energies, pairs, eta)]
        own += self._inner(pairs) if self.anatomy else ()
        sums, coefficients, energies, *inner = self.gradients.partition.all_reduce_sum(*own)
        return Sums(eta, sums, coefficients, energies, out.delta if keep_delta else None, *inner)

    @staticmethod
    def _inner(pairs: Pairs) -> list[Tensor]:
        """(2, N) float64: inner products of the third vectors with the second, and of the fourth with the first."""
        count, size = pairs.work.shape[1:]
        spans = torch.tensor([(v * size, size) for v in range(count)])
        g_a, g_b, a2, b2 = (rows.reshape(1, -1) for rows in pairs.work)
        return [torch.stack([ops.gram(*two, segments=spans)[:, 0, 0] for two in ((g_b, a2), (g_a, b2))])]

    def _with_pieces(self, energies: Tensor, pairs: Pairs, eta: Tensor) -> Tensor:
        """(N, S) the energies that the kernel found, and those on segments in pieces, each in its place."""
        # A matrix has as many pieces of its columns as rows, and the kernel keeps a sum of each chunk for each segment.
        basis, columns = self.basis, iter(energies.unbind(1))
        if not any(s.pieces for s in self.segments) and not (basis and basis.scattered):
            return energies
        own = [self._energy(pairs, eta, s.intervals) if s.pieces else next(columns) for s in self.segments]
        if basis and basis.scattered:
            return torch.stack([*own, self._energy(pairs, eta, basis.support)], 1)
        return torch.stack([*own, *columns], 1)

    def _energy(self, pairs: Pairs, eta: Tensor, intervals: Sequence[tuple[int, int]]) -> Tensor:
        """(N,) float64 squared length of delta on some intervals."""

        def packed(rows: Tensor) -> Tensor:
            return torch.cat([rows[:, start : start + length] for start, length in intervals], 1).double()

        g_a, g_b, a2, b2 = map(packed, pairs.work)
        eta = eta[:, None].to(g_a)
        delta = eta.square() * (b2 - a2) if pairs.form == "bracket" else eta * ((a2 - g_a) - (b2 - g_b))
        count, length = delta.shape
        rows = torch.tensor([(row * length, length) for row in range(count)])
        return ops.gram(delta.view(1, -1), segments=rows)[:, 0, 0]

    def _basis_values(self, pairs: Pairs) -> Tensor | None:
        """(n,) the values of the basis that all pairs share, or (N, n)."""
        values = self._basis.values if self._basis else None
        if values is None or values.ndim == 1:
            return values
        return self._spread(rows_of(values, pairs.runs), len(pairs))

    def _stats(
        self, pairs: Pairs, sums: Sums, errors: Tensor, method: Method, steps: Tensor | None = None, exact: bool = False
    ) -> CommutatorStats:
        """The statistics of N pairs, with their noise floors, from sums over their gradients.

        Args:
            pairs: the N pairs.
            sums: norms and inner products of each pair's four gradients and of what they come to.
            errors: (4, N) norms of what rounding may have done to those four.
            method: whose formula gives the defect.
            steps: (2, N) the same of the vectors that weights were moved along; the first two of ``errors`` if None.
            exact: whether the pairs were evaluated in float64.
        """
        bracket = pairs.form == "bracket"
        eta, area, lengths, unit = sums.eta, sums.area, sums.lengths, sums.unit
        defect, changes = lengths[3] / unit, lengths[4:6]
        # Rounding enters through the vectors that are subtracted, through the lengths that are divided by, and through
        # the directions of the steps; an error of a direction changes its difference, or product, in proportion.
        scale = area if bracket else eta * area
        rounding = in_quadrature(errors[2:] if bracket else errors)
        relative = errors[:2] / lengths[:2]
        turned = (relative if steps is None else steps / lengths[:2]).flip(0)  # what each difference is along
        directions = in_quadrature(turned * changes) / scale
        parts = torch.stack([rounding / scale, directions, defect * in_quadrature(relative)])
        floor = FLOOR_MARGIN * in_quadrature(parts)
        if method == "published":
            defect, floor = sums.published, floor + lengths[7] / unit
        energies, count = sums.energies, len(self.segments)
        stats = CommutatorStats(
            method=method,
            eta=eta,
            defect=defect,
            grad_norm_a=lengths[0],
            grad_norm_b=lengths[1],
            grad_cosine=sums.sums[:, 2] / area,
            grad_cosine_error=FLOOR_MARGIN * (relative[0] + relative[1]),
            bracket_norm=lengths[3] / eta.square(),
            noise_floor=floor,
            exact=torch.full_like(floor, exact, dtype=torch.bool),
            reference=sums.published,
            energies=energies[:, :count] if count else None,
            delta=sums.delta,
        )
        if sums.inner is not None:
            stats = replace(stats, **self._products(sums, errors, turned, bracket))
        if not self._basis:
            return stats
        inside = sums.coefficients.square().sum(1)
        return replace(
            stats,
            parallel=inside.sqrt(),
            residual=(sums.sums[:, 3] - inside).clamp_min(0).sqrt(),
            coefficients=sums.coefficients,
            support=energies[:, count:].sum(1).sqrt(),
        )

    @staticmethod
    def _products(sums: Sums, errors: Tensor, directions: Tensor, bracket: bool) -> dict[str, Any]:
        """H_A g_B and H_B g_A: lengths, the lengths of their errors, and their parts along g_B and g_A.

        ``directions`` (2, N) are the relative errors of what they are along.
        """
        assert sums.inner is not None
        products, inner, rounding = sums.lengths[4:6], sums.inner, errors[2:]
        if not bracket:
            # The change past a step is -eta times the product, to first order. Its part along the step is a difference
            # of two inner products in float64: they round too, which counts where the vectors are float64 themselves.
            summing = torch.finfo(torch.float64).eps * sums.lengths[:2]
            products, inner = products / sums.eta, (sums.sums[:, 2] - inner) / sums.eta
            rounding = in_quadrature(torch.stack([errors[:2], rounding, summing])) / sums.eta
        rounding = FLOOR_MARGIN * in_quadrature(torch.stack([rounding, directions * products]))
        along = inner / sums.sums[:, :2].T.flip(0)
        found = {"product_norm": products, "product_error": rounding, "rayleigh": along}
        return {f"{name}_{batch}": row for name, rows in found.items() for batch, row in zip("ab", rows, strict=True)}


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
    """The first ``pairs`` of an iterable, all if None; or as many calls of a sampler."""
    if pairs is not None and pairs < 1:
        raise ValueError(f"pairs must be at least 1, got {pairs}")
    if not callable(source):
        return islice(source, pairs)
    if pairs is None:
        raise ValueError("pairs must be given when the pairs are drawn by a function")
    return (source() for _ in range(pairs))


def _linked(source: Iterable[PairOfRuns]) -> Iterator[PairOfRuns]:
    """The pairs of a chain; ValueError for one with a gap."""
    end: Sequence[Any] | None = None
    for index, pair in enumerate(source):
        if end is not None and any(first is not last for first, last in zip(pair[0], end, strict=True)):
            raise ValueError(f"source: pair {index} of a chain must begin with the batch that ended pair {index - 1}")
        end = pair[1]
        yield pair
