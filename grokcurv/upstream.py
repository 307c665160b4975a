"""The logs of the paper's own code: its ``.pt`` files to a :class:`grokcurv.StreamingPCA`, and back.

``grok_sweep.py`` of github.com/skydancerosel/grokking-integrability (Xu, arXiv 2602.16746) saves, for each run, a dict
with ``torch.save``::

    attn_logs   list of {"step": int, "layers": [{"layer": i, "WQ": (d, d), "WK": ..., "WV": ..., "WO": ...}, ...]},
                steps rising from 0
    cfg         dict of plain values; its scripts read OP_NAME, WEIGHT_DECAY, SEED and N_LAYERS
    metrics     list of {"step": int, "train_acc": float, "test_acc": float}
    grokked     bool
    final_step, final_train_acc, final_test_acc

Files are read with ``torch.load(weights_only=True)``, which runs no code that a file brings along.

A file written as that code writes it, of a trajectory along a line, and read again:

>>> import pandas as pd, torch
>>> from grokcurv import Segment
>>> from grokcurv.upstream import Log, load
>>> names = ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")
>>> segments = [Segment(f"encoder.layers.0.self_attn.{name}", 9 * i, 9, (3, 3)) for i, name in enumerate(names)]
>>> rows = torch.randn(36) + torch.linspace(0, 1, 5)[:, None] * torch.randn(36)
>>> metrics = pd.DataFrame({"step": [400], "train_acc": [1.0], "test_acc": [0.3]})
>>> Log([0, 100, 200, 300, 400], rows, tuple(segments), {"SEED": 42}, metrics, False, 400).save("add_wd1.0_s42.pt")
>>> log = load("add_wd1.0_s42.pt")
>>> log.pca(n_components=2).explained_variance_ratio_[:, 0].round(decimals=6).tolist()  # of each matrix
[1.0, 1.0, 1.0, 1.0]
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grokcurv.flat import Segment
from grokcurv.pca import StreamingPCA
from grokcurv.storage import open_file, write_atomically

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Log", "load"]

KEYS = {"attn_logs": list, "cfg": dict, "metrics": list, "grokked": bool, "final_step": int}
METRICS = {"step": int, "train_acc": float, "test_acc": float}
MATRICES = {"WQ": "q_proj_weight", "WK": "k_proj_weight", "WV": "v_proj_weight", "WO": "out_proj.weight"}
"""What :func:`grokcurv.flat.attention_segments` calls each, after the name of its module."""


@dataclass(frozen=True, eq=False)
class Log:
    """A run as the paper's code logs it: the attention matrices at every few steps, and how well it did."""

    steps: list[int]
    """Of the rows: n of them, rising from 0."""
    rows: Tensor
    """(n, L): the attention matrices at each step, row-major, side by side in the order of the segments."""
    segments: tuple[Segment, ...]
    """W_Q, W_K, W_V, W_O of each layer in turn, named as by :func:`grokcurv.flat.attention_segments`."""
    config: dict[str, Any]
    """The file's ``cfg``: plain values."""
    metrics: pd.DataFrame
    """Columns ``step``, ``train_acc``, ``test_acc`` (fractions)."""
    grokked: bool
    """Whether the run met its criterion."""
    final_step: int
    """Updates in all."""

    @classmethod
    def from_pca(
        cls,
        pca: StreamingPCA,
        steps: Iterable[int],
        *,
        config: Mapping[str, Any],
        metrics: pd.DataFrame,
        grokked: bool,
    ) -> Log:
        """What a PCA of a run's attention matrices has kept, ready for :meth:`save`.

        Args:
            pca: with ``attention_segments(model)`` as its segments, and ``gram`` at work: the method that keeps rows.
            steps: at which its rows were taken.
            config: plain values, ``cfg`` in the file.
            metrics: with the columns ``step``, ``train_acc``, ``test_acc``; others are left out.
            grokked: whether the run met its criterion.

        Raises:
            ValueError: segments that are not the four matrices of each layer; steps that do not fit the rows or do not
                rise from 0; a column missing; ``pca`` has no rows, or its method keeps none.
        """
        rows, steps = pca.rows_, [int(step) for step in steps]
        _check_segments(pca.segments)
        if len(steps) != len(rows):
            raise ValueError(f"steps has {len(steps)} entries, but pca has seen {len(rows)} rows")
        _check_steps("steps", steps)
        _check_keys("metrics", dict(metrics), dict.fromkeys(METRICS, object))
        last = max(steps[-1], *metrics["step"].tolist()) if len(metrics) else steps[-1]
        segments = _side_by_side({s.name: s.shape for s in pca.segments or ()})
        return cls(steps, rows, segments, dict(config), metrics[list(METRICS)], grokked, int(last))

    def pca(self, n_components: int = 8, **options: Any) -> StreamingPCA:
        """A :class:`grokcurv.StreamingPCA` of the rows, one for each matrix; options are the class's own."""
        return StreamingPCA(n_components, segments=self.segments, **options).partial_fit(self.rows)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all.

        Raises:
            TypeError: something in ``config`` is not plain: the file could not be read without running its code.
        """
        _check_plain("config", self.config)
        _check_segments(self.segments)
        metrics = self.metrics[list(METRICS)].astype(METRICS).to_dict("records")
        final = metrics[-1] if metrics else dict.fromkeys(METRICS, 0)
        content = {
            "attn_logs": [
                {"step": step, "layers": self._layers(row)} for step, row in zip(self.steps, self.rows, strict=True)
            ],
            "cfg": self.config,
            "metrics": metrics,
            "grokked": bool(self.grokked),
            "final_step": self.final_step,
            "final_train_acc": final["train_acc"],
            "final_test_acc": final["test_acc"],
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_atomically(Path(path), buffer.getvalue())

    def _layers(self, row: Tensor) -> list[dict[str, Any]]:
        """The attention matrices of a row of weights, a dict a layer."""
        # Clones: what is saved as a view is loaded with the memory of all the others.
        matrices = (row[s.start : s.stop].reshape(s.shape).cpu().clone() for s in self.segments)
        layers = range(len(self.segments) // len(MATRICES))
        return [{"layer": layer, **{key: next(matrices) for key in MATRICES}} for layer in layers]


def load(path: str | os.PathLike[str]) -> Log:
    """Read one of the files of the paper's code.

    Raises:
        FileNotFoundError: there is none; another OSError where it cannot be opened.
        ValueError: it is no such file, or one that would have to run code to be read; the message says what is amiss.
    """
    import pandas as pd

    content = _read(path)
    try:
        _check_keys("the file", content, KEYS)
        _check_plain("cfg", content["cfg"])
        logs = content["attn_logs"]
        if not logs:
            raise ValueError("attn_logs must have at least one entry")
        named = [_named_matrices(i, log) for i, log in enumerate(logs)]
        kinds = [{name: (m.shape, m.dtype) for name, m in matrices.items()} for matrices in named]
        for i, others in enumerate(kinds):
            if others != kinds[0]:
                raise ValueError(f"attn_logs[{i}] has other layers, shapes or dtypes than attn_logs[0]")
        steps = [log["step"] for log in logs]
        _check_steps("attn_logs", steps)
        for i, metrics in enumerate(content["metrics"]):
            _check_keys(f"metrics[{i}]", metrics, METRICS)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is no log of the paper's code: {error}") from None
    rows = torch.stack([torch.cat([m.reshape(-1) for m in matrices.values()]) for matrices in named])
    frame = pd.DataFrame(content["metrics"], columns=list(METRICS))
    segments = _side_by_side({name: tuple(m.shape) for name, m in named[0].items()})
    return Log(steps, rows, segments, content["cfg"], frame, content["grokked"], content["final_step"])


def _read(path: str | os.PathLike[str]) -> Any:
    """What torch.save wrote, if it is tensors and plain values alone; reading it runs no code from it."""
    with open_file(Path(os.path.realpath(path))) as file:  # a link is the caller's own
        data = io.BytesIO(file.read())
    try:
        return torch.load(data, map_location="cpu", weights_only=True)
    except Exception as error:  # of any class, where the bytes make no sense
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted:
            raise ValueError(
                f"{path} holds more than tensors and plain values: it asks for {wanted[1]}, and reading it would run "
                "that. If you trust the file, load it with torch.load(weights_only=False), make what is in it plain, "
                "and save it again"
            ) from error
        raise ValueError(f"{path} is damaged, or was not written by torch.save: {error}") from error


def _named_matrices(i: int, log: Any) -> dict[str, Tensor]:
    """The matrices of one entry of attn_logs, by the names of their segments."""
    _check_keys(f"attn_logs[{i}]", log, {"step": int, "layers": list})
    matrices: dict[str, Tensor] = {}
    for number, layer in enumerate(log["layers"]):
        where = f"attn_logs[{i}]['layers'][{number}]"
        _check_keys(where, layer, {"layer": int, **dict.fromkeys(MATRICES, Tensor)})
        if layer["layer"] != number:
            raise ValueError(f"{where} is layer {layer['layer']!r}")
        for key, name in MATRICES.items():
            matrix = layer[key]
            if matrix.layout != torch.strided or not matrix.is_floating_point() or matrix.dim() != 2:
                raise ValueError(f"{where}[{key!r}] must be a matrix of floats, a dense tensor of two dimensions")
            matrices[f"encoder.layers.{number}.self_attn.{name}"] = matrix
    if not matrices:
        raise ValueError(f"attn_logs[{i}] has no layers")
    return matrices


def _side_by_side(shapes: Mapping[str, tuple[int, ...]]) -> tuple[Segment, ...]:
    starts = accumulate(map(math.prod, shapes.values()), initial=0)
    return tuple(Segment(name, next(starts), math.prod(shape), shape) for name, shape in shapes.items())


def _check_segments(segments: Sequence[Segment] | None) -> None:
    """Raise a ValueError unless the segments are the attention matrices of each layer."""
    names = [s.name for s in segments or ()]
    prefixes = [name.removesuffix(MATRICES["WQ"]) for name in names[:: len(MATRICES)]]
    if not names or names != [prefix + name for prefix in prefixes for name in MATRICES.values()]:
        raise ValueError(
            "pca must have the segments of grokcurv.flat.attention_segments, which are W_Q, W_K, W_V and W_O of "
            f"each layer in turn; got {', '.join(names) or 'none'}"
        )


def _check_steps(name: str, steps: Sequence[Any]) -> None:
    """Raise a ValueError unless steps are whole numbers that rise from 0."""
    if not all(isinstance(step, int) for step in steps):
        raise ValueError(f"{name}: steps must be whole numbers, got {steps}")
    if steps[0] != 0 or any(a >= b for a, b in pairwise(steps)):
        raise ValueError(f"{name}: steps must rise from 0, got {steps}")


def _check_keys(where: str, entry: Any, keys: Mapping[str, type]) -> None:
    """Raise a ValueError unless the entry is a dict with these keys, each of its type."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be a dict, got {type(entry).__name__}")
    missing = [key for key in keys if key not in entry]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}; it has {', '.join(map(str, entry)) or 'nothing'}")
    for key, kind in keys.items():
        value = entry[key]
        if not isinstance(value, (kind, int) if kind is float else kind) or (kind is not bool and value is True):
            raise ValueError(f"{where}[{key!r}] must be of type {kind.__name__}, got {type(value).__name__}")


def _check_plain(where: str, value: Any) -> None:
    """Raise a TypeError for anything in it but numbers, text, None, lists and dicts."""
    if isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check_plain(f"{where}[{key!r}]", item)
    elif type(value) not in (bool, int, float, str, type(None)):
        raise TypeError(f"{where} must be a plain value (number, text, None, list, dict), got {type(value).__name__}")
