"""The claims: what each says, what decides it, and its three numbers.

A claim is judged by a rule that is stated on the page and applied twice, to what the published arithmetic gives here and
to what can be trusted; the two answers make the verdict. What a rule is to be, and its thresholds, stand in this file and
nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from grokcurv.analysis import (
    by_phase,
    changepoint_step,
    control_ratio,
    grok_step,
    lead_time,
    onset_step,
    phases,
    power_law,
    sign_test,
)
from grokcurv.modular import TrainConfig
from grokcurv.report.sweep_figures import plain
from grokcurv.reproduce import figures, published
from grokcurv.reproduce.evidence import Arithmetic, Evidence, Trial
from grokcurv.reproduce.figures import Line, Panel
from grokcurv.reproduce.plan import NEEDS
from grokcurv.reproduce.published import Number

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from grokcurv.report.figures import Theme

HOLDS = "holds"
ONLY_PUBLISHED = "holds only in the published arithmetic"
FAILS = "does not hold"
UNDECIDED = "not decided"
NOT_RUN = "not run"

GROKKED = 0.9
"""Test accuracy whose first occurrence is the grok step."""

PC1_TOLERANCE = 5.0
"""Points of PC1 % by which a mean may differ from the published one."""

WALK_P = 0.01
"""A matrix moves more directly than a random walk if at most this share of walks has a PC1 as large."""

RHO = 0.9995
"""From here on rho is 1.000 in print."""

LEAST_RATIO = 10.0
"""Of the defect to that of the control."""

SIGN_P = 0.05
"""Of the sign test over runs."""

WIDEST_EXPONENT = 1.0
"""A 95 % interval wider than this does not tell one exponent from another."""

SAME_STEP = 100.0
"""Steps by which two runs may differ and grok at once: the interval between evaluations."""

GENTLE = 0.75
"""Strength of a projection up to which the random basis was published to make no difference."""

SPIKE = 1000.0
"""A defect from here on is one of the high ones of the slow regime."""

SENTENCES = {
    "pc1": "The attention weights of a network that groks move along one line: the first principal component of each "
    "matrix’s trajectory holds most of its variance, more than a random walk’s does.",
    "rho": "The commutator lies outside the execution subspace: ρ = |δ⊥| / |δ| is 1.000.",
    "exec-random": "While the network has memorised and not yet grokked, the commutator’s part inside the execution "
    "subspace is 1.8 to 2.9 times what a random subspace of as many dimensions would catch.",
    "control-ratio": "The defect of a run that groks is 10 to 1000 times that of the same run without weight decay.",
    "onset": "The defect rises before the test accuracy does, in every run.",
    "lr-law": "The lead grows with the grok step as a power of it, lead ∝ (grok step)^1.3, over three learning rates.",
    "alignment": "Training steps align with commutators, the more so the higher the learning rate: less than chance at "
    "1e-4, more than chance at 1e-2.",
    "suppression": "Motion outside the execution subspace is needed: without it no run groks.",
    "random-basis": "It is that subspace which matters: damping what lies outside a random one of equal rank, by up to "
    f"{GENTLE:.0%}, delays grokking by less than 50 steps.",
    "kicks": "Pushing the weights along commutators does not prevent grokking: every kicked run groks.",
    "slow-regime": "At learning rate 5e-5 and weight decay 0.1 the defect alternates between 0 and some 10,000 for "
    "hundreds of thousands of steps before the network groks.",
}

RULES = {
    "pc1": f"The median over runs that grok, of the mean over matrices, is within {PC1_TOLERANCE:g} points of the published "
    f"one, and at least half of all their matrices have a PC1 that at most {WALK_P:.0%} of random walks with steps as long "
    "reach.",
    "rho": f"The lowest of the runs’ medians is {RHO} or more.",
    "exec-random": "The lowest of the runs’ medians at the checkpoint of the memorised network is above 1. In the "
    "published arithmetic the random subspaces lie in all of parameter space; the trustworthy ones are confined to the "
    "coordinates on which the execution subspace lives.",
    "control-ratio": f"The median over runs, of the median from the onset of the defect on, is {LEAST_RATIO:g} or more. A "
    "defect that cannot be told from rounding does not count.",
    "onset": f"The sign test over the runs that grokked rejects that lead and lag are as likely, p < {SIGN_P}; a run "
    "without an onset counts as one that did not lead. It fails if half of the runs or fewer lead.",
    "lr-law": f"The 95 % bootstrap interval of the exponent holds the published one and is at most {WIDEST_EXPONENT:g} "
    "wide; a wider one decides nothing.",
    "alignment": "The median over runs at learning rate 1e-2 is above 1 and above that at 1e-4.",
    "suppression": "No run grokks whose baseline did. In the published arithmetic the gradient is projected, from which "
    "AdamW’s moments and weight decay lead out again; trustworthy is the projection of the update itself.",
    "random-basis": f"No run groks more than {SAME_STEP:g} steps, one evaluation, before or after its baseline. In the "
    "published arithmetic the random basis lies in all of parameter space; the trustworthy one is confined to the "
    "matrices of the execution basis.",
    "kicks": "Every kicked run groks whose baseline did. In the published arithmetic the kick also leaves another "
    "gradient to the optimiser.",
    "slow-regime": f"Some measurements are exactly 0 and some are {SPIKE:g} or more.",
}


@dataclass(frozen=True)
class Finding:
    """A number in three ways; where no commutator enters, the last two are one."""

    quantity: str
    published: Number
    arithmetic: Number
    """What the published arithmetic gives here."""
    trustworthy: Number
    decimals: int | None = None
    """In print; three significant digits if None."""

    @property
    def numbers(self) -> tuple[Number, Number, Number]:
        """The three."""
        return self.published, self.arithmetic, self.trustworthy


@dataclass(frozen=True)
class Answer:
    """What became of a claim."""

    claim: str
    verdict: str
    findings: tuple[Finding, ...]
    """The first is what the rule speaks of."""
    remarks: tuple[str, ...]
    """What else a reader has to know, a sentence each."""
    settings: Mapping[str, str]
    """By set, its runs in words."""
    draw: Callable[[Theme], Figure] | None
    alt: str
    caption: str

    @property
    def sentence(self) -> str:
        return SENTENCES[self.claim]

    @property
    def rule(self) -> str:
        return RULES[self.claim]


def verdict(trustworthy: bool | None, arithmetic: bool | None) -> str:
    """The verdict of a rule that says yes, no or, None, that it cannot tell."""
    if trustworthy:
        return HOLDS
    if arithmetic:
        return ONLY_PUBLISHED
    return UNDECIDED if trustworthy is None else FAILS


def answer(claim: str, evidence: Evidence) -> Answer:
    """Judge a claim, or say that none of its runs has been done."""
    trials = evidence.of(claim)
    finished = [trial for trial in trials if trial.status == "finished"]
    lost = [trial for trial in trials if trial.status == "failed"]
    remarks = [f"{len(lost)} of {len(trials)} runs failed and count neither way."] if lost else []
    remarks += [f"{trial.id}: {trial.reason}" for trial in lost]
    open_ = len(trials) - len(finished) - len(lost)
    if open_ and finished:
        remarks.append(f"{open_} of {len(trials)} runs are not finished.")
    settings = {name: _describe(evidence.trials[name]) for name in NEEDS[claim] if evidence.trials[name]}
    if not finished:
        if not trials:
            remarks.append("None of this profile’s runs speaks of it.")
        return Answer(claim, UNDECIDED if lost else NOT_RUN, (), tuple(remarks), settings, None, "", "")
    judged = JUDGES[claim](evidence)
    return Answer(
        claim,
        verdict(judged.trustworthy, judged.arithmetic),
        judged.findings,
        (*judged.remarks, *remarks),
        settings,
        judged.draw,
        judged.alt,
        judged.caption,
    )


@dataclass(frozen=True)
class Judgement:
    """What a claim's function comes to."""

    trustworthy: bool | None
    arithmetic: bool | None
    findings: tuple[Finding, ...]
    draw: Callable[[Theme], Figure] | None = None
    alt: str = ""
    caption: str = ""
    remarks: tuple[str, ...] = ()


def pc1(evidence: Evidence) -> Judgement:
    def percent(name: str) -> Number:
        return Number.over(trial.walks["pc1_percent"].mean() for trial in evidence[name])

    def walks(name: str, column: str) -> Number:
        return Number.over(value for trial in evidence[name] for value in trial.walks[column])

    mean, p = percent("grokking"), walks("grokking", "p_value")
    holds = None
    if mean.count:
        holds = abs(mean.value - published.PC1_PERCENT.value) <= PC1_TOLERANCE and p.value <= WALK_P
    findings = [_same("PC1 %, mean over matrices, runs that grok", published.PC1_PERCENT, mean)]
    names = {"never": "operations that do not grok", "control": "weight decay 0"}
    for name, words in names.items():
        findings.append(_same(f"the same, {words}", published.PC1_PERCENT_OTHERS[name], percent(name)))
    findings.append(
        _same("PC1 % of random walks, runs that grok, by matrix", Number(), walks("grokking", "walk_percent"))
    )
    for name, words in {"grokking": "runs that grok", **names}.items():
        findings.append(_same(f"standard deviations above random walks, {words}", Number(), walks(name, "z")))
    lines = []
    for name, colour in {"grokking": "green", "never": "purple", "control": "muted"}.items():
        for index, trial in enumerate(evidence[name]):
            assert trial.run is not None
            history = trial.run.pca_history
            if not history.empty:
                mean_ = history.groupby("step")["pc1_percent"].mean()
                label = {"grokking": "grok", "never": "do not grok", "control": "weight decay 0"}[name]
                lines.append(Line(mean_.index, mean_, label if index == 0 else "", colour))
    return Judgement(
        holds,
        None,
        _kept(findings),
        partial(figures.lines, [Panel(lines, "PC1 %, mean", band=published.PC1_PERCENT)]) if lines else None,
        f"Mean over matrices against the step, {len(lines)} runs; at the end, for runs that grok, {say(mean)}.",
        "Share of the variance of everything up to each step, mean over the attention matrices, one line a run. Grey: "
        "the published range over matrices at the end.",
        ("No commutator enters, so there is one number for both arithmetics.",),
    )


def rho(evidence: Evidence) -> Judgement:
    trusted = Number.over(_median(trial, "rho") for trial in evidence["grokking"])
    snapshots = [trial.snapshot for trial in evidence["memorised"]]
    arithmetic = Number.over(
        np.nanmedian(shot.rho("published", shot.trajectory)) for shot in snapshots if shot.trajectory is not None
    )
    chance = Number.over(
        math.sqrt(1 - shot.trajectory.dim / shot.size) for shot in snapshots if shot.trajectory is not None
    )

    def holds(number: Number) -> bool | None:
        return number.low >= RHO if number.count else None

    lines = [
        Line(trial.records["step"], 1 - trial.records["rho"], f"{trial.config.op}, seed {trial.config.seed}", index)
        for index, trial in enumerate(evidence["grokking"])
        if "rho" in trial.records and trial.records["rho"].notna().any()
    ]
    remarks = ()
    if chance.count:
        remarks = (
            f"A commutator of random direction has ρ = {chance.value:.5f}: the claim says of δ that it is not confined to a "
            "few dimensions among very many, which is true of nearly all vectors. How its part inside compares with "
            "chance is the next claim.",
        )
    return Judgement(
        holds(trusted),
        holds(arithmetic),
        _kept(
            [
                Finding("ρ, median over a run", published.RHO, arithmetic, trusted, 5),
                Finding("ρ of a random direction", Number(), chance, chance, 5),
            ]
        ),
        partial(figures.lines, [Panel(lines, "1 - ρ", log=True, level=1 - chance.value)]) if lines else None,
        f"On a logarithmic axis over the steps; ρ is {say(trusted, 5)}.",
        "1 - ρ of the trustworthy commutators, one line a run. Black: the value of a random direction.",
        remarks,
    )


def exec_random(evidence: Evidence) -> Judgement:
    shots = [trial.snapshot for trial in evidence["memorised"]]
    paper = 3  # singular directions of a matrix

    def singular(arithmetic: Arithmetic, support: Any, k: int = paper) -> Number:
        return Number.over(
            np.nanmedian(shot.ratios(arithmetic, shot.singular[k], support))
            for shot in shots
            if k in shot.singular and len(getattr(shot, arithmetic))
        )

    def trajectory(arithmetic: Arithmetic, support: Any) -> Number:
        return Number.over(
            np.nanmedian(shot.ratios(arithmetic, shot.trajectory, support))
            for shot in shots
            if shot.trajectory is not None and len(getattr(shot, arithmetic))
        )

    def phase(name: str, column: str) -> Number:
        return Number.over(
            by_phase(trial.records, column)[name] for trial in evidence["grokking"] if column in trial.records
        )

    headline = singular("published", "full"), singular("trustworthy", "matched")
    memorised = published.EXEC_RANDOM["memorisation"]
    findings = [
        Finding("inside over chance, singular directions, memorised", memorised, *headline),
        Finding(
            "the same, random subspaces in all of parameter space",
            Number(),
            singular("published", "full"),
            singular("trustworthy", "full"),
        ),
        Finding(
            "the same, random subspaces in its support",
            Number(),
            singular("published", "matched"),
            singular("trustworthy", "matched"),
        ),
        Finding(
            "directions of the trajectory, in its support, memorised",
            Number(),
            trajectory("published", "matched"),
            trajectory("trustworthy", "matched"),
        ),
    ]
    for name in ("memorisation", "pre-grok", "post-grok"):
        past = published.EXEC_RANDOM.get(name, Number()) if name == "post-grok" else Number()
        findings.append(
            Finding(
                f"directions of the trajectory so far, in its support, {name}",
                past,
                Number(),
                phase(name, "exec_matched_ratio"),
            )
        )

    def holds(number: Number) -> bool | None:
        return number.low > 1 if number.count else None

    swept = sorted({k for shot in shots for k in shot.singular})
    lines = [
        Line(swept, [singular(arithmetic, support, k).value for k in swept], f"{words}, {where}", colour, style)
        for arithmetic, words, colour in (
            ("published", "float32 formula", "orange"),
            ("trustworthy", "trustworthy", "blue"),
        )
        for support, where, style in (("full", "all parameters", "--"), ("matched", "support", "-"))
    ]
    arithmetic, trusted = headline
    return Judgement(
        holds(trusted),
        holds(arithmetic),
        _kept(findings),
        partial(
            figures.lines,
            [Panel(lines, "inside / chance", level=1.0, band=memorised)],
            xlabel="singular directions of each attention matrix",
        )
        if swept
        else None,
        f"Against the number of directions; for three, {say(arithmetic)} by the float32 formula among all parameters and "
        f"{say(trusted)} for the trustworthy commutators in the support.",
        "The commutator’s share inside the leading singular directions of the attention matrices of the memorised "
        "network, over its mean in random subspaces of as many dimensions, median over the runs. Black: chance. Grey: "
        "published, for three directions.",
    )


def control(evidence: Evidence) -> Judgement:
    pairs = [(trial, other) for other in evidence["control"] if (trial := evidence.baseline(other)) is not None]

    def ratios(arithmetic: Arithmetic) -> list[Any]:
        found = []
        for trial, other in pairs:
            ours, theirs = _defects(trial, arithmetic), _defects(other, arithmetic)
            onset = onset_step(ours)
            if onset is not None:
                found.append(control_ratio(ours[ours["step"] >= onset], theirs))
        return found

    found = {arithmetic: ratios(arithmetic) for arithmetic in ("published", "trustworthy")}
    medians = {name: Number.over(ratio.median for ratio in ratios) for name, ratios in found.items()}
    largest = {name: Number.over(ratio.maximum for ratio in ratios) for name, ratios in found.items()}

    def holds(number: Number) -> bool | None:
        return number.value >= LEAST_RATIO if number.count else None

    compared = sum(ratio.reliable for ratio in found["trustworthy"])
    of = sum(len(other.records) for _, other in pairs)
    panels = []
    for trial, other in pairs[:2]:
        lines = [
            Line(rows["step"], rows["defect_median"], f"{words}{how}", colour, style)
            for one, words, style in ((trial, "weight decay 1", "-"), (other, "weight decay 0", ":"))
            for arithmetic, how, colour in (("published", ", float32 formula", "orange"), ("trustworthy", "", "blue"))
            for rows in [_defects(one, arithmetic)]
        ]
        panels.append(Panel(lines, f"defect D, {trial.config.op}", log=True))
    return Judgement(
        holds(medians["trustworthy"]),
        holds(medians["published"]),
        _kept(
            [
                Finding(
                    "defect over that of the control, median from the onset on",
                    published.CONTROL_RATIO,
                    medians["published"],
                    medians["trustworthy"],
                ),
                Finding("the same, largest", Number(), largest["published"], largest["trustworthy"]),
            ]
        ),
        partial(figures.lines, panels) if panels else None,
        f"Defects over the steps on a logarithmic axis, with and without weight decay; their ratio is "
        f"{say(medians['published'])} by the float32 formula and {say(medians['trustworthy'])} where both can be trusted.",
        "Solid: weight decay 1. Dotted: weight decay 0. Gaps are measurements that cannot be told from rounding.",
        (f"Both defects could be trusted at {compared:,} steps, of {of:,} rows of the controls.",) if pairs else (),
    )


def onset(evidence: Evidence) -> Judgement:
    grokked = [trial for trial in evidence["grokking"] if _grok(trial) is not None]

    def leads(arithmetic: Arithmetic, threshold: float = GROKKED, rule: Any = onset_step) -> list[float]:
        """A lead for each run that passed the threshold; minus infinity where the defect never rose."""
        found = []
        for trial in grokked:
            defects, grok = _defects(trial, arithmetic), grok_step(trial.records, threshold)
            if grok is not None:
                step = rule(defects)
                found.append(-math.inf if step is None else float(grok - step))
        return found

    def since_memorised(defects: pd.DataFrame) -> int | None:
        known = phases(defects) != "early"
        known &= phases(defects) != ""
        return changepoint_step(defects, since=int(defects["step"][known].min())) if known.any() else None

    def both(quantity: str, past: Number, decimals: int | None = 0, **how: Any) -> Finding:
        return Finding(quantity, past, *(Number.over(leads(a, **how)) for a in ("published", "trustworthy")), decimals)

    tests = {arithmetic: sign_test(leads(arithmetic)) for arithmetic in ("published", "trustworthy")}

    def holds(test: Any) -> bool | None:
        runs = test.positive + test.negative + test.ties
        if not runs:
            return None
        if test.p_value < SIGN_P:
            return True
        return False if 2 * test.positive <= runs else None

    findings = [
        both("lead, steps: first rise of the defect to test accuracy 0.9", published.LEAD_TIME),
        Finding(
            "share of runs in which the defect rose first",
            Number(1.0, count=12),
            *(Number.share(t.positive, t.positive + t.negative + t.ties) for t in tests.values()),
            2,
        ),
        Finding("p of the sign test", Number(), *(Number(test.p_value) for test in tests.values())),
        *(
            both(f"lead to test accuracy {threshold:g}", Number(), threshold=threshold)
            for threshold in (0.5, 0.7, 0.95, 0.98)
        ),
        both("lead by the changepoint rule, from memorisation on", Number(), rule=since_memorised),
    ]
    forest = [finding for finding in findings if finding.quantity.startswith("lead")]
    return Judgement(
        holds(tests["trustworthy"]),
        holds(tests["published"]),
        _kept(findings),
        partial(figures.forest, forest, xlabel="steps", zero=0.0) if grokked else None,
        f"Leads by what counts as a rise and as grokked; to 0.9 and by the paper’s rule {say(findings[0].trustworthy, 0)} "
        "steps where the defect can be trusted.",
        "Point: median over the runs. Line: their range. Grey: published range. Right of zero the defect rose first.",
        ("Measurements are an interval apart, and so are evaluations: a lead is known to that.",),
    )


def lr_law(evidence: Evidence) -> Judgement:
    trials = [trial for name in ("grokking", "rates") for trial in evidence[name]]
    points: dict[Arithmetic, list[tuple[float, float]]] = {"published": [], "trustworthy": []}
    for arithmetic, found in points.items():
        for trial in trials:
            lead = lead_time(_defects(trial, arithmetic), GROKKED)
            grok = _grok(trial)
            if lead is not None and grok is not None and lead > 0:
                found.append((float(grok), float(lead)))
    laws = {name: power_law(*zip(*found, strict=True)) for name, found in points.items() if found}
    exponents = {
        name: Number(laws[name].exponent, laws[name].low, laws[name].high, len(found)) if name in laws else Number()
        for name, found in points.items()
    }

    def holds(number: Number) -> bool | None:
        width = number.high - number.low
        if not (math.isfinite(number.value) and width <= WIDEST_EXPONENT):
            return None
        return number.low <= published.LEAD_EXPONENT.value <= number.high

    findings = [
        Finding("exponent of the lead in the grok step", published.LEAD_EXPONENT, *exponents.values(), 2),
    ]
    for rate, past in published.MAX_DEFECT.items():
        mine = [trial for trial in trials if trial.config.lr == rate]
        highest = [Number.over(_defects(trial, a)["defect_median"].max() for trial in mine) for a in points]
        findings.append(Finding(f"highest defect of a run, learning rate {plain(rate)}", past, *highest))
    for rate in published.MAX_DEFECT:
        steps = Number.over(_grok(trial) or math.nan for trial in trials if trial.config.lr == rate)
        known = [step for (_, lr), step in published.GROK_STEPS.items() if lr == rate]
        findings.append(_same(f"grok step, learning rate {plain(rate)}", Number.over(known), steps, 0))
    fits = {name: law for name, law in laws.items() if math.isfinite(law.exponent)}
    return Judgement(
        holds(exponents["trustworthy"]),
        holds(exponents["published"]),
        _kept(findings),
        partial(figures.scatter, points, fits) if laws else None,
        f"Lead against grok step on logarithmic axes; exponent {say(exponents['trustworthy'], 2)} where the defect can be "
        f"trusted, {say(exponents['published'], 2)} by the float32 formula.",
        "One point a run, lines by least squares.",
        ("Only runs that grokked after their defect rose can enter.",),
    )


def alignment(evidence: Evidence) -> Judgement:
    trials = [trial for name in ("grokking", "rates") for trial in evidence[name]]
    rates = {rate: [trial for trial in trials if trial.config.lr == rate] for rate in published.ALIGNMENT}
    whole = {rate: Number.over(_median(t, "step_alignment_ratio") for t in mine) for rate, mine in rates.items()}
    ends: dict[Arithmetic, dict[float, Number]] = {
        arithmetic: {
            rate: Number.over(trial.snapshot.alignment(arithmetic) for trial in mine) for rate, mine in rates.items()
        }
        for arithmetic in ("published", "trustworthy")
    }

    def holds(at: Mapping[float, Number]) -> bool | None:
        low, high = at[1e-4], at[1e-2]
        return high.value > max(1.0, low.value) if low.count and high.count else None

    findings = [
        Finding(f"|cos| over chance, learning rate {plain(rate)}", past, ends["published"][rate], whole[rate])
        for rate, past in reversed(published.ALIGNMENT.items())
    ]
    findings += [
        Finding(
            f"the same at the end of the run, {plain(rate)}",
            Number(),
            ends["published"][rate],
            ends["trustworthy"][rate],
        )
        for rate in reversed(published.ALIGNMENT)
    ]
    kept = _kept(findings)
    return Judgement(
        holds(whole),
        holds(ends["published"]),
        kept,
        partial(figures.forest, kept, xlabel="|cos| of step and commutator / chance", zero=1.0),
        f"By learning rate; at 1e-2 {say(whole[1e-2])} over whole runs where commutators can be trusted.",
        "Point: median over the runs. Line: their range. Grey: published range. One is chance.",
        ("The float32 commutators are those at the runs’ last checkpoints, the trustworthy ones those of whole runs.",),
    )


def suppression(evidence: Evidence) -> Judgement:
    pairs = _beside_baselines(evidence, "suppression")

    def chosen(kind: str, strength: float, every: int = 1) -> list[tuple[Trial, Trial]]:
        wanted = (kind, strength, every)
        return [
            (t, b) for t, b in pairs if (t.config.intervention, t.config.strength, t.config.intervene_every) == wanted
        ]

    groks = {kind: _share(chosen(kind, 1.0)) for kind in ("project", "project-update")}

    def holds(number: Number) -> bool | None:
        return number.value == 0 if number.count else None

    findings = [
        Finding("share of runs that grok, nothing outside", published.SUPPRESSED, *groks.values(), 2),
        Finding(
            "the same, projected at every tenth step",
            Number(),
            _share(chosen("project", 1.0, 10)),
            _share(chosen("project-update", 1.0, 10)),
            2,
        ),
    ]
    for strength in sorted({t.config.strength for t, _ in pairs if t.config.strength < 1}):
        past = published.SUPPRESSION_DELAY if strength == GENTLE else Number()
        delays = (_delays(chosen(kind, strength)) for kind in groks)
        findings.append(Finding(f"steps of delay at strength {strength:g}", past, *delays, 0))
    return _interventions(
        pairs,
        findings,
        (holds(groks["project-update"]), holds(groks["project"])),
        (
            "AdamW divides every coordinate by its own running size, so a gradient that is a quarter as large almost "
            "everywhere makes almost the same step: below strength 1 the gradient’s projection changes little.",
        ),
    )


def random_basis(evidence: Evidence) -> Judgement:
    pairs = _beside_baselines(evidence, "random-basis")

    def chosen(basis: str, full: bool) -> list[tuple[Trial, Trial]]:
        return [
            (t, b)
            for t, b in pairs
            if t.config.basis == basis and (t.config.strength == 1.0 if full else t.config.strength <= GENTLE)
        ]

    bases = ("random", "matched")
    delays = {basis: _delays(chosen(basis, full=False)) for basis in bases}

    def holds(number: Number) -> bool | None:
        return max(abs(number.low), abs(number.high)) <= SAME_STEP if number.count else None

    findings = [
        Finding(f"steps of delay, up to strength {GENTLE:g}", published.RANDOM_DELAY, *delays.values(), 0),
        Finding("share of runs that grok at strength 1", Number(), *(_share(chosen(b, full=True)) for b in bases), 2),
    ]
    return _interventions(pairs, findings, (holds(delays["matched"]), holds(delays["random"])), ())


def kicks(evidence: Evidence) -> Judgement:
    pairs = _beside_baselines(evidence, "kicks")
    kicked = [pair for pair in pairs if pair[0].config.intervention == "kick"]
    faithful = [pair for pair in kicked if pair[0].config.faithful]
    proper = [pair for pair in kicked if not pair[0].config.faithful]

    def holds(number: Number) -> bool | None:
        return number.value == 1 if number.count else None

    shares = _share(faithful), _share(proper)
    kinds = {
        "along fresh commutators": [p for p in proper if p[0].config.direction == "commutator" and not _once(p[0])],
        "in random directions": [p for p in proper if p[0].config.direction == "random" and not _once(p[0])],
        "once": [p for p in proper if _once(p[0])],
        "noise": [pair for pair in pairs if pair[0].config.intervention == "noise"],
    }
    findings = [
        Finding("share of kicked runs that grok", published.KICKED, *shares, 2),
        Finding("steps of delay by kicks", Number(), _delays(faithful), _delays(proper), 0),
        *(Finding(f"the same, {words}", Number(), Number(), _delays(chosen), 0) for words, chosen in kinds.items()),
    ]
    return _interventions(pairs, findings, (holds(shares[1]), holds(shares[0])), ())


def slow_regime(evidence: Evidence) -> Judgement:
    trials = evidence["slow"]
    kinds: tuple[Arithmetic, ...] = ("published", "trustworthy")
    values = [[v for t in trials for v in _defects(t, a)["defect_median"].dropna()] for a in kinds]

    def holds(defects: Sequence[float]) -> bool | None:
        return 0.0 in defects and max(defects) >= SPIKE if defects else None

    findings = [
        Finding(
            "share of measurements that are exactly 0",
            Number(),
            *(Number.share(v.count(0.0), len(v)) for v in values),
            3,
        ),
        Finding("highest defect", Number(), *(Number(max(v, default=math.nan)) for v in values)),
        _same("grok step", published.SLOW_GROK_STEP, Number.over(_grok(trial) or math.nan for trial in trials), 0),
    ]
    lines = [
        Line(rows["step"], rows["defect_median"], words if index == 0 else "", colour)
        for index, trial in enumerate(trials)
        for arithmetic, words, colour in (
            ("published", "float32 formula", "orange"),
            ("trustworthy", "trustworthy", "blue"),
        )
        for rows in [_defects(trial, arithmetic)]
    ]
    arithmetic, trustworthy = values
    return Judgement(
        holds(trustworthy),
        holds(arithmetic),
        _kept(findings),
        partial(figures.lines, [Panel(lines, "defect D", log=True)]),
        "Defect over the steps on a logarithmic axis, in both arithmetics.",
        "Gaps are measurements that are 0 or cannot be told from rounding.",
    )


JUDGES: dict[str, Callable[[Evidence], Judgement]] = {
    "pc1": pc1,
    "rho": rho,
    "exec-random": exec_random,
    "control-ratio": control,
    "onset": onset,
    "lr-law": lr_law,
    "alignment": alignment,
    "suppression": suppression,
    "random-basis": random_basis,
    "kicks": kicks,
    "slow-regime": slow_regime,
}


def say(number: Number, decimals: int | None = None) -> str:
    """A number in words: 71.2 (68.1 to 75.0); the range alone where there is no middle; 'none'."""
    from grokcurv.report.summary import number as short

    def one(value: float) -> str:
        return short(value) if decimals is None else f"{value:,.{decimals}f}"

    interval = f"{one(number.low)} to {one(number.high)}" if math.isfinite(number.low + number.high) else ""
    if not math.isfinite(number.value):
        return interval or "none"
    return one(number.value) + (f" ({interval})" if interval and number.low < number.high else "")


def label(config: TrainConfig) -> str:
    """An intervention in a few words."""
    often = (
        "once"
        if config.intervene_times == 1
        else f"every {config.intervene_every}"
        if config.intervene_every > 1
        else ""
    )
    if config.intervention == "kick":
        what = f"kick, {config.direction}{', faithful' if config.faithful else ''}"
    else:
        what = {"project": f"gradient, {config.basis}", "project-update": f"update, {config.basis}"}.get(
            config.intervention, config.intervention
        )
    return ", ".join(filter(None, [what, f"{config.strength:g}", often]))


def _interventions(
    pairs: list[tuple[Trial, Trial]],
    findings: Iterable[Finding],
    holds: tuple[bool | None, bool | None],
    remarks: tuple[str, ...],
) -> Judgement:
    """Of interventions that are set beside their baselines."""
    kinds = list(dict.fromkeys(label(trial.config) for trial, _ in pairs))
    said: set[str] = set()
    lines = []
    for baseline in dict.fromkeys(baseline.id for _, baseline in pairs):
        rows = next(b.records for _, b in pairs if b.id == baseline)
        lines.append(Line(rows["step"], rows["test_acc"], "" if "baseline" in said else "baseline", "ink"))
        said.add("baseline")
    for trial, _ in pairs:
        kind = label(trial.config)
        lines.append(
            Line(trial.records["step"], trial.records["test_acc"], "" if kind in said else kind, kinds.index(kind))
        )
        said.add(kind)
    kept = _kept(findings)
    return Judgement(
        *holds,
        kept,
        partial(figures.lines, [Panel(lines, "test accuracy", height=2.6)]) if lines else None,
        f"Test accuracy over the steps, {len(pairs)} runs beside their baselines; "
        + "; ".join(f"{finding.quantity}: {say(finding.trustworthy, finding.decimals)}" for finding in kept[:1])
        + ".",
        "One line a run. Black: the same run without an intervention.",
        remarks,
    )


def _beside_baselines(evidence: Evidence, name: str) -> list[tuple[Trial, Trial]]:
    """The finished runs of a set, each with its baseline if that grokked."""
    pairs = [(trial, evidence.baseline(trial)) for trial in evidence[name]]
    return [(trial, baseline) for trial, baseline in pairs if baseline is not None and _grok(baseline) is not None]


def _share(pairs: Sequence[tuple[Trial, Trial]]) -> Number:
    """Of the runs, those that grokked."""
    if not pairs:
        return Number()
    return Number.share(sum(_grok(trial) is not None for trial, _ in pairs), len(pairs))


def _delays(pairs: Sequence[tuple[Trial, Trial]]) -> Number:
    """Steps by which runs grok later than their baselines; of one that does not, those it had gone on for by its end."""
    late = []
    for trial, baseline in pairs:
        grok, usual = _grok(trial), _grok(baseline)
        assert usual is not None
        late.append(float((trial.records["step"].max() if grok is None else grok) - usual))
    return Number.over(late)


def _once(trial: Trial) -> bool:
    return trial.config.intervene_times == 1


def _grok(trial: Trial) -> int | None:
    return grok_step(trial.records, GROKKED)


def _defects(trial: Trial, arithmetic: Arithmetic) -> pd.DataFrame:
    """A run's records with its defect by one arithmetic in ``defect_median``, and nothing that cannot be trusted."""
    import pandas as pd

    records = trial.records
    rows = pd.DataFrame({name: records[name] for name in ("step", "train_acc", "test_acc") if name in records})
    if arithmetic == "published":
        rows["defect_median"] = records.get("reference_median", math.nan)
    elif "defect_median" in records:
        rows["defect_median"] = records["defect_median"].where(records["reliable"].eq(True))
    else:
        rows["defect_median"] = math.nan
    return rows


def _median(trial: Trial, column: str) -> float:
    """Median of a column over the reliable measurements of a run."""
    if column not in trial.records:
        return math.nan
    return float(trial.records[column].where(trial.records["reliable"].eq(True)).median())


def _same(quantity: str, past: Number, here: Number, decimals: int | None = None) -> Finding:
    """A finding into which no commutator enters."""
    return Finding(quantity, past, here, here, decimals)


def _kept(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The first finding, and those others that have a number from here."""
    first, *others = findings
    return (first, *(finding for finding in others if _any(finding.arithmetic) or _any(finding.trustworthy)))


def _any(number: Number) -> bool:
    return not all(map(math.isnan, (number.value, number.low, number.high)))


def _describe(trials: Sequence[Trial]) -> str:
    """The operations with their seeds, and the settings other than the default that all runs share or that vary."""
    seeds: dict[str, list[int]] = {}
    for trial in trials:
        seeds.setdefault(trial.config.op, []).append(trial.config.seed)
    said = [f"{op} {', '.join(map(str, dict.fromkeys(its)))}" for op, its in seeds.items()]
    default = TrainConfig(threads=1)
    for field in fields(TrainConfig):
        values = list(dict.fromkeys(getattr(trial.config, field.name) for trial in trials))
        if field.name not in ("op", "seed", "basis_from") and values != [getattr(default, field.name)]:
            said.append(f"{field.name} {' | '.join(map(plain, values))}")
    return "; ".join(said)
