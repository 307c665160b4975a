"""Where a model is evaluated and where the vectors of its parameters live: one place, but where there is no float64."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")

KINDS = ("cpu", "cuda", "mps", "meta")
"""Kinds of devices that a model may be on."""


@dataclass(frozen=True)
class Device:
    """The device of a model, seen from its vectors (P,), which live at :attr:`home`.

    On a CPU and on a CUDA device that is where the model is, and nothing here moves anything. A device without float64,
    an Apple GPU, evaluates the model in its own precision, and that is all it does. Its vectors live on the CPU, with
    whatever is made of them, and there are the evaluations in float64: of the same model, with copies of its tensors in
    their place. What goes from one to the other is moved here and nowhere else, and has arrived when a method returns.

    Attributes:
        model: where the model is.
        has_float64: whether that place has float64.
    """

    model: torch.device
    has_float64: bool = True

    # ------------------------------------------------------------------------------------------------- what is where

    @property
    def home(self) -> torch.device:
        """Where vectors live."""
        return self.model if self.has_float64 else CPU

    def is_home(self, x: Tensor) -> bool:
        """Whether a tensor is where vectors live."""
        return x.device == self.home

    def is_apart(self, leaf: Tensor) -> bool:
        """Whether an evaluation at parameters that are where ``leaf`` is happens at home, and the model is not."""
        return not self.has_float64 and self.is_home(leaf)

    def means(self, device: torch.device) -> bool:
        """Whether what asks for a device asks for the model's."""
        return device.type == self.model.type

    # -------------------------------------------------------------------------------------------------------- moving

    def move(self, x: Tensor, there: torch.device) -> Tensor:
        """A copy on the other device: the one place where anything passes."""
        return x.to(there)

    def bring(self, x: Tensor) -> Tensor:
        """A tensor at home: itself, if it is there."""
        return x if self.has_float64 or self.is_home(x) else self.move(x, self.home)

    def bring_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Tensors of one dtype on the model's device, at home, by one copy: each would wait for the device."""
        if self.has_float64:
            return list(parts)
        flat = self.bring(torch.cat([part.reshape(-1) for part in parts]))
        sizes = [part.numel() for part in parts]
        return [there.view(part.shape) for there, part in zip(flat.split(sizes), parts, strict=True)]

    def send(self, theta: Tensor) -> Tensor:
        """Parameters where a model of their dtype is evaluated: float64 stays at home."""
        stays = self.has_float64 or theta.dtype == torch.float64 or not self.is_home(theta)
        return theta if stays else self.move(theta, self.model)

    def beside(self, x: Tensor, leaf: Tensor) -> Tensor:
        """A vector where ``leaf`` is; of its dtype, if it has to go there from home."""
        if self.has_float64 or self.is_home(leaf):
            return self.bring(x)
        return self.move(x.to(leaf.dtype), self.model) if self.is_home(x) else x

    def room(self, x: Tensor, leaf: Tensor) -> Tensor:
        """Memory like that of ``x`` where ``leaf`` is: ``x`` itself, if it is there."""
        here = self.has_float64 or self.is_home(x) == self.is_home(leaf)
        return x if here else torch.empty_like(x, device=self.model)

    # ------------------------------------------------------------------------------------------- what a device can do

    @property
    def has_data(self) -> bool:
        """Whether there are numbers to look at: on the meta device there are none."""
        return self.model.type != "meta"

    @property
    def has_graphs(self) -> bool:
        """Whether what is launched there can be captured."""
        return self.model.type == "cuda"

    @property
    def products(self) -> tuple[Any, ...]:
        """Those of torch's backends there that may round to TensorFloat-32, by their ``fp32_precision``."""
        backends: Any = torch.backends
        return (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn) if self.has_graphs else ()

    def free_memory(self) -> int:
        """Bytes that are free on a CUDA device, or all that there are beside a CPU."""
        if self.has_graphs:
            return torch.cuda.mem_get_info(self.model)[0]
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    @contextmanager
    def without_autocast(self) -> Iterator[None]:
        """Neither evaluations nor what is made of them are under a ``torch.autocast`` of the caller's."""
        with ExitStack() as stack:
            for kind in dict.fromkeys((self.model.type, self.home.type)):
                if torch.amp.is_autocast_available(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            yield


def device_of(model: torch.device) -> Device:
    """Of a model whose parameters are there.

    Raises:
        ValueError: no model can be measured on a device of that kind.
    """
    if model.type not in KINDS:
        raise ValueError(
            f"model must be on a CPU, on a CUDA device or on an Apple GPU (mps), got parameters on {str(model)!r}"
        )
    return Device(model, has_float64=model.type != "mps")


def default_generators(device: torch.device) -> dict[str, torch.Generator]:
    """torch's own generators: of the CPU, and of the device if it is a GPU."""
    found = {"torch": torch.default_generator}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.default_generators[device.index or 0]
    if device.type == "mps":
        found["mps"] = torch.mps._get_default_mps_generator()
    return found
