"""What an update is made of: decay, the momentum of earlier gradients, and the last gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from grokcurv.commutator import CommutatorProbe
from grokcurv.flat import Segment, select_segments
from grokcurv.measures.base import Measure
from grokcurv.measures.training_gradient import TrainingGradient
from grokcurv.optim import row_norms
from grokcurv.pairs import PairOfRuns
from grokcurv.steps import MOMENTS, Block, OptimizerRow, OptimizerState, adam, like, plus, read_state, sgd
from grokcurv.subspace import Subspace

Scaled = tuple[Any, Tensor]
"""A number, or (r, 1), and the vectors (r, n) that it multiplies."""

PARTS = ("update", "decay", "momentum", "gradient_part")

COSINES = ("decay_momentum_cosine", "decay_gradient_cosine", "momentum_gradient_cosine")


@dataclass
class Before:
    """What an update is told from that has been made since.

    Attributes:
        theta: (R, P) the parameters.
        moments: (R, P) the average of earlier gradients; zero where there is none.
        settings: of the optimisers' blocks, which a scheduler may have changed since; None where they are tensors.
        begun: of each block of torch's optimisers, whether there were moments.
        layout: what the blocks were.
    """

    theta: Tensor
    moments: Tensor
    settings: list[dict[str, Any]] | None
    begun: list[bool]
    layout: list[Any]


class UpdateDecomposition(Measure):
    """The parts of the last update ``u = theta_t - theta_(t-1)``, and their lengths.

    With g the gradient that the optimiser was given, after clipping:

    ======================  =====================================================================================
    ``update_norm``         \\|u\\|
    ``decay_norm``          of what shrinks the parameters
    ``momentum_norm``       of what the optimiser's average of earlier gradients contributes
    ``gradient_part_norm``  of what g contributes
    ``clip_factor``         \\|g\\| over the length of ``.grad`` as the monitor saw it: how far it was clipped since;
                            NaN where the monitor sees what has been clipped, as that of :func:`grokcurv.attach` does
    ======================  =====================================================================================

    For AdamW (Loshchilov & Hutter, arXiv 1711.05101) the parts are ``-lr wd theta``, ``-lr beta_1 m_(t-1) / c`` and
    ``-lr (1 - beta_1) g / c`` with ``c = (1 - beta_1^t) (sqrt(v_t / (1 - beta_2^t)) + eps)``, whose second moment is
    that of this step. For SGD with momentum mu they are ``-lr k wd theta``, ``-lr mu b_(t-1)`` and ``-lr k g``, k = 1 -
    dampening; Nesterov's has ``-lr mu^2 b_(t-1)`` and k = 1 + mu (1 - dampening). Decay of earlier steps is in the
    momentum there. In both they sum to u, but for the rounding of the parameters. Where Adam adds the decay to the
    gradient, its second moment mixes the two: all three are NaN. Of other optimisers decay is known if they shrink the
    parameters themselves, and the rest is NaN. A step that the optimiser skipped has no parts, and no row before the
    first update.

    With ``cosines`` there are also ``decay_momentum_cosine``, ``decay_gradient_cosine`` and
    ``momentum_gradient_cosine``, between the parts; with ``segments`` each of ``update_segment_share``,
    ``decay_segment_share``, ``momentum_segment_share`` and ``gradient_part_segment_share``: the squared length on the
    segments over the whole; and with ``basis`` the same four ``_basis_share``, in the span of a subspace.

    A step costs no gradient; two vectors of P are kept, and nine read or written where there is a row.

    Of gradient descent alone the update is the gradient's part:

    >>> import torch, grokcurv as gc
    >>> model, x = torch.nn.Linear(3, 1), torch.randn(8, 3)
    >>> loss_fn = lambda model, x: model(x).square().mean()
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> monitor = gc.attach(model, loss_fn, optimizer, measures=[gc.UpdateDecomposition()])
    >>> for _ in range(2):
    ...     loss_fn(model, x).backward()
    ...     optimizer.step()
    >>> row = monitor.last
    >>> round(row["gradient_part_norm"] / row["update_norm"], 3), row["decay_norm"], row["momentum_norm"]
    (1.0, 0.0, 0.0)

    Args:
        optimizer: that of the loop, or several; :func:`grokcurv.attach` and the trainer of many runs tell their own.
        cosines: record the angles between the parts.
        segments: patterns of :func:`grokcurv.select_segments`, one or several, or segments.
        basis: a subspace of R^P, the same for all runs.

    Raises:
        ValueError: when the monitor is made, if no optimiser is known, segments match nothing or a basis is of another
            R^P.
    """

    name = "update_decomposition"
    columns = ("update_norm", "decay_norm", "momentum_norm", "gradient_part_norm", "clip_factor")

    def __init__(
        self,
        optimizer: Optimizer | Iterable[Optimizer] = (),
        *,
        cosines: bool = False,
        segments: str | Sequence[str | Segment] | None = None,
        basis: Subspace | None = None,
    ) -> None:
        several = (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer)
        self._optimizers: tuple[Optimizer | OptimizerRow, ...] = several
        self._sees_clipped: bool | None = None  # where nobody has said, what the monitor sees is not clipped yet
        self.cosines, self._wanted, self.basis = cosines, segments, basis
        more = COSINES if cosines else ()
        for name in [name for name, given in (("segment", segments), ("basis", basis)) if given is not None]:
            more = (*more, *(f"{part}_{name}_share" for part in PARTS))
        self.columns = (*type(self).columns, *more)

    def follow(self, optimizers: Sequence[Optimizer | OptimizerRow]) -> None:
        """Those of the loop, before whose updates it is looked, when gradients have been clipped; or rows."""
        self._optimizers = tuple(optimizers)
        if optimizers and isinstance(optimizers[0], Optimizer):
            self._sees_clipped = True

    def follow_training(self, gradient: TrainingGradient) -> None:
        if self._sees_clipped is None:
            self._sees_clipped = False

    def bind(self, probe: CommutatorProbe) -> None:
        """Find the parameters' optimisers."""
        self._engine = engine = probe.gradients
        if not self._optimizers and not engine.shared:
            raise ValueError("UpdateDecomposition: no optimiser is known; pass optimizer=, or use grokcurv.attach")
        if self._sees_clipped is None:
            # Runs with pairs of their own are measured between two steps, when what is in .grad has been used.
            self._sees_clipped = engine.shared
        several = [self._wanted] if isinstance(self._wanted, str) else list(self._wanted or ())
        patterns = [each for each in several if isinstance(each, str)]
        found = select_segments(engine.model, *patterns) if patterns else ()
        self.segments = (*found, *(each for each in several if isinstance(each, Segment)))
        if self.basis is not None:
            if self.basis.size != engine.size:
                raise ValueError(f"basis lives in R^{self.basis.size}, the model has P = {engine.size} parameters")
            self.basis = self.basis.to(engine.device)
        self._before: Before | None = None
        self._seen = torch.full((engine.runs,), math.nan, dtype=torch.float64, device=engine.device)
        self._taken = 0
        for optimizer in self._optimizers:
            if isinstance(optimizer, Optimizer):
                optimizer.register_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self._taken += 1

    @torch.no_grad()
    def observe(self, step: int, pairs: Sequence[PairOfRuns], due: bool) -> Tensor | None:
        """Look at the update that led here, and remember what the next one will change."""
        engine = self._engine
        theta, state = engine.thetas(range(engine.runs)), read_state(self._optimizers, engine, partly=True)
        found = None
        if due:
            stepped = engine.shared or self._taken == len(self._optimizers)
            known = self._before if stepped and self._before and self._before.layout == state.layout else None
            if known is None:
                found = self._seen.new_full((engine.runs, len(self.columns)), math.nan)
            else:
                found = self._row(known, state, theta)
        if not self._sees_clipped:
            seen = self._lengths_of_grad()
            self._seen = seen.masked_fill(seen == 0, math.nan)
        moments = _moments(state, theta)
        if engine.shared:  # theirs is the memory that the step writes to
            theta, moments = theta.clone(), moments.clone()
        begun = [any(name in block.state for name in MOMENTS[block.rule]) for block in state.blocks]
        self._before = Before(theta, moments, state.settings, begun, state.layout)
        self._taken = 0
        return found

    def _lengths_of_grad(self) -> Tensor:
        """(R,) norms of the gradients that training has now; NaN where there are none."""
        engine = self._engine
        if engine.shared:
            return row_norms(engine.training_gradients(range(engine.runs)))
        gradients = [x.grad.detach() for x in engine.evaluator.parameters() if x.grad is not None]
        return engine.partition.norm(*gradients)[None].to(self._seen.device) if gradients else self._seen * math.nan

    def _row(self, before: Before, after: OptimizerState, theta: Tensor) -> Tensor:
        """(R, columns) of the update from there to here."""
        update, more = theta - before.theta, len(self.columns) > 5
        squares = self._seen.new_zeros(5, len(theta))
        squares[0] = row_norms(update) ** 2
        whole = update.new_zeros(4, *update.shape) if more else None
        # Blocks of rows, which have begun with zeros, may be fewer now: runs end.
        begun = [True] * len(after.blocks) if self._engine.shared else before.begun
        for block, known in zip(after.with_settings(before.settings).blocks, begun, strict=True):
            old, moment, moved = map(block.of, (before.theta, before.moments, update))
            for place, part in enumerate(_parts(block, old, moment if known else None, moved), 1):
                squares[place, block.rows] += math.nan if part is None else _square(*part)
                if whole is not None and place < 4:
                    vector = torch.full_like(moved, math.nan) if part is None else _times(*part)
                    block.put(whole[place], vector)
        lengths = squares.sqrt()
        columns = [*lengths[:4], lengths[4] / self._seen]
        if whole is not None:
            whole[0] = update
            columns += self._more(whole, lengths)
        return torch.stack(columns, 1)

    def _more(self, parts: Tensor, lengths: Tensor) -> list[Tensor]:
        """The columns that were asked for besides, of update, decay, momentum and gradient (4, R, P)."""
        found: list[Tensor] = []
        if self.cosines:
            for i, j in ((1, 2), (1, 3), (2, 3)):
                inner = (parts[i].double() * parts[j]).sum(1)
                found.append(inner / (lengths[i] * lengths[j]))
        if self._wanted is not None:
            found += [row_norms(torch.cat([s.of(x) for s in self.segments], 1)) ** 2 / row_norms(x) ** 2 for x in parts]
        if self.basis is not None:
            found += [self.basis.split(x).coefficients.double().square().sum(1) / row_norms(x) ** 2 for x in parts]
        return found

    def state_dict(self, run: int = 0) -> dict[str, Any]:
        kept = None
        if (before := self._before) is not None:
            kept = {"theta": before.theta[run].clone(), "moments": before.moments[run].clone()}
            kept |= {name: getattr(before, name) for name in ("settings", "begun", "layout")}
        return {"before": kept, "seen": self._seen[run].clone(), "taken": self._taken}

    def load_state_dict(self, state: Mapping[str, Any], run: int = 0) -> None:
        """Restore :meth:`state_dict`; ValueError if it is of other parameters."""
        engine, kept = self._engine, state["before"]
        self._seen[run], self._taken = state["seen"].to(engine.device), state["taken"]
        if run == 0:
            self._before = None
        if kept is None:
            return
        if kept["theta"].shape != (engine.size,):
            raise ValueError(f"UpdateDecomposition: state has {len(kept['theta'])} parameters, the model {engine.size}")
        if self._before is None:
            empty = [kept[name].to(engine.device).new_zeros(engine.runs, engine.size) for name in ("theta", "moments")]
            self._before = Before(empty[0], empty[1], kept["settings"], kept["begun"], kept["layout"])
        self._before.theta[run], self._before.moments[run] = kept["theta"], kept["moments"]

    def keep(self, runs: list[int]) -> None:
        self._seen = self._seen[runs]
        if (before := self._before) is not None:
            self._before = replace(before, theta=before.theta[runs], moments=before.moments[runs])


def _moments(state: OptimizerState, theta: Tensor) -> Tensor:
    """(R, P) what Adam and SGD average gradients in, zero where nobody does."""
    found: Tensor | None = None
    for block in state.blocks:
        if block.rule not in (adam, sgd) or MOMENTS[block.rule][0] not in block.state:
            continue
        moment = block.moment(MOMENTS[block.rule][0], theta)
        if state.covers(block):
            return moment
        found = torch.zeros_like(theta) if found is None else found
        block.put(found, moment)
    return torch.zeros_like(theta) if found is None else found


def _parts(block: Block, old: Tensor, moment: Tensor | None, moved: Tensor) -> tuple[Scaled | None, ...]:
    """Decay, momentum and this step's gradient in the update of a block, and that gradient. None of what is not known.

    Of the block as it is after the update, with the settings of before, and rows (r, n) of the parameters and of the
    average of gradients before the update, None if there was none, and of the update.
    """
    settings, decay = block.settings, block.settings["weight_decay"]
    lr = replace(block, state={"count": block.state.get("count", 1.0) - 1}).lr
    without = not isinstance(decay, Tensor) and decay == 0
    shrinks: Scaled | None = (-lr * decay, old) if settings["decoupled"] or without else None
    if block.rule is sgd:
        return _sgd(block, lr, old, moment, moved)
    if block.rule is not adam or shrinks is None or "exp_avg" not in block.state:
        return shrinks, None, None, None
    beta_1, count = settings["beta_1"], block.state["count"]
    root = (1 - settings["beta_2"] ** count) ** 0.5
    length, top = -lr / (1 - beta_1**count) * root, block.moment("exp_avg_sq", old)
    if settings["amsgrad"]:
        top = block.moment("max_exp_avg_sq", old)
    divisor = top.sqrt().add_(*like(old, settings["eps"] * root))
    mean = block.moment("exp_avg", old)
    fresh = mean if moment is None else plus(mean, -beta_1, moment)
    earlier = torch.zeros_like(mean) if moment is None else moment / divisor
    return shrinks, (length * beta_1, earlier), (length, fresh / divisor), (1 / (1 - beta_1), fresh)


def _sgd(block: Block, lr: Any, old: Tensor, moment: Tensor | None, moved: Tensor) -> tuple[Scaled, ...]:
    """The same for SGD: decay, earlier gradients, this one as it entered the update, and this one."""
    settings = block.settings
    momentum, ahead, decay = settings["momentum"], settings["nesterov"], settings["weight_decay"]
    # The first gradient is not dampened.
    kept = 1.0 if moment is None else 1 - settings["dampening"]
    now, share = block.state.get("momentum_buffer"), kept * (1 - ahead) + ahead * (1 + momentum * kept)
    earlier = torch.zeros_like(old) if moment is None else moment
    if now is None:  # no momentum
        along, share = _times(-1 / lr, moved), 1.0
    else:
        along = _times(1 / kept, plus(block.moment("momentum_buffer", old), -momentum, earlier))
    given = plus(along, -decay, old)
    before = -lr * momentum * (1 - ahead + ahead * momentum)
    return (-lr * share * decay, old), (before, earlier), (-lr * share, given), (1.0, given)


def _times(scale: Any, vectors: Tensor) -> Tensor:
    """(r, n) the vectors themselves."""
    return vectors * (scale.to(vectors.dtype) if isinstance(scale, Tensor) else scale)


def _square(scale: Any, vectors: Tensor) -> Tensor:
    """(r,) float64 squared lengths."""
    if isinstance(scale, Tensor) and scale.numel() > len(vectors):  # another number for each coordinate
        scale, vectors = 1.0, _times(scale, vectors)
    lengths: Tensor = row_norms(vectors) * (scale.reshape(-1) if isinstance(scale, Tensor) else scale)
    return lengths.square()
