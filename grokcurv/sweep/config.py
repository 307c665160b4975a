"""What a sweep file says, and the plan it stands for: an ordered list of runs, each with an id and its settings."""

from __future__ import annotations

import difflib
import itertools
import math
import random
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from os import PathLike
from pathlib import Path
from typing import Any, get_type_hints

from grokcurv.training.config import PRESETS, TrainConfig

MOST_RUNS = 100_000
"""Of a sweep."""

LONGEST_ID = 120
"""Characters of a run's id at most; a file name can have 255."""

WANTED = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


@dataclass(frozen=True)
class Random:
    """Settings drawn at random, each field from a stream of its own: one more field or sample changes no other."""

    samples: int
    """How many."""
    fields: dict[str, dict[str, list[Any]]]
    """By field, one of ``{"uniform": [low, high]}``, ``{"log_uniform": [low, high]}`` and ``{"choice": [...]}``.
    Fields that are whole numbers are drawn as such, both bounds included."""
    seed: int = 0
    """Of the draws; the runs' own is a field like any other."""


@dataclass(frozen=True)
class SweepConfig:
    """Every entry of ``runs``, with every sample of ``random``, with every combination of ``grid``, in this order.

    Of the three at least one says something; the grid's last field varies fastest. Settings are those of
    :class:`grokcurv.training.TrainConfig`; a ``preset`` among them is what the run starts from. A run has one thread
    unless ``threads`` says otherwise.

    >>> config = SweepConfig(run={"steps": 10}, grid={"op": ["add", "mul"], "seed": [0, 1]})
    >>> list(config.plan)
    ['0000-add-seed0', '0001-add-seed1', '0002-mul-seed0', '0003-mul-seed1']
    """

    run: dict[str, Any] = field(default_factory=dict)
    """Settings of all runs; an entry of ``runs`` can overrule them."""
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """By field, the values it takes."""
    runs: list[dict[str, Any]] = field(default_factory=list)
    """Settings run by run."""
    random: Random | None = None
    """Settings drawn at random."""

    def __post_init__(self) -> None:
        """Check everything, down to the settings of every run.

        Raises:
            ValueError: naming the table and the field, what it was and what it can be.
        """
        if not (self.grid or self.runs or self.random):
            raise ValueError("a sweep needs at least one of [grid], [[runs]] and [random]; got none")
        for name, values in self.grid.items():
            if not isinstance(values, list) or not values:
                raise ValueError(f"[grid] {name} must be a list of values; got {values!r}")
            for index, value in enumerate(values):
                if value in values[:index]:
                    raise ValueError(f"[grid] {name} has {value!r} twice")
        named = {"[run]": self.run, "[grid]": self.grid, "[random.fields]": self.random.fields if self.random else {}}
        listed = {name: None for entry in self.runs for name in entry}
        for (table, names), (other, others) in itertools.combinations([*named.items(), ("[[runs]]", listed)], 2):
            shared = [name for name in names if name in others]
            if shared and (table, other) != ("[run]", "[[runs]]"):
                raise ValueError(f"{shared[0]} is in {table} and in {other}; wanted it in one of them")
        samples = _number("samples", self.random.samples, 1) if self.random else 1
        count = max(len(self.runs), 1) * samples * math.prod(map(len, self.grid.values()))
        if count > MOST_RUNS:
            raise ValueError(f"a sweep has {MOST_RUNS:,} runs at most; this one would have {count:,}")
        _ = self.plan

    @classmethod
    def from_toml(cls, path: str | PathLike[str]) -> SweepConfig:
        """Read a sweep file.

        Raises:
            ValueError: it cannot be read, is not TOML, or describes no sweep; the message begins with the path.
        """
        try:
            return cls.from_dict(tomllib.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, tables: Mapping[str, Any]) -> SweepConfig:
        """The tables of a sweep file; ValueError naming the one that is wrong."""
        for name, content in tables.items():
            if name not in ("run", "grid", "runs", "random"):
                raise ValueError(f"there is no table [{name}]; wanted run, grid, runs or random")
            kind, wanted = (list, "an array of tables, [[runs]]") if name == "runs" else (dict, f"a table, [{name}]")
            if not isinstance(content, kind):
                raise ValueError(f"{name} must be {wanted}; got {content!r}")
        for entry in tables.get("runs", ()):
            if not isinstance(entry, dict):
                raise ValueError(f"runs must be an array of tables, [[runs]]; got {entry!r} in it")
        return cls(**{**tables, "random": _random(tables["random"])} if "random" in tables else tables)

    def to_dict(self) -> dict[str, Any]:
        """The tables of a sweep file, as :meth:`from_dict` takes them."""
        return {name: content for name, content in asdict(self).items() if content}

    @cached_property
    def named(self) -> tuple[str, ...]:
        """Fields that [[runs]], [random] and [grid] name, in this order."""
        listed = [name for entry in self.runs for name in entry]
        return tuple(dict.fromkeys([*listed, *(self.random.fields if self.random else ()), *self.grid]))

    @cached_property
    def plan(self) -> dict[str, TrainConfig]:
        """The runs in order: settings by id, such as ``0007-add-lr0.001-seed42``: a number and what it says of
        the fields that vary.
        """
        combinations = list(self._combinations())
        configs = [_settings(tables) for tables in combinations]
        varied = [name for name in varied_fields(self.named, configs) if name != "basis_from"]  # a path
        width = max(4, len(str(len(configs) - 1)))
        plan = {}
        for index, (config, tables) in enumerate(zip(configs, combinations, strict=True)):
            its_own = {name for table in tables.values() for name in table}
            plan[_id(f"{index:0{width}}", config, [name for name in varied if name in its_own])] = config
        return plan

    def _combinations(self) -> Iterator[dict[str, dict[str, Any]]]:
        """The settings of each run in turn, by the table they come from."""
        run = {name: checked("[run]", name, value) for name, value in self.run.items()}
        listed = [
            {name: checked(f"[[runs]] number {number}", name, value) for name, value in entry.items()}
            for number, entry in enumerate(self.runs, 1)
        ]
        grid = [[checked("[grid]", name, value) for value in values] for name, values in self.grid.items()]
        samples = _samples(self.random) if self.random else [{}]
        for entry, sample, point in itertools.product(listed or [{}], samples, itertools.product(*grid)):
            yield {
                "[run]": run,
                "[[runs]]": entry,
                "[random.fields]": sample,
                "[grid]": dict(zip(self.grid, point, strict=True)),
            }


def varied_fields(named: tuple[str, ...], configs: list[TrainConfig]) -> tuple[str, ...]:
    """Those of the fields in which the configurations differ."""
    return tuple(name for name in named if len({getattr(config, name) for config in configs}) > 1)


def _random(table: dict[str, Any]) -> Random:
    """The table [random] of a sweep file."""
    for name in table:
        if name not in ("samples", "seed", "fields"):
            raise ValueError(f"[random] has no {name}; it has samples, seed and the table [random.fields]")
    for name in ("samples", "fields"):
        if name not in table:
            raise ValueError(f"[random] needs {name}, the {'number of draws' if name == 'samples' else 'fields drawn'}")
    if not isinstance(table["fields"], dict):
        raise ValueError(f"[random] fields must be a table, [random.fields]; got {table['fields']!r}")
    return Random(**table)


def _samples(drawn: Random) -> list[dict[str, Any]]:
    """Settings drawn at random, a dict a run."""
    _number("seed", drawn.seed, 0)
    if not drawn.fields:
        raise ValueError("[random.fields] must have at least one setting to draw; got none")
    columns = [_draws(name, law, drawn) for name, law in drawn.fields.items()]
    return [dict(zip(drawn.fields, values, strict=True)) for values in zip(*columns, strict=True)]


def _number(name: str, number: Any, least: int) -> int:
    """A setting of [random], once it is a whole number from ``least`` on."""
    if not isinstance(number, int) or isinstance(number, bool) or number < least:
        raise ValueError(f"[random] {name} must be a whole number, at least {least}; got {number!r}")
    return number


def _draws(name: str, law: Any, drawn: Random) -> list[Any]:
    """The values of one field in all samples."""
    where = f"[random.fields] {name}"
    if not isinstance(law, dict) or len(law) != 1 or next(iter(law)) not in ("uniform", "log_uniform", "choice"):
        raise ValueError(
            f"{where} must be one of {{uniform = ...}}, {{log_uniform = ...}}, {{choice = ...}}; got {law}"
        )
    ((kind, values),) = law.items()
    if not isinstance(values, list) or not values:
        raise ValueError(f"{where}: {kind} must be a list; got {values!r}")
    values = [checked("[random.fields]", name, value) for value in values]
    stream = random.Random(f"{drawn.seed} {name}")
    shares = [stream.random() for _ in range(drawn.samples)]
    if kind == "choice":
        return [values[int(share * len(values))] for share in shares]
    whole = _types()[name] is int
    if not whole and _types()[name] is not float:
        raise ValueError(f"{where} is {WANTED[_types()[name]]}: it can be drawn by choice alone; got {kind}")
    least = 0 if kind == "log_uniform" else -math.inf
    if len(values) != 2 or not least < values[0] < values[1] < math.inf:
        above = " above 0" if kind == "log_uniform" else ""
        raise ValueError(f"{where}: {kind} must be [low, high]{above}, low below high; got {values}")
    # A whole number is the middle of an interval of length one, so that its bounds are as likely as the rest.
    low, high = (values[0] - 0.5, values[1] + 0.5) if whole else values
    scale, back = (math.log, math.exp) if kind == "log_uniform" else (float, float)
    low, high = scale(low), scale(high)
    numbers = [back(low + share * (high - low)) for share in shares]
    return [min(max(math.floor(number + 0.5), values[0]), values[1]) for number in numbers] if whole else numbers


@cache
def _types() -> dict[str, type]:
    """Of every setting: bool, int, float or str."""
    return {name: hint if hint in WANTED else str for name, hint in get_type_hints(TrainConfig).items()}


def checked(table: str, name: str, value: Any) -> Any:
    """The value, of the type that the setting has."""
    if name not in _types():
        close = difflib.get_close_matches(name, _types(), 1)
        hint = f"; did you mean {close[0]}?" if close else "; grokcurv train --help lists them"
        raise ValueError(f"{table} {name} is no setting of a run{hint}")
    wanted = _types()[name]
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise ValueError(f"{table} {name} must be {WANTED[wanted]}; got {value!r}")
    return value


def _settings(tables: dict[str, dict[str, Any]]) -> TrainConfig:
    """A run's settings from tables of which later ones override earlier ones."""
    settings: dict[str, Any] = {"threads": 1}
    said = []
    for table, values in tables.items():
        settings |= values
        if values:
            said.append(f"{table} {', '.join(f'{name} = {value!r}' for name, value in values.items())}")
    try:
        return replace(PRESETS.get(settings.get("preset", "paper"), PRESETS["paper"]), **settings)
    except ValueError as error:
        raise ValueError(f"the run of {'; '.join(said)}: {error}") from error


def _id(number: str, config: TrainConfig, varied: list[str]) -> str:
    """A run's name: its number and the settings in which runs differ, as the name of a folder."""
    parts = [number]
    for name in varied:
        value = getattr(config, name)
        text = value if isinstance(value, str) else f"{name}{value:g}" if type(value) is float else f"{name}{value}"
        parts.append(re.sub(r"[^A-Za-z0-9._-]+", "_", text.replace("+", "")).strip("_").lower())
    return "-".join(parts)[:LONGEST_ID]
