"""The ops on NumPy arrays and on what speaks DLPack: the same bits, nothing copied, nothing written that may not be."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pyarrow as pa
import pytest
import torch
from cases import Inputs
from torch import Tensor

from grokcurv import ops
from grokcurv.ops._arguments import as_tensor

KERNELS = Path(__file__).parents[1] / "docs" / "kernels.md"


def samples(op: str, generator: torch.Generator) -> Iterator[Inputs]:
    """Those whose numbers NumPy can hold."""
    for inputs in cases.sample_inputs(op, generator):
        if not any(isinstance(x, Tensor) and x.dtype == torch.bfloat16 for x in inputs.values()):
            yield inputs


def arrays(inputs: Inputs, read_only: bool = False, writes: tuple[str, ...] = ()) -> Inputs:
    """Copies of the tensors as arrays; read-only ones but for those that the op writes to."""
    copies = {name: x.numpy().copy() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    for name, x in copies.items():
        if isinstance(x, np.ndarray):
            x.flags.writeable = name in writes or not read_only
    return copies


@pytest.mark.parametrize("op", cases.OPS)
def test_read_only_arrays_give_the_same_bits(op: str, generator: torch.Generator) -> None:
    for inputs in samples(op, generator):
        wanted = cases.run(op, inputs)
        given = arrays(inputs, read_only=True, writes=cases.WRITES.get(op, ()))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = getattr(ops, op)(**given)
        written = [given[name] for name in cases.WRITES.get(op, ()) if name in given]
        if written:
            assert result is written[0]
            got = tuple(torch.from_numpy(x) for x in written)
        else:
            got = cases.outputs(result)
            assert all(isinstance(x, Tensor) for x in got)
        for a, b in zip(got, wanted, strict=True):
            assert a.dtype == b.dtype
            assert a.numpy().tobytes() == b.numpy().tobytes()
        for name, x in inputs.items():
            if isinstance(x, Tensor) and name not in cases.WRITES.get(op, ()):
                np.testing.assert_array_equal(given[name], x.numpy())


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, names in cases.WRITES.items() for name in names] + [("perturb", "out")]
)
def test_a_read_only_array_is_not_written_to(op: str, name: str, generator: torch.Generator) -> None:
    inputs = next(samples(op, generator))
    given = arrays(inputs)
    if op == "perturb":
        given["out"] = np.zeros_like(given["directions"])
    given[name].flags.writeable = False
    before = given[name].copy()
    with pytest.raises(ValueError, match=rf"^{name} is written to, but it is a read-only NumPy array"):
        getattr(ops, op)(**given)
    np.testing.assert_array_equal(given[name], before)


def test_out_is_filled_where_it_lies(generator: torch.Generator) -> None:
    given = arrays(next(samples("perturb", generator)))
    whole = np.full((5, *given["directions"].shape), 7, dtype=given["directions"].dtype)
    out = whole[2]
    assert ops.perturb(**given, out=out) is out
    np.testing.assert_array_equal(whole[2], ops.perturb(**given).numpy())
    assert (whole[[0, 1, 3, 4]] == 7).all()


def test_a_memory_mapped_file_is_read_in_place(tmp_path: Path, generator: torch.Generator) -> None:
    x = torch.randn(6, 1000, generator=generator)
    np.save(tmp_path / "rows.npy", x.numpy())
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    assert as_tensor("x", mapped).data_ptr() == mapped.ctypes.data
    assert torch.equal(ops.gram(mapped), ops.gram(x))


def test_results_are_numpy_arrays_without_a_copy(generator: torch.Generator) -> None:
    gram = ops.gram(torch.randn(3, 100, generator=generator).numpy())
    assert np.asarray(gram).ctypes.data == np.from_dlpack(gram).ctypes.data == gram.data_ptr()


def test_arrow_arrays(generator: torch.Generator) -> None:
    theta, directions = torch.randn(50, generator=generator), torch.randn(2, 50, generator=generator)
    eta = torch.rand(2, generator=generator, dtype=torch.float64)
    immutable = pa.array(theta.numpy())
    got = ops.perturb(immutable, directions, pa.array(eta.numpy()))
    assert torch.equal(got, ops.perturb(theta, directions, eta))
    with pytest.raises(TypeError, match=r"^mean is written to: .*got FloatArray"):
        ops.rotate_(directions, torch.eye(2).double()[None], mean=immutable, weights=eta)
    assert immutable.equals(pa.array(theta.numpy()))


def test_jax_arrays(generator: torch.Generator) -> None:
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    x = torch.randn(3, 40, generator=generator)
    given = jax.numpy.asarray(x.numpy())
    assert torch.equal(ops.gram(given), ops.gram(x))
    np.testing.assert_array_equal(jax.dlpack.from_dlpack(ops.gram(given).float()), ops.gram(x).float())
    with pytest.raises(TypeError, match=r"^rows is written to: it must be a tensor or a NumPy array"):
        ops.rotate_(given, torch.zeros(1, 3, 3, dtype=torch.float64))
    np.testing.assert_array_equal(given, x.numpy())


def backwards(x: np.ndarray) -> np.ndarray:
    return x[:, ::-1]


def every_other(x: np.ndarray) -> np.ndarray:
    return x[:, ::2]


def swapped(x: np.ndarray) -> np.ndarray:
    return x.astype(x.dtype.newbyteorder())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (np.ndarray.tolist, TypeError, "x must be a tensor, a NumPy array or another with __dlpack__, got list"),
        (lambda x: x.astype(np.float16), TypeError, "x must be float32 or float64 or bfloat16, got float16"),
        (lambda x: x.astype("U4"), TypeError, "x is a ndarray whose memory torch cannot share"),
        (swapped, TypeError, "x is a ndarray whose memory torch cannot share"),
        (backwards, ValueError, "x must be contiguous, got strides (40, -4): pass np.ascontiguousarray(x)"),
        (every_other, ValueError, "x must be contiguous, got strides (40, 8): pass np.ascontiguousarray(x)"),
        (lambda x: x[0], ValueError, "x must have shape (n, P), got (10,)"),
    ],
    ids=["list", "half", "text", "byte order", "backwards", "strided", "shape"],
)
def test_refusals(change: Callable[[np.ndarray], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + re.escape(message)):
        ops.gram(change(np.ones((3, 10), dtype=np.float32)))


def test_every_op_takes_arrays() -> None:
    """No public argument is annotated as a tensor alone."""
    for op in cases.OPS:
        for name, parameter in inspect.signature(getattr(ops, op)).parameters.items():
            assert "Tensor" not in str(parameter.annotation), (op, name)


def test_the_documentation_is_right() -> None:
    """docs/kernels.md has every op, its code runs as it stands, and gives what its formulas say."""
    text = KERNELS.read_text()
    assert all(re.search(rf"^## .*\b{op}\b", text, re.MULTILINE) for op in cases.OPS)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 10
    names: dict[str, Any] = {}
    checks = {
        "gram": 0,
        "perturb": 1,
        "commutator": 2,
        "split": 3,
        "filter": 4,
        "lengths": 5,
        "pca": 6,
        "turn": 7,
        "draw": 9,
    }
    for number, block in enumerate(blocks):
        before = {name: x.copy() for name, x in names.items() if isinstance(x, np.ndarray)}
        exec(block, names)
        n = {name: np.asarray(x) for name, x in names.items() if isinstance(x, Tensor | np.ndarray)}
        if number == checks["gram"]:
            np.testing.assert_allclose(n["g"][0], n["x"].astype(float) @ n["x"].astype(float).T, rtol=1e-10)
        elif number == checks["perturb"]:
            wanted = n["theta"] - n["steps"].astype(np.float32)[:, None] * n["directions"]
            np.testing.assert_array_equal(n["stepped"], wanted)
        elif number == checks["commutator"]:
            delta = 1e-3 * ((n["a2"] - n["g_a"]) - (n["b2"] - n["g_b"]))
            lengths = [np.linalg.norm(1e-3 * n[name]) for name in ("g_a", "g_b")]
            np.testing.assert_allclose(n["defect"], np.linalg.norm(delta) / np.prod(lengths))
            halves = (delta.reshape(2, -1) ** 2).sum(1) / (delta**2).sum()
            np.testing.assert_allclose(n["share_of_each_half"][0], halves)
        elif number == checks["split"]:
            np.testing.assert_allclose(n["coefficients"], n["v"][:, 500:1500] @ n["basis"].T)
            np.testing.assert_allclose(n["norm2"], (n["v"] ** 2).sum(1))
        elif number == checks["filter"]:
            inside = before["v"][:, 500:1500] @ n["basis"].T @ n["basis"]
            np.testing.assert_allclose(n["v"][:, 500:1500], inside, atol=1e-12)
            assert np.abs(np.delete(n["v"], slice(500, 1500), axis=1)).max() == 0
        elif number == checks["lengths"]:
            apart = (n["x"].astype(float) - n["x"][0]) ** 2
            wanted = [apart[:, :256].sum(1), apart[:, 256:1280].sum(1)]
            np.testing.assert_allclose(n["squared_lengths"], wanted, rtol=1e-9)
        elif number == checks["pca"]:
            _, s, vt = np.linalg.svd(n["x"].astype(float), full_matrices=False)
            np.testing.assert_allclose(n["values"][0], s[:3] ** 2)
            np.testing.assert_allclose(np.abs(n["principal_components"] @ vt[:3].T), np.eye(3), atol=1e-3)
        elif number == checks["turn"]:
            np.testing.assert_allclose(n["mean"], before["x"].mean(0), atol=1e-6)
            np.testing.assert_array_equal(n["x"], before["x"])
        elif number == checks["draw"]:
            assert n["batches"].shape == (3, 512)
            assert (n["batches"].min(1) >= 0).all()
            assert (n["batches"].max(1) < n["n"]).all()
            np.testing.assert_array_equal(n["again"][0], n["batches"][2, :10])
        else:
            np.testing.assert_allclose(n["sum_of_parts"], n["whole"], atol=1e-9)
