"""How do tasks from a generator score? By the scorer that comes with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from aligntune.errors import RewardError, require

from . import answers
from .base import adversarial, bad, good, reward

SUM = {"question": "What is 4 - 1 - 7?", "answer": "-4", "metadata": {"source_dataset": "chain_sum"}}


@reward(
    "reasoning_gym",
    range=(0, 1),
    source="reasoning-gym (Stojanovski et al. 2025, arXiv 2505.24760)",
    examples=[
        good("4 - 1 = 3, 3 - 7 = -4. <answer>-4</answer>", entry=SUM),
        bad("<answer>5</answer>", (0.0, 0.1), entry=SUM),
        adversarial("<answer></answer>", (0.0, 0.1), entry=SUM, note="an empty answer"),
    ],
)
def reasoning_gym(completion: str, entry: Mapping[str, Any] | str, *, dataset: str | None = None, extract: str = "auto") -> float:  # fmt: skip
    """The score that the task's own generator gives the answer; partial credit as it defines it.

    The column `entry` is the generator's item (question, answer, metadata) as a dict or JSON. `dataset` names the
    generator when the metadata do not; `extract` is how the answer is found (whole, last_line, boxed, tag, auto).
    """
    module = require("reasoning_gym", extra="rewards", why="the reward 'reasoning_gym'")
    item = json.loads(entry) if isinstance(entry, str) else dict(entry)
    name = dataset or (item.get("metadata") or {}).get("source_dataset")
    if name is None:
        raise RewardError("reasoning_gym: the entry's metadata have no source_dataset; set params: {dataset: ...}")
    try:
        score = module.get_score_answer_fn(name)
    except (KeyError, ValueError, AttributeError) as error:
        raise RewardError(f"reasoning_gym has no dataset {name!r}") from error
    return float(score(answer=answers.extract(completion, extract), entry=item))
