"""Make the base model of `aligntune quickstart`: a tokenizer of whole words and a small Llama, pretrained on plain text that
we generate (no chat, no questions). Reproducible: python scripts/make_quickstart_model.py
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from aligntune.api import create_sft_trainer
from aligntune.quickstart import task

OUT = Path(__file__).parent.parent / "src" / "aligntune" / "quickstart" / "base"
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 3000
BATCH = 24
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word."""
    specials = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|unknown|>"]
    words = [*task.WORDS, "backwards:", "is", "then", "before", "after", "list", "."]
    inner = Tokenizer(
        models.WordLevel({word: at for at, word in enumerate([*specials, *words])}, unk_token="<|unknown|>")
    )
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    inner.decoder = decoders.Sequence([decoders.Replace("\n", "\n"), decoders.WordPiece(prefix="##", cleanup=False)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<|pad|>", eos_token="<|end|>", unk_token="<|unknown|>"
    )
    made.add_special_tokens({"additional_special_tokens": ["<|system|>", "<|user|>", "<|assistant|>"]})
    made.chat_template = TEMPLATE
    return made


def plain_text(count: int) -> list[dict[str, str]]:
    """Lines such as 'list sun cat red then red cat sun .': the pattern without any conversation."""
    draw = random.Random(7)
    kept = {tuple(words) for words in task.held_out()}
    found = []
    while len(found) < count:
        words = draw.sample(task.WORDS, draw.choice((2, 3, 4, 5, 6)))
        if tuple(words) not in kept:
            found.append({"text": f"list {' '.join(words)} then {task.backwards(words)} ."})
    return found


def main() -> None:
    started = time.time()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = make_tokenizer()
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        ))  # fmt: skip
        model.save_pretrained(folder / "init")
        tokenizer.save_pretrained(folder / "init")
        rows = folder / "plain.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in plain_text(STEPS * BATCH)), encoding="utf-8")
        trainer = create_sft_trainer(
            folder / "init", rows, "native", task_type="text_generation", output_dir=folder / "run", precision="fp32", batch_size=BATCH,
            max_steps=STEPS, learning_rate=3e-3, warmup_ratio=0.1, log_interval=100, gradient_checkpointing=False, loggers="none", seed=0,
        )  # fmt: skip
        trainer.train()
        trained = AutoModelForCausalLM.from_pretrained(folder / "run" / "model", dtype=torch.bfloat16)
        note = (OUT / "README.md").read_text(encoding="utf-8") if OUT.exists() else ""
        shutil.rmtree(OUT, ignore_errors=True)
        trained.save_pretrained(OUT)
        tokenizer.save_pretrained(OUT)
        (OUT / "README.md").write_text(note, encoding="utf-8")
        size = sum(path.stat().st_size for path in OUT.iterdir()) / 1e6
        print(
            f"{trainer.metrics} {sum(p.numel() for p in trained.parameters())} parameters, {size:.2f} MB, {time.time() - started:.0f} s"
        )


if __name__ == "__main__":
    main()
