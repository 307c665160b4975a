"""Runs an hour of a sweep beside the same runs one after another in plain PyTorch.

``python benches/sweep_throughput.py examples/sweeps/grokking.toml DIR`` does the sweep into DIR with two workers of one
thread each, from the start, and then a part of its first run in plain PyTorch with two threads: the module's own
forward, evaluations, and the naive commutators of ``grokcurv.bench`` at the same steps, without PCA, controls or
floors. The plain time of the whole sweep is that of the part, scaled by the steps that its runs took. Wants an idle
machine.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
import tyro
from study import Batch, cross_entropy, take
from torch import nn

from grokcurv.bench.naive import commutator
from grokcurv.sweep import SweepConfig, run_sweep
from grokcurv.tasks import split
from grokcurv.training import TrainConfig, build_model

PART = 600
"""Steps of the part, with a measurement every 100 as in the sweep."""


def plain(config: TrainConfig, steps: int) -> float:
    """Seconds of training so many steps."""
    torch.manual_seed(config.seed)
    data = split(config.op, config.p, config.train_fraction, torch.Generator().manual_seed(config.seed))
    model = build_model(config)
    betas = (config.beta1, config.beta2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=betas, weight_decay=config.weight_decay)

    train, test = (data.train_pairs, data.train_answers), (data.test_pairs, data.test_answers)

    def draw() -> Batch:
        return take(train, torch.randint(len(data.train_pairs), (config.batch_size,)))

    began = time.perf_counter()
    for step in range(steps):
        if step % config.eval_every == 0:
            with torch.no_grad():
                for pairs, answers in (train, test):
                    (model(pairs).argmax(1) == answers).float().mean().item()
        if step % config.measure_every == 0:
            for _ in range(config.pairs):
                commutator(model, cross_entropy, (draw(), draw()), config.eta)
        optimizer.zero_grad()
        cross_entropy(model, draw()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
    return time.perf_counter() - began


def main(file: tyro.conf.Positional[Path], out: tyro.conf.Positional[Path], part: int = PART) -> None:
    """Time both and print the ratio.

    Args:
        file: of the sweep.
        out: its folder.
        part: steps in plain PyTorch; a few show that everything works.
    """
    config = SweepConfig.from_toml(file)
    began = time.perf_counter()
    sweep = run_sweep(config, out, workers=2)
    ours = time.perf_counter() - began
    metrics = sweep.table("metrics")
    steps = int(metrics.groupby("run")["step"].max().sum())
    print(sweep.runs[["op", "seed", "status"]].join(metrics.groupby("run").last()[["step", "test_acc", "seconds"]]))
    rate = len(sweep.runs) / ours * 3600
    print(f"sweep: {len(sweep.runs)} runs, {steps:,} steps, {ours / 60:.1f} min, {rate:.1f} runs/h")
    torch.set_num_threads(2)
    first = next(iter(sweep.plan.values()))
    plain(first, 20)
    step = plain(first, part) / part
    theirs = step * steps
    print(f"plain PyTorch, two threads: {1e3 * step:.1f} ms a step, {theirs / 60:.1f} min for all")
    print(f"ratio of runs an hour: {theirs / ours:.2f}")


if __name__ == "__main__":
    tyro.cli(main)
