"""Curvature of a training run, measured while it runs: what to measure when, and the records of it."""

from __future__ import annotations

import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from grokcurv import ops
from grokcurv.commutator import (
    DESIGNS,
    GIVEN,
    METHODS,
    RENAMED,
    CommutatorProbe,
    CommutatorStats,
    Design,
    Method,
    Pair,
    Sampler,
    quantile,
)
from grokcurv.device_buffer import DeviceBuffer, capturing, copy_to_host_async, is_asynchronous
from grokcurv.evaluation import LossFn, isolated
from grokcurv.flat import Segment, select_segments
from grokcurv.gradients import Asking, Model, Strategy, carry_out
from grokcurv.lookahead import Kept, Later, Memory, version, with_next
from grokcurv.pca import StreamingPCA
from grokcurv.state import Snapshot
from grokcurv.subspace import RandomBaseline, Subspace, alignment

if TYPE_CHECKING:
    import pandas as pd

    from grokcurv.loggers import Logger

BASIS_COMPONENTS = 2
"""Directions per segment in the execution basis (Xu, arXiv 2602.16746)."""

GRADIENT_TOLERANCE = 0.05
"""Relative difference between the norm of ``.grad`` and that of the measured gradient beyond which they are two."""

GRADIENT_MARGIN = 5.0
"""How many times further from float64 ``.grad`` may be than the monitor's own gradients are."""

CONFIRMATIONS = 2
"""So many checks must have found ``.grad`` right before it is used."""

CLEAR = (0.01, 0.1)
"""A share or a cosine is NaN when its error may be more than the first number, and more than the second of itself."""

Gradient = Literal["checked", "trusted", "own"]

OWN, USED, CONFIRMED, REFUTED = range(4)
"""What a row has to do with ``.grad``: nothing; it rests on it; or it was a check that found it right, or wrong."""

VERDICT_LAG = 2
"""On an accelerator, after how many more measurements the host learns whether one was reliable."""

CHECK_EVERY = 25
"""Steps after which the float64 evaluations behind the noise floor are made anew; ``docs/numerics.md`` says why 25."""

FIELDS = (
    "defect_median",
    "defect_p25",
    "defect_p75",
    "noise_floor",
    "reliable",
    "grad_norm",
    "grad_cosine",
    "bracket_norm",
    "rho",
    "exec_fraction",
    "exec_random_ratio",
    "exec_matched_ratio",
    "attention_fraction",
    "reference_median",
    "reference_p25",
    "reference_p75",
    "share_error",
    "grad_cosine_error",
)
"""What one measurement records, each the median over its pairs unless its name says otherwise."""

REFERENCE_FIELDS = ("reference_median", "reference_p25", "reference_p75")
"""Those of the published arithmetic, which are recorded whether they are right or not."""

ALIGNMENT_FIELDS = (
    "step_alignment",
    "step_alignment_ratio",
    "step_share",
    "step_share_ratio",
    "step_alignment_error",
    "step_share_error",
)
"""What it records besides, with ``alignment=True``."""


SHARES = {
    "exec_random_ratio": "exec_fraction",
    "step_alignment_ratio": "step_alignment",
    "step_share_ratio": "step_share",
}
"""Ratios to what chance would give, and the column that each is in its units."""

HEAD = ("step", "method", "measure_seconds", "gradient")
"""What stands before :data:`FIELDS` in a row of numbers; the method by its place among the methods."""


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

    Args:
        model, loss_fn, eta, method: as for :class:`grokcurv.CommutatorProbe`.
        every: measure at every this many steps, from the first (step 0) on.
        pairs: pairs of batches per measurement.
        pca: a :class:`grokcurv.StreamingPCA` to feed with the parameters; its leading two directions per segment
            are the execution basis on which every ``delta`` is projected (``method="sketch"`` has none).
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
        noise_floor: ``False`` saves the float64 evaluations: rows are then numbers that nobody vouches for, none of
            them ``reliable``, and none is repeated as a bracket.
        gradient: ``"own"``: all four are computed. The other two save one and take ``.grad``, which must be that of
            ``loss_fn``, unscaled and unclipped. ``"trusted"``: it is used as it is. ``"checked"``: it is used once two
            checks have found it right; a row that rests on it is ``reliable`` when the next check has found so again,
            and NaN if not, and then the monitor computes its own. What is wrong between two checks, and right at both,
            may stay unseen. For models that draw at random it is never used.
        loggers: each gets every record, through ``log(record, step)``, those that rest on ``.grad`` when the next check
            has settled them; passing any makes each measurement read back.

    Attributes:
        fields: names of the numbers that a measurement records: :data:`FIELDS`, and those of ``alignment``.
        memory: copies of the batches that training was given last, for losses that write to them.

    Raises:
        ValueError: intervals or pairs below one; several pairs without a sampler; a model on several processes with a
            ``pca`` that is not sharded as it is, or of which no row could be reliable.
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
        method: Method = "difference",
        eta: float | Literal["auto"] = 1e-3,
        noise_floor: bool = True,
        gradient: Gradient = "own",
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
        self.probe.segments = _attention(engine.model)
        if noise_floor and not engine.checked:
            raise ValueError(
                "model cannot be evaluated in float64, so that every row would be NaN: give distributed(model, exact), "
                "or noise_floor=False for rows of which none is reliable"
            )
        if pca is not None and pca.partition != engine.partition:
            raise ValueError(
                "pca must take the vectors that the model has on each process: a ShardedPCA(model) where the model is "
                "under fully_shard, a StreamingPCA otherwise"
            )
        self._falls_back = method == "difference" and engine.brackets and noise_floor
        self.design: Design = design
        self.every, self.pairs, self.pca, self.pca_every = every, pairs, pca, pca_every
        self.sampler, self.check_every, self.alignment = sampler, check_every, alignment
        self.fields = FIELDS + ALIGNMENT_FIELDS if alignment else FIELDS
        self._before: Tensor | None = None  # for alignment: the parameters at the call before one that measures
        self._checked: dict[str, int] = {}  # the step of the latest check, by method
        self.loggers = tuple(loggers)
        self._baselines: tuple[RandomBaseline, RandomBaseline] | None = None
        device = self.probe.gradients.device
        self._steps = 0  # without those of replays
        self._clock = torch.zeros((), dtype=torch.int64, device=device)
        self._records = DeviceBuffer(len(HEAD) + len(self.fields), device)
        self._verdicts: deque[Callable[[], Tensor]] = deque()
        self._gave_up = False  # the difference form
        self._pca_steps: list[Tensor] = []
        self._floored = noise_floor  # otherwise rows are numbers that nobody vouches for
        self.gradient: Gradient = gradient
        self._gradient_ratio: Tensor | None = None
        self._confirmations = 0  # checks that have found .grad right
        self._distrusted = False  # since one has found it wrong
        self._gradient_verdicts: deque[Callable[[], Tensor]] = deque()
        self.memory = Memory()
        self._writes: bool | None = None  # whether the loss writes to its batch, once that was of interest
        self._unlogged: list[Tensor] = []  # rows from the first on that waits for a confirmation

    def lookahead(self, loader: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """Each batch of ``loader`` with the one after it; the last comes with None, and is not measured.

        Training sees what a plain loop over ``loader`` sees, whether it is measured or not. If the loader draws from
        torch's, Python's or NumPy's own generator, the next batch must not be fetched before the training step has
        drawn: its place is taken by a :class:`grokcurv.lookahead.Later`, with which :meth:`step` fetches it. Where a
        loader refills the tensors that it has given out, training gets copies.
        """
        return with_next(loader, self.probe.gradients.device, self.memory)

    def step(self, batch: Any = None, next_batch: Any = None) -> None:
        """Count one training step, and do what is due at it.

        Args:
            batch: what training has just back-propagated; not needed with a sampler.
            next_batch: what it will see next; None skips the measurement. As :meth:`lookahead` gives it.

        Raises:
            ValueError: no sampler and no batch; or ``.grad`` is not the gradient of ``loss_fn`` on ``batch``.
            RuntimeError: captured in a CUDA graph, with ``alignment=True``.
        """
        carry_out(self.probe.gradients, [self.stepping(batch, next_batch)])

    def stepping(self, batch: Any = None, next_batch: Any = None) -> Asking[None]:
        """:meth:`step`, stopping where it needs gradients, so that several monitors' can be computed at once."""
        # A captured step is recorded once and replayed many times: it measures whatever the counters of the host say,
        # leaves the PCA alone (which folds rows at times that depend on their number) and counts on the device.
        step, captured = self._steps, capturing(self.probe.gradients.device)
        if captured and self.alignment:
            raise RuntimeError(
                "alignment=True looks back on the call before, which a CUDA graph does not know: "
                "capture a monitor with alignment=False"
            )
        if self.pca is not None and step % self.pca_every == 0 and not captured:
            self.feed()
        if self.due or captured:
            if self.sampler is None and batch is None:
                raise ValueError("step() needs the batch and the next one, or the monitor a sampler")
            if self.sampler is None:
                batch, next_batch = self._pair(batch, next_batch)
            if self.sampler is not None or next_batch is not None:
                yield from self._measure(step, batch, next_batch)
        # The last update is the difference of two calls' parameters, so the call before one that measures keeps its
        # own.
        if self.alignment:
            wanted = (step + 1) % self.every == 0
            self._before = self.probe.gradients.flatten(self._before) if wanted else None
        self._steps += not captured
        self._clock += 1

    def _pair(self, batch: Any, next_batch: Any) -> Pair:
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

    def feed(self) -> None:
        """Feed the PCA with the parameters as they are; :meth:`step` does it when it is due.

        Raises:
            ValueError: the monitor has no PCA.
        """
        if self.pca is None:
            raise ValueError("feed() needs a monitor with a pca")
        self.pca.partial_fit(self.probe.gradients.flatten())
        self._pca_steps.append(self._clock.clone())
        self._update_basis(self.pca)

    @property
    def due(self) -> bool:
        """Whether the next call of :meth:`step` measures."""
        return self._steps % self.every == 0

    @property
    def steps(self) -> int:
        """How many steps there were, replays included; reading it waits for the device."""
        return int(self._clock)

    @property
    def last(self) -> dict[str, Any] | None:
        """The latest record, or None; reading it waits for the device."""
        row = self._records.last()
        return None if row is None else self._record(settled(row[None])[0])

    def records(self) -> pd.DataFrame:
        """One row per measurement: ``step``, ``method``, ``measure_seconds`` and :attr:`fields`.

        Reading is the only point that waits for the device. Units: the defect, its floor and the reference are one
        over the loss; ``grad_norm`` is the loss per unit of theta; the rest are ratios, except ``bracket_norm``
        (loss squared over theta cubed). ``rho`` is ``|delta_perp| / |delta|``, ``exec_fraction`` is
        ``|delta_par| / |delta|``, ``exec_random_ratio`` divides it by its mean over random subspaces of R^P, and
        ``exec_matched_ratio`` does so within the coordinates on which the basis lives. ``step_alignment`` is the mean
        over the pairs of ``|cos|`` between the last training step and ``delta``, ``step_share`` the length of the
        step's part in the span of all deltas over its own (Xu, arXiv 2602.16746); their ratios divide them by their
        exact means for random directions (:class:`grokcurv.subspace.RandomBaseline`). NaN where there was no basis or
        no step yet, or nothing trustworthy.
        """
        import pandas as pd

        self._check_gradient()
        rows = settled(self._records.read())
        head, values = rows[:, : len(HEAD)], rows[:, len(HEAD) :]
        frame = pd.DataFrame(values.numpy(), columns=list(self.fields))
        frame.insert(0, "step", head[:, 0].numpy().astype("int64"))
        frame.insert(5, "method", pd.Series([METHODS[int(m)] for m in head[:, 1].tolist()], dtype="str"))
        frame["reliable"] = frame["reliable"] == 1.0
        frame["measure_seconds"] = head[:, 2].numpy()
        return frame

    def pca_records(self) -> pd.DataFrame:
        """PC1 % of every expanding window of the trajectory: columns ``step``, ``matrix``, ``pc1_percent``."""
        import pandas as pd

        if self.pca is None or not self._pca_steps:
            return pd.DataFrame({"step": pd.Series(dtype="int64"), "matrix": pd.Series(dtype="str"), "pc1_percent": []})
        names = [s.name for s in self.pca.segments] if self.pca.segments else ["all"]
        history = 100.0 * self.pca.pc1_history_.reshape(len(self._pca_steps), len(names)).cpu().numpy()
        frame = pd.DataFrame(history, columns=names)
        frame.insert(0, "step", self._fed_at())
        return frame.melt("step", var_name="matrix", value_name="pc1_percent").sort_values("step", kind="stable")

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on in another process: counters, records and the PCA; tensors and plain values."""
        rows = self._records.read()
        head = rows[:, : len(HEAD)].tolist()
        return {
            "steps": self.steps,
            "pca_steps": self._fed_at(),
            "row_steps": [int(row[0]) for row in head],
            "row_methods": [METHODS[int(row[1])] for row in head],
            "row_seconds": [row[2] for row in head],
            "row_gradients": [int(row[3]) for row in head],
            "confirmations": self._confirmations,
            "distrusted": self._distrusted,
            "unlogged": len(self._unlogged),
            "rows": rows[:, len(HEAD) :].contiguous(),
            "checked": dict(self._checked),
            **self.probe.state_dict(),
            "before": self._before.clone() if self._before is not None else None,
            "pca": self.pca.state_dict() if self.pca is not None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; the monitor must have been built with the same settings.

        Raises:
            ValueError: the state has a PCA, or alignments, and the monitor has none, or the other way round.
        """
        for name, saved, here in (
            ("a pca", state["pca"] is not None, self.pca is not None),
            ("alignment", state["rows"].shape[1] > len(FIELDS), self.alignment),
        ):
            if saved != here:
                raise ValueError(f"state was saved with {name} and the monitor has none, or the other way round")
        if state["rows"].shape[1] != len(self.fields):
            raise ValueError(
                f"state has rows of {state['rows'].shape[1]} numbers and this version records {len(self.fields)}: "
                "it was saved by another version of grokcurv"
            )
        device = self.probe.gradients.device
        self._steps = state["steps"]
        self._clock.fill_(state["steps"])
        self._pca_steps = [torch.tensor(step) for step in state["pca_steps"]]
        columns = (
            state["row_steps"],
            (METHODS.index(RENAMED.get(method, method)) for method in state["row_methods"]),
            state["row_seconds"],
            state["row_gradients"],
        )
        head = torch.tensor(list(zip(*columns, strict=True)), dtype=torch.float64).reshape(-1, len(HEAD))
        rows = torch.cat([head, state["rows"].to("cpu", torch.float64)], dim=1)
        self._records = DeviceBuffer(rows.shape[1], device)
        self._records.extend(rows)
        self._checked = dict(state["checked"])
        self._before = state["before"].to(device, copy=True) if state["before"] is not None else None
        self.probe.load_state_dict(state)
        self._confirmations, self._distrusted = state["confirmations"], state["distrusted"]
        self._unlogged = list(rows[len(rows) - state["unlogged"] :])
        self._gradient_verdicts.clear()
        self._verdicts.clear()
        self._gave_up = False
        for reliable in rows[:, len(HEAD) + FIELDS.index("reliable")]:  # as they came in then
            self._next_method()
            self._note(reliable)
        if self.pca is not None:
            self.pca.load_state_dict(state["pca"])
            self._update_basis(self.pca)

    def _fed_at(self) -> list[int]:
        return [int(step) for step in self._pca_steps]

    def _update_basis(self, pca: StreamingPCA) -> None:
        """The execution basis so far. Two rows span one direction: the basis waits until every block is full."""
        on_cpu = not is_asynchronous(self.probe.gradients.device)
        # On an accelerator the count of rows is there, and reading it would wait; how often the PCA was fed is known
        # here.
        seen = pca.n_samples_seen_ if on_cpu else len(self._pca_steps)
        if pca.method_ == "sketch":
            self.probe.gradients.note(
                "basis",
                False,
                "the PCA keeps a sketch of the trajectory, as 'auto' does for very long vectors, and no directions",
                "rho and the exec_* columns are NaN; give a StreamingPCA(method='incremental') or one with segments",
            )
        if seen <= BASIS_COMPONENTS or pca.method_ == "sketch":
            return
        basis = Subspace.from_pca(pca, n_components=BASIS_COMPONENTS, size=self.probe.gradients.size)
        if self._baselines is None:
            sizes = torch.tensor([basis.size, basis.support_size], dtype=torch.float64)
            full, matched = self.probe.gradients.partition.all_reduce_sum(sizes)[0].tolist()
            self._baselines = RandomBaseline(basis.dim, int(full)), RandomBaseline(basis.dim, int(matched))
        self.probe.update_basis(basis)

    def _measure(self, step: int, batch: Any, next_batch: Any) -> Asking[None]:
        start = time.perf_counter()
        probe, device = self.probe, self.probe.gradients.device
        on_cpu, captured = not is_asynchronous(device), capturing(device)
        source = [(batch, next_batch)] if self.sampler is None else self._draw(self.sampler, step)
        # What is wanted of this step: the form, whether a check is due, and whether .grad may stand for the first
        # gradient.
        method = probe.method if captured else self._next_method()
        check = self._check_due(method, step)
        known = self._training_gradient(method, check)
        measure = partial(probe.measuring, source, design=self.design, seed=step, keep_delta=self.alignment)
        stats = yield from measure(method=method, first_gradient=known, check=check)
        reference = stats.reference
        # drowned: true on a CPU where the difference form, asked for, has lost its digits; the bracket of the same
        # pairs then takes the row, if the model has second derivatives. On an accelerator the host learns of it later
        # (_next_method).
        gradient = self._judge_gradient(known, stats, check)
        drowned = on_cpu and self._falls_back and not bool(stats.reliable.all())
        if drowned and probe.gradients.has_true_brackets(source[0][0], seed=2 * step):
            del stats  # and its deltas
            stats = yield from measure(method="bracket", check=self._check_due("bracket", step))
            gradient = torch.where(gradient == USED, gradient * OWN, gradient)
        values = self._values(stats, reference)
        if not captured:
            self._note(values[FIELDS.index("reliable")])
        seconds = math.nan if captured else time.perf_counter() - start
        head = [torch.full_like(values[0], x) for x in (METHODS.index(stats.method), seconds)]
        self._records.append(torch.cat([torch.stack([self._clock.to(values.dtype), *head, gradient]), values]))
        if self.loggers and not captured:
            self._log()

    def _log(self) -> None:
        """Hand the loggers what is settled: rows that rest on ``.grad`` wait for the next check."""
        row = self._records.last()
        assert row is not None
        self._unlogged.append(row)
        gradients = [int(row[HEAD.index("gradient")]) for row in self._unlogged]
        # A logger cannot take back what it was given, so rows that rest on a .grad which nobody has confirmed stay
        # here.
        if USED in gradients and gradients[-1] not in (CONFIRMED, REFUTED):
            return
        rows, self._unlogged = settled(torch.stack(self._unlogged)), []
        for row in rows:
            record = self._record(row)
            for logger in self.loggers:
                logger.log(record, step=record["step"])

    def _draw(self, sampler: Sampler, step: int) -> list[Pair]:
        """What the sampler draws. From visible generators it draws as if they were its own: training's stay put."""
        if callable(at := getattr(sampler, "at", None)):
            at(step)
        with isolated(step):
            if self.design == "independent":
                return [sampler() for _ in range(self.pairs)]
            batches = [batch for _ in range(self.pairs // 2 + 1) for batch in sampler()]
        return list(pairwise(batches[: self.pairs + 1]))

    def _check_due(self, method: Method, step: int) -> bool:
        """Whether the errors of the latest check are too old for this step; if so, it is taken to be made."""
        age = step - self._checked.get(method, -self.check_every)
        # Every replay of a captured step checks: whether a check is due is not something that a graph can decide.
        due = age >= self.check_every or capturing(self.probe.gradients.device)
        if due:
            self._checked[method] = step
        return due

    def _next_method(self) -> Method:
        """The probe's, or on an accelerator the bracket, once the difference form is known to have failed."""
        method = self.probe.method
        if not self._falls_back or not is_asynchronous(self.probe.gradients.device):
            return method
        # The verdict on a row arrives while later ones are launched; reading it a fixed number of measurements later
        # makes a resumed run decide at the same step as an undisturbed one.
        while len(self._verdicts) >= VERDICT_LAG:
            self._gave_up = self._gave_up or not bool(self._verdicts.popleft()())
        return "bracket" if self._gave_up else method

    def _note(self, reliable: Tensor) -> None:
        """Have the host learn, in its own time, whether the measurement was reliable."""
        if self._falls_back and is_asynchronous(self.probe.gradients.device) and not self._gave_up:
            self._verdicts.append(copy_to_host_async(reliable))

    def _values(self, stats: CommutatorStats, reference: Tensor) -> Tensor:
        """One row of the fields, float64 on the device; what rests on an unreliable delta is NaN."""
        reliable = stats.reliable.all()
        delta = stats.bracket_norm * stats.eta.square()
        # Of a unit vector along delta, and so of the length of any part of it.
        share_error = stats.noise_floor / stats.defect
        pairs = {
            "defect": stats.defect,
            "bracket_norm": stats.bracket_norm,
            "noise_floor": stats.noise_floor,
            "grad_cosine": stats.grad_cosine,
            "reference": reference,
        }
        errors = {"grad_cosine": stats.grad_cosine_error}
        if stats.energies is not None:
            pairs["attention_fraction"] = stats.energies.sum(1).sqrt() / delta
            errors["attention_fraction"] = share_error
        if stats.parallel is not None and stats.residual is not None and stats.support is not None and self._baselines:
            full, matched = self._baselines
            inside, support = stats.parallel / delta, stats.support / delta
            # The rows of the basis are of length one to their own rounding only: a rho below its root is none.
            assert self.probe.basis is not None
            least = math.sqrt(2.0 * full.dim * torch.finfo(self.probe.basis.values.dtype).eps)
            rho = stats.residual / delta
            pairs["rho"], errors["rho"] = torch.where(rho < least, math.nan, rho), share_error
            pairs["exec_fraction"], errors["exec_fraction"] = inside, share_error
            pairs["exec_random_ratio"] = inside / full.mean
            pairs["exec_matched_ratio"] = inside / support / matched.mean
            errors["exec_matched_ratio"] = share_error * (1.0 + inside / support) / support / matched.mean
        # Not a tensor of three levels: on an accelerator it would come from the host.
        table = torch.stack(list(pairs.values()))
        lower, middle, upper = (quantile(table, level) for level in (0.25, 0.5, 0.75))
        row = dict(zip(pairs, middle, strict=True))
        for name in ("defect", "reference"):
            place = list(pairs).index(name)
            row |= {f"{name}_median": row.pop(name), f"{name}_p25": lower[place], f"{name}_p75": upper[place]}
        row |= {"share_error": share_error.amax(), "grad_cosine_error": stats.grad_cosine_error.amax()}
        bounds = {name: error.amax() for name, error in errors.items()}
        if stats.delta is not None and self._before is not None:
            aligned, aligned_bounds = self._aligned(stats.delta, self._before, row["share_error"])
            row |= aligned
            bounds |= aligned_bounds
        # A row is a number or NaN: what rests on a delta that drowned is not shown. What is kept is true whatever
        # became of delta: the floor itself, the angle of the gradients, which has an error of its own, and the
        # published formula, which is reported with its faults. Columns that have a bound are NaN alone where that is
        # too wide.
        if self._floored:
            kept = ("noise_floor", "grad_cosine", "grad_cosine_error", "share_error", *REFERENCE_FIELDS)
            row = {name: x if name in kept else torch.where(reliable, x, math.nan) for name, x in row.items()}
            row |= {name: _clear(row[name], bound) for name, bound in bounds.items()}
            for ratio, share in SHARES.items():  # which is the same, in other units
                if ratio in row:
                    row[ratio] = torch.where(row[share].isnan(), math.nan, row[ratio])
        row["reliable"] = reliable.to(torch.float64)
        row["grad_norm"] = quantile(torch.cat([stats.grad_norm_a, stats.grad_norm_b]), 0.5)
        missing = torch.full_like(row["reliable"], math.nan)
        return torch.stack([row.get(name, missing) for name in self.fields])

    def _aligned(
        self, delta: Tensor, before: Tensor, share_error: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """:data:`ALIGNMENT_FIELDS` of the step from ``before`` to the parameters as they are, and bounds of errors."""
        engine = self.probe.gradients
        step = engine.flatten().to(delta.dtype) - before
        cosines, share, correlations = alignment(step, delta, engine.partition)
        count, size = len(delta), engine.segments[-1].stop
        mean = cosines.abs().mean()
        chance, share_chance = (RandomBaseline(dim, size).mean for dim in (1, min(count, size)))
        # The span of n unit vectors turns by at most the length of all their errors over their least singular value.
        (values,), _ = ops.eigh(correlations[None], count)
        spread = share_error * math.sqrt(count) / values.amin().clamp(min=0.0).sqrt()
        row = {
            "step_alignment": mean,
            "step_alignment_ratio": mean / chance,
            "step_share": share,
            "step_share_ratio": share / share_chance,
            "step_alignment_error": torch.where(mean.isnan(), math.nan, share_error),
            "step_share_error": torch.where(mean.isnan(), math.nan, spread.clamp(max=1.0)),
        }
        bounds = {
            "step_alignment": share_error,
            "step_share": spread,
        }
        return row, bounds

    def _record(self, row: Tensor) -> dict[str, Any]:
        step, method, seconds, _, *values = row.tolist()
        record: dict[str, Any] = dict(zip(self.fields, values, strict=True))
        record["reliable"] = record["reliable"] == 1.0
        return {"step": int(step), "method": METHODS[int(method)], **record, "measure_seconds": seconds}

    def _training_gradient(self, method: Method, check: bool) -> Tensor | None:
        """The flat ``.grad``, if it stands for that of ``loss_fn``, or is to be compared with it now.

        Not for models that draw at random, whose masks were others.
        """
        engine = self.probe.gradients
        while len(self._gradient_verdicts) >= VERDICT_LAG:
            self._take_verdict(bool(self._gradient_verdicts.popleft()()))
        if self.sampler is not None or method == "bracket" or self.gradient == "own" or self._distrusted:
            return None
        # At a check .grad is always looked at. Between checks it stands in for a gradient only where the trainer
        # vouches for it, or where checks have found it right so often that a chance agreement is out of the question.
        if engine.stochastic or not (self.gradient == "trusted" or check or self._confirmations >= CONFIRMATIONS):
            return None
        gradient = engine.flatten_grad()
        # One that overflowed, of a step that a GradScaler will skip, says nothing of the loss.
        return gradient if is_asynchronous(engine.device) or bool(gradient.isfinite().all()) else None

    def _judge_gradient(self, known: Tensor | None, stats: CommutatorStats, check: bool) -> Tensor:
        """() what this row has to do with ``.grad``; a check that finds it wrong is the end of its use."""
        own, engine = torch.full_like(stats.noise_floor[0], OWN), self.probe.gradients
        exactly = engine.traits.nonsmooth and engine.dtype != torch.float64 and self.probe.noise_floor
        if known is None or exactly or engine.stochastic:
            return own  # the probe has not used it
        waits = is_asynchronous(engine.device)
        if GIVEN not in self.probe.errors or not (check if waits else bool(stats.exact[0])):
            return own if self.gradient == "trusted" else own + USED
        distance, error, length = self.probe.errors[GIVEN]
        # The yardstick is the probe's own rounding at the same parameters: a .grad further off than that is of another
        # loss, batch or mask.
        right = (distance <= GRADIENT_MARGIN * error) | ~distance.isfinite()
        if self._gradient_ratio is None:  # late in training rounding alone may make a gradient longer or shorter
            self._gradient_ratio = torch.where(right, 1.0, engine.partition.norm(known) / length)
            if not waits:
                self._check_gradient()
        if not capturing(engine.device):
            if waits:
                self._gradient_verdicts.append(copy_to_host_async(right))
            else:
                self._take_verdict(bool(right))
        return torch.where(right, own + CONFIRMED, own + REFUTED)

    def _take_verdict(self, right: bool) -> None:
        self._confirmations += right
        if right or self._distrusted or self.gradient == "trusted":
            return
        self._distrusted = True
        self.probe.gradients.note(
            ".grad",
            False,
            ".grad is further from the gradient of loss_fn on the batch given to step() than rounding explains",
            "the monitor computes its own from here on; rows that used it since the last good check are NaN",
        )

    def _check_gradient(self) -> None:
        engine = self.probe.gradients
        if self._gradient_ratio is None or engine.stochastic or engine.evaluator.stateful:
            return  # a state that training's forward pass has changed, or other masks, make other gradients
        (ratio,) = self._gradient_ratio[None].tolist()
        if math.isfinite(ratio) and abs(ratio - 1.0) > GRADIENT_TOLERANCE:
            raise ValueError(
                f"|.grad| is {ratio:.3g} times the norm of the gradient of loss_fn on the batch given to step(); "
                "call step() after backward and before clipping, with the same loss; with a GradScaler after "
                "scaler.unscale_(optimizer); with accumulated gradients give a batch and a loss_fn that stand for all "
                "of them. Or give the monitor a sampler"
            )


def settled(rows: Tensor) -> Tensor:
    """Rows of records as far as they are known to be true.

    One that rests on a ``.grad`` is reliable if the next check has found that right, NaN if wrong, and until then a
    number that is not called reliable.
    """
    gradients = rows[:, HEAD.index("gradient")]
    if not bool((gradients == USED).any()):
        return rows
    # Backwards: each row takes the verdict of the first check after it.
    rows, verdict = rows.clone(), USED
    reliable = len(HEAD) + FIELDS.index("reliable")
    measured = [len(HEAD) + i for i, name in enumerate((*FIELDS, *ALIGNMENT_FIELDS)) if name not in REFERENCE_FIELDS]
    for row in reversed(range(len(rows))):
        gradient = int(gradients[row])
        if gradient in (CONFIRMED, REFUTED):
            verdict = gradient
        elif gradient == USED and verdict != CONFIRMED:
            if verdict == REFUTED:
                rows[row, [column for column in measured if column < rows.shape[1]]] = math.nan
            rows[row, reliable] = 0.0
    return rows


def _clear(value: Tensor, bound: Tensor) -> Tensor:
    """The value, or NaN where its error may be too large to say anything."""
    absolute, relative = CLEAR
    return torch.where((bound > absolute) & (bound > relative * value.abs()), math.nan, value)


def _attention(model: nn.Module) -> tuple[Segment, ...]:
    """All trainable parameters of the model's attention modules, weights and biases."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    patterns = [f"{name}.*" if name else "*" for name in names]
    return tuple(s for s in select_segments(model, *patterns) if s.name in trainable) if patterns else ()
