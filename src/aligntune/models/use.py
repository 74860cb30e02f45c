"""How is used what was trained? A run's model is loaded for answers, or written as full weights."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from aligntune.config.words import plain_word
from aligntune.errors import ConfigError, ModelError
from aligntune.models.files import adapter_base, explain_missing, is_model_folder, model_folder
from aligntune.models.heads import saved_head
from aligntune.models.load import merge_adapter, with_adapter
from aligntune.models.lora import is_quantised, merge
from aligntune.models.precision import device
from aligntune.models.save import save_model, set_generation_tokens
from aligntune.models.tokenizer import load_tokenizer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load_for_answers(name: str, dtype: torch.dtype | str = "auto", *, merged: bool = True) -> tuple[Any, Any]:
    """(model in evaluation mode on this machine's device, tokenizer) of a folder, run or hub name; adapters are merged, or with
    `merged` off laid on top of weights that are not quantised."""
    name = model_folder(name)
    is_model_folder(name)
    if saved_head(name) is not None:
        raise ModelError(
            f"{name}: is a classifier or a reward model, which writes no text, so there is no chat and no export of it; "
            "aligntune eval measures it"
        )
    base = adapter_base(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(base or name, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(explain_missing(base or name, "weights", error)) from error
    if not merged and is_quantised(model):
        model = model.dequantize()
        model.hf_quantizer = None
    if base is not None:
        model = merge_adapter(model, name) if merged else with_adapter(model, name)
    tokenizer = load_tokenizer(name)
    set_generation_tokens(model, tokenizer)  # those of an adapter's base may be others
    return model.eval().to(device()), tokenizer


@dataclass
class Chat:
    """A conversation with a model; `messages` is what was said."""

    model: Any
    tokenizer: Any
    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    messages: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def load(cls, name: str, *, system: str | None = None, **settings: Any) -> Chat:
        model, tokenizer = load_for_answers(name)
        if tokenizer.chat_template is None:
            raise ModelError(f"{name}: its tokenizer has no chat template, so it cannot chat")
        return cls(model, tokenizer, messages=[{"role": "system", "content": system}] if system else [], **settings)

    @torch.no_grad()
    def say(self, text: str) -> str:
        """The model's answer to `text`, which joins the conversation with it."""
        self.messages.append({"role": "user", "content": text})
        inputs = self.tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        torch.manual_seed(self.seed + len(self.messages))
        sampling = (
            {"do_sample": True, "temperature": self.temperature} if self.temperature > 0 else {"do_sample": False}
        )
        out = self.model.generate(
            **inputs, max_new_tokens=self.max_new_tokens, pad_token_id=self.tokenizer.pad_token_id, **sampling
        )
        answer = self.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": answer})
        return answer


@torch.no_grad()
def export(name: str, output: Path, *, dtype: str = "bf16", overwrite: bool = False) -> float:
    """Write `name` with its adapter merged, in `dtype`; returns the largest difference of log-probabilities after reloading, from
    those of the adapter on its base.

    The difference is that of rounding to `dtype`. Raises `ModelError`, and writes nothing, when it is large: the merge went wrong.
    """
    if plain_word(dtype) not in DTYPES:
        raise ConfigError(f"dtype is {dtype}; it should be one of {', '.join(DTYPES)}")
    if output.exists() and not overwrite:
        raise ConfigError(f"{output} exists; choose another folder, or replace it with --overwrite")
    source = Path(model_folder(name)).expanduser().resolve()
    if output.resolve() in (source, *source.parents):
        raise ConfigError(f"{output} holds the model that is exported; choose another folder")
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written ({error.strerror or error}); choose another folder") from error
    try:
        difference = _write_and_compare(name, partial, DTYPES[plain_word(dtype)])
        if difference > 1.0:
            raise ModelError(
                f"{name}: the written weights give other log-probabilities (by {difference:.2g}); nothing was kept"
            )
        shutil.rmtree(output, ignore_errors=True)
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return difference


def _write_and_compare(name: str, folder: Path, dtype: torch.dtype) -> float:
    model, tokenizer = load_for_answers(name, torch.float32, merged=False)
    ids = torch.arange(1, min(33, model.get_input_embeddings().weight.shape[0]), device=model.device)[None]
    before = model(ids).logits.float().log_softmax(-1)
    whole = merge(model) if hasattr(model, "peft_config") else model
    save_model(whole.to(dtype), tokenizer, folder)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(ids.device)
    return float((again(ids).logits.log_softmax(-1) - before).abs().max())
