"""How many digits do commutator defects have? Regenerates the tables of docs/numerics.md.

Trains modular addition and multiplication with and without weight decay by the paper's recipe, stops at checkpoints
from step 0 to long after grokking, and measures the same pairs of batches there with every method in both precisions.

    make numerics              # about an hour on one core; writes docs/measurements/numerics.csv
    python benches/numerics.py --tables    # the tables alone, from that file
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import tyro
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional

import grokcurv as gc
from grokcurv.flat import flatten
from grokcurv.modular.model import Transformer
from grokcurv.modular.tasks import Dataset, split

ETA = 1e-3
SEED = 42
BATCH = 512
PUBLISHED = {("add", 1.0): (0, 250, 2000, 3500), ("add", 0.0): (750, 1750, 2500)}
CHECKPOINTS = {
    1.0: (0, 250, 500, 1000, 2000, 3500, 5000),
    0.0: (0, 250, 750, 1750, 2500, 5000, 7000, 9000),
}
RECORD = Path(__file__).parents[1] / "docs/measurements/numerics.csv"

Batch = tuple[Tensor, Tensor]


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def cross_entropy64(model: nn.Module, batch: Batch) -> Tensor:
    return gc.cross_entropy64(model(batch[0]), batch[1])


LOSSES = {"float32 logits": cross_entropy, "float64 logits": cross_entropy64}


def checkpoints(op: str, weight_decay: float, last: int, kept: Path | None) -> Iterator[tuple[int, nn.Module, Dataset]]:
    """The paper's recipe, its random numbers too; yields at each checkpoint, or reads those in the folder ``kept``."""
    data = split(op, 97, 0.5, random.Random(SEED))
    torch.manual_seed(SEED)
    model = Transformer()
    files = {
        step: kept and kept / f"{op}_{weight_decay:g}_{step}.safetensors"
        for step in CHECKPOINTS[weight_decay]
        if step <= last
    }
    if all(file and file.exists() for file in files.values()):
        for step, file in files.items():
            load_model(model, file)
            yield step, model, data
        return
    numbers = np.random.RandomState(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=weight_decay)
    for step in range(max(files) + 1):
        if step in files:
            if kept:
                save_model(model, files[step])
            yield step, model, data
        optimizer.zero_grad()
        cross_entropy(model, draw(data, numbers)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def draw(data: Dataset, numbers: np.random.RandomState) -> Batch:
    index = torch.from_numpy(numbers.randint(0, len(data.train_pairs), BATCH))
    return data.train_pairs[index], data.train_answers[index]


def direct_delta(probe: gc.CommutatorProbe, pair: tuple[Batch, Batch]) -> Tensor:
    """``theta_AB - theta_BA`` in the model's own dtype, as the published code forms it."""

    def end_point(*batches: Batch) -> Tensor:
        theta = flatten(probe.gradients.model)
        for batch in batches:
            theta = theta - ETA * probe.gradients.gradient(theta, batch, torch.empty_like(theta))
        return theta

    return end_point(*pair) - end_point(*reversed(pair))


def assess(model: nn.Module, pairs: list[tuple[Batch, Batch]]) -> pd.DataFrame:
    """One row per pair and loss: every method in float32 beside float64."""
    exact_probe = gc.CommutatorProbe(copy.deepcopy(model).double(), cross_entropy64, eta=ETA, noise_floor=False)
    exact = {method: exact_probe.measure(pairs, method=method, keep_delta=True) for method in ("difference", "bracket")}
    return pd.concat([_assess(model, pairs, logits, exact) for logits in LOSSES])


def _assess(
    model: nn.Module, pairs: list[tuple[Batch, Batch]], logits: str, exact: dict[str, gc.CommutatorStats]
) -> pd.DataFrame:
    probe = gc.CommutatorProbe(model, LOSSES[logits], eta=ETA)
    direct = torch.stack([direct_delta(probe, pair) for pair in pairs]).double()
    columns: dict[str, Tensor] = {
        "grad_norm": exact["difference"].grad_norm_a,
        "reference_cosine": torch.cosine_similarity(direct, exact["difference"].delta),
    }
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
    remaining = iter(pairs)
    monitor = gc.CurvatureMonitor(model, LOSSES[logits], pairs=len(pairs), sampler=lambda: next(remaining), eta=ETA)
    monitor.step()
    row = monitor.records().iloc[0]
    frame = pd.DataFrame({name: column.numpy() for name, column in columns.items()})
    frame.insert(0, "pair", range(len(pairs)))
    frame.insert(0, "logits", logits)
    return frame.assign(monitor_method=row["method"], monitor_median=row["defect_median"])


def run(ops: tuple[str, ...], pairs: int, last: int, kept: Path | None) -> pd.DataFrame:
    frames = []
    for op in ops:
        for weight_decay in CHECKPOINTS:
            for step, model, data in checkpoints(op, weight_decay, last, kept):
                numbers = np.random.RandomState(SEED + step)  # at step 0: the pairs the paper measured
                drawn = [(draw(data, numbers), draw(data, numbers)) for _ in range(pairs)]
                frame = assess(model, drawn)
                for name, value in {"step": step, "weight_decay": weight_decay, "op": op}.items():
                    frame.insert(0, name, value)
                frames.append(frame)
                print(
                    f"{op} weight decay {weight_decay:g} step {step}: |g| {frame['grad_norm'].median():.2g}", flush=True
                )
    return pd.concat(frames, ignore_index=True)


def published_table(record: pd.DataFrame) -> str:
    """The checkpoints of the paper's arithmetic: medians over the first five pairs."""
    lines = [
        "| checkpoint | published float32 formula | difference, float32 | float64 | exact bracket, float64 "
        "| cos(published delta, true delta) |",
        "|---|---|---|---|---|---|",
    ]
    for (op, weight_decay), steps in PUBLISHED.items():
        for step in steps:
            here = _select(record, op=op, weight_decay=weight_decay, step=step, logits="float32 logits")
            median = here[here["pair"] < 5].median(numeric_only=True)
            names = ("reference", "difference", "difference_exact", "bracket_exact")
            cells = [f"{median[name]:.4g}" for name in names] + [f"{median['reference_cosine']:.3f}"]
            lines.append(f"| {op}, weight decay {weight_decay:g}, step {step} | {' | '.join(cells)} |")
    return "\n".join(lines)


def checkpoint_table(record: pd.DataFrame) -> str:
    """Float64 logits, every checkpoint."""
    lines = [
        "| checkpoint | \\|g\\| | D (float64) | reliable | difference error, worst reliable | bracket error, worst "
        "| errors below floor | floor / p95 error | monitor |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    record = _select(record, logits="float64 logits")
    for (op, weight_decay, step), here in record.groupby(["op", "weight_decay", "step"], sort=False):
        reliable = here[here["difference_reliable"]]
        worst = f"{_relative(reliable, 'difference').max():.2%}" if len(reliable) else "-"
        ratio = here["difference_floor"].max() / here["difference_error"].quantile(0.95)
        cells = [
            f"{here['grad_norm'].median():.2g}",
            f"{here['difference_exact'].median():.4g}",
            f"{len(reliable)}/{len(here)}",
            worst,
            f"{_relative(here, 'bracket').max():.4%}",
            f"{_below_floor(here, 'difference').sum()}/{len(here)}",
            f"{ratio:.1f}",
            here["monitor_method"].iloc[0],
        ]
        lines.append(f"| {op}, weight decay {weight_decay:g}, step {step} | {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(record: pd.DataFrame) -> str:
    """What is claimed of the three methods and the floor, counted over all pairs."""
    lines = ["| claim | " + " | ".join(LOSSES) + " |", "|---|---|---|"]
    rows: dict[str, list[str]] = {}
    for logits in LOSSES:
        here = _select(record, logits=logits)
        reliable = here[here["difference_reliable"]]
        error = _relative(reliable, "difference")
        points = ["op", "weight_decay", "step"]
        tight = reliable.groupby(points)["difference_floor"].max() / here.groupby(points)["difference_error"].quantile(
            0.95
        )
        exact = np.where(here["monitor_method"] == "bracket", here["bracket_exact"], here["difference_exact"])
        medians = here.assign(exact=exact).groupby(points).agg({"exact": "median", "monitor_median": "first"})
        monitor = (medians["monitor_median"] / medians["exact"] - 1).abs()
        cells = {
            "pairs, of them reliable": f"{len(here)}, {len(reliable)}",
            "`difference` within 1 % of float64, of these": f"{(error <= 0.01).mean():.2%} (worst {error.max():.2%})",
            "`bracket` from float64, worst": f"{_relative(here, 'bracket').max():.3%}",
            "errors below the floor, `difference`": f"{_below_floor(here, 'difference').mean():.1%}",
            "errors below the floor, `bracket`": f"{_below_floor(here, 'bracket').mean():.1%}",
            "floor over the 95th percentile of the errors, worst reliable checkpoint": f"{tight.max():.1f}",
            "monitor rows: worst error, rows NaN": f"{monitor.max():.3%}, {monitor.isna().sum()} of {len(monitor)}",
        }
        for name, cell in cells.items():
            rows.setdefault(name, []).append(cell)
    return "\n".join(lines + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()])


def _select(record: pd.DataFrame, **values: object) -> pd.DataFrame:
    for name, value in values.items():
        record = record[record[name] == value]
    return record


def _relative(record: pd.DataFrame, method: str) -> pd.Series:
    return (record[method] / record[f"{method}_exact"] - 1).abs()


def _below_floor(record: pd.DataFrame, method: str) -> pd.Series:
    return record[f"{method}_error"] <= record[f"{method}_floor"]


@dataclass
class Options:
    """How many digits do commutator defects have? Trains, measures, and prints the tables of docs/numerics.md."""

    ops: tuple[str, ...] = ("add", "mul")
    pairs: int = 12
    out: Path = RECORD
    checkpoints: Path | None = None
    """A folder to keep the networks in, and to take them from if they are there."""
    last: int = 10_000
    """No network is trained beyond this step; a few show that everything works."""
    tables: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the tables from the file at --out, without measuring."""


if __name__ == "__main__":
    options = tyro.cli(Options)
    torch.set_num_threads(1)
    if not options.tables:
        for folder in (options.out.parent, options.checkpoints):
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
        measured = run(options.ops, options.pairs, options.last, options.checkpoints)
        measured.to_csv(options.out, index=False, float_format="%.6g")
    record = pd.read_csv(options.out)
    print(published_table(record), checkpoint_table(record), summary(record), sep="\n\n")
