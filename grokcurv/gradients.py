"""Gradients and Hessian-vector products of a loss at arbitrary flat parameter vectors.

The module is called through :func:`torch.func.functional_call`, so its own parameters, their ``.grad`` and its buffers
are never written. Three strategies give the same gradients:

``loop``   one forward and one backward pass at a time, for any module; autograd accumulates into the flat buffer
``vmap``   one batched program for several parameter vectors and batches (:func:`torch.func.vmap`)
``graph``  the loop, launched from CUDA graphs, which a small model's hundreds of tiny kernels gain most from
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Generator, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from grokcurv.flat import ALL_HERE, Coordinates, Segment, flatten, flatten_grad, segments_of
from grokcurv.records import capturing

Strategy = Literal["auto", "loop", "vmap", "graph"]

SMALL = 1 << 24
"""Up to so many parameters a step's time on a GPU goes into launching it."""

KINKS = re.compile(
    r"\w*relu\w*|threshold|elu|hard\w+|softshrink|\w*max_pool\w*|multi\w*_margin_loss\w*|abs|sgn|sign|clamp\w*|"
    r"maximum|minimum|a?max|a?min|aminmax|(nan)?median|mode|kthvalue|sort|topk|[gl][et]"
)
"""ATen's operators whose derivative may jump, and the comparisons by which a model or a loss decides for itself."""

T = TypeVar("T")

LossFn = Callable[[nn.Module, Any], Tensor]
Vectors = tuple[Tensor, ...]


class GradientEngine:
    """Gradients of ``loss_fn(model, batch)`` at any parameter vectors.

    Args:
        model: any module with at least one trainable parameter; all trainable parameters on one device and of
            one floating dtype. What is compiled in it or in the loss runs uncompiled here: compiled graphs cannot be
            differentiated twice, and would be compiled anew for the other precision.
        loss_fn: ``loss_fn(model, batch)`` returning a scalar tensor.
        strategy: ``"auto"`` is ``graph`` for models of at most 2^24 parameters on a GPU, and ``loop`` for all others
            and wherever the former two do not go. ``vmap`` wants batches of tensors of the same shapes, and a model and
            loss without random draws and without decisions on values; it evaluates the directions of a pair at once,
            in memory for four vectors of P more. ``graph`` wants batches of tensors and no random draws; each shape of
            batch has a graph of its own, captured when it is met for the second time.

    Randomness inside the model (dropout) is drawn from a generator seeded by the caller, so that the same batch
    meets the same mask at different parameters; the visible generators are left as they were. ``stochastic`` says
    whether anything has been drawn so far.

    Evaluations can be captured in a CUDA graph, after one that was not, by models that draw nothing: a generator cannot
    be set in a capture.

    Attributes:
        coordinates: which of the P coordinates the vectors here hold: all, unless a subclass says otherwise. ``size``
            is their number.
        brackets: whether there are Hessian-vector products.
        checked: whether there are evaluations in another precision than the model's.
    """

    coordinates: Coordinates = ALL_HERE
    brackets = checked = True

    def __init__(self, model: nn.Module, loss_fn: LossFn, *, strategy: Strategy = "auto") -> None:
        if strategy not in get_args(Strategy):
            raise ValueError(f"strategy must be one of {', '.join(get_args(Strategy))}; got {strategy!r}")
        self.model: nn.Module = getattr(model, "_orig_mod", model)
        self._refuse_spread()
        self.segments: tuple[Segment, ...] = segments_of(self.model)
        self._loss_fn = loss_fn
        self._holder = _Holder(self.model)
        theta = self.flatten()  # refuses several dtypes or devices
        self.device, self.dtype, self.size = theta.device, theta.dtype, len(theta)
        self.stochastic = False
        self._evaluated = False
        self._kinked: bool | None = None
        on_gpu = self.device.type == "cuda"
        if strategy == "graph" and not on_gpu:
            raise ValueError(f"strategy 'graph' needs a model on a CUDA device; this one is on {self.device}")
        if strategy == "auto":
            strategy = "graph" if on_gpu and self.size <= SMALL else "loop"
        self.strategy: Strategy = strategy
        self._graphs: dict[Any, _Graph | None] = {}  # None: met once

    def flatten(self, out: Tensor | None = None) -> Tensor:
        """The model's own parameters: :func:`grokcurv.flat.flatten`."""
        return flatten(self.model, out)

    def flatten_grad(self) -> Tensor:
        """What training has left in their ``.grad``: :func:`grokcurv.flat.flatten_grad`."""
        return flatten_grad(self.model)

    def gradients(self, thetas: Tensor, batches: Sequence[Any], out: Tensor, *, seeds: Sequence[int]) -> Tensor:
        """Write the gradient at each parameter vector, on the batch beside it, into the rows of ``out``.

        Args:
            thetas: (N, P), or (P,) for all batches.
            batches: N of whatever ``loss_fn`` takes.
            out: (N, P) of the dtype of ``thetas``; overwritten.
            seeds: of the model's own randomness, one per batch.

        Raises:
            ValueError: as :meth:`gradient`; other numbers of vectors, batches, rows or seeds; with ``vmap``, batches of
                different shapes.
            RuntimeError: with ``vmap``, a model or loss that :func:`torch.func.vmap` cannot run.
        """
        n = len(batches)
        if len(seeds) != n or out.shape != (n, self.size) or thetas.shape not in ((self.size,), (n, self.size)):
            raise ValueError(
                f"thetas, batches, out and seeds must agree: {n} batches ask for thetas of shape ({self.size},) or "
                f"({n}, {self.size}), out of shape ({n}, {self.size}) and {n} seeds; got {tuple(thetas.shape)}, "
                f"{tuple(out.shape)} and {len(seeds)}"
            )
        if self.strategy == "vmap" and n > 1:
            return self._batched(thetas, batches, out)
        for theta, batch, row, seed in zip(thetas.expand(n, -1), batches, out, seeds, strict=True):
            self.gradient(theta, batch, row, seed=seed)
        return out

    def gradient(self, theta: Tensor, batch: Any, out: Tensor, *, seed: int = 0) -> Tensor:
        """Write the gradient at ``theta`` on ``batch`` into ``out``.

        Args:
            theta: (P,) parameter vector in the order of ``model.parameters()``. A dtype other than the model's
                evaluates the whole model, its buffers and the floating tensors of ``batch`` in that dtype.
            batch: whatever ``loss_fn`` takes.
            out: (P,) of ``theta``'s dtype; overwritten.
            seed: of the model's own randomness.

        Raises:
            ValueError: the loss is not a scalar tensor, or does not depend on the parameters.
        """
        if self.strategy == "graph" and not self.stochastic and not capturing(self.device):
            key = (theta.dtype, _signature(batch))
            if key in self._graphs:
                graph = self._graphs[key] = self._graphs[key] or _Graph(self._one, theta, batch)
                return graph.replay(theta, batch, out)
            if key[1] is not None:  # the first time launches what a capture cannot: lazy loading, workspaces
                self._graphs[key] = None
        return self._one(theta, batch, out, seed)

    def _one(self, theta: Tensor, batch: Any, out: Tensor, seed: int = 0) -> Tensor:
        leaves = self._leaves(theta)
        views = self._views(out.zero_())
        with self._evaluation(seed):
            self._at(leaves, batch, lambda loss: _accumulate(leaves, views, loss))
        return out

    def _batched(self, thetas: Tensor, batches: Sequence[Any], out: Tensor) -> Tensor:
        """All gradients as one program. Generators are left alone: ``vmap`` refuses to draw."""
        shared = thetas.ndim == 1
        leaves = tuple(thetas.detach()[..., s.start : s.stop].unflatten(-1, s.shape) for s in self.segments)
        stacked = _stack(batches)

        def loss(leaves: Vectors, batch: Any) -> Tensor:
            return self._at(list(leaves), batch, lambda loss: loss)

        # The fused attention of the CPU would run once per vector: it has no batched form.
        with torch.inference_mode(False), sdpa_kernel(SDPBackend.MATH):
            rows = torch.func.vmap(torch.func.grad(loss), in_dims=(None if shared else 0, 0))(leaves, stacked)
        for segment, values in zip(self.segments, rows, strict=True):
            out[:, segment.start : segment.stop].copy_(values.flatten(1))
        self._evaluated = True
        return out

    def kinked(self, batch: Any, *, seed: int = 0) -> bool:
        """Whether the gradient may jump: at a rectifier, a maximum, an absolute value, a decision (:data:`KINKS`).

        Found by evaluating the loss once, on ``batch``; the first answer is kept. What a kernel of the user's own does
        inside is not seen.
        """
        if self._kinked is None:
            with self._evaluation(seed), _Operators() as seen:
                self._at(self._leaves(None), batch, lambda loss: loss)
            self._kinked = any(map(KINKS.fullmatch, seen.names))
        return self._kinked

    def hessian_vectors(self, theta: Tensor | None, batches: Sequence[Any], *, seeds: Sequence[int]) -> Vectors:
        """Two gradients and the two crossed Hessian-vector products they define.

        Each gradient's graph is differentiated once more (Pearlmutter, Neural Computation 6, 1994). Attention runs
        on the composed ("math") kernel, since the fused ones have no second derivative.

        Args:
            theta: (P,), as for :meth:`gradient`; None for the model's own parameters.
            batches: the two batches A and B.
            seeds: of the model's own randomness, one per batch.

        Returns:
            Four vectors (P,): ``g_A``, ``g_B``, ``H_A g_B``, ``H_B g_A``.
        """
        leaves = self._leaves(theta)
        products = leaves[0].new_zeros(2, self.size)

        def differentiate(graphs: Sequence[Vectors]) -> Sequence[Vectors]:
            for graph, direction, row in zip(graphs, self._directions(graphs), products, strict=True):
                # A gradient that does not depend on the parameters (a loss linear in them) has no second derivative.
                pairs = [(g, v.detach()) for g, v in zip(graph, direction, strict=True) if g.requires_grad]
                if pairs:
                    _accumulate(leaves, self._views(row), [g for g, _ in pairs], [v for _, v in pairs])
            return graphs

        with sdpa_kernel(SDPBackend.MATH):
            graphs = self._with_graphs(leaves, list(zip(batches, seeds, strict=True)), differentiate)
        gradients = products.new_empty(2, self.size)
        for graph, row in zip(graphs, gradients, strict=True):
            for view, part in zip(self._views(row), graph, strict=True):
                view.copy_(part.detach())
        return (*gradients, *products)

    def _directions(self, graphs: Sequence[Vectors]) -> Sequence[Vectors]:
        """Along what each gradient is differentiated: the other one."""
        return graphs[::-1]

    def _with_graphs(
        self,
        leaves: list[Tensor],
        batches: Sequence[tuple[Any, int]],
        use: Callable[[Sequence[Vectors]], T],
        graphs: Sequence[Vectors] = (),
    ) -> T:
        """``use`` of the differentiable gradients on each batch, one inside the evaluation of the other."""
        if not batches:
            return use(graphs)
        (batch, seed), *rest = batches

        def add(loss: Tensor) -> T:
            graph = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
            return self._with_graphs(leaves, rest, use, (*graphs, graph))

        with self._evaluation(seed):
            return self._at(leaves, batch, add)

    def _at(self, leaves: list[Tensor], batch: Any, use: Callable[[Tensor], T]) -> T:
        """``use(loss)``, with the leaves in the place of the model's parameters.

        They stay there while the loss is used: activation checkpointing runs the forward pass again in the backward.
        """
        dtype = leaves[0].dtype
        state: dict[str, Tensor] = {f"model.{s.name}": leaf for s, leaf in zip(self.segments, leaves, strict=True)}
        # Copies of the buffers, so that a batch norm in training mode updates those and not the model's.
        state |= {f"model.{name}": buffer.clone() for name, buffer in self.model.named_buffers()}
        if dtype != self.dtype:
            frozen = {f"model.{name}": p for name, p in self.model.named_parameters() if not p.requires_grad}
            state = {name: _cast(tensor, dtype) for name, tensor in (state | frozen).items()}
            batch = cast_batch(batch, dtype)
        try:
            with uncompiled():
                used: T = functional_call(self._holder, state, (lambda: use(self._loss(batch)),))
                return used
        except RuntimeError as error:
            if dtype != self.dtype:
                error.add_note(f"while evaluating the model in {dtype} for the noise floor; noise_floor=False does not")
            raise

    def _loss(self, batch: Any) -> Tensor:
        loss = self._loss_fn(self.model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn must return a scalar tensor, got {got}")
        if not loss.requires_grad:
            raise ValueError("loss_fn returned a loss that does not depend on the model's trainable parameters")
        return loss.reshape(())

    def _views(self, vector: Tensor) -> list[Tensor]:
        return [vector[s.start : s.stop].view(s.shape) for s in self.segments]

    def _leaves(self, theta: Tensor | None) -> list[Tensor]:
        with torch.inference_mode(False):
            if theta is None:
                own = dict(self.model.named_parameters())
                return [own[s.name].detach().requires_grad_() for s in self.segments]
            return [view.requires_grad_() for view in self._views(theta.detach())]

    def _refuse_spread(self) -> None:
        """Raises for a model of which one call of the module, or this process, has but a part."""
        for module in self.model.modules():
            if isinstance(module, nn.DataParallel):
                raise ValueError(
                    "model is an nn.DataParallel, which splits a batch over the devices of one process: pass "
                    "model.module, measured on its own device, or train with DistributedDataParallel"
                )
        kinds = {type(module).__name__ for module in self.model.modules()}  # by name: some are slow to import
        sharded = any(hasattr(parameter, "device_mesh") for parameter in self.model.parameters())
        if sharded or kinds & {"DistributedDataParallel", "FullyShardedDataParallel"}:
            raise ValueError(
                "model is trained on several processes (DistributedDataParallel, fully_shard): pass "
                "grokcurv.integrations.sharded.distributed(model)"
            )

    @contextmanager
    def _evaluation(self, seed: int) -> Iterator[None]:
        """Gradients on, whatever the caller's mode, and a private random stream."""
        generators = [torch.default_generator]
        if capturing(self.device):
            if self.stochastic or not self._evaluated:
                raise RuntimeError(
                    "model draws at random (dropout), which a CUDA graph cannot repeat: measure it without a capture"
                    if self.stochastic
                    else "measure once before the capture: what the model draws at random shows only then"
                )
        elif self.device.type == "cuda":
            generators.append(torch.cuda.default_generators[self.device.index or 0])
        states = [generator.get_state() for generator in generators]
        try:
            seeded = [generator.manual_seed(seed).get_state() for generator in generators]
            with torch.inference_mode(False), torch.enable_grad():
                yield
            drawn = (not torch.equal(g.get_state(), state) for g, state in zip(generators, seeded, strict=True))
            self.stochastic = self.stochastic or any(drawn)
            self._evaluated = True
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)


@dataclass(frozen=True)
class Distributed:
    """A model on several processes, with an engine of its own: :func:`grokcurv.integrations.sharded.distributed`."""

    engine: Callable[[LossFn, Strategy], GradientEngine]


Model = nn.Module | Distributed


class _Holder(nn.Module):
    """Carries out a piece of work, so that ``functional_call`` can replace the model's parameters meanwhile."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], T]) -> T:
        return work()


class _Operators(TorchDispatchMode):
    """Names of the operators that floating tensors meet, without the mark of those that write in place."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(x, Tensor) and x.is_floating_point() for x in tree_leaves(args)):
            self.names.add(func.name().rpartition("::")[2].partition(".")[0].rstrip("_"))
        return func(*args, **(kwargs or {}))


def uncompiled() -> AbstractContextManager[None]:
    """Runs what ``torch.compile`` has made as it was written. Where its compiler was never loaded there is none."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


@dataclass(frozen=True)
class Wanted:
    """A gradient that a measurement waits for: at ``theta`` on ``batch``, into ``out``."""

    theta: Tensor
    batch: Any
    out: Tensor
    seed: int


Asking = Generator[list[Wanted], None, T]
"""Work that stops wherever it needs gradients, and goes on once they are there; so several can wait for one program."""


def carry_out(engine: GradientEngine | None, works: Sequence[Asking[T]]) -> list[T]:
    """The results of works that ask ``engine`` for gradients, which gets at once what they ask for together.

    None does for works that ask for nothing. All is done outside the caller's ``torch.autocast``, which would round
    what is computed from the gradients; a ``loss_fn`` that is to be evaluated under it enters it itself.
    """
    kind = engine.device.type if engine else "cpu"
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
        return _carry_out(engine, works)


def _carry_out(engine: GradientEngine | None, works: Sequence[Asking[T]]) -> list[T]:
    results: dict[int, T] = {}
    waiting = dict(enumerate(works))
    while waiting:
        wanted: list[Wanted] = []
        for index, work in list(waiting.items()):
            try:
                wanted += next(work)
            except StopIteration as end:
                results[index] = end.value
                del waiting[index]
        for dtype in {w.theta.dtype for w in wanted}:
            assert engine is not None
            _serve(engine, [w for w in wanted if w.theta.dtype == dtype])
    return [results[index] for index in range(len(works))]


def _serve(engine: GradientEngine, wanted: Sequence[Wanted]) -> None:
    if engine.strategy != "vmap" or len(wanted) == 1:
        for w in wanted:
            engine.gradient(w.theta, w.batch, w.out, seed=w.seed)
        return
    thetas = torch.stack([w.theta for w in wanted])
    rows = engine.gradients(thetas, [w.batch for w in wanted], torch.empty_like(thetas), seeds=[w.seed for w in wanted])
    for w, row in zip(wanted, rows, strict=True):
        w.out.copy_(row)


class _Graph:
    """A gradient's launches, captured once and replayed with other parameters and another batch of the same shapes."""

    def __init__(self, gradient: Callable[[Tensor, Any, Tensor], Tensor], theta: Tensor, batch: Any) -> None:
        self._theta, self._batch = theta.clone(), _map_tensors(batch, Tensor.clone)
        self._out = torch.empty_like(theta)
        self._replay = capture(lambda: gradient(self._theta, self._batch, self._out))

    def replay(self, theta: Tensor, batch: Any, out: Tensor) -> Tensor:
        self._theta.copy_(theta)
        for own, given in zip(tree_leaves(self._batch), tree_leaves(batch), strict=True):
            own.copy_(given)
        self._replay()
        return out.copy_(self._out)


def capture(run: Callable[[], object]) -> Callable[[], None]:
    """What launches again all that ``run`` launches, on the same memory."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _signature(batch: Any) -> Any:
    """What two batches must share to share a graph; None for one that is not made of tensors alone."""
    leaves, structure = tree_flatten(batch)
    if not all(isinstance(leaf, Tensor) and leaf.device.type == "cuda" for leaf in leaves):
        return None
    return structure, tuple((leaf.shape, leaf.stride(), leaf.dtype, leaf.device) for leaf in leaves)


def _stack(batches: Sequence[Any]) -> Any:
    """One batch whose tensors have a leading dimension that counts the batches."""
    leaves, structures = zip(*map(tree_flatten, batches), strict=True)
    first = structures[0]
    shapes = [[(x.shape, x.dtype) if isinstance(x, Tensor) else None for x in row] for row in leaves]
    if any(s != first for s in structures) or any(row != shapes[0] or None in row for row in shapes):
        raise ValueError("strategy 'vmap' needs batches made of tensors of the same shapes and dtypes")
    return tree_unflatten([torch.stack(column) for column in zip(*leaves, strict=True)], first)


def _accumulate(leaves: list[Tensor], views: list[Tensor], roots: Any, weights: list[Tensor] | None = None) -> None:
    """Back-propagate into ``views`` and nowhere else: autograd adds in place to a gradient that is already there."""
    for leaf, view in zip(leaves, views, strict=True):
        leaf.grad = view
    torch.autograd.backward(roots, weights, inputs=leaves)
    for leaf in leaves:
        leaf.grad = None


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Floating tensors to ``dtype``; integers and the rest stay. A tensor already there keeps its identity."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def cast_batch(batch: Any, dtype: torch.dtype) -> Any:
    """``batch`` with its floating tensors in ``dtype``."""
    return _map_tensors(batch, lambda tensor: _cast(tensor, dtype))


def _map_tensors(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``function`` to the tensors of nested tuples, lists and mappings."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, MutableMapping):
        mapped = copy.copy(tree)
        mapped.update({key: _map_tensors(value, function) for key, value in tree.items()})
        return mapped
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_map_tensors(value, function) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(_map_tensors(value, function) for value in tree)
    return tree
