"""What a measurement is held against: float64 on copies, without the package; and a run that nobody measures."""

from __future__ import annotations

import copy
import itertools
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from study import cross_entropy as classify
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import grokcurv as gc

LossFn = Callable[[nn.Module, Any], Tensor]


def widened(value: Any) -> Any:
    """A copy with all floats in float64. A module that writes a type down says so in ``narrow``, which is widened."""
    if isinstance(value, nn.Module):
        copied = copy.deepcopy(value).double()
        for module in copied.modules():
            for name, held in list(vars(module).items()):
                if isinstance(held, Tensor) and held.is_floating_point():
                    setattr(module, name, held.double())
            if hasattr(module, "narrow"):
                module.narrow = torch.float64
        return copied
    if isinstance(value, Tensor):
        return value.detach().to(torch.float64, copy=True) if value.is_floating_point() else value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.astype(np.float64) if value.dtype.kind == "f" else value.copy()
    if isinstance(value, dict | MappingProxyType):
        return {key: widened(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(widened, value))
    copied = copy.copy(value)
    for name, held in getattr(value, "__dict__", {}).items():
        object.__setattr__(copied, name, widened(held))  # some are frozen
    return copied


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """All visible generators start from ``seed``, and are put back; new tensors are of float64."""
    before, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
    default = torch.get_default_dtype()
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)
        torch.set_rng_state(before)
        random.setstate(python)
        np.random.set_state(numpy)


class Truth:
    """Defects by their definition. Every evaluation has a copy of the model to itself."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        self.model, self.loss_fn = widened(model), loss_fn
        self.theta = flat([p.detach() for p in self._trainable(self.model)])

    @staticmethod
    def _trainable(model: nn.Module) -> list[nn.Parameter]:
        return [p for p in model.parameters() if p.requires_grad]

    def _gradient(self, theta: Tensor, batch: Any, seed: int, create_graph: bool = False):
        model = copy.deepcopy(self.model)
        parameters = self._trainable(model)
        nn.utils.vector_to_parameters(theta.clone(), parameters)
        with seeded(seed), sdpa_kernel(SDPBackend.MATH):
            loss = self.loss_fn(model, widened(batch))
            options = {"allow_unused": True, "materialize_grads": True}
            return parameters, torch.autograd.grad(loss, parameters, create_graph=create_graph, **options)

    def gradient(self, batch: Any, seed: int = 0, theta: Tensor | None = None) -> Tensor:
        return flat(self._gradient(self.theta if theta is None else theta, batch, seed)[1])

    def product(self, batch: Any, direction: Tensor, seed: int = 0) -> Tensor:
        parameters, gradients = self._gradient(self.theta, batch, seed, create_graph=True)
        inner = torch.cat([g.reshape(-1) for g in gradients]) @ direction
        return flat(torch.autograd.grad(inner, parameters, allow_unused=True, materialize_grads=True))

    def difference(self, a: Any, b: Any, eta: float = 1e-3, seeds: tuple[int, int] = (0, 1)) -> float:
        g_a, g_b = self.gradient(a, seeds[0]), self.gradient(b, seeds[1])
        past_a = self.gradient(a, seeds[0], self.theta - eta * g_b)
        past_b = self.gradient(b, seeds[1], self.theta - eta * g_a)
        return float(((past_a - g_a) - (past_b - g_b)).norm() / (eta * g_a.norm() * g_b.norm()))

    def bracket(self, a: Any, b: Any, seeds: tuple[int, int] = (0, 1)) -> float:
        g_a, g_b = self.gradient(a, seeds[0]), self.gradient(b, seeds[1])
        bracket = self.product(b, g_a, seeds[1]) - self.product(a, g_b, seeds[0])
        return float(bracket.norm() / (g_a.norm() * g_b.norm()))

    def defect(self, method: str, a: Any, b: Any, eta: float = 1e-3, seeds: tuple[int, int] = (0, 1)) -> float:
        return self.bracket(a, b, seeds) if method == "bracket" else self.difference(a, b, eta, seeds)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([(t.to_dense() if t.is_sparse else t).detach().reshape(-1) for t in tensors])


def right(defect: float, reliable: bool, truth: float, rtol: float = 0.1) -> bool:
    """Whether a number that is called reliable is the truth; of one that is not, nothing is claimed."""
    return not reliable or abs(defect - truth) <= rtol * truth


def check(
    model: nn.Module,
    loss_fn: LossFn,
    pair: tuple[Any, Any],
    truth: Truth | None = None,
    *,
    rtol: float = 0.1,
    **options: Any,
) -> gc.CommutatorStats:
    """Measure one pair, and hold what is called reliable against the truth."""
    truth = truth or Truth(model, loss_fn)
    stats = gc.CommutatorProbe(model, loss_fn, **options).measure([pair])
    if stats.reliable:
        expected = truth.defect(stats.method, *pair, float(stats.eta))
        assert right(float(stats.defect), True, expected, rtol), (float(stats.defect), expected, stats.noise_floor)
    return stats


# ---------------------------------------------------------------------------------------------------- small situations

METHODS = ["difference", "bracket"]


def seed(generator: torch.Generator) -> int:
    return int(torch.randint(1 << 30, (), generator=generator))


def points(generator: torch.Generator, batches: int, size: int = 8, width: int = 6, classes: int = 4):
    return [
        (torch.randn(size, width, generator=generator), torch.randint(classes, (size,), generator=generator))
        for _ in range(batches)
    ]


def perceptron(activation=nn.Tanh, width: int = 6, hidden: int = 10, classes: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), activation(), nn.Linear(hidden, classes))


def of(make: Callable[[], nn.Module], generator: torch.Generator) -> nn.Module:
    """A model as ``make`` makes it, from a seed of the generator's."""
    torch.manual_seed(seed(generator))
    return make()


def exactly(model: nn.Module) -> Truth:
    return Truth(model, classify)


# ---------------------------------------------------------------------------------------------------------------- runs


@dataclass
class Run:
    """A training run: what is left of it, and the truths of its rows."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: list[Any]
    monitor: gc.CurvatureMonitor | None = None
    truths: list[float] = field(default_factory=list)
    generators: tuple[Any, ...] = ()
    error: Exception | None = None

    @property
    def records(self):
        """Rows with their truths."""
        frame = self.monitor.records()
        if self.truths:
            frame["truth"] = self.truths
        return frame

    def assert_right(self, rtol: float = 0.1) -> None:
        for row in self.records.itertuples():
            assert right(row.defect_median, row.reliable, row.truth, rtol), row


def train(
    make: Callable[[], nn.Module],
    loss_fn: LossFn,
    batches: Sequence[Any],
    *,
    measured: bool = True,
    truth: Callable[[nn.Module], Truth] | None = None,
    optimizer: Callable[[Any], torch.optim.Optimizer] = lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    after_backward: Callable[[int, nn.Module], None] = lambda step, model: None,
    keep_grad: Callable[[int], bool] = lambda step: False,
    **options: Any,
) -> Run:
    """Train from generators that are where they always are, on copies of the batches."""
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    model = make()
    trainable = [p for p in model.parameters() if p.requires_grad]
    run = Run(model, optimizer(trainable), copy.deepcopy(list(batches)))
    if measured:
        run.monitor = gc.CurvatureMonitor(model, loss_fn, **options)
    for step, (batch, following) in enumerate(itertools.pairwise(run.batches)):
        if not keep_grad(step):
            run.optimizer.zero_grad()
        loss_fn(model, batch).backward()
        after_backward(step, model)
        if run.monitor is not None:
            with torch.random.fork_rng():  # where the truth is of another module, made for it
                exact = truth(model) if truth else None
            run.monitor.step(batch, following)
            if exact is not None:
                seeds = (2 * step, 2 * step + 1)
                run.truths.append(exact.defect(run.monitor.last["method"], batch, following, seeds=seeds))
        run.optimizer.step()
    run.generators = (torch.get_rng_state(), random.getstate(), np.random.get_state())
    return run


def twins(make: Callable[[], nn.Module], loss_fn: LossFn, batches: Sequence[Any], **options: Any) -> Run:
    """The measured one of two runs, of which the other is bitwise the same."""
    plain = train(make, loss_fn, batches, measured=False, **options)
    measured = train(make, loss_fn, batches, **options)
    assert_same(kept(plain.model), kept(measured.model), "model")
    assert_same(plain.optimizer.state_dict(), measured.optimizer.state_dict(), "optimizer")
    assert_same(plain.batches, measured.batches, "batches")
    assert_same(plain.generators, measured.generators, "generators")
    return measured


def kept(model: nn.Module) -> dict[str, Any]:
    """All that a model and its parts keep, but hooks."""
    return {
        f"{prefix}.{name}": value
        for prefix, module in model.named_modules()
        for name, value in vars(module).items()
        if not name.endswith("hooks") and name not in ("_modules", "_non_persistent_buffers_set")
    }


def assert_same(a: Any, b: Any, path: str) -> None:
    """Bit by bit, and type by type."""
    assert type(a) is type(b), path
    if isinstance(a, Tensor):
        assert (a.dtype, a.shape, a.layout, a.requires_grad) == (b.dtype, b.shape, b.layout, b.requires_grad), path
        a, b = (x.detach().to_dense() if x.is_sparse else x.detach() for x in (a, b))
        assert torch.equal(torch.isnan(a), torch.isnan(b)), path
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), path
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(a, b, path)
    elif isinstance(a, Mapping):
        assert list(a) == list(b), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple | deque):
        assert len(a) == len(b), path
        for index, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_same(one, other, f"{path}[{index}]")
    elif isinstance(a, torch.Generator | np.random.RandomState):
        assert_same(a.get_state(), b.get_state(), path)
    elif isinstance(a, np.random.Generator):
        assert a.bit_generator.state == b.bit_generator.state, path
    elif isinstance(a, random.Random):
        assert a.getstate() == b.getstate(), path
    elif isinstance(a, bool | int | float | complex | str | bytes | set | frozenset | type(None)):
        assert a == b or (a != a and b != b), path
    elif not isinstance(a, nn.Module) and hasattr(a, "__dict__") and not callable(a):
        assert_same(vars(a), vars(b), path)
