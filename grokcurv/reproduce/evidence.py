"""What the claims are judged by: the runs, and what is measured afterwards at their checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from grokcurv.analysis import RandomBaseline, random_walk_pc1
from grokcurv.commutator import CommutatorProbe
from grokcurv.flat import attention_segments, flatten
from grokcurv.gradients import GradientEngine
from grokcurv.modular import TrainConfig, build_model
from grokcurv.modular.trainer import Training, threads_of, training_loss
from grokcurv.monitor import BASIS_COMPONENTS
from grokcurv.pca import StreamingPCA
from grokcurv.reproduce.plan import NEEDS
from grokcurv.runs import Run
from grokcurv.subspace import Subspace, alignment

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

Arithmetic = Literal["published", "trustworthy"]

PAIRS = 12
"""Commutators of a checkpoint, as many as the paper takes for alignments."""

DIRECTIONS = (1, 2, 3, 4, 6, 8)
"""Singular directions of a matrix in the bases whose dimension is varied; the paper's control takes three."""

WALKS = 200
"""Random walks behind a z-score."""


class Evidence:
    """The runs by set, and what became of them.

    Args:
        trials: by set; a set that the profile does not have is empty.
    """

    def __init__(self, trials: Mapping[str, Sequence[Trial]]) -> None:
        self.trials = {name: tuple(trials.get(name, ())) for names in NEEDS.values() for name in names}

    def __getitem__(self, name: str) -> tuple[Trial, ...]:
        """The finished runs of a set."""
        return tuple(trial for trial in self.trials[name] if trial.status == "finished")

    def of(self, claim: str) -> tuple[Trial, ...]:
        """All runs that the claim reads, whatever became of them."""
        return tuple(trial for name in NEEDS[claim] for trial in self.trials[name])

    def baseline(self, trial: Trial, name: str = "grokking") -> Trial | None:
        """The finished run of a set that has this one's operation and seed."""
        same = (trial.config.op, trial.config.seed)
        return next((other for other in self[name] if (other.config.op, other.config.seed) == same), None)


@dataclass(eq=False)
class Trial:
    """A run of the plan, as far as it has got."""

    id: str
    config: TrainConfig
    status: str
    """As :attr:`grokcurv.sweep.Sweep.runs` has it: finished, failed, pending, ..."""
    reason: str
    """Why it failed."""
    run: Run | None
    """None before it began."""

    @cached_property
    def records(self) -> pd.DataFrame:
        """Metrics and curvature, joined on ``step``; empty before it began."""
        import pandas as pd

        return pd.DataFrame({"step": []}) if self.run is None else self.run.records()

    @cached_property
    def trajectory(self) -> pd.Series:
        """PC1 % of everything up to each step, mean over the matrices, by step; empty without one."""
        import pandas as pd

        history = pd.DataFrame() if self.run is None else self.run.pca_history
        return pd.Series(dtype=float) if history.empty else history.groupby("step")["pc1_percent"].mean()

    @cached_property
    def snapshot(self) -> Snapshot:
        """What its last checkpoint has to say of commutators."""
        assert self.run is not None
        return take_snapshot(self.run)

    @cached_property
    def alignment(self) -> Mapping[Arithmetic, float]:
        """That of an update with commutators at its last checkpoint; the snapshot is not kept."""
        assert self.run is not None
        shot = take_snapshot(self.run)
        return {arithmetic: shot.alignment(arithmetic) for arithmetic in get_args(Arithmetic)}

    @cached_property
    def walks(self) -> pd.DataFrame:
        """Its matrices beside random walks, see :func:`compare_walks`."""
        assert self.run is not None
        return compare_walks(self.run)


@dataclass(frozen=True)
class Snapshot:
    """Commutators at the weights one update past a checkpoint, in both arithmetics, and what they are held against."""

    trustworthy: Tensor
    """(n, P): those of the pairs whose commutator can be told from rounding; n may be 0."""
    published: Tensor
    """(N, P): of all pairs, by the float32 formula."""
    step: Tensor
    """(P,) the update before."""
    trajectory: Subspace | None
    """Leading directions of each attention matrix's trajectory; None before there are any."""
    singular: Mapping[int, Subspace]
    """By their number per matrix, leading singular directions of the attention matrices themselves."""

    @property
    def size(self) -> int:
        """P."""
        return len(self.step)

    def ratios(
        self, arithmetic: Arithmetic, basis: Subspace, support: Literal["full", "matched"]
    ) -> NDArray[np.float64]:
        """(n,) share of each commutator inside a basis over its mean in random ones of as many dimensions.

        The random ones lie in R^P, or for ``matched`` within the coordinates on which the basis lives, where the share
        is then of the commutator's part there. NaN for a commutator of zeros.
        """
        delta = getattr(self, arithmetic)
        whole = delta
        if support == "matched":
            whole = torch.cat([delta[:, start : start + length] for start, length in basis.support], dim=1)
        norm = torch.linalg.vector_norm(whole, dim=1, dtype=torch.float64)
        ratios: NDArray[np.float64] = (basis.split(delta).parallel / norm / basis.random_baseline(support).mean).numpy()
        return ratios

    def rho(self, arithmetic: Arithmetic, basis: Subspace) -> NDArray[np.float64]:
        """(n,) share of each commutator outside a basis."""
        delta = getattr(self, arithmetic)
        rho: NDArray[np.float64] = (
            basis.split(delta).residual / torch.linalg.vector_norm(delta, dim=1, dtype=torch.float64)
        ).numpy()
        return rho

    def alignment(self, arithmetic: Arithmetic) -> float:
        """Mean |cos| of the update with the commutators over its exact mean for a random update; NaN without any."""
        cosines = alignment(self.step, getattr(self, arithmetic)).cosines
        return float(cosines.abs().nanmean() / RandomBaseline(1, self.size).mean)


def take_snapshot(run: Run, pairs: int = PAIRS) -> Snapshot:
    """Go on with a finished run by one update, in memory, and measure there.

    On one thread, with batches drawn from the run's seed, so that the same folder gives the same bits.

    Raises:
        RunError: no checkpoint, or a damaged one.
    """
    config = replace(TrainConfig(**run.config), measure_every=0)
    checkpoint = run.checkpoint()
    with threads_of(1):
        training = Training(config, None)
        training.load_state_dict(checkpoint, run.metrics)
        model = training.model
        before = flatten(model)
        training.update()
        theta = flatten(model)
        generator = torch.Generator().manual_seed(config.seed)
        data = training.data

        def batch() -> tuple[Tensor, Tensor]:
            rows = torch.randint(len(data.train_answers), (config.measure_rows,), generator=generator)
            return data.train_pairs[rows], data.train_answers[rows]

        drawn = [(batch(), batch()) for _ in range(pairs)]
        probe = CommutatorProbe(model, training_loss(replace(config, float64_logits=True)), eta=config.eta)
        stats = probe.measure(drawn, keep_delta=True)
        if not stats.reliable.all():
            stats = probe.measure(drawn, keep_delta=True, method="bracket")
        assert stats.delta is not None
        engine = GradientEngine(model, training_loss(config))
        published = torch.stack([_published_commutator(engine, theta, pair, config.eta) for pair in drawn])
        pca = _trajectory(checkpoint, model)
        known = pca is not None and pca.n_samples_seen_ > BASIS_COMPONENTS
        return Snapshot(
            stats.delta[stats.reliable],
            published,
            theta - before,
            Subspace.from_pca(pca, BASIS_COMPONENTS, size=len(theta)) if pca is not None and known else None,
            {k: Subspace.from_singular_vectors(model, k=k) for k in DIRECTIONS if k <= config.d_model},
        )


def compare_walks(run: Run) -> pd.DataFrame:
    """PC1 of each attention matrix beside that of random walks with steps as long as its own.

    Returns:
        ``matrix``; ``pc1_percent`` at the end of the run; ``walk_percent``, the mean of the walks; ``z``; ``p_value``.
        No rows where the run kept no trajectory of three rows.

    Raises:
        RunError: no checkpoint, or a damaged one.
    """
    import pandas as pd

    columns = ["matrix", "pc1_percent", "walk_percent", "z", "p_value"]
    pca = _trajectory(run.checkpoint(), build_model(TrainConfig(**run.config)))
    if pca is None or pca.n_samples_seen_ < 3:
        return pd.DataFrame(columns=columns)
    shares = pca.explained_variance_ratio_[:, 0].tolist()
    rows = []
    for segment, share, norms in zip(pca.segments or (), shares, pca.step_norms_.T, strict=True):
        null = random_walk_pc1(norms.numpy(), segment.length, trials=WALKS)
        rows.append((segment.name, 100 * share, 100 * null.mean, null.z_score(share), null.p_value(share)))
    return pd.DataFrame(rows, columns=columns)


def _published_commutator(engine: GradientEngine, theta: Tensor, pair: tuple[Any, Any], eta: float) -> Tensor:
    """(P,): two end points in the parameters' own precision, one subtracted from the other."""
    ends = []
    for order in (pair, pair[::-1]):
        point = theta
        for batch in order:
            point = point - eta * engine.gradient(point, batch, torch.empty_like(theta))
        ends.append(point)
    return ends[0] - ends[1]


def _trajectory(checkpoint: Mapping[str, Any], model: nn.Module) -> StreamingPCA | None:
    """The PCA in a checkpoint of a run that kept one."""
    monitor = checkpoint["monitor"]
    if monitor is None or monitor["pca"] is None:
        return None
    pca = StreamingPCA(segments=attention_segments(model))
    pca.load_state_dict(monitor["pca"])
    return pca
