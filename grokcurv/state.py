"""What an evaluation of a model can change, as it is now, and a way to put it back.

A model is whatever Python does in ``loss_fn(model, batch)``: it may count its calls, grow a cache, move an average,
normalise its batch in place. A :class:`Snapshot` walks from the model, the loss and the batch to everything they hold.
Tensors are protected by stand-ins: for the time of an evaluation the objects have the contents of copies
(:func:`standing_in`), so that what is written goes to the copies, hooks and ``.grad`` of the originals stay out of
sight, and a training graph that is still alive finds its tensors as it left them. Containers, attributes, closures and
generators are compared afterwards, and put back where they differ.
"""

from __future__ import annotations

import copy
import dis
import functools
import itertools
import operator
import random
import types
from collections import ChainMap, Counter, OrderedDict, UserDict, UserList, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

LARGE = 1 << 16
"""Tensors of more numbers get a stand-in only if they are known to change; the others are watched."""

LONG = 10_000
"""Containers of more entries are put back as they were, but what is in them is not looked at."""

ATOMS = frozenset(
    {type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, range, slice}
)

CLOSED = frozenset(
    [
        *("torch", "lightning", "pytorch_lightning", "numpy", "grokcurv", "logging", "pathlib", "datetime", "re"),
        *("threading", "_thread", "multiprocessing", "concurrent", "asyncio", "io", "_io", "weakref"),
        *("types", "typing", "enum", "abc", "_abc", "builtins", "functools", "collections"),
    ]
)
"""Packages whose objects and functions hold nothing of a model's: tools, and what has a model and is not in it."""

OPEN = (types.SimpleNamespace, UserDict, UserList, ChainMap)
"""What is entered all the same."""

ITERATORS: tuple[type, ...] = (itertools.count, itertools.cycle, type(iter([])), type(iter(())), type(iter(range(0))))
"""Iterators that can be copied. A copy takes their place when they have gone on."""

Generators = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
ENTERED = (nn.Module, Tensor, dict, list, set, deque, types.FunctionType, *Generators)
"""What is followed from the global names that a function of the user's reads."""


class Snapshot:
    """Everything that can be reached from some objects, as it is now.

    >>> model = nn.Linear(2, 1)
    >>> model.calls = 0
    >>> snapshot = Snapshot([model])
    >>> model.calls += 1
    >>> snapshot.restore(), model.calls
    (True, 0)

    Args:
        held: where to begin; what is found from here counts as the model's own.
        reached: where to go on from, the loss for one; tensors found only here are data more often than state.
        apart: tensors that are not looked at, the trainable parameters.

    Attributes:
        tensors: the tensors found; the first :attr:`held` of them from ``held``.
    """

    def __init__(self, held: Iterable[object], reached: Iterable[object] = (), apart: Iterable[Tensor] = ()) -> None:
        self.tensors: list[Tensor] = []
        self.generators: list[Any] = []
        self._dicts: list[tuple[dict[Any, Any], tuple[Any, ...], tuple[Any, ...]]] = []
        self._empty: list[dict[Any, Any]] = []
        self._running: list[tuple[types.GeneratorType[Any, Any, Any], int | None]] = []
        self._lists: list[tuple[Any, tuple[Any, ...]]] = []
        self._places: list[tuple[Callable[[], Any], Callable[[Any], None], Any]] = []
        self._arrays: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
        self._seen: dict[int, object] = {id(tensor): tensor for tensor in apart}
        self._walk(list(held))
        self.held = len(self.tensors)
        self._walk(list(reached))
        self._streams = [(stream, stream.read()) for stream in map(stream_of, self.generators)]

    def _walk(self, stack: list[Any]) -> None:
        """Note everything on the stack and what hangs on it; an object that was met is not entered again."""
        while stack:
            value = stack.pop()
            kind = type(value)
            if kind in ATOMS or id(value) in self._seen:
                continue
            self._seen[id(value)] = value
            if isinstance(value, Tensor):
                self.tensors.append(value)
            elif isinstance(value, dict):
                self._note_dict(value, stack)
            elif isinstance(value, list | set | deque):
                self._lists.append((value, tuple(map(_kept, value))))
                stack.extend(value if len(value) <= LONG else ())
            elif isinstance(value, tuple | frozenset | types.MappingProxyType):
                members = value.values() if isinstance(value, types.MappingProxyType) else value
                stack.extend(members if len(value) <= LONG else ())
            elif isinstance(value, nn.Module):
                self._note_dict(vars(value), stack)
                stack.append(kind.forward)
            elif isinstance(value, Generators):
                self.generators.append(value)
            elif isinstance(value, np.ndarray):
                if value.dtype != object and value.size <= LARGE:
                    self._arrays.append((value, value.copy()))
            elif isinstance(value, types.FunctionType):
                self._note_function(value, stack)
            elif isinstance(value, types.MethodType):
                stack += [value.__self__, value.__func__]
            elif isinstance(value, functools.partial):
                stack += [value.func, value.args, value.keywords]
            elif isinstance(value, types.GeneratorType):
                self._running.append((value, _position(value)))
            elif isinstance(value, OPEN) or (
                kind is not type and (kind.__module__ or "").partition(".")[0] not in CLOSED
            ):
                self._note_object(value, stack)

    def _note_dict(self, value: dict[Any, Any], stack: list[Any]) -> None:
        """Remember what is in a dict, and look into that in turn."""
        if not value:  # most are, the registers of hooks
            self._empty.append(value)
            return
        values = tuple(map(_kept, _base(value).values(value)))
        self._dicts.append((value, tuple(_base(value).keys(value)), values))
        stack.extend(values if len(values) <= LONG else ())

    def _note_object(self, value: Any, stack: list[Any]) -> None:
        """Remember an object's attributes, those in slots too."""
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            self._note_dict(attributes, stack)
        kind: Any = type(value)
        for name in _slots(kind):
            if hasattr(value, name):
                self._note_attribute(value, name, stack)

    def _note_function(self, function: types.FunctionType, stack: list[Any]) -> None:
        """What a function of the user's holds: cells of its closure, and the global names it reads or assigns."""
        code = function.__code__
        if _is_library(code):
            return
        for cell in function.__closure__ or ():
            try:
                self._note_attribute(cell, "cell_contents", stack)
            except ValueError:  # it is still empty
                continue
        there = function.__globals__
        read, assigned = _global_names(code)
        stack.extend(x for x in (there.get(name) for name in read) if isinstance(x, ENTERED))
        for name in assigned & there.keys():
            self._note_place(functools.partial(there.get, name), functools.partial(there.__setitem__, name), stack)

    def _note_attribute(self, owner: Any, name: str, stack: list[Any]) -> None:
        """One that is in no ``__dict__``; written past a class that forbids it."""
        write = functools.partial(object.__setattr__, owner, name)
        self._note_place(functools.partial(getattr, owner, name), write, stack)

    def _note_place(self, read: Callable[[], Any], write: Callable[[Any], None], stack: list[Any]) -> None:
        """Remember what is in a place that can be read and written."""
        value = read()
        self._places.append((read, write, _kept(value)))
        stack.append(value)

    def restore(self) -> bool:
        """Put back all but tensors and generators: attributes, entries, closures, arrays; whether any differed."""
        changed = False
        for filled in filter(None, self._empty):
            changed = True
            _base(filled).clear(filled)
        for mapping, keys, values in self._dicts:
            base = _base(mapping)
            if not (_identical(base.values(mapping), values) and _identical(base.keys(mapping), keys)):
                changed = True
                base.clear(mapping)
                for key, value in zip(keys, values, strict=True):
                    base.__setitem__(mapping, key, _kept(value))
        for sequence, members in self._lists:
            if not _identical(sequence, members):
                changed = True
                sequence.clear()
                sequence.update(members) if isinstance(sequence, set) else sequence.extend(map(_kept, members))
        for read, write, value in self._places:
            if read() is not value:
                changed = True
                write(_kept(value))
        for array, contents in self._arrays:
            if array.shape == contents.shape and array.flags.writeable:
                array[...] = contents
        for generator, position in self._running:
            if _position(generator) != position:
                raise RuntimeError(
                    f"model: an evaluation advanced the generator {generator.__name__}(), which cannot be put back: "
                    "keep an iterator that can be copied (itertools.count, iter of a list) or a number instead"
                )
        return changed

    def signature(self) -> tuple[Any, ...]:
        """What a captured evaluation keeps: the addresses of tensors, and numbers and words as they are."""
        addresses = tuple(tensor.data_ptr() for tensor in self.tensors if tensor.layout == torch.strided)
        values = [values for _, _, values in self._dicts] + [members for _, members in self._lists]
        values.append(tuple(value for _, _, value in self._places))
        return addresses, tuple(x for members in values for x in members if type(x) in (bool, int, float, str))

    def restore_generators(self) -> None:
        """Put back every generator that was found."""
        for stream, position in self._streams:
            stream.write(position)

    def seed_generators(self, seed: int) -> None:
        """Start every generator that was found anew."""
        for stream, _ in self._streams:
            stream.seed(seed)


@dataclass(frozen=True, eq=False)
class Stream:
    """What a generator draws: how it is read where that stands, how it is put somewhere, and started anew."""

    read: Callable[[], Any]
    write: Callable[[Any], object]
    seed: Callable[[int], object]
    same: Callable[[Any, Any], bool] = operator.eq

    def stands_at(self, position: Any) -> bool:
        """Whether nothing was drawn since ``position`` was read."""
        return self.same(self.read(), position)


class Streams(dict[str, Stream]):
    """Several of them, by their names.

    >>> generator = torch.Generator()
    >>> streams = Streams(order=stream_of(generator))
    >>> before = streams.positions()
    >>> x = torch.rand(1, generator=generator)
    >>> list(streams.moved(before))
    ['order']
    >>> streams.move_to(before)
    >>> torch.equal(torch.rand(1, generator=generator), x)
    True
    """

    def positions(self) -> dict[str, Any]:
        """Where they stand."""
        return {name: stream.read() for name, stream in self.items()}

    def moved(self, since: Mapping[str, Any]) -> dict[str, Any]:
        """Of these positions those of generators from which something was drawn since."""
        return {name: position for name, position in since.items() if not self[name].stands_at(position)}

    def move_to(self, positions: Mapping[str, Any]) -> None:
        """Put the generators there, those that are elsewhere."""
        for name, position in self.moved(positions).items():
            self[name].write(position)


def stream_of(generator: Any) -> Stream:
    """Of one of :data:`Generators`."""
    if isinstance(generator, torch.Generator):
        return Stream(generator.get_state, generator.set_state, generator.manual_seed, torch.equal)
    if isinstance(generator, random.Random):
        return Stream(generator.getstate, generator.setstate, generator.seed)
    if isinstance(generator, np.random.RandomState):
        return Stream(generator.get_state, generator.set_state, lambda seed: generator.seed(seed % 2**32), _same_state)
    bits = generator.bit_generator
    write = functools.partial(setattr, bits, "state")
    return Stream(lambda: bits.state, write, lambda seed: write(type(bits)(seed).state))


def stand_ins(
    tensors: Sequence[Tensor],
    dtype: torch.dtype | None = None,
    move: Callable[[Tensor], Tensor] | None = None,
) -> list[Tensor]:
    """Copies of the tensors, floating ones in ``dtype`` if given; those that share memory share it again.

    ``move``, if given, takes them to the device where the copies are wanted.
    """
    storages = Counter(_storage(tensor) for tensor in tensors if tensor.layout == torch.strided)
    whole: dict[tuple[int, torch.dtype], Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        source = tensor.detach()
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        if tensor.layout != torch.strided or storages[_storage(tensor)] == 1:
            source = move(source) if move else source
            return source.to(wanted) if wanted != tensor.dtype else source.clone()
        key = (_storage(tensor), tensor.dtype)
        if key not in whole:
            flat = source.new_empty(0).set_(source.untyped_storage())
            whole[key] = (move(flat) if move else flat).to(wanted, copy=True)
        return whole[key].as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())

    return [copy(tensor).requires_grad_(tensor.requires_grad) for tensor in tensors]


class ReferencedError(RuntimeError):
    """A tensor cannot be exchanged for another, since somebody has a weak reference to what is inside it."""


@contextmanager
def standing_in(originals: Sequence[Tensor], others: Sequence[Tensor]) -> Iterator[None]:
    """Meanwhile each original, as a Python object, is the other tensor, and the other one it.

    What hangs on the object (names, places in modules, closures and lists) sees the other's dtype, data and gradient;
    what hangs on the tensor itself (its gradient, hooks, version, the graphs it is part of) goes with it.
    """
    swapped = 0
    torch.clear_autocast_cache()  # it keeps weak references, with which a tensor cannot be exchanged
    try:
        for original, other in zip(originals, others, strict=True):
            try:
                torch._C._swap_tensor_impl(original, other)
            except RuntimeError as error:
                raise ReferencedError(
                    "weak references to the model's tensors forbid that others take their place; torch.profiler has "
                    "some while it records shapes, memory or stacks"
                ) from error
            swapped += 1
        yield
    finally:
        torch.clear_autocast_cache()
        for index in reversed(range(swapped)):  # backwards: an object may have been exchanged twice
            torch._C._swap_tensor_impl(originals[index], others[index])


def _identical(now: Collection[Any], then: Collection[Any]) -> bool:
    """Whether these are the very same objects, in the same order."""
    return len(now) == len(then) and all(map(operator.is_, now, then))


def _kept(value: Any) -> Any:
    """The value, or a copy of an iterator, which would go on otherwise."""
    if isinstance(value, itertools.cycle):
        return copy.deepcopy(value)  # a shallow one goes on with the same iterator inside
    return copy.copy(value) if isinstance(value, ITERATORS) else value


def _same_state(a: Any, b: Any) -> bool:
    return bool(a[2:] == b[2:] and np.array_equal(a[1], b[1]))


def _position(generator: types.GeneratorType[Any, Any, Any]) -> int | None:
    return generator.gi_frame.f_lasti if generator.gi_frame is not None else None


def _base(mapping: dict[Any, Any]) -> Any:
    """The class whose methods are used: those of a subclass may forbid what they usually do."""
    return OrderedDict if isinstance(mapping, OrderedDict) else dict


def _storage(tensor: Tensor) -> int:
    pointer: int = tensor.untyped_storage()._cdata
    return pointer


@functools.cache
def _slots(kind: Any) -> tuple[str, ...]:
    """Attributes that instances of a class keep in slots."""
    names = (getattr(base, "__slots__", ()) for base in kind.__mro__)
    flat = [name for slots in names for name in ([slots] if isinstance(slots, str) else slots)]
    return tuple(name for name in flat if name not in ("__dict__", "__weakref__"))


@functools.cache
def _is_library(code: types.CodeType) -> bool:
    return "site-packages" in code.co_filename or code.co_filename.startswith("<frozen")


@functools.cache
def _global_names(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The global names that a function, or one defined in it, may read, and those that it assigns."""
    # Not co_names, which has attributes too: what a script calls `b` is not what a module has as `self.b`.
    found = [(i.opname, i.argval) for i in dis.get_instructions(code)]
    assigned = {name for operation, name in found if operation == "STORE_GLOBAL"}
    loads = ("LOAD_NAME", "LOAD_GLOBAL", "LOAD_FROM_DICT_OR_GLOBALS")  # the last since Python 3.12
    read = {name for operation, name in found if operation in loads}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner = _global_names(constant)
            read |= inner[0]
            assigned |= inner[1]
    return frozenset(read), frozenset(assigned)
