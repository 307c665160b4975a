"""Purposes keep their numbers; a shuffle is a random order of every run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_draw import assert_equally_likely, runs
from torch import Generator

from grokcurv import ops, reference
from grokcurv.draws import Purpose, shuffle


def test_purposes_keep_their_numbers() -> None:
    """And none is a sketch's, 0 and 1."""
    assert {purpose.name: purpose.value for purpose in Purpose} == {
        "SPLIT": 2,
        "TRAINING": 3,
        "MEASUREMENT": 4,
        "INTERVENTION": 5,
        "HESSIAN": 6,
    }


@pytest.mark.parametrize("n", [0, 1, 2, 37, 300])
def test_a_shuffle_sorts_its_draws(n: int, generator: Generator) -> None:
    seeds = runs(generator, 3)["seeds"]
    got = shuffle(seeds, Purpose.SPLIT, n)
    assert (got.shape, got.dtype) == ((3, n), torch.int64)
    zeros = torch.zeros_like(seeds)
    bits = reference.draw(seeds, Purpose.SPLIT, zeros, zeros, n).tolist()
    assert got.tolist() == [sorted(range(n), key=run.__getitem__) for run in bits]


def test_equal_draws_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """As 64 bits hardly ever are: here three values on a hundred places."""
    draw = ops.draw
    monkeypatch.setattr(ops, "draw", lambda *inputs: draw(*inputs) % 3)
    seeds = torch.arange(5)
    zeros = torch.zeros_like(seeds)
    values = ops.draw(seeds, 2, zeros, zeros, 100).tolist()
    assert shuffle(seeds, 2, 100).tolist() == [sorted(range(100), key=run.__getitem__) for run in values]


def test_every_order_is_as_likely() -> None:
    """Of four, over seeds in a row, at the significance of the tests of draw."""
    orders = shuffle(torch.arange(24_000), Purpose.SPLIT, 4)
    codes = (orders * 4 ** torch.arange(4)).sum(1)
    different, which = codes.unique(return_inverse=True)
    assert len(different) == 24
    assert_equally_likely(which, 24)


def test_a_run_does_not_depend_on_its_company(generator: Generator) -> None:
    seeds = runs(generator, 4)["seeds"]
    together = shuffle(seeds, Purpose.SPLIT, 50)
    assert torch.equal(shuffle(seeds[2:3], Purpose.SPLIT, 50), together[2:3])
    assert not torch.equal(shuffle(seeds, Purpose.TRAINING, 50), together)
    assert shuffle(seeds[:0], Purpose.SPLIT, 50).shape == (0, 50)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"n": -1}, ValueError, r"^n must lie in 0\.\.2\*\*33, got -1"),
        ({"n": 2**33 + 1}, ValueError, "^n must lie in"),
        ({"purpose": 2**32}, ValueError, r"^purpose must lie in 0\.\.2\*\*32 - 1"),
        ({"seeds": torch.zeros(3)}, TypeError, "^seeds must be int64, got float32"),
        ({"seeds": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, r"^seeds must have shape \(R\), got \(2, 2\)"),
    ],
)
def test_bad_input(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs = {"seeds": torch.arange(3), "purpose": Purpose.SPLIT, "n": 5} | changed
    with pytest.raises(error, match=message):
        shuffle(**inputs)
