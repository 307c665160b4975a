"""Edges of the Hessian's spectrum, followed through training by a product a row each; trace and curvature."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from grokcurv import ops
from grokcurv.commutator import CommutatorProbe
from grokcurv.device_buffer import capturing
from grokcurv.evaluation import Check
from grokcurv.gradients import Multiply
from grokcurv.hessian import Lanczos, curvature, has_smooth_loss, quotients, random_vector, signs
from grokcurv.measures.base import Measure
from grokcurv.measures.commutator import CHECK_EVERY
from grokcurv.pairs import PairOfRuns
from grokcurv.steps import OptimizerRow, OptimizerState, read_state
from grokcurv.subspace import Subspace

Ends = Literal["both", "largest"]

COLUMNS = (
    *("lambda_max", "lambda_max_residual", "lambda_min", "lambda_min_residual", "trace", "trace_stderr"),
    *("sharpness_preconditioned", "gap_checked", "sharpness_preconditioned_residual", "stability_threshold"),
)
"""Whatever is asked for; what is not is NaN."""

LEAST_GAP = 0.01
"""An eigenvalue is taken to be so far from the next one, as a share of the whole spectrum's width, at least."""

BACK = 0.5
"""Where the other end of the spectrum is not followed, it is taken to be no farther than this share of the edge, on the
other side of zero, unless Lanczos' method has found it farther."""

SHORT = 12
"""Products of the Lanczos run that a row begins with where the row before is more than a step away."""

SETTLING = 2
"""Rows after the first with a preconditioner in which it still changes so much that its edge is searched for anew."""


OPPOSITE = {"lambda_max": "lambda_min", "lambda_min": "lambda_max"}
"""The other end of the same matrix."""


class Pairs(NamedTuple):
    """Of k vectors in a row: Ritz values of ``sign`` times a matrix, descending, vectors (k, P), and their products
    with the matrix itself."""

    values: Tensor
    vectors: Tensor
    products: Tensor


@dataclass
class Tracked:
    """The k farthest eigenvectors at one end, of R runs, of H or of what a preconditioner makes of it.

    Attributes:
        sign: 1 of the largest, -1 of the smallest: what is followed is the largest of ``sign`` times the matrix.
        vectors: (R, k, P) orthonormal, where the next row multiplies.
        before: (R, k, P) where the row before did, as far as the next step looks back.
        gap: (R,) float64 from the k-th eigenvalue to the next, as a share of the spectrum's width.
        back: (R,) float64 the other end, as the latest Lanczos run found it, of ``sign`` times the matrix.
        error, length: (R, k) float64: what the latest check found of the products, and how long they were then.
        rows: how many there were.
    """

    sign: float
    vectors: Tensor
    before: Tensor
    gap: Tensor
    back: Tensor
    error: Tensor
    length: Tensor
    rows: int = 0

    @classmethod
    def of(cls, sign: float, runs: int, k: int, size: int, like: Tensor) -> Tracked:
        """Of k edges of each run nothing is known yet."""
        vectors = torch.zeros(2, runs, k, size, dtype=like.dtype, device=like.device)
        unknown = torch.full((2, runs, k), math.nan, dtype=torch.float64, device=like.device)
        return cls(sign, vectors[0], vectors[1], unknown[0, :, 0].clone(), unknown[1, :, 0].clone(), *unknown)

    def tables(self) -> dict[str, Tensor]:
        return {f.name: x for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}


class HessianEdges(Measure):
    """The largest and the smallest eigenvalue of the Hessian H of one fixed batch, its trace, and its curvature.

    ======================================  =====================================================================
    ``lambda_max``, ``lambda_min``          v' H v of the vectors v that are followed
    ``lambda_max_residual``, ``..._min_..`` \\|fl(H v) - lambda v\\| + e, e what float64 found of the rounding of H v:
                                            an eigenvalue of H lies within it
    ``lambda_max_2``, ... ``_k``            of k > 1: the next ones, each with its residual
    ``trace``, ``trace_stderr``             Hutchinson's estimate from so many ``probes``, and its standard error
    ``sharpness_preconditioned``            the largest eigenvalue of D^-1/2 H D^-1/2, D = sqrt(v_hat) + eps that of
                                            Adam or AdamW at their latest step; dimensionless times 1 / lr
    ``stability_threshold``                 (2 + 2 beta_1) / ((1 - beta_1) lr), beside which it is to be seen
    ``gap_checked``                         the step of the latest Lanczos run, of which there was no farther edge
    ``curvature_1``, ... ``_n``             v' H v of the vectors ``along``
    ======================================  =====================================================================

    Units are the loss over theta squared. A residual says that there is an eigenvalue near, not that it is the edge;
    that is confirmed by a Lanczos run (full reorthogonalisation, started from what is followed and a random vector), in
    the first row and every ``lanczos_every`` rows, whose vectors take over where they are farther out.

    In between each edge costs one product a row where rows are a step apart. (Where they are farther apart the edge may
    have moved on: a row then begins with a Lanczos run of 12 products, from what was followed.) The vector moves by a
    step of the second-order Richardson iteration (Golub & Varga, Numer. Math. 3, 1961) for the shifted matrix, ``v + =
    (H - c) v - (d / 2)^2 v_before``, c and d the middle and half the width of the rest of the spectrum: the other edge,
    and the gap that the Lanczos run saw. Its error shrinks by exp(-2 sqrt(gap / width)) a row, where the power method's
    does by exp(-2 gap / width). e is renewed every ``check_every`` rows, and grows with the product in between.

    The stability of Adam is that of Cohen et al. (arXiv 2207.14484). A model without second derivatives gets NaN and
    one warning, as the preconditioned sharpness does with another optimiser.

    A row costs a gradient's graph (one forward and two backward passes), then a product (two backward passes) for each
    edge: two of H, and that of D^-1/2 H D^-1/2 if it is asked for; two forward passes in float64 for each probe and
    each vector ``along``, or a product where the loss is not smooth. A Lanczos run costs ``lanczos_steps`` products
    (once more for the preconditioned edge), a check a product in float64 for each edge. Steps without a row cost
    nothing. Each edge keeps 2 k vectors of P; a Lanczos run takes memory for ``lanczos_steps`` of them.

    Example:
        >>> import grokcurv as gc
        >>> model, batch = torch.nn.Linear(3, 2), (torch.randn(64, 3), torch.randint(2, (64,)))
        >>> loss_fn = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> with gc.attach(model, loss_fn, optimizer, measures=[gc.HessianEdges(batch)]) as monitor:
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         loss_fn(model, batch).backward()
        ...         optimizer.step()
        >>> edge = gc.hessian_edges(model, loss_fn, batch)  # convex, so the smallest is zero
        >>> row = monitor.records().iloc[-1]
        >>> bool(abs(row["lambda_max"] / edge.values[0] - 1) < 0.1), bool(abs(row["lambda_min"]) < 1e-3)
        (True, True)

    Args:
        batch: what ``loss_fn`` takes, not to be changed meanwhile. Of several runs in one program a list has one for
            each, anything else is for all.
        k: how many eigenvalues at each end.
        ends: ``"largest"`` leaves ``lambda_min`` out.
        probes: of the trace; 0 for none.
        preconditioned: whether to follow the preconditioned edge; by default where the optimisers are Adam or AdamW.
        along: a :class:`grokcurv.Subspace`, or vectors (n, P).
        optimizer: that of the loop, or several; :func:`grokcurv.attach` tells its own. Of several runs the row of an
            optimiser of rows for each.
        lanczos_every, lanczos_steps: of Lanczos runs, in rows and in products.
        check_every: rows after which e is found anew.
        seed: of probes, starting vectors, and what the model draws at random.

    Raises:
        ValueError: no batch; settings below 1 (``probes`` below 0), another ``ends``; when the monitor is made, k > P,
            vectors of another length, or ``preconditioned=True`` with an optimiser that has none.
    """

    name = "hessian_edges"

    def __init__(
        self,
        batch: Any,
        k: int = 1,
        *,
        ends: Ends = "both",
        probes: int = 8,
        preconditioned: bool | None = None,
        along: Subspace | Tensor | None = None,
        optimizer: Optimizer | Iterable[Optimizer | OptimizerRow] = (),
        lanczos_every: int = 500,
        lanczos_steps: int = 60,
        check_every: int = CHECK_EVERY,
        seed: int = 0,
    ) -> None:
        if batch is None:
            raise ValueError("HessianEdges: batch is needed, that whose Hessian is meant; got None")
        counts = {"k": k, "lanczos_every": lanczos_every, "lanczos_steps": lanczos_steps, "check_every": check_every}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if probes < 0:
            raise ValueError(f"probes must be at least 0, got {probes}")
        if ends not in get_args(Ends):
            raise ValueError(f"ends must be one of {', '.join(get_args(Ends))}, got {ends!r}")
        self.batch, self.k, self.ends, self.probes, self.seed = batch, k, ends, probes, seed
        self.preconditioned, self.lanczos_steps = preconditioned, lanczos_steps
        self.lanczos_every, self.check_every = lanczos_every, check_every
        self._given = (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer)
        self._optimizers: tuple[Optimizer | OptimizerRow, ...] = self._given
        self._divides = False  # whether there is a preconditioner
        self._along = along.to_dense() if isinstance(along, Subspace) else along
        if self._along is not None and self._along.ndim != 2:
            raise ValueError(f"along must be a Subspace or vectors (n, P), got shape {tuple(self._along.shape)}")
        more = [
            f"lambda_{end}_{place}{what}"
            for end in ("max", "min")
            for place in range(2, k + 1)
            for what in ("", "_residual")
        ]
        self._count_along = 0 if self._along is None else len(self._along)
        self.columns = (*COLUMNS, *more, *(f"curvature_{n + 1}" for n in range(self._count_along)))

    def follow(self, optimizers: Sequence[Optimizer | OptimizerRow]) -> None:
        """Those of the loop, unless others were given."""
        self._optimizers = self._given or tuple(optimizers)
        if hasattr(self, "_engine"):  # the trainer has rows once there is a monitor, and other ones later
            self._divides = self._adam()

    def bind(self, probe: CommutatorProbe) -> None:
        """Look at the sizes and at the optimisers; says in a ValueError what is wrong with them."""
        self._engine = engine = probe.gradients
        if self.k > engine.size:
            raise ValueError(f"HessianEdges: k must be at most P = {engine.size}, got {self.k}")
        if self._along is not None and self._along.shape[1] != engine.size:
            raise ValueError(f"HessianEdges: along must have vectors of P = {engine.size}, got {self._along.shape[1]}")
        if engine.shared and isinstance(self.batch, list) and len(self.batch) != engine.runs:
            raise ValueError(f"HessianEdges: batch has {len(self.batch)} batches for {engine.runs} runs")
        like = torch.empty(0, dtype=engine.dtype, device=engine.device)
        self._missing = torch.full((), math.nan, dtype=torch.float64, device=engine.device)
        self._directions = [] if self._along is None else list(self._along.detach().to(like))
        signs_of = {"lambda_max": 1.0} | ({"lambda_min": -1.0} if self.ends == "both" else {})
        self._divides = bool(self._optimizers or not engine.shared) and self._adam()
        if self._divides or (engine.shared and self.preconditioned is not False):
            signs_of["sharpness_preconditioned"] = 1.0
        size = engine.size
        self._tracked = {
            name: Tracked.of(sign, engine.runs, self.k if name.startswith("lambda") else 1, size, like)
            for name, sign in signs_of.items()
        }
        self._confirmed = self._missing.expand(engine.runs).clone()
        self._latest: int | None = None  # the step of the row before

    def _adam(self) -> bool:
        """Whether there is a preconditioner to divide by."""
        if not self._optimizers or self.preconditioned is False:
            if self.preconditioned:
                raise ValueError("HessianEdges: no optimiser is known; pass optimizer=, or use grokcurv.attach")
            return False
        try:
            self._state().stability_threshold()
        except ValueError as error:
            others = "the edges of the Hessian itself, its trace and its curvature are measured"
            if self.preconditioned:
                raise ValueError(f"HessianEdges: {error}; without preconditioned=True {others}") from error
            self._engine.note("optimizer", False, str(error), f"sharpness_preconditioned is NaN; {others}")
            return False
        return True

    def _state(self) -> OptimizerState:
        return read_state(self._optimizers, self._engine)

    def _batch(self, run: int) -> Any:
        one_each = self._engine.shared and isinstance(self.batch, list)
        return self.batch[run] if one_each else self.batch

    def observe(self, step: int, pairs: Sequence[PairOfRuns], due: bool) -> Tensor | None:
        """Multiply what is followed, and move it on; (R, columns) where there is a row."""
        if not due:
            return None
        engine = self._engine
        if capturing(engine.device):
            raise RuntimeError(
                "HessianEdges: its Lanczos runs and checks come at steps that a CUDA graph does not know"
            )
        row = {name: self._missing.expand(engine.runs).clone() for name in self.columns}
        scale: Tensor | None = None
        if self._divides:
            state = self._state()
            row["stability_threshold"] = state.stability_threshold()
            if all("exp_avg_sq" in block.state for block in state.blocks):
                scale = state.preconditioner().rsqrt()
        thetas = engine.thetas(range(engine.runs))
        followed = {
            name: each for name, each in self._tracked.items() if name.startswith("lambda") or scale is not None
        }
        self._apart = self._latest is None or step - self._latest > 1
        self._latest = step
        for run in range(engine.runs):
            self._observe(run, step, thetas[run], None if scale is None else scale[run], followed, row)
        for each in followed.values():
            each.rows += 1
        row["gap_checked"] = self._confirmed
        return torch.stack([row[name] for name in self.columns], 1)

    def _observe(
        self,
        run: int,
        step: int,
        theta: Tensor,
        scale: Tensor | None,
        followed: dict[str, Tracked],
        row: dict[str, Tensor],
    ) -> None:
        """One run's row."""
        engine, batch = self._engine, self._batch(run)
        engine.admit(batch, seed=self.seed)
        has_second = engine.has_true_brackets(batch, seed=self.seed)
        if not has_second:
            consequence = "the edges of the Hessian are NaN"
            engine.note("HessianEdges", False, "the model has no true second derivatives", consequence)
        scales = {name: scale if name.startswith("sharpness") else None for name in followed}
        if has_second and followed:
            found = self._products(run, step, theta, scales, followed)
            for name, (values, residuals) in found.items():
                for place, (value, residual) in enumerate(zip(values, residuals, strict=True)):
                    column = name if place == 0 else f"{name}_{place + 1}"
                    row[column][run], row[f"{column}_residual"][run] = value, residual
        if has_second or has_smooth_loss(engine):
            probes = signs(engine, self.probes, self.seed, step)
            quadratic = curvature(engine, theta, batch, [*probes, *self._directions], self.seed)
            if self.probes:
                samples = quadratic[: self.probes]
                row["trace"][run] = samples.mean()
                row["trace_stderr"][run] = samples.std() / math.sqrt(self.probes) if self.probes > 1 else math.nan
            for place, value in enumerate(quadratic[self.probes :]):
                row[f"curvature_{place + 1}"][run] = value

    def _products(
        self, run: int, step: int, theta: Tensor, scales: Mapping[str, Tensor | None], followed: dict[str, Tracked]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Values and residuals (k,) of what is followed of a run, which then moves on."""
        engine, batch = self._engine, self._batch(run)

        def use(multiply: Multiply) -> dict[str, tuple[Tensor, Tensor]]:
            def scaled(name: str) -> Multiply:
                scale = scales[name]
                return multiply if scale is None else lambda v: scale * multiply(scale * v)

            found: dict[str, tuple[Tensor, Tensor]] = {}
            searched = {name: self._searched(each) for name, each in followed.items()}
            fresh: dict[str, Tensor] = {}
            for plain in (True, False):  # both ends of H come from one run
                names = [name for name in followed if name.startswith("lambda") == plain and searched[name]]
                if names:
                    steps = max(searched[name] for name in names)
                    fresh |= self._search(run, scaled(names[0]), {name: followed[name] for name in names}, steps)
                    if plain and steps == self.lanczos_steps:
                        self._confirmed[run] = float(step)
            pairs: dict[str, Pairs] = {}
            for name, each in followed.items():
                if each.rows:
                    pairs[name], turn = _ritz(scaled(name), each.vectors[run], each.sign)
                    each.before[run] = turn @ each.before[run]
                if name in fresh:
                    other, _ = _ritz(scaled(name), fresh[name], each.sign)
                    pairs[name] = self._farther(each, run, pairs.get(name, other), other)
            for name, each in followed.items():
                values, vectors, products = pairs[name]
                error = self._error(run, theta, each, vectors, products, scales[name])
                found[name] = each.sign * values, quotients(vectors, products)[1] + error
            for name, each in followed.items():
                opposite = found.get(OPPOSITE.get(name, ""))
                back = None if opposite is None else each.sign * opposite[0][0] - opposite[1][0].nan_to_num(0.0)
                _advance(each, run, pairs[name], back)
            return found

        alone = len(followed) == 1 and not any(map(self._searched, followed.values())) and self.k == 1
        if not alone:
            return engine.hessian(theta, batch, use, seed=self.seed)

        def once(direction: Tensor) -> Tensor:
            product = torch.empty_like(direction)
            engine.product(theta, batch, direction, None, product, self.seed)
            return product

        return use(once)

    @staticmethod
    def _farther(each: Tracked, run: int, followed: Pairs, found: Pairs) -> Pairs:
        """What a Lanczos run has found, where that is farther out than what is followed."""
        farther = (found.values.sum() > followed.values.sum()) | followed.values.sum().isnan()
        each.before[run] = torch.where(farther, 0.0, each.before[run])
        return Pairs(*(torch.where(farther, x, y) for x, y in zip(found, followed, strict=True)))

    def _searched(self, each: Tracked) -> int:
        """Products of the Lanczos run that is due; 0 for none."""
        settles = self._tracked.get("sharpness_preconditioned") is each and each.rows <= SETTLING
        if each.rows % self.lanczos_every == 0 or settles:
            return self.lanczos_steps
        return min(SHORT, self.lanczos_steps) if self._apart else 0

    def _search(self, run: int, multiply: Multiply, wanted: dict[str, Tracked], steps: int) -> dict[str, Tensor]:
        """Vectors (k, P) of the edges that a Lanczos run finds, and of each how far the spectrum goes on."""
        engine = self._engine
        start = random_vector(engine, self.seed)
        start = start / start.norm()
        for each in wanted.values():
            start = start + each.vectors[run].sum(0)
        krylov = Lanczos(multiply, start, min(max(steps, self.k + 1), engine.size))
        while not krylov.full:
            krylov.extend()
        found = {}
        for name, each in wanted.items():
            k = each.vectors.shape[1]
            values, vectors, _ = krylov.edge(min(k + 1, krylov.size), each.sign)
            (back,), _, _ = krylov.edge(1, -each.sign)
            found[name], values, back = vectors[:k], each.sign * values, each.sign * back
            width = values[0] - back
            each.gap[run] = ((values[k - 1] - values[-1]) / width).nan_to_num(1.0) if len(values) > k else 1.0
            each.back[run] = back
        return found

    def _error(
        self, run: int, theta: Tensor, each: Tracked, vectors: Tensor, products: Tensor, scale: Tensor | None
    ) -> Tensor:
        """(k,) how far products are from those in float64, as far as the latest check knows."""
        engine, batch = self._engine, self._batch(run)
        lengths = products.norm(dim=1, dtype=torch.float64)
        if each.rows % self.check_every == 0:
            each.length[run], each.error[run] = lengths, math.nan
            if engine.checked and engine.certifies and engine.traits.exact:
                wide, shake = theta.to(torch.float64), None
                if theta.dtype == torch.float64:  # its own rounding shows when it is made larger at random
                    shake = torch.Generator(theta.device).manual_seed(self.seed)
                    wide = engine.shake_(wide.clone(), shake)
                for place, (v, product) in enumerate(zip(vectors, products, strict=True)):
                    direction = v.to(torch.float64) if scale is None else scale.double() * v.double()
                    exact = torch.empty_like(wide)
                    check = Check(exact.new_full((1, 3), math.nan), shake=shake) if shake is not None else None
                    engine.product(wide, batch, direction, None, exact, self.seed, check)
                    exact = exact if scale is None else exact * scale.double()
                    each.error[run, place] = (exact - product.double()).norm()
        grown = (lengths / each.length[run]).nan_to_num(1.0).clamp(min=1.0)
        bound: Tensor = each.error[run] * grown
        return bound

    def state_dict(self, run: int = 0) -> dict[str, Any]:
        tracked = {
            name: {"rows": each.rows} | {key: x[run].clone() for key, x in each.tables().items()}
            for name, each in self._tracked.items()
        }
        return {"tracked": tracked, "confirmed": self._confirmed[run].clone(), "latest": self._latest}

    def load_state_dict(self, state: Mapping[str, Any], run: int = 0) -> None:
        """Restore :meth:`state_dict`; ValueError if it is of other edges, or of another P."""
        for name, each in self._tracked.items():
            saved = state["tracked"].get(name)
            if saved is None or saved["vectors"].shape != each.vectors.shape[1:]:
                had = "nothing" if saved is None else f"vectors of shape {tuple(saved['vectors'].shape)}"
                wanted = tuple(each.vectors.shape[1:])
                raise ValueError(f"HessianEdges: state has {had} for {name}, and this measure {wanted}: other settings")
            each.rows = saved["rows"]
            for key, x in each.tables().items():
                x[run] = saved[key].to(x)
        self._confirmed[run], self._latest = state["confirmed"].to(self._confirmed), state["latest"]

    def keep(self, runs: list[int]) -> None:
        if isinstance(self.batch, list) and self._engine.shared:
            self.batch = [self.batch[run] for run in runs]
        for each in self._tracked.values():
            for key, x in each.tables().items():
                setattr(each, key, torch.stack([x[run] for run in runs]))
        self._confirmed = torch.stack([self._confirmed[run] for run in runs])
        if self._optimizers and isinstance(self._optimizers[0], tuple):
            self._optimizers = tuple(self._optimizers[run] for run in runs)


def _ritz(multiply: Callable[[Tensor], Tensor], vectors: Tensor, sign: float) -> tuple[Pairs, Tensor]:
    """Ritz pairs of ``sign`` times a matrix on orthonormal vectors (k, P), and what turns the vectors into theirs."""
    products = torch.stack([multiply(v) for v in vectors])
    turn = torch.ones(1, 1, dtype=vectors.dtype, device=vectors.device)
    if len(vectors) > 1:
        inner = ops.gram(vectors, products)[0]
        turn = ops.eigh(sign * (inner + inner.T)[None] / 2, len(vectors))[1][0].T.to(vectors.dtype)
        vectors, products = turn @ vectors, turn @ products
    return Pairs(sign * quotients(vectors, products)[0], vectors, products), turn


def _advance(each: Tracked, run: int, pairs: Pairs, back: Tensor | None) -> None:
    """A step of the second-order Richardson iteration, of ``sign`` times the matrix, whose edge is wanted."""
    values, vectors, products = pairs
    back = torch.minimum(each.back[run], -BACK * values[0].abs()) if back is None else back
    width = values[0] - back
    inner = values[-1] - each.gap[run].clamp(min=LEAST_GAP) * width
    middle, half = (inner + back) / 2, ((inner - back) / 2).clamp(min=0.0)
    moved = each.sign * products - middle.to(products.dtype) * vectors
    moved -= (half.square() / 4).to(products.dtype) * each.before[run]
    # following = lower^-1 moved, and what it looks back on is made smaller, and mixed, by the same.
    lower = torch.linalg.qr(moved.T, mode="r").R.T if len(moved) > 1 else moved.norm(dim=1, keepdim=True)
    both = torch.linalg.solve_triangular(lower, torch.cat([moved, vectors], 1), upper=False)
    following, before = both.split(vectors.shape[1], 1)
    usable = both.isfinite().all()
    each.before[run] = torch.where(usable, before, 0.0)
    each.vectors[run] = torch.where(usable, following, vectors.nan_to_num(0.0, 0.0, 0.0))
