"""A loop of one's own, left as it is: an LSTM that learns to add two marked numbers of a sequence."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
import tyro
from torch import Tensor, nn

import grokcurv as gc

plt.style.use(Path(__file__).with_name("gallery.mplstyle"))


class Adder(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, width, batch_first=True), nn.Linear(width, 1)

    def forward(self, sequence: Tensor) -> Tensor:
        states, _ = self.lstm(sequence)
        return self.head(states[:, -1])[:, 0]


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def draw(rows: int = 64, length: int = 12) -> tuple[Tensor, Tensor]:
    """Sequences of numbers, two of them marked by a one beside them; and the sum of those two."""
    numbers, marks = torch.rand(rows, length), torch.zeros(rows, length)
    marks.scatter_(1, torch.rand(rows, length).argsort(1)[:, :2], 1.0)
    return torch.stack([numbers, marks], 2), (numbers * marks).sum(1)


def main(steps: int = 1500, out: Path = Path("recurrent.png")) -> pd.DataFrame:
    """Train for so many steps; every 25th is measured, on five pairs of batches of its own."""
    torch.manual_seed(0)
    model = Adder()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    with gc.attach(model, loss_fn, optimizer, sampler=lambda: (draw(256), draw(256)), every=25, pairs=5) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = loss_fn(model, draw())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    rows = monitor.records().assign(loss=losses[::25])
    columns = ["step", "loss", "grad_norm", "defect_median", "noise_floor", "reliable"]
    print(rows[columns].iloc[:: max(1, len(rows) // 8)].to_string(index=False))

    figure, (top, bottom) = plt.subplots(2, sharex=True)
    top.plot(losses)
    top.set(yscale="log", ylabel="training loss\n(squared error)")
    bottom.plot(rows["step"], rows["defect_median"], label="defect: median of 5 pairs, and quartiles")
    bottom.fill_between(rows["step"], rows["defect_p25"], rows["defect_p75"], alpha=0.2, linewidth=0)
    bottom.plot(rows["step"], rows["noise_floor"], color="C4", linestyle=":", label="noise floor")
    bottom.set(yscale="log", xlabel="training step", ylabel="defect (1 / $\\theta$)")
    bottom.legend()
    figure.savefig(out)
    return rows


if __name__ == "__main__":
    tyro.cli(main)
