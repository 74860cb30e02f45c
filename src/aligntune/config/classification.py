"""Which settings mean nothing to a classifier? A run of a classification task refuses them by name."""

from __future__ import annotations

from collections.abc import Iterator

from aligntune.config.base import Section
from aligntune.config.run import SFTRunConfig
from aligntune.config.synonyms import Path

_ONE_LABEL = "a classifier's loss is the cross-entropy of its labels"
_ROWS = "rows of a classifier are padded, each by itself"
_ANSWERS = "a classifier writes no text"
_METRICS = f"{_ANSWERS}; it is measured by accuracy, F1 and the Matthews correlation"

REFUSED: dict[Path, str] = {
    ("train", "packing"): _ROWS,
    ("train", "packing_strategy"): _ROWS,
    ("train", "eval_packing"): _ROWS,
    ("train", "padding_free"): _ROWS,
    ("train", "completion_only_loss"): _ONE_LABEL,
    ("train", "assistant_only_loss"): _ONE_LABEL,
    ("train", "loss_type"): _ONE_LABEL,
    ("train", "loss_function"): _ONE_LABEL,
    ("train", "activation_offloading"): "is for language modelling",
    ("model", "compile"): "is for language modelling",
    ("model", "selective_checkpointing"): "is for language modelling",
    ("dataset", "chat_template"): "texts are classified as they are",
    ("dataset", "system_prompt"): "texts are classified as they are",
    ("dataset", "streaming"): "the classes are counted before training, which a stream does not allow",
    ("evaluation", "compute_perplexity"): _METRICS,
    ("evaluation", "compute_rouge"): _METRICS,
    ("evaluation", "compute_bleu"): _METRICS,
    ("evaluation", "compute_meteor"): _METRICS,
    ("evaluation", "compute_bertscore"): _METRICS,
    ("evaluation", "compute_semantic_similarity"): _METRICS,
    ("evaluation", "compute_codebleu"): _METRICS,
    ("evaluation", "bertscore_model"): _METRICS,
    ("evaluation", "semantic_similarity_model"): _METRICS,
    ("evaluation", "max_samples_for_quality_metrics"): "every evaluation row is classified",
    ("evaluation", "max_new_tokens"): _ANSWERS,
}
"""Setting -> why it cannot act. One that is explicitly off (False, none, the plain loss) asks for nothing and passes."""


def classification_contradictions(config: SFTRunConfig) -> Iterator[tuple[Path, str]]:
    """(path, message) of what a run cannot ask of a classifier, and of tasks that do not go together."""
    sources = config.sources
    tasks = {source.task_type for source in sources}
    if not any(task.is_classification for task in tasks):
        return
    if len(tasks) > 1:
        listed = ", ".join(sorted(task.value for task in tasks))
        yield ("datasets",), f"are of different tasks ({listed}); a classifier learns one"
    task = sources[0].task_type
    if config.eval_dataset is not None and config.eval_dataset.task_type is not task:
        yield (
            ("eval_dataset", "task_type"),
            f"is {config.eval_dataset.task_type.value}, but the run trains {task.value}",
        )
    for (name, setting), why in REFUSED.items():
        for where, section in _sections(config, str(name)):
            value = getattr(section, str(setting))
            if section.is_set(str(setting)) and value not in (False, None, "nll", "off"):
                yield (*where, setting), f"has no effect on {task.value}: {why}"


def _sections(config: SFTRunConfig, name: str) -> Iterator[tuple[Path, Section]]:
    """Where a section stands in the run; there may be several datasets."""
    if name != "dataset":
        yield (name,), getattr(config, name)
        return
    if config.dataset is not None:
        yield ("dataset",), config.dataset
    else:
        yield from ((("datasets", place), source) for place, source in enumerate(config.datasets))
    if config.eval_dataset is not None:
        yield ("eval_dataset",), config.eval_dataset
