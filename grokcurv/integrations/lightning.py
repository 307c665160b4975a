"""Curvature of a model that PyTorch Lightning trains.

>>> import torch
>>> from lightning.pytorch import LightningModule, Trainer
>>> from grokcurv.integrations.lightning import CurvatureCallback
>>> class Regression(LightningModule):
...     def __init__(self):
...         super().__init__()
...         self.body = torch.nn.Linear(3, 1)
...     def training_step(self, batch, index):
...         return self.body(batch).square().mean()
...     def configure_optimizers(self):
...         return torch.optim.SGD(self.parameters(), lr=0.1)
>>> callback = CurvatureCallback(lambda module, batch: module.body(batch).square().mean())
>>> quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
>>> trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=[callback], **quiet)
>>> trainer.fit(Regression(), callback.lookahead([torch.randn(8, 3) for _ in range(3)]))
>>> callback.monitor.records()["step"].tolist()  # the last batch has no next one
[0, 1]
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from grokcurv.evaluation import LossFn, streams, switched
from grokcurv.loggers import CallableLogger, scalars
from grokcurv.lookahead import Later, copied
from grokcurv.monitor import CurvatureMonitor
from grokcurv.state import LARGE, Snapshot, stand_ins, standing_in

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.plugins.precision import Precision
except ImportError as error:
    raise ImportError("this module needs PyTorch Lightning: pip install 'grokcurv[lightning]'") from error


class CurvatureCallback(Callback):
    """A :class:`grokcurv.CurvatureMonitor` that steps with the optimiser, before clipping, after unscaling.

    Without a ``sampler`` the pair is (this batch, next batch), and the loader given to ``fit`` must be
    :meth:`lookahead` of the real one. With accumulated gradients there must be a sampler.

    ``loss_fn`` is evaluated outside the precision plugin's autocast: with ``precision="bf16-mixed"`` the model trains
    in bfloat16 and is measured in float32. With ``"bf16-true"`` and ``"64-true"`` it gets batches of that type, as
    ``training_step`` does. The monitor's state is part of Lightning's checkpoints.

    The batch after this one goes through the hooks of batch transfer once more, for the measurement alone, and what
    they draw and change is put back: training calls them as if nobody had. An optimiser that calls its closure several
    times is measured at the first of them, and counts once.

    Args:
        loss_fn: ``loss_fn(module, batch)`` returning a scalar, ``module`` being the ``LightningModule``.
        log: send each record's numbers to the trainer's loggers too, as ``curvature/defect_median`` and so on. On an
            accelerator each measurement then waits to be read.
        options: all others of :class:`grokcurv.CurvatureMonitor`.

    Raises:
        ValueError: from ``fit``: several processes, several optimisers, accumulated gradients without a sampler, or
            neither a sampler nor :meth:`lookahead`; and what the monitor raises.
    """

    def __init__(self, loss_fn: LossFn, *, log: bool = True, **options: Any) -> None:
        self._loss_fn, self._log, self._options = loss_fn, log, options
        self._monitor: CurvatureMonitor | None = None
        self._state: Mapping[str, Any] | None = None  # from a checkpoint, until there is a monitor
        self._following: deque[Any] = deque()  # what comes after each batch that was fetched and not yet trained on
        self._pair: tuple[Any, Any] = (None, None)
        self._stepped = False  # since the optimiser was last asked to step: closures may be called again
        self._has_gradient = False  # since the batch came: training_step may have returned None
        self._watch: Any = None  # of the optimiser's steps

    @property
    def monitor(self) -> CurvatureMonitor:
        """The monitor.

        Raises:
            RuntimeError: before ``fit``, which makes it.
        """
        if self._monitor is None:
            raise RuntimeError("there is no monitor yet: fit makes it, when the model is where it will be trained")
        return self._monitor

    def lookahead(self, loader: Iterable[Any]) -> Iterable[Any]:
        """Wrap a training loader, to measure each batch against the next: the same batches, each fetched one ahead.

        Give it to ``trainer.fit`` in the loader's place.
        """
        return _Lookahead(self, loader)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the monitor, unless this fit goes on with the model of the last one."""
        if trainer.world_size > 1:
            raise ValueError(f"the callback measures in one process, this trainer has {trainer.world_size}")
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"the callback steps with the one optimiser, this trainer has {len(trainer.optimizers)}: "
                "call CurvatureMonitor.step in training_step instead"
            )
        self._forget_optimizer()
        self._watch = trainer.optimizers[0].register_step_pre_hook(self._expect_step)
        if self._monitor is not None and self._monitor.probe.gradients.model is pl_module:
            return  # a second fit goes on
        options = dict(self._options)
        if self._log:
            options["loggers"] = [*options.get("loggers", ()), CallableLogger(partial(_log, trainer))]
        self._monitor = CurvatureMonitor(pl_module, _as_trained(self._loss_fn, trainer), **options)
        if self._state is not None:
            self._monitor.load_state_dict(self._state)
            self._state = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the batch, and the one that lookahead knows to follow."""
        following = self._following.popleft() if self._following else _UNKNOWN
        self._pair = batch, following
        self._stepped = self._has_gradient = False
        if self.monitor.sampler is None and self.monitor.due:
            self.monitor.memory.keep(batch)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that ``.grad`` is that of this batch: without a backward pass it would be that of an earlier one."""
        self._has_gradient = True

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Measure, once before each step of the optimiser."""
        if self._stepped:
            return
        self._stepped = True
        if self.monitor.sampler is not None:
            return self.monitor.step()
        if trainer.accumulate_grad_batches > 1:
            raise ValueError(
                f"accumulate_grad_batches={trainer.accumulate_grad_batches}: .grad is that of several batches; "
                "give the callback a sampler"
            )
        batch, following = self._pair
        if following is _UNKNOWN:
            raise ValueError("fit the trainer with callback.lookahead(loader), or give the callback a sampler")
        if following is not None:
            ready = partial(_transferred, trainer, pl_module)
            following = following.then(ready) if isinstance(following, Later) else Later(partial(ready, following))
        gradient = self.monitor.gradient if self._has_gradient else "own"
        with switched([self.monitor], "gradient", gradient):
            self.monitor.step(batch, following)

    def _expect_step(self, *_: Any) -> None:
        self._stepped = False

    def _forget_optimizer(self, *_: Any) -> None:
        """Take the hook off the optimiser of an earlier fit."""
        if self._watch is not None:
            self._watch.remove()
        self._watch = None

    on_fit_end = on_exception = _forget_optimizer

    def on_train_batch_end(self, *_: Any) -> None:
        self._pair = (None, None)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._monitor is None else self._monitor.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if self._monitor is not None:
            self._monitor.load_state_dict(state_dict)
        else:
            self._state = state_dict or None


_UNKNOWN = object()


class _Lookahead:
    def __init__(self, callback: CurvatureCallback, loader: Iterable[Any]) -> None:
        self._callback, self._loader = callback, loader

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]  # a loader without a length raises, as it should

    def __iter__(self) -> Iterator[Any]:
        # Lightning asks for an iterator to see whether there is one, but not a DataLoader, which draws a seed for it.
        if isinstance(self._loader, DataLoader) and sys._getframe(1).f_code.co_name == "_check_dataloader_iterable":
            return iter(())
        self._callback._following.clear()
        return self._batches(self._callback.monitor.lookahead(self._loader))

    def _batches(self, pairs: Iterator[tuple[Any, Any]]) -> Iterator[Any]:
        """Give batches to Lightning, and tell the callback which one follows each."""
        for batch, following in pairs:
            if batch is not None:  # Lightning leaves such a batch out, and tells no callback
                self._callback._following.append(following)
            yield batch

    @property
    def sampler(self) -> Any:
        """The loader's, which Lightning tells the epoch."""
        return getattr(self._loader, "sampler", None)

    @property
    def batch_sampler(self) -> Any:
        """The loader's, which Lightning tells the epoch."""
        return getattr(self._loader, "batch_sampler", None)


def _as_trained(loss_fn: LossFn, trainer: Trainer) -> LossFn:
    """The loss, with new tensors of the module's type where the precision plugin gives it those in training."""
    if type(trainer.precision_plugin).tensor_init_context is Precision.tensor_init_context:
        return loss_fn
    return partial(_in_its_type, loss_fn)  # through a partial, a snapshot finds what the loss holds


def _in_its_type(loss_fn: LossFn, module: nn.Module, batch: Any) -> Tensor:
    """The loss, with the module's dtype as torch's default one, as Lightning trains it."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(next(module.parameters()).dtype)
    try:
        return loss_fn(module, batch)
    finally:
        torch.set_default_dtype(usual)


def _transferred(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    """The batch as training will get it, from the trainer's own steps, which then find everything as it was.

    Generators are put back, those of the module too, and its attributes, buffers and the batch. None if the batch
    cannot be copied.
    """
    batch = copied(batch)
    if batch is None:
        return None
    snapshot = Snapshot([module, trainer.datamodule], apart=module.parameters())
    small = [x for x in snapshot.tensors if x.numel() <= LARGE and type(x) in (Tensor, nn.Buffer)]
    visible = streams(module.device)
    before = visible.positions()
    try:
        with standing_in(small, stand_ins(small)):
            batch = trainer.precision_plugin.convert_input(batch)
            batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
            return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    finally:
        snapshot.restore()
        snapshot.restore_generators()
        visible.move_to(before)


def _log(trainer: Trainer, record: dict[str, object], step: int) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(scalars(record), step=step)
