"""The shorter way to the transformer's logits is the module's, in value and in gradient."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from grokcurv.tasks import Transformer
from grokcurv.tasks.modular import fast

SHAPES = {
    "the paper's": {},
    "one layer": {"layers": 1},
    "three layers": {"layers": 3, "d_model": 48, "heads": 3, "d_ff": 40},
    "one head, relu": {"heads": 1, "d_model": 20, "activation": "relu"},
    "decoder": {"sequence": "a b =", "d_model": 32},
    "decoder of four tokens": {"sequence": "a op b =", "d_model": 32, "layers": 3},
    "without LayerNorm": {"sequence": "a b =", "layer_norm": False, "layers": 1},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_module(shape, dtype, generator):
    p = int(torch.randint(5, 98, (), generator=generator))
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    model = Transformer(p, **shape).to(dtype)
    with torch.no_grad():  # the biases and the scales of a new network are zeros and ones
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    pairs = torch.randint(p, (67, 2), generator=generator)
    answers = torch.randint(p, (67,), generator=generator)
    values, gradients = [], []
    for forward in (model, lambda x: fast.logits(model, x)):
        found = forward(pairs)
        values.append(found.detach())
        gradients.append(torch.autograd.grad(functional.cross_entropy(found, answers), list(model.parameters())))
    # Sums of at most a few hundred terms in another order, through a few layers: some hundred roundings.
    tolerance = 300 * torch.finfo(dtype).eps
    assert (values[1] - values[0]).norm() <= tolerance * values[0].norm()
    for slow, quick in zip(*gradients, strict=True):
        whole = torch.cat([g.flatten() for g in gradients[0]]).norm()
        assert (quick - slow).norm() <= tolerance * whole


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows):
    model = Transformer(7, d_model=8, heads=2, d_ff=8)
    pairs = torch.zeros(rows, 2, dtype=torch.int64)
    torch.testing.assert_close(fast.logits(model, pairs), model(pairs))


def test_second_derivatives_are_the_modules(generator):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.manual_seed(3)
    model = Transformer(11, d_model=16, heads=2, d_ff=16).double()
    pairs, answers = torch.randint(11, (20, 2), generator=generator), torch.randint(11, (20,), generator=generator)
    products = []
    parameters = list(model.parameters())
    direction = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in parameters]
    with sdpa_kernel(SDPBackend.MATH):
        for forward in (model, lambda x: fast.logits(model, x)):
            loss = functional.cross_entropy(forward(pairs), answers)
            graph = torch.autograd.grad(loss, parameters, create_graph=True)
            products.append(torch.autograd.grad(graph, parameters, direction, materialize_grads=True))
    for slow, quick in zip(*products, strict=True):
        torch.testing.assert_close(quick, slow, rtol=1e-10, atol=1e-10)
