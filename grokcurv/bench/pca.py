"""StreamingPCA beside NumPy's SVD, scikit-learn, TorchDR and ``torch.pca_lowrank``, on a walk with drift."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pkgutil import resolve_name
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.linalg import subspace_angles
from torch import Generator, Tensor

from grokcurv.bench.comparison import OURS, Case, Comparison, Implementation
from grokcurv.bench.kernels import CHUNK, normal
from grokcurv.pca import StreamingPCA

SAMPLES = 10
"""Prefixes of which a peer does the PCA, where grokcurv does it of all."""


class Answer(NamedTuple):
    """Leading variances (k,), descending, and components (k, P), as tensors or as NumPy's arrays."""

    variances: Any
    components: Any


def whole(n: int, size: int, k: int = 2) -> Case:
    """Variances and components of rows that are all there."""

    def build(generator: Generator) -> Comparison:
        x = walk(generator, n, size)
        rows = x.numpy()

        def ours() -> Answer:
            return fitted(StreamingPCA(n_components=k, method="gram").partial_fit(x))

        def numpy() -> Answer:
            values, vectors = svd(rows)
            return Answer(values[:k] ** 2 / (n - 1), vectors[:k])

        def sklearn() -> Answer:
            return fitted(resolve_name("sklearn.decomposition:PCA")(k).fit(rows))

        def torchdr() -> Answer:
            pca = resolve_name("torchdr:PCA")(k, device="cpu")
            scores = pca.fit_transform(x)
            return Answer(scores.square().sum(0) / (n - 1), pca.components_)

        implementations = (
            Implementation(OURS, ours),
            Implementation("NumPy SVD", numpy, needs=("threadpoolctl",)),
            Implementation("scikit-learn PCA", sklearn, note="its solver by size", needs=("sklearn", "threadpoolctl")),
            Implementation("TorchDR PCA", torchdr, needs=("torchdr",)),
            Implementation("torch.pca_lowrank", lambda: lowrank(x, k), note="approximate: random projections"),
        )
        flops64 = n * (n + 1) * size
        return Comparison(implementations, errors_against(x, k), tolerance=1e-5, moved=x.nbytes, flops64=flops64)

    return Case("pca", f"PCA of {n} rows of {size:,}, k = {k}", 40 * n * size, build)


def history(n: int, size: int) -> Case:
    """PC1 % of the first 2, 3, ... n rows. Peers do ten prefixes, and their time is scaled to all of them."""
    # The midpoint rule: too little, if anything.
    prefixes = [max(2, round(n * (i + 0.5) / SAMPLES)) for i in range(SAMPLES)]

    def build(generator: Generator) -> Comparison:
        x = walk(generator, n, size)
        parts = [x[:m] for m in prefixes]

        def ours() -> Tensor:
            return StreamingPCA(n_components=2, method="gram").partial_fit(x).pc1_history_

        def shares(spectra: Iterable[Any]) -> Tensor:
            return torch.stack([variances[0] / variances.sum() for variances in map(torch.as_tensor, spectra)])

        def numpy() -> Tensor:
            return shares(svd(part.numpy())[0].astype(float) ** 2 for part in parts)

        truth = shares(spectrum(part)[0] for part in parts)
        note, scale = f"{SAMPLES} timed, scaled to all", (n - 1) / SAMPLES
        both = (
            Implementation(OURS, ours, lambda: ours()[[m - 1 for m in prefixes]]),
            Implementation("NumPy SVD of each", numpy, note=note, needs=("threadpoolctl",), times=scale),
        )
        errors = {"share of PC1, largest error": lambda got: float((got - truth).abs().max())}
        return Comparison(both, errors, tolerance=1e-5, moved=x.nbytes, flops64=n * (n + 1) * size)

    return Case("pca-history", f"PC1 % of every prefix of {n} rows of {size:,}", 40 * n * size, build)


def incremental(n: int, size: int, k: int = 8) -> Case:
    """Rows that come one by one and are not kept."""

    def build(generator: Generator) -> Comparison:
        x = walk(generator, n, size)
        batches = list(x.split(3 * k))
        if len(batches[-1]) < k:  # peers refuse it
            batches[-2:] = [torch.cat(batches[-2:])]

        def streamed(pca: Any, parts: Iterable[Any]) -> Answer:
            for part in parts:
                pca.partial_fit(part)
            return fitted(pca)

        def ours() -> Answer:
            return streamed(StreamingPCA(n_components=k, method="incremental"), x)

        def sklearn() -> Answer:
            return streamed(resolve_name("sklearn.decomposition:IncrementalPCA")(k), [part.numpy() for part in batches])

        def torchdr() -> Answer:
            return streamed(resolve_name("torchdr:IncrementalPCA")(k, device="cpu"), batches)

        new = StreamingPCA(n_components=k)
        rank, block = k + new.oversampling, new.block
        # For a block of b rows: each row read, with the first, and stored; the basis and the block read for the Gram
        # matrix; both read, the basis and the sum written for the rotation.
        rows = rank + 1 + block
        vectors, folds = 3 * block + rows + rows + rank + 4, n / block
        note, at_once = f"approximate, in batches of {3 * k}", "approximate: random projections; all rows at once"
        implementations = (
            Implementation(OURS, ours),
            Implementation("scikit-learn IncrementalPCA", sklearn, note=note, needs=("sklearn", "threadpoolctl")),
            Implementation("TorchDR IncrementalPCA", torchdr, note=note, needs=("torchdr",)),
            Implementation("torch.pca_lowrank", lambda: lowrank(x, k), note=at_once),
        )
        moved, flops = folds * vectors * 4 * size, folds * (rows * (rows + 1) + 2 * rank * rows) * size
        return Comparison(implementations, errors_against(x, k), 1e-2, moved=int(moved), flops64=int(flops))

    title = f"PCA row by row, {n} rows of {size:,}, k = {k}"
    return Case("pca-incremental", title, (4 * n + 4 * (3 * k + 50) + 32 * k) * size, build)


def lowrank(x: Tensor, k: int) -> Answer:
    _, values, vectors = torch.pca_lowrank(x, q=k + 6, niter=2)
    return Answer(values[:k].square() / (len(x) - 1), vectors[:, :k].mT)


def svd(rows: Any) -> tuple[Any, Any]:
    """Singular values and right vectors of centred rows, by NumPy."""
    return np.linalg.svd(rows - rows.mean(0), full_matrices=False)[1:]


def fitted(pca: Any) -> Answer:
    """That of a PCA of ours or of scikit-learn's kind."""
    return Answer(pca.explained_variance_, pca.components_)


# ----------------------------------------------------------------------------------------------------- input and truth


def walk(generator: Generator, rows: int, size: int) -> Tensor:
    """A trajectory (rows, size): a random walk with drift, far from the origin."""
    drift, place = normal(generator, size), 20 * normal(generator, size)
    x = torch.empty(rows, size)
    for row in x:
        place += normal(generator, size).add_(drift, alpha=0.3)
        row.copy_(place)
    return x


def centred(part: Tensor) -> Tensor:
    wide = part.double()
    return wide - wide.mean(0)


def spectrum(x: Tensor) -> tuple[Tensor, Tensor]:
    """Variances (n,), descending, and eigenvectors (n, n) of the centred rows' Gram matrix, in float64."""
    gram = sum(c @ c.T for c in map(centred, x.split(CHUNK, 1)))
    values, vectors = torch.linalg.eigh(torch.as_tensor(gram))
    return values.flip(0).clamp(min=0) / (len(x) - 1), vectors.flip(1)


def principal_angle(rows: Any, others: Any) -> float:
    """The largest between the spans of rows (k, P), in degrees."""
    return float(np.degrees(subspace_angles(*(np.asarray(span, np.float64).T for span in (rows, others)))[0]))


def errors_against(x: Tensor, k: int) -> dict[str, Callable[[Answer], float]]:
    """Of the variances over the first of them, and the largest angle between the planes."""
    values, vectors = spectrum(x)
    # Components are the weighted sums of centred rows, worked out chunk by chunk when they are compared.
    weights = vectors[:, :k].mT / (values[:k, None] * (len(x) - 1)).sqrt()

    def variances(got: Answer) -> float:
        return float((torch.as_tensor(got.variances).double() - values[:k]).abs().max() / values[0])

    def angle(got: Answer) -> float:
        true = torch.cat([weights @ centred(part) for part in x.split(CHUNK, 1)], 1)
        return principal_angle(got.components, true)

    return {"variances, error over the first": variances, "components, degrees": angle}
