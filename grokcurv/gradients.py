"""Gradients and Hessian-vector products of a loss at arbitrary flat parameter vectors.

The model is evaluated by :mod:`grokcurv.evaluation`, which leaves it as it was. Three strategies give the same
gradients:

=========  ============================================================================================================
``loop``   one forward and one backward pass at a time, for any module; autograd accumulates into the flat buffer
``vmap``   one batched program for several parameter vectors and batches (:func:`torch.func.vmap`)
``graph``  the loop, launched from CUDA graphs, which a small model's hundreds of tiny kernels gain most from
=========  ============================================================================================================
"""

from __future__ import annotations

import functools
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from grokcurv.admission import GRADIENT_TOLERANCE, Admission, Finding, Traits, first_line, has_kinks, relative_distance
from grokcurv.device_buffer import capturing
from grokcurv.evaluation import LOCK, Check, Evaluator, LossFn, Mode, unwrapped
from grokcurv.flat import Segment, flatten
from grokcurv.intercept import NARROW, Widened, shake_, unseen
from grokcurv.partition import WHOLE, Partition
from grokcurv.state import Snapshot

T = TypeVar("T")

Strategy = Literal["auto", "loop", "vmap", "graph"]

Multiply = Callable[[Tensor], Tensor]
"""The product of a symmetric matrix with a vector (P,)."""

SMALL = 1 << 24
"""Up to so many parameters a step's time on a GPU goes into launching it."""

SHORT = 1 << 20
"""Up to so many parameters all of a gradient is there before it goes to its place, in one operator."""

GRAPHS = 16
"""So many captured gradients are kept; the one not used for longest goes first."""

VECTORS = 4
"""Vectors of P that a gradient in a batched program takes beside what a backward pass keeps."""

PIECE = 1 << 18
"""Numbers of a vector that are looked at, or moved, at a time."""


class GradientEngine:
    """Gradients of ``loss_fn(model, batch)`` at any parameter vectors.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> engine = GradientEngine(model, lambda model, x: 0.5 * model(x).square().sum())
    >>> theta, x = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0])
    >>> engine.gradient(theta, x, torch.empty(2))  # (theta'x) x
    tensor([11., 22.])

    Args:
        model: any module with at least one trainable parameter; all trainable parameters on one device (a CPU, a CUDA
            device or an Apple GPU) and of one real floating dtype. What is compiled in it or in the loss runs
            uncompiled here: compiled graphs cannot be differentiated twice, and would be compiled anew for the other
            precision.
        loss_fn: ``loss_fn(model, batch)`` returning a scalar tensor.
        strategy: ``"auto"`` is ``graph`` for models of at most 2^24 parameters on a GPU, and ``loop`` for all others
            and wherever the former two do not go. ``vmap`` wants batches of tensors of the same shapes, and a model and
            loss without random draws and without decisions on values; it evaluates the directions of a pair at once, in
            memory for four vectors of P more, and checks all four in float64 at once, in memory for 24. ``graph`` wants
            batches of tensors and no random draws; each shape of batch, with the addresses and numbers that a capture
            keeps, has a graph of its own, captured when it is met for the second time.
        compile: put the programs of ``vmap`` through ``torch.compile``, those in the model's own precision.

    Randomness inside the model (dropout) is drawn from generators seeded by the caller, so that the same batch
    meets the same mask at different parameters; the visible generators are left as they were. ``stochastic`` says
    whether anything has been drawn so far.

    Evaluations can be captured in a CUDA graph, after one that was not, by models that draw nothing: a generator cannot
    be set in a capture.

    Attributes:
        place: where the model is, and where vectors live, :attr:`device`: the CPU if the model is on an Apple GPU.
        partition: which of the P coordinates the vectors here hold: all, unless a subclass says otherwise. ``size``
            is their number.
        brackets: whether there are Hessian-vector products.
        checked: whether there are evaluations in float64.
        certifies: whether those are of this very model, so that they may take the place of its own.
        traits: how the structure of model and batch admitted last is evaluated.
    """

    # runs: of how many runs the engine has the parameters. shared: true for those that know several, whose batches come
    # in lists.
    runs, shared = 1, False
    # All true for a model that this process has whole. An engine of shards differentiates once only, and evaluates in
    # float64 a copy that it was given, if it was given one.
    partition: Partition = WHOLE
    brackets = checked = certifies = True

    def __init__(
        self, model: nn.Module, loss_fn: LossFn, *, strategy: Strategy = "auto", compile: bool = False
    ) -> None:
        self.model, self.compile = unwrapped(model), compile
        with LOCK:  # another thread may be evaluating it
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad and (dtype := parameter.dtype) not in (*NARROW, torch.float64):
                    raise ValueError(f"model: parameter {name!r} must be of a real floating dtype, got {dtype}")
            self._check_model()
            self.evaluator = self._evaluator(loss_fn)
        self.segments: tuple[Segment, ...] = self.evaluator.segments
        self.place, self.dtype = self.evaluator.place, self.evaluator.dtype
        self.device = self.place.home
        self.size = self.evaluator.size
        self.traits = Traits()
        self._admission = Admission()
        self.use(strategy)
        # What of capturing is remembered, by what a capture depends on: the graphs there are, what was met once and is
        # captured when it comes again, and what a capture has refused for good.
        self._graphs: dict[Any, Callable[[Tensor, Any, Tensor], Tensor]] = {}
        self._met: set[Any] = set()
        self._uncapturable: set[Any] = set()
        self._pool: Any = None  # of memory, that all graphs share
        # Of batched programs: what one of their gradients takes, by the shapes of its batch; the bytes that a program
        # may take, once that was asked; those that were compiled.
        self._kept: dict[Any, int] = {}
        self._room: int | None = None
        self._programs: dict[Any, Callable[..., Any]] = {}
        self._places: dict[tuple[Segment, ...], list[tuple[int, int, int]]] = {}  # of segments, in the parameters

    def use(self, strategy: Strategy) -> None:
        """Compute gradients by this strategy from now on.

        Raises:
            ValueError: there is no such strategy, or not for a model that is where this one is.
        """
        on_gpu = self.place.has_graphs
        if strategy not in get_args(Strategy):
            raise ValueError(f"strategy must be one of {', '.join(get_args(Strategy))}; got {strategy!r}")
        if strategy == "graph" and not on_gpu:
            raise ValueError(f"strategy 'graph' needs a model on a CUDA device; this one is on {self.place.model}")
        if strategy == "auto":
            strategy = "graph" if on_gpu and self.size <= SMALL else "loop"
        self.strategy: Strategy = strategy

    def _evaluator(self, loss_fn: LossFn) -> Evaluator:
        return Evaluator(self.model, loss_fn)

    @property
    def admission(self) -> tuple[Finding, ...]:
        """What the checks of :mod:`grokcurv.admission` have found so far."""
        return tuple(self._admission.findings)

    def note(self, check: str, passed: bool, detail: str, consequence: str) -> None:
        """Add a finding; one that fails is warned of."""
        self._admission.find(check, passed, detail, consequence)

    @property
    def stochastic(self) -> bool:
        """Whether the model is known to draw at random."""
        return self.evaluator.stochastic

    def flatten(self, out: Tensor | None = None) -> Tensor:
        """(P,) the model's own parameters, copied, into ``out`` of any floating dtype if given.

        They are in the order of the beginning, whichever order the model has them in now.
        """
        if out is None:
            out = torch.empty(self.size, dtype=self.dtype, device=self.device)
        with torch.no_grad(), LOCK:
            torch._foreach_copy_(self.evaluator.views(out), self.evaluator.values())
        return out

    def thetas(self, runs: Sequence[int], out: Tensor | None = None) -> Tensor:
        """(R, P) the parameters of these runs; of one run in the memory of ``out`` (P,), if given, and in its dtype."""
        return self.flatten(out)[None]

    def thetas_on(self, segments: Sequence[Segment], out: Tensor) -> Tensor:
        """Write the parameters of all runs on some segments, side by side, into ``out`` (R, p) of their dtype.

        Reads these coordinates alone. Not for a model of which here is but a part.
        """
        key = tuple(segments)
        if key not in self._places:
            self._places[key] = self._pieces(key)
        places = self._places[key]
        if not places:
            return out
        with torch.no_grad(), LOCK:
            values = self._values({number for number, _, _ in places})
            sources = [
                whole if length == whole.shape[1] else whole[:, start : start + length]
                for whole, start, length in ((values[number], start, length) for number, start, length in places)
            ]
            torch._foreach_copy_(list(out.split([length for _, _, length in places], 1)), sources)
        return out

    def _pieces(self, segments: Sequence[Segment]) -> list[tuple[int, int, int]]:
        """Of segments the parts that lie in one parameter each: its number, where they start in it, their length."""
        pieces: list[tuple[int, int, int]] = []
        for begin, count in (interval for segment in segments for interval in segment.intervals):
            for number, parameter in enumerate(self.segments):
                start, stop = max(begin, parameter.start), min(begin + count, parameter.stop)
                if start >= stop:
                    continue
                start, stop = start - parameter.start, stop - parameter.start
                if pieces and (pieces[-1][0], sum(pieces[-1][1:])) == (number, start):  # as thirds of a fused matrix do
                    start = pieces.pop()[1]
                pieces.append((number, start, stop - start))
        return pieces

    def _values(self, numbers: set[int]) -> dict[int, Tensor]:
        """(R, length) some parameters of all runs, flat, by their numbers."""
        parameters = self.evaluator.parameters()
        parts = [self.evaluator.local(parameters[number]).view(1, -1) for number in numbers]
        return dict(zip(numbers, self.place.bring_all(parts), strict=True))

    def training_gradients(self, runs: Sequence[int]) -> Tensor:
        """(R, P) what training has left in the ``.grad`` of these runs' parameters."""
        return self.flatten_grad()[None]

    def next_gradients(self, runs: Sequence[int]) -> Tensor | None:
        """(R, P) the gradients on the batches that come next, where training has computed them with its own."""
        return None

    def theta_norms(self, runs: Sequence[int]) -> Tensor:
        """(R,) float64: lengths of the parameters of these runs."""
        return self.partition.norm(*self.evaluator.values())[None]

    def flatten_grad(self, out: Tensor | None = None) -> Tensor:
        """(P,) what training has left in their ``.grad``, zero where one has none; in the same order."""
        grads = (torch.zeros_like(p) if p.grad is None else p.grad for p in self.evaluator.parameters())
        parts = [_dense(self.evaluator.local(grad)).reshape(-1) for grad in grads]
        return torch.cat(self.place.bring_all(parts), out=out)

    def anywhere(self, flag: bool) -> bool:
        """Whether the flag is set in any of the processes that train the model, all of which ask."""
        return flag

    # ---------------------------------------------------------------------------------------------------- admission

    def admit(self, batch: Any, *, seed: int = 0, exact: bool = True, brackets: bool = False) -> Traits:
        """Find out, once for each structure of model and batch, how it is to be evaluated; :attr:`traits` from here on.

        The structure: which parameters are trainable, the modes of the modules, and the types and dimensions, not the
        sizes, of what is in the batch. Inside a capture and on the meta device, where no number can be looked at, only
        whether the loss has kinks is found. ``exact=False`` leaves the evaluation in float64 out; ``brackets`` also
        looks at second derivatives, as :meth:`has_true_brackets` does.
        """
        tensors = Snapshot([batch]).tensors
        modes = tuple(module.training for module in self.model.modules())
        # Sizes are left out: a last, smaller batch would be admitted anew, and nothing that is looked for depends on
        # how many rows there are.
        key = (exact, modes, type(batch), tuple((t.dtype, t.dim()) for t in tensors))
        known = self._admission.traits
        # A capture holds no numbers to look at: it takes the traits of the admission before it, whatever its batch is.
        if key not in known and capturing(self.device) and known:
            return self.traits
        if key not in known:
            with self.evaluator.session():
                known[key] = self._admitted(batch, seed, exact, brackets)
            # Whoever has computed something of this pair before the model was admitted must not mix it with what comes
            # now.
            self.evaluator.generation += 1
        self.traits = known[key]
        if brackets:
            self.has_true_brackets(batch, seed=seed)
        return self.traits

    def _admitted(self, batch: Any, seed: int, exact: bool, brackets: bool) -> Traits:
        if capturing(self.device) or not self.place.has_data:
            return Traits(nonsmooth=self._has_kinks(batch, seed), brackets=self.brackets)
        self.traits = Traits()
        traits = self._admission.admit(self, batch, seed, exact, brackets)
        if self.strategy == "vmap":
            self._compare_vmap(batch)
        return traits

    def _has_kinks(self, batch: Any, seed: int) -> bool:
        return has_kinks(self.observe(self.flatten(), batch, None, seed))

    def _compare_vmap(self, batch: Any) -> None:
        """Hold a batched gradient against the loop's, once; where they differ the loop is what is used."""
        theta = self.flatten()
        loop = self.whole_gradient(theta, batch, torch.empty_like(theta))
        distance = max(relative_distance(row, loop) for row in self._batched(theta[None], [batch, batch]))
        passed = distance <= GRADIENT_TOLERANCE
        detail = f"the batched gradient is {distance:.1e} from that of the loop"
        self.note("vmap", passed, detail, "strategy 'loop' is used")
        if not passed:
            self.strategy = "loop"

    def is_nonsmooth(self, batch: Any, *, seed: int = 0) -> bool:
        """Whether the gradient may jump: at a rectifier, a maximum, an absolute value, a decision.

        Told by the operators of :data:`grokcurv.admission.KINKS`, in one evaluation of each structure of model and
        batch. What a kernel of the user's own does inside is not seen.
        """
        return self.admit(batch, seed=seed).nonsmooth

    def kinked(self, batch: Any, *, seed: int = 0) -> bool:
        """The old name of :meth:`is_nonsmooth`."""
        warnings.warn("GradientEngine.kinked is called is_nonsmooth now", FutureWarning, stacklevel=2)
        return self.is_nonsmooth(batch, seed=seed)

    def has_true_brackets(self, batch: Any, *, seed: int = 0) -> bool:
        """Whether second derivatives are what they should be; looked at when it is first asked."""
        if not self.brackets or not self.place.has_data or capturing(self.device):
            return self.brackets
        with self.evaluator.session():
            return self._admission.second_derivatives(self, self.traits, batch, seed)

    def observe(self, theta: Tensor, batch: Any, out: Tensor | None, seed: int, plain: bool = False) -> frozenset[str]:
        """The gradient into ``out``, if it is given, and the names of the operators that lead to the loss."""

        def use(loss: Tensor, placed: list[Tensor]) -> None:
            if out is not None:
                self._differentiate(loss, placed, out, plain)

        return self.evaluator.observe(self.evaluator.leaves(theta), batch, use, seed=seed)

    # ---------------------------------------------------------------------------------------------------- gradients

    def gradients(
        self,
        thetas: Tensor,
        batches: Sequence[Any],
        out: Tensor | Sequence[Tensor],
        *,
        seeds: Sequence[int],
        checks: Sequence[Check | None] | None = None,
    ) -> None:
        """Write the gradients at parameter vectors, each on the batch beside it, into the rows of ``out``.

        Args:
            thetas: (N, P), or (R, P) for N a multiple of R: vector i is row ``i % R``; or (P,) for all.
            batches: N of whatever ``loss_fn`` takes.
            out: (N, P), or several (n, P) with N rows in all; overwritten.
            seeds: of the model's own randomness, one per batch.
            checks: for each of several ``out`` what :meth:`gradient` takes, of its rows.

        Raises:
            ValueError: as :meth:`gradient`; other numbers of vectors, batches, rows or seeds; with ``vmap``, batches of
                different shapes.
            RuntimeError: with ``vmap``, a model or loss that :func:`torch.func.vmap` cannot run.
        """
        blocks = [out] if isinstance(out, Tensor) else list(out)
        n, rows, thetas = len(batches), sum(map(len, blocks)), thetas if thetas.ndim == 2 else thetas[None]
        if len(seeds) != n or rows != n or thetas.shape[1] != self.size or n % len(thetas):
            raise ValueError(
                f"thetas, batches, out and seeds must agree: {n} batches ask for thetas of shape (R, {self.size}), R a "
                f"divisor of {n}, for {n} rows and {n} seeds; got {tuple(thetas.shape)}, {rows} and {len(seeds)}"
            )
        checks = [None] * len(blocks) if checks is None else checks
        # A comparison that keeps what is there streams through one gradient's memory, which a batch of rows would not.
        if self.strategy == "vmap" and n > 1 and not any(check and check.keep for check in checks):
            if len(blocks) == 1 and checks[0] is None and blocks[0].dtype == thetas.dtype:
                self._batched(thetas, batches, blocks[0])
                return
            found = self._batched(thetas, batches)
            for part, block, check in zip(found.split(list(map(len, blocks))), blocks, checks, strict=True):
                deliver(part, block, check)
            return
        pairs = zip(blocks, checks, strict=True)
        places = ((row, check and check.of(j)) for block, check in pairs for j, row in enumerate(block))
        for i, (row, check) in enumerate(places):
            self.gradient(thetas[i % len(thetas)], batches[i], row, seed=seeds[i], check=check)

    def gradient(self, theta: Tensor, batch: Any, out: Tensor, *, seed: int = 0, check: Check | None = None) -> Tensor:
        """Write the gradient at ``theta`` on ``batch`` into ``out``.

        Args:
            theta: (P,) parameter vector in the order of ``model.parameters()``. A dtype other than the model's
                evaluates the whole model, its buffers and the floating tensors of ``batch`` in that dtype.
            batch: whatever ``loss_fn`` takes.
            out: (P,); overwritten. Of another dtype than ``theta``: the gradient goes there one parameter at a time,
                rounded, in memory for one.
            seed: of the model's own randomness.
            check: what holds the gradient against what was in ``out`` before.

        Raises:
            ValueError: the loss is not a scalar tensor, or does not depend on the parameters.
        """
        streamed = check is not None or out.dtype != theta.dtype
        # A graph writes its whole vector to one memory. What is streamed goes elsewhere, or is compared on the way;
        # what draws at random would draw the same again in every replay; and a capture cannot replay a graph inside
        # itself without keeping all of its memory.
        if self.strategy == "graph" and not streamed and not self.stochastic and not capturing(self.device):
            return self._graphed(theta, batch, out, seed)
        if not streamed:
            return self.whole_gradient(theta, batch, out, seed)
        if not self._survives(functools.partial(self._streamed, theta, batch, out, seed, check), theta):
            out.fill_(math.nan)
        return out

    def whole_gradient(
        self,
        theta: Tensor,
        batch: Any,
        out: Tensor,
        seed: int = 0,
        *,
        plain: bool | None = None,
        mode: Mode = None,
        at_home: bool = False,
    ) -> Tensor:
        """The gradient, all of it at once, into ``out`` of the dtype of ``theta``.

        ``plain`` and ``mode``: by which kind of backward pass and under what, if not as :attr:`traits` say;
        ``at_home``: where vectors live, and not where the model is.
        """
        use = functools.partial(self._differentiate, out=out, plain=self.traits.plain if plain is None else plain)
        leaves, mode = self.evaluator.leaves(theta, at_home=at_home), mode or self._mode(theta.dtype)
        self.evaluator.evaluate(leaves, batch, use, seed=seed, mode=mode)
        return out

    def _differentiate(self, loss: Tensor, placed: list[Tensor], out: Tensor, plain: bool) -> None:
        """Back-propagate into ``out`` and nowhere else.

        A plain pass is not told where to stop. Re-entrant checkpoints want it so; other leaves of the graph then get
        gradients too, of which those that the model and the loss hold are stand-ins.
        """
        there = self.place.room(out, placed[0])
        views = self.evaluator.views(there)
        if self.size <= SHORT and not plain:
            found = torch.autograd.grad(loss, placed, allow_unused=True, materialize_grads=True)
            with torch.no_grad():  # zeros for what was not met want a gradient themselves in torch 2.6
                torch._foreach_copy_(views, list(map(_dense, found)))
        else:
            # Autograd adds in place to a gradient that is there already, so the flat buffer, zeroed, is filled without
            # a copy of any part.
            there.zero_()
            for parameter, view in zip(placed, views, strict=True):
                parameter.grad = view
            torch.autograd.backward(loss, inputs=None if plain else placed)
            for parameter in placed:
                parameter.grad = None
        if there is not out:
            out.copy_(self.place.bring(there))

    def _survives(self, evaluate: Callable[[], None], theta: Tensor) -> bool:
        """Whether an evaluation, in float64 for the check's sake, can be made; that it cannot ends no training."""
        # In the model's own precision an error is the user's, and is raised. Only what the float64 check adds must
        # never end a training that runs well without it.
        if theta.dtype == self.dtype:
            evaluate()
            return True
        try:
            try:
                evaluate()
            except RuntimeError:
                if self.traits.widened:
                    raise
                self.traits.widened = True  # something asks for fewer bits that did not at admission
                evaluate()
        except Exception as error:
            self.traits.exact = False
            self.note("float64", False, f"cannot be evaluated: {first_line(error)}", "no row is reliable")
            return False
        return True

    def _streamed(
        self, theta: Tensor, batch: Any, out: Tensor, seed: int, check: Check | None, mode: Mode = None
    ) -> None:
        """The gradient at theta by one backward pass, each parameter's put into ``out`` as it arrives."""
        delivery, mode = self._delivery(out, check), mode or self._mode(theta.dtype, check)
        leaves, plain = self.evaluator.leaves(theta), self.traits.plain

        def use(loss: Tensor, placed: list[Tensor]) -> None:
            delivery.begin()
            torch.autograd.backward(loss, inputs=None if plain else placed)
            if plain:
                for index, parameter in enumerate(placed):
                    delivery.take_from(index, parameter)
            delivery.end()

        # A plain pass also reaches leaves that stand for others, so that a parameter's gradient may arrive in several
        # parts: it is read when all are there, at the cost of having all of it at once.
        if not plain:
            delivery.attach(leaves)
        self.evaluator.evaluate(leaves, batch, use, seed=seed, mode=mode)

    def _delivery(self, out: Tensor | None, check: Check | None) -> Delivery:
        return Delivery([] if out is None else self.evaluator.views(out), check, self.place.bring)

    def _mode(self, dtype: torch.dtype, check: Check | None = None) -> Mode:
        """What an evaluation in ``dtype`` needs around it."""
        shake = check.shake if check else None
        lifts = self.traits.widened or self.stochastic or shake is not None
        return Widened(self.dtype, shake) if dtype == torch.float64 and lifts else None

    def exact_gradient(self, theta: Tensor, batch: Any, out: Tensor, seed: int, check: Check | None = None) -> Widened:
        """The gradient in float64 with all casts lifted, into ``out`` of any dtype, and what was lifted."""
        mode = Widened(self.dtype)
        self._streamed(theta, batch, out, seed, check, mode)
        return mode

    def sample_rounding(self, theta: Tensor, batch: Any, out: Tensor, seed: int) -> float:
        """How far the gradient at ``theta``, in float64, is moved by rounding; it goes to ``out``, (P,) float64."""
        self.exact_gradient(theta, batch, out, seed)
        shake = torch.Generator(theta.device).manual_seed(seed)
        check = Check(theta.new_zeros(3, dtype=torch.float64), keep=True, shake=shake)
        self._streamed(self.shake_(theta.clone(), shake), batch, out, seed, check)
        return check.distance

    def _graphed(self, theta: Tensor, batch: Any, out: Tensor, seed: int) -> Tensor:
        """The gradient from a captured graph, where there is one or the same was asked for before."""
        # What a capture keeps besides the numbers in theta and the batch is in the key: modes of modules, loss weights
        # and other numbers that the model or loss holds, and the addresses of buffers and frozen parameters (the
        # snapshot's signature). When one of them changes, so does the key, and a new graph is captured.
        signature = _signature(batch)
        if signature is None:
            return self.whole_gradient(theta, batch, out, seed)
        with self.evaluator.session() as snapshot:
            modes = tuple(module.training for module in self.model.modules())
            key = (theta.dtype, signature, modes, self.traits.plain, snapshot.signature())
            graph = self._graphs.pop(key, None)
            if key not in self._met:
                # The first time launches what a capture cannot: lazy loading, workspaces.
                self._met.add(key)
                return self.whole_gradient(theta, batch, out, seed)
            if graph is None and key not in self._uncapturable:
                graph = self._capture(key, theta, batch)
            if graph is None:
                return self.whole_gradient(theta, batch, out, seed)
            self._graphs[key] = graph  # at the end: the others were not used for longer
            while len(self._graphs) > GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            return graph(theta, batch, out)

    def _capture(self, key: Any, theta: Tensor, batch: Any) -> Callable[[Tensor, Any, Tensor], Tensor] | None:
        """What launches it again at other parameters, on another batch of the same shapes; None if it is impossible."""
        try:
            own_theta, own_batch = theta.clone(), tree_map_only(Tensor, Tensor.clone, batch)
            found = torch.empty_like(theta)
            replay, pool = capture(lambda: self.whole_gradient(own_theta, own_batch, found), self._pool)
        except RuntimeError as error:
            # Some models synchronise or allocate outside torch's pool; what has failed once would fail at every call,
            # and each failure costs a capture.
            self._uncapturable.add(key)
            detail = f"the gradient cannot be captured in a CUDA graph: {str(error).partition(chr(10))[0]}"
            self.note("graph", False, detail, "it is launched operator by operator")
            return None
        # One pool for all graphs: they are replayed one after another, and their memories may overlap.
        self._pool = self._pool or pool

        def launch(theta: Tensor, batch: Any, out: Tensor) -> Tensor:
            own_theta.copy_(theta)
            for own, given in zip(tree_leaves(own_batch), tree_leaves(batch), strict=True):
                own.copy_(given)
            replay()
            return out.copy_(found)

        return launch

    def _batched(self, thetas: Tensor, batches: Sequence[Any], out: Tensor | None = None) -> Tensor:
        """All gradients as one program, or as several where memory asks for it."""
        most = self._most(thetas, batches[0])
        if len(batches) <= most:
            return self._program(thetas, batches, out)
        out = thetas.new_empty(len(batches), self.size) if out is None else out
        for start in range(0, len(batches), most):
            here = slice(start, start + most)
            some = thetas if len(thetas) == 1 else repeated(thetas, len(batches))[here]
            self._program(some, batches[here], out[here])
        return out

    def _most(self, thetas: Tensor, batch: Any) -> int:
        """How many gradients fit into one program, each with its vectors and with what a backward pass keeps for it."""
        if not self.place.has_data:
            return sys.maxsize
        shapes = tuple(leaf.shape for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
        if shapes not in self._kept:
            kept: dict[int, int] = {}

            def note(saved: Tensor) -> Tensor:
                storage = saved.untyped_storage()
                kept[storage.data_ptr()] = storage.nbytes()
                return saved

            theta = self.flatten()
            with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
                self.whole_gradient(theta, batch, torch.empty_like(theta))
            self._kept[shapes] = sum(kept.values()) + VECTORS * theta.nbytes
        if self._room is None:  # half of what is free on a GPU, or of what there is for a CPU
            self._room = self.place.free_memory() // 2
        wider = thetas.element_size() // self.dtype.itemsize
        return max(1, self._room // (max(1, wider) * self._kept[shapes]))

    def _program(self, thetas: Tensor, batches: Sequence[Any], out: Tensor | None) -> Tensor:
        """All gradients at once. Generators are left alone: ``vmap`` refuses to draw."""
        shared = len(thetas) == 1
        thetas = self.place.send(thetas[0] if shared else repeated(thetas, len(batches)))
        leaves = tuple(thetas.detach()[..., s.start : s.stop].unflatten(-1, s.shape) for s in self.segments)
        stacked = _stack(batches)
        if self.place.is_apart(thetas):
            stacked = tree_map_only(Tensor, self.place.bring, stacked)
        if thetas.dtype != self.dtype:
            stacked = tree_map_only(Tensor, lambda x: x.to(thetas.dtype) if x.is_floating_point() else x, stacked)

        gradients: Callable[..., Any] = torch.func.vmap(
            torch.func.grad(self.evaluator.loss_at), in_dims=(None if shared else 0, 0)
        )
        # The fused attention of the CPU would run once per vector: it has no batched form.
        with self.evaluator.around(thetas) as stack, sdpa_kernel(SDPBackend.MATH):
            stack.enter_context(self._mode(thetas.dtype) or nullcontext())
            with torch.enable_grad():
                if self.compile and thetas.dtype == self.dtype:
                    gradients = self._compiled(gradients, leaves, stacked)
                rows = gradients(leaves, stacked)
        return torch.cat([self.place.bring(values.flatten(1)) for values in rows], 1, out=out)

    def _compiled(self, gradients: Callable[..., Any], leaves: Any, stacked: Any) -> Callable[..., Any]:
        """The same program from ``torch.compile``: traced here once for each shape, and compiled as operators alone.

        What is around an evaluation has compiled code run as it was written, which this must not.
        """
        from torch.fx.experimental.proxy_tensor import make_fx  # slow to import

        flat, structure = tree_flatten((leaves, stacked))
        shapes = structure, tuple((leaf.shape, leaf.dtype) for leaf in flat)
        if shapes not in self._programs:
            traced = make_fx(lambda *inputs: gradients(*tree_unflatten(inputs, structure)))(*flat)
            self._programs[shapes] = torch.compile(traced)

        def run(*inputs: Any) -> Any:
            with torch.compiler.set_stance("default"), torch.no_grad():
                return self._programs[shapes](*tree_leaves(inputs))

        return run

    # ------------------------------------------------------------------------------------- Hessian-vector products

    def product(
        self,
        theta: Tensor,
        batch: Any,
        direction: Tensor,
        gradient: Tensor | None,
        product: Tensor,
        seed: int = 0,
        check: Check | None = None,
    ) -> None:
        """Write the gradient at ``theta`` on ``batch``, and the product of the Hessian with ``direction``.

        The gradient's graph is differentiated once more (Pearlmutter, Neural Computation 6, 1994), part by part: the
        inner product with the direction is taken as each parameter's gradient arrives, and no gradient is kept.
        Attention runs on the composed ("math") kernel, since the fused ones have no second derivative.

        Args:
            theta, batch, seed: as for :meth:`gradient`.
            direction: (P,) of any floating dtype.
            gradient, product: (P,); overwritten, as ``out`` of :meth:`gradient` is. The gradient may be None.
            check: of the gradient, and of the product, (2, 3); or of the product alone, (1, 3).
        """
        first = self._delivery(gradient, check and check.of(0))
        second = self._delivery(product, check and check.of(-1))
        along: list[Tensor] = []
        terms: list[Tensor] | None = None  # of the inner product, while the gradient arrives

        def meet(index: int, grad: Tensor) -> Tensor | None:
            if terms is None:
                return None  # this is the product's part
            first.take(index, _dense(grad))
            if grad.requires_grad:
                terms.append((_dense(grad) * along[index]).sum())
            return grad.detach().new_zeros(()).expand(grad.shape)  # nobody needs it any more

        def use(loss: Tensor, placed: list[Tensor]) -> None:
            nonlocal terms
            first.begin()
            second.begin()
            # The first pass builds the gradient's graph, and each part meets the direction as it arrives; its own value
            # is not wanted, and what is returned in its place is a zero that takes no memory.
            terms = []
            torch.autograd.grad(loss, placed, create_graph=True, allow_unused=True)
            # Kept, they would hold the graph, whose leaves hold this: all of it until the garbage collector comes by.
            total, terms = torch.stack(terms).sum() if terms else None, None
            if total is not None:  # else the gradient is constant
                torch.autograd.backward(total, inputs=placed)
            first.end()
            second.end()

        def differentiate() -> None:
            nonlocal along
            leaves = self.evaluator.leaves(theta)
            # Other rows of one buffer may be written to meanwhile: `data` does not count their changes as its own.
            along = self.evaluator.views(self.place.beside(direction.data, leaves[0]))
            for index, leaf in enumerate(leaves):
                leaf.register_hook(functools.partial(meet, index))
            second.attach(leaves)
            with sdpa_kernel(SDPBackend.MATH):
                self.evaluator.evaluate(leaves, batch, use, seed=seed, mode=self._mode(theta.dtype, check))

        if self.traits.brackets is None:  # somebody is finding out
            differentiate()
        elif not self._survives(differentiate, theta):
            product.fill_(math.nan)

    def hessian(self, theta: Tensor, batch: Any, use: Callable[[Multiply], T], *, seed: int = 0) -> T:
        """``use(multiply)``, where ``multiply(direction)`` is the product (P,) of the Hessian with a vector (P,).

        The gradient's graph is built once and differentiated for each product, so that all but the first save a forward
        pass and half of a backward pass. It takes the memory of both until ``use`` has returned, which is why
        :meth:`product`, for one, keeps none. What ``use`` keeps of ``multiply`` is of no use afterwards.

        Args:
            theta, batch, seed: as for :meth:`gradient`; products are of the dtype of ``theta``.
            use: what to do with the Hessian. May be called again, where a generator was found to have moved.
        """

        def differentiate(loss: Tensor, placed: list[Tensor]) -> T:
            grads = torch.autograd.grad(loss, placed, create_graph=True, allow_unused=True)
            # A gradient that is constant in the parameters has no graph, and its rows of the Hessian are zero.
            kept = [i for i, grad in enumerate(grads) if grad is not None and grad.requires_grad]
            rows = [_dense(grads[i]) for i in kept]

            def multiply(direction: Tensor) -> Tensor:
                out = torch.zeros_like(direction, dtype=theta.dtype)
                there = self.place.beside(direction.detach().to(theta.dtype), placed[0])
                along = self.evaluator.views(there)
                if rows:
                    found = torch.autograd.grad(
                        rows, placed, [along[i] for i in kept], retain_graph=True, allow_unused=True
                    )
                    for view, part in zip(self.evaluator.views(out), found, strict=True):
                        if part is not None:
                            view.copy_(self.place.bring(_dense(part)))
                return out

            with torch.no_grad():
                return use(multiply)

        leaves = self.evaluator.leaves(theta)
        with sdpa_kernel(SDPBackend.MATH):
            return self.evaluator.evaluate(leaves, batch, differentiate, seed=seed, mode=self._mode(theta.dtype))

    def loss(self, theta: Tensor, batch: Any, *, seed: int = 0) -> Tensor:
        """() float64: the loss at ``theta``, in the precision of that, as for :meth:`gradient`."""

        def use(loss: Tensor, placed: list[Tensor]) -> Tensor:
            return self.place.bring(loss.detach()).to(torch.float64)

        return self.evaluator.evaluate(
            self.evaluator.leaves(theta), batch, use, seed=seed, mode=self._mode(theta.dtype)
        )

    def shake_(self, theta: Tensor, generator: torch.Generator) -> Tensor:
        """:func:`grokcurv.intercept.shake_` of a vector (P,), part by part."""
        for view in self.evaluator.views(theta):
            shake_(view, generator)
        return theta

    def _check_model(self) -> None:
        """Raises for a model of which one call of the module, or this process, has but a part, or of several kinds."""
        for module in self.model.modules():
            if isinstance(module, nn.DataParallel):
                raise ValueError(
                    "model is an nn.DataParallel, which splits a batch over the devices of one process: pass "
                    "model.module, measured on its own device, or train with DistributedDataParallel"
                )
            if isinstance(module, torch.jit.ScriptModule):
                raise ValueError(
                    "model holds a torch.jit.ScriptModule, whose parameters cannot be replaced: pass the module that "
                    "it was made from"
                )
        kinds = {type(module).__name__ for module in self.model.modules()}  # by name: some are slow to import
        sharded = any(hasattr(parameter, "device_mesh") for parameter in self.model.parameters())
        if sharded or kinds & {"DistributedDataParallel", "FullyShardedDataParallel"}:
            raise ValueError(
                "model is trained on several processes (DistributedDataParallel, fully_shard): pass "
                "grokcurv.integrations.sharded.distributed(model)"
            )
        flatten(self.model)  # raises for several dtypes or devices


class Delivery:
    """Takes a vector part by part: compares each with what stands there, and writes it, rounded, over that.

    Args:
        views: where the parts go.
        check: what is found in comparing.
        bring: takes a part to where the views are.
    """

    def __init__(self, views: list[Tensor], check: Check | None, bring: Callable[[Tensor], Tensor]) -> None:
        self._views, self._check, self._bring = views, check, bring
        self._missing: set[int] = set()
        self._norms: list[Tensor] = []

    def begin(self) -> None:
        """Nothing has arrived yet."""
        self._missing, self._norms = set(range(len(self._views))), []

    def attach(self, leaves: list[Tensor]) -> None:
        """Take each leaf's gradient when it is ready. Hooks are on the leaves alone, whatever they stand for."""
        for index, leaf in enumerate(leaves):
            leaf.register_post_accumulate_grad_hook(functools.partial(self.take_from, index))

    def take_from(self, index: int, parameter: Tensor) -> None:
        """The gradient that has arrived at a parameter, which loses it."""
        if parameter.grad is not None:
            self.take(index, _dense(parameter.grad))
            parameter.grad = None

    @torch.no_grad()
    @unseen()
    def take(self, index: int, part: Tensor) -> None:
        """One part, of any floating dtype."""
        if not self._views:
            return  # nobody wants the vector
        view, part = self._views[index], self._bring(part.detach())
        self._missing.discard(index)
        if self._check:
            self._norms += [_distance(view, part), _norm(part)]
        if not (self._check and self._check.keep):
            view.copy_(part)
        if self._check:
            rounded = view.dtype != part.dtype
            self._norms.append(_distance(view, part) if rounded else part.new_zeros((), dtype=torch.float64))

    def end(self) -> None:
        """What has not arrived is zero."""
        for index in sorted(self._missing):
            self.take(index, torch.zeros_like(self._views[index]))
        if self._check and self._norms:
            self._check.found.copy_(torch.stack(self._norms).view(-1, 3).square().sum(0).sqrt())


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """The length of ``a - b``, in memory for a piece of it."""
    if a.numel() <= PIECE:
        return _norm(a - b)
    rows = max(1, PIECE * len(a) // a.numel())
    return _norm(torch.stack([_norm(x - y) for x, y in zip(a.split(rows), b.split(rows), strict=True)]))


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)
    return norm


@dataclass(frozen=True)
class Distributed:
    """A model on several processes, with an engine of its own: :func:`grokcurv.integrations.sharded.distributed`."""

    engine: Callable[[LossFn, Strategy], GradientEngine]


Model = nn.Module | Distributed


def deliver(vectors: Tensor, out: Tensor, check: Check | None, partition: Partition = WHOLE) -> None:
    """A vector (P,), or several (n, P), into ``out``, as :class:`Delivery` does with parts of one."""
    norms = [partition.norms(out - vectors), partition.norms(vectors)] if check else []
    if not (check and check.keep):
        out.copy_(vectors)
    if check:
        check.found.copy_(torch.stack([*norms, partition.norms(out - vectors)], -1))


def repeated(rows: Tensor, count: int) -> Tensor:
    """(count, P) the rows (R, P) of all runs, over and over; themselves if they are so many."""
    return rows if len(rows) == count else rows.repeat(count // len(rows), 1)


def capture(run: Callable[[], object], pool: Any = None) -> tuple[Callable[[], None], Any]:
    """What launches again all that ``run`` launches, on the same memory, and the pool that this memory is from.

    Other threads may go on allocating meanwhile (a loader's that pins memory): the capture is this thread's alone.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        run()
    return graph.replay, graph.pool()


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


def _dense(grad: Tensor) -> Tensor:
    return grad.to_dense() if grad.layout != torch.strided else grad
