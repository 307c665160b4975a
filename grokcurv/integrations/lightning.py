"""Curvature of a model that PyTorch Lightning trains.

>>> from grokcurv.integrations.lightning import CurvatureCallback
>>> callback = CurvatureCallback(lambda module, batch: cross_entropy(module(batch[0]), batch[1]))
>>> Trainer(callbacks=[callback]).fit(module, callback.lookahead(loader))  # doctest: +SKIP
>>> callback.monitor.records()  # doctest: +SKIP
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from grokcurv.evaluation import LossFn
from grokcurv.loggers import scalars
from grokcurv.monitor import CurvatureMonitor

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError("this module needs PyTorch Lightning: pip install 'grokcurv[lightning]'") from error


class CurvatureCallback(Callback):
    """A :class:`grokcurv.CurvatureMonitor` that steps with the optimiser, before clipping, after unscaling.

    Without a ``sampler`` the pair is (this batch, next batch), and the loader given to ``fit`` must be
    :meth:`lookahead` of the real one. With accumulated gradients there must be a sampler.

    ``loss_fn`` is evaluated outside the precision plugin's autocast: with ``precision="bf16-mixed"`` the model trains
    in bfloat16 and is measured in float32. The monitor's state is part of Lightning's checkpoints.

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
        """The same batches; the callback learns of each next one."""
        return _Lookahead(self, loader)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            raise ValueError(f"the callback measures in one process, this trainer has {trainer.world_size}")
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"the callback steps with the one optimiser, this trainer has {len(trainer.optimizers)}: "
                "call CurvatureMonitor.step in training_step instead"
            )
        if self._monitor is not None and self._monitor.probe.gradients.model is pl_module:
            return  # a second fit goes on
        options = dict(self._options)
        if self._log:
            options["loggers"] = [*options.get("loggers", ()), _TrainerLoggers(trainer)]
        self._monitor = CurvatureMonitor(pl_module, self._loss_fn, **options)
        if self._state is not None:
            self._monitor.load_state_dict(self._state)
            self._state = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        following = self._following.popleft() if self._following else _UNKNOWN
        if following is not _UNKNOWN and following is not None:
            following = trainer.strategy.batch_to_device(following)
        self._pair = batch, following

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
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
        self.monitor.step(batch, following)

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
        self._callback._following.clear()
        for batch, following in self._callback.monitor.lookahead(self._loader):
            self._callback._following.append(following)
            yield batch


class _TrainerLoggers:
    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def log(self, record: dict[str, object], /, *, step: int) -> None:
        for logger in self._trainer.loggers:
            logger.log_metrics(scalars(record), step=step)
