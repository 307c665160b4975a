"""Operators as they pass between PyTorch's autograd and its kernels: seen, widened, shaken, given draws of their own.

Four dispatch modes. They act below autograd, so that what they change is differentiated as it was written, and inside
backward passes too.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from grokcurv.device import Device

NARROW = frozenset({torch.float32, torch.float16, torch.bfloat16})
"""What counts as fewer bits than float64."""

SHAKEN = 4.0
"""Rounding errors that :class:`Widened` adds to each result, in units of float64's roundoff: sums have several."""


_paused = threading.local()


def shake_(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Move each number, in place, by up to half of :data:`SHAKEN` units of its last bit."""
    # The factor 1 + 4 eps y, y uniform in [-1/2, 1/2], is one of seven numbers when it has been rounded. A y of 256
    # equally likely values gives each of them exactly as often as one of 53 bits would: eight are in one draw.
    draws = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device)
    draws.random_(-(2**63), None, generator=generator)
    noise = draws.view(torch.int8)[: x.numel()].view(x.shape).to(x.dtype)
    return x.mul_(noise.add_(0.5).mul_(SHAKEN / 256.0 * torch.finfo(x.dtype).eps).add_(1.0))


@contextmanager
def unseen() -> Iterator[None]:
    """What is done inside is no part of the evaluation: the modes here let it pass."""
    before = getattr(_paused, "now", False)
    _paused.now = True
    try:
        yield
    finally:
        _paused.now = before


class Seen(TorchDispatchMode):
    """Notes what passes.

    >>> with Seen() as seen:
    ...     x = torch.rand(3).exp()
    >>> seen.names, seen.draws
    ({'exp'}, True)

    Attributes:
        names: operators that met floating tensors, without the mark of those that write in place.
        draws: whether anything was drawn from a generator of torch's own.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()
        self.draws = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(x.is_floating_point() for x in _tensors((args, kwargs))):
            self.names.add(func.name().rpartition("::")[2].partition(".")[0].rstrip("_"))
        self.draws = self.draws or (_is_random(func) and kwargs.get("generator") is None)
        return func(*args, **kwargs)


class PrivateDraws(TorchDispatchMode):
    """What would be drawn from torch's own generators is drawn from others, seeded here, by this thread alone.

    >>> before = torch.get_rng_state()
    >>> with PrivateDraws(seed=0):
    ...     x = torch.rand(3)
    >>> torch.equal(torch.get_rng_state(), before)
    True
    """

    supports_higher_order_operators = True

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if _is_random(func) and kwargs.get("generator") is None:
            there = [x.device for x in _tensors(args)]
            device = torch.device(kwargs.get("device") or next(iter(there), "cpu"))
            if device not in self._generators:
                self._generators[device] = torch.Generator(device).manual_seed(self._seed)
            taking = func if _takes_generator(func) else getattr(func.overloadpacket, "generator", None)
            if taking is not None:
                func, kwargs["generator"] = taking, self._generators[device]
        return func(*args, **kwargs)


class Apart(TorchDispatchMode):
    """Has a model that is apart from its vectors draw the same, and find what it asks for, on either side.

    What would be drawn from torch's default generators is drawn from the CPU's, and moved to where it is wanted. In an
    evaluation at home, what asks for the model's device gets home.

    >>> with Apart(Device(torch.device("meta"), has_float64=False), at_home=True):
    ...     x = torch.zeros(2, device="meta")
    >>> x.device
    device(type='cpu')
    """

    supports_higher_order_operators = True

    def __init__(self, place: Device, at_home: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._place, self._at_home = place, at_home

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, draws = (args, kwargs or {}), _is_random(func) and (kwargs or {}).get("generator") is None
        if draws and not self._at_home:
            return self._drawn(func, given)
        args, kwargs = tree_map_only(torch.device, self._instead, given) if self._at_home else given
        return func(*args, **kwargs)

    def _instead(self, device: torch.device) -> torch.device:
        """Where vectors live, for where the model is; any other device as it is."""
        return self._place.home if self._place.means(device) else device

    def _drawn(self, func: Any, given: tuple[Any, Any]) -> Any:
        """What asks for the model's device, or is like something there, is moved there, and written where it is to be
        written."""
        place, tensors = self._place, _tensors(given)
        args, kwargs = tree_map_only(Tensor, place.bring, tree_map_only(torch.device, self._instead, given))
        drawn = func(*args, **kwargs)
        asked = any(isinstance(x, torch.device) and place.means(x) for x in _leaves(given))
        if not asked and all(map(place.is_home, tensors)):
            return drawn
        targets = {id(here): target for here, target in zip(_tensors((args, kwargs)), tensors, strict=True)}
        for here in _written(func, args, kwargs):
            if targets[id(here)] is not here:
                targets[id(here)].copy_(place.move(here, place.model))
        return tree_map_only(
            Tensor, lambda x: targets[id(x)] if id(x) in targets else place.move(x, place.model), drawn
        )


class Widened(TorchDispatchMode):
    """Carries out in float64 what asks for fewer bits, so that float64 in means float64 out.

    Types asked for (casts, factories, reductions) become float64, what mixes float64 with fewer bits is widened first,
    and what makes floats of other things is widened afterwards. Random numbers are drawn in ``narrow`` and widened:
    an evaluation in fewer bits draws the same.

    >>> x = torch.tensor([1.0, 1e-10], dtype=torch.float64)
    >>> with Widened(torch.float32):
    ...     total = x.float().sum()
    >>> total.dtype, bool(total > 1)
    (torch.float64, True)

    Args:
        narrow: the type of the evaluation that this one is held against.
        shake: a generator; every result is then multiplied by 1 + 4 u x, u the roundoff of float64 and x uniform in
            [-1, 1]. The change of what is computed is a sample of its rounding error (Monte Carlo arithmetic: Parker,
            UCLA CSD-970002, 1997), the cancellation of nearly equal numbers included.

    Attributes:
        lifted: operators for which something was changed.
        remained: operators that gave fewer bits all the same, from float64.
    """

    supports_higher_order_operators = True

    def __init__(self, narrow: torch.dtype, shake: torch.Generator | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._narrow = narrow
        self._shake = shake
        self.lifted: set[str] = set()
        self.remained: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(_paused, "now", False):
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        leaves = _leaves(args, kwargs)
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        wide = any(x.dtype == torch.float64 for x in tensors)
        if _is_random(func):
            self.lifted.add(name)
            return self._drawn(func, args, kwargs)
        if name != "view" or func._overloadname != "dtype":
            asked = [x for x in leaves if isinstance(x, torch.dtype) and x in NARROW]
            if asked:
                self.lifted.add(name)
                args, kwargs = tree_map_only(torch.dtype, _wider, (args, kwargs))
        written = _written(func, args, kwargs)
        if wide and any(x.dtype in NARROW for x in tensors):
            self.lifted.add(name)
            args, kwargs = tree_map_only(
                Tensor, lambda x: x if any(x is y for y in written) else _widened(x), (args, kwargs)
            )
        shaking = _COMPOSED.get(name) if self._shake is not None else None
        out = func(*args, **kwargs) if shaking is None else shaking(lambda x: shake_(x, self._shake), *args)
        if name == "lift_fresh" or not _returns_alias(func):
            narrow = any(x.dtype in NARROW for x in _tensors(out))
            if narrow and wide:
                self.remained.add(name)
            elif narrow:
                self.lifted.add(name)
                out = tree_map_only(Tensor, _widened, out)
        elif wide and any(x.dtype in NARROW for x in written):
            self.remained.add(name)
        if self._shake is not None:
            self._shaken(func, out, (args, kwargs))
        return out

    def _shaken(self, func: Any, out: Any, given: Any) -> None:
        """Change the float64 results of an operation by about their rounding, if it rounds."""
        if func.overloadpacket.__name__.startswith(("empty", "new_empty")) or (
            _returns_alias(func) and not func._schema.is_mutable
        ):
            return
        # Constants, and numbers that are only moved or chosen, are not rounded; and backward passes look for those that
        # were chosen among those that came in.
        constant = not any(x.is_floating_point() for x in _tensors(given))
        extreme = any(x in _EXTREME for x in _leaves(given) if isinstance(x, str | float))
        if constant or extreme or func.overloadpacket.__name__.rstrip("_") in _EXACT:
            return
        for x in _tensors(out):
            if x.dtype == torch.float64:
                shake_(x, self._shake)

    def _drawn(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Draw at random what the model draws in its own dtype, and widen it to float64."""
        if func.overloadpacket.__name__ == "native_dropout":
            x, p, train = args
            _, mask = func(torch.ones_like(x, dtype=self._narrow), p, train)
            return x * mask * (0.0 if p == 1.0 else 1.0 / (1.0 - p)), mask
        if func.overloadpacket.__name__.startswith("rrelu_with_noise"):
            return self._leaky(func, args, kwargs)
        if func._schema.is_mutable:
            target, *rest = args
            if target.dtype != torch.float64:
                return func(*args, **kwargs)
            rest, kwargs = tree_map_only(Tensor, self._narrowed, (rest, kwargs))
            return target.copy_(func(torch.empty_like(target, dtype=self._narrow), *rest, **kwargs))
        if _tensors(args):  # the draws depend on them: on their values, or for `*_like` on their type
            args, kwargs = tree_map_only(Tensor, self._narrowed, (args, kwargs))
        kwargs = {name: self._narrow if x == torch.float64 else x for name, x in kwargs.items()}
        return tree_map_only(Tensor, _widened, func(*args, **kwargs))

    def _leaky(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A rectifier that draws its slopes writes them to its second argument, where the backward pass finds them."""
        x, slopes, *rest = args  # two bounds, and whether it trains
        if not (rest[2] if len(rest) > 2 else kwargs.get("training", False)):
            return func(*args, **kwargs)
        small = tree_map_only(Tensor, self._narrowed, args)
        func(*small, **kwargs)
        slopes.copy_(small[1])
        return x.mul_(slopes) if func._schema.returns[0].alias_info is not None else x * slopes

    def _narrowed(self, x: Tensor) -> Tensor:
        return x.to(self._narrow) if x.dtype == torch.float64 else x


def _log_softmax(noisy: Callable[[Tensor], Tensor], x: Tensor, dim: int, _: bool) -> Tensor:
    shifted = x - x.amax(dim, keepdim=True)
    return shifted - noisy(noisy(shifted.exp().sum(dim, keepdim=True)).log())


def _log_softmax_backward(
    noisy: Callable[[Tensor], Tensor], grad: Tensor, output: Tensor, dim: int, _: torch.dtype
) -> Tensor:
    """What torch computes there, with noise where it rounds."""
    return grad - noisy(noisy(output.exp()) * grad.sum(dim, keepdim=True))


_EXACT = frozenset(
    (
        *("max", "min", "amax", "amin", "aminmax", "_aminmax", "median", "nanmedian", "kthvalue", "mode"),
        *("topk", "sort"),
        *("cummax", "cummin", "_cummax_helper", "_cummin_helper", "max_pool2d_with_indices", "max_pool3d_with_indices"),
        *("where", "masked_fill", "masked_select", "gather", "index", "index_select", "take", "embedding", "scatter"),
        *("index_put", "cat", "stack", "flip", "roll", "repeat", "clone", "_to_copy", "copy", "fill", "zero", "triu"),
        *("tril", "constant_pad_nd", "neg", "abs", "relu", "threshold", "clamp"),
        *("ceil", "floor", "round", "trunc", "sign", "sgn", "heaviside", "floor_divide"),
    )
)
"""Operators that give the numbers that they are given, or some of them, in another order or with another sign; or whole
numbers."""

_EXTREME = (math.inf, -math.inf, "amax", "amin", "max", "min")
"""Orders of norms, and names of reductions, by which others do the same."""

_COMPOSED: dict[str, Callable[..., Tensor]] = {
    "_log_softmax": _log_softmax,
    "_log_softmax_backward_data": _log_softmax_backward,
}
"""Kernels that subtract nearly equal numbers inside, where a change of the result shows nothing, in several steps."""


def _leaves(*trees: Any) -> list[Any]:
    """What is in tuples, lists and dicts: operators are given nothing else, and every operator passes here, for which
    PyTorch's own walk, over whatever a tree can be made of, takes nearly three times as long."""
    found: list[Any] = []
    for tree in trees:
        if isinstance(tree, tuple | list):
            found += _leaves(*tree)
        elif isinstance(tree, dict):
            found += _leaves(*tree.values())
        else:
            found.append(tree)
    return found


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in _leaves(tree) if isinstance(x, Tensor)]


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.float64) if x.dtype in NARROW else x


def _wider(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype in NARROW else dtype


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors among the arguments that the operator writes to."""
    if not func._schema.is_mutable:
        return []
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    names = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return _tensors([given.get(name) for name in names])


@functools.cache
def _is_random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags and not func.overloadpacket.__name__.startswith("_scaled_dot")


@functools.cache
def _takes_generator(func: Any) -> bool:
    return any(argument.name == "generator" for argument in func._schema.arguments)


@functools.cache
def _returns_alias(func: Any) -> bool:
    """Whether what comes back is, or may be, a view of an argument or the argument itself."""
    return any(value.alias_info is not None for value in func._schema.returns)
