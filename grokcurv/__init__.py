"""Curvature and trajectory geometry of neural-network training, at every step.

>>> import torch
>>> import grokcurv as gc
>>> model = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 5))
>>> loss_fn = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
>>> batch_a, batch_b = ((torch.randn(8, 3), torch.randint(5, (8,))) for _ in range(2))
>>> stats = gc.commutator_defect(model, loss_fn, batch_a, batch_b)
>>> bool(stats.reliable), bool(stats.noise_floor < stats.defect / 10)
(True, True)
"""

from importlib.metadata import version

from grokcurv.admission import AdmissionWarning, Finding
from grokcurv.attachment import attach
from grokcurv.bracket_scores import BracketScores, bracket_scores
from grokcurv.commutator import CommutatorProbe, CommutatorStats, commutator_defect
from grokcurv.flat import FlatParameters, Segment, attention_segments, select_segments
from grokcurv.hessian import hessian_edges, hessian_trace
from grokcurv.losses import cross_entropy64
from grokcurv.measures.gradient_noise import GradientNoise
from grokcurv.measures.hessian_edges import HessianEdges
from grokcurv.measures.optimizer_commutator import OptimizerCommutator
from grokcurv.measures.update_decomposition import UpdateDecomposition
from grokcurv.measures.update_gram import UpdateGram
from grokcurv.measures.weight_spectra import WeightSpectra
from grokcurv.monitor import CurvatureMonitor
from grokcurv.pca import StreamingPCA
from grokcurv.replays import replay
from grokcurv.samplers import from_loader, halves, subsample
from grokcurv.subspace import Subspace

__version__ = version("grokcurv")

__all__ = [
    "AdmissionWarning",
    "BracketScores",
    "CommutatorProbe",
    "CommutatorStats",
    "CurvatureMonitor",
    "Finding",
    "FlatParameters",
    "GradientNoise",
    "HessianEdges",
    "OptimizerCommutator",
    "Segment",
    "StreamingPCA",
    "Subspace",
    "UpdateDecomposition",
    "UpdateGram",
    "WeightSpectra",
    "attach",
    "attention_segments",
    "bracket_scores",
    "commutator_defect",
    "cross_entropy64",
    "from_loader",
    "halves",
    "hessian_edges",
    "hessian_trace",
    "replay",
    "select_segments",
    "subsample",
]
