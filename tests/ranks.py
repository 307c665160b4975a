"""Processes that carry out functions together, over gloo; and what the tests of sharded models have them carry out."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import grokcurv as gc
from grokcurv.flat import attention_segments, flatten, segments_of
from grokcurv.integrations.sharded import ShardedPCA, distributed

TIMEOUT = 120.0
"""Seconds for what is asked of the ranks; a collective that waits for a missing rank gives up after half of it."""

ETA = 1e-2

hybrid: DeviceMesh
"""In a rank: the first two, replicas of each other."""


class Ranks:
    """``size`` spawned processes in one process group. None outlives :meth:`close`."""

    def __init__(self, size: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            mine, its = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, str(folder / "rendezvous"), its), daemon=True)
            process.start()
            its.close()
            self.pipes.append(mine)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, ranks: int) -> list[Any]:
        """What ``function(mesh, *args)`` returns on each of the first so many ranks; ``mesh`` is of those."""
        until = time.monotonic() + TIMEOUT
        for pipe in self.pipes:
            pipe.send((function, args, ranks))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(max(0.0, until - time.monotonic())):
                self.close()
                raise TimeoutError(f"rank {rank} did not answer within {TIMEOUT} s")
            answers.append(pipe.recv())
        failures = [text for good, text in answers if not good]
        if failures:
            raise AssertionError("\n".join(failures))
        return [value for _, value in answers[:ranks]]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _serve(rank: int, size: int, path: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=TIMEOUT / 2)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size, timeout=limit)
    meshes = {n: DeviceMesh("cpu", list(range(n)), mesh_dim_names=("shard",)) for n in range(2, size + 1)}
    global hybrid
    hybrid = DeviceMesh("cpu", [[0], [1]], mesh_dim_names=("replicate", "shard"))
    while True:
        function, args, ranks = pipe.recv()
        try:
            result = function(meshes[ranks], *args) if rank < ranks else None
            pipe.send((True, result))
        except BaseException:
            pipe.send((False, f"rank {rank}: {traceback.format_exc()}"))


# --------------------------------------------------------------------------------------------------- models and batches


class Net(nn.Module):
    """Attention, a batch norm (buffers), a frozen layer, a parameter that no loss uses, and one of a single row."""

    def __init__(self, dropout: float = 0.0, relu: bool = False, checkpointing: bool = False) -> None:
        super().__init__()
        self.activation = torch.relu if relu else torch.tanh
        self.checkpointing = checkpointing
        self.embed = nn.Linear(5, 8)
        self.fixed = nn.Linear(8, 8).requires_grad_(False)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(8, 1)
        self.unused = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.enter, x, use_reentrant=False) if self.checkpointing else self.enter(x)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.head(self.drop(self.norm(h.mean(1))))

    def enter(self, x: Tensor) -> Tensor:
        return self.activation(self.fixed(self.embed(x)))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0])[:, 0] - batch[1]).square().mean()


def net(seed: int, dtype: torch.dtype = torch.float32, train: bool = False, **options: Any) -> Net:
    torch.manual_seed(seed)
    # A batch norm in training mode sees one rank's samples: only in evaluation mode is the whole the mean of the parts.
    return Net(**options).to(dtype).train(train)


def batches(count: int, ranks: int, seed: int, dtype: torch.dtype = torch.float32) -> list[list[tuple[Tensor, Tensor]]]:
    """``count`` batches for each rank, of six samples."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(ranks, count, 6, 3, 5, generator=draw, dtype=torch.float64)
    return [[(b.to(dtype), b.sum((1, 2)).sin().to(dtype)) for b in own] for own in x]


def whole(parts: list[list[tuple[Tensor, Tensor]]]) -> list[tuple[Tensor, Tensor]]:
    """The batches of all ranks together: the gradient on one is the mean of the ranks'."""
    return [(torch.cat([x for x, _ in same]), torch.cat([y for _, y in same])) for same in zip(*parts, strict=True)]


def shard(model: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    fully_shard(model.attention, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def sharded(mesh: DeviceMesh, model: nn.Module, exact: nn.Module | None = None) -> Any:
    return distributed(shard(model, mesh), None if exact is None else shard(exact, mesh))


def ddp(mesh: DeviceMesh, model: nn.Module) -> DistributedDataParallel:
    return DistributedDataParallel(model, process_group=mesh.get_group(), find_unused_parameters=True)


def other(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float64 else torch.float64


def plain(stats: gc.CommutatorStats) -> dict[str, Any]:
    return {**vars(stats), "reliable": stats.reliable}


# ---------------------------------------------------------------------------------------------------------- what is run


def from_given_shards(mesh: DeviceMesh, seed: int) -> dict[str, Any]:
    """The statistics of random gradients, from the shards of all ranks, and what the kernels say of the whole."""
    model = shard(net(seed), mesh)
    engine = distributed(model).engine(loss, "auto")
    draw = torch.Generator().manual_seed(seed)
    size = engine.segments[-1].stop
    vectors = [torch.randn(1, size, generator=draw) for _ in range(4)]
    theta = torch.randn(size, generator=draw)
    eta = torch.full((1,), ETA, dtype=torch.float64)
    rows = torch.linalg.qr(torch.randn(size, 3, generator=draw)).Q.T.contiguous()
    spans = attention_segments(net(seed))[1:3] + tuple(gc.Segment(str(i), i, size // 2, ()) for i in (0, 11, size // 2))
    here = own(engine)
    mine = [engine.partition.local_part(s) for s in spans]
    out, want = (
        gc.ops.commutator(
            *(v[:, at].contiguous() for v in vectors),
            eta,
            theta=theta[at].contiguous(),
            values=rows[:, at].flatten(),
            rows=torch.tensor([[0, n, n * i] for i in range(3)]),
            segments=torch.tensor([[s.start, s.length] for s in parts]),
        )
        for at, n, parts in ((here, len(here), mine), (torch.arange(size), size, spans))
    )
    got = engine.partition.all_reduce_sum(out.sums, out.coefficients, out.energies)
    norms = engine.partition.norm(vectors[0][0, here]), torch.linalg.vector_norm(vectors[0].double())
    return {"got": got, "want": (want.sums, want.coefficients, want.energies), "norms": norms, "size": len(here)}


def own(fed: Any) -> Tensor:
    """The numbers in R^P of this rank's coordinates."""
    return torch.cat([torch.arange(start, start + shape.numel()) for start, shape in fed.partition.pieces])


def measure(
    mesh: DeviceMesh, kind: str, seed: int, dtype: torch.dtype, options: dict[str, Any], relu: bool = False
) -> dict[str, Any]:
    """Two pairs by the probe on several ranks, and by one on the batches of all ranks in this process."""
    parts = batches(4, mesh.size(), seed, dtype)
    mine, every = parts[mesh.get_local_rank()], whole(parts)
    model = net(seed, dtype, relu=relu)
    if kind == "ddp":
        wrapped = distributed(ddp(mesh, model))
    else:
        wrapped = sharded(hybrid if kind == "hsdp" else mesh, model, net(seed + 1, other(dtype), relu=relu))
    reference = net(seed, dtype, relu=relu)
    segments = (segments_of(reference)[0], *attention_segments(reference)[:3])
    probe = gc.CommutatorProbe(wrapped, loss, segments=segments, **{"eta": ETA, **options})
    single = gc.CommutatorProbe(reference, loss, segments=segments, **{"eta": ETA, **options})
    stats = probe.measure([(mine[0], mine[1]), (mine[2], mine[3])], keep_delta=True)
    alone = single.measure([(every[0], every[1]), (every[2], every[3])], keep_delta=True)
    here = torch.arange(probe.gradients.size) if kind == "ddp" else own(probe.gradients)
    return {"stats": plain(stats), "alone": plain(alone), "here": here}


def train(mesh: DeviceMesh, kind: str, seed: int, measured: bool, options: dict[str, Any]) -> dict[str, Any]:
    """Six steps of AdamW in training mode; measured after every backward pass, or not."""
    model = net(seed, train=True, **options)
    wrapped = ddp(mesh, model) if kind == "ddp" else shard(model, mesh)
    mine = batches(7, mesh.size(), seed)[mesh.get_local_rank()]
    monitor = None
    if measured:
        pca = gc.StreamingPCA(2) if kind == "ddp" else ShardedPCA(wrapped, 2)
        exact = None if kind == "ddp" else shard(net(seed + 1, torch.float64, True, **options), mesh)
        monitor = gc.CurvatureMonitor(
            distributed(wrapped, exact), loss, eta=ETA, pca=pca, pca_every=1, alignment=True, check_every=2
        )
    optimizer = torch.optim.AdamW((p for p in wrapped.parameters() if p.requires_grad), lr=1e-2)
    torch.manual_seed(seed + mesh.get_local_rank())
    losses = []
    for batch, following in pairwise(mine):
        value = loss(wrapped, batch)
        value.backward()
        before = [p.grad for p in wrapped.parameters()]
        copies = [None if g is None else local(g).clone() for g in before]
        if monitor is not None:
            monitor.step(batch, following)
        for p, g, copy in zip(wrapped.parameters(), before, copies, strict=True):
            assert p.grad is g
            assert g is None or torch.equal(local(g), copy)
        losses.append(float(value))
        optimizer.step()
        optimizer.zero_grad()
    end = {name: local(t).clone() for name, t in wrapped.state_dict().items()}
    records = None if monitor is None else monitor.records().drop(columns="measure_seconds")
    return {"end": end, "losses": losses, "random": torch.get_rng_state(), "records": records}


def local(t: Tensor) -> Tensor:
    return t.to_local() if hasattr(t, "to_local") else t.detach()


def monitor_alone(seed: int, ranks: int) -> Any:
    """The records of a monitor in one process that trains on the batches of all ranks, in evaluation mode."""
    model = net(seed)
    return _trajectory(model, model, whole(batches(5, ranks, seed)), lambda: gc.StreamingPCA(2))


def monitor_ranks(mesh: DeviceMesh, kind: str, seed: int, resumed: bool) -> Any:
    mine = batches(5, mesh.size(), seed)[mesh.get_local_rank()]
    if kind == "ddp":
        model = ddp(mesh, net(seed))
        return _trajectory(model, distributed(model), mine, lambda: gc.StreamingPCA(2), resumed)
    model = shard(net(seed), mesh)
    wrapped = distributed(model, shard(net(seed + 1, torch.float64), mesh))
    return _trajectory(model, wrapped, mine, lambda: ShardedPCA(model, 2), resumed)


def _trajectory(
    model: nn.Module, given: Any, data: list[Any], pca: Callable[[], gc.StreamingPCA], resumed: bool = False
) -> Any:
    def new() -> gc.CurvatureMonitor:
        return gc.CurvatureMonitor(given, loss, eta=ETA, pca=pca(), pca_every=1, alignment=True)

    monitor = new()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.05)
    for batch, following in monitor.lookahead(data):
        if resumed:
            state, monitor = monitor.state_dict(), new()
            monitor.load_state_dict(state)
        loss(model, batch).backward()
        monitor.step(batch, following)
        optimizer.step()
        optimizer.zero_grad()
    return monitor.records().drop(columns="measure_seconds")


def pca(mesh: DeviceMesh, seed: int, segmented: bool, store: torch.dtype | None) -> dict[str, Any]:
    """A PCA of a random trajectory by shards and of the whole; its state through a dictionary on the way."""
    model = shard(net(seed), mesh)
    reference = net(seed)
    segments = attention_segments(reference)[:2] if segmented else None
    split = ShardedPCA(model, 3, segments, store_dtype=store)
    one = gc.StreamingPCA(3, "gram", segments, store_dtype=store)
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(12, 4, generator=draw) @ torch.randn(4, len(flatten(reference)), generator=draw)
    rows += 1e-2 * torch.randn(rows.shape, generator=draw)
    here = own(split)
    split.partial_fit(rows[:7, here])
    again = ShardedPCA(model, 3, segments, store_dtype=store)
    again.load_state_dict(split.state_dict())
    for row in rows[7:, here]:
        again.partial_fit(row)
    one.partial_fit(rows)
    broken = rows[:2, here].clone()
    if mesh.get_local_rank() == mesh.size() - 2:
        broken[1] = torch.nan
    try:
        again.partial_fit(broken)
        refused = ""
    except ValueError as error:
        refused = str(error)
    names = ("explained_variance_", "explained_variance_ratio_", "total_variance_", "pc1_history_", "error_bound_")
    numbers = {name: (getattr(again, name), getattr(one, name)) for name in names}
    numbers["scores"] = again.transform(rows[:, here]), one.transform(rows)
    numbers["steps"] = again.step_norms_, one.step_norms_
    wanted, mean = one.components_, one.mean_
    if segments:
        bounds = [(s, split.partition.local_part(s)) for s in segments]
        places = [here[m.start : m.start + m.length] - s.start for s, m in bounds]
        parts = [c[:, at] for c, at in zip(wanted, places, strict=True)]
        means = [m[at] for m, at in zip(mean, places, strict=True)]
    else:
        parts, means = [wanted[:, here]], [mean[here]]
    components = again.components_ if segments else [again.components_]
    averages = again.mean_ if segments else [again.mean_]
    return {
        "numbers": numbers,
        "components": list(zip(components, parts, strict=True)),
        "means": list(zip(averages, means, strict=True)),
        "seen": again.n_samples_seen_,
        "refused": refused,
    }


def nan(mesh: DeviceMesh, seed: int) -> dict[str, Any]:
    """One rank's batch holds a NaN."""
    mine = batches(2, mesh.size(), seed)[mesh.get_local_rank()]
    if mesh.get_local_rank() == 1:
        mine[0][0][0, 0, 0] = torch.nan
    model, exact = net(seed), net(seed, torch.float64)
    probe = gc.CommutatorProbe(sharded(mesh, model, exact), loss)
    before = probe.gradients.flatten()
    stats = probe.measure([(mine[0], mine[1])])
    return {**plain(stats), "kept": torch.equal(before, probe.gradients.flatten())}


def grown(mesh: DeviceMesh, kind: str, seed: int) -> list[bool]:
    """Which pairs were checked: the first, as it must be; the same again; and one that is large on the last rank."""
    mine = batches(4, mesh.size(), seed)[mesh.get_local_rank()]
    if mesh.get_local_rank() == mesh.size() - 1:
        mine[2][0].mul_(100.0)
    model = net(seed)
    wrapped = distributed(ddp(mesh, model)) if kind == "ddp" else sharded(mesh, model, net(seed + 1, torch.float64))
    probe = gc.CommutatorProbe(wrapped, loss, eta=1.0)
    pairs = (mine[0], mine[1]), (mine[0], mine[1]), (mine[2], mine[3])
    return [bool(probe.measure([pair], check=False).exact) for pair in pairs]


def dropout(mesh: DeviceMesh, seed: int) -> dict[str, Any]:
    """A model with dropout, measured twice from one seed, once from another, and with a step ten times as long."""
    mine = batches(2, mesh.size(), seed)[mesh.get_local_rank()]
    dropping, masks = net(seed, dropout=0.5, train=True), []
    dropping.drop.register_forward_hook(lambda module, given, out: masks.append(out == 0))
    model = sharded(mesh, dropping, net(seed, torch.float64))
    probe, longer = (gc.CommutatorProbe(model, loss, eta=eta) for eta in (ETA / 100, ETA / 10))
    state = torch.get_rng_state()
    stats = [
        plain(p.measure([(mine[0], mine[1])], seed=s)) for p, s in ((probe, 3), (probe, 3), (probe, 4), (longer, 3))
    ]
    kept = torch.equal(state, torch.get_rng_state())
    return {"stats": stats, "kept": kept, "random": probe.gradients.stochastic, "mask": masks[-1]}


def failure(mesh: DeviceMesh, kind: str, seed: int, method: str, everywhere: bool) -> dict[str, Any]:
    """A loss that breaks off, on all ranks or on the last alone; then one that does not."""
    mine = batches(2, mesh.size(), seed)[mesh.get_local_rank()]
    model = ddp(mesh, net(seed)) if kind == "ddp" else shard(net(seed), mesh)
    loss(model, mine[0]).backward()
    grads = [p.grad for p in model.parameters()]
    broken = [everywhere or mesh.get_local_rank() == mesh.size() - 1]

    def fragile(module: nn.Module, batch: Any) -> Tensor:
        value = loss(module, batch)
        if broken[0] and torch.equal(batch[0], mine[1][0]):
            raise RuntimeError("broken off")
        return value

    probe = gc.CommutatorProbe(distributed(model), fragile, method=method)
    before, message = probe.gradients.flatten(), ""
    try:
        probe.measure([(mine[0], mine[1])])
    except RuntimeError as error:
        message = str(error)
    kept = torch.equal(before, probe.gradients.flatten())
    same = all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    broken[0] = False
    after = probe.measure([(mine[0], mine[1])])
    return {"message": message, "kept": kept and same, "after": plain(after)}


def accumulate(mesh: DeviceMesh, seed: int, measured: bool, mixed: bool) -> dict[str, Any]:
    """Two passes whose gradients FSDP reduces together; measured between them, which is refused, or not."""
    mine = batches(2, mesh.size(), seed)[mesh.get_local_rank()]
    model = net(seed)
    if mixed:
        model.norm = nn.Identity()
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else MixedPrecisionPolicy()
    probe = gc.CommutatorProbe(distributed(shard(model, mesh, mp_policy=policy)), loss)
    pair, messages = [(mine[0], mine[1])], []
    model.set_requires_gradient_sync(False)
    loss(model, mine[0]).backward()
    for synchronised in (False, True):
        model.set_requires_gradient_sync(synchronised)
        try:
            messages.append(str(probe.measure(pair)) if measured else "")
        except ValueError as error:
            messages.append(str(error))
    loss(model, mine[1]).backward()
    grads = [local(p.grad).clone() for p in model.parameters() if p.grad is not None]
    return {"messages": messages, "grads": grads, "after": plain(probe.measure(pair))}


def low_precision(mesh: DeviceMesh, seed: int) -> dict[str, Any]:
    """The floor of a model that FSDP computes in bfloat16, beside the same one in float32."""
    mine = batches(2, mesh.size(), seed)[mesh.get_local_rank()]
    policies = MixedPrecisionPolicy(), MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    floors = []
    for policy in policies:
        model, exact = net(seed), net(seed, torch.float64)
        model.norm, exact.norm = nn.Identity(), nn.Identity()  # on a CPU a batch norm takes no two precisions
        wrapped = distributed(shard(model, mesh, mp_policy=policy), shard(exact, mesh))
        floors.append(gc.CommutatorProbe(wrapped, loss, eta=ETA).measure([(mine[0], mine[1])]).noise_floor)
    return {"floors": floors}


def refusals(mesh: DeviceMesh, seed: int) -> dict[str, str]:
    """What bad input is answered with, by name."""
    model, mixed, partial = shard(net(seed), mesh), net(seed), net(seed)
    mixed.head.double()
    fully_shard(mixed.head, mesh=mesh)
    fully_shard(mixed, mesh=mesh)
    fully_shard(partial, mesh=mesh, ignored_params={partial.head.weight})
    unlike = fully_shard(nn.Linear(6, 2, dtype=torch.float64), mesh=mesh)
    sideways = nn.Sequential(nn.Linear(6 * mesh.size(), 3, bias=False))
    fully_shard(sideways, mesh=mesh, shard_placement_fn=lambda p: Shard(1))
    hooked = shard(net(seed), mesh)
    hooked.head.weight.register_post_accumulate_grad_hook(lambda p: None)
    mine = batches(2, mesh.size(), seed)[mesh.get_local_rank()]
    pair = [(mine[0], mine[1])]
    twin = shard(net(seed, torch.float64), mesh)
    replicated = ddp(mesh, net(seed))
    tries: dict[str, Callable[[], Any]] = {
        "raw sharded": lambda: gc.CommutatorProbe(model, loss),
        "raw ddp": lambda: gc.CommutatorProbe(replicated, loss),
        "inside": lambda: gc.CommutatorProbe(nn.Sequential(replicated), loss),
        "plain": lambda: distributed(net(seed)),
        "dataparallel": lambda: distributed(nn.DataParallel(net(seed))),
        "ddp exact": lambda: distributed(replicated, twin),
        "mixed": lambda: gc.CommutatorProbe(distributed(mixed), loss),
        "ignored": lambda: gc.CommutatorProbe(distributed(partial), loss),
        "sideways": lambda: gc.CommutatorProbe(distributed(sideways), loss),
        "exact plain": lambda: gc.CommutatorProbe(distributed(model, net(seed, torch.float64)), loss),
        "exact dtype": lambda: gc.CommutatorProbe(distributed(model, shard(net(seed), mesh)), loss),
        "exact other": lambda: gc.CommutatorProbe(distributed(model, unlike), loss),
        "bracket": lambda: gc.CommutatorProbe(distributed(model), loss, method="bracket").measure(pair),
        "strategy": lambda: gc.CommutatorProbe(distributed(model), loss, strategy="vmap"),
        "monitor": lambda: gc.CurvatureMonitor(distributed(model), loss),
        "monitor pca": lambda: gc.CurvatureMonitor(distributed(model, twin), loss, pca=gc.StreamingPCA()),
        "pca": lambda: ShardedPCA(net(seed)),
        "pca order": lambda: ShardedPCA(model, segments=[(8, 4), (0, 4)]),
        "pca end": lambda: ShardedPCA(model, segments=[(0, 10**6)]),
        "ddp pca": lambda: gc.CurvatureMonitor(distributed(replicated), loss, pca=ShardedPCA(model)),
        "pca length": lambda: ShardedPCA(model).partial_fit(torch.zeros(1)),
        "hook": lambda: gc.CommutatorProbe(distributed(hooked), loss).measure(pair),
    }
    answers = {}
    for name, attempt in tries.items():
        try:
            attempt()
            answers[name] = ""
        except ValueError as error:
            answers[name] = str(error)
    return answers


def unvouched(mesh: DeviceMesh, seed: int) -> dict[str, Any]:
    mine = batches(2, mesh.size(), seed)[mesh.get_local_rank()]
    return plain(gc.CommutatorProbe(sharded(mesh, net(seed)), loss, eta=ETA).measure([(mine[0], mine[1])]))


class Blocks(nn.Module):
    """What the documentation calls ``build``."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.block(x)))


def documented(mesh: DeviceMesh, blocks: list[str], loop: str) -> list[int]:
    """The code of the documentation, each block followed by its loop; how many rows are reliable."""
    draw = torch.Generator().manual_seed(mesh.get_local_rank())
    names: dict[str, Any] = {
        "torch": torch,
        "DistributedDataParallel": DistributedDataParallel,
        "fully_shard": fully_shard,
        "build": lambda dtype: Blocks().to(dtype),
        "loss_fn": lambda model, batch: (model(batch[0]) - batch[1]).square().mean(),
        "loader": [(torch.randn(6, 4, generator=draw), torch.randn(6, 1, generator=draw)) for _ in range(5)],
    }
    counts = []
    for block in blocks:
        exec(block.replace(loop, ""), names)
        names["optimizer"] = torch.optim.SGD(names["model"].parameters(), lr=0.1)
        exec(loop, names)
        counts.append(int(names["monitor"].records()["reliable"].sum()))
    return counts
