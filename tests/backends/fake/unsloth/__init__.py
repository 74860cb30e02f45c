"""Stands in for Unsloth on a machine without a GPU: changes TRL in plain sight, as the real one does.

UNSLOTH_FAKE in the environment: "fails" (its import raises), "dies" (its process ends).
"""

import os
import sys
from dataclasses import dataclass

BEHAVIOUR = os.environ.get("UNSLOTH_FAKE", "")
FIRST = "transformers" not in sys.modules and "trl" not in sys.modules
if BEHAVIOUR == "fails":
    raise NotImplementedError("Unsloth cannot find any torch accelerator? You need a GPU.")
if BEHAVIOUR == "dies":
    os._exit(7)

import trl

DEVICE_TYPE = "cuda"


@dataclass
class UnslothSFTConfig(trl.SFTConfig):
    adam_beta1: float = 0.85  # a default that it changes and that we leave to TRL
    unsloth_num_chunks: int = -1


class UnslothSFTTrainer(trl.SFTTrainer):
    """Its own class, as the real one's."""


trl.SFTConfig, trl.SFTTrainer = UnslothSFTConfig, UnslothSFTTrainer


class FastLanguageModel:
    @staticmethod
    def from_pretrained(model_name, max_seq_length, dtype, full_finetuning, load_in_4bit, **rest):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        assert FIRST, "transformers or trl were imported before unsloth"
        model = AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype)
        model.requires_grad_(full_finetuning)
        return model, AutoTokenizer.from_pretrained(model_name)

    @staticmethod
    def get_peft_model(model, r, lora_alpha, target_modules, lora_dropout=0, bias="none", **rest):
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=r, lora_alpha=lora_alpha, target_modules=target_modules, lora_dropout=lora_dropout, bias=bias
        )
        return get_peft_model(model, config)
