from __future__ import annotations

import pytest
import torch
from torch import nn

from grokcurv.tasks import MLP, Transformer
from grokcurv.training import PRESETS, TrainConfig, build_model


def pairs(p: int, n: int = 9) -> torch.Tensor:
    return torch.randint(p, (n, 2))


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_papers_model() -> None:
    model = build_model(TrainConfig())
    assert count(model) == 290_401
    assert model(pairs(97)).shape == (9, 97)
    first, second = (dict(layer.named_parameters()) for layer in model.encoder.layers)
    assert all(first[name].equal(second[name]) and first[name] is not second[name] for name in first)


def test_weights_are_those_of_the_seed_and_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = (build_model(TrainConfig(seed=seed)) for seed in (7, 7, 8))
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(7)
    embedding = nn.Embedding(97, 128).weight
    positions = torch.randn(2, 128) / 128**0.5
    assert one.tok_emb.weight.equal(embedding)
    assert one.pos_emb.equal(positions)
    assert all(a.equal(b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not one.head.weight.equal(other.head.weight)


def test_the_encoder_reads_position_zero_and_ignores_nothing() -> None:
    model = Transformer(11, layers=1, d_model=8, heads=2, d_ff=12)
    a = torch.tensor([[3, 4]])
    for changed in ([[5, 4]], [[3, 5]]):
        assert not model(a).equal(model(torch.tensor(changed)))


@pytest.mark.parametrize(("sequence", "tokens"), [("a b =", 3), ("a op b =", 4)])
def test_decoders_read_the_last_token_causally(sequence: str, tokens: int) -> None:
    model = Transformer(11, layers=2, d_model=8, heads=2, d_ff=12, sequence=sequence)
    assert model.tok_emb.num_embeddings == 11 + tokens - 2
    assert model.pos_emb.shape == (tokens, 8)
    first, second = model.encoder.layers
    assert not first.linear1.weight.equal(second.linear1.weight)
    seen = []
    model.encoder.register_forward_hook(lambda _module, _args, output: seen.append(output))
    model(torch.tensor([[3, 4], [3, 5]]))
    before_b = tokens - 2  # a, or a and op: what stands before b does not see it
    torch.testing.assert_close(seen[0][0, :before_b], seen[0][1, :before_b])
    assert not seen[0][0, -1].allclose(seen[0][1, -1])
    assert model._tokens(torch.tensor([[3, 4]])).tolist() == [[3, 4, 11] if tokens == 3 else [3, 12, 4, 11]]


def test_without_layer_norm() -> None:
    model = Transformer(113, layers=1, d_ff=512, activation="relu", layer_norm=False, sequence="a b =")
    assert not any(isinstance(module, nn.LayerNorm) for module in model.modules())
    assert 0.9 < model.tok_emb.weight.std().item() * 128**0.5 < 1.1
    x = pairs(113)
    with torch.no_grad():
        torch.testing.assert_close(model.train()(x), model.eval()(x))


def test_the_mlp() -> None:
    model = MLP(7, layers=2, width=5)
    assert count(model) == 14 * 5 + 5 * 5 + 5 * 7
    x = pairs(7)
    one_hot = torch.zeros(9, 14)
    one_hot[torch.arange(9), x[:, 0]] = 1
    one_hot[torch.arange(9), 7 + x[:, 1]] = 1
    hidden = one_hot
    for layer in model.hidden:
        hidden = (hidden @ layer.weight.T).relu()
    torch.testing.assert_close(model(x), hidden @ model.head.weight.T)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_builds_and_has_a_gradient(preset: str) -> None:
    config = PRESETS[preset]
    assert config.preset == preset
    model = build_model(config)
    model(pairs(config.p)).logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
