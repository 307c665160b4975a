"""From the folder of a run or a sweep to ``report.html`` and ``figures/*.png`` in it."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from os.path import lexists
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from grokcurv.report import figures, sweep_figures
from grokcurv.report.beside import Beside
from grokcurv.report.format import number
from grokcurv.report.measures import Figured, figured
from grokcurv.report.summary import Summary
from grokcurv.report.sweep_summary import BesideSummary, SweepSummary
from grokcurv.runs import Run, open_run
from grokcurv.storage import RunError, make_folder, write_atomically
from grokcurv.sweep import Sweep, open_sweep
from grokcurv.training.run import GROKKED


@dataclass(frozen=True)
class Drawing:
    """A figure of the page: its name, its alternative text, a PNG file, and as SVG in two themes, wide and narrow."""

    name: str
    alt: str
    png: bytes
    light: bytes
    dark: bytes
    narrow_light: bytes
    narrow_dark: bytes


def write_report(
    source: Run | Sweep | str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] | None = None,
) -> Path:
    """Write ``report.html`` and ``figures/*.png`` into the folder of a run or a sweep; returns the page's path.

    Older ones are replaced. The page needs no other file and no network; a sweep's links to the reports of its runs
    that have one. What is unfinished, or without curvature, is reported as far as it goes, and the page says what is
    missing.

    Args:
        source: the run, the sweep, or its folder; or the folders of several runs, which are set beside each other.
        out: another folder to write into, such as where the source's may only be read; made if missing. Runs beside
            each other need one.

    Raises:
        RunError: neither there, damaged files, a disk that refuses, or a link where the page or a figure should be.
        ValueError: a run that was kept in memory alone; several folders without ``out``.
    """
    if isinstance(source, Sequence) and not isinstance(source, str):
        if out is None:
            raise ValueError("runs beside each other need out, the folder for their page")
        beside = BesideSummary(Beside(source, Path(out)))
        return write_page(Path(out), "sweep.html", beside, list(draw_sweep(beside)))
    if isinstance(source, str | os.PathLike):
        folder = Path(source)
        if not any(lexists(folder / name) for name in ("config.json", "sweep.json")):
            raise RunError(f"{folder} holds neither a run nor a sweep: there is no config.json or sweep.json in it")
        source = open_sweep(folder) if lexists(folder / "sweep.json") else open_run(folder)
    if source.path is None:
        raise ValueError("run was kept in memory alone: a report is written into a run's folder, and it has none")
    folder = source.path if out is None else Path(out)
    if isinstance(source, Run):
        summary = Summary(source)
        return write_page(folder, "page.html", summary, list(draw(summary)))
    sweep = SweepSummary(source, folder)
    return write_page(folder, "sweep.html", sweep, list(draw_sweep(sweep)))


def write_page(folder: Path, template: str, summary: Any, drawings: list[Drawing]) -> Path:
    """Write ``report.html``, made of a template of this package, and the figures; the page's path."""
    make_folder(folder, parents=True)
    pictures = make_folder(folder / "figures")
    for drawing in drawings:
        write_atomically(pictures / f"{drawing.name}.png", drawing.png)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = lambda svg: "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
    # A page may run this script and no other, by its digest.
    environment.filters["integrity"] = lambda text: (
        "sha256-" + base64.b64encode(sha256(text.encode()).digest()).decode()
    )
    script = Markup(Path(__file__).with_name("table.js").read_text(encoding="utf-8"))
    html = environment.get_template(template).render(summary=summary, drawings=drawings, script=script)
    write_atomically(page := folder / "report.html", html.encode())
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
        yield draw_all(
            "grokking",
            alt,
            lambda theme: figures.grokking(metrics, curvature, theme, onset=summary.onset, grok=summary.grok),
        )
    if summary.has_pca:
        last = pca.dropna(subset="pc1_percent").groupby("matrix")["pc1_percent"].last()
        alt = f"Shares over the steps, one line a matrix; at the end from {last.min():.0f} to {last.max():.0f} %."
        yield draw_all("pc1", alt, lambda theme: figures.pc1(pca, theme))
    if summary.has_geometry:
        last = curvature.dropna(subset=["rho", "exec_random_ratio", "exec_matched_ratio"]).iloc[-1]
        alt = (
            f"Over the steps; at the last, {last['exec_random_ratio']:.2f} times chance among all parameters, "
            f"{last['exec_matched_ratio']:.2f} times chance in the support, and rho is {last['rho']:.4f}."
        )
        yield draw_all("geometry", alt, lambda theme: figures.geometry(curvature, theme))
    for name, measure in figured(curvature):
        yield draw_all(name, _said(measure, curvature), partial(figures.panels_of, curvature, measure.panels))
    if summary.has_fourier:
        alt = "Over the steps, above, accuracy; below, the share of energy on a few frequencies, at the end"
        shares = {"embedding": "fourier_embedding", "logits": "fourier_logits"}
        ends = {name: metrics[column].dropna() for name, column in shares.items() if column in metrics}
        alt += " and ".join(f" {values.iloc[-1]:.0%} of the {name}" for name, values in ends.items() if len(values))
        yield draw_all("fourier", f"{alt}.", lambda theme: figures.fourier(metrics, theme, grok=summary.grok))
    if not metrics.empty:
        first, last = metrics["train_loss"].iloc[[0, -1]]
        alt = f"On logarithmic axes over the steps; the training loss goes from {number(first)} to {number(last)}."
        yield draw_all("dynamics", alt, lambda theme: figures.dynamics(metrics, curvature, theme))


def _said(measure: Figured, curvature: pd.DataFrame) -> str:
    """The figure of a measure in words: where each line ends."""
    columns = {column: label for panel in measure.panels for column, label in panel.columns.items()}
    known = {label: curvature[column].dropna() for column, label in columns.items() if column in curvature}
    ends = [f"{label} {number(values.iloc[-1])}" for label, values in known.items() if len(values)]
    return f"Over the steps; at the end {', '.join(ends)}."


def draw_sweep(summary: SweepSummary) -> Iterator[Drawing]:
    """The figures of a sweep for which there is data."""
    settings, results, fields = summary.settings, summary.grouped, summary.fields
    if fields and settings["finished"].any():
        said = [f"{name.lower()} {value}, {remark}" for name, value, remark in summary.key_numbers]
        alt = f"By {' and '.join(fields)}; the numbers are in the table below. Over all runs: {'; '.join(said)}."
        yield draw_all("phase", alt, lambda theme: sweep_figures.phase(settings, results, fields, theme))
    # A table in which nothing can be drawn counts as empty.
    metrics = summary.metrics if results["test_acc"].notna().any() else summary.metrics.iloc[:0]
    curvature = summary.curvature if (results["max_defect"] > 0).any() else summary.curvature.iloc[:0]
    if not (metrics.empty and curvature.empty):
        names = ["test accuracy"] * (not metrics.empty) + ["defect"] * (not curvature.empty)
        alt = f"One line a run: {' above, '.join(names)}{' below' * (len(names) == 2)}, over the training steps."
        yield draw_all(
            "trajectories",
            alt,
            lambda theme: sweep_figures.trajectories(
                results.assign(run=results.index), metrics, curvature, summary.lines, theme, together=not fields
            ),
        )
    for name, found in summary.signals.items():
        best = found.table[~found.table["reference"].astype(bool)].iloc[0]
        alt = (
            f"By column of the measurements, the AUROC and the leads; the numbers are in the table below. Highest: "
            f"{best['column']} with {best['auroc']:.2f}."
        )
        yield draw_all(name, alt, partial(sweep_figures.signals, found))


def draw_all(name: str, alt: str, draw: Callable[[figures.Theme], Figure]) -> Drawing:
    """A figure in both themes and widths."""
    drawn, png = [], b""
    for width in (figures.WIDE, figures.NARROW):
        for theme in (figures.LIGHT, figures.DARK):
            with figures.style(theme, width):
                figure = draw(theme)
                drawn.append(figures.saved(figure, theme, "svg"))
                png = png or figures.saved(figure, theme, "png")
    return Drawing(name, alt, png, *drawn)
