"""Settings of a modular-arithmetic run, and the presets of the literature."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

from grokcurv.commutator import RENAMED, Design, Method, current_method
from grokcurv.interventions import Direction
from grokcurv.measures import measure_names
from grokcurv.measures.commutator import CHECK_EVERY
from grokcurv.tasks.modular.model import Activation, Sequence
from grokcurv.tasks.modular.operations import check_operation, train_size

Preset = Literal["paper", "paper-slow", "power", "nanda", "prieto"]
Architecture = Literal["transformer", "mlp"]
Rng = Literal["philox", "paper", "torch"]
OptimizerName = Literal["adamw", "sgd", "muon"]
InterventionKind = Literal["none", "project", "project-update", "kick", "noise"]
Basis = Literal["oracle", "causal", "random", "matched"]

MEASURE_ROWS = 512
"""Rows of a measurement's batch where training uses the full batch (or all of them, if they are fewer)."""


CHANGEABLE = ("steps", "steps_after_grok", "checkpoint_every", "snapshot_every", "threads")
"""Settings that may be others when a run is resumed: how far it goes, what it stores, on how many threads."""


@dataclass(frozen=True)
class TaskSettings:
    """What is learnt."""

    op: str = "add"
    """Operation: one of add, sub, mul, x2_y2, x2_xy_y2, x3_xy, div."""
    p: int = 97
    """Modulus; prime for div."""
    train_fraction: float = 0.5
    """Share of the pairs that train."""
    seed: int = 42
    """Of everything random in the run; 0 to 2^32 - 1."""
    rng: Rng = "philox"
    """philox: split, batches and measurements are functions of seed and step alone, so that neither measuring nor other
    runs beside this one change anything. paper: the draws of the paper's code in its order; measurements share the
    stream of the training batches, and the network runs as the module itself, to meet published digits; otherwise a
    transformer runs by a shorter way. torch: of older versions, whose folders are read, but not gone on with."""


@dataclass(frozen=True)
class NetworkSettings:
    """The network."""

    architecture: Architecture = "transformer"
    """Kind of network."""
    layers: int = 2
    """Layers of the transformer, or hidden layers of the MLP."""
    d_model: int = 128
    """Width of the residual stream, or of the MLP's hidden layers."""
    heads: int = 4
    """Attention heads."""
    d_ff: int = 256
    """Width of the transformer's feed-forward layers."""
    activation: Activation = "gelu"
    """Of the transformer's feed-forward layers."""
    layer_norm: bool = True
    """Whether the transformer has LayerNorms."""
    sequence: Sequence = "a b"
    """What the transformer reads; with an = it is a causal decoder."""


@dataclass(frozen=True)
class OptimizerSettings:
    """How it is trained."""

    optimizer: OptimizerName = "adamw"
    """AdamW; SGD with momentum, whose decay is part of the gradient; or Muon on the matrices between the embeddings and
    the head, with AdamW on everything else."""
    lr: float = 1e-3
    """Learning rate; of Muon, that of its matrices."""
    weight_decay: float = 1.0
    """Of the optimiser, on every parameter."""
    beta1: float = 0.9
    """Of AdamW."""
    beta2: float = 0.98
    """Of AdamW."""
    momentum: float = 0.95
    """Of SGD and Muon."""
    nesterov: bool = True
    """Whether SGD and Muon look ahead along the momentum."""
    adamw_lr: float = 1e-3
    """Learning rate of what Muon leaves to AdamW."""
    warmup: int = 0
    """Steps over which the learning rate rises linearly."""
    float64_logits: bool = False
    """Whether training takes its cross-entropy of float64 logits, as measurements on pairs of their own always do."""
    clip: float = 1.0
    """Largest gradient norm; 0 does not clip."""
    batch_size: int = 512
    """Rows per step, drawn with replacement; 0 takes the whole training set."""


@dataclass(frozen=True)
class LengthSettings:
    """How long, and when it has settled."""

    steps: int = 20_000
    """Updates at most."""
    eval_every: int = 100
    """Steps between evaluations on the whole of both sets."""
    grok_threshold: float = 0.98
    """Test accuracy with which the run settles."""
    grok_patience: int = 3
    """Evaluations in a row that must reach it; the run has settled at the last of them."""
    steps_after_grok: int = 1000
    """The run ends this many steps after it has settled."""


@dataclass(frozen=True)
class MeasurementSettings:
    """What is measured, and when."""

    method: Method = "difference"
    """How the commutator is computed."""
    eta: float = 1e-3
    """Step length of the commutator."""
    pairs: int = 5
    """Pairs of batches per measurement."""
    design: Design = "independent"
    """Whether the pairs of a measurement share no batch, or each one the batch of the one before: 3 n + 1 gradients
    instead of 4 n."""
    successive: bool = False
    """Measure the batch of this step against that of the next, and take training's own gradient for the first of the
    four: for a measurement at every step. Needs pairs = 1."""
    alignment: bool = False
    """Set the last training step beside the commutators of every measurement."""
    anatomy: bool = False
    """Record the two products of every bracket, and what they are along the gradients."""
    measure_every: int = 100
    """Steps between measurements; 0 measures nothing and keeps no PCA."""
    pca_every: int = 100
    """Steps between rows of the trajectory's PCA; 0 keeps none."""
    check_every: int = CHECK_EVERY
    """Steps after which a measurement makes the float64 evaluations behind its noise floor anew; 1 for all of them."""
    measures: str = ""
    """What is recorded besides commutators, with commas between names: update_gram, update_decomposition,
    optimizer_commutator, hessian_edges, weight_spectra, gradient_noise (docs/measures.md)."""
    update_window: int = 10
    """Updates in the window of update_gram."""
    update_every: int = 1
    """Steps of each update of update_gram and weight_spectra."""


@dataclass(frozen=True)
class InterventionSettings:
    """What is done to training."""

    intervention: InterventionKind = "none"
    """What is done to training: project damps the gradient outside the basis and project-update the whole step, kick
    pushes the weights along a commutator, noise in a random direction, both outside the basis (docs/interventions.md).
    """
    strength: float = 0.0
    """Of the intervention: s of a projection, 0 to 1; length of a kick in gradient steps, or of the noise; 0: none."""
    direction: Direction = "commutator"
    """Of a kick: along the fresh commutator, or random and orthogonal to it, with equal length."""
    basis: Basis = "causal"
    """Of the intervention: the run's own basis so far; the oracle, which is that of the finished run in basis_from; a
    random one of equal rank; or one matched to the oracle, with as many random directions in each of its matrices."""
    basis_from: str = ""
    """Folder of the run whose basis.safetensors is the oracle."""
    intervene_from: int = 500
    """Step of the first intervention."""
    intervene_every: int = 1
    """Steps between interventions."""
    intervene_times: int = 0
    """Interventions at most; 0: to the end."""
    faithful: bool = False
    """Kick as published: between backward and step, leaving another gradient in .grad; with the paper's draws, its
    batches come from the training stream."""


@dataclass(frozen=True)
class StorageSettings:
    """Where it runs, and what is stored when."""

    checkpoint_every: int = 500
    """Steps between checkpoints."""
    snapshot_every: int = 0
    """Steps between snapshots, the weights alone, which are all kept; 0 takes none. Needs a run folder."""
    device: str = "cpu"
    """Where to train."""
    threads: int = 0
    """CPU threads while the run lasts; 0 leaves torch's."""
    compile: bool = False
    """Whether gradients of several runs that are one batched program go through torch.compile; others never do."""


@dataclass(frozen=True)
class TrainConfig(
    StorageSettings,
    InterventionSettings,
    MeasurementSettings,
    LengthSettings,
    OptimizerSettings,
    NetworkSettings,
    TaskSettings,
):
    """One run. The defaults are the paper's fast regime (Xu, arXiv 2602.16746).

    Its settings are those of its bases, the last one's first.

    >>> config = TrainConfig(op="mul", steps=100)
    >>> config.p, config.lr, config.weight_decay
    (97, 0.001, 1.0)
    """

    preset: Preset = "paper"
    """Name of the preset these settings started from; on the command line, the one to start from."""

    def __post_init__(self) -> None:
        """Check every setting.

        Raises:
            ValueError: naming the setting, what it was and what it can be.
        """
        if self.method in RENAMED:
            object.__setattr__(self, "method", current_method(self.method))
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {getattr(self, name)!r}")
        for names, holds, wanted in RANGES:
            for name in names:
                if not holds(getattr(self, name)):
                    raise ValueError(f"{name} must {wanted}; got {getattr(self, name)}")
        if self.d_model % self.heads and self.architecture == "transformer":
            raise ValueError(f"d_model must be a multiple of heads; got {self.d_model} and {self.heads}")
        if self.successive and (self.pairs != 1 or self.batch_size == 0):
            raise ValueError(
                "successive measures one pair, this step's batch and the next one's: it needs pairs = 1 and a "
                f"batch_size above 0; got {self.pairs} and {self.batch_size}"
            )
        if measure_names(self.measures) and not self.measure_every:
            raise ValueError("measures are recorded with commutators: they need measure_every above 0; got 0")
        self._check_intervention()
        if self.batch_size > self.train_rows:
            raise ValueError(
                f"batch_size is larger than the training set: {self.batch_size} of {self.train_rows} rows; "
                "0 takes the whole set"
            )

    def _check_intervention(self) -> None:
        """Raise a ValueError if settings of the intervention do not go together."""
        projects = self.intervention in ("project", "project-update")
        if projects and self.strength > 1:
            raise ValueError(f"strength of a projection must lie in [0, 1]; got {self.strength}")
        if projects and self.basis == "causal" and not (self.measure_every and self.pca_every):
            raise ValueError(
                "basis 'causal' is that of the run's own PCA: it needs measure_every and pca_every above 0; "
                f"got {self.measure_every} and {self.pca_every}"
            )
        if self.intervention != "none" and self.basis != "causal" and not self.basis_from:
            raise ValueError(f"basis {self.basis!r} needs basis_from, the folder of the run whose basis is the oracle")
        if self.faithful and self.intervention != "kick":
            raise ValueError(f"faithful is for intervention 'kick'; got {self.intervention!r}")

    @property
    def train_rows(self) -> int:
        """Rows of the training set."""
        return train_size(check_operation(self.op, self.p).size(self.p), self.train_fraction)

    @property
    def measure_rows(self) -> int:
        """Rows of a batch drawn for a measurement."""
        return self.batch_size or min(MEASURE_ROWS, self.train_rows)


SECTIONS = TrainConfig.__bases__[::-1]
"""The settings in groups."""

CHOICES = {name: get_args(hint) for name, hint in get_type_hints(TrainConfig).items() if get_origin(hint) is Literal}
"""By setting, what it can be, where that is one of a few words."""

POSITIVE = (
    *("layers", "d_model", "heads", "d_ff"),
    *("eval_every", "grok_patience", "pairs", "check_every", "intervene_every", "checkpoint_every", "update_every"),
)
NOT_NEGATIVE = (
    *("warmup", "steps", "batch_size", "steps_after_grok", "measure_every", "pca_every"),
    *("intervene_from", "intervene_times", "snapshot_every", "threads"),
)

RANGES: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (POSITIVE, lambda x: x >= 1, "be at least 1"),
    (NOT_NEGATIVE, lambda x: x >= 0, "be at least 0"),
    (POSITIVE + NOT_NEGATIVE, lambda x: x < 2**63, "be below 2^63"),  # more than torch can count
    (("update_window",), lambda x: 3 <= x < 2**63, "be at least 3"),
    (("threads",), lambda x: x <= 1024, "be at most 1024"),  # more end the process, where the system has no room
    (("lr", "eta", "adamw_lr"), lambda x: 0 < x < math.inf, "be a positive number"),
    (("weight_decay", "clip", "grok_threshold", "strength"), lambda x: 0 <= x < math.inf, "be a number, not negative"),
    (("beta1", "beta2", "momentum"), lambda x: 0 <= x < 1, "lie in [0, 1)"),
    (("seed",), lambda x: 0 <= x < 2**32, "lie between 0 and 2^32 - 1"),
)
"""Settings that are numbers, when one is in order, and the words for that."""

PRESETS: dict[Preset, TrainConfig] = {
    "paper": TrainConfig(),
    "paper-slow": TrainConfig(
        preset="paper-slow",
        lr=5e-5,
        weight_decay=0.1,
        beta2=0.999,
        layers=3,
        steps=800_000,
        eval_every=500,
        measure_every=1000,
        pca_every=2000,
        checkpoint_every=5000,
    ),
    "power": TrainConfig(
        preset="power",
        op="div",
        warmup=10,
        clip=0.0,
        d_ff=512,
        activation="relu",
        sequence="a op b =",
        steps=100_000,
        checkpoint_every=1000,
    ),
    "nanda": TrainConfig(
        preset="nanda",
        p=113,
        warmup=10,
        clip=0.0,
        batch_size=0,
        train_fraction=0.3,
        layers=1,
        d_ff=512,
        activation="relu",
        layer_norm=False,
        sequence="a b =",
        steps=40_000,
    ),
    "prieto": TrainConfig(
        preset="prieto",
        p=113,
        lr=5e-4,
        weight_decay=0.0,
        beta2=0.99,
        clip=0.0,
        batch_size=0,
        train_fraction=0.4,
        architecture="mlp",
        d_model=200,
    ),
}
"""Settings to start from: ``dataclasses.replace(PRESETS["nanda"], seed=1)``.

* ``paper`` and ``paper-slow``: Xu, arXiv 2602.16746, the fast and the slow regime. The slow one is evaluated,
  measured and stored less often, to keep 800 000 steps within memory.
* ``power``: Power et al., arXiv 2201.02177: a decoder of two layers on ``a op b =``. Ours normalises before each
  sub-layer where theirs does after, learns positions where theirs are sinusoids, keeps the biases, and scores the
  answer alone where theirs also scores the end of the sequence.
* ``nanda``: Nanda et al., arXiv 2301.05217: one layer, full batch, no LayerNorm. Ours keeps the biases of attention
  and of the head, and takes torch's initialisation for the linear maps.
* ``prieto``: Prieto et al., arXiv 2501.04697: a bias-free MLP, full batch, no weight decay: in float32 it stops
  learning before it groks, because its cross-entropy loses the last digits. AdamW's epsilon is torch's, 1e-8,
  where theirs is 1e-25.
"""
