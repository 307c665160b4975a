"""Predictors of grokking: the protocol against loops written out, and sweeps whose answer is known."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from synthetic_sweep import Sweep

from grokcurv.analysis import Predictors, clopper_pearson, predictors
from grokcurv.analysis.predictors import THRESHOLDS, _scores

NAN = math.nan
GROK = ("add", "mul", "sub", "x2_y2")
NEVER = ("x2_xy_y2", "x3_xy")
EVERY, EVALUATED, CAP = 25, 100, 3000

Column = Callable[[np.random.Generator, np.ndarray, float, str], Any]
"""Values at the steps of a run, which groks at a step or never (infinity), of an operation."""


def sweep(
    generator: np.random.Generator,
    columns: dict[str, Column],
    grok: tuple[str, ...] = GROK,
    never: tuple[str, ...] = NEVER,
    seeds: tuple[int, int] = (3, 6),
    **settings: Any,
) -> Sweep:
    """Runs that grok at a step of their own and end soon after, and runs that go on to the cap."""
    runs, metrics, curvature = [], [], []
    for op in (*grok, *never):
        for seed in range(seeds[op in never]):
            step = float(generator.integers(8, 16) * EVALUATED) if op in grok else math.inf
            end = min(step + 200, CAP)
            name = f"{op}-{seed}"
            runs.append({"run": name, "op": op, "seed": seed, "weight_decay": 1.0, "status": "finished", "reason": ""})
            evaluated, measured = np.arange(0, end + 1, EVALUATED), np.arange(0, end + 1, EVERY)
            accuracy = np.where(evaluated >= step, 0.95, 0.1)
            metrics.append(pd.DataFrame({"run": name, "step": evaluated, "test_acc": accuracy}))
            values = {column: make(generator, measured, step, op) for column, make in columns.items()}
            curvature.append(pd.DataFrame({"run": name, "step": measured, **values}))
    frame = pd.DataFrame(runs).set_index("run").assign(**settings)
    tables = {"metrics": pd.concat(metrics), "curvature": pd.concat(curvature)}
    shuffled = {name: table.sample(frac=1, random_state=1) for name, table in tables.items()}
    return Sweep(Path("sweep"), ("op", "seed"), frame, shuffled)


def noise(generator: np.random.Generator, steps: np.ndarray, _: float, __: str) -> Any:
    return generator.standard_normal(len(steps))


def perfect(generator: np.random.Generator, steps: np.ndarray, grok: float, _: str) -> Any:
    """Rises so that the third row beyond any threshold is 500 steps before grokking."""
    return np.exp(0.01 * generator.standard_normal(len(steps)) + 5.0 * (steps >= grok - 500 - 2 * EVERY))


def clock(generator: np.random.Generator, steps: np.ndarray, _: float, __: str) -> Any:
    """A rise at one step in all runs alike, which lies before most grok steps, and growth."""
    return 1 + steps + 1e4 * (steps > 700) * steps + generator.standard_normal(len(steps))


def row(found: Predictors, column: str) -> Any:
    return found.table.set_index("column").loc[column]


# The protocol, written out


def reference_scores(steps: list[float], values: list[float], way: int) -> dict[float, float]:
    """By step, the highest statistic so far."""
    z = []
    for t, x in enumerate(values):
        past = values[:t]
        if t < 10:
            z.append(-math.inf)
            continue
        lower, middle, upper = np.quantile(past, [0.25, 0.5, 0.75])
        width = (upper - lower) / (2 * stats.norm.ppf(0.75)) if upper > lower else np.std(past)
        away = way * (x - middle)
        z.append(0.0 if away == 0 else away / width if width else math.copysign(math.inf, away))
    best, found = -math.inf, {}
    for t, step in enumerate(steps):
        if t >= 12:
            best = max(best, min(z[t - 2 : t + 1]))
        found[step] = best
    return found


def at(scores: dict[float, float], step: float) -> float:
    return next((scores[one] for one in sorted(scores, reverse=True) if one <= step), -math.inf)


def reference(given: Sweep, column: str) -> dict[str, Any]:
    """The row of a column, by loops over runs, pairs and folds."""
    runs: dict[str, Any] = {}
    signs = np.sign(given.tables["curvature"][column].dropna())
    log = bool(len(signs)) and signs.nunique() == 1 and signs.iloc[0] != 0
    for name in given.runs.index:
        metrics, rows = (
            table[table["run"] == name].sort_values("step").dropna() for table in (given.tables[n] for n in TABLES)
        )
        reached = metrics.loc[metrics["test_acc"] >= 0.9, "step"]
        grok = reached.min() if len(reached) else math.inf
        values = np.log(np.abs(rows[column])) if log else rows[column]
        both = [reference_scores(rows["step"].tolist(), values.tolist(), way) for way in (1, -1)]
        before = metrics.loc[metrics["step"] < grok, "step"].max()
        end = max(metrics["step"].max(), rows["step"].max())
        runs[name] = {"op": given.runs["op"][name], "grok": grok, "horizon": before, "end": end, "scores": both}
    yes = [run for run in runs.values() if run["grok"] < math.inf]
    no = [run for run in runs.values() if run["grok"] == math.inf]

    def pairs(leave: set[str]) -> list[tuple[Any, Any]]:
        return [
            (i, j)
            for i in yes
            for j in no
            if j["end"] >= i["horizon"] and i["op"] not in leave and j["op"] not in leave
        ]

    def concordance(i: Any, j: Any, way: int) -> float:
        mine, theirs = (at(run["scores"][way], i["horizon"]) for run in (i, j))
        return 0.5 * (float(mine > theirs) + float(mine >= theirs))

    def choose(leave: set[str]) -> tuple[int, float]:
        left = pairs(leave)
        auroc = [sum(concordance(i, j, way) for i, j in left) for way in (0, 1)]
        way = 0 if auroc[0] >= auroc[1] else 1
        ranked = []
        for level in THRESHOLDS:
            hits = sum(at(i["scores"][way], i["horizon"]) >= level for i, _ in left)
            false = sum(at(j["scores"][way], i["horizon"]) >= level for i, j in left)
            ranked.append((false - hits, false, level))
        tied = [level for *rank, level in sorted(ranked) if tuple(rank) == min(ranked)[:2]]
        return way, tied[(len(tied) - 1) // 2]

    longest = max(run["horizon"] for run in yes)
    for run in runs.values():
        way, level = choose({run["op"]})
        alarms = [step for step, score in run["scores"][way].items() if score >= level]
        last = run["horizon"] if run["grok"] < math.inf else longest
        run["alarm"] = min((step for step in alarms if step <= last), default=math.inf)
    every = pairs(set())
    leads = [run["grok"] - run["alarm"] for run in yes if run["alarm"] < math.inf]
    return {
        "scale": "log" if log else "raw",
        "hits": len(leads),
        "lead": np.median(leads) if leads else NAN,
        "false_alarms": sum(run["alarm"] < math.inf for run in no),
        "gain": np.mean([(i["alarm"] < math.inf) - float(j["alarm"] <= i["horizon"]) for i, j in every]),
        "auroc": np.mean([concordance(i, j, choose({i["op"], j["op"]})[0]) for i, j in every]),
    }


TABLES = ("metrics", "curvature")


def test_the_protocol_against_loops() -> None:
    generator = np.random.default_rng()

    def walk(generator: np.random.Generator, steps: np.ndarray, grok: float, _: str) -> Any:
        drift = 0.3 * (grok < math.inf) * (steps > generator.integers(300, 900))
        values = np.cumsum(generator.standard_normal(len(steps)) + drift)
        return np.where(generator.random(len(steps)) < 0.1, NAN, values)

    def levels(generator: np.random.Generator, steps: np.ndarray, _: float, op: str) -> Any:
        """Whole numbers, with quartiles that coincide and pasts that are constant."""
        return generator.integers(0, 2 + (op == "add"), len(steps)) * (steps > generator.integers(0, 900))

    columns: dict[str, Column] = {
        "walk": walk,
        "levels": levels,
        "negative": lambda *a: -np.exp(walk(*a) / 10),
    }
    given = sweep(generator, columns, seeds=(2, 2))
    ended = given.tables["curvature"]["run"].ne("x3_xy-0") | (given.tables["curvature"]["step"] < 900)
    given.tables["curvature"] = given.tables["curvature"][ended]  # one that ended early, and is compared less
    given.tables["metrics"] = given.tables["metrics"].query("run != 'x3_xy-0' or step < 900")
    found = predictors(given)
    for name in columns:
        one = Sweep(given.path, given.varied, given.runs, {n: t.copy() for n, t in given.tables.items()})
        one.tables["curvature"] = one.tables["curvature"][["run", "step", name]]
        wanted = reference(one, name)
        assert {key: row(found, name)[key] for key in wanted} == pytest.approx(wanted, abs=1e-12, nan_ok=True), name
        assert row(found, name)["cross_validated"]


def test_rows_after_the_horizon_change_nothing() -> None:
    given = sweep(np.random.default_rng(), {"noise": noise, "perfect": perfect})
    found = predictors(given)
    grok = found.alarms.drop_duplicates("run").set_index("run")["grok_step"]
    table = given.tables["curvature"]
    late = table["step"] > grok.reindex(table["run"]).to_numpy() - EVALUATED
    table.loc[late, "noise"] = 1e6  # of runs that never grok none
    again = predictors(given)
    pd.testing.assert_frame_equal(found.table, again.table)
    pd.testing.assert_frame_equal(found.alarms, again.alarms)


# Sweeps whose answer is known


def test_a_perfect_alarm() -> None:
    found = predictors(sweep(np.random.default_rng(), {"noise": noise, "perfect": perfect}))
    assert found.table["column"][0] == "perfect"
    best = row(found, "perfect")
    assert (best["lead"], best["lead_min"], best["lead_max"]) == (500, 500, 500)
    assert (best["grokked"], best["hits"], best["never"], best["false_alarms"]) == (12, 12, 12, 0)
    assert (best["auroc"], best["gain"], best["direction"], best["scale"]) == (1, 1, "up", "log")
    assert (best["auroc_low"], best["auroc_high"]) == (1, 1)
    assert best["spearman"] == pytest.approx(1)
    assert best["cross_validated"]
    interval = stats.binomtest(0, 12).proportion_ci(method="exact")
    assert (best["false_low"], best["false_high"]) == pytest.approx((interval.low, interval.high))
    alarms = found.alarms[found.alarms["column"] == "perfect"]
    assert (alarms["lead"].dropna() == 500).all()
    assert len(alarms) == 24
    assert found.protocol["grokked"] == dict.fromkeys(GROK, 3)
    assert any("15 ways" in note and "p = 0.067" in note for note in found.notes)


def test_a_fall_is_as_good_as_a_rise() -> None:
    falling = sweep(np.random.default_rng(), {"falls": lambda *a: 1 / perfect(*a), "below": lambda *a: -perfect(*a)})
    found = predictors(falling)
    for name, direction in (("falls", "down"), ("below", "up")):  # of what is negative the size counts
        assert row(found, name)[["direction", "auroc", "lead"]].tolist() == [direction, 1, 500]


def test_a_clock_predicts_nothing() -> None:
    """Though it moves before most grok steps, and runs that never grok are watched for three times as long."""
    generator = np.random.default_rng()
    exact: Column = lambda _, steps, __, ___: 1.0 + steps + 1e4 * (steps > 700) * steps  # noqa: E731
    linear: Column = lambda _, steps, __, ___: 3.0 * steps  # noqa: E731
    noisy: dict[str, Column] = {f"clock{k}": clock for k in range(20)}
    found = predictors(sweep(generator, {**noisy, "exact": exact, "linear": linear}))
    for name in ("exact", "linear"):
        one = row(found, name)
        assert (one["auroc"], one["gain"]) == (0.5, 0), name
        assert (one["hits"], one["false_alarms"]) == (0, 0), name  # of equal gains the quietest
    means = found.table.set_index("column").loc[list(noisy), ["auroc", "gain"]].mean()
    assert means.tolist() == pytest.approx([0.5, 0], abs=0.15)


def test_noise_predicts_nothing_on_average() -> None:
    """Neither the AUROC nor the gain of held-out alarms is better than chance over many sweeps; in-sample they are."""
    generator = np.random.default_rng(7)
    names = [f"n{k}" for k in range(40)]
    found = predictors(sweep(generator, dict.fromkeys(names, noise)), trials=200)
    table = found.table.set_index("column").loc[names]
    for column, chance in (("auroc", 0.5), ("gain", 0.0)):
        values = table[column]
        assert abs(values.mean() - chance) < 4 * values.std() / math.sqrt(len(values)), column
    # At the threshold each has, runs that never grok raise false alarms as often as runs that grok raise alarms, in
    # a longer time.
    assert table["false_rate"].mean() >= table["hit_rate"].mean() - 0.1
    whole = predictors(sweep(generator, dict.fromkeys(names, noise), grok=("add",), never=("x3_xy",)))
    assert not whole.table.set_index("column").loc[names, "cross_validated"].any()
    assert whole.table.set_index("column").loc[names, "auroc"].mean() > 0.52  # the direction was chosen on these runs
    assert any("too good" in note for note in whole.notes)


def test_false_alarms_at_the_rate_of_the_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of noise, the share of runs with an alarm is that of series drawn for it alone."""
    module = sys.modules["grokcurv.analysis.predictors"]  # whose name in its package is the function's
    monkeypatch.setattr(module, "THRESHOLDS", (0.8,))
    generator = np.random.default_rng(3)
    given = sweep(generator, {"noise": noise}, seeds=(10, 60))
    found = predictors(given)
    rows = int(found.protocol["longest_horizon"]) // EVERY + 1
    scores = _scores(generator.standard_normal(1000 * rows), np.arange(1001) * rows)
    rate = (scores[0, rows - 1 :: rows] >= 0.8).mean()  # up and down are alike
    assert 0.1 < rate < 0.9
    one = row(found, "noise")
    assert abs(one["false_rate"] - rate) < 4 * math.sqrt(rate * (1 - rate) * (1 / 120 + 1 / 1000))
    assert one["hit_rate"] < one["false_rate"]  # whose runs are shorter


def test_a_column_that_reads_the_operation() -> None:
    """Its level is lost against its own past; its growth, whatever the operation does later, has a wide interval."""
    generator = np.random.default_rng(5)
    level = {op: generator.normal(0, 100) for op in (*GROK, *NEVER)}
    covered, by_runs, trials = 0, 0, 12
    for _ in range(trials):
        slope = {op: generator.normal(0, 1) for op in (*GROK, *NEVER)}

        def grows(generator: np.random.Generator, steps: np.ndarray, _: float, op: str, slope=slope) -> Any:
            return slope[op] * np.maximum(steps - 400, 0) + 30 * generator.standard_normal(len(steps))

        columns: dict[str, Column] = {"level": lambda g, steps, _, op: level[op] + noise(g, steps, 0, op)}
        found = predictors(sweep(generator, {**columns, "grows": grows}))
        assert 0.2 < row(found, "level")["auroc"] < 0.8
        one = row(found, "grows")
        covered += one["auroc_low"] <= 0.5 <= one["auroc_high"]
        # 12 runs against 12, were they independent (Mann & Whitney 1947).
        by_runs += abs(one["auroc"] - 0.5) <= 1.96 * math.sqrt(25 / (12 * 12 * 12))
    assert covered > by_runs


def test_pairs_of_signals() -> None:
    def half(first: bool) -> Column:
        """Rises before grokking, and less in every third run that never does: each of two in others."""
        turns = cycle([first, not first, False])

        def make(generator: np.random.Generator, steps: np.ndarray, grok: float, _: str) -> Any:
            at = grok - 400 if grok < math.inf else 600 if next(turns) else math.inf
            height = 5.0 if grok < math.inf else 1.5
            return np.exp(0.01 * generator.standard_normal(len(steps)) + height * (steps >= at))

        return make

    found = predictors(sweep(np.random.default_rng(), {"a": half(True), "b": half(False), "noise": noise}))
    pairs = found.pairs.set_index(["first", "second", "rule"])
    both = next(pairs.loc[key] for key in (("a", "b", "both"), ("b", "a", "both")) if key in pairs.index)
    assert (both["hits"], both["false_alarms"]) == (12, 0)
    either = next(pairs.loc[key] for key in (("a", "b", "either"), ("b", "a", "either")) if key in pairs.index)
    assert (either["hits"], either["false_alarms"]) == (12, 8)
    assert both["lead"] == either["lead"] == 350
    assert len(found.pairs) == 2 * 3


def test_what_cannot_be_told_apart() -> None:
    found = predictors(sweep(np.random.default_rng(), {"a": perfect, "b": perfect, "noise": noise, "clock": clock}))
    table = found.table.set_index("column")
    assert (table.loc[["a", "b"], ["behind", "behind_low", "behind_high"]] == 0).all(axis=None)
    assert table.loc["noise", "behind_low"] > 0 or table.loc["noise", "auroc"] > 0.9
    assert any("cannot be told from the best, a" in note and "fewer than 20 runs" in note for note in found.notes)


# What is missing


def test_without_both_outcomes() -> None:
    generator = np.random.default_rng()
    for given in (
        sweep(generator, {"noise": noise}, grok=()),
        sweep(generator, {"noise": noise}, never=()),
        sweep(generator, {"noise": noise}, status="failed"),
    ):
        found = predictors(given)
        assert found.table[["auroc", "auroc_low", "gain", "threshold", "hit_rate", "lead"]].isna().all(axis=None)
        assert (found.table[["hits", "false_alarms"]] == 0).all(axis=None)
        assert found.alarms["alarm_step"].isna().all()
        assert found.pairs.empty
        assert len(found.notes) >= 1
        assert any("nothing to tell apart" in note for note in found.notes)


def test_without_records() -> None:
    given = sweep(np.random.default_rng(), {"noise": noise})
    for lacks in (["curvature"], ["metrics"], ["metrics", "curvature"]):
        tables = {name: table for name, table in given.tables.items() if name not in lacks}
        found = predictors(Sweep(given.path, given.varied, given.runs, tables))
        assert list(found.table["column"]) == (["test_acc"] if lacks == ["curvature"] else ["noise"])[: len(tables)]
    assert found.notes


def test_one_operation() -> None:
    """Whose runs have both outcomes."""
    given = sweep(np.random.default_rng(), {"perfect": perfect}, never=("x3_xy",), grok=("add",))
    given.runs["op"] = "add"
    one = row(found := predictors(given), "perfect")
    assert (one["auroc"], one["lead"], one["cross_validated"]) == (1, 500, False)
    assert math.isnan(one["auroc_low"])
    assert any("for want of other operations" in note for note in found.notes)
    unnamed = predictors(Sweep(given.path, given.varied, given.runs.drop(columns="op"), given.tables))
    pd.testing.assert_frame_equal(unnamed.table, found.table)


def test_columns_of_every_kind() -> None:
    """Constant, empty, infinite, of text, of few runs, short: none raises, none predicts."""
    generator = np.random.default_rng()
    columns: dict[str, Column] = {
        "constant": lambda _, steps, __, ___: np.full(len(steps), 0.1),
        "nan": lambda _, steps, __, ___: np.full(len(steps), NAN),
        "infinite": lambda _, steps, __, ___: np.where(steps % 50, math.inf, 1.0),
        "huge": lambda g, steps, *_: 1e300 * g.standard_normal(len(steps)),
        "method": lambda _, steps, __, ___: np.full(len(steps), "bracket"),
        "short": lambda g, steps, *_: np.where(steps < 200, g.standard_normal(len(steps)), NAN),
        "of_add": lambda g, steps, _, op: g.standard_normal(len(steps)) if op == "add" else np.full(len(steps), NAN),
        "noise_floor": noise,
        "measure_seconds": clock,
        "reliable": lambda g, steps, *_: g.random(len(steps)) < 0.5,
        "defect_median": lambda g, steps, *_: np.exp(noise(g, steps, 0, "")),
    }
    given = sweep(generator, columns)
    found = predictors(given)
    assert set(found.table["column"]) == {
        *("constant", "nan", "infinite", "huge", "short", "of_add", "defect_median", "test_acc")
    }
    table = found.table.set_index("column")
    assert (table.loc[["constant", "infinite", "short"], "auroc"] == 0.5).all()
    assert (table.loc[["constant", "infinite", "short"], ["hits", "false_alarms"]] == 0).all(axis=None)
    assert table.loc["nan", ["grokked", "never"]].tolist() == [0, 0]
    assert table.loc["of_add", ["grokked", "never"]].tolist() == [3, 0]
    assert table.loc[["nan", "of_add"], "auroc"].isna().all()
    # Named, everything is judged that is a number, and what is not there has a row.
    named = predictors(given, ["noise_floor", "g23", "method", "noise_floor", "test_acc"])
    assert sorted(named.table["column"]) == ["g23", "method", "noise_floor", "test_acc"]
    assert row(named, "g23")["auroc"] is NAN or math.isnan(row(named, "g23")["auroc"])
    assert "No run has rows of g23, method." in named.notes
    assert row(named, "test_acc")["reference"]


def test_only_reliable_defects_count() -> None:
    given = sweep(np.random.default_rng(), {"defect_median": perfect, "bracket_norm": perfect, "rho": perfect})
    table = given.tables["curvature"]
    table["reliable"] = table["defect_median"] < 10  # what rises is not
    found = predictors(given)
    assert row(found, "rho")["auroc"] == 1
    assert row(found, "defect_median")["auroc"] < 0.9
    table["reliable"] = table["reliable"].astype(object).where(table["step"] % 50 == 0, None)
    assert row(predictors(given), "rho")["auroc"] == 1


def test_runs_without_weight_decay_are_apart() -> None:
    generator = np.random.default_rng()
    given = sweep(generator, {"perfect": perfect})
    given.runs.loc[given.runs["seed"] == 0, "weight_decay"] = 0.0
    given.runs.loc[given.runs["seed"] == 1, "weight_decay"] = 0.5
    for weight_decay, count in ((None, 8), (0.0, 4), (0.5, 4), (1.0, 4), (2.0, 0)):
        found = predictors(given, ["perfect"], weight_decay)
        assert row(found, "perfect")["grokked"] == count
        assert found.protocol["weight_decay"] == ("above 0" if weight_decay is None else weight_decay)


def test_runs_that_have_not_finished_or_grokked_at_once() -> None:
    given = sweep(np.random.default_rng(), {"perfect": perfect})
    given.runs.loc[["add-0", "x3_xy-0"], "status"] = ["failed", "running"]
    metrics = given.tables["metrics"]
    metrics.loc[metrics["run"] == "mul-0", "test_acc"] = 1.0  # from step 0 on: there is nothing before
    found = row(predictors(given), "perfect")
    assert (found["grokked"], found["never"]) == (10, 11)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"threshold": 90}, r"threshold is a fraction .* got 90"), ({"trials": 0}, "trials must be at least 1, got 0")],
)
def test_bad_input(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        predictors(sweep(np.random.default_rng(), {"noise": noise}), **arguments)


def test_the_seed_decides() -> None:
    given = sweep(np.random.default_rng(), {"noise": noise, "walk": lambda g, s, *_: np.cumsum(noise(g, s, 0, ""))})
    first, second, other = (predictors(given, seed=seed, trials=50).table for seed in (1, 1, 2))
    pd.testing.assert_frame_equal(first, second)
    kept = [column for column in first if column not in ("auroc_low", "auroc_high", "behind_low", "behind_high")]
    pd.testing.assert_frame_equal(first[kept], other[kept])


def test_clopper_pearson_against_scipy() -> None:
    for trials in (1, 3, 12, 40):
        for successes in range(trials + 1):
            interval = stats.binomtest(successes, trials).proportion_ci(method="exact")
            assert clopper_pearson(successes, trials) == pytest.approx((successes / trials, *interval), abs=1e-12)
    found = clopper_pearson([0, 2, 0], [3, 3, 0])
    assert np.isnan([part[2] for part in found]).all()
    # It never covers less often than it says.
    for p in (0.01, 0.3, 0.5, 0.97):
        chances = stats.binom.pmf(range(13), 12, p)
        _, low, high = clopper_pearson(np.arange(13), 12)
        assert chances[(low <= p) & (p <= high)].sum() >= 0.95
    assert all(a < b for a, b in pairwise(clopper_pearson(np.arange(13), 12)[1]))
