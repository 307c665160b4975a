"""The trajectory of the parameters: its principal components, and the execution basis they span."""

from __future__ import annotations

from collections.abc import Mapping
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
    """The PCA of the runs' trajectories; its leading two directions per segment are the execution basis of each.

    The basis is made when somebody asks for it after a feed, not at every feed, and goes to the probe.

    Args:
        probe: what measures the runs, and projects on their bases.
        pca: what is fed with the parameters, of as many runs as the probe's; ``method="sketch"`` has no basis.

    Attributes:
        baselines: of random subspaces like the basis, in all of R^P and on its support; None before there is one.
    """

    def __init__(self, probe: CommutatorProbe, pca: StreamingPCA) -> None:
        self.probe, self.pca = probe, pca
        self.steps: list[list[Tensor]] = [[] for _ in range(pca.runs)]  # of the feeds of each run
        self.baselines: tuple[RandomBaseline, RandomBaseline] | None = None
        self._stale = False

    def feed(self, clock: Tensor) -> None:
        """Feed the PCA with the parameters as they are; ``clock`` () is the step."""
        engine, step = self.probe.gradients, clock.clone()
        self.pca.partial_fit(engine.thetas(range(engine.runs)))
        for steps in self.steps:
            steps.append(step)
        self._stale = True
        if is_asynchronous(engine.device):  # replays of a captured measurement ask for nothing
            self.update_basis()

    def update_basis(self) -> None:
        """Have the probe project on the basis so far. Two rows span one direction: it waits until every block is full.

        In a program of several runs all of them have been fed at the same steps.
        """
        if not self._stale:
            return
        self._stale = False
        engine, pca = self.probe.gradients, self.pca
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
        seen = len(self.steps[0]) if is_asynchronous(engine.device) else pca.n_samples_seen_
        if seen <= BASIS_COMPONENTS:
            return
        basis = Subspace.from_pca(pca, n_components=BASIS_COMPONENTS, size=engine.size)
        if self.baselines is None:
            sizes = torch.tensor([basis.size, basis.support_size], dtype=torch.float64)
            full, matched = engine.partition.all_reduce_sum(sizes)[0].tolist()
            self.baselines = RandomBaseline(basis.dim, int(full)), RandomBaseline(basis.dim, int(matched))
        self.probe.update_bases(basis)

    def records(self, run: int = 0) -> pd.DataFrame:
        """PC1 % of every expanding window of a run's trajectory: columns ``step``, ``matrix``, ``pc1_percent``.

        Of a PCA that does not keep its rows also ``pc1_error``: how far the share can be off, in percent too; 0 while
        it still kept them.
        """
        import pandas as pd

        pca, steps = self.pca, self.fed_at(run)
        if not len(steps):
            return no_records()
        names = [s.name for s in pca.segments] if pca.segments else ["all"]
        shares, errors = (
            100.0 * values.reshape(pca.runs, -1)[run].cpu().numpy()
            for values in (pca.pc1_history_, pca.pc1_history_bound_)
        )
        matrices = pd.Series(names * len(steps), dtype="str")
        frame = pd.DataFrame({"step": steps.repeat_interleave(len(names)), "matrix": matrices, "pc1_percent": shares})
        return frame if pca.method_ == "gram" else frame.assign(pc1_error=errors)

    def fed_at(self, run: int = 0) -> Tensor:
        """(n,) int64: the steps of the rows."""
        steps = self.steps[run]
        return torch.stack(steps).cpu() if steps else torch.empty(0, dtype=torch.int64)

    def state_dict(self, run: int = 0) -> dict[str, Any]:
        return {"pca_steps": self.fed_at(run), "pca": self.pca.state_dict(run)}

    def load_state_dict(self, state: Mapping[str, Any], run: int = 0) -> None:
        self.steps[run] = list(torch.as_tensor(state["pca_steps"], dtype=torch.int64))  # a list in older versions
        self.pca.load_state_dict(state["pca"], run)
        self._stale = True

    def keep(self, runs: list[int]) -> None:
        self.pca.keep(runs)
        self.steps = [self.steps[run] for run in runs]


def no_records() -> pd.DataFrame:
    """:meth:`Trajectory.records` of no trajectory."""
    import pandas as pd

    return pd.DataFrame({"step": pd.Series(dtype="int64"), "matrix": pd.Series(dtype="str"), "pc1_percent": []})
