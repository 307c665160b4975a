"""Digests of the bits of what the package computes, and of torch's own beside them.

    python tests/digests.py > tests/data/digests.json

writes those that ``test_digests`` holds every later commit to. A commit that is meant to change numbers writes them
anew, and says which and why.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cases
import pandas as pd
import torch
from torch import Tensor, nn

import grokcurv as gc
from grokcurv.sweep import SweepConfig, open_sweep, run_sweep
from grokcurv.training import TrainConfig, train

SMALL: dict[str, Any] = {
    "p": 23,
    "d_model": 16,
    "d_ff": 32,
    "heads": 2,
    "batch_size": 32,
    "eval_every": 50,
    "threads": 1,
}


def digest(*values: Any) -> str:
    """Of numbers, strings, tensors, tables, and mappings and lists of them; times are left out of tables."""
    bits = hashlib.sha256()
    for value in values:
        bits.update(_bytes(value))
    return bits.hexdigest()


def _bytes(value: Any) -> bytes:
    if isinstance(value, Tensor):
        whole = value.detach().contiguous()
        return str((whole.dtype, tuple(whole.shape))).encode() + whole.flatten().view(torch.uint8).numpy().tobytes()
    if isinstance(value, pd.DataFrame):
        kept = [name for name in value.columns if "seconds" not in name]
        return b"".join(_bytes([name, *value[name].tolist()]) for name in kept)
    if isinstance(value, Mapping):
        return b"".join(_bytes(key) + _bytes(value[key]) for key in value)
    if isinstance(value, list | tuple):
        return b"[" + b",".join(map(_bytes, value)) + b"]"
    return repr(value).encode()


def torchs() -> str:
    """Of torch alone: where it differs, the processor has other bits for everything, and nothing can be said."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, activation="gelu", batch_first=True)
    found: list[Tensor] = []
    for model in (layer, layer.double()):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(20):
            optimizer.zero_grad()
            x = torch.randn(32, 3, 16, dtype=next(model.parameters()).dtype)
            nn.functional.cross_entropy(model(x)[:, 0], torch.randint(16, (32,))).backward()
            optimizer.step()
        many = torch.randn(300, 3, 16, dtype=next(model.parameters()).dtype)
        found += [model(many), *(p.clone() for p in model.parameters())]
    square = torch.randn(40, 40, dtype=torch.float64)
    return digest(
        found, torch.linalg.eigh(square + square.T)[0], torch.linalg.svd(square)[1], square.exp().log_softmax(0)
    )


def kernels() -> str:
    return cases.digest(0, 0)


def kernels_of_runs() -> str:
    return cases.digest(0, 1)


def pca() -> str:
    found: list[Any] = []
    rows = torch.randn(40, 500, generator=torch.Generator().manual_seed(1)).cumsum(0)
    for method in ("gram", "incremental", "sketch"):
        streaming = gc.StreamingPCA(4, method, segments=None if method == "sketch" else [(0, 200), (200, 300)])
        for row in rows:
            streaming.partial_fit(row)
        kept = [] if method == "sketch" else [streaming.components_, streaming.mean_]
        found += [streaming.explained_variance_, *kept]
    return digest(found)


def run() -> str:
    """300 steps of the trainer, measured at every tenth."""
    found: list[Any] = []
    for options in ({}, {"method": "bracket", "steps": 60}, {"rng": "paper", "alignment": True, "steps": 60}):
        config = TrainConfig(**SMALL | {"steps": 300, "measure_every": 10, "pca_every": 10, "pairs": 2} | options)
        result = train(config)
        found += [result.metrics, result.curvature, result.pca_history]
    return digest(found)


def monitored() -> str:
    """A loop of its own, with a module that rectifies and one that casts."""
    found: list[Any] = []
    for activation in (nn.Tanh, nn.ReLU):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(6, 12), activation(), nn.Linear(12, 4))

        def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return nn.functional.cross_entropy(model(batch[0]).float(), batch[1])

        batches = [(torch.randn(8, 6), torch.randint(4, (8,))) for _ in range(60)]
        monitor = gc.CurvatureMonitor(model, loss_fn, pca=gc.StreamingPCA(2), pca_every=5, gradient="checked")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for batch, following in monitor.lookahead(batches):
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            monitor.step(batch, following)
            optimizer.step()
        found += [monitor.records(), monitor.pca_records(), list(model.parameters())]
    return digest(found)


def sweep() -> str:
    """Four runs, and what their folder says of each."""
    config = SweepConfig(
        run=SMALL | {"steps": 100, "measure_every": 20, "pca_every": 20, "pairs": 2},
        grid={"seed": [0, 1], "weight_decay": [0.1, 1.0]},
    )
    with tempfile.TemporaryDirectory() as folder:
        run_sweep(config, Path(folder), workers=1)
        swept = open_sweep(folder)
        files = sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))
        files = [name for name in files if not name.endswith("progress.json")]  # no record
        runs = [swept.run(name) for name in swept.plan]
        return digest(files, [[run.metrics, run.curvature, run.pca_history] for run in runs])


DIGESTS: tuple[Callable[[], str], ...] = (torchs, kernels, kernels_of_runs, pca, run, monitored, sweep)


def digests() -> dict[str, str]:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {"torch": torch.__version__.partition("+")[0], **{of.__name__: of() for of in DIGESTS}}


if __name__ == "__main__":
    json.dump(digests(), sys.stdout, indent=2)
    print()
