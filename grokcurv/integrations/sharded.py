"""Models trained on several processes: DistributedDataParallel and FSDP2 (``torch.distributed.fsdp.fully_shard``).

A group of one process measures what a process without a group does:

>>> import torch
>>> import torch.distributed as dist
>>> from torch.nn.parallel import DistributedDataParallel
>>> import grokcurv as gc
>>> from grokcurv.integrations.sharded import distributed
>>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
>>> model, (a, b) = torch.nn.Linear(3, 2), torch.randn(2, 8, 3)
>>> loss_fn = lambda model, batch: model(batch).square().mean()
>>> probe = gc.CommutatorProbe(distributed(DistributedDataParallel(model)), loss_fn)
>>> defect = probe.measure([(a, b)]).defect
>>> torch.equal(defect, gc.commutator_defect(model, loss_fn, a, b).defect)
True
>>> dist.destroy_process_group()

Every rank makes the same calls at the same time, each with its own batches; what is measured is the commutator of the
gradients averaged over the ranks, the ones training steps along. Every rank gets the same numbers, to the bit.

**DistributedDataParallel.** Each rank has all P coordinates. It evaluates the wrapped module, not the wrapper, whose
hooks and buckets see nothing of it, and each gradient or Hessian-vector product is averaged by one all-reduce of P
numbers. Everything after that is the same on each rank.

**fully_shard.** Each rank has a shard of the coordinates, which may be empty: P_r of them, and every vector, ``theta``
and ``delta`` included, is (P_r,). A gradient is the module's own forward and backward pass, in which FSDP gathers
parameters and scatters the averaged gradient; for that the shards are moved along the step in place, and put back bit
by bit with ``.grad`` and buffers. Then the kernels run on the shard, and what they sum over coordinates is completed by
summing over the ranks (:class:`Sharding`): a few float64 numbers a pair.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from grokcurv.evaluation import unwrapped
from grokcurv.gradients import Distributed
from grokcurv.integrations.ddp import ReplicatedEngine
from grokcurv.integrations.fsdp import ShardedEngine, ShardedPCA

__all__ = ["ShardedPCA", "distributed"]


def distributed(model: nn.Module, exact: nn.Module | None = None) -> Distributed:
    """``model``, to be passed to :class:`grokcurv.CommutatorProbe` or :class:`grokcurv.CurvatureMonitor` on each rank.

    Args:
        model: a DistributedDataParallel, or a module to which ``fully_shard`` was applied as a whole, over a mesh of
            one dimension or of two (replicate, shard), along dimension 0 of each parameter.
        exact: for ``fully_shard`` alone: the same architecture in float64 (float32 for a model of float64), under the
            same calls of ``fully_shard``. The noise floor is measured with it; it costs each rank a shard in float64.
            Its values do not matter: parameters and buffers are copied over at each evaluation. Without it the noise
            floor is NaN and nothing is called reliable. DistributedDataParallel needs none.

    Raises:
        ValueError: another kind of model; when a probe is made, parameters that are not sharded as above, or an
            ``exact`` that is not.
    """
    # The kind of model is all that is looked at here, and it is the same on every rank: none may raise while the others
    # go on to a collective. What an engine looks at closer, when a probe is made, is the same on each as well.
    module, exact = unwrapped(model), exact and unwrapped(exact)
    # DistributedDataParallel first, since its wrapper is told by its type: inside it each rank has a whole model, which
    # can take float64 parameters for an evaluation, so that there is nothing for an exact model to do.
    if isinstance(module, DistributedDataParallel):
        if exact is not None:
            raise ValueError("exact is for fully_shard: a DistributedDataParallel can be evaluated in float64 as it is")
        return Distributed(lambda loss_fn, strategy: ReplicatedEngine(module, loss_fn, strategy))
    # fully_shard leaves a module what it is and gives it a class that derives from FSDPModule as well. FSDP casts and
    # gathers in the one precision it was set up with, and so float64 takes a model of its own.
    if isinstance(module, FSDPModule):
        return Distributed(lambda loss_fn, strategy: ShardedEngine(module, loss_fn, strategy, exact))
    # The older wrapper is no FSDPModule: it has flattened the parameters, whose pieces need not be rows of any of them.
    if isinstance(module, FullyShardedDataParallel):
        raise ValueError("model is a FullyShardedDataParallel; use its successor torch.distributed.fsdp.fully_shard")
    raise ValueError(
        f"model must be a DistributedDataParallel or have had fully_shard(model), got {type(module).__name__}; "
        "a model of one process needs no distributed()"
    )
