"""A whole measurement of the demo's model beside its bare gradients and beside the naive one, in one run.

What must be done: 36 gradients for K = 9 pairs, and for the noise floor two float64 gradients. Everything else
(perturbed parameters, defect, projection on the execution basis, both random controls) moves a few dozen vectors of
1.2 MB a pair, a small part of one gradient's time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from naive import measure
from torch import nn
from torch.nn import functional

import grokcurv as gc
from grokcurv.flat import attention_segments, flatten
from grokcurv.modular.model import Transformer

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
    runs = {
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


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
