"""What is measured along a training run: a file a measure, for any number of runs at once."""

from collections.abc import Callable
from typing import Any, NamedTuple

from grokcurv.measures.base import Measure
from grokcurv.measures.gradient_noise import GradientNoise
from grokcurv.measures.hessian_edges import HessianEdges
from grokcurv.measures.optimizer_commutator import OptimizerCommutator
from grokcurv.measures.update_decomposition import UpdateDecomposition
from grokcurv.measures.update_gram import UpdateGram
from grokcurv.measures.weight_spectra import WeightSpectra


class Given(NamedTuple):
    """What settings and command lines say of the measures that they name."""

    window: int = 10
    """Updates in a window."""
    every: int = 1
    """Steps of an update."""
    batch: Any = None
    """For measures of one batch: that of the run, or those of several runs."""


MEASURES: dict[str, Callable[[Given], Measure]] = {
    UpdateGram.name: lambda given: UpdateGram(given.window, every=given.every),
    UpdateDecomposition.name: lambda _: UpdateDecomposition(),
    OptimizerCommutator.name: lambda _: OptimizerCommutator(),
    HessianEdges.name: lambda given: HessianEdges(given.batch, probes=2),
    WeightSpectra.name: lambda given: WeightSpectra(every=given.every),
    GradientNoise.name: lambda _: GradientNoise(),
}
"""Measures that settings and command lines can name, and how each is made there."""


def measure_names(text: str) -> list[str]:
    """The names in ``"one,another"``; ValueError for one that is none, or is there twice."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for index, name in enumerate(names):
        if name not in MEASURES:
            raise ValueError(f"measures: there is none called {name!r}; there are {', '.join(MEASURES)}")
        if name in names[:index]:
            raise ValueError(f"measures must each be named once; got {name!r} twice")
    return names


def named_measures(text: str, given: Given = Given()) -> tuple[Measure, ...]:  # noqa: B008
    """The measures that :func:`measure_names` finds, made anew."""
    return tuple(MEASURES[name](given) for name in measure_names(text))
