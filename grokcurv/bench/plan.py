"""Which cases ``grokcurv bench`` runs: those of the table, and those of its curves over P, K and T."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from grokcurv.bench import kernels, measurements, pca
from grokcurv.bench.comparison import Case

DEMO = 290_401
"""Parameters of the demo's model."""
MATRIX = 128 * 128
"""Numbers in one of its attention matrices."""

AXES = {"P": "parameters P", "K": "pairs of batches K", "T": "rows of the trajectory T"}
"""Of curves."""


@dataclass(frozen=True)
class Curve:
    """One case at several sizes.

    Attributes:
        axis: one of :data:`AXES`.
        title: of its panel.
        points: size and case.
    """

    axis: str
    title: str
    points: tuple[tuple[int, Case], ...]


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        budget: seconds that the timed rounds of a case of the table take, about; a point of a curve takes half.
    """

    table: tuple[Case, ...]
    curves: tuple[Curve, ...]
    budget: float


def make_plan(quick: bool) -> Plan:
    """The plan; ``quick`` ends within ten minutes on one core, without it P goes up to 1e8 and T to 1000."""
    table = of_table(10_000_000, streamed=96) if quick else (*of_table(30_000_000, streamed=400), *hessians())
    parameters = (100_000, 1_000_000, 10_000_000) + (() if quick else (100_000_000,))
    # Peers take a minute a round for 24 rows of 1e7.
    streamed = (100_000, 300_000, 1_000_000) if quick else parameters
    pairs = (1, 3, 9) if quick else (1, 2, 4, 9, 18)
    rows = (30, 100, 300) if quick else (30, 100, 300, 1000)
    curves = (
        curve("P", "defect arithmetic", parameters, kernels.defect),
        curve("P", "24 rows of a PCA, k = 2", streamed, lambda size: pca.incremental(24, size, 2)),
        curve("K", "whole measurement, demo's model", pairs, measurements.whole),
        curve("K", "exact bracket, demo's model", pairs, measurements.bracket),
        curve("T", "PCA of rows of 16,384", rows, lambda n: pca.whole(n, MATRIX)),
        curve("T", "PC1 % of every prefix", rows, lambda n: pca.history(n, MATRIX)),
    )
    return Plan(table, curves, budget=4.0 if quick else 15.0)


def of_table(large: int, streamed: int, shrink: int = 1) -> tuple[Case, ...]:
    """The cases of the table.

    Args:
        large: P of the kernels whose vectors fit no cache.
        streamed: rows of the incremental PCA.
        shrink: by how much P is smaller in all of it.
    """
    large, demo, matrix = large // shrink, DEMO // shrink, MATRIX // shrink
    return (
        measurements.admission(),
        measurements.pair(),
        measurements.bracket(1),
        measurements.whole(9),
        measurements.whole(9, measurements.SHORTER),
        measurements.training(),
        measurements.training(measurements.SHORTER),
        measurements.updates(),
        measurements.hessian_edge(0),
        measurements.followed(),
        pca.whole(300, matrix),
        pca.history(300, matrix),
        pca.incremental(streamed, demo),
        kernels.defect(large),
        kernels.perturb(large),
        kernels.rounding_terms(demo),
        kernels.defect_on_basis(demo),
        kernels.split(large),
        kernels.filter_(demo),
        kernels.gram_row(60, 8 * matrix),
        kernels.gram_matrix(60, 8 * matrix),
        kernels.eigh(60, 8),
        kernels.eigh_prefixes(300),
        kernels.rotate(24, 12, demo),
        kernels.sketch(1, 1 << 16, large),
        kernels.draw(64, large // 64),
    )


def hessians() -> tuple[Case, ...]:
    """More of the Hessian, minutes each."""
    late = measurements.hessian_edge(300), measurements.hessian_sum(300)
    return measurements.hessian_sum(0), *late


def curve(axis: str, title: str, sizes: Sequence[int], case: Callable[[int], Case]) -> Curve:
    return Curve(axis, title, tuple((size, case(size)) for size in sizes))


def every_size(device: str, shrink: int = 1) -> tuple[Case, ...]:
    """What ``make bench`` runs, and ``make gpu``: every kernel at the size of the demo's model and at one that fills no
    cache, and on a CPU the whole table.

    Args:
        device: whose sizes they are.
        shrink: by how much all of it is smaller, for a rehearsal.
    """
    gpu, rehearsed = device == "cuda", shrink > 1
    # Vectors, and rows of which there are many.
    large, wide = (n // shrink for n in ((100_000_000, 30_000_000) if gpu else (30_000_000, 8 * MATRIX)))
    demo, sketched = DEMO // shrink, 1 if gpu else 8
    together = (2,) if rehearsed else (1, 16, 64, 256) if gpu else (4,)
    by_size = (
        kernels.defect,
        kernels.rounding_terms,
        kernels.defect_on_basis,
        kernels.perturb,
        kernels.split,
        kernels.filter_,
    )
    cases = (
        *(() if gpu else of_table(30_000_000, 400, shrink)),
        *(() if gpu or rehearsed else hessians()),
        *(case(size) for size in (large, demo) for case in by_size),
        kernels.perturb(demo, runs=64),
        kernels.gram_matrix(32, wide),
        kernels.gram_row(64, wide),
        kernels.gram_matrix(48, demo),
        kernels.rotate(32, 32, wide),
        kernels.rotate(32, 16, wide),
        kernels.rotate(48, 16, demo),
        kernels.eigh(48, 48),
        kernels.eigh(128, 128, batch=1 if rehearsed else 64),
        kernels.eigh(150 if rehearsed else 450, 8, batch=1),
        kernels.sketch(sketched, 1 << 16, large // sketched),
        kernels.draw(64, large // 64),
        kernels.draw(256, 512),
        measurements.whole(1 if rehearsed else 9),
        *(measurements.program(runs, measured) for runs in together for measured in (False, True)),
    )
    return tuple({case.title: case for case in cases}.values())
