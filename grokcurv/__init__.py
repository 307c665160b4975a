"""Curvature and trajectory geometry of neural-network training, at every step.

>>> import grokcurv as gc
>>> stats = gc.commutator_defect(model, loss_fn, batch_a, batch_b)  # doctest: +SKIP
>>> stats.defect, stats.noise_floor, stats.reliable  # doctest: +SKIP
"""

from importlib.metadata import version

from grokcurv.admission import AdmissionWarning, Finding
from grokcurv.commutator import CommutatorProbe, CommutatorStats, commutator_defect
from grokcurv.flat import FlatParameters, Segment
from grokcurv.losses import cross_entropy64
from grokcurv.monitor import CurvatureMonitor
from grokcurv.pca import StreamingPCA
from grokcurv.samplers import from_loader, halves, subsample
from grokcurv.subspace import Subspace

__version__ = version("grokcurv")

__all__ = [
    "AdmissionWarning",
    "CommutatorProbe",
    "CommutatorStats",
    "CurvatureMonitor",
    "Finding",
    "FlatParameters",
    "Segment",
    "StreamingPCA",
    "Subspace",
    "commutator_defect",
    "cross_entropy64",
    "from_loader",
    "halves",
    "subsample",
]
