"""The paper's table of PC1 % per attention matrix, from our own runs with the paper's draws.

Nothing is measured on the way, as in the paper's runs for this table. ``pytest -m published`` trains all six until they
grok, about three minutes each on one thread; ``-s`` shows the figures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import grokcurv as gc
from grokcurv.flat import attention_segments, flatten
from grokcurv.training import TrainConfig, load_model, train

PUBLISHED = pd.read_csv(Path(__file__).parent / "data" / "published_pc1.csv", comment="#")
MATRICES = ["pc1_WQ", "pc1_WK", "pc1_WV", "pc1_WO"]
ROW_EVERY = 100


@pytest.mark.published
@pytest.mark.parametrize("seed", [42, 137, 2024])
@pytest.mark.parametrize("op", ["add", "mul"])
def test_pc1_of_every_attention_matrix(op: str, seed: int, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"measure_every": 0, "snapshot_every": ROW_EVERY, "steps_after_grok": 0}
    run = train(TrainConfig(op=op, seed=seed, rng="paper", threads=1, **settings), out=tmp_path)
    pca = gc.StreamingPCA(n_components=1, method="gram", segments=attention_segments(load_model(run, 0)))
    for step in run.snapshots:
        pca.partial_fit(flatten(load_model(run, step)))
    last = int(run.metrics["step"].iloc[-1])
    assert pca.n_samples_seen_ == last // ROW_EVERY + 1

    both = PUBLISHED[(PUBLISHED["op"] == op) & (PUBLISHED["seed"] == seed)].melt(
        ["layer", "final_step"], MATRICES, "matrix", "published"
    )
    both = both.sort_values("layer", kind="stable", ignore_index=True)
    assert len(both) == len(pca.segments) == 8
    both["segment"] = [segment.name for segment in pca.segments]
    both["ours"] = 100 * pca.explained_variance_ratio_[:, 0].numpy()
    both["difference"] = both["ours"] - both["published"]
    print(f"\n{op}, seed {seed}: our last step {last}, published {both['final_step'][0]}")
    print(both[["layer", "matrix", "segment", "published", "ours", "difference"]].to_string(float_format="%.3f"))
    assert both["difference"].abs().max() < 3
