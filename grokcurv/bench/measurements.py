"""Measurements of the demo's model beside the naive ones, bare gradients, curvlinops and the plain training loop.

A commutator must do four gradients, K of them in a whole measurement 4 K; a bracket must do two gradients and two
Hessian-vector products. The floor is the flops of their matrix products, counted on the module, at the rate of a large
product. Truth is the same model in float64, by the definition, where the subtraction costs no digits that show.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from grokcurv.admission import Finding
from grokcurv.bench import naive
from grokcurv.bench.comparison import OURS, Case, Comparison, Implementation, relative, worst
from grokcurv.commutator import CommutatorProbe
from grokcurv.flat import attention_segments, flatten
from grokcurv.gradients import Strategy, capture
from grokcurv.modular import TrainConfig, Transformer, fast
from grokcurv.modular.ensemble import Buffers, Ensemble
from grokcurv.modular.evaluation import evaluate
from grokcurv.modular.trainer import Training
from grokcurv.monitor import CHECK_EVERY, CurvatureMonitor
from grokcurv.pca import StreamingPCA
from grokcurv.subspace import Subspace

ETA = 1e-3
ROWS = 512
"""Of a batch."""
MEMORY = 1 << 30
DEMO = "demo's model"
COMPARED = 5
"""Training steps whose defects are compared with float64 truth."""

ADMITTED = 14
"""Gradients whose time admission may take."""

SUPPORTS: tuple[Literal["full"], Literal["matched"]] = ("full", "matched")
"""Of the random controls."""

Forward = Callable[[Any, Tensor], Tensor]
MODULE: Forward = Transformer.__call__
"""The module's own forward pass, as any model has one."""
SHORTER: Forward = fast.logits
"""The forward pass of the package's trainer, which leaves out what nobody reads."""


def pair() -> Case:
    """One pair of batches."""

    def build(generator: Generator) -> Comparison:
        model, batches, _ = demo(generator, 1)
        loss_fn = loss(MODULE)
        without, probe = (CommutatorProbe(model, loss_fn, noise_floor=floor) for floor in (False, True))
        truth = defects64(model, batches)
        return Comparison(
            (
                Implementation(OURS, lambda: without.measure(batches).defect),
                Implementation(
                    f"{OURS}, with its noise floor", lambda: probe.measure(batches).defect, note="does more"
                ),
                Implementation("naive", lambda: naive.commutator(model, loss_fn, batches[0], ETA)[0][None]),
                _bare(model, batches),
            ),
            {"defect, relative error": lambda got: math.nan if got is None else worst(got, truth)},
            tolerance=1e-2,
            flops=4 * gradient_flops(model, batches[0][0]),
        )

    return Case("pair", f"commutator of a pair, {DEMO}", MEMORY, build)


def admission() -> Case:
    """What a model costs when it is first met, beside as many gradients as that may take."""

    def build(generator: Generator) -> Comparison:
        model, (pair,), _ = demo(generator, 1)
        loss_fn, one = loss(MODULE), pair[0]
        gradient = gradient_flops(model, one)

        def admit(brackets: bool) -> tuple[Finding, ...]:
            engine = CommutatorProbe(model, loss_fn).gradients
            engine.admit(one, brackets=brackets)
            return engine.admission

        def bare() -> None:
            model.zero_grad()
            loss_fn(model, one).backward()

        return Comparison(
            (
                Implementation(OURS, lambda: admit(True)),
                Implementation(f"{OURS}, without second derivatives", lambda: admit(False), note="does less"),
                Implementation(f"{ADMITTED} bare gradients", bare, note="measures nothing", times=ADMITTED),
            ),
            {"checks that failed": lambda found: math.nan if found is None else sum(not f.passed for f in found)},
            tolerance=0.0,
            flops=2 * gradient + bracket_flops(model, pair) // 2,  # told where to stop and not, and a product
            flops64=2 * gradient,
        )

    return Case("admission", f"admission, {DEMO}", MEMORY, build)


def whole(pairs: int, forward: Forward = MODULE) -> Case:
    """Pairs projected on the execution basis, with both random controls and the noise floor."""

    def build(generator: Generator) -> Comparison:
        model, batches, basis = demo(generator, pairs)
        probe = CommutatorProbe(model, loss(forward), basis=basis)
        dense = basis.to_dense().T.contiguous()
        truth = defects64(model, batches, dense.double())

        def ours() -> tuple[Tensor, ...]:
            stats = probe.measure(batches)
            assert stats.parallel is not None
            assert stats.support is not None
            inside = stats.parallel / (stats.bracket_norm * stats.eta.square())
            full, matched = (basis.random_baseline(support).mean for support in SUPPORTS)
            return stats.defect, inside, inside / full, stats.parallel / stats.support / matched

        def plain() -> Tensor:
            rows = naive.measure(model, loss(MODULE), batches, dense, ETA)
            return torch.tensor([row[:2] for row in rows], dtype=torch.float64).T

        def error(index: int) -> Callable[[Any], float]:
            return lambda got: math.nan if got is None else worst(got[index], truth[index])

        implementations = [
            Implementation(OURS, ours),
            Implementation("naive", plain, note="no noise floor"),
            _bare(model, batches),
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
        return Comparison(
            tuple(implementations),
            {"defect, relative error of the worst": error(0), "share inside the basis, the same": error(1)},
            tolerance=1e-2,
            flops=4 * pairs * gradient_flops(model, batches[0][0], forward),
        )

    trainer = forward is SHORTER
    return Case(
        "whole-trainer" if trainer else "whole",
        f"whole measurement, {_pairs(pairs)}, {'the trainer of the package' if trainer else DEMO}",
        MEMORY,
        build,
    )


def bracket(pairs: int) -> Case:
    """``H_B g_A - H_A g_B``, the vector."""

    def build(generator: Generator) -> Comparison:
        model, batches, _ = demo(generator, pairs)
        loss_fn = loss(MODULE)
        probe = CommutatorProbe(model, loss_fn, method="bracket", noise_floor=False)
        truth = torch.stack([bracket64(model, pair) for pair in batches])

        def ours() -> Tensor:
            stats = probe.measure(batches, keep_delta=True)
            assert stats.delta is not None
            return stats.delta / stats.eta.square()[:, None]

        def error(got: Tensor) -> float:
            return max(relative(x, y) for x, y in zip(got, truth, strict=True))

        return Comparison(
            (
                Implementation(OURS, ours),
                Implementation(
                    "curvlinops",
                    lambda: torch.stack([curvlinops_bracket(model, pair) for pair in batches]),
                    needs=("curvlinops",),
                ),
            ),
            {"vector, relative error of the worst": error},
            tolerance=1e-4,  # five times the worst in docs/numerics.md
            flops=pairs * bracket_flops(model, batches[0]),
        )

    return Case("bracket", f"exact bracket, {_pairs(pairs)}, {DEMO}", MEMORY, build)


def training(forward: Forward = MODULE) -> Case:
    """Loop steps with a certified defect at every one, beside the plain loop; one check of the noise floor."""

    def build(generator: Generator) -> Comparison:
        seed, device = seed_from(generator), generator.device
        kinds: dict[str, dict[str, Any]] = {
            OURS: {"forward": forward, "monitored": True},
            "torch.optim, four gradients at every step": {"naive_defects": True},
            "torch.optim": {},
        }
        exact = Loop(seed, device, naive_defects=True, exact=True).run(COMPARED)
        truth, bare = torch.tensor(exact.defects, dtype=torch.float64), Loop(seed, device).run(COMPARED)
        notes = dict(zip(kinds, ("", "no noise floor", "measures nothing"), strict=True))

        def checked(options: dict[str, Any]) -> Callable[[], Loop]:
            return lambda: Loop(seed, device, **options).run(COMPARED)

        def run(options: dict[str, Any]) -> Callable[[], object]:
            loop = Loop(seed, device, **options)
            return lambda: loop.run(CHECK_EVERY)

        def error(got: Loop) -> float:
            defects = torch.tensor(got.measured(), dtype=torch.float64)
            return worst(defects, truth) if len(defects) else math.nan

        errors: dict[str, Callable[[Any], float]] = {"defect, relative error of the worst": error}
        if forward is MODULE:  # another forward pass rounds otherwise
            errors["weights, distance from the plain loop's"] = lambda got: float((got.theta() - bare.theta()).norm())
        flops = gradient_flops(bare.model, bare.draw(), forward)
        return Comparison(
            tuple(
                Implementation(name, run(options), checked(options), note=notes[name], times=1 / CHECK_EVERY)
                for name, options in kinds.items()
            ),
            errors,
            tolerance=1e-2,
            flops=4 * flops,
        )

    trainer = forward is SHORTER
    return Case(
        "step-trainer" if trainer else "step",
        f"training step with a defect, {'the trainer of the package' if trainer else DEMO}",
        MEMORY,
        build,
    )


def program(runs: int, measured: bool) -> Case:
    """A step of each of several runs that are one program, beside one run alone that measures nothing."""

    def build(generator: Generator) -> Comparison:
        seed = seed_from(generator)
        base = TrainConfig(device=str(generator.device), batch_size=ROWS, successive=True, pairs=1, pca_every=0)

        def stepper(count: int, measured: bool, strategy: Strategy) -> tuple[Callable[[], object], Callable[[], float]]:
            """What takes a step of so many runs, and the loss of the first of them afterwards."""
            configs = [replace(base, seed=seed + i, measure_every=int(measured)) for i in range(count)]
            together = Ensemble([Training(config, None) for config in configs], strategy)
            buffers, first = Buffers(together.runs), together.runs[0]

            def step() -> None:
                together.update(buffers)
                for run in together.runs:
                    run.step += 1

            def loss() -> float:
                step()
                return evaluate(first.config, first.model, first.data, {})["train_loss"]

            return step, loss

        (_, truth), alone, ours = stepper(1, True, "loop"), stepper(1, False, "loop"), stepper(runs, measured, "auto")
        wanted, first = truth(), batch(generator)
        return Comparison(
            (
                Implementation(OURS, *ours, times=1 / runs),
                Implementation("one run alone", *alone, note="measures nothing"),
            ),
            {"loss after a step, relative error": lambda got: abs(got / wanted - 1)},
            tolerance=1e-3,  # Adam's first step is the sign of a gradient, also of one that rounding decides
            flops=(4 if measured else 1) * gradient_flops(network(seed, generator.device), first),
        )

    doing = "measured at every step" if measured else "unmeasured"
    return Case("program", f"step of a run, {runs} as one program, {doing}", MEMORY * (1 + runs // 16), build)


class Loop:
    """A training loop of the demo's network, its own from the seed on.

    Attributes:
        defects: of the steps so far, if they were measured the naive way; with ``exact`` on a copy in float64.
    """

    def __init__(
        self,
        seed: int,
        device: torch.device,
        *,
        forward: Forward = MODULE,
        monitored: bool = False,
        naive_defects: bool = False,
        exact: bool = False,
    ) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.model = network(seed, device)
        self.loss = loss(forward)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=1.0)
        # What stands in .grad is the gradient of this very loss.
        self.monitor = CurvatureMonitor(self.model, self.loss, gradient="trusted") if monitored else None
        self.naive_defects, self.exact = naive_defects, exact
        self.defects: list[float] = []
        self.following = self.draw()

    def draw(self) -> tuple[Tensor, Tensor]:
        return batch(self.generator)

    def run(self, steps: int) -> Loop:
        for _ in range(steps):
            now, self.following = self.following, self.draw()
            if self.naive_defects:
                model = copy.deepcopy(self.model).double() if self.exact else self.model
                self.defects.append(float(naive.commutator(model, self.loss, (now, self.following), ETA)[0]))
            self.optimizer.zero_grad()
            self.loss(self.model, now).backward()
            if self.monitor is not None:
                self.monitor.step(now, self.following)
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
        return self

    def measured(self) -> list[float]:
        """The defects, however they were measured."""
        return self.defects if self.monitor is None else self.monitor.records()["defect_median"].tolist()

    def theta(self) -> Tensor:
        return flatten(self.model)


# --------------------------------------------------------------------------------------------------------------- inputs


def seed_from(generator: Generator) -> int:
    return int(torch.randint(2**31, (), generator=generator, device=generator.device))


def loss(forward: Forward) -> Callable[[nn.Module, Any], Tensor]:
    return lambda model, batch: functional.cross_entropy(forward(model, batch[0]), batch[1])


def network(seed: int, device: torch.device) -> Transformer:
    """The demo's, without a trace in the caller's random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Transformer().to(device)


def batch(generator: Generator) -> tuple[Tensor, Tensor]:
    x, y = (torch.randint(97, n, generator=generator, device=generator.device) for n in ((ROWS, 2), (ROWS,)))
    return x, y


def demo(generator: Generator, pairs: int) -> tuple[Transformer, list[tuple[Any, Any]], Subspace]:
    """The demo's network after eight steps, pairs of batches, and the execution basis of its way there."""
    model = network(seed_from(generator), generator.device)
    pca = StreamingPCA(n_components=2, segments=attention_segments(model))
    optimizer, loss_fn = torch.optim.AdamW(model.parameters(), lr=1e-3), loss(MODULE)
    for _ in range(8):
        pca.partial_fit(flatten(model))
        optimizer.zero_grad()
        loss_fn(model, batch(generator)).backward()
        optimizer.step()
    optimizer.zero_grad()
    drawn = [(batch(generator), batch(generator)) for _ in range(pairs)]
    return model, drawn, Subspace.from_pca(pca, size=flatten(model).numel())


def _bare(model: nn.Module, pairs: list[tuple[Any, Any]]) -> Implementation:
    loss_fn = loss(MODULE)

    def run() -> None:
        for pair in pairs:
            for one in (*pair, *pair):
                model.zero_grad()
                loss_fn(model, one).backward()

    return Implementation(f"{4 * len(pairs)} bare gradients", run, note="measures nothing")


def _pairs(count: int) -> str:
    return "one pair" if count == 1 else f"{count} pairs"


def curvlinops_bracket(model: nn.Module, pair: tuple[Any, Any]) -> Tensor:
    """Two gradients by autograd, two products by curvlinops, on the kernel of attention that it can take."""
    from curvlinops import HessianLinearOperator

    parameters, loss_fn = list(model.parameters()), nn.CrossEntropyLoss()
    with sdpa_kernel(SDPBackend.MATH):
        gradients = [
            torch.cat([g.flatten() for g in torch.autograd.grad(loss_fn(model(x), y), parameters)]) for x, y in pair
        ]
        hessians = [HessianLinearOperator(model, loss_fn, parameters, [one], check_deterministic=False) for one in pair]
        vector: Tensor = hessians[1] @ gradients[0] - hessians[0] @ gradients[1]
    return vector


# ------------------------------------------------------------------------------------------------------ truth and floor


def defects64(model: nn.Module, pairs: list[tuple[Any, Any]], basis: Tensor | None = None) -> Tensor:
    """Defects of the model in float64, (N,); with a basis (P, K) also the shares of delta inside, (2, N)."""
    exact, rows = copy.deepcopy(model).double(), []
    for pair in pairs:
        value, delta = naive.commutator(exact, loss(MODULE), pair, ETA)
        rows.append(value if basis is None else torch.stack([value, (basis.T @ delta).norm() / delta.norm()]))
    return torch.stack(rows, dim=-1)


def bracket64(model: nn.Module, pair: tuple[Any, Any]) -> Tensor:
    """``H_B g_A - H_A g_B`` of the model in float64, each product the forward derivative of a gradient."""
    exact = copy.deepcopy(model).double()
    parameters = {name: p.detach() for name, p in exact.named_parameters()}

    def gradient(one: Any) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
        def value(parameters: dict[str, Tensor]) -> Tensor:
            logits: Tensor = torch.func.functional_call(exact, parameters, (one[0],))
            return functional.cross_entropy(logits, one[1])

        return torch.func.grad(value)

    with sdpa_kernel(SDPBackend.MATH):
        of_a, of_b = map(gradient, pair)
        g_a, g_b = of_a(parameters), of_b(parameters)
        first = torch.func.jvp(of_b, (parameters,), (g_a,))[1]
        second = torch.func.jvp(of_a, (parameters,), (g_b,))[1]
    return torch.cat([(first[name] - second[name]).flatten() for name in parameters])


def gradient_flops(model: nn.Module, one: Any, forward: Forward = MODULE) -> int:
    """Of the matrix products of one gradient."""
    with FlopCounterMode(display=False) as counter:
        loss(forward)(model, one).backward()
    model.zero_grad()
    return int(counter.get_total_flops())


def bracket_flops(model: nn.Module, pair: tuple[Any, Any]) -> int:
    """Of two gradients, and of two products by differentiating their graphs once more."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        graphs = [torch.autograd.grad(loss(MODULE)(model, one), parameters, create_graph=True) for one in pair]
        for graph, vectors in zip(graphs, reversed(graphs), strict=True):
            torch.autograd.grad(graph, parameters, [v.detach() for v in vectors])
    return int(counter.get_total_flops())
