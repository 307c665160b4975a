"""Which runs the claims need, in three sizes.

A profile lists runs in named sets, a claim names the sets it reads, and a run that is in several sets is trained once.
The profiles are files beside this one: ``quick.toml``, ``add.toml`` and ``paper.toml``.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, product
from pathlib import Path
from typing import Any

from grokcurv.reproduce.published import GROK_STEPS
from grokcurv.sweep import SweepConfig
from grokcurv.training import PRESETS, TrainConfig

NEEDS: dict[str, tuple[str, ...]] = {
    "pc1": ("grokking", "never", "control"),
    "rho": ("grokking",),
    "exec-random": ("grokking",),
    "control-ratio": ("grokking", "control"),
    "onset": ("grokking",),
    "lr-law": ("grokking", "rates", "regimes"),
    "alignment": ("grokking", "rates"),
    "update-gram": ("grokking", "control"),
    "suppression": ("suppression",),
    "random-basis": ("random-basis",),
    "kicks": ("kicks",),
    "slow-regime": ("slow",),
}
"""By claim, in the order of the page, the sets of runs it reads; an intervention's baseline is one of ``grokking``."""

CLAIMS = tuple(NEEDS)
"""By name, in the order of the page."""

ASKED_FOR = ("slow-regime",)
"""Claims whose runs, of a day or more, are trained only when they are named, and read as far as they are."""

SECONDS = {"update": 0.029, "evaluation": 0.17, "measurement": 0.65}
"""Of the paper's transformer, on one of two busy cores; they order the runs, longest first, and no more."""

Seeds = Mapping[str, tuple[int, ...]]
"""By operation."""


@dataclass(frozen=True)
class Block:
    """Runs that share settings: every operation with each of its seeds."""

    seeds: Seeds
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Profile:
    """The runs of a reproduction."""

    name: str
    runs: Mapping[str, tuple[Block, ...]]
    """By set."""
    interventions: Mapping[str, tuple[Block, ...]]
    """By set. Of each run's operation and seed there is one in the set ``grokking``: its baseline, and what its basis
    is taken from."""
    run: Mapping[str, Any] = field(default_factory=dict)
    """Settings of all runs."""


@dataclass(frozen=True)
class Part:
    """One of the two sweeps of a plan."""

    config: SweepConfig | None
    """None where the profile has nothing for it."""
    sets: Mapping[str, tuple[str, ...]]
    """By set, the ids of its runs."""

    @property
    def plan(self) -> Mapping[str, TrainConfig]:
        """Settings by id."""
        return self.config.plan if self.config else {}

    def of(self, names: Collection[str], others: Collection[str] = ()) -> list[str]:
        """The ids of the runs that are in one of the sets named, and of others, in order."""
        wanted = {*others, *(run for name in names for run in self.sets.get(name, ()))}
        return [run for run in self.plan if run in wanted]


@dataclass(frozen=True)
class Plan:
    """What a profile comes to."""

    runs: Part
    interventions: Part
    baselines: Mapping[str, str]
    """By id of an intervention, that of the plain run that is its baseline."""

    @property
    def parts(self) -> Mapping[str, Part]:
        """By the name of its folder."""
        return {"runs": self.runs, "interventions": self.interventions}

    def needed(self, claims: Collection[str]) -> tuple[list[str], list[str]]:
        """The plain runs and the interventions that these claims read, by id."""
        names = {name for claim in claims for name in NEEDS[claim]}
        interventions = self.interventions.of(names)
        baselines = {self.baselines[run] for run in interventions}
        return self.runs.of(names, baselines), interventions


def make_plan(
    profile: Profile,
    root: str | os.PathLike[str],
    operations: Collection[str] | None = None,
    seeds: Collection[int] | None = None,
) -> Plan:
    """The plan of a profile.

    Args:
        profile: its runs.
        root: folder in which the plain runs have theirs, where interventions find their bases.
        operations: leaves out the runs of others.
        seeds: in place of the profile's, for every operation.

    Raises:
        ValueError: operations of which the profile has none, or no seed.
    """
    known = {op for blocks in profile.runs.values() for block in blocks for op in block.seeds}
    for op in operations if operations is not None else ():
        if op not in known:
            raise ValueError(f"operations must be among {', '.join(sorted(known))}; got {op!r}")
    for name, chosen in {"operations": operations, "seeds": seeds}.items():
        if chosen is not None and not chosen:
            raise ValueError(f"{name} must name at least one; got none")

    def entries(blocks: tuple[Block, ...]) -> Iterator[dict[str, Any]]:
        for block in blocks:
            for op, its_seeds in block.seeds.items():
                if operations is None or op in operations:
                    for seed in dict.fromkeys(its_seeds if seeds is None else seeds):
                        yield {"op": op, "seed": seed, **block.settings}

    runs = _part(profile.run, {name: list(entries(blocks)) for name, blocks in profile.runs.items()})
    grokking = {(runs.plan[run].op, runs.plan[run].seed): run for run in runs.sets.get("grokking", ())}

    def based(entry: dict[str, Any]) -> dict[str, Any]:
        return {**entry, "basis_from": os.path.join(root, grokking[entry["op"], entry["seed"]])}

    wanted = {name: list(map(based, entries(blocks))) for name, blocks in profile.interventions.items()}
    interventions = _part(profile.run, wanted)
    baselines = {run: grokking[config.op, config.seed] for run, config in interventions.plan.items()}
    return Plan(runs, interventions, baselines)


def expected_seconds(config: TrainConfig) -> float:
    """Roughly how long a run of the paper's transformer takes, if it groks when the paper's did."""
    stopped = config.weight_decay < 1 or (config.intervention.startswith("project") and config.strength == 1)
    grok = None if stopped else GROK_STEPS.get((config.op, config.lr))
    patience = (config.grok_patience - 1) * config.eval_every
    steps = config.steps if grok is None else min(config.steps, grok + patience + config.steps_after_grok)
    measurements = steps / config.measure_every * config.pairs / 5 if config.measure_every else 0
    updating = (steps * SECONDS["update"] + steps / config.eval_every * SECONDS["evaluation"]) * config.layers / 2
    return updating + measurements * SECONDS["measurement"]


def _part(common: Mapping[str, Any], wanted: Mapping[str, list[dict[str, Any]]]) -> Part:
    """A sweep of all runs that are wanted, each once, the longest first, so that workers end together."""
    runs: list[dict[str, Any]] = []
    for entries in wanted.values():
        runs += [entry for entry in entries if entry not in runs]
    if not runs:
        return Part(None, {})

    def seconds(entry: Mapping[str, Any]) -> float:
        settings = {**common, **entry}
        return expected_seconds(replace(PRESETS[settings.get("preset", "paper")], **settings))

    runs.sort(key=seconds, reverse=True)
    sweep = SweepConfig(run=dict(common), runs=runs)
    ids = list(sweep.plan)
    return Part(sweep, {name: tuple(ids[runs.index(entry)] for entry in entries) for name, entries in wanted.items()})


WATCHED = {"basis": "oracle", "measure_every": 0, "pca_every": 0, "steps_after_grok": 0}
"""Settings of interventions: what counts is whether they grok, and when."""


def _blocks(operations: list[str], seeds: list[int], **settings: Any) -> Iterator[Block]:
    """Of a setting with a list each value in turn, the last such setting varying fastest."""
    values = [value if isinstance(value, list) else [value] for value in settings.values()]
    for point in product(*values):
        chosen = dict(zip(settings, point, strict=True))
        yield Block(dict.fromkeys(operations, tuple(seeds)), WATCHED | chosen if "intervention" in settings else chosen)


def _read(name: str) -> Profile:
    """The profile in a file beside this one: of each set a list of tables, and what all of them share."""
    said: dict[str, Any] = tomllib.loads(Path(__file__).with_name(f"{name}.toml").read_text(encoding="utf-8"))
    shared = {key: said.pop(key) for key in ("operations", "seeds") if key in said}
    sets = {key: tuple(chain(*(_blocks(**shared | table) for table in tables))) for key, tables in said.items()}
    interventions = {key: blocks for key, blocks in sets.items() if "intervention" in blocks[0].settings}
    return Profile(name, {key: sets[key] for key in sets if key not in interventions}, interventions)


PROFILES = {name: _read(name) for name in ("quick", "add", "paper")}
"""By name: ``quick``, ``add`` (seeds of one operation) and ``paper`` (the paper's runs)."""

QUICK = PROFILES["quick"]
