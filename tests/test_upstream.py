"""Logs of the paper's code, here written as that code writes them, beside PCA by SVD and our own monitor's."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import grokcurv as gc
from grokcurv import upstream
from grokcurv.flat import attention_segments, flatten

KEYS = ("WQ", "WK", "WV", "WO")
WIDTH, LAYERS = 8, 2


class Model(nn.Module):
    """As far as the log is concerned, the paper's."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        self.embedding = nn.Embedding(5, WIDTH)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)


def matrices(model: Model) -> list[dict[str, Any]]:
    """What the paper's code logs of a model."""
    layers = []
    for i, layer in enumerate(model.encoder.layers):
        q, k, v = layer.self_attn.in_proj_weight.detach().chunk(3)
        o = layer.self_attn.out_proj.weight.detach()
        layers.append({"layer": i, **{key: m.clone() for key, m in zip(KEYS, (q, k, v, o), strict=True)}})
    return layers


@pytest.fixture
def run(generator: torch.Generator) -> tuple[dict[str, Any], gc.StreamingPCA]:
    """A log of a model on the move, and a StreamingPCA that saw the same."""
    model = Model()
    pca = gc.StreamingPCA(n_components=2, segments=attention_segments(model))
    content: dict[str, Any] = {
        "attn_logs": [],
        "cfg": {"OP_NAME": "add", "WEIGHT_DECAY": 1.0, "SEED": 42, "N_LAYERS": LAYERS, "GRAD_CLIP": 1.0},
        "metrics": [{"step": s, "train_acc": s / 700, "test_acc": s / 1000} for s in (1, 100, 200, 650)],
        "grokked": True,
        "final_step": 650,
        "final_train_acc": 650 / 700,
        "final_test_acc": 650 / 1000,
    }
    for step in range(0, 700, 100):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=generator))
        content["attn_logs"].append({"step": step, "layers": matrices(model)})
        pca.partial_fit(flatten(model))
    return content, pca


def alike(a: Any, b: Any) -> bool:
    """Equal in every value, type and bit."""
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return type(b) is list and len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


def test_a_log_becomes_the_pca_of_its_matrices(run: Any, tmp_path: Path) -> None:
    content, own = run
    torch.save(content, tmp_path / "log.pt")
    log = upstream.load(tmp_path / "log.pt")
    pca = log.pca(n_components=2)
    assert log.steps == list(range(0, 700, 100))
    assert [s.name for s in pca.segments] == [s.name for s in own.segments]
    assert [s.shape for s in pca.segments] == [(WIDTH, WIDTH)] * 4 * LAYERS
    assert torch.equal(pca.explained_variance_ratio_, own.explained_variance_ratio_)
    for mine, theirs in zip(pca.components_, own.components_, strict=True):
        assert torch.equal(mine, theirs)
    for j in range(4 * LAYERS):
        x = np.stack([entry["layers"][j // 4][KEYS[j % 4]].double().flatten() for entry in content["attn_logs"]])
        s = np.linalg.svd(x - x.mean(0), compute_uv=False)
        np.testing.assert_allclose(pca.explained_variance_ratio_[j], s[:2] ** 2 / (s**2).sum(), rtol=1e-6)
    assert log.config == content["cfg"]
    assert log.metrics.to_dict("records") == content["metrics"]
    assert (log.grokked, log.final_step) == (True, 650)
    assert log.pca(3, method="incremental", block=4).method_ == "incremental"


def test_a_log_is_written_as_it_was_read(run: Any, tmp_path: Path) -> None:
    content, _ = run
    torch.save(content, tmp_path / "log.pt")
    upstream.load(tmp_path / "log.pt").save(tmp_path / "again.pt")
    assert alike(content, torch.load(tmp_path / "again.pt", weights_only=True))
    assert sorted(os.listdir(tmp_path)) == ["again.pt", "log.pt"]
    matrix = torch.load(tmp_path / "again.pt", weights_only=True)["attn_logs"][1]["layers"][0]["WK"]
    assert matrix.untyped_storage().nbytes() == matrix.nbytes  # no part of the memory of others


def test_a_pca_is_exported_as_the_log_of_its_run(run: Any, tmp_path: Path) -> None:
    content, own = run
    metrics = pd.DataFrame(content["metrics"]).assign(train_loss=0.5)
    steps = np.arange(0, 700, 100)
    log = upstream.Log.from_pca(own, steps, config=content["cfg"], metrics=metrics, grokked=True)
    log.save(tmp_path / "log.pt")
    assert alike(content, torch.load(tmp_path / "log.pt", weights_only=True))


def test_a_monitor_is_exported(generator: torch.Generator, tmp_path: Path) -> None:
    model = Model()
    pca = gc.StreamingPCA(n_components=2, segments=attention_segments(model))

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        return model.encoder(model.embedding(x)).square().mean()

    monitor = gc.CurvatureMonitor(model, loss_fn, every=2, pca=pca, pca_every=2)
    wanted = []
    for step in range(5):
        wanted += [matrices(model)] if step % 2 == 0 else []
        batch = torch.randint(5, (4, 3), generator=generator)
        loss_fn(model, batch).backward()
        monitor.step(batch, batch)
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(0.1 * p.grad)
        model.zero_grad()
    history = monitor.pca_records()
    none = pd.DataFrame({"step": [], "train_acc": [], "test_acc": []})
    log = upstream.Log.from_pca(pca, history["step"].unique(), config={}, metrics=none, grokked=False)
    log.save(tmp_path / "log.pt")
    content = torch.load(tmp_path / "log.pt", weights_only=True)
    assert alike([{"step": 2 * i, "layers": layers} for i, layers in enumerate(wanted)], content["attn_logs"])
    assert (content["metrics"], content["final_step"], content["final_test_acc"]) == ([], 4, 0)
    assert upstream.load(tmp_path / "log.pt").metrics.empty


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_file_that_would_run_code_is_refused(run: Any, tmp_path: Path) -> None:
    content, _ = run
    content["cfg"]["trap"] = Trap(tmp_path / "sprung")
    torch.save(content, tmp_path / "log.pt")
    with pytest.raises(ValueError, match=r"log\.pt holds more than tensors and plain values: it asks for posix\.mkdir"):
        upstream.load(tmp_path / "log.pt")
    assert not (tmp_path / "sprung").exists()
    content["cfg"]["trap"] = np.float64(1.0)
    torch.save(content, tmp_path / "log.pt")
    with pytest.raises(ValueError, match=r"it asks for numpy.*weights_only=False"):
        upstream.load(tmp_path / "log.pt")


def spoiled(path: str, value: Any) -> Any:
    """A change of the content: at the path sets the value, or deletes the key if there is none."""

    def change(content: dict[str, Any]) -> None:
        *way, last = path.split("/")
        place: Any = content
        for key in way:
            place = place[int(key) if isinstance(place, list) else key]
        if value is None:
            del place[last]
        else:
            place[int(last) if isinstance(place, list) else last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoiled("grokked", None), "the file lacks grokked; it has attn_logs, cfg"),
        (spoiled("attn_logs", []), "attn_logs must have at least one entry"),
        (spoiled("attn_logs/2/layers", None), r"attn_logs\[2\] lacks layers; it has step"),
        (spoiled("attn_logs/1/layers/1/WV", None), r"attn_logs\[1\]\['layers'\]\[1\] lacks WV"),
        (spoiled("attn_logs/1/layers/1/layer", 0), r"\['layers'\]\[1\] is layer 0"),
        (spoiled("attn_logs/1/layers/0/WQ", torch.ones(3)), r"\['WQ'\] must be a matrix of floats"),
        (spoiled("attn_logs/1/layers/0/WQ", torch.ones(3, 3)), r"attn_logs\[1\] has other layers, shapes or dtypes"),
        (spoiled("attn_logs/3/layers", []), r"attn_logs\[3\] has no layers"),
        (spoiled("attn_logs/0/step", 1), r"steps must rise from 0, got \[1, 100"),
        (spoiled("attn_logs/2/step", 100), r"steps must rise from 0, got \[0, 100, 100"),
        (spoiled("attn_logs/2/step", 200.0), r"attn_logs\[2\]\['step'\] must be of type int, got float"),
        (spoiled("attn_logs/2/step", "200"), "must be of type int, got str"),
        (spoiled("attn_logs", {}), "must be of type list, got dict"),
        (spoiled("attn_logs/0", 3), r"attn_logs\[0\] must be a dict, got int"),
        (spoiled("attn_logs/0/layers", 3), "must be of type list, got int"),
        (spoiled("attn_logs/0/layers/0", "x"), "must be a dict, got str"),
        (spoiled("attn_logs/1/layers/0/WQ", "x"), r"\['WQ'\] must be of type Tensor, got str"),
        (spoiled("attn_logs/1/layers/0/WQ", torch.eye(8).to_sparse()), "must be a matrix of floats, a dense tensor"),
        (spoiled("attn_logs/1/layers/0/WQ", torch.eye(8).int()), "must be a matrix of floats, a dense tensor"),
        (spoiled("attn_logs/1/layers/0/WQ", torch.eye(8).double()), "has other layers, shapes or dtypes"),
        (spoiled("cfg", 3), r"\['cfg'\] must be of type dict, got int"),
        (spoiled("cfg/OP_NAME", torch.ones(2)), "must be a plain value .* got Tensor"),
        (spoiled("metrics", 3), "must be of type list, got int"),
        (spoiled("metrics/1", 3), r"metrics\[1\] must be a dict, got int"),
        (spoiled("metrics/1/test_acc", "high"), r"metrics\[1\]\['test_acc'\] must be of type float, got str"),
        (spoiled("grokked", 1), "must be of type bool, got int"),
        (spoiled("final_step", True), "must be of type int, got bool"),
        (spoiled("metrics/1/test_acc", None), r"metrics\[1\] lacks test_acc"),
    ],
)
def test_a_log_of_another_layout_is_refused(run: Any, tmp_path: Path, change: Any, message: str) -> None:
    content = copy.deepcopy(run[0])
    change(content)
    torch.save(content, tmp_path / "log.pt")
    with pytest.raises(ValueError, match=rf"log\.pt is no log of the paper's code: .*{message}"):
        upstream.load(tmp_path / "log.pt")


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        upstream.load(tmp_path / "none.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    for name in ("pipe.pt", "."):
        with pytest.raises(OSError, match="must be a file and is"):
            upstream.load(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="the file must be a dict, got list"):
        upstream.load(tmp_path / "list.pt")
    torch.save({"a": torch.ones(1000)}, tmp_path / "half.pt")
    whole = (tmp_path / "half.pt").read_bytes()
    for data in (b"", b"text", whole[: len(whole) // 2]):
        (tmp_path / "half.pt").write_bytes(data)
        with pytest.raises(ValueError, match=r"is damaged, or was not written by torch\.save"):
            upstream.load(tmp_path / "half.pt")


def test_what_cannot_be_exported_is_refused(run: Any, tmp_path: Path) -> None:
    content, pca = run
    steps, metrics = range(0, 700, 100), pd.DataFrame(content["metrics"])

    def export(
        pca: gc.StreamingPCA, steps: Any = steps, metrics: pd.DataFrame = metrics, **config: Any
    ) -> upstream.Log:
        return upstream.Log.from_pca(pca, steps, config=config, metrics=metrics, grokked=True)

    with pytest.raises(ValueError, match="steps has 3 entries, but pca has seen 7 rows"):
        export(pca, range(3))
    with pytest.raises(ValueError, match="steps must rise from 0"):
        export(pca, range(100, 800, 100))
    with pytest.raises(ValueError, match="metrics lacks test_acc; it has step, train_acc"):
        export(pca, metrics=metrics.drop(columns="test_acc"))
    with pytest.raises(ValueError, match=r"must have the segments of .*attention_segments.*got none"):
        export(gc.StreamingPCA().partial_fit(torch.ones(7, 5)))
    with pytest.raises(ValueError, match=r"got encoder\.layers\.0\.self_attn\.q_proj_weight$"):
        export(gc.StreamingPCA(segments=pca.segments[:1]).partial_fit(torch.ones(7, pca.n_features_in_)))
    with pytest.raises(ValueError, match="rows_ needs method='gram', this PCA works by 'incremental'"):
        export(upstream.Log.from_pca(pca, steps, config={}, metrics=metrics, grokked=True).pca(method="incremental"))
    with pytest.raises(ValueError, match="has seen no rows"):
        export(gc.StreamingPCA(segments=pca.segments))
    with pytest.raises(TypeError, match=r"config\['a'\]\[1\] must be a plain value .* got ndarray"):
        export(pca, a=[1, np.ones(2)]).save(tmp_path / "log.pt")
    assert not (tmp_path / "log.pt").exists()
