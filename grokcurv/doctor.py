"""``grokcurv doctor``: what was built, what it runs on, and whether every op agrees with its definition here."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grokcurv import _cpu, ops, reference
from grokcurv.ops._dispatch import cuda_problem, cuda_version
from grokcurv.runs import processor

PACKAGES = (
    *("grokcurv", "torch", "numpy", "scipy", "pandas", "pyarrow", "safetensors"),
    *("matplotlib", "jinja2", "tyro", "rich"),
)


def report() -> dict[str, Any]:
    """Facts in the sections ``machine``, ``packages``, ``build``, ``cuda`` and ``self_test`` (``"ok"`` or an error)."""
    return {
        "machine": {
            "system": platform.platform(),
            "processor": processor(),
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        },
        "packages": {name: _version(name) for name in PACKAGES},
        "build": {
            "compiler": _cpu.COMPILER,
            "build type": _cpu.BUILD_TYPE,
            "flags": _cpu.FLAGS,
            "instruction set": _cpu.ISA,
            "instruction sets": {
                name: "runs here" if runs else "not on this processor" for name, runs in _cpu.ISAS.items()
            },
            "OpenMP": _cpu.OPENMP,
            "OpenMP runtimes loaded": _openmp_runtimes(),
        },
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


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


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
    try:
        test()
    except Exception as error:
        return f"FAILED: {type(error).__name__}: {error}"
    return "ok"


def _close(*pairs: tuple[Tensor, Tensor]) -> None:
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


def _rows(*shape: int) -> Tensor:
    """Float32 numbers that need no generator."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).mul(0.7).sin().float().reshape(shape)


_ETA = torch.tensor([1e-3, 0.5], dtype=torch.float64)
_SIZE = 5001
_BASIS = (_rows(300), torch.tensor([[10, 100, 0], [4000, 200, 100]]))


def _test_perturb() -> None:
    inputs = (_rows(_SIZE), _rows(2, _SIZE), _ETA)
    if not torch.equal(ops.perturb(*inputs), reference.perturb(*inputs)):
        raise AssertionError("bits differ from the definition")


def _test_commutator() -> None:
    g_a, g_b, a2, b2 = _rows(4, 2, _SIZE)
    theta, (values, rows), segments = _rows(_SIZE), _BASIS, torch.tensor([[0, _SIZE], [4000, 1000]])
    got, wanted = (
        module.commutator(g_a, g_b, a2, b2, _ETA, theta=theta, values=values, rows=rows, segments=segments)
        for module in (ops, reference)
    )
    _close(*zip(got, wanted, strict=True))


def _test_subspace() -> None:
    v = _rows(2, _SIZE)
    _close(*zip(ops.subspace_split(v, *_BASIS), reference.subspace_split(v, *_BASIS), strict=True))
    v = v.double()
    values, rows = _BASIS[0].double(), _BASIS[1]
    _close((ops.subspace_filter_(v.clone(), values, rows, 0.5), reference.subspace_filter(v, values, rows, 0.5)))


def _test_gram() -> None:
    x = _rows(5, _SIZE)
    _close((ops.gram(x, x[:2], origin=x[0]), reference.gram(x, x[:2], origin=x[0])))


def _test_eigh() -> None:
    x = _rows(1, 140, 30).double()
    for a in (x @ x.mT, x.mT @ x):
        values, vectors = ops.eigh(a, 3)
        _close((values, reference.eigh(a, 3)[0]), (a @ vectors, vectors * values[:, None]))


def _test_rotate() -> None:
    rows, coefficients = _rows(5, _SIZE), _rows(1, 3, 5).double()
    want = reference.rotate(rows, coefficients)
    _close((ops.rotate(rows, coefficients), want), (ops.rotate_(rows.clone(), coefficients)[:3], want))


def _test_sketch() -> None:
    x = _rows(2, _SIZE)
    _close((ops.sketch(x, 64, 1), reference.sketch(x, 64, 1)))


SELF_TESTS: dict[str, Callable[[], None]] = {
    "perturb": _test_perturb,
    "commutator": _test_commutator,
    "subspace": _test_subspace,
    "gram": _test_gram,
    "eigh": _test_eigh,
    "rotate": _test_rotate,
    "sketch": _test_sketch,
}

if __name__ == "__main__":
    raise SystemExit(main())
