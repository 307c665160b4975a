"""A GPT-2 of transformers, random weights, measured in a plain loop: what it costs, in time and memory.

    python benches/gpt2.py whole              # 124 M parameters, 10 steps, measured at every one
    python benches/gpt2.py budget --share 0.1 # 10 M parameters, 300 steps, within a budget; killed half-way and resumed

Wants an idle machine, 12 GiB and some minutes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import grokcurv as gc

SMALL = {"n_embd": 256, "n_layer": 8, "n_head": 8, "vocab_size": 12_000}
"""Of some 10 million parameters; that of 124 is the config's own."""


def network(settings: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**settings, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0))


def loss_fn(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, labels=tokens).loss


def batches(model: nn.Module, length: int, seed: int = 0) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(model.config.vocab_size, (1, length), generator=generator)


class Trained:
    """A network, and how it is trained and measured."""

    def __init__(self, settings: dict[str, Any], length: int) -> None:
        self.model = network(settings)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.loader = batches(self.model, length)
        data = torch.cat([next(batches(self.model, length, seed)) for seed in range(64)])
        self.sampler = gc.subsample(data, rows=1)
        self.monitor: gc.CurvatureMonitor | None = None

    def attach(self, **options: Any) -> None:
        self.monitor = gc.attach(self.model, loss_fn, self.optimizer, sampler=self.sampler, **options)

    def step(self) -> None:
        self.optimizer.zero_grad()
        loss_fn(self.model, next(self.loader)).backward()
        self.optimizer.step()

    def weights(self) -> Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])


@contextmanager
def peak_memory() -> Iterator[Callable[[], float]]:
    """GiB of the process at most meanwhile, looked at a hundred times a second."""
    most, done = [0.0], threading.Event()

    def look() -> None:
        while not done.wait(0.01):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            most[0] = max(most[0], pages * 4096 / 2**30)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield lambda: most[0]
    finally:
        done.set()
        watcher.join()


def seconds(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def whole(settings: dict[str, Any], steps: int, length: int) -> None:
    """Every step measured, with a PCA of the attention matrices, beside the loop alone."""
    plain = Trained(settings, length)
    with peak_memory() as most:
        alone = [seconds(plain.step) for _ in range(steps)]
        print(f"plain: {sorted(alone)[steps // 2]:.3f} s a step, {most():.2f} GiB at most")
    weights = plain.weights()
    size = 4 * len(weights) / 2**30
    del plain
    measured = Trained(settings, length)
    segments = gc.attention_segments(measured.model)
    pca = gc.StreamingPCA(n_components=2, segments=segments)
    measured.attach(pca=pca, pca_every=1)
    with peak_memory() as most:
        for _ in range(steps):
            measured.step()
    assert measured.monitor is not None
    records, middle = measured.monitor.records(), sorted(alone)[steps // 2]
    took = [f"{x / middle:.1f}" for x in records["measure_seconds"]]
    print(f"measured: {most():.2f} GiB at most; a vector of P is {size:.2f}, a row of the PCA {_row(segments):.2f}")
    print(f"a measurement took, in plain steps: {', '.join(took)}")
    methods = " and ".join(records["method"].unique())
    print(f"rows by {methods}, PCA by {pca.method_}; rho at the last step {records['rho'].iloc[-1]:.3f}")
    print(f"training is bitwise the unmeasured one: {torch.equal(weights, measured.weights())}")


def _row(segments: tuple[gc.Segment, ...]) -> float:
    return 4 * sum(segment.length for segment in segments) / 2**30


def budget(settings: dict[str, Any], share: float, steps: int, length: int) -> None:
    """Steps within a budget, and from a state half-way again."""
    plain = Trained(settings, length)
    for _ in range(5):
        plain.step()
    alone = sorted(seconds(plain.step) for _ in range(20))[10]
    runs: list[list[int]] = []
    state: dict[str, Any] = {}
    for resumed in (False, True):
        trained = Trained(settings, length)
        trained.attach(budget=share)
        assert trained.monitor is not None
        for number in range(steps):
            if resumed and number == steps // 2:
                trained.monitor.load_state_dict(state)
            elif resumed and number < steps // 2:
                trained.monitor.detach()
            if resumed and number == steps // 2:
                trained.monitor.follow([trained.optimizer])
            trained.step()
            if not resumed and number == steps // 2 - 1:
                state = trained.monitor.state_dict()
        runs.append(trained.monitor.records()["step"].tolist())
        if not resumed:
            cost = trained.monitor.cost
            print(f"plain: {alone:.3f} s a step; admission took {cost['admission'] / alone:.0f} of them")
            print(f"training {cost['training']:.1f} s, measuring {cost['commutator']:.1f} s")
            print(f"{cost['commutator'] / cost['training']:.4f} of training, of {share} asked for")
            print(
                f"{len(runs[0])} rows, intervals {trained.monitor.records()['interval'].iloc[1:].astype(int).tolist()}"
            )
    print(f"resumed half-way it measured the same steps: {runs[0] == runs[1]}")


def main(
    what: Annotated[str, tyro.conf.Positional],
    share: float = 0.1,
    steps: int = 0,
    length: int = 128,
    tiny: bool = False,
) -> None:
    """Print what it costs to measure.

    Args:
        what: whole or budget.
        share: of the training time that a budget allows.
        steps: 10 or 300 if not given.
        length: of a sequence; batches are of one.
        tiny: a network of two small layers, to see that everything works.
    """
    torch.set_num_threads(1)
    smallest = {"n_embd": 24, "n_layer": 2, "n_head": 2, "vocab_size": 50}
    if what == "whole":
        whole(smallest if tiny else {}, steps or 10, length)
    else:
        budget(smallest if tiny else SMALL, share, steps or 300, length)


if __name__ == "__main__":
    tyro.cli(main)
