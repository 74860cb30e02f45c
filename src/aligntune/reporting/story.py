"""What does the reader want to know first? The headline, from what to what, samples side by side, tables of results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aligntune.reporting.reading import RunRecord
from aligntune.reporting.scales import finite, solids
from aligntune.reporting.svg import sparkline
from aligntune.reporting.text import duration, is_timing, label, short, value_text

BETTER_HIGH = (
    *("accuracy", "accuracies", "pass@", "exact_match", "f1", "mcc", "bleu", "rouge", "meteor", "bertscore", "reward"),
    *("margin", "fitness", "win_rate", "similarity", "score", "correlation"),
)
BETTER_LOW = ("loss", "perplexity", "error", "toxicity", "mse")
CARDS = 4
PROMPTS_SHOWN = 6
PROMPTS_MORE = 40


@dataclass(frozen=True)
class Card:
    """One number of the headline. `verdict` is better, worse or "" where neither direction is good or nothing moved."""

    title: str
    split: str
    before: str
    after: str
    steps: str
    best: str
    verdict: str
    spark: str


@dataclass(frozen=True)
class Comparison:
    """One prompt with what the model wrote to it first and last; `before` is None when there is one step only."""

    prompt: list[tuple[str, str]]
    reference: str
    before: Mapping[str, Any] | None
    after: Mapping[str, Any]


def cards(record: RunRecord) -> list[Card]:
    """At most four: quality on held-out data first, then held-out loss, then training reward and loss."""
    found: list[tuple[int, str, str]] = []
    rewarded = "reward" in record.names("train")
    for split in record.splits():
        for name in record.names(split):
            rank = _rank(split, name, rewarded)
            if rank is not None and any(finite(value) for value in record.series(split, name)[1]):
                found.append((rank, split, name))
    found.sort(key=lambda item: item[0])  # stable: ties keep the order of the trail
    return [_card(record, split, name) for _, split, name in found[:CARDS]]


def title(record: RunRecord) -> str:
    """`run_name`, or what was done to which model."""
    logging = record.config.get("logging") or {}
    return str(logging.get("run_name") or subject(record) or record.run.path.name)


def subject(record: RunRecord) -> str:
    """`SFT of SmolLM2-135M on alpaca`, as far as the config says."""
    for section, base, rows in (
        ("reward_training", "base_model_name", "labelled texts"),
        ("reward_pairs", "base", "preference pairs"),
    ):
        if "algorithm" not in record.config and section in record.config:
            return f"Reward model of {_last_part(record.config[section][base])} from {rows}"
    algorithm = str(record.config.get("algorithm") or "").upper().replace("_", " ")
    model = _last_part((record.config.get("model") or {}).get("name_or_path"))
    datasets = record.config.get("datasets") or [record.config.get("dataset") or {}]
    data = " + ".join(filter(None, (_last_part(entry.get("name")) for entry in datasets)))
    of, on = f" of {model}" if model else "", f" on {data}" if data else ""
    return f"{algorithm or 'Training'}{of}{on}" if of or on else algorithm


def facts(record: RunRecord) -> list[tuple[str, str]]:
    """Small facts under the headline: steps, epochs, tokens, time, speed, memory."""
    found = [("steps", f"{record.last_step():,}")] if record.metrics else []
    for name, title, shown in (("epoch", "epochs", "{:.3g}".format), ("num_tokens", "tokens", short)):
        last = next((value for value in reversed(record.series("train", name)[1]) if finite(value)), None)
        if last is not None:
            found.append((title, shown(last)))
    seconds = record.seconds()
    if seconds is not None:
        found.append(("time", duration(seconds)))
    speeds = sorted(solids(record.series("train", "tokens_per_second")[1]))
    if speeds:
        found.append(("tokens per second, median", short(speeds[len(speeds) // 2])))
    memory = solids(record.series("train", "memory_gib")[1])
    if memory:
        found.append(("peak memory", f"{max(memory):.3g} GiB"))
    return found


def evaluations(record: RunRecord) -> list[dict[str, Any]]:
    """One table per held-out split: a row per step (the first, the last and the best always), a column per metric."""
    tables = []
    for split in record.splits():
        names = [n for n in record.names(split) if not is_timing(n) and n != "epoch"]
        if split == "train" or not names:
            continue
        values = {name: dict(zip(*record.series(split, name), strict=True)) for name in names}
        steps = sorted({step for of_name in values.values() for step in of_name})
        best = {name: _best_step(name, of_name) for name, of_name in values.items()}
        kept = set(_spread_out(steps, 12)) | {step for step in best.values() if step is not None}
        rows = [(step, [_table_cell(n, values[n].get(step), best[n] == step) for n in names]) for step in sorted(kept)]
        tables.append({"split": split, "columns": [label(name) for name in names], "rows": rows, "all": len(steps)})
    return tables


def comparisons(record: RunRecord) -> list[Comparison]:
    """Samples by prompt, each with its first and its last step; several samples of a prompt are paired in order."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    counts: dict[tuple[str, Any], int] = {}
    for row in record.samples:
        key = json.dumps(row.get("id", row.get("prompt")), ensure_ascii=False)
        order = counts.get((key, row.get("step")), 0)
        counts[key, row.get("step")] = order + 1
        groups.setdefault((key, order), []).append(row)
    return [_comparison(rows) for rows in groups.values()][: PROMPTS_SHOWN + PROMPTS_MORE]


def finite_number(value: Any) -> bool:
    """True for numbers that are not NaN or infinite (JSON has none, but booleans and text it has)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and finite(value)


def _rank(split: str, name: str, rewarded: bool) -> int | None:
    if is_timing(name) or name.endswith(("/std", "_std")):
        return None
    high, low = any(part in name for part in BETTER_HIGH), any(part in name for part in BETTER_LOW)
    held_out = split != "train"
    if name.endswith("rejected"):
        return None
    if held_out and name in ("rouge1", "rouge2"):
        return 2  # rougeL speaks for them, so that there is room for the loss
    if held_out and high:
        return 0
    if held_out and low:
        return 1
    if name == "reward":
        return 2
    if name == "loss" and not rewarded:  # the loss of a policy is no measure of it
        return 3
    return 4 if name in ("mean_token_accuracy", "kl") else None


def _card(record: RunRecord, split: str, name: str) -> Card:
    steps, values = record.series(split, name)
    solid = [(step, value) for step, value in zip(steps, values, strict=True) if finite(value)]
    (first_step, first), (last_step, last) = solid[0], solid[-1]
    best_step = _best_step(name, dict(solid))
    direction = _direction(name)
    moved = direction * (last - first)
    single = len(solid) == 1
    return Card(
        title=label(name),
        split="held-out" if split == "eval" else split,
        before="" if single else value_text(name, first, 3),
        after=value_text(name, last, 3),
        steps=f"step {last_step:g}" if single else f"step {first_step:g} to {last_step:g}",
        best=f"best {value_text(name, dict(solid)[best_step], 3)} at step {best_step:g}"
        if best_step is not None and dict(solid)[best_step] != last and split != "train" and not single
        else "",
        verdict="better" if moved > 0 else "worse" if moved < 0 else "",
        spark=sparkline(values, title=f"{split} {label(name)}") if len(solid) > 2 else "",
    )


def _direction(name: str) -> int:
    if name.endswith("rejected"):
        return 0  # of the answers to turn away from: neither direction alone is good
    if any(part in name for part in BETTER_LOW):
        return -1
    return 1 if any(part in name for part in BETTER_HIGH) else 0


def _best_step(name: str, values: Mapping[float, float | None]) -> float | None:
    direction = _direction(name)
    solid = {step: value for step, value in values.items() if finite(value)}
    return max(solid, key=lambda step: direction * solid[step]) if direction and solid else None


def _table_cell(name: str, value: float | None, best: bool) -> tuple[str, bool]:
    return (value_text(name, value) if finite(value) else "–", best)


def _spread_out(steps: Sequence[float], limit: int) -> list[float]:
    if len(steps) <= limit:
        return list(steps)
    return [steps[round(index * (len(steps) - 1) / (limit - 1))] for index in range(limit)]


def _comparison(rows: Sequence[Mapping[str, Any]]) -> Comparison:
    ordered = sorted(rows, key=lambda row: row.get("step", 0))
    first, last = ordered[0], ordered[-1]
    return Comparison(
        prompt=_turns(last.get("prompt", "")),
        reference=_plain(last.get("reference", "")),
        before=_answer(first) if first.get("step") != last.get("step") else None,
        after=_answer(last),
    )


def _answer(row: Mapping[str, Any]) -> dict[str, Any]:
    scores = {"reward": row["reward"]} if finite_number(row.get("reward")) else {}
    scores |= {name: value for name, value in (row.get("rewards") or {}).items() if finite_number(value)}
    known = ("step", "prompt", "completion", "reference", "reward", "rewards", "id")
    other = {key: value for key, value in row.items() if key not in known and value is not None}
    return {
        "step": row.get("step", 0),
        "text": "\n\n".join(text for _, text in _turns(row.get("completion", ""))),
        "scores": [(name, f"{value:.4g}") for name, value in scores.items()],
        "other": [(label(key), _plain(value)) for key, value in other.items()],
    }


def _turns(prompt: Any) -> list[tuple[str, str]]:
    """Role and text of each message; plain text is one turn without a role."""
    if isinstance(prompt, list) and all(isinstance(turn, dict) and "content" in turn for turn in prompt):
        return [(str(turn.get("role", "")), _plain(turn["content"])) for turn in prompt]
    return [("", _plain(prompt))]


def _plain(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _last_part(name: Any) -> str:
    """`HuggingFaceTB/SmolLM2-135M` -> `SmolLM2-135M`, `../data/alpaca.json` -> `alpaca`."""
    last = str(name or "").rstrip("/").rsplit("/", 1)[-1]
    stem, dot, ending = last.rpartition(".")
    return stem if dot and ending in ("json", "jsonl", "csv", "parquet", "txt", "conll") else last
