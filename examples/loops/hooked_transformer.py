"""A HookedTransformer of TransformerLens on modular addition, as studies of mechanisms train it.

pip install "transformer-lens<4"
python examples/loops/hooked_transformer.py
"""

from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional
from transformer_lens import HookedTransformer, HookedTransformerConfig

import grokcurv as gc

P = 13


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    tokens, answers = batch
    return functional.cross_entropy(model(tokens)[:, -1].double(), answers)


def train(steps: int = 40, watch: Any = gc.attach) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"act_fn": "gelu", "normalization_type": None, "d_vocab": P + 1, "d_vocab_out": P}
    config = HookedTransformerConfig(n_layers=1, n_ctx=3, d_model=24, d_head=6, n_heads=4, d_mlp=48, seed=0, **settings)
    model = HookedTransformer(config, move_to_device=False)
    pairs = torch.cartesian_prod(torch.arange(P), torch.arange(P), torch.tensor([P]))
    batch = pairs, (pairs[:, 0] + pairs[:, 1]) % P
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1.0, betas=(0.9, 0.98))
    pca = gc.StreamingPCA(segments=gc.attention_segments(model))
    monitor = watch(model, loss_fn, optimizer, sampler=gc.subsample(batch, rows=64), every=4, pca=pca, pca_every=4)

    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    return model, monitor


def main(steps: int = 40) -> None:
    """Train for so many steps, and print what was measured."""
    print(train(steps)[1].records()[["step", "defect_median", "noise_floor", "rho"]].to_string(index=False))


if __name__ == "__main__":
    tyro.cli(main)
