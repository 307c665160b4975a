"""Fourier progress against hand-built networks' embeddings and logits, and against projections written out."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from grokcurv.tasks import MLP, OPERATIONS, Transformer, table
from grokcurv.tasks.modular.fourier import (
    GROUPS,
    FourierShares,
    elements,
    embedding_of,
    energies,
    excluded_loss,
    key_frequencies,
    random_share,
    restricted_loss,
)
from grokcurv.training import TrainConfig, load_model, train
from grokcurv.training.network import task_of

F64 = torch.float64


def defined(op: str, p: int) -> bool:
    return p in (2, 3, 5, 7, 11, 13) or op not in ("mul", "div")


def tasks(*sizes: int) -> list[tuple[str, int]]:
    return [(op, p) for p in sizes for op in OPERATIONS if op != "div" or defined(op, p)]


def group(op: str, p: int) -> tuple[int, dict[int, int]]:
    """Its order n, and the place of each number in it, by trying all logarithms."""
    if op not in ("mul", "div"):
        return p, {a: a for a in range(p)}
    for root in range(1, p):
        places = {pow(root, j, p): j for j in range(p - 1)}
        if len(places) == p - 1:
            return p - 1, places
    raise AssertionError(f"{p} has no primitive root for {op}")


def project(values: Tensor, angles: Tensor) -> float:
    """Energy of the columns of ``values`` (rows, width) on the cosine and the sine of ``angles`` (rows,)."""
    total = 0.0
    for wave in (angles.cos(), angles.sin()):
        length2 = wave.square().sum()
        if length2 > 1e-9:
            total += ((wave @ values).square().sum() / length2).item()
    return total


def by_definition(op: str, p: int, embedding: Tensor, pairs: Tensor, logits: Tensor, k: int) -> tuple[float, float]:
    """Both shares by explicit projections in float64; the second over a and b, not over the answers."""
    n, places = group(op, p)
    numbers = sorted(places)
    rows = embedding[numbers].to(F64)
    rows = rows - rows.mean(0)
    at = torch.tensor([places[a] for a in numbers], dtype=F64)
    energy = {f: project(rows, 2 * math.pi * f * at / n) for f in range(1, n // 2 + 1)}
    key = sorted(energy, key=lambda f: -energy[f])[:k]
    whole = rows.square().sum().item()
    share = sum(energy[f] for f in key) / whole if len(energy) else math.nan
    if op not in GROUPS:
        return share, math.nan
    inside = torch.tensor([a in places and b in places for a, b in pairs.tolist()])
    x = logits[inside][:, numbers].to(F64)
    x = x - x.mean(1, keepdim=True)
    x = x - x.mean(0)
    sign = -1 if op in ("sub", "div") else 1
    total = torch.tensor([places[a] + sign * places[b] for a, b in pairs[inside].tolist()], dtype=F64)
    explained = sum(project(x, 2 * math.pi * f * total / n) for f in key)
    return share, explained / x.square().sum().item() if n > 1 else math.nan


def shares(op: str, p: int, embedding: Tensor, logits: Tensor, k: int = 5, pieces: int = 1000) -> list[float]:
    """What the evaluation computes of the logits (rows, p) at all pairs, ``pieces`` rows at a time."""
    _, answers = table(op, p)
    found = FourierShares(op, p, embedding, k)
    for x, y in zip(logits.split(pieces), answers.split(pieces), strict=True):
        found.add(x, y)
    return found.read().tolist()


@pytest.mark.parametrize(("op", "p"), tasks(2, 3, 5, 6, 7, 12, 13))
def test_random_numbers_have_the_shares_of_the_definition(op: str, p: int, generator: Generator) -> None:
    pairs, _ = table(op, p)
    embedding = torch.randn(p, 4, generator=generator)
    logits = 3 + torch.randn(len(pairs), p, generator=generator) + torch.randn(p, generator=generator)
    for k in (1, 2, 5):
        found = shares(op, p, embedding, logits, k, pieces=7)
        if not defined(op, p):
            assert np.isnan(found).all()
            continue
        wanted = by_definition(op, p, embedding, pairs, logits, k)
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)
        assert np.nanmax([0, *found]) <= 1 + 1e-12


@pytest.mark.parametrize(("op", "p"), [(op, p) for op in GROUPS for p in (13, 31)])
def test_a_network_that_adds_by_angles(op: str, p: int, generator: Generator) -> None:
    """cos(w (a o b - c)) at a few frequencies is all; with noise, the part that is not noise."""
    n, places = group(op, p)
    place = torch.tensor([places.get(a, 0) for a in range(p)], dtype=F64)
    frequencies = (torch.randperm(n // 2, generator=generator)[:5] + 1).to(F64)
    angles = 2 * math.pi * frequencies * place[:, None] / n
    embedding = torch.cat([angles.cos(), angles.sin()], 1)
    mixed = embedding @ torch.randn(10, 10, generator=generator, dtype=F64) + 7
    pairs, answers = table(op, p)
    angle = angles[answers][:, None] - angles[None]
    weights = 1 + torch.rand(5, generator=generator, dtype=F64)
    logits = (weights * angle.cos()).sum(-1)
    logits += torch.randn(len(pairs), 1, generator=generator, dtype=F64)  # the soft-max cannot see it
    logits += torch.randn(p, generator=generator, dtype=F64)  # the pair does not change it
    np.testing.assert_allclose(shares(op, p, mixed, logits), [1, 1], rtol=1e-10)
    fewer = shares(op, p, mixed, logits, k=4)
    assert max(fewer) < 0.99
    # The operation's inverse answers by other pairs of frequencies.
    other = {"add": "sub", "sub": "add", "mul": "div", "div": "mul"}[op]
    if len(table(other, p)[0]) == len(pairs):
        assert shares(other, p, mixed, logits)[1] < 1e-9


def test_a_table_without_structure_has_two_k_of_its_components(generator: Generator) -> None:
    p, k = 23, 5
    found = [
        shares("add", p, torch.randn(p, 8, generator=generator), torch.randn(p * p, p, generator=generator), k)[1]
        for _ in range(30)
    ]
    # p - 1 free answers: a share of energy with 2 k (p - 1) of (p^2 - 1) (p - 1) degrees of freedom.
    mean = 2 * k / (p**2 - 1)
    deviation = math.sqrt(2 * mean / ((p**2 - 1) * (p - 1)) / 30)
    assert abs(np.mean(found) - mean) < 5 * deviation


@pytest.mark.parametrize(("n", "width", "k"), [(97, 128, 5), (23, 3, 2), (7, 4, 3)])
def test_the_share_of_a_random_embedding(n: int, width: int, k: int, generator: Generator) -> None:
    order = torch.arange(n)
    found = []
    for _ in range(200):
        energy = energies(torch.randn(n, width, generator=generator), order)[1:]
        found.append((energy.topk(k).values.sum() / energy.sum()).item())
    assert abs(np.mean(found) - random_share(n, width, k)) < 5 * np.std(found) / math.sqrt(200) + 1e-12
    with pytest.raises(ValueError, match="n must be odd and at least 3, got 96"):
        random_share(96, 8)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9, 97])
def test_energies_add_up(n: int, generator: Generator) -> None:
    embedding = torch.randn(n + 2, 5, generator=generator)
    order = torch.randperm(n + 2, generator=generator)[:n]
    energy = energies(embedding, order)
    assert len(energy) == n // 2 + 1
    torch.testing.assert_close(energy.sum(), embedding[order].to(F64).square().sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(energy[0], n * embedding[order].to(F64).mean(0).square().sum(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("p", [2, 3, 5, 7, 97, 113, 4093])
def test_elements_of_a_prime_are_powers(p: int) -> None:
    for op in ("mul", "div"):
        powers = elements(op, p)
        assert powers is not None
        assert sorted(powers.tolist()) == list(range(1, p))
        root = powers[1].item() if p > 2 else 1
        assert (powers[:-1] * root % p).equal(powers[1:])
    assert torch.arange(p).equal(elements("x3_xy", p))


@pytest.mark.parametrize("p", [4, 6, 8, 9, 15, 561])
def test_other_moduli_have_no_primitive_element(p: int) -> None:
    assert elements("mul", p) is None


def test_nothing_to_see_is_nan(generator: Generator) -> None:
    p = 11
    same = torch.randn(4, generator=generator).expand(p, 4)
    biases = torch.randn(p, generator=generator).expand(p * p, p)
    assert np.isnan(shares("add", p, same, biases)).all()
    assert np.isnan(shares("add", p, torch.zeros(p, 4), torch.zeros(p * p, p))).all()
    assert np.isnan(shares("add", p, torch.full((p, 4), torch.nan), torch.full((p * p, p), torch.inf))).all()


@pytest.mark.parametrize("op", ["x2_y2", "x2_xy_y2"])
def test_why_the_quadratic_operations_have_no_logits(op: str) -> None:
    """The waves of their answers are equally large at every pair of frequencies of a and b: a Gauss sum."""
    p = 13
    _, answers = table(op, p)
    wave = torch.polar(torch.ones(p * p, dtype=F64), 2 * math.pi * answers.to(F64) / p)
    sizes = torch.fft.fft2(wave.view(p, p)).abs()
    torch.testing.assert_close(sizes, torch.full_like(sizes, p))


def test_embeddings() -> None:
    model = Transformer(7, layers=1, d_model=8, heads=2, d_ff=8, sequence="a op b =")
    assert embedding_of(model).equal(model.tok_emb.weight[:7])
    mlp = MLP(5, width=3)
    embedding = embedding_of(mlp)
    weight = mlp.hidden[0].weight
    assert embedding.shape == (5, 6)
    for token in range(5):
        assert embedding[token].equal(torch.cat([weight[:, token], weight[:, 5 + token]]))


# Restricted and excluded loss


def losses_by_definition(
    op: str, p: int, logits: Tensor, frequencies: list[int], train: set[int]
) -> tuple[float, float]:
    """Both losses by a discrete Fourier transform of the logits (pairs, p) over both operands, in float64.

    The transform is over the places of a and b in the group. Of its components (0, 0), (f, f) and (-f, -f) are kept, or
    (f, -f) and (-f, f) where the answer is that of the inverse operation; or all but those of the frequencies.
    """
    n, places = group(op, p)
    pairs, answers = table(op, p)
    at = {(places[a], places[b]): row for row, (a, b) in enumerate(pairs.tolist()) if a in places and b in places}
    grid = torch.stack([torch.stack([logits[at[i, j]] for j in range(n)]) for i in range(n)]).to(F64)
    sign = -1 if op in ("sub", "div") else 1
    transform = torch.fft.fft2(grid, dim=(0, 1))
    waves = torch.zeros_like(transform)
    for f in frequencies:
        for i in {f % n, -f % n}:
            waves[i, sign * i % n] = transform[i, sign * i % n]
    waves = torch.fft.ifft2(waves, dim=(0, 1)).real
    mean = grid.mean((0, 1))

    def loss(values: Tensor, rows: set[int]) -> float:
        total = [
            math.log(sum(math.exp(x) for x in values[i, j].tolist())) - values[i, j, answers[row]].item()
            for (i, j), row in at.items()
            if row in rows
        ]
        return sum(total) / len(total)

    return loss(waves + mean, set(range(len(pairs)))), loss(grid - waves, train)


@pytest.mark.parametrize(("op", "p"), [(op, p) for op in GROUPS for p in (2, 3, 7, 12) if defined(op, p)])
def test_losses_against_the_transform(op: str, p: int, generator: Generator) -> None:
    pairs, answers = table(op, p)
    n, places = group(op, p)
    logits = torch.randn(len(pairs), p, generator=generator) + torch.randn(p, generator=generator)
    inside = [row for row, (a, b) in enumerate(pairs.tolist()) if a in places and b in places]
    train = torch.randperm(len(pairs), generator=generator)[: 1 + len(pairs) // 2]
    train = torch.cat([train, torch.tensor(inside[:1])])  # at least one of the group
    chosen = (torch.randperm(max(n // 2, 1), generator=generator)[: n // 4 + 1] + 1).tolist() if n > 1 else None
    wanted = losses_by_definition(op, p, logits, chosen or [], set(train.tolist()))
    mask = torch.zeros(len(pairs), dtype=torch.bool)
    mask[train] = True
    found = restricted_loss(logits, answers, chosen, op), excluded_loss(logits, answers, mask, chosen, op)
    assert [loss.dtype for loss in found] == [F64, F64]
    assert [loss.item() for loss in found] == pytest.approx(wanted, rel=1e-12)
    # Rows in any order, and pairs as a square.
    order = torch.randperm(len(pairs), generator=generator)
    again = restricted_loss(logits[order], answers[order], chosen, op)
    torch.testing.assert_close(again, found[0], rtol=1e-12, atol=0)
    sides = (p - 1, p - 1) if op == "mul" else (p, p - 1) if op == "div" else (p, p)
    square = logits.view(*sides, p), answers.view(sides)
    assert excluded_loss(*square, mask.view(sides), chosen, op).equal(found[1])
    if n > 3:
        every = list(range(1, n // 2 + 1))
        means = torch.stack([logits[answers == r].to(F64).mean(0) for r in sorted(places)])
        wanted_loss = torch.nn.functional.cross_entropy(means, torch.tensor(sorted(places)))
        torch.testing.assert_close(restricted_loss(logits, answers, every, op), wanted_loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("op", "p"), [("add", 13), ("sub", 12), ("mul", 13), ("div", 11)])
def test_key_frequencies(op: str, p: int, generator: Generator) -> None:
    n, places = group(op, p)
    _, answers = table(op, p)
    logits = torch.randn(len(answers), 1, generator=generator, dtype=F64) + 9 * torch.rand(p, generator=generator)
    strengths = torch.randperm(n // 2, generator=generator) + 1.0
    place = torch.tensor([places.get(a, 0) for a in range(p)], dtype=F64)
    for f, strength in enumerate(strengths.tolist(), 1):
        logits = logits + strength * torch.cos(2 * math.pi * f * (place[answers][:, None] - place) / n)
    for k in (1, 3, 50):
        wanted = sorted((strengths.square() * (1 + (2 * torch.arange(1, n // 2 + 1) == n))).argsort()[-k:] + 1)
        if op in ("add", "sub"):  # elsewhere the answer 0, outside the group, has waves of another's
            assert key_frequencies(logits, answers, k, op).tolist() == [int(f) for f in wanted]
        given = key_frequencies(logits, answers, k, op)
        assert given.tolist() == sorted(given.tolist())
        assert len(given) == min(k, n // 2)
    by_default = key_frequencies(logits, answers, op=op)
    assert restricted_loss(logits, answers, op=op).equal(restricted_loss(logits, answers, by_default, op))
    assert excluded_loss(logits, answers, slice(20, 40), op=op).equal(
        excluded_loss(logits, answers, slice(20, 40), by_default, op)
    )


def test_a_network_that_adds_by_angles_and_one_that_has_memorised(generator: Generator) -> None:
    p = 23
    _, answers = table("add", p)
    angle = 2 * math.pi * (answers[:, None] - torch.arange(p)).to(F64) / p
    adds = 8 * ((2 * angle).cos() + (5 * angle).cos() + (9 * angle).cos())
    train = torch.randperm(p * p, generator=generator)[:150]
    chance = math.log(p)
    assert restricted_loss(adds, answers, [2, 5, 9]) < 1e-3
    assert excluded_loss(adds, answers, train, [2, 5, 9]).item() == pytest.approx(chance)
    memorised = torch.randn(p * p, p, generator=generator)
    memorised[train, answers[train]] += 20
    assert restricted_loss(memorised, answers, [2, 5, 9]) > 0.5 * chance
    assert excluded_loss(memorised, answers, train, [2, 5, 9]) < 0.05


def test_losses_that_are_not_defined(generator: Generator) -> None:
    pairs, answers = table("add", 7)
    logits = torch.randn(49, 7, generator=generator)
    for arguments, said in (
        ((logits, answers, None, "x2_y2"), "op must be one of add, sub, mul, div, .* got 'x2_y2'"),
        ((logits[:48], answers[:48]), r"all 7\^2 pairs of the group of 'add', 7 of each answer; got from 6 to 7"),
        ((logits, answers[:48]), r"got \(49, 7\) and \(48,\)"),
        ((logits[0], answers[0]), r"got \(7,\) and \(\)"),
        ((logits, answers, [0, 1]), r"whole numbers from 1 to 3, \(k,\); got \[0, 1\]"),
        ((logits, answers, [4]), "from 1 to 3"),
        ((logits, answers, torch.tensor([1.0])), "whole numbers"),
        ((torch.zeros(64, 9), torch.zeros(64, dtype=torch.int64), None, "mul"), "p must be prime for op 'mul'.* got 9"),
    ):
        with pytest.raises(ValueError, match=said):
            restricted_loss(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="train chooses no pair"):
        excluded_loss(logits, answers, torch.zeros(49, dtype=torch.bool))
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        key_frequencies(logits, answers, 0)
    assert len(pairs) == 49
    assert restricted_loss(torch.full((49, 7), torch.nan), answers, [1]).isnan()


TINY = TrainConfig(
    p=7, layers=1, d_model=8, heads=2, d_ff=12, batch_size=16, steps=20, eval_every=10, measure_every=0, threads=1
)


@pytest.mark.parametrize(
    "values",
    [
        {"op": "add"},
        {"op": "div", "sequence": "a op b ="},
        {"op": "mul", "p": 11, "architecture": "mlp"},
        {"op": "mul", "p": 9},
        {"op": "x3_xy"},
    ],
)
def test_a_run_records_them(values: dict, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last row is that of the whole table's logits at once, though the evaluation takes them in pieces."""
    monkeypatch.setattr("grokcurv.tasks.modular.task.EVALUATION_ROWS", 10)
    config = dataclasses.replace(TINY, **values)
    run = train(config, out=tmp_path)
    model = load_model(run)
    pairs, _ = table(config.op, config.p)
    with torch.no_grad():
        logits = task_of(config).logits(model, pairs)
    last = run.metrics[["fourier_embedding", "fourier_logits"]].iloc[-1]
    if config.p == 9:
        assert last.isna().all()
        return
    wanted = by_definition(config.op, config.p, embedding_of(model), pairs, logits, 5)
    np.testing.assert_allclose(last.to_numpy(), wanted, rtol=1e-5)
