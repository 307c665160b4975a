"""What is measured along a training run: a file a measure, for any number of runs at once."""

from collections.abc import Callable, Iterable
from functools import partial

from grokcurv.measures.base import Measure
from grokcurv.measures.update_gram import UpdateGram

MEASURES: dict[str, Callable[[], Measure]] = {UpdateGram.name: partial(UpdateGram, window=10)}
"""Measures that a command line can name, as they are made there."""


def named_measures(names: Iterable[str]) -> tuple[Measure, ...]:
    """Measures by their names; ValueError for a name that is none, which says what there is."""
    made = []
    for name in names:
        if name not in MEASURES:
            raise ValueError(f"no measure {name!r}; there are {', '.join(MEASURES)}")
        made.append(MEASURES[name]())
    return tuple(made)
