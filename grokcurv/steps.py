"""An optimiser's whole step as a function: parameters, gradient and state in, update and state after it out.

What the optimisers of a loop hold, moments, counts and settings, is read and never written. Vectors are rows (R, P) in
the order of the engine's. An update is formed as such, not as a difference of parameters, so that it is right to the
rounding of its own length.

>>> model = torch.nn.Linear(3, 1, bias=False)
>>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
>>> state = read_state([optimizer], GradientEngine(model, lambda model, x: model(x).sum()))
>>> update, after = state.step(torch.ones(1, 3), torch.ones(1, 3))
>>> again, _ = after.step(torch.ones(1, 3) + update, torch.ones(1, 3))
>>> update, again
(tensor([[-0.1000, -0.1000, -0.1000]]), tensor([[-0.1900, -0.1900, -0.1900]]))
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from grokcurv import optim
from grokcurv.flat import Segment
from grokcurv.gradients import GradientEngine
from grokcurv.pairs import rows_of
from grokcurv.partition import Partition

OptimizerRow = tuple[optim.Optimizer, int]
"""What a run is trained with: a row of an optimiser of rows."""

UNDERSTOOD = "AdamW, Adam, SGD and Muon"
"""Optimisers, of torch and of :mod:`grokcurv.optim`."""

DECOUPLED = ("AdamW", "Muon")
"""Optimisers that shrink the parameters themselves, whatever their groups say."""


@dataclass(frozen=True)
class Block:
    """Coordinates of some runs that one rule moves with the same settings.

    Attributes:
        rule: what moves them.
        name: of the optimiser.
        rows: which runs.
        columns: which coordinates, in the order of the moments.
        settings: numbers, one for all or float64 (r, 1).
        state: moments (r, n), and ``count``, of steps taken. What the first step makes is not there before it.
    """

    rule: Rule
    name: str
    rows: slice
    columns: tuple[slice, ...]
    settings: Mapping[str, Any]
    state: Mapping[str, Any]

    def of(self, rows: Tensor) -> Tensor:
        """(r, n) its part of (R, P)."""
        parts = [rows[self.rows, there] for there in self.columns]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def put(self, rows: Tensor, part: Tensor) -> None:
        """Write its part of (R, P)."""
        for there, values in zip(self.columns, part.split([s.stop - s.start for s in self.columns], 1), strict=True):
            rows[self.rows, there] = values

    @property
    def lr(self) -> Any:
        """The learning rate of the next step, in the warm-up or after it."""
        warmup = self.settings.get("warmup")
        share = 1.0 if warmup is None else ((self.state["count"] + 1) / warmup).clamp(max=1.0)
        return self.settings["lr"] * share

    def moment(self, name: str, like: Tensor) -> Tensor:
        """(r, n) in the dtype of ``like``; zeros before the first step."""
        return self.state[name].to(like.dtype) if name in self.state else torch.zeros_like(like)


@dataclass(frozen=True)
class OptimizerState:
    """Whatever a step of the R runs of an engine depends on beside parameters and gradients.

    Coordinates in no block are moved by nobody: their update is zero.

    Attributes:
        max_norm: (R,) float64 to which gradients are clipped first, inf for those that are not; None where none is.
    """

    engine: GradientEngine
    blocks: tuple[Block, ...]
    max_norm: Tensor | None = None

    @torch.no_grad()
    def step(self, theta: Tensor, gradient: Tensor) -> tuple[Tensor, OptimizerState]:
        """The update (R, P) at parameters (R, P) along a gradient (R, P), in their dtype, and the state after it.

        Clipping, warm-up, decay, moments and counts are in it. A schedule that only the loop knows is not: the state
        after has the settings of this step.
        """
        gradient = self.clipped(gradient)
        update, blocks = torch.zeros_like(theta), []
        for block in self.blocks:
            part, moments = block.rule(block, block.of(theta), block.of(gradient))
            blocks.append(replace(block, state={"count": block.state.get("count", 0.0) + 1, **moments}))
            if self.covers(block):
                update = part
            else:
                block.put(update, part)
        return update, replace(self, blocks=tuple(blocks))

    @property
    def layout(self) -> list[Any]:
        """Names and coordinates of what torch's optimisers move, as plain values; that of rows stays what it is."""
        blocks = () if self.engine.shared else self.blocks
        return [[block.name, [[there.start, there.stop] for there in block.columns]] for block in blocks]

    @property
    def settings(self) -> list[dict[str, Any]] | None:
        """Those of the blocks, as plain values, which a schedule may change; None where they are tensors."""
        if any(isinstance(x, Tensor) for block in self.blocks for x in block.settings.values()):
            return None
        return [dict(block.settings) for block in self.blocks]

    def with_settings(self, settings: list[dict[str, Any]] | None) -> OptimizerState:
        """The same state with other settings, such as those of the step before; None: with its own."""
        if settings is None:
            return self
        blocks = (replace(block, settings=each) for block, each in zip(self.blocks, settings, strict=True))
        return replace(self, blocks=tuple(blocks))

    def covers(self, block: Block) -> bool:
        """Whether a block has all rows and coordinates, one after the other."""
        return (block.rows, block.columns) == (slice(0, self.engine.runs), (slice(0, self.engine.size),))

    def clipped(self, gradient: Tensor) -> Tensor:
        """(R, P) the gradient as it is after clipping."""
        return gradient if self.max_norm is None else gradient * optim.clip_scale(gradient, self.max_norm)

    def clone(self) -> OptimizerState:
        """One that stays as it is while the optimisers go on."""

        def kept(values: Mapping[str, Any]) -> dict[str, Any]:
            return {name: x.clone() if isinstance(x, Tensor) else x for name, x in values.items()}

        blocks = (replace(block, settings=kept(block.settings), state=kept(block.state)) for block in self.blocks)
        return replace(self, blocks=tuple(blocks))

    @torch.no_grad()
    def preconditioner(self) -> Tensor:
        """(R, P) ``sqrt(v_hat) + eps`` of the latest step of Adam or AdamW: what divides the average of gradients.

        NaN before the first step, inf where nobody moves the parameters.

        Raises:
            ValueError: another optimiser is among them.
        """
        engine = self.engine
        found = torch.full((engine.runs, engine.size), math.inf, dtype=engine.dtype, device=engine.device)
        for block in self._adams("preconditioner"):
            if "exp_avg_sq" in block.state:
                square = block.state.get("max_exp_avg_sq", block.state["exp_avg_sq"])
                root, eps = like(
                    found, (1 - block.settings["beta_2"] ** block.state["count"]) ** 0.5, block.settings["eps"]
                )
                block.put(found, square.sqrt().div_(root).add_(eps))
            else:
                for there in block.columns:
                    found[block.rows, there] = math.nan
        return found

    def stability_threshold(self) -> Tensor:
        """(R,) float64: ``(2 + 2 beta_1) / ((1 - beta_1) lr)``, with the learning rate of the next step.

        Where the largest eigenvalue of the Hessian, divided by :meth:`preconditioner` from both sides in halves, is
        above it, Adam and AdamW diverge on a quadratic loss (Cohen et al., arXiv 2207.14484). Of groups with several
        settings the lowest: below it none of them does.

        Raises:
            ValueError: another optimiser is among them.
        """
        engine = self.engine
        found = torch.full((engine.runs, 1), math.inf, dtype=torch.float64, device=engine.device)
        for block in self._adams("stability threshold"):
            beta, lr = block.settings["beta_1"], block.lr
            found[block.rows] = found[block.rows].clamp(max=(2 + 2 * beta) / ((1 - beta) * lr))
        return found[:, 0]

    def _adams(self, what: str) -> tuple[Block, ...]:
        """The blocks, all of Adam's kind; a ValueError if one has not what is asked for."""
        for block in self.blocks:
            if block.rule is not adam:
                raise ValueError(f"optimizer: {block.name} has no {what}; Adam and AdamW have one")
        return self.blocks


def read_state(
    optimizers: Sequence[torch.optim.Optimizer | OptimizerRow],
    engine: GradientEngine,
    max_norm: float | None = None,
    *,
    partly: bool = False,
) -> OptimizerState:
    """The state that optimisers are in now, for the parameters of an engine; it may share their memory.

    Parameters that have no ``.grad`` while others have one are not going to be moved, and are in no block.

    Args:
        optimizers: those of ``torch.optim`` that train the one run of the engine, or the row of an optimiser of rows
            for each of its runs.
        max_norm: to which the loop clips gradients by ``torch.nn.utils.clip_grad_norm_``; optimisers of rows know.
        partly: an optimiser that is not understood has blocks too, of settings alone, which cannot step.

    Raises:
        ValueError: an optimiser that is not understood, by its name; a model of which this process has a part.
    """
    if type(engine.partition) is not Partition:
        raise ValueError("model: the step of an optimiser of shards is not understood")
    limit = torch.full((engine.runs,), max_norm or math.inf, dtype=torch.float64, device=engine.device)
    limits, blocks, number = max_norm is not None, list[Block](), 0
    rows = [each if isinstance(each, tuple) else (each, 0) for each in optimizers]
    for optimizer, members in groupby(rows, key=lambda each: each[0]):
        if isinstance(optimizer, torch.optim.Optimizer):
            blocks += _read_torch(optimizer, engine, partly)
            continue
        places = [place for _, place in members]
        here = slice(number, number + len(places))
        number = here.stop
        blocks += _read_rows(optimizer, places, here)
        if optimizer.max_norm is not None:
            limit[here], limits = _of(optimizer.max_norm, places), True
    return OptimizerState(engine, tuple(blocks), limit if limits else None)


def adam(block: Block, theta: Tensor, gradient: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Adam (Kingma & Ba, arXiv 1412.6980), its decay coupled or not, with or without AMSGrad."""
    settings, lr, count = block.settings, block.lr, block.state.get("count", 0.0) + 1
    beta_1, beta_2, decay = settings["beta_1"], settings["beta_2"], settings["weight_decay"]
    bias, square_bias = 1 - beta_1**count, 1 - beta_2**count
    new, old_square, new_square, length, root, coupled, shrink = like(
        theta, 1 - beta_1, beta_2, 1 - beta_2, -lr / bias, square_bias**0.5, decay, -lr * decay
    )
    gradient = -gradient if settings["maximize"] else gradient
    gradient = gradient if settings["decoupled"] else plus(gradient, coupled, theta)
    mean = block.moment("exp_avg", theta).lerp(gradient, new)
    square = (block.moment("exp_avg_sq", theta) * old_square).addcmul_(gradient * new_square, gradient)
    moments, top = {"exp_avg": mean, "exp_avg_sq": square}, square
    if settings["amsgrad"]:
        moments["max_exp_avg_sq"] = top = torch.maximum(block.moment("max_exp_avg_sq", theta), square)
    update = (mean * length).div_(top.sqrt().div_(root).add_(settings["eps"]))
    return plus(update, shrink, theta) if settings["decoupled"] else update, moments


def sgd(block: Block, theta: Tensor, gradient: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Gradient descent with momentum, heavy-ball or Nesterov's, whose decay is part of the gradient."""
    settings = block.settings
    momentum, ahead = settings["momentum"], settings["nesterov"]
    decay, old, new, along, extra = like(
        theta,
        settings["weight_decay"],
        momentum,
        1 - settings["dampening"],
        -block.lr * (1 - ahead + ahead * momentum),
        -block.lr * ahead,
    )
    direction = plus(-gradient if settings["maximize"] else gradient, decay, theta)
    if not isinstance(momentum, Tensor) and momentum == 0:
        return direction * like(theta, -block.lr)[0], {}
    # The first gradient is not dampened.
    known = "momentum_buffer" in block.state
    buffer = plus(block.moment("momentum_buffer", theta) * old, new, direction) if known else direction
    return plus(buffer * along, extra, direction), {"momentum_buffer": buffer}


def muon(block: Block, theta: Tensor, gradient: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Muon of matrices, orthogonalised in the dtype of theta, where torch's takes bfloat16."""
    settings = block.settings
    momentum, lr = settings["momentum"], block.lr
    new, ahead, length, shrink = like(
        theta, 1 - momentum, 1 - settings["nesterov"] * (1 - momentum), -lr, -lr * settings["weight_decay"]
    )
    buffer = block.moment("momentum_buffer", theta).lerp(gradient, new)
    direction, moves = gradient.lerp(buffer, ahead), []
    widths = [a * b * count for a, b, count in settings["shapes"]]
    for (a, b, count), part in zip(settings["shapes"], direction.split(widths, 1), strict=True):
        matrices = optim.orthogonalize(part.reshape(-1, a, b)).reshape(len(part), count * a * b)
        moves.append(matrices * (length * optim.ADJUSTMENTS[settings["adjust_lr_fn"]](a, b)))
    return plus(torch.cat(moves, 1), shrink, theta), {"momentum_buffer": buffer}


def other(block: Block, theta: Tensor, gradient: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """A step that is not understood."""
    raise ValueError(f"optimizer: {block.name} is not understood; {UNDERSTOOD} are")


Rule = Callable[[Block, Tensor, Tensor], tuple[Tensor, dict[str, Any]]]
"""A step of parameters (r, n) along a gradient (r, n): the update, and moments after it."""

MOMENTS: Mapping[Rule, tuple[str, ...]] = {
    adam: ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    sgd: ("momentum_buffer",),
    muon: ("momentum_buffer",),
    other: (),
}
"""What optimisers keep, by the names it has in torch and in :mod:`grokcurv.optim`."""

KINDS: tuple[tuple[Any, Rule], ...] = (
    *((kind, adam) for kind in (torch.optim.AdamW, torch.optim.Adam, optim.AdamW)),
    *((kind, sgd) for kind in (torch.optim.SGD, optim.SGD)),
    *((home.Muon, muon) for home in (torch.optim, optim) if hasattr(home, "Muon")),  # torch has it from 2.9 on
)


def rule_of(optimizer: torch.optim.Optimizer | optim.Optimizer) -> Rule:
    """What moves the parameters; ValueError, with the optimiser's name, if that is not understood.

    A subclass that steps in its own way is another optimiser.
    """
    for kind, rule in KINDS:
        if isinstance(optimizer, kind) and inspect.unwrap(type(optimizer).step) is inspect.unwrap(kind.step):
            return rule
    raise ValueError(f"optimizer: {type(optimizer).__name__} is not understood; {UNDERSTOOD} are")


def _read_torch(optimizer: torch.optim.Optimizer, engine: GradientEngine, partly: bool) -> Iterator[Block]:
    """The blocks of an optimiser of torch: of a group, parameters that have moments, and that have none."""
    try:
        rule = rule_of(optimizer)
    except ValueError:
        if not partly:
            raise
        rule = other
    there = {id(p): (s, p) for s, p in zip(engine.segments, engine.evaluator.parameters(), strict=True)}
    given = {key for key, (_, parameter) in there.items() if parameter.grad is not None} or set(there)

    def begun(member: tuple[Segment, nn.Parameter]) -> bool:
        state = optimizer.state.get(member[1], {})
        return any(state.get(name) is not None for name in MOMENTS[rule])

    for group in optimizer.param_groups:
        members = [there[id(p)] for p in group["params"] if id(p) in there and id(p) in given]
        members.sort(key=lambda x: (begun(x), x[0].shape if rule is muon else (), x[0].start))
        for moved, several in groupby(members, key=begun):
            segments, parameters = zip(*several, strict=True)
            states = [optimizer.state[parameter] for parameter in parameters] if moved else []
            state: dict[str, Any] = {}
            for name in MOMENTS[rule]:
                if states and name in states[0]:
                    parts = engine.place.bring_all([x[name].detach() for x in states])
                    state[name] = torch.cat([part.reshape(-1) for part in parts])[None]
            if states and "step" in states[0]:
                state["count"] = _count([x["step"] for x in states], segments, engine)
            settings = _settings(rule, optimizer, group, segments)
            yield Block(rule, type(optimizer).__name__, slice(0, 1), _merged(segments), settings, state)


def _settings(
    rule: Rule, optimizer: torch.optim.Optimizer, given: Mapping[str, Any], segments: Sequence[Segment]
) -> dict[str, Any]:
    """A parameter group's settings as numbers, named alike for all optimisers."""
    group = {name: _number(value) for name, value in given.items()}
    settings = {name: group.get(name, 0.0) for name in ("lr", "weight_decay")}
    settings |= {name: float(group.get(name, 0.0)) for name in ("maximize", "nesterov")}
    settings["decoupled"] = type(optimizer).__name__ in DECOUPLED or group.get("decoupled_weight_decay", False)
    if rule is other:
        return settings
    if rule is adam:
        settings |= dict(zip(("beta_1", "beta_2"), map(_number, group["betas"]), strict=True))
        return settings | {name: group[name] for name in ("eps", "amsgrad")}
    settings["momentum"] = group["momentum"]
    if rule is sgd:
        return settings | {"dampening": group["dampening"]}
    if (*group["ns_coefficients"], group["ns_steps"]) != (*optim.NEWTON_SCHULZ, optim.NEWTON_SCHULZ_STEPS):
        raise ValueError("optimizer: Muon with ns_coefficients or ns_steps of its own is not understood")
    shapes = [(*shape, len(list(several))) for shape, several in groupby(segments, key=lambda x: x.shape)]
    return settings | {"adjust_lr_fn": group["adjust_lr_fn"] or "original", "shapes": shapes}


def _read_rows(optimizer: optim.Optimizer, places: Sequence[int], here: slice) -> Iterator[Block]:
    """The blocks of some rows of an optimiser of rows, which are these runs."""
    rule_of(optimizer)
    name, everything = type(optimizer).__name__, slice(0, optimizer.theta.shape[1])

    def each(*names: str) -> dict[str, Any]:
        return {name: _of(getattr(optimizer, name), places)[:, None].double() for name in names}

    def state(rule: Rule) -> dict[str, Any]:
        found = {name: _of(getattr(optimizer, name), places) for name in MOMENTS[rule] if hasattr(optimizer, name)}
        return {**found, **each("count")}

    decoupled = name in DECOUPLED
    common: dict[str, Any] = {**each("weight_decay", "warmup"), "maximize": 0.0, "decoupled": decoupled}
    others: tuple[slice, ...] = (everything,)
    lr = "lr"
    if isinstance(optimizer, optim.Muon):
        others, lr = tuple(optimizer.others), "adamw_lr"
    if isinstance(optimizer, optim.SGD):
        settings = {**common, **each("lr", "momentum", "nesterov"), "dampening": 0.0}
        yield Block(sgd, name, here, (everything,), settings, state(sgd))
    if isinstance(optimizer, optim.Muon) and optimizer.matrices:
        shapes = [(*shape, len(several)) for shape, several in optimizer.groups.items()]
        settings = {**common, **each("lr", "momentum", "nesterov"), "shapes": shapes}
        settings["adjust_lr_fn"] = optimizer.adjust_lr_fn
        yield Block(muon, name, here, tuple(optimizer.matrices), settings, state(muon))
    if isinstance(optimizer, optim.AdamW | optim.Muon) and others:
        beta_1, beta_2 = _of(optimizer.betas, places)[..., None].unbind(1)
        settings = {**common, "lr": each(lr)[lr], "beta_1": beta_1, "beta_2": beta_2, "eps": optim.EPSILON}
        yield Block(adam, name, here, others, {**settings, "amsgrad": False}, state(adam))


def _of(table: Tensor, places: Sequence[int]) -> Tensor:
    """Some rows; where they stand together, without a copy."""
    first, last = places[0], places[-1] + 1
    return table[first:last] if list(places) == list(range(first, last)) else rows_of(table, places)


def _count(steps: Sequence[Any], segments: Sequence[Segment], engine: GradientEngine) -> float | Tensor:
    """How many steps parameters have taken; float64 (1, n) where the number is on a device, or not one for all."""
    if not any(isinstance(x, Tensor) and x.device.type != "cpu" for x in steps) and len(set(map(float, steps))) == 1:
        return float(steps[0])
    each = [torch.as_tensor(x, device=engine.device).to(torch.float64).reshape(1) for x in steps]
    return torch.cat([x.expand(s.length) for x, s in zip(each, segments, strict=True)])[None]


def _merged(segments: Iterable[Segment]) -> tuple[slice, ...]:
    """Where segments lie, those that follow on another as one."""
    found: list[slice] = []
    for segment in segments:
        if found and found[-1].stop == segment.start:
            found[-1] = slice(found[-1].start, segment.stop)
        else:
            found.append(slice(segment.start, segment.stop))
    return tuple(found)


def _number(x: Any) -> Any:
    """A setting that may be a tensor: what is on the CPU is looked at, what is on a device is not waited for."""
    if not isinstance(x, Tensor):
        return x
    return float(x) if x.device.type == "cpu" else x.detach().to(torch.float64)


def like(rows: Tensor, *values: Any) -> tuple[Any, ...]:
    """Numbers as they are, and tensors in the dtype of the rows."""
    return tuple(x.to(rows.dtype) if isinstance(x, Tensor) else x for x in values)


def plus(x: Tensor, value: Any, y: Tensor) -> Tensor:
    """``x + value y``, and x itself where the value is the number zero."""
    if isinstance(value, Tensor):
        return x + value.to(x.dtype) * y
    return x if value == 0 else torch.add(x, y, alpha=value)
