from __future__ import annotations

import dataclasses
import os
import random
import signal
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
import torch

from grokcurv import CurvatureMonitor, StreamingPCA
from grokcurv.monitor import ALIGNMENT_FIELDS
from grokcurv.runs import RunError, open_run, unpack
from grokcurv.tasks import split
from grokcurv.training import PRESETS, TrainConfig, TrainingError, build_model, config, load_model, train

TINY = TrainConfig(
    p=7,
    layers=1,
    d_model=8,
    heads=2,
    d_ff=12,
    batch_size=16,
    steps=30,
    eval_every=10,
    pairs=2,
    measure_every=10,
    pca_every=5,
    checkpoint_every=10,
    threads=1,
)
UNMEASURED = dataclasses.replace(TINY, measure_every=0)
TIMINGS = ["seconds", "measure_seconds"]


def changed(base: TrainConfig = TINY, **values: Any) -> TrainConfig:
    return dataclasses.replace(base, **values)


def untimed(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.drop(columns=TIMINGS, errors="ignore")


def weights(path: Path) -> dict[str, torch.Tensor]:
    return open_run(path).checkpoint()["model"]


def global_state() -> tuple[object, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()), torch.get_num_threads()


class Recorder:
    """Stands where a monitor stands, and keeps what it is shown."""

    def __init__(self, model: torch.nn.Module, sampler: Any) -> None:
        self.model, self.sampler, self.seen, self.last = model, sampler, [], None
        self.probe = type("Probe", (), {"bases": (), "gradients": None})()

    def stepping(self, *batches: Any) -> Iterator[None]:
        yield from ()
        self.step(*batches)

    def step(self, batch: Any = None, next_batch: Any = None) -> None:
        gradient = None if batch is None else torch.cat([p.grad.flatten() for p in self.model.parameters()])
        self.seen.append((batch, next_batch, gradient))

    def latest(self, run: int = 0) -> None:
        return self.last

    def records(self, run: int = 0) -> pd.DataFrame:
        return pd.DataFrame()

    pca_records = records

    def state_dict(self, run: int = 0) -> dict[str, Any]:
        return {"seen": len(self.seen)}

    def load_state_dict(self, state: dict[str, Any], run: int = 0) -> None:
        self.seen = [None] * state["seen"]


@pytest.mark.parametrize(("clip", "rel"), [(0.0, 1e-12), (0.5, 1e-8)])
def test_metrics_are_those_of_the_plain_loop(clip: float, rel: float) -> None:
    """The same draws, fed to a training loop written out in full; torch sums the length that is clipped otherwise."""
    run = train(changed(rng="paper", measure_every=0, clip=clip, seed=9, threads=0))  # as many as the loop below
    data = split("add", 7, 0.5, random.Random(9))
    model = build_model(changed(seed=9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=1.0)
    stream = np.random.RandomState(9)
    for step in range(31):
        if step % 10 == 0:
            row = run.metrics[run.metrics["step"] == step].iloc[0]
            with torch.no_grad():
                for name, x, y in (
                    ("train", data.train_pairs, data.train_answers),
                    ("test", data.test_pairs, data.test_answers),
                ):
                    logits = model(x)
                    loss = torch.nn.functional.cross_entropy(logits.double(), y).item()
                    assert row[f"{name}_loss"] == pytest.approx(loss, rel=1e-6)
                    assert row[f"{name}_acc"] == (logits.argmax(1) == y).double().mean().item()
                norm = torch.cat([p.flatten() for p in model.parameters()]).double().norm().item()
                # A length that is rounded otherwise moves clipped gradients by some 1e-7 of themselves, and AdamW's
                # steps of 1e-3 by no more: in 30 steps that is less than 30 * 1e-3 * sqrt(P) * 1e-7 of a length of 10.
                assert row["weight_norm"] == pytest.approx(norm, rel=rel)
        index = torch.from_numpy(stream.randint(0, 24, 16))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(data.train_pairs[index]), data.train_answers[index]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip or torch.inf)
        optimizer.step()
    assert run.metrics["step"].tolist() == [0, 10, 20, 30]
    assert run.metrics["seconds"].is_monotonic_increasing


@pytest.mark.parametrize("rng", ["philox", "paper"])
def test_same_seed_same_run_and_nothing_global_is_touched(rng: str) -> None:
    before = global_state()
    first, second = train(changed(rng=rng)), train(changed(rng=rng))
    assert global_state() == before
    pd.testing.assert_frame_equal(untimed(first.metrics), untimed(second.metrics), check_exact=True)
    pd.testing.assert_frame_equal(untimed(first.curvature), untimed(second.curvature), check_exact=True)
    pd.testing.assert_frame_equal(first.pca_history, second.pca_history, check_exact=True)
    other = train(changed(rng=rng, seed=43))
    assert not np.array_equal(first.metrics["train_loss"], other.metrics["train_loss"])


def test_measuring_changes_nothing(tmp_path: Path) -> None:
    train(TINY, out=tmp_path / "measured")
    train(UNMEASURED, out=tmp_path / "unmeasured")
    measured, unmeasured = open_run(tmp_path / "measured"), open_run(tmp_path / "unmeasured")
    pd.testing.assert_frame_equal(untimed(measured.metrics), untimed(unmeasured.metrics), check_exact=True)
    assert unmeasured.curvature.empty
    a, b = measured.checkpoint(), unmeasured.checkpoint()
    for name, value in a["model"].items():
        assert value.equal(b["model"][name]), name
    assert all(value.equal(b["optimizer"][name]) for name, value in a["optimizer"].items())


def test_with_the_papers_draws_measuring_takes_from_the_training_stream() -> None:
    measured = train(changed(rng="paper"))
    unmeasured = train(changed(UNMEASURED, rng="paper"))
    assert measured.metrics["train_loss"][0] == unmeasured.metrics["train_loss"][0]
    assert measured.metrics["train_loss"][1] != unmeasured.metrics["train_loss"][1]


def test_the_run_folder(tmp_path: Path) -> None:
    run = train(TINY, out=tmp_path)
    assert run.status == "finished"
    assert run.config == dataclasses.asdict(TINY)
    assert run.environment["threads"] == 1
    assert run.environment["device"] == "cpu"
    assert run.metrics["step"].tolist() == run.curvature["step"].tolist() == [0, 10, 20, 30]
    assert run.curvature["defect_median"].gt(0).all()
    assert run.curvature["reference_median"].gt(0).all()
    assert sorted(run.pca_history["step"].unique()) == list(range(0, 31, 5))
    assert run.pca_history["matrix"].nunique() == 4
    assert run.checkpoint()["step"] == 30
    basis = unpack((tmp_path / "basis.safetensors").read_bytes())
    assert basis["size"] == sum(p.numel() for p in build_model(TINY).parameters())
    assert basis["rows"].shape == (8, 3)
    for name, value in load_model(run).state_dict().items():
        assert value.equal(weights(tmp_path)[name])


def test_the_mlp_follows_all_its_parameters() -> None:
    run = train(changed(architecture="mlp", batch_size=0))
    assert run.pca_history["matrix"].unique().tolist() == ["all"]
    assert run.curvature["attention_fraction"].isna().all()


def test_pca_and_monitor_can_be_off() -> None:
    assert train(changed(pca_every=0)).pca_history.empty
    assert train(UNMEASURED).curvature.empty


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_train_one_measured_step(preset: str) -> None:
    small = changed(PRESETS[preset], steps=1, batch_size=min(PRESETS[preset].batch_size, 32), pairs=1, threads=1)
    run = train(changed(small, p=13))
    assert run.metrics["step"].tolist() == [0, 1]
    assert np.isfinite(run.metrics.to_numpy(dtype=float)).all()
    assert run.curvature["defect_median"].notna().all()


def test_preset_names() -> None:
    assert tuple(PRESETS) == get_args(config.Preset)
    assert PRESETS["paper"] == TrainConfig()


def test_warmup() -> None:
    run = train(changed(UNMEASURED, warmup=20, eval_every=5, steps=25, lr=0.02))
    assert run.metrics["learning_rate"].tolist() == pytest.approx([0.001, 0.006, 0.011, 0.016, 0.02, 0.02])


def test_it_ends_after_grokking() -> None:
    run = train(changed(UNMEASURED, grok_threshold=0.0, grok_patience=2, steps_after_grok=7))
    assert run.metrics["step"].tolist() == [0, 10, 17]
    seen: list[dict[str, Any]] = []
    train(changed(UNMEASURED, grok_threshold=0.0, steps_after_grok=100), on_progress=seen.append)
    assert [latest["settled_step"] for latest in seen] == [None, 20, 20]
    assert seen[-1]["step"] == seen[-1]["steps"] == 30


def test_progress() -> None:
    seen: list[dict[str, Any]] = []
    run = train(changed(steps=25, eval_every=20), on_progress=seen.append)
    assert [latest["step"] for latest in seen] == [10, 20, 25]
    assert seen[0]["train_loss"] == run.metrics["train_loss"][0]
    assert seen[1]["test_acc"] == run.metrics["test_acc"][1]
    assert seen[1]["defect"] == run.curvature["defect_median"][2]
    assert all(latest["steps_per_second"] > 0 for latest in seen)


def test_ones_own_monitor_with_a_sampler_is_called_before_every_update() -> None:
    made: list[Recorder] = []

    def factory(model: torch.nn.Module, sampler: Any) -> Any:
        made.append(Recorder(model, sampler))
        return made[0]

    train(changed(UNMEASURED, steps=12), factory)
    assert len(made[0].seen) == 13
    (pairs_a, answers_a), (pairs_b, _) = made[0].sampler()
    assert pairs_a.shape == (16, 2)
    assert answers_a.equal(pairs_a.sum(1) % 7)
    assert not pairs_a.equal(pairs_b)


@pytest.mark.parametrize("rng", ["philox", "paper"])
def test_ones_own_monitor_without_a_sampler_sees_batch_next_batch_and_gradient(rng: str) -> None:
    made: list[Recorder] = []

    def factory(model: torch.nn.Module, sampler: Any) -> Any:
        made.append(Recorder(model, None))
        return made[0]

    watched = train(changed(UNMEASURED, rng=rng, steps=12, clip=1e-3), factory)
    plain = train(changed(UNMEASURED, rng=rng, steps=12, clip=1e-3))
    pd.testing.assert_frame_equal(untimed(watched.metrics), untimed(plain.metrics), check_exact=True)
    seen = made[0].seen
    assert len(seen) == 12
    for (_, following, gradient), (batch, *_) in pairwise(seen):
        assert following[0].equal(batch[0])
        assert gradient.norm() > 0.01  # not yet clipped


def test_monitor_must_be_a_factory() -> None:
    with pytest.raises(TypeError, match=r"monitor must be a function \(model, sampler\) -> monitor; got object"):
        train(TINY, object())  # type: ignore[arg-type]


@pytest.mark.parametrize("folder", [True, False])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, folder: bool) -> None:
    """The weights turn NaN at step 14; the evaluation of step 20 sees it, the checkpoint of step 10 is kept."""

    class Poison(Recorder):
        def step(self, batch: Any = None, next_batch: Any = None) -> None:
            super().step(batch, next_batch)
            if len(self.seen) == 15:
                with torch.no_grad():
                    self.model.head.bias.fill_(torch.nan)

    with pytest.raises(TrainingError, match="loss is NaN at step 20") as caught:
        train(changed(UNMEASURED, checkpoint_every=1 if folder else 10), Poison, out=tmp_path if folder else None)
    run = caught.value.run
    assert run.metrics["step"].tolist() == [0, 10, 20]
    assert run.status.startswith("failed: loss is NaN at step 20")
    if folder:
        assert run.status.endswith("; the last good checkpoint, of step 13, is kept")
        assert run.checkpoint()["step"] == 13
        assert all(value.isfinite().all() for value in weights(tmp_path).values())


def test_the_monitor_may_meet_the_bad_weights_first() -> None:
    models: list[Any] = []

    def factory(model: torch.nn.Module, sampler: Any) -> CurvatureMonitor:
        models.append(model)
        return CurvatureMonitor(model, lambda m, b: m(b[0]).sum(), pca=StreamingPCA(), pca_every=15, sampler=sampler)

    def poison(latest: dict[str, Any]) -> None:
        with torch.no_grad():
            models[0].head.bias.fill_(torch.nan)

    with pytest.raises(TrainingError, match=r"loss is NaN at step 15$") as caught:
        train(changed(UNMEASURED, eval_every=100), factory, on_progress=poison)
    assert caught.value.run.metrics["step"].tolist() == [0, 15]


def test_divergence() -> None:
    with pytest.raises(TrainingError, match=r"loss is (NaN|infinite) at step"):
        train(changed(UNMEASURED, lr=1e30, layer_norm=False, sequence="a b ="))


def test_ctrl_c_keeps_a_checkpoint_and_resume_ends_the_same(tmp_path: Path) -> None:
    def press(latest: dict[str, Any]) -> None:
        if latest["step"] == 10:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(changed(checkpoint_every=1000), out=tmp_path / "a", on_progress=press)
    assert signal.getsignal(signal.SIGINT) is handler
    run = open_run(tmp_path / "a")
    assert run.status == "interrupted"
    assert run.checkpoint()["step"] == 10
    resumed = train(changed(checkpoint_every=1000), out=tmp_path / "a", resume=True)
    whole = train(changed(checkpoint_every=1000), out=tmp_path / "b")
    pd.testing.assert_frame_equal(untimed(resumed.metrics), untimed(whole.metrics), check_exact=True)
    assert all(value.equal(weights(tmp_path / "b")[name]) for name, value in weights(tmp_path / "a").items())


def test_in_another_thread() -> None:
    runs: list[Any] = []
    thread = threading.Thread(target=lambda: runs.append(train(UNMEASURED)))
    thread.start()
    thread.join()
    assert runs[0].status == "finished"


def test_a_finished_run_resumes_to_itself(tmp_path: Path) -> None:
    first = train(TINY, out=tmp_path).metrics
    pd.testing.assert_frame_equal(train(TINY, out=tmp_path, resume=True).metrics, first, check_exact=True)
    with pytest.raises(RunError, match="already holds this run"):
        train(TINY, out=tmp_path)
    with pytest.raises(RunError, match=r"lr \(0.001 there, 0.01 here\)"):
        train(changed(lr=0.01), out=tmp_path, resume=True)


def test_resume_needs_a_folder_with_its_tables(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="resume needs out"):
        train(TINY, resume=True)
    train(UNMEASURED, out=tmp_path)
    (tmp_path / "metrics.parquet").unlink()
    with pytest.raises(RunError, match=r"metrics\.parquet is missing"):
        train(UNMEASURED, out=tmp_path, resume=True)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"damaged")
    with pytest.raises(RunError, match=r"checkpoint\.safetensors is missing or damaged"):
        train(UNMEASURED, out=tmp_path, resume=True)


@pytest.mark.parametrize("device", ["abacus", "cuda:99"])
def test_unknown_device(device: str) -> None:
    with pytest.raises(ValueError, match=f"device must be one that torch has here; got '{device}'"):
        train(changed(device=device))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"op": "pow"}, "op must be one of add, sub, mul"),
        ({"op": "div", "p": 9}, "p must be prime"),
        ({"p": 1}, "p must lie between"),
        ({"preset": "mine"}, "preset must be one of 'paper', .* got 'mine'"),
        ({"architecture": "rnn"}, "architecture must be one of 'transformer', 'mlp'; got 'rnn'"),
        ({"sequence": "b a"}, "sequence must be one of"),
        ({"activation": "tanh"}, "activation must be one of"),
        ({"rng": "numpy"}, "rng must be one of 'philox', 'paper', 'torch'"),
        ({"method": "exact"}, "method must be one of"),
        ({"batch_size": 25}, r"batch_size is larger than the training set: 25 of 24 rows"),
        ({"batch_size": -1}, "batch_size must be at least 0; got -1"),
        ({"train_fraction": 1.0}, "train_fraction must leave both sets"),
        ({"d_model": 9}, "d_model must be a multiple of heads; got 9 and 2"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"steps": -1}, "steps must be at least 0"),
        ({"eval_every": 0}, "eval_every must be at least 1"),
        ({"pairs": 0}, "pairs must be at least 1"),
        ({"lr": 0.0}, "lr must be a positive number"),
        ({"eta": float("nan")}, "eta must be a positive number"),
        ({"weight_decay": -0.1}, "weight_decay must be a number, not negative"),
        ({"clip": float("inf")}, "clip must be a number"),
        ({"beta2": 1.0}, r"beta2 must lie in \[0, 1\)"),
        ({"optimizer": "lion"}, "optimizer must be one of 'adamw', 'sgd', 'muon'; got 'lion'"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\)"),
        ({"seed": -1}, "seed must lie between"),
        ({"seed": 2**32}, "seed must lie between"),
    ],
)
def test_settings_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changed(**values)


def test_successive_steps() -> None:
    config = changed(successive=True, pairs=1, measure_every=1, steps=30)
    measured = train(config)
    plain = train(changed(config, measure_every=0))
    pd.testing.assert_frame_equal(untimed(measured.metrics), untimed(plain.metrics), check_exact=True)
    assert measured.curvature["step"].tolist() == list(range(30))  # after the last update there is no next batch
    assert measured.curvature["defect_median"].notna().all()


def test_successive_steps_resume_bitwise(tmp_path: Path) -> None:
    config = changed(successive=True, pairs=1, measure_every=1, steps=60, checkpoint_every=10, float64_logits=True)
    whole = train(config, out=tmp_path / "whole")

    def press(latest: dict[str, Any]) -> None:
        if latest["step"] == 30:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(config, out=tmp_path / "parts", on_progress=press)
    parts = train(config, out=tmp_path / "parts", resume=True)
    pd.testing.assert_frame_equal(untimed(parts.curvature), untimed(whole.curvature), check_exact=True)


def test_successive_steps_may_meet_the_bad_weights_first() -> None:
    with pytest.raises(TrainingError, match=r"(loss is (NaN|infinite)|a weight is beyond 1e\+30) at step [1-9]$"):
        train(changed(successive=True, pairs=1, measure_every=1, pca_every=1, lr=1e30, eval_every=100))


@pytest.mark.parametrize("wrong", [{"pairs": 2}, {"pairs": 1, "batch_size": 0}])
def test_successive_needs_one_pair_of_different_batches(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="successive measures one pair"):
        changed(successive=True, **wrong)


def test_float64_logits_train_alike_at_first() -> None:
    one, other = train(changed(UNMEASURED, steps=10)), train(changed(UNMEASURED, steps=10, float64_logits=True))
    for name in ("train_loss", "weight_norm"):
        np.testing.assert_allclose(one.metrics[name], other.metrics[name], rtol=1e-5)


def test_alignment_changes_nothing_and_resumes_bitwise(tmp_path: Path) -> None:
    config = changed(alignment=True, checkpoint_every=7, measure_every=4)
    whole, plain = train(config, out=tmp_path / "whole"), train(changed(config, alignment=False))
    pd.testing.assert_frame_equal(untimed(whole.metrics), untimed(plain.metrics), check_exact=True)
    assert not set(ALIGNMENT_FIELDS) & set(plain.curvature)
    same = untimed(plain.curvature)
    pd.testing.assert_frame_equal(untimed(whole.curvature)[list(same)], same, check_exact=True)
    assert whole.curvature["step_alignment"].notna().sum() >= 4
    for name in ALIGNMENT_FIELDS:
        bound = whole.curvature["step_share_error" if "share" in name else "step_alignment_error"]
        missing = whole.curvature[name].isna()
        assert missing[0]
        # A small cosine is left out where its error may be a tenth of it.
        assert not (missing & (bound <= 0.01)).any()
        assert not ("error" in name and missing[1:].any())

    def press(latest: dict[str, Any]) -> None:
        if latest["step"] in (10, 20):  # before a measurement's last step, and after it
            os.kill(os.getpid(), signal.SIGINT)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(config, out=tmp_path / "parts", resume=True, on_progress=press)
    parts = train(config, out=tmp_path / "parts", resume=True)
    pd.testing.assert_frame_equal(untimed(parts.curvature), untimed(whole.curvature), check_exact=True)
