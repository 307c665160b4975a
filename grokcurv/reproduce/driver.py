"""From claims to a page: train what is not trained yet, judge, write."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import replace
from os.path import lexists
from pathlib import Path
from typing import Any

from grokcurv.reproduce.claims import answer
from grokcurv.reproduce.evidence import Evidence, Trial
from grokcurv.reproduce.page import Reproduction
from grokcurv.reproduce.plan import ASKED_FOR, CLAIMS, PROFILES, Plan, Profile, make_plan
from grokcurv.reproduce.published import SLOW_GROK_STEP
from grokcurv.reproduce.table import matrices_of, table_of
from grokcurv.runs import describe_environment
from grokcurv.storage import make_folder, write_atomically
from grokcurv.sweep import Sweep, open_sweep, run_sweep
from grokcurv.sweep.estimate import seconds_of
from grokcurv.sweep.folder import find
from grokcurv.training import PRESETS

Progress = Callable[[dict[str, Any]], object]


def reproduce(
    claims: Collection[str] | None = None,
    profile: str | Profile = "quick",
    out: str | os.PathLike[str] | None = None,
    operations: Collection[str] | None = None,
    seeds: Collection[int] | None = None,
    engine: str = "local",
    workers: int | None = None,
    train: bool = True,
    on_progress: Progress | None = None,
) -> Reproduction:
    """Judge claims of the paper by runs of one's own, and write a page about it.

    The runs are two sweeps, of plain runs in ``out/runs`` and of interventions, which need some of those finished, in
    ``out/interventions``. The same call goes on after anything that stopped it, and when nothing is left to train only
    writes the page anew; with other claims it trains what those need beyond what is there. A run that fails stops no
    other. Two calls in fresh folders give the same table, bit for bit, its timing aside.

    Args:
        claims: some of :data:`CLAIMS`; all if None, of which ``slow-regime`` is only trained when named.
        profile: a name out of :data:`PROFILES`, or one of your own.
        out: the folder; ``runs/reproduce-PROFILE`` if None.
        operations: to leave out the runs of others.
        seeds: in place of the profile's, for every operation.
        engine, workers: as for :func:`grokcurv.sweep.run_sweep`.
        train: whether to train what is not trained yet; if not, the claims are judged by the runs that have finished,
            also while another process trains the rest.
        on_progress: called with what a sweep reports; ``runs``, ``finished`` and ``failed`` count both sweeps.

    Raises:
        ValueError: an unknown claim, profile, operation or engine.
        RunError: a folder that holds other runs, is being trained in by another process or is damaged.
    """
    if isinstance(profile, str):
        if profile not in PROFILES:
            raise ValueError(f"profile must be one of {', '.join(map(repr, PROFILES))}; got {profile!r}")
        profile = PROFILES[profile]
    for claim in claims or ():
        if claim not in CLAIMS:
            raise ValueError(f"claims must be among {', '.join(CLAIMS)}; got {claim!r}")
    wanted = [claim for claim in CLAIMS if claims is None or claim in claims]
    path = Path(out) if out is not None else Path("runs") / f"reproduce-{profile.name}"
    plan = make_plan(profile, _root(path), operations, seeds)
    to_train = [claim for claim in wanted if claims is not None or claim not in ASKED_FOR]
    if train:
        sweeps = _train(plan, path, plan.needed(to_train), on_progress, engine=engine, workers=workers)
    else:
        parts = {name: part.config for name, part in plan.parts.items() if part.config is not None}
        sweeps = {name: find(path / name, config)[0] for name, config in parts.items()}
    trials = {name: _trials(name, sweep) for name, sweep in sweeps.items()}
    evidence = Evidence(
        {name: [trials[part][run] for run in runs] for part in trials for name, runs in plan.parts[part].sets.items()}
    )
    answers = tuple(answer(claim, evidence) for claim in wanted)
    slow = "slow-regime" in wanted and all(trial.status != "finished" for trial in evidence.of("slow-regime"))
    costs = {"slow-regime": _slow_regime_seconds()} if slow else {}
    failed = {t.id: t.reason for part in trials.values() for t in part.values() if t.status == "failed"}
    matrices = matrices_of(evidence if "pc1" in wanted else Evidence({}))
    tables = {"runs": table_of(sweeps), "matrices": matrices}
    found = Reproduction(path, profile.name, answers, costs, describe_environment(), failed, **tables)
    make_folder(path, parents=True)
    for name, frame in {"table": found.table, "findings": found.findings, **tables}.items():
        write_atomically(path / f"{name}.parquet", frame.to_parquet(index=False))
        write_atomically(path / f"{name}.csv", frame.to_csv(index=False).encode())
    found.write()
    return found


def _root(path: Path) -> str:
    """Folder of the plain runs, as ``basis_from`` has it.

    Relative to where the command runs, so that a checkout can be moved; or as it was when the sweep that is there
    began, so that the folder alone can be moved and is still that sweep.
    """
    there = path / "interventions"
    if lexists(there / "sweep.json"):
        return str(Path(next(iter(open_sweep(there).plan.values())).basis_from).parent)
    return os.path.relpath(path / "runs" / "runs")


def _train(
    plan: Plan, path: Path, needed: tuple[list[str], list[str]], on_progress: Progress | None, **how: Any
) -> dict[str, Sweep]:
    """Both sweeps by name, with the runs that are needed done."""
    sweeps: dict[str, Sweep] = {}
    total, finished, failed = sum(map(len, needed)), 0, 0
    to_come = sum(plan.interventions.plan[run].steps for run in needed[1])
    for (name, part), runs in zip(plan.parts.items(), needed, strict=True):
        if part.config is None:
            continue

        def report(
            news: dict[str, Any], finished: int = finished, failed: int = failed, to_come: int = to_come
        ) -> None:
            assert on_progress is not None
            counts = {"runs": total, "finished": finished + news["finished"], "failed": failed + news["failed"]}
            rate, left = news["steps_per_second"], news["seconds_left"]
            on_progress({**news, **counts, "seconds_left": left + to_come / rate if rate else left})

        told = report if on_progress else None
        sweeps[name] = run_sweep(part.config, path / name, only=runs, on_progress=told, **how)
        states = sweeps[name].runs["status"].reindex(runs)
        finished += int((states == "finished").sum())
        failed += int((states == "failed").sum())
        to_come = 0
    return sweeps


def _trials(name: str, sweep: Sweep) -> dict[str, Trial]:
    """The runs of a sweep by id."""
    trials = {}
    for run, status, reason in sweep.runs[["status", "reason"]].itertuples():
        begun = lexists(sweep.folder(run) / "config.json")
        trials[run] = Trial(f"{name}/{run}", sweep.plan[run], status, reason, sweep.run(run) if begun else None)
    return trials


def _slow_regime_seconds() -> float:
    """What the slow regime would take on one thread of this machine, to where it was published to grok."""
    update, _ = seconds_of(replace(PRESETS["paper-slow"], threads=1))
    return SLOW_GROK_STEP.value * update
