"""Which row formats are there? Their names, known without the code that reads them (`aligntune.data`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from aligntune.config import rl, sft
from aligntune.config.enums import AlgorithmType, TaskType
from aligntune.config.run import RLRunConfig, SFTRunConfig
from aligntune.config.synonyms import Path
from aligntune.config.words import not_among, plain_word

TASK_FORMATS: dict[TaskType, tuple[str, ...]] = {
    TaskType.SUPERVISED_FINE_TUNING: ("text", "alpaca", "dolly", "messages", "sharegpt", "prompt_completion"),
    TaskType.INSTRUCTION_FOLLOWING: ("alpaca", "dolly", "prompt_completion"),
    TaskType.TEXT_GENERATION: ("text",),
    TaskType.CHAT_COMPLETION: ("messages", "sharegpt", "prompt_completion"),
    TaskType.TEXT_CLASSIFICATION: ("classification",),
    TaskType.TOKEN_CLASSIFICATION: ("tagging",),
}
"""What each task of supervised fine-tuning reads."""
RL_FORMATS = {
    "preference": ["preference", "alpaca_pairs", "sharegpt_pairs", "hh", "ranked"],
    "prompt": ["prompt", "instruction", "messages", "sharegpt", "hh", "preference"],
}
"""What DPO reads, and what the online algorithms read; `aligntune.data.row_format` adds those of a user."""


def unknown_formats(config: SFTRunConfig | RLRunConfig) -> Iterator[tuple[Path, str]]:
    """A `format_type` that is no format of the rows that the run reads."""
    several: Sequence[sft.DatasetConfig | rl.DatasetConfig] = config.datasets
    places: list[Path] = [("dataset",), ("eval_dataset",), *(("datasets", place) for place in range(len(several)))]
    for at, source in zip(places, (config.dataset, config.eval_dataset, *several), strict=True):
        name = None if source is None else source.format_type
        if source is not None and name is not None and plain_word(name) not in _readable(config, source):
            known = _formats(config, source)
            yield (*at, "format_type"), f"{not_among(name, known)}, got {name!r}"


def _formats(config: SFTRunConfig | RLRunConfig, source: sft.DatasetConfig | rl.DatasetConfig) -> Sequence[str]:
    if isinstance(source, sft.DatasetConfig):
        return TASK_FORMATS[source.task_type]
    return RL_FORMATS["preference" if config.algorithm is AlgorithmType.DPO else "prompt"]


def _readable(config: SFTRunConfig | RLRunConfig, source: sft.DatasetConfig | rl.DatasetConfig) -> Sequence[str]:
    """The formats, and those of pairs, on which `aligntune eval` measures a model by the settings of SFT."""
    pairs = RL_FORMATS["preference"] if isinstance(source, sft.DatasetConfig) else ()
    return (*_formats(config, source), *pairs)
