"""fully_shard: each rank has a shard of the coordinates, and what is summed over them is completed over the ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.utils._pytree import tree_map_only

from grokcurv.admission import Traits
from grokcurv.evaluation import Check, Evaluator, LossFn, unwrapped
from grokcurv.flat import Segment, segments_of
from grokcurv.gradients import GradientEngine, Strategy, deliver
from grokcurv.integrations.ddp import seed_of_rank
from grokcurv.partition import Partition
from grokcurv.pca import StreamingPCA
from grokcurv.pca.common import Layout
from grokcurv.state import Snapshot


@dataclass(frozen=True)
class Sharding(Partition):
    """Which coordinates of a model under ``fully_shard`` a rank has, and sums over all of them.

    Its vectors (P_r,) are the local parts of the trainable parameters, in order. A local part is the interval of rows
    that ``torch.chunk`` gives the rank, so that a rank's coordinates are in the order of the flat vector (P,).

    What the ranks found is gathered and put together in their order, so that no rank can see other bits than the next
    and decide otherwise.

    Attributes:
        group: the ranks over which the parameters are sharded.
        pieces: start in R^P, and shape, of each local part.
    """

    group: dist.ProcessGroup
    pieces: tuple[tuple[int, torch.Size], ...]

    @classmethod
    def of(cls, model: nn.Module) -> Sharding:
        """How the trainable parameters are sharded.

        Raises:
            ValueError: not at all, along another dimension than 0, or not all over the same mesh and of one dtype.
        """
        # Resharded before the model is looked at: where FSDP has gathered a parameter, the module has a plain tensor of
        # full shape in its place, and would look as if nothing were sharded.
        pieces, kinds = [], []
        held, segments = _parameters(model), segments_of(model)
        for segment, parameter in zip(segments, held, strict=True):
            if not isinstance(parameter, DTensor):
                raise ValueError(
                    f"model: parameter {segment.name!r} is not sharded, so that its gradient is not averaged; call "
                    "fully_shard(model) on the whole model, without ignored_params"
                )
            # Over a mesh of two dimensions, (replicate, shard), a parameter has a placement for each; exactly one of
            # them may cut it. Cut along its rows, each part is an interval of the flat vector, which all that follows
            # rests on. Of exactly that type: the rows of a strided shard need not be an interval.
            mesh, placements = parameter.device_mesh, parameter.placements
            cuts = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
            if len(cuts) != 1 or type(cut := placements[cuts[0]]) is not Shard or cut.dim != 0:
                raise ValueError(
                    f"model: parameter {segment.name!r} must be sharded along its dimension 0 and over one dimension "
                    f"of the mesh, got placements {placements}"
                )
            # One mesh for all, because sums over all coordinates are completed in one group, and one dtype, because the
            # local parts go into one vector.
            kinds.append((parameter.dtype, mesh, placements))
            if kinds[-1] != kinds[0]:
                raise ValueError(
                    f"model: trainable parameters must be of one dtype and sharded alike, but {segment.name!r} is "
                    f"{kinds[-1]} and {segments[0].name!r} {kinds[0]}"
                )
            # Where the part of this rank begins, as torch.chunk cuts: each rank has ceil(rows / world) rows until there
            # are none left. The last ranks may have fewer, or none; those begin at the end.
            rows = segment.shape[0]
            start = min(rows, mesh.get_local_rank(cuts[0]) * -(-rows // mesh.size(cuts[0])))
            pieces.append((segment.start + start * (segment.length // max(1, rows)), _local(parameter).shape))
        # The group of the dimension that shards, not of all ranks: replicas have the same coordinates, and a sum over
        # both dimensions would count each as often as there are replicas.
        return cls(mesh.get_group(cuts[0]), tuple(pieces))

    @property
    def size(self) -> int:
        """P_r."""
        return sum(shape.numel() for _, shape in self.pieces)

    def views(self, vector: Tensor) -> list[Tensor]:
        """The parts of a vector (P_r,), shaped as the local parts of the parameters."""
        parts = vector.split([shape.numel() for _, shape in self.pieces])
        return [part.view(shape) for part, (_, shape) in zip(parts, self.pieces, strict=True)]

    def local_part(self, segment: Segment) -> Segment:
        ends = ((self._below(start), self._below(start + length)) for start, length in segment.intervals)
        pieces = tuple((start, stop - start) for start, stop in ends if stop > start)
        length = sum(length for _, length in pieces)
        start = pieces[0][0] if pieces else self._below(segment.start)
        return Segment(segment.name, start, length, (length,), pieces if len(pieces) > 1 else ())

    def all_reduce_sum(self, *sums: Tensor) -> tuple[Tensor, ...]:
        # All sums of a call travel in one message. They are gathered and added here, rank 0 first, so that every rank
        # makes the same additions: the last bit of a sum can decide a comparison, and that what is called next.
        first, *others = self._gather(torch.cat([s.reshape(-1) for s in sums]))
        for other in others:
            first = first + other
        parts = first.split([s.numel() for s in sums])
        return tuple(part.view(s.shape) for part, s in zip(parts, sums, strict=True))

    def norm(self, *parts: Tensor) -> Tensor:
        # Squares add up over shards, lengths do not.
        squares = [torch.linalg.vector_norm(part, dtype=torch.float64).square() for part in parts]
        return self.all_reduce_sum(torch.stack(squares).sum())[0].sqrt()

    def norms(self, rows: Tensor) -> Tensor:
        squares = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64).square()
        return self.all_reduce_sum(squares)[0].sqrt()

    def all_reduce_max(self, values: Tensor) -> Tensor:
        # Gathered too, so that the NaN of any rank reaches all: torch's own maximum passes it on.
        return self._gather(values).amax(0)

    def all_reduce_and(self, flags: Tensor) -> Tensor:
        # A flag is true for this rank's coordinates; what is returned is true for all of them, on every rank, if it was
        # so on each. As bytes, which every backend can send.
        return self._gather(flags.to(torch.uint8)).bool().all(0)

    def _gather(self, values: Tensor) -> Tensor:
        """(ranks, ...): the values of each."""
        # The values of all ranks must be of one shape, which none of them can check: what is gathered here is per pair,
        # per segment or per row, and never per coordinate, of which the ranks have different numbers.
        found = [torch.empty_like(values) for _ in range(self.group.size())]
        dist.all_gather(found, values.contiguous(), group=self.group)
        return torch.stack(found)

    def _below(self, coordinate: int) -> int:
        """How many of the coordinates here come before this one of R^P."""
        return sum(min(max(coordinate - start, 0), shape.numel()) for start, shape in self.pieces)


class ShardedEngine(GradientEngine):
    """Gradients under ``fully_shard``, through the module's own passes; vectors are (P_r,).

    There are no Hessian-vector products: a gradient that FSDP has scattered cannot be differentiated again. There is
    one strategy, ``loop``.
    """

    # `brackets` is false on every rank for every model here: there are no second derivatives. `certifies` is false too:
    # the float64 evaluation, where there is one, is of another model. Its gradients are compared with this one's, and
    # take their place only at kinks.
    brackets = certifies = False
    partition: Sharding

    def __init__(self, model: nn.Module, loss_fn: LossFn, strategy: Strategy, exact: nn.Module | None = None) -> None:
        if strategy not in ("auto", "loop"):
            raise ValueError(f"strategy must be 'auto' or 'loop' for a model under fully_shard, got {strategy!r}")
        # The partition comes first, since the engine makes an evaluator that needs it. And the loop alone, whatever the
        # device: FSDP gathers and reduces in the module's own passes, one at a time.
        self.partition = Sharding.of(model)
        super().__init__(model, loss_fn, strategy="loop")
        # `checked` is true on all ranks if they were given an exact model, as all or none must be: its evaluations
        # gather over the ranks as the model's do.
        self.checked = exact is not None
        self._exact = None if exact is None else self._twin(exact)

    def _evaluator(self, loss_fn: LossFn) -> Evaluator:
        return ShardedEvaluator(self.model, loss_fn, self.partition)

    def product(self, *_: Any, **__: Any) -> None:
        """Raises ValueError: there are none."""
        raise ValueError(
            "method 'bracket' needs second derivatives, which a model under fully_shard has not; "
            "eta='auto' estimates the bracket from gradients"
        )

    def hessian(self, *_: Any, **__: Any) -> NoReturn:
        """Raises ValueError: there is none."""
        raise ValueError("a Hessian needs second derivatives, which a model under fully_shard has not")

    def _admitted(self, batch: Any, seed: int, exact: bool, brackets: bool) -> Traits:
        """As in one process, with one answer for all ranks."""
        # Traits decide whether a gradient is taken of the exact model, whose passes are collectives of their own: ranks
        # that disagreed would wait for each other in different ones. `nonsmooth` is true for all if it is for any.
        return Traits(nonsmooth=self.anywhere(self._has_kinks(batch, seed_of_rank(seed))), brackets=False)

    def anywhere(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        # `flag` is true for this rank alone, `unset` where it is not; if it is unset on all ranks nobody has set it.
        unset = torch.tensor([not flag], device=self.device)
        return not bool(self.partition.all_reduce_and(unset))

    def gradient(self, theta: Tensor, batch: Any, out: Tensor, *, seed: int = 0, check: Check | None = None) -> Tensor:
        """As there. A sample of the rounding error is that of the other precision, scaled by the ratio of roundoffs."""
        # In one process the operators of the evaluation are shaken. Here the gradient in the other precision takes the
        # place of a shaken one: both differ from the true one by rounding alone.
        if check and check.shake:
            theta = theta.to(_other(theta.dtype))
        # A gradient comes whole from FSDP: it goes straight to `out` only where nobody wants to compare it with what is
        # there. A check is given on all ranks or on none, since its norms are completed over the ranks.
        whole = out if out.dtype == theta.dtype and check is None else torch.empty_like(theta)
        self._gradient(theta, batch, whole, seed)
        if whole is not out:
            deliver(whole, out, check, self.partition)
        if check and check.shake:
            # The distance is of the coarser precision's rounding; what is asked for is that of float64, finer by the
            # ratio of the roundoffs.
            eps = torch.finfo(theta.dtype).eps
            check.found[0] *= min(1.0, torch.finfo(torch.float64).eps / eps)
        return out

    def _gradient(self, theta: Tensor, batch: Any, out: Tensor, seed: int) -> None:
        """This rank's part of the gradient of the mean of all ranks' losses, by FSDP's own backward pass."""
        if theta.dtype != self.dtype:
            if self._exact is None or theta.dtype != self._exact.dtype:
                raise ValueError(f"theta is {theta.dtype}, but the model {self.dtype}, and no exact model is of that")
            # The exact model's values are stale whenever it is asked. Its trainable parameters take those of `theta` in
            # its own evaluation; the rest is copied over first, and the batch cast as an evaluation of the model itself
            # in another precision would cast it.
            self._follow(self._exact.model)
            cast = tree_map_only(Tensor, lambda x: x.to(theta.dtype) if x.is_floating_point() else x, batch)
            self._exact._gradient(theta, cast, out, seed)
            return
        # Before every pass: hooks and waiting gradients come and go between two measurements. All ranks find the same,
        # if they train the same model alike, and none enters a pass that others refuse.
        self._refuse_bystanders(_parameters(self.model))

        def use(loss: Tensor, _: list[Any]) -> None:
            # Autograd cannot be asked to deliver elsewhere: FSDP scatters and averages gradients as they arrive, and
            # puts them into the .grad of the sharded parameters. The evaluator has set those to None, or FSDP would add
            # to them, and puts training's back. A .grad is sharded as its parameter is, and already reduced over the
            # ranks: the local part of it is the local part of the mean.
            loss.backward()
            self.flatten_grad(out)

        self.evaluator.evaluate(self.evaluator.leaves(theta), batch, use, seed=seed_of_rank(seed))

    def observe(self, theta: Tensor, batch: Any, out: Tensor | None, seed: int, plain: bool = False) -> frozenset[str]:
        # A forward pass alone shows the operators. What it leaves gathered, since FSDP awaits a backward pass, is freed
        # when the parameters are put back.
        return self.evaluator.observe(self.evaluator.leaves(theta), batch, lambda *_: None, seed=seed)

    def _check_model(self) -> None:
        """A sharded model is what this is for, and Sharding.of has looked at dtypes and devices."""

    def _refuse_bystanders(self, parameters: list[nn.Parameter]) -> None:
        """Raise a ValueError where a measured backward pass would take effect on training."""
        # In one process a measurement runs on stand-ins, which no hook of training's knows. Here it runs on training's
        # own parameters: a hook that waits for their gradients, as of an optimiser that steps in the backward pass,
        # would take a measured one for training's.
        for segment, parameter in zip(self.segments, parameters, strict=True):
            if getattr(parameter, "_post_accumulate_grad_hooks", None):
                raise ValueError(
                    f"model: parameter {segment.name!r} has a hook that runs when its gradient is there (an optimiser "
                    "in the backward pass?), and would run for measured gradients too; remove it"
                )
        # Between accumulated passes FSDP holds unreduced gradients of full shape where no .grad shows them. A measured
        # backward pass would reduce them together with its own, and training would lose them.
        if any(map(_holds_gradients, _groups(self.model))):
            raise ValueError(
                "model is between passes whose gradients add up unreduced: measure after one under "
                "set_requires_gradient_sync(True)"
            )

    def _twin(self, exact: nn.Module) -> ShardedEngine:
        """The engine of the exact model, once it is known to be built alike."""
        if not isinstance(exact, FSDPModule):
            raise ValueError(f"exact must have had fully_shard(exact), got {type(exact).__name__}")
        # Its engine has no exact model in turn, which ends the recursion.
        engine, wanted = ShardedEngine(exact, self.evaluator.loss_fn, "loop"), _other(self.dtype)
        if engine.dtype != wanted or engine.device != self.device:
            raise ValueError(f"exact must be {wanted} on {self.device}, got {engine.dtype} on {engine.device}")
        # Buffers and frozen parameters are copied over by position, and vectors cut by the shards: both must agree.
        if _structure(exact) != _structure(self.model) or engine.partition.pieces != self.partition.pieces:
            raise ValueError("exact has other modules, parameters, buffers or shards than model: build it alike")
        return engine

    @torch.no_grad()
    def _follow(self, exact: nn.Module) -> None:
        """Give the exact model what a gradient depends on besides the trainable parameters."""
        # Buffers and frozen parameters, which no `theta` holds; and the modes, because a dropout that one of the two
        # leaves out would be taken for rounding. Both are sharded alike, so that local parts go over without a gather.
        for its, mine in zip(exact.buffers(), self.model.buffers(), strict=True):
            its.copy_(mine)
        for twin, module in zip(exact.modules(), self.model.modules(), strict=True):
            twin.training = module.training
        for parameter, given in zip(exact.parameters(), self.model.parameters(), strict=True):
            if not given.requires_grad:
                _local(parameter).copy_(_local(given))


class ShardedEvaluator(Evaluator):
    """Evaluates a model under ``fully_shard`` through its own passes: the shards take other values, in place.

    FSDP keeps state of its own on the modules, which is left to it: of the model's, parameters, ``.grad`` and buffers
    are put back.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn, partition: Sharding) -> None:
        self._partition = partition
        super().__init__(model, loss_fn)

    def parameters(self) -> list[nn.Parameter]:
        # Called for what it does: afterwards the module has its sharded parameters, not those FSDP has gathered, which
        # would pass for others that have come in their place.
        _parameters(self.model)
        return super().parameters()

    @property
    def size(self) -> int:
        return self._partition.size

    def local(self, tensor: Tensor) -> Tensor:
        return _local(tensor)

    def views(self, vector: Tensor) -> list[Tensor]:
        return self._partition.views(vector)

    def leaves(self, theta: Tensor, *, at_home: bool = False) -> list[Tensor]:
        # Values to be copied into the shards, no more: no gradient arrives at them, so none is required.
        return self.views(theta)

    def _look(self) -> Snapshot:
        """The buffers as they are before a measurement, to be put back."""
        # Of the model's attributes none: FSDP's own are among them, streams, groups and buffers in flight, and to put
        # those back would take from it what a pass has left for the next.
        return Snapshot([list(self.model.buffers())])

    def _place(self, leaves: Sequence[Tensor], stack: ExitStack) -> None:
        """Overwrite the model's shards with ``leaves`` until the evaluation has ended."""
        # Stand-ins, as in one process, are no way here: FSDP keeps the memory of each shard and gathers from that,
        # whatever tensor the module holds. So the shard itself is overwritten, and a copy of its bits put back.
        parameters = _parameters(self.model)
        values, grads = [_local(p).clone() for p in parameters], [p.grad for p in parameters]

        def put_back(kind: Any, *_: Any) -> None:
            # `kind` is None on a rank whose evaluation came to its end. After one that was broken off FSDP still counts
            # on the rest of the pass; from torch 2.13 on it can be told that none will come.
            if kind is not None and hasattr(self.model, "reset_iter_state"):
                self.model.reset_iter_state()  # type: ignore[operator]
            # Resharded anew, since the pass may have left the module with gathered parameters, and to write to those
            # would leave the shards as the measurement had them.
            _write(_parameters(self.model), values, grads)

        # Before anything is overwritten, so that a write that fails halfway is put back too.
        stack.push(put_back)
        _write(parameters, leaves, [None] * len(grads))


def _other(dtype: torch.dtype) -> torch.dtype:
    """The precision that an exact model has."""
    return torch.float32 if dtype == torch.float64 else torch.float64


def _parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters, sharded, as the optimiser has them; what FSDP has gathered is freed."""
    # A forward pass leaves the root gathered, and every module under reshard_after_forward=False, to save the backward
    # pass a collective. To free what is gathered takes none: a rank may do it on its own.
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _local(tensor: Tensor) -> Tensor:
    """The memory itself of the local part, without a history."""
    # to_local is differentiable, so that what it returns with gradients enabled is a node of a graph: to write to it
    # in place would be refused, or recorded.
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


@torch.no_grad()
def _write(parameters: list[nn.Parameter], values: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Put values into this rank's parts of the parameters, and set each ``.grad``."""
    for parameter, value, grad in zip(parameters, values, grads, strict=True):
        _local(parameter).copy_(value)
        parameter.grad = grad


def _structure(model: nn.Module) -> Any:
    """What two models have in common that are built alike: names of modules, names and shapes of tensors."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    names = [name for name, _ in model.named_modules()]
    return names, [(name, tensor.shape, tensor.requires_grad) for name, tensor in tensors]


def _groups(model: nn.Module) -> Iterator[Any]:
    """What FSDP keeps of the parameters that it gathers together. torch has no public way to read it."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Several groups to a module in newer releases, one or none in older ones.
            state: Any = module._get_fsdp_state()
            yield from getattr(state, "_fsdp_param_groups", None) or filter(None, [state._fsdp_param_group])


def _holds_gradients(group: Any) -> bool:
    """Whether a backward pass would add to gradients that wait to be reduced, or let its own wait."""
    # Gradients wait in one of three places: in the dtype they will be reduced in, where that is another than the
    # parameters'; as the .grad of a gathered parameter; or reduced over the shards and not yet over the replicas.
    waiting = [p.unsharded_accumulated_grad for p in group.fsdp_params]
    waiting += [p._unsharded_param.grad for p in group.fsdp_params if hasattr(p, "_unsharded_param")]
    waiting.append(group._partial_reduce_output)
    # `reduce_grads` is false for a group that was told not to reduce its next pass, `all_reduce_grads` for one that was
    # told to reduce over the shards alone; a loop tells all ranks the same. No gradient need be waiting yet.
    return not (group.reduce_grads and group.all_reduce_grads) or any(grad is not None for grad in waiting)


class ShardedPCA(StreamingPCA):
    """:class:`grokcurv.StreamingPCA` of rows of which each rank has its shard (P_r,); ``method="gram"`` alone.

    Each rank keeps its shard of the rows. The Gram matrix, and all that follows from it, is the same on each; the
    components and the mean are sharded as the rows are. ``partial_fit``, ``components_``, ``transform`` and
    ``load_state_dict`` exchange numbers: call them on all ranks. A row that is not finite on one rank is refused on
    all. Each rank saves and loads its own ``state_dict``.

    >>> import grokcurv as gc
    >>> from torch.distributed.fsdp import fully_shard
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> mesh = dist.init_device_mesh("cpu", (1,))
    >>> model, rows = fully_shard(nn.Linear(3, 2), mesh=mesh), torch.randn(5, 8)
    >>> shares = ShardedPCA(model, 2).partial_fit(rows).explained_variance_ratio_
    >>> torch.allclose(shares, gc.StreamingPCA(2).partial_fit(rows).explained_variance_ratio_)
    True
    >>> dist.destroy_process_group()

    Args:
        model: after ``fully_shard(model)``.
        n_components, store_dtype, scratch: as for :class:`grokcurv.StreamingPCA`.
        segments: intervals of all P coordinates, in their order.

    Raises:
        ValueError: as for :class:`grokcurv.StreamingPCA`, and as :func:`distributed`.
    """

    partition: Sharding

    def __init__(
        self,
        model: nn.Module,
        n_components: int = 8,
        segments: Sequence[Segment | tuple[int, int]] | None = None,
        *,
        store_dtype: torch.dtype | None = None,
        scratch: str | os.PathLike[str] | None = None,
    ) -> None:
        module = unwrapped(model)
        if not isinstance(module, FSDPModule):
            raise ValueError(
                f"model must have had fully_shard(model), got {type(module).__name__}; where each rank has all "
                "coordinates, a StreamingPCA on each does"
            )
        # Of the methods `gram` alone has its sums completed over the ranks. The partition comes first, since the
        # constructor makes a layout with it.
        self.partition = Sharding.of(module)
        super().__init__(n_components, "gram", segments, store_dtype=store_dtype, scratch=scratch)
        if self.segments is None:
            return
        # They are given as intervals of R^P, the same on every rank, and kept as intervals of this rank's vectors. One
        # that is empty here stays, because the ranks exchange a number for each segment.
        size, stop = sum(p.numel() for p in _parameters(module)), 0
        for segment in self.segments:
            if not stop <= segment.start <= segment.stop <= size:  # empty parts would lose their order otherwise
                raise ValueError(f"segments must ascend, disjoint, up to P = {size}; {segment.name!r} does not")
            stop = segment.stop
        self.segments = tuple(map(self.partition.local_part, self.segments))

    def _pack(self, x: Tensor) -> Tensor:
        rows = super()._pack(x)
        if x.shape[-1] != self.partition.size:
            raise ValueError(f"x must hold this rank's {self.partition.size} coordinates, got {x.shape[-1]}")
        return rows

    def _new_layout(self, features: int, device: torch.device) -> Layout:
        layout = super()._new_layout(features, device)
        # To read the lengths of whole segments for the first time is an exchange. It is made here, where all ranks come
        # by, so that variances can afterwards be read on one rank alone.
        layout.sizes  # noqa: B018
        return layout
