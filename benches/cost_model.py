"""The cost model of docs/scaling.md: what a step launches, computes and moves, and the time that this predicts.

Every call that is not a view is one launch, matrix products are counted by torch's own FlopCounterMode, and bytes are
those of all inputs and outputs of every call, each once. The three constants of the machine (one thread) are measured
first; then each row's prediction stands beside its time. Wants an idle machine.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable
from typing import Annotated

import torch
import tyro
from study import Operators
from torch import nn

import grokcurv as gc
from grokcurv.bench.measurements import MODULE, ROWS, SHORTER, batch, flops, loss, network


def fastest(run: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest of some calls, after one to warm up."""
    run()
    return min(timeit.repeat(run, number=1, repeat=rounds))


def constants(rounds: int) -> tuple[float, float, float]:
    """Seconds per Gflop, per MB and per launch: products, copies and the smallest calls of the model's sizes."""
    x, y, small = torch.randn(2 * ROWS, 128), torch.randn(128, 256), torch.randn(4, requires_grad=True)
    flop = fastest(lambda: x @ y, 10 * rounds) / (2e-9 * x.numel() * y.shape[1])
    out = torch.empty_like(x)
    byte = fastest(lambda: torch.mul(x, 2.0, out=out), 10 * rounds) / (2e-6 * x.numel() * x.element_size())
    # A launch of a forward pass and the one of its backward pass.
    call = fastest(lambda: (small * 2.0).backward(torch.ones(4)), 100 * rounds) / 3
    return flop, byte, call


def main(rounds: Annotated[int, tyro.conf.arg(help="of each row; one shows that everything works")] = 30) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    flop, byte, call = constants(rounds)
    print(f"{1 / flop:.0f} Gflop/s, {1e-3 / byte:.0f} GB/s, {1e6 * call:.1f} us a launch")
    generator = torch.Generator().manual_seed(0)
    model, now, following = network(0), batch(generator), batch(generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)

    def step(monitor: gc.CurvatureMonitor | None = None) -> None:
        optimizer.zero_grad()
        loss(SHORTER)(model, now).backward()
        if monitor is not None:
            monitor.step(now, following)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()

    probe = gc.CommutatorProbe(model, loss(SHORTER), noise_floor=False)
    monitor = gc.CurvatureMonitor(model, loss(SHORTER), check_every=10**9)
    rows = {
        "gradient, the module": lambda: loss(MODULE)(model, now).backward(),
        "gradient, the shorter way": lambda: loss(SHORTER)(model, now).backward(),
        "training step, the shorter way": step,
        "... with successive steps measured": lambda: step(monitor),
        "one pair": lambda: probe.measure([(now, following)]),
        "nine pairs": lambda: probe.measure([(now, following)] * 9),
    }
    for name, run in rows.items():
        measured = fastest(run, rounds)
        with Operators() as seen:
            run()
        calls, gigaflops, megabytes = seen.launches, flops(run) / 1e9, seen.bytes / 1e6
        predicted = calls * call + gigaflops * flop + megabytes * byte
        times = f"{1e3 * predicted:.0f} ms | {1e3 * measured:.0f} ms | {measured / predicted:.2f}"
        print(f"| {name} | {calls:,} | {gigaflops:.2f} | {megabytes:,.0f} | {times} |")


if __name__ == "__main__":
    tyro.cli(main)
