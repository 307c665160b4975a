"""What records say: when a run grokked and its defect rose, whether that is more than chance, how large it is.

Most functions take *records*: a pandas DataFrame, or any mapping from a column's name to equally many numbers, in any
order of steps. A NaN is "not measured in this row": the accuracy and the defect may be on different rows, as they are
when a run's metrics and measurements are joined on ``step`` (:meth:`grokcurv.runs.Run.records`). Steps are training
steps. docs/analysis.md has one line on each function.
"""

from grokcurv.analysis.predictors import Predictors, predictors
from grokcurv.analysis.random_walk import RandomWalkNull, random_walk_pc1
from grokcurv.analysis.spectrum import Eigenspectrum, eigenspectrum
from grokcurv.analysis.statistics import (
    Bend,
    ControlRatio,
    PowerLaw,
    SignTest,
    censored_power_law,
    clopper_pearson,
    control_ratio,
    log_log_bend,
    power_law,
    sign_test,
    wilson,
)
from grokcurv.analysis.sweeps import sweep_results, sweep_settings
from grokcurv.analysis.timing import (
    PHASES,
    by_phase,
    changepoint_step,
    grok_step,
    lead_time,
    lead_times,
    onset_step,
    phases,
    settled_step,
)
from grokcurv.analysis.update_null import UpdateGramNull, noise_edge, update_gram_bands, update_gram_null
from grokcurv.random_subspace import RandomBaseline, alignment_p_value

__all__ = [
    "PHASES",
    "Bend",
    "ControlRatio",
    "Eigenspectrum",
    "PowerLaw",
    "Predictors",
    "RandomBaseline",
    "RandomWalkNull",
    "SignTest",
    "UpdateGramNull",
    "alignment_p_value",
    "by_phase",
    "censored_power_law",
    "changepoint_step",
    "clopper_pearson",
    "control_ratio",
    "eigenspectrum",
    "grok_step",
    "lead_time",
    "lead_times",
    "log_log_bend",
    "noise_edge",
    "onset_step",
    "phases",
    "power_law",
    "predictors",
    "random_walk_pc1",
    "settled_step",
    "sign_test",
    "sweep_results",
    "sweep_settings",
    "update_gram_bands",
    "update_gram_null",
    "wilson",
]
