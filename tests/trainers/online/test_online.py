"""Online RL on a tiny model: invariances, exact resume, learning, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from aligntune.core.backend_factory import create_rl_trainer
from aligntune.errors import ConfigError, RewardError
from aligntune.reporting.text import without_timing

ALGORITHMS = ["ppo", "grpo", "dapo", "dr_grpo", "gspo", "neural_mirror_grpo"]


def digits(completion: str) -> float:
    """Share of characters that are digits; 10 of 259 tokens are."""
    return sum(character.isdigit() for character in completion) / max(1, len(completion))


def exact(completion: str, answer: str) -> float:
    return float(completion == answer)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("online")
    tiny.write_model(folder / "model")
    tiny.write_rows(folder / "prompts.jsonl", [{"prompt": f"say {word}", "answer": word} for word in tiny.WORDS])
    return folder


def run(files: Path, out: Path, algorithm: str = "grpo", **settings: Any) -> Any:
    given: dict[str, Any] = {
        "reward_functions": [digits], "precision": "fp32", "use_peft": False, "batch_size": 8, "learning_rate": 3e-3, "max_steps": 4,
        "logging_steps": 1, "max_completion_length": 5, "temperature": 1.0, "top_p": 1.0, "loggers": "none", "lr_scheduler": "constant",
        "mask_truncated_completions": False, "backend": "native",
    }  # fmt: skip
    given |= {"missing_eos_penalty": 0.0} if algorithm == "ppo" else {"num_generations": 4}
    return create_rl_trainer(files / "model", files / "prompts.jsonl", algorithm, output_dir=out, **(given | settings))


def lines(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("perf/", "elapsed")
    return [
        {name: value for name, value in without_timing(row).items() if not name.startswith(timed)} for row in rows if row["split"] == split
    ]


def trained(session: Any) -> list[dict[str, Any]]:
    session.train(overwrite=True)
    return lines(session.directory.path)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_first_update_is_on_policy(files: Path, tmp_path: Path, algorithm: str) -> None:
    first = trained(run(files, tmp_path, algorithm, max_steps=1))[0]
    assert first["ratio_min"] == pytest.approx(1.0, abs=1e-5)
    assert first["ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert first["clip_fraction_low"] == first["clip_fraction_high"] == 0
    assert first["sampler_mismatch"] < 1e-5
    if algorithm != "neural_mirror_grpo":
        assert first["kl"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_update_does_not_depend_on_micro_batches(files: Path, tmp_path: Path, algorithm: str) -> None:
    one = trained(run(files, tmp_path / "a", algorithm, batch_size=8, gradient_accumulation_steps=1))
    other = trained(run(files, tmp_path / "b", algorithm, batch_size=2, gradient_accumulation_steps=4))
    for name in ("loss", "grad_norm", "reward", "completions/mean_length"):
        seen = [[row[name] for row in rows if name in row] for rows in (one, other)]  # a phase's own numbers come once
        assert seen[0] == pytest.approx(seen[1], abs=2e-5), name


@pytest.mark.parametrize("settings", [{"use_peft": True, "force_use_ref_model": True}, {"use_peft": True}], ids=str)
def test_lora_compares_with_its_own_base(files: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """The adapter disabled and a frozen copy are the same reference."""
    found = trained(run(files, tmp_path, learning_rate=1e-2, max_steps=6, **settings))
    assert found[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert found[-1]["kl"] > 1e-6
    if settings.get("force_use_ref_model"):
        plain = trained(run(files, tmp_path / "plain", learning_rate=1e-2, max_steps=6, use_peft=True))
        assert [row["kl"] for row in plain] == pytest.approx([row["kl"] for row in found], abs=1e-6)


def test_a_batch_of_truncated_completions_gives_no_loss_and_one_warning(files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "aligntune"):
        session = run(files, tmp_path, mask_truncated_completions=True, kl_coef=0.1, max_completion_length=2)
        found = trained(session)
    silent = [row for row in found if row["completions/truncated_share"] == 1]
    assert silent
    assert all(row["loss"] == 0 and row["grad_norm"] == 0 for row in silent)


@pytest.mark.parametrize(("algorithm", "settings"), [
    ("grpo", {"rollout_batch_size": 8, "kl_coef": 0.1}), ("grpo", {"num_ppo_epochs": 3}), ("ppo", {"num_ppo_epochs": 2, "kl_coef": 0.1}),
    ("grpo", {"use_peft": True}), ("dapo", {"rollout_batch_size": 4}),
    ("grpo", {"rewards": [{"type": "length", "normalize": True}], "reward_functions": None, "rollout_batch_size": 4}),
], ids=str)  # fmt: skip
def test_resume_is_exact_in_the_middle_of_a_rollout(files: Path, tmp_path: Path, algorithm: str, settings: dict[str, Any]) -> None:
    settings = {name: value for name, value in settings.items() if value is not None} | {"save_interval": 1, "max_steps": 6}
    if "rewards" in settings:
        settings["reward_functions"] = None
    whole, cut = (run(files, tmp_path / name, algorithm, **settings) for name in ("whole", "cut"))
    expected = trained(whole)
    cut.train()
    again = run(files, tmp_path / "cut", algorithm, **settings)
    again.train(resume=str(tmp_path / "cut" / "checkpoints" / "checkpoint-3"))
    assert lines(tmp_path / "cut") == expected
    for one, other in zip(whole.model.parameters(), again.model.parameters()):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_it_learns_to_write_digits(files: Path, tmp_path: Path, algorithm: str) -> None:
    """A random model writes a digit once in 26 tokens; sampled completions must come to hold many."""
    more = {"batch_size": 32, "num_ppo_epochs": 2} if algorithm == "ppo" else {"batch_size": 32, "num_generations": 8}
    found = trained(run(files, tmp_path, algorithm, max_steps=60, learning_rate=1e-2, kl_coef=0.0, logging_steps=5, **more))
    assert found[0]["reward"] < 0.15
    assert found[-1]["reward"] > 0.6


def test_held_out_prompts_are_scored_by_the_task(files: Path, tmp_path: Path) -> None:
    session = run(
        files, tmp_path, reward_functions=[exact, digits], reward_function_weights=[1.0, 0.5], eval_dataset=str(files / "prompts.jsonl"),
        eval_strategy="steps", eval_interval=2,
    )  # fmt: skip
    metrics = session.train()
    assert metrics["eval_pass@1"] == metrics["eval_rewards/exact/accuracy"] == metrics["eval_rewards/exact/mean"]
    parts = metrics["eval_rewards/exact/mean"] + 0.5 * metrics["eval_rewards/digits/mean"]
    assert metrics["eval_reward"] == pytest.approx(parts)
    assert [row["step"] for row in lines(tmp_path, "eval")] == [0, 2, 4]


def test_dynamic_sampling_replaces_prompts_without_a_signal(files: Path, tmp_path: Path) -> None:
    found = trained(run(files, tmp_path, "dapo", max_resample_batches=3))
    assert any(row.get("dynamic_sampling/rounds", 0) > 1 for row in found)
    assert all(row.get("dynamic_sampling/rounds", 1) <= 3 for row in found)
    off = trained(run(files, tmp_path, "dapo", dynamic_sampling=False))
    assert all(row.get("dynamic_sampling/rounds", 1) == 1 for row in off)


def test_samples_are_logged_when_due(files: Path, tmp_path: Path) -> None:
    logging_settings = {"sample_logging": {"enabled": True, "prompts": ["say cat"], "interval_steps": 2, "num_samples": 2, "max_new_tokens": 3}}
    run(files, tmp_path, logging=logging_settings).train()
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    due = [row for row in samples if row["prompt"] == [{"role": "user", "content": "say cat"}]]
    assert [(row["step"], row["sample"]) for row in due] == [(0, 0), (0, 1), (2, 0), (2, 1), (4, 0), (4, 1)]


def test_the_value_model_may_be_one_of_its_own(files: Path, tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "critic", seed=3)
    session = run(files, tmp_path / "out", "ppo", reward_value_model=str(tmp_path / "critic"))
    session.train()
    critic = session.trainer.critic
    assert critic.trunk is not None
    fresh = tiny.model(3)
    assert any(not torch.equal(a, b) for a, b in zip(critic.trunk.parameters(), fresh.parameters()))  # it trained


@pytest.mark.parametrize(("settings", "message"), [
    ({"num_generations": 1}, "at least 2"), ({"reward_functions": []}, "no reward model"),
    ({"batch_size": 6, "gradient_accumulation_steps": 1}, "whole groups of 4"), ({"rollout_batch_size": 3, "batch_size": 8}, "multiple of 2"),
    ({"stop_token": "<|nope|>"}, "not a token"), ({"max_completion_length": 5000}, "leaves no room"),
    ({"reward_functions": ["lenght"]}, "length"), ({"fast_inference": True}, "vllm"), ({"enable_thinking": True}, "thinking"),
], ids=str)  # fmt: skip
def test_mistakes(files: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, RewardError, ImportError), match=message):
        run(files, tmp_path, **settings).train()
    assert not (tmp_path / "model").exists()


def test_a_reward_that_is_not_a_number_stops_the_run_and_shows_the_sample(files: Path, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="broken"):
        run(files, tmp_path, reward_functions=[broken]).train()


def broken(completion: str) -> float:
    return float("nan")
