"""How many digits do commutator defects have? Regenerates the tables of docs/measurements/numerics.md.

Trains modular addition and multiplication with and without weight decay by the paper's recipe, stops at checkpoints
from step 0 to long after grokking, and measures the same pairs of batches there with every method in both precisions.

    make numerics              # about an hour on one core; writes docs/measurements/numerics.csv
    python benches/numerics.py --tables    # the tables alone, from that file
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
import tyro
from study import DOCS, Batch, Flag, Pair, cross_entropy, shares, table, take
from torch import Tensor, nn

import grokcurv as gc
from grokcurv.bench import naive
from grokcurv.tasks.modular.operations import Dataset, split
from grokcurv.training import TrainConfig, load_model, train

ETA = 1e-3
SEED = 42
PUBLISHED = [
    *(("add", 1.0, step) for step in (0, 250, 2000, 3500)),
    *(("add", 0.0, step) for step in (750, 1750, 2500)),
]
CHECKPOINTS = {
    1.0: (0, 250, 500, 1000, 2000, 3500, 5000),
    0.0: (0, 250, 750, 1750, 2500, 5000, 7000, 9000),
}
RECIPE: dict[str, Any] = {"seed": SEED, "rng": "paper", "measure_every": 0, "pca_every": 0, "snapshot_every": 250}
RECORD = DOCS / "measurements/numerics.csv"
POINT = ["op", "weight_decay", "step"]
"""What names a checkpoint."""


@dataclass
class Options:
    """How many digits do commutator defects have? Trains, measures, prints those of docs/measurements/numerics.md."""

    ops: tuple[str, ...] = ("add", "mul")
    pairs: int = 12
    rows: int = 512
    """Of a batch; a few show that everything works."""
    out: Path = RECORD
    last: int = 10_000
    """No network is trained beyond this step; a few show that everything works."""
    tables: Flag = False
    """Print the tables from the file at --out, without measuring."""


def cross_entropy64(model: nn.Module, batch: Batch) -> Tensor:
    return gc.cross_entropy64(model(batch[0]), batch[1])


LOSSES = {"float32 logits": cross_entropy, "float64 logits": cross_entropy64}


def draw(data: Dataset, numbers: np.random.RandomState, rows: int) -> Batch:
    index = torch.from_numpy(numbers.randint(0, len(data.train_pairs), rows))
    return take((data.train_pairs, data.train_answers), index)


def assess(model: nn.Module, pairs: list[Pair], **point: object) -> pd.DataFrame:
    """One row per pair and loss: every method in float32 beside float64."""
    exact_probe = gc.CommutatorProbe(copy.deepcopy(model).double(), cross_entropy64, eta=ETA, noise_floor=False)
    exact = {method: exact_probe.measure(pairs, method=method, keep_delta=True) for method in ("difference", "bracket")}
    frames = []
    for logits, loss_fn in LOSSES.items():
        plain = copy.deepcopy(model)
        published = torch.stack([naive.commutator(plain, loss_fn, pair, ETA)[1] for pair in pairs]).double()
        columns: dict[str, Any] = {
            **point,
            "logits": logits,
            "pair": range(len(pairs)),
            "grad_norm": exact["difference"].grad_norm_a,
            "reference_cosine": torch.cosine_similarity(published, exact["difference"].delta),
        }
        probe = gc.CommutatorProbe(model, loss_fn, eta=ETA)
        for method, truth in exact.items():
            found = probe.measure(pairs, method=method, keep_delta=True)
            area = truth.eta.square() * truth.grad_norm_a * truth.grad_norm_b
            columns |= {
                method: found.defect,
                f"{method}_exact": truth.defect,
                f"{method}_error": (found.delta.double() - truth.delta).norm(dim=1) / area,
                f"{method}_floor": found.noise_floor,
                f"{method}_reliable": found.reliable,
            }
            if method == "difference":
                columns["reference"] = found.reference
        monitor = gc.CurvatureMonitor(model, loss_fn, pairs=len(pairs), sampler=iter(pairs).__next__, eta=ETA)
        monitor.step()
        row = monitor.records().iloc[0]
        columns |= {"monitor_method": row["method"], "monitor_median": row["defect_median"]}
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames)


def run(options: Options) -> pd.DataFrame:
    """Of the network at each checkpoint of the paper's recipe, which its random numbers are part of."""
    frames = []
    for op, weight_decay in product(options.ops, CHECKPOINTS):
        data = split(op, 97, 0.5, random.Random(SEED))
        steps = [step for step in CHECKPOINTS[weight_decay] if step <= options.last]
        config = TrainConfig(op=op, weight_decay=weight_decay, steps=steps[-1], steps_after_grok=steps[-1], **RECIPE)
        with TemporaryDirectory() as folder:
            trained = train(config, out=folder)
            for step in steps:
                numbers = np.random.RandomState(SEED + step)  # at step 0: the pairs the paper measured
                pairs = [tuple(draw(data, numbers, options.rows) for _ in range(2)) for _ in range(options.pairs)]
                model = load_model(trained, step)
                frames.append(assess(model, pairs, op=op, weight_decay=weight_decay, step=step))
                norm = frames[-1]["grad_norm"].median()
                print(f"{op} weight decay {weight_decay:g} step {step}: |g| {norm:.2g}", flush=True)
    return pd.concat(frames, ignore_index=True)


def published_table(record: pd.DataFrame) -> str:
    """The checkpoints of the paper's arithmetic: medians over the first five pairs."""
    first = record[(record["logits"] == "float32 logits") & (record["pair"] < 5)]
    medians = first.groupby(POINT).median(numeric_only=True)
    titles = ["published float32 formula", "difference, float32", "float64", "exact bracket, float64"]
    names = ["reference", "difference", "difference_exact", "bracket_exact"]
    rows = []
    for point, median in medians.reindex(PUBLISHED).iterrows():
        rows.append([named(*point), *(f"{median[name]:.4g}" for name in names), f"{median['reference_cosine']:.3f}"])
    return table(["checkpoint", *titles, "cos(published delta, true delta)"], rows)


def checkpoint_table(record: pd.DataFrame) -> str:
    """Float64 logits, every checkpoint."""
    rows = []
    for point, here in record[record["logits"] == "float64 logits"].groupby(POINT, sort=False):
        difference, bracket = held(here, "difference"), held(here, "bracket")
        found = shares(difference)
        row = {
            "checkpoint": named(*point),
            "\\|g\\|": f"{here['grad_norm'].median():.2g}",
            "D (float64)": f"{here['difference_exact'].median():.4g}",
            "reliable": f"{found['reliable']}/{len(here)}",
            "difference error, worst reliable": f"{found['worst']:.2%}" if found["reliable"] else "-",
            "bracket error, worst": f"{bracket['relative'].max():.4%}",
            "errors below floor": f"{(difference['error'] <= difference['noise_floor']).sum()}/{len(here)}",
            "floor / p95 error": f"{difference['noise_floor'].max() / difference['error'].quantile(0.95):.1f}",
            "monitor": here["monitor_method"].iloc[0],
        }
        rows.append(row)
    return table(rows[0], (row.values() for row in rows))


def summary(record: pd.DataFrame) -> str:
    """What is claimed of the three methods and the floor, counted over all pairs."""
    columns = [claims(rows) for _, rows in record.groupby("logits", sort=False)]
    return table(["claim", *LOSSES], ([claim, *(column[claim] for column in columns)] for claim in columns[0]))


def claims(rows: pd.DataFrame) -> dict[str, str]:
    difference, bracket = (rows[POINT].join(held(rows, method)) for method in ("difference", "bracket"))
    found = shares(difference)
    floors = difference[difference["reliable"]].groupby(POINT)["noise_floor"].max()
    tight = floors / difference.groupby(POINT)["error"].quantile(0.95)
    exact = rows["bracket_exact"].where(rows["monitor_method"] == "bracket", rows["difference_exact"])
    medians = rows.assign(exact=exact).groupby(POINT).agg({"exact": "median", "monitor_median": "first"})
    monitor = (medians["monitor_median"] / medians["exact"] - 1).abs()
    return {
        "pairs, of them reliable": f"{len(rows)}, {found['reliable']}",
        "`difference` within 1 % of float64, of these": f"{found['within 1 %']:.2%} (worst {found['worst']:.2%})",
        "`bracket` from float64, worst": f"{bracket['relative'].max():.3%}",
        "errors below the floor, `difference`": f"{found['below floor, of all']:.1%}",
        "errors below the floor, `bracket`": f"{shares(bracket)['below floor, of all']:.1%}",
        "floor over the 95th percentile of the errors, worst reliable checkpoint": f"{tight.max():.1f}",
        "monitor rows: worst error, rows NaN": f"{monitor.max():.3%}, {monitor.isna().sum()} of {len(monitor)}",
    }


def held(rows: pd.DataFrame, method: str) -> pd.DataFrame:
    """A method beside float64, with the columns that :func:`study.shares` reads."""
    names = {f"{method}_error": "error", f"{method}_floor": "noise_floor", f"{method}_reliable": "reliable"}
    relative = (rows[method] / rows[f"{method}_exact"] - 1).abs()
    return rows[[*names]].rename(columns=names).assign(relative=relative)


def named(op: str, weight_decay: float, step: int) -> str:
    return f"{op}, weight decay {weight_decay:g}, step {step}"


def main(options: Options) -> None:
    torch.set_num_threads(1)
    if not options.tables:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        run(options).to_csv(options.out, index=False, float_format="%.6g")
    record = pd.read_csv(options.out)
    print(published_table(record), checkpoint_table(record), summary(record), sep="\n\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
