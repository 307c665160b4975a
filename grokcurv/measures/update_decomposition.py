"""What an update is made of: decay, the momentum of earlier gradients, and the last gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from grokcurv import ops
from grokcurv.commutator import CommutatorProbe
from grokcurv.measures.base import Measure
from grokcurv.pairs import PairOfRuns
from grokcurv.steps import OptimizerRow

MOMENTS = {torch.optim.Adam: "exp_avg", torch.optim.SGD: "momentum_buffer"}
"""What optimisers call the average of gradients. ``AdamW`` is an ``Adam``, or behaves as one that decouples decay."""

DECOUPLED = ("AdamW", "Muon")
"""Optimisers that shrink the parameters themselves, whatever their groups say."""

SETTINGS = (
    *("lr", "weight_decay", "decoupled_weight_decay", "betas", "eps", "amsgrad"),
    *("momentum", "dampening", "nesterov"),
)
"""Of a group, what the parts depend on."""


class Before(NamedTuple):
    """Of a parameter, as it was before an update."""

    value: Tensor
    moment: Tensor | None
    """The average of earlier gradients; None where there is none yet, or none that is known."""
    group: dict[str, Any]
    """:data:`SETTINGS` of its group: a scheduler may have changed them when the update is looked at."""


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

    A step costs no gradient; two vectors of P are kept, and seven read or written.

    Args:
        optimizer: that of the loop, or several; :func:`grokcurv.attach` tells its own.

    Raises:
        ValueError: when the monitor is made, if no optimiser is known.
    """

    name = "update_decomposition"
    columns = ("update_norm", "decay_norm", "momentum_norm", "gradient_part_norm", "clip_factor")

    def __init__(self, optimizer: Optimizer | Iterable[Optimizer] = ()) -> None:
        self._optimizers = (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer)
        self._sees_clipped = False

    def follow(self, optimizers: Sequence[Optimizer | OptimizerRow]) -> None:
        """Those of the loop, before whose updates it is looked, when gradients have been clipped."""
        self._optimizers = tuple(each for each in optimizers if isinstance(each, Optimizer))
        self._sees_clipped = True

    def bind(self, probe: CommutatorProbe) -> None:
        """Find each parameter's optimiser."""
        if not self._optimizers:
            raise ValueError("UpdateDecomposition: no optimiser is known; pass optimizer=, or use grokcurv.attach")
        if probe.gradients.runs > 1:
            raise ValueError(f"UpdateDecomposition: it measures one run, and these are {probe.gradients.runs}")
        model = probe.gradients.model
        self._parameters: dict[str, nn.Parameter] = {
            segment.name: model.get_parameter(segment.name) for segment in probe.gradients.segments
        }
        self._owner = {
            id(parameter): (optimizer, group)
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        self._before: dict[str, Before] = {}
        self._engine = probe.gradients
        self._unknown = torch.full((), math.nan, dtype=torch.float64, device=self._engine.device)
        self._seen = self._unknown  # the length of .grad
        self._taken = 0
        for optimizer in self._optimizers:
            optimizer.register_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self._taken += 1

    def observe(self, step: int, pairs: Sequence[PairOfRuns], due: bool) -> Tensor | None:
        """Look at the update that led here, and remember what the next one will change."""
        found = None
        if due:
            stepped = self._before and self._taken == len(self._optimizers)
            found = torch.stack(self._lengths() if stepped else [self._unknown] * len(self.columns))[None]
        gradients = [x.grad for x in self._parameters.values() if x.grad is not None]
        self._seen = self._unknown if self._sees_clipped or not gradients else _length(gradients)
        self._before, self._taken = {name: self._now(x) for name, x in self._parameters.items()}, 0
        return found

    def _now(self, parameter: nn.Parameter) -> Before:
        optimizer, group = self._owner.get(id(parameter), (None, {}))
        moment = optimizer.state.get(parameter, {}).get(_moment_of(optimizer)) if optimizer is not None else None
        settings = {name: group[name] for name in SETTINGS if name in group}
        return Before(parameter.detach().clone(), None if moment is None else moment.clone(), settings)

    def state_dict(self, run: int = 0) -> dict[str, Any]:
        before = {name: tuple(each) for name, each in self._before.items()}
        return {"before": before, "seen": self._seen, "taken": self._taken}

    def load_state_dict(self, state: Mapping[str, Any], run: int = 0) -> None:
        """Restore :meth:`state_dict`; ValueError if it is of other parameters."""
        if state["before"] and state["before"].keys() != self._parameters.keys():
            raise ValueError(f"UpdateDecomposition: state has the parameters {', '.join(state['before'])}")

        def here(x: Tensor | None, name: str) -> Tensor | None:
            return None if x is None else x.to(self._parameters[name].device)

        self._before = {
            name: Before(value.to(self._parameters[name].device), here(moment, name), dict(group))
            for name, (value, moment, group) in state["before"].items()
        }
        self._seen, self._taken = state["seen"].to(self._engine.device), state["taken"]

    def _lengths(self) -> list[Tensor]:
        sums = torch.zeros(5, dtype=torch.float64, device=self._engine.device)
        for name, parameter in self._parameters.items():
            before = self._before[name]
            update = parameter.detach() - before.value
            optimizer, _ = self._owner.get(id(parameter), (None, None))
            rows = [update, *_parts(optimizer, parameter, before, update)]
            known = [update if row is None else row for row in rows]
            squares = ops.gram(torch.stack(known).reshape(len(known), -1))[0].diagonal()
            # By multiplying: a mask of the host's would have to go to the device.
            sums += torch.stack([x * (math.nan if row is None else 1.0) for x, row in zip(squares, rows, strict=True)])
        update, decay, momentum, gradient, given = sums.sqrt()
        return [update, decay, momentum, gradient, given / self._seen]


def _moment_of(optimizer: Optimizer) -> str | None:
    return next((name for kind, name in MOMENTS.items() if isinstance(optimizer, kind)), None)


def _parts(
    optimizer: Optimizer | None, parameter: nn.Parameter, before: Before, update: Tensor
) -> tuple[Tensor | None, ...]:
    """Decay, momentum, this step's gradient in an update; and that gradient. None of what is not known."""
    zero = torch.zeros_like(update)
    state: Mapping[str, Any] = {} if optimizer is None else optimizer.state.get(parameter, {})
    if optimizer is None or (parameter.grad is None and not state):  # nobody has moved it
        return zero, zero, zero, zero
    group = before.group
    decay = group.get("weight_decay", 0.0)
    decoupled = type(optimizer).__name__ in DECOUPLED or group.get("decoupled_weight_decay", False)
    if isinstance(optimizer, torch.optim.SGD):
        return _sgd(state.get("momentum_buffer"), before, update)
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW) and (decoupled or not decay):
        return _adam(state, before)
    return -group["lr"] * decay * before.value if decoupled or not decay else None, None, None, None


def _adam(state: Mapping[str, Any], before: Before) -> tuple[Tensor, ...]:
    group, step = before.group, state["step"].to(before.value.device)
    beta_1, beta_2 = group["betas"]
    second = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    scale = -group["lr"] / (1 - beta_1**step) / ((second / (1 - beta_2**step)).sqrt() + group["eps"])
    earlier = torch.zeros_like(second) if before.moment is None else beta_1 * before.moment
    fresh = state["exp_avg"] - earlier
    return -group["lr"] * group["weight_decay"] * before.value, scale * earlier, scale * fresh, fresh / (1 - beta_1)


def _sgd(moment: Tensor | None, before: Before, update: Tensor) -> tuple[Tensor, ...]:
    group = before.group
    mu, lr = group["momentum"], group["lr"]
    # The first gradient is not dampened.
    kept = 1.0 if before.moment is None else 1 - group["dampening"]
    share, earlier = 1.0, torch.zeros_like(update)
    if mu:
        share = 1 + mu * kept if group["nesterov"] else kept
        if before.moment is not None:
            earlier = mu * before.moment
    along = -update / lr if moment is None else (moment - earlier) / kept  # g + wd theta
    given = along - group["weight_decay"] * before.value
    return (
        -lr * share * group["weight_decay"] * before.value,
        -lr * (mu if group["nesterov"] else 1.0) * earlier,
        -lr * share * given,
        given,
    )


def _length(tensors: Iterable[Tensor]) -> Tensor:
    length: Tensor = torch.stack([torch.linalg.vector_norm(x, dtype=torch.float64) for x in tensors]).norm()
    return length
