"""The trajectory of the parameters: its principal components, and the execution basis they span."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grokcurv.commutator import CommutatorProbe
from grokcurv.device_buffer import is_asynchronous
from grokcurv.pca import StreamingPCA
from grokcurv.subspace import RandomBaseline, Subspace

if TYPE_CHECKING:
    import pandas as pd

BASIS_COMPONENTS = 2
"""Directions per segment in the execution basis (Xu, arXiv 2602.16746)."""


class Trajectory:
    """The PCA of each run's trajectory; its leading two directions per segment are the execution basis.

    The basis is made when somebody asks for it after a feed, not at every feed, and goes to the probe.

    Args:
        probe: what measures the runs, and projects on their bases.
        pcas: for each run what is fed with its parameters; ``method="sketch"`` has no basis.

    Attributes:
        baselines: of random subspaces like the basis, in all of R^P and on its support; None before there is one.
    """

    def __init__(self, probe: CommutatorProbe, pcas: Sequence[StreamingPCA]) -> None:
        self.probe, self.pcas = probe, list(pcas)
        self.steps: list[list[Tensor]] = [[] for _ in self.pcas]  # of the feeds of each run
        self.baselines: tuple[RandomBaseline, RandomBaseline] | None = None
        self._stale = False

    def feed(self, clock: Tensor) -> None:
        """Feed each PCA with its run's parameters as they are; ``clock`` () is the step."""
        engine = self.probe.gradients
        for pca, steps, theta in zip(self.pcas, self.steps, engine.thetas(range(engine.runs)), strict=True):
            pca.partial_fit(theta)
            steps.append(clock.clone())
        self._stale = True
        if is_asynchronous(engine.device):  # replays of a captured measurement ask for nothing
            self.update_basis()

    def update_basis(self) -> None:
        """Have the probe project on the bases so far. Two rows span one direction: they wait until every block is full.

        In a program of several runs all of them have been fed at the same steps.
        """
        if not self._stale:
            return
        self._stale = False
        engine, pca = self.probe.gradients, self.pcas[0]
        if pca.method_ == "sketch":
            engine.note(
                "basis",
                False,
                "the PCA keeps a sketch of the trajectory, as 'auto' does for very long vectors, and no directions",
                "rho and the exec_* columns are NaN; give a StreamingPCA(method='incremental') or one with segments",
            )
            return
        # On an accelerator the count of rows is there, and reading it would wait; how often the PCA was fed is known
        # here.
        asynchronous = is_asynchronous(engine.device)
        seen = [len(s) if asynchronous else p.n_samples_seen_ for p, s in zip(self.pcas, self.steps, strict=True)]
        if min(seen) <= BASIS_COMPONENTS:
            return
        bases = [Subspace.from_pca(pca, n_components=BASIS_COMPONENTS, size=engine.size) for pca in self.pcas]
        if self.baselines is None:
            sizes = torch.tensor([bases[0].size, bases[0].support_size], dtype=torch.float64)
            full, matched = engine.partition.all_reduce_sum(sizes)[0].tolist()
            self.baselines = RandomBaseline(bases[0].dim, int(full)), RandomBaseline(bases[0].dim, int(matched))
        self.probe.update_bases(bases)

    def records(self, run: int = 0) -> pd.DataFrame:
        """PC1 % of every expanding window of a run's trajectory: columns ``step``, ``matrix``, ``pc1_percent``."""
        import pandas as pd

        pca, steps = self.pcas[run], self.fed_at(run)
        if not steps:
            return no_records()
        names = [s.name for s in pca.segments] if pca.segments else ["all"]
        history = 100.0 * pca.pc1_history_.reshape(len(steps), len(names)).cpu().numpy()
        frame = pd.DataFrame(history, columns=names)
        frame.insert(0, "step", steps)
        return frame.melt("step", var_name="matrix", value_name="pc1_percent").sort_values("step", kind="stable")

    def fed_at(self, run: int = 0) -> list[int]:
        return [int(step) for step in self.steps[run]]

    def state_dict(self, run: int = 0) -> dict[str, Any]:
        return {"pca_steps": self.fed_at(run), "pca": self.pcas[run].state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], run: int = 0) -> None:
        self.steps[run] = [torch.tensor(step) for step in state["pca_steps"]]
        self.pcas[run].load_state_dict(state["pca"])
        self._stale = True

    def keep(self, runs: list[int]) -> None:
        self.pcas, self.steps = [self.pcas[run] for run in runs], [self.steps[run] for run in runs]


def no_records() -> pd.DataFrame:
    """:meth:`Trajectory.records` of no trajectory."""
    import pandas as pd

    return pd.DataFrame({"step": pd.Series(dtype="int64"), "matrix": pd.Series(dtype="str"), "pc1_percent": []})
