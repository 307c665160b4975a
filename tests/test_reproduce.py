"""The reproduction: its plan, each claim on evidence for it and on evidence against it, and the whole, small."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import synthetic_reproduction as synthetic
import torch
from engines import Here
from synthetic_reproduction import snapshot, trial, trials, walks
from test_report import Page

import grokcurv as gc
from grokcurv import cli
from grokcurv.draws import Purpose, shuffle
from grokcurv.flat import flatten
from grokcurv.report.figures import LIGHT
from grokcurv.reproduce import CLAIMS, PROFILES, Block, Profile, Reproduction, driver, reproduce
from grokcurv.reproduce.claims import JUDGES, answer
from grokcurv.reproduce.evidence import Evidence, Trial, compare_walks, paper_checkpoints, take_snapshot
from grokcurv.reproduce.findings import Answer, say
from grokcurv.reproduce.plan import NEEDS, QUICK, WATCHED, expected_seconds, make_plan
from grokcurv.reproduce.published import Number
from grokcurv.reproduce.rules import FAILS, HOLDS, NOT_RUN, ONLY_PUBLISHED, RULES, SENTENCES, UNDECIDED, verdict
from grokcurv.runs import Run, RunError
from grokcurv.storage import hold
from grokcurv.sweep import open_sweep
from grokcurv.tasks import split, table
from grokcurv.training import TrainConfig, load_model, train

NAN = math.nan

# The plan


def test_every_claim_has_its_parts() -> None:
    assert set(CLAIMS) == set(JUDGES) == set(RULES) == set(SENTENCES)
    needed = {name for claim in CLAIMS for name in NEEDS[claim]}
    for profile, without in ((QUICK, {"slow", "regimes"}), (PROFILES["paper"], set())):  # hours of runs
        assert {*profile.runs, *profile.interventions} == needed - without


@pytest.mark.parametrize("name", PROFILES)
def test_no_run_is_trained_twice(name: str) -> None:
    plan = make_plan(PROFILES[name], "root")
    for part in (plan.runs, plan.interventions):
        configs = list(part.plan.values())
        assert len(set(configs)) == len(configs)
        seconds = list(map(expected_seconds, configs))
        assert seconds == sorted(seconds, reverse=True)
        assert {run for runs in part.sets.values() for run in runs} == set(part.plan)


def test_the_quick_profile_is_quick() -> None:
    plan = make_plan(QUICK, "root")
    seconds = [expected_seconds(config) for part in (plan.runs, plan.interventions) for config in part.plan.values()]
    assert sum(seconds) / 2 < 40 * 60  # two workers; the rest of 45 minutes is for the page
    assert max(seconds) < sum(seconds) / 2


def test_the_paper_profile_is_the_paper() -> None:
    plan = make_plan(PROFILES["paper"], "root").runs
    regimes = [plan.plan[run] for run in plan.sets["regimes"]]
    assert {(c.batch_size, c.weight_decay, c.lr) for c in regimes} == {
        *((rows, 1.0, 1e-3) for rows in (256, 1024)),
        (512, 0.3, 1e-3),
    }
    base = [c for c in plan.plan.values() if c.lr == 1e-3 and c not in regimes]
    assert len(base) == 36
    assert {(c.op, c.weight_decay, c.seed) for c in base} == {
        (op, decay, seed)
        for op in ("add", "sub", "mul", "x2_y2", "x2_xy_y2", "x3_xy")
        for decay in (0.0, 1.0)
        for seed in (42, 137, 2024)
    }
    rates = [c for c in plan.plan.values() if c.preset == "paper" and c.weight_decay == 1 and c not in regimes]
    assert len(rates) == 54
    assert {c.lr for c in rates} == {1e-4, 1e-3, 1e-2}


def test_claims_train_what_they_need() -> None:
    plan = make_plan(QUICK, "root")
    runs, interventions = plan.needed(["onset"])
    assert (set(runs), interventions) == (set(plan.runs.sets["grokking"]), [])
    runs, interventions = plan.needed(["kicks"])
    assert set(interventions) == set(plan.interventions.sets["kicks"])
    (baseline,) = runs  # of all its interventions
    config = plan.runs.plan[baseline]
    for run in interventions:
        kicked = plan.interventions.plan[run]
        assert (kicked.op, kicked.seed, kicked.basis_from) == (config.op, config.seed, f"root/{baseline}")
        assert "root" not in run
    everything = plan.needed(CLAIMS)
    assert [len(ids) for ids in everything] == [len(plan.runs.plan), len(plan.interventions.plan)]


def test_operations_and_seeds() -> None:
    plan = make_plan(QUICK, "root", ["mul"], [7, 8, 7])
    assert {(c.op, c.seed) for c in plan.runs.plan.values()} == {("mul", 7), ("mul", 8)}
    assert plan.interventions.config is None
    assert plan.needed(CLAIMS)[1] == []
    with pytest.raises(ValueError, match=r"operations must be among add, .*; got 'div'"):
        make_plan(QUICK, "root", ["div"])
    for name in ("operations", "seeds"):
        with pytest.raises(ValueError, match=f"{name} must name at least one"):
            make_plan(QUICK, "root", **{name: []})


# The claims


def judged(claim: str, changed: dict[str, list[Trial]] | None = None) -> Answer:
    return answer(claim, Evidence({**trials(), **(changed or {})}))


def test_verdicts() -> None:
    table = {
        (True, True): HOLDS,
        (True, False): HOLDS,
        (True, None): HOLDS,
        (False, True): ONLY_PUBLISHED,
        (None, True): ONLY_PUBLISHED,
        (False, False): FAILS,
        (False, None): FAILS,
        (None, False): UNDECIDED,
        (None, None): UNDECIDED,
    }
    assert {flags: verdict(*flags) for flags in table} == table


@pytest.mark.parametrize("claim", [claim for claim in CLAIMS if claim != "slow-regime"])
def test_a_claim_that_holds(claim: str) -> None:
    found = judged(claim)
    assert found.verdict == HOLDS
    assert all(finding.here.trustworthy.known for finding in found.findings[:1])
    assert found.draw is not None
    assert found.alt
    assert found.caption


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("status", ["failed", "pending"])
def test_a_claim_without_a_finished_run(claim: str, status: str) -> None:
    lost = {name: [trial({}, status=status, reason="no <luck>")] for name in NEEDS[claim]}
    found = answer(claim, Evidence(lost))
    assert found.verdict == (UNDECIDED if status == "failed" else NOT_RUN)
    assert not found.findings
    assert found.draw is None
    assert ("no <luck>" in " ".join(found.remarks)) == (status == "failed")
    nothing = answer(claim, Evidence({}))
    assert nothing.verdict == NOT_RUN
    assert "no run" in nothing.remarks[0]


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_claim_of_which_half_the_sets_are_missing(claim: str) -> None:
    """Whatever is missing, there is an answer, with a figure that can be drawn or none."""
    whole = trials()
    for name in NEEDS[claim]:
        for kept in ({name: whole.get(name, [])}, {other: whole[other] for other in whole if other != name}):
            found = answer(claim, Evidence(kept))
            assert found.verdict in (HOLDS, ONLY_PUBLISHED, FAILS, UNDECIDED, NOT_RUN)
            if found.draw is not None:
                found.draw(LIGHT).draw_without_rendering()


def test_failed_runs_count_neither_way() -> None:
    failed = trial({"op": "add", "seed": 2024}, status="failed", reason="loss is NaN", onset=3000, grok=100)
    with_it = judged("onset", {"grokking": [*trials()["grokking"], failed]})
    assert with_it.findings == judged("onset").findings
    assert with_it.remarks[-2:] == ("1 of 6 runs failed and count neither way.", "runs/add-2024: loss is NaN")


@pytest.mark.parametrize(
    ("percent", "p_value", "expected"),
    [(71.0, 0.005, HOLDS), (60.0, 0.005, FAILS), (80.0, 0.005, FAILS), (71.0, 0.5, FAILS)],
)
def test_pc1(percent: float, p_value: float, expected: str) -> None:
    runs = [trial({"op": "add"}, walks=walks(percent, p_value), grok=2000) for _ in range(2)]
    found = judged("pc1", {"grokking": runs})
    assert found.verdict == expected
    assert found.findings[0].here.trustworthy == Number(percent, percent, percent, 2)
    assert found.findings[0].here.arithmetic == found.findings[0].here.trustworthy


def test_pc1_of_runs_that_did_not_grok() -> None:
    assert judged("pc1", {"grokking": [trial({"op": "add"})]}).verdict == UNDECIDED


def test_rho() -> None:
    found = judged("rho")
    assert found.findings[0].here.trustworthy.value == pytest.approx(1 - 2e-5 * 1.6 * 1.5125, abs=1e-8)
    chance = found.findings[1].here.trustworthy.value
    assert chance == pytest.approx(math.sqrt(1 - 8 / synthetic.SIZE))
    assert f"{chance:.5f}" in found.remarks[0]
    low = trials()["grokking"]
    low[0].run.curvature["rho"] = 0.9
    assert judged("rho", {"grokking": low}).verdict == FAILS


@pytest.mark.parametrize(
    ("trustworthy", "published", "expected"),
    [(2, 2, HOLDS), (1, 2, ONLY_PUBLISHED), (0.5, 0.5, FAILS), (2, 0.5, HOLDS)],
)
def test_exec_random(trustworthy: float, published: float, expected: str) -> None:
    runs = [
        trial({"op": op}, snapshot=snapshot(trustworthy * 0.9, published * 0.9 + 0.1, seed))
        for seed, op in enumerate(("add", "mul"), 20)
    ]
    found = judged("exec-random", {"grokking": runs})
    assert found.verdict == expected
    for number, times in zip(found.findings[0].here, (published * 0.9 + 0.1, trustworthy * 0.9), strict=True):
        assert number.value == pytest.approx(times, rel=0.25)  # 3 dimensions, 60 vectors


def test_exec_random_without_memorisation() -> None:
    found = judged("exec-random", {"grokking": [trial({"op": "add"}, snapshot=None)]})
    assert found.verdict == UNDECIDED
    assert found.remarks == ("runs/add-42 has no snapshot in the phase of memorisation and does not count.",)
    assert found.draw is None


def test_exec_random_without_a_trustworthy_commutator() -> None:
    shot = snapshot(2, 2)
    shot = replace(shot, trustworthy=shot.trustworthy[:0])
    found = judged("exec-random", {"grokking": [trial({}, snapshot=shot)]})
    assert found.verdict == ONLY_PUBLISHED
    assert not found.findings[0].here.trustworthy.known


@pytest.mark.parametrize(
    ("level", "reference", "reliable", "expected"),
    [
        (2.0, 1.0, True, HOLDS),
        (100.0, 1.0, True, FAILS),
        (100.0, 0.01, True, ONLY_PUBLISHED),
        (2.0, 1.0, False, ONLY_PUBLISHED),
        (2.0, 50.0, False, UNDECIDED),
    ],
)
def test_control_ratio(level: float, reference: float, reliable: bool, expected: str) -> None:
    controls = [
        trial({"op": op, "weight_decay": 0.0}, level=level, onset=0, reference=reference, reliable=reliable)
        for op in ("add", "mul")
    ]
    found = judged("control-ratio", {"control": controls})
    assert found.verdict == expected
    if reliable:
        assert found.findings[0].here.trustworthy == Number(300 / level, 300 / level, 300 / level, 2)
    else:
        assert found.findings[0].here.trustworthy == Number()


@pytest.mark.parametrize(
    ("leading", "lagging", "never", "expected"),
    [
        (5, 0, 0, HOLDS),
        (4, 0, 0, UNDECIDED),
        (4, 1, 0, UNDECIDED),
        (8, 1, 0, HOLDS),
        (2, 2, 0, FAILS),
        (2, 0, 3, FAILS),
    ],
)
def test_onset(leading: int, lagging: int, never: int, expected: str) -> None:
    onsets = [1000] * leading + [3000] * lagging + [math.inf] * never
    runs = [trial({"op": "add", "seed": seed}, onset=onset, grok=2000) for seed, onset in enumerate(onsets)]
    found = judged("onset", {"grokking": runs})
    assert found.verdict == expected
    share = next(f for f in found.findings if f.quantity.startswith("share"))
    assert share.here.trustworthy.value == leading / len(runs)


def test_onset_that_only_the_float32_formula_sees() -> None:
    """What the published arithmetic calls a rise is none where the defect cannot be told from rounding."""
    runs = [trial({"seed": seed}, onset=1000, grok=2000) for seed in range(6)]
    for run in runs:
        run.run.curvature.loc[:, ["defect_median"]] = NAN
        run.run.curvature["reliable"] = False
    found = judged("onset", {"grokking": runs})
    assert found.verdict == ONLY_PUBLISHED
    assert found.findings[0].here.arithmetic == Number(1000, 1000, 1000, 6)


def test_onset_without_grokking() -> None:
    assert judged("onset", {"grokking": [trial({}, onset=1000)]}).verdict == UNDECIDED


@pytest.mark.parametrize(("exponent", "expected"), [(1.3, HOLDS), (1.0, FAILS), (0.5, FAILS)])
def test_lr_law(exponent: float, expected: str) -> None:
    generator = np.random.default_rng(0)
    made = []
    for rate, groks in ((1e-4, (28_000, 34_000)), (1e-3, (2600, 3100, 3400)), (1e-2, (1200, 1500, 1300))):
        for seed, grok in enumerate(groks):
            for op in ("add", "mul", "sub", "x2_y2"):
                lead = 0.03 * grok**1.3 if exponent == 1.3 else 0.4 * grok**exponent
                lead *= generator.uniform(0.93, 1.07)
                settings = {"lr": rate, "seed": seed, "op": op}
                made.append(trial(settings, steps=40_000, onset=grok - lead, grok=grok, every=20))
    grokking = [t for t in made if t.config.lr == 1e-3]
    rates = [t for t in made if t.config.lr != 1e-3]
    found = judged("lr-law", {"grokking": grokking, "rates": rates, "regimes": []})
    assert found.verdict == expected
    assert found.findings[0].here.trustworthy.value == pytest.approx(exponent, abs=0.1)
    if exponent == 1.0:  # then the onset is a share of the grok step too
        assert found.findings[2].here.trustworthy.value == pytest.approx(1, abs=0.1)
    few = judged("lr-law", {"grokking": grokking[:8], "rates": [], "regimes": []})
    assert few.verdict == UNDECIDED


def test_a_rise_that_is_always_at_one_step_is_no_power_law() -> None:
    """Though between two learning rates it has the published exponent."""
    generator = np.random.default_rng(1)
    sets: dict[str, list[Trial]] = {"grokking": [], "rates": [], "regimes": []}
    for name, rate, groks in (("rates", 1e-4, (28_000, 34_000, 31_000)), ("grokking", 1e-3, (2600, 3100, 3400))):
        for seed, grok in enumerate(groks):
            for op in ("add", "mul", "sub", "x2_y2"):
                onset = 1900 + generator.uniform(-60, 60)
                settings = {"lr": rate, "seed": seed, "op": op}
                sets[name].append(trial(settings, steps=40_000, onset=onset, grok=grok, every=50))
    found = judged("lr-law", sets)
    numbers = {finding.quantity: finding.here.trustworthy for finding in found.findings}
    assert found.verdict == FAILS
    assert numbers["exponent over the learning rates alone"].value == pytest.approx(1.3, abs=0.15)
    assert numbers["second coefficient of a parabola in its place"].high < 0
    assert abs(numbers["exponent of the onset in the grok step"].value) < 0.02  # uniform noise of 3 %, over 24 runs
    assert numbers["exponent at learning rate 0.001 alone"].value > 2
    assert numbers["onset, learning rate 0.0001"].value == pytest.approx(1900, abs=60)


def test_runs_that_never_grok_count_by_how_long_they_waited() -> None:
    runs = [
        trial({"seed": seed, "op": op}, steps=9000, onset=onset, grok=onset * (1 + wait), every=50)
        for seed, onset in enumerate((1000, 1400, 2000, 2800))
        for op, wait in {"add": 0.7, "mul": 1.0, "sub": 1.4}.items()
    ]
    waiting = [trial({"seed": seed, "op": "x3_xy"}, steps=9000, onset=onset, every=50) for seed, onset in ((5, 1000),)]
    name = "exponent of the lead in the onset, runs that never grok among them"

    def exponent(rates: list[Trial]) -> Number:
        found = judged("lr-law", {"grokking": runs, "rates": rates, "regimes": []})
        return next(finding for finding in found.findings if finding.quantity == name).here.trustworthy

    alone, beside = exponent([]), exponent(waiting)
    assert alone.value == pytest.approx(1, abs=0.05)
    assert beside.value < alone.value - 0.1  # what rose at 1000 waits longest
    assert (alone.count, beside.count) == (12, 13)


@pytest.mark.parametrize(
    ("slow", "fast", "published", "expected"),
    [
        (0.5, 1.8, 1.8, HOLDS),
        (2.0, 1.8, 1.8, FAILS),
        (0.2, 0.9, 1.8, ONLY_PUBLISHED),
        (1.75, 1.8, 0.1, UNDECIDED),  # not told apart
    ],
)
def test_alignment(slow: float, fast: float, published: float, expected: str) -> None:
    rates = [
        trial({"lr": 1e-4}, alignments=synthetic.alignments_of(slow)),
        *(trial({"lr": 1e-2, "op": op}, alignments=synthetic.alignments_of(fast, published)) for op in ("add", "mul")),
    ]
    found = judged("alignment", {"rates": rates})
    assert found.verdict == expected
    assert found.findings[0].here.trustworthy == Number(fast, pytest.approx(0.9 * fast), pytest.approx(1.1 * fast), 6)
    assert judged("alignment", {"rates": rates[:1]}).verdict == UNDECIDED


AT: dict[str, Any] = {"basis": "oracle", "basis_from": "x", "measure_every": 0}


@pytest.mark.parametrize(
    ("gradient", "update", "expected"),
    [(math.inf, math.inf, HOLDS), (math.inf, 3000, ONLY_PUBLISHED), (3000, 3000, FAILS), (3000, math.inf, HOLDS)],
)
def test_suppression(gradient: float, update: float, expected: str) -> None:
    runs = [
        trial({**AT, "intervention": kind, "strength": 1.0}, grok=grok)
        for kind, grok in (("project", gradient), ("project-update", update))
    ]
    assert judged("suppression", {"suppression": runs}).verdict == expected
    assert judged("suppression", {"suppression": runs[:1]}).verdict != HOLDS
    # Where the baseline does not grok nothing was suppressed.
    alone = judged("suppression", {"suppression": runs, "grokking": [trial({})]})
    assert alone.verdict == UNDECIDED
    assert alone.remarks[-1] == "2 of 2 runs have no baseline that grokked, and do not count."


@pytest.mark.parametrize(
    ("random", "matched", "expected"),
    [(2900, 2950, HOLDS), (2950, 3500, ONLY_PUBLISHED), (3500, 2500, FAILS), (2900, math.inf, ONLY_PUBLISHED)],
)
def test_random_basis(random: float, matched: float, expected: str) -> None:
    runs = [
        trial({**AT, "intervention": "project", "strength": 0.75, "basis": basis}, grok=grok, every=50)
        for basis, grok in (("random", random), ("matched", matched))
    ]
    found = judged("random-basis", {"random-basis": runs})
    assert found.verdict == expected
    late = (4000 if math.isinf(matched) else matched) - 2900
    assert found.findings[0].here.trustworthy == Number(late, late, late, 1)


@pytest.mark.parametrize(
    ("falls", "control", "runs", "verdict"),
    [
        *((20.0, 1.0, 4, HOLDS), (20.0, 20.0, 4, UNDECIDED), (20.0, 20.0, 5, FAILS)),  # 5 of 5 have p = 1 / 32
        *((1.5, 1.0, 4, FAILS), (1.5, 20.0, 4, FAILS)),
    ],
)
def test_update_gram(falls: float, control: float, runs: int, verdict: str) -> None:
    """A control is read where its baseline grokked, at step 2900 of 4000, where not all of its fall is done."""
    several = range(runs)
    found = judged(
        "update-gram",
        {
            "grokking": [trial({"seed": seed}, grok=2900, fall=falls) for seed in several],
            "control": [trial({"seed": seed, "weight_decay": 0.0}, fall=control) for seed in several],
        },
    )
    assert found.verdict == verdict
    share, other, factor, same, *_ = (finding.here.trustworthy for finding in found.findings)
    assert (share.value, share.count) == (falls >= 2, runs)
    assert (other.value, other.count) == (control >= 2, runs)
    # Windows are full from step 1000 on.
    np.testing.assert_allclose(factor.value, falls ** (1 - 1000 / 2900), rtol=1e-12)
    np.testing.assert_allclose(same.value, control ** (1900 / 4000), rtol=1e-12)


@pytest.mark.parametrize(
    ("faithful", "proper", "expected"),
    [(3000, 3000, HOLDS), (3000, math.inf, ONLY_PUBLISHED), (math.inf, math.inf, FAILS), (math.inf, 3000, HOLDS)],
)
def test_kicks(faithful: float, proper: float, expected: str) -> None:
    runs = [
        trial({**AT, "intervention": "kick", "strength": 100.0, "faithful": flag}, grok=grok)
        for flag, grok in ((True, faithful), (False, proper))
    ]
    assert judged("kicks", {"kicks": runs}).verdict == expected


@pytest.mark.parametrize(
    ("published", "trustworthy", "expected"),
    [([0.0, 2e4], [3.0, 4.0], ONLY_PUBLISHED), ([0.0, 2e4], [0.0, 5e3], HOLDS), ([1.0, 2.0], [1.0, 2.0], FAILS)],
)
def test_slow_regime(published: list[float], trustworthy: list[float], expected: str) -> None:
    run = trial({"preset": "paper-slow"}, steps=1000)
    curvature = run.run.curvature
    curvature["reference_median"] = np.resize(published, len(curvature))
    curvature["defect_median"] = np.resize(trustworthy, len(curvature))
    assert judged("slow-regime", {"slow": [run]}).verdict == expected
    under_way = trial({"preset": "paper-slow"}, status="interrupted", steps=1000)
    under_way.run.curvature["reference_median"] = curvature["reference_median"]
    under_way.run.curvature["defect_median"] = curvature["defect_median"]
    found = judged("slow-regime", {"slow": [under_way]})
    assert found.verdict == (UNDECIDED if expected == FAILS else expected)  # what is not there may yet come
    assert found.remarks[-1] == "Not finished: 1 of 1 runs."
    begun = trial({"preset": "paper-slow"}, status="running")
    begun.run._tables |= dict.fromkeys(("metrics", "curvature"), pd.DataFrame())  # nothing is written yet
    assert judged("slow-regime", {"slow": [begun]}).verdict == NOT_RUN
    unreliable = trial({"preset": "paper-slow"}, reliable=False)
    assert judged("slow-regime", {"slow": [unreliable]}).findings[0].here.trustworthy == Number()


def test_numbers_in_print() -> None:
    assert say(Number()) == "none"
    assert say(Number(NAN, 1.8, 2.9)) == "1.80 to 2.90"
    assert say(Number(71.23, 68.1, 75.0, 3)) == "71.2 (68.1 to 75.0)"
    assert say(Number(1234.0, 1234.0, 1234.0, 1), 0) == "1,234"
    assert Number.over([NAN, 3.0, 1.0, math.inf]) == Number(2.0, 1.0, 3.0, 2)
    assert Number.over([]) == Number()
    assert Number.share(0, 0) == Number()


# What is measured at snapshots


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    settings = {"p": 11, "seed": 5, "steps": 50, "snapshot_every": 10, "measures": "update_gram"}
    config = TrainConfig(**{**NETWORK, **settings})
    return train(config, out=tmp_path_factory.mktemp("finished") / "run")


def test_the_displacement_of_a_snapshot(finished: Run, tmp_path: Path) -> None:
    shorter = train(TrainConfig(**{**finished.config, "steps": 30}), out=tmp_path / "shorter")
    shot = take_snapshot(finished, 30, 10, pairs=3)
    torch.testing.assert_close(
        shot.displacement, flatten(load_model(shorter)) - flatten(load_model(finished, 10)), rtol=0, atol=0
    )
    assert shot.displacement.abs().max() > 1e-3
    again = take_snapshot(finished, 30, 10, pairs=3)
    for name in ("trustworthy", "published", "displacement"):
        assert torch.equal(getattr(shot, name), getattr(again, name))
    assert shot.published.shape == (3, len(shot.displacement))
    with pytest.raises(RunError, match="000000035"):
        take_snapshot(finished, 35)


def test_the_basis_of_a_snapshot_is_that_of_the_trajectory_so_far(finished: Run) -> None:
    """As the run's own monitor has it at its end, from rows at the same steps."""
    basis = take_snapshot(finished, 50, pairs=1).trajectory
    assert basis is not None
    own = gc.Subspace.from_table(**finished.basis())
    assert (basis.dim, basis.size) == (own.dim, own.size)
    rows = own.split(basis.to_dense()).coefficients
    torch.testing.assert_close(rows.square().sum(1), torch.ones(basis.dim, dtype=torch.float64), rtol=0, atol=1e-4)
    assert take_snapshot(finished, 10, pairs=1).trajectory is None  # of two rows


def test_the_paper_s_checkpoints() -> None:
    """The paper's four checkpoints."""
    run = trial({"op": "add"}, grok=3000)  # memorised at 200
    assert paper_checkpoints(run.records, range(0, 4001, 100)) == (200, 2500, 3500)
    late = run.records.assign(train_acc=np.where(run.records["step"] >= 900, 1.0, 0.5))
    assert paper_checkpoints(late, range(0, 4001, 100)) == (200, 900, 2500, 3500)
    assert paper_checkpoints(late, range(0, 4001, 1000)) == (0, 1000, 3000)  # two of them are next to 3000
    assert paper_checkpoints(trial({"op": "add"}).records, range(0, 4001, 100)) == ()
    assert paper_checkpoints(late, []) == ()


def test_where_a_run_ends() -> None:
    accuracies = [0.1, 0.99, NAN, 0.99, 0.2, 0.98, 0.98, NAN, 0.99, 1.0]
    records = pd.DataFrame({"step": range(0, 1000, 100), "test_acc": accuracies})
    run = trial({"grok_patience": 3})
    run.__dict__["records"] = records
    assert run.end == 800
    assert trial({"grok_patience": 3}).end is None


def test_commutators_of_a_snapshot_by_their_definition(finished: Run) -> None:
    """Both arithmetics against theta_AB - theta_BA in float64, from gradients by autograd."""
    shot = take_snapshot(finished, 40, pairs=4)
    config = TrainConfig(**finished.config)
    vector = flatten(load_model(finished, 40))
    model = load_model(finished, 40).double()
    theta = flatten(model)
    order = shuffle(torch.tensor([config.seed]), Purpose.SPLIT, len(table(config.op, config.p)[0]))
    data = split(config.op, config.p, config.train_fraction, order[0])
    generator = torch.Generator().manual_seed(config.seed)

    def gradient(at: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        torch.nn.utils.vector_to_parameters(at, model.parameters())
        loss = torch.nn.functional.cross_entropy(model(data.train_pairs[rows]), data.train_answers[rows])
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    for delta in shot.trustworthy:
        a, b = (torch.randint(len(data.train_answers), (config.measure_rows,), generator=generator) for _ in range(2))
        ends = []
        for first, second in ((a, b), (b, a)):
            point = theta - config.eta * gradient(theta, first)
            ends.append(point - config.eta * gradient(point, second))
        exact = ends[0] - ends[1]
        assert float((delta - exact).norm() / exact.norm()) < 0.02
    assert len(shot.trustworthy) == 4
    # In float32 the same subtraction is mostly rounding: it is an ulp of the weights in many coordinates.
    ulp = torch.finfo(torch.float32).eps * vector.abs().max()
    assert float((shot.published - shot.trustworthy).abs().max()) < 4 * ulp


def test_ratios_and_alignment_of_a_snapshot(generator: torch.Generator) -> None:
    size, k = 3000, 4
    rows = torch.linalg.qr(torch.randn(500, k, generator=generator)).Q.T.contiguous()
    basis = gc.Subspace.from_blocks(size, [(200, rows)])
    delta = torch.randn(200, size, generator=generator)
    shot = replace(
        snapshot(),
        trustworthy=delta,
        published=torch.zeros(2, size),
        displacement=torch.randn(size, generator=generator),
    )
    for support in ("full", "matched"):
        ratios = shot.ratios("trustworthy", basis, support)  # type: ignore[arg-type]
        # Mean of 200 ratios whose standard deviation is about 1 / sqrt(2 k).
        assert ratios.mean() == pytest.approx(1, abs=5 / math.sqrt(2 * k * 200))
        assert np.isnan(shot.ratios("published", basis, support)).all()  # type: ignore[arg-type]
    np.testing.assert_allclose(
        shot.rho("trustworthy", basis) ** 2
        + (shot.ratios("trustworthy", basis, "full") * basis.random_baseline().mean) ** 2,
        1,
    )
    # |cos| has mean m and standard deviation m sqrt(pi / 2 - 1).
    found = shot.alignment("trustworthy")
    assert found.ratio == pytest.approx(1, abs=5 * 0.756 / math.sqrt(200))
    assert 0.0001 < found.p_value < 1
    assert all(map(math.isnan, shot.alignment("published")))
    aligned = replace(shot, displacement=delta[0], trustworthy=delta[:1]).alignment("trustworthy")
    assert aligned.ratio == pytest.approx(math.sqrt(math.pi * size / 2), rel=1e-3)
    assert aligned.p_value == 1e-4


def test_walks_of_a_run(finished: Run, tmp_path: Path) -> None:
    found = compare_walks(finished)
    last = finished.pca_history.groupby("matrix")["pc1_percent"].last()
    assert len(found) == len(last) == 4
    np.testing.assert_allclose(found.set_index("matrix")["pc1_percent"], last[found["matrix"]], rtol=1e-6)
    assert ((found["p_value"] > 0) & (found["p_value"] <= 1)).all()
    assert ((found["walk_percent"] > 40) & (found["walk_percent"] < 100)).all()
    shorter = train(TrainConfig(**{**finished.config, "steps": 30}), out=tmp_path / "shorter")
    pd.testing.assert_frame_equal(compare_walks(finished, 30), compare_walks(shorter))
    assert compare_walks(finished, 10).empty


def test_a_trajectory_that_is_not_kept_whole_has_no_walks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("grokcurv.pca.streaming.MOST_ROWS", 5)
    run = train(TrainConfig(**{**NETWORK, "p": 11, "steps": 40, "pca_every": 1}), out=tmp_path / "run")
    assert list(run.pca_history.columns) == ["step", "matrix", "pc1_percent", "pc1_error"]
    known = run.pca_history.dropna()
    assert known["step"].unique().tolist() == [1, 2, 3, 4, 30]  # a block is 31 rows
    assert (known["pc1_error"][known["step"] < 5] == 0).all()
    assert (known["pc1_error"][known["step"] == 30] > 0).all()
    assert compare_walks(run).empty


# The whole, small

NETWORK: dict[str, Any] = {
    **{"p": 7, "d_model": 16, "heads": 2, "d_ff": 16, "layers": 1, "lr": 1e-2, "threads": 1},
    **{"batch_size": 0, "train_fraction": 0.9, "pairs": 2, "grok_threshold": 0.9, "steps_after_grok": 20},
    **{"eval_every": 10, "measure_every": 10, "pca_every": 10, "checkpoint_every": 50},
}


def intervention(**settings: Any) -> Block:
    return Block({"x2_y2": (3,)}, {**WATCHED, "steps": 40, "intervene_from": 10, "strength": 1.0, **settings})


TINY = Profile(
    "tiny",
    runs={
        "grokking": (Block({"x2_y2": (3,)}, {"steps": 120, "alignment": True, "snapshot_every": 10}),),
        "control": (Block({"x2_y2": (3,)}, {"steps": 100, "weight_decay": 0.0}),),
        "never": (Block({"x3_xy": (3,)}, {"steps": 40, "lr": 1e35, "clip": 0.0}),),  # fails
        "rates": (Block({"x2_y2": (3,)}, {"lr": 1e-3, "steps": 40, "alignment": True, "snapshot_every": 10}),),
    },
    interventions={
        "suppression": (intervention(intervention="project"), intervention(intervention="project-update")),
        "random-basis": tuple(
            intervention(intervention="project", basis=basis, strength=0.5) for basis in ("random", "matched")
        ),
        "kicks": (intervention(intervention="kick", strength=10.0, intervene_every=10),),
    },
    run=NETWORK,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Reproduction:
    return reproduce(profile=TINY, out=tmp_path_factory.mktemp("whole") / "out", workers=1)


SWEEPS, TABLES = ("runs", "interventions"), ("table", "findings", "runs", "matrices")


def test_the_whole(whole: Reproduction) -> None:
    table = whole.table.set_index("claim")
    assert tuple(table.index) == CLAIMS
    assert table["verdict"].isin([HOLDS, ONLY_PUBLISHED, FAILS, UNDECIDED, NOT_RUN]).all()
    assert (table["verdict"] == NOT_RUN).sum() == 1
    assert table.loc["slow-regime", "verdict"] == NOT_RUN
    assert table.loc["slow-regime", "cost_hours"] > 0
    assert table["cost_hours"].notna().sum() == 1
    for claim in ("pc1", "suppression", "random-basis"):
        assert np.isfinite(table.loc[claim, ["published_arithmetic", "trustworthy"]].astype(float)).all()
    (failed,) = whole.failed
    assert failed.startswith("runs/")
    assert "x3_xy" in failed
    page = Page(whole.page)
    assert failed in page.text
    assert len(page.of("img")) == sum(answer.draw is not None for answer in whole.answers) >= 8
    for name in TABLES:
        frame = getattr(whole, name)
        pd.testing.assert_frame_equal(pd.read_parquet(whole.path / f"{name}.parquet"), frame)
        assert len(pd.read_csv(whole.path / f"{name}.csv")) == len(frame)


def test_what_each_run_came_to(whole: Reproduction) -> None:
    """One row each, of both sweeps, by the tables in its folder."""
    table = whole.runs.set_index("run")
    assert set(table["status"]) == {"finished", "failed"}
    assert list(table.index) == [f"{part}/{run}" for part in SWEEPS for run in open_sweep(whole.path / part).plan]
    for name, row in table.iterrows():
        part, run = str(name).split("/")
        folder = open_sweep(whole.path / part).run(run)
        assert (row["op"], row["seed"]) == (folder.config["op"], folder.config["seed"])
        assert row["last_step"] == folder.metrics["step"].max()
        grok = folder.metrics.loc[folder.metrics["test_acc"] >= 0.9, "step"].min()
        assert row["grok_step"] == grok or math.isnan(row["grok_step"] + grok)
        measured = folder.curvature
        assert row["measurements"] == row["difference"] + row["bracket"] == len(measured)
        assert row["unreliable"] == (~measured["reliable"]).sum() if len(measured) else row["unreliable"] == 0
    assert table["measurements"].max() > 0


def test_what_each_matrix_came_to(whole: Reproduction) -> None:
    """PC1 where the run had settled, or ended, by the trajectory in its folder."""
    for run, rows in whole.matrices.groupby("run"):
        part, name = str(run).split("/")
        folder = open_sweep(whole.path / part).run(name)
        (step,) = set(rows["step"])
        settled = gc.analysis.settled_step(folder.metrics, 0.9, 3)
        assert step == (folder.metrics["step"].max() if settled is None else settled)
        history = folder.pca_history
        expected = history[history["step"] == step].set_index("matrix")["pc1_percent"]
        pd.testing.assert_series_equal(rows.set_index("matrix")["pc1_percent"].sort_index(), expected.sort_index())
    assert whole.matrices["run"].nunique() == 2  # the third failed


@pytest.mark.usefixtures("drawn_once")
def test_again_in_a_fresh_folder(whole: Reproduction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit the same, by way of two calls with other claims, and of another engine."""
    monkeypatch.setattr("grokcurv.sweep.driver._engine", Here)
    folder = tmp_path / "out"
    first = reproduce(["exec-random"], TINY, folder, workers=1)
    assert list(first.table["claim"]) == ["exec-random"]
    states = {part: open_sweep(folder / part).runs["status"] for part in SWEEPS}
    assert states["runs"].value_counts().to_dict() == {"pending": 3, "finished": 1}
    assert set(states["interventions"]) == {"pending"}
    seen: list[dict[str, Any]] = []
    second = reproduce(profile=TINY, out=folder, workers=1, on_progress=seen.append)
    for name in TABLES:
        one, other = (getattr(result, name).drop(columns="cost_hours", errors="ignore") for result in (whole, second))
        pd.testing.assert_frame_equal(one, other, check_exact=True)
    assert {news["runs"] for news in seen} == {9}
    assert (seen[-1]["finished"], seen[-1]["failed"]) == (8, 1)


@pytest.mark.usefixtures("drawn_once")
def test_nothing_is_trained_again_and_a_moved_folder_stays_itself(
    whole: Reproduction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(whole.path, moved)
    monkeypatch.setattr("grokcurv.sweep.driver._engine", None)
    monkeypatch.setattr(driver, "_slow_regime_seconds", lambda: 3600.0)
    seen: list[Any] = []
    again = reproduce(["pc1", "slow-regime"], TINY, moved, on_progress=seen.append)
    assert not seen
    pd.testing.assert_frame_equal(again.table.iloc[:1], whole.table.iloc[:1])
    assert again.table["cost_hours"].iloc[1] == 1
    for trains in (True, False):
        with pytest.raises(RunError, match="holds another sweep"):
            reproduce(["pc1"], TINY, moved, seeds=[2], train=trains)


@pytest.mark.usefixtures("drawn_once")
def test_judged_by_what_there_is(whole: Reproduction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while another process trains, and without a trace of a sweep."""
    monkeypatch.setattr("grokcurv.sweep.driver._engine", None)
    shutil.copytree(whole.path, tmp_path / "whole")
    with hold(tmp_path / "whole" / "runs", "run"):
        again = reproduce(profile=TINY, out=tmp_path / "whole", train=False)
    for name in TABLES:
        one, other = (getattr(result, name).drop(columns="cost_hours", errors="ignore") for result in (whole, again))
        pd.testing.assert_frame_equal(one, other, check_exact=True)
    nothing = reproduce(profile=TINY, out=tmp_path / "none", train=False)
    assert set(nothing.table["verdict"]) == {NOT_RUN}
    assert nothing.runs.empty
    assert not any((tmp_path / "none" / part).exists() for part in SWEEPS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"claims": ["pc2"]}, r"claims must be among pc1, .*; got 'pc2'"),
        ({"profile": "slow"}, r"profile must be one of 'quick', 'add', 'paper'; got 'slow'"),
        ({"engine": "slurm"}, r"engine must be one of 'local', 'ray'; got 'slurm'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        reproduce(**{"out": tmp_path / "out", **arguments})
    assert not (tmp_path / "out").exists()


# The page and the command


@pytest.mark.usefixtures("drawn_once")
def test_the_page(tmp_path: Path) -> None:
    page = Page(synthetic.page(tmp_path))
    assert len(page.of("img")) == 11
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == set(CLAIMS) - {"slow-regime"}
    for words in (
        "Holds 11",
        "Not run 1 slow-regime",
        "pc1: holds",
        "71.7 (68.0 to 83.0) 71.0 71.0",
        "It would take 8 h 53 min on one thread of this machine",
        "Runs, control: add 42; mul 42; weight_decay 0",
        RULES["onset"],
        SENTENCES["lr-law"],
    ):
        assert words in page.text, words
    for link in page.of("a"):
        assert link["href"] is not None
        assert f'id="{link["href"][1:]}"' in page.source


@pytest.mark.usefixtures("drawn_once")
def test_the_page_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>\"&"
    page = Page(synthetic.page(tmp_path, {"kicks": [trial({}, status="failed", reason=evil)]}))
    assert not page.of("script")
    assert f"runs/add-42: {evil}" in page.text
    assert "kicks: not decided" in page.text


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Replaces the reproduction, of which one run fails; what it was called with."""
    calls: list[Any] = []
    answers = tuple(answer(claim, Evidence(trials())) for claim in ("pc1", "slow-regime"))

    def reproduce(**options: Any) -> Reproduction:
        calls.append({name: value for name, value in options.items() if name != "on_progress"})
        return Reproduction(tmp_path, "quick", answers, {}, {}, {"runs/0001": "loss is NaN"})

    monkeypatch.setattr("grokcurv.reproduce.reproduce", reproduce)
    return calls


def test_the_command(asked: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reproduce"]) == 1
    said = capsys.readouterr().out
    assert "runs/0001 failed: loss is NaN" in said
    assert said.endswith(f"{tmp_path / 'report.html'}\n")
    rows = {line.split()[0]: line for line in said.splitlines() if line}
    assert rows["pc1"].split()[1:] == ["71.7", "(68.0", "to", "83.0)", "71.0", "71.0", "holds"]
    assert rows["slow-regime"].split()[1:] == ["not", "run"]
    options = (
        "--claims pc1 onset --profile paper --out x --operations add --seeds 1 2 --engine ray --workers 3 --no-train"
    )
    assert cli.main(["reproduce", *options.split()]) == 1
    assert asked == [
        {"profile": "quick", "out": None, "engine": "local", "workers": None, "train": True},
        {"claims": ("pc1", "onset"), "profile": "paper", "out": Path("x"), "operations": ("add",), "seeds": (1, 2)}
        | {"engine": "ray", "workers": 3, "train": False},
    ]


def test_bad_input_to_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reproduce", "--claims", "pc2", "--out", str(tmp_path)]) == 2
    assert "claims must be among pc1," in capsys.readouterr().err


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def reproduce(*_: object, **__: object) -> Reproduction:
        raise KeyboardInterrupt

    monkeypatch.setattr("grokcurv.reproduce.reproduce", reproduce)
    assert cli.main(["reproduce"]) == 130
    assert "to go on: the same command" in capsys.readouterr().err
