"""Does it learn? Five online algorithms on three generated tasks, three seeds each, on one CPU core.

A model of about 77 thousand parameters is taught each task by supervised fine-tuning until it gets a part of the answers
right; then each algorithm trains that same model by reward alone (1 for the exact answer). Measured is the share of held-out
prompts that the greedy answer gets right, before and after.

    OMP_NUM_THREADS=1 python benchmarks/learning_rl.py [--steps 120] [--seeds 3] [--tasks reverse,sort,add] [--out benchmarks/results]

Writes `learning_rl.json` (every run, with the accuracy over steps) and `learning_rl.md` (the table). 45 runs of about 12 seconds: ten
minutes on an idle core.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

ALGORITHMS: dict[str, dict[str, Any]] = {
    "ppo": {"missing_eos_penalty": 0.0, "lam": 1.0},
    "grpo": {},
    "dapo": {},
    "dr_grpo": {},
    "gspo": {"gspo_gamma": 3e-4, "gspo_delta": 4e-4},
}
LETTERS = "abcdefgh"
HELD_OUT = 128
COMPLETIONS = 128
"""Of a rollout, which serves two updates."""


def reverse(draw: random.Random) -> tuple[str, str]:
    """Five letters backwards."""
    text = "".join(draw.choices(LETTERS, k=5))
    return f"{text}>", text[::-1]


def sort(draw: random.Random) -> tuple[str, str]:
    """Five letters in order."""
    text = "".join(draw.sample(LETTERS, k=5))
    return f"{text}>", "".join(sorted(text))


def add(draw: random.Random) -> tuple[str, str]:
    """The sum of two numbers of two digits."""
    one, other = draw.randint(10, 99), draw.randint(10, 99)
    return f"{one}+{other}>", str(one + other)


TASKS = {"reverse": (reverse, 90), "sort": (sort, 16), "add": (add, 500)}
"""What makes a prompt and its answer, and the steps of supervised fine-tuning that teach a part of the task."""


def exact(completion: str, answer: str) -> float:
    return float(completion == answer)


def write_model(folder: Path) -> Path:
    """A random Llama over characters."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    symbols = ["<pad>", "<eos>", ">", "+", *"0123456789", *LETTERS]
    inner = Tokenizer(models.WordLevel({symbol: at for at, symbol in enumerate(symbols)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(symbols), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_rows(path: Path, make: Any, count: int, seed: int, without: set[str] = frozenset()) -> set[str]:
    """`count` different prompts that are not in `without`."""
    draw, rows = random.Random(seed), {}
    while len(rows) < count:
        prompt, answer = make(draw)
        if prompt not in without:
            rows[prompt] = answer
    path.write_text("".join(json.dumps({"prompt": p, "completion": a, "answer": a}) + "\n" for p, a in rows.items()))
    return set(rows)


def common(folder: Path) -> dict[str, Any]:
    return {
        "precision": "fp32", "use_peft": False, "loggers": "none", "save_strategy": "no", "lr_scheduler": "constant",
        "eval_dataset": {"name": str(folder / "held.jsonl"), "task_type": "text"},
    }  # fmt: skip


def taught(folder: Path, model: Path, steps: int) -> Path:
    """The model after a little supervised fine-tuning."""
    from aligntune.core.backend_factory import create_sft_trainer

    settings = {"batch_size": 64, "max_steps": steps, "learning_rate": 3e-3, "backend": "native", "eval_strategy": "no",
                "compute_rouge": False, "compute_bleu": False, "logging_steps": 1000}  # fmt: skip
    given = {name: value for name, value in common(folder).items() if name not in ("use_peft", "eval_dataset")}
    session = create_sft_trainer(
        str(model), str(folder / "train.jsonl"), output_dir=str(folder / "sft"), **given, **settings
    )
    session.train()
    return folder / "sft" / "model"


def run(folder: Path, start: Path, algorithm: str, seed: int, steps: int) -> dict[str, Any]:
    """Train and measure; accuracy by step."""
    from aligntune.core.backend_factory import create_rl_trainer

    group = {} if algorithm == "ppo" else {"num_generations": 8}
    settings = group | {
        "batch_size": COMPLETIONS, "num_ppo_epochs": 2, "max_steps": 2 * steps, "learning_rate": 3e-4, "kl_coef": 0.0,
        "max_completion_length": 6, "temperature": 1.0, "top_p": 1.0, "seed": seed, "data_seed": seed, "backend": "native",
        "eval_strategy": "steps", "eval_interval": 2 * max(1, steps // 5), "logging_steps": 1000,
    }  # fmt: skip
    dataset = {"name": str(folder / "train.jsonl"), "task_type": "text", "format_type": "prompt"}
    held = {"eval_dataset": {"name": str(folder / "held.jsonl"), "task_type": "text", "format_type": "prompt"}}
    out = folder / f"{algorithm}-{seed}"
    started = time.perf_counter()
    session = create_rl_trainer(
        str(start), algorithm=algorithm, reward_functions=[exact], output_dir=str(out), dataset=dataset,
        **(common(folder) | held | settings | ALGORITHMS[algorithm]),
    )  # fmt: skip
    session.train()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    curve = {row["step"]: row["pass@1"] for row in rows if row["split"] == "eval"}
    seconds = round(time.perf_counter() - started, 1)
    return {
        "algorithm": algorithm,
        "seed": seed,
        "start": curve[0],
        "end": curve[max(curve)],
        "curve": curve,
        "seconds": seconds,
    }


def table(results: list[dict[str, Any]], steps: int, seconds: float) -> str:
    """Start and end accuracy (mean and range over seeds) of every algorithm on every task."""
    tasks = list(dict.fromkeys(result["task"] for result in results))
    lines = [
        f"Greedy accuracy on {HELD_OUT} held-out prompts, mean over seeds (least to most). {steps} rollouts of {COMPLETIONS} completions, two updates each; "
        f"all runs together: {seconds:.0f} s on one CPU core.",
        "",
        f"| algorithm | {' | '.join(f'{task}: start | end' for task in tasks)} |",
        f"|---|{'---|---|' * len(tasks)}",
    ]
    for algorithm in ALGORITHMS:
        cells = []
        for task in tasks:
            ends = [result["end"] for result in results if (result["task"], result["algorithm"]) == (task, algorithm)]
            start = next(
                result["start"] for result in results if (result["task"], result["algorithm"]) == (task, algorithm)
            )
            cells += [f"{start:.2f}", f"{statistics.mean(ends):.2f} ({min(ends):.2f}–{max(ends):.2f})"]
        lines.append(f"| {algorithm} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def prepared(folder: Path, model: Path, task: str) -> Path:
    """Write a task's rows to `folder`, and teach the model a part of it; returns where training by reward starts."""
    make, teaching = TASKS[task]
    folder.mkdir()
    held = write_rows(folder / "held.jsonl", make, HELD_OUT, seed=1)
    write_rows(folder / "train.jsonl", make, 2000, seed=2, without=held)
    with contextlib.redirect_stdout(io.StringIO()):
        return taught(folder, model, teaching)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as root:
        model = write_model(Path(root) / "model")
        for task in options.tasks.split(","):
            folder = Path(root) / task
            start = prepared(folder, model, task)
            for algorithm in ALGORITHMS:
                for seed in range(options.seeds):
                    with contextlib.redirect_stdout(io.StringIO()):
                        result = run(folder, start, algorithm, seed, options.steps)
                    results.append({"task": task} | result)
                    print(
                        f"{task:5} {algorithm:8} seed {seed}: {result['start']:.2f} -> {result['end']:.2f} in {result['seconds']} s",
                        flush=True,
                    )
    seconds = time.perf_counter() - started
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "learning_rl.json").write_text(
        json.dumps({"steps": options.steps, "seconds": seconds, "runs": results}, indent=1) + "\n"
    )
    text = table(results, options.steps, seconds)
    (options.out / "learning_rl.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
