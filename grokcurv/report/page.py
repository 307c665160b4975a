"""From a run folder to ``report.html`` and ``figures/*.png``."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from grokcurv.report import figures
from grokcurv.report.summary import GROKKED, Summary, number
from grokcurv.runs import Run, open_run, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Drawing:
    """A figure of the page: its name, its alternative text, and the PNG files of the two themes."""

    name: str
    alt: str
    light: bytes
    dark: bytes


def write_report(run: Run | str | os.PathLike[str]) -> Path:
    """Write ``report.html`` and ``figures/*.png`` into the run's folder, over older ones; returns the page's path.

    The page needs no other file and no network. An unfinished run, or one without curvature, is reported as far as
    it goes, and the page says what is missing.

    Raises:
        RunError: no run there, a damaged one, or a disk that refuses.
        ValueError: a run that was kept in memory alone.
    """
    if not isinstance(run, Run):
        run = open_run(run)
    if run.path is None:
        raise ValueError("run was kept in memory alone: a report is written into a run's folder, and it has none")
    summary = Summary(run)
    drawings = list(draw(summary))
    folder = run.path / "figures"
    folder.mkdir(exist_ok=True)
    for drawing in drawings:
        write_atomically(folder / f"{drawing.name}.png", drawing.light)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = lambda png: "data:image/png;base64," + base64.b64encode(png).decode()
    page = run.path / "report.html"
    write_atomically(page, environment.get_template("page.html").render(run=summary, drawings=drawings).encode())
    return page


def draw(summary: Summary) -> Iterator[Drawing]:
    """The figures for which there is data."""
    metrics, curvature, pca = summary.metrics, summary.curvature, summary.pca
    if not (metrics.empty and curvature.empty):
        alt = f"Over {summary.last_step:,} steps. "
        if not metrics.empty:
            passes = f"passes {GROKKED:.0%} at step {summary.grok:,}" if summary.grok is not None else "stays low"
            alt += f"Above, accuracy: that on the test set {passes}. "
        if len(summary.defects):
            first, last = summary.defects["defect_median"].iloc[[0, -1]]
            onset = f", with its onset at step {summary.onset:,}" if summary.onset is not None else ""
            alt += f"Below, on a logarithmic axis, the defect: from {number(first)} to {number(last)}{onset}."
        yield _drawing(
            "grokking",
            alt,
            lambda theme: figures.grokking(metrics, curvature, theme, onset=summary.onset, grok=summary.grok),
        )
    if summary.has_pca:
        last = pca.dropna(subset="pc1_percent").groupby("matrix")["pc1_percent"].last()
        alt = f"Shares over the steps, one line a matrix; at the end from {last.min():.0f} to {last.max():.0f} %."
        yield _drawing("pc1", alt, lambda theme: figures.pc1(pca, theme))
    if summary.has_geometry:
        last = curvature.dropna(subset=["rho", "exec_random_ratio", "exec_matched_ratio"]).iloc[-1]
        alt = (
            f"Over the steps; at the last, {last['exec_random_ratio']:.2f} times chance among all parameters, "
            f"{last['exec_matched_ratio']:.2f} times chance in the support, and rho is {last['rho']:.4f}."
        )
        yield _drawing("geometry", alt, lambda theme: figures.geometry(curvature, theme))
    if not metrics.empty:
        first, last = metrics["train_loss"].iloc[[0, -1]]
        alt = f"On logarithmic axes over the steps; the training loss goes from {number(first)} to {number(last)}."
        yield _drawing("dynamics", alt, lambda theme: figures.dynamics(metrics, curvature, theme))


def _drawing(name: str, alt: str, draw: Callable[[figures.Theme], Figure]) -> Drawing:
    pictures = []
    for theme in (figures.LIGHT, figures.DARK):
        with figures.style(theme):
            pictures.append(figures.png(draw(theme), theme))
    return Drawing(name, alt, *pictures)
