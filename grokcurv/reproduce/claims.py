"""The claims judged: for each a function from the evidence to its numbers, its rule's word on them, and a figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from grokcurv import analysis
from grokcurv.report.format import plain
from grokcurv.reproduce import figures, published, rules
from grokcurv.reproduce.evidence import AlignmentTest, Arithmetic, Evidence, Snapshot, Support, Trial
from grokcurv.reproduce.figures import ARITHMETICS, Line, Panel
from grokcurv.reproduce.findings import Answer, Finding, Here, Judgement, say
from grokcurv.reproduce.plan import NEEDS
from grokcurv.reproduce.published import Number
from grokcurv.training import TrainConfig

if TYPE_CHECKING:
    from grokcurv.subspace import Subspace

Rise = Callable[[pd.DataFrame], int | None]
"""The step from which the defect has risen."""

DIRECTIONS = 3
"""Singular directions of each matrix in the paper's control."""


def answer(claim: str, evidence: Evidence) -> Answer:
    """Judge a claim, or say that none of its runs has been done."""
    trials = evidence.of(claim)
    finished = sum(trial.status == "finished" for trial in trials)
    failed = [trial for trial in trials if trial.status == "failed"]
    remarks = [f"{len(failed)} of {len(trials)} runs failed and count neither way."] if failed else []
    remarks += [f"{trial.id}: {trial.reason}" for trial in failed]
    if finished and len(trials) > finished + len(failed):
        remarks.append(f"{len(trials) - finished - len(failed)} of {len(trials)} runs are not finished.")
    settings = {name: _describe(evidence.trials[name]) for name in NEEDS[claim] if evidence.trials[name]}
    if not trials:
        remarks.append("This profile has no run that speaks of it.")
    if not finished:
        verdict = rules.UNDECIDED if failed else rules.NOT_RUN
        return Answer(claim=claim, verdict=verdict, settings=settings, remarks=tuple(remarks))
    judged = JUDGES[claim](evidence)
    first, *others = judged.findings
    findings = (first, *(finding for finding in others if any(number.known for number in finding.here)))
    arithmetic, trustworthy = judged.holds
    whole = {**vars(judged), "findings": findings, "remarks": (*judged.remarks, *remarks)}
    return Answer(**whole, claim=claim, verdict=rules.verdict(trustworthy, arithmetic), settings=settings)


def pc1(evidence: Evidence) -> Judgement:
    runs = {name: evidence[name] for name in NEEDS["pc1"]}
    runs["grokking"] = tuple(trial for trial in evidence["grokking"] if trial.end is not None)

    def mean(name: str) -> Number:
        return Number.over(trial.walks["pc1_percent"].mean() for trial in runs[name])

    def matrices(name: str, column: str) -> Number:
        return Number.over(value for trial in runs[name] for value in trial.walks[column])

    names = {"grokking": "runs that grok", "never": "operations that do not", "control": "weight decay 0"}
    past = {"grokking": published.PC1_PERCENT, **published.PC1_PERCENT_OTHERS}
    here = mean("grokking")
    close = abs(here.value - published.PC1_PERCENT.value) <= rules.PC1_TOLERANCE
    holds = close and matrices("grokking", "p_value").value <= rules.WALK_P if here.count else None
    lines = []
    for name, colour in zip(names, ("green", "purple", "muted"), strict=True):
        for index, trial in enumerate(runs[name]):
            history = trial.trajectory
            lines.append(Line(history.index, history, names[name] if index == 0 else "", colour))
    grokked = runs["grokking"]
    ends = [trial.walks["pc1_percent"].mean() for trial in grokked]
    lines.append(Line([trial.end for trial in grokked], ends, "has grokked", "ink", " "))
    last = Number.over(trial.trajectory.iloc[-1] for trial in grokked)
    return Judgement(
        (None, holds),
        (
            *(_same(f"PC1 %, mean over matrices, {names[name]}", mean(name), past[name]) for name in names),
            _same("PC1 %, mean over matrices, at the end of runs that grok", last),
            _same("PC1 % of random walks beside those that grok", matrices("grokking", "walk_percent")),
            *(_same(f"standard deviations above random walks, {names[name]}", matrices(name, "z")) for name in names),
        ),
        partial(figures.lines, [Panel(lines, "PC1 %, mean", band=published.PC1_PERCENT)]),
        f"Mean over the matrices against the step; where runs have grokked, {say(here)} %.",
        "Share of the variance of everything up to each step, mean over the attention matrices, one line a run. Black: "
        "where a run has grokked. Grey: the published range over matrices at that step.",
        ("No commutator enters, so there is one number for both arithmetics.",),
    )


def rho(evidence: Evidence) -> Judgement:
    shots = [trial.snapshot for trial in evidence["grokking"]]
    known = [(shot, shot.trajectory) for shot in shots if shot is not None and shot.trajectory is not None]
    here = Here(
        Number.over(_middle(shot.rho("published", basis)) for shot, basis in known),
        Number.over(_median(trial, "rho") for trial in evidence["grokking"]),
    )
    chance = Number.over(math.sqrt(1 - basis.dim / shot.size) for shot, basis in known)
    lines = [
        Line(trial.records["step"], 1 - trial.records["rho"], f"{trial.config.op}, seed {trial.config.seed}", index)
        for index, trial in enumerate(evidence["grokking"])
        if "rho" in trial.records
    ]
    remark = (
        f"A commutator of random direction has rho = {chance.value:.5f}: that δ is not confined to a few dimensions "
        "among very many is true of nearly all vectors. How its part inside compares with chance is the next claim."
    )
    return Judgement(
        _both(lambda number: number.low >= rules.RHO, here),
        (
            Finding("rho, median over a run", here, published.RHO, 5),
            _same("rho of a random direction", chance, decimals=5),
        ),
        partial(figures.lines, [Panel(lines, r"1 - $\rho$", log=True, level=1 - chance.value)]),
        f"1 - rho on a logarithmic axis over the steps; rho is {say(here.trustworthy, 5)}.",
        "Of trustworthy commutators, one line a run. Black: a random direction.",
        (remark,) if chance.count else (),
    )


def exec_random(evidence: Evidence) -> Judgement:
    shots = [trial.snapshot for trial in evidence["grokking"] if trial.snapshot is not None]
    without = [trial.id for trial in evidence["grokking"] if trial.snapshot is None]

    def ratio(arithmetic: Arithmetic, support: Support, basis: Callable[[Snapshot], Subspace | None]) -> Number:
        found = [(shot, space) for shot in shots if (space := basis(shot)) is not None]
        return Number.over(_middle(shot.ratios(arithmetic, space, support)) for shot, space in found)

    def singular(arithmetic: Arithmetic, support: Support, k: int = DIRECTIONS) -> Number:
        return ratio(arithmetic, support, lambda shot: shot.singular.get(k))

    def phase(name: str) -> Number:
        tables = [t.records for t in evidence["grokking"] if "exec_matched_ratio" in t.records]
        return Number.over(analysis.by_phase(records, "exec_matched_ratio")[name] for records in tables)

    here = Here(singular("published", "full"), singular("trustworthy", "matched"))
    memorised = published.EXEC_RANDOM["memorisation"]
    trajectory = _here(lambda a: ratio(a, "matched", lambda shot: shot.trajectory))
    pasts = {"memorisation": Number(), "pre-grok": Number(), "post-grok": published.EXEC_RANDOM["post-grok"]}
    findings = (
        Finding("inside over chance, singular directions, memorised", here, memorised),
        Finding("the same, random subspaces in all of parameter space", _here(lambda a: singular(a, "full"))),
        Finding("the same, in the support", _here(lambda a: singular(a, "matched"))),
        Finding("directions of the trajectory, in their support, memorised", trajectory),
        *(Finding(f"the same over runs that grok, {n}", Here(Number(), phase(n)), past) for n, past in pasts.items()),
    )
    supports: tuple[tuple[Support, str, str], ...] = (("full", "all parameters", "--"), ("matched", "support", "-"))
    swept = sorted({k for shot in shots for k in shot.singular})
    lines = [
        Line(swept, [singular(a, support, k).value for k in swept], f"{words}, {where}", colour, style)
        for a, (colour, words) in ARITHMETICS.items()
        for support, where, style in supports
    ]
    panel = Panel(lines, "inside / chance", level=1.0, band=memorised)
    return Judgement(
        _both(lambda number: number.low > 1, here),
        findings,
        partial(figures.lines, [panel], xlabel="singular directions of each attention matrix") if swept else None,
        f"Against the number of directions; for three, {say(here.arithmetic)} by the float32 formula among all "
        f"parameters, {say(here.trustworthy)} for trustworthy commutators in the support.",
        "The commutator's share inside the leading singular directions of the attention matrices of the memorised "
        "network, over its mean in random subspaces of as many dimensions, median over the runs. Black: chance. Grey: "
        "published, for three directions.",
        tuple(f"{name} has no snapshot in the phase of memorisation and does not count." for name in without),
    )


def control(evidence: Evidence) -> Judgement:
    pairs = [(trial, other) for other in evidence["control"] if (trial := evidence.baseline(other)) is not None]

    def ratios(arithmetic: Arithmetic) -> list[Any]:
        found = []
        for trial, other in pairs:
            ours, theirs = _defects(trial, arithmetic), _defects(other, arithmetic)
            onset = analysis.onset_step(ours)
            if onset is not None:
                found.append(analysis.control_ratio(ours[ours["step"] >= onset], theirs))
        return found

    here = _here(lambda a: Number.over(ratio.median for ratio in ratios(a)))
    compared = ratios("trustworthy")
    panels = []
    for trial, other in pairs[:2]:
        lines = _defect_lines(trial, ", weight decay 1") + _defect_lines(other, ", weight decay 0", ":")
        panels.append(Panel(lines, f"D, {trial.config.op}, seed {trial.config.seed}", log=True))
    trusted, steps = sum(ratio.reliable for ratio in compared), sum(ratio.steps for ratio in compared)
    remark = f"From the onset on, both defects could be trusted at {trusted:,} of {steps:,} steps that both measured."
    return Judgement(
        _both(lambda number: number.value >= rules.LEAST_RATIO, here),
        (
            Finding("defect over the control's, median from the onset on", here, published.CONTROL_RATIO),
            Finding("the same, largest", _here(lambda a: Number.over(ratio.maximum for ratio in ratios(a)))),
        ),
        partial(figures.lines, panels) if panels else None,
        "Defects over the steps on a logarithmic axis, with and without weight decay; their ratio is "
        f"{say(here.arithmetic)} by the float32 formula and {say(here.trustworthy)} where both can be trusted.",
        "Solid: weight decay 1. Dotted: weight decay 0. Gaps are measurements that cannot be told from rounding.",
        (remark,) if steps else (),
    )


def onset(evidence: Evidence) -> Judgement:
    grokked = [trial for trial in evidence["grokking"] if _grok(trial) is not None]

    def leads(arithmetic: Arithmetic, threshold: float, rise: Rise) -> list[float]:
        """A lead for each run that passed the threshold; minus infinity where the defect never rose."""
        found = []
        for trial in grokked:
            grok, step = analysis.grok_step(trial.records, threshold), rise(_defects(trial, arithmetic))
            if grok is not None:
                found.append(-math.inf if step is None else float(grok - step))
        return found

    def past_memorising(defects: pd.DataFrame) -> int | None:
        memorised = defects["step"][~np.isin(analysis.phases(defects), ["", "early"])]
        return analysis.changepoint_step(defects, since=int(memorised.min())) if len(memorised) else None

    def lead(threshold: float = rules.GROKKED, rise: Rise = analysis.onset_step) -> Here:
        return _here(lambda a: Number.over(leads(a, threshold, rise)))

    tests = [analysis.sign_test(leads(a, rules.GROKKED, analysis.onset_step)) for a in ARITHMETICS]

    def holds(test: Any) -> bool | None:
        if test.p_value < rules.SIGNIFICANT:
            return True
        return False if grokked and 2 * test.positive <= len(grokked) else None

    led = Here(*(Number.share(test.positive, len(grokked)) for test in tests))
    findings = (
        Finding("lead, steps, to test accuracy 0.9", lead(), published.LEAD_TIME, 0),
        Finding("share of runs in which the defect rose first", led, published.LED, 2),
        Finding("p of the sign test", Here(*(Number(test.p_value) for test in tests))),
        *(Finding(f"lead to test accuracy {t:g}", lead(t), decimals=0) for t in (0.5, 0.7, 0.95, 0.98)),
        Finding("lead by the changepoint rule, once memorised", lead(rise=past_memorising), decimals=0),
    )
    forest = [finding for finding in findings if finding.quantity.startswith("lead")]
    return Judgement(
        (holds(tests[0]), holds(tests[1])),
        findings,
        partial(figures.forest, forest, xlabel="steps", zero=0.0) if grokked else None,
        "Leads by what counts as a rise and as grokked; by the paper's rules "
        f"{say(findings[0].here.trustworthy, 0)} steps where the defect can be trusted.",
        "Point: median over the runs. Line: their range. Grey: published range. Right of zero the defect rose first.",
        ("A lead is known to the interval between measurements, and that between evaluations.",),
    )


def lr_law(evidence: Evidence) -> Judgement:
    trials = [trial for name in ("grokking", "rates") for trial in evidence[name]]

    def points(arithmetic: Arithmetic) -> list[tuple[float, float]]:
        found = ((_grok(trial), analysis.lead_time(_defects(trial, arithmetic), rules.GROKKED)) for trial in trials)
        return [(float(grok), float(lead)) for grok, lead in found if grok and lead and lead > 0]

    laws = {a: analysis.power_law(*np.array(points(a)).reshape(-1, 2).T) for a in ARITHMETICS}
    here = _here(lambda a: Number(laws[a].exponent, laws[a].low, laws[a].high, len(points(a))))

    def holds(number: Number) -> bool | None:
        if not number.high - number.low <= rules.WIDEST_EXPONENT:  # NaN too
            return None
        return number.low <= published.LEAD_EXPONENT.value <= number.high

    findings = [Finding("exponent of the lead in the grok step", here, published.LEAD_EXPONENT, 2)]
    for rate, past in published.MAX_DEFECT.items():
        mine = [trial for trial in trials if trial.config.lr == rate]
        highest = _here(lambda a, mine=mine: Number.over(_defects(t, a)["defect_median"].max() for t in mine))  # type: ignore[misc]
        findings.append(Finding(f"highest defect of a run, learning rate {plain(rate)}", highest, past))
    for rate in published.MAX_DEFECT:
        steps = Number.over(_grok(trial) or math.nan for trial in trials if trial.config.lr == rate)
        known = [step for (_, lr), step in published.GROK_STEPS.items() if lr == rate]
        findings.append(_same(f"grok step, learning rate {plain(rate)}", steps, Number.over(known), 0))
    return Judgement(
        (holds(here.arithmetic), holds(here.trustworthy)),
        tuple(findings),
        partial(figures.scatter, {a: points(a) for a in ARITHMETICS}, laws) if any(map(points, ARITHMETICS)) else None,
        f"Lead against grok step on logarithmic axes; the exponent is {say(here.trustworthy, 2)} where the defect can "
        f"be trusted, {say(here.arithmetic, 2)} by the float32 formula.",
        "A point a run, lines by least squares.",
        ("Runs enter that grokked after their defect rose.",),
    )


def alignment(evidence: Evidence) -> Judgement:
    rates: dict[float, list[Trial]] = {rate: [] for rate in sorted(published.ALIGNMENT, reverse=True)}
    for trial in (*evidence["grokking"], *evidence["rates"]):
        rates.setdefault(trial.config.lr, []).append(trial)
    fastest, *_, slowest = rates

    def tests(arithmetic: Arithmetic, rate: float) -> list[AlignmentTest]:
        found = (one for trial in rates[rate] for one in trial.alignments[arithmetic])
        return [one for one in found if math.isfinite(one.ratio)]

    def ratio(arithmetic: Arithmetic, rate: float) -> Number:
        return Number.over(one.ratio for one in tests(arithmetic, rate))

    def beyond(arithmetic: Arithmetic, rate: float) -> Number:
        found = tests(arithmetic, rate)
        return Number.share(sum(one.p_value <= rules.SIGNIFICANT for one in found), len(found))

    def holds(arithmetic: Arithmetic) -> bool | None:
        from scipy.stats import mannwhitneyu

        high, low = ([one.ratio for one in tests(arithmetic, rate)] for rate in (fastest, slowest))
        if not (high and low):
            return None
        if ratio(arithmetic, fastest).value <= max(1.0, ratio(arithmetic, slowest).value):
            return False
        return True if mannwhitneyu(high, low, alternative="greater").pvalue < rules.SIGNIFICANT else None

    past = published.ALIGNMENT
    ratios, shares, singles = [], [], []
    for rate, name in zip(past, map(plain, past), strict=True):
        ours, shared = (_here(partial(of, rate=rate)) for of in (ratio, beyond))
        ratios.append(Finding(f"|cos| over chance, learning rate {name}", ours, past[rate]))
        shares.append(Finding(f"share above 95 % of random directions, {name}", shared, decimals=2))
        steps = Here(Number(), Number.over(_median(trial, "step_alignment_ratio") for trial in rates[rate]))
        singles.append(Finding(f"|cos| of single steps over chance, {name}", steps))
    first = ratios[0].here
    return Judgement(
        (holds("published"), holds("trustworthy")),
        (*ratios, *shares, *singles),
        partial(figures.forest, [*ratios, *singles], xlabel="|cos| with commutators / chance", zero=1.0),
        f"By learning rate; at {plain(fastest)} {say(first.trustworthy)} with commutators that can be trusted, "
        f"{say(first.arithmetic)} with those of the float32 formula.",
        "Point: median over the displacements between checkpoints, or over runs. Line: range. Grey: published range. "
        "Black: chance.",
        (
            "The published steps are not single updates: they lead from one of a run's four checkpoints to the next, "
            "hundreds of updates later or more. Single updates stand below.",
            "The commutators of a checkpoint are alike, so that chance alone carries the mean |cos| far from 1; the "
            "shares above 95 % of random directions, 0.05 by chance, take account of that.",
        ),
    )


def suppression(evidence: Evidence) -> Judgement:
    beside = _beside_baselines(evidence, "suppression")

    def projected(of: Callable[[list[Pair]], Number], **settings: Any) -> Here:
        return Here(*(of(_where(beside, intervention=kind, **settings)) for kind in ("project", "project-update")))

    here = projected(_share, strength=1.0, intervene_every=1)
    tenth = projected(_share, strength=1.0, intervene_every=10)
    findings = [
        Finding("share of runs that grok without motion outside", here, published.SUPPRESSED, 2),
        Finding("the same, projected at every tenth step", tenth, decimals=2),
    ]
    for strength in sorted({trial.config.strength for trial, _ in beside} - {1.0}):
        past = published.SUPPRESSION_DELAY if strength == rules.GENTLE else Number()
        later = projected(_delays, strength=strength, intervene_every=1)
        findings.append(Finding(f"steps later at strength {strength:g}", later, past, 0))
    remark = (
        "A few dimensions among very many leave little to learn in, whichever they are: the next claim has the same "
        "projection on random ones."
    )
    return _intervened("suppression", evidence, findings, lambda number: number.value == 0, remark)


def random_basis(evidence: Evidence) -> Judgement:
    beside = _beside_baselines(evidence, "random-basis")
    gentle = [pair for pair in beside if pair[0].config.strength <= rules.GENTLE]
    whole = [pair for pair in beside if pair[0].config.strength > rules.GENTLE]

    def drawn(of: Callable[[list[Pair]], Number], pairs: list[Pair]) -> Here:
        return Here(*(of(_where(pairs, basis=basis)) for basis in ("random", "matched")))

    here = drawn(_delays, gentle)
    findings = [
        Finding(f"steps later, up to strength {rules.GENTLE:g}", here, published.RANDOM_DELAY, 0),
        Finding("share of runs that grok at strength 1", drawn(_share, whole), decimals=2),
    ]
    return _intervened("random-basis", evidence, findings, lambda n: max(abs(n.low), abs(n.high)) <= rules.SAME_STEP)


def kicks(evidence: Evidence) -> Judgement:
    beside = _beside_baselines(evidence, "kicks")
    faithful = _where(beside, intervention="kick", faithful=True)
    proper = _where(beside, intervention="kick", faithful=False)
    once = _where(proper, intervene_times=1)
    again = [pair for pair in proper if pair not in once]
    kinds = {
        "along commutators, again and again": _where(again, direction="commutator"),
        "beside them, again and again": _where(again, direction="random"),
        "kicked once": once,
        "noise": _where(beside, intervention="noise"),
    }
    here = Here(_share(faithful), _share(proper))
    findings = [
        Finding("share of kicked runs that grok", here, published.KICKED, 2),
        Finding("steps later", Here(_delays(faithful), _delays(proper)), decimals=0),
        *(Finding(f"the same, {said}", Here(Number(), _delays(pairs)), decimals=0) for said, pairs in kinds.items()),
    ]
    return _intervened("kicks", evidence, findings, lambda number: number.value == 1)


def slow_regime(evidence: Evidence) -> Judgement:
    trials = evidence["slow"]
    values = {a: [v for t in trials for v in _defects(t, a)["defect_median"].dropna()] for a in ARITHMETICS}

    def holds(defects: Sequence[float]) -> bool | None:
        return 0.0 in defects and max(defects) >= rules.SPIKE if defects else None

    zeros = _here(lambda a: Number.share(values[a].count(0.0), len(values[a])))
    highest = _here(lambda a: Number(max(values[a], default=math.nan)))
    steps = Number.over(_grok(trial) or math.nan for trial in trials)
    lines = [line for trial in trials for line in _defect_lines(trial)]
    return Judgement(
        (holds(values["published"]), holds(values["trustworthy"])),
        (
            Finding("share of measurements that are exactly 0", zeros, decimals=3),
            Finding("highest defect", highest),
            _same("grok step", steps, published.SLOW_GROK_STEP, 0),
        ),
        partial(figures.lines, [Panel(lines, "defect D", log=True)]),
        f"Defect over the steps on a logarithmic axis; {say(zeros.arithmetic, 3)} of it is 0 by the float32 formula.",
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

Pair = tuple[Trial, Trial]
"""A run with an intervention, and its baseline."""

Rule = Callable[[Number], bool]


def label(config: TrainConfig) -> str:
    """An intervention in a few words."""
    what: str = config.intervention
    if what == "kick":
        what = f"kick, {config.direction}{', faithful' if config.faithful else ''}"
    elif what != "noise":
        what = f"{'update' if what == 'project-update' else 'gradient'}, {config.basis}"
    often = f"every {config.intervene_every}" if config.intervene_every > 1 else ""
    return ", ".join(filter(None, [what, f"{config.strength:g}", "once" if config.intervene_times == 1 else often]))


def _intervened(name: str, evidence: Evidence, findings: list[Finding], rule: Rule, *remarks: str) -> Judgement:
    """What a claim about interventions comes to, with the test accuracies of all its runs."""
    beside = _beside_baselines(evidence, name)
    alone = len(evidence[name]) - len(beside)
    if alone:
        remarks += (f"{alone} of {len(evidence[name])} runs have no baseline that grokked, and do not count.",)
    unfinished = sum(_grok(trial) is None for trial, _ in beside)
    if unfinished:
        remarks += (
            f"{unfinished} of {len(beside)} runs had not grokked by their end: they are at least as much later as they "
            "ended after their baseline grokked, and count with that.",
        )
    kinds = list(dict.fromkeys(label(trial.config) for trial, _ in beside))
    baselines = {id(baseline): baseline for _, baseline in beside}
    lines = [Line(b.records["step"], b.records["test_acc"], "baseline", "ink") for b in baselines.values()]
    for trial, _ in beside:
        kind = label(trial.config)
        lines.append(Line(trial.records["step"], trial.records["test_acc"], kind, kinds.index(kind)))
    first = findings[0]
    return Judgement(
        _both(rule, first.here),
        tuple(findings),
        partial(figures.lines, [Panel(lines, "test accuracy", height=2.6)]) if lines else None,
        f"Test accuracy over the steps of {len(beside)} runs and their baselines; {first.quantity}: "
        f"{say(first.here.arithmetic, first.decimals)} as published, {say(first.here.trustworthy, first.decimals)} as "
        "is trustworthy.",
        "One line a run. Black: the same run without an intervention.",
        remarks,
    )


def _beside_baselines(evidence: Evidence, name: str) -> list[Pair]:
    """The finished runs of a set whose baseline grokked."""
    beside = ((trial, evidence.baseline(trial)) for trial in evidence[name])
    return [(trial, baseline) for trial, baseline in beside if baseline is not None and _grok(baseline) is not None]


def _where(pairs: Sequence[Pair], **settings: Any) -> list[Pair]:
    """Those whose runs have all these settings."""
    return [pair for pair in pairs if settings.items() <= vars(pair[0].config).items()]


def _share(pairs: Sequence[Pair]) -> Number:
    """Of the runs, those that grokked."""
    return Number.share(sum(_grok(trial) is not None for trial, _ in pairs), len(pairs))


def _delays(pairs: Sequence[Pair]) -> Number:
    """Steps by which runs grok later than their baselines; of one that does not, those by which it ended later."""
    late = []
    for trial, baseline in pairs:
        grok, usual = _grok(trial), _grok(baseline)
        assert usual is not None
        late.append(float((trial.records["step"].max() if grok is None else grok) - usual))
    return Number.over(late)


def _grok(trial: Trial) -> int | None:
    return analysis.grok_step(trial.records, rules.GROKKED)


def _defects(trial: Trial, arithmetic: Arithmetic) -> pd.DataFrame:
    """A run's records with its defect by one arithmetic in ``defect_median``, and nothing that cannot be trusted."""
    records = trial.records
    rows = records[["step", "train_acc", "test_acc"]]
    if "defect_median" not in records:
        return rows.assign(defect_median=math.nan)
    if arithmetic == "published":
        return rows.assign(defect_median=records["reference_median"])
    return rows.assign(defect_median=records["defect_median"].where(records["reliable"].eq(True)))


def _defect_lines(trial: Trial, suffix: str = "", style: str = "-") -> list[Line]:
    """A run's defect over its steps in both arithmetics."""
    lines = []
    for arithmetic, (colour, words) in ARITHMETICS.items():
        rows = _defects(trial, arithmetic)
        lines.append(Line(rows["step"], rows["defect_median"], words + suffix, colour, style))
    return lines


def _median(trial: Trial, column: str) -> float:
    """Median of a column over the reliable measurements of a run."""
    records = trial.records
    return float(records[column].where(records["reliable"].eq(True)).median()) if column in records else math.nan


def _middle(values: Iterable[float]) -> float:
    """Median of what is finite; NaN if nothing is."""
    return Number.over(values).value


def _here(number: Callable[[Arithmetic], Number]) -> Here:
    return Here(number("published"), number("trustworthy"))


def _same(quantity: str, number: Number, past: Number = Number(), decimals: int | None = None) -> Finding:  # noqa: B008
    """A finding into which no commutator enters."""
    return Finding(quantity, Here(number, number), past, decimals)


def _both(rule: Rule, here: Here) -> tuple[bool | None, bool | None]:
    """What a rule says of both numbers; None of one that is made of nothing."""
    first, second = (rule(number) if number.count else None for number in here)
    return first, second


def _describe(trials: Sequence[Trial]) -> str:
    """The operations with their seeds, and the settings that are not the default's."""
    seeds: dict[str, list[str]] = {}
    for trial in trials:
        seeds.setdefault(trial.config.op, []).append(str(trial.config.seed))
    said = [f"{op} {', '.join(dict.fromkeys(its))}" for op, its in seeds.items()]
    default = TrainConfig(threads=1)
    for field in fields(TrainConfig):
        values = list(dict.fromkeys(getattr(trial.config, field.name) for trial in trials))
        if field.name not in ("op", "seed", "basis_from") and values != [getattr(default, field.name)]:
            said.append(f"{field.name} {' | '.join(map(plain, values))}")
    return "; ".join(said)
