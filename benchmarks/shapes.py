"""Models of known shapes with random weights, rows with instruction-like lengths, and the record of a measurement."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path

import torch

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2048},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936},
}  # fmt: skip
PEAK_FLOPS = 989e12  # dense bfloat16 of an H100 SXM


def build_model(shape: str, device: str, attn_implementation: str = "sdpa"):
    """Qwen2.5 of that shape, weights random, bfloat16 on CUDA."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(**SHAPES[shape], tie_word_embeddings=True, max_position_embeddings=8192, rope_theta=1e6)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16 if device == "cuda" else torch.float32, attn_implementation=attn_implementation
        )


def text_lengths(count: int, longest: int = 2048, seed: int = 0) -> list[int]:
    """Log-normal, median about 190 tokens, mean about 300."""
    rng = random.Random(seed)
    return [int(min(longest, max(16, 1.6 * rng.lognormvariate(math.log(120), 0.8) + 10))) for _ in range(count)]


def packed_batches(count: int, tokens: int, vocab: int, seed: int = 0) -> list[list[list[int]]]:
    """Batches of rows of random tokens, each filled with whole rows up to `tokens`."""
    rng = random.Random(seed)
    lengths = iter(text_lengths(count * tokens // 16, seed=seed))
    batches, row = [], next(lengths)
    for _ in range(count):
        batch, used = [], 0
        while used + row <= tokens:
            batch.append([rng.randrange(10, min(vocab, 2000)) for _ in range(row)])
            used += row
            row = next(lengths)
        batches.append(batch)
    return batches


def versions() -> dict[str, str]:
    import transformers

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "card": card,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
    }


def report(out: str | None, **row) -> None:
    """Print a result, and append it to a JSON-lines file with the versions and the command."""
    print("RESULT", json.dumps(row), flush=True)
    if out:
        script = f"benchmarks/{Path(sys.argv[0]).name}"
        command = " ".join(["python", script, *sys.argv[1:]]).replace(f" --out {out}", "")
        with Path(out).open("a") as file:
            file.write(json.dumps({**row, **versions(), "command": command}) + "\n")


def peak_gib() -> float | None:
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else None
