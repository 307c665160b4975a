"""A tape stands in for a CUDA graph: it notes each call that reaches a kernel, and repeats them on the same memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

MODULES = (
    *("device_buffer", "pca.streaming", "evaluation", "gradients", "checks", "commutator", "monitor"),
    *("measures.commutator", "measures.training_gradient", "measures.trajectory"),
)


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextmanager
def patched(name: str, value: Callable[[torch.device], bool]) -> Iterator[None]:
    """With a function of :mod:`grokcurv.device_buffer` replaced wherever it is used."""
    with pytest.MonkeyPatch.context() as patch:
        for module in MODULES:
            patch.setattr(f"grokcurv.{module}.{name}", value, raising=False)
        yield


class NoListsForIndices(TorchFunctionMode):
    """Numbers that index a tensor go to its device: a graph refuses that, and no operator shows it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            indices = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(index, list) for index in indices), f"{indices} are on the host"
        return func(*args, **(kwargs or {}))


class Tape(TorchDispatchMode):
    """Notes calls, and repeats them on the memory that they had."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __enter__(self) -> Tape:
        self.patch = patched("capturing", lambda device: True)
        self.patch.__enter__()
        self.indices = NoListsForIndices()
        self.indices.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.indices.__exit__(*error)
        self.patch.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "unique", "masked_select"), f"{func} waits"
        noted = tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}))  # a call may change a shape in place
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, *noted, tree_map_only(Tensor, Tensor.detach, result)))
        return result

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, result in self.calls:
                given = {x.untyped_storage().data_ptr() for x in tensors((args, kwargs))}
                for old, new in zip(tensors(result), tensors(func(*args, **kwargs)), strict=True):
                    if old.untyped_storage().data_ptr() not in given:
                        old.copy_(new)


def capture(run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """As of a CUDA graph: the result of a call, and what fills it anew."""
    with Tape() as tape:
        result = run()
    return result, tape.replay
