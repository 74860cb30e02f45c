"""The embedded default: its task, its model, and that fine-tuning it works."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from aligntune.quickstart import run, task


def test_held_out_lists_are_never_trained_on(tmp_path: Path) -> None:
    kept = {tuple(words) for words in task.held_out()}
    assert kept.isdisjoint({tuple(words) for words in task.lists(500, 0, frozenset(kept))})
    assert task.held_out() == task.held_out()
    assert len(kept) == 200


def test_the_verifier() -> None:
    assert run.right("red cat sun", task.backwards(["sun", "cat", "red"])) == 1.0
    assert run.right("sun cat red", task.backwards(["sun", "cat", "red"])) == 0.0
    assert task.in_place("red cat moon", "red cat sun") == pytest.approx(2 / 3)
    assert task.in_place("red", "red cat sun") == pytest.approx(1 / 3)
    assert task.in_place("", "red") == 0.0
    assert task.accuracy(["b a", "x"], [["a", "b"], ["c", "d"]]) == 0.5


def test_the_base_is_small_and_its_template_renders_prompts_as_prefixes() -> None:
    assert sum(path.stat().st_size for path in run.BASE.iterdir()) < 8e6
    tokenizer = AutoTokenizer.from_pretrained(run.BASE)
    row = task.rows([["sun", "cat", "red"]])[0]
    whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
    prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    assert whole.startswith(prompt)
    assert tokenizer.unk_token_id not in tokenizer("backwards: cat red blue")["input_ids"]
    assert AutoModelForCausalLM.from_pretrained(run.BASE).num_parameters() < 1_000_000


@pytest.mark.slow
def test_fine_tuning_then_grpo_take_the_base_from_nothing_to_most_answers(tmp_path: Path) -> None:
    """Guessing three words in order is right once in 40 thousand times; three in ten demonstrations are careless, so
    imitation alone ends between 0.6 and 0.85 (six seeds, two backends), and the reward leads on to 0.8 and more."""
    found = run.quickstart(tmp_path)
    assert found["base"] < 0.05
    assert found["SFT"] > 0.4
    assert found["GRPO"] > max(0.7, found["SFT"] + 0.05)
