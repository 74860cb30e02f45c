"""What do evaluations of saved models share? The result, and a model that is ready to be asked."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from aligntune.config.enums import PrecisionType
from aligntune.config.run import SFTRunConfig
from aligntune.errors import ConfigError
from aligntune.evaluation.evaluator import Evaluation
from aligntune.models.heads import SavedHead, head_arguments, head_class, settle
from aligntune.models.load import load_model
from aligntune.models.precision import resolve_precision
from aligntune.models.tokenizer import load_tokenizer

PREFERENCE = "preference"
"""Name of the task of choosing between two answers."""

Table = tuple[str, list[str], list[list[Any]]]
"""Title, columns, rows."""


@dataclass(frozen=True)
class SavedEvaluation(Evaluation):
    """`task` that was measured, and tables to show beside the metrics."""

    task: str = ""
    tables: list[Table] = field(default_factory=list)


def load_for_evaluation(run: SFTRunConfig, head: SavedHead | None = None) -> tuple[Any, Any]:
    """Model (an adapter merged into its base) and tokenizer, ready to be asked."""
    precision = resolve_precision(PrecisionType.AUTO if not run.model.is_set("precision") else run.model.precision)
    name = run.model.name_or_path
    tokenizer = load_tokenizer(name, generates=head is None)
    if head is None:
        return load_model(run.model, precision, trained=False).eval(), tokenizer
    model = load_model(
        run.model, precision, trained=False, auto_class=head_class(head.task), **head_arguments(head.names)
    )
    settle(model, tokenizer)
    return model.eval(), tokenizer


def batch_size(run: SFTRunConfig) -> int:
    """Rows per forward pass: those that the user asks for, else eight."""
    return run.train.per_device_batch_size if run.train.is_set("per_device_batch_size") else 8


def check_names(names: Sequence[str], known: Sequence[str]) -> set[str]:
    """`names` as a set. Raises `ConfigError` for one that is not known."""
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}? There" if close else "there"
            raise ConfigError(f"metrics: there is no {name!r} here; {hint} are: {', '.join(known)}")
    return set(names)
