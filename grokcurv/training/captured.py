"""Steps on a device, launched again as CUDA graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import Any

from grokcurv.gradients import capture


class Launcher:
    """Carries out what a step does on the device: by the graph of an earlier one that did the same.

    What is launched for the first time is launched operator by operator, which loads what a capture cannot; the second
    time it is captured, and from then on replayed. It must find all that differs from step to step in the memory in
    which it was when it was captured, and what it returns is overwritten by the next replay.

    Args:
        captures: whether graphs are made at all; never on a CPU.
    """

    def __init__(self, captures: bool) -> None:
        self._captures = captures
        self.forget()

    def forget(self) -> None:
        """Capture anew: memory has moved, or runs have left."""
        self._met: set[Hashable] = set()
        self._graphs: dict[Hashable, tuple[Callable[[], None], Any] | None] = {}
        self._pool: Any = None  # of memory that all graphs share: they are replayed one after another

    def __call__(self, kind: Hashable, launch: Callable[[], Any]) -> Any:
        """What ``launch`` returns; launches of one kind do the same."""
        if not self._captures:
            return launch()
        if kind not in self._met:
            self._met.add(kind)
            return launch()
        if kind not in self._graphs:
            self._graphs[kind] = self._captured(launch)
        graph = self._graphs[kind]
        if graph is None:
            return launch()
        replay, result = graph
        replay()
        return result

    def _captured(self, launch: Callable[[], Any]) -> tuple[Callable[[], None], Any] | None:
        """A graph of what is launched, and what that returned; None of what no graph holds."""
        found: list[Any] = []
        try:
            replay, self._pool = capture(lambda: found.append(launch()), self._pool)
        except RuntimeError as error:
            warnings.warn(f"a step is launched operator by operator: no graph holds it ({error})", stacklevel=4)
            return None
        return replay, found[0]
