"""Measurements of the demo's model beside its bare gradients, its training step, and the naive ones, in one run.

A whole measurement must do 36 gradients for K = 9 pairs, and for the noise floor two float64 gradients. Everything else
(perturbed parameters, defect, projection on the execution basis, both random controls) moves a few dozen vectors of
1.2 MB a pair, a small part of one gradient's time. A measurement of successive steps must do three, and every 25th
time two in float64. The shorter way to the logits makes a gradient cheaper by the products it leaves out:
184 of 275 million multiply-adds per forward pass of 512 rows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from naive import commutator, measure
from torch import nn
from torch.nn import functional

import grokcurv as gc
from grokcurv.flat import attention_segments, flatten
from grokcurv.modular import Transformer, fast
from grokcurv.monitor import CHECK_EVERY

PAIRS = 9
ROUNDS = 5


def loss_fn(model: nn.Module, batch) -> torch.Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


@pytest.fixture(scope="module")
def problem():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Transformer()
    draw = lambda: (torch.randint(97, (512, 2)), torch.randint(97, (512,)))  # noqa: E731
    pairs = [(draw(), draw()) for _ in range(PAIRS)]
    pca = gc.StreamingPCA(n_components=2, segments=attention_segments(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(8):
        pca.partial_fit(flatten(model))
        optimizer.zero_grad()
        loss_fn(model, draw()).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, pairs, gc.Subspace.from_pca(pca, size=flatten(model).numel())


def bare_gradients(model: nn.Module, pairs) -> None:
    for pair in pairs:
        for batch in (*pair, *pair):
            model.zero_grad()
            loss_fn(model, batch).backward()


def measurement(probe: gc.CommutatorProbe, pairs) -> None:
    stats = probe.measure(pairs)
    delta = stats.bracket_norm * stats.eta.square()
    for fraction, support in ((stats.parallel / delta, "full"), (stats.parallel / stats.support, "matched")):
        assert (fraction / probe.basis.random_baseline(support).mean).isfinite().all()


def test_whole_measurement(benchmark, note, problem):
    """Ratios to the 36 bare gradients, each to those of its own round: the machine's speed drifts."""
    model, pairs, basis = problem
    probe = gc.CommutatorProbe(model, loss_fn, basis=basis)
    without = gc.CommutatorProbe(model, loss_fn, basis=basis, noise_floor=False)
    shorter = gc.CommutatorProbe(
        model, lambda model, batch: functional.cross_entropy(fast.logits(model, batch[0]), batch[1]), basis=basis
    )
    runs = {
        "the shorter way, noise floor included": lambda: measurement(shorter, pairs),
        "noise floor included": lambda: measurement(probe, pairs),
        "noise floor left out": lambda: measurement(without, pairs),
        "its float64 gradients alone": lambda: float64_check(probe, pairs[0]),
        "naive, no noise floor": lambda: measure(model, loss_fn, pairs, basis.to_dense().T.contiguous(), 1e-3),
    }
    bare_gradients(model, pairs)
    ratios: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        bare = seconds(lambda: bare_gradients(model, pairs))
        for name, run in runs.items():
            ratios[name].append(seconds(run) / bare)
    for name, values in ratios.items():
        note(f"{statistics.median(values):5.2f}x the {4 * PAIRS} bare gradients ({bare:.2f} s): {name}")
    benchmark.pedantic(measurement, (probe, pairs), rounds=1)


def float64_check(probe: gc.CommutatorProbe, pair) -> None:
    theta = flatten(probe.gradients.model).double()
    for batch in pair:
        probe.gradients.gradient(theta, batch, torch.empty_like(theta))


def test_successive_steps(benchmark, note):
    """A training step with a measurement, ratios to the plain training step of the module in the same round."""
    steps = CHECK_EVERY  # so that each round holds one check
    plain = training(Transformer.__call__)
    runs = {
        "shorter way, a measurement every step": training(fast.logits, measured=True),
        "the module, a measurement every step": training(Transformer.__call__, measured=True),
        "shorter way, unmeasured": training(fast.logits),
        "the module, four naive gradients and their difference": training(Transformer.__call__, naive=True),
    }
    ratios: dict[str, list[float]] = {name: [] for name in runs}
    for run in (plain, *runs.values()):
        run(2)
    for _ in range(ROUNDS):
        bare = seconds(lambda: plain(steps))
        for name, run in runs.items():
            ratios[name].append(seconds(lambda run=run: run(steps)) / bare)
    for name, values in ratios.items():
        note(f"{statistics.median(values):5.2f}x the plain training step ({1e3 * bare / steps:.0f} ms): {name}")
    benchmark.pedantic(runs["shorter way, a measurement every step"], (1,), rounds=1)


def training(forward, *, measured: bool = False, naive: bool = False) -> Callable[[int], None]:
    """``run(steps)``: that many training steps of a network of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=1.0)
    loss = lambda model, batch: functional.cross_entropy(forward(model, batch[0]), batch[1])  # noqa: E731
    draw = lambda: (torch.randint(97, (512, 2)), torch.randint(97, (512,)))  # noqa: E731
    monitor = gc.CurvatureMonitor(model, loss) if measured else None
    following = draw()

    def run(steps: int) -> None:
        nonlocal following
        for _ in range(steps):
            batch, following = following, draw()
            if naive:
                commutator(model, loss, (batch, following), 1e-3)
            optimizer.zero_grad()
            loss(model, batch).backward()
            if monitor is not None:
                monitor.step(batch, following)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    return run


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
