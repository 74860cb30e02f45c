"""Do the fast ways to train give the loss curve of the plain one? python benchmarks/loss_curves.py OUT [--steps 300] [--rate 2e-3] [--stored float32]

A byte-level language model of two layers learns the text of this repository's pages, packed, in the same order for each arm:
    float32      no autocast
    masters      float32 weights under bfloat16 autocast (the default)
    split        bfloat16 weights with exact float32 masters (adamw_split)
    split16      the same with stochastically rounded bfloat16 moments (adamw_split_bf16)
    compiled     masters with compiled layers that recompute the MLP (a GPU alone)

Written to OUT: loss_curves.json, .svg and .md (loss_curves_gpu on a GPU): the curves, and each arm's largest and mean distance from `masters`. On a CPU
bfloat16 is emulated, with the same rounding. `--stored` is the format of the checkpoint: split weights are rounded to bfloat16 as they are loaded.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from shapes import versions

from backends import byte_tokenizer

ARMS: dict[str, dict[str, Any]] = {
    "masters": {},
    "float32": {"model": {"precision": "fp32"}},
    "split": {"train": {"optimizer": "adamw_split"}},
    "split16": {"train": {"optimizer": "adamw_split_bf16"}},
    "compiled": {"model": {"compile": True, "selective_checkpointing": "mlp"}},
}


def write_parts(folder: Path, hidden: int, stored: str) -> None:
    """A model with random weights, and the paragraphs of docs/*.md."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    byte_tokenizer().save_pretrained(folder / "model")
    shape = {"vocab_size": 264, "hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": 2, "num_attention_heads": hidden // 32}  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**shape, num_key_value_heads=2, tie_word_embeddings=True))
    model.to(getattr(torch, stored)).save_pretrained(folder / "model")
    pages = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
    texts = [text for page in pages for text in page.read_text().split("\n\n") if len(text) > 40]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def losses(folder: Path, arm: str, steps: int, length: int, rate: float) -> list[float]:
    from aligntune.api import create_trainer

    run: dict[str, Any] = {
        "algorithm": "sft", "backend": "native", "fallback": False,
        "dataset": {"name": str(folder / "texts.jsonl"), "task_type": "text_generation"},
        "model": {"name_or_path": str(folder / "model"), "precision": "bf16", "max_seq_length": length, "gradient_checkpointing": False, "compile": False},
        "train": {"max_steps": steps, "per_device_batch_size": 8, "learning_rate": rate, "packing": True},
        "logging": {"output_dir": str(folder / arm), "loggers": "none", "log_interval": 1, "save_strategy": "no"},
        "evaluation": {"max_new_tokens": 2},
    }  # fmt: skip
    for section, values in ARMS[arm].items():
        run[section] = run[section] | values
    session = create_trainer(run)
    session.train(overwrite=True)
    rows = [json.loads(line) for line in session.directory.metrics.path.read_text().splitlines()]
    return [row["loss"] for row in rows if row["split"] == "train"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--stored", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        from aligntune.models import precision

        precision.bf16_is_fast = lambda _: True  # or bf16 falls to fp32 on a CPU
    arms = [arm for arm in ARMS if arm != "compiled" or torch.cuda.is_available()]
    with tempfile.TemporaryDirectory() as name:
        write_parts(Path(name), args.hidden, args.stored)
        curves = {arm: losses(Path(name), arm, args.steps, args.length, args.rate) for arm in arms}
    write(args.out, curves, vars(args) | {"out": ""})


def write(out: Path, curves: dict[str, list[float]], settings: dict[str, Any]) -> None:
    from aligntune.reporting.palette import standalone
    from aligntune.reporting.svg import Line, line_chart

    out.mkdir(parents=True, exist_ok=True)
    file = "loss_curves_gpu" if torch.cuda.is_available() else "loss_curves"
    plain = curves["masters"]
    rows = {}
    for arm, values in curves.items():
        distance = [abs(a - b) for a, b in zip(values, plain)]
        rows[arm] = {"last": sum(values[-20:]) / 20, "largest": max(distance), "mean": sum(distance) / len(distance)}
    (out / f"{file}.json").write_text(json.dumps({"curves": {arm: [round(x, 5) for x in values] for arm, values in curves.items()}, "settings": settings, **versions()}) + "\n")  # fmt: skip
    lines = [Line(arm, list(range(1, len(values) + 1)), values) for arm, values in curves.items()]
    (out / f"{file}.svg").write_text(standalone(line_chart(lines, title="Loss curves of fast and plain training")))
    table = "\n".join(
        f"| {arm} | {row['last']:.4f} | {row['largest']:.4f} | {row['mean']:.4f} |" for arm, row in rows.items()
    )
    found = versions()
    text = (
        "# Fast and plain loss curves\n\n`python benchmarks/loss_curves.py benchmarks/results`: a byte model of two layers on "
        f"this repository's pages, {len(plain)} steps ({found['card']}, torch {found['torch']}). Distances are from `masters`, in nats.\n\n"
        f"![curves]({file}.svg)\n\n| arm | loss, mean of the last 20 steps | largest distance | mean distance |\n|---|---:|---:|---:|\n"
    )
    (out / f"{file}.md").write_text(f"{text}{table}\n")
    print(table)


if __name__ == "__main__":
    main()
