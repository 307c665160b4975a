"""Segments that are parts of tensors: slices, heads, and the projections of other people's attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import grokcurv as gc
from grokcurv.flat import attention_parameters, flatten, segments_of
from grokcurv.subspace import Subspace


class Tensors(nn.Module):
    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Module() for _ in shapes)
        for part, shape in zip(self.parts, shapes, strict=True):
            part.weight = nn.Parameter(torch.randn(shape))


INDICES = [
    "0",
    "-1",
    ":2",
    "1:3",
    "::2",
    ":, :2",
    ":, 1",
    "0, 1:",
    "1:, ::2",
    ":, -1:",
    ":, :, 0",
    "1, :, 1:",
    ":, 1:, :1",
]


@pytest.mark.parametrize("index", INDICES)
def test_a_slice_is_that_of_the_tensor(index: str) -> None:
    shapes = tuple(tuple(int(n) for n in torch.randint(3, 6, (3,))) for _ in range(3))
    model = Tensors(*shapes)
    theta = flatten(model)
    found = gc.select_segments(model, f"*.weight[{index}]")
    assert [segment.name for segment in found] == [f"parts.{i}.weight[{index}]" for i in range(3)]
    for segment, parameter in zip(found, model.parameters(), strict=True):
        truth = eval(f"parameter[{index}]", {"parameter": parameter.detach()})
        assert segment.shape == tuple(truth.shape)
        assert segment.length == truth.numel() == sum(length for _, length in segment.intervals)
        assert torch.equal(segment.of(theta).view(segment.shape), truth)
        for (start, length), (following, _) in zip(segment.intervals, segment.intervals[1:], strict=False):
            assert start + length < following  # in order, and none that touch
        assert torch.equal(segment.of(theta.expand(2, -1)), segment.of(theta).expand(2, -1))


def test_a_slice_of_a_slice() -> None:
    model = Tensors((4, 6, 2))
    (columns,) = gc.select_segments(model, "*t[:, 1:4]")
    again = columns.sliced("1, :2")
    assert torch.equal(again.of(flatten(model)).view(again.shape), model.parts[0].weight.detach()[1, 1:3])


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (["*t[9]"], r"parts\.0\.weight of shape \(3, 4\) has no \[9\]"),
        (["*t[0, 0, 0]"], r"has no \[0, 0, 0\]"),
        (["*t[2:2]"], "empty"),
        (["*t[,]"], "an index is missing"),
        (["*t[::-1]"], "step"),
        (["nothing[0]"], r"'nothing\[0\]' matches none of parts\.0\.weight"),
        (["*t[0]", "*t[:2]"], "overlap"),
        (["*t[:, 0]", "*t[0]"], "overlap"),
    ],
)
def test_bad_slices(patterns: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        gc.select_segments(Tensors((3, 4)), *patterns)


def test_parts_beside_the_whole_are_left_out() -> None:
    model = Tensors((3, 4), (2, 2))
    whole = gc.select_segments(model, "*")
    assert gc.select_segments(model, "*t[:, 1]", "*") == whole == segments_of(model)
    assert gc.select_segments(model, "parts.[01].*") == whole  # a class of characters, as ever


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def network(generator: torch.Generator) -> tuple[nn.Module, Callable[[], tuple[Tensor, Tensor]]]:
    torch.manual_seed(int(torch.randint(1 << 30, (), generator=generator)))
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 5))
    return model, lambda: (torch.randn(16, 6, generator=generator), torch.randint(5, (16,), generator=generator))


@pytest.mark.parametrize("method", ["difference", "bracket"])
def test_shares_of_parts_sum_to_the_whole(method: str, generator: torch.Generator) -> None:
    model, batch = network(generator)
    parts = gc.select_segments(
        model, "0.weight[:, :2]", "0.weight[:, 2:]", "0.bias", "2.weight[0:3]", "2.weight[3:]", "2.bias"
    )
    pairs = [(batch(), batch()) for _ in range(3)]
    probe = gc.CommutatorProbe(model, loss_fn, method=method, segments=parts)
    stats = probe.measure(pairs, keep_delta=True)
    whole = gc.CommutatorProbe(model, loss_fn, method=method, segments=segments_of(model)).measure(pairs)
    scale = (stats.bracket_norm * stats.eta.square()).square()
    torch.testing.assert_close(stats.energies.sum(1), scale, rtol=1e-12, atol=0)
    torch.testing.assert_close(stats.energies[:, :2].sum(1), whole.energies[:, 0], rtol=1e-12, atol=0)
    for segment, energy in zip(parts, stats.energies.T, strict=True):  # delta itself is kept in float32
        truth = segment.of(stats.delta).double().square().sum(1)
        torch.testing.assert_close(energy, truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "patterns", [("0.weight[:, :2]", "0.weight[:, 2:]", "2.weight"), ("0.weight[:, 1:3]", "2.weight[1:3]")]
)
def test_the_trajectory_of_columns(patterns: tuple[str, ...], generator: torch.Generator) -> None:
    """PCA, basis, projections and support are those of the same columns laid side by side."""
    model, batch = network(generator)
    segments = gc.select_segments(model, *patterns)
    size = sum(p.numel() for p in model.parameters())
    rows = torch.randn(6, size, generator=generator)
    pca = gc.StreamingPCA(n_components=2, segments=segments).partial_fit(rows)
    for segment, variances in zip(segments, pca.explained_variance_, strict=True):
        plain = segment.of(rows).double()
        truth = torch.linalg.svdvals(plain - plain.mean(0))[:2].square() / (len(rows) - 1)
        torch.testing.assert_close(variances, truth, rtol=1e-6, atol=0)
    basis = Subspace.from_pca(pca, 2)
    dense = basis.to_dense().double()
    torch.testing.assert_close(dense @ dense.T, torch.eye(2 * len(segments), dtype=torch.float64), rtol=0, atol=1e-5)
    inside = torch.zeros(size, dtype=torch.bool)
    for segment in segments:
        for start, length in segment.intervals:
            inside[start : start + length] = True
    assert not dense[:, ~inside].any()
    assert basis.support_size == int(inside.sum())
    again = gc.StreamingPCA(n_components=2, segments=segments)
    again.load_state_dict(pca.state_dict())
    assert torch.equal(torch.cat(list(again.components_), 1), torch.cat(list(pca.components_), 1))
    with pytest.raises(ValueError, match="segments"):
        gc.StreamingPCA(n_components=2, segments=gc.select_segments(model, *patterns[:-1])).load_state_dict(
            pca.state_dict()
        )

    probe = gc.CommutatorProbe(model, loss_fn, basis=basis)
    stats = probe.measure([(batch(), batch())], keep_delta=True)
    delta = stats.delta.double()
    torch.testing.assert_close(stats.parallel, (dense @ delta[0]).norm()[None], rtol=1e-5, atol=0)
    torch.testing.assert_close(stats.support, delta[:, inside].norm(dim=1), rtol=1e-6, atol=0)


def test_a_run_measured_on_columns(generator: torch.Generator) -> None:
    model, drawn = network(generator)
    model.double()  # whose floors are far below

    def batch() -> tuple[Tensor, Tensor]:
        x, y = drawn()
        return x.double(), y

    pca = gc.StreamingPCA(n_components=2, segments=gc.select_segments(model, "0.weight[:, ::2]"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with gc.attach(model, loss_fn, optimizer, sampler=lambda: (batch(), batch()), pca=pca, pca_every=1) as monitor:
        for _ in range(5):
            loss_fn(model, batch()).backward()
            optimizer.step()
    records = monitor.records()
    assert records["exec_matched_ratio"].iloc[3:].gt(0).all()
    np.testing.assert_allclose(records["rho"].iloc[3:] ** 2 + records["exec_fraction"].iloc[3:] ** 2, 1, rtol=1e-3)


TINY = {"hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 16, "vocab_size": 20}


def transformers_model(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    known: dict[str, tuple[str, dict[str, Any]]] = {
        "gpt2": ("GPT2", {"n_embd": 12, "n_head": 3, "n_layer": 2, "vocab_size": 20, "n_positions": 8}),
        "llama": ("Llama", TINY | {"num_key_value_heads": 3}),
        "bert": ("Bert", TINY),
        "neox": ("GPTNeoX", TINY),
        "vit": ("ViT", TINY | {"image_size": 8, "patch_size": 4}),
        "distilbert": ("DistilBert", {"dim": 12, "n_heads": 3, "n_layers": 2, "hidden_dim": 16, "vocab_size": 20}),
    }
    name, settings = known[kind]
    return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**settings))


def test_heads_of_gpt2() -> None:
    """Queries, keys, values of a fused Conv1D, whose columns they are; all heads together are all of it."""
    model = transformers_model("gpt2")
    theta, parameters = flatten(model), dict(model.named_parameters())
    found = gc.attention_segments(model)
    assert len(found) == 8
    q, k, v, o = (segment.of(theta).view(segment.shape) for segment in found[:4])
    assert torch.equal(torch.cat([q, k, v], 1), parameters["h.0.attn.c_attn.weight"])
    assert torch.equal(o, parameters["h.0.attn.c_proj.weight"])
    assert found[:3] == gc.select_segments(
        model, *(f"h.0.attn.c_attn.weight[{at}]" for at in (":, 0:12", ":, 12:24", ":, 24:36"))
    )
    heads = gc.select_segments(model, *(f"*.c_attn.weight[:, {4 * i}:{4 * i + 4}]" for i in range(9)))
    assert len(heads) == 18
    assert sum(head.length for head in heads) == 2 * parameters["h.0.attn.c_attn.weight"].numel()
    assert {s.name for s in attention_parameters(model)} == {name for name in parameters if ".attn." in name}


def test_heads_of_neox() -> None:
    """A fused matrix whose rows go head by head."""
    model = transformers_model("neox")
    theta = flatten(model)
    fused = dict(model.named_parameters())["layers.0.attention.query_key_value.weight"]
    q, k, v = (segment.of(theta).view(3, 4, 12) for segment in gc.attention_segments(model)[:3])
    assert torch.equal(torch.stack([q, k, v], 1).flatten(0, 2), fused)


@pytest.mark.parametrize("kind", ["llama", "bert", "vit", "distilbert"])
def test_projections_of_transformers(kind: str) -> None:
    model = transformers_model(kind)
    found = gc.attention_segments(model)
    assert len(found) == 8
    assert all(segment.shape == (12, 12) for segment in found)
    shares = attention_parameters(model)
    assert {segment.name for segment in found} <= {segment.name for segment in shares}
    assert all("attention" in segment.name or "attn" in segment.name for segment in shares)


def test_a_hooked_transformer() -> None:
    lens = pytest.importorskip("transformer_lens")
    settings = {"d_mlp": 16, "d_vocab": 7, "n_ctx": 3, "act_fn": "gelu", "seed": 0}
    config = lens.HookedTransformerConfig(n_layers=2, d_model=8, d_head=4, n_heads=2, **settings)
    model = lens.HookedTransformer(config, move_to_device=False)
    found = gc.attention_segments(model)
    assert [segment.name for segment in found[:4]] == [f"blocks.0.attn.W_{letter}" for letter in "QKVO"]
    heads = gc.select_segments(model, "blocks.*.attn.W_Q[1]")
    assert [segment.name for segment in heads] == [f"blocks.{i}.attn.W_Q[1]" for i in range(2)]
    assert torch.equal(heads[0].of(flatten(model)).view(8, 4), model.blocks[0].attn.W_Q.detach()[1])
    assert {s.name for s in attention_parameters(model)} == {n for n, _ in model.named_parameters() if ".attn." in n}
    batch = torch.randint(7, (9, 3)), torch.randint(7, (9,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gc.attach(
        model, lambda m, b: functional.cross_entropy(m(b[0])[:, -1], b[1]), optimizer, sampler=gc.halves(batch)
    ) as monitor:
        optimizer.step()
    assert 0 < monitor.records()["attention_fraction"].item() < 1
