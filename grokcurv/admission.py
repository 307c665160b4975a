"""What a model is, found out before its numbers are believed.

Nothing is assumed of a model and its loss: the first time that a structure is met (names of trainable parameters,
modes, types of a batch) a few evaluations show whether the gradient is the one training sees, whether it can be
repeated, whether float64 sees what float32 rounds, and whether there are second derivatives. What fails has a
consequence for the measurements, a line in ``admission``, and one warning.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from grokcurv.device import Device
from grokcurv.evaluation import Check
from grokcurv.intercept import Widened

KINKS = re.compile(
    r"\w*relu\w*|threshold|elu|hard\w+|softshrink|\w*max_pool\w*|multi\w*_margin_loss\w*|abs|sgn|sign|clamp\w*|"
    r"maximum|minimum|a?max|a?min|aminmax|(nan)?median|mode|kthvalue|sort|topk|[gl][et]"
)
"""ATen's operators whose derivative may jump, and the comparisons by which a model or a loss decides for itself."""

GRADIENT_TOLERANCE = 1e-4
"""Relative distance up to which two evaluations in the model's own precision are one: the order of sums may differ."""

CURVATURE_TOLERANCE = 1e-3
"""The same of a Hessian-vector product and a difference of gradients."""

DISPLACEMENTS = (1e-5, 1e-3, 1e-7)
"""Half the length of that difference's step, relative to the length of the parameters: a step too long leaves the
neighbourhood, one too short drowns. The next is tried where one before finds no agreement."""


DROWNED = 10.0
"""How many times its sampled size the rounding error of that difference is allowed; and how many times the CPU's own
the difference between its gradient and that of a device without float64."""

JUMP = 1e-2
"""That difference is allowed for where the loss has kinks: rounding may switch a unit."""


class AdmissionWarning(UserWarning):
    """A check of :mod:`grokcurv.admission` has failed; the text says what that means for the measurements."""


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: its name: ``"gradient"``, ``"repeat"``, ``"second derivative"``, ``"float64"``, ``"device"``,
            ``"batches"``, ``".grad"``, ``"references"``, ``"basis"``, ``"vmap"``, ``"graph"``, ``"optimizer"``,
            ``"HessianEdges"``.
        passed: whether all is as one would wish.
        detail: what was found.
        consequence: what the measurements do about it; empty if the check passed.
    """

    check: str
    passed: bool
    detail: str
    consequence: str = ""

    def __str__(self) -> str:
        return f"{self.check}: {self.detail}" + (f"; {self.consequence}" if self.consequence else "")


@dataclass
class Traits:
    """How a structure is evaluated.

    Attributes:
        nonsmooth: its gradient may jump (:data:`KINKS`): it is evaluated in float64, and rounded.
        plain: gradients come from a backward pass that is not told where to stop, as training's do.
        widened: its float64 evaluation needs :class:`grokcurv.intercept.Widened`.
        exact: it has a float64 evaluation.
        trusted: two evaluations give the same.
        brackets: its second derivatives are true; None while nobody has asked.
    """

    nonsmooth: bool = False
    plain: bool = False
    widened: bool = True
    exact: bool = True
    trusted: bool = True
    brackets: bool | None = None


class Engine(Protocol):
    """What is asked of a :class:`grokcurv.gradients.GradientEngine`, whose methods say what they do."""

    brackets: bool
    traits: Traits
    place: Device

    def flatten(self, out: Tensor | None = None) -> Tensor: ...
    def observe(
        self, theta: Tensor, batch: Any, out: Tensor | None, seed: int, plain: bool = ...
    ) -> frozenset[str]: ...
    def whole_gradient(
        self, theta: Tensor, batch: Any, out: Tensor, seed: int, *, plain: bool | None = ..., at_home: bool = ...
    ) -> Tensor: ...
    def gradient(self, theta: Tensor, batch: Any, out: Tensor, *, seed: int = ..., check: Check | None = ...) -> Tensor:
        """Write the gradient of the loss on ``batch`` at parameters ``theta`` (P,) into ``out`` (P,), and return it."""

    def exact_gradient(
        self, theta: Tensor, batch: Any, out: Tensor, seed: int, check: Check | None = ...
    ) -> Widened: ...
    def product(
        self, theta: Tensor, batch: Any, direction: Tensor, gradient: Tensor | None, product: Tensor, seed: int
    ) -> None: ...
    def sample_rounding(self, theta: Tensor, batch: Any, out: Tensor, seed: int) -> float: ...


class Admission:
    """The findings about one model, and the traits of each of its structures."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.traits: dict[Any, Traits] = {}

    def find(self, check: str, passed: bool, detail: str, consequence: str = "") -> None:
        """Note a finding; one that fails is warned of, once."""
        finding = Finding(check, passed, detail, "" if passed else consequence)
        if finding in self.findings:
            return
        news = not any(f.check == check and not f.passed for f in self.findings)
        self.findings.append(finding)
        if not passed and news:
            warnings.warn(str(finding), AdmissionWarning, stacklevel=2)

    def admit(self, engine: Engine, batch: Any, seed: int, exact: bool, brackets: bool) -> Traits:
        """Evaluate the model on ``batch`` at its own parameters, some five gradients, to find its traits.

        Where ``brackets`` will be looked at next, the gradient in float64 serves both.
        """
        # One observed evaluation tells which operators lead to the loss, of which generators it draws, and gives the
        # gradient that the others are held against.
        theta = engine.flatten()
        first, again = torch.empty_like(theta), torch.empty_like(theta)
        traits = engine.traits = Traits(exact=exact)
        try:
            operators = engine.observe(theta, batch, first, seed)
        except RuntimeError as error:
            # Re-entrant checkpointing raises where backward is told where to stop: its inner graph has leaves of its
            # own.
            if "Checkpoint" not in str(error) and "checkpoint" not in str(error):
                raise
            traits.plain = True
            operators = engine.observe(theta, batch, first, seed, plain=True)
        traits.nonsmooth = has_kinks(operators)
        self._gradient(engine, theta, batch, first, again, seed)
        if traits.exact:
            wide = theta.to(torch.float64)
            gradient = again if wide is theta or not brackets else torch.empty_like(wide)
            self._float64(engine, traits, wide, batch, gradient, seed)
            if traits.exact and not engine.place.has_float64:
                self._elsewhere(engine, theta, batch, first, gradient, seed)
            if brackets and traits.exact:
                del theta, first, again, wide
                self.second_derivatives(engine, traits, batch, seed, gradient)
        return traits

    def _gradient(self, engine: Engine, theta: Tensor, batch: Any, first: Tensor, again: Tensor, seed: int) -> None:
        """The gradient as it was asked for, beside that of a plain backward pass, and beside itself."""
        traits = engine.traits
        engine.whole_gradient(theta, batch, again, seed, plain=True)
        # Two gradients that differ have one of two reasons: a part of the graph that only a plain pass reaches, or an
        # evaluation that does not repeat itself. A second plain pass tells them apart.
        distance = relative_distance(first, again)
        if distance > GRADIENT_TOLERANCE and not traits.plain:
            engine.whole_gradient(theta, batch, first, seed, plain=True)
            repeats = relative_distance(first, again)
            if repeats <= GRADIENT_TOLERANCE:
                traits.plain = True
        else:
            repeats = distance
        if traits.plain:
            self.find(
                "gradient",
                False,
                "a backward pass that is told where to stop misses a part of the graph (re-entrant checkpointing?)",
                "gradients are taken as loss.backward() takes them",
            )
        else:
            self.find("gradient", True, "equals that of a plain loss.backward()")
        traits.trusted = repeats <= GRADIENT_TOLERANCE
        self.find(
            "repeat",
            traits.trusted,
            "the same evaluation twice gives the same"
            if traits.trusted
            else f"the same evaluation twice gives gradients {repeats:.1e} of their length apart: the model or the "
            "loss draws at random, or keeps something, where it cannot be seen",
            "no row is reliable; hold generators and state as attributes of the model",
        )

    def _float64(self, engine: Engine, traits: Traits, theta: Tensor, batch: Any, out: Tensor, seed: int) -> None:
        """The evaluation in float64 that everything is held against."""
        try:
            mode = engine.exact_gradient(theta, batch, out, seed)
        except Exception as error:
            traits.exact = False
            self.find("float64", False, f"cannot be evaluated: {first_line(error)}", "no row is reliable")
            return
        # widened: true where a cast was lifted; every evaluation in float64 then runs under the mode that lifts it.
        traits.widened = bool(mode.lifted)
        if mode.remained:
            traits.exact = False
            self.find(
                "float64",
                False,
                f"{', '.join(sorted(mode.remained))} gives fewer bits from float64, where they cannot be lifted",
                "no row is reliable",
            )
        elif mode.lifted:
            lifted = ", ".join(sorted(mode.lifted))
            self.find("float64", True, f"fewer bits, or draws, were asked for by {lifted}, and lifted")
        else:
            self.find("float64", True, "float64 throughout")

    def _elsewhere(self, engine: Engine, theta: Tensor, batch: Any, first: Tensor, exact: Tensor, seed: int) -> None:
        """Whether the model is, on the CPU, where it is evaluated in float64, what it is on its own device.

        ``first`` is the gradient from there, ``exact`` that in float64. Both sides round, and so they may be some times
        as far apart as that on the CPU is off.
        """
        traits, consequence = engine.traits, "no row is reliable"
        try:
            here = engine.whole_gradient(theta, batch, torch.empty_like(theta), seed, at_home=True)
        except Exception as error:
            traits.exact = False
            self.find("device", False, f"cannot be evaluated on {engine.place.home}: {first_line(error)}", consequence)
            return
        distance, tolerance = relative_distance(first, here), JUMP if traits.nonsmooth else GRADIENT_TOLERANCE
        traits.exact = distance <= max(tolerance, DROWNED * relative_distance(here, exact))
        self.find(
            "device",
            traits.exact,
            f"the gradient on {engine.place.home}, where it is evaluated in float64, is {distance:.1e} of its length "
            f"from that on {engine.place.model}" + ("" if traits.exact else ": the model or the loss is another there"),
            consequence,
        )

    def second_derivatives(
        self, engine: Engine, traits: Traits, batch: Any, seed: int, direction: Tensor | None = None
    ) -> bool:
        """Whether a Hessian-vector product equals a difference of gradients in float64.

        The direction is the gradient in float64, if somebody has it.
        """
        if traits.brackets is not None:
            return traits.brackets
        if not engine.brackets:
            traits.brackets = False
            return False
        consequence = "there are no brackets: a row whose difference form drowns is NaN"
        theta = engine.flatten().to(torch.float64)
        own, check = torch.empty_like(engine.flatten()), Check(theta.new_zeros(3))
        try:
            if direction is None:
                direction = torch.empty_like(theta)
                engine.gradient(theta, batch, direction, seed=seed, check=check)
            engine.product(engine.flatten(), batch, direction, None, own, seed)
        except Exception as error:
            traits.brackets = False
            self.find("second derivative", False, f"there is none: {first_line(error)}", consequence)
            return False
        traits.brackets = True
        # At a kink a difference of gradients meets the jump and the product does not: neither is wrong.
        if traits.nonsmooth:
            self.find("second derivative", True, "not compared with differences: at a kink it is one-sided")
            return True
        length, scale, size = (float(x.norm(dtype=torch.float64)) for x in (direction, theta, own))
        if not (math.isfinite(length) and length > 0):
            return True  # nothing to be compared here
        # The product in the model's own precision and one more gradient are enough for most models.
        step = min(DISPLACEMENTS) * max(scale, 1.0) / length
        expected = own.to(torch.float64).mul_(step).add_(direction)
        check = replace(check, keep=True)
        engine.gradient(theta.add_(direction, alpha=step), batch, expected, seed=seed, check=check)
        apart = check.distance / step
        traits.brackets = apart <= CURVATURE_TOLERANCE * size
        del own, expected
        if not traits.brackets:
            traits.brackets, size, apart = self._curvature(engine, engine.flatten(theta), batch, seed, direction)
        self.find(
            "second derivative",
            traits.brackets,
            f"a Hessian-vector product and a difference of gradients are {apart / size if size else apart:.1e} apart"
            + ("" if traits.brackets else ": something in the model has no true second derivative"),
            consequence,
        )
        return traits.brackets

    def _curvature(
        self, engine: Engine, theta: Tensor, batch: Any, seed: int, direction: Tensor
    ) -> tuple[bool, float, float]:
        """Whether a product equals a central difference, all in float64; the product's length, and how far it is off.

        In memory for eight vectors: theta moves to and fro, and of the second gradient only its distance is wanted.
        """
        product, expected = torch.empty_like(theta), torch.empty_like(theta)
        engine.product(theta, batch, direction, None, product, seed)
        size, apart, check = float(product.norm()), math.inf, Check(theta.new_zeros(3), keep=True)
        for displacement in DISPLACEMENTS:
            step = displacement * max(float(theta.norm()), 1.0) / float(direction.norm())
            engine.exact_gradient(theta.add_(direction, alpha=step), batch, expected, seed)
            expected.sub_(product, alpha=2.0 * step)
            theta.sub_(direction, alpha=2.0 * step)
            engine.exact_gradient(theta, batch, expected, seed, check)
            engine.flatten(theta)
            apart = min(apart, check.distance / (2.0 * step))
            if apart <= CURVATURE_TOLERANCE * size:
                return True, size, apart
        # In a confident model the difference of two nearly equal gradients may be all rounding: then it says nothing,
        # and the floors of the brackets are to be trusted, which sample the rounding of the products.
        noise = engine.sample_rounding(theta, batch, expected, seed)
        return apart <= CURVATURE_TOLERANCE * size + DROWNED * noise / step, size, apart


def has_kinks(operators: Iterable[str]) -> bool:
    """Whether a derivative may jump at one of these."""
    return any(map(KINKS.fullmatch, operators))


def relative_distance(a: Tensor, b: Tensor) -> float:
    """Relative to the longer one; 0 for two that are not finite in the same places."""
    if torch.equal(a, b) or not bool((a.isfinite() & b.isfinite()).all()):
        return 0.0
    a, b = a.double(), b.double()
    return float((a - b).norm() / torch.maximum(a.norm(), b.norm()))


def first_line(error: Exception) -> str:
    """What kind of error, and the beginning of what it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
