"""What evaluations in float64 have found of the rounding errors of a pair's vectors, and of which pairs it speaks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grokcurv.device_buffer import capturing, is_asynchronous
from grokcurv.gradients import GradientEngine
from grokcurv.pairs import Pair, Pairs, Sums, in_quadrature, rows_of
from grokcurv.state import Snapshot

GIVEN = "given"
"""Where :attr:`CommutatorProbe.errors` has (R, 3) the distance of a given gradient from that in float64, the greatest
such distance of the probe's own evaluations beside it, and the first gradient's length."""

STALE_MARGIN = 4.0
"""How many times larger an error may be than those of the latest check, in a pair that is not checked itself."""

SATURATED = 0.02
"""Relative error of an evaluation from which on float64's own rounding is looked at: digits may be lost there too."""

FAINT = 1e-9
"""Length of a gradient below which the same is done: where everything is saturated, both precisions may agree on it."""

MOVED = 0.5
"""A check is too old when the parameters have moved by this share of their length since."""

CHANGED = 10.0
"""Or when the length of a gradient has changed by this factor."""

GROWN = 3.0
"""Or when what is in the batches has grown by this one, below :data:`STALE_MARGIN`: a sum errs as what is summed."""

ALARM = 8.0
"""A gradient that is given is looked at when the change from it exceeds, or is below, that of the other batch's by this
factor. Honest training was seen to span 0.4 to 2.2."""

FEW = 16
"""Tensors of fewer integers name things more often than they measure them, and are not looked at for that."""

SAMPLED = 1 << 12
"""From about so many coordinates it is seen how far the parameters have moved."""

SAMPLES = 4
"""How often float64's own rounding is sampled where gradients are faint, of which the worst counts: there it may come
from a single number beside one, such as the probability of one answer, which a sample can leave as it is."""

SampleNoise = Callable[[Pairs, Tensor, int], Tensor]
"""(4,) of one pair how far its evaluations in float64 move when their rounding errors are made larger at random; given
(4,) what its vectors have lost in rounding, and how often to try."""


class Origin(NamedTuple):
    """Where a check was made."""

    lengths: list[float]
    """Of the two gradients."""
    place: Tensor
    """(S,) float64: some coordinates of theta."""
    magnitudes: list[float]
    """Of what is in the batches."""


class Checks:
    """The errors that the latest check of each run has found, by the form it was made for, and where.

    Attributes:
        errors: (R, 2, 2) the greatest absolute and relative error of the two gradients at theta, and of the two other
            vectors; and ``errors["given"]`` (:data:`GIVEN`).
        origins: where they were found, by the run.
    """

    def __init__(self, engine: GradientEngine) -> None:
        self.engine = engine
        self.errors: dict[str, Tensor] = {}
        self.origins: dict[str, dict[int, Origin]] = {}

    def state_dict(self, run: int = 0) -> dict[str, Any]:
        """What the latest checks of a run have found, and where."""
        errors = {form: found[run].clone() for form, found in self.errors.items()}
        origins = {form: tuple(places[run]) for form, places in self.origins.items() if run in places}
        return {"errors": errors, "origins": origins}

    def load_state_dict(self, state: Mapping[str, Any], run: int = 0) -> None:
        """Restore :meth:`state_dict`."""
        for form, found in state["errors"].items():
            self._write(self.errors, form, (run,), found[None].to(self.engine.device))
        for form, origin in state["origins"].items():
            if len(origin) == 2:  # of an older version: lengths and place in one
                origin = origin[0][:2].tolist(), origin[0][2:], origin[1]
            self.origins.setdefault(form, {})[run] = Origin(*origin)

    def learn(
        self,
        pairs: Pairs,
        found: Tensor,
        check: bool,
        exactly: bool,
        keep: bool,
        sample_noise: SampleNoise,
    ) -> Tensor:
        """(4, N) the sizes of the errors of pairs that were evaluated in float64; for later pairs, those of their own.

        An evaluation in float64 errs less than one in the model's precision by the ratio of the roundoffs, unless both
        have lost all digits of something: where float32 has lost most of them, and where there is nothing to compare
        with, float64's own error is sampled. ``keep``: the vectors stay what they are in the model's precision.
        """
        engine = self.engine
        distance, length, lost = found.unbind(-1)
        if exactly and not check:
            return in_quadrature(torch.stack([lost, self.expected(pairs)]))
        wide = engine.dtype == torch.float64
        # float64 errs less than float32 by the ratio of the roundoffs, provided that both lose digits alike. Where
        # float32 has lost most of them (saturated logits), or gradients are so small that both may have underflowed
        # alike, the ratio says nothing, and float64's own rounding is sampled instead.
        faint = length < FAINT
        if exactly or wide:  # nothing was there to be held against
            faint = engine.partition.norms(pairs.work) < FAINT
        else:
            faint |= distance > SATURATED * length
        own = distance * (torch.finfo(torch.float64).eps / torch.finfo(engine.dtype).eps)
        # On an accelerator nobody looks at the numbers to decide: where a sample would be needed the error counts as
        # large as the vector, and the row is NaN.
        if is_asynchronous(engine.device):
            own = torch.where(faint, length, own)
            sampled = exactly and check and not capturing(engine.device) and engine.place.has_data
            often = [int(sampled)] * len(pairs)
        else:
            sampled = (exactly and check) or wide or pairs.form == "bracket"
            often = [SAMPLES if one else int(sampled) for one in faint.any(0).tolist()]
        for v, times in enumerate(often):
            if times:
                own[:, v] = sample_noise(pairs.part(v, v + 1), lost[:, v], times)
        errors = distance if keep else torch.maximum(lost, own)
        if exactly or (wide and all(often)):
            distance = torch.maximum(distance, errors) if wide else errors
            length = engine.partition.norms(pairs.work)
        relative = (distance / length).nan_to_num(nan=math.inf)
        self._remember(pairs, torch.stack([distance, relative], -1).view(2, 2, -1, 2).amax(1))
        return errors

    def expected(self, pairs: Pairs) -> Tensor:
        """(4, N) errors as large as any that the latest check has found, absolute or relative, and then some."""
        if pairs.form not in self.errors:
            return pairs.unknown(math.inf)
        # Late in training gradients shrink and absolute errors with them; early they grow, and errors in proportion.
        # The larger of the two predictions covers both ways, and the margin what lies between two checks.
        absolute, relative = rows_of(self.errors[pairs.form], pairs.runs).permute(2, 1, 0)[:, :, None, None]
        lengths = self.engine.partition.norms(pairs.work).view(2, 2, -1, len(pairs.runs))
        return STALE_MARGIN * torch.maximum(absolute, relative * lengths).view(4, -1)

    def compare_given(self, pairs: Pairs, found: Tensor) -> None:
        """Note how far a gradient that was given is from float64, and how far the probe's own evaluations are."""
        distance, length, _ = found.unbind(-1)
        # Where one was given, the fourth was taken along it, and errs with it.
        given, own = distance[: pairs.given].amax(0), distance[pairs.given : pairs.given + 2].amax(0)
        found = torch.stack([given, own, length[0]], 1)[: len(pairs.runs)]
        self._write(self.errors, GIVEN, pairs.runs, found)

    def _remember(self, pairs: Pairs, found: Tensor) -> None:
        """Keep what a check has found, (2, N, 2), and of where it is true."""
        self._write(self.errors, pairs.form, pairs.runs, found.transpose(0, 1)[: len(pairs.runs)])
        if not is_asynchronous(self.engine.device):
            places, lengths = self._whereabouts(pairs), self.engine.partition.norms(pairs.work[:2]).T.tolist()
            origins = self.origins.setdefault(pairs.form, {})
            for v, run in enumerate(pairs.runs):
                sizes = [] if self.engine.shared else self._magnitudes(pairs.pair(v))
                origins[run] = Origin(lengths[v], places[v], sizes)

    def _write(self, table: dict[str, Tensor], name: str, runs: tuple[int, ...], rows: Tensor) -> None:
        """Rows of some runs, where a captured measurement finds them again."""
        if name not in table:
            table[name] = rows.new_full((self.engine.runs, *rows.shape[1:]), math.nan)
        if len(runs) == len(table[name]):
            table[name].copy_(rows)
        else:
            for run, row in zip(runs, rows, strict=True):
                table[name][run] = row

    def _whereabouts(self, pairs: Pairs) -> Tensor:
        """(R, S) float64: some thousand coordinates of theta, equally spaced."""
        thetas = self.engine.thetas(pairs.runs, pairs.theta)
        return thetas[:, :: max(1, thetas.shape[1] // SAMPLED)].to(torch.float64)

    def doubtful(self, pairs: Pairs, sums: Sums, defect: Tensor, reliable: Tensor) -> list[bool]:
        """For each pair, whether the latest check is not enough for it. On an accelerator nobody waits to see."""
        if is_asynchronous(self.engine.device):
            return [False] * len(pairs)
        table = torch.stack([defect, reliable, *sums.lengths[:2], *sums.lengths[4:6]], 1).tolist()
        origins = self.origins.get(pairs.form, {})
        moved = [True] * len(pairs.runs)
        if all(run in origins for run in pairs.runs):
            there = torch.stack([origins[run].place for run in pairs.runs])
            ways = torch.stack([self._whereabouts(pairs) - there, there])
            moved = [way > MOVED * length for way, length in self.engine.partition.norms(ways).T.tolist()]
        return [self._doubt(pairs, v, row, moved[v % len(moved)]) for v, row in enumerate(table)]

    def _doubt(self, pairs: Pairs, v: int, row: Sequence[float], moved: bool) -> bool:
        """Whether a pair, of the lengths and changes in its row, is one that the latest check does not speak of."""
        # From the cheapest question to the dearest; the first that is answered with doubt ends it. A row that is not a
        # number, or without gradients, is not made better by float64.
        defect, reliable, n_a, n_b, change_a, change_b = row
        if not (math.isfinite(defect) and n_a * n_b > 0):
            return False
        origin = self.origins.get(pairs.form, {}).get(pairs.runs[v % len(pairs.runs)])
        if not reliable or origin is None:
            return True
        if pairs.given and v < len(pairs.runs) and not _within(ALARM, change_a, change_b):
            return True
        # A check speaks of where it was made: of gradients of that length, of parameters near those, of batches of that
        # magnitude. Ranks must decide alike, or one of them would wait for the others' evaluation for ever.
        if moved or not all(map(partial(_within, CHANGED), (n_a, n_b), origin.lengths)):
            return True
        if self.engine.shared:  # batches of names
            return False
        now = zip_longest(self._magnitudes(pairs.pair(v)), origin.magnitudes, fillvalue=0.0)
        return self.engine.anywhere(any(size > GROWN * then for size, then in now))

    def _magnitudes(self, pair: Pair) -> list[float]:
        """Root mean squares of the tensors in two batches, in their order; the greater of the two."""
        both = (_root_mean_squares(batch, self.engine.place.bring) for batch in pair)
        return [max(sizes) for sizes in zip_longest(*both, fillvalue=0.0)]

    def keep(self, runs: list[int]) -> None:
        """Go on with these runs alone, renumbered in this order."""
        self.errors = {form: found[runs] for form, found in self.errors.items()}
        self.origins = {
            form: {new: places[old] for new, old in enumerate(runs) if old in places}
            for form, places in self.origins.items()
        }


def _within(factor: float, x: float, y: float) -> bool:
    """Whether two positive numbers differ by no more than a factor; false for what is none."""
    return x > 0 and y > 0 and 1 / factor <= x / y <= factor


def _root_mean_squares(batch: Any, bring: Callable[[Tensor], Tensor]) -> Iterator[float]:
    """Of each tensor in a batch; zero where numbers are names, or not laid out one after another.

    ``bring`` takes it to where there is float64.
    """
    for tensor in Snapshot([batch]).tensors:
        least = 1 if tensor.is_floating_point() or tensor.is_complex() else FEW
        if tensor.is_nested or tensor.layout != torch.strided or tensor.dtype == torch.bool or tensor.numel() < least:
            yield 0.0
            continue
        values = (tensor.detach().abs() if tensor.is_complex() else tensor.detach()).to(torch.float32)
        size = float(torch.linalg.vector_norm(bring(values), dtype=torch.float64)) / math.sqrt(tensor.numel())
        yield size if math.isfinite(size) else math.inf
