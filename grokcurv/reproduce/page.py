"""What became of the claims: as tables, for the terminal, and as a page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table

from grokcurv.report.format import duration
from grokcurv.report.page import draw_all, write_page
from grokcurv.report.summary import flat
from grokcurv.reproduce.findings import Answer, say
from grokcurv.reproduce.published import SOURCE

NUMBERS = (
    *("published", "published_low", "published_high"),
    *("published_arithmetic", "published_arithmetic_low", "published_arithmetic_high"),
    *("trustworthy", "low", "high"),
)
"""Columns of a finding's numbers, each with the ends of its interval."""


@dataclass(frozen=True)
class Reproduction:
    """What became of the claims.

    Attributes:
        path: the folder.
        profile: the name of the plan.
        answers: of the claims, in order.
        costs: seconds that the runs of a claim which are not done would take, by claim.
        environment: where the page was written.
        failed: why runs failed, by id.
        runs: what each run came to, see :func:`grokcurv.reproduce.table.table_of`.
        matrices: PC1 of each matrix, see :func:`grokcurv.reproduce.table.matrices_of`; empty unless ``pc1`` was judged.
    """

    path: Path
    profile: str
    answers: tuple[Answer, ...]
    costs: Mapping[str, float]
    environment: Mapping[str, Any]
    failed: Mapping[str, str]
    runs: pd.DataFrame = field(default_factory=pd.DataFrame, compare=False)
    matrices: pd.DataFrame = field(default_factory=pd.DataFrame, compare=False)

    title = "The claims, measured again"

    @property
    def page(self) -> Path:
        """``report.html`` in the folder."""
        return self.path / "report.html"

    @cached_property
    def _numbers(self) -> pd.DataFrame:
        """Every finding of every claim; a claim that has none has a row without one."""
        rows: list[dict[str, Any]] = []
        for one in self.answers:
            cost = self.costs.get(one.claim, math.nan) / 3600
            known = {"claim": one.claim, "verdict": one.verdict, "cost_hours": cost}
            for finding in one.findings:
                ends = chain(*((number.value, number.low, number.high) for number in finding.numbers))
                numbers = dict(zip(NUMBERS, ends, strict=True))
                rows.append({**known, "quantity": finding.quantity, **numbers, "runs": finding.here.trustworthy.count})
            if not one.findings:
                rows.append({**known, "quantity": "", "runs": 0})
        frame = pd.DataFrame(rows, columns=["claim", "quantity", *NUMBERS, "runs", "verdict", "cost_hours"])
        return frame.astype({"runs": int})

    @property
    def table(self) -> pd.DataFrame:
        """One row a claim.

        ``claim``; ``quantity``, what its rule speaks of; ``published``, ``published_arithmetic`` (what that gives here)
        and ``trustworthy``, each with ``_low`` and ``_high`` (for ``trustworthy`` plainly ``low`` and ``high``) and NaN
        where there is none; ``runs``, how many runs or measurements the last is made of; ``verdict``; ``cost_hours``, a
        timing: what runs of a claim that are not done would take here. The range is that over the runs unless the page
        says otherwise.
        """
        return self._numbers.drop_duplicates("claim", ignore_index=True)

    @property
    def findings(self) -> pd.DataFrame:
        """All the numbers of all claims, a row each, with the columns of the table; ``verdict`` is the claim's."""
        return self._numbers[self._numbers["quantity"] != ""].reset_index(drop=True)

    def verdicts(self) -> Table:
        """The table in print, for a terminal."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("claim", "published", "published arithmetic", "trustworthy", "verdict"):
            table.add_column(name)
        for one in self.answers:
            table.add_row(one.claim, *next(iter(self.cells(one)), [""] * 4)[1:], one.verdict)
        return table

    @property
    def subtitle(self) -> list[str]:
        return [SOURCE, f"profile {self.profile}"]

    @property
    def missing(self) -> list[str]:
        """What is not there, a sentence each."""
        return [f"{answer.claim}: {answer.verdict}." for answer in self.answers if not answer.findings]

    @property
    def key_numbers(self) -> list[tuple[str, str, str]]:
        """Verdicts, and how many claims have each."""
        counts: dict[str, list[str]] = {}
        for answer in self.answers:
            counts.setdefault(answer.verdict, []).append(answer.claim)
        return [(words.capitalize(), str(len(claims)), ", ".join(claims)) for words, claims in counts.items()]

    def cells(self, answer: Answer) -> list[list[str]]:
        """A claim's findings in print: quantity, published, published arithmetic, trustworthy."""
        return [[one.quantity, *(say(number, one.decimals) for number in one.numbers)] for one in answer.findings]

    def cost(self, answer: Answer) -> str:
        """What running it would take; '' where that is not known or not needed."""
        seconds = self.costs.get(answer.claim)
        return "" if seconds is None else duration(seconds)

    @property
    def facts(self) -> list[tuple[str, Mapping[str, Any]]]:
        return [("Environment", dict(flat(self.environment)))]

    def write(self) -> None:
        """Write ``report.html`` and ``figures/*.png`` into the folder."""
        drawings = [draw_all(one.claim, one.alt, one.draw) for one in self.answers if one.draw is not None]
        write_page(self.path, "reproduction.html", self, drawings)
