"""How much two steps of the optimiser itself fail to commute: the order of batches, and curvature apart from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from grokcurv.checks import FAINT, SATURATED, STALE_MARGIN
from grokcurv.commutator import FLOOR_MARGIN, LAST_BITS, PADDING, CommutatorProbe
from grokcurv.evaluation import LOCK
from grokcurv.measures.base import Measure
from grokcurv.measures.training_gradient import TrainingGradient
from grokcurv.optim import row_norms
from grokcurv.pairs import PairOfRuns
from grokcurv.reference import compute_type
from grokcurv.state import ReferencedError, Snapshot
from grokcurv.steps import OptimizerRow, OptimizerState, muon, read_state

CHECK_EVERY = 100
"""Steps after which it is looked anew, in float64, how far rounding moves delta."""

ASTRAY = 1e-3
"""How far from the update that was foreseen, relative to it, training may go: rounding of moments, and no more."""

ASTRAY_MUON = 0.1
"""The same where torch's Muon orthogonalises in bfloat16."""


@dataclass
class Half:
    """What is known of a pair before its last gradient, g_B past the update on A.

    Attributes:
        rest: (R, P) delta, but for the last update: ``u_A - u_B - u_A'``.
        order: (R, P) delta with both gradients frozen at theta.
        point: (R, P) where the update on A leads.
        lengths: (R, 3) float64 of u_A, of u_B, and how far from ``point`` training may end.
        floor: (2, R) float64: ``opt_floor`` is the first and ``opt_defect`` times the second.
        settings: of the optimisers' blocks, for the second step; None where they hold tensors, which stay.
        layout: names and coordinates of the blocks.
        announced: copies of the tensors in the batches B.
    """

    rest: Tensor
    order: Tensor
    point: Tensor
    lengths: Tensor
    floor: Tensor
    settings: list[dict[str, Any]] | None
    layout: list[Any]
    announced: list[list[Tensor]]


class Here(NamedTuple):
    """Where training is: this step's gradient (R, P), the optimisers' state, the parameters (R, P), and their step."""

    gradient: Tensor
    state: OptimizerState
    theta: Tensor
    stepped: tuple[Tensor, OptimizerState]


class OptimizerCommutator(Measure):
    """The commutator of the optimiser's own maps: Phi_i(theta, s) is one whole step on batch i.

    Clipping, moments, step count, warm-up and decay are in Phi, and in s what the optimiser keeps. With u_i the update
    at (theta, s), delta = Phi_B(Phi_A(theta, s)) - Phi_A(Phi_B(theta, s)), of the parameters, and delta_0 the same with
    both gradients frozen at theta, a row has, in units of one over theta,

    ==================  =========================================================================================
    ``opt_defect``      \\|delta\\| / (\\|u_A\\| \\|u_B\\|)
    ``opt_order``       \\|delta_0\\| / (\\|u_A\\| \\|u_B\\|): what the order of batches does without curvature, through
                        moments, clipping and decay
    ``opt_curvature``   \\|delta - delta_0\\| / (\\|u_A\\| \\|u_B\\|): zero where the Hessian is; to first order of
                        ``J_AB H_B u_A - J_BA H_A u_B``, J the derivative of a second update by its gradient
    ``opt_floor``       the rounding floor of the three (``docs/numerics.md``); NaN where float64 cannot be had
    ==================  =========================================================================================

    Of plain gradient descent with learning rate eta (no momentum, decay or clipping) ``opt_defect`` is the commutator
    defect D of that eta (Xu, arXiv 2602.16746) and ``opt_order`` zero. All is formed from updates, not from
    parameters. Both updates of a pair have this step's settings, and in a warm-up the next step's learning rate is that
    of the next step; schedules that only the loop knows are not foreseen.

    With a sampler the first pair of a row is taken, and costs four gradients. Without one the pair is (this batch, next
    batch), and training itself takes one of the two orders: g_A(theta_t) and g_B(theta_(t+1)) are its own. So a row
    costs two gradients where ``.grad`` is trusted (``gradient="trusted"``), and three where it is not: then also that
    of each batch at the parameters of its own step, which serves two rows. The row of step t is complete at the next
    call of the monitor, and NaN until then. It stays NaN if that step had another batch than was announced, or if
    training went elsewhere than foreseen: a skipped step, another clipping than ``max_norm``, a group of parameters
    that was added. Three vectors of P are kept from step to step (12 P bytes in float32), and some 20 more for a moment
    while it measures; a check takes two gradients in float64, and as many vectors in that.

    A step that is captured in a CUDA graph cannot be measured so.

    >>> import torch
    >>> import grokcurv as gc
    >>> model, x, y = torch.nn.Linear(3, 2), torch.randn(96, 3), torch.randint(2, (96,))
    >>> loss_fn = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> monitor = gc.CurvatureMonitor(model, loss_fn, measures=[gc.OptimizerCommutator(optimizer)])
    >>> for batch, next_batch in monitor.lookahead([(x[i::3], y[i::3]) for i in range(3)]):
    ...     optimizer.zero_grad()
    ...     loss_fn(model, batch).backward()
    ...     monitor.step(batch, next_batch)
    ...     optimizer.step()
    >>> monitor.records().opt_order.gt(0).tolist()
    [True, True]

    Args:
        optimizer: that of the loop, or several; :func:`grokcurv.attach` and the trainer tell their own. AdamW, Adam,
            SGD and Muon are understood.
        max_norm: to which the loop clips gradients with ``torch.nn.utils.clip_grad_norm_``, between the monitor's step
            and the optimiser's. The trainer's optimisers know theirs.
        check_every: steps from one look in float64 at the rounding errors to the next.

    Raises:
        ValueError: a ``max_norm`` or ``check_every`` that is not positive; when the monitor is made, no optimiser, or
            one that is not understood, by its name.
    """

    name = "optimizer_commutator"
    columns = ("opt_defect", "opt_order", "opt_curvature", "opt_floor")
    needs_pairs = True

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] = (),
        max_norm: float | None = None,
        *,
        check_every: int = CHECK_EVERY,
    ) -> None:
        for name, value in {"max_norm": max_norm, "check_every": check_every}.items():
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        several = (optimizer,) if isinstance(optimizer, torch.optim.Optimizer) else optimizer
        self._optimizers: list[torch.optim.Optimizer | OptimizerRow] = list(several)
        self.max_norm, self.check_every = max_norm, check_every
        self._training: TrainingGradient | None = None
        self._half: Half | None = None
        self._here: Here | None = None

    def follow(self, optimizers: Sequence[torch.optim.Optimizer | OptimizerRow]) -> None:
        self._optimizers = list(optimizers)

    def follow_training(self, gradient: TrainingGradient) -> None:
        self._training = gradient

    def bind(self, probe: CommutatorProbe) -> None:
        """See that the optimisers are understood; ValueError with the name of one that is not."""
        engine = probe.gradients
        if not self._optimizers and not engine.shared:
            raise ValueError("OptimizerCommutator: no optimiser is known; pass optimizer=, or use grokcurv.attach")
        self._probe, self._engine = probe, engine
        if self._optimizers:
            try:
                read_state(self._optimizers, engine)
            except ValueError as error:
                raise ValueError(
                    f"OptimizerCommutator: {error}. What does not ask for the optimiser can be had: the monitor's own "
                    "defects, of plain gradient steps, and of UpdateDecomposition the norms that it knows"
                ) from error
        options: dict[str, Any] = {"dtype": torch.float64, "device": engine.device}
        self._unknown = torch.full((engine.runs, len(self.columns)), math.nan, **options)
        # Of the latest check of each run: the error of delta over the updates' length, and the gradient's length.
        self._checked = torch.full((engine.runs, 2), math.nan, **options)
        self._checked_at: int | None = None

    @property
    def pending(self) -> bool:
        return self._half is not None

    def observe(self, step: int, pairs: Sequence[PairOfRuns], due: bool) -> Tensor | None:
        """Measure the first pair, but for what only the next step will know."""
        here, self._here = self._here, None
        if not due:
            return None
        try:
            return self._observe(step, pairs[0], here) if pairs else self._unknown.clone()
        except ReferencedError:  # nothing can be evaluated while somebody holds the graph; the monitor notes it
            return self._unknown.clone()

    def _observe(self, step: int, pair: PairOfRuns, here: Here | None) -> Tensor:
        """Numbers of one row of each run: the optimiser's steps on A then B, against those on B then A."""
        a, b = map(list, pair)
        with self._evaluation(a, step):
            engine, successive = self._engine, self._training is not None
            seeds = (step, step + 1) if successive else (2 * step, 2 * step + 1)  # of A and of B
            g_a, state, theta, (u_a, s_a) = here or self._arrive(a, seeds[0])
            following = self._trusted(following=True)
            g_b = self._gradients(theta, b, seeds[1]) if following is None else following
            u_b, s_b = state.step(theta, g_b)
            past_a, past_b = theta + u_a, theta + u_b
            g_a2 = self._gradients(past_b, a, seeds[0])
            rest, frozen = u_a - (u_b + s_b.step(past_b, g_a2)[0]), s_a.step(past_a, g_b)[0]
            order = (u_a + frozen) - (u_b + s_b.step(past_b, g_a)[0])
            lengths = torch.stack([row_norms(u_a), row_norms(u_b)], 1)
            if self._check_due(step):
                error = self._error(theta, state, a, g_a, g_b, rest + frozen, seeds[0])
                self._checked = torch.stack([error / _joint(*lengths.unbind(1)), row_norms(g_a)], 1)
            floor = self._floor(lengths, g_a)
            muons = any(block.rule is muon and not engine.shared for block in state.blocks)
            astray = (ASTRAY_MUON if muons else ASTRAY) * lengths[:, 0]
            astray = astray + 4 * torch.finfo(engine.dtype).eps * row_norms(theta)
            lengths = torch.cat([lengths, astray[:, None]], 1)
            announced = [[x.clone() for x in _numbers(batch)] for batch in b]
            half = Half(rest, order, past_a, lengths, floor, state.settings, state.layout, announced)
            if not successive:
                return self._row(half, s_a.step(past_a, self._gradients(past_a, b, seeds[1]))[0])
        self._half = half
        return self._unknown.clone()

    def complete(self, batches: Sequence[Any]) -> Tensor | None:
        """The row of the step before, now that training has come to the next one, with these batches."""
        half, self._half = self._half, None
        if half is None or not batches:
            return None
        try:
            with self._evaluation(batches, self._step + 1):
                self._here = here = self._arrive(list(batches), self._step + 1)
        except ReferencedError:
            return None
        g_b, now, theta, (last, _) = here
        if now.layout != half.layout:
            return None
        if now.settings != half.settings:
            last, _ = now.with_settings(half.settings).step(theta, g_b)
        row = self._row(half, last)
        arrived = row_norms(theta - half.point) <= half.lengths[:, 2]
        same = [_same(kept, batch, self._engine.device) for kept, batch in zip(half.announced, batches, strict=True)]
        return row.masked_fill(~(arrived & torch.stack(same))[:, None], math.nan)

    @contextmanager
    def _evaluation(self, batches: Sequence[Any], step: int) -> Iterator[None]:
        """As any measurement: nobody else changes the model meanwhile, and its structure is known."""
        engine, self._step = self._engine, step
        with engine.place.without_autocast(), LOCK, torch.inference_mode(False), engine.evaluator.session():
            engine.admit(batches[0], seed=2 * step, exact=self._probe.noise_floor)
            yield

    def _arrive(self, batches: list[Any], seed: int) -> Here:
        """Where training is: weights, gradient and state of the optimiser, and the step that it takes from there."""
        theta = self._engine.thetas(range(self._engine.runs)).to(compute_type(self._engine.dtype))
        gradient, state = self._trusted(), read_state(self._optimizers, self._engine, self.max_norm)
        if gradient is None:
            gradient = self._gradients(theta, batches, seed)
        return Here(gradient, state, theta, state.step(theta, gradient))

    def _trusted(self, following: bool = False) -> Tensor | None:
        """(R, P) the gradient that training has left, on this step's batches or on those of the next, if it counts."""
        engine = self._engine
        if self._training is None or self._training.use != "trusted" or engine.stochastic:
            return None
        runs = range(engine.runs)
        found = engine.next_gradients(runs) if following else engine.training_gradients(runs)
        return None if found is None else found.to(compute_type(engine.dtype))

    def _gradients(self, thetas: Tensor, batches: list[Any], seed: int) -> Tensor:
        """(R, P) in the dtype of thetas; in the model's own precision unless they are float64."""
        dtype = torch.float64 if thetas.dtype == torch.float64 else self._engine.dtype
        stride = -(-thetas.shape[1] // PADDING) * PADDING  # the CPU's products depend on where their factors begin
        points = thetas.new_empty(len(thetas), stride, dtype=dtype)[:, : thetas.shape[1]].copy_(thetas)
        out = torch.empty_like(points, memory_format=torch.contiguous_format)
        self._engine.gradients(points, batches, out, seeds=[seed] * len(batches))
        return out.to(thetas.dtype)

    def _check_due(self, step: int) -> bool:
        """Whether to hold this row against float64."""
        traits = self._engine.traits
        if not (self._probe.noise_floor and traits.exact and traits.trusted):
            self._checked = torch.full_like(self._checked, math.nan)
            return False
        if self._checked_at is not None and 0 <= step - self._checked_at < self.check_every:
            return False
        self._checked_at = step
        return True

    def _error(
        self, theta: Tensor, state: OptimizerState, a: list[Any], g_a: Tensor, g_b: Tensor, found: Tensor, seed: int
    ) -> Tensor:
        """(R,) float64: how far delta is from that of float64, up to the last update, whose gradient is g_B.

        The two gradients on A are computed in float64, and those on B are taken to err as much.
        """
        if theta.dtype == torch.float64:
            nothing = LAST_BITS * torch.finfo(torch.float64).eps
            return nothing * _joint(*(row_norms(state.step(theta, g)[0]) for g in (g_a, g_b)))
        theta, g_b = theta.double(), g_b.double()
        exact = self._gradients(theta, a, seed)
        (u_a, s_a), (u_b, s_b) = state.step(theta, exact), state.step(theta, g_b)
        second = s_b.step(theta + u_b, self._gradients(theta + u_b, a, seed))[0]
        error = math.sqrt(2.0) * row_norms(found - (u_a + s_a.step(theta + u_a, g_b)[0] - u_b - second))
        # Where float32 has lost most digits float64 may have lost many: the error counts as large as the updates.
        length = row_norms(exact)
        blind = (row_norms(g_a - exact) > SATURATED * length) | (length < FAINT)
        return torch.where(blind, _joint(row_norms(u_a), row_norms(u_b)), error)

    def _floor(self, lengths: Tensor, g_a: Tensor) -> Tensor:
        """(2, R) the floor, but for the part of it that is a share of the defect; and that share."""
        error, length = self._checked.unbind(1)
        # Errors of gradients stay what they are, or stay in proportion, as gradients shrink: the larger of the two.
        shrunk = (length / row_norms(g_a)).clamp(min=1.0).nan_to_num(nan=1.0, posinf=math.inf)
        error = FLOOR_MARGIN * STALE_MARGIN * error * shrunk
        return torch.stack(
            [error * _joint(*lengths.unbind(1)) / (lengths[:, 0] * lengths[:, 1]), math.sqrt(2.0) * error]
        )

    def _row(self, half: Half, last: Tensor) -> Tensor:
        """(R, columns) float64, given the last update: of B past that of A."""
        unit, delta = half.lengths[:, 0] * half.lengths[:, 1], half.rest + last
        defect, order, curvature = (row_norms(x) / unit for x in (delta, half.order, delta - half.order))
        return torch.stack([defect, order, curvature, half.floor[0] + half.floor[1] * defect], 1)

    def state_dict(self, run: int = 0) -> dict[str, Any]:
        half = self._half
        kept = None
        if half is not None:
            rows = {name: getattr(half, name)[run].clone() for name in ("rest", "order", "point", "lengths")}
            kept = rows | {"floor": half.floor[:, run].clone(), "announced": half.announced[run]}
            kept |= {"settings": half.settings, "layout": half.layout, "step": self._step}
        return {"half": kept, "checked": self._checked[run].clone(), "checked_at": self._checked_at}

    def load_state_dict(self, state: Mapping[str, Any], run: int = 0) -> None:
        """Restore :meth:`state_dict`."""
        engine, runs = self._engine, self._engine.runs
        self._checked[run], self._checked_at = state["checked"].to(engine.device), state["checked_at"]
        self._here, kept = None, state["half"]
        if run == 0:
            self._half = None
        if kept is None:
            return
        self._step = kept["step"]
        rows = {name: kept[name].to(engine.device) for name in ("rest", "order", "point", "lengths", "floor")}
        if self._half is None:
            empty = {name: x.new_zeros(runs, *x.shape) for name, x in rows.items()}
            empty["floor"] = empty["floor"].T.contiguous()
            self._half = Half(
                **empty, settings=kept["settings"], layout=kept["layout"], announced=[kept["announced"]] * runs
            )
        for name in ("rest", "order", "point", "lengths"):
            getattr(self._half, name)[run] = rows[name]
        self._half.floor[:, run], self._half.announced[run] = rows["floor"], kept["announced"]

    def keep(self, runs: list[int]) -> None:
        self._unknown, self._checked, self._here = self._unknown[: len(runs)], self._checked[runs], None
        if self._half is not None:
            half = self._half
            rows = {name: getattr(half, name)[runs] for name in ("rest", "order", "point", "lengths")}
            announced = [half.announced[run] for run in runs]
            self._half = replace(half, **rows, floor=half.floor[:, runs], announced=announced)


def _joint(x: Tensor, y: Tensor) -> Tensor:
    """(R,) ``sqrt(x^2 + y^2)``, by operations that round the same for any number of runs."""
    return (x * x + y * y).sqrt()


def _numbers(batch: Any) -> list[Tensor]:
    """The tensors and arrays in a batch."""
    arrays = (torch.from_numpy(x) for x in tree_leaves(batch) if isinstance(x, np.ndarray) and x.dtype.kind in "biuf")
    return [*(x.detach() for x in Snapshot([batch]).tensors), *arrays]


def _same(kept: Sequence[Tensor], batch: Any, device: torch.device) -> Tensor:
    """() bool on the device: whether a batch has these numbers."""
    numbers, answer = _numbers(batch), torch.ones((), dtype=torch.bool, device=device)
    if [(x.shape, x.dtype) for x in kept] != [(x.shape, x.dtype) for x in numbers]:
        return ~answer
    for was, now in zip(kept, numbers, strict=True):
        equal = ((was == now) | ((was != was) & (now != now))).all()
        answer = answer & (equal if equal.device == device else bool(equal))
    return answer
