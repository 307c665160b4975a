"""From an op to the kernel that carries it out: registration with torch, and one call, on the device of its tensors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor

from grokcurv.ops._arguments import check_apart, converter

cpu_core: Any = None
cpu_problem = ""
try:
    cpu_core = import_module("grokcurv._cpu")
except ImportError as error:  # until a kernel is called nothing needs it, so that grokcurv doctor can say what is wrong
    cpu_problem = f"grokcurv._cpu, the compiled core, does not load ({error}); docs/building.md says how to build it"

R = TypeVar("R")

TYPES = {getattr(torch, name): getattr(cpu_core, name.upper(), 0) for name in ("float32", "float64", "bfloat16")}

_library = torch.library.Library("grokcurv", "DEF")


def define(
    name: str, fake: Callable[..., R], fill: Callable[..., None], writes: tuple[str, ...] = ()
) -> Callable[..., R]:
    """An op with the arguments of ``fake``, of which it writes to those named; whoever calls it may give any arrays.

    Args:
        name: of the op.
        fake: checks what the arguments say of themselves, and allocates the outputs.
        fill: checks the values of tables, and has a kernel write the outputs; they are its last arguments.
        writes: names of the arguments that it also writes to.
    """
    kinds = {label: kind for label, kind in get_type_hints(fake).items() if label != "return"}
    labels = tuple(kinds)
    converters = tuple(converter(kind, label in writes) for label, kind in kinds.items())

    def run(*args: Any) -> R:
        outputs = fake(*args)
        tensors = {label: x for label, x in zip(labels, args, strict=True) if isinstance(x, Tensor)} if writes else {}
        written = {label: tensors.pop(label) for label in writes if label in tensors}
        for label, x in written.items():
            check_apart(label, x, **tensors)
            tensors[label] = x
        fill(*args, *(outputs if isinstance(outputs, tuple) else () if outputs is None else (outputs,)))
        for x in written.values():
            if not x.is_inference():  # such tensors have no version
                torch.autograd.graph.increment_version(x)
        return outputs

    schema = torch.library.infer_schema(fake, op_name=name, mutates_args=writes)
    # Integers are part of a traced program, not symbols in it: the checks look at them.
    _library.define(schema.replace("SymInt", "int"), tags=torch.Tag.pt2_compliant_tag)
    _library.impl(name, run, "CPU")
    _library.impl(name, run, "CUDA")
    torch.library.register_fake(f"grokcurv::{name}", fake, lib=_library)
    op: Callable[..., R] = getattr(torch.ops.grokcurv, name).default

    def convert_and_call(*given: Any) -> R:
        return op(*[convert(label, x) for label, convert, x in zip(labels, converters, given, strict=True)])

    return convert_and_call


class Core(NamedTuple):
    """What carries out kernels on a device."""

    kernels: Any
    """``grokcurv._cpu`` or ``grokcurv._cuda``."""
    where: int
    """The number of threads, or the address of a stream."""
    guard: AbstractContextManager[Any]
    """In which they are called."""


_nothing = nullcontext()


def core_of(device: torch.device) -> Core:
    """The compiled core for a device, with its threads or stream."""
    if device.type == "cpu":
        if cpu_problem:
            raise ImportError(cpu_problem)
        return Core(cpu_core, torch.get_num_threads(), _nothing)
    return Core(cuda_core(device), torch.cuda.current_stream(device).cuda_stream, torch.cuda.device(device))


@cache
def cuda_core(device: torch.device) -> Any:
    """The CUDA core, once it is known to run on ``device`` and has loaded its kernels there."""
    try:
        kernels = import_module("grokcurv._cuda")
    except ImportError as error:
        raise RuntimeError(
            f"tensors on {device} need the extension grokcurv._cuda, which was not built here: install the CUDA "
            "toolkit (nvcc) and build anew (docs/building.md), or move the tensors to the CPU with .cpu()"
        ) from error
    problem = cuda_problem(kernels.RUNTIME, kernels.driver())
    if problem:
        raise RuntimeError(f"tensors on {device}: {problem}")
    with torch.cuda.device(device):
        kernels.preload()
    return kernels


def cuda_problem(runtime: int, driver: int) -> str | None:
    """Why kernels built with CUDA ``runtime`` (13000 is 13.0) cannot run with a driver good for ``driver``, or None."""
    if runtime // 1000 <= driver // 1000:
        return None
    wanted = (
        f"grokcurv._cuda was built with CUDA {cuda_version(runtime)}, which needs a driver for CUDA {runtime // 1000}"
    )
    found = f"the driver here is good for CUDA {cuda_version(driver)}" if driver else "there is no NVIDIA driver here"
    return f"{wanted} (13: 580 or later), and {found}"


def cuda_version(number: int) -> str:
    """13.0 for 13000."""
    return f"{number // 1000}.{number % 1000 // 10}"


def call(kernel: str, beside: Tensor, *args: Tensor | float | None) -> None:
    """Calls a kernel where ``beside`` is, with tensors as addresses (None as the null address)."""
    core = core_of(beside.device)
    addresses = [0 if a is None else _address(a) if isinstance(a, Tensor) else a for a in args]
    workspace = []

    def allocate(doubles: int) -> int:
        workspace.append(torch.empty(doubles, dtype=torch.float64, device=beside.device))
        return workspace[0].data_ptr()

    with core.guard:
        getattr(core.kernels, kernel)(allocate, core.where, *addresses)


def strided(t: Tensor | None) -> tuple[Tensor | None, int]:
    """One array for all vectors, or two-dimensional with a row for each: as a kernel takes it, with its stride."""
    return t, 0 if t is None or t.dim() == 1 else t.shape[1]


_anywhere = torch.empty(1)


def _address(tensor: Tensor) -> int:
    """Never null: torch gives an empty tensor the null address, which to a kernel would mean that it is absent."""
    return tensor.data_ptr() or _anywhere.data_ptr()
