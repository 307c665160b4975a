"""What each claim says, and the rule that decides it, with every threshold.

A rule is applied twice: to what the published arithmetic gives here, and to what can be trusted. Both answers together
make the verdict.
"""

from __future__ import annotations

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

WIDEST_EXPONENT = 1.0
"""A 95 % interval wider than this does not tell one exponent from another."""

SAME_STEP = 100.0
"""Steps by which two runs may differ and still grok at once: the interval between evaluations."""

GENTLE = 0.75
"""Strength of a projection up to which a random basis was published to make no difference."""

SPIKE = 1000.0
"""A defect from here on is one of the high ones of the slow regime."""

SENTENCES = {
    "pc1": "The attention weights of a network that groks move along one line: the first principal component of each "
    "matrix's trajectory holds most of its variance, more than a random walk's does.",
    "rho": "The commutator lies outside the execution subspace: rho = |δ⊥| / |δ| is 1.000.",
    "exec-random": "When the network has memorised and not yet grokked, the commutator's part inside the execution "
    "subspace is 1.8 to 2.9 times what a random subspace of as many dimensions would catch.",
    "control-ratio": "The defect of a run that groks is 10 to 1000 times that of the same run without weight decay.",
    "onset": "The defect rises before the test accuracy does, in every run.",
    "lr-law": "Over three learning rates the lead is a power of the grok step, with an exponent of about 1.3.",
    "alignment": "Training moves along commutators, the more so the higher the learning rate: less than by chance at "
    "1e-4, more than by chance at 1e-2.",
    "suppression": "Motion outside the execution subspace is needed: without it no run groks.",
    "random-basis": "It is that subspace which matters: damping what lies outside a random one of equal rank, by up to "
    f"{GENTLE:.0%}, moves grokking by less than 50 steps.",
    "kicks": "Pushing the weights along commutators does not prevent grokking: every kicked run groks.",
    "slow-regime": "At learning rate 5e-5 and weight decay 0.1 the defect alternates between 0 and some 10,000 for "
    "hundreds of thousands of steps before the network groks.",
}

RULES = {
    "pc1": "Up to the step at which a run has grokked, where the published ones end, the mean over matrices, median "
    f"over the runs, is within {PC1_TOLERANCE:g} points of the published one, and for at least half of their matrices "
    f"at most {WALK_P:.0%} of random walks with steps as long have a PC1 as large.",
    "rho": f"The lowest of the runs' medians is {RHO} or more.",
    "exec-random": "In the middle of the phase of memorisation, the lowest of the runs' medians is "
    "above 1. In the published arithmetic the random subspaces lie in all of parameter space; the trustworthy ones are "
    "confined to the coordinates on which the execution subspace lives.",
    "control-ratio": "The ratio, median over the steps from the onset of the defect on and then over runs, is "
    f"{LEAST_RATIO:g} or more. A defect that cannot be told from rounding does not count.",
    "onset": "The sign test over the runs that grokked says that leads are more likely than lags, p < "
    f"{SIGNIFICANT}; a run whose defect never rose counts as one that did not lead. The claim fails if half of the "
    "runs or fewer lead.",
    "lr-law": f"The 95% bootstrap interval of the exponent holds the published one and is at most {WIDEST_EXPONENT:g} "
    "wide; a wider one decides nothing.",
    "alignment": "Between the paper's four checkpoints of a run, of |cos| with the commutators at the later one: the "
    "median at learning rate 1e-2 is above 1 and above that at 1e-4, and a Mann-Whitney test tells the two apart, "
    f"p < {SIGNIFICANT}; if it does not, nothing is decided.",
    "suppression": "No run groks whose baseline did. In the published arithmetic the gradient is projected, and "
    "AdamW's moments and weight decay lead out of the subspace again; trustworthy is the projection of the update.",
    "random-basis": f"No run groks more than {SAME_STEP:g} steps, one evaluation, before or after its baseline. In the "
    "published arithmetic the random basis lies in all of parameter space; the trustworthy one has as many random "
    "directions in each matrix as the execution basis.",
    "kicks": "Every kicked run groks whose baseline did. In the published arithmetic the kick also leaves another "
    "gradient to the optimiser.",
    "slow-regime": f"Some measurements are exactly 0, and some are {SPIKE:g} or more.",
}


def verdict(trustworthy: bool | None, arithmetic: bool | None) -> str:
    """The verdict of a rule that says yes, no or, None, that it cannot tell."""
    if trustworthy:
        return HOLDS
    if arithmetic:
        return ONLY_PUBLISHED
    return UNDECIDED if trustworthy is None else FAILS
