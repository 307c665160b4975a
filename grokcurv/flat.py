"""The flat parameter vector: which coordinate belongs to which parameter, and one buffer behind a module.

P is the number of trainable coordinates of a model. Its parameter vector is the concatenation of the trainable
parameters in the order of ``model.parameters()``, each in row-major order; a tied parameter occurs once, a frozen one
not at all.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from typing import NoReturn

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Segment:
    """A named interval of the flat vector: ``length`` coordinates from ``start`` on, of a tensor of ``shape``."""

    name: str
    start: int
    length: int
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        """One past the last coordinate."""
        return self.start + self.length


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


def select_segments(model: nn.Module, *patterns: str) -> tuple[Segment, ...]:
    """The segments whose name matches any shell-style pattern (``*``, ``?``, ``[...]``; case counts), in order.

    A tied parameter answers to each of its names. The fused ``in_proj_weight`` and ``in_proj_bias`` of an
    ``nn.MultiheadAttention`` also answer, a third each, to the names torch gives them when they are not fused:
    ``q_proj_weight``, ``k_proj_weight``, ``v_proj_weight``, and ``q_proj_bias`` and so on. A third of a parameter that
    is selected whole is not returned beside it: no coordinate is selected twice.

    Raises:
        ValueError: a pattern that matches nothing; the message lists the names. Or no pattern.
    """
    if not patterns:
        raise ValueError("patterns: give at least one, such as '*'")
    whole, thirds = _named_segments(model)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in (*whole, *thirds)):
            raise ValueError(f"patterns: {pattern!r} matches none of {', '.join((*whole, *thirds))}")

    def matching(names: Mapping[str, Segment]) -> set[Segment]:
        return {s for name, s in names.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}

    chosen = matching(whole)
    chosen |= {t for t in matching(thirds) if not any(s.start <= t.start < s.stop for s in chosen)}
    return tuple(sorted(chosen, key=lambda s: (s.start, s.stop)))


def attention_segments(model: nn.Module) -> tuple[Segment, ...]:
    """W_Q, W_K, W_V and W_O of each ``nn.MultiheadAttention`` in turn, fused or not; biases and frozen ones left out.

    Raises:
        ValueError: the model has none that is trainable.
    """
    whole, thirds = _named_segments(model)
    known = thirds | whole
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")
    prefixes = [_prefix(name) for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    segments = tuple(known[p + name] for p in prefixes for name in names if p + name in known)
    if not segments:
        raise ValueError("model has no nn.MultiheadAttention with trainable projections")
    return segments


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
