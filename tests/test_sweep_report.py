"""The report of a sweep: its results, figures and page, for whole sweeps and for those that lack something."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import synthetic_sweep
from matplotlib.figure import Figure
from matplotlib.text import Text
from scipy.stats import binomtest
from synthetic_sweep import Sweep
from test_report import PNG, Page, assert_pictures

from grokcurv.analysis import (
    grok_step,
    lead_time,
    onset_step,
    predictors,
    settled_step,
    sweep_results,
    sweep_settings,
)
from grokcurv.report import figures, sweep_figures, write_report
from grokcurv.report.figures import DARK, LIGHT, NARROW, WIDE
from grokcurv.report.sweep_summary import SweepSummary
from grokcurv.runs import RunError

pytestmark = pytest.mark.usefixtures("drawn_once")  # but for the whole page of the fixture
NAN = float("nan")
NOTHING = pd.DataFrame()


def by_hand() -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Five runs of two settings; the rows are out of order."""
    runs = pd.DataFrame(
        {
            "lr": [0.1, 0.1, 0.1, 0.2, 0.2],
            "seed": [1, 2, 3, 1, 2],
            "status": ["finished", "finished", "failed", "running", "pending"],
            "reason": ["", "", "no", "", ""],
        },
        index=list("abcde"),
    )
    metrics = pd.DataFrame(
        {
            "run": list("aaabbbccdd"),
            "step": [20, 10, 30, 0, 10, 20, 0, 10, 0, 10],
            "test_acc": [0.95, 0.1, NAN, 0.2, 0.89, 0.7, 0.9, 0.1, 0.1, 1.0],
        }
    )
    curvature = pd.DataFrame(
        {
            "run": list("aaaaabbb"),
            "step": [0, 5, 10, 15, 40, 0, 5, 10],
            "defect_median": [1, 2, 4, 30, 90.0, 1, 2, NAN],
            "reliable": [True, True, True, True, False, True, True, True],
        }
    )
    return runs, metrics, curvature


def test_results_by_hand() -> None:
    results = sweep_results(*by_hand())
    assert list(results.index) == list("abcde")
    expected = {
        "grok_step": [20, NAN, 0, 10, NAN],
        "settled_step": [NAN, NAN, NAN, NAN, NAN],
        "onset_step": [15, NAN, NAN, NAN, NAN],
        "lead_time": [5, NAN, NAN, NAN, NAN],
        "max_defect": [30, 2, NAN, NAN, NAN],  # 90 was not reliable
        "max_defect_step": [15, 5, NAN, NAN, NAN],
        "last_step": [40, 20, 10, 10, NAN],
        "test_acc": [0.95, 0.7, 0.1, 1.0, NAN],
    }
    assert list(results)[4:] == list(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(results[name], values, err_msg=name)


def test_only_finished_runs_count() -> None:
    first, second = sweep_settings(sweep_results(*by_hand()), ["lr"]).to_dict("records")
    assert first.pop("grok_low") < 0.5 < first.pop("grok_high")
    assert first == {
        "lr": 0.1,
        "runs": 3,
        "finished": 2,
        "failed": 1,
        "unfinished": 0,
        "grokked": 1,  # a; the run that failed after it had passed the threshold is left out
        "grok_fraction": 0.5,
        "grok_step": 20,
        "grok_step_min": 20,
        "grok_step_max": 20,
        "settled_step": pytest.approx(NAN, nan_ok=True),
        "censored_step": 20,  # b
        "max_defect": 16,
        "lead_time": 5,
    }
    assert (second["runs"], second["unfinished"], second["finished"], second["grokked"]) == (2, 2, 0, 0)
    assert all(np.isnan(second[name]) for name in ("grok_fraction", "grok_low", "grok_step", "max_defect", "lead_time"))
    (everything,) = sweep_settings(sweep_results(*by_hand()), []).to_dict("records")
    assert (everything["runs"], everything["finished"], everything["grokked"]) == (5, 2, 1)


@pytest.mark.parametrize("trials", [1, 3, 20])
def test_wilson_intervals(trials: int) -> None:
    for successes in range(trials + 1):
        results = pd.DataFrame({"status": "finished", "grok_step": [1.0] * successes + [NAN] * (trials - successes)})
        results = results.assign(settled_step=NAN, last_step=9.0, max_defect=1.0, lead_time=NAN)
        (row,) = sweep_settings(results, []).to_dict("records")
        interval = binomtest(successes, trials).proportion_ci(method="wilson")
        np.testing.assert_allclose((row["grok_low"], row["grok_high"]), interval, atol=1e-12)


def test_random_records_as_the_functions_of_one_run_see_them() -> None:
    generator = np.random.default_rng()
    names = [f"r{index}" for index in range(60)]
    metrics, curvature = [], []
    for name in names:
        for tables in (metrics, curvature):
            count = int(generator.integers(0, 30))
            step = generator.permutation(count) * 10
            accuracy = np.where(generator.random(count) < 0.1, NAN, generator.uniform(0, 1, count) ** 0.2)
            defect = np.exp(generator.normal(1, 2, count))
            defect[generator.random(count) < 0.15] = NAN
            defect[generator.random(count) < 0.05] = np.inf
            columns = {"step": step, "test_acc": accuracy, "defect_median": defect}
            tables.append(pd.DataFrame({"run": name, **columns, "reliable": generator.random(count) < 0.7}))
    runs = pd.DataFrame({"status": "finished", "reason": "", "grok_threshold": 0.8, "grok_patience": 2}, index=names)
    runs.loc[names[::2], "grok_patience"] = 3
    both = [pd.concat(tables).sample(frac=1, random_state=1) for tables in (metrics, curvature)]
    for categories in (False, True):
        tables = [table.astype({"run": "category"}) if categories else table for table in both]
        results = sweep_results(runs, *tables, threshold=0.8)
        for name, measured, defects in zip(names, metrics, curvature, strict=True):
            row = results.loc[name]
            found = {"grok_step": grok_step(measured, 0.8), "onset_step": onset_step(defects)}
            found["settled_step"] = settled_step(measured, 0.8, int(runs["grok_patience"][name]))
            joined = pd.concat([measured[["step", "test_acc"]], defects[["step", "defect_median"]]])
            found["lead_time"] = lead_time(joined, 0.8)
            trusted = defects.loc[defects["reliable"] & np.isfinite(defects["defect_median"]), "defect_median"]
            found["max_defect"] = trusted.max() if len(trusted) else None
            for column, value in found.items():
                np.testing.assert_equal(row[column], NAN if value is None else value)


@pytest.mark.parametrize("empty", ["metrics", "curvature", "both"])
def test_results_without_records(empty: str) -> None:
    runs, metrics, curvature = by_hand()
    metrics, curvature = (
        NOTHING if empty in (name, "both") else table
        for name, table in (("metrics", metrics), ("curvature", curvature))
    )
    results = sweep_results(runs, metrics, curvature)
    assert results["grok_step"].isna().all() == metrics.empty
    assert results["max_defect"].isna().all() == curvature.empty
    assert results["lead_time"].isna().all()


def test_bad_records() -> None:
    runs, metrics, curvature = by_hand()
    with pytest.raises(ValueError, match=r"no column 'test_acc'"):
        sweep_results(runs, metrics.drop(columns="test_acc"), curvature)
    with pytest.raises(ValueError, match=r"threshold is a fraction .* got 90"):
        sweep_results(runs, metrics, curvature, threshold=90)


def many() -> Sweep:
    """5,000 runs of 50 rows each, in memory."""
    runs = synthetic_sweep.plan(
        op=synthetic_sweep.OPS[:5], lr=tuple(np.geomspace(1e-4, 1e-2, 20)), seed=tuple(range(50))
    )
    generator = np.random.default_rng(0)
    rows = {"run": np.repeat(runs.index, 50), "step": np.tile(np.arange(50) * 100, len(runs))}
    accuracy, defect = generator.random(50 * len(runs)) * 0.93, np.exp(generator.normal(0, 2, 50 * len(runs)))
    tables = {
        "metrics": pd.DataFrame({**rows, "test_acc": accuracy}),
        "curvature": pd.DataFrame({**rows, "defect_median": defect, "reliable": True}),
    }
    return Sweep(Path("many"), ("op", "lr", "seed"), runs, tables)


def test_five_thousand_runs_are_quick() -> None:
    sweep = many()
    began = time.process_time()
    results = sweep_results(sweep.runs, sweep.table("metrics"), sweep.table("curvature"))
    settings = sweep_settings(results, ["op", "lr"])
    assert time.process_time() - began < 5
    assert (len(results), len(settings), settings["finished"].sum()) == (5000, 100, 5000)


def test_five_thousand_runs_on_a_page(tmp_path: Path) -> None:
    sweep = replace(many(), path=tmp_path)
    sweep.tables.clear()  # drawing a quarter of a million points is for another test
    page = Page(write_report(sweep))
    assert len(page.of("tr")) == 5000 + 100 + 2
    assert len(page.source) < 4e6


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    sweep = synthetic_sweep.published(tmp_path_factory.mktemp("runs") / "lr")
    synthetic_sweep.write(sweep)
    (sweep.path / "runs" / "add-0.001-42").mkdir(parents=True)
    (sweep.path / "runs" / "add-0.001-42" / "report.html").write_text("its report")
    assert write_report(sweep) == sweep.path / "report.html"
    return sweep


@pytest.fixture(scope="module")
def page(sweep: Sweep) -> Page:
    return Page(sweep.path / "report.html")


def test_figures_are_written_and_embedded(sweep: Sweep, page: Page) -> None:
    written = {path.stem: path.read_bytes() for path in (sweep.path / "figures").iterdir()}
    assert set(written) == {"phase", "trajectories", "signals"}
    assert all(data.startswith(PNG) for data in written.values())
    assert_pictures(page, 3)


def test_the_page_needs_nothing_else(page: Page) -> None:
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object")
        for name in ("src", "srcset", "action", "data", "poster"):
            assert attributes.get(name, "data:").startswith("data:")  # type: ignore[union-attr]
    assert [link["href"] for link in page.of("a")] == ["runs/add-0.001-42/report.html"]
    policies = [meta["content"] for meta in page.of("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    (script,) = re.findall("<script>(.*?)</script>", page.source, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policies == [f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"]


def test_words_and_numbers(page: Page) -> None:
    for words in (
        "op (6), lr (3), seed (3) 54 runs",
        "2 runs of 54 are not finished (2 pending) and count neither for grokking nor against it",
        "1 run failed and counts neither way",
        "Runs 54 51 finished, 1 failed, 2 pending",
        "Grokked 33 of 51",
        "x2_y2 0.0003 1 of 3 6 to 79% 19,000",
        "x3_xy 0.003 0 of 1 0 to 79% not by 20,000",
        "Failed runs sub-0.003-137 loss is not finite at step 1,013",
        "x3_xy 0.003 2024 pending",
        "Settings of every run p 97 preset paper weight_decay 1 layers 2",
    ):
        assert words in page.text, words
    assert page.text.count("finished") >= 51


def small(path: Path, *, tables: dict[str, pd.DataFrame] | None = None, **varied: tuple[Any, ...]) -> Sweep:
    runs = synthetic_sweep.plan(**varied)
    return Sweep(path, tuple(varied), runs, synthetic_sweep.records(runs) if tables is None else tables)


def test_a_folder_of_a_sweep_and_one_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = small(tmp_path / "sweep", tables={}, op=("add", "mul"))
    synthetic_sweep.write(sweep)
    monkeypatch.setattr("grokcurv.report.page.open_sweep", lambda path: replace(sweep, path=path))
    assert write_report(str(sweep.path)) == sweep.path / "report.html"
    with pytest.raises(RunError, match="holds neither a run nor a sweep"):
        write_report(tmp_path)


def test_nothing_has_started(tmp_path: Path) -> None:
    sweep = small(tmp_path, tables={}, lr=(1e-3, 1e-2), op=("add", "mul"), seed=(1, 2))
    sweep.runs["status"] = "pending"
    page = Page(write_report(sweep))
    assert not page.of("img")
    assert "8 runs of 8 are not finished (8 pending)" in page.text
    assert "No evaluation was recorded" in page.text
    assert "Grokked" not in page.text


def test_all_failed(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>\"&"
    sweep = small(tmp_path, op=("add", "mul"), seed=(1, 2))
    sweep.runs["status"], sweep.runs["reason"] = "failed", evil
    page = Page(write_report(sweep))
    assert "4 runs failed and count neither way" in page.text
    assert page.text.count(evil) == 4
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"trajectories"}


def test_text_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('$\\nonsense$')</script>\"&?#"
    sweep = small(tmp_path, tables={}, op=(evil, "add"), lr=(1.0, 2.0))
    sweep.runs.index = pd.Index([evil, "b", "c", "d"])
    page = Page(write_report(sweep))
    assert len(page.of("script")) == 1  # its own
    assert page.text.count(evil) == 1 + 2 + 2  # an id; two settings; two runs of that operation
    page = Page(write_report(replace(sweep, tables=synthetic_sweep.records(sweep.runs))))
    assert len(page.of("script")) == 1  # and matplotlib does not take it for mathematics
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"phase", "trajectories"}


def test_addresses_of_reports_are_quoted(tmp_path: Path) -> None:
    sweep = small(tmp_path, tables={}, op=("add", "mul"))
    sweep.runs.index = pd.Index(["a?b#c d%", "plain"])
    folder = tmp_path / "runs" / "a?b#c d%"
    folder.mkdir(parents=True)
    (folder / "report.html").touch()
    assert [link["href"] for link in Page(write_report(sweep)).of("a")] == ["runs/a%3Fb%23c%20d%25/report.html"]


@pytest.mark.parametrize(
    "varied",
    [
        {"seed": (1,)},
        {"seed": (1, 2)},
        {"lr": (1e-3,), "seed": (1,)},
        {"lr": (3e-3, 1e-3), "seed": (1, 2)},
        {"op": ("add", "x3_xy")},
        {"layer_norm": (True, False), "seed": (1, 2)},
        {"lr": (1e-3, 3e-3), "weight_decay": (0.1, 1.0), "op": ("mul", "add"), "layers": (1, 2)},
        {"p": tuple(range(90, 105)), "batch_size": tuple(range(1, 17))},
    ],
    ids=" ".join,
)
def test_sweeps_of_every_shape(tmp_path: Path, varied: dict[str, tuple[Any, ...]]) -> None:
    page = Page(write_report(small(tmp_path, **varied)))
    assert len(page.of("img")) == 1 + bool(set(varied) - {"seed"})


def test_numbers_drawn_at_random_are_put_into_classes(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    runs = synthetic_sweep.plan(lr=tuple(10 ** generator.uniform(-4, -2, 80)), op=("add", "x3_xy"))
    sweep = Sweep(tmp_path, ("lr", "op"), runs, synthetic_sweep.records(runs))
    summary = SweepSummary(sweep)
    assert summary.classed == ["lr"]
    assert len(summary.fields["lr"]) == 8
    assert list(summary.settings["runs"]) == [10] * 16
    assert summary.fields["lr"] == sorted(summary.fields["lr"])
    assert summary.results["lr"].nunique() == 80  # the table of runs has their own
    page = Page(write_report(sweep))
    assert "The many values of lr are in 8 classes" in page.text


def test_settings_that_differ_unasked_are_not_said_to_be_shared(tmp_path: Path) -> None:
    sweep = small(tmp_path, tables={}, op=("add", "mul"))
    sweep.runs["layers"] = [1, 2]
    ((_, reasons), (_, shared)) = SweepSummary(sweep).facts
    assert not reasons
    assert set(shared) == {"p", "preset", "seed", "lr", "weight_decay"}


@pytest.mark.parametrize("lacks", ["metrics", "curvature"])
def test_half_the_records(tmp_path: Path, lacks: str) -> None:
    sweep = small(tmp_path, op=("add", "x3_xy"), lr=(1e-3, 3e-3), seed=(1, 2))
    del sweep.tables[lacks]
    page = Page(write_report(sweep))
    assert ("No curvature was measured" if lacks == "curvature" else "No evaluation was recorded") in page.text
    assert len(page.of("img")) == 2


def test_rows_of_nan(tmp_path: Path) -> None:
    sweep = small(tmp_path, op=("add", "x3_xy"), lr=(1e-3, 3e-3))
    sweep.tables["metrics"]["test_acc"] = NAN
    sweep.tables["curvature"]["defect_median"] = NAN
    page = Page(write_report(sweep))
    assert "Grokked 0 of 4" in page.text
    assert "Highest defect" not in page.text
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"phase"}


@pytest.mark.filterwarnings("error")
def test_runs_of_a_single_row(tmp_path: Path) -> None:
    sweep = small(tmp_path, op=("add", "x3_xy"), lr=(1e-3, 3e-3))
    first = {name: table[table["step"] == 0] for name, table in sweep.tables.items()}
    write_report(replace(sweep, tables=first))


def signals(tmp_path: Path, seeds: int = 3) -> Sweep:
    """Four operations of which two never grok, with columns beside the defect."""
    sweep = small(tmp_path, op=("add", "mul", "x2_xy_y2", "x3_xy"), seed=tuple(range(seeds)))
    curvature, generator = sweep.tables["curvature"], np.random.default_rng()
    grok = {name: rows["step"][rows["test_acc"] >= 0.9].min() for name, rows in sweep.tables["metrics"].groupby("run")}
    before = curvature["step"] >= curvature["run"].map(grok) - 600
    curvature["signal"] = np.exp(3.0 * before + 0.01 * generator.standard_normal(len(curvature)))
    curvature["noise"] = generator.standard_normal(len(curvature))
    return sweep


def test_which_signal_comes_first(tmp_path: Path) -> None:
    sweep = signals(tmp_path)
    page, found = Page(write_report(sweep)), predictors(sweep)
    assert "Which signal comes first column moves" not in page.text  # a figure is between
    for words in (
        "Which signal comes first",
        "signal rises 1.00 1.00 to 1.00 0.00 to 0.00 6 of 6 400 400 400 0 of 6 0 to 46% 1.00",
        "6 runs of 2 operations grok, 6 runs of 2 operations never do",
        "test_acc (reference)",
        *found.notes,
    ):
        assert words in page.text, words
    assert page.text.count(" or signal ") + page.text.count("signal or ") == 2  # pairs with noise and with the defect
    assert "without weight decay" not in page.text
    for theme in (LIGHT, DARK):
        for width in (figures.WIDE, figures.NARROW):
            with figures.style(theme, width):
                auroc, leads = sweep_figures.signals(found, theme).axes
            assert auroc.get_yticklabels()[0].get_text() == "signal ↑"
            assert len(auroc.get_yticklabels()) == len(found.table)
            small_dots, medians = (dots.get_offsets() for dots in leads.collections)
            assert len(small_dots) == found.alarms["lead"].notna().sum()
            assert len(medians) == len(found.table)


def test_signals_need_both_outcomes_and_others_are_not_read(tmp_path: Path) -> None:
    read: list[object] = []

    class Counting(Sweep):
        def table(self, name: str, columns: object = None) -> pd.DataFrame:
            read.append(columns)
            return super().table(name, columns)

    sweep = signals(tmp_path)
    for runs in (
        sweep.runs.assign(status="failed"),
        sweep.runs[sweep.runs["op"].isin(["add", "mul"])],
        sweep.runs.assign(status=["finished"] * 7 + ["running"] * 5),  # one that never groks
    ):
        assert not SweepSummary(Counting(sweep.path, sweep.varied, runs, sweep.tables)).signals
    assert len(read) == 3 * 2
    assert None not in read
    both = SweepSummary(Counting(sweep.path, sweep.varied, sweep.runs, sweep.tables)).signals
    assert list(both) == ["signals"]
    without = SweepSummary(replace(sweep, runs=sweep.runs.assign(weight_decay=0.0))).signals
    assert list(without) == ["signals-without-decay"]
    pd.testing.assert_frame_equal(without["signals-without-decay"].table, both["signals"].table)
    text = Page(write_report(replace(sweep, runs=sweep.runs.assign(weight_decay=0.0)))).text
    assert "Which signal comes first, without weight decay" in text
    assert "signal rises 1.00" in text


def drawn(sweep: Sweep, theme: figures.Theme = LIGHT) -> Figure:
    summary = SweepSummary(sweep)
    with figures.style(theme):
        return sweep_figures.phase(summary.settings, summary.results, summary.fields, theme)


def texts(figure: Figure) -> list[list[str]]:
    """Of every map: what its cells and labels say."""
    return [[text.get_text() for text in axes.texts] for axes in figure.axes if axes.collections]


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_maps_say_what_the_settings_came_to(theme: figures.Theme, tmp_path: Path) -> None:
    sweep = synthetic_sweep.published(tmp_path)
    sweep.runs.loc[["add-0.0003-42", "add-0.0003-137", "add-0.0003-2024"], "status"] = "running"
    fraction, steps, defects, lead = texts(drawn(sweep, theme))
    settings = SweepSummary(sweep).settings
    said = zip(settings.grokked, settings.finished, strict=True)
    assert fraction[:17] == [f"{grokked}/{finished}" for grokked, finished in said if finished]  # of one setting none
    assert steps[:17].count("never") == lead[:17].count("never") == 6
    assert f"{settings.grok_step[1]:,.0f}" in steps
    assert len(set(defects[:17])) > 9


def test_axes_of_words_before_those_of_numbers_and_numbers_in_order() -> None:
    runs = synthetic_sweep.plan(lr=(1e-2, 1e-4, 1e-3), op=("mul", "add"), layer_norm=(True, False))
    fields = sweep_figures.arrange(runs, ["lr", "op", "layer_norm"])
    assert list(fields) == ["op", "layer_norm", "lr"]
    assert fields["op"] == ["mul", "add"]
    assert fields["lr"] == [1e-4, 1e-3, 1e-2]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3e-5, "0.00003"),
        (1.0, "1"),
        (0.1, "0.1"),
        (512, "512"),
        (20_000, "20,000"),
        (0, "0"),
        (1e-9, "1e-09"),
        (True, "True"),
        ("add", "add"),
        (None, "None"),
    ],
)
def test_plain(value: Any, text: str) -> None:
    assert sweep_figures.plain(value) == text


def test_a_lead_below_zero_has_a_colour_of_its_own(tmp_path: Path) -> None:
    sweep = small(tmp_path, lr=(1e-3, 3e-3), weight_decay=(0.5, 1.0))
    early = sweep.runs.index[0]
    sweep.tables["metrics"].loc[sweep.tables["metrics"]["run"] == early, "test_acc"] = 1.0
    (cells,) = [axes for axes in drawn(sweep).axes if axes.collections][3].collections
    behind, *ahead = cells.get_facecolor()[:, :3]
    assert behind[0] > behind[2]  # orange
    for colour in ahead:
        assert colour[2] > colour[1]  # purple


def test_bases_of_runs_own_seeds_are_one_setting(tmp_path: Path) -> None:
    """Named by whose they are: the run's id without number and seed; one that all have is no setting."""
    folders = [
        f"../runs/bases/runs/{number:04}-steps_after_grok{after}-seed{seed}"
        for number, (after, seed) in enumerate((after, seed) for after in (0, 1000) for seed in (1, 2))
    ]
    sweep = small(tmp_path, basis_from=tuple(folders), strength=(0.5, 1.0), seed=(1, 2))
    ends = zip(sweep.runs["basis_from"], sweep.runs["seed"], strict=True)
    own = np.array([path.endswith(f"seed{seed}") for path, seed in ends])
    summary = SweepSummary(replace(sweep, runs=sweep.runs[own]))
    assert summary.fields == {"basis_from": ["steps_after_grok0", "steps_after_grok1000"], "strength": [0.5, 1.0]}
    assert summary.settings["runs"].tolist() == [2] * 4
    first = sweep.runs["basis_from"].str.contains("grok0-")
    assert list(SweepSummary(replace(sweep, runs=sweep.runs[own & first])).fields) == ["strength"]
    other = SweepSummary(replace(sweep, runs=sweep.runs[first]))
    assert other.fields["basis_from"] == ["steps_after_grok0", "steps_after_grok0-seed1", "steps_after_grok0-seed2"]
    named = small(tmp_path, basis_from=("seed1", "runs/add-seed1"), seed=(1,))
    assert SweepSummary(named).fields == {"basis_from": ["seed1", "add"]}


def test_headings_stay_above_their_panels(tmp_path: Path) -> None:
    """A value that is too long keeps its end."""
    sweep = small(
        tmp_path, basis_from=tuple(f"0000-steps_after_grok1000-weight_decay{n}" for n in "123"), lr=(0.1, 0.2)
    )
    summary = SweepSummary(sweep)
    for width in (WIDE, NARROW):
        with figures.style(LIGHT, width):
            figure = sweep_figures.trajectories(
                summary.results, summary.metrics, summary.curvature, summary.fields, LIGHT
            )
            figure.draw_without_rendering()
            for number, axes in enumerate(figure.axes[::2], 1):
                heading = axes.get_title(loc="left")
                assert re.fullmatch(rf"….*decay{number}", heading)
                (title,) = (t for t in axes.get_children() if isinstance(t, Text) and t.get_text() == heading)
                assert title.get_window_extent().x1 <= axes.get_window_extent().x1


@pytest.mark.parametrize("end", [2000, 9700, 10_000, 20_000, 100_000])
def test_steps_of_panels_beside_each_other_stay_apart(tmp_path: Path, end: int) -> None:
    sweep = small(tmp_path, op=("add", "sub", "mul"), lr=(1e-3, 3e-3))
    summary = SweepSummary(sweep)
    metrics, curvature = (
        table.assign(step=(table["step"] / table["step"].max() * end).clip(lower=100 * (table["step"] > 0)))
        for table in (summary.metrics, summary.curvature)
    )
    for width in (WIDE, NARROW):
        with figures.style(LIGHT, width):
            figure = sweep_figures.trajectories(summary.results, metrics, curvature, summary.fields, LIGHT)
            figure.draw_without_rendering()
            boxes = [
                label.get_window_extent()
                for axes in figure.axes
                for label in axes.get_xticklabels()
                if label.get_text() and label.get_visible()
            ]
            shown = [box for box in boxes if box.width > 0]
            assert len(shown) > 5
            assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in shown)
            for index, box in enumerate(shown):
                assert not any(box.overlaps(other) for other in shown[index + 1 :]), box


def test_trajectories_draw_every_run_and_leave_gaps(tmp_path: Path) -> None:
    sweep = small(tmp_path, op=("add", "x3_xy"), lr=(1e-3, 3e-3), seed=(1, 2))
    curvature = sweep.tables["curvature"]
    curvature.loc[::7, "reliable"] = False
    summary = SweepSummary(sweep)
    with figures.style(LIGHT):
        panels = sweep_figures.trajectories(summary.results, summary.metrics, curvature, summary.fields, LIGHT).axes
    assert [axes.get_title(loc="left") for axes in panels] == ["add", "", "x3_xy", ""]
    heights = []
    for axes in panels:
        (lines,) = axes.collections
        assert len(lines.get_segments()) == 4  # type: ignore[attr-defined]
        heights.append(np.concatenate([path.vertices[:, 1] for path in lines.get_paths()]))
    together = np.concatenate([heights[1], heights[3]])
    assert np.isnan(together).sum() == (~curvature["reliable"]).sum()
    assert np.nanmax(together) == curvature["defect_median"][curvature["reliable"]].max()
