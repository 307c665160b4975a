"""Commutator defects at a step of training, and how they lie to the trajectory."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from grokcurv import ops
from grokcurv.commutator import METHODS, CommutatorProbe, CommutatorStats, Design, Method
from grokcurv.device_buffer import capturing, copy_to_host_async, is_asynchronous
from grokcurv.measures.anatomy import (
    ANATOMY_BOUNDS,
    ANATOMY_FIELDS,
    COSINE_FIELDS,
    UNITS,
    Bracket,
    median_cosine,
    products,
)
from grokcurv.measures.base import Measure, quantiles, unclear
from grokcurv.measures.training_gradient import VERDICT_LAG, TrainingGradient
from grokcurv.measures.trajectory import Trajectory
from grokcurv.pairs import PairGradients, PairOfRuns, rows_of
from grokcurv.subspace import RandomBaseline, alignment

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
    "exec_matched_ratio": "exec_matched",
    "step_alignment_ratio": "step_alignment",
    "step_share_ratio": "step_share",
}
"""Ratios to what chance would give, and what each is without: a column, or the part of delta's length on the basis's
coordinates that lies in the basis."""

BOUNDS = {
    "grad_cosine": "grad_cosine_error",
    **dict.fromkeys(("attention_fraction", "rho", "exec_fraction", "exec_random_ratio"), "share_error"),
    "exec_matched_ratio": "exec_matched_error",
    **dict.fromkeys(("step_alignment", "step_alignment_ratio"), "step_alignment_error"),
    **dict.fromkeys(("step_share", "step_share_ratio"), "step_share_error"),
    **ANATOMY_BOUNDS,
}
"""Columns that are NaN alone where an error is too wide for them, and that error."""

KEPT = (
    *("noise_floor", "reliable", "grad_norm", "grad_cosine", "grad_cosine_error", "share_error", *REFERENCE_FIELDS),
    *(name for name in ANATOMY_FIELDS if name not in COSINE_FIELDS),
)
"""Columns that are true whatever became of delta: the floor itself, the gradients' length and angle and the products
that delta is the difference of, which have errors of their own, and the published formula, which is reported with its
faults."""


Plan = tuple[tuple[Method, bool, tuple[int, ...]], ...]
"""Which runs are measured by which method, and whether that is checked."""


class Commutator:
    """Commutator defects of R runs: what :data:`FIELDS` names.

    A measurement whose difference form drowns in rounding is repeated as the exact bracket of the same pairs, run by
    run; a row that neither can vouch for is NaN. On an accelerator nothing waits: the host knows of it two measurements
    later, and from then on measures the bracket of that run.

    Args:
        probe: of R runs.
        trajectory: on whose execution bases the probe projects, if there is one.
        training_gradient: what is known of the gradients that training leaves.
        design, check_every, alignment, anatomy: as for :class:`grokcurv.CurvatureMonitor`.
        measures: those whose numbers come from the pairs' gradients.

    Attributes:
        columns: what a row has: :data:`FIELDS`, those of ``alignment``, of ``anatomy`` and of ``measures``.
        looks_back: whether a row looks back on the call before, and on every delta: for its alignment or its anatomy.
        seconds: of the host that the latest measurement took by a method, checked or not, brackets that took its rows
            aside.
    """

    def __init__(
        self,
        probe: CommutatorProbe,
        trajectory: Trajectory | None,
        training_gradient: TrainingGradient,
        *,
        design: Design,
        check_every: int,
        alignment: bool,
        anatomy: bool = False,
        measures: Sequence[Measure] = (),
    ) -> None:
        self.probe, self.trajectory, self.training_gradient = probe, trajectory, training_gradient
        self.design, self.check_every, self.alignment = design, check_every, alignment
        self.looks_back, self.measures = alignment or anatomy, tuple(measures)
        self._own = FIELDS + alignment * ALIGNMENT_FIELDS + anatomy * ANATOMY_FIELDS
        self.columns = (*self._own, *(name for measure in self.measures for name in measure.columns))
        probe.anatomy = anatomy
        self._bracket = Bracket(probe.gradients) if anatomy else None
        self._gradients: dict[int, Tensor] = {}  # (K, 4) of each run, for the measures
        # Constants of every row, on the device, where none is copied while it measures.
        self._missing = torch.full((), math.nan, dtype=torch.float64, device=probe.gradients.device)
        self._method = torch.arange(len(METHODS), dtype=torch.float64, device=probe.gradients.device)
        self._rests = torch.tensor([[name not in KEPT] for name in self._own], device=probe.gradients.device)
        self.seconds: dict[tuple[Method, bool], float] = {}
        self._floored = probe.noise_floor  # otherwise rows are numbers that nobody vouches for
        self.falls_back = probe.method == "difference" and probe.gradients.brackets and probe.noise_floor
        runs = probe.gradients.runs
        self._gave_up = [False] * runs  # the difference form
        self._verdicts: deque[Callable[[], Tensor]] = deque()  # (R,) of the latest rows, whether they were reliable
        self._checked: list[dict[str, int]] = [{} for _ in range(runs)]  # the step of the latest check, by method
        self._before: Tensor | None = None  # to look back on: (R, P) at the call before one that measures

    def remember(self, wanted: bool) -> None:
        """Keep the parameters as they are, for what the training step that follows is set beside."""
        engine, self._before = self.probe.gradients, None
        if wanted and self.looks_back:
            theta = engine.thetas(range(engine.runs))
            self._before = theta.clone() if engine.shared else theta  # a copy already

    def plan(self, step: int) -> Plan:
        """How each run is to be measured at this step; checks that are due are taken to be made."""
        plan = self.foresee(step)
        for method, check, runs in plan:
            self._take_checked(method, step, runs if check else ())
        return plan

    def foresee(self, step: int) -> Plan:
        """The plan of a step, if it should be measured."""
        groups: dict[tuple[Method, bool], list[int]] = {}
        for run, method in enumerate(self._methods()):
            groups.setdefault((method, self._check_due(method, step, run)), []).append(run)
        return tuple((method, check, tuple(runs)) for (method, check), runs in groups.items())

    def carried_out(self, step: int, plan: Plan, found: Tensor) -> Plan:
        """The plan of a measurement as it was carried out: with an entry more for each run whose row is a bracket's.

        That is where the difference form was not reliable. ``found`` is (R, columns) of the rows measured.
        """
        if is_asynchronous(self.probe.gradients.device):
            return plan
        # On a CPU the numbers are there; on a device, where looking would wait, no row is taken by another method.
        brackets = (found[:, 0] == METHODS.index("bracket")).tolist()
        taken = [run for method, _, runs in plan if method != "bracket" for run in runs if brackets[run]]
        return *plan, *(("bracket", self._checked[run]["bracket"] == step, (run,)) for run in taken)

    def nothing(self) -> Tensor:
        """What :meth:`observe` finds where there is no pair."""
        found = self._missing.repeat(self.probe.gradients.runs, 2 + len(self.columns))
        found[:, 0] = METHODS.index(self.probe.method)
        found[:, (1, 2 + FIELDS.index("reliable"))] = 0.0
        return found

    def observe(self, step: int, pairs: Sequence[PairOfRuns], plan: Plan) -> Tensor:
        """(R, 2 + columns) float64 on the device: the method, by its place, what the row has to do with ``.grad``, and
        the numbers. A captured one is replayed as it was planned."""
        if self.trajectory is not None:
            self.trajectory.update_basis()
        rows: dict[int, Tensor] = {}
        for method, check, runs in plan:
            rows |= zip(runs, self._observe(step, pairs, list(runs), method, check).unbind(0), strict=True)
        if self._bracket is not None:
            self._bracket.advance()
        found = torch.stack([rows[run] for run in range(len(rows))])
        if not self.measures:
            return found
        gradients = PairGradients(*torch.stack([self._gradients[run] for run in range(len(rows))], 1).unbind(-1))
        return torch.cat([found, *(measure.observe_pairs(pairs, gradients) for measure in self.measures)], 1)

    def _observe(self, step: int, pairs: Sequence[PairOfRuns], runs: list[int], method: Method, check: bool) -> Tensor:
        """The rows of some runs, all by one method."""
        probe, engine = self.probe, self.probe.gradients
        source = pairs if len(runs) == engine.runs else [_of_runs(pair, runs) for pair in pairs]
        known = () if method == "bracket" else self.training_gradient.offered(runs, check)
        options: dict[str, Any] = {"design": self.design, "seed": step, "keep_delta": self.looks_back}
        begun = time.perf_counter()
        stats = probe.measure_runs(source, runs, method=method, check=check, first_gradients=known, **options)
        self.seconds[method, check] = time.perf_counter() - begun
        gradient = self.training_gradient.judge(known, stats, runs, check)
        reference = stats.reference.view(-1, len(runs))
        reliable = stats.reliable.view(-1, len(runs)).all(0)
        rows = self._rows(stats, runs, reliable, reference, gradient)
        if not self.falls_back or method == "bracket" or is_asynchronous(engine.device):
            return rows
        # On a CPU, where the difference form has lost its digits the bracket of the same pairs takes the row, if the
        # model has second derivatives. On an accelerator the host learns of it later (_methods).
        well = reliable.tolist()
        del stats  # and its deltas
        for place, run in enumerate(runs):
            pair = source[0][0][place]
            if well[place] or not engine.has_true_brackets(pair, seed=2 * step):
                continue
            again = self._check_due("bracket", step, run)
            self._take_checked("bracket", step, [run] if again else ())
            alone = [_of_runs(pair, [place]) for pair in source]
            stats = probe.measure_runs(alone, [run], method="bracket", check=again, **options)
            own = self.training_gradient.unused(gradient[place : place + 1])
            reliable = stats.reliable.all()[None]
            rows[place] = self._rows(stats, [run], reliable, reference[:, place : place + 1], own)[0]
            del stats
        return rows

    def forget_checks(self) -> None:
        """Have the next measurement make the check that is not due yet."""
        for checked in self._checked:
            checked.clear()

    def _check_due(self, method: Method, step: int, run: int) -> bool:
        """Whether the errors of a run's latest check are too old for this step."""
        # Every replay of a captured step checks: whether a check is due is not something that a graph can decide.
        latest = self._checked[run].get(method)
        return latest is None or step - latest >= self.check_every or capturing(self.probe.gradients.device)

    def _take_checked(self, method: Method, step: int, runs: Sequence[int]) -> None:
        for run in runs:
            self._checked[run][method] = step

    def _methods(self) -> list[Method]:
        """For each run the probe's, or on an accelerator the bracket, once its difference form is known to fail."""
        # The verdict on a row arrives while later ones are launched; reading it a fixed number of measurements later
        # makes a resumed run decide at the same step as an undisturbed one.
        while len(self._verdicts) >= VERDICT_LAG and not capturing(self.probe.gradients.device):
            verdict = self._verdicts.popleft()().tolist()
            self._gave_up = [gave or not well for gave, well in zip(self._gave_up, verdict, strict=True)]
        return ["bracket" if gave else self.probe.method for gave in self._gave_up]

    def note(self, row: Tensor) -> None:
        """Have the host learn, in its own time, which runs' measurements were reliable, of what was observed."""
        if self.falls_back and is_asynchronous(self.probe.gradients.device) and not all(self._gave_up):
            self._verdicts.append(copy_to_host_async(row[:, 2 + FIELDS.index("reliable")]))

    def _rows(
        self, stats: CommutatorStats, runs: list[int], reliable: Tensor, reference: Tensor, gradient: Tensor
    ) -> Tensor:
        """(R, 2 + columns): what rests on an unreliable delta is NaN."""
        of = stats.each(lambda x: x.view(-1, len(runs), *x.shape[1:]))  # (K, R, ...) each
        delta = of.bracket_norm * of.eta.square()
        pairs = {
            "defect_median": of.defect,
            "reference_median": reference,
            "bracket_norm": of.bracket_norm,
            "noise_floor": of.noise_floor,
            "grad_cosine": of.grad_cosine,
        }
        # share_error is of a unit vector along delta, and so of the length of any part of it.
        share_error = of.noise_floor / of.defect
        errors = {"grad_cosine_error": of.grad_cosine_error, "share_error": share_error}
        if of.product_norm_a is not None:
            of_products, their_errors = products(of, self._floored)
            pairs, errors = pairs | of_products, errors | their_errors
        if of.energies is not None:
            pairs["attention_fraction"] = of.energies.sum(2).sqrt() / delta
        baselines = self.trajectory and self.trajectory.baselines
        if of.parallel is not None and of.residual is not None and of.support is not None and baselines:
            full, matched = baselines
            inside, support = of.parallel / delta, of.support / delta
            # The rows of the basis are of length one to their own rounding only: a rho below its root is none.
            least = math.sqrt(2.0 * full.dim * torch.finfo(self.probe.bases[0].values.dtype).eps)
            rho = of.residual / delta
            pairs["rho"], pairs["exec_fraction"] = rho.masked_fill(rho < least, math.nan), inside
            pairs["exec_random_ratio"] = inside / full.mean
            pairs["exec_matched"] = within = inside / support
            pairs["exec_matched_ratio"] = within / matched.mean
            errors["exec_matched_error"] = share_error * (1.0 + within) / support
        # Tables (columns, K, R), of which each column has its quantiles over the pairs, or its greatest error.
        lower, middle, upper = quantiles(torch.stack(list(pairs.values())), 0.25, 0.5, 0.75, dim=1)
        row = dict(zip(pairs, middle, strict=True))
        row |= zip(errors, torch.stack(list(errors.values())).amax(1), strict=True)
        for name, low, high in zip(("defect", "reference"), lower, upper, strict=False):
            row |= {f"{name}_p25": low, f"{name}_p75": high}
        if of.delta is not None and self._before is not None:
            row |= self._beside_the_step(of.delta, self._before, runs, row["share_error"])
        if self._bracket is not None:
            row |= self._bracket.cosine(of, runs, row["share_error"])
        if self.measures:
            gradients = PairGradients(of.grad_norm_a, of.grad_norm_b, of.grad_cosine, of.grad_cosine_error)
            self._gradients |= zip(runs, torch.stack(gradients, -1).unbind(1), strict=True)
        row["reliable"] = reliable
        (row["grad_norm"],) = quantiles(torch.cat([of.grad_norm_a, of.grad_norm_b]), 0.5)

        def table(of: Mapping[str, str]) -> Tensor:
            """(columns, R): what stands for each."""
            return torch.stack([row.get(of.get(name, name), missing) for name in self._own])

        missing = self._missing.expand(len(runs))
        values = table({})
        # A row is a number or NaN: what rests on a delta that drowned is not shown, nor what an error is too wide for;
        # a ratio is not where the share is not that it is of.
        if self._floored:
            bounds = table({name: BOUNDS.get(name, "none") for name in self._own})
            units: Tensor | float = 1.0
            if self._bracket is not None:
                row["one"] = torch.ones_like(missing)
                units = table({name: UNITS.get(name, "one") for name in self._own})
            values = values.masked_fill(unclear(table(SHARES), bounds, units) | (self._rests & ~reliable), math.nan)
        method = self._method[METHODS.index(stats.method)].expand(len(runs))
        return torch.stack([method, gradient, *values], 1)

    def _beside_the_step(
        self, delta: Tensor, before: Tensor, runs: list[int], share_error: Tensor
    ) -> dict[str, Tensor]:
        """What sets delta beside the steps to the parameters as they are, (R,) each."""
        engine, found = self.probe.gradients, dict[str, Tensor]()
        steps = engine.thetas(runs).to(delta.dtype) - rows_of(before, runs)
        if self.alignment:
            found |= self._aligned(delta, steps, share_error)
        if self._bracket is not None:
            cosine = median_cosine(steps, delta, engine.partition)
            error = share_error.masked_fill(cosine.isnan(), math.nan)
            found |= {"bracket_update_cosine": cosine, "bracket_update_cosine_error": error}
        return found

    def _aligned(self, delta: Tensor, steps: Tensor, share_error: Tensor) -> dict[str, Tensor]:
        """:data:`ALIGNMENT_FIELDS`."""
        engine = self.probe.gradients
        cosines, shares, correlations = alignment(steps, delta, engine.partition)
        count, size = len(delta), engine.segments[-1].stop
        mean = cosines.abs().mean(1)
        chance, share_chance = (RandomBaseline(dim, size).mean for dim in (1, min(count, size)))
        # The span of n unit vectors turns by at most the length of all their errors over their least singular value.
        values, _ = ops.eigh(correlations, count)
        spread = share_error * math.sqrt(count) / values.amin(1).clamp(min=0.0).sqrt()
        return {
            "step_alignment": mean,
            "step_alignment_ratio": mean / chance,
            "step_share": shares,
            "step_share_ratio": shares / share_chance,
            "step_alignment_error": share_error.masked_fill(mean.isnan(), math.nan),
            "step_share_error": spread.clamp(max=1.0).masked_fill(mean.isnan(), math.nan),
        }

    def state_dict(self, run: int = 0) -> dict[str, Any]:
        before = None if self._before is None else self._before[run].clone()
        bracket = {} if self._bracket is None else {"bracket": self._bracket.state_dict(run)}
        return {"checked": dict(self._checked[run]), "before": before, **bracket, **self.probe.checks.state_dict(run)}

    def load_state_dict(self, state: Mapping[str, Any], run: int = 0) -> None:
        """Restore :meth:`state_dict`; ``reliable`` says of all rows so far whether they were."""
        engine = self.probe.gradients
        self._checked[run] = dict(state["checked"])
        self.probe.checks.load_state_dict(state, run)
        if state["before"] is not None:
            if self._before is None:
                self._before = torch.empty(engine.runs, engine.size, dtype=engine.dtype, device=engine.device)
            self._before[run] = state["before"].to(engine.device)
        elif engine.runs == 1:
            self._before = None
        if self._bracket is not None:
            self._bracket.load_state_dict(state["bracket"], run)
        self._recall(state["reliable"], run)

    def _recall(self, reliable: Sequence[bool], run: int) -> None:
        """Have the verdicts on a run's rows come in as they did."""
        if not (self.falls_back and is_asynchronous(self.probe.gradients.device)):
            return
        settled = len(reliable) - VERDICT_LAG
        self._gave_up[run] = not all(reliable[: max(settled, 0)])
        latest = [verdict() for verdict in self._verdicts] if run else []
        while len(latest) < min(len(reliable), VERDICT_LAG):
            latest.append(torch.ones(self.probe.gradients.runs, dtype=torch.float64))
        for verdicts, well in zip(latest, reliable[max(settled, 0) :], strict=False):
            verdicts[run] = float(well)
        self._verdicts = deque(verdicts.clone for verdicts in latest)

    def keep(self, runs: list[int]) -> None:
        self._gave_up = [self._gave_up[run] for run in runs]
        self._checked = [self._checked[run] for run in runs]
        self._verdicts = deque(verdict()[runs].clone for verdict in self._verdicts)
        if self._before is not None:
            self._before = self._before[runs]
        if self._bracket is not None:
            self._bracket.keep(runs)
        self._gradients.clear()
        self.probe.keep(runs)


def _of_runs(pair: PairOfRuns, places: Sequence[int]) -> PairOfRuns:
    """The batches of some of the runs."""
    a, b = pair
    return [a[place] for place in places], [b[place] for place in places]
