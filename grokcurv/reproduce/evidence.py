"""What the claims are judged by: the runs, and what is measured afterwards at their snapshots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from grokcurv.analysis import RandomBaseline, alignment_p_value, grok_step, phases, random_walk_pc1, settled_step
from grokcurv.bench import naive
from grokcurv.commutator import CommutatorProbe
from grokcurv.flat import attention_segments, flatten
from grokcurv.measures.trajectory import BASIS_COMPONENTS
from grokcurv.pca import StreamingPCA
from grokcurv.reproduce.plan import ASKED_FOR, NEEDS
from grokcurv.reproduce.rules import GROKKED
from grokcurv.runs import Run
from grokcurv.subspace import Subspace, alignment
from grokcurv.training import TrainConfig, build_model, load_model
from grokcurv.training.draws import order_of
from grokcurv.training.network import task_of
from grokcurv.training.process import threads_of

Arithmetic = Literal["published", "trustworthy"]
Support = Literal["full", "matched"]

LONG = [name for claim in ASKED_FOR for name in NEEDS[claim]]
"""Sets of runs that are read as far as they are."""

PAIRS = 12
"""Commutators of a snapshot, as many as the paper takes for alignments."""

DIRECTIONS = (1, 2, 3, 4, 6, 8)
"""Singular directions of a matrix in the bases whose dimension is varied; the paper's control takes three."""

WALKS = 200
"""Random walks behind a z-score."""

WALKED = ["matrix", "pc1_percent", "walk_percent", "z", "p_value"]
"""Columns of :func:`compare_walks`."""


class Evidence:
    """The runs by set, and what became of them.

    Args:
        trials: by set; a set that the profile does not have is empty.
    """

    def __init__(self, trials: Mapping[str, Sequence[Trial]]) -> None:
        self.trials = {name: tuple(trials.get(name, ())) for names in NEEDS.values() for name in names}

    def __getitem__(self, name: str) -> tuple[Trial, ...]:
        """The finished runs of a set; of one that takes a day, also those that have got somewhere."""

        def counts(trial: Trial) -> bool:
            begun = name in LONG and trial.status in ("running", "interrupted") and "test_acc" in trial.records
            return trial.status == "finished" or begun

        return tuple(filter(counts, self.trials[name]))

    def of(self, claim: str) -> tuple[Trial, ...]:
        """All runs that the claim reads, whatever became of them."""
        return tuple(trial for name in NEEDS[claim] for trial in self.trials[name])

    def pairs(self, name: str) -> list[Pair]:
        """The finished runs of a set that have a baseline, each with it.

        That is the finished run of the set ``grokking`` that has the same operation and seed, the first if several do.
        """
        baselines = {(trial.config.op, trial.config.seed): trial for trial in reversed(self["grokking"])}
        found = ((trial, baselines.get((trial.config.op, trial.config.seed))) for trial in self[name])
        return [(trial, baseline) for trial, baseline in found if baseline is not None]


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
        return pd.DataFrame({"step": []}) if self.run is None else self.run.records()

    @cached_property
    def grok(self) -> int | None:
        """Its grok step."""
        return grok_step(self.records, GROKKED)

    def defects(self, arithmetic: Arithmetic) -> pd.DataFrame:
        """Its records with the defect by one arithmetic in ``defect_median``, and nothing that cannot be trusted."""
        records = self.records
        defect: pd.Series | float = math.nan
        if "defect_median" in records:
            trusted = records["defect_median"].where(records["reliable"].eq(True))
            defect = records["reference_median"] if arithmetic == "published" else trusted
        return records[["step", "train_acc", "test_acc"]].assign(defect_median=defect)

    @cached_property
    def trajectory(self) -> pd.Series:
        """PC1 % of everything up to each step, mean over the matrices, by step; empty without one."""
        history = pd.DataFrame() if self.run is None else self.run.pca_history
        return pd.Series(dtype=float) if history.empty else history.groupby("step")["pc1_percent"].mean()

    @cached_property
    def end(self) -> int | None:
        """The step at which it had grokked by its own settings, where the published runs end; None if it never did."""
        threshold, patience = self.config.grok_threshold, self.config.grok_patience
        can = "test_acc" in self.records and 0 < threshold <= 1
        return settled_step(self.records, threshold, patience) if can else None

    @cached_property
    def snapshot(self) -> Snapshot | None:
        """Commutators at the middle one of its snapshots in the phase of memorisation; None if there is none."""
        if self.run is None:
            return None
        memorised = set(self.records["step"][phases(self.records) == "memorisation"])
        steps = [step for step in self.run.snapshots if step in memorised]
        return take_snapshot(self.run, steps[len(steps) // 2]) if steps else None

    @cached_property
    def alignments(self) -> Mapping[Arithmetic, tuple[AlignmentTest, ...]]:
        """Of the displacements between the paper's four checkpoints, each with the commutators at its end; none if it
        did not grok."""
        found: dict[Arithmetic, tuple[AlignmentTest, ...]] = {"published": (), "trustworthy": ()}
        if self.run is not None:
            for since, step in pairwise(paper_checkpoints(self.records, self.run.snapshots)):
                shot = take_snapshot(self.run, step, since)  # not kept: it has 24 vectors of P
                for arithmetic in found:
                    found[arithmetic] += (shot.alignment(arithmetic),)
        return found

    @cached_property
    def walks(self) -> pd.DataFrame:
        """Its matrices beside random walks up to :attr:`end`, see :func:`compare_walks`."""
        assert self.run is not None
        return compare_walks(self.run, self.end)


Pair = tuple[Trial, Trial]
"""A run and its baseline."""


class AlignmentTest(NamedTuple):
    """How a displacement of the weights is aligned with commutators."""

    ratio: float
    """Mean |cos| over its mean for a random direction; NaN without commutators."""
    p_value: float
    """Probability that a random direction is as aligned."""


@dataclass(frozen=True)
class Snapshot:
    """Commutators at a snapshot of the weights, in both arithmetics, and what they are held against."""

    trustworthy: Tensor
    """(n, P): those of the pairs whose commutator can be told from rounding; n may be 0."""
    published: Tensor
    """(N, P): of all pairs, by the float32 formula."""
    displacement: Tensor
    """(P,) of the weights, since an earlier snapshot."""
    trajectory: Subspace | None
    """Leading directions of each attention matrix's trajectory; None before there are any."""
    singular: Mapping[int, Subspace]
    """By their number per matrix, leading singular directions of the attention matrices themselves."""

    @property
    def size(self) -> int:
        """P."""
        return len(self.displacement)

    def ratios(self, arithmetic: Arithmetic, basis: Subspace, support: Support) -> NDArray[np.float64]:
        """(n,) share of each commutator inside a basis over its mean in random ones of as many dimensions.

        The random ones lie in R^P, or for ``matched`` within the coordinates on which the basis lives, where the share
        is then of the commutator's part there. NaN for a commutator of zeros.
        """
        delta = getattr(self, arithmetic)
        parts = [delta[:, start : start + length] for start, length in basis.support]
        whole = torch.cat(parts, dim=1) if support == "matched" else delta
        shares = basis.split(delta).parallel / _lengths(whole)
        return np.asarray(shares / basis.random_baseline(support).mean)

    def rho(self, arithmetic: Arithmetic, basis: Subspace) -> NDArray[np.float64]:
        """(n,) share of each commutator outside a basis."""
        delta = getattr(self, arithmetic)
        return np.asarray(basis.split(delta).residual / _lengths(delta))

    def alignment(self, arithmetic: Arithmetic) -> AlignmentTest:
        """That of the displacement with the commutators; those of zeros left out."""
        delta = getattr(self, arithmetic)
        delta = delta[delta.any(1)]
        if not len(delta):
            return AlignmentTest(math.nan, math.nan)
        found = alignment(self.displacement, delta)
        mean = float(found.cosines.abs().mean())
        p_value = alignment_p_value(mean, found.correlations.numpy(), self.size)
        return AlignmentTest(mean / RandomBaseline(1, self.size).mean, p_value)


def paper_checkpoints(records: pd.DataFrame, snapshots: Sequence[int]) -> tuple[int, ...]:
    """The snapshots next to the paper's four checkpoints; fewer where one is next to two, none without grokking.

    Step 200, or a twentieth of the run if that is later; when the training accuracy reaches 0.95; at 85 % of the grok
    step (test accuracy 0.9); 500 steps after it.
    """
    grok, memorised = grok_step(records, GROKKED), np.flatnonzero(records["train_acc"] >= 0.95)
    if grok is None or not memorised.size or not snapshots:
        return ()
    wanted = (max(200, 0.05 * snapshots[-1]), records["step"].iloc[memorised[0]], 0.85 * grok, grok + 500)
    return tuple(dict.fromkeys(min(snapshots, key=lambda step, at=at: abs(step - at)) for at in wanted))  # type: ignore[misc]


def take_snapshot(run: Run, step: int, since: int = 0, pairs: int = PAIRS) -> Snapshot:
    """Measure a run at one of its snapshots.

    On one thread, with batches drawn from the run's seed, so that the same folder gives the same bits.

    Args:
        run: a run with snapshots.
        step, since: two of them; the second is where the displacement begins.
        pairs: of batches.

    Raises:
        RunError: a snapshot that is not there, or damaged.
    """
    config = TrainConfig(**run.config)
    with threads_of(1):
        task = task_of(config)
        data = task.split(order_of(config, task.size))
        before, model = flatten(load_model(run, since)), load_model(run, step)
        theta = flatten(model)
        generator = torch.Generator().manual_seed(config.seed)

        def batch() -> tuple[Tensor, Tensor]:
            rows = torch.randint(len(data.train_answers), (config.measure_rows,), generator=generator)
            return data.train_pairs[rows], data.train_answers[rows]

        drawn = [(batch(), batch()) for _ in range(pairs)]
        probe = CommutatorProbe(model, task.measured_loss, eta=config.eta)
        stats = probe.measure(drawn, keep_delta=True)
        if not stats.reliable.all():
            stats = probe.measure(drawn, keep_delta=True, method="bracket")
        assert stats.delta is not None
        published = torch.stack([naive.commutator(model, task.loss, pair, config.eta)[1] for pair in drawn])
        return Snapshot(
            stats.delta[stats.reliable],
            published,
            theta - before,
            _trajectory_basis(run, step),
            {k: Subspace.from_singular_vectors(model, k=k) for k in DIRECTIONS if k <= config.d_model},
        )


def compare_walks(run: Run, until: int | None = None) -> pd.DataFrame:
    """PC1 of each attention matrix beside that of random walks with steps as long as its own.

    Args:
        run: a run that kept a trajectory.
        until: the step at which the trajectory ends; the run's last if None.

    Returns:
        ``matrix``; ``pc1_percent`` at the end of the trajectory; ``walk_percent``, the mean of the walks; ``z``;
        ``p_value``. No rows where there is no trajectory of three rows, or one that is not kept whole: one of more
        than 500.

    Raises:
        RunError: no checkpoint, or a damaged one.
    """
    monitor, history = run.checkpoint()["monitor"], run.pca_history
    if len(history):
        history = history.pivot(index="step", columns="matrix", values="pc1_percent").loc[:until]
    if len(history) < 3:
        return pd.DataFrame(columns=WALKED)
    pca = StreamingPCA(segments=attention_segments(build_model(TrainConfig(**run.config))))
    pca.load_state_dict(monitor["pca"])
    if pca.method_ != "gram":
        return pd.DataFrame(columns=WALKED)
    rows = []
    for segment, norms in zip(pca.segments or (), pca.step_norms_[: len(history) - 1].T, strict=True):
        null = random_walk_pc1(norms.numpy(), segment.length, trials=WALKS)
        percent = float(history[segment.name].iloc[-1])
        share = percent / 100
        rows.append((segment.name, percent, 100 * null.mean, null.z_score(share), null.p_value(share)))
    return pd.DataFrame(rows, columns=WALKED)


def _lengths(rows: Tensor) -> Tensor:
    """(n,) float64."""
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return lengths


def _trajectory_basis(run: Run, step: int) -> Subspace | None:
    """Leading directions of each attention matrix over the snapshots so far; None before they span them."""
    models = (load_model(run, at) for at in run.snapshots if at <= step)
    first = next(models)
    pca = StreamingPCA(segments=attention_segments(first)).partial_fit(flatten(first)[None])
    for model in models:
        pca.partial_fit(flatten(model)[None])
    enough = pca.n_samples_seen_ > BASIS_COMPONENTS
    return Subspace.from_pca(pca, BASIS_COMPONENTS, size=flatten(first).numel()) if enough else None
