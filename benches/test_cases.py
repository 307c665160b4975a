"""The cases of ``grokcurv bench``, at more sizes and with what is asked of them; pytest-benchmark times grokcurv alone.

Truth comes first there as here: a case whose answer is wrong is not timed. A ratio compares rounds that took turns.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch

from grokcurv.bench.check import check, peers
from grokcurv.bench.comparison import Case
from grokcurv.bench.plan import everything
from grokcurv.bench.table import clock, errors, factor, must, quantities
from grokcurv.bench.timing import threads

BUDGET = 10.0
FASTER = {
    "defect": ("plain torch, the float32 formula", 10.0),
    "pca": ("NumPy SVD", 8.0),
    "pca-history": ("NumPy SVD of each", 40.0),
    "pca-incremental": ("scikit-learn IncrementalPCA", 8.0),
}
"""By case, how many times faster than which peer it must be."""
CLOSER = {"pca-incremental": "scikit-learn IncrementalPCA"}
"""By case, the peer whose error in the first quantity it must not exceed."""
OVER_FLOOR = {"defect": 1 / 0.7}
"""By case, how many times its floor it may take."""


@pytest.fixture(scope="module")
def problems() -> Mapping[str, str]:
    return peers()


@pytest.fixture(autouse=True)
def one_thread(problems: Mapping[str, str]) -> Iterator[None]:
    """Also for the BLAS of NumPy and SciPy; after the peers have loaded theirs."""
    pytest.importorskip("threadpoolctl", reason="threadpoolctl is not installed")
    with threads(1):
        yield


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = everything(metafunc.config.getoption("--shrink"))
        metafunc.parametrize("case", cases, ids=lambda case: case.title)


def test_case(
    case: Case,
    benchmark: Callable[..., None],
    note: Callable[[str], None],
    problems: Mapping[str, str],
    shrink: int,
) -> None:
    generator = torch.Generator().manual_seed(0)
    result = check(case, generator, BUDGET / shrink, problems)
    if not result.outcomes:
        pytest.skip(result.problem)  # it needs more memory than is free
    assert not result.problem
    ours, *others = result.outcomes
    for outcome in others:
        note(f"{clock(ours.times)}, {outcome.name} {clock(outcome.times) or outcome.problem} {factor(outcome.ratio)}")
        note(f"{quantities(ours)}: {errors(ours)}, {errors(outcome)}")
    if result.floor is not None:
        note(f"{factor(result.floor.ratio)} its floor, {must(result.floor)}")
    if shrink > 1:
        return
    by_name = {outcome.name: outcome for outcome in others if outcome.ratio is not None}
    name, least = FASTER.get(case.name, ("", 0.0))
    if name in by_name:
        assert by_name[name].ratio.median >= least
    closer = by_name.get(CLOSER.get(case.name, ""))
    if closer is not None:
        first = next(iter(ours.errors))
        assert ours.errors[first] <= closer.errors[first]
    assert result.floor is None or result.floor.ratio.median <= OVER_FLOOR.get(case.name, sys.float_info.max)
    benchmark.pedantic(
        case.build(generator).implementations[0].run, rounds=5 if ours.times.median < 1 else 1, warmup_rounds=1
    )
