"""The network of a run's settings, the way it is run, and its loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from grokcurv.flat import Segment, select_segments
from grokcurv.losses import cross_entropy64
from grokcurv.modular import fast
from grokcurv.modular.config import TrainConfig
from grokcurv.modular.model import MLP, Transformer
from grokcurv.runs import Run
from grokcurv.storage import RunError

Batch = tuple[Tensor, Tensor]
"""Pairs and answers."""

Forward = Callable[[Any, Tensor], Tensor]


def build_model(config: TrainConfig, seed: int | None = None) -> nn.Module:
    """The network of ``config`` on the CPU, its weights drawn from ``torch.manual_seed(seed)`` (default: the config's).

    The global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed if seed is None else seed)
        if config.architecture == "mlp":
            return MLP(config.p, layers=config.layers, width=config.d_model)
        return Transformer(
            config.p,
            layers=config.layers,
            d_model=config.d_model,
            heads=config.heads,
            d_ff=config.d_ff,
            activation=config.activation,
            layer_norm=config.layer_norm,
            sequence=config.sequence,
        )


def matrices(config: TrainConfig, model: nn.Module) -> tuple[Segment, ...]:
    """The matrices that Muon orthogonalises: those between the embeddings, or the one-hot numbers, and the head."""
    found = select_segments(model, "encoder.*weight" if config.architecture == "transformer" else "hidden.*")
    return tuple(segment for segment in found if len(segment.shape) == 2)


def load_model(run: Run, step: int | None = None) -> nn.Module:
    """The network of a run folder, on the CPU: at its latest checkpoint, or at a step among its snapshots.

    Raises:
        RunError: there is no such checkpoint or snapshot, it is damaged, or the settings are not those of its network.
    """
    weights = run.checkpoint() if step is None else {"model": run.snapshot(step)}
    try:
        model = build_model(TrainConfig(**run.config))
        model.load_state_dict(weights["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise RunError(f"{run.path}: its settings and its weights are not those of one network: {error}") from error
    return model


def forward_of(config: TrainConfig) -> Forward:
    """``forward(model, pairs)`` -> logits: a transformer by the shorter way, unless published digits are to be met."""
    if config.architecture == "transformer" and config.rng != "paper":
        return fast.logits
    return lambda model, pairs: model(pairs)


def training_loss(config: TrainConfig) -> Callable[[nn.Module, Batch], Tensor]:
    """``loss(model, (pairs, answers))``: the mean cross-entropy of ``config``'s run."""
    forward = forward_of(config)
    cross_entropy = cross_entropy64 if config.float64_logits else functional.cross_entropy
    return lambda model, batch: cross_entropy(forward(model, batch[0]), batch[1])
