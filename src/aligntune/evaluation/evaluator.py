"""How good are the model's answers? Greedy answers to chosen rows, every metric of them, and every answer kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aligntune.errors import DataError
from aligntune.evaluation.answers import EvaluationRow, Prompt, TextGenerator, choose
from aligntune.evaluation.registry import Metric, compute


@dataclass(frozen=True)
class Evaluation:
    """Metrics over the answered rows, and a record per row: row, prompt, reference, prediction, scores, columns."""

    metrics: dict[str, float]
    predictions: list[dict[str, Any]]

    def write_predictions(self, path: str | Path) -> Path:
        """One JSON object a line; values that JSON has no form for are written as text."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for record in self.predictions:
                file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
        return path


@dataclass
class AnswerEvaluator:
    """Answers the same rows at every call. `check()` before training; a call gives the metrics and keeps `last`.

    `max_samples` rows are drawn by `seed` (all, if None). `device`: where encoders of metrics run (default: CPU).
    """

    generator: TextGenerator
    rows: Sequence[EvaluationRow]
    metrics: Sequence[Metric]
    max_new_tokens: int = 128
    max_samples: int | None = 50
    seed: int = 0
    device: str | None = None
    last: Evaluation | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.chosen = choose(len(self.rows), self.max_samples, self.seed)

    def check(self) -> None:
        """Whatever can be missing is missed here: rows, packages, encoders, columns of metrics, empty references.

        Raises:
            DataError, MissingExtra, ModelError, ConfigError: with what to do about it.
        """
        if not self.rows:
            raise DataError("there are no evaluation rows to answer")
        for at in self.chosen:
            if not self.rows[at].reference.strip():
                raise DataError(f"evaluation row {at} has an empty reference answer")
        columns = self._columns()
        for entry in self.metrics:
            entry.check(columns)

    def __call__(self) -> dict[str, float]:
        """Answer, score, keep the records in `last`, and return the metrics."""
        self.last = self.evaluate()
        return self.last.metrics

    def evaluate(self) -> Evaluation:
        """Answers and scores of the chosen rows."""
        rows = [self.rows[at] for at in self.chosen]
        prompts: list[Prompt] = [row.prompt for row in rows]
        predictions = self.generator.generate(
            prompts, max_new_tokens=self.max_new_tokens, tools=[row.tools for row in rows]
        )
        references = [row.reference for row in rows]
        metrics, by_row = compute(self.metrics, predictions, references, self._columns(), self.device)
        records = [
            {
                "row": at,
                "prompt": row.prompt,
                "reference": row.reference,
                "prediction": predictions[place],
                "scores": {name: scores[place] for name, scores in by_row.items()},
                **({"columns": dict(row.columns)} if row.columns else {}),
            }
            for place, (at, row) in enumerate(zip(self.chosen, rows, strict=True))
        ]
        return Evaluation(metrics, records)

    def _columns(self) -> dict[str, list[Any]]:
        """The columns that all chosen rows have."""
        rows = [self.rows[at] for at in self.chosen]
        shared = set.intersection(*(set(row.columns) for row in rows)) if rows else set()
        return {name: [row.columns[name] for row in rows] for name in sorted(shared)}
