"""The transformer's logits with less arithmetic: nothing is computed twice, and nothing that nobody reads.

A batch holds few distinct tokens, so what depends on one token at one position alone (its embedding, the first
LayerNorm, the first projections to queries, keys and values) is computed once for each and gathered per sample. The
answer is read at one position, so the last layer attends from there alone, and its feed-forward part sees only that.
Values and gradients are the module's up to rounding: the sums are the same, their order is not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from grokcurv.tasks.modular.model import Transformer


def logits(model: Transformer, pairs: Tensor) -> Tensor:
    """``model(pairs)``, (n, 2) int64 numbers below p -> (n, p), by the shorter way.

    The parameters are read from ``model``, so :func:`torch.func.functional_call` on it, or on a module that holds it,
    can replace them.
    """
    tokens = model._tokens(pairs)
    length = tokens.shape[1]
    read = length - 1 if model.decoder else 0
    layers = list(model.encoder.layers)

    # Row i * vocabulary + token of a table is that token at position i.
    table = (model.tok_emb.weight + model.pos_emb[:, None]).flatten(0, 1)
    rows = tokens + model.tok_emb.num_embeddings * torch.arange(length, device=tokens.device)
    first, d = layers[0].self_attn, table.shape[-1]
    projected = functional.linear(layers[0].norm1(table), first.in_proj_weight, first.in_proj_bias)
    x, qkv = functional.embedding(rows, table), functional.embedding(rows, projected)

    for layer in layers:
        attention, last = layer.self_attn, layer is layers[-1]
        wanted = slice(read, read + 1) if last else slice(None)
        if layer is layers[0]:
            query, key, value = qkv[:, wanted, :d], qkv[..., d : 2 * d], qkv[..., 2 * d :]
        else:
            weight, bias, normed = attention.in_proj_weight, attention.in_proj_bias, layer.norm1(x)
            query = functional.linear(normed[:, wanted], weight[:d], bias[:d])
            key, value = functional.linear(normed, weight[d:], bias[d:]).chunk(2, -1)
        # What is read in the end sees every position, so that a decoder needs no mask for it.
        mask = model.mask if model.decoder and not last else None
        query, key, value = (part.unflatten(-1, (attention.num_heads, -1)) for part in (query, key, value))
        mixed = _attend(query, key, value, mask)
        x = x[:, wanted] + attention.out_proj(mixed.flatten(2))
        x = x + layer.linear2(layer.activation(layer.linear1(layer.norm2(x))))
    answer: Tensor = model.head(model.ln(x[:, 0]))
    return answer


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of (n, I, heads, d) queries on (n, J, heads, d) keys and values, entry by entry.

    For the two to four positions here that takes a fraction of the time of kernels made for long sequences. Of two
    positions, the soft-max is the logistic function of the difference of their scores.
    """
    if key.shape[1] == 2 and mask is None:
        (k, other_k), (v, other_v) = key.split(1, 1), value.split(1, 1)
        weight = ((query * (k - other_k)).sum(-1, keepdim=True) / math.sqrt(query.shape[-1])).sigmoid()
        return torch.lerp(other_v, v, weight)
    scores = (query[:, :, None] * key[:, None]).sum(-1) / math.sqrt(query.shape[-1])  # (n, I, J, heads)
    if mask is not None:
        scores = scores.masked_fill(mask[:, :, None], -math.inf)
    return (scores.softmax(2)[..., None] * value[:, None]).sum(2)
