"""Brackets of many batches with one: which batches' steps change what a step on the target does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grokcurv import ops
from grokcurv.admission import Traits
from grokcurv.checks import FAINT, SATURATED, STALE_MARGIN
from grokcurv.commutator import FLOOR_MARGIN
from grokcurv.evaluation import LOCK, Check, LossFn
from grokcurv.gradients import Distributed, GradientEngine, Model


@dataclass(frozen=True, eq=False)
class BracketScores:
    """What :func:`bracket_scores` finds of N sources; float64.

    Attributes:
        scores: (N,) inner products of the brackets with ``along``, or their lengths.
        errors: (N,) how far rounding may have moved each; infinite where the model cannot be evaluated in float64.
    """

    scores: Tensor
    errors: Tensor

    def __len__(self) -> int:
        return len(self.scores)


def bracket_scores(
    model: Model, loss_fn: LossFn, sources: Iterable[Any], target: Any, *, along: Tensor | None = None, seed: int = 0
) -> BracketScores:
    """Score batches by the order of training: what it changes to train on each before the target, and not after it.

    Two plain SGD steps of length eta, on source i and then on the target t, end ``eta^2 (H_t g_i - H_i g_t)`` away from
    the same two in the other order, to that order in eta; g and H are gradients and Hessians at the model's present
    parameters. With a direction w the score is

        ``<H_t g_i - H_i g_t, w> = g_i . (H_t w) - g_t . (H_i w)``,

    for instance with w the gradient of a held-out loss: times eta^2 what the order changes of that loss, positive where
    the target should come first.

    That takes N + 1 Hessian-vector products, each of which gives a gradient too. Without w the scores are the lengths
    ``|H_t g_i - H_i g_t|``, of 2 N products and one gradient. Either way six vectors of P are kept, whatever N is, and
    one in float64 while that is evaluated: the target and the first source are, once more, for the errors; those of the
    other sources are taken to be alike, and up to four times as large.

    This is a score of training order for plain SGD. Momentum, AdamW's scaling and weight decay have commutators of
    their own, even without curvature; the OptimizerCommutator measures those.

    Args:
        model, loss_fn: as for :class:`grokcurv.CommutatorProbe`; the model is left as it was.
        sources: N batches.
        target: the batch that all of them are set beside.
        along: (P,) the direction w, in the order of ``model.parameters()``, of any floating dtype.
        seed: of the model's own randomness (dropout): the target's batch meets this one's, source i that of
            ``seed + 1 + i``.

    Raises:
        ValueError: no sources; ``along`` of another shape or dtype, or not finite; a model without true second
            derivatives on one of the batches, which says what was found, or whose loss is not a scalar.

    Example:
        >>> import torch, grokcurv as gc
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> loss_fn = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()
        >>> sources = [(torch.randn(16, 3), torch.randn(16, 1)) for _ in range(4)]
        >>> found = gc.bracket_scores(model, loss_fn, sources, target=sources[0])
        >>> found.scores.shape, bool(found.scores[0] <= found.errors[0])  # a batch commutes with itself
        (torch.Size([4]), True)
    """
    batches = list(sources)
    if not batches:
        raise ValueError("sources must hold at least one batch, got none")
    engine = model.engine(loss_fn, "loop") if isinstance(model, Distributed) else GradientEngine(model, loss_fn)
    w = None if along is None else _direction(along, engine)
    with engine.place.without_autocast(), LOCK, torch.inference_mode(False), engine.evaluator.session():
        evaluation = _Evaluation(engine)
        for number, batch in enumerate([target, *batches]):  # once for each structure
            evaluation.admit(batch, seed + number)
        while True:
            generation = engine.evaluator.generation
            evaluation = _Evaluation(engine)
            rows = (
                evaluation.along(batches, target, w, seed) if w is not None else evaluation.norms(batches, target, seed)
            )
            # The model may have been seen to do what it had not done before, such as to draw: then what came before
            # is not of one function with what came after.
            if generation == engine.evaluator.generation:
                break
    scores, errors = torch.stack(rows).unbind(1)
    return BracketScores(scores.clone(), FLOOR_MARGIN * errors)


class _Evaluation:
    """Gradients and Hessian-vector products at a model's parameters, and the lengths of their errors."""

    def __init__(self, engine: GradientEngine) -> None:
        self.engine, self.theta = engine, engine.flatten()
        # What the first evaluation of a kind was off by, each of its vectors: absolutely, and relatively.
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}

    def admit(self, batch: Any, seed: int) -> Traits:
        """How a batch is to be evaluated; ValueError if there are no second derivatives on it."""
        engine = self.engine
        traits = engine.admit(batch, seed=seed, exact=engine.checked, brackets=True)
        if not traits.brackets:
            said = [finding.detail for finding in engine.admission if finding.check == "second derivative"]
            raise ValueError(
                "bracket_scores: model has no true second derivatives, which a bracket is made of: "
                + (said[-1] if said else "it is sharded over several processes")
            )
        return traits

    def along(self, sources: list[Any], target: Any, w: Tensor, seed: int) -> list[Tensor]:
        """(2,) for each source: the score along w, and the length of its error."""
        g_t, h_t, g, h = (torch.empty_like(self.theta) for _ in range(4))
        e_g_t, e_h_t = self._product("target", target, w, g_t, h_t, seed)
        n_g_t, n_h_t = _norms(g_t, h_t)
        rows = []
        for index, batch in enumerate(sources):
            e_g, e_h = self._product("source", batch, w, g, h, seed + 1 + index)
            n_g, n_h = _norms(g, h)
            # An error of one vector moves an inner product by no more than its length times that of the other.
            errors = torch.stack([e_g * n_h_t, n_g * e_h_t, e_g_t * n_h, n_g_t * e_h])
            score = ops.gram(g[None], h_t[None]) - ops.gram(g_t[None], h[None])
            rows.append(torch.stack([score[0, 0, 0], errors.norm()]))
        return rows

    def norms(self, sources: list[Any], target: Any, seed: int) -> list[Tensor]:
        """(2,) for each source: the length of its bracket, and of that one's error."""
        g_t, on_t, g, on = (torch.empty_like(self.theta) for _ in range(4))
        (e_g_t,) = self._gradient("target", target, g_t, seed)
        rows = []
        for index, batch in enumerate(sources):
            e_g, e_on = self._product("source", batch, g_t, g, on, seed + 1 + index)
            (e_on_t,) = self._product("along a source", target, g, None, on_t, seed)
            n_g_t, n_g, n_on, n_on_t = _norms(g_t, g, on, on_t)
            # An error of a direction changes its product in proportion.
            errors = torch.stack([e_on, e_on_t, e_g_t / n_g_t * n_on, e_g / n_g * n_on_t])
            length = ops.gram(on_t[None], origin=on)[0, 0, 0].sqrt()
            rows.append(torch.stack([length, errors.nan_to_num(nan=0.0, posinf=math.inf).norm()]))
        return rows

    def _gradient(self, kind: str, batch: Any, out: Tensor, seed: int) -> Tensor:
        """Put the gradient into ``out`` and return its error."""

        def run(theta: Tensor, check: Check | None) -> None:
            self.engine.gradient(theta, batch, out, seed=seed, check=check and check.of(0))

        return self._evaluated(kind, batch, [out], seed, run)

    def _product(self, kind: str, batch: Any, along: Tensor, gradient: Tensor | None, out: Tensor, seed: int) -> Tensor:
        """Put a Hessian-vector product into ``out``, with the gradient beside it if asked, and return their errors."""

        def run(theta: Tensor, check: Check | None) -> None:
            self.engine.product(theta, batch, along, gradient, out, seed, check)

        return self._evaluated(kind, batch, [out] if gradient is None else [gradient, out], seed, run)

    def _evaluated(
        self, kind: str, batch: Any, vectors: list[Tensor], seed: int, run: Callable[[Tensor, Check | None], None]
    ) -> Tensor:
        """The lengths of the errors of these vectors, which are filled; the first of a kind in float64 too."""
        engine, theta = self.engine, self.theta
        traits = self.admit(batch, seed)
        floored = engine.checked and traits.exact and traits.trusted
        # With kinks all is evaluated in float64: rounding may switch a unit, which moves a gradient by a jump.
        exactly = floored and (traits.nonsmooth or engine.dtype == torch.float64)
        run(theta.double() if exactly else theta, None)
        if not floored:
            return torch.full((len(vectors),), math.inf, dtype=torch.float64, device=theta.device)
        lengths = _norms(*vectors)
        if kind in self._seen:
            absolute, relative = self._seen[kind]
            return STALE_MARGIN * torch.maximum(absolute, relative * lengths)
        errors = found = lengths.new_zeros(len(vectors), 3)[:, 0]
        faint = True
        if not exactly:
            check = Check(lengths.new_zeros(len(vectors), 3))
            run(theta.double(), check)  # and in the vectors are those in float64, rounded
            found, lengths, errors = check.found.unbind(1)
            faint = bool(((found > SATURATED * lengths) | (lengths < FAINT)).any())
        if faint:  # there float64 may have lost its digits too: what it loses is sampled
            shake = torch.Generator(theta.device).manual_seed(seed)
            check = Check(lengths.new_zeros(len(vectors), 3), keep=True, shake=shake)
            run(engine.shake_(theta.double(), shake), check)
            errors = torch.maximum(errors, check.found[:, 0])
            found = torch.maximum(found, errors) if exactly else found
        self._seen[kind] = found, (found / lengths).nan_to_num(nan=0.0)
        return errors


def _norms(*vectors: Tensor) -> Tensor:
    """(n,) float64: their lengths."""
    return torch.stack([torch.linalg.vector_norm(vector, dtype=torch.float64) for vector in vectors])


def _direction(along: Tensor, engine: GradientEngine) -> Tensor:
    """A direction where the model's vectors are; ValueError for what is none."""
    if along.shape != (engine.size,) or not along.is_floating_point():
        raise ValueError(
            f"along must be of shape ({engine.size},) and of a floating dtype; got {tuple(along.shape)}, {along.dtype}"
        )
    if not bool(along.isfinite().all()):
        raise ValueError("along must be finite; got a NaN or an infinity")
    return engine.place.bring(along.detach())
