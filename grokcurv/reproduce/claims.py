"""The claims judged: for each a function from the evidence to its numbers, its rule's word on them, and a figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from grokcurv import analysis
from grokcurv.report.format import plain
from grokcurv.reproduce import figures, published, rules
from grokcurv.reproduce.evidence import AlignmentTest, Arithmetic, Evidence, Pair, Snapshot, Support, Trial
from grokcurv.reproduce.figures import ARITHMETICS, Line, Panel
from grokcurv.reproduce.findings import Answer, Finding, Here, Judgement
from grokcurv.reproduce.plan import NEEDS
from grokcurv.reproduce.published import Number
from grokcurv.subspace import Subspace
from grokcurv.training import TrainConfig

Rise = Callable[[pd.DataFrame], int | None]
"""The step from which the defect has risen."""

Rule = Callable[[Number], bool | None]


class Led(NamedTuple):
    """A run that grokked after its defect rose."""

    grok: int
    lead: float
    split: str
    """Operation and seed: runs that share them share their data, and are resampled together."""


DIRECTIONS = 3
"""Singular directions of each matrix in the paper's control."""


def answer(claim: str, evidence: Evidence) -> Answer:
    """Judge a claim, or say that none of its runs has been done."""
    trials = evidence.of(claim)
    known = sum(len(evidence[name]) for name in NEEDS[claim])
    failed = [trial for trial in trials if trial.status == "failed"]
    remarks = [f"{len(failed)} of {len(trials)} runs failed and count neither way."] if failed else []
    remarks += [f"{trial.id}: {trial.reason}" for trial in failed]
    left = sum(trial.status not in ("finished", "failed") for trial in trials)
    if known and left:
        remarks.append(f"Not finished: {left} of {len(trials)} runs.")
    settings = {name: _describe(evidence.trials[name]) for name in NEEDS[claim] if evidence.trials[name]}
    if not trials:
        remarks.append("This profile has no run that speaks of it.")
    if not known:
        verdict = rules.UNDECIDED if failed else rules.NOT_RUN
        return Answer(claim=claim, verdict=verdict, settings=settings, remarks=tuple(remarks))
    judged = JUDGES[claim](evidence)
    first, *others = judged.findings
    findings = (first, *(finding for finding in others if any(number.known for number in finding.here)))
    arithmetic, trustworthy = judged.holds
    said = (*rules.WORDS[claim]["remarks"], *judged.remarks, *remarks)
    whole = {**vars(judged), "findings": findings, "remarks": said}
    return Answer(**whole, claim=claim, verdict=rules.verdict(trustworthy, arithmetic), settings=settings)


def pc1(evidence: Evidence) -> Judgement:
    """PC1's share of each attention matrix's trajectory, beside random walks with its steps."""
    names = {"grokking": "runs that grok", "never": "operations that do not", "control": "weight decay 0"}
    colours = dict(zip(names, ("green", "purple", "muted"), strict=True))
    grokked = tuple(trial for trial in evidence["grokking"] if trial.end is not None)
    runs = {name: evidence[name] for name in names} | {"grokking": grokked}

    def matrices(name: str, column: str) -> Number:
        return Number.over(value for trial in runs[name] for value in trial.walks[column])

    ends = {name: [trial.walks["pc1_percent"].mean() for trial in its] for name, its in runs.items()}
    means, past = {name: Number.over(percents) for name, percents in ends.items()}, published.PC1_PERCENT
    last = Number.over(trial.trajectory.iloc[-1] for trial in grokked)
    close = abs(means["grokking"].value - past["grokking"].value) <= rules.PC1_TOLERANCE
    holds = close and matrices("grokking", "p_value").value <= rules.WALK_P if means["grokking"].count else None
    lines = [Line(t.trajectory.index, t.trajectory, names[name], colours[name]) for name in runs for t in runs[name]]
    lines.append(Line([trial.end for trial in grokked], ends["grokking"], "has grokked", "ink", " "))
    return Judgement(
        (None, holds),
        (
            *(_same(f"PC1 %, mean over matrices, {names[name]}", means[name], past[name]) for name in names),
            _same("PC1 %, mean over matrices, at the end of runs that grok", last),
            _same("PC1 % of random walks beside those that grok", matrices("grokking", "walk_percent")),
            *(_same(f"standard deviations above random walks, {names[name]}", matrices(name, "z")) for name in names),
        ),
        partial(figures.lines, [Panel(lines, "PC1 %, mean", band=past["grokking"])]),
    )


def rho(evidence: Evidence) -> Judgement:
    """The part of a commutator outside the trajectory's PCA basis."""
    trials = evidence["grokking"]
    shots = [trial.snapshot for trial in trials]
    known = [(shot, shot.trajectory) for shot in shots if shot is not None and shot.trajectory is not None]
    here = Here(
        Number.over(_middle(shot.rho("published", basis)) for shot, basis in known),
        Number.over(_median(trial, "rho") for trial in trials),
    )
    chance = Number.over(math.sqrt(1 - basis.dim / shot.size) for shot, basis in known)
    lines = [
        Line(trial.records["step"], 1 - trial.records["rho"], f"{trial.config.op}, seed {trial.config.seed}", index)
        for index, trial in enumerate(trials)
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
        (remark,) if chance.count else (),
    )


def exec_random(evidence: Evidence) -> Judgement:
    """How much more of a commutator lies in the execution basis than in a random subspace."""
    trials = evidence["grokking"]
    shots = [trial.snapshot for trial in trials if trial.snapshot is not None]

    def ratio(arithmetic: Arithmetic, support: Support, basis: Callable[[Snapshot], Subspace | None]) -> Number:
        found = [(shot, space) for shot in shots if (space := basis(shot)) is not None]
        return Number.over(_middle(shot.ratios(arithmetic, space, support)) for shot, space in found)

    def singular(arithmetic: Arithmetic, support: Support, k: int = DIRECTIONS) -> Number:
        return ratio(arithmetic, support, lambda shot: shot.singular.get(k))

    def phase(name: str) -> Number:
        tables = [trial.records for trial in trials if "exec_matched_ratio" in trial.records]
        return Number.over(analysis.by_phase(records, "exec_matched_ratio")[name] for records in tables)

    here = Here(singular("published", "full"), singular("trustworthy", "matched"))
    trajectory = _here(lambda a: ratio(a, "matched", lambda shot: shot.trajectory))
    memorised, grokked = published.EXEC_RANDOM.values()
    pasts = {"memorisation": Number(), "pre-grok": Number(), "post-grok": grokked}
    findings = (
        Finding("inside over chance, singular directions, memorised", here, memorised),
        Finding("the same, random subspaces in all of parameter space", _here(lambda a: singular(a, "full"))),
        Finding("the same, in the support", _here(lambda a: singular(a, "matched"))),
        Finding("directions of the trajectory, in their support, memorised", trajectory),
        *(Finding(f"the same over runs that grok, {n}", Here(Number(), phase(n)), past) for n, past in pasts.items()),
    )
    swept = sorted({k for shot in shots for k in shot.singular})
    supports: dict[Support, tuple[str, str]] = {"full": ("all parameters", "--"), "matched": ("support", "-")}
    lines = [
        Line(swept, [singular(a, support, k).value for k in swept], f"{words}, {where}", colour, style)
        for a, (colour, words) in ARITHMETICS.items()
        for support, (where, style) in supports.items()
    ]
    panel = Panel(lines, "inside / chance", level=1.0, band=memorised)
    without = [trial.id for trial in trials if trial.snapshot is None]
    return Judgement(
        _both(lambda number: number.low > 1, here),
        findings,
        partial(figures.lines, [panel], xlabel="singular directions of each attention matrix") if swept else None,
        tuple(f"{name} has no snapshot in the phase of memorisation and does not count." for name in without),
    )


def control(evidence: Evidence) -> Judgement:
    """Defects of runs that grok, over those of the same runs without weight decay."""
    pairs = [(trial, other) for other, trial in evidence.pairs("control")]

    def ratios(arithmetic: Arithmetic) -> list[Any]:
        found = []
        for trial, other in pairs:
            ours = trial.defects(arithmetic)
            onset = analysis.onset_step(ours)
            if onset is not None:
                found.append(analysis.control_ratio(ours[ours["step"] >= onset], other.defects(arithmetic)))
        return found

    here = _here(lambda a: Number.over(ratio.median for ratio in ratios(a)))
    compared = ratios("trustworthy")
    trusted, steps = sum(ratio.reliable for ratio in compared), sum(ratio.steps for ratio in compared)
    remark = f"From the onset on, both defects could be trusted at {trusted:,} of {steps:,} steps that both measured."
    panels = []
    for trial, other in pairs[:2]:
        lines = _defect_lines(trial, ", weight decay 1") + _defect_lines(other, ", weight decay 0", ":")
        panels.append(Panel(lines, f"D, {trial.config.op}, seed {trial.config.seed}", log=True))
    return Judgement(
        _both(lambda number: number.value >= rules.LEAST_RATIO, here),
        (
            Finding("defect over the control's, median from the onset on", here, published.CONTROL_RATIO),
            Finding("the same, largest", _here(lambda a: Number.over(ratio.maximum for ratio in ratios(a)))),
        ),
        partial(figures.lines, panels) if panels else None,
        (remark,) if steps else (),
    )


def onset(evidence: Evidence) -> Judgement:
    """How long before grokking the defect rises."""
    grokked = [trial for trial in evidence["grokking"] if trial.grok is not None]

    def leads(
        arithmetic: Arithmetic, threshold: float = rules.GROKKED, rise: Rise = analysis.onset_step
    ) -> list[float]:
        """A lead for each run that passed the threshold; minus infinity where the defect never rose."""
        found = (_lead(trial, arithmetic, threshold, rise) for trial in grokked)
        return [lead for lead in found if lead is not None]

    def lead(what: str, *rule: Any, past: Number = Number()) -> Finding:  # noqa: B008
        return Finding(f"lead{what}", _here(lambda a: Number.over(leads(a, *rule))), past, 0)

    def holds(test: Any) -> bool | None:
        if test.p_value < rules.SIGNIFICANT:
            return True
        return False if grokked and 2 * test.positive <= len(grokked) else None

    tests = [analysis.sign_test(leads(a)) for a in ARITHMETICS]
    led = Here(*(Number.share(test.positive, len(grokked)) for test in tests))
    forest = [
        lead(", steps, to test accuracy 0.9", past=published.LEAD_TIME),
        *(lead(f" to test accuracy {t:g}", t) for t in (0.5, 0.7, 0.95, 0.98)),
        lead(" by the changepoint rule, once memorised", rules.GROKKED, _changepoint),
    ]
    return Judgement(
        (holds(tests[0]), holds(tests[1])),
        (
            forest[0],
            Finding("share of runs in which the defect rose first", led, published.LED, 2),
            Finding("p of the sign test", Here(*(Number(test.p_value) for test in tests))),
            *forest[1:],
        ),
        partial(figures.forest, forest, xlabel="steps", zero=0.0) if grokked else None,
    )


def lr_law(evidence: Evidence) -> Judgement:
    """Whether that lead is a power of the grok step."""
    by_rate = [*evidence["grokking"], *evidence["rates"]]
    trials = [*by_rate, *evidence["regimes"]]
    rates = {rate: [trial for trial in by_rate if trial.config.lr == rate] for rate in published.MAX_DEFECT}
    usual = [trial for trial in trials if trial.config.lr == rules.USUAL_RATE]

    def led(its: Sequence[Trial], arithmetic: Arithmetic, rise: Rise = analysis.onset_step) -> list[Led]:
        """Of the runs that grokked after their defect rose."""
        found = ((trial, _lead(trial, arithmetic, rise=rise)) for trial in its)
        return [
            Led(trial.grok, lead, f"{trial.config.op} {trial.config.seed}")
            for trial, lead in found
            if trial.grok is not None and lead is not None and lead > 0
        ]

    def fit(function: Callable[..., Any], runs: Sequence[Led]) -> Any:
        grok, lead, split = zip(*runs, strict=True) if runs else ((), (), ())
        return function(grok, lead, groups=split)

    def exponent(its: Sequence[Trial], arithmetic: Arithmetic, rise: Rise = analysis.onset_step) -> Number:
        runs = led(its, arithmetic, rise)
        law = fit(analysis.power_law, runs)
        return Number(law.exponent, law.low, law.high, len(runs))

    def bend(arithmetic: Arithmetic) -> Number:
        runs = led(trials, arithmetic)
        bent = fit(analysis.log_log_bend, runs)
        return Number(bent.value, bent.low, bent.high, len(runs))

    def onsets(arithmetic: Arithmetic) -> Number:
        """Exponent of the onset in the grok step: 0 if the defect always rises at one step."""
        runs = [run._replace(lead=run.grok - run.lead) for run in led(trials, arithmetic) if run.lead < run.grok]
        law = fit(analysis.power_law, runs)
        return Number(law.exponent, law.low, law.high, len(runs))

    def waiting(arithmetic: Arithmetic) -> Number:
        """Exponent of the wait since the onset in the onset, with the runs that still wait at their end."""
        known = [bounds for trial in trials if (bounds := _wait(trial, arithmetic)) is not None]
        onset, low, high, split = zip(*known, strict=True) if known else ((), (), (), ())
        law = analysis.censored_power_law(onset, low, high, groups=split)
        return Number(law.exponent, law.low, law.high, len(known))

    def holds(law: Number, bent: Number) -> bool | None:
        if splits < rules.FEWEST_SPLITS:
            return None
        if bent.low > 0 or bent.high < 0:
            return False
        if not law.high - law.low <= rules.WIDEST_EXPONENT:  # NaN too
            return None
        return law.low <= published.LEAD_EXPONENT.value <= law.high

    def over(rate: float, what: Callable[[Trial, Arithmetic], float | None]) -> Here:
        return _here(lambda a: Number.over(v for t in rates[rate] if (v := what(t, a)) is not None))

    here, bent = _here(partial(exponent, trials)), _here(bend)
    splits = len({run.split for run in led(trials, "trustworthy")})
    grokked = [trial for trial in trials if trial.grok is not None]
    leads = {a: [lead for trial in grokked if (lead := _lead(trial, a)) is not None] for a in ARITHMETICS}
    tests = [analysis.sign_test(leads[a]) for a in ARITHMETICS]
    findings = [
        Finding("exponent of the lead in the grok step", here, published.LEAD_EXPONENT, 2),
        Finding("second coefficient of a parabola in its place", bent, decimals=2),
        Finding("exponent of the onset in the grok step", _here(onsets), decimals=2),
        Finding("exponent over the learning rates alone", _here(partial(exponent, by_rate)), decimals=2),
        Finding(
            f"exponent at learning rate {plain(rules.USUAL_RATE)} alone", _here(partial(exponent, usual)), decimals=2
        ),
        Finding(
            "exponent by the changepoint rule, once memorised",
            _here(lambda a: exponent(trials, a, _changepoint)),
            decimals=2,
        ),
        Finding("exponent of the lead in the onset, runs that never grok among them", _here(waiting), decimals=2),
        Finding(
            "share of runs that grok in which the defect rose first",
            Here(*(Number.share(test.positive, len(grokked)) for test in tests)),
            decimals=2,
        ),
        Finding("p of the sign test", Here(*(Number(test.p_value) for test in tests))),
    ]
    for rate, past in published.MAX_DEFECT.items():
        name = plain(rate)
        known = Number.over(step for (_, lr), step in published.GROK_STEPS.items() if lr == rate)
        findings += [
            Finding(
                f"onset, learning rate {name}", over(rate, lambda t, a: analysis.onset_step(t.defects(a))), decimals=0
            ),
            _same(f"grok step, learning rate {name}", _steps(rates[rate]), known, 0),
            _same(
                f"step at which runs have settled, {name}",
                over(rate, lambda t, _: t.end)[0],
                published.SETTLED[rate],
                0,
            ),
            Finding(
                f"highest defect of a run, learning rate {name}",
                over(rate, lambda t, a: t.defects(a)["defect_median"].max()),
                past,
            ),
        ]
    risen = {a: led(trials, a) for a in ARITHMETICS}
    points = {a: [run[:2] for run in runs] for a, runs in risen.items()}
    laws = {a: fit(analysis.power_law, runs) for a, runs in risen.items()}
    onset = Number.over(grok - lead for grok, lead in points["trustworthy"]).value
    return Judgement(
        (holds(here.arithmetic, bent.arithmetic), holds(here.trustworthy, bent.trustworthy)),
        tuple(findings),
        partial(figures.scatter, points, laws, onset) if any(points.values()) else None,
    )


def alignment(evidence: Evidence) -> Judgement:
    """Cosines between commutators and how the weights have moved since the checkpoint before, by learning rate."""
    rates: dict[float, list[Trial]] = {rate: [] for rate in published.ALIGNMENT}
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

    ratios, shares, singles = [], [], []
    for rate, past in published.ALIGNMENT.items():
        name, (ours, shared) = plain(rate), (_here(partial(of, rate=rate)) for of in (ratio, beyond))
        ratios.append(Finding(f"|cos| over chance, learning rate {name}", ours, past))
        shares.append(Finding(f"share above 95 % of random directions, {name}", shared, decimals=2))
        steps = Here(Number(), Number.over(_median(trial, "step_alignment_ratio") for trial in rates[rate]))
        singles.append(Finding(f"|cos| of single steps over chance, {name}", steps))
    return Judgement(
        (holds("published"), holds("trustworthy")),
        (*ratios, *shares, *singles),
        partial(figures.forest, [*ratios, *singles], xlabel="|cos| with commutators / chance", zero=1.0),
    )


def update_gram(evidence: Evidence) -> Judgement:
    """How the gap in the spectrum of recent updates falls, with weight decay and without."""
    names = {"grokking": "runs that grok", "control": "weight decay 0"}
    colours = dict(zip(names, ("green", "muted"), strict=True))
    grokked = [(trial, trial) for trial in evidence["grokking"] if trial.grok is not None]
    pairs = {"grokking": grokked, "control": _beside_baselines(evidence, "control")}
    # Rows with a full window, up to where the run grokked, or the baseline of a control did.
    tables = {name: [t for pair in its if len(t := _windows(*pair))] for name, its in pairs.items()}
    falls = {name: [float(t["g23"].max() / t["g23"].iloc[-1]) for t in its] for name, its in tables.items()}
    ratios = {name: Number.over(t["gap_ratio"].median() for t in its) for name, its in tables.items()}
    fell = {name: sum(fall >= rules.FALL for fall in its) for name, its in falls.items()}
    count = len(falls["grokking"])

    def holds() -> bool | None:
        from scipy.stats import binomtest, fisher_exact

        if not count or 2 * fell["grokking"] <= count:
            return False if count else None
        counts = [[fell[name], len(falls[name]) - fell[name]] for name in names]
        if fisher_exact(np.array(counts), alternative="greater").pvalue < rules.SIGNIFICANT:
            return True
        controls = sum(counts[1])
        most = controls and binomtest(fell["control"], controls, alternative="greater").pvalue < rules.SIGNIFICANT
        return False if most else None

    def share(name: str) -> Finding:
        number = Number.share(fell[name], len(falls[name]))
        return _same(f"share in which g23 falls, {names[name]}", number, published.GAP_FELL[name], 2)

    lines = [Line(t["step"], t["g23"], names[name], colours[name]) for name in reversed(names) for t in tables[name]]
    lines += [Line(t["step"].iloc[-1:], t["g23"].iloc[-1:], "has grokked", "ink", " ") for t in tables["grokking"]]
    return Judgement(
        (None, holds()),
        (
            *map(share, names),
            _same("factor by which it falls, runs that grok", Number.over(falls["grokking"]), published.GAP_FALL),
            _same("the same, weight decay 0", Number.over(falls["control"])),
            *(_same(f"R, median up to there, {names[n]}", ratios[n], published.GAP_RATIO[n], 2) for n in names),
        ),
        partial(figures.lines, [Panel(lines, "g23", log=True)]) if lines else None,
    )


def _windows(trial: Trial, until: Trial) -> pd.DataFrame:
    """The rows of a run's updates, as far as windows are full and another run had not grokked."""
    records = trial.records
    known = records["g23"].notna() if "g23" in records else records["step"] < 0
    return records[known & (records["step"] <= (until.grok or 0))]


def suppression(evidence: Evidence) -> Judgement:
    """Which runs grok whose gradients or updates are projected onto the execution basis."""
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
    return _intervened("suppression", evidence, findings, lambda number: number.value == 0)


def random_basis(evidence: Evidence) -> Judgement:
    """How much later runs grok whose motion outside a random basis is damped."""
    beside = _beside_baselines(evidence, "random-basis")
    gentle = [pair for pair in beside if pair[0].config.strength <= rules.GENTLE]
    whole = [pair for pair in beside if pair[0].config.strength > rules.GENTLE]

    def drawn(of: Callable[[list[Pair]], Number], pairs: list[Pair]) -> Here:
        return Here(*(of(_where(pairs, basis=basis)) for basis in ("random", "matched")))

    findings = [
        Finding(f"steps later, up to strength {rules.GENTLE:g}", drawn(_delays, gentle), published.RANDOM_DELAY, 0),
        Finding("share of runs that grok at strength 1", drawn(_share, whole), decimals=2),
    ]
    return _intervened("random-basis", evidence, findings, lambda n: max(abs(n.low), abs(n.high)) <= rules.SAME_STEP)


def kicks(evidence: Evidence) -> Judgement:
    """Which runs grok that are moved along a commutator."""
    beside = _beside_baselines(evidence, "kicks")
    faithful, proper = (_where(beside, intervention="kick", faithful=flag) for flag in (True, False))
    once = _where(proper, intervene_times=1)
    again = [pair for pair in proper if pair not in once]
    kinds = {
        "along commutators, again and again": _where(again, direction="commutator"),
        "beside them, again and again": _where(again, direction="random"),
        "kicked once": once,
        "noise": _where(beside, intervention="noise"),
    }
    findings = [
        Finding("share of kicked runs that grok", Here(_share(faithful), _share(proper)), published.KICKED, 2),
        Finding("steps later", Here(_delays(faithful), _delays(proper)), decimals=0),
        *(Finding(f"the same, {said}", Here(Number(), _delays(pairs)), decimals=0) for said, pairs in kinds.items()),
    ]
    return _intervened("kicks", evidence, findings, lambda number: number.value == 1)


def slow_regime(evidence: Evidence) -> Judgement:
    """Defects of a run that takes hundreds of thousands of steps."""
    trials = evidence["slow"]
    values = {a: [v for t in trials for v in t.defects(a)["defect_median"].dropna()] for a in ARITHMETICS}
    ended = all(trial.status == "finished" for trial in trials)

    def holds(defects: Sequence[float]) -> bool | None:
        if defects and 0.0 in defects and max(defects) >= rules.SPIKE:
            return True
        return False if defects and ended else None

    zeros = _here(lambda a: Number.share(values[a].count(0.0), len(values[a])))
    highest = _here(lambda a: Number(max(values[a], default=math.nan)))
    lines = [line for trial in trials for line in _defect_lines(trial)]
    accuracies = [Line(t.records["step"], t.records["test_acc"], "test accuracy", "ink") for t in trials]
    return Judgement(
        (holds(values["published"]), holds(values["trustworthy"])),
        (
            Finding("share of measurements that are exactly 0", zeros, decimals=3),
            Finding("highest defect", highest),
            _same("grok step", _steps(trials), published.SLOW_GROK_STEP, 0),
            _same("last step", Number.over(trial.records["step"].max() for trial in trials), decimals=0),
        ),
        partial(figures.lines, [Panel(lines, "defect D", log=True), Panel(accuracies, "test accuracy")]),
    )


JUDGES: dict[str, Callable[[Evidence], Judgement]] = {
    "pc1": pc1,
    "rho": rho,
    "exec-random": exec_random,
    "control-ratio": control,
    "onset": onset,
    "lr-law": lr_law,
    "alignment": alignment,
    "update-gram": update_gram,
    "suppression": suppression,
    "random-basis": random_basis,
    "kicks": kicks,
    "slow-regime": slow_regime,
}


def label(config: TrainConfig) -> str:
    """An intervention in a few words."""
    what: str = config.intervention
    if what == "kick":
        what = f"kick, {config.direction}{', faithful' if config.faithful else ''}"
    elif what != "noise":
        what = f"{'update' if what == 'project-update' else 'gradient'}, {config.basis}"
    often = f"every {config.intervene_every}" if config.intervene_every > 1 else ""
    return ", ".join(filter(None, [what, f"{config.strength:g}", "once" if config.intervene_times == 1 else often]))


def _intervened(name: str, evidence: Evidence, findings: list[Finding], rule: Rule) -> Judgement:
    """What a claim about interventions comes to, with the test accuracies of all its runs."""
    beside, runs, remarks = _beside_baselines(evidence, name), len(evidence[name]), []
    if len(beside) < runs:
        remarks.append(f"{runs - len(beside)} of {runs} runs have no baseline that grokked, and do not count.")
    unfinished = sum(trial.grok is None for trial, _ in beside)
    if unfinished:
        remarks.append(
            f"{unfinished} of {len(beside)} runs had not grokked by their end: they are at least as much later as they "
            "ended after their baseline grokked, and count with that."
        )
    kinds = list(dict.fromkeys(label(trial.config) for trial, _ in beside))
    looks: dict[Trial, tuple[str, str | int]] = {baseline: ("baseline", "ink") for _, baseline in beside}
    looks |= {trial: (label(trial.config), kinds.index(label(trial.config))) for trial, _ in beside}
    lines = [Line(trial.records["step"], trial.records["test_acc"], *look) for trial, look in looks.items()]
    return Judgement(
        _both(rule, findings[0].here),
        tuple(findings),
        partial(figures.lines, [Panel(lines, "test accuracy", height=2.6)]) if lines else None,
        tuple(remarks),
        len(beside),
    )


def _beside_baselines(evidence: Evidence, name: str) -> list[Pair]:
    """The finished runs of a set whose baseline grokked."""
    return [pair for pair in evidence.pairs(name) if pair[1].grok is not None]


def _where(pairs: Sequence[Pair], **settings: Any) -> list[Pair]:
    """Those whose runs have all these settings."""
    return [pair for pair in pairs if settings.items() <= vars(pair[0].config).items()]


def _share(pairs: Sequence[Pair]) -> Number:
    """Of the runs, those that grokked."""
    return Number.share(sum(trial.grok is not None for trial, _ in pairs), len(pairs))


def _delays(pairs: Sequence[Pair]) -> Number:
    """Steps by which runs grok later than their baselines; of one that does not, those by which it ended later."""
    ends = ((t.records["step"].max() if t.grok is None else t.grok, baseline.grok) for t, baseline in pairs)
    return Number.over(float(end - usual) for end, usual in ends if usual is not None)


def _changepoint(defects: pd.DataFrame) -> int | None:
    """The step of the changepoint rule among measurements of a network that has memorised."""
    memorised = defects["step"][~np.isin(analysis.phases(defects), ["", "early"])]
    return analysis.changepoint_step(defects, since=int(memorised.min())) if len(memorised) else None


def _lead(
    trial: Trial, arithmetic: Arithmetic, threshold: float = rules.GROKKED, rise: Rise = analysis.onset_step
) -> float | None:
    """Steps from the rise to grokking; minus infinity where the defect never rose, None without grokking."""
    grok = analysis.grok_step(trial.records, threshold)
    if grok is None:
        return None
    step = rise(trial.defects(arithmetic))
    return -math.inf if step is None else float(grok - step)


def _wait(trial: Trial, arithmetic: Arithmetic) -> tuple[int, float, float, str] | None:
    """Onset, bounds of the wait from there to grokking, operation and seed; None without an onset before grokking.

    Onset and grokking came at some step since the last look, and of a run that has not grokked it is known how long it
    has waited.
    """
    config, onset = trial.config, analysis.onset_step(trial.defects(arithmetic))
    if onset is None or (trial.grok is not None and trial.grok < onset):
        return None
    split = f"{config.op} {config.seed}"
    if trial.grok is None:
        waited = int(trial.records["step"].max()) - onset
        return (onset, float(waited), math.inf, split) if waited else None
    lead = trial.grok - onset
    return onset, float(max(lead - config.eval_every, 0)), float(lead + config.measure_every), split


def _steps(trials: Iterable[Trial]) -> Number:
    """Grok steps of those that have one."""
    return Number.over(trial.grok or math.nan for trial in trials)


def _defect_lines(trial: Trial, suffix: str = "", style: str = "-") -> list[Line]:
    """A run's defect over its steps in both arithmetics."""
    rows = ((trial.defects(a), colour, words) for a, (colour, words) in ARITHMETICS.items())
    return [Line(each["step"], each["defect_median"], words + suffix, colour, style) for each, colour, words in rows]


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
