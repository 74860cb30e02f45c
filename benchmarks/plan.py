"""Predicted against measured peak memory, for every measurement that the memory model covers: python benchmarks/plan.py

Reads the results beside it and writes a table, `results/plan.md`. The batches are those that the benchmarks
trained on, the largest of each; nothing is fitted to the measurements. Needs no GPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_step import BATCH, pairs
from sft_run import TARGETS
from shapes import SHAPES, packed_batches

from aligntune.config.base import LoraSettings
from aligntune.planning.memory import GIB, Batch, Rollout, Training, head_backward, head_forward, moments
from aligntune.planning.shapes import Shape, shape_of

RESULTS = Path(__file__).parent / "results"
FUSED = "adamw_torch_fused"
WARMUP = 4
"""Steps of `sft_step.py` before those that it counts."""
SPLIT = {"split": "adamw_split", "splitbf16": "adamw_split_bf16"}
BATCH_ROWS, LENGTH = 8, 2048
"""Packed rows of a step of `sft_run.py`, and their tokens."""
LORA = LoraSettings(16, 32, 0.0, list(TARGETS), False)
RUNS: dict[str, dict[str, Any]] = {
    "native": {"compiled": "all"},
    "mlp": {"compiled": "mlp"},
    "split16": {"trained": 2, "optimizer": "adamw_split_bf16", "compiled": "mlp"},
    "lora": {"compiled": "all", "lora": LORA},
    "lora-half": {"compiled": "half", "lora": LORA},
    "lora-mlp": {"compiled": "mlp", "lora": LORA},
    "plain": {},
    "gc": {"checkpointing": True},
    "budget": {"compiled": "all"},
}
"""Arms of `sft_run.py` on a GPU."""
GRPO_RUNS: dict[str, dict[str, Any]] = {
    "native": {"optimizer": FUSED},
    "native-split": {"trained": 2, "optimizer": "adamw_split"},
    "native-small": {"trained": 2, "optimizer": "adamw_split_bf16", "compiled": "mlp"},
    "native-budget": {"trained": 2, "optimizer": "adamw_split"},
    "native-compile": {"trained": 2, "optimizer": "adamw_split", "compiled": "all"},
}
"""Arms of `grpo_run.py` on a GPU."""
PASS = 8192
"""Most tokens of a pass of the arms that say `budget`."""
SEVERAL = ("sft-ddp", "sft-equal", "sft-fsdp2")
"""Tasks of `several.py`, but for one: `CUT` was measured when the compiler cut layers under DDP, which it does no more."""
CUT = ("sft-ddp", 2, "0.5b")
ENGINE = "graph-compiled"
"""The arm of `rollouts.py` that a run takes; others were measured when gate and up were two products."""
LENGTHS = 128
"""Prompt tokens of the rollout benchmark."""
GRPO_PROMPT = 64
"""Prompt tokens of `grpo_run.py`."""
TRL_SFT = [
    ("padded", 34.2, Batch(8 * 2048, 8 * 2048, 2048, masked=True), False),
    ("padded, gradient checkpointing", 8.9, Batch(8 * 2048, 8 * 2048, 2048, masked=True), True),
    ("packed into one row under sdpa", 44.8, Batch(16_384, 16_384, 16_384, masked=True), False),
]
"""TRL 1.15's SFTTrainer by itself, 8 rows of at most 2,048 tokens, float32 weights under bf16 autocast, fused AdamW, H100, torch
2.11, transformers 5.17: GiB measured, the largest batch (taken to hold a row at the cap), checkpointing."""


def rows() -> Iterator[tuple[str, float, dict[str, float], float]]:
    """(what, predicted bytes, lines at the peak, measured GiB)."""
    for found in _read("sft_step.jsonl"):
        yield _row(f"SFT step, native, {found['arm']}", _sft(found), found["peak_gib"])
    for found in _newest(_read("sft_run.jsonl"), "shape", "arm"):
        if found["arm"] in RUNS:
            what = f"SFT run, native, {found['shape']}, {found['arm']}"
            yield _row(what, _whole_run(found, RUNS[found["arm"]]), found["peak_gib"])
    for found in _newest(_read("several.jsonl"), "shape", "task", "gpus"):
        task, gpus = found["task"], found["gpus"]
        if task in SEVERAL and (task, gpus, found["shape"]) != CUT:
            what = f"SFT run, native, {found['shape']}, {task.removeprefix('sft-')}, {gpus} GPU"
            yield _row(what, _several(found), found["peak_gib"])
    for name, measured, batch, checkpointing in TRL_SFT:
        training = Training(_shape("0.5b"), batch, "tiles", optimizer=FUSED, checkpointing=checkpointing)
        yield _row(f"SFT step, TRL, {name}", training, measured)
    for found in _read("dpo_step.jsonl"):
        yield _row(f"DPO step, {found['arm']}", _dpo(found), found["peak_gib"])
    for found in _newest(_read("grpo_run.jsonl"), "arm"):
        if found["arm"] in GRPO_RUNS:
            yield _row(f"GRPO run, {found['arm']}", _grpo(found), found["peak_gib"])
    for found in _newest(_read("rollouts.jsonl"), "arm", "rows"):
        if found["arm"] != ENGINE:
            continue
        rollout = Rollout(found["rows"], LENGTHS + found["new"], found["rows"] * LENGTHS)
        training = Training(
            _shape(found["shape"]), Batch(1, 1, 1), "none", trained=2, optimizer="paged_adamw_32bit", rollout=rollout
        )
        yield _row(
            f"rollouts, {found['arm']}, {found['rows']} x {found['new']}", training, found["peak_gib"], "rollout"
        )


def _row(
    what: str, training: Training, measured: float, moment: str | None = None
) -> tuple[str, float, dict[str, float], float]:
    found = moments(training)
    lines = found[moment] if moment else max(found.values(), key=lambda one: sum(one.values()))
    return what, sum(lines.values()), lines, measured


def _shape(name: str) -> Shape:
    return shape_of({"model_type": "qwen2", "tie_word_embeddings": True} | SHAPES[name], name)


def _sft(found: dict[str, Any]) -> Training:
    """Weights and gradients in bf16: a loop of the benchmark's own, not a trainer."""
    parts, vocab = found["arm"].split("-"), SHAPES[found["shape"]]["vocab_size"]
    micro = 2 if "micro8k" in parts else 1
    batches = packed_batches((found["steps"] + WARMUP) * micro, 16_384 // micro, vocab)
    batch = max(batches, key=lambda rows: sum(map(len, rows)))
    tokens = sum(map(len, batch))
    keep = next((keep for keep in ("cheap", "half", "mlp") if keep in parts), "all")
    optimizer = next((SPLIT[part] for part in parts if part in SPLIT), FUSED)
    return Training(
        _shape(found["shape"]), Batch(tokens, tokens - len(batch), max(map(len, batch))), "loss", trained=2, optimizer=optimizer,
        compiled=keep if "compile" in parts else None, accumulates=micro > 1, repeats_keys=_before_2_12(found),  # type: ignore[arg-type]
    )  # fmt: skip


def _several(found: dict[str, Any]) -> Training:
    """What one of the GPUs holds."""
    gpus = found["gpus"]
    if found["task"] == "sft-fsdp2":
        return _whole_run(found, {"compiled": "all", "weight_shards": gpus, "state_shards": gpus})
    rows = BATCH_ROWS // gpus if found["task"] == "sft-equal" else BATCH_ROWS
    return _whole_run(found, {"compiled": "all", "bucketed": gpus > 1}, rows)


def _whole_run(found: dict[str, Any], settings: dict[str, Any], rows: int = BATCH_ROWS) -> Training:
    """Full rows, as the plan of a run takes them."""
    tokens = rows * LENGTH
    cut = found.get("arm") == "budget"
    batch = Batch(PASS, PASS, LENGTH, cut_from=tokens) if cut else Batch(tokens, tokens, LENGTH)
    return Training(
        _shape(found["shape"]), batch, "loss", repeats_keys=_before_2_12(found), accumulates=cut, **({"optimizer": FUSED} | settings)
    )  # fmt: skip


def _dpo(found: dict[str, Any]) -> Training:
    """The largest batch of the benchmark: packed rows (native), or 16 rows padded to the longest (TRL)."""
    shape, parts = _shape(found["shape"]), found["arm"].split("-")
    native = parts[0] == "native"
    kept = pairs(found["steps"] * BATCH)
    batches = [kept.select(range(start, start + BATCH)) for start in range(0, len(kept), BATCH)]
    sizes = []
    for batch in batches:
        answers = [len(ids) for name in ("chosen_ids", "rejected_ids") for ids in batch[name]]
        longest = 100 + max(answers)
        tokens = sum(answers) + 100 * len(answers) if native else longest * len(answers)
        sizes.append(Batch(tokens, sum(answers), longest, masked=not native))
    split: dict[str, Any] = (
        {"trained": 2, "optimizer": "adamw_split_bf16"} if "split16" in parts else {"optimizer": FUSED}
    )
    return Training(
        shape, max(sizes, key=lambda batch: batch.tokens), "log_probs" if native else "tiles", checkpointing="gc" in parts,
        compiled=None if "compile" not in parts else "mlp" if "mlp" in parts else "all",
        repeats_keys=native and _before_2_12(found), frozen={"reference model": 2.0 * shape.parameters}, **split,
    )  # fmt: skip


def _grpo(found: dict[str, Any]) -> Training:
    """Every completion at its longest, in one pass but for `native-budget`."""
    shape, rows, new = _shape(found["shape"]), found["completions"], found["new"]
    length, cut = GRPO_PROMPT + new, found["arm"] == "native-budget"
    of_a_pass = PASS // length if cut else rows
    batch = Batch(of_a_pass * length, of_a_pass * new, length, cut_from=rows * length if cut else None)
    return Training(
        shape, batch, "log_probs", repeats_keys=_before_2_12(found), accumulates=cut,
        rollout=Rollout(rows, length, rows * GRPO_PROMPT), **GRPO_RUNS[found["arm"]],
    )  # fmt: skip


def _before_2_12(found: dict[str, Any]) -> bool:
    return tuple(map(int, found["torch"].split(".")[:2])) < (2, 12)


def heads() -> Iterator[tuple[str, float, float]]:
    """(arm, predicted, measured) GiB of the head alone, above its inputs and what the repeat before left (its gradients, which
    are freed between the forward and the backward pass)."""
    for found in _read("linear_loss.jsonl"):
        kind = {"plain cross-entropy": "full", "cross-entropy, bfloat16 logits, 1024 MiB": "loss",
                "log-probs, float32 logits, 1024 MiB": "log_probs"}.get(found["arm"])  # fmt: skip
        if kind is None:
            continue
        shape, tokens = _shape("0.5b"), found["tokens"]
        training = Training(shape, Batch(tokens, tokens, 1), kind, trained=2)  # type: ignore[arg-type]
        left = 2 * (shape.embedding + tokens * shape.hidden)
        size = max(head_forward(training), head_backward(training) - left)
        yield found["arm"], size / GIB, found["peak_gib"]


def _newest(rows: list[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    """Of the rows that a GPU made, the last for each value of `keys`, in the order of their first."""
    made = [row for row in rows if row.get("peak_gib") and "failed" not in row]
    return list({tuple(row[key] for key in keys): row for row in made}.values())


def _read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def table() -> str:
    """The page."""
    lines = [
        "Peak GPU memory, predicted by the formulas of `aligntune plan` and measured (`torch.cuda.max_memory_allocated`), in GiB. `python benchmarks/plan.py`,",
        "on the results beside this file: H100 80 GB, torch 2.11, transformers 5.17, the 0.5B shape where no other is named, the largest batch that each run met. No allowance for",
        "context and unusable blocks is in these numbers, and nothing is fitted to them.",
        "",
        "| run | predicted | measured | error | largest lines at the peak |",
        "|---|---|---|---|---|",
    ]
    errors = []
    for what, predicted, parts, measured in rows():
        error = predicted / GIB / measured - 1
        errors.append(abs(error))
        largest = sorted(parts.items(), key=lambda part: -part[1])[:4]
        shown = ", ".join(f"{name} {size / GIB:.2f}" for name, size in largest)
        lines.append(f"| {what} | {predicted / GIB:.2f} | {measured:.2f} | {error:+.1%} | {shown} |")
    lines += [
        "",
        f"Largest error {max(errors):.1%}, mean {sum(errors) / len(errors):.1%}, over {len(errors)} runs.",
        "",
        "The head alone, 16,384 tokens (`linear_loss.jsonl`):",
        "",
        "| arm | predicted | measured | difference |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {arm} | {predicted:.2f} | {measured:.2f} | {measured - predicted:.2f} |"
        for arm, predicted, measured in heads()
    ]
    lines += [
        "",
        "The two chunked arms took one chunk of logits more (0.93 GiB in float32, 0.46 in bfloat16) than the kernel holds today: it now lets a chunk go before",
        "it makes the next, and the rows are consistent with a measurement from before that.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    text = table()
    (RESULTS / "plan.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
