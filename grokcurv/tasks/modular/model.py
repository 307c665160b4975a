"""The networks that learn modular arithmetic."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Sequence = Literal["a b", "a b =", "a op b ="]
Activation = Literal["gelu", "relu"]

SEQUENCES: dict[str, int] = {"a b": 2, "a b =": 3, "a op b =": 4}
"""What a transformer reads, and how many tokens that is."""


class Transformer(nn.Module):
    """A transformer that answers ``a op b`` modulo p.

    With ``sequence="a b"`` it is the encoder of Xu (arXiv 2602.16746): learned positions drawn from N(0, 1/d), pre-norm
    layers with biases that all start equal (``nn.TransformerEncoder`` copies the first), answer read at position 0.
    Submodules are constructed in that paper's order, so that the same seed gives the same weights.

    The other two sequences end in an ``=`` token and make it a decoder: attention is causal, the answer is read at
    the last position, and the layers start independent of each other.

    >>> model = Transformer(7, layers=1, d_model=8, heads=2, d_ff=16)
    >>> model(torch.tensor([[3, 4], [5, 6]])).shape
    torch.Size([2, 7])

    Args:
        p: modulus; also the number of classes.
        layer_norm: ``False`` drops every LayerNorm and draws token embeddings from N(0, 1/d), which keeps the
            residual stream at the scale the layers expect.
    """

    mask: Tensor

    def __init__(
        self,
        p: int = 97,
        *,
        layers: int = 2,
        d_model: int = 128,
        heads: int = 4,
        d_ff: int = 256,
        activation: Activation = "gelu",
        layer_norm: bool = True,
        sequence: Sequence = "a b",
    ) -> None:
        super().__init__()
        self.p, self.sequence = p, sequence
        length = SEQUENCES[sequence]
        self.decoder = sequence != "a b"

        def layer() -> nn.TransformerEncoderLayer:
            one = nn.TransformerEncoderLayer(
                d_model, heads, d_ff, dropout=0.0, activation=activation, batch_first=True, norm_first=True
            )
            if not layer_norm:
                for name in ("norm1", "norm2"):
                    setattr(one, name, nn.Identity())
                one.activation_relu_or_gelu = 0  # keeps eval() off torch's fused path, which needs the norms
            return one

        self.tok_emb = nn.Embedding(p + length - 2, d_model)
        self.pos_emb = nn.Parameter(torch.randn(length, d_model) / math.sqrt(d_model))
        self.encoder = nn.TransformerEncoder(layer(), layers, enable_nested_tensor=False)
        self.ln = nn.LayerNorm(d_model) if layer_norm else nn.Identity()
        self.head = nn.Linear(d_model, p)
        if self.decoder:
            for i in range(1, layers):
                self.encoder.layers[i] = layer()
        if not layer_norm:
            with torch.no_grad():
                self.tok_emb.weight.div_(math.sqrt(d_model))
        self.register_buffer("mask", torch.ones(length, length, dtype=torch.bool).triu(1), persistent=False)

    def forward(self, pairs: Tensor) -> Tensor:
        """(n, 2) int64 numbers below p -> (n, p) logits."""
        x = self.tok_emb(self._tokens(pairs)) + self.pos_emb
        x = self.encoder(x, mask=self.mask if self.decoder else None)
        logits: Tensor = self.head(self.ln(x[:, -1 if self.decoder else 0]))
        return logits

    def _tokens(self, pairs: Tensor) -> Tensor:
        """(B, tokens) what the network reads of pairs (B, 2)."""
        if not self.decoder:
            return pairs
        a, b = pairs.unbind(1)
        equals, operator = torch.full_like(a, self.p), torch.full_like(a, self.p + 1)
        return torch.stack([a, b, equals] if self.sequence == "a b =" else [a, operator, b, equals], 1)


class MLP(nn.Module):
    """A fully connected ReLU network without biases on the two one-hot numbers, side by side.

    The network of Prieto et al. (arXiv 2501.04697).

    >>> model = MLP(7, layers=1, width=8)
    >>> sum(parameter.numel() for parameter in model.parameters())  # (2 p + p) width
    168
    >>> model(torch.tensor([[3, 4], [5, 6]])).shape
    torch.Size([2, 7])

    Args:
        p: modulus; also the number of classes.
        layers: number of hidden layers.
        width: of each hidden layer.
    """

    def __init__(self, p: int = 113, *, layers: int = 2, width: int = 200) -> None:
        super().__init__()
        self.p = p
        sizes = [2 * p, *[width] * layers]
        self.hidden = nn.ModuleList(nn.Linear(m, n, bias=False) for m, n in pairwise(sizes))
        self.head = nn.Linear(width, p, bias=False)

    def forward(self, pairs: Tensor) -> Tensor:
        """(n, 2) int64 numbers below p -> (n, p) logits."""
        x = functional.one_hot(pairs, self.p).flatten(1).to(self.head.weight.dtype)
        for layer in self.hidden:
            x = functional.relu(layer(x))
        logits: Tensor = self.head(x)
        return logits
