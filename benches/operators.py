"""Operators dispatched by a step of the demo's network, measured and not, for programs of several runs.

``python benches/operators.py`` prints them. Views do not count (:class:`study.Operators`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import tyro
from study import Operators

from grokcurv.bench.measurements import together
from grokcurv.training import TrainConfig


def steps(config: TrainConfig, runs: int) -> Iterator[int]:
    """Operators of a step that is not measured, of one that is, and of one that is with the float64 check."""
    for measured, checked in ((False, False), (True, False), (True, True)):
        program = together(config, runs, measured, "vmap" if runs > 1 else "loop")
        program.observe(program.runs)  # with admission, and the first check
        program.update()
        for group in program.groups if checked else ():
            group.monitor.commutator.forget_checks()
        with Operators() as seen:
            program.update()
            for group in program.groups:
                if not group.looks_ahead:
                    group.prepare()
                    group.advance(group.launch())
        yield seen.count


def main(runs: Sequence[int] = (1, 4, 16, 64), p: int = 97, d_model: int = 128) -> None:
    """Print the counts.

    Args:
        runs: the sizes of the programs.
        p: the modulus; a small one, with few rows a batch, shows that everything works.
        d_model: the width; likewise.
    """
    torch.set_num_threads(1)
    rows = min(512, p * p // 4)
    config = TrainConfig(successive=True, pairs=1, pca_every=0, p=p, d_model=d_model, batch_size=rows)
    print(f"{'runs':>6} {'unmeasured':>12} {'measured':>12} {'checked':>12}")
    for count in runs:
        print(f"{count:6} " + " ".join(f"{n:12}" for n in steps(config, count)))


if __name__ == "__main__":
    tyro.cli(main)
