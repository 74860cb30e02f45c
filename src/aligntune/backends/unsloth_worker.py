"""`python -m aligntune.backends.unsloth_worker JOB.json`: a session under Unsloth, which is imported before all it changes."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from aligntune.backends.launch.job import Job, Unavailable
from aligntune.errors import BackendError, ModelError

logger = logging.getLogger(__name__)

CHANGED = ("trl", "transformers", "peft")
"""Packages that must not be imported before Unsloth."""

EXCEPTIONS = {
    "gradient_checkpointing": "its own checkpointing is in the model",
    "gradient_checkpointing_kwargs": "its own checkpointing is in the model",
    "activation_checkpointing": "its own checkpointing is in the model",
    "activation_checkpointing_kwargs": "its own checkpointing is in the model",
    "average_tokens_across_devices": "there is one process",
    "max_length": "our rows are cut already",
    "bf16": "its model is in that format already",
    "fp16": "its model is in that format already",
}
"""Settings that Unsloth may change without changing what is computed, and why."""


def main() -> int:
    """Import Unsloth, then train what the job says; the exit code."""
    job = Job(Path(sys.argv[1]).parent)
    try:
        import_unsloth()
    except Unavailable as error:
        job.write_error(0, error)
        return 2
    from aligntune.backends.launch import worker

    return worker.main(UnslothTraining())


def import_unsloth() -> None:
    """Raise `Unavailable` when Unsloth cannot be imported, for whatever reason, or finds no GPU."""
    early = [name for name in CHANGED if name in sys.modules]
    if early:
        raise Unavailable(f"unsloth must be imported before {', '.join(early)}")
    try:
        import unsloth
    except Exception as error:  # raised again: its import fails with NotImplementedError, RuntimeError and others
        raise Unavailable(f"importing unsloth failed with {type(error).__name__}: {error}") from error
    if getattr(unsloth, "DEVICE_TYPE", "cuda") == "cpu":
        raise Unavailable("unsloth found no GPU")


class UnslothTraining:
    """The backend inside the process that imported Unsloth."""

    name = "unsloth"

    def load_policy(self, session: Any, tokenizer: Any = None, **head: Any) -> Any:
        """The model by `FastLanguageModel`, with its LoRA adapter; weights in the run's compute format."""
        from unsloth import FastLanguageModel

        config, seed = session.config.model, session.config.train.seed
        lora, wanted = config.lora, config.quantization
        model, _ = FastLanguageModel.from_pretrained(
            model_name=config.name_or_path, max_seq_length=config.max_seq_length, dtype=session.precision.compute,
            load_in_4bit=bool(wanted.get("load_in_4bit")), load_in_8bit=bool(wanted.get("load_in_8bit")),
            full_finetuning=lora is None, fast_inference=False, trust_remote_code=getattr(config, "trust_remote_code", False),
            use_exact_model_name=True, random_state=seed, use_gradient_checkpointing="unsloth" if config.gradient_checkpointing else False,
        )  # fmt: skip
        if lora is not None:
            from aligntune.models.lora import lora_targets

            model = FastLanguageModel.get_peft_model(
                model, r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, bias=lora.bias, random_state=seed,
                max_seq_length=config.max_seq_length, target_modules=lora_targets(model, lora),
                use_gradient_checkpointing="unsloth" if config.gradient_checkpointing else False,
            )  # fmt: skip
        if not any(weight.requires_grad for weight in model.parameters()):
            raise ModelError(
                f"{config.name_or_path}: no parameter is trainable under Unsloth, so training would change nothing"
            )
        if tokenizer is not None:
            from aligntune.models.tokenizer import fit_embeddings

            fit_embeddings(model, tokenizer)
        return model

    def build_trainer(self, session: Any, callbacks: Sequence[Any]) -> Any:
        """The patched TRL trainer, its arguments compared with those that were asked for."""
        from aligntune.backends.trl import TRLBackend

        trainer = TRLBackend().trainer(session, callbacks)
        for sentence in changed_arguments(trainer.args):
            session.recorder.note(sentence)
        return trainer


def changed_arguments(args: Any) -> list[str]:
    """One sentence for each argument that is not what TRL itself would have made of our settings.

    Raises `BackendError` for an argument of ours that was changed and is not in `EXCEPTIONS`; arguments that we leave to
    TRL's defaults are reported.
    """
    asked = getattr(args, "asked", None)
    if asked is None:
        raise BackendError("unsloth replaced the trainer's arguments, so they cannot be compared with the settings")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        keep_state = {"accelerator_config": {"use_configured_state": True}}  # else it would reset the trainer's own
        plain = _plain_class(type(args))(**(asked | keep_state))
    sentences, wrong = [], []
    for field in fields(plain):
        expected, got = getattr(plain, field.name), getattr(args, field.name, None)
        if field.name.startswith("_") or field.name == "accelerator_config" or _same(expected, got):
            continue
        said = f"unsloth runs with {field.name}={got!r} in place of {expected!r}"
        if field.name in EXCEPTIONS:
            sentences.append(f"{said}: {EXCEPTIONS[field.name]}")
        elif field.name in asked:
            wrong.append(said)
        else:
            sentences.append(f"{said}, TRL's own default")
    if wrong:
        raise BackendError("; ".join(wrong) + ": choose settings that it keeps, or another backend")
    return sentences


def _plain_class(cls: type[Any]) -> type[Any]:
    """The class that TRL itself defines, below Unsloth's."""
    for base in cls.__mro__:
        if base.__module__.startswith(("trl.trainer.", "trl.experimental.")) and not base.__name__.startswith(
            "Unsloth"
        ):
            return base
    raise BackendError(f"{cls.__name__} is not one of TRL's argument classes")


def _same(expected: Any, got: Any) -> bool:
    return bool(expected == got) or (expected in (None, [], {}) and got in (None, [], {}))


if __name__ == "__main__":
    raise SystemExit(main())
