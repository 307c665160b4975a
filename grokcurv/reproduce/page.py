"""The page of a reproduction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grokcurv.report.format import duration
from grokcurv.report.page import draw_twice, write_page
from grokcurv.reproduce.findings import Answer, say
from grokcurv.reproduce.published import SOURCE


class ReproductionSummary:
    """The words and numbers of the page.

    Attributes:
        answers: of the claims, in order.
        costs: seconds that a claim which was not run would take, by claim.
    """

    title = "The claims, measured again"

    def __init__(
        self, profile: str, answers: Sequence[Answer], costs: Mapping[str, float], environment: Mapping[str, Any]
    ) -> None:
        self.profile, self.answers, self.costs, self.environment = profile, tuple(answers), costs, environment

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
        return [
            [finding.quantity, *(say(number, finding.decimals) for number in finding.numbers)]
            for finding in answer.findings
        ]

    def cost(self, answer: Answer) -> str:
        """What running it would take; '' where that is not known or not needed."""
        seconds = self.costs.get(answer.claim)
        return "" if seconds is None else duration(seconds)

    @property
    def facts(self) -> list[tuple[str, Mapping[str, Any]]]:
        """Where the page was written."""
        plain = {name: value for name, value in self.environment.items() if not isinstance(value, Mapping)}
        return [("Environment", {**plain, **self.environment.get("packages", {})})]


def write(folder: Path, summary: ReproductionSummary) -> Path:
    """Write ``report.html`` and ``figures/*.png`` into ``folder``; the page's path."""
    drawings = [draw_twice(one.claim, one.alt, one.draw) for one in summary.answers if one.draw is not None]
    return write_page(folder, "reproduction.html", summary, drawings)
