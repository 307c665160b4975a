"""What models, losses and loops really do: a row that is called reliable is then right.

Truths are of ``truth.py``, which uses nothing of the package: float64 on a copy of the model.
"""

from __future__ import annotations

import math
import warnings
from itertools import pairwise

import pytest
import torch
from study import stable_cross_entropy as cross_entropy
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from truth import METHODS, Truth, check, classify, of, perceptron, points, right, seed, train, twins

import grokcurv as gc


def words(generator: torch.Generator, batches: int, size: int = 8, length: int = 3, count: int = 9):
    return [
        (torch.randint(count, (size, length), generator=generator), torch.randint(4, (size,), generator=generator))
        for _ in range(batches)
    ]


def classify64(model: nn.Module, batch) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


# -------------------------------------------------------------------------------------- types that the code writes down


class Typed(nn.Module):
    """Asks for ``narrow`` somewhere; the truth asks for float64 there."""

    def __init__(self, narrow: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.narrow = narrow
        self.body, self.head = nn.Linear(9, 12), nn.Linear(12, 4)


class Indicators(Typed):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(functional.one_hot(x, 9).to(self.narrow).mean(1))))


class Logits(Indicators):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(self.narrow)


class SoftmaxType(Typed):
    def forward(self, x: Tensor) -> Tensor:
        h = self.body(functional.one_hot(x, 9).to(self.body.weight.dtype))
        weights = torch.softmax(h.sum(-1), dim=-1, dtype=self.narrow).to(h.dtype)
        return self.head(torch.tanh((weights[..., None] * h).sum(1)))


class FreshState(Typed):
    """A recurrence whose first state is made on the spot, of the default type."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(9, 12, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.one_hot(x, 9).to(self.narrow)
        return self.head(self.cell(x, torch.zeros(1, len(x), 12))[0][:, -1])


class Positions(Typed):
    """A table of positions, filled in by numbers made on the spot, and a mask of minus infinity."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(functional.one_hot(x, 9).to(self.narrow))
        angles = torch.arange(x.shape[1])[:, None] / torch.logspace(0, 1, 12)
        h = h + torch.sin(angles)
        scores = (h @ h.mT) / math.sqrt(12.0)
        scores = scores + torch.full(scores.shape[-2:], -math.inf).triu(1)
        return self.head((scores.softmax(-1) @ h)[:, -1].tanh())


class ByHand(Typed):
    """Half precision in the middle, and back."""

    def __init__(self) -> None:
        super().__init__(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(functional.one_hot(x, 9).to(self.body.weight.dtype).mean(1)).to(self.narrow)
        return self.head(torch.tanh(h).to(self.body.weight.dtype))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [Indicators, Logits, SoftmaxType, FreshState, Positions])
def test_single_precision_that_the_model_asks_for(kind, method, generator):
    model, pair = of(kind, generator), tuple(words(generator, 2))
    assert check(model, classify, pair, method=method, rtol=0.02).reliable.all()


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_by_hand_is_rounding(method, generator):
    """The float64 evaluation has none of it, and says how much there is."""
    model, pair = of(ByHand, generator), tuple(words(generator, 2))
    assert check(model, classify, pair, method=method, rtol=0.02).reliable
    probe = gc.CommutatorProbe(model, classify, method=method)
    probe.measure([pair])
    assert probe.errors[method][0, 0, 1] > 1e-4  # of the gradients, relative: bfloat16 has eight bits


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("where", ["the forward pass", "the loss"])
def test_autocast_that_the_loss_enters(where, method, generator):
    def loss_fn(model: nn.Module, batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch[0])
            if where == "the loss":
                return functional.cross_entropy(logits, batch[1])
        return functional.cross_entropy(logits.float(), batch[1])

    for _ in range(3):
        model, pair = of(perceptron, generator), tuple(points(generator, 2))
        check(model, loss_fn, pair, Truth(model, classify), method=method)


@pytest.mark.parametrize("eta", [1e-3, 1e-6, "auto"])
def test_single_precision_inside_a_double_model(eta, generator):
    """A step that float64 resolves with ease would drown in what the model rounds in between."""
    model = of(SoftmaxType, generator).double()
    pair = tuple(words(generator, 2))
    assert check(model, classify, pair, eta=eta, rtol=0.02).reliable


@pytest.mark.parametrize("method", METHODS)
def test_a_language_model_that_computes_its_own_loss(method, generator):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=6, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    model = of(lambda: transformers.GPT2LMHeadModel(config), generator)
    pair = []
    for _ in range(2):
        tokens = torch.randint(11, (4, 6), generator=generator)
        pair.append({"input_ids": tokens, "labels": tokens})

    def next_words(model: nn.Module, batch) -> Tensor:
        logits = model(batch["input_ids"]).logits[:, :-1]
        return functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    def loss_fn(model: nn.Module, batch) -> Tensor:
        return model(**batch).loss

    assert check(model, loss_fn, tuple(pair), Truth(model, next_words), method=method, rtol=0.05).reliable


# ------------------------------------------------------------------------------------------------------------ confident


def confident(generator: torch.Generator, margin: float, size: int, activation=nn.Tanh, dtype=torch.float32):
    """A perceptron that is right about two batches, of which the least certain is ahead by ``margin``."""
    model = of(lambda: perceptron(activation, hidden=24), generator).double()
    with torch.no_grad():
        x = torch.randn(64 * size, 6, generator=generator, dtype=torch.float64)
        top = model(x).topk(2, dim=1)
        lead = top.values[:, 0] - top.values[:, 1]
        chosen = lead.topk(2 * size).indices[torch.randperm(2 * size, generator=generator)]
        model[2].weight *= margin / lead[chosen].min()
        model[2].bias *= margin / lead[chosen].min()
        batches = [(x[part].to(dtype), top.indices[part, 0]) for part in chosen.split(size)]
    return model.to(dtype), tuple(batches)


FORMS = {"difference": {}, "automatic step": {"eta": "auto"}, "bracket": {"method": "bracket"}}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_confident_on_a_small_batch(size, form, generator):
    for margin in (4.0, 9.0, 13.0, 16.0):
        model, pair = confident(generator, margin, size, nn.GELU)
        check(model, classify, pair, Truth(model, classify64), **FORMS[form])


@pytest.mark.parametrize("form", ["automatic step", "bracket"])
@pytest.mark.parametrize(
    ("dtype", "margin"),
    [(dtype, margin) for dtype in (torch.float32, torch.float64) for margin in (25.0, 33.0, 36.0)]
    + [(torch.float64, 40.0), (torch.float64, 45.0)],
)
def test_float64_rounds_away_the_rest_of_a_certain_class(dtype, margin, form, generator):
    """p - 1 has no digit left in float64 from a margin of 37 on, and fewer and fewer before."""
    for activation in (nn.Tanh, nn.Tanh, nn.ReLU):
        model, pair = confident(generator, margin, 6, activation, dtype)
        check(model, classify, pair, Truth(model, classify64), **FORMS[form])


@pytest.mark.parametrize(("form", "samples"), [("automatic step", 10), ("bracket", 2)])
def test_a_sample_of_rounding_may_leave_a_number_as_it_is(form, samples, generator):
    """In a batch of one all the rounding is that of one probability; which sample is drawn must not matter."""
    for activation in (nn.Tanh, nn.ReLU):
        for margin in (36.0, 37.5):
            model, (a, b) = confident(generator, margin, 1, activation)
            truth = Truth(model, classify64)
            probe = gc.CommutatorProbe(model, classify, **FORMS[form])
            for number in range(samples):
                stats = probe.measure([(a, b)], seed=number)
                if stats.reliable:
                    expected = truth.defect(stats.method, a, b, float(stats.eta))
                    assert float(stats.defect) == pytest.approx(expected, rel=0.1), (margin, number, stats.noise_floor)


def test_both_precisions_lose_the_same_digits(generator):
    """p - 1 is zero in either: that they agree says nothing."""
    for margin in (39.0, 40.0, 41.0, 42.0):
        for form in ("automatic step", "bracket"):
            model, pair = confident(generator, margin, 6)
            check(model, classify, pair, Truth(model, classify64), **FORMS[form])


def test_certain_by_the_logarithm_of_probabilities(generator):
    """The same cancellation, spelled differently."""
    for loss_fn in (
        lambda model, batch: functional.nll_loss(model(batch[0]).log_softmax(-1), batch[1]),
        lambda model, batch: functional.nll_loss(model(batch[0]).softmax(-1).log(), batch[1]),
        lambda model, batch: functional.cross_entropy(model(batch[0]).float(), batch[1]),
    ):
        for margin in (12.0, 30.0, 34.0):
            model, pair = confident(generator, margin, 4)
            check(model, loss_fn, pair, Truth(model, classify64), method="bracket")


# ------------------------------------------------------------------------------------------- very small, and no numbers


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-22, 1e-30, 1e-40])
def test_a_loss_scaled_down(scale, method, generator):
    """Products of gradients leave the range of float32, and the last of the gradients too."""

    def loss_fn(model: nn.Module, batch) -> Tensor:
        return classify(model, batch) * scale

    model, pair = of(perceptron, generator), tuple(points(generator, 2))
    check(model, loss_fn, pair, method=method)
    monitor = gc.CurvatureMonitor(model, loss_fn, sampler=lambda: pair, method=method)
    monitor.step()
    row = monitor.last
    assert right(row["defect_median"], row["reliable"], Truth(model, loss_fn).defect(row["method"], *pair))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["no gradient", "infinite", "not a number"])
def test_a_batch_of_which_nothing_can_be_said(kind, method, generator):
    batches = points(generator, 5)
    if kind == "no gradient":
        batches[2][1].fill_(-100)  # all of it is padding
    else:
        batches[2][0][0, 0] = math.inf if kind == "infinite" else math.nan

    def loss_fn(model: nn.Module, batch) -> Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1], reduction="sum", ignore_index=-100)

    def skip(step: int, model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.grad.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gc.AdmissionWarning)
        run = twins(perceptron, loss_fn, batches, method=method, after_backward=skip)
    records = run.records
    assert not records["reliable"][1:3].any()
    assert records["reliable"][[0, 3]].all()


# --------------------------------------------------------------------------------------------- from one step to another


def classified(model: nn.Module) -> Truth:
    return Truth(model, classify64)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("kind", ["confident", "loaded", "far"])
def test_weights_that_jump_between_two_checks(kind, sampled, generator):
    def jump(step: int, model: nn.Module) -> None:
        if step != 4:
            return
        with torch.no_grad():
            for parameter in model.parameters():
                if kind == "confident":
                    parameter *= 6.0
                elif kind == "loaded":
                    parameter.copy_(torch.randn(parameter.shape))
                else:
                    parameter += 30.0 * torch.randn(parameter.shape)
        classify(model, batches[4]).backward(inputs=list(model.parameters()))

    batches = points(generator, 9)
    draws = iter(list(pairwise(batches)) * 2)
    options = {"sampler": draws.__next__} if sampled else {}
    run = train(perceptron, classify, batches, truth=classified, after_backward=jump, check_every=6, **options)
    run.assert_right()
    assert run.records["reliable"][:3].all() or not sampled


@pytest.mark.parametrize("method", METHODS)
def test_very_different_pairs_in_one_measurement(method, generator):
    """Errors are found on the first pair alone; the others' own sizes tell whether they are enough."""
    model = of(perceptron, generator)
    batches = points(generator, 10)
    for (x, _), scale in zip(batches, (1.0, 1.0, 1e3, 1e-3, 1e-6, 1.0, 30.0, 1e-2, 1e2, 1e2), strict=True):
        x *= scale
    pairs = list(zip(batches[::2], batches[1::2], strict=True))
    for order in (pairs, pairs[::-1]):
        stats = gc.CommutatorProbe(model, classify, method=method).measure(order)
        truth = Truth(model, classify64)
        for pair, defect, reliable in zip(order, stats.defect.tolist(), stats.reliable.tolist(), strict=True):
            assert right(defect, reliable, truth.defect(method, *pair))


def scaled(factor: float, when):
    def change(step: int, model: nn.Module) -> None:
        for parameter in model.parameters() if when(step) else ():
            parameter.grad *= factor

    return change


def decayed(step: int, model: nn.Module) -> None:
    for parameter in model.parameters() if step % 5 else ():
        parameter.grad += 0.01 * parameter.detach()


def clipped(step: int, model: nn.Module) -> None:
    if step > 2:
        nn.utils.clip_grad_norm_(model.parameters(), 1e-2)


def zeroed(step: int, model: nn.Module) -> None:
    if step > 6:
        list(model.parameters())[-1].grad.zero_()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"after_backward": scaled(0.97, lambda step: True)}, id="scaled"),
        pytest.param({"after_backward": scaled(0.97, lambda step: step % 5)}, id="between checks"),
        pytest.param({"after_backward": scaled(1.04, lambda step: step == 7)}, id="scaled once"),
        pytest.param({"after_backward": scaled(2.0, lambda step: step > 0)}, id="doubled"),
        pytest.param({"after_backward": decayed}, id="L2"),
        pytest.param({"after_backward": clipped}, id="clipped"),
        pytest.param({"after_backward": zeroed}, id="zeroed"),
        pytest.param({"keep_grad": lambda step: step % 3 != 0}, id="summed"),
        pytest.param({"keep_grad": lambda step: step == 7}, id="kept once"),
    ],
)
def test_a_grad_that_stops_being_that_of_the_loss(change, generator):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gc.AdmissionWarning)
        run = train(perceptron, classify, points(generator, 13), truth=classified, check_every=5, **change)
    run.assert_right(0.05)
    assert run.records["reliable"].any()


def test_dropout_that_is_switched_on_later(generator):
    """Until then nothing was drawn, and ``.grad`` was that of the loss."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.0), nn.Linear(16, 4))

    class Masked(nn.Module):
        """The masks are drawn as float32 draws them."""

        def __init__(self, body: nn.Sequential) -> None:
            super().__init__()
            self.body, self.p = body, body[2].p

        def forward(self, x: Tensor) -> Tensor:
            h = self.body[1](self.body[0](x))
            mask = functional.dropout(torch.ones(h.shape, dtype=torch.float32), self.p)
            return self.body[3](h * mask)

    def switch(step: int, model: nn.Module) -> None:
        if step == 4:
            model[2].p = 0.5

    run = twins(
        make,
        classify,
        points(generator, 9),
        truth=lambda model: Truth(Masked(model), classify),
        after_backward=switch,
    )
    run.assert_right(0.05)
    assert run.records["reliable"][[0, 1, 6, 7]].all()


# ----------------------------------------------------------------------------------------- shares and cosines near zero


class Curve(nn.Module):
    """Of two parameters, so that two directions are all there are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x * self.weight[0]) * self.weight[1]


def squares(model: nn.Module, batch) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def curved(method: str, generator: torch.Generator):
    """Records of a model of two parameters: all of delta is in the basis."""
    batches = [tuple(torch.randn(2, 8, generator=generator)) for _ in range(24)]
    options = {"pca": gc.StreamingPCA(n_components=2), "pca_every": 1, "method": method}
    return train(lambda: of(Curve, generator), squares, batches, **options).records[6:]


@pytest.mark.parametrize("method", METHODS)
def test_a_share_of_all(method, generator):
    records = curved(method, generator)
    assert (records["exec_fraction"].isna() | ((records["exec_fraction"] - 1).abs() <= 1e-3)).all()
    assert (records["rho"].isna() | (records["rho"] <= 1e-3)).all()


def test_a_share_of_nothing(generator):
    """What is left over is zero, or rounding within the bound, or NaN."""
    records = curved("bracket", generator)
    assert (records["rho"].isna() | (records["rho"] <= records["share_error"])).all()


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_gradients_at_right_angles(scale, generator):
    """Two batches of different words: their gradients have no coordinate in common."""

    def loss_fn(model: nn.Module, batch) -> Tensor:
        h = model(batch[0])
        return scale * (torch.tanh(h).sum(1) - batch[1]).square().mean()

    def make() -> nn.Module:
        return nn.Embedding(10, 5)

    batches = [
        (torch.randint(5, (8,), generator=generator) + 5 * (index % 2), torch.randn(8, generator=generator))
        for index in range(4)
    ]
    records = train(make, loss_fn, batches).records
    assert (records["grad_cosine"].isna() | (records["grad_cosine"].abs() <= records["grad_cosine_error"])).all()
    assert not records["reliable"].any()  # they commute: there is no defect


def test_a_cosine_that_is_nearly_zero(generator):
    model, batches = of(perceptron, generator), points(generator, 2, size=1)
    for scale in (1.0, 1e-3, 1e-6):
        pair = (batches[0], (batches[1][0] * scale, batches[1][1]))
        stats = gc.CommutatorProbe(model, classify).measure([pair])
        truth = Truth(model, classify)
        a, b = truth.gradient(pair[0]), truth.gradient(pair[1])
        cosine = float(a @ b / a.norm() / b.norm())
        assert abs(float(stats.grad_cosine) - cosine) <= float(stats.grad_cosine_error)


# ---------------------------------------------------------------------------------------------- numbers that are chosen

CHOSEN = {
    "shifted by the largest": lambda f: (f - f.amax(1, keepdim=True)).exp().sum(1).log().mean(),
    "largest and smallest": lambda f: f.max() - f.min(),
    "range": lambda f: torch.subtract(*f.aminmax()).square(),
    "median": lambda f: f.median() + f.nanmedian(),
    "quantile": lambda f: torch.quantile(f, 0.7) + torch.quantile(f, 0.3, dim=1).sum(),
    "greatest coordinate": lambda f: torch.linalg.vector_norm(f, math.inf),
    "greatest distance": lambda f: torch.cdist(f[:3], f[3:], p=math.inf).mean(),
    "greatest of a group": lambda f: (
        f.new_zeros(4).scatter_reduce(0, torch.arange(4).repeat(len(f)), f.flatten(), "amax").sum()
    ),
    "running maximum": lambda f: f.cummax(1).values.mean(),
}
"""Backward passes look for them among what they were chosen from."""


@pytest.mark.parametrize("kind", CHOSEN)
def test_numbers_that_are_chosen(kind, generator):
    def loss_fn(model: nn.Module, batch) -> Tensor:
        f = model(batch[0])
        return functional.cross_entropy(f, batch[1]) + 0.3 * CHOSEN[kind](f)

    run = train(
        lambda: of(perceptron, generator), loss_fn, points(generator, 5), truth=lambda model: Truth(model, loss_fn)
    )
    run.assert_right(0.02)
    assert run.records["reliable"].sum() >= len(run.records) - 1  # by chance one may lie on a kink


# ------------------------------------------------------------------------------- backward passes of a kind of their own


class Recomputed(nn.Module):
    def __init__(self, *, checkpointed: bool) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 10), nn.Linear(10, 4)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        if not self.checkpointed:
            return self.outer(torch.tanh(self.inner(x)))
        x = x.detach().requires_grad_()  # or the old kind of checkpoint would have no gradient
        return self.outer(checkpoint(lambda x: torch.tanh(self.inner(x)), x, use_reentrant=True))


@pytest.mark.parametrize("method", METHODS)
def test_reentrant_checkpoints(method, generator):
    def plain(model: nn.Module) -> Truth:
        other = Recomputed(checkpointed=False)
        other.load_state_dict(model.state_dict())
        return Truth(other, classify)

    with pytest.warns(gc.AdmissionWarning, match="gradient.*checkpoint"):
        run = twins(lambda: Recomputed(checkpointed=True), classify, points(generator, 5), truth=plain, method=method)
    run.assert_right(0.02)
    assert run.records["reliable"].all() == (method == "difference")


@pytest.mark.parametrize("method", METHODS)
def test_parameters_that_the_loss_has_captured(method, generator):
    """A penalty on a list made long before: the list has the model's own objects, not its names."""
    model, pair = of(perceptron, generator), tuple(points(generator, 2))
    weights = [p for p in model.parameters() if p.dim() > 1]

    def loss_fn(model: nn.Module, batch) -> Tensor:
        return classify(model, batch) + 0.2 * sum(w.square().square().sum() for w in weights)

    def spelled_out(model: nn.Module, batch) -> Tensor:
        penalty = sum(w.square().square().sum() for w in model.parameters() if w.dim() > 1)
        return classify(model, batch) + 0.2 * penalty

    assert check(model, loss_fn, pair, Truth(model, spelled_out), method=method, rtol=0.02).reliable


class Once(torch.autograd.Function):
    """A hyperbolic tangent whose author forbids the second derivative."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grad * (1.0 - y * y)


class Detached(torch.autograd.Function):
    """One whose author forgets it: what is kept outside ``save_for_backward`` has no graph."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.y = x.detach().tanh()
        return ctx.y.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * (1.0 - ctx.y.square())


class Custom(nn.Module):
    def __init__(self, function=torch.tanh) -> None:
        super().__init__()
        self.inner, self.outer, self.function = nn.Linear(6, 10), nn.Linear(10, 4), function

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.function(self.inner(x)))


def composed(model: nn.Module) -> Truth:
    other = Custom()
    other.load_state_dict(model.state_dict())
    return Truth(other, classify)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("eta", [1e-3, 1e-9])
@pytest.mark.parametrize("function", [Once, Detached])
def test_a_second_derivative_that_is_missing_or_wrong(function, eta, method, generator):
    """With the short step the difference drowns, and the monitor would turn to the bracket."""

    def make() -> nn.Module:
        return Custom(function.apply)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = twins(make, classify, points(generator, 4), truth=composed, method=method, eta=eta)
    run.assert_right(0.02)
    asked = method == "bracket" or eta < 1e-6
    records = run.records
    assert records["reliable"].any() != asked
    told = [str(w.message) for w in caught if issubclass(w.category, gc.AdmissionWarning)]
    assert any("second derivative" in text for text in told) == asked


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_connectionist_temporal_classification(scale, generator):
    """Its kernel has no second derivative. Scaled down, the difference form has no digits either."""

    def loss_fn(model: nn.Module, batch) -> Tensor:
        logs = model(batch[0]).log_softmax(-1)
        return scale * functional.ctc_loss(logs, batch[1], torch.full((3,), 9), torch.full((3,), 3))

    batches = [
        (torch.randn(9, 3, 6, generator=generator), torch.randint(1, 4, (3, 3), generator=generator)) for _ in range(4)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gc.AdmissionWarning)
        run = twins(perceptron, loss_fn, batches, truth=lambda model: Truth(model, loss_fn))
    run.assert_right(0.02)
    assert run.records["reliable"].all() == (scale == 1.0)


# ---------------------------------------------------------------------------- what a forward pass changes and then uses


class RunningScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = perceptron()
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        self.scale.mul_(0.5).add_(0.5 * y.detach().abs().mean(0))
        return y / self.scale


def spectral(norm) -> nn.Module:
    return nn.Sequential(norm(nn.Linear(6, 10)), nn.Tanh(), norm(nn.Linear(10, 4)))


NORMALISED = {
    "spectral norm": lambda: spectral(nn.utils.spectral_norm),
    "parametrised spectral norm": lambda: spectral(nn.utils.parametrizations.spectral_norm),
    "running scale": RunningScale,
    "batch norm": lambda: nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.Tanh(), nn.Linear(10, 4)),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NORMALISED)
def test_buffers_that_the_forward_pass_changes(name, method, generator):
    """Each of the evaluations begins with the buffers that training has now, whichever comes first."""
    start, batches = seed(generator), points(generator, 4)
    pair = tuple(batches[:2])
    model = of(NORMALISED[name], torch.Generator().manual_seed(start))
    truth = Truth(model, classify)
    for ordered in (pair, pair[::-1]):
        assert check(model, classify, ordered, truth, method=method, rtol=0.02).reliable
    twins(NORMALISED[name], classify, batches, method=method)
