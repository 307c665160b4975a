"""What a snapshot finds and puts back, and tensors that stand in for others."""

from __future__ import annotations

import dataclasses
import functools
import gc as garbage
import random
import types
import weakref
from collections import OrderedDict, UserDict, UserList, defaultdict, deque

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from grokcurv.state import LARGE, Snapshot, stand_ins, standing_in


class Slotted:
    __slots__ = ("absent", "first", "second")

    def __init__(self, first, second) -> None:
        self.first, self.second = first, second


class Both(Slotted):
    """Slots of a base class, and a dictionary."""

    def __init__(self, first, second) -> None:
        super().__init__(first, second)
        self.third = [first]


@dataclasses.dataclass(frozen=True)
class Frozen:
    members: list
    tensor: Tensor


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape)


def found(value) -> set[int]:
    return {id(tensor) for tensor in Snapshot([value]).tensors}


# -------------------------------------------------------------------------------------------------------- what is found

WRAPPED = {
    "list": lambda t: [1, [t]],
    "tuple": lambda t: ("a", (t,)),
    "set": lambda t: {t},
    "frozenset": lambda t: frozenset({t}),
    "deque": lambda t: deque([None, t]),
    "dictionary": lambda t: {"a": {"b": t}},
    "ordered": lambda t: OrderedDict(a=t),
    "default": lambda t: defaultdict(list, a=[t]),
    "mapping proxy": lambda t: types.MappingProxyType({"a": t}),
    "namespace": lambda t: types.SimpleNamespace(a=t),
    "slots": lambda t: Slotted(t, None),
    "slots and attributes": lambda t: Both(None, t),
    "frozen dataclass": lambda t: Frozen([], t),
    "partial": lambda t: functools.partial(print, t, end=t),
    "closure": lambda t: lambda: t,
    "closure in a slot": lambda t: Slotted(None, (lambda: t)),
    "method": lambda t: types.MethodType(lambda self: None, Slotted(t, 0)),
    "user dictionary": lambda t: UserDict(a=t),
    "user list": lambda t: UserList([t]),
    "module": lambda t: nn.Sequential(Holder(t)),
}


class Holder(nn.Module):
    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.held = [{"deep": tensor}]


@pytest.mark.parametrize(
    "kind",
    [kind for kind in WRAPPED],
)
def test_a_tensor_is_found(kind):
    tensor = ones(2)
    assert id(tensor) in found(WRAPPED[kind](tensor))


def test_what_contains_itself_is_walked_once():
    tensor = ones(1)
    ring: list = [tensor]
    ring.append({"ring": ring, "tensor": tensor})
    assert Snapshot([ring, ring]).tensors == [tensor]


def test_parameters_buffers_and_what_hooks_hold():
    collected, model = [ones(1)], nn.BatchNorm1d(2)
    model.register_forward_hook(lambda *_: collected.append(1))
    tensors = found(model)
    assert {id(t) for t in (model.weight, model.bias, model.running_mean, model.num_batches_tracked)} <= tensors
    assert id(collected[0]) in tensors


def test_held_comes_first_and_apart_is_left_out():
    own, reached, apart = ones(1), ones(2), ones(3)
    snapshot = Snapshot([[own, apart]], [[reached, own]], [apart])
    assert [id(t) for t in snapshot.tensors] == [id(own), id(reached)]
    assert snapshot.held == 1


def test_tools_are_not_entered():
    """A logger, a thread or a path has nothing of a model's."""
    import logging
    import pathlib
    import threading

    logger, tensor = logging.getLogger("of a model"), ones(1)
    logger.tensor = tensor
    assert not found([logger, threading.Lock(), pathlib.Path(), torch.float32, torch.Size([1]), np.float64(1.0)])
    del logger.tensor


def test_generators_are_found_seeded_and_put_back(generator):
    seed = int(torch.randint(1 << 30, (), generator=generator))
    own = [torch.Generator(), random.Random(), np.random.default_rng(), np.random.RandomState(3)]
    draws = [
        lambda: torch.rand(3, generator=own[0]).tolist(),
        lambda: own[1].random(),
        lambda: own[2].normal(size=3).tolist(),
        lambda: own[3].normal(size=3).tolist(),
    ]
    snapshot = Snapshot([own])
    assert snapshot.generators == own or set(map(id, snapshot.generators)) == set(map(id, own))
    next_ones = [draw() for draw in draws]
    for _ in range(2):
        snapshot.restore_generators()
        assert [draw() for draw in draws] == next_ones
    snapshot.seed_generators(seed)
    first = [draw() for draw in draws]
    snapshot.seed_generators(seed)
    assert [draw() for draw in draws] == first != next_ones


# ----------------------------------------------------------------------------------------------------- what is put back


def change_list(value: list) -> None:
    value[0].append(3)
    value.insert(0, "new")


def change_dictionary(value: dict) -> None:
    value["a"]["c"] = value["a"].pop("b")
    del value["z"]
    value["b"] = 1


def change_object(value) -> None:
    value.first = "other"
    value.third.clear()
    value.fourth = 4


CHANGES = {
    "list": (lambda: [[1], "x"], change_list),
    "deque": (lambda: deque([1, 2], maxlen=2), lambda value: value.append(3)),
    "set": (lambda: {1, 2}, lambda value: value.symmetric_difference_update({2, 5})),
    "dictionary": (lambda: {"z": 0, "a": {"b": 1}}, change_dictionary),
    "order": (lambda: OrderedDict(a=1, b=2), lambda value: value.move_to_end("a")),
    "default": (lambda: defaultdict(list, a=[1]), lambda value: value["new"].append(1)),
    "object": (lambda: Both(1, 2), change_object),
    "slots": (lambda: Slotted(1, [2]), lambda value: (setattr(value, "first", 5), value.second.append(5))),
    "array": (lambda: np.arange(4.0), lambda value: value.__imul__(3.0)),
    "module": (lambda: nn.Sequential(nn.Linear(2, 2)), lambda value: value.add_module("more", nn.Tanh())),
    "mode": (lambda: nn.Sequential(nn.Dropout()), lambda value: value.eval()),
}


def described(value) -> str:
    if isinstance(value, nn.Module):
        return repr([(name, module, module.training) for name, module in value.named_modules()])
    if isinstance(value, Slotted):
        return repr((value.first, value.second, getattr(value, "__dict__", None)))
    return repr(value)


@pytest.mark.parametrize("kind", CHANGES)
def test_what_was_changed_is_put_back(kind):
    build, change = CHANGES[kind]
    value = build()
    before, snapshot = described(value), Snapshot([value])
    assert not snapshot.restore()
    change(value)
    assert described(value) != before
    assert snapshot.restore() or kind == "array"  # those are put back without a look
    assert described(value) == before
    assert not snapshot.restore()


def test_cells_of_closures_are_put_back():
    def make():
        count, names = 0, []

        def step() -> tuple[int, list[str]]:
            nonlocal count
            count += 1
            names.append("called")
            return count, names

        return step

    step = make()
    step()
    snapshot = Snapshot([step])
    step()
    assert snapshot.restore()
    assert step() == (2, ["called"] * 2)


COUNT = 0
NAMES: list[str] = []


def count_up() -> None:
    global COUNT
    COUNT += 1
    NAMES.append("called")


NAMESAKE = ones(3)


def test_an_attribute_is_no_global_of_its_name():
    class Inner:
        kept = NAMESAKE

        def read(self):
            return NAMESAKE

    assert id(NAMESAKE) in found(lambda: NAMESAKE + 1)
    assert id(NAMESAKE) in found(Inner().read)
    assert id(NAMESAKE) not in found(lambda x: x.NAMESAKE + 1)


def test_globals_that_a_function_assigns_or_fills_are_put_back():
    snapshot = Snapshot([count_up])
    before = COUNT, list(NAMES)
    count_up()
    assert snapshot.restore()
    assert before == (COUNT, NAMES)


def test_an_object_that_was_replaced_comes_back_itself():
    """By identity, with all that refers to it."""
    holder = Slotted(ones(2), None)
    original, snapshot = holder.first, Snapshot([holder])
    holder.first = holder.first + 1
    snapshot.restore()
    assert holder.first is original


def test_a_snapshot_keeps_nothing_alive_longer_than_itself():
    value = Both(ones(1), 2)
    snapshot, watched = Snapshot([value]), weakref.ref(value.first)
    del snapshot, value
    garbage.collect()
    assert watched() is None


# ------------------------------------------------------------------------------------------------------------ stand-ins


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_stand_ins_are_copies(dtype, generator):
    originals = [
        torch.randn(3, 2, generator=generator),
        torch.arange(4),
        torch.randn(2, generator=generator).requires_grad_(),
        torch.tensor(True),
        torch.randn(4, 4, generator=generator).T,
    ]
    for original, copy in zip(originals, stand_ins(originals, dtype), strict=True):
        wanted = dtype if dtype and original.is_floating_point() else original.dtype
        assert (copy.dtype, copy.shape, copy.requires_grad) == (wanted, original.shape, original.requires_grad)
        assert torch.equal(copy, original.to(wanted))
        assert copy.is_leaf
        assert copy.data_ptr() != original.data_ptr()


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_what_shares_memory_shares_it_again(dtype, generator):
    whole = torch.randn(4, 3, generator=generator)
    originals = [whole, whole[1], whole.T[::2], whole.view(-1)[5:]]
    copies = stand_ins(originals, dtype)
    with torch.no_grad():
        copies[1] += 7.0
    expected = whole.clone()
    expected[1] += 7.0
    for copy, view in zip(copies, (expected, expected[1], expected.T[::2], expected.view(-1)[5:]), strict=True):
        torch.testing.assert_close(copy, view.to(copy.dtype))
    assert not torch.equal(whole, expected)


def test_sparse_tensors_have_stand_ins(generator):
    original = torch.randn(5, 2, generator=generator).to_sparse()
    (copy,) = stand_ins([original], torch.float64)
    assert copy.dtype == torch.float64
    assert torch.equal(copy.to_dense(), original.to_dense().double())


def test_standing_in(generator):
    """Objects keep their names, and have others' contents; what is written goes to the others."""
    model = nn.Linear(2, 2)
    before = [p.detach().clone() for p in model.parameters()]
    originals = list(model.parameters())
    others = [torch.randn(p.shape, generator=generator).double().requires_grad_() for p in originals]
    contents = [other.detach().clone() for other in others]
    model.weight.grad = ones(2, 2)
    with standing_in(originals, others):
        assert model.weight is originals[0]
        assert type(model.weight) is nn.Parameter
        assert model.weight.dtype == torch.float64
        assert model.weight.grad is None
        assert torch.equal(model.weight, contents[0])
        model(torch.ones(1, 2, dtype=torch.float64)).sum().backward()
        with torch.no_grad():
            model.bias += 1.0
    assert torch.equal(others[1], contents[1] + 1.0)
    assert others[0].grad is not None
    assert torch.equal(model.weight.grad, ones(2, 2))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_hooks_of_the_original_stay_out_of_sight():
    called, original, other = [], ones(2).requires_grad_(), ones(2).requires_grad_()
    original.register_hook(called.append)
    with standing_in([original], [other]):
        original.sum().backward()
    assert not called
    original.sum().backward()
    assert len(called) == 1


def test_a_graph_that_is_alive_finds_its_tensors(generator):
    weight = torch.randn(3, generator=generator).requires_grad_()
    loss = (weight.square() * weight).sum()
    (copy,) = stand_ins([weight])
    with standing_in([weight], [copy]), torch.no_grad():
        weight.zero_()
    loss.backward()
    torch.testing.assert_close(weight.grad, 3.0 * weight.detach().square())


@pytest.mark.parametrize("nested", [False, True])
def test_exchanged_twice(nested):
    """In one call or in two, they come back in reverse."""
    original, first, second = (torch.full((2,), float(value)) for value in (1, 2, 3))
    if nested:
        with standing_in([original], [first]):
            with standing_in([original], [second]):
                assert original[0] == 3
            assert original[0] == 2
    else:
        with standing_in([original, original], [first, second]):
            assert original[0] == 3
    assert [float(t[0]) for t in (original, first, second)] == [1, 2, 3]


def test_what_was_exchanged_comes_back_after_an_error():
    original, other = ones(2), torch.zeros(2)
    with pytest.raises(RuntimeError, match="in between"), standing_in([original], [other]):
        raise RuntimeError("in between")
    assert original.sum() == 2
    with pytest.raises(ValueError, match="shorter"), standing_in([original, ones(1)], [other]):
        pass
    assert original.sum() == 2
    assert other.sum() == 0


def test_a_large_array_is_data():
    small, large = np.zeros(4), np.zeros(LARGE + 1)
    snapshot = Snapshot([[small, large]])
    small += 1
    large[0] = 1.0
    snapshot.restore()
    assert small.sum() == 0
    assert large[0] == 1.0
