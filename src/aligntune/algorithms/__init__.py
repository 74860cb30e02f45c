"""What is the loss? Algorithms as pure functions on typed batches: no transformers, no TRL, no I/O in a step.

Start with `base` (what an algorithm is to a trainer) and `batch` (what a loss sees and returns). Every module here is
imported once, so an algorithm that a file registers is known to `get`.
"""

from __future__ import annotations

import importlib
import pkgutil

from aligntune.algorithms.base import (
    Advantages,
    AlgorithmSpec,
    Needs,
    ScoredRollouts,
    algorithm,
    get,
    names,
    register,
)
from aligntune.algorithms.batch import (
    Loss,
    Normalizers,
    PairBatch,
    PairLogProbs,
    RolloutBatch,
    combine_metrics,
)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "Advantages",
    "AlgorithmSpec",
    "Loss",
    "Needs",
    "Normalizers",
    "PairBatch",
    "PairLogProbs",
    "RolloutBatch",
    "ScoredRollouts",
    "algorithm",
    "combine_metrics",
    "get",
    "names",
    "register",
]
