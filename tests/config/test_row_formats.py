"""The names of row formats stand in the config, which reads no rows, and are those of the code that does."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest

from aligntune.config.contradictions import QUANTIZATION_FIELDS
from aligntune.config.resolve import resolve
from aligntune.errors import ConfigError


def test_the_names_are_those_of_the_formats() -> None:
    code = """
from copy import deepcopy
from aligntune.config.row_formats import RL_FORMATS, TASK_FORMATS
written = deepcopy(RL_FORMATS)
from aligntune.data.formats import formats_of
import aligntune.data
assert RL_FORMATS == written, RL_FORMATS
for kind, names in written.items():
    assert set(names) == set(formats_of(kind)), kind
registered = {name for kind in ("sft", "classification", "tagging") for name in formats_of(kind)}
assert registered == {name for names in TASK_FORMATS.values() for name in names}

@aligntune.data.row_format("mine", kind="prompt", needs=("q",))
def mine(q): ...
assert RL_FORMATS["prompt"][-1] == "mine"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("algorithm", "settings", "message"), [
    ("sft", {"dataset": {"name": "d", "format_type": "alpacca"}}, "dataset.format_type: should be one of text, alpaca"),
    ("sft", {"dataset": {"name": "d", "format_type": "text", "task_type": "chat_completion"}}, "should be one of messages, sharegpt"),
    ("dpo", {"dataset": {"name": "d", "format_type": "prompt"}}, "dataset.format_type: should be one of preference, alpaca_pairs"),
    ("grpo", {"eval_dataset": {"name": "e", "format_type": "promt"}}, "eval_dataset.format_type: should be one of prompt, "),
    ("ppo", {"datasets": [{"name": "a"}, {"name": "b", "format_type": "x"}]}, "datasets.1.format_type: should be one of prompt, "),
    ("sft", {"peft_enabled": True, "quantization": {"load_in_4bitt": True}},
     "model.quantization: load_in_4bitt is not a field of BitsAndBytesConfig: did you mean load_in_4bit?"),
    ("ppo", {"reward_path": "r", "reward_model_quantization": {"bits": 4}}, "model.reward_model_quantization: bits is not a field"),
])  # fmt: skip
def test_an_unknown_name_is_refused(algorithm: str, settings: dict[str, Any], message: str) -> None:
    base: dict[str, Any] = {"model": "m"} | ({} if "datasets" in settings else {"dataset": "d"})
    base |= {} if algorithm in ("sft", "dpo") or "reward_path" in settings else {"rewards": ["length"]}
    with pytest.raises(ConfigError, match=re.escape(message)):
        resolve(base, arguments=settings, algorithm=algorithm)


def test_an_evaluation_reads_pairs_by_the_settings_of_sft() -> None:
    assert resolve({"model": "m"}, arguments={"dataset": {"name": "d", "format_type": "hh"}}, algorithm="sft").config


def test_a_format_in_other_letters_is_taken() -> None:
    settings = {"dataset": {"name": "d", "format_type": "Prompt-Completion"}}
    assert resolve({"model": "m"}, arguments=settings, algorithm="sft").config


def test_the_fields_of_quantisation_are_those_of_transformers() -> None:
    from transformers import BitsAndBytesConfig

    known = {name for name in BitsAndBytesConfig().to_dict() if not name.startswith("_")} - {"quant_method"}
    assert set(QUANTIZATION_FIELDS) == known
