"""How fast are rows tokenised? Rows and tokens per second with one and two processes, and the cached second start.

    python benchmarks/tokenize_rows.py [--rows 100000] [--data FILE] [--tokenizer FOLDER]

Without `--data`, rows are made: instructions and answers of random words, about 150 tokens each. Without `--tokenizer`, a byte-level
BPE of 8000 tokens is trained on them. Seconds are wall-clock; CPU seconds (of all processes) tell what a busy machine hides.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from aligntune.config.sft import DatasetConfig
from aligntune.data import load_rows, pack, tokenize_sft, use_template


def write_rows(path: Path, count: int) -> None:
    """`count` alpaca rows of words drawn from a Zipf law over 20000 made words."""
    rng = np.random.default_rng(0)
    syllables = [a + b for a in "bcdfghklmnprstvw" for b in ("a", "e", "i", "o", "u", "an", "er", "is", "on")]
    words = np.array(["".join(rng.choice(syllables, rng.integers(1, 4))) for _ in range(20_000)])
    with path.open("w", encoding="utf-8") as handle:
        for _ in range(count):
            sizes = rng.integers(8, 30), rng.integers(30, 140)
            instruction, output = (" ".join(words[np.minimum(rng.zipf(1.3, size), 20_000) - 1]) + "." for size in sizes)
            handle.write(json.dumps({"instruction": instruction, "input": "", "output": output}) + "\n")


def train_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with path.open(encoding="utf-8") as handle:
        lines = [next(handle) for _ in range(2000)]
    tokenizer.train_from_iterator([json.loads(line)["output"] for line in lines], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def cpu_seconds() -> float:
    """User and system time of this process and its finished children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(entry.ru_utime + entry.ru_stime for entry in used)


def run(config: DatasetConfig, tokenizer: PreTrainedTokenizerBase, label: str) -> None:
    start = time.perf_counter()
    rows = load_rows(config, seed=0)
    loaded, cpu = time.perf_counter(), cpu_seconds()
    tokens = tokenize_sft(rows, tokenizer, config, max_length=2048)
    end, cpu = time.perf_counter(), cpu_seconds() - cpu
    total = int(np.asarray(tokens.with_format("numpy")["length"][:]).sum())
    print(
        f"{label:28s} read {loaded - start:6.2f} s   tokenise {end - loaded:6.2f} s   {len(tokens) / (end - loaded):9.0f} rows/s"
        f"   {total / (end - loaded) / 1e6:6.2f} M tokens/s   {cpu:6.2f} CPU s = {len(tokens) / cpu:7.0f} rows/CPU s"
    )
    start = time.perf_counter()
    packed = pack(tokens, 2048)
    share = total / (len(packed) * 2048)
    print(f"{'':28s} bfd packing {time.perf_counter() - start:6.2f} s   {len(packed)} rows, {100 * share:.2f} % full")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--data")
    parser.add_argument("--tokenizer")
    options = parser.parse_args()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "datasets"
        path = Path(options.data or Path(folder) / "rows.jsonl")
        if not options.data:
            write_rows(path, options.rows)
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer) if options.tokenizer else train_tokenizer(path)
        use_template(tokenizer, None if options.tokenizer else "chatml")
        for processes in (1, 2):
            os.environ["ALIGNTUNE_CACHE"] = str(Path(folder) / f"tokens{processes}")
            config = DatasetConfig(name=str(path), dataset_num_proc=processes, auto_detect_fields=True)
            run(config, tokenizer, f"{processes} process{'es' if processes > 1 else ''}")
        run(config, tokenizer, "second start, cached")


if __name__ == "__main__":
    main()
