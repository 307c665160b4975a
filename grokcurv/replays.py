"""Measurements of a training run that is over, from its checkpoints."""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from grokcurv.attachment import require_pairs
from grokcurv.checkpoints import (
    CheckpointError,
    find_checkpoints,
    load_weights,
    read_checkpoint,
    step_of,
    weights_of,
)
from grokcurv.evaluation import LossFn
from grokcurv.measures.base import Measure
from grokcurv.monitor import CurvatureMonitor
from grokcurv.pairs import Sampler
from grokcurv.progress import ReplayProgress
from grokcurv.storage import read_parquet, write_table

if TYPE_CHECKING:
    import pandas as pd

WRITE_SECONDS = 20.0
"""Seconds between two writings of the table."""

Checkpoint = str | PathLike[str] | Mapping[str, Any]
"""A file or folder, or a state dict."""


def replay(
    model: nn.Module,
    checkpoints: str | PathLike[str] | Iterable[Checkpoint | tuple[int, Checkpoint]],
    loss_fn: LossFn,
    sampler: Sampler | None,
    *,
    measures: Iterable[Measure] = (),
    out: str | PathLike[str] | None = None,
    on_error: Literal["skip", "raise"] = "skip",
    progress: bool = True,
    **options: Any,
) -> pd.DataFrame:
    """Measure a model at each of its checkpoints.

    A row is what a :class:`grokcurv.CurvatureMonitor` records at that step in training, bit for bit where it depends on
    the parameters and the batches alone, and that monitor checked each of its rows (``check_every=1``, the default
    here). The model is left as it was.

    Args:
        model: of which these are checkpoints; or a part of what was saved: see :func:`grokcurv.checkpoints.weights_of`.
        checkpoints: a folder of ``.safetensors``, ``.pt``, ``.pth``, ``.ckpt`` and ``.bin`` files or of Hugging Face's
            checkpoint folders; a run folder of this package with snapshots; or an iterable of such files, of state
            dicts, or of pairs ``(step, file or state dict)``. Files are taken in the order of the steps in their names;
            state dicts alone are steps 0, 1, 2, ...
        loss_fn: ``loss_fn(model, batch)`` returning a scalar.
        sampler: as for :func:`grokcurv.attach`. One that draws by the step, such as :func:`grokcurv.subsample`, draws
            what it drew in training.
        measures: what is recorded besides.
        out: a Parquet file that holds the rows, whole at any time. Steps in it are not measured again.
        on_error: ``"skip"``: a checkpoint that is damaged, or is not of this model, is named in a warning and in
            ``attrs["skipped"]`` of the table, and the rest goes on; ``"raise"``: it is an error.
        progress: show how far it is on standard error.
        options: all others of :class:`grokcurv.CurvatureMonitor`: ``pairs``, ``design``, ``method``, ``pca`` and so on.

    Returns:
        The columns of :meth:`grokcurv.CurvatureMonitor.records`, a row a checkpoint, in the order of steps.

    Raises:
        ValueError: no checkpoint, steps that repeat or do not ascend, a name without a step, an ``out`` of other
            settings; with ``on_error="raise"`` a :class:`grokcurv.checkpoints.CheckpointError`.
        RunError: ``out`` is damaged or cannot be written.
    """
    if on_error not in ("skip", "raise"):
        raise ValueError(f"on_error must be 'skip' or 'raise', got {on_error!r}")
    if "budget" in options:
        raise ValueError("budget is for training: a replay measures every checkpoint that it is given")
    measures = require_pairs(sampler, measures)
    options = {"check_every": 1} | options
    monitor = CurvatureMonitor(model, loss_fn, sampler=sampler, measures=measures, **options)
    settings = {name: value for name, value in options.items() if isinstance(value, bool | int | float | str)}
    table = _Table(None if out is None else Path(out), monitor.records, settings)
    numbered = _numbered(checkpoints)
    total = len(numbered) if isinstance(numbered, Sequence) else None
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    skipped: dict[str, str] = {}
    latest = -1
    with contextlib.ExitStack() as stack:
        stack.callback(load_weights, model, before)
        stack.callback(table.write)
        show = stack.enter_context(ReplayProgress("replay")) if progress else None
        for number, (step, name, source) in enumerate(numbered, 1):
            if step <= latest:
                raise ValueError(f"checkpoints: {name} is of step {step}, and comes after one of step {latest}")
            latest = step
            # The PCA and the measures may rest on what came before, which is then seen again, and not measured.
            if step not in table.steps or monitor.trajectory is not None or measures:
                try:
                    found = source if isinstance(source, Mapping) else read_checkpoint(Path(source))
                    load_weights(model, weights_of(model, found, name))
                except CheckpointError as error:
                    if on_error == "raise":
                        raise
                    warnings.warn(f"left out: {error}", stacklevel=2)
                    skipped[name] = str(error)
                    continue
                monitor.at(step)
                if step not in table.steps:
                    monitor.step()
                else:
                    monitor.pass_by()
            table.write(WRITE_SECONDS)
            if show is not None:
                show({"done": number, "total": total, "step": step, "skipped": len(skipped), "row": monitor.last})
    frame = table.frame()
    frame.attrs["skipped"] = skipped
    return frame


class _Table:
    """The rows of a replay: those that its file held, and those of the monitor."""

    def __init__(self, path: Path | None, records: Callable[[], pd.DataFrame], settings: Mapping[str, Any]) -> None:
        self.path, self.records, self.settings = path, records, json.dumps(settings, sort_keys=True)
        self.written = time.monotonic()
        self.before: pd.DataFrame | None = None
        found = None if path is None else read_parquet(path)
        if found is not None:
            said = (found.schema.metadata or {}).get(b"replay", b"{}").decode()
            columns = list(records().columns)
            if said != self.settings or found.column_names != columns:
                raise ValueError(
                    f"out: {path} has rows of other settings, {said} and columns {', '.join(found.column_names)}; "
                    f"wanted are {self.settings} and {', '.join(columns)}"
                )
            self.before = found.to_pandas(ignore_metadata=True)
        self.steps = frozenset[int]() if self.before is None else frozenset(self.before["step"].tolist())

    def frame(self) -> pd.DataFrame:
        """Rows of before and new ones, by step."""
        import pandas as pd

        new = self.records()
        parts = [part for part in (self.before, new) if part is not None and len(part)]
        every = pd.concat(parts) if len(parts) > 1 else (parts or [new])[0]
        return every.sort_values("step", ignore_index=True)

    def write(self, after: float = 0.0) -> None:
        """Write the file, if so many seconds have passed."""
        if self.path is not None and time.monotonic() - self.written >= after:
            write_table(self.path, self.frame(), {"replay": self.settings})
            self.written = time.monotonic()


def _numbered(checkpoints: Any) -> Sequence[tuple[int, str, Any]] | Iterator[tuple[int, str, Any]]:
    """Step, name and source of each checkpoint."""
    if isinstance(checkpoints, str | PathLike):
        return [(step, str(path), path) for step, path in find_checkpoints(Path(checkpoints))]
    if isinstance(checkpoints, Mapping):
        raise ValueError("checkpoints must be a folder or an iterable of checkpoints; got one dict: give a list of it")
    if not isinstance(checkpoints, Sequence):
        return (_placed(place, given) for place, given in enumerate(checkpoints))
    if not checkpoints:
        raise ValueError("checkpoints: there is none")
    return sorted((_placed(place, given) for place, given in enumerate(checkpoints)), key=lambda one: one[0])


def _placed(place: int, given: Any) -> tuple[int, str, Any]:
    """Step, name and source of a checkpoint that is given as a file, a state dict, or (step, either)."""
    step, source = given if isinstance(given, tuple) else (None, given)
    if isinstance(source, Mapping):
        step = place if step is None else step
        return step, f"the state dict of step {step}", source
    if not isinstance(source, str | PathLike):
        raise ValueError(f"checkpoints: number {place} is a {type(source).__name__}, neither a file nor a state dict")
    step = step_of(Path(source)) if step is None else step
    if step is None:
        raise ValueError(f"checkpoints: {source} has no step in its name; give (step, file)")
    return step, fspath(source), source
