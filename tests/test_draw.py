"""draw: its generator, its definition, numbers that are uniform and independent, and what they do not depend on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats
from torch import Generator, Tensor

from grokcurv import ops, reference

ONES = 2**32 - 1
KNOWN = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)
"""The known answers of philox4x32-10 in the authors' library Random123: counter, key, words."""

BELOW = (0, 1, 2, 3, 97, 4704, 2**31 - 1, 2**31, 2**31 + 1, 3 * 2**30, 2**32 - 1, 2**32)
"""A run each: all bits, none, few; with nothing to refuse, and with about half of the words refused."""


def tensor(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def runs(generator: Generator, count: int = len(BELOW)) -> dict[str, Any]:
    """Arguments of so many runs, but for n and rows."""
    return {
        "seeds": torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator),
        "purpose": int(torch.randint(2**32, (), generator=generator)),
        "steps": torch.randint(2**32, (count,), generator=generator),
    }


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_generator(counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, int, int, int]) -> None:
    assert reference.philox(counter, key) == words


def test_the_known_answer_of_all_zeros() -> None:
    """The one whose counter is reached without 2**33 entries before it."""
    words, zero = KNOWN[0][2], tensor(0)
    assert ops.draw(zero, 0, zero, tensor(2**32), 4).tolist() == [list(words)]
    pairs = [words[0] + (words[1] << 32), words[2] + (words[3] << 32)]
    assert [x % 2**64 for x in ops.draw(zero, 0, zero, zero, 2)[0].tolist()] == pairs


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 31, 32, 33, 130, 1021, 1024])
def test_definition(rows: int, generator: Generator) -> None:
    inputs = {**runs(generator), "n": tensor(*BELOW), "rows": rows}
    assert torch.equal(ops.draw(**inputs), reference.draw(**inputs))


@pytest.mark.parametrize(("n", "rows"), [((0, 97), 4097), ((2**31 + 1, 2**32), 4096), ((5,), 9001)])
def test_definition_of_many_rows(n: tuple[int, ...], rows: int, generator: Generator) -> None:
    inputs = {**runs(generator, len(n)), "n": tensor(*n), "rows": rows}
    assert torch.equal(ops.draw(**inputs), reference.draw(**inputs))


@pytest.mark.parametrize("purpose", [0, 2**31, ONES])
def test_definition_at_the_ends(purpose: int) -> None:
    seeds = tensor(0, -1, -(2**63), 2**63 - 1, 2**32, ONES)
    for step in (0, 2**31, ONES):
        for n in (0, 97, 2**31 + 1):
            inputs = {"steps": torch.full_like(seeds, step), "n": torch.full_like(seeds, n), "rows": 7}
            got = ops.draw(seeds, purpose, **inputs)
            assert torch.equal(got, reference.draw(seeds, purpose, **inputs))


def test_64_bits_are_two_words_in_a_row(generator: Generator) -> None:
    some = runs(generator, 3)
    words = ops.draw(**some, n=torch.full((3,), 2**32), rows=2 * 77).view(3, 77, 2)
    assert torch.equal(
        ops.draw(**some, n=torch.zeros_like(some["seeds"]), rows=77), words[..., 0] | words[..., 1] << 32
    )


def test_words_are_refused(generator: Generator) -> None:
    """Just above 2**31 a word in two, of which the next attempt makes something else. No product but keeps its bits."""
    n, rows, run = 2**31 + 1, 10_000, runs(generator, 1)
    words, got = (ops.draw(**run, n=tensor(m), rows=rows)[0] for m in (2**32, n))
    products = words * n
    refused = products % 2**32 < 2**32 % n
    share = (2**32 % n) / 2**32
    assert abs(refused.double().mean() - share) <= 5 * (share * (1 - share) / rows) ** 0.5
    first = products >> 32 & ONES
    assert torch.equal(got[~refused], first[~refused])
    assert (got[refused] != first[refused]).double().mean() > 0.99
    assert ((got >= 0) & (got < n)).all()


# --------------------------------------------------------------------------------------------- uniform and independent

SIGNIFICANCE = 1e-3
"""Of a test at each end. Seeds are fixed, so that a test that has passed passes."""


def p_value(counts: Tensor) -> float:
    """Pearson's test of equally likely cells: how likely are counts at least as uneven."""
    expected = float(counts.sum()) / counts.numel()
    statistic = (counts - expected).square().sum() / expected
    return float(stats.chi2.sf(float(statistic), counts.numel() - 1))


def assert_equally_likely(cells: Tensor, count: int) -> None:
    """The numbers of ``cells`` are uniform on [0, count): neither too uneven nor too even."""
    assert SIGNIFICANCE < p_value(cells.flatten().bincount(minlength=count)) < 1 - SIGNIFICANCE


@pytest.mark.parametrize("n", [97, 4704])
def test_uniform(n: int) -> None:
    got = ops.draw(tensor(1, 2, 3), 3, tensor(0, 1, 10**6), tensor(n, n, n), 200_000)
    for run in got:
        assert_equally_likely(run, n)
    assert_equally_likely(got, n)


def test_refusing_is_what_makes_numbers_uniform() -> None:
    """Of four words in a row three numbers become below 3 2**30: the first of two of them, unless one is refused."""
    n, rows = 3 * 2**30, 100_000
    words, got = (ops.draw(tensor(4), 3, tensor(5), tensor(m), rows)[0] for m in (2**32, n))
    assert_equally_likely(got % 3, 3)
    assert_equally_likely(got >> 20, n >> 20)
    assert p_value(((words * 3 >> 2) % 3).bincount(minlength=3)) < SIGNIFICANCE


def test_bits_are_uniform() -> None:
    drawn = ops.draw(tensor(6), 2, tensor(0), tensor(0), 100_000)
    for byte in drawn.view(torch.uint8).view(-1, 8).long().T:
        assert_equally_likely(byte, 256)


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"seed": -1}, {"seed": 2**32}, {"purpose": 3}, {"purpose": 2 + 2**16}, {"step": 1}, {"step": 2**31}],
    ids=str,
)
@pytest.mark.parametrize("n", [13, 3 * 2**30])
def test_independent(n: int, other: dict[str, int]) -> None:
    """Of runs, purposes and steps that differ by a bit or by one, each pair of numbers is as likely as any."""

    def thirteenths(seed: int = 0, purpose: int = 2, step: int = 0) -> Tensor:
        numbers = ops.draw(tensor(seed), purpose, tensor(step), tensor(n), 100_000)[0]
        return numbers * 13 // n

    assert_equally_likely(13 * thirteenths() + thirteenths(**other), 169)


@pytest.mark.parametrize("apart", [1, 2, 3, 4, 32])
def test_entries_are_independent(apart: int) -> None:
    run = ops.draw(tensor(7), 4, tensor(3), tensor(13), 192_000)[0].view(-1, 2 * apart)
    assert_equally_likely(13 * run[:, :apart] + run[:, apart:], 169)


# ----------------------------------------------------------------------------------------- what they do not depend on


def test_fewer_rows_are_the_beginning_of_more(generator: Generator) -> None:
    inputs = {**runs(generator), "n": tensor(*BELOW)}
    most = ops.draw(**inputs, rows=2500)
    for rows in (0, 1, 6, 33, 1024, 2047):
        assert torch.equal(ops.draw(**inputs, rows=rows), most[:, :rows])


def test_a_run_does_not_depend_on_its_company(generator: Generator) -> None:
    inputs, n = runs(generator), tensor(*BELOW)
    together = ops.draw(**inputs, n=n, rows=43)
    for r in range(len(n)):
        alone = {name: inputs[name][r : r + 1] for name in ("seeds", "steps")}
        assert torch.equal(ops.draw(**alone, purpose=inputs["purpose"], n=n[r : r + 1], rows=43), together[r : r + 1])


@pytest.mark.parametrize(("count", "rows"), [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_draw(count: int, rows: int, generator: Generator) -> None:
    got = ops.draw(**runs(generator, count), n=torch.full((count,), 9), rows=rows)
    assert (got.shape, got.dtype) == ((count, rows), torch.int64)
