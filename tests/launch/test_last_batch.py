"""Rows that do not fill the last batch of all processes: none is trained on twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks

import tiny

ROWS = 9
"""Four a step, so that the third has one, and the second process none."""
KINDS = [
    "sft-native",
    "sft-trl",
    "lengths-native",
    "cut-native",
    "packed-native",
    "stream-native",
    "classes-native",
    "dpo-native",
    "aot-native",
    "known-native",
]

PAIRS: dict[str, dict[str, Any]] = {"dpo": {}, "aot": {"loss_type": "aot_unpaired"}, "known": {}}
"""Settings of DPO: a plain loss, one that compares the pairs of a step, and log-probabilities of the reference in the rows."""


@pytest.fixture(scope="module")
def finished(
    parts: Path, sft_config: Callable[..., dict[str, Any]], rl_config: Callable[..., dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:  # fmt: skip
    """One folder for each run of four steps, named KIND-LAYOUT."""
    folder = tmp_path_factory.mktemp("last")
    for name in ("rows", "classes", "pairs"):
        lines = (parts / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:ROWS]))
    rows = (parts / "rows.jsonl").read_text().splitlines(keepends=True)
    (folder / "flow.jsonl").write_text("".join(rows[: ROWS + 1]))  # of one row, its own repetitions have the mean
    tiny.write_rows(folder / "many.jsonl", tiny.chats(40))

    def config(kind: str, layout: str, world: int) -> dict[str, Any]:
        name, backend = kind.split("-")
        if name in PAIRS:
            found = rl_config("dpo", folder / f"{kind}-{layout}", world, backend, max_steps=4, **PAIRS[name])
            return found | {
                "dataset": {"name": str(folder / "pairs.jsonl"), "precompute_ref_log_probs": name == "known"}
            }
        train: dict[str, Any] = {"lengths": {"group_by_length": True}, "cut": {"micro_batch_tokens": 73}, "packed": {"packing": True}}.get(name, {})  # fmt: skip
        found = sft_config(folder / f"{kind}-{layout}", world, backend, **train)
        rows = {"classes": "classes", "packed": "many", "stream": "flow"}.get(name, "rows")
        found["dataset"] = {"name": str(folder / f"{rows}.jsonl"), "streaming": name == "stream"}
        del found["eval_dataset"]
        if name == "classes":
            del found["evaluation"]
            found["dataset"] |= {"task_type": "text_classification"}
        return found

    def phase(world: int, sharded: bool, layout: str) -> dict[str, Any]:
        return {
            "world": world,
            "sharded": sharded,
            "cases": [{"config": config(kind, layout, world)} for kind in KINDS],
        }

    ranks.run_phases([phase(1, False, "one"), phase(2, False, "ddp"), phase(2, True, "fsdp2")], folder)
    return folder


def lines(folder: Path, *names: str) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows for name in names if name in row]


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(finished: Path, kind: str, layout: str) -> None:
    names = ["loss", "grad_norm", *(["rewards/margins", "logps/chosen"] if kind.split("-")[0] in PAIRS else [])]
    one, two = (lines(finished / f"{kind}-{name}", *names) for name in ("one", layout))
    assert two == pytest.approx(one, rel=1e-4, abs=1e-5)
    assert len(one) == 4 * len(names)
