"""What a claim's runs come to: numbers in three ways, what the claim's rule says of them, and what a reader is told."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from matplotlib.figure import Figure

from grokcurv.report.figures import Theme
from grokcurv.report.format import number as short
from grokcurv.reproduce.published import Number
from grokcurv.reproduce.rules import RULES, SENTENCES, WORDS


class Here(NamedTuple):
    """A number of ours, twice."""

    arithmetic: Number
    """What the published arithmetic gives."""
    trustworthy: Number


@dataclass(frozen=True)
class Finding:
    """A number in three ways; where no commutator enters, both of ours are one."""

    quantity: str
    here: Here
    published: Number = Number()  # noqa: RUF009 - immutable
    decimals: int | None = None
    """In print; three significant digits if None."""

    @property
    def numbers(self) -> tuple[Number, Number, Number]:
        """Published, published arithmetic, trustworthy."""
        return self.published, *self.here


@dataclass(frozen=True)
class Judgement:
    """What a claim's function comes to; nothing where no run has been done."""

    holds: tuple[bool | None, bool | None] = (None, None)
    """What the rule says in the published arithmetic, and in trustworthy arithmetic; None if it cannot tell."""
    findings: tuple[Finding, ...] = ()
    """The first is what the rule speaks of."""
    draw: Callable[[Theme], Figure] | None = None
    remarks: tuple[str, ...] = ()
    """What else a reader has to know, a sentence each."""
    runs: int = 0
    """How many the figure's words speak of, if they do."""


@dataclass(frozen=True, kw_only=True)
class Answer(Judgement):
    """What became of a claim."""

    claim: str
    verdict: str
    settings: Mapping[str, str]
    """By set, its runs in words."""

    @property
    def sentence(self) -> str:
        return SENTENCES[self.claim]

    @property
    def rule(self) -> str:
        return RULES[self.claim]

    @property
    def caption(self) -> str:
        return str(WORDS[self.claim]["caption"])

    @property
    def alt(self) -> str:
        """The figure in words, with the number that the rule speaks of; '' where there is none."""
        if not self.findings:
            return ""
        first = self.findings[0]
        numbers = {name: say(number, first.decimals) for name, number in first.here._asdict().items()}
        return str(WORDS[self.claim]["alt"]).format(**numbers, quantity=first.quantity, runs=self.runs)


def say(number: Number, decimals: int | None = None) -> str:
    """A number in words: 71.2 (68.1 to 75.0); the range alone where there is no middle; 'none'."""

    def one(value: float) -> str:
        return short(value) if decimals is None else f"{value:,.{decimals}f}"

    interval = f"{one(number.low)} to {one(number.high)}" if math.isfinite(number.low + number.high) else ""
    if not math.isfinite(number.value):
        return interval or "none"
    return one(number.value) + (f" ({interval})" if interval and number.low < number.high else "")
