"""Curvature of a model that the Trainer of Hugging Face's transformers trains.

>>> import torch
>>> from transformers import Trainer, TrainingArguments
>>> from grokcurv.integrations.huggingface import CurvatureCallback
>>> class Regression(torch.nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.body = torch.nn.Linear(3, 1)
...     def forward(self, x):
...         return {"loss": self.body(x).square().mean()}
>>> data = [{"x": torch.randn(3)} for _ in range(16)]
>>> sampler = lambda: ({"x": torch.randn(8, 3)}, {"x": torch.randn(8, 3)})
>>> callback = CurvatureCallback(lambda model, batch: model(**batch)["loss"], sampler, every=2)
>>> quiet = dict(save_strategy="no", report_to=[], disable_tqdm=True, log_level="error")
>>> arguments = TrainingArguments("runs/hf", max_steps=4, use_cpu=True, **quiet)
>>> output = Trainer(Regression(), arguments, train_dataset=data, callbacks=[callback]).train()  # doctest: +ELLIPSIS
{...}
>>> callback.monitor.records()["step"].tolist()
[0, 2]
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from grokcurv.commutator import Sampler
from grokcurv.evaluation import LossFn
from grokcurv.monitor import CurvatureMonitor
from grokcurv.storage import pack, unpack, write_atomically

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError("this module needs transformers: pip install 'grokcurv[huggingface]'") from error

FILE = "curvature.safetensors"
"""The monitor's state, in each checkpoint's folder."""


class CurvatureCallback(TrainerCallback):
    """A :class:`grokcurv.CurvatureMonitor` that steps with the optimiser.

    The Trainer shows its callbacks no batch, and ``.grad`` only clipped: the pairs come from ``sampler``. So gradient
    accumulation makes no difference. With ``bf16=True`` the Trainer puts the model's ``forward`` under autocast, and it
    is measured so: the noise floor says what is left, and the exact bracket takes over where it can.

    The monitor's state is saved in each checkpoint of the Trainer and found again by ``resume_from_checkpoint``, from
    a checkpoint of the same ``output_dir``. A second ``train`` of the same model goes on with the records. Where the
    sampler stands is for the caller to keep.

    Args:
        loss_fn: ``loss_fn(model, batch)`` returning a scalar, such as ``model(**batch).loss``.
        sampler: a function of no arguments that draws ``(batch_a, batch_b)``, on the model's device.
        options: all others of :class:`grokcurv.CurvatureMonitor`; ``loggers`` among them: those of the Trainer cannot
            be reached from a callback.

    Raises:
        ValueError: from ``train``: several processes; a checkpoint whose file of the monitor's state is damaged; and
            what the monitor raises.
    """

    def __init__(self, loss_fn: LossFn, sampler: Sampler, **options: Any) -> None:
        if not callable(sampler):
            raise TypeError(f"sampler must be a function that draws (batch_a, batch_b), got {type(sampler).__name__}")
        self._loss_fn, self._sampler, self._options = loss_fn, sampler, options
        self._monitor: CurvatureMonitor | None = None

    @property
    def monitor(self) -> CurvatureMonitor:
        """The monitor.

        Raises:
            RuntimeError: before ``train``, which makes it.
        """
        if self._monitor is None:
            raise RuntimeError("there is no monitor yet: train makes it, when the model is where it will be trained")
        return self._monitor

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        """Make the monitor, with the state that was saved beside the checkpoint if training goes on from one."""
        if args.world_size > 1:
            raise ValueError(f"the callback measures in one process, this training has {args.world_size}")
        known = self._monitor is not None and self._monitor.probe.gradients.model is model
        if known and state.global_step == 0:
            return  # a second train goes on
        self._monitor = CurvatureMonitor(model, self._loss_fn, sampler=self._sampler, **self._options)
        if state.global_step > 0:
            file = _file(args, state)
            if file.exists():
                self._monitor.load_state_dict(_unpacked(file))
            else:
                warnings.warn(
                    f"training goes on at step {state.global_step}, but there is no {file}: the records begin anew, "
                    "at step 0",
                    stacklevel=2,
                )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Measure before the optimiser's step."""
        self.monitor.step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the monitor's state beside the Trainer's checkpoint."""
        file = _file(args, state)
        if file.parent.is_dir():
            write_atomically(file, pack(self.monitor.state_dict()))


def _unpacked(file: Path) -> Any:
    """The monitor's state that :meth:`CurvatureCallback.on_save` wrote."""
    try:
        return unpack(file.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{file} is cut or damaged: {error}. Without that file training goes on, and the records begin anew"
        ) from error


def _file(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE
