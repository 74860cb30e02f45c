"""What does a saved classifier decide? Its task and classes, from the files of a model or of an adapter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

from aligntune.config.enums import TaskType
from aligntune.errors import ModelError
from aligntune.models.files import adapter_base, explain_missing, is_model_folder
from aligntune.models.positions import encoder_positions

LABELS_FILE = "labels.json"
"""Beside an adapter, which has no config of its own to hold them: `{"task_type": ..., "names": [...]}`."""

_ENDINGS = {
    TaskType.TEXT_CLASSIFICATION: "ForSequenceClassification",
    TaskType.TOKEN_CLASSIFICATION: "ForTokenClassification",
}


@dataclass(frozen=True)
class SavedHead:
    """`names[i]` is class i. A head with one class gives a score: it is a reward model's."""

    task: TaskType
    names: tuple[str, ...]


def head_class(task: TaskType) -> Any:
    """The auto class that puts the task's head on any causal or encoder model."""
    tags = task is TaskType.TOKEN_CLASSIFICATION
    return AutoModelForTokenClassification if tags else AutoModelForSequenceClassification


def head_arguments(names: Sequence[str]) -> dict[str, Any]:
    """What `from_pretrained` and the saved config need to know of the classes."""
    return {"num_labels": len(names), "id2label": dict(enumerate(names)), "label2id": {name: at for at, name in enumerate(names)}}  # fmt: skip


def saved_head(name: str) -> SavedHead | None:
    """The head of the model or adapter `name` (folder or hub name), or None when it is no classifier."""
    is_model_folder(name)
    if adapter_base(name) is not None:
        file = Path(name) / LABELS_FILE
        if not file.exists():
            return _numbered_head(Path(name))
        content = json.loads(file.read_text(encoding="utf-8"))
        return SavedHead(TaskType(content["task_type"]), tuple(content["names"]))
    config = model_config(name)
    architecture = (config.architectures or [""])[0]
    task = next((task for task, ending in _ENDINGS.items() if architecture.endswith(ending)), None)
    return (
        None if task is None else SavedHead(task, tuple(config.id2label[place] for place in range(config.num_labels)))
    )


def _numbered_head(adapter: Path) -> SavedHead | None:
    """The head in an adapter that does not say its classes, as other programs write it: they have numbers, as in transformers."""
    kind = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("task_type")
    task = {"SEQ_CLS": TaskType.TEXT_CLASSIFICATION, "TOKEN_CLS": TaskType.TOKEN_CLASSIFICATION}.get(kind)
    file = adapter / "adapter_model.safetensors"
    if task is None or not file.exists():
        return None
    with safe_open(file, framework="pt") as tensors:
        whole = [tensors.get_slice(key).get_shape() for key in tensors.keys() if ".lora_" not in key]  # noqa: SIM118
    matrices = [shape[0] for shape in whole if len(shape) == 2]
    return SavedHead(task, tuple(f"LABEL_{place}" for place in range(min(matrices)))) if matrices else None


def head_files(head: SavedHead) -> dict[str, Any]:
    """What lies beside an adapter, by file name, and says its classes."""
    return {LABELS_FILE: {"task_type": head.task.value, "names": list(head.names)}}


def longest_input(name: str, tokenizer: Any, wanted: int) -> int:
    """Tokens that the model `name` can read: `wanted`, or what its positions and its tokenizer allow."""
    config = model_config(adapter_base(name) or name).get_text_config()
    return int(min(wanted, encoder_positions(config) or wanted, tokenizer.model_max_length))


def model_config(name: str) -> Any:
    """The transformers config of a model. Raises `ModelError` when it cannot be had."""
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(explain_missing(name, "config", error)) from error


def settle(model: Any, tokenizer: Any) -> None:
    """Make the head's model ready: padding is known to causal heads, which read the last token that is none."""
    for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
        config.pad_token_id = tokenizer.pad_token_id
        config.use_cache = False
