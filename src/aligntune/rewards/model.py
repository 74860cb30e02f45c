"""What does a reward model say? A sequence-classification model scores prompt and completion, in batches, on its device.

With one output the score is that number (Bradley-Terry models, regression). With several it is the probability of the
label that is asked for, so that any classifier can serve as a reward.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aligntune.errors import ConfigError, ModelError

from .base import adversarial, bad, good, reward
from .samples import Text, completion_text, conversation, prompt_text

if TYPE_CHECKING:
    import torch


SCALE_FILE = "reward_scale.json"
"""Beside an adapter, which has no config of its own to hold it: [mean, std] of the labels that were standardised."""


class RewardModel:
    """A loaded model and its tokenizer as a reward function.

    `device`: "auto" is where the model lies; else it is moved there. `label`: index or name of the output that counts,
    for a model with several. `max_length`: longest input in tokens (default: what the model takes); of a longer one
    the beginning is cut.

    Raises:
        ModelError: the model has no classification head, or several outputs and no `label` among them.
    """

    __name__ = "reward_model"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        device: str = "auto",
        batch_size: int = 8,
        max_length: int | None = None,
        label: int | str | None = None,
    ) -> None:
        self.model = model.eval() if device == "auto" else model.eval().to(device)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.outputs = _outputs(model)
        self.label = _label_index(model.config, self.outputs, label)
        self.max_length = max_length or _longest(model.config, tokenizer)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if model.config.pad_token_id is None:  # the head reads the last token that is not padding
            model.config.pad_token_id = tokenizer.pad_token_id

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float]:
        """One score per completion. Inputs of like length share a batch; the scores do not depend on it."""
        import torch

        encoded = [self.encode(*pair) for pair in zip(prompts, completions, strict=True)]
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]["input_ids"]))
        scores = [0.0] * len(encoded)
        device = next(self.model.parameters()).device
        with torch.inference_mode():
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                rows = self.tokenizer.pad(
                    [encoded[i] for i in batch], padding=True, padding_side="right", return_tensors="pt"
                )
                logits = self.model(**rows.to(device)).logits.float()
                for i, value in zip(batch, self._scores(logits).tolist(), strict=True):
                    scores[i] = value
        return scores

    def encode(self, prompt: Text, completion: Text) -> dict[str, list[int]]:
        """The model's input: by its chat template where it has one, else as a pair (encoders) or as one text."""
        if self.tokenizer.chat_template is not None:
            text = self.tokenizer.apply_chat_template(conversation(prompt, completion), tokenize=False)
            return self._cut(
                self.tokenizer(text, add_special_tokens=False, verbose=False)
            )  # no warning of lengths: it is cut
        asked, said = prompt_text(prompt), completion_text(completion)
        if not asked:
            return self._cut(self.tokenizer(said, verbose=False))
        if self.tokenizer.sep_token is not None:
            return self._cut(self.tokenizer(asked, said, verbose=False))
        return self._cut(self.tokenizer(asked + said, verbose=False))

    def _cut(self, encoded: Any) -> dict[str, list[int]]:
        """Keep the end, and the token that opens every input."""
        surplus = len(encoded["input_ids"]) - self.max_length
        if surplus <= 0:
            return dict(encoded)
        opens = encoded["input_ids"][0] in (self.tokenizer.bos_token_id, self.tokenizer.cls_token_id)
        return {name: values[: int(opens)] + values[surplus + int(opens) :] for name, values in encoded.items()}

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        """[batch, outputs] logits -> [batch] scores."""
        if self.outputs == 1:
            mean, std = getattr(self.model.config, "reward_scale", None) or (
                0.0,
                1.0,
            )  # of labels that were standardised
            return logits[:, 0] * std + mean
        if getattr(self.model.config, "problem_type", None) == "multi_label_classification":
            return logits.sigmoid()[:, self.label]
        return logits.softmax(-1)[:, self.label]


def _outputs(model: Any) -> int:
    if not type(model).__name__.endswith("ForSequenceClassification") and not hasattr(model, "score"):
        raise ModelError(
            f"{type(model).__name__} has no classification head, so it gives no reward: use a sequence-classification "
            "model with one output, or train one with `aligntune reward train`"
        )
    return int(model.config.num_labels)


def _label_index(config: Any, outputs: int, label: int | str | None) -> int:
    if outputs == 1:
        return 0
    names = {str(name).lower(): int(index) for index, name in config.id2label.items()}
    index = names.get(str(label).lower(), label)
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < outputs:
        raise ModelError(
            f"the reward model has {outputs} outputs: say which one counts with label: {' or '.join(names)}"
        )
    return index


def _longest(config: Any, tokenizer: Any) -> int:
    from aligntune.models.positions import encoder_positions

    return int(min(encoder_positions(config) or 1 << 20, tokenizer.model_max_length))


def load(
    name_or_path: str,
    *,
    device: str = "auto",
    quantization: dict[str, Any] | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    **options: Any,
) -> RewardModel:
    """A reward model from a folder (whole, a LoRA adapter with its head, or of a run) or the hub; `options` as `RewardModel`.

    `device`: "auto" is the accelerator if there is one. `quantization`: fields of `BitsAndBytesConfig`.

    Raises:
        ModelError: it cannot be loaded, or it was saved without a head (which transformers would make up at random).
        ConfigError: a device that is not there, or a quantization that cannot be had.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from aligntune.models.files import adapter_base, explain_missing, is_model_folder, model_folder
    from aligntune.models.load import merge_adapter, quantization_config

    name_or_path = model_folder(name_or_path)
    is_model_folder(name_or_path)
    base = adapter_base(name_or_path)
    target = _device(device)
    kwargs: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if quantization:
        made = quantization_config(quantization, "reward model: quantization")
        kwargs |= {"quantization_config": made, "device_map": {"": target}}
    if base is not None:
        kwargs["num_labels"] = 1
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            base or name_or_path, output_loading_info=True, **kwargs
        )
    except (OSError, KeyError, ValueError) as error:  # what transformers raises for missing and unknown models
        raise ModelError(explain_missing(name_or_path, "reward model", error)) from error
    if base is not None:
        model = merge_adapter(model, name_or_path)
        read_scale(model, name_or_path)
    elif info["missing_keys"]:
        raise ModelError(
            f"{name_or_path}: its weights have no {', '.join(sorted(info['missing_keys']))}: it is a model without a "
            "reward head. Use a reward model, or train this one with `aligntune reward train`"
        )
    return RewardModel(model, tokenizer, device="auto" if quantization else target, **options)


def adapter_files(model: Any) -> dict[str, Any]:
    """What lies beside a reward model's adapter, by file name."""
    from aligntune.config.enums import TaskType
    from aligntune.models.heads import SavedHead, head_files

    scale = getattr(model.config, "reward_scale", None)
    return head_files(SavedHead(TaskType.TEXT_CLASSIFICATION, ("LABEL_0",))) | ({SCALE_FILE: scale} if scale else {})


def read_scale(model: Any, adapter: str) -> None:
    """Give a model that `adapter` was merged into the scale that lies beside it."""
    file = Path(adapter) / SCALE_FILE
    model.config.reward_scale = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _device(name: str) -> str:
    """The device to load on; `ConfigError` where there is none of that name."""
    import torch

    from aligntune.models.precision import device as default_device

    target = str(default_device()) if name == "auto" else name
    try:
        kind = torch.device(target).type
    except RuntimeError as error:
        raise ConfigError(f"reward model: device={name!r}: use auto, cpu or cuda ({error})") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"reward model: device={name!r}, and this machine has no CUDA device; use auto or cpu")
    return target


@cache
def _loaded(name_or_path: str, settings: str) -> RewardModel:
    return load(name_or_path, **json.loads(settings))


MODEL = {"model": "<reward model>", "device": "cpu"}  # tests put a real folder in its place


@reward(
    "reward_model",
    examples=[
        good("the cat sat", (-1e3, 1e3), prompt="it was", params=MODEL),
        bad("blue", (-1e3, 1e3), prompt="it was", params=MODEL),
        adversarial(
            "", (-1e3, 1e3), prompt="it was", params=MODEL, note="no text; what it is worth is the model's word"
        ),
    ],
)
def reward_model(
    prompts: list[Text],
    completions: list[Text],
    *,
    model: str | None = None,
    label: int | str | None = None,
    device: str = "auto",
    batch_size: int = 8,
    max_length: int | None = None,
    quantization: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> list[float]:
    """The output of a sequence-classification model (a folder or hub name); with several outputs that of `label`.

    Its numbers have no fixed range: `normalize` or `clip` them before they meet other rewards.
    """
    if model is None:
        raise ConfigError("reward_model needs params: {model: ...}, the folder or hub name of a reward model")
    settings = {
        "label": label, "device": device, "batch_size": batch_size, "max_length": max_length,
        "quantization": quantization, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    return _loaded(model, json.dumps(settings, sort_keys=True))(prompts, completions)
