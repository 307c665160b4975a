"""How far can ``reliable`` be trusted on models that nobody here wrote for it? Truth is computed without the package.

Eight small models, each with a loss as people write it, are trained with plain PyTorch from initialisation to a
training loss of 3e-5 and stopped on the way. There pairs of batches are measured by the public API of grokcurv, one or
four a call, and by monitors along stretches of training; and each pair once more in float64, by a copy of the model.

    python benches/trust.py              # 25 minutes on one core; writes docs/measurements/trust.csv.gz
    python benches/trust.py --tables     # the tables alone, from that file
    python benches/trust.py --tables --out new.csv.gz --against old.csv.gz    # what one commit trusts beside another

Pairs and weights are functions of the seed and of the pair's place in the study, so that two commits of the package
(``PYTHONPATH`` chooses) measure the same pairs at the same weights.
"""

from __future__ import annotations

import copy
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, starmap
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import tyro
from study import DOCS, Batch, Flag, Pair, cross_entropy, shares, stable_cross_entropy, table, take
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils._pytree import tree_map

import grokcurv as gc

ETA = 1e-3
ASKED: dict[str, dict[str, Any]] = {
    "difference": {"eta": ETA, "method": "difference"},
    "bracket": {"eta": ETA, "method": "bracket"},
    "auto": {"eta": "auto", "method": "difference"},
}
PHASES = ("early", "middle", "late")
EARLY_STEPS, MIDDLE_SHARE, LATE_LOSS, MOST_STEPS = 3, 0.4, 3e-5, 20_000
SIZES = (1, 2, 4, 32, 512)
STRETCH_SIZES = (2, 4, 32)
STRETCH_RATE = 0.1
"""Share of the learning rate in a stretch under a monitor: small batches at the whole rate forget what late knew."""
TRAINING_SIZE = 32
GROUP = 4
"""Pairs of a call that measures several."""

DIGITS = 1e-3
"""A truth that moves by more than this when the parameters move by their last bit is none."""

STEP_DIGITS = 1e-4
"""Nor is one whose steps are rounded by more than this: moved parameters take the same rounded step."""

SMALLEST = 1e-290
"""Gradients shorter than this have lost digits to underflow, or are about to."""

RECORD = DOCS / "measurements/trust.csv.gz"
NUMBERS = ("eta", "defect", "noise_floor")
MEASURED = {"method": "difference", **dict.fromkeys(NUMBERS, np.nan), "reliable": False, "why": ""}
"""What a row says of a measurement, and what where it failed."""

PLACE = ["model", "phase", "size", "kind", "asked", "place"]
"""What names a pair of the study, whatever commit measures it."""

Row = dict[str, Any]


# The models, as people write them.


def perceptron(activation: type[nn.Module], middle: type[nn.Module] = nn.Linear) -> nn.Module:
    return nn.Sequential(nn.Linear(16, 64), activation(), middle(64, 64), activation(), nn.Linear(64, 10))


class NarrowLinear(nn.Linear):
    """A layer that casts to bfloat16 in ``forward``, and back."""

    narrow = torch.bfloat16

    def forward(self, x: Tensor) -> Tensor:
        x_low, weight, bias = (tensor.to(self.narrow) for tensor in (x, self.weight, self.bias))
        return functional.linear(x_low, weight, bias).to(x.dtype)


class Encoder(nn.Module):
    """A transformer that reads (a, b, =) and answers a + b modulo 23."""

    def __init__(self, p: int = 23, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(p + 1, width)
        self.position = nn.Parameter(0.1 * torch.randn(3, width))
        layer = nn.TransformerEncoderLayer(
            width, 2, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, p)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x) + self.position)[:, -1])


class Recurrent(nn.Module):
    """An LSTM with a first state that ``forward`` makes without a word on its dtype."""

    def __init__(self, tokens: int = 10, width: int = 24) -> None:
        super().__init__()
        self.width = width
        self.embed, self.lstm = nn.Embedding(tokens, 12), nn.LSTM(12, width, batch_first=True)
        self.head = nn.Linear(width, tokens)

    def forward(self, x: Tensor) -> Tensor:
        h0 = torch.zeros(1, len(x), self.width)
        c0 = torch.zeros(1, len(x), self.width)
        return self.head(self.lstm(self.embed(x), (h0, c0))[0][:, -1])


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Tanh(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.BatchNorm2d(12),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(12 * 16, 6),
    )


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    tokens = {"vocab_size": 32, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, **tokens, **none)).train()


def language_model_loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(input_ids=batch[0], labels=batch[1]).loss


# What they learn.


def teacher(generator: torch.Generator) -> Batch:
    """Points of 16 dimensions, labelled by a random network."""
    x = torch.randn(1024, 16, generator=generator)
    weights = torch.randn(16, 32, generator=generator), torch.randn(32, 10, generator=generator)
    return x, (torch.tanh(x @ weights[0] / 4) @ weights[1]).argmax(1)


def addition(generator: torch.Generator, p: int = 23) -> Batch:
    a, b = torch.cartesian_prod(torch.arange(p), torch.arange(p)).T
    return torch.stack([a, b, torch.full_like(a, p)], dim=1), (a + b) % p


def patterns(generator: torch.Generator) -> Batch:
    """Six patterns of 8 x 8 under noise."""
    y = torch.randint(6, (1024,), generator=generator)
    shapes = torch.randn(6, 1, 8, 8, generator=generator)
    return shapes[y] + 1.5 * torch.randn(1024, 1, 8, 8, generator=generator), y


def first_token(generator: torch.Generator) -> Batch:
    """Six tokens, of which the first is asked for."""
    x = torch.randint(10, (1024, 6), generator=generator)
    return x, x[:, 0]


def permutations(generator: torch.Generator) -> Batch:
    """Texts (c, x, p_c(x), p_c(p_c(x)), ...) for eight permutations; the first two tokens are a prompt."""
    tables = torch.stack([torch.randperm(24, generator=generator) for _ in range(8)])
    c, token = torch.cartesian_prod(torch.arange(8), torch.arange(24)).T
    texts = [c, token + 8]
    for _ in range(4):
        token = tables[c, token]
        texts.append(token + 8)
    x = torch.stack(texts, dim=1)
    labels = x.clone()
    labels[:, :2] = -100
    return x, labels


def classes(model: nn.Module, batch: Batch) -> Batch:
    """Logits (n, classes) and labels (n,) behind a loss, without the dtype that the loss would give them."""
    return model(batch[0]), batch[1]


def next_tokens(model: nn.Module, batch: Batch) -> Batch:
    logits, labels = model(input_ids=batch[0]).logits[:, :-1].flatten(0, 1), batch[1][:, 1:].flatten()
    counted = labels != -100
    return logits[counted], labels[counted]


@dataclass(frozen=True)
class Problem:
    """A model, its task, and its loss twice: as people write it, and as logits and labels for the truth."""

    build: Callable[[], nn.Module]
    data: Callable[[torch.Generator], Batch]
    loss_fn: Callable[[nn.Module, Batch], Tensor] = cross_entropy
    logits: Callable[[nn.Module, Batch], Batch] = classes
    learning_rate: float = 3e-3
    smooth: bool = True
    largest: tuple[int, int] | None = None
    """Calls with one pair and calls with several at the largest batch size, where the usual number takes too long."""


PROBLEMS = {
    "mlp gelu": Problem(lambda: perceptron(nn.GELU), teacher, learning_rate=5e-3),
    "mlp tanh": Problem(lambda: perceptron(nn.Tanh), teacher, learning_rate=5e-3),
    "mlp relu": Problem(lambda: perceptron(nn.ReLU), teacher, learning_rate=5e-3, smooth=False),
    "mlp bfloat16": Problem(lambda: perceptron(nn.GELU, NarrowLinear), teacher, learning_rate=5e-3),
    "transformer": Problem(Encoder, addition, largest=(8, 1)),
    "conv batch norm": Problem(convolutional, patterns, learning_rate=1e-3, largest=(8, 1)),
    "lstm": Problem(Recurrent, first_token, learning_rate=5e-3, largest=(8, 1)),
    "gpt2": Problem(gpt2, permutations, language_model_loss, next_tokens, largest=(4, 1)),
}


# Truth.


@contextmanager
def in_float64() -> Iterator[None]:
    """What a model makes without naming a dtype is float64; attention runs on the kernel that has two derivatives."""
    with sdpa_kernel(SDPBackend.MATH), ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
        yield


def length(vector: Tensor) -> Tensor:
    """The 2-norm, where squares would underflow too."""
    largest = vector.abs().max()
    return largest * (vector / largest).norm() if largest > 0 else largest


class Truth:
    """Defects by their definition and by double backward, in float64, by a copy of the model."""

    def __init__(self, problem: Problem, model: nn.Module) -> None:
        self.problem, self.model = problem, copy.deepcopy(model).double()
        for module in self.model.modules():
            if isinstance(module, NarrowLinear):
                module.narrow = torch.float64
        self.parameters = list(self.model.parameters())

    def __call__(self, theta: Tensor, pair: Pair, method: str, eta: float) -> tuple[float, str]:
        """The defect at ``theta``, and how it was found; NaN where float64 cannot tell.

        The definition is evaluated as it stands. Where its gradients differ by too little for float64, their
        difference is integrated instead: ``g(theta - eta d) - g(theta)`` is ``-eta`` times the mean of ``H d`` over the
        way, by two points of Gauss and Legendre. A loss with kinks has no such integral.
        """
        theta = theta.double()
        first, second = tree_map(_double, pair)
        signs = torch.randint(2, theta.shape, generator=seeded("signs")) * 2 - 1
        thetas = theta, theta * (1 + signs * torch.finfo(torch.float64).eps)
        ways = {"bracket": (self.bracket,), "difference": (self.definition, self.integral)}[method]
        for way in ways if self.problem.smooth else ways[:1]:
            with in_float64():
                found, moved = (way(at, first, second, eta) for at in thetas)
            # As vectors: two lengths of nothing but noise may agree.
            if length(found) > 0 and length(found - moved) <= DIGITS * length(found):
                return float(length(found)), way.__name__
        return float("nan"), "none"

    def definition(self, theta: Tensor, a: Batch, b: Batch, eta: float) -> Tensor:
        """``delta / (|eta g_A| |eta g_B|)``, a vector, as are the others."""
        g_a, size_a, g_b, size_b = self._gradients(theta, a, b)
        past_a, past_b = theta - eta * g_a, theta - eta * g_b
        for past, g in ((past_a, g_a), (past_b, g_b)):
            if length(theta - past - eta * g) > STEP_DIGITS * eta * length(g):
                return torch.full_like(theta, torch.nan)
        change_a = self.gradient(past_b, a) - g_a
        change_b = self.gradient(past_a, b) - g_b
        return (change_a - change_b) / size_a / (eta * size_b)

    def integral(self, theta: Tensor, a: Batch, b: Batch, eta: float) -> Tensor:
        return self._products(theta, a, b, eta, (0.5 - 12**-0.5, 0.5 + 12**-0.5))

    def bracket(self, theta: Tensor, a: Batch, b: Batch, eta: float) -> Tensor:
        return self._products(theta, a, b, 0.0, (0.0,))

    def _products(self, theta: Tensor, a: Batch, b: Batch, eta: float, points: tuple[float, ...]) -> Tensor:
        """``(mean H_B g_A - mean H_A g_B) / (|g_A| |g_B|)`` over points of the way, by unit vectors."""
        g_a, size_a, g_b, size_b = self._gradients(theta, a, b)
        total = torch.zeros_like(theta)
        for t in points:
            total += self.gradient(theta - t * eta * g_a, b, g_a / size_a) / size_b
            total -= self.gradient(theta - t * eta * g_b, a, g_b / size_b) / size_a
        return total / len(points)

    def _gradients(self, theta: Tensor, a: Batch, b: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``g_A``, its length, ``g_B`` and its length; a length below :data:`SMALLEST` is NaN, and so is the truth."""
        g_a, g_b = self.gradient(theta, a), self.gradient(theta, b)
        size_a, size_b = (size if size >= SMALLEST else size * torch.nan for size in (length(g_a), length(g_b)))
        return g_a, size_a, g_b, size_b

    def gradient(self, theta: Tensor, batch: Batch, along: Tensor | None = None) -> Tensor:
        """The gradient, or its derivative along a direction: the Hessian's product with it."""
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        vector_to_parameters(theta, self.parameters)
        loss = stable_cross_entropy(*self.problem.logits(self.model, batch))
        parts = torch.autograd.grad(loss, self.parameters, create_graph=along is not None, materialize_grads=True)
        flat = torch.cat([part.flatten() for part in parts])
        if along is not None:
            parts = torch.autograd.grad(flat, self.parameters, along, materialize_grads=True)
            flat = torch.cat([part.flatten() for part in parts])
        for name, buffer in self.model.named_buffers():
            buffer.copy_(buffers[name])
        return flat


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


# Weights and pairs, functions of their place.


def seeded(*place: object) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(repr(place).encode()))


def draw(data: Batch, size: int, generator: torch.Generator) -> Pair:
    """Two batches without a sample in common, where there are enough."""
    count = len(data[0])
    if 2 * size <= count:
        index = torch.randperm(count, generator=generator)[: 2 * size]
    else:
        index = torch.randint(count, (2 * size,), generator=generator)
    first, second = index.split(size)
    return take(data, first), take(data, second)


@dataclass
class Stage:
    """A model on its way: what a measurement or a stretch of training starts from."""

    seed: int
    name: str
    phase: str
    problem: Problem
    model: nn.Module
    optimizer: torch.optim.Optimizer
    data: Batch
    loss: float
    step: int

    @cached_property
    def truth(self) -> Truth:
        return Truth(self.problem, self.model)

    def seeded(self, *place: object) -> torch.Generator:
        return seeded(self.seed, self.name, self.phase, *place)


def stages(name: str, seed: int, phases: tuple[str, ...]) -> Iterator[Stage]:
    """Trains by Adam; yields after three steps, where the loss has fallen to two fifths, and where it is 3e-5."""
    problem = PROBLEMS[name]
    data = problem.data(seeded(seed, name, "data"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded(seed, name).initial_seed())
        model = problem.build()
    optimizer = torch.optim.Adam(model.parameters(), lr=problem.learning_rate)
    generator, wanted, start = seeded(seed, name, "training"), list(phases), None
    for step in range(MOST_STEPS):
        if step % 5 == 0 or step == EARLY_STEPS:
            with torch.no_grad():
                loss = float(problem.loss_fn(model, data))
            start = start or loss
            reached = {"early": step >= EARLY_STEPS, "middle": loss <= MIDDLE_SHARE * start, "late": loss <= LATE_LOSS}
            while wanted and reached[wanted[0]]:
                trained = copy.deepcopy((model, optimizer))
                yield Stage(seed, name, wanted.pop(0), problem, *trained, data, loss, step)
            if not wanted:
                return
        batch, _ = draw(data, TRAINING_SIZE, generator)
        optimizer.zero_grad()
        problem.loss_fn(model, batch).backward()
        optimizer.step()
    raise RuntimeError(f"{name}: a training loss of {LATE_LOSS:g} was not reached in {MOST_STEPS} steps")


# Measurements.


def probe_rows(stage: Stage, options: Options) -> Iterator[Row]:
    """Pairs one a call and :data:`GROUP` a call, by a fresh probe for each method."""
    theta = parameters_to_vector(stage.model.parameters()).detach()
    for asked, arguments in ASKED.items():
        probe, failure = attempt(gc.CommutatorProbe, copy.deepcopy(stage.model), stage.problem.loss_fn, **arguments)
        for size in options.sizes:
            few = stage.problem.largest if size == SIZES[-1] else None
            singles, groups = few or (options.singles, options.groups)
            place = 0
            for count in [1] * singles + [GROUP] * groups:
                pairs = [draw(stage.data, size, stage.seeded(size, asked, place + i)) for i in range(count)]
                found, why = (None, failure) if failure else attempt(measured, probe, pairs)
                failed = {"why": why, "method": arguments["method"]}
                for index, pair in enumerate(pairs):
                    at = {"size": size, "kind": "probe", "asked": asked, "place": place + index, "index": index}
                    yield checked(stage, theta, pair, at, found[index] if found else failed)
                place += count


def attempt(run: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, str]:
    """What a call returns, and the error that it raised: another commit may refuse what this one takes.

    What a model does to an older commit is what the study is about, so it goes on.
    """
    try:
        return run(*arguments, **options), ""
    except Exception as error:
        return None, type(error).__name__


def measured(probe: gc.CommutatorProbe, pairs: list[Pair]) -> list[Row]:
    stats = probe.measure(pairs)
    columns = {name: getattr(stats, name).tolist() for name in (*NUMBERS, "reliable")}
    return pd.DataFrame(columns | {"method": stats.method}).to_dict("records")


def monitor_rows(stage: Stage, size: int, steps: int, successive: bool) -> Iterator[Row]:
    """A stretch of training under a monitor with all its defaults and a sampler, or on (this batch, next batch)."""
    kind = "successive" if successive else "monitor"
    model, optimizer = copy.deepcopy((stage.model, stage.optimizer))
    optimizer.param_groups[0]["lr"] = STRETCH_RATE * stage.problem.learning_rate
    loss_fn, drawn = stage.problem.loss_fn, []

    def sampler() -> Pair:
        drawn.append(draw(stage.data, size, stage.seeded(kind, size, len(points), len(drawn))))
        return drawn[-1]

    monitor, failure = attempt(gc.CurvatureMonitor, model, loss_fn, sampler=None if successive else sampler)
    rows = size if successive else TRAINING_SIZE
    batches = [draw(stage.data, rows, stage.seeded(kind, step))[0] for step in range(steps + 1)]
    points: list[tuple[Tensor, Pair]] = []
    found: list[Row] = []
    for following in pairwise(batches):
        optimizer.zero_grad()
        loss_fn(model, following[0]).backward()
        drawn.clear()
        record, why = (None, failure) if failure else attempt(watched, monitor, following if successive else ())
        found.append(record or {"why": why})
        pair = following if successive else (drawn or [sampler()])[0]
        points.append((parameters_to_vector(model.parameters()).detach().clone(), pair))
        optimizer.step()
    if successive and not failure:
        records, why = attempt(in_the_end, monitor, found)
        found = records or [{"why": why}] * steps
    for step, ((theta, pair), record) in enumerate(zip(points, found, strict=True)):
        at = {"size": size, "kind": kind, "asked": kind, "place": step, "index": 0}
        yield checked(stage, theta, pair, at, record | {"eta": ETA, "defect": record.get("defect_median", np.nan)})


def watched(monitor: gc.CurvatureMonitor, batches: Pair | tuple[()]) -> Row:
    """The record that a step with a sampler has left, as a logger sees it at once; of the other, that it is to come."""
    before = None if batches else monitor.last
    monitor.step(*batches)
    record = {"why": ""} if batches else monitor.last
    return {"why": "no record"} if record in (None, before) else dict(record)


def in_the_end(monitor: gc.CurvatureMonitor, found: list[Row]) -> list[Row]:
    """What the records say when the stretch is over: a later step may have told more of an earlier one."""
    records = iter(monitor.records().to_dict("records"))
    return [row if row["why"] else next(records) for row in found]


def checked(stage: Stage, theta: Tensor, pair: Pair, at: Row, values: Row) -> Row:
    """What was measured beside the truth at the step that was taken; a pair that failed is not reliable."""
    row: Row = {"model": stage.name, "phase": stage.phase, "loss": stage.loss, "at_step": stage.step} | at
    row |= {name: values.get(name, missing) for name, missing in MEASURED.items()}
    eta = row["eta"] if np.isfinite(row["eta"]) else ETA
    true, way = (np.nan, "failed") if row["why"] else stage.truth(theta, pair, row["method"], eta)
    error = abs(row["defect"] - true)
    return row | {"truth": true, "way": way, "error": error, "relative": error / true}


def run(options: Options) -> pd.DataFrame:
    rows: list[Row] = []
    begin = time.perf_counter()
    for place, name in enumerate(PROBLEMS):
        if name not in options.models:
            continue
        for stage in stages(name, options.seed, ("early",) if options.small else PHASES):
            here = [*probe_rows(stage, options)]
            for successive in (False, True):
                if successive and stage.phase == "early" and not options.small:
                    continue  # for time's sake: early is where least goes wrong
                size = STRETCH_SIZES[(place + PHASES.index(stage.phase) + successive) % len(STRETCH_SIZES)]
                here += monitor_rows(stage, size, options.steps, successive)
            rows += here
            told = sum(row["reliable"] for row in here)
            now = f"step {stage.step}, loss {stage.loss:.2g}, {len(here)} pairs, {told} reliable"
            print(f"{time.perf_counter() - begin:5.0f} s  {name}, {stage.phase}: {now}", flush=True)
    return pd.DataFrame(rows)


def write(record: pd.DataFrame, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rounded = record.replace([np.inf, -np.inf], np.nan).astype({"reliable": int})
    rounded.to_csv(path, index=False, float_format="%.6g", compression={"method": "infer", "mtime": 1})


def read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, converters={"why": str}).astype({"reliable": bool})


# Tables.

TARGETS = {"within 1 %": 0.99, "within 10 %": 0.999, "below floor": 0.99, "kept": 0.9}


def tally(rows: pd.DataFrame) -> dict[str, Any]:
    ways = rows["way"].value_counts()
    counts = {"pairs": len(rows), "failed": int(ways.get("failed", 0)), "no truth": int(ways.get("none", 0))}
    return counts | shares(rows[rows["truth"].notna()])


def cell(name: str, value: float) -> str:
    """In bold what misses its target."""
    if isinstance(value, int):
        return str(value)
    if np.isnan(value):
        return "-"
    text = f"{value:.2%}" if name != "worst" else f"{value:.2g}"
    return f"**{text}**" if value < TARGETS.get(name, -1.0) else text


def methods(record: pd.DataFrame) -> pd.Series:
    """What was asked of a probe; of a monitor's row, the method that the row has."""
    probes = record["kind"] == "probe"
    return record["asked"].where(probes, record["kind"] + ": " + record["method"]).rename("method")


def parts(record: pd.DataFrame, *keys: Any) -> Iterator[tuple[str, pd.DataFrame]]:
    """All of a record, and its groups by each key, each with what to call it."""
    yield "all", record
    for key in keys:
        for value, rows in record.groupby(key, sort=False):
            yield value if isinstance(value, str) else ", ".join(dict.fromkeys(value)), rows


def trust_table(record: pd.DataFrame) -> str:
    sizes = "size " + record["size"].astype(str)
    indices = ("index in call " + record["index"].astype(str)).where(record["kind"] == "probe")
    titles = [f"{name} (target {TARGETS[name]:.1%})" if name in TARGETS else name for name in tally(record)]
    groups = parts(record, "kind", "model", "phase", sizes, methods(record), indices)
    return table(["", *titles], ([name, *starmap(cell, tally(rows).items())] for name, rows in groups))


def against_table(record: pd.DataFrame, other: pd.DataFrame) -> str:
    """Of the pairs that the other record calls reliable, and rightly, how many are reliable here."""
    both = other.merge(record, on=PLACE, suffixes=("_there", "_here"), validate="one_to_one")
    same = (both["method_there"] == both["method_here"]) & (both["eta_there"] == both["eta_here"])
    moved = (both["truth_there"] / both["truth_here"] - 1).abs()[same] > 1e-4
    lines = []
    for name, rows in parts(both, "model", ["kind", "asked"]):
        line = [name, rows["reliable_there"].sum(), rows["reliable_here"].sum()]
        for limit in (0.1, 0.01):
            kept = rows["reliable_here"][rows["reliable_there"] & (rows["relative_there"] <= limit)]
            line += [len(kept), cell("kept", kept.mean())]
        lines.append(line)
    of_these = "of these reliable here (target 90 %)"
    titles = ["", "reliable there", "reliable here", "within 10 % there", of_these, "within 1 % there", of_these]
    return (
        f"{len(both)} pairs in both records, {len(other) - len(both)} in the other only; "
        f"{moved.sum()} with another truth, so at other weights (there should be none).\n\n" + table(titles, lines)
    )


@dataclass
class Options:
    """How far can `reliable` be trusted? Trains, measures, computes the truth, and prints the tables."""

    out: Path = RECORD
    """Compressed if its name ends in .gz."""
    seed: int = 0
    singles: int = 12
    """Pairs that are measured one a call, in each cell of model, phase, batch size and method."""
    groups: int = 3
    """Calls with four pairs, in each cell."""
    steps: int = 200
    """Training steps under each monitor."""
    sizes: tuple[int, ...] = SIZES
    models: tuple[str, ...] = tuple(PROBLEMS)
    tables: Flag = False
    """Print the tables from the file at --out, without measuring."""
    small: Flag = False
    """A few pairs of each model after three steps of training: shows that everything works, in a minute."""
    against: Path | None = None
    """The record of another commit, to compare with pair by pair."""

    def __post_init__(self) -> None:
        if self.small:
            self.singles, self.groups, self.steps, self.sizes = 1, 1, 4, (1, 4)
            if self.out == RECORD:  # which is of the whole study
                self.out = Path("runs/trust-small.csv.gz")


def main(options: Options) -> None:
    torch.set_num_threads(1)
    if not options.tables:
        write(run(options), options.out)
    record = read(options.out)
    print(trust_table(record))
    if options.against:
        print("", against_table(record, read(options.against)), sep="\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
