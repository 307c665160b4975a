"""A whole measurement of the demo's model beside its bare gradients and beside the naive one, in one run.

What must be done: 36 gradients for K = 9 pairs, and for the noise floor two float64 gradients. Everything else
(perturbed parameters, defect, projection on the execution basis, both random controls) moves a few dozen vectors of
1.2 MB a pair, a small part of one gradient's time.
"""

from __future__ import annotations

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
        baseline = probe.basis.random_baseline(support)
        assert (fraction / baseline.mean).isfinite().all()


def test_bare_gradients(benchmark, problem):
    model, pairs, _ = problem
    benchmark.pedantic(bare_gradients, (model, pairs), rounds=ROUNDS, warmup_rounds=1)


def test_whole_measurement(benchmark, problem):
    model, pairs, basis = problem
    probe = gc.CommutatorProbe(model, loss_fn, basis=basis)
    benchmark.pedantic(measurement, (probe, pairs), rounds=ROUNDS, warmup_rounds=1)


def test_whole_measurement_without_noise_floor(benchmark, problem):
    model, pairs, basis = problem
    probe = gc.CommutatorProbe(model, loss_fn, basis=basis, noise_floor=False)
    benchmark.pedantic(measurement, (probe, pairs), rounds=ROUNDS, warmup_rounds=1)


def test_naive_measurement(benchmark, problem):
    model, pairs, basis = problem
    dense = basis.to_dense().T.contiguous()
    benchmark.pedantic(measure, (model, loss_fn, pairs, dense, 1e-3), rounds=1)
