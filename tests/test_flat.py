from __future__ import annotations

import copy
import io
import pickle
from itertools import pairwise

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector

from grokcurv.flat import (
    FlatParameters,
    Segment,
    attention_segments,
    flatten,
    flatten_grad,
    segments_of,
    select_segments,
    unflatten,
    unflatten_grad,
)


class Tied(nn.Module):
    """An embedding tied to the output layer, a frozen double layer, a buffer and an empty parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.hidden = nn.Linear(5, 5)
        self.frozen = nn.Linear(3, 3).double().requires_grad_(False)
        self.nothing = nn.Parameter(torch.empty(0, 4))
        self.head = nn.Linear(5, 7)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embedding(x)))) * self.scale


def loss_of(model: nn.Module) -> Tensor:
    x = torch.arange(7)
    return nn.functional.cross_entropy(model(x), (3 * x) % 7)


def transformer(**options: object) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=6, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


# Segments


def test_segments_follow_parameters_in_order_with_tied_once_and_frozen_never():
    model = Tied()
    segments = segments_of(model)
    assert [s.name for s in segments] == [
        "nothing",
        "embedding.weight",
        "hidden.weight",
        "hidden.bias",
        "head.bias",
    ]
    assert [s.shape for s in segments] == [(0, 4), (7, 5), (5, 5), (5,), (7,)]
    assert segments[0].start == 0
    assert all(a.stop == b.start for a, b in pairwise(segments))
    assert segments[-1].stop == 35 + 25 + 5 + 7


def test_flatten_copies_trainable_parameters():
    model = Tied()
    vector = flatten(model)
    assert torch.equal(vector, parameters_to_vector(p for p in model.parameters() if p.requires_grad))
    assert not vector.requires_grad
    vector.zero_()
    assert model.hidden.weight.abs().sum() > 0

    out = torch.empty(72)
    assert flatten(model, out=out) is out
    assert torch.equal(out, flatten(model))


def test_flatten_reads_any_memory_format():
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    assert torch.equal(flatten(model), torch.cat([model.weight.detach().reshape(-1), model.bias.detach()]))


def test_unflatten_rounds_once_and_leaves_the_frozen_alone():
    model = Tied()
    frozen = model.frozen.weight.clone()
    vector = torch.randn(72, dtype=torch.float64)
    unflatten(model, vector)
    assert torch.equal(flatten(model), vector.float())
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.frozen.weight, frozen)


def test_gradients_go_there_and_back_and_a_missing_one_stays_missing():
    model = Tied()
    loss_of(model).backward()
    model.nothing.grad = model.hidden.bias.grad = None
    grads = {name: p.grad for name, p in model.named_parameters()}
    vector = flatten_grad(model)
    assert torch.equal(vector[:35].view(7, 5), model.embedding.weight.grad)
    assert not vector[60:65].any()
    unflatten_grad(model, vector + 1)
    assert torch.equal(flatten_grad(model)[60:65], torch.zeros(5))
    assert torch.equal(flatten_grad(model)[:60], vector[:60] + 1)
    assert all(p.grad is grads[name] for name, p in model.named_parameters())


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(71),
        torch.empty(1, 72),
        torch.empty(72, dtype=torch.float64),
        torch.empty(72, device="meta"),
        torch.empty(144)[::2],
    ],
    ids=["length", "shape", "dtype", "device", "stride"],
)
def test_flatten_refuses_an_out_that_does_not_fit(out: Tensor):
    with pytest.raises(ValueError, match=r"out must be a contiguous tensor of shape \(72,\)"):
        flatten(Tied(), out=out)


def test_no_trainable_parameters_is_an_error():
    for model in (nn.ReLU(), nn.Linear(2, 2).requires_grad_(False)):
        for use in (segments_of, flatten, FlatParameters, lambda m: select_segments(m, "*"), attention_segments):
            with pytest.raises(ValueError, match="no trainable parameters"):
                use(model)


def test_lazy_parameters_are_an_error_until_they_have_a_shape():
    model = nn.LazyLinear(3)
    with pytest.raises(ValueError, match="'weight' has no shape yet"):
        segments_of(model)
    model(torch.zeros(1, 2))
    assert segments_of(model)[0].shape == (3, 2)


# Selecting


def test_select_by_pattern():
    model = transformer()
    names = [s.name for s in select_segments(model, "*.self_attn.*")]
    assert names == [
        f"layers.{i}.self_attn.{n}"
        for i in range(2)
        for n in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    ]
    assert select_segments(model, "*.norm1.bias", "*.norm1.*") == select_segments(model, "*.norm1.*")
    assert select_segments(model, "*") == segments_of(model)
    assert select_segments(model, "layers.[1].linear?.weight") == tuple(
        s for s in segments_of(model) if s.name in ("layers.1.linear1.weight", "layers.1.linear2.weight")
    )


def test_fused_projections_can_be_told_apart():
    model = transformer()
    vector = flatten(model)
    fused = model.layers[1].self_attn
    for index, letter in enumerate("qkv"):
        (weight,) = select_segments(model, f"layers.1.self_attn.{letter}_proj_weight")
        assert weight.name == f"layers.1.self_attn.{letter}_proj_weight"
        assert weight.shape == (8, 8)
        part = vector[weight.start : weight.stop].view(weight.shape)
        assert torch.equal(part, fused.in_proj_weight.detach().chunk(3)[index])
        (bias,) = select_segments(model, f"layers.1.self_attn.{letter}_proj_bias")
        assert torch.equal(vector[bias.start : bias.stop], fused.in_proj_bias.detach().chunk(3)[index])


def test_no_coordinate_is_selected_twice():
    model = transformer()
    both = select_segments(model, "*.q_proj_weight", "layers.0.self_attn.in_proj_weight")
    assert [s.name for s in both] == ["layers.0.self_attn.in_proj_weight", "layers.1.self_attn.q_proj_weight"]
    assert [s.name for s in select_segments(model, "*proj_bias")] == [
        "layers.0.self_attn.in_proj_bias",
        "layers.1.self_attn.in_proj_bias",
    ]


def test_a_tied_parameter_answers_to_each_of_its_names():
    model = Tied()
    assert select_segments(model, "head.weight") == select_segments(model, "embedding.weight")
    assert len(select_segments(model, "*.weight")) == 2  # tied, hidden; the frozen one is not trainable


def test_a_module_used_twice_is_selected_once():
    shared = nn.MultiheadAttention(4, 1)
    model = nn.ModuleDict({"a": shared, "b": shared})
    assert [s.name for s in select_segments(model, "b.k_proj_weight", "?.k_proj_weight")] == ["a.k_proj_weight"]
    assert len(attention_segments(model)) == 4


def test_a_pattern_that_matches_nothing_lists_the_names():
    with pytest.raises(ValueError, match=r"'\*\.atn\.\*' matches none of layers\.0.*k_proj_bias"):
        select_segments(transformer(), "*", "*.atn.*")
    with pytest.raises(ValueError, match="at least one"):
        select_segments(transformer())


@pytest.mark.parametrize("options", [{}, {"kdim": 5, "vdim": 6}, {"bias": False}], ids=["fused", "unfused", "no bias"])
def test_attention_segments_are_q_k_v_o(options: dict):
    attention = nn.MultiheadAttention(8, 2, **options)
    model = nn.Sequential(nn.Linear(8, 8), attention)
    vector = flatten(model)
    if options.get("kdim"):
        wanted = [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
    else:
        wanted = list(attention.in_proj_weight.chunk(3))
    segments = attention_segments(model)
    assert [s.name for s in segments] == [
        "1.q_proj_weight",
        "1.k_proj_weight",
        "1.v_proj_weight",
        "1.out_proj.weight",
    ]
    for segment, weight in zip(segments, [*wanted, attention.out_proj.weight], strict=True):
        assert torch.equal(vector[segment.start : segment.stop].view(segment.shape), weight)


def test_attention_segments_of_a_bare_attention_and_without_any():
    assert attention_segments(nn.MultiheadAttention(4, 1))[0].name == "q_proj_weight"
    with pytest.raises(ValueError, match=r"no nn\.MultiheadAttention"):
        attention_segments(nn.Linear(2, 2))
    frozen = nn.MultiheadAttention(4, 1)
    frozen.in_proj_weight.requires_grad_(False)
    assert [s.name for s in attention_segments(frozen)] == ["out_proj.weight"]


def test_segment_is_plain_data():
    segment = Segment("w", 3, 4, (2, 2))
    assert segment.stop == 7
    assert segment == Segment("w", 3, 4, (2, 2))


# FlatParameters: sharing


def test_parameters_and_gradients_are_views_of_the_buffers():
    model = Tied()
    before, identities = flatten(model), [id(p) for p in model.parameters()]
    loss_of(model).backward()
    grads = torch.cat([torch.zeros(0) if p.grad is None else p.grad.reshape(-1) for p in model.parameters()])
    flat = FlatParameters(model)

    assert [id(p) for p in model.parameters()] == identities
    assert model.head.weight is model.embedding.weight
    assert torch.equal(flat.vector, before)
    assert torch.equal(flat.grad, grads)
    assert model.frozen.weight.dtype == torch.float64
    with torch.no_grad():
        flat.vector.mul_(3)
        flat.grad.fill_(7)
    (s,) = flat.select("hidden.bias")
    assert torch.equal(model.hidden.bias, 3 * before[s.start : s.stop])
    assert all((p.grad == 7).all() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        model.hidden.bias.zero_()
    assert not flat.vector[s.start : s.stop].any()


def test_no_copy_is_made_on_use():
    flat = FlatParameters(Tied())
    assert flat.vector.data_ptr() == flat.vector.data_ptr()
    assert flat.grad.data_ptr() == flat.grad.data_ptr()
    assert not flat.vector.requires_grad


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["loop", "foreach", "fused"])
def test_training_is_the_same_over_views(kind: str, when: str, set_to_none: bool):
    options = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}[kind]
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 7))
    model = copy.deepcopy(plain)

    def optimiser(m: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(m.parameters(), lr=0.05, weight_decay=0.1, **options)

    def train(m: nn.Module, opt: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            opt.zero_grad(set_to_none=set_to_none)
            loss_of(m).backward()
            nn.utils.clip_grad_norm_(m.parameters(), 0.5)
            opt.step()

    ours, theirs = optimiser(model), optimiser(plain)
    if when == "before":
        train(model, ours, 3)
        flat = FlatParameters(model)
    else:
        flat = FlatParameters(model)
        ours = optimiser(model)
        train(model, ours, 3)
    train(plain, theirs, 3)
    train(model, ours, 4)
    train(plain, theirs, 4)
    assert torch.allclose(flat.vector, flatten(plain), rtol=1e-5, atol=1e-6)
    grads = torch.cat([p.grad.reshape(-1) for p in plain.parameters()])
    assert torch.allclose(flat.grad, grads, rtol=1e-4, atol=1e-6)
    assert flat.grad.abs().max() > 1e-3


def test_gradients_dropped_by_zero_grad_come_home():
    model = Tied()
    flat = FlatParameters(model)
    loss_of(model).backward()
    first = flat.grad.clone()
    assert first.abs().sum() > 0

    model.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in model.parameters())
    assert not flat.grad.any()

    model.zero_grad(set_to_none=True)
    loss_of(model).backward()
    assert torch.equal(flat.grad, first)
    loss_of(model).backward()  # accumulates into the view that reading re-attached
    assert torch.equal(flat.grad, 2 * first)


def test_sparse_gradients_are_gathered():
    model = nn.Embedding(5, 3, sparse=True)
    flat = FlatParameters(model)
    model.zero_grad()
    model(torch.tensor([1, 1, 4])).sum().backward()
    assert model.weight.grad.is_sparse
    assert flat.grad.view(5, 3)[:, 0].tolist() == [0, 2, 0, 0, 1]


def test_a_gradient_with_a_graph_is_an_error_and_not_detached_in_silence():
    model = nn.Linear(2, 1)
    flat = FlatParameters(model)
    loss = model(torch.ones(1, 2)).square().sum()
    (model.weight.grad,) = torch.autograd.grad(loss, model.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="'weight' carries a graph"):
        _ = flat.grad


# FlatParameters: what else is done with a model

AWAY = r"parameter '.*' (no longer lives in the flat buffer|was added).*release\(\) these FlatParameters"


def test_state_dict_round_trips():
    model, other = Tied(), Tied()
    flat = FlatParameters(model)
    model.load_state_dict(other.state_dict())
    assert torch.equal(flat.vector, flatten(other))

    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = Tied()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(flatten(fresh), flat.vector)


def test_saving_one_view_needs_a_clone_or_a_release(tmp_path):
    model = nn.Linear(3, 2)
    flat = FlatParameters(model)
    with pytest.raises(RuntimeError, match="Refusing to save"):
        safetensors.torch.save_model(model, str(tmp_path / "shared.safetensors"))
    flat.release()
    safetensors.torch.save_model(model, str(tmp_path / "own.safetensors"))
    saved = safetensors.torch.load_file(tmp_path / "own.safetensors")
    assert torch.equal(saved["weight"], model.weight)


def test_assigning_a_state_dict_is_noticed():
    model = Tied()
    flat = FlatParameters(model)
    model.load_state_dict(Tied().state_dict(), assign=True)
    for use in (flat.check, lambda: flat.vector, lambda: flat.grad):
        with pytest.raises(RuntimeError, match=AWAY):
            use()


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.to(torch.float64),
        lambda m: m.half(),
        lambda m: m.to("meta"),
        lambda m: m.to_empty(device="cpu"),
        lambda m: setattr(m.hidden, "weight", nn.Parameter(torch.zeros(5, 5))),
        lambda m: setattr(m.hidden.weight, "data", torch.zeros(5, 5)),
    ],
    ids=["dtype", "half", "device", "to_empty", "replaced", "data"],
)
def test_a_parameter_that_leaves_is_noticed_and_flattening_anew_helps(move):
    model = Tied()
    flat = FlatParameters(model)
    move(model)
    for use in (lambda: flat.vector, lambda: flat.grad):
        with pytest.raises(RuntimeError, match=AWAY):
            use()
    flat.release()
    if model.hidden.weight.device.type != "meta":
        values = flatten(model)
        again = FlatParameters(model).vector
        assert again.dtype == values.dtype
        assert torch.equal(again, values) or values.isnan().any()


def test_moving_to_where_it_is_changes_nothing():
    model = Tied()
    flat = FlatParameters(model)
    model.to("cpu").hidden.to(torch.float32)
    flat.check()


def test_freezing_unfreezing_and_adding_are_noticed():
    for change, name in (
        (lambda m: m.hidden.bias.requires_grad_(False), "hidden.bias"),
        (lambda m: m.frozen.bias.requires_grad_(True), "frozen.bias"),
        (lambda m: m.register_parameter("adapter", nn.Parameter(torch.ones(2))), "adapter"),
    ):
        model = Tied()
        flat = FlatParameters(model)
        change(model)
        with pytest.raises(RuntimeError, match=f"'{name}' was added, removed, frozen or unfrozen"):
            flat.check()


def test_flattening_twice_takes_the_parameters_from_the_first():
    model = Tied()
    first = FlatParameters(model)
    second = FlatParameters(model)
    with pytest.raises(RuntimeError, match="no longer lives"):
        first.check()
    first.release()
    second.check()


def test_deepcopy_of_the_model_is_an_ordinary_model():
    model = Tied()
    flat = FlatParameters(model)
    twin = copy.deepcopy(model)
    assert twin.head.weight is twin.embedding.weight
    assert torch.equal(flatten(twin), flat.vector)
    with torch.no_grad():
        flat.vector.zero_()
    assert flatten(twin).any()
    FlatParameters(twin).check()
    flat.check()


def test_the_link_itself_is_not_copied():
    flat = FlatParameters(Tied())
    for use in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="copy the model"):
            use(flat)


def test_functional_call_and_vmap_over_views():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    want = model(x)
    flat = FlatParameters(model)
    assert torch.allclose(functional_call(model, dict(model.named_parameters()), x), want)

    def output(vector: Tensor) -> Tensor:
        return functional_call(model, {s.name: vector[s.start : s.stop].view(s.shape) for s in flat.segments}, x)

    many = torch.func.vmap(output)(torch.stack([flat.vector, 0 * flat.vector]))
    assert torch.allclose(many[0], want, atol=1e-6)
    assert not many[1].any()


def test_attention_runs_over_views():
    model = transformer().eval()
    x = torch.randn(2, 3, 8)
    want = model(x)
    flat = FlatParameters(model)
    assert torch.allclose(model(x), want, atol=1e-6)
    model.train()
    model(x).square().sum().backward()
    assert flat.grad.isfinite().all()


def test_release_gives_every_parameter_its_own_memory():
    model = Tied()
    flat = FlatParameters(model)
    loss_of(model).backward()
    vector, grad = flat.vector, flat.grad
    values, grads = vector.clone(), grad.clone()
    flat.release()
    vector.zero_()
    grad.zero_()
    assert torch.equal(flatten(model), values)
    assert torch.equal(torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.requires_grad]), grads)
    assert model.head.weight is model.embedding.weight
    assert model.hidden.weight.untyped_storage().nbytes() == 4 * 25
    assert model.hidden.weight.grad.untyped_storage().nbytes() == 4 * 25
    flat.release()
    for use in (flat.check, lambda: flat.vector, lambda: flat.grad):
        with pytest.raises(RuntimeError, match="were released"):
            use()


def test_release_after_a_parameter_was_deleted():
    model = Tied()
    flat = FlatParameters(model)
    del model.hidden
    flat.release()
    assert model.head.bias.untyped_storage().nbytes() == 4 * 7


# FlatParameters: what cannot be flattened


def test_several_dtypes_or_devices_are_an_error_that_leaves_the_model_alone():
    model = Tied()
    model.frozen.requires_grad_(True)
    storage = model.hidden.weight.data_ptr()
    with pytest.raises(ValueError, match=r"'embedding.weight'|'frozen.weight' is torch.float64"):
        FlatParameters(model)
    assert model.hidden.weight.data_ptr() == storage
    assert model.hidden.weight.grad is None
    with pytest.raises(ValueError, match=r"on cpu and '1.weight' is torch.float32 on meta"):
        flatten(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")))


def test_frozen_parameters_may_be_anywhere():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta", dtype=torch.float16).requires_grad_(False))
    assert FlatParameters(model).vector.shape == (6,)


class Odd(nn.Parameter):
    pass


def build(**parameters: Tensor) -> nn.Module:
    model = nn.Module()
    for name, tensor in parameters.items():
        model.register_parameter(name, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor))
    return model


SHARED = torch.zeros(4, 4)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (build(w=torch.zeros(2, device="meta")), "meta device"),
        (build(w=torch.zeros(2, dtype=torch.complex64)), "must be real"),
        (build(w=Odd(torch.zeros(2))), "'w' is a Odd, not a plain"),
        (build(w=torch.zeros(3, 2).T), r"'w' is not contiguous \(shape \(2, 3\), strides \(1, 2\)\)"),
        (build(v=SHARED, w=SHARED), "'v' and 'w' share memory"),
        (build(v=SHARED, w=nn.Parameter(SHARED[0], requires_grad=False)), "'v' and 'w' share memory"),
    ],
    ids=["meta", "complex", "subclass", "strides", "shared", "shared with frozen"],
)
def test_what_cannot_share_a_buffer_is_refused(model: nn.Module, message: str):
    with pytest.raises(ValueError, match=message):
        FlatParameters(model)


def test_memory_shared_among_the_frozen_is_not_our_business():
    model = build(v=torch.zeros(2))
    model.register_buffer("a", SHARED)
    model.register_buffer("b", SHARED[:2])
    assert FlatParameters(model).vector.shape == (2,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_real_dtype(dtype: torch.dtype):
    model = nn.Linear(3, 2).to(dtype)
    flat = FlatParameters(model)
    model(torch.ones(1, 3, dtype=dtype)).sum().backward()
    assert flat.vector.dtype == flat.grad.dtype == dtype
    assert flat.grad.tolist() == [1.0] * 8
