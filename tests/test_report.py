"""The report: its numbers, figures and page, for whole runs and for runs that lack something."""

from __future__ import annotations

import base64
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import synthetic_run
import torch
from matplotlib.axes import Axes

from grokcurv.report import figures, write_report
from grokcurv.report.figures import DARK, LIGHT, NARROW, WIDE
from grokcurv.report.format import duration, number
from grokcurv.report.measures import FIGURED, figured
from grokcurv.report.summary import Summary
from grokcurv.runs import Run, RunError, RunWriter, open_run

pytestmark = pytest.mark.usefixtures("drawn_once")  # but for the whole page of the fixture
PNG = b"\x89PNG\r\n\x1a\n"


class Page(HTMLParser):
    """A page's text, and its elements as (tag, attributes)."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.source = path.read_text()
        self.feed(self.source)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data + " "

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = synthetic_run.write_run(tmp_path_factory.mktemp("runs") / "add")
    assert write_report(folder) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page(run / "report.html")


def test_figures_are_written_and_embedded(run: Path, page: Page) -> None:
    written = {path.stem: path.read_bytes() for path in (run / "figures").iterdir()}
    assert set(written) == {"grokking", "pc1", "geometry", "fourier", "dynamics"}
    assert all(data.startswith(PNG) for data in written.values())
    assert_pictures(page, 5)


def assert_pictures(page: Page, count: int) -> None:
    """Each is drawn in two themes and widths, as SVG that holds text as outlines, runs nothing and fetches nothing."""
    images, sources = page.of("img"), page.of("source")
    assert all(image["alt"] for image in images)
    addresses = [image["src"] for image in images] + [source["srcset"] for source in sources]
    assert len(addresses) == len(set(addresses)) == 4 * count
    assert [source["media"] for source in sources[:3]] == [
        "(max-width: 40rem) and (prefers-color-scheme: dark)",
        "(max-width: 40rem)",
        "(prefers-color-scheme: dark)",
    ]
    widths = []
    for address in addresses:
        assert address is not None
        head, _, data = address.partition(",")
        assert head == "data:image/svg+xml;base64"
        root = ElementTree.fromstring(base64.b64decode(data))
        widths.append(root.get("width"))
        for element in root.iter():
            assert element.tag.rpartition("}")[2] not in ("script", "text", "foreignObject", "a")
            links = [value for name, value in element.attrib.items() if name.endswith("href")]
            assert all(value.startswith(("#", "data:image/png")) for value in links)
    assert widths == ["576pt"] * count + ["342pt", "342pt", "576pt"] * count  # of 8 and 4.75 inches


@pytest.mark.parametrize("both", [False, True], ids=["y", "both"])
def test_logarithmic_axes_have_three_labelled_values(both: bool, generator: torch.Generator) -> None:
    """However little or much they span, wherever they lie."""
    for span in (1e-6, 1e-4, 0.01, 0.1, 0.3, 0.7, 1.0, 1.5, 2.0, 2.5, 3.0, 5.0, 11.0, 30.0):
        for middle in (40 * torch.rand(8, generator=generator) - 20).tolist():
            with figures.style(LIGHT):
                axes = figures.axes_at(figures.blank(3), (1, 1, 3, 1))
                figures.log_scale(axes, both)
                low, high = 10.0 ** (middle - span / 2), 10.0 ** (middle + span / 2)
                axes.set(xlim=(low, high), ylim=(low, high))
                for axis in (axes.xaxis, axes.yaxis) if both else (axes.yaxis,):
                    ticks = [float(value) for value in axis.get_majorticklocs()]
                    assert 3 <= len(ticks) <= 11
                    assert all(low * (1 - 1e-8) <= tick <= high * (1 + 1e-8) for tick in ticks)
                    assert ticks == sorted(set(ticks))
                    labels = axis.get_major_formatter().format_ticks(ticks)
                    assert len(set(labels)) == len(labels)
                    for label, tick in zip(labels, ticks, strict=True):
                        said = label.strip("$").replace(r" \times 10^{", "e").replace("10^{", "1e").rstrip("}")
                        assert abs(float(said) - tick) <= 0.02 * np.diff(ticks).min() + 1e-9 * tick


def test_what_nobody_could_zoom_into_is_a_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figure of a run of 20 000 records is far smaller than its lines would be."""
    rows = synthetic_run.curvature()
    dense = pd.concat([rows.assign(step=500 * rows["step"] + at) for at in range(500)]).sort_values("step")
    dense = dense.assign(defect_median=dense["defect_median"] * (1 + 0.1 * np.sin(dense["step"])))
    assert len(dense) > 20_000
    sizes = []
    for limit in (figures.DENSE, len(dense)):
        monkeypatch.setattr(figures, "DENSE", limit)
        with figures.style(LIGHT):
            figure = figures.grokking(pd.DataFrame(), dense, LIGHT, onset=None, grok=None)
            sizes.append(len(figures.saved(figure, LIGHT, "svg")))
    assert sizes[0] < sizes[1] / 4


def test_the_page_needs_nothing_else(page: Page) -> None:
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "a")
        for name in ("src", "srcset", "href", "action", "data", "poster"):
            assert attributes.get(name, "data:").startswith("data:")  # type: ignore[union-attr]
    style = page.source[page.source.index("<style>") : page.source.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    policies = [meta["content"] for meta in page.of("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_key_numbers(page: Page) -> None:
    for words in (
        "add mod 97, seed 42",
        "4,200 steps finished",
        "Grok step 3,100",
        "Defect onset 1,800",
        "Lead 1,300 steps the defect rose before the test accuracy",
        "Reliable 100% 43 of 43 measurements; 3 by the bracket",
        "Test accuracy 100.0%",
        "layer 0 70.0 69.0 81.0 73.0 73.3",
        "W_Q W_K W_V W_O mean",
        "weight_decay 1.0",
        "python 3.",
        "whole run 1 min 41 s",
        "one measurement 210 ms (median of 43)",
        "all measurements 9.0 s (9% of the run)",
    ):
        assert words in page.text, words
    assert not page.of("ul")  # nothing is missing


def test_runs_beside_each_other(run: Path, tmp_path: Path) -> None:
    """On a page of its own, with links to theirs; they are told apart by as much of their paths as it takes."""
    other = synthetic_run.write_run(tmp_path / "more" / "add", lr=0.5, seed=7)
    before = sorted(run.rglob("*"))
    page = write_report([run, other], tmp_path / "page")
    assert page == tmp_path / "page" / "report.html"
    names = [f"{folder.parent.name}/add" for folder in (run, other)]
    shown = Page(page)
    assert " beside ".join(names) in shown.text
    assert "they differ in seed, lr" in shown.text
    assert all(name in shown.text for name in names)
    assert [link["href"] for link in shown.of("a")] == [os.path.relpath(run / "report.html", page.parent)]
    assert (tmp_path / "page" / "figures" / "trajectories.png").read_bytes().startswith(PNG)
    assert sorted(run.rglob("*")) == before
    for folders, said in (([run], "at least two, each once"), ([run, run], "at least two, each once")):
        with pytest.raises(ValueError, match=said):
            write_report(folders, tmp_path / "page")
    with pytest.raises(ValueError, match="need out, the folder for their page"):
        write_report([run, other])
    with pytest.raises(RunError, match="holds no run"):
        write_report([run, tmp_path], tmp_path / "page")


def test_a_page_elsewhere(tmp_path: Path) -> None:
    """The run's folder is only read."""
    folder = synthetic_run.write_run(tmp_path / "run", {"metrics": synthetic_run.metrics().iloc[:3]})
    before = sorted(folder.rglob("*"))
    assert write_report(folder, tmp_path / "deep" / "page") == tmp_path / "deep" / "page" / "report.html"
    assert sorted(folder.rglob("*")) == before


def test_a_second_report_replaces_the_first(run: Path) -> None:
    figure = run / "figures" / "pc1.png"
    figure.write_bytes(b"old")
    write_report(str(run))
    assert figure.read_bytes().startswith(PNG)


def test_text_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>\"&"
    tables = {"metrics": synthetic_run.metrics().head(3)}
    folder = synthetic_run.write_run(tmp_path / "run", tables, status=f"failed: {evil}", op=evil, **{evil: evil})
    page = Page(write_report(folder))
    assert not page.of("script")
    assert page.text.count(evil) == 7  # op: title, heading, setting; status: twice; the setting: name and value
    assert "&lt;script&gt;" in page.source


def test_names_of_matrices_are_not_mathematics(tmp_path: Path) -> None:
    """matplotlib would read a pair of dollar signs as TeX, and fail."""
    pca = synthetic_run.pca_history().replace({"matrix": {synthetic_run.MATRICES[0]: r"$\nonsense$ <b>"}})
    page = Page(write_report(synthetic_run.write_run(tmp_path / "run", {"pca": pca})))
    assert r"$\nonsense$ <b>" in page.text


def test_a_run_without_curvature(tmp_path: Path) -> None:
    folder = synthetic_run.write_run(tmp_path / "run", {"metrics": synthetic_run.metrics()})
    page = Page(write_report(folder))
    assert "No curvature was measured" in page.text
    assert "No principal components" in page.text
    assert "Grok step 3,100" in page.text
    assert "Lead" not in page.text
    assert {path.stem for path in (folder / "figures").iterdir()} == {"grokking", "fourier", "dynamics"}


def test_an_interrupted_run(tmp_path: Path) -> None:
    tables = {
        "metrics": synthetic_run.metrics().head(4),
        "curvature": synthetic_run.curvature().head(1),
        "pca": synthetic_run.pca_history().query("step == 0"),
    }
    page = Page(write_report(synthetic_run.write_run(tmp_path / "run", tables, status="interrupted")))
    assert "The run is not finished (status: interrupted)" in page.text
    assert "No commutator was split" in page.text
    assert "No principal components" in page.text
    assert "Grok step not reached" in page.text
    assert "Defect onset not reached" in page.text


def test_a_run_of_nothing(tmp_path: Path) -> None:
    page = Page(write_report(synthetic_run.write_run(tmp_path / "run", {}, status="failed: no space")))
    assert not page.of("img")
    assert "No evaluation was recorded" in page.text
    assert "0 steps failed: no space" in page.text


def test_curvature_alone_and_never_reliable(tmp_path: Path) -> None:
    curvature = synthetic_run.curvature().assign(reliable=False)
    trusted = ["defect_median", "defect_p25", "defect_p75", "rho", "exec_random_ratio", "exec_matched_ratio"]
    curvature[trusted] = np.nan
    page = Page(write_report(synthetic_run.write_run(tmp_path / "run", {"curvature": curvature})))
    assert "No measurement of the defect was reliable" in page.text
    assert "Reliable 0% 0 of 43" in page.text
    assert "Highest defect" not in page.text
    assert len(page.of("img")) == 1


def test_runs_that_cannot_be_reported(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds neither a run nor a sweep"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="kept in memory alone"):
        write_report(Run(None, {}, {}, tables={"metrics": synthetic_run.metrics()}))


def lines(axes: Axes) -> dict[str, np.ndarray]:
    """What a panel draws, by colour; the first line where there are several."""
    drawn: dict[str, np.ndarray] = {}
    for line in axes.get_lines():
        drawn.setdefault(str(line.get_color()), np.asarray(line.get_ydata(), dtype=float))
    return drawn


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_grokking_draws_the_records(theme: figures.Theme) -> None:
    metrics, curvature = synthetic_run.metrics(), synthetic_run.curvature()
    curvature.loc[5:6, ["defect_median", "defect_p25", "defect_p75"]] = np.nan
    with figures.style(theme):
        top, bottom = figures.grokking(metrics, curvature, theme, onset=1800, grok=3100).axes
    assert bottom.get_yscale() == "log"
    np.testing.assert_array_equal(lines(top)[theme.muted], metrics["train_acc"])
    np.testing.assert_array_equal(lines(bottom)[theme.orange], curvature["reference_median"])
    np.testing.assert_array_equal(lines(bottom)[theme.blue], curvature["defect_median"])  # NaN and all: a gap
    for axes in (top, bottom):
        assert {1800, 3100} <= {line.get_xdata()[0] for line in axes.get_lines()}  # type: ignore[index]
    texts = [text.get_text() for axes in (top, bottom) for text in axes.texts]
    assert {"onset 1,800", "grok 3,100", "1,300 steps", "noise floor", "float32\nformula"} <= set(texts)
    assert bottom.get_legend().get_texts()[0].get_text() == "measured by the exact bracket"
    low, high = bottom.get_ylim()
    assert low < curvature["noise_floor"].min()
    assert high > curvature["reference_median"].max()


@pytest.mark.parametrize(("width", "onset", "grok"), [(WIDE, 1800, 3100), (NARROW, 1800, 2900), (NARROW, 100, 400)])
def test_words_beside_marks_cross_no_mark(width: float, onset: int, grok: int) -> None:
    """Nor do they leave the panel."""
    metrics, curvature = synthetic_run.metrics(), synthetic_run.curvature()
    with figures.style(LIGHT, width):
        figure = figures.grokking(metrics, curvature, LIGHT, onset=onset, grok=grok)
        figure.draw_without_rendering()
        for axes in figure.axes:
            panel = axes.get_window_extent()
            marks = [axes.transData.transform((step, 1))[0] for step in (onset, grok)]
            for text in axes.texts:
                if text.get_text().startswith(("onset", "grok")) or text.get_text().endswith("steps"):
                    box = text.get_window_extent()
                    assert panel.x0 <= box.x0
                    assert box.x1 <= panel.x1
                    assert grok - onset < 1000 or not any(box.x0 < mark < box.x1 for mark in marks)


def test_a_tiny_noise_floor_does_not_flatten_the_defect() -> None:
    curvature = synthetic_run.curvature().assign(noise_floor=1e-12)
    with figures.style(LIGHT):
        (axes,) = figures.grokking(pd.DataFrame(), curvature, LIGHT, onset=None, grok=None).axes
    assert axes.get_ylim()[0] > curvature["defect_p25"].min() / 1000


@pytest.mark.filterwarnings("error")
def test_zeros_and_a_single_row_on_logarithmic_axes() -> None:
    metrics, curvature = synthetic_run.metrics().head(1), synthetic_run.curvature().head(1)
    with figures.style(LIGHT):
        for axes in figures.dynamics(metrics, curvature, LIGHT).axes:
            low, high = np.log10(axes.get_ylim())
            assert high - low >= 1
            assert (low % 1, high % 1) == (0, 0)  # both ends are labelled
        curvature = synthetic_run.curvature().assign(reference_median=0.0)
        _, bottom = figures.grokking(metrics, curvature, LIGHT, onset=None, grok=None).axes
        assert "float32\nformula" not in [text.get_text() for text in bottom.texts]


def test_pc1_has_a_panel_a_layer_and_a_line_a_matrix() -> None:
    history = synthetic_run.pca_history()
    with figures.style(LIGHT):
        panels = figures.pc1(history, LIGHT).axes
    assert [panel.get_ylabel() for panel in panels] == ["PC1, layer 0", "PC1, layer 1"]
    for panel in panels:
        assert [text.get_text() for text in panel.texts] == [f"$W_{matrix}$" for matrix in "KQOV"]  # from below
        assert len(lines(panel)) == 4


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("encoder.layers.0.self_attn.q_proj_weight", ("layer 0", "W_Q")),
        ("layers.11.attn.o_proj.weight", ("layer 11", "W_O")),
        ("h.3.out_proj.weight", ("layer 3", "W_O")),
        ("self_attn.q_proj_weight", ("", "self_attn.q_proj_weight")),
        ("hidden.0.weight", ("", "hidden.0.weight")),
        ("all", ("", "all")),
    ],
)
def test_matrix_label(name: str, label: tuple[str, str]) -> None:
    assert figures.matrix_label(name) == label


def test_geometry_shows_both_nulls_and_chance() -> None:
    curvature = synthetic_run.curvature()
    with figures.style(LIGHT):
        top, bottom = figures.geometry(curvature, LIGHT).axes
    drawn = lines(top)
    np.testing.assert_array_equal(drawn[LIGHT.blue], curvature["exec_random_ratio"])
    np.testing.assert_array_equal(drawn[LIGHT.orange], curvature["exec_matched_ratio"])
    np.testing.assert_array_equal(drawn[LIGHT.ink], [1, 1])
    assert bottom.texts[0].get_text() == rf"$\rho$ = {curvature['rho'].iloc[-1]:.4f}"


@pytest.mark.parametrize("lacks", ["columns", "values", "logits"])
def test_runs_with_fewer_fourier_shares(tmp_path: Path, lacks: str) -> None:
    metrics = synthetic_run.metrics()
    if lacks == "columns":  # a folder of before there were any
        metrics = metrics.drop(columns=["fourier_embedding", "fourier_logits"])
    else:
        metrics = metrics.assign(fourier_logits=np.nan)
        if lacks == "values":
            metrics = metrics.assign(fourier_embedding=np.nan)
    folder = synthetic_run.write_run(tmp_path / "run", {"metrics": metrics})
    page = Page(write_report(folder))
    assert (folder / "figures" / "fourier.png").exists() == (lacks == "logits")
    alts = [str(image["alt"]) for image in page.of("img")]
    assert sum("frequencies, at the end 90% of the embedding." in alt for alt in alts) == (lacks == "logits")


def test_fourier_shares_beside_accuracy() -> None:
    metrics = synthetic_run.metrics()
    with figures.style(LIGHT):
        top, bottom = figures.fourier(metrics, LIGHT, grok=3100).axes
        alone = figures.fourier(metrics.assign(fourier_logits=np.nan), LIGHT, grok=None).axes[1]
    np.testing.assert_array_equal(lines(top)[LIGHT.green], metrics["test_acc"])
    np.testing.assert_array_equal(lines(bottom)[LIGHT.blue], metrics["fourier_embedding"])
    np.testing.assert_array_equal(lines(bottom)[LIGHT.orange], metrics["fourier_logits"])
    assert {text.get_text() for text in bottom.texts} == {"embedding", "logits", "grok 3,100"}
    assert [text.get_text() for text in alone.texts] == ["embedding"]


def with_measures(generator: torch.Generator, *names: str) -> pd.DataFrame:
    """Records that have the columns of these measures too."""
    curvature = synthetic_run.curvature()
    columns = {column for name in names for panel in FIGURED[name].panels for column in (*panel.columns, panel.floor)}
    added = {name: torch.rand(len(curvature), generator=generator).double() for name in sorted(columns - {""})}
    return curvature.assign(**{name: values.numpy() for name, values in added.items()})


@pytest.mark.parametrize("name", FIGURED)
def test_a_measure_has_its_panels(name: str, generator: torch.Generator) -> None:
    curvature = with_measures(generator, name)
    ((found, figure),) = figured(curvature)
    assert (found, figure) == (name, FIGURED[name])
    with figures.style(LIGHT):
        drawn = figures.panels_of(curvature, figure.panels, LIGHT)
    for axes, panel in zip(drawn.axes, figure.panels, strict=True):
        assert axes.get_ylabel() == panel.ylabel
        assert {text.get_text().replace("\n", " ") for text in axes.texts} == set(panel.columns.values())
        for column, line in zip(panel.columns, axes.lines[bool(np.isfinite(panel.level)) :], strict=True):
            np.testing.assert_array_equal(line.get_ydata(), curvature[column])
    nothing = curvature.assign(**dict.fromkeys(figure.panels[0].columns, np.nan))
    assert [panel for _, one in figured(nothing) for panel in one.panels] == list(figure.panels[1:])


def test_measures_on_a_page(tmp_path: Path, generator: torch.Generator) -> None:
    folder = synthetic_run.write_run(tmp_path / "run", {"curvature": with_measures(generator, "update_gram")})
    page = Page(write_report(folder))
    assert {path.stem for path in (folder / "figures").iterdir()} >= {"update_gram", "grokking"}
    for words in ("title", "caption"):
        assert " ".join(getattr(FIGURED["update_gram"], words).split()) in page.text
    assert FIGURED["hessian_edges"].title not in page.text


def test_spread_moves_labels_apart_and_no_further() -> None:
    generator = np.random.default_rng()
    for _ in range(100):
        count = int(generator.integers(0, 7))
        middles = np.sort(generator.uniform(0, 1, count))
        heights = generator.uniform(0.05, 0.4, count)
        places = np.array(figures.spread(middles.tolist(), heights.tolist()))
        gaps = (heights[1:] + heights[:-1]) / 2
        assert (np.diff(places) >= gaps - 1e-12).all()
        assert np.allclose(places.sum(), middles.sum())  # each cluster stays centred on its members
        if (np.diff(middles) >= gaps).all():
            np.testing.assert_allclose(places, middles)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.00123456, "0.00123"),
        (0.2165, "0.216"),
        (4.5, "4.50"),
        (99.96, "100"),
        (1234.6, "1,230"),
        (-87.31, "-87.3"),
        (3e-7, "3.00e-07"),
        (4.2e9, "4.20e+09"),
        (float("nan"), "none"),
    ],
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.34, "12.3 s"), (59.96, "1 min 00 s"), (245, "4 min 05 s"), (12_300, "3 h 25 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_lead_after_grokking(tmp_path: Path) -> None:
    metrics = synthetic_run.metrics().assign(test_acc=1.0)
    folder = synthetic_run.write_run(tmp_path / "run", {"metrics": metrics, "curvature": synthetic_run.curvature()})
    lead = next(number for number in Summary(open_run(folder)).key_numbers if number[0] == "Lead")
    assert lead == ("Lead", "-1,800 steps", "the defect rose after the test accuracy")


def test_settings_of_another_trainer(tmp_path: Path) -> None:
    """The run folder knows nothing of modular arithmetic; nor need its settings."""
    with RunWriter(tmp_path / "mine", {"model": "resnet"}) as writer:
        writer.write_table("metrics", synthetic_run.metrics())
        writer.set_status("finished")
    page = Page(write_report(tmp_path / "mine"))
    assert re.search(r"mine .*4,200 steps finished", page.text)
    assert "model resnet" in page.text
