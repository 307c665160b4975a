"""How well do the methods of StreamingPCA do on a real trajectory? Regenerates the table and the figure of docs/pca.md.

Trains the demo's network as `make demo` does, but measures nothing and keeps a row of its attention matrices every ten
steps. Then every method sees these rows, and is compared with an SVD in float64 of each matrix.

    make trajectory    # ten minutes; writes docs/measurements/pca.csv and docs/images/pca.png
"""

from __future__ import annotations

import math
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import pandas as pd
import torch
import tyro
from study import DOCS
from torch import Tensor
from torch.utils._pytree import tree_leaves

import grokcurv as gc
from grokcurv.bench.pca import principal_angle
from grokcurv.flat import attention_segments, flatten
from grokcurv.training import TrainConfig, load_model, train

ROW_EVERY = 10
COMPONENTS = 2

SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("gram", {}),
    ("gram, bfloat16", {"store_dtype": torch.bfloat16}),
    *(("incremental", {"oversampling": extra}) for extra in (0, 2, 4, 8, 16, 32)),
    *(("incremental, shrinkage", {"oversampling": extra, "shrinkage": True}) for extra in (0, 2, 4, 8, 16, 32)),
    *(("sketch", {"sketch_size": 1 << power}) for power in (8, 10, 12)),
]


def trajectory(steps: int) -> tuple[Tensor, list[int]]:
    """Rows (n, L) of the demo's attention matrices, one behind the other, and the length of each."""
    settings: dict[str, Any] = {"measure_every": 0, "snapshot_every": ROW_EVERY, "steps": steps}
    rows = []
    with TemporaryDirectory() as folder:
        run = train(TrainConfig(op="add", weight_decay=1.0, seed=42, **settings), out=folder)
        for step in run.snapshots:
            model = load_model(run, step)
            vector, segments = flatten(model), attention_segments(model)
            rows.append(torch.cat([vector[s.start : s.stop] for s in segments]))
    return torch.stack(rows), [segment.length for segment in segments]


def truth(rows: Tensor, lengths: list[int]) -> tuple[Tensor, list[Tensor]]:
    """PC1 share and top-2 basis of each matrix, by an SVD in float64."""
    matrices = [matrix - matrix.mean(0) for matrix in rows.double().split(lengths, dim=1)]
    found = [torch.linalg.svd(matrix, full_matrices=False) for matrix in matrices]
    shares = [values[0].square() / values.square().sum() for _, values, _ in found]
    return torch.stack(shares), [basis[:COMPONENTS] for _, _, basis in found]


def kept_bytes(pca: gc.StreamingPCA) -> int:
    """What the PCA keeps: the tensors of its state, and room in its buffer."""
    state = pca.state_dict()
    size = sum(leaf.nbytes for leaf in tree_leaves(state) if isinstance(leaf, Tensor))
    if pca.method_ != "gram":  # the buffer's free places
        size += (pca.block - state["state"]["pending"]) * state["state"]["rows"][0].nbytes
    return size


def compare(rows: Tensor, lengths: list[int]) -> pd.DataFrame:
    shares, bases = truth(rows, lengths)
    segments = list(zip(accumulate(lengths, initial=0), lengths, strict=False))
    results: list[dict[str, Any]] = []
    for name, options in SETTINGS:
        pca = gc.StreamingPCA(COMPONENTS, name.partition(",")[0], segments, **options)
        for row in rows:
            pca.partial_fit(row)
        components = [] if pca.method_ == "sketch" else pca.components_
        result = {
            "method": name,
            "option": ", ".join(f"{key}={value}" for key, value in options.items()),
            "vectors": kept_bytes(pca) / rows[0].nbytes,
            "pc1_error_points": 100 * (pca.explained_variance_ratio_[:, 0] - shares).abs().max().item(),
            "bound_points": 100 * (pca.error_bound_ / pca.total_variance_).max().item(),
            "top2_angle_degrees": max(map(principal_angle, components, bases), default=math.nan),
        }
        print(pd.DataFrame([result]).to_string(index=False, header=not results), flush=True)
        results.append(result)
    return pd.DataFrame(results)


def draw(table: pd.DataFrame, file: Path) -> None:
    from matplotlib.figure import Figure

    from grokcurv.report.figures import LIGHT, saved, style

    with style(LIGHT):
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        errors, angles = figure.subplots(1, 2, sharex=True)
        colours = LIGHT.ink, LIGHT.muted, LIGHT.blue, LIGHT.green, LIGHT.orange
        for color, (name, part) in zip(colours, table.groupby("method", sort=False), strict=True):
            look = {"color": color, "marker": "o", "markersize": 4, "label": name}
            errors.plot(part["vectors"], part["pc1_error_points"].clip(lower=1e-7), **look)
            if name != "gram":
                errors.plot(part["vectors"], part["bound_points"], color=color, linestyle=":", marker=".", markersize=4)
            angles.plot(part["vectors"], part["top2_angle_degrees"].clip(lower=1e-7), **look)
        errors.set(title="PC1 %: error, and its bound (dotted)", ylabel="percentage points")
        angles.set(title="top-2 subspace: angle", ylabel="degrees")
        for axes in (errors, angles):
            axes.set(xscale="log", yscale="log", xlabel="memory, in vectors of the parameters")
        angles.legend(fontsize="small")
        file.write_bytes(saved(figure, LIGHT, "png"))


def main(
    docs: Annotated[Path, tyro.conf.arg(help="where measurements/pca.csv and images/pca.png go")] = DOCS,
    steps: Annotated[int, tyro.conf.arg(help="of training at most; a few show that everything works")] = 20_000,
) -> None:
    table = compare(*trajectory(steps))
    table.to_csv(docs / "measurements/pca.csv", index=False, float_format="%.4g")
    draw(table, docs / "images/pca.png")
    default = table[table["option"] == "oversampling=8"].set_index("method").loc["incremental"]
    assert default["pc1_error_points"] < 0.1
    assert default["top2_angle_degrees"] < 1


if __name__ == "__main__":
    tyro.cli(main)
