"""Inputs of the ops: one `sample_inputs` feeds comparison with the definition, opcheck, compilation and bit tests."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Generator, Tensor

from grokcurv import ops, reference

Inputs = dict[str, Any]
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
OWNERS = ((), (3,))
"""What comes before the shape of what three vectors share, and of what each of them has of its own."""
SHAPES = ((2, 4099), (3, 129), (1, 1), (0, 5), (2, 0))
"""(N, P): a second chunk and a tail; a tail; a single coordinate; nothing."""


def numbers(shape: tuple[int, ...], dtype: torch.dtype, generator: Generator) -> Tensor:
    """Either sign, magnitudes exp(3 randn): eight decades, so that an addition out of order shows."""
    magnitude = torch.randn(shape, generator=generator, dtype=torch.float64).mul(3).exp()
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return (magnitude * sign).to(dtype)


def step_sizes(n: int, generator: Generator) -> Tensor:
    return torch.rand(n, generator=generator, dtype=torch.float64).mul(1e-2)


def spans(count: int, size: int, generator: Generator) -> Tensor:
    """(count, 2): random parts of `size` coordinates, which may overlap; the first is all of them, the second empty."""
    ends = torch.randint(0, size + 1, (count, 2), generator=generator).sort(dim=1).values
    starts, lengths = ends[:, 0], ends[:, 1] - ends[:, 0]
    if count > 1:
        starts[0], lengths[0], lengths[1] = 0, size, 0
    return torch.stack([starts, lengths], dim=1)


def basis(count: int, size: int, dtype: torch.dtype, generator: Generator, owners: tuple[int, ...] = ()) -> Inputs:
    """Block-sparse vectors, neither orthogonal nor normalised; `owners` is (N,) where each of N has its own."""
    blocks = spans(count, size, generator)
    offsets = blocks[:, 1].cumsum(0) - blocks[:, 1] + 3
    values = numbers((*owners, int(blocks[:, 1].sum()) + 5), reference.compute_type(dtype), generator)
    return {"values": values, "rows": torch.cat([blocks, offsets[:, None]], dim=1)}


def orthonormal_basis(size: int, dtype: torch.dtype, generator: Generator, owners: tuple[int, ...] = ()) -> Inputs:
    """Four orthonormal vectors, two on each half of the coordinates."""
    half = size // 2
    shape = (*owners, half, 2)
    blocks = [torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64)).Q.mT for _ in range(2)]
    starts = torch.tensor([0, 0, half, half])
    rows = torch.stack([starts, torch.full((4,), half), torch.arange(4) * half], dim=1)
    return {"values": torch.cat(blocks, -2).flatten(-2).to(reference.compute_type(dtype)), "rows": rows}


def on_basis(x: Tensor, dense: Tensor) -> Tensor:
    """(N, K): each row of x times each vector of the basis, (K, P) for all or (N, K, P)."""
    return (dense @ x[..., None])[..., 0]


UNIT = 2.0**-53
"""Half the spacing of float64 numbers at 1."""


def gamma(n: int) -> float:
    """n rounded operations in a row err by at most this factor of the sum of magnitudes."""
    return n * UNIT / (1 - n * UNIT)


def gradients(n: int, p: int, dtype: torch.dtype, generator: Generator) -> Inputs:
    vectors = {name: numbers((n, p), dtype, generator) for name in ("g_a", "g_b", "a2", "b2")}
    return {**vectors, "eta": step_sizes(n, generator)}


def _perturb(n: int, p: int, dtype: torch.dtype, generator: Generator) -> Iterator[Inputs]:
    theta, directions = numbers((p,), dtype, generator), numbers((n, p), dtype, generator)
    yield {"theta": theta, "directions": directions, "eta": step_sizes(n, generator)}


def _commutator(n: int, p: int, dtype: torch.dtype, generator: Generator) -> Iterator[Inputs]:
    inputs = gradients(n, p, dtype, generator)
    yield {
        **inputs,
        **basis(5, p, dtype, generator),
        "theta": numbers((p,), dtype, generator),
        "segments": spans(4, p, generator),
        "form": "difference",
        "keep_delta": True,
    }
    yield {**inputs, "form": "bracket", "segments": spans(0, p, generator)}


def _subspace_split(n: int, p: int, dtype: torch.dtype, generator: Generator) -> Iterator[Inputs]:
    yield {"v": numbers((n, p), dtype, generator), **basis(5, p, dtype, generator)}


def _subspace_filter_(n: int, p: int, dtype: torch.dtype, generator: Generator) -> Iterator[Inputs]:
    yield _filtered(n, p, dtype, generator, ())


def _filtered(n: int, p: int, dtype: torch.dtype, generator: Generator, owners: tuple[int, ...]) -> Inputs:
    space = orthonormal_basis(p, dtype, generator, owners) if p >= 4 else basis(2, p, dtype, generator, owners)
    return {"g": numbers((n, p), dtype, generator), **space, "strength": 0.75}


def _gram(n: int, p: int, dtype: torch.dtype, generator: Generator) -> Iterator[Inputs]:
    x, y = numbers((n, p), dtype, generator), numbers((n + 3, p), dtype, generator)
    yield {"x": y}
    yield {"x": numbers((6, 4 * p), dtype, generator)}  # more than one range of coordinates
    yield {"x": x, "y": y, "origin": numbers((p,), dtype, generator), "segments": spans(3, p, generator)}


def _eigh(n: int, p: int, dtype: torch.dtype, generator: Generator) -> Iterator[Inputs]:
    """B = n Gram matrices of size min(p, 140): both methods."""
    if dtype == torch.float64:
        size = min(p, 140)
        x = torch.randn(n, size, 20, generator=generator, dtype=dtype)
        yield {"a": x @ x.mT, "k": min(size, 3)}
        yield {"a": x @ x.mT, "k": size}


def disjoint_spans(size: int, generator: Generator) -> Tensor:
    """(4, 2): parts of `size` coordinates between random ends, neither in order nor covering; one is empty."""
    ends = torch.randint(0, size + 1, (6,), generator=generator).sort().values
    starts, stops = ends[0::2], ends[1::2]
    return torch.cat([torch.stack([starts, stops - starts], dim=1).flip(0), torch.tensor([[0, 0]])])


def _rotate(n: int, p: int, dtype: torch.dtype, generator: Generator) -> Iterator[Inputs]:
    """m = 3n rows into q = 5n, and by segment into n."""
    rows = numbers((3 * n, p), dtype, generator)
    yield {"rows": rows, "coefficients": numbers((1, 5 * n, 3 * n), torch.float64, generator)}
    segments = disjoint_spans(p, generator)
    coefficients = numbers((len(segments), n, 3 * n), torch.float64, generator)
    yield {"rows": rows, "coefficients": coefficients, "segments": segments}


def _rotate_(n: int, p: int, dtype: torch.dtype, generator: Generator) -> Iterator[Inputs]:
    rows = numbers((9 * n, p), dtype, generator)
    segments = disjoint_spans(p, generator)
    yield {
        "rows": rows,
        "coefficients": numbers((len(segments), 7 * n, 9 * n), torch.float64, generator),
        "segments": segments,
        "mean": numbers((p,), torch.float64, generator),
        "weights": numbers((9 * n,), torch.float64, generator),
    }
    yield {"rows": rows, "coefficients": numbers((1, 9 * n, 9 * n), torch.float64, generator)}


def _sketch(n: int, p: int, dtype: torch.dtype, generator: Generator) -> Iterator[Inputs]:
    """The second has several ranges where P is more than 65536."""
    yield {"x": numbers((n, p), dtype, generator), "size": 64, "seed": 2**62 + 5, "start": 2**40 + 77}
    x = numbers((n, 40 * p), dtype, generator)
    yield {"x": x, "size": 256, "seed": int(torch.randint(2**31, (), generator=generator))}


def _draw(n: int, p: int, dtype: torch.dtype, generator: Generator) -> Iterator[Inputs]:
    """R = N runs, rows = P: numbers for which hardly a word is refused, half of them, or none; and 64 bits."""
    if dtype == torch.float64:
        for below in ([4704, 2**31 + 1, 2**32], [0, 97, 2**32 - 5]):
            yield {
                "seeds": torch.randint(-(2**63), 2**63 - 1, (n,), generator=generator),
                "purpose": int(torch.randint(2**32, (), generator=generator)),
                "steps": torch.randint(2**32, (n,), generator=generator),
                "n": torch.tensor(below)[torch.arange(n) % 3],
                "rows": p,
            }


_SAMPLES: dict[str, Callable[[int, int, torch.dtype, Generator], Iterator[Inputs]]] = {
    "perturb": _perturb,
    "commutator": _commutator,
    "subspace_split": _subspace_split,
    "subspace_filter_": _subspace_filter_,
    "gram": _gram,
    "eigh": _eigh,
    "rotate": _rotate,
    "rotate_": _rotate_,
    "sketch": _sketch,
}


def _perturb_of_runs(n: int, p: int, dtype: torch.dtype, generator: Generator) -> Iterator[Inputs]:
    theta, directions = (numbers((n, p), dtype, generator) for _ in range(2))
    yield {"theta": theta, "directions": directions, "eta": step_sizes(n, generator)}


def _commutator_of_runs(n: int, p: int, dtype: torch.dtype, generator: Generator) -> Iterator[Inputs]:
    own = {**basis(3, p, dtype, generator, (n,)), "theta": numbers((n, p), dtype, generator)}
    yield {**gradients(n, p, dtype, generator), **own, "segments": spans(2, p, generator), "keep_delta": True}


def _subspace_split_of_runs(n: int, p: int, dtype: torch.dtype, generator: Generator) -> Iterator[Inputs]:
    yield {"v": numbers((n, p), dtype, generator), **basis(3, p, dtype, generator, (n,))}


def _subspace_filter_of_runs(n: int, p: int, dtype: torch.dtype, generator: Generator) -> Iterator[Inputs]:
    yield _filtered(n, p, dtype, generator, (n,))


_OF_RUNS: dict[str, Callable[[int, int, torch.dtype, Generator], Iterator[Inputs]]] = {
    "perturb": _perturb_of_runs,
    "commutator": _commutator_of_runs,
    "subspace_split": _subspace_split_of_runs,
    "subspace_filter_": _subspace_filter_of_runs,
    "draw": _draw,
}
"""Where each of N vectors is a run's, with parameters or a basis of its own."""

OPS = tuple(_SAMPLES | _OF_RUNS)
KINDS = (_SAMPLES, _OF_RUNS)
WRITES = {"subspace_filter_": ("g",), "rotate_": ("rows", "mean")}
"""The arguments that an op writes to, the one that it returns first."""


def sample_inputs(
    op: str, generator: Generator, shapes: Iterable[tuple[int, int]] = SHAPES, kinds: Iterable[int] = (0, 1)
) -> Iterator[Inputs]:
    """Keyword arguments of `ops.<op>`, over dtypes, shapes and options; of both :data:`KINDS`, or of some."""
    for samples in (KINDS[kind] for kind in kinds if op in KINDS[kind]):
        for dtype in DTYPES:
            for n, p in shapes:
                yield from samples[op](n, p, dtype, generator)


def of_one(inputs: Inputs, i: int) -> Inputs:
    """Those of vector i alone, to whom all is shared."""
    batched = {"directions", "eta", "g_a", "g_b", "a2", "b2", "v", "g"}
    alone = {name: x[i : i + 1] if name in batched else x for name, x in inputs.items()}
    own = {name: inputs[name][i] for name in ("theta", "values") if name in inputs and inputs[name].dim() == 2}
    return alone | own


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def run(op: str, inputs: Inputs, function: Callable[..., Any] | None = None) -> tuple[Tensor, ...]:
    """The outputs of the op, or of a function like it, and what else it writes to; it gets copies."""
    copies = {name: x.clone() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    results = outputs((function or getattr(ops, op))(**copies))
    return results + tuple(copies[name] for name in WRITES.get(op, ())[1:] if name in copies)


def define(op: str, inputs: Inputs) -> tuple[Tensor, ...]:
    """The outputs by definition."""
    return run(op, inputs, getattr(reference, op, None) or getattr(reference, op.rstrip("_")))


def digest(seed: int, *kinds: int) -> str:
    """One hash of the bits of every output of every op on the samples of a seed, of both kinds or of some."""
    bits = hashlib.sha256()
    for op in OPS:
        for inputs in sample_inputs(op, torch.Generator().manual_seed(seed), kinds=kinds or (0, 1)):
            for output in run(op, inputs):
                bits.update(output.contiguous().view(torch.uint8).numpy().tobytes())
    return bits.hexdigest()


if __name__ == "__main__":
    print(digest(int(sys.argv[1])))
