"""replay: a run that is over, measured from its checkpoints."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

import grokcurv as gc
from grokcurv.checkpoints import CheckpointError, find_checkpoints, step_of
from grokcurv.cli import main
from grokcurv.runs import open_run
from grokcurv.storage import RunError
from grokcurv.training import TrainConfig, replay_run, train


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def new_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(40, 3, generator=generator), torch.randint(2, (40,), generator=generator)


def values(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.drop(columns="measure_seconds").reset_index(drop=True)


@pytest.fixture
def trained() -> tuple[list[dict[str, Tensor]], pd.DataFrame]:
    """State dicts of six steps, and what a monitor recorded of them in training."""
    model, states = new_model(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sampler = gc.subsample(data(), rows=8)
    with gc.attach(model, loss_fn, optimizer, sampler=sampler, check_every=1, pairs=2) as monitor:
        for _ in range(6):
            states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
            optimizer.zero_grad()
            loss_fn(model, data()).backward()
            optimizer.step()
    return states, monitor.records()


def replayed(checkpoints: Any, **options: Any) -> pd.DataFrame:
    options = {"pairs": 2, "progress": False, "model": new_model(3)} | options
    return gc.replay(options.pop("model"), checkpoints, loss_fn, gc.subsample(data(), rows=8), **options)


def write(folder: Path, states: list[dict[str, Tensor]], kind: str) -> None:
    """Checkpoints as other programs write them."""
    for step, state in enumerate(states):
        if kind == "safetensors":
            safetensors.torch.save_file(state, folder / f"model-{step:05}.safetensors")
        elif kind == "pt":
            torch.save({"model_state_dict": state, "step": step, "optimizer": {"lr": 0.1}}, folder / f"ckpt_{step}.pt")
        elif kind == "compiled":
            torch.save({f"module._orig_mod.{k}": v for k, v in state.items()}, folder / f"run2_step{step}_loss0.31.pth")
        elif kind == "lightning":
            wrapped = {"metric.total": torch.ones(1), **{f"model.{k}": v for k, v in state.items()}}
            torch.save({"state_dict": wrapped, "global_step": step}, folder / f"epoch=7-step={step}.ckpt")
        elif kind == "huggingface":
            inner = folder / f"checkpoint-{step}"
            inner.mkdir()
            safetensors.torch.save_file(state, inner / "model.safetensors")
            torch.save({"state": {}}, inner / "optimizer.pt")
    torch.save(states[-1], folder / "last.pt")  # no step in its name


@pytest.mark.parametrize("kind", ["safetensors", "pt", "compiled", "lightning", "huggingface"])
def test_rows_are_those_of_training(kind: str, trained: Any, tmp_path: Path) -> None:
    states, records = trained
    write(tmp_path, states, kind)
    model = new_model(3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = replayed(tmp_path, model=model)
    pd.testing.assert_frame_equal(values(found), values(records), check_exact=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_state_dicts_and_lists(trained: Any, tmp_path: Path) -> None:
    states, records = trained
    pd.testing.assert_frame_equal(values(replayed(iter(states))), values(records), check_exact=True)
    some = replayed([(4, states[4]), (1, states[1])])
    pd.testing.assert_frame_equal(values(some), values(records.iloc[[1, 4]]), check_exact=True)
    write(tmp_path, states, "pt")
    files = [tmp_path / "ckpt_5.pt", str(tmp_path / "ckpt_2.pt")]
    pd.testing.assert_frame_equal(values(replayed(files)), values(records.iloc[[2, 5]]), check_exact=True)


def test_a_stopped_replay_goes_on(trained: Any, tmp_path: Path) -> None:
    states, records = trained
    out = tmp_path / "rows.parquet"

    def until(stop: int) -> Iterator[dict[str, Tensor]]:
        yield from states[:stop]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replayed(until(3), out=out)
    assert len(pd.read_parquet(out)) == 3
    read = []
    found = replayed(((step, state) for step, state in enumerate(states) if not read.append(step)), out=out)
    pd.testing.assert_frame_equal(values(found), values(records), check_exact=True)
    pd.testing.assert_frame_equal(pd.read_parquet(out), found)
    again = replayed(states, out=out)
    pd.testing.assert_frame_equal(again, found, check_exact=True)  # the times too: nothing was measured
    with pytest.raises(ValueError, match="other settings"):
        replayed(states, out=out, pairs=1)
    out.write_bytes(out.read_bytes()[:-30])
    with pytest.raises(RunError, match="damaged"):
        replayed(states, out=out)


def test_a_measure_of_what_came_before_goes_on(trained: Any, tmp_path: Path) -> None:
    """Its rows are those of a replay that was never stopped: what is in the file is seen again, and not measured."""
    states, _ = trained
    whole = replayed(states, measures=[gc.UpdateGram(3, "*")])
    assert whole["g23"].notna().tolist() == [False] * 3 + [True] * 3
    out = tmp_path / "rows.parquet"
    replayed(states[:4], measures=[gc.UpdateGram(3, "*")], out=out)
    again = replayed(states, measures=[gc.UpdateGram(3, "*")], out=out)
    pd.testing.assert_frame_equal(values(again), values(whole), check_exact=True)


def test_of_a_hundred_three_are_damaged(trained: Any, tmp_path: Path) -> None:
    states, _ = trained
    for step in range(100):
        torch.save(states[step % 6], tmp_path / f"step{step}.pt")
    (tmp_path / "step7.pt").write_bytes((tmp_path / "step7.pt").read_bytes()[:400])
    torch.save(
        {k: v for k, v in states[0].items() if k != "0.bias"} | {"0.biases": torch.ones(6)}, tmp_path / "step31.pt"
    )
    torch.save(states[0] | {"2.weight": torch.ones(3, 6)}, tmp_path / "step64.pt")
    with pytest.warns(UserWarning, match="left out") as said:
        found = replayed(tmp_path, pairs=1, noise_floor=False)
    assert found["step"].tolist() == [step for step in range(100) if step not in (7, 31, 64)]
    assert len(said) == 3
    skipped = found.attrs["skipped"]
    assert [Path(name).name for name in skipped] == ["step7.pt", "step31.pt", "step64.pt"]
    first, second, third = skipped.values()
    assert "cannot be read" in first
    assert "missing: 0.bias" in second
    assert "not the model's: 0.biases" in second
    assert "2.weight (3, 6) for (2, 6)" in third
    with pytest.raises(CheckpointError, match=r"step7\.pt"):
        replayed(tmp_path, on_error="raise", noise_floor=False)


def test_nothing_is_unpickled_that_runs(tmp_path: Path) -> None:
    torch.save(new_model(), tmp_path / "step0.pt")  # a module, not its state
    with pytest.raises(CheckpointError, match=r"step0\.pt cannot be read"):
        replayed(tmp_path, on_error="raise")


def test_tied_weights_are_there_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embed(tokens))

    model = Tied()
    safetensors.torch.save_file({"embed.weight": torch.randn(5, 4)}, tmp_path / "step3.safetensors")
    batch = torch.arange(5), torch.arange(5)
    assert gc.replay(model, tmp_path, loss_fn, gc.halves(batch), progress=False)["step"].tolist() == [3]


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("checkpoint-500", 500),
        ("epoch=3-step=1200.ckpt", 1200),
        ("000000100.safetensors", 100),
        ("run2_000300.pt", 300),
        ("model_step400_loss0.52.pth", 400),
        ("iter_0007000", 7000),
        ("loss0.52.pt", None),
        ("best.pt", None),
        ("step-1000", 1000),
    ],
)
def test_the_step_in_a_name(name: str, step: int | None) -> None:
    assert step_of(Path(name)) == step


def test_bad_input(trained: Any, tmp_path: Path) -> None:
    states, _ = trained
    with pytest.raises(ValueError, match="is no folder"):
        replayed(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds none with a step"):
        replayed(tmp_path)
    with pytest.raises(ValueError, match="comes after one of step 2"):
        replayed([(2, states[0]), (2, states[1])])
    with pytest.raises(ValueError, match="of step 1, and comes after one of step 2"):
        replayed(iter([(2, states[0]), (1, states[1])]))
    with pytest.raises(ValueError, match="checkpoints: there is none"):
        replayed([])
    with pytest.raises(ValueError, match="number 0 is a int"):
        replayed([3])
    with pytest.raises(ValueError, match="give a list of it"):
        replayed(states[0])
    with pytest.raises(ValueError, match=r"last\.pt has no step"):
        replayed([tmp_path / "last.pt"])
    with pytest.raises(ValueError, match="on_error must be"):
        replayed(states, on_error="ignore")
    with pytest.raises(ValueError, match="budget is for training"):
        replayed(states, budget=0.1)
    with pytest.raises(ValueError, match=r"gc\.subsample"):
        gc.replay(new_model(), states, loss_fn, None)
    with pytest.raises(CheckpointError, match="none of the model's keys"):
        replayed([{"other": torch.ones(2)}], on_error="raise")
    (tmp_path / "step1.pt").write_bytes(b"")
    (tmp_path / "step01.safetensors").write_bytes(b"")
    assert [step for step, _ in find_checkpoints(tmp_path)] == [1, 1]


SMALL = TrainConfig(
    measure_every=10,
    snapshot_every=10,
    p=7,
    d_model=16,
    heads=2,
    d_ff=16,
    steps=40,
    batch_size=16,
    check_every=1,
    pairs=2,
)
EXECUTION = ["rho", "exec_fraction", "exec_random_ratio", "exec_matched_ratio"]


@pytest.mark.parametrize(
    "settings", [{"pca_every": 0}, {"successive": True, "pairs": 1}, {"method": "bracket", "design": "chain"}]
)
def test_a_run_of_the_trainer(settings: dict[str, Any], tmp_path: Path) -> None:
    from dataclasses import replace

    run = train(replace(SMALL, **settings), out=tmp_path / "run")
    run = open_run(tmp_path / "run")
    found = replay_run(run, progress=False)
    records = run.curvature[run.curvature["step"].isin(run.snapshots)]
    assert len(found) >= 4
    found = found[found["step"].isin(records["step"])].reset_index(drop=True)
    alike = [name for name in found.columns if name not in (*EXECUTION, "measure_seconds")]
    pd.testing.assert_frame_equal(found[alike], records[alike].reset_index(drop=True), check_exact=True)


def test_a_run_has_measures_by_their_names(tmp_path: Path) -> None:
    """Those of one batch are of that on which the run was measured."""
    from dataclasses import replace

    train(replace(SMALL, pca_every=0, measures="hessian_edges"), out=tmp_path / "run")
    run = open_run(tmp_path / "run")
    found = replay_run(run, measures="hessian_edges,weight_spectra", progress=False)
    both = found.merge(run.curvature, on="step")
    assert len(both) >= 4
    first = both.iloc[0]  # later ones are followed through other steps
    for end in ("lambda_max", "lambda_min"):
        assert abs(first[f"{end}_x"] - first[f"{end}_y"]) <= first[f"{end}_residual_x"] + first[f"{end}_residual_y"]
    assert found["weight_stable_rank"].gt(1).all()


def test_a_run_without_snapshots(tmp_path: Path) -> None:
    from dataclasses import replace

    train(replace(SMALL, steps=2, snapshot_every=0), out=tmp_path / "run")
    with pytest.raises(ValueError, match="snapshot_every"):
        replay_run(open_run(tmp_path / "run"))


MODULE = """
import torch
from torch import nn
import grokcurv as gc

def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])

def made():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
    x = torch.randn(40, 3)
    return model, loss_fn, gc.subsample((x, (x[:, 0] > 0).long()), rows=8)
"""


def test_the_command(trained: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    states, _ = trained
    write(tmp_path, states, "pt")
    (tmp_path / "ckpt_3.pt").write_bytes(b"damaged")
    (tmp_path / "mine.py").write_text(MODULE)
    command = [sys.executable, "-m", "grokcurv", "replay", str(tmp_path), "--model", "mine:made"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "replay.parquet: 5 rows, 1 checkpoints left out" in done.stdout
    assert "ckpt_3.pt cannot be read" in done.stdout
    assert pd.read_parquet(tmp_path / "replay.parquet")["step"].tolist() == [0, 1, 2, 4, 5]
    monkeypatch.chdir(tmp_path)
    again = ["replay", str(tmp_path), "--model", "mine:made", "--out", "wide.parquet", "--measures"]
    assert main([*again, "update_gram"]) == 2  # a perceptron has no attention
    assert "UpdateGram: model has no" in capsys.readouterr().err
    assert main([*again, "hessian_edges"]) == 2  # of which batch?
    assert "HessianEdges: batch is needed" in capsys.readouterr().err
    assert main([*again, "nothing"]) == 2
    assert "there is none called 'nothing'; there are update_gram" in capsys.readouterr().err
    assert main(["replay", str(tmp_path)]) == 2
    assert "--model MODULE:FUNCTION" in capsys.readouterr().err
    assert main(["replay", str(tmp_path), "--model", "mine:nobody"]) == 2
    assert "(model, loss_fn, sampler)" in capsys.readouterr().err
