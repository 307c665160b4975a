"""Launches, flops and bytes of a training step and of what is measured in it: the counts of docs/scaling.md.

Counted on the CPU: every call that is not a view is one launch, matrix products are
counted by torch's own FlopCounterMode, and bytes are those of all inputs and outputs of every call, each once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import grokcurv as gc
from grokcurv.modular import Transformer, fast

ROWS = 512


class Launches(TorchDispatchMode):
    """Counts calls that write, and the bytes they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not view and "empty" not in func.__name__ and "detach" not in func.__name__:
            tensors = {id(x): x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)}
            self.calls += 1
            self.bytes += sum(x.numel() * x.element_size() for x in tensors.values())
        return result


def counted(run: Callable[[], object]) -> tuple[int, float, float]:
    """Launches, Gflop in matrix products and MB of one call, after one that was not counted."""
    run()
    with Launches() as launches:
        run()
    with FlopCounterMode(display=False) as flops:
        run()
    return launches.calls, flops.get_total_flops() / 1e9, launches.bytes / 1e6


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    model = Transformer()
    batch, other = ((torch.randint(97, (ROWS, 2)), torch.randint(97, (ROWS,))) for _ in range(2))

    def loss(forward: Any) -> Any:
        return lambda model, batch: functional.cross_entropy(forward(model, batch[0]), batch[1])

    def training(forward: Any, monitor: gc.CurvatureMonitor | None = None) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)

        def step() -> None:
            optimizer.zero_grad()
            loss(forward)(model, batch).backward()
            if monitor is not None:
                monitor.step(batch, other)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
            optimizer.step()

        return step

    probe = gc.CommutatorProbe(model, loss(fast.logits), noise_floor=False)
    rows = {
        "gradient, the module": lambda: loss(Transformer.__call__)(model, batch).backward(),
        "gradient, the shorter way": lambda: loss(fast.logits)(model, batch).backward(),
        "training step, the shorter way": training(fast.logits),
        "... with successive steps measured": training(
            fast.logits, gc.CurvatureMonitor(model, loss(fast.logits), check_every=10**9)
        ),
        "one pair": lambda: probe.measure([(batch, other)]),
        "nine pairs": lambda: probe.measure([(batch, other)] * 9),
    }
    for name, run in rows.items():
        calls, flops, megabytes = counted(run)
        print(f"| {name} | {calls:,} | {flops:.2f} | {megabytes:,.0f} |")


if __name__ == "__main__":
    main()
