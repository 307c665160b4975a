"""``loss_fn(model, batch)`` at any parameters, with the model, the batch and every generator left as they were.

The model itself is evaluated, and not a copy: for the time of an evaluation its Parameters have other contents
(:mod:`grokcurv.state`), whoever refers to them. So a block used three times, a list of parameters that the loss has
captured, a checkpoint that runs the forward pass again in the backward, are all evaluated as training evaluates them.
"""

from __future__ import annotations

import functools
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from grokcurv.device import CPU, default_generators, device_of
from grokcurv.device_buffer import capturing
from grokcurv.flat import Segment, segments_of
from grokcurv.intercept import NARROW, Apart, PrivateDraws, Seen
from grokcurv.state import LARGE, Snapshot, Stream, Streams, stand_ins, standing_in, stream_of

T = TypeVar("T")

LossFn = Callable[[nn.Module, Any], Tensor]

Use = Callable[[Tensor, list[Any]], T]
"""What is done with a loss and with the parameters on which it was evaluated, while they are in their place."""

Mode = AbstractContextManager[Any] | None
"""What is entered around an evaluation, to change or to see what its operators do."""

PYTHON: random.Random = random.seed.__self__  # type: ignore[attr-defined]
"""The generator behind the functions of Python's ``random``."""

TITLES = {
    "torch": "torch's default generator",
    "random": "Python's random",
    "numpy": "numpy.random",
    "cuda": "torch's default generator of {}",
    "mps": "torch's default generator of {}",
}
"""How the generators that everybody sees are spoken of."""

LOCK = threading.RLock()
"""Held while a model is not what it looks like: another thread that measures waits."""


def unwrapped(model: nn.Module) -> nn.Module:
    """What ``torch.compile`` has wrapped, if it has."""
    module: nn.Module = getattr(model, "_orig_mod", model)
    return module


@dataclass(frozen=True)
class Check:
    """Holds a vector against what stands where it goes.

    Attributes:
        found: (3,) float64, overwritten: the distance of the vector from what was there before, its length, and the
            length of what was lost in rounding it to what is there; a row for each of several.
        keep: true for those who only compare: what is there stays.
        shake: for those who sample rounding errors, a generator by which those of an evaluation in float64 are made
            larger at random (:class:`grokcurv.intercept.Widened`; the engine's ``shake_`` does it to parameters).
    """

    found: Tensor
    keep: bool = False
    shake: torch.Generator | None = None

    def of(self, which: int | slice | tuple[int | slice, ...]) -> Check:
        """The check of one of several vectors, or of some of them."""
        return replace(self, found=self.found[which])

    @property
    def distance(self) -> float:
        return float(self.found[0])


class Evaluator:
    """Evaluates a loss at parameters that are put in the place of the model's own.

    Everything ``loss_fn`` can touch is put back: parameters with their ``.grad``, hooks and graphs, buffers, tensors,
    numbers and containers that modules, hooks and the loss keep, the batch, and generators: torch's, Python's and
    NumPy's, and those that modules hold. Where the model draws at random, all of them start from ``seed``.

    >>> model = nn.Linear(3, 1)
    >>> evaluator = Evaluator(model, lambda model, x: model(x).square().mean())
    >>> zero = evaluator.leaves(torch.zeros(evaluator.size))
    >>> evaluator.evaluate(zero, torch.ones(3), lambda loss, parameters: loss.item())
    0.0
    >>> bool(model.weight.any())
    True

    Args:
        model, loss_fn: as for :class:`grokcurv.gradients.GradientEngine`.

    Attributes:
        place: where the model is, and where the vectors are of which it is given parts.
        draws: of which visible generators the evaluations are known to take: ``"torch"``, ``"random"``, ``"numpy"``.
        generation: a count of the times that something new was learnt in the middle of an evaluation, such as a draw.
            What was computed before it may not fit what is computed after.
        stateful: whether an evaluation has left the model, or the batch, other than it met it, before that was put
            back.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        self.model, self.loss_fn = model, loss_fn
        self.segments: tuple[Segment, ...] = segments_of(model)
        self.draws: set[str] = set()
        self.generation = 0
        self.volatile: set[int] = set()  # large tensors that are known to change, by identity
        self.writes_parameters = False  # then every evaluation needs parameters of its own
        self.stateful = False
        self._evaluated = False
        self._not_ours: set[str] = set()  # generators that something else draws from meanwhile
        self._snapshot: Snapshot | None = None
        self._held: ExitStack | None = None  # what keeps the first session open
        self._met: list[nn.Parameter] = []  # the parameters, once they were asked for while sessions are held
        self._parameters: list[nn.Parameter] = []
        self._sparse: list[nn.Embedding | nn.EmbeddingBag] = []
        self._ends: dict[tuple[str, int, int], Any] = {}
        first = self.parameters()[0]
        self.dtype, self.device = first.dtype, first.device
        self.place = device_of(self.device)

    # ------------------------------------------------------------------------------------------------- what is there

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, in the order of the flat vector, whichever order the model has them in now.

        Raises:
            ValueError: they are not those of the beginning: one was frozen, unfrozen, added, removed or given another
                shape.
        """
        if self._snapshot is not None:
            return self._parameters  # of this session
        if self._met:
            return self._met
        found = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        names = {segment.name for segment in self.segments}
        changed = sorted(found.keys() ^ names)
        if changed:
            what = "unfrozen or added" if changed[0] in found else "frozen or removed"
            raise ValueError(
                f"model: parameter {changed[0]!r} was {what} "
                "since the measurement was set up, and the vectors would be of other coordinates: make a new one"
            )
        for segment in self.segments:
            if found[segment.name].shape != segment.shape:
                raise ValueError(
                    f"model: parameter {segment.name!r} has now shape {tuple(found[segment.name].shape)} and had "
                    f"{segment.shape} when the measurement was set up: make a new one"
                )
        several = [found[segment.name] for segment in self.segments]
        if self._held is not None:
            self._met = several
        return several

    def local(self, tensor: Tensor) -> Tensor:
        """What is here of a parameter, or of a gradient: its memory, without a history."""
        return tensor.detach()

    def values(self) -> list[Tensor]:
        """What is here of the parameters, in their order, where vectors live."""
        return self.place.bring_all(list(map(self.local, self.parameters())))

    @property
    def size(self) -> int:
        """How many coordinates are here: P, unless a subclass says otherwise."""
        return self.segments[-1].stop

    def _check_kind(self, parameters: Sequence[nn.Parameter]) -> None:
        """Raise a ValueError if a parameter has another dtype or device than when the measurement was set up."""
        for segment, parameter in zip(self.segments, parameters, strict=True):
            if (parameter.dtype, parameter.device) != (self.dtype, self.device):
                raise ValueError(
                    f"model: parameter {segment.name!r} is now {parameter.dtype} on {parameter.device} and was "
                    f"{self.dtype} on {self.device} when the measurement was set up: make a new one"
                )

    @contextmanager
    def session(self) -> Iterator[Snapshot]:
        """Looks once at what could change, for all evaluations inside, between which nobody else changes the model."""
        with LOCK, torch.inference_mode(False), ExitStack() as alone:
            if self._snapshot is None:
                (self._held or alone).enter_context(self._opened())
            assert self._snapshot is not None
            yield self._snapshot

    @contextmanager
    def held(self) -> Iterator[None]:
        """Sessions inside are one, if there are any: nobody else changes the model between them."""
        with LOCK, ExitStack() as held:
            outer, self._held = self._held, self._held or held
            try:
                yield
            finally:
                self._held, self._met = outer, self._met if outer else []

    @contextmanager
    def _opened(self) -> Iterator[None]:
        """Remember what the model is before a measurement, for as long as the measurement lasts."""
        self._parameters = self.parameters()
        self._check_kind(self._parameters)
        self._sparse = [m for m in self.model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.sparse]
        self._snapshot = self._look()
        try:
            yield
        finally:
            self._snapshot = None
            self._ends.clear()

    def _look(self) -> Snapshot:
        return Snapshot([self.model], [self.loss_fn], self._parameters)

    def leaves(self, theta: Tensor, *, at_home: bool = False) -> list[Tensor]:
        """Views of a vector, or of a copy if the model writes to them, that gradients can be asked of.

        An evaluation takes place where they are: on the model's device if that has their dtype, unless it is to be made
        where vectors live.
        """
        with torch.inference_mode(False):
            vector = theta.detach() if at_home else self.place.send(theta.detach())
            return [view.requires_grad_() for view in self.views(vector.clone() if self.writes_parameters else vector)]

    def views(self, vector: Tensor) -> list[Tensor]:
        """The parts of a vector, shaped as the parameters."""
        return [vector[s.start : s.stop].view(s.shape) for s in self.segments]

    # -------------------------------------------------------------------------------------------------- evaluations

    def evaluate(self, leaves: Sequence[Tensor], batch: Any, use: Use[T], *, seed: int = 0, mode: Mode = None) -> T:
        """``use(loss, parameters)`` with the contents of the leaves in the parameters, as long as the loss is used.

        Args:
            leaves: one for each parameter. Of another dtype than the model's: whatever floats the modules hold, and
                the batch, are then evaluated in that dtype too.
            batch: what ``loss_fn`` takes; protected like the model, whatever it is made of.
            use: what to do with the loss. May be called again, where a generator was found to have moved.
            seed: of the model's own randomness.
            mode: entered around the evaluation.

        Raises:
            ValueError: the loss is not a scalar tensor, or does not depend on the parameters.
            RuntimeError: a large tensor was changed that had not been before, and cannot be put back.
        """
        once = functools.partial(self._once, leaves, batch, use, seed=seed)
        with self.session():
            # The first evaluation trusts that nothing draws but what is known to. If a visible generator stands
            # elsewhere afterwards, either the model has drawn, or another thread has: an observed repetition tells
            # which, and what the model drew is put back, from now on for good.
            used, moved = once(mode=mode)
            if moved:
                observation = Observation()
                once(mode=observation)
                self._learn(moved, observation.drew)
                used, _ = once(mode=mode)
        return used

    def observe(self, leaves: Sequence[Tensor], batch: Any, use: Use[T], *, seed: int = 0) -> frozenset[str]:
        """:meth:`evaluate`, and the names of the operators that lead to the loss.

        Of which generators the model draws is seen too, and which large tensors change.
        """
        observation = Observation()
        names: frozenset[str] = frozenset()

        def watched(loss: Tensor, placed: list[Tensor]) -> None:
            nonlocal names
            names = frozenset(observation.names)
            use(loss, placed)

        with self.session():
            _, moved = self._once(leaves, batch, watched, seed=seed, mode=observation, everything=True)
            if moved:
                self._learn(moved, observation.drew)
                self._once(leaves, batch, use, seed=seed, mode=None)
        return names

    def _once(
        self, leaves: Sequence[Tensor], batch: Any, use: Use[T], *, seed: int, mode: Mode, everything: bool = False
    ) -> tuple[T, dict[str, Any]]:
        """An evaluation, and where the generators were before that moved although nothing was known to be drawn."""
        moved: dict[str, Any] = {}
        with self.session():
            # A forward pass may write to its parameters (Embedding(max_norm=...), momentum encoders). Versions tell,
            # and from then on every evaluation gets a copy of the vector.
            written = [leaf._version for leaf in leaves]
            with self.around(leaves[0], batch, seed=seed, moved=moved, everything=everything) as stack:
                self._place(leaves, stack)
                stack.enter_context(mode or nullcontext())
                with torch.enable_grad():
                    used = use(self._loss(batch), list(self._parameters))
            if not self.writes_parameters and written != [leaf._version for leaf in leaves]:
                self.writes_parameters = True
                self.generation += 1
        return used, moved

    @contextmanager
    def around(
        self,
        like: Tensor,
        batch: Any = None,
        *,
        seed: int = 0,
        moved: dict[str, Any] | None = None,
        everything: bool = False,
    ) -> Iterator[ExitStack]:
        """All of an evaluation in the dtype, and in the place, of ``like``, but the parameters, which are put in their
        place in the stack it gives."""
        with self.session() as snapshot:
            cast = like.dtype if like.dtype != self.dtype else None
            apart = self.place.is_apart(like)
            # Tensors of the model that may change get stand-ins, copies that are written to in their place; large ones
            # that were never seen to change are watched instead, which costs nothing. The batch always gets stand-ins.
            given = Snapshot([batch])
            copied, watched = self._choose(snapshot, cast, everything, apart)
            move = self.place.bring if apart else None
            originals = [*copied, *given.tensors]
            copies = [*stand_ins(copied, cast, move), *stand_ins(given.tensors, cast, move)]
            versions = [(tensor, tensor.data, tensor._version) for tensor in watched]
            made = [copy._version for copy in copies]
            places = [copy.data_ptr() if copy.layout == torch.strided else 0 for copy in copies]
            with ExitStack() as stack:
                # The order matters: what is entered last is left first, so tensors are themselves again before
                # attributes are compared and put back, and generators are restored when nothing can draw any more.
                stack.enter_context(self._plain_surroundings())
                stack.enter_context(self._generators(snapshot, seed, batch, {} if moved is None else moved))
                stack.callback(self._restore, given)
                stack.callback(self._restore, snapshot)
                stack.enter_context(standing_in(originals, copies))
                if not self.place.has_float64:
                    stack.enter_context(Apart(self.place, apart))
                yield stack
            self.stateful = self.stateful or made != [copy._version for copy in copies]
            if everything:
                self._note_changes(copied, copies, made, places)
            self._look_after(versions)

    def loss_at(self, leaves: Sequence[Tensor], batch: Any) -> Tensor:
        """The loss with the leaves in the place of the parameters while it is computed; inside :meth:`around`."""
        with standing_in(self._parameters, leaves):
            return self._loss(batch)

    def _loss(self, batch: Any) -> Tensor:
        """The loss of the user's function, once it is a scalar that depends on the parameters."""
        loss = self.loss_fn(self.model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn must return a scalar tensor, got {got}")
        if not loss.requires_grad:
            raise ValueError("loss_fn returned a loss that does not depend on the model's trainable parameters")
        return loss.reshape(())

    def _place(self, leaves: Sequence[Tensor], stack: ExitStack) -> None:
        """Put the leaves in the place of the parameters until the stack is closed."""
        stack.enter_context(standing_in(self._parameters, leaves))

    def _choose(
        self, snapshot: Snapshot, dtype: torch.dtype | None, everything: bool, apart: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Which tensors get stand-ins, and which are watched. The model's own floats are wanted in ``dtype``, and all
        that there are at home, if that is apart from the model."""
        copied: list[Tensor] = []
        watched: list[Tensor] = []
        for index, tensor in enumerate(snapshot.tensors):
            if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or tensor.is_inference():
                continue
            # cast: true for the model's own narrow floats in a float64 evaluation. A tensor of the loss alone, or of an
            # attribute that both share, keeps its dtype, as it does when the user calls the loss. small: true for what
            # is cheaper to copy than to think about, and for what is known to change.
            cast = dtype is not None and tensor.dtype in NARROW and index < snapshot.held
            small = tensor.numel() <= LARGE or tensor.requires_grad or id(tensor) in self.volatile
            away = apart and not self.place.is_home(tensor)
            (copied if cast or small or away or everything else watched).append(tensor)
        return copied, watched

    def _restore(self, snapshot: Snapshot) -> None:
        self.stateful = snapshot.restore() or self.stateful

    def _note_changes(
        self, originals: Sequence[Tensor], copies: Sequence[Tensor], versions: list[int], places: list[int]
    ) -> None:
        """Large tensors whose stand-ins were written to, with the same numbers or not, will have stand-ins again."""
        for original, copy, version, place in zip(originals, copies, versions, places, strict=False):
            written = copy._version != version or (copy.layout == torch.strided and copy.data_ptr() != place)
            if original.numel() > LARGE and (written or not same_numbers(original, copy)):
                self.volatile.add(id(original))

    def _look_after(self, watched: Sequence[tuple[Tensor, Tensor, int]]) -> None:
        """Raise a RuntimeError where an evaluation wrote to a tensor of which no copy was kept."""
        for tensor, contents, version in watched:
            if tensor.layout == torch.strided and tensor.data_ptr() != contents.data_ptr():
                self.volatile.add(id(tensor))
                tensor.data = contents  # other contents were put in its place: these are unharmed
            elif tensor._version != version:
                self.volatile.add(id(tensor))
                self.generation += 1
                raise RuntimeError(
                    f"model: an evaluation changed {self._name_of(tensor)}, which it had not done before, so that no "
                    "copy was kept that could be put back; from now on one is"
                )

    def _name_of(self, tensor: Tensor) -> str:
        """Where in the model a tensor is, for a message."""
        for prefix, module in self.model.named_modules():
            for held in (module._parameters, module._buffers, vars(module)):
                for name, value in held.items():
                    if value is tensor:
                        return repr(f"{prefix}.{name}".strip("."))
        return f"a tensor of shape {tuple(tensor.shape)}"

    @contextmanager
    def _plain_surroundings(self) -> Iterator[None]:
        """Nothing compiled, cached or rounded to TensorFloat-32; sparse gradients of embeddings as dense ones."""
        cached = torch.is_autocast_cache_enabled()
        with (
            uncompiled(),
            switched(self.place.products, "fp32_precision", "ieee"),
            switched([parametrize], "_cache_enabled", 0),
            switched(self._sparse, "sparse", False),
        ):
            torch.set_autocast_cache_enabled(False)
            try:
                yield
            finally:
                torch.set_autocast_cache_enabled(cached)

    # --------------------------------------------------------------------------------------------------- generators

    @contextmanager
    def _generators(self, snapshot: Snapshot, seed: int, batch: Any, moved: dict[str, Any]) -> Iterator[None]:
        """What the model is known to draw comes from ``seed``, and is put back; ``moved`` gets what moved besides.

        A generator of which nothing is known to be drawn is not touched: another thread may be drawing from it.
        """
        if capturing(self.device):
            if self.stochastic or snapshot.generators:
                raise RuntimeError(
                    "model draws at random (dropout), which a CUDA graph cannot repeat: measure it without a capture"
                )
            if not self._evaluated:
                raise RuntimeError("measure once before the capture: what the model draws at random shows only then")
            yield
            return
        # Only generators that the model draws from are seeded: to set one that another thread uses would change what
        # that thread draws, and a training run with it.
        visible = Streams((name, own) for name, own in streams(self.device).items() if name not in self._not_ours)
        known = {name: stream for name, stream in visible.items() if name in self.draws}
        before = visible.positions()
        snapshot.seed_generators(seed)
        for stream in known.values():
            stream.seed(seed)
        try:
            yield
            # With one thread nobody can have drawn in between, and the end need not be remembered.
            if known and threading.active_count() > 1:
                self._watch_ends(known, seed, batch)
        finally:
            snapshot.restore_generators()
            for name, stream in known.items():
                stream.write(before[name])
        self._evaluated = True
        moved |= visible.moved({name: before[name] for name in before if name not in known})

    def _watch_ends(self, known: dict[str, Stream], seed: int, batch: Any) -> None:
        """An evaluation that begins alike draws alike, unless another thread takes from the same generator."""
        for name, stream in known.items():
            end = stream.read()
            if not stream.stands_at(self._ends.setdefault((name, seed, id(batch)), end)):
                raise RuntimeError(
                    f"another thread drew from {TITLES[name].format(self.device)} while a model that draws from it was "
                    "being measured; let one of the two have a generator of its own"
                )

    def _learn(self, moved: dict[str, Any], drew: set[str]) -> None:
        """Of the generators that moved, those that the model was seen to draw from are put back, now and always."""
        ours = moved.keys() & drew
        streams(self.device).move_to({name: moved[name] for name in ours})
        self.draws |= ours
        self._not_ours |= moved.keys() - drew
        self.generation += 1

    @property
    def stochastic(self) -> bool:
        """Whether evaluations are known to draw at random from a generator that everybody sees."""
        return bool(self.draws)


@functools.cache
def streams(device: torch.device) -> Streams:
    """Python's, NumPy's and torch's own generators; torch's of the CPU, and of the device if it is a GPU."""
    visible = default_generators(device) | {"random": PYTHON, "numpy": np.random.mtrand._rand}
    return Streams((name, stream_of(generator)) for name, generator in visible.items())


class Observation(Seen):
    """What this thread does while it is open: which operators it calls, and of which visible generators it takes.

    NumPy's does not show who drew: it counts as this thread's.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls_random = False

    @property
    def drew(self) -> set[str]:
        """Names of :func:`streams`."""
        torch_s = {"torch", "cuda", "mps"} if self.draws else set()
        return torch_s | ({"random"} if self._calls_random else set()) | {"numpy"}

    def __enter__(self) -> Observation:
        self._profiler = sys.getprofile()
        sys.setprofile(self._watch)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        if self._profiler is None or callable(self._profiler):
            sys.setprofile(self._profiler)
        else:  # Python 3.11's cProfile, which shows itself and is no function
            sys.setprofile(None)
            self._profiler.enable()

    def _watch(self, frame: Any, event: str, called: Any) -> None:
        if event == "c_call" and getattr(called, "__self__", None) is PYTHON:
            self._calls_random = True


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """What is drawn inside comes from generators seeded here, and those that everybody sees stay where they are.

    torch's are not touched at all. Python's and NumPy's are put back if they have moved: then they are seeded by the
    next call, or nothing would be new in it.
    """
    both = Streams((name, streams(CPU)[name]) for name in ("random", "numpy"))
    before = both.positions()
    for name in both.keys() & _isolated:
        both[name].seed(seed)
    try:
        with PrivateDraws(seed):
            yield
    finally:
        _isolated.update(both.moved(before))
        both.move_to(before)


_isolated: set[str] = set()
"""Generators from which something that was isolated has drawn."""


@contextmanager
def switched(owners: Sequence[Any], name: str, value: object) -> Iterator[None]:
    """Meanwhile that attribute of each of them is another."""
    before = [getattr(owner, name) for owner in owners]
    try:
        for owner in owners:
            setattr(owner, name, value)
        yield
    finally:
        for owner, own in zip(owners, before, strict=True):
            setattr(owner, name, own)


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Whether one tensor could take the place of the other: NaN is like NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


def uncompiled() -> AbstractContextManager[None]:
    """Runs what ``torch.compile`` has made as it was written. Where its compiler was never loaded there is none."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance
