"""Replays of runs of this trainer, from their snapshots."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

from grokcurv.measures import Given, named_measures
from grokcurv.measures.base import Measure
from grokcurv.pairs import Pair
from grokcurv.replays import replay
from grokcurv.runs import Run
from grokcurv.storage import RunError
from grokcurv.training.batches import Batches
from grokcurv.training.config import TrainConfig
from grokcurv.training.run import Training

if TYPE_CHECKING:
    import pandas as pd


def replay_run(
    run: Run,
    *,
    measures: str | Iterable[Measure] = (),
    out: str | PathLike[str] | None = None,
    on_error: Literal["skip", "raise"] = "skip",
    progress: bool = True,
    **options: Any,
) -> pd.DataFrame:
    """Measure a run at its snapshots (setting ``snapshot_every``), on the batches that it was measured on.

    Args:
        run: of a folder.
        measures: as for :func:`grokcurv.replay`, or names as in the setting.
        out, on_error, progress: as for :func:`grokcurv.replay`.
        options: of :class:`grokcurv.CurvatureMonitor`; ``pairs``, ``design``, ``method`` and ``eta`` are the run's if
            not given.

    Returns:
        As :func:`grokcurv.replay`.

    Raises:
        ValueError: a run without snapshots, or with draws that cannot be drawn again (``rng`` is not ``"philox"``).
        RunError: its settings are not those of this version; and what :func:`grokcurv.replay` raises.
    """
    if run.path is None or not run.snapshots:
        raise ValueError("run has no snapshots: train it with snapshot_every")
    try:
        config = TrainConfig(**run.config)
    except (TypeError, ValueError) as error:
        raise RunError(f"{run.path}: its settings are not those of this version: {error}") from error
    if config.rng != "philox":
        raise ValueError(
            f"run has rng={config.rng!r}, a stream that is not drawn again; only 'philox' draws by the step"
        )
    training = Training(config)
    task = training.task
    if isinstance(measures, str):
        given = Given(config.update_window, config.update_every, training.fixed_batch)
        measures = named_measures(measures, given)
    kept = {"pairs": config.pairs, "design": config.design, "method": config.method, "eta": config.eta}
    return replay(
        training.model,
        run.path / "snapshots",
        task.loss if config.successive else task.measured_loss,
        _Draws(training),
        measures=measures,
        out=out,
        on_error=on_error,
        progress=progress,
        **kept | options,
    )


class _Draws:
    """Draws the pairs that a run was measured on at a step."""

    def __init__(self, training: Training) -> None:
        self._batches, self._successive, self._drawn = Batches([training]), training.config.successive, 0

    def at(self, step: int) -> None:
        self._batches.steps.fill_(step)
        self._drawn = 0

    def __call__(self) -> Pair:
        if self._successive:
            return self._batches.training()[0], self._batches.training(following=True)[0]
        (one,), (other,) = self._batches.measuring(2, 2 * self._drawn)
        self._drawn += 1
        return one, other
