"""Curvature of a training run, measured while it runs: what to measure when, and the records of it."""

from __future__ import annotations

import math
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from grokcurv.admission import Finding
from grokcurv.budget import FIELDS as BUDGET_FIELDS
from grokcurv.budget import Budget
from grokcurv.commutator import DESIGNS, METHODS, RENAMED, CommutatorProbe, Design, Method
from grokcurv.device_buffer import DeviceBuffer, capturing
from grokcurv.evaluation import LossFn, isolated
from grokcurv.flat import attention_parameters
from grokcurv.gradients import Model, Strategy
from grokcurv.lookahead import Kept, Later, Memory, version, with_next
from grokcurv.measures.base import Measure
from grokcurv.measures.commutator import ALIGNMENT_FIELDS, CHECK_EVERY, FIELDS, REFERENCE_FIELDS, Commutator, Plan
from grokcurv.measures.training_gradient import CONFIRMED, REFUTED, USED, Gradient, TrainingGradient
from grokcurv.measures.trajectory import Trajectory, no_records
from grokcurv.pairs import Pair, PairOfRuns, Sampler
from grokcurv.pca import StreamingPCA
from grokcurv.state import ReferencedError, Snapshot

if TYPE_CHECKING:
    import pandas as pd

    from grokcurv.loggers import Logger

HEAD = ("step", "method", "measure_seconds", "gradient")
"""What stands before the fields in a row of numbers; the method by its place among the methods."""


class CurvatureMonitor:
    """Measures commutator defects and the trajectory's PCA along a training loop, and changes nothing in it.

    Call :meth:`step` once per training step, after ``backward`` and before clipping and the optimiser. Without a
    ``sampler`` the pair is (this batch, next batch), and the gradient that training has just left in ``.grad`` may
    serve as the first of its four gradients: see ``gradient``. With a ``sampler`` every measurement draws its own
    pairs and ``.grad`` is not read. ``docs/own-loop.md`` goes through mixed precision, accumulation, dropout and so on.

    A measurement whose difference form drowns in rounding is repeated as the exact bracket, and the row's
    ``method`` says so; a row that neither can vouch for is NaN. The published float32 formula is recorded beside it
    (``reference_median``), from the same gradients.

    The float64 gradients behind the noise floor cost more than a pair of batches does, so that measurements of nearby
    steps share them: see ``check_every``.

    On an accelerator nothing waits. A row that turns out unreliable is NaN there instead of being repeated; two
    measurements later the host knows of it, and from then on measures the bracket. :meth:`step` can be captured in a
    CUDA graph, once a step was measured without: a captured step measures whatever ``every`` says, each replay adds a
    record and counts as a step, and the PCA is fed by :meth:`feed`, between replays.

    >>> import torch, grokcurv as gc
    >>> model, loader = torch.nn.Linear(3, 2), [torch.randn(8, 3) for _ in range(4)]
    >>> loss_fn = lambda model, x: model(x).square().mean()
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> monitor = gc.CurvatureMonitor(model, loss_fn)
    >>> for batch, next_batch in monitor.lookahead(loader):
    ...     optimizer.zero_grad()
    ...     loss_fn(model, batch).backward()
    ...     monitor.step(batch, next_batch)
    ...     optimizer.step()
    >>> monitor.records()[["step", "reliable"]].values.tolist()
    [[0, True], [1, True], [2, True]]

    Args:
        model, loss_fn, eta, method: as for :class:`grokcurv.CommutatorProbe`.
        every: measure at every this many steps, from the first (step 0) on.
        pairs: pairs of batches per measurement.
        pca: a :class:`grokcurv.StreamingPCA`, of the model's ``runs``, to feed with the parameters; its leading two
            directions per segment are the execution basis on which every ``delta`` is projected (``method="sketch"``
            has none).
        pca_every: feed ``pca`` at every this many steps.
        sampler: a function of no arguments that draws ``(batch_a, batch_b)``. One that has a method ``at`` is told the
            step before, so that it can draw the same whenever that step is measured again.
        design: ``"chain"`` draws one batch more than there are pairs, and each next pair begins with the batch that the
            one before ended with: 3 n + 1 gradients instead of 4 n.
        strategy: of the gradients, see :class:`grokcurv.gradients.GradientEngine`.
        check_every: a measurement this many steps or more after the latest evaluations behind the noise floor makes
            them anew, one sooner takes the sizes of the errors from them. A captured step always makes them.
        alignment: set the training step that led to a measurement, theta_t - theta_(t-1), beside its commutators:
            :data:`ALIGNMENT_FIELDS`. One vector of P is kept for it from the call before on, and up to 2 n + 1 more for
            n pairs while they are measured. Such a step cannot be captured.
        anatomy: also say what a bracket is made of, at no gradient more: :data:`ANATOMY_FIELDS`. It keeps a vector of P
            as ``alignment`` does, the same one, and another; it cannot be captured either.
        noise_floor: ``False`` saves the float64 evaluations: rows are then numbers that nobody vouches for, none of
            them ``reliable``, and none is repeated as a bracket.
        gradient: ``"own"``: all four are computed. The other two save one and take ``.grad``, which must be that of
            ``loss_fn``, unscaled and unclipped. ``"trusted"``: it is used as it is. ``"checked"``: it is used once two
            checks have found it right; a row that rests on it is ``reliable`` when the next check has found so again,
            and NaN if not, and then the monitor computes its own. What is wrong between two checks, and right at both,
            may stay unseen. For models that draw at random it is never used.
        measures: what is recorded besides, each a :class:`grokcurv.measures.base.Measure` of its own.
        budget: measure at those of the steps ``every`` names that take no more than this share of the time of training:
            see :class:`grokcurv.budget.Budget`. Rows then have :data:`grokcurv.budget.FIELDS` too. The first
            measurement is followed by some that are timed and forgotten: two rows, and two brackets, one of them
            checked. Such a step cannot be captured.
        loggers: each gets every record, through ``log(record, step)``, those that rest on ``.grad`` when the next check
            has settled them; passing any makes each measurement read back.

    Attributes:
        fields: names of the numbers that a measurement records: :data:`FIELDS`, those of ``alignment``, of ``anatomy``,
            of ``measures`` and of ``budget``.
        memory: copies of the batches that training was given last, for losses that write to them.

    Raises:
        ValueError: intervals or pairs below one; several pairs without a sampler; a ``pca`` of other runs than the
            model has; a model on several processes with one that is not sharded as it is, or of which no row could be
            reliable.
    """

    def __init__(
        self,
        model: Model,
        loss_fn: LossFn,
        *,
        every: int = 1,
        pairs: int = 1,
        pca: StreamingPCA | None = None,
        pca_every: int = 100,
        sampler: Sampler | None = None,
        design: Design = "independent",
        strategy: Strategy = "auto",
        check_every: int = CHECK_EVERY,
        alignment: bool = False,
        anatomy: bool = False,
        method: Method = "difference",
        eta: float | Literal["auto"] = 1e-3,
        noise_floor: bool = True,
        gradient: Gradient = "own",
        measures: Sequence[Measure] = (),
        budget: float | None = None,
        loggers: Sequence[Logger] = (),
    ) -> None:
        for name, value in {"every": every, "pairs": pairs, "pca_every": pca_every, "check_every": check_every}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if sampler is None and pairs > 1:
            raise ValueError(f"pairs={pairs} needs a sampler: without one the only pair is (this batch, next batch)")
        for name, choice, choices in (("design", design, DESIGNS), ("gradient", gradient, get_args(Gradient))):
            if choice not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {choice!r}")
        self.probe = CommutatorProbe(model, loss_fn, eta=eta, method=method, noise_floor=noise_floor, strategy=strategy)
        engine = self.probe.gradients
        self.probe.segments = attention_parameters(engine.model)
        if noise_floor and not engine.checked:
            raise ValueError(
                "model cannot be evaluated in float64, so that every row would be NaN: give distributed(model, exact), "
                "or noise_floor=False for rows of which none is reliable"
            )
        if pca is not None and pca.runs != engine.runs:
            raise ValueError(f"pca must have runs={engine.runs}, as many as the model has; got {pca.runs}")
        if pca is not None and pca.partition != engine.partition:
            raise ValueError(
                "pca must take the vectors that the model has on each process: a ShardedPCA(model) where the model is "
                "under fully_shard, a StreamingPCA otherwise"
            )
        self.runs = engine.runs
        self.trajectory = None if pca is None else Trajectory(self.probe, pca)
        if self.trajectory is not None:
            self.probe.follow(self.trajectory.update_basis)
        self.training_gradient = TrainingGradient(self.probe, gradient if sampler is None else "own")
        self.commutator = Commutator(
            self.probe,
            self.trajectory,
            self.training_gradient,
            design=design,
            check_every=check_every,
            alignment=alignment,
            anatomy=anatomy,
            measures=[measure for measure in measures if measure.from_pairs],
        )
        self.every, self.pca_every, self.pairs = every, pca_every, pairs
        self.sampler, self.design = sampler, design
        self.measures = tuple(measures)
        for measure in self.measures:
            if sampler is None:
                measure.follow_training(self.training_gradient)
            measure.bind(self.probe)
        self._has_pairless = any(not measure.needs_pairs for measure in self.measures)
        self.budget = None if budget is None else Budget(budget, self.commutator)
        more = [name for measure in self.measures if not measure.from_pairs for name in measure.columns]
        self.fields = (*self.commutator.columns, *more, *(BUDGET_FIELDS if self.budget else ()))
        if len(set(self.fields)) < len(self.fields):
            raise ValueError(f"measures: two of them record a column of one name, among {', '.join(self.fields)}")
        self._width = len(HEAD) + len(self.fields)
        self._open: Tensor | None = None  # (R, width) the latest row, while a measure is going to complete it
        self._closed: Tensor | None = None  # what was open until this step
        self.loggers = tuple(loggers)
        self._steps = 0  # without those of replays
        self._clock = torch.zeros((), dtype=torch.int64, device=engine.device)
        self._history = [torch.empty(0, self._width, dtype=torch.float64)] * self.runs  # before the records
        self._records = DeviceBuffer(self.runs * self._width, engine.device)
        self.memory = Memory()
        self._writes: bool | None = None  # whether the loss writes to its batch, once that was of interest
        self._unlogged: list[Tensor] = []  # rows from the first on that waits for a confirmation
        self._left = math.nan  # when the latest call of step() ended
        self._costs: defaultdict[str, float] = defaultdict(float)  # seconds
        self._admitted = False  # a model was, in this process

    @property
    def gradient(self) -> Gradient:
        """Whether ``.grad`` serves; never with a sampler."""
        return self.training_gradient.use

    @gradient.setter
    def gradient(self, gradient: Gradient) -> None:
        self.training_gradient.use = gradient if self.sampler is None else "own"

    @property
    def admission(self) -> tuple[Finding, ...]:
        """What has been found out about the model so far."""
        return self.probe.gradients.admission

    @property
    def pca(self) -> StreamingPCA | None:
        """The PCA that is fed, of all runs."""
        return None if self.trajectory is None else self.trajectory.pca

    def lookahead(self, loader: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """Each batch of ``loader`` with the one after it; the last comes with None, and is not measured.

        Training sees what a plain loop over ``loader`` sees, whether it is measured or not. If the loader draws from
        torch's, Python's or NumPy's own generator, the next batch must not be fetched before the training step has
        drawn: its place is taken by a :class:`grokcurv.lookahead.Later`, with which :meth:`step` fetches it. Where a
        loader refills the tensors that it has given out, training gets copies.
        """
        return with_next(loader, self.probe.gradients.place.model, self.memory)

    def step(self, batch: Any = None, next_batch: Any = None) -> None:
        """Count one training step, and do what is due at it.

        Args:
            batch: what training has just back-propagated; not needed with a sampler.
            next_batch: what it will see next; None skips the measurement. As :meth:`lookahead` gives it.

        Raises:
            ValueError: no sampler and no batch; or ``.grad`` is not the gradient of ``loss_fn`` on ``batch``.
            RuntimeError: captured in a CUDA graph, with ``alignment=True``, ``anatomy=True`` or a measure that
                remembers.
        """
        # A captured step is recorded once and replayed many times: it measures whatever the counters of the host say,
        # leaves the PCA alone (which folds rows at times that depend on their number) and counts on the device.
        captured = capturing(self.probe.gradients.device)
        if captured and self.commutator.looks_back:
            raise RuntimeError(
                "alignment=True and anatomy=True look back on the call before, which a CUDA graph does not know: "
                "capture a monitor with alignment=False and anatomy=False"
            )
        if captured and self.budget is not None:
            raise RuntimeError(
                "a budget counts on the host, which a CUDA graph does not ask: capture a monitor without"
            )
        if captured and (names := [measure.name for measure in self.measures if not measure.capturable]):
            raise RuntimeError(
                f"{', '.join(names)}: a measure that remembers the step before is not replayed by a CUDA graph: "
                "capture a monitor without"
            )
        start = time.perf_counter() if captured else self._enter()
        if self.feeds and not captured:
            self.feed()
            start = time.perf_counter()
        due, pairs = self.due or captured, list[PairOfRuns]()
        if due:
            if self.sampler is None and batch is None and not self._has_pairless:
                raise ValueError("step() needs the batch and the next one, or the monitor a sampler")
            pairs = self.draw() if self.sampler is not None else self._pair(batch, next_batch)
        plan = self.commutator.plan(self._steps) if pairs else ()
        met = [] if self._open is None or batch is None else self._met(batch)
        found = self.launch(pairs, plan, start, due and self._has_pairless, met)
        if captured:
            self._clock += 1
            return
        if self.budget is not None:
            self._settle(self.budget, pairs, plan, found)
        self.advance(found)
        self._left = time.perf_counter()

    def plan(self) -> Plan:
        """How the next step measures; empty where it does not."""
        return self.commutator.plan(self._steps) if self.due else ()

    def launch(
        self,
        pairs: Sequence[PairOfRuns],
        plan: Plan,
        start: float,
        regardless: bool = False,
        met: Sequence[Any] = (),
    ) -> Tensor | None:
        """What the device does of a step: measure as planned, if at all, and write that down.

        (R, 2 + columns) what was found of commutators, for :meth:`advance`. A captured one may be replayed where the
        plan is the same. ``regardless``: there is a row even where no commutator is measured. ``met``: the batches that
        the runs have been trained on in this step, by which a row that is open is completed.
        """
        with self.probe.gradients.evaluator.held():  # what several of them look at is looked at once
            return self._launch(pairs, plan, start, regardless, met)

    def _launch(
        self, pairs: Sequence[PairOfRuns], plan: Plan, start: float, regardless: bool, met: Sequence[Any]
    ) -> Tensor | None:
        """The work of :meth:`launch`, with the model held."""
        self._close(met)
        due = bool(plan) or regardless
        if not due and not self.measures:
            return None
        more = list[Tensor]()
        for measure in self.measures:
            begun = time.perf_counter()
            seen = measure.observe(self._steps, pairs, due)
            more += () if seen is None else seen.unbind(1)
            self._count(measure.name, begun)
        if not due:
            return None
        captured, begun = capturing(self.probe.gradients.device), time.perf_counter()
        try:
            if plan and self.budget is not None and not self.budget.prices:
                # So that the first row takes what a row takes; the gradient in float64 serves both looks at the model.
                self.probe.admit(pairs[0], seed=self._steps, brackets=self.commutator.falls_back)
            found = self.commutator.observe(self._steps, pairs, plan) if plan else self.commutator.nothing()
        except ReferencedError as error:  # a run that is looked at with a profiler goes on, and is measured afterwards
            if captured:
                raise
            self.commutator.forget_checks()
            self.probe.gradients.note("references", False, str(error), "no step is measured meanwhile")
            return None
        if plan:
            self._count("commutator" if self._admitted else "admission", begun)
            self._admitted = True
        method, gradient, *values = found.unbind(1)
        seconds = torch.full_like(method, math.nan if captured else time.perf_counter() - start)
        if self.budget is not None:
            more += self.budget.fields(self._steps, method)
        row = torch.stack([self._clock.expand_as(method), method, seconds, gradient, *values, *more], 1)
        if any(measure.pending for measure in self.measures):
            self._open = row
        else:
            self._records.append(row.flatten())
        return found

    def _close(self, met: Sequence[Any]) -> None:
        """Write down the row that is open, with what its measures know of it now."""
        self._closed, self._open = self._open, None
        if self._closed is None:
            return
        place = len(HEAD) + len(self.commutator.columns)
        for measure in self.measures:
            if measure.from_pairs:
                continue  # its columns are among the commutator's
            there = slice(place, place := place + len(measure.columns))
            begun = time.perf_counter()
            if measure.pending and (completed := measure.complete(met)) is not None:
                self._closed[:, there] = completed
            self._count(measure.name, begun)
        self._records.append(self._closed.flatten())

    def advance(self, found: Tensor | None) -> None:
        """What is done after a launch, or a replay of one: have the host learn of what was found, and count."""
        if found is not None:
            self._records.drain()
            self.commutator.note(found)
        if self.loggers:
            if self._closed is not None:
                self._log(self._closed[0].cpu())
            if found is not None and self._open is None:
                self._log(self._records.last())
        # The last update is the difference of two calls' parameters, so the call before one that measures keeps its
        # own.
        self._steps += 1
        self._clock += 1
        self.commutator.remember(self.due)

    def _enter(self) -> float:
        """The time, before anything is measured of a step; what has passed since the last one was training's."""
        if self.budget is not None:
            self.budget.synchronize()  # while steps are being timed, and not from then on
        now = time.perf_counter()
        if not math.isnan(self._left):
            self._costs["training"] += now - self._left
            if self.budget is not None:
                self.budget.trained(now - self._left)
        return now

    def _count(self, kind: str, begun: float) -> None:
        self._costs[kind] += time.perf_counter() - begun

    def _settle(self, budget: Budget, pairs: Sequence[PairOfRuns], plan: Plan, found: Tensor | None) -> None:
        """Have the budget know what became of this step, and, after the first row, what rows take."""
        budget.settle(self._steps, self._steps % self.every == 0, plan, found)
        if plan and found is not None and not budget.prices:
            begun = time.perf_counter()
            others = {f"measure {measure.name}": self._costs[measure.name] for measure in self.measures}
            budget.price(pairs, self._steps, {**others, "trajectory": self._costs["trajectory"]})
            self._count("admission", begun)

    def _pair(self, batch: Any, next_batch: Any) -> list[PairOfRuns]:
        """The one pair there is, as training's forward passes meet the batches; none if one of them is not known."""
        if self.probe.gradients.shared:
            return [] if next_batch is None else [(batch, next_batch)]
        batch, next_batch = self._as_met(batch, next_batch)
        return [] if next_batch is None else [([batch], [next_batch])]

    def _met(self, batch: Any) -> list[Any]:
        """This step's batches, one of each run, as training's forward passes met them; none if that is not known."""
        if self.probe.gradients.shared:
            return list(batch)
        batch, known = self._as_met(batch, batch)
        return [] if known is None else [batch]

    def _as_met(self, batch: Any, next_batch: Any) -> Pair:
        """The batches as training's forward passes meet them; None for the next one if that is not known."""
        # A loss may normalise its batch in place, and a loader may refill the tensors of the one before: what step() is
        # given may no longer be what training saw. Versions of tensors, and copies that lookahead keeps, tell; where
        # neither can, the pair is not measured.
        if next_batch is None or capturing(self.probe.gradients.device):
            return batch, None if isinstance(next_batch, Later) else next_batch
        given = batch
        if isinstance(next_batch, Later):
            here = Kept(batch)
            next_batch = next_batch.take()
            batch = here.copy if here.copy is not None and here.changed() else batch
        kept = self.memory.find(given)
        written = any(map(version, Snapshot([given]).tensors)) if kept is None else kept.changed()
        if next_batch is None or not written or not self._loss_writes(batch, kept is not None):
            return batch, next_batch
        return (batch, None) if kept is None or not kept.is_like(given) else (kept.copy, next_batch)

    def _loss_writes(self, batch: Any, kept: bool) -> bool:
        """Whether ``loss_fn`` writes to its batch, so that a batch it was trained on is another one now."""
        if self._writes is None:
            evaluator = self.probe.gradients.evaluator
            self.probe.gradients.admit(batch, exact=self.probe.noise_floor)  # what it changes is found there

            def look(*_: Any) -> bool:
                return any(map(version, Snapshot([batch]).tensors))  # those of stand-ins, which begin at zero

            self._writes = evaluator.evaluate(evaluator.leaves(self.probe.gradients.flatten()), batch, look)
            if self._writes and not kept:
                warnings.warn(
                    "loss_fn writes to its batch: what step() is given is no longer what training saw, and is not "
                    "measured; take batches from monitor.lookahead(loader), which keeps copies, or give it a sampler",
                    stacklevel=2,
                )
        return self._writes

    def pass_by(self) -> None:
        """Have the PCA, where it is due, and the measures see the parameters of this step, without a row."""
        if self.feeds:
            self.feed()
        for measure in self.measures:
            measure.observe(self._steps, (), False)

    def at(self, step: int) -> None:
        """Have the next call of :meth:`step` be that of this step: of a checkpoint, say."""
        self._steps = step
        self._clock.fill_(step)

    def feed(self) -> None:
        """Feed the PCA with the parameters as they are; :meth:`step` does it when it is due.

        Raises:
            ValueError: the monitor has no PCA.
        """
        if self.trajectory is None:
            raise ValueError("feed() needs a monitor with a pca")
        begun = time.perf_counter()
        self.trajectory.feed(self._clock)
        self._count("trajectory", begun)
        if self.budget is not None:
            self.budget.pay("trajectory")

    @property
    def due(self) -> bool:
        """Whether the next call of :meth:`step` measures."""
        if self._steps % self.every:
            return False
        return self.budget is None or self.budget.affords(self._steps)

    @property
    def cost(self) -> dict[str, float]:
        """Seconds of the process that each measure has taken, and training between the calls of :meth:`step`.

        ``admission`` is the first measurement of each process, in which the model is looked at, and what was timed for
        a budget. On an accelerator these are the host's seconds: what it launches runs on meanwhile.
        """
        return dict(self._costs)

    @property
    def feeds(self) -> bool:
        """Whether the next call of :meth:`step` feeds the PCA."""
        return self.trajectory is not None and self._steps % self.pca_every == 0

    @property
    def steps(self) -> int:
        """How many steps there were, replays included; reading it waits for the device."""
        return int(self._clock)

    @property
    def last(self) -> dict[str, Any] | None:
        """The latest record, or None; reading it waits for the device."""
        return self.latest()

    def latest(self, run: int = 0) -> dict[str, Any] | None:
        """:attr:`last`, of one of several runs."""
        row = self._records.last() if self._open is None else self._open.cpu()
        rows = self._history[run][-1:] if row is None else row.view(self.runs, -1)[run][None]
        return self._record(settled(rows, self.commutator.columns)[0]) if len(rows) else None

    def records(self, run: int = 0) -> pd.DataFrame:
        """One row per measurement: ``step``, ``method``, ``measure_seconds`` and :attr:`fields`.

        Reading is the only point that waits for the device. A number is the median over the row's pairs unless its
        name says otherwise, and NaN where there was no basis or no step yet, or nothing trustworthy.

        ===================================  ===================  =====================================================
        column                               unit                 what it is
        ===================================  ===================  =====================================================
        ``defect_median``, ``_p25``,         1 / theta            ``|delta| / (|eta g_A| |eta g_B|)``, and its quartiles
        ``_p75``
        ``reference_median``, ``_p25``,      1 / theta            the same by the published float32 formula
        ``_p75``
        ``noise_floor``                      1 / theta            what rounding may have made of the defect
        ``reliable``                                              whether the floor is a tenth of the defect or less
        ``grad_norm``                        loss / theta         ``|g_A|``
        ``grad_cosine``                      1                    of the angle between ``g_A`` and ``g_B``
        ``bracket_norm``                     loss^2 / theta^3     ``|delta| / eta^2``
        ``rho``                              1                    ``|delta_perp| / |delta|``, outside the basis
        ``exec_fraction``                    1                    ``|delta_par| / |delta|``, inside it
        ``exec_random_ratio``                1                    that over its mean for random subspaces of R^P
        ``exec_matched_ratio``               1                    the same within the coordinates where the basis lives
        ``attention_fraction``               1                    length of delta on the attention matrices over its own
        ``step_alignment``                   1                    ``|cos|`` of the last training step and delta, mean
                                                                  over the pairs (Xu, arXiv 2602.16746)
        ``step_share``                       1                    length of the step's part in the span of all deltas
                                                                  over its own
        ``step_alignment_ratio``,            1                    these over their exact means for random directions
        ``step_share_ratio``                                      (:class:`grokcurv.analysis.RandomBaseline`)
        ``..._error``                        of the column        bounds of errors
        ``measure_seconds``                  seconds              what the measurement took
        ===================================  ===================  =====================================================

        Columns of ``anatomy`` are in :mod:`grokcurv.measures.anatomy`, those of ``measures`` with each class.
        """
        import pandas as pd

        self.training_gradient.refuse_another()
        rows = settled(self._rows(run), self.commutator.columns)
        frame = pd.DataFrame(rows.numpy(), columns=[*HEAD, *self.fields])
        methods = pd.Series(np.array(METHODS, dtype=object)[frame["method"].astype("int64")], dtype="str")
        frame = frame.assign(step=frame["step"].astype("int64"), method=methods, reliable=frame["reliable"] == 1.0)
        return frame[["step", *self.fields[:4], "method", *self.fields[4:], "measure_seconds"]]

    def pca_records(self, run: int = 0) -> pd.DataFrame:
        """PC1 % of every expanding window of the trajectory: columns ``step``, ``matrix``, ``pc1_percent``.

        And ``pc1_error``, in percent too, of a PCA that does not keep its rows.
        """
        return no_records() if self.trajectory is None else self.trajectory.records(run)

    def state_dict(self, run: int = 0) -> dict[str, Any]:
        """Everything needed to go on in another process: counters, records and the PCA; tensors and plain values."""
        rows = self._rows(run)
        steps, methods, seconds, gradients = rows[:, : len(HEAD)].T.contiguous()
        trajectory = self.trajectory.state_dict(run) if self.trajectory is not None else {"pca_steps": [], "pca": None}
        return {
            "steps": self.steps,
            "row_steps": steps.long(),
            "methods": list(METHODS),
            "row_methods": methods.to(torch.int8),  # places among them
            "row_seconds": seconds,
            "row_gradients": gradients.to(torch.int8),
            "unlogged": len(self._unlogged),
            "columns": list(self.fields),
            "costs": {kind: torch.tensor(seconds, dtype=torch.float64) for kind, seconds in self.cost.items()},
            "budget": None if self.budget is None else self.budget.state_dict(),
            "open": self._open is not None,
            "measures": {measure.name: measure.state_dict(run) for measure in self.measures},
            "rows": rows[:, len(HEAD) :].contiguous(),
            **self.training_gradient.state_dict(),
            **self.commutator.state_dict(run),
            **trajectory,
        }

    def load_state_dict(self, state: Mapping[str, Any], run: int = 0) -> None:
        """Restore :meth:`state_dict`; the monitor must have been built with the same settings.

        Raises:
            ValueError: the state has a PCA, or alignments, and the monitor has none, or the other way round.
        """
        width = state["rows"].shape[1]
        columns = state.get("columns", (FIELDS + ALIGNMENT_FIELDS)[:width])  # older versions did not say
        for name, saved, here in (
            ("a pca", state["pca"] is not None, self.trajectory is not None),
            ("alignment", ALIGNMENT_FIELDS[0] in columns, self.commutator.alignment),
            ("a budget", state.get("budget") is not None, self.budget is not None),
        ):
            if saved != here:
                raise ValueError(f"state was saved with {name} and the monitor has none, or the other way round")
        if len(columns) != width or set(columns) != set(self.fields):
            raise ValueError(
                f"state has rows of {', '.join(columns)} ({width} numbers) and this monitor records "
                f"{', '.join(self.fields)}: it was saved with other measures, or by another version of grokcurv"
            )
        names = state["row_methods"] if "methods" not in state else state["methods"]  # older versions wrote them out
        places = torch.tensor([METHODS.index(RENAMED.get(name, name)) for name in names], dtype=torch.float64)
        methods = places if names is state["row_methods"] else places[state["row_methods"].long()]
        before = (state["row_steps"], methods, state["row_seconds"], state["row_gradients"])
        head = torch.stack([torch.as_tensor(column, dtype=torch.float64) for column in before], 1)
        numbers = state["rows"].to("cpu", torch.float64)[:, [list(columns).index(name) for name in self.fields]]
        rows = torch.cat([head, numbers], dim=1)
        is_open = state.get("open", False)
        self._history[run] = rows[:-1] if is_open else rows
        if run == 0:
            self._open = rows.new_empty(self.runs, self._width).to(self.probe.gradients.device) if is_open else None
            self._steps = state["steps"]
            self._clock.fill_(state["steps"])
            self._records = DeviceBuffer(self.runs * self._width, self.probe.gradients.device)
            written = self._history[run]
            self._unlogged = list(written[len(written) - state["unlogged"] :])
            self._costs.update({kind: float(seconds) for kind, seconds in state.get("costs", {}).items()})
            if self.budget is not None:
                self.budget.load_state_dict(state["budget"])
        if self._open is not None:
            self._open[run] = rows[-1]
        for measure in self.measures:
            measure.load_state_dict(state["measures"][measure.name], run)
        reliable = rows[:, len(HEAD) + FIELDS.index("reliable")] == 1.0
        self.training_gradient.load_state_dict(state)
        self.commutator.load_state_dict({**state, "reliable": reliable.tolist()}, run)
        if self.trajectory is not None:
            self.trajectory.load_state_dict(state, run)

    def keep(self, runs: list[int]) -> None:
        """Of several runs go on with these alone, in this order, as the engine does."""
        self._history = [self._written(run) for run in runs]
        self._open = None if self._open is None else self._open[runs]
        self.runs = len(runs)
        self._records = DeviceBuffer(self.runs * self._width, self.probe.gradients.device)
        self.commutator.keep(runs)
        for measure in self.measures:
            measure.keep(runs)
        if self.trajectory is not None:
            self.trajectory.keep(runs)

    def _rows(self, run: int) -> Tensor:
        """(n, width) all rows of a run so far, on the host; waits for the device."""
        written = self._written(run)
        return written if self._open is None else torch.cat([written, self._open[run : run + 1].cpu()])

    def _written(self, run: int) -> Tensor:
        """Those that nothing is added to."""
        rows = self._records.read().view(-1, self.runs, self._width)[:, run]
        return torch.cat([self._history[run], rows])

    def _log(self, row: Tensor | None) -> None:
        """Hand the loggers what is settled: rows that rest on ``.grad`` wait for the next check."""
        assert row is not None
        self._unlogged.append(row)
        gradients = [int(row[HEAD.index("gradient")]) for row in self._unlogged]
        # A logger cannot take back what it was given, so rows that rest on a .grad which nobody has confirmed stay
        # here.
        if USED in gradients and gradients[-1] not in (CONFIRMED, REFUTED):
            return
        rows, self._unlogged = settled(torch.stack(self._unlogged), self.commutator.columns), []
        for row in rows:
            record = self._record(row)
            for logger in self.loggers:
                logger.log(record, step=record["step"])

    def draw(self) -> list[PairOfRuns]:
        """What the sampler draws. From visible generators it draws as if they were its own: training's stay put."""
        sampler = self.sampler
        assert sampler is not None
        if callable(at := getattr(sampler, "at", None)):
            at(self._steps)
        with isolated(self._steps):
            drawn = [sampler() for _ in range(self.pairs if self.design == "independent" else self.pairs // 2 + 1)]
        if not self.probe.gradients.shared:
            drawn = [([a], [b]) for a, b in drawn]
        if self.design == "independent":
            return drawn
        batches = [batch for pair in drawn for batch in pair]
        return list(pairwise(batches[: self.pairs + 1]))

    def _record(self, row: Tensor) -> dict[str, Any]:
        """A row of the device buffer as a record, by the names of its columns."""
        step, method, seconds, _, *values = row.tolist()
        record: dict[str, Any] = dict(zip(self.fields, values, strict=True))
        record["reliable"] = record["reliable"] == 1.0
        return {"step": int(step), "method": METHODS[int(method)], **record, "measure_seconds": seconds}


def settled(rows: Tensor, columns: Sequence[str]) -> Tensor:
    """Rows of records as far as they are known to be true; ``columns`` are the commutator's, which come first.

    One that rests on a ``.grad`` is reliable if the next check has found that right, NaN if wrong, and until then a
    number that is not called reliable.
    """
    gradients = rows[:, HEAD.index("gradient")]
    if not bool((gradients == USED).any()):
        return rows
    # Backwards: each row takes the verdict of the first check after it.
    rows, verdict = rows.clone(), USED
    reliable = len(HEAD) + FIELDS.index("reliable")
    measured = [len(HEAD) + i for i, name in enumerate(columns) if name not in REFERENCE_FIELDS]
    for row in reversed(range(len(rows))):
        gradient = int(gradients[row])
        if gradient in (CONFIRMED, REFUTED):
            verdict = gradient
        elif gradient == USED and verdict != CONFIRMED:
            if verdict == REFUTED:
                rows[row, measured] = math.nan
            rows[row, reliable] = 0.0
    return rows
