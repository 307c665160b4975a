from __future__ import annotations

import random

import pytest
import torch

from grokcurv.tasks import OPERATIONS, split, table

DEFINITIONS = {
    "add": lambda a, b, p: (a + b) % p,
    "sub": lambda a, b, p: (a - b) % p,
    "mul": lambda a, b, p: (a * b) % p,
    "x2_y2": lambda a, b, p: (a * a + b * b) % p,
    "x2_xy_y2": lambda a, b, p: (a * a + a * b + b * b) % p,
    "x3_xy": lambda a, b, p: (a * a * a + a * b) % p,
    "div": lambda a, b, p: next(c for c in range(p) if c * b % p == a),
}


@pytest.mark.parametrize("p", [2, 5, 13])
@pytest.mark.parametrize("op", OPERATIONS)
def test_table_is_the_definition_in_lexicographic_order(op: str, p: int) -> None:
    first, second = {"mul": (1, 1), "div": (0, 1)}.get(op, (0, 0))
    expected = [(a, b) for a in range(first, p) for b in range(second, p)]
    pairs, answers = table(op, p)
    assert pairs.dtype == answers.dtype == torch.int64
    assert list(map(tuple, pairs.tolist())) == expected
    assert answers.tolist() == [DEFINITIONS[op](a, b, p) for a, b in expected]
    assert OPERATIONS[op].size(p) == len(expected)


def test_operations_and_definitions_are_the_same_set() -> None:
    assert OPERATIONS.keys() == DEFINITIONS.keys()


@pytest.mark.parametrize("p", [4, 9, 91])
def test_division_needs_a_prime(p: int) -> None:
    with pytest.raises(ValueError, match=f"p must be prime for op 'div'.*got {p}"):
        table("div", p)
    table("mul", p)


@pytest.mark.parametrize("p", [-3, 0, 1, 10_007])
def test_p_out_of_range(p: int) -> None:
    with pytest.raises(ValueError, match=f"p must lie between 2 and 4096; got {p}"):
        table("add", p)


def test_unknown_operation_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"one of add, sub, mul, x2_y2, x2_xy_y2, x3_xy, div; got 'power'"):
        table("power", 7)


@pytest.mark.parametrize("fraction", [0.1, 1 / 3, 0.5, 0.99])
def test_split_is_a_partition(fraction: float) -> None:
    pairs, answers = table("x3_xy", 11)
    data = split("x3_xy", 11, fraction, torch.Generator().manual_seed(random.getrandbits(32)))
    assert len(data.train_pairs) == len(data.train_answers) == int(fraction * 121)
    both = torch.cat([data.train_pairs, data.test_pairs])
    order = (both[:, 0] * 11 + both[:, 1]).argsort()
    assert both[order].equal(pairs)
    assert torch.cat([data.train_answers, data.test_answers])[order].equal(answers)


def test_split_by_random_shuffles_the_lexicographic_list() -> None:
    seed = random.getrandbits(32)
    pairs = [[a, b] for a in range(1, 13) for b in range(1, 13)]
    random.Random(seed).shuffle(pairs)
    data = split("mul", 13, 0.5, random.Random(seed))
    assert data.train_pairs.tolist() == pairs[:72]
    assert data.test_pairs.tolist() == pairs[72:]


@pytest.mark.parametrize("fraction", [-0.5, 0.0, 0.001, 1.0, 1.5, float("nan")])
def test_fractions_that_leave_a_set_empty(fraction: float) -> None:
    with pytest.raises(ValueError, match="train_fraction must leave both sets some of the 25 pairs"):
        split("add", 5, fraction, random.Random(0))
