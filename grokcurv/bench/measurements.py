"""Measurements of the demo's model beside the naive ones, bare gradients, curvlinops and the plain training loop.

A commutator must do four gradients, K of them in a whole measurement 4 K; a bracket must do two gradients and two
Hessian-vector products. The floor is the flops of their matrix products, counted on the module, at the rate of a large
product. Truth is the same model in float64, by the definition, where the subtraction costs no digits that show.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Generator, Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from grokcurv.bench import naive
from grokcurv.bench.comparison import OURS, Case, Comparison, Implementation, relative, worst
from grokcurv.commutator import CommutatorProbe
from grokcurv.flat import attention_segments, flatten
from grokcurv.gradients import Strategy, capture
from grokcurv.hessian import hessian_edges, hessian_trace
from grokcurv.measures.commutator import CHECK_EVERY
from grokcurv.measures.hessian_edges import HessianEdges
from grokcurv.measures.update_gram import UpdateGram
from grokcurv.monitor import CurvatureMonitor
from grokcurv.pca import StreamingPCA
from grokcurv.subspace import Subspace
from grokcurv.tasks import Transformer
from grokcurv.tasks.modular import fast
from grokcurv.training import TrainConfig
from grokcurv.training.program import Program
from grokcurv.training.run import Training

ETA = 1e-3
ROWS = 512
"""Of a batch."""
MEMORY = 1 << 30
DEMO = "demo's model"
COMPARED = 5
"""Training steps whose defects are compared with float64 truth."""

PROBES = 32
"""Of a trace."""
TRUE_PROBES = 128
"""Of what it is held against."""

ADMITTED = 14
"""Gradients whose time admission may take."""

Forward = Callable[[Any, Tensor], Tensor]
MODULE: Forward = Transformer.__call__
"""The module's own forward pass, as any model has one."""
SHORTER: Forward = fast.logits
"""The forward pass of the package's trainer, which leaves out what nobody reads."""


def pair() -> Case:
    """One pair of batches."""

    def build(generator: Generator) -> Comparison:
        model, batches, basis = demo(generator, 1)
        loss_fn, (truth, _) = loss(MODULE), measured64(model, batches, basis)
        bare, checked = (CommutatorProbe(model, loss_fn, noise_floor=wanted) for wanted in (False, True))
        implementations = (
            Implementation(OURS, lambda: bare.measure(batches).defect),
            Implementation(f"{OURS}, with its noise floor", lambda: checked.measure(batches).defect, note="does more"),
            Implementation("naive", lambda: naive.commutator(model, loss_fn, batches[0], ETA)[0][None]),
            _bare(model, 2 * [*batches[0]]),
        )
        errors = {"defect, relative error": lambda got: worst(got, truth)}
        return Comparison(implementations, errors, tolerance=1e-2, flops=4 * gradient_flops(model, batches[0][0]))

    return _case("pair", "commutator of a pair", build)


def admission() -> Case:
    """What a model costs when it is first met, beside as many gradients as that may take."""

    def build(generator: Generator) -> Comparison:
        model, (pair,), _ = demo(generator, 1)
        one, gradient = pair[0], gradient_flops(model, pair[0])

        def admit(brackets: bool) -> int:
            """The checks that failed."""
            engine = CommutatorProbe(model, loss(MODULE)).gradients
            engine.admit(one, brackets=brackets)
            return sum(not finding.passed for finding in engine.admission)

        implementations = (
            Implementation(OURS, lambda: admit(True)),
            Implementation(f"{OURS}, without second derivatives", lambda: admit(False), note="does less"),
            _bare(model, [one], times=ADMITTED),
        )
        errors = {"checks that failed": float}
        # A gradient told where to stop and one not, and a product.
        work = 2 * gradient + flops(lambda: bracket_by_autograd(model, pair)) // 2
        return Comparison(implementations, errors, tolerance=0.0, flops=work, flops64=2 * gradient)

    return _case("admission", "admission", build)


def whole(pairs: int, forward: Forward = MODULE) -> Case:
    """Pairs projected on the execution basis, with both random controls and the noise floor."""

    def build(generator: Generator) -> Comparison:
        model, batches, basis = demo(generator, pairs)
        probe = CommutatorProbe(model, loss(forward), basis=basis)
        dense, truth = basis.to_dense().T.contiguous(), measured64(model, batches, basis)

        def ours() -> tuple[Tensor, ...]:
            stats = probe.measure(batches)
            assert stats.parallel is not None
            assert stats.support is not None
            inside = stats.parallel / (stats.bracket_norm * stats.eta.square())
            full, matched = basis.random_baseline("full").mean, basis.random_baseline("matched").mean
            return stats.defect, inside, inside / full, stats.parallel / stats.support / matched

        def plain() -> Tensor:
            return torch.tensor(naive.measure(model, loss(MODULE), batches, dense, ETA), dtype=torch.float64).T

        implementations = [
            Implementation(OURS, ours),
            Implementation("naive", plain, note="no noise floor"),
            _bare(model, 2 * [one for pair in batches for one in pair]),
        ]
        if generator.device.type == "cuda":
            held = [(batch(generator), batch(generator)) for _ in range(pairs)]
            ours()  # what is captured must have been loaded
            got: list[Tensor] = []
            replay, _ = capture(lambda: got.append(probe.measure(held).defect))

            def replayed() -> tuple[Tensor, ...]:
                for memory, values in zip(tree_leaves(held), tree_leaves(batches), strict=True):
                    memory.copy_(values)
                replay()
                return got[0], torch.full_like(got[0], math.nan)

            implementations.insert(1, Implementation(f"{OURS}, captured and replayed", replay, replayed))
        errors: dict[str, Callable[[Any], float]] = {
            "defect, relative error of the worst": lambda got: worst(got[0], truth[0]),
            "share inside the basis, the same": lambda got: worst(got[1], truth[1]),
        }
        work = 4 * pairs * gradient_flops(model, batches[0][0], forward)
        return Comparison(tuple(implementations), errors, tolerance=1e-2, flops=work)

    return _case("whole", f"whole measurement, {_pairs(pairs)}", build, forward)


def bracket(pairs: int) -> Case:
    """``H_B g_A - H_A g_B``, the vector."""

    def build(generator: Generator) -> Comparison:
        model, batches, _ = demo(generator, pairs)
        probe = CommutatorProbe(model, loss(MODULE), method="bracket", noise_floor=False)
        exact = in_float64(model)
        truth = [bracket_by_autograd(exact, pair) for pair in batches]

        def ours() -> Tensor:
            stats = probe.measure(batches, keep_delta=True)
            assert stats.delta is not None
            return stats.delta / stats.eta.square()[:, None]

        def theirs() -> list[Tensor]:
            return [curvlinops_bracket(model, pair) for pair in batches]

        both = Implementation(OURS, ours), Implementation("curvlinops", theirs, needs=("curvlinops",))
        errors = {"vector, relative error of the worst": lambda got: max(map(relative, got, truth))}
        work = pairs * flops(lambda: bracket_by_autograd(model, batches[0]))
        # The tolerance is five times the worst in docs/measurements/numerics.md.
        return Comparison(both, errors, tolerance=1e-4, flops=work)

    return _case("bracket", f"exact bracket, {_pairs(pairs)}", build)


def hessian_edge(steps: int) -> Case:
    """The largest eigenvalue of a batch's Hessian, to 1e-4 of itself."""

    def build(generator: Generator) -> Comparison:
        model, one = Loop(seed_from(generator), generator.device).run(steps).model, batch(generator)
        loss_fn = loss(MODULE)
        with products(in_float64(model), one) as (multiply, size):
            matrix = LinearOperator((size, size), matvec=multiply, dtype=np.float64)
            truth = float(eigsh(matrix, k=1, which="LA", tol=1e-6, return_eigenvectors=False)[0])
        ours = hessian_edges(model, loss_fn, one)

        def eigenthings() -> float:
            from hessian_eigenthings import lanczos

            operator = eigenthings_operator(model, one)
            # It takes as many products as it is told to: here as many as ours found to be enough.
            with sdpa_kernel(SDPBackend.MATH):
                return float(lanczos(operator, k=1, max_iter=ours.products, which="LA", seed=0).eigenvalues[0])

        def curvlinops() -> float:
            with sdpa_kernel(SDPBackend.MATH):
                matrix = curvlinops_hessian(model, one).to_scipy()
                return float(eigsh(matrix, k=1, which="LA", tol=1e-3, return_eigenvectors=False)[0])

        def pyhessian() -> float:
            with sdpa_kernel(SDPBackend.MATH):
                return float(pyhessian_of(model, one).eigenvalues(maxIter=1000, tol=1e-5)[0][0])

        implementations = (
            Implementation(OURS, lambda: float(hessian_edges(model, loss_fn, one).values[0])),
            Implementation("hessian-eigenthings", eigenthings, needs=("hessian_eigenthings",)),
            Implementation("curvlinops and SciPy", curvlinops, needs=("curvlinops",)),
            Implementation("PyHessian", pyhessian, needs=("pyhessian",), note="of the largest magnitude"),
        )
        errors = {"eigenvalue, relative error": lambda got: abs(got / truth - 1)}
        return Comparison(implementations, errors, tolerance=1e-4, flops=3 * gradient_flops(model, one))

    return _case("edge", f"largest Hessian eigenvalue, {_after(steps)}", build)


def hessian_sum(steps: int) -> Case:
    """The trace of a batch's Hessian, from :data:`PROBES` probes, within 2 % of |tr| + |H|_F / 10."""

    def build(generator: Generator) -> Comparison:
        model, one = Loop(seed_from(generator), generator.device).run(steps).model, batch(generator)
        loss_fn = loss(MODULE)
        with products(model, one) as (multiply, size):
            signs = torch.randint(2, (TRUE_PROBES, size), generator=generator, device=generator.device) * 2.0 - 1.0
            found = np.array([(float(z @ (h := torch.from_numpy(multiply(z)))), float(h.norm())) for z in signs])
        truth, frobenius = found[:, 0].mean(), np.sqrt(np.square(found[:, 1]).mean())
        allowed = 0.02 * abs(truth) + frobenius / 10

        def eigenthings() -> float:
            from hessian_eigenthings import hutchinson

            with sdpa_kernel(SDPBackend.MATH):
                return float(hutchinson(eigenthings_operator(model, one), num_samples=PROBES, seed=0).estimate)

        def curvlinops() -> float:
            from curvlinops import hutchinson_trace

            with sdpa_kernel(SDPBackend.MATH):
                return float(hutchinson_trace(curvlinops_hessian(model, one), PROBES))

        def pyhessian() -> float:
            with sdpa_kernel(SDPBackend.MATH):
                return float(np.mean(pyhessian_of(model, one).trace(maxIter=PROBES, tol=0.0)))

        implementations = (
            Implementation(OURS, lambda: hessian_trace(model, loss_fn, one, PROBES).value),
            Implementation("hessian-eigenthings", eigenthings, needs=("hessian_eigenthings",)),
            Implementation("curvlinops", curvlinops, needs=("curvlinops",)),
            Implementation("PyHessian", pyhessian, needs=("pyhessian",)),
        )
        errors = {"trace, error over what is allowed": lambda got: abs(got - truth) / allowed}
        # Four standard errors, where the probes vary by the whole of the Frobenius norm.
        return Comparison(implementations, errors, tolerance=4.0, flops=gradient_flops(model, one))

    return _case("trace", f"trace of the Hessian, {PROBES} probes, {_after(steps)}", build)


def followed() -> Case:
    """Training steps with one tracked edge of the Hessian at every one, beside the plain loop of the module."""

    def build(generator: Generator) -> Comparison:
        seed, device = seed_from(generator), generator.device
        fixed = batch(generator)

        def implementation(name: str, forward: Forward, edge: bool) -> Implementation:
            loop = Loop(seed, device, forward=forward, edge_of=fixed if edge else None).run(1)
            return Implementation(name, partial(loop.run, 1), lambda: loop)

        def error(loop: Loop) -> float:
            """How far the edge that is followed is from that of the same weights, in the residual it gives."""
            if loop.monitor is None:
                return math.nan
            loop.monitor.step()
            row = loop.monitor.latest()
            assert row is not None
            edge = hessian_edges(loop.model, loop.loss, fixed, tol=1e-5).values[0]
            return abs(float(row["lambda_max"]) / float(edge) - 1)

        implementations = (
            implementation(OURS, SHORTER, True),
            implementation(f"{OURS}, the module", MODULE, True),
            implementation("torch.optim, the module", MODULE, False),
        )
        errors = {"edge, relative error": error}
        return Comparison(implementations, errors, tolerance=0.1, flops=4 * gradient_flops(network(0, device), fixed))

    return _case("edge-step", "training step with a tracked Hessian edge", build)


def training(forward: Forward = MODULE) -> Case:
    """Loop steps with a certified defect at every one, beside the plain loop; one check of the noise floor."""

    def build(generator: Generator) -> Comparison:
        seed, device = seed_from(generator), generator.device
        exact = Loop(seed, device, naive_on=in_float64).run(COMPARED)
        truth, bare = exact.defects(), Loop(seed, device).run(COMPARED)

        def implementation(name: str, note: str = "", **options: Any) -> Implementation:
            loop, fresh = (Loop(seed, device, **options) for _ in range(2))
            run, checked = partial(loop.run, CHECK_EVERY), partial(fresh.run, COMPARED)
            return Implementation(name, run, checked, note=note, times=1 / CHECK_EVERY)

        errors: dict[str, Callable[[Any], float]] = {}
        errors["defect, relative error of the worst"] = lambda got: worst(got.defects(), truth)
        if forward is MODULE:  # another forward pass rounds otherwise
            theta = flatten(bare.model)
            errors["weights, distance from the plain loop's"] = lambda got: float((flatten(got.model) - theta).norm())
        four = "torch.optim, four gradients at every step"
        loops = (
            implementation(OURS, forward=forward, monitored=True),
            implementation(four, "no noise floor", naive_on=lambda model: model),
            implementation("torch.optim", "measures nothing"),
        )
        work = 4 * gradient_flops(bare.model, bare.following, forward)
        return Comparison(loops, errors, tolerance=1e-2, flops=work)

    return _case("step", "training step with a defect", build, forward)


def updates(window: int = 10) -> Case:
    """Singular values of the last updates of the attention matrices at a step, beside a decomposition at each."""

    def build(generator: Generator) -> Comparison:
        model = network(seed_from(generator), generator.device)
        matrices: list[Tensor] = [
            p for name, p in model.named_parameters() if "self_attn" in name and name.endswith("weight")
        ]
        moves = [[1e-3 * torch.randn_like(p) for p in matrices] for _ in range(window + 1)]

        def measure() -> Callable[[], Tensor]:
            found = UpdateGram(window, spectrum=True)
            CurvatureMonitor(model, loss(MODULE), measures=[found])
            first = found.columns.index("sigma_1")

            def step() -> Tensor:
                row = found.observe(0, (), True)
                assert row is not None
                return row[0, first : first + window]

            return step

        def plain() -> Callable[[], Tensor]:
            return naive.UpdateSpectrum([*matrices], window).step

        def run(step: Callable[[], Tensor], count: int, back: bool) -> Tensor:
            """What a step says after some moves, which may be taken back."""
            before = [p.detach().clone() for p in matrices] if back else []
            for move in moves[:count]:
                with torch.no_grad():
                    torch._foreach_add_(matrices, move)
                found = step()
            with torch.no_grad():
                for parameter, value in zip(matrices, before, strict=False):
                    parameter.copy_(value)
            return found

        def implementation(name: str, make: Callable[[], Callable[[], Tensor]], note: str = "") -> Implementation:
            step = make()
            run(step, window + 1, True)
            checked = lambda: run(make(), window + 1, True)  # noqa: E731
            return Implementation(name, lambda: run(step, 1, False), checked, note=note)

        thetas: list[Tensor] = []

        def kept() -> Tensor:
            thetas.append(torch.cat([p.detach().double().flatten() for p in matrices]))
            return thetas[-1]

        run(kept, window + 1, True)
        truth = torch.linalg.svdvals(torch.stack(thetas).diff(dim=0))
        ours, other = implementation(OURS, measure, "also gaps, k*, rotations, r90"), implementation("naive", plain)
        errors = {"singular values, relative error of the worst": lambda got: worst(got, truth)}
        size = sum(p.numel() for p in matrices)
        moved = (window + 5) * matrices[0].element_size() * size
        return Comparison((ours, other), errors, tolerance=1e-5, moved=moved, flops64=2 * window * size)

    return _case("updates", f"singular values of {window} updates at a step", build)


def program(runs: int, measured: bool) -> Case:
    """A step of each of several runs that are one program, beside one run alone that measures nothing."""

    def build(generator: Generator) -> Comparison:
        seed = seed_from(generator)
        device = str(generator.device)
        base = TrainConfig(seed=seed, device=device, batch_size=ROWS, successive=True, pairs=1, pca_every=0)

        def loss(stepped: Program) -> float:
            """Of the first run, after one more step of all."""
            stepped.update()
            first = stepped.runs[0]
            return float(first.task.evaluate(first.model, first.data)[0])

        truth = loss(together(base, 1, True, "loop"))
        ours, alone = together(base, runs, measured, "auto"), together(base, 1, False, "loop")
        both = (
            Implementation(OURS, ours.update, lambda: loss(ours), times=1 / runs),
            Implementation("one run alone", alone.update, lambda: loss(alone), note="measures nothing"),
        )
        errors = {"loss after a step, relative error": lambda got: abs(got / truth - 1)}
        work = (4 if measured else 1) * gradient_flops(network(seed, generator.device), batch(generator))
        # Adam's first step is the sign of a gradient, also of one that rounding decides.
        return Comparison(both, errors, tolerance=1e-3, flops=work)

    doing = "measured at every step" if measured else "unmeasured"
    return Case("program", f"step of a run, {runs} as one program, {doing}", MEMORY * (1 + runs // 16), build)


def together(config: TrainConfig, runs: int, measured: bool, strategy: Strategy) -> Program:
    """One program of runs with consecutive seeds, measured at every step or not at all."""
    configs = [replace(config, seed=config.seed + i, measure_every=int(measured)) for i in range(runs)]
    return Program([Training(config) for config in configs], strategy)


@dataclass
class Loop:
    """A training loop of the demo's network, its own from the seed on."""

    seed: int
    """Of the network and of its batches."""
    device: torch.device
    forward: Forward = MODULE
    monitored: bool = False
    """Whether a monitor measures the defect at every step."""
    edge_of: Any = None
    """A batch of which the largest eigenvalue of the Hessian is followed, if there is one."""
    naive_on: Callable[[nn.Module], nn.Module] | None = None
    """What makes, of the model at a step, that on which the defect is measured the naive way; it is not if None."""

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(self.seed)
        self.model, self.loss = network(self.seed, self.device), loss(self.forward)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=1.0)
        # What stands in .grad is the gradient of this very loss.
        self.monitor = CurvatureMonitor(self.model, self.loss, gradient="trusted") if self.monitored else None
        if self.edge_of is not None:
            edge = HessianEdges(self.edge_of, ends="largest", probes=0, preconditioned=False)
            self.monitor = CurvatureMonitor(self.model, self.loss, measures=[edge])
        self.naive_defects: list[float] = []
        self.following = batch(self.generator)

    def run(self, steps: int) -> Loop:
        for _ in range(steps):
            now, self.following = self.following, batch(self.generator)
            if self.naive_on is not None:
                defect, _ = naive.commutator(self.naive_on(self.model), self.loss, (now, self.following), ETA)
                self.naive_defects.append(float(defect))
            self.optimizer.zero_grad()
            self.loss(self.model, now).backward()
            if self.edge_of is not None and self.monitor is not None:
                self.monitor.step()
            elif self.monitor is not None:
                self.monitor.step(now, self.following)
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
        return self

    def defects(self) -> Tensor:
        """Of the steps so far, float64, however they were measured; a NaN if they were not."""
        measured = self.naive_defects if self.monitor is None else self.monitor.records()["defect_median"].tolist()
        return torch.tensor(measured or [math.nan], dtype=torch.float64)


# --------------------------------------------------------------------------------------------------------------- inputs


def seed_from(generator: Generator) -> int:
    return int(torch.randint(2**31, (), generator=generator, device=generator.device))


def loss(forward: Forward) -> Callable[[nn.Module, Any], Tensor]:
    return lambda model, batch: functional.cross_entropy(forward(model, batch[0]), batch[1])


def network(seed: int, device: torch.device | str = "cpu") -> Transformer:
    """The demo's, without a trace in the caller's random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Transformer().to(device)


def batch(generator: Generator) -> tuple[Tensor, Tensor]:
    x, y = (torch.randint(97, n, generator=generator, device=generator.device) for n in ((ROWS, 2), (ROWS,)))
    return x, y


def demo(generator: Generator, pairs: int) -> tuple[Transformer, list[tuple[Any, Any]], Subspace]:
    """The demo's network after eight steps, pairs of batches, and the execution basis of its way there."""
    loop = Loop(seed_from(generator), generator.device)
    pca = StreamingPCA(n_components=2, segments=attention_segments(loop.model))
    for _ in range(8):
        pca.partial_fit(flatten(loop.model))
        loop.run(1)
    loop.optimizer.zero_grad()
    drawn = [(batch(generator), batch(generator)) for _ in range(pairs)]
    return loop.model, drawn, Subspace.from_pca(pca, size=flatten(loop.model).numel())


def _case(name: str, title: str, build: Callable[[Generator], Comparison], forward: Forward = MODULE) -> Case:
    """Of the demo's model, called as any model is or as the package's trainer does."""
    if forward is SHORTER:
        return Case(f"{name}-trainer", f"{title}, the trainer of the package", MEMORY, build)
    return Case(name, f"{title}, {DEMO}", MEMORY, build)


def _bare(model: nn.Module, batches: list[Any], times: int = 1) -> Implementation:
    """The gradients on the batches, so many times."""
    loss_fn = loss(MODULE)

    def run() -> None:
        for one in batches:
            model.zero_grad()
            loss_fn(model, one).backward()

    return Implementation(f"{times * len(batches)} bare gradients", run, note="measures nothing", times=times)


def _after(steps: int) -> str:
    return f"after {steps} steps" if steps else "at the beginning"


def _pairs(count: int) -> str:
    return "one pair" if count == 1 else f"{count} pairs"


def curvlinops_bracket(model: nn.Module, pair: tuple[Any, Any]) -> Tensor:
    """Two gradients by autograd, two products by curvlinops, on the kernel of attention that it can take."""
    from curvlinops import HessianLinearOperator

    parameters, loss_fn = list(model.parameters()), nn.CrossEntropyLoss()
    with sdpa_kernel(SDPBackend.MATH):
        gradients = [naive.gradient(model, loss(MODULE), one) for one in pair]
        hessians = [HessianLinearOperator(model, loss_fn, parameters, [one], check_deterministic=False) for one in pair]
        vector: Tensor = hessians[1] @ gradients[0] - hessians[0] @ gradients[1]
    return vector


def curvlinops_hessian(model: nn.Module, one: Any) -> Any:
    from curvlinops import HessianLinearOperator

    return HessianLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), [one], check_deterministic=False
    )


def eigenthings_operator(model: nn.Module, one: Any) -> Any:
    from hessian_eigenthings import HessianOperator

    return HessianOperator(model, [one], loss(MODULE))


def pyhessian_of(model: nn.Module, one: Any) -> Any:
    """Of a copy: it leaves gradients with their graphs in the model."""
    from pyhessian import hessian

    return hessian(copy.deepcopy(model), nn.CrossEntropyLoss(), data=one, cuda=False)


# ------------------------------------------------------------------------------------------------------ truth and floor


@contextmanager
def products(model: nn.Module, one: Any) -> Iterator[tuple[Callable[[Any], NDArray[Any]], int]]:
    """Products with the Hessian by autograd alone, of NumPy's vectors or torch's, and its size."""
    parameters = list(model.parameters())
    sizes = [p.numel() for p in parameters]
    with sdpa_kernel(SDPBackend.MATH):
        grads = torch.autograd.grad(loss(MODULE)(model, one), parameters, create_graph=True)

        def multiply(vector: Any) -> NDArray[Any]:
            parts = torch.as_tensor(vector).to(parameters[0]).flatten().split(sizes)
            along = [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]
            rows = torch.autograd.grad(grads, parameters, along, retain_graph=True)
            return parameters_to_vector(rows).cpu().numpy()

        yield multiply, sum(sizes)


def in_float64(model: nn.Module) -> nn.Module:
    """A copy."""
    return copy.deepcopy(model).double()


def measured64(model: nn.Module, pairs: list[tuple[Any, Any]], basis: Subspace) -> Tensor:
    """Defects of the model in float64, and the shares of delta inside the basis, (2, N)."""
    exact, dense = in_float64(model), basis.to_dense().T.double()
    known = [naive.commutator(exact, loss(MODULE), pair, ETA) for pair in pairs]
    return torch.stack([torch.stack([value, naive.share(delta, dense)]) for value, delta in known], dim=-1)


def bracket_by_autograd(model: nn.Module, pair: tuple[Any, Any]) -> Tensor:
    """``H_B g_A - H_A g_B``, (P,): the derivative of ``g_B . v - g_A . w``, v and w being g_A and g_B held fixed."""
    parameters = list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        graphs = [torch.autograd.grad(loss(MODULE)(model, one), parameters, create_graph=True) for one in pair]
        g_a, g_b = map(parameters_to_vector, graphs)
        return parameters_to_vector(torch.autograd.grad(g_b @ g_a.detach() - g_a @ g_b.detach(), parameters))


def flops(run: Callable[[], object]) -> int:
    """Of the matrix products of a call."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def gradient_flops(model: nn.Module, one: Any, forward: Forward = MODULE) -> int:
    """Of the matrix products of one gradient."""
    return flops(lambda: torch.autograd.grad(loss(forward)(model, one), list(model.parameters())))
