"""``grokcurv doctor``: what was built, what it runs on, and whether every op agrees with its definition here."""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grokcurv import ops, reference
from grokcurv.ops._dispatch import cpu_core, cpu_problem, cuda_problem, cuda_version
from grokcurv.runs import PACKAGES, processor, versions

PACKAGES_OF_PAGES = ("matplotlib", "jinja2", "tyro", "rich")
"""Those that no run depends on."""


def report() -> dict[str, Any]:
    """Facts in the sections ``machine``, ``packages``, ``build``, ``cuda`` and ``self_test`` (``"ok"`` or an error)."""
    packages = PACKAGES + PACKAGES_OF_PAGES
    return {
        "machine": {
            "system": platform.platform(),
            "processor": processor(),
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        },
        "packages": dict.fromkeys(packages, "not installed") | versions(packages),
        "build": {**_cpu_core(), "OpenMP runtimes loaded": _openmp_runtimes()},
        "cuda": {
            **_cuda_core(),
            "torch's CUDA": torch.version.cuda or "none: this torch was built for the CPU alone",
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "self_test": {name: _outcome(test) for name, test in SELF_TESTS.items()},
    }


def main() -> int:
    """Prints the report; returns 0 if every op works here, else 1."""
    facts = report()
    for section, entries in facts.items():
        print(section.replace("_", " "))
        for name, value in entries.items():
            text = ", ".join(f"{k} ({v})" for k, v in value.items()) if isinstance(value, dict) else value
            print(f"  {name:<24} {', '.join(text) or 'none' if isinstance(text, list) else text}")
    return 0 if set(facts["self_test"].values()) == {"ok"} else 1


def _cpu_core() -> dict[str, Any]:
    """How the CPU kernels were built, and for which processors."""
    if cpu_problem:
        return {"extension": cpu_problem}
    return {
        "compiler": cpu_core.COMPILER,
        "build type": cpu_core.BUILD_TYPE,
        "flags": cpu_core.FLAGS,
        "instruction set": cpu_core.ISA,
        "instruction sets": {
            name: "runs here" if runs else "not on this processor" for name, runs in cpu_core.ISAS.items()
        },
        "OpenMP": cpu_core.OPENMP,
    }


def _openmp_runtimes() -> list[str]:
    """The OpenMP libraries in this process. One is right; two would each start threads of their own."""
    maps = Path("/proc/self/maps")
    paths = {line.split()[-1] for line in maps.read_text().splitlines()} if maps.exists() else set()
    return sorted(path for path in paths if Path(path).name.startswith(("libgomp", "libomp", "libiomp")))


def _cuda_core() -> dict[str, str]:
    """What the CUDA kernels were built with and for, and whether the driver here can run them."""
    try:
        core = import_module("grokcurv._cuda")
    except ImportError as error:
        return {"extension": f"not built, or it does not load: {error}"}
    return {
        "extension": f"{core.COMPILER} for {core.ARCHITECTURES}",
        "driver": cuda_problem(core.RUNTIME, core.driver()) or f"good for CUDA {cuda_version(core.driver())}",
    }


def _outcome(test: Callable[[], None]) -> str:
    """In a word what came of a test: ok, or how it failed."""
    try:
        test()
    except Exception as error:
        return f"FAILED: {type(error).__name__}: {error}"
    return "ok"


_assert_close = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-11)


def _assert_agrees(op: str, *inputs: Any, bits: bool = False, **options: Any) -> None:
    """That the op gives what its definition gives, or its very ``bits``."""
    got, wanted = (getattr(module, op)(*inputs, **options) for module in (ops, reference))
    if bits and not torch.equal(got, wanted):
        raise AssertionError("bits differ from the definition")
    _assert_close(got, wanted)


def _rows(*shape: int) -> Tensor:
    """Float32 numbers that need no generator."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).mul(0.7).sin().float().reshape(shape)


_ETA = torch.tensor([1e-3, 0.5], dtype=torch.float64)
_SIZE = 5001
_ROWS = _rows(5, _SIZE)
_PAIR = _ROWS[:2]
_INTEGERS = torch.tensor([[5, -1, 2**40], [0, 7, 2**32 - 1], [97, 2**31 + 1, 0]])
_BASIS = (_rows(300), torch.tensor([[10, 100, 0], [4000, 200, 100]]))


def _test_commutator() -> None:
    g_a, g_b, a2, b2 = _rows(4, 2, _SIZE)
    theta, (values, rows), segments = _rows(_SIZE), _BASIS, torch.tensor([[0, _SIZE], [4000, 1000]])
    _assert_agrees("commutator", g_a, g_b, a2, b2, _ETA, theta=theta, values=values, rows=rows, segments=segments)


def _test_subspace() -> None:
    _assert_agrees("subspace_split", _PAIR, *_BASIS)
    v, values, rows = _PAIR.double(), _BASIS[0].double(), _BASIS[1]
    _assert_close(ops.subspace_filter_(v.clone(), values, rows, 0.5), reference.subspace_filter(v, values, rows, 0.5))


def _test_eigh() -> None:
    x = _rows(1, 140, 30).double()
    for a in (x @ x.mT, x.mT @ x):
        values, vectors = ops.eigh(a, 3)
        _assert_close(values, reference.eigh(a, 3)[0])
        _assert_close(a @ vectors, vectors * values[:, None])


def _test_rotate() -> None:
    coefficients = _rows(1, 3, 5).double()
    _assert_agrees("rotate", _ROWS, coefficients)
    _assert_close(ops.rotate_(_ROWS.clone(), coefficients)[:3], reference.rotate(_ROWS, coefficients))


SELF_TESTS: dict[str, Callable[[], None]] = {
    "perturb": partial(_assert_agrees, "perturb", _rows(_SIZE), _PAIR, _ETA, bits=True),
    "commutator": _test_commutator,
    "subspace": _test_subspace,
    "gram": partial(_assert_agrees, "gram", _ROWS, _PAIR, origin=_ROWS[0]),
    "eigh": _test_eigh,
    "rotate": _test_rotate,
    "sketch": partial(_assert_agrees, "sketch", _PAIR, 64, 1),
    "draw": partial(_assert_agrees, "draw", _INTEGERS[0], 3, *_INTEGERS[1:], 9, bits=True),
}

if __name__ == "__main__":
    raise SystemExit(main())
