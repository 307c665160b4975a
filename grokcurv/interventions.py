r"""Interventions on training: what happens to grokking when the motion outside a subspace is damped, or pushed.

With :math:`\Pi` the projection on a subspace of R^P, the execution basis above all, and :math:`\theta^+` the parameters
after the optimiser's step from :math:`\theta` (Xu, arXiv 2602.16746, has the first, the third and the fourth):

==========================  ===========================================================================================
:class:`Projection`         :math:`g \leftarrow \Pi g + (1 - s)(1 - \Pi) g` for the optimiser alone
``of="update"``             the same of :math:`\theta^+ - \theta`, so that moments and decay cannot leave the span
:class:`Kick`               :math:`\theta^+ \leftarrow \theta^+ + \alpha |\eta g_A|\, u`, u along a commutator or beside
:class:`Noise`              :math:`\theta^+ \leftarrow \theta^+ + \sigma u`, u random
==========================  ===========================================================================================

An intervention stands around the optimiser's step, after clipping, in anybody's loop::

    with projection.at(step):
        optimizer.step()

What training has measured stays what it was: ``.grad`` is afterwards bit for bit what it was before, batches come from
a sampler of the intervention's own, random numbers from its own generator. ``docs/interventions.md`` has a whole loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from grokcurv import ops
from grokcurv.commutator import CommutatorProbe, CommutatorStats, Pair, Sampler
from grokcurv.device_buffer import is_asynchronous
from grokcurv.evaluation import unwrapped
from grokcurv.flat import flatten, flatten_grad, unflatten, unflatten_grad
from grokcurv.subspace import Subspace

Part = Literal["gradient", "update"]
Direction = Literal["commutator", "random"]

Space = Subspace | Callable[[], Subspace | None]
"""A subspace; or a function that says which it is now, None while there is none: ``lambda: monitor.probe.basis``."""


class Intervention:
    """What all interventions share: when they act, on which subspace, and what is known of it afterwards.

    >>> intervention = Intervention(nn.Linear(2, 1), 1.0, start=10, every=5)
    >>> [step for step in range(25) if intervention.due(step)]
    [10, 15, 20]

    Args:
        model: any module; its trainable parameters are R^P, in the order of ``model.parameters()``.
        strength: 0 never acts.
        space: the subspace, or a function that returns the current one.
        generator: of all that is drawn; its state is part of :meth:`state_dict`.
        start: the first step at which to act.
        every: act at every this many steps from there on.
        times: after having acted so often, no more; 0: to the end.

    Attributes:
        acted: how often it has acted.
        norm: () float64 on the model's device: length of what it changed the last time; NaN before the first.

    Raises:
        ValueError: a strength or schedule out of range; a subspace of another R^P.
    """

    def __init__(
        self,
        model: nn.Module,
        strength: float,
        *,
        space: Space | None = None,
        generator: torch.Generator | None = None,
        start: int = 0,
        every: int = 1,
        times: int = 0,
    ) -> None:
        if not 0 <= strength < math.inf:
            raise ValueError(f"strength must be a number, not negative; got {strength}")
        for name, value, least in (("start", start, 0), ("every", every, 1), ("times", times, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}; got {value}")
        self.model = unwrapped(model)
        self.strength, self.start, self.every, self.times = strength, start, every, times
        self.generator = generator
        theta = flatten(self.model)  # refuses several dtypes or devices
        self.size, self.device = len(theta), theta.device
        self.acted = 0
        self.norm = torch.full((), math.nan, dtype=torch.float64, device=self.device)
        self._space = space.to(self.device) if isinstance(space, Subspace) else space
        if isinstance(space, Subspace):
            self.space()  # checks it

    def space(self) -> Subspace | None:
        """The subspace now."""
        space = self._space() if callable(self._space) else self._space
        if space is not None and space.size != self.size:
            raise ValueError(f"space lives in R^{space.size}, the model has P = {self.size} parameters")
        return space

    def due(self, step: int) -> bool:
        """Whether to act at this step."""
        since = step - self.start
        left = not self.times or self.acted < self.times
        return self.strength > 0 and since >= 0 and since % self.every == 0 and left

    @contextmanager
    def at(self, step: int) -> Iterator[None]:
        """Around the optimiser's step, after clipping: :meth:`before` it and :meth:`after` it.

        Args:
            step: how many steps the optimiser has taken so far.
        """
        self.before(step)
        try:
            yield
        except BaseException:
            self.cancel()
            raise
        self.after(step)

    def before(self, step: int) -> None:
        """What happens just before the optimiser's step."""

    def after(self, step: int) -> None:
        """What happens just after it."""

    def cancel(self) -> None:
        """Instead of :meth:`after`, where the optimiser failed to take its step."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on with the same draws; tensors and plain values."""
        drawn = None if self.generator is None else self.generator.get_state()
        return {"acted": self.acted, "norm": self.norm, "generator": drawn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; the intervention must have been built with the same settings.

        A generator whose state is None there is left alone: whoever seeds it before every step need not keep it.
        """
        self.acted = state["acted"]
        self.norm = state["norm"].to(self.device)
        if self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"])

    def _note(self, norm: Tensor) -> None:
        self.acted += 1
        self.norm = norm

    def _draw(self) -> Tensor:
        """(P,) standard normal, float64."""
        assert self.generator is not None
        drawn = torch.randn(self.size, dtype=torch.float64, device=self.generator.device, generator=self.generator)
        return drawn.to(self.device)

    def _outside(self, v: Tensor) -> Tensor:
        """What of ``v`` (P,), float64, lies outside the subspace: all of it while there is none."""
        space = self.space()
        return v if space is None else v - space.filter_(v.clone(), 1.0)

    def _push(self, direction: Tensor, length: Tensor) -> None:
        """Move theta along ``direction`` (P,), float64, by () ``length``: nowhere along zero."""
        theta = flatten(self.model).double()
        unflatten(self.model, theta.add_(_unit(direction) * length))
        self._note(length)


class Projection(Intervention):
    """Damps what lies outside a subspace: ``v <- v_par + (1 - strength) v_perp``.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    >>> projection = Projection(model, Subspace(torch.tensor([[1.0, 0.0]])))
    >>> before = flatten(model)
    >>> model(torch.ones(2)).sum().backward()
    >>> with projection.at(0):
    ...     optimizer.step()
    >>> (before - flatten(model)).round(decimals=5).tolist(), model.weight.grad.tolist()
    ([1.0, 0.0], [[1.0, 1.0]])

    Args:
        model: as for :class:`Intervention`.
        space: the subspace; while a function returns None nothing happens, and nothing is counted.
        strength: s, 0 to 1.
        of: ``"gradient"``, as published: the optimiser sees the filtered ``.grad``, and the measured one is there again
            afterwards. AdamW's step leaves the subspace all the same: its moments remember gradients from before, it
            divides each coordinate by a root of its own, and it decays all weights.
            ``"update"``: the whole step is filtered, decay included; with s = 1 it lies in the subspace, up to the one
            rounding of the parameters. The moments are of the measured gradient.
        **schedule: ``start``, ``every``, ``times`` of :class:`Intervention`. Acting now and then is the paper's
            "penalty".

    Raises:
        ValueError: as for :class:`Intervention`; a strength above 1, an unknown ``of``.
    """

    def __init__(
        self, model: nn.Module, space: Space, strength: float = 1.0, *, of: Part = "gradient", **schedule: int
    ) -> None:
        if not 0 <= strength <= 1:
            raise ValueError(f"strength of a projection must lie in [0, 1]; got {strength}")
        if of not in get_args(Part):
            raise ValueError(f"of must be 'gradient' or 'update'; got {of!r}")
        if of == "update" and isinstance(space, Subspace):
            space = space.to(torch.float64)  # once, not at every step
        super().__init__(model, strength, space=space, generator=None, **schedule)
        self.of = of
        self._held: tuple[Subspace, Tensor] | None = None  # on what to project, and the gradient or theta before

    def before(self, step: int) -> None:
        """Filter the gradient; if the update is to be filtered, remember the weights that it starts from."""
        space = self.space() if self.due(step) else None
        if space is None:
            return
        if self.of == "update":
            self._held = space, flatten(self.model)
            return
        measured = flatten_grad(self.model)
        self._held = space, measured
        unflatten_grad(self.model, self._filter(space, measured))

    def after(self, step: int) -> None:
        """Filter the update, if it is what is filtered."""
        if self.of == "update" and self._held is not None:
            space, before = self._held
            # In float64 the difference is exact, so that theta is rounded once and stays where the filter gives zero.
            unflatten(self.model, before + self._filter(space, flatten(self.model).double() - before))
        self.cancel()

    def cancel(self) -> None:
        """Put back the gradient as it was before :meth:`before`."""
        if self.of == "gradient" and self._held is not None:
            unflatten_grad(self.model, self._held[1])
        self._held = None

    def _filter(self, space: Subspace, v: Tensor) -> Tensor:
        """The vector without its part outside the space, or with less of it; its change in norm is noted."""
        filtered = space.filter_(v.clone(), self.strength)
        self._note(torch.linalg.vector_norm(v - filtered, dtype=torch.float64))
        return filtered


class Kick(Intervention):
    r"""Pushes the parameters along a fresh commutator, or beside it: :math:`\theta \leftarrow \theta + \alpha |\eta
    g_A|\, u`.

    u is the direction of :math:`\delta` outside the subspace, or of the whole of it while there is no subspace; it is
    measured where the optimiser's step has led. Where the probe knows a noise floor and the host need not wait for it,
    a commutator that drowns in rounding is measured again as the exact bracket; if that one does too there is no kick,
    and none is counted.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> probe = CommutatorProbe(model, lambda model, x: 0.5 * model(x).square().sum(), eta=0.1)
    >>> pair = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
    >>> kick, before = Kick(probe, lambda: pair, strength=2.0), flatten(model)
    >>> with kick.at(0):
    ...     pass  # the optimiser's step
    >>> round(float((flatten(model) - before).norm() / before[0].abs()), 4)  # |g_A| is |w_1|
    0.2

    Args:
        probe: measures the commutator, with its eta and method; its own basis is not used.
        sampler: draws the pair of batches ``(A, B)``, from other random numbers than training's.
        strength: alpha, the length of the kick in gradient steps.
        direction: ``"commutator"``; or ``"random"``, uniform among the directions orthogonal to the subspace and to the
            commutator, with the same length: the control.
        space: outside which to kick.
        generator: of the random directions; give the sampler's, if it has one that nobody else uses, and its state goes
            into the checkpoint.
        faithful: as published for a single kick, between ``backward`` and the optimiser's step: theta is pushed first,
            and the measurement leaves its last gradient, :math:`g_A(\theta - \eta g_B)`, unclipped in ``.grad``, where
            the optimiser finds it instead of training's. Whether the commutator drowns in rounding is not asked.
            Otherwise the kick comes after the step and ``.grad`` is not touched.
        **schedule: ``start``, ``every``, ``times`` of :class:`Intervention`; ``times=1`` is a single kick.

    Raises:
        ValueError: as for :class:`Intervention`; an unknown direction, a random one without a generator; a faithful
            kick with ``eta="auto"``.
    """

    def __init__(
        self,
        probe: CommutatorProbe,
        sampler: Sampler,
        strength: float,
        *,
        direction: Direction = "commutator",
        space: Space | None = None,
        generator: torch.Generator | None = None,
        faithful: bool = False,
        **schedule: int,
    ) -> None:
        if direction not in get_args(Direction):
            raise ValueError(f"direction must be 'commutator' or 'random'; got {direction!r}")
        if direction == "random" and generator is None:
            raise ValueError("direction 'random' needs a generator")
        if faithful and probe.eta == "auto":
            raise ValueError("faithful kicks need a probe whose eta is a number; got 'auto'")
        super().__init__(probe.gradients.model, strength, space=space, generator=generator, **schedule)
        self.probe, self.sampler, self.direction, self.faithful = probe, sampler, direction, faithful

    def before(self, step: int) -> None:
        """As published: measure and kick before the step, which then goes by the gradient that measuring leaves."""
        if self.faithful and self.due(step):
            pair = self.sampler()
            left_behind = self._last_gradient(pair, step)
            self._kick(self.probe.measure([pair], keep_delta=True, seed=step))
            unflatten_grad(self.model, left_behind)

    def after(self, step: int) -> None:
        """Measure a pair, more exactly where rounding drowns it, and move the weights along its commutator."""
        if not self.faithful and self.due(step):
            pair = self.sampler()
            stats = self.probe.measure([pair], keep_delta=True, seed=step)
            if self._drowned(stats):
                stats = self.probe.measure([pair], keep_delta=True, seed=step, method="bracket")
            if not self._drowned(stats):
                self._kick(stats)

    def _drowned(self, stats: CommutatorStats) -> bool:
        return self.probe.noise_floor and not is_asynchronous(self.device) and not bool(stats.reliable)

    def _kick(self, stats: CommutatorStats) -> None:
        """Move the weights along a commutator, or at random at right angles to it, by the length that was asked for."""
        assert stats.delta is not None
        along = self._outside(stats.delta[0].double())
        if self.direction == "random":
            commutator = _unit(along)
            along = self._outside(self._draw())
            along -= along.dot(commutator) * commutator
        self._push(along, self.strength * (stats.eta * stats.grad_norm_a)[0])

    def _last_gradient(self, pair: Pair, step: int) -> Tensor:
        """``g_A(theta - eta g_B)``, with the random numbers of the measurement."""
        gradients, (batch_a, batch_b) = self.probe.gradients, pair
        theta = flatten(self.model)
        out = gradients.gradient(theta, batch_b, torch.empty_like(theta), seed=2 * step + 1)
        eta = torch.full((1,), float(self.probe.eta), dtype=torch.float64, device=self.device)
        return gradients.gradient(ops.perturb(theta, out[None], eta)[0], batch_a, out, seed=2 * step)


class Noise(Intervention):
    """Adds noise of a given length outside a subspace, after the optimiser's step.

    It is a standard normal vector, less its part inside the subspace (none while there is no subspace), scaled.

    >>> model = nn.Linear(4, 3)
    >>> noise, before = Noise(model, 0.5, generator=torch.Generator()), flatten(model)
    >>> with noise.at(0):
    ...     pass  # the optimiser's step
    >>> round(float((flatten(model) - before).norm()), 4)
    0.5

    Args:
        model: as for :class:`Intervention`.
        strength: length of the noise, in units of theta.
        generator: of the noise; its state is part of :meth:`state_dict`.
        **others: ``space``, which stays free of noise, and ``start``, ``every``, ``times`` of :class:`Intervention`.
    """

    def __init__(self, model: nn.Module, strength: float, *, generator: torch.Generator, **others: Any) -> None:
        super().__init__(model, strength, generator=generator, **others)

    def after(self, step: int) -> None:
        if self.due(step):
            self._push(self._outside(self._draw()), torch.full_like(self.norm, self.strength))


def _unit(v: Tensor) -> Tensor:
    """``v / |v|``, and zero for zero."""
    norm = torch.linalg.vector_norm(v)
    return v / torch.where(norm > 0, norm, math.inf)
