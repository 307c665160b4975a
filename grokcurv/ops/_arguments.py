"""What an op is given: arrays as tensors, numbers as numbers, and checks that name the argument."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NoReturn, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from grokcurv.reference import compute_type

FLOATS = (torch.float32, torch.float64, torch.bfloat16)
"""Of vectors."""


class Array(Protocol):
    """A torch tensor, a NumPy array, or what else speaks DLPack: JAX, Arrow, CuPy."""

    def __dlpack__(self, *args: Any, **options: Any) -> Any: ...

    def __dlpack_device__(self) -> Any: ...


A = TypeVar("A", bound=Array)


def as_tensor(name: str, x: Array) -> Tensor:
    """``x``, or a tensor of its memory; raises TypeError if it is no array or one that torch cannot share.

    What torch would refuse before an op is reached, or pass on to it without its derivative, is refused here.
    """
    if isinstance(x, Tensor):
        if x.layout is not torch.strided or x.is_nested or x.is_quantized:
            raise TypeError(f"{name} must be a dense tensor, got one that is sparse, nested or quantized")
        check_no_grad(name, x)
        return x
    if not hasattr(x, "__dlpack__"):
        raise TypeError(f"{name} must be a tensor, a NumPy array or another with __dlpack__, got {type(x).__name__}")
    if isinstance(x, np.ndarray) and not x.flags.c_contiguous:  # a negative stride would end the process in torch 2.13
        raise ValueError(f"{name} must be contiguous, got strides {x.strides}: pass np.ascontiguousarray({name})")
    try:
        return torch.utils.dlpack.from_dlpack(x)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{name} is a {type(x).__name__} whose memory torch cannot share: {error}") from error


def as_writable(name: str, x: Array) -> Tensor:
    """As :func:`as_tensor`, for what is written to. NumPy says whether it may be; the DLPack protocol need not."""
    if not isinstance(x, Tensor):
        if not isinstance(x, np.ndarray):
            raise TypeError(f"{name} is written to: it must be a tensor or a NumPy array, got {type(x).__name__}")
        if not x.flags.writeable:
            raise ValueError(f"{name} is written to, but it is a read-only NumPy array: pass {name}.copy()")
    return as_tensor(name, x)


def as_integer(name: str, x: int) -> int:
    """``x`` as an int64: torch's own complaint would be a RuntimeError."""
    if not isinstance(x, (int, torch.SymInt)):  # a union here is more than the compiler of torch 2.6 reads
        try:
            x = operator.index(x)
        except TypeError as error:
            raise TypeError(f"{name} must be an integer, got {x!r}") from error
    if not -(2**63) <= x < 2**63:
        raise ValueError(f"{name} must be an integer of 64 bits, got {x}")
    return x


def as_number(name: str, x: float) -> float:
    """``x`` as a float64."""
    if not hasattr(x, "__float__"):
        raise TypeError(f"{name} must be a number, got {x!r}")
    try:
        return float(x)
    except (OverflowError, RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"{name} must be a number, got {x!r:.60}: {error}") from error


CONVERTERS: dict[Any, Callable[[str, Any], Any]] = {
    Tensor: as_tensor,
    int: as_integer,
    float: as_number,
    str: lambda _, x: str(x),
    bool: lambda _, x: bool(x),
}
"""What makes an op's argument of what was given for it, by how the op's own is annotated."""


def converter(kind: Any, written: bool) -> Callable[[str, Any], Any]:
    """As :data:`CONVERTERS`, also of what is written to and of what may be None."""
    if kind == Tensor | None:
        convert = converter(Tensor, written)
        return lambda name, x: None if x is None else convert(name, x)
    return as_writable if written else CONVERTERS[kind]


def check(
    name: str,
    t: Tensor,
    dtype: torch.dtype | tuple[torch.dtype, ...],
    shape: tuple[int | str, ...],
    beside: Tensor | None = None,
    rows: int | str | None = None,
) -> None:
    """Raises unless ``t`` has one of the dtypes, the shape (a letter is any size) and the device of ``beside``.

    With ``rows``, one for each of so many vectors is as good as the one that they share.
    """
    wanted = dtype if isinstance(dtype, tuple) else (dtype,)
    if t.dtype not in wanted:
        raise TypeError(f"{name} must be {' or '.join(map(_short, wanted))}, got {_short(t.dtype)}")
    whole = shape if rows is None or t.dim() == len(shape) else (rows, *shape)
    if t.dim() != len(whole) or any([type(m) is not str and n != m for n, m in zip(t.shape, whole, strict=True)]):
        shapes = [shape] if rows is None else [shape, (rows, *shape)]
        said = " or ".join(f"({', '.join(map(str, one))})" for one in shapes)
        raise ValueError(f"{name} must have shape {said}, got {tuple(t.shape)}")
    if beside is not None and t.device != beside.device:
        raise ValueError(f"{name} must be on {beside.device} like the other tensors, got {t.device}")
    if not t.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {t.stride()}: pass {name}.contiguous()")
    check_no_grad(name, t)


def check_no_grad(name: str, t: Tensor) -> None:
    """Raise a ValueError for a tensor that autograd is recording."""
    if t.requires_grad:
        raise ValueError(f"{name} requires grad, but the op has no derivative: pass {name}.detach()")
    # Outside of a level of forward differentiation no tensor has a tangent; to ask torch takes ten times as long.
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None:
        raise ValueError(f"{name} carries a tangent, but the op has no derivative")


def check_table(name: str, t: Tensor, shape: tuple[int | str, ...]) -> None:
    """Raises unless ``t`` is a table of indices: int64, of this shape, on the CPU."""
    if t.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, wherever the vectors are; got {t.device}: pass {name}.cpu()")
    check(name, t, torch.int64, shape)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_basis(values: Tensor, rows: Tensor, vectors: Tensor) -> None:
    check("values", values, compute_type(vectors.dtype), ("nnz",), vectors, rows=vectors.shape[0])
    check_table("rows", rows, ("K", 3))


def check_row_values(values: Tensor, rows: Tensor, size: int) -> None:
    """Raise a ValueError unless each row of a table (k, 3) lies within its vector and within its values."""
    nnz = values.shape[-1]
    for j, (start, length, offset) in enumerate(rows.tolist()):
        if start < 0 or not 0 <= length <= size - start:
            refuse_span("rows", j, start, length, size)
        if not 0 <= offset <= nnz - length:
            raise ValueError(f"rows[{j}] reads values[{offset}:{offset + length}], but there are {nnz} values")


def check_spans(name: str, spans: Tensor, size: int) -> None:
    """Raises unless every (start, length) lies inside ``size`` coordinates. No sum of two numbers can overflow."""
    for j, (start, length) in enumerate(spans.tolist()):
        if start < 0 or not 0 <= length <= size - start:
            refuse_span(name, j, start, length, size)


def refuse_span(name: str, j: int, start: int, length: int, size: int) -> NoReturn:
    raise ValueError(f"{name}[{j}] has start {start} and length {length}, which does not lie within P = {size}")


def count_segments(segments: Tensor | None) -> int:
    """S: without segments all coordinates are one."""
    if segments is None:
        return 1
    check_table("segments", segments, ("S", 2))
    return segments.shape[0]


def spans_within(segments: Tensor | None, size: int) -> Tensor:
    """The segments, or the one of all coordinates; raises if one leaves them."""
    if segments is None:
        return torch.tensor([[0, size]])
    check_spans("segments", segments, size)
    return segments


def check_apart(name: str, out: Tensor, **inputs: Tensor) -> None:
    """Raises if ``out`` shares memory with an input. All are contiguous, so each is one range of bytes."""
    start, stop = out.data_ptr(), out.data_ptr() + out.nbytes
    for other, t in inputs.items():
        if start < t.data_ptr() + t.nbytes and t.data_ptr() < stop:
            raise ValueError(f"{name} overlaps {other} in memory: pass a tensor of its own")
