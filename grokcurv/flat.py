"""The flat parameter vector: which coordinate belongs to which parameter, and one buffer behind a module.

P is the number of trainable coordinates of a model. Its parameter vector is the concatenation of the trainable
parameters in the order of ``model.parameters()``, each in row-major order; a tied parameter occurs once, a frozen one
not at all.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib import import_module
from itertools import pairwise
from typing import NoReturn

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Segment:
    """Named coordinates of the flat vector, of a tensor of ``shape``: ``length`` of them from ``start`` on.

    They are consecutive, but for a slice that takes some columns of a matrix: that is in ``pieces``, disjoint intervals
    ``(start, length)`` in order.

    >>> import torch, grokcurv as gc
    >>> model = torch.nn.Linear(4, 3)
    >>> [(s.name, s.start, s.stop) for s in gc.select_segments(model, "weight[0]", "bias")]
    [('weight[0]', 0, 4), ('bias', 12, 15)]
    """

    name: str
    start: int
    length: int
    shape: tuple[int, ...]
    pieces: tuple[tuple[int, int], ...] = ()

    @property
    def stop(self) -> int:
        """One past the last coordinate."""
        return sum(self.pieces[-1]) if self.pieces else self.start + self.length

    @property
    def intervals(self) -> tuple[tuple[int, int], ...]:
        """The intervals ``(start, length)`` of which it consists."""
        return self.pieces or ((self.start, self.length),)

    def of(self, vectors: Tensor) -> Tensor:
        """(..., length) these coordinates of vectors (..., P): a view where they are consecutive, a copy otherwise."""
        parts = [vectors[..., start : start + length] for start, length in self.intervals]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def sliced(self, which: str) -> Segment:
        """A part of it, written as an index of its tensor: ``"2"``, ``"-1"``, ``":, :768"``, ``"0:4, ::2"``.

        Raises:
            ValueError: no such index, or nothing in it.
        """
        try:
            index = tuple(_slice(part) for part in which.split(","))
            places = torch.arange(self.length).view(self.shape)[index]
        except (ValueError, IndexError) as error:
            raise ValueError(f"patterns: {self.name} of shape {self.shape} has no [{which}]: {error}") from error
        if not places.numel():
            raise ValueError(f"patterns: {self.name}[{which}] of shape {self.shape} is empty")
        flat = places.flatten()
        if self.pieces:
            flat = torch.cat([torch.arange(start, start + length) for start, length in self.pieces])[flat]
        else:
            flat += self.start
        begins = torch.cat([torch.tensor([0]), (flat.diff() != 1).nonzero()[:, 0] + 1])
        lengths = torch.cat([begins, torch.tensor([len(flat)])]).diff()
        pieces = tuple(zip(flat[begins].tolist(), lengths.tolist(), strict=True))
        name, shape = f"{self.name}[{which}]", tuple(places.shape)
        return Segment(name, pieces[0][0], len(flat), shape, pieces if len(pieces) > 1 else ())


def _slice(part: str) -> int | slice:
    """``"2"``, ``":3"``, ``"1:"``, ``"::2"``: as Python writes it."""
    bounds = [int(bound) if bound.strip() else None for bound in part.split(":")]
    if len(bounds) > 1:
        return slice(*bounds)
    if bounds[0] is None:
        raise ValueError("an index is missing")
    return bounds[0]


def segments_of(model: nn.Module) -> tuple[Segment, ...]:
    """Where each trainable parameter of ``model`` lies in the flat vector, in order and without gaps.

    Raises:
        ValueError: no trainable parameter, or one without a shape yet (lazy modules).
    """
    segments, start = [], 0
    for name, parameter in _trainable(model).items():
        segments.append(Segment(name, start, parameter.numel(), tuple(parameter.shape)))
        start += parameter.numel()
    return tuple(segments)


INDEXED = re.compile(r"(.+)\[([-\d:, ]+)\]")
"""A pattern that ends with an index."""


def select_segments(model: nn.Module, *patterns: str) -> tuple[Segment, ...]:
    """The segments whose name matches any shell-style pattern (``*``, ``?``, ``[...]``; case counts), in order.

    A pattern may end with an index of the tensors that it names: ``"blocks.*.attn.W_Q[2]"`` is the third head,
    ``"*.c_attn.weight[:, :768]"`` the queries of a fused matrix. (One that matches a name as it stands is taken so.)

    A tied parameter answers to each of its names. The fused ``in_proj_weight`` and ``in_proj_bias`` of an
    ``nn.MultiheadAttention`` also answer, a third each, to the names torch gives them when they are not fused:
    ``q_proj_weight``, ``k_proj_weight``, ``v_proj_weight``, and ``q_proj_bias`` and so on. A part of a parameter that
    is selected whole is not returned beside it: no coordinate is selected twice.

    Raises:
        ValueError: a pattern that matches nothing; the message lists the names. An index that a tensor does not have,
            or two that overlap. Or no pattern.
    """
    if not patterns:
        raise ValueError("patterns: give at least one, such as '*'")
    whole, thirds = _named_segments(model)
    chosen, parts = set[Segment](), set[Segment]()
    for pattern in patterns:
        names, index = _matching(pattern, (*whole, *thirds))
        for name in names:
            segment = whole.get(name) or thirds[name]
            (chosen if name in whole and index is None else parts).add(segment.sliced(index) if index else segment)
    parts = {part for part in parts if not any(s.start <= part.start < s.stop for s in chosen)}
    found = tuple(sorted((*chosen, *parts), key=lambda s: (s.start, s.stop, s.name)))
    _refuse_overlaps(found)
    return found


def _matching(pattern: str, names: Collection[str]) -> tuple[list[str], str | None]:
    """The names that a pattern matches, and the index that it ends with, unless it matches as it stands."""
    tried: list[tuple[str, str | None]] = [(pattern, None)]
    if indexed := INDEXED.fullmatch(pattern):
        tried.append((indexed[1], indexed[2]))
    for wanted, index in tried:
        if matched := [name for name in names if fnmatchcase(name, wanted)]:
            return matched, index
    raise ValueError(f"patterns: {pattern!r} matches none of {', '.join(names)}")


def _refuse_overlaps(segments: tuple[Segment, ...]) -> None:
    """Raise a ValueError if two segments have a coordinate in common."""
    every = sorted((*interval, s.name) for s in segments for interval in s.intervals)
    for (start, length, name), (following, _, other) in pairwise(every):
        if following < start + length:
            raise ValueError(f"patterns: {name} and {other} overlap, and no coordinate can be in two segments")


SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("W_Q", "W_K", "W_V"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("q", "k", "v"),
)
"""Names that attention modules give their projections to queries, keys and values."""

FUSED = ("c_attn", "qkv", "qkv_proj", "Wqkv", "query_key_value")
"""Names that they give to all three in one; of the last the rows go head by head."""

OUTPUTS = ("o_proj", "out_proj", "c_proj", "W_O", "out_lin", "to_out.0", "dense", "proj", "o")
"""Names that they give to the projection that follows."""


def attention_segments(model: nn.Module) -> tuple[Segment, ...]:
    """W_Q, W_K, W_V and W_O of each attention module in turn, fused or not; biases and frozen ones left out.

    Known are ``nn.MultiheadAttention``, and models of transformers, timm and TransformerLens by the names they give to
    projections (:data:`SEPARATE`, :data:`FUSED`, :data:`OUTPUTS`). Others, and single heads, are for
    :func:`select_segments`.

    Raises:
        ValueError: the model has none that is known and trainable.
    """
    segments = tuple(part for _, parts in _attention_modules(model) for part in parts)
    if not segments:
        raise ValueError(
            "model has no nn.MultiheadAttention with trainable projections, nor any that are named as in transformers, "
            "timm or TransformerLens: select_segments takes any names"
        )
    return segments


def attention_parameters(model: nn.Module) -> tuple[Segment, ...]:
    """All trainable parameters, weights and biases, of the modules that :func:`attention_segments` knows."""
    owners = tuple(prefix for prefixes, _ in _attention_modules(model) for prefix in prefixes)
    return tuple(segment for segment in segments_of(model) if segment.name.startswith(owners)) if owners else ()


def _attention_modules(model: nn.Module) -> list[tuple[tuple[str, ...], list[Segment]]]:
    """Of each attention module what its parameters' names begin with, and the projections that are trainable."""
    whole, thirds = _named_segments(model)
    found: list[tuple[tuple[str, ...], list[Segment]]] = []
    for name, module in model.named_modules():
        prefix = _prefix(name)
        prefixes: tuple[str, ...] = (prefix,)
        if isinstance(module, nn.MultiheadAttention):
            known = thirds | whole
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")
            parts = [known[prefix + each] for each in names if prefix + each in known]
        else:
            weights = {each.removesuffix(".weight"): prefix + each for each, _ in module.named_parameters()}
            separate = next((names for names in SEPARATE if weights.keys() >= {*names}), ())
            fused = next((weights[each] for each in FUSED if each in weights), "")
            if not separate and not fused:
                continue
            parts = [whole[weights[each]] for each in separate if weights[each] in whole]
            if not separate and fused in whole:
                parts = _thirds(whole[fused], module)
            # In BERT and its like the last projection belongs to a module beside this one.
            beside = prefix.removesuffix("self.") + "output."
            output = next((weights[each] for each in OUTPUTS if each in weights), f"{beside}dense.weight")
            parts += [whole[output]] if output in whole else []
            prefixes = (prefix, beside) if prefix.endswith(".self.") else (prefix,)
        found.append((prefixes, parts))
    return found


def _thirds(fused: Segment, attention: nn.Module) -> list[Segment]:
    """Queries, keys and values of a fused matrix; none where they are not of one size."""
    rows, columns = fused.shape if len(fused.shape) == 2 else (0, 0)
    if columns == 3 * rows:  # Conv1D of transformers has its outputs along the second dimension
        return [fused.sliced(f":, {i * rows}:{(i + 1) * rows}") for i in range(3)]
    if rows != 3 * columns:
        return []
    if not fused.name.endswith("query_key_value.weight"):
        return [fused.sliced(f"{i * columns}:{(i + 1) * columns}") for i in range(3)]
    settings = (attention, getattr(attention, "config", None))
    heads = next(
        (n for x in settings for n in (getattr(x, "num_heads", 0), getattr(x, "num_attention_heads", 0)) if n), 0
    )
    if not heads or columns % heads:
        return []
    by_head = replace(fused, shape=(heads, 3, columns // heads, columns))
    parts = [by_head.sliced(f":, {i}") for i in range(3)]
    return [replace(part, name=f"{fused.name}[{kind}]") for part, kind in zip(parts, "qkv", strict=True)]


def flatten(model: nn.Module, out: Tensor | None = None) -> Tensor:
    """A detached copy (P,) of the trainable parameters, in their dtype and on their device; into ``out`` if given.

    Raises:
        ValueError: no trainable parameters, parameters of several dtypes or devices, or an ``out`` that does not fit.
    """
    parameters = _trainable(model)
    dtype, device = _common_kind(parameters)
    size = sum(parameter.numel() for parameter in parameters.values())
    if out is None:
        out = torch.empty(size, dtype=dtype, device=device)
    elif out.shape != (size,) or out.dtype != dtype or out.device != device or not out.is_contiguous():
        raise ValueError(
            f"out must be a contiguous tensor of shape ({size},), {dtype}, on {device}; "
            f"got shape {tuple(out.shape)}, {out.dtype}, on {out.device}, strides {out.stride()}"
        )
    with torch.no_grad():
        for parameter, part in _with_parts(model, out):
            part.copy_(parameter)
    return out


def unflatten(model: nn.Module, vector: Tensor) -> None:
    """Write a vector (P,) of any floating dtype over the trainable parameters, rounded once to theirs."""
    with torch.no_grad():
        for parameter, part in _with_parts(model, vector):
            parameter.copy_(part)


def flatten_grad(model: nn.Module) -> Tensor:
    """A copy (P,) of the gradients of the trainable parameters, zero where one has none."""
    grads = (torch.zeros_like(p) if p.grad is None else p.grad for p in _trainable(model).values())
    return torch.cat([grad.detach().to_dense().reshape(-1) for grad in grads])


def unflatten_grad(model: nn.Module, vector: Tensor) -> None:
    """Write a vector (P,) over the gradients of the trainable parameters; those without a gradient stay without."""
    with torch.no_grad():
        for parameter, part in _with_parts(model, vector):
            if parameter.grad is not None:
                parameter.grad.copy_(part)


class FlatParameters:
    """One contiguous buffer behind a module's trainable parameters, and one behind their gradients.

    Every trainable parameter becomes a view of :attr:`vector`, every ``.grad`` a view of :attr:`grad`. The
    ``Parameter`` objects stay the same, so an optimiser keeps working whether it was made before or after. So do
    ``load_state_dict``, ``functional_call`` and ``copy.deepcopy(model)``, whose copy is an ordinary model.

    PyTorch can take a parameter out of the buffer: ``model.to(...)`` with another dtype or device, ``.half()``,
    ``load_state_dict(assign=True)``, replacing a parameter, freezing or unfreezing one. Every use of :attr:`vector` and
    :attr:`grad` looks (:meth:`check`) and raises then; :meth:`release`, and flatten anew.

    Gradients leave more easily: ``zero_grad()`` drops them by default and ``backward()`` makes new ones. Reading
    :attr:`grad` brings them home: a ``.grad`` found elsewhere is copied in and re-pointed, one that is None becomes
    zeros. Therefore read the property anew every time; ``zero_grad(set_to_none=False)`` saves the copy. An optimiser
    skips a parameter whose ``.grad`` is None but decays one whose ``.grad`` is zero.

    Two more consequences of sharing memory: autograd does not notice when :attr:`vector` is changed between a forward
    and its backward pass, and a file written from views may hold the whole buffer or be refused
    (``torch.save(parameter)``, ``safetensors.torch.save_model``): clone what is saved, or release first.

    >>> import torch, grokcurv as gc
    >>> model = torch.nn.Linear(2, 1)
    >>> flat = gc.FlatParameters(model)
    >>> flat.vector.copy_(torch.tensor([1.0, 2.0, 3.0]))
    tensor([1., 2., 3.])
    >>> model.weight.tolist(), model.bias.tolist()
    ([[1.0, 2.0]], [3.0])

    Args:
        model: any module; only plain, contiguous ``nn.Parameter`` of one dtype on one device can share a buffer. Frozen
            parameters and buffers are left alone, whatever they are.

    Raises:
        ValueError: no trainable parameters, several dtypes or devices, parameters without data (lazy, meta), of a
            subclass (sharded, quantised), not contiguous, or sharing memory without being the same ``Parameter``. The
            model is then left as it was.
    """

    def __init__(self, model: nn.Module) -> None:
        _refuse_unflattenable(model)
        self.model = model
        self.segments = segments_of(model)
        self._vector = flatten(model)
        self._grad = torch.zeros_like(self._vector)
        self._released = False
        self._bring_gradients_home()
        for parameter, view in zip(_trainable(model).values(), self._views(self._vector), strict=True):
            parameter.data = view

    @property
    def vector(self) -> Tensor:
        """(P,) the parameters themselves: writing to it in place is writing to the model."""
        self.check()
        return self._vector

    @property
    def grad(self) -> Tensor:
        """(P,) the gradients themselves, zero where a parameter has none."""
        self.check()
        self._bring_gradients_home()
        return self._grad

    def select(self, *patterns: str) -> tuple[Segment, ...]:
        """The segments whose names match any of the patterns: :func:`select_segments`."""
        return select_segments(self.model, *patterns)

    def check(self) -> None:
        """Make sure that the model's trainable parameters are the buffer.

        Raises:
            RuntimeError: they are not, or were released; the message names the first parameter that has left.
        """
        if self._released:
            raise RuntimeError("these FlatParameters were released; make new ones with FlatParameters(model)")
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        changed = parameters.keys() ^ {s.name for s in self.segments}
        if changed:
            raise RuntimeError(
                f"parameter {min(changed)!r} was added, removed, frozen or unfrozen since the model was flattened; "
                "release() these FlatParameters and make new ones"
            )
        for segment, view in zip(self.segments, self._views(self._vector), strict=True):
            if not _same_memory(parameters[segment.name], view):
                raise RuntimeError(
                    f"parameter {segment.name!r} no longer lives in the flat buffer (after model.to(...), "
                    "load_state_dict(assign=True) or the like); release() these FlatParameters and make new ones"
                )

    def release(self) -> None:
        """Give every parameter and gradient memory of its own again. Values stay; a second call does nothing."""
        if self._released:
            return
        parameters = dict(self.model.named_parameters())
        views = zip(self.segments, self._views(self._vector), self._views(self._grad), strict=True)
        for segment, view, grad_view in views:
            parameter = parameters.get(segment.name)
            if parameter is None:
                continue
            if parameter.grad is not None and _same_memory(parameter.grad, grad_view):
                parameter.grad = grad_view.clone()
            if _same_memory(parameter, view):
                parameter.data = view.clone()
        self._released = True
        self._vector = self._grad = torch.empty(0)

    def _views(self, vector: Tensor) -> list[Tensor]:
        return [vector[s.start : s.stop].view(s.shape) for s in self.segments]

    def _bring_gradients_home(self) -> None:
        """Move each parameter's ``.grad`` into its place in the flat gradient."""
        for (name, parameter), view in zip(_trainable(self.model).items(), self._views(self._grad), strict=True):
            grad = parameter.grad
            if grad is None:
                view.zero_()
            elif grad.requires_grad:
                raise RuntimeError(f"the .grad of {name!r} carries a graph (create_graph=True): detach it first")
            elif not _same_memory(grad, view):
                view.copy_(grad.to_dense())
            parameter.grad = view

    def __reduce__(self) -> NoReturn:
        raise TypeError("FlatParameters cannot be copied or pickled: copy the model, then FlatParameters(copy)")


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name, in order, tied ones once."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("model has no trainable parameters")
    for name, parameter in parameters.items():
        if nn.parameter.is_lazy(parameter):
            raise ValueError(f"model: parameter {name!r} has no shape yet; run one forward pass first")
    return parameters


def _with_parts(model: nn.Module, vector: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
    """Each trainable parameter with its part of a vector (P,), a view of the parameter's shape."""
    parameters = _trainable(model).values()
    parts = vector.split([parameter.numel() for parameter in parameters])
    return [(parameter, part.view(parameter.shape)) for parameter, part in zip(parameters, parts, strict=True)]


def _common_kind(parameters: Mapping[str, nn.Parameter]) -> tuple[torch.dtype, torch.device]:
    """The one dtype and device of all parameters."""
    first = next(iter(parameters))
    dtype, device = parameters[first].dtype, parameters[first].device
    for name, parameter in parameters.items():
        if (parameter.dtype, parameter.device) != (dtype, device):
            raise ValueError(
                "model: trainable parameters must have one dtype and one device, but "
                f"{first!r} is {dtype} on {device} and {name!r} is {parameter.dtype} on {parameter.device}"
            )
    return dtype, device


def _refuse_unflattenable(model: nn.Module) -> None:
    """Everything that could not live in the buffer, or would change its meaning there."""
    parameters = _trainable(model)
    dtype, device = _common_kind(parameters)
    if device.type == "meta":
        raise ValueError("model is on the meta device, its parameters hold no data; materialise it first")
    if not dtype.is_floating_point:
        raise ValueError(f"model: trainable parameters must be real, got {dtype}")
    for name, parameter in parameters.items():
        if type(parameter) is not nn.Parameter:
            raise ValueError(f"model: parameter {name!r} is a {type(parameter).__name__}, not a plain nn.Parameter")
        if not parameter.is_contiguous():
            raise ValueError(
                f"model: parameter {name!r} is not contiguous (shape {tuple(parameter.shape)}, strides "
                f"{parameter.stride()}); call model.to(memory_format=torch.contiguous_format) or make it so"
            )
    # Tensors that share memory without being the same object would silently part ways in the buffer.
    owners: dict[int, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device == device and tensor.layout == torch.strided and tensor.numel():
            other = owners.setdefault(tensor.data_ptr(), name)
            if other != name and not parameters.keys().isdisjoint((name, other)):
                raise ValueError(f"model: {other!r} and {name!r} share memory; tie them as one nn.Parameter instead")


def _named_segments(model: nn.Module) -> tuple[dict[str, Segment], dict[str, Segment]]:
    """Segments by every name they answer to: whole parameters, and the thirds of fused attention projections."""
    by_parameter = dict(zip(map(id, _trainable(model).values()), segments_of(model), strict=True))
    every = model.named_parameters(remove_duplicate=False)
    whole = {name: by_parameter[id(p)] for name, p in every if id(p) in by_parameter}
    thirds: dict[str, Segment] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, nn.MultiheadAttention):
            continue
        for kind in ("weight", "bias"):
            fused = by_parameter.get(id(getattr(module, f"in_proj_{kind}")))
            if fused is None:
                continue
            length, shape = fused.length // 3, (fused.shape[0] // 3, *fused.shape[1:])
            for index, letter in enumerate("qkv"):
                part = f"{letter}_proj_{kind}"
                own = fused.name.removesuffix(f"in_proj_{kind}") + part
                thirds[_prefix(name) + part] = Segment(own, fused.start + index * length, length, shape)
    return whole, thirds


def _prefix(module_name: str) -> str:
    return f"{module_name}." if module_name else ""


def _same_memory(tensor: Tensor, view: Tensor) -> bool:
    same_kind = (tensor.layout, tensor.device, tensor.dtype) == (view.layout, view.device, view.dtype)
    return same_kind and tensor.is_set_to(view)


def __getattr__(name: str) -> object:
    """What has moved to :mod:`grokcurv.partition`, by the names that it had."""
    moved = {"Coordinates": "Partition", "ALL_HERE": "WHOLE"}
    if name not in moved:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"grokcurv.flat.{name} is grokcurv.partition.{moved[name]} now", FutureWarning, stacklevel=2)
    found: object = getattr(import_module("grokcurv.partition"), moved[name])
    return found
