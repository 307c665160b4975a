"""Lightning's and Hugging Face's trainers, the real ones, beside plain loops that do the same."""

from __future__ import annotations

import copy
import importlib
import re
import subprocess
import sys
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from models import PROBLEMS, cross_entropy
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, SequentialSampler, TensorDataset

import grokcurv as gc

CLIP = 0.05  # of every gradient here


@pytest.fixture
def lightning():
    return pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")


@pytest.fixture
def transformers():
    pytest.importorskip("accelerate", reason="accelerate, which the Trainer needs, is not installed")
    return pytest.importorskip("transformers", reason="transformers is not installed")


def same(one: gc.CurvatureMonitor, other: gc.CurvatureMonitor) -> None:
    frames = [monitor.records().drop(columns="measure_seconds") for monitor in (one, other)]
    assert len(frames[0]) > 0
    assert frames[0]["reliable"].all()
    pd.testing.assert_frame_equal(*frames, check_exact=True)
    pd.testing.assert_frame_equal(one.pca_records(), other.pca_records(), check_exact=True)


def options() -> dict:
    return {"pca": gc.StreamingPCA(n_components=2), "pca_every": 1, "alignment": True}


def data(generator: torch.Generator, batches: int) -> TensorDataset:
    x = torch.randn(4 * batches, 5, generator=generator)
    return TensorDataset(x, torch.randint(3, (4 * batches,), generator=generator))


def pairs(dataset: TensorDataset, start: int = 0):
    """Draws pairs, always the same ones."""
    drawn = iter(DataLoader(dataset, batch_size=4, generator=torch.Generator().manual_seed(1)))
    batches = list(drawn)
    position = iter(range(2 * start, 1000))
    return lambda: tuple(batches[next(position) % len(batches)] for _ in range(2))


def test_nothing_is_imported_before_it_is_used():
    script = """
import sys, grokcurv, grokcurv.loggers, grokcurv.integrations
loaded = {"lightning", "transformers", "accelerate", "tensorboard", "wandb", "trackio"} & set(sys.modules)
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [("lightning", "lightning.pytorch", "lightning"), ("huggingface", "transformers", "huggingface")],
)
def test_without_the_framework_the_extra_is_named(module, package, extra, monkeypatch):
    name = f"grokcurv.integrations.{module}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"pip install 'grokcurv\[{extra}\]'"):
        importlib.import_module(name)


# ------------------------------------------------------------------------------------------------------------ Lightning


def loss_of(module: nn.Module, batch) -> Tensor:
    x, y = batch
    return functional.cross_entropy(module(x), y)


def lightning_module(lightning, model: nn.Module, optimizers: int = 1):
    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = copy.deepcopy(model)
            self.automatic_optimization = optimizers == 1

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch, index: int) -> Tensor:
            return loss_of(self, batch)

        def configure_optimizers(self):
            made = [torch.optim.AdamW(self.parameters(), lr=0.01) for _ in range(optimizers)]
            return made[0] if optimizers == 1 else made

    return Module()


def lightning_trainer(lightning, callback, **settings):
    quiet = ("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "logger")
    defaults = dict.fromkeys(quiet, False) | {"accelerator": "cpu", "max_epochs": 2, "gradient_clip_val": CLIP}
    return lightning.Trainer(callbacks=[callback], **(defaults | settings))


def plain_loop(model: nn.Module, loader, *, epochs=2, accumulate=1, sampler=None, autocast=False):
    """What the frameworks do, by hand; returns (model, monitor)."""
    model = copy.deepcopy(model)
    monitor = gc.CurvatureMonitor(model, loss_of, sampler=sampler, **options())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(epochs):
        for index, (batch, following) in enumerate(monitor.lookahead(loader)):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = loss_of(model, batch)
            (loss / accumulate).backward()
            if (index + 1) % accumulate == 0:
                monitor.step(*(() if sampler else (batch, following)))
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
    return model, monitor


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_measures_as_the_plain_loop(lightning, precision, sized, generator):
    from grokcurv.integrations.lightning import CurvatureCallback

    model, dataset = PROBLEMS["perceptron"].model(), data(generator, 4)
    loader = DataLoader(dataset, batch_size=4)

    class Unsized:
        def __iter__(self):
            return iter(loader)

    trained, expected = plain_loop(model, loader, autocast=precision != "32-true")
    callback = CurvatureCallback(loss_of, **options())
    with pytest.raises(RuntimeError, match="fit makes it"):
        _ = callback.monitor
    module = lightning_module(lightning, model)
    trainer = lightning_trainer(lightning, callback, precision=precision)
    trainer.fit(module, callback.lookahead(loader if sized else Unsized()))
    same(expected, callback.monitor)
    assert expected.records()["step"].tolist() == [0, 1, 2, 4, 5, 6]
    assert set(expected.records()["method"]) == {"difference"}
    torch.testing.assert_close(module.net.state_dict(), trained.state_dict(), rtol=0, atol=0)


def test_lightning_accumulates_with_a_sampler(lightning, generator):
    from grokcurv.integrations.lightning import CurvatureCallback

    model, dataset = PROBLEMS["perceptron"].model(), data(generator, 6)
    loader = DataLoader(dataset, batch_size=4)
    trained, expected = plain_loop(model, loader, accumulate=3, sampler=pairs(dataset))
    callback = CurvatureCallback(loss_of, sampler=pairs(dataset), **options())
    module = lightning_module(lightning, model)
    lightning_trainer(lightning, callback, accumulate_grad_batches=3).fit(module, loader)
    same(expected, callback.monitor)
    assert expected.records()["step"].tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(module.net.state_dict(), trained.state_dict(), rtol=0, atol=0)


def test_lightning_resumes_from_its_checkpoint(lightning, generator, tmp_path):
    from grokcurv.integrations.lightning import CurvatureCallback

    model, dataset = PROBLEMS["perceptron"].model(), data(generator, 4)
    loader = DataLoader(dataset, batch_size=4)
    _, expected = plain_loop(model, loader)
    callback = CurvatureCallback(loss_of, **options())
    trainer = lightning_trainer(lightning, callback, max_epochs=1)
    trainer.fit(lightning_module(lightning, model), callback.lookahead(loader))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    other = CurvatureCallback(loss_of, **options())
    lightning_trainer(lightning, other).fit(
        lightning_module(lightning, model), other.lookahead(loader), ckpt_path=tmp_path / "last.ckpt", weights_only=True
    )
    same(expected, other.monitor)


def test_lightning_loggers_get_the_numbers(lightning, generator, tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    from grokcurv.integrations.lightning import CurvatureCallback

    loader = DataLoader(data(generator, 4), batch_size=4)
    callback = CurvatureCallback(loss_of, every=2)
    trainer = lightning_trainer(lightning, callback, logger=CSVLogger(tmp_path), max_epochs=1)
    trainer.fit(lightning_module(lightning, PROBLEMS["perceptron"].model()), callback.lookahead(loader))
    trainer.logger.save()
    logged = pd.read_csv(next(tmp_path.rglob("metrics.csv")))
    records = callback.monitor.records()
    assert logged["step"].tolist() == records["step"].tolist() == [0, 2]
    np.testing.assert_allclose(logged["curvature/defect_median"], records["defect_median"])
    assert (logged["curvature/reliable"] == 1.0).all()


def test_lightning_says_what_it_wants(lightning, generator):
    from grokcurv.integrations.lightning import CurvatureCallback

    loader = DataLoader(data(generator, 4), batch_size=4)
    model = PROBLEMS["perceptron"].model()
    for settings, optimizers, message in (
        ({}, 1, r"callback\.lookahead\(loader\), or give the callback a sampler"),
        ({"accumulate_grad_batches": 2}, 1, "accumulate_grad_batches=2: .grad is that of several batches"),
        ({"gradient_clip_val": None}, 2, "steps with the one optimiser, this trainer has 2"),
    ):
        trainer = lightning_trainer(lightning, CurvatureCallback(loss_of), **settings)
        with pytest.raises(ValueError, match=message):
            trainer.fit(lightning_module(lightning, model, optimizers), loader)


class Awkward:
    """What a LightningModule may do besides; mixed in before it."""

    skipped: int | None = None

    def on_before_batch_transfer(self, batch, dataloader_idx):
        self.passed = getattr(self, "passed", 0) + 1
        return batch[0].add_(0.01 * self.passed), batch[1]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.register_buffer("mean", getattr(self, "mean", torch.zeros(5)).lerp(batch[0].mean(0).float(), 0.1))
        return batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]

    def training_step(self, batch, index):
        self.watched.append(batch[0].clone())
        loss = super().training_step(batch, index)
        return None if index == self.skipped else loss


def fit_twice(lightning, loader, build, drops=0.0, **settings):
    """The module that was measured, its unmeasured twin, and the callback."""
    from grokcurv.integrations.lightning import CurvatureCallback

    callback = CurvatureCallback(loss_of, log=False)
    modules = []
    for callbacks, given in (([], loader), ([callback], callback.lookahead(loader))):
        torch.manual_seed(2)
        module = build()
        module.watched = []
        module.net.append(nn.Dropout(drops))
        trainer = lightning_trainer(lightning, callback, max_epochs=1, gradient_clip_val=None, **settings)
        trainer.callbacks[:] = [c for c in trainer.callbacks if c is not callback] + callbacks
        torch.manual_seed(3)
        trainer.fit(module, given)
        modules.append(module)
    plain, measured = modules
    torch.testing.assert_close(measured.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert all(map(torch.equal, plain.watched, measured.watched))
    return measured, callback


def awkward(lightning, **attributes):
    def build():
        plain = type(lightning_module(lightning, PROBLEMS["perceptron"].model()))
        module = type("Module", (Awkward, plain), {})()
        for name, value in attributes.items():
            setattr(module, name, value)
        return module

    return build


@pytest.mark.parametrize("sized", [True, False])
def test_lightning_s_transfer_hooks_act_once(lightning, sized, generator):
    loader = DataLoader(data(generator, 3), batch_size=4, shuffle=True)

    class Unsized:
        def __iter__(self):
            return iter(loader)

    measured, callback = fit_twice(lightning, loader if sized else Unsized(), awkward(lightning), drops=0.3)
    assert measured.passed == 3
    assert len(callback.monitor.records()) == 2


def test_lightning_measures_the_batch_that_training_will_see(lightning, generator):
    from grokcurv.integrations.lightning import CurvatureCallback

    class Noted(CurvatureCallback):
        def on_fit_start(self, trainer, pl_module):
            super().on_fit_start(trainer, pl_module)
            self.pairs = []
            launch = self.monitor.launch
            self.monitor.launch = lambda pairs, *options: self.pairs.extend(pairs) or launch(pairs, *options)

    callback = Noted(loss_of, log=False)
    module = awkward(lightning)()
    module.watched = []
    loader = DataLoader(data(generator, 3), batch_size=4)
    lightning_trainer(lightning, callback, max_epochs=1).fit(module, callback.lookahead(loader))
    seen = [(batch[0], following[0]) for (batch,), (following,) in callback.pairs]
    for (batch, following), (now, then) in zip(seen, pairwise(module.watched), strict=True):
        assert torch.equal(batch, now)
        assert torch.equal(following, then)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_lightning_s_true_precisions(lightning, precision, generator):
    class Making(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.eye(x.shape[1])  # of the type that the plugin sets

    def build():
        module = lightning_module(lightning, PROBLEMS["perceptron"].model())
        module.net.insert(0, Making())
        return module

    loader = DataLoader(data(generator, 3), batch_size=4)
    _, callback = fit_twice(lightning, loader, build, precision=precision)
    records = callback.monitor.records()
    assert len(records) == 2
    if precision == "64-true":
        assert records["reliable"].all()


def test_lightning_s_training_step_may_return_none(lightning, generator):
    """Often enough that .grad is trusted by then."""
    loader = DataLoader(data(generator, 6), batch_size=4)
    _, callback = fit_twice(lightning, loader, awkward(lightning, skipped=3))
    records = callback.monitor.records()
    assert records["step"].tolist() == [0, 1, 2, 3, 4]
    states = []

    class Before(lightning.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            states.append(copy.deepcopy(module.net.state_dict()))

    from grokcurv.integrations.lightning import CurvatureCallback

    plain = lightning_module(lightning, PROBLEMS["perceptron"].model())
    model, train = plain.net, plain.training_step

    def training_step(batch, batch_idx):
        return None if batch_idx == 3 else train(batch, batch_idx)

    plain.training_step = training_step
    tapped = CurvatureCallback(loss_of, log=False, check_every=2)
    trainer = lightning_trainer(lightning, Before(), max_epochs=1)
    trainer.callbacks.append(tapped)
    trainer.fit(plain, tapped.lookahead(loader))
    records, batches = tapped.monitor.records(), list(loader)
    for step, (state, defect, reliable) in enumerate(
        zip(states[:-1], records["defect_median"], records["reliable"], strict=True)
    ):
        model.load_state_dict(state)
        truth = gc.commutator_defect(model, loss_of, *batches[step : step + 2]).defect.item()
        assert not reliable or abs(defect / truth - 1.0) < 1e-2, step


def test_lightning_counts_a_closure_s_steps_once(lightning, generator):
    def build():
        module = lightning_module(lightning, PROBLEMS["perceptron"].model())
        module.configure_optimizers = lambda: torch.optim.LBFGS(module.parameters(), max_iter=4)
        return module

    _, callback = fit_twice(lightning, DataLoader(data(generator, 3), batch_size=4), build)
    assert callback.monitor.steps == 3
    assert callback.monitor.records()["step"].tolist() == [0, 1]


def test_lightning_leaves_out_batches_that_are_none(lightning, generator):
    batches = list(DataLoader(data(generator, 4), batch_size=4))

    class Holes:
        def __iter__(self):
            yield from (*batches[:2], None, *batches[2:])

    def build():
        return lightning_module(lightning, PROBLEMS["perceptron"].model())

    _, callback = fit_twice(lightning, Holes(), build)
    records = callback.monitor.records()
    assert records["step"].tolist() == [0, 2]  # the batch before the hole has none after it


# --------------------------------------------------------------------------------------------------------- Hugging Face


class Rows(Dataset):
    """The rows of tensors by name, as the Trainer's collator wants them."""

    def __init__(self, **columns: Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def gpt2(transformers, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(7)
    shares = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), dropout)
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=6, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, **shares
    )
    return transformers.GPT2LMHeadModel(config)


def sentences(generator: torch.Generator, rows: int = 48) -> Rows:
    tokens = torch.randint(11, (rows, 6), generator=generator)
    return Rows(input_ids=tokens, labels=tokens)


def hf_loss(model: nn.Module, batch) -> Tensor:
    return model(**batch).loss


def hf_pairs(rows: Rows, skip: int = 0):
    order = DataLoader(rows, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3))
    batches = iter([batch for _ in range(4) for batch in order][2 * skip :])
    return lambda: (next(batches), next(batches))


def hf_trainer(transformers, folder: Path, model: nn.Module, rows: Rows, callback, **settings):
    class Trainer(transformers.Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            return SequentialSampler(rows)

    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "weight_decay": 0.0,
        "max_grad_norm": CLIP,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    arguments = transformers.TrainingArguments(output_dir=str(folder), **(defaults | settings))
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback])
    trainer.model_accepts_loss_kwargs = False  # the mean over a batch, which is then divided by the number of batches
    return trainer


def hf_loop(
    model: nn.Module, rows: Rows, *, steps: int = 6, accumulate: int = 1
) -> tuple[nn.Module, gc.CurvatureMonitor]:
    model = copy.deepcopy(model).train()
    monitor = gc.CurvatureMonitor(model, hf_loss, sampler=hf_pairs(rows), **options())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    batches = iter(DataLoader(rows, batch_size=4))
    for _ in range(steps):
        for batch in islice(batches, accumulate):
            (hf_loss(model, batch) / accumulate).backward()
        monitor.step()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return model, monitor


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointing"])
def test_the_trainer_measures_as_the_plain_loop(transformers, settings, generator, tmp_path):
    from grokcurv.integrations.huggingface import CurvatureCallback

    model, rows = gpt2(transformers), sentences(generator)
    trained, expected = hf_loop(model, rows)
    callback = CurvatureCallback(hf_loss, hf_pairs(rows), **options())
    with pytest.raises(RuntimeError, match="train makes it"):
        _ = callback.monitor
    hf_trainer(transformers, tmp_path, model, rows, callback, **settings).train()
    same(expected, callback.monitor)
    assert len(expected.records()) == 6
    assert expected.records()["rho"].notna().sum() == 4
    torch.testing.assert_close(model.state_dict(), trained.state_dict(), rtol=0, atol=0)


def test_the_trainer_accumulates(transformers, generator, tmp_path):
    from grokcurv.integrations.huggingface import CurvatureCallback

    model, rows = gpt2(transformers), sentences(generator)
    _, expected = hf_loop(model, rows, steps=4, accumulate=3)
    callback = CurvatureCallback(hf_loss, hf_pairs(rows), **options())
    hf_trainer(transformers, tmp_path, model, rows, callback, max_steps=4, gradient_accumulation_steps=3).train()
    same(expected, callback.monitor)
    assert expected.records()["step"].tolist() == [0, 1, 2, 3]


def test_the_trainer_resumes_from_its_checkpoint(transformers, generator, tmp_path):
    from grokcurv.integrations.huggingface import FILE, CurvatureCallback

    model, rows = gpt2(transformers), sentences(generator)
    _, expected = hf_loop(model, rows)
    settings = {"save_strategy": "steps", "save_steps": 3}
    first = CurvatureCallback(hf_loss, hf_pairs(rows), **options())
    hf_trainer(transformers, tmp_path, copy.deepcopy(model), rows, first, max_steps=3, **settings).train()
    folder = tmp_path / "checkpoint-3"
    assert (folder / FILE).exists()
    second = CurvatureCallback(hf_loss, hf_pairs(rows, skip=3), **options())
    resumed = hf_trainer(transformers, tmp_path, copy.deepcopy(model), rows, second, **settings)
    resumed.train(resume_from_checkpoint=str(folder))
    same(expected, second.monitor)
    (folder / FILE).unlink()
    third = CurvatureCallback(hf_loss, hf_pairs(rows), **options())
    with pytest.warns(UserWarning, match="goes on at step 3, but there is no .*checkpoint-3.*begin anew"):
        hf_trainer(transformers, tmp_path, copy.deepcopy(model), rows, third, **settings).train(
            resume_from_checkpoint=str(folder)
        )
    assert third.monitor.records()["step"].tolist() == [0, 1, 2]


def test_a_second_train_goes_on(transformers, generator, tmp_path):
    from grokcurv.integrations.huggingface import FILE, CurvatureCallback

    model, rows = gpt2(transformers), sentences(generator)
    callback = CurvatureCallback(hf_loss, hf_pairs(rows), **options())
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = hf_trainer(transformers, tmp_path, model, rows, callback, **settings)
    trainer.train()
    first = callback.monitor.records()
    trainer.train()
    records = callback.monitor.records()
    assert records["step"].tolist() == [0, 1, 2, 3]
    pd.testing.assert_frame_equal(records[:2], first, check_exact=True)
    file = tmp_path / "checkpoint-2" / FILE
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"checkpoint-2.*curvature\.safetensors is cut or damaged"):
        hf_trainer(transformers, tmp_path, model, rows, callback, **settings | {"max_steps": 4}).train(
            resume_from_checkpoint=str(file.parent)
        )


def test_the_trainer_in_bfloat16_with_dropout(transformers, generator, tmp_path):
    """Its autocast is inside the model's forward: what is certified is the function without it."""
    from grokcurv.integrations.huggingface import CurvatureCallback

    model, rows = gpt2(transformers), sentences(generator)
    pair = hf_pairs(rows)()
    truth = gc.commutator_defect(copy.deepcopy(model).double(), hf_loss, *pair).defect.item()
    callback = CurvatureCallback(hf_loss, hf_pairs(rows))
    hf_trainer(transformers, tmp_path, model, rows, callback, bf16=True, max_steps=3).train()
    records = callback.monitor.records()
    assert set(records["method"]) == {"difference"}
    assert records["reliable"].all()
    np.testing.assert_allclose(records["defect_median"][0], truth, rtol=0.01)
    dropping = gpt2(transformers, dropout=0.2)
    callback = CurvatureCallback(hf_loss, hf_pairs(rows))
    hf_trainer(transformers, tmp_path, dropping, rows, callback, max_steps=3).train()
    assert callback.monitor.probe.gradients.stochastic
    assert callback.monitor.records()["reliable"].all()


def test_the_trainer_s_sampler_is_a_function(transformers):
    from grokcurv.integrations.huggingface import CurvatureCallback

    with pytest.raises(TypeError, match=r"sampler must be a function that draws .* got list"):
        CurvatureCallback(hf_loss, [])


# ------------------------------------------------------------------------------------------------------------- the page


def test_the_page_s_code_runs(lightning, transformers, generator, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    problem = PROBLEMS["perceptron"]
    model, rows = problem.model(), sentences(generator)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = problem.model()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch, index: int) -> Tensor:
            return cross_entropy(self, batch)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    names = {
        "model": model,
        "loss_fn": cross_entropy,
        "loader": [problem.batch(generator) for _ in range(8)],
        "optimizer": torch.optim.AdamW(model.parameters()),
        "module": Module(),
        "network": gpt2(transformers),
        "dataset": rows,
        "sampler": hf_pairs(rows),
        "data": problem.batch(generator),
    }
    Path("checkpoints").mkdir()
    for step in range(3):
        torch.save(model.state_dict(), f"checkpoints/step{step}.pt")
    page = Path(__file__).parents[1] / "docs" / "own-loop.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    lengths = []
    for block in blocks:
        exec(block, names)
        monitor = names["callback"].monitor if "callback = " in block else names["monitor"]
        if block.startswith("monitor = "):
            monitor.step()
        records = names["records"] if "replay(" in block else monitor.records()
        lengths.append(len(records))
        assert records["reliable"].any() if "replay(" in block else records["reliable"].all()
    assert lengths[:1] + lengths[2:] == [8, 7, 1, 7, 2, 3, 1, 3, 7]
    assert 1 <= lengths[1] <= 48  # as many as the budget has paid for
    assert [segment.name for segment in names["heads"][:1]] == ["transformer.h.0.attn.c_attn.weight[:, 0:8]"]
    assert len(pd.read_parquet("curvature.parquet")) == 7
