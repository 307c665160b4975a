"""The table of docs/measures.md: what each measure adds to a training step of the demo's network, at every step.

Steps of the plain loop of the module (forward and backward pass, clipping, AdamW) are timed in turns with those of
loops that have a measure besides; a round has one step of each, and what stands in the table is the median over the
rounds of the ratio within a round. Gradients are counted in flops of matrix products. Wants an idle machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
import tyro
from torch import nn

import grokcurv as gc
from grokcurv.bench.measurements import MODULE, SHORTER, Forward, batch, flops, loss, network
from grokcurv.bench.timing import interleaved, threads
from grokcurv.measures.base import Measure
from grokcurv.measures.training_gradient import TrainingGradient

Make = Callable[[torch.optim.Optimizer, object], Measure]

MEASURES: dict[str, tuple[Forward, Make]] = {
    "UpdateGram(10), attention": (MODULE, lambda *_: gc.UpdateGram(10)),
    'UpdateGram(10, "*")': (MODULE, lambda *_: gc.UpdateGram(10, "*")),
    "UpdateDecomposition()": (MODULE, lambda optimizer, _: gc.UpdateDecomposition(optimizer)),
    "OptimizerCommutator(), the module": (MODULE, lambda optimizer, _: gc.OptimizerCommutator(optimizer, 1.0)),
    "OptimizerCommutator(), the shorter way": (SHORTER, lambda optimizer, _: gc.OptimizerCommutator(optimizer, 1.0)),
    "HessianEdges(), one edge, the module": (MODULE, lambda _, fixed: _edge(fixed)),
    "HessianEdges(), one edge, the shorter way": (SHORTER, lambda _, fixed: _edge(fixed)),
    "WeightSpectra()": (MODULE, lambda *_: gc.WeightSpectra()),
}
"""By what stands in the table: the forward pass that is trained and measured with, and what is measured."""


def _edge(fixed: object) -> gc.HessianEdges:
    return gc.HessianEdges(fixed, ends="largest", probes=0, preconditioned=False)


class Loop:
    """A training loop, and a measure that sees each of its steps as a monitor would show them to it."""

    def __init__(self, forward: Forward = MODULE, make: Make | None = None) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.model, self.loss, self.step = network(0), loss(forward), 0
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=1.0)
        self.following, self.measure = batch(self.generator), None
        if make is not None:
            self.measure = make(self.optimizer, batch(self.generator))
            probe = gc.CommutatorProbe(self.model, self.loss)
            probe.gradients.admit(self.following)
            self.evaluator = probe.gradients.evaluator
            self.measure.follow_training(TrainingGradient(probe, "trusted"))
            self.measure.bind(probe)

    def run(self) -> None:
        now, self.following = self.following, batch(self.generator)
        self.optimizer.zero_grad()
        self.loss(self.model, now).backward()
        if self.measure is not None:
            with self.evaluator.held():  # as in a monitor
                if self.measure.pending:
                    self.measure.complete([now])
                self.measure.observe(self.step, [([now], [self.following])], True)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1


def main(
    seconds: Annotated[
        float, tyro.conf.arg(help="that all rounds take, about; little shows that everything works")
    ] = 60.0,
    only: Annotated[tuple[str, ...], tyro.conf.arg(help="words, of which a row's name has one; all rows if none")] = (),
) -> None:
    """Print the table."""
    wanted = {name: row for name, row in MEASURES.items() if not only or any(word in name for word in only)}
    with threads(1):
        loops = {"": Loop()} | {name: Loop(*row) for name, row in wanted.items()}
        for loop in loops.values():
            for _ in range(12):  # until windows are full, and what a first row searches for is found
                loop.run()
        plain, *others = interleaved([loop.run for loop in loops.values()], seconds)
        print(f"plain step: {1e3 * plain.median:.1f} ms, {len(plain.samples)} rounds")
        base = flops(loops[""].run)
        for (name, loop), times in zip(list(loops.items())[1:], others, strict=True):
            ratio = times.over(plain)
            low, high = ratio.spread
            more = (flops(loop.run) - flops(Loop(MEASURES[name][0]).run)) / base
            print(f"| `{name}` | {ratio.median:.2f} ({low:.2f} to {high:.2f}) | {more:.1f} |")


if __name__ == "__main__":
    tyro.cli(main)
