"""What each claim says, and the rule that decides it, with every threshold; the words are in claims.toml.

A rule is applied twice: to what the published arithmetic gives here, and to what can be trusted. Both answers together
make the verdict.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
"""A matrix moves more directly than random walks if at most this share of them has a PC1 as large."""

RHO = 0.9995
"""From here on rho is 1.000 in print."""

LEAST_RATIO = 10.0
"""Of a defect to that of the control."""

SIGNIFICANT = 0.05
"""Of a test over runs."""

WIDEST_EXPONENT = 0.6
"""A 95 % interval wider than this does not tell one exponent from another."""

FEWEST_SPLITS = 10
"""Operations and seeds below which an interval by resampling them is far too short."""

USUAL_RATE = 1e-3
"""The learning rate at which other hyperparameters were varied."""

SAME_STEP = 100.0
"""Steps by which two runs may differ and still grok at once: the interval between evaluations."""

FALL = 2.0
"""The gap of the update Gram matrix has fallen when it is at most its maximum over this."""

GENTLE = 0.75
"""Strength of a projection up to which a random basis was published to make no difference."""

SPIKE = 1000.0
"""A defect from here on is one of the high ones of the slow regime."""

_SAID: dict[str, dict[str, Any]] = tomllib.loads(Path(__file__).with_name("claims.toml").read_text(encoding="utf-8"))
_OTHERWISE = _SAID.pop("otherwise")

WORDS: Mapping[str, Mapping[str, Any]] = {claim: _OTHERWISE | words for claim, words in _SAID.items()}
"""By claim, what stands on its part of the page: claims.toml."""

SENTENCES: dict[str, str] = {claim: words["sentence"].format_map(globals()) for claim, words in WORDS.items()}
RULES: dict[str, str] = {claim: words["rule"].format_map(globals()) for claim, words in WORDS.items()}


def verdict(trustworthy: bool | None, arithmetic: bool | None) -> str:
    """The verdict of a rule that says yes, no or, None, that it cannot tell."""
    if trustworthy:
        return HOLDS
    if arithmetic:
        return ONLY_PUBLISHED
    return UNDECIDED if trustworthy is None else FAILS
