"""What may be passed as references? One text a row, or several acceptable ones."""

from __future__ import annotations

from collections.abc import Sequence

from aligntune.errors import DataError

Reference = str | Sequence[str]


def reference_lists(predictions: Sequence[str], references: Sequence[Reference]) -> list[list[str]]:
    """`references` with each row as a list of alternatives.

    Raises `DataError` if the two differ in length, are empty, or a row has no reference.
    """
    if len(predictions) != len(references):
        raise DataError(f"{len(predictions)} predictions but {len(references)} references: give one of each per row")
    if not predictions:
        raise DataError("there are no predictions to score: give at least one row")
    rows = [[row] if isinstance(row, str) else list(row) for row in references]
    for index, row in enumerate(rows):
        if not row:
            raise DataError(f"row {index} has no reference: give one text or a list of texts")
    return rows
