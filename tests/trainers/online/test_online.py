"""Online RL on a tiny model: invariances, exact resume, learning, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from online_helpers import digits, lines, trained

from aligntune.errors import ConfigError, RewardError
from aligntune.trainers.online_trainer import OnlineTrainer
from aligntune.trainers.rollout_phase import Sampler

Run = Callable[..., Any]
ALGORITHMS = ["ppo", "grpo", "dapo", "dr_grpo", "gspo", "neural_mirror_grpo"]


def exact(completion: str, answer: str) -> float:
    return float(completion == answer)


@pytest.mark.parametrize(
    ("algorithm", "temperature"), [*((name, 1.0) for name in ALGORITHMS), ("grpo", 0.5), ("ppo", 0.5)]
)
def test_the_first_update_is_on_policy(run: Run, algorithm: str, temperature: float) -> None:
    """Sampler, update and reference mean the same tempered distribution."""
    first = trained(run(algorithm, max_steps=1, temperature=temperature))[0]
    assert first["ratio_min"] == pytest.approx(1.0, abs=1e-5)
    assert first["ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert first["clip_fraction_low"] == first["clip_fraction_high"] == 0
    assert first["sampler_mismatch"] < 1e-5
    if algorithm != "neural_mirror_grpo":
        assert first["kl"] == pytest.approx(0.0, abs=1e-6)


def test_phases_are_measured_without_dropout_and_updates_made_with_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the other left: in the second phase the model comes from an update."""
    modes: list[tuple[str, bool]] = []

    def watch(name: str) -> None:
        plain = getattr(OnlineTrainer, name)

        def watched(self: Any, *given: Any) -> Any:
            modes.append((name, self.model.training))
            return plain(self, *given)

        monkeypatch.setattr(OnlineTrainer, name, watched)

    watch("_measure")
    watch("loss_of")
    run(max_steps=2).train()
    assert modes == [("_measure", False), ("loss_of", True)] * 2


def test_each_phase_draws_and_shuffles_anew(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    orders: list[tuple[int, ...]] = []
    sample, begin = Sampler.sample, OnlineTrainer.begin_phase

    def sampled(self: Any, prompts: int, seed: int, *rest: Any) -> Any:
        seeds.append(seed)
        return sample(self, prompts, seed, *rest)

    def begun(self: Any) -> None:
        begin(self)
        orders.append(tuple(self.order.tolist()))

    monkeypatch.setattr(Sampler, "sample", sampled)
    monkeypatch.setattr(OnlineTrainer, "begin_phase", begun)
    trained(run(num_ppo_epochs=2, max_steps=6))
    assert len(set(seeds)) == len(set(orders)) == 3
    for order in orders:  # two passes, each over all eight completions
        assert sorted(order[:8]) == sorted(order[8:]) == list(range(8))
        assert order[:8] != order[8:]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_update_does_not_depend_on_micro_batches(run: Run, algorithm: str) -> None:
    one = trained(run(algorithm, "a", batch_size=8, gradient_accumulation_steps=1))
    other = trained(run(algorithm, "b", batch_size=2, gradient_accumulation_steps=4))
    for name in ("loss", "grad_norm", "reward", "completions/mean_length"):
        seen = [[row[name] for row in rows if name in row] for rows in (one, other)]  # a phase's own numbers come once
        assert seen[0] == pytest.approx(seen[1], abs=2e-5), name


@pytest.mark.parametrize(("algorithm", "settings"), [
    ("grpo", {"rollout_batch_size": 8, "kl_coef": 0.1}), ("grpo", {"num_ppo_epochs": 3}), ("ppo", {"num_ppo_epochs": 2, "kl_coef": 0.1}),
    ("grpo", {"use_peft": True}), ("dapo", {"rollout_batch_size": 4}),
    ("grpo", {"rewards": [{"type": "length", "normalize": True}], "reward_functions": None, "rollout_batch_size": 4}), ("grpo", {"disable_dropout": False, "use_peft": True, "lora_dropout": 0.3, "rollout_batch_size": 4}),
], ids=str)  # fmt: skip
def test_resume_is_exact_in_the_middle_of_a_rollout(
    tmp_path: Path, run: Run, algorithm: str, settings: dict[str, Any]
) -> None:
    settings = settings | {"save_interval": 1, "max_steps": 6}
    whole, cut = (run(algorithm, name, **settings) for name in ("whole", "cut"))
    expected = trained(whole)
    cut.train()
    again = run(algorithm, "cut", **settings)
    again.train(resume=str(tmp_path / "cut" / "checkpoints" / "checkpoint-3"))
    assert lines(tmp_path / "cut") == expected
    for one, other in zip(whole.model.parameters(), again.model.parameters()):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "algorithm", ["grpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ALGORITHMS if name != "grpo")]
)
def test_it_learns_to_write_digits(run: Run, algorithm: str) -> None:
    """A random model writes a digit once in 26 tokens; sampled completions must come to hold many."""
    more: dict[str, Any] = (
        {"batch_size": 32, "num_ppo_epochs": 2} if algorithm == "ppo" else {"batch_size": 32, "num_generations": 8}
    )
    more |= {"max_resample_batches": 2} if algorithm == "dapo" else {}
    found = trained(run(algorithm, max_steps=35, learning_rate=1e-2, kl_coef=0.0, logging_steps=5, **more))
    assert found[0]["reward"] < 0.15
    assert found[-1]["reward"] > 0.6


def test_held_out_prompts_are_scored_by_the_task(files: Path, tmp_path: Path, run: Run) -> None:
    session = run(
        reward_functions=[exact, digits], reward_function_weights=[1.0, 0.5], eval_dataset=str(files / "prompts.jsonl"),
        eval_strategy="steps", eval_interval=2,
    )  # fmt: skip
    metrics = session.train()
    assert metrics["eval_pass@1"] == metrics["eval_rewards/exact/accuracy"] == metrics["eval_rewards/exact/mean"]
    parts = metrics["eval_rewards/exact/mean"] + 0.5 * metrics["eval_rewards/digits/mean"]
    assert metrics["eval_reward"] == pytest.approx(parts)
    assert [row["step"] for row in lines(tmp_path / "out", "eval")] == [0, 2, 4]


def test_dynamic_sampling_replaces_prompts_without_a_signal(run: Run) -> None:
    found = trained(run("dapo", "on", max_resample_batches=3))
    assert any(row.get("dynamic_sampling/rounds", 0) > 1 for row in found)
    assert all(row.get("dynamic_sampling/rounds", 1) <= 3 for row in found)
    off = trained(run("dapo", "off", dynamic_sampling=False))
    assert all(row.get("dynamic_sampling/rounds", 1) == 1 for row in off)


def test_prompts_that_only_fill_up_are_not_counted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fillers: list[int] = []
    sample = Sampler.sample

    def sampled(self: Any, *given: Any) -> Any:
        scored = sample(self, *given)
        fillers.append(scored.fillers)
        return scored

    def some(completion_ids: list[int], answer: str) -> float:
        return float(sum(completion_ids)) if answer > "m" else 1.0

    monkeypatch.setattr(Sampler, "sample", sampled)
    session = run("dapo", reward_functions=[some], batch_size=16, max_resample_batches=1, max_steps=1)
    session.train()
    assert 0 < fillers[0] < 4
    rollout = session.trainer.rollout
    assert rollout.counted.tolist() == [True] * 4 * (4 - fillers[0]) + [False] * 4 * fillers[0]
    assert torch.equal(rollout.loss_mask.any(1), rollout.counted)


def test_samples_are_logged_when_due(tmp_path: Path, run: Run) -> None:
    logging_settings = {
        "sample_logging": {
            "enabled": True,
            "prompts": ["say cat"],
            "interval_steps": 2,
            "num_samples": 2,
            "max_new_tokens": 3,
        }
    }
    run(logging=logging_settings).train()
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    due = [row for row in samples if row["prompt"] == [{"role": "user", "content": "say cat"}]]
    assert [(row["step"], row["sample"]) for row in due] == [(0, 0), (0, 1), (2, 0), (2, 1), (4, 0), (4, 1)]


@pytest.mark.parametrize(("settings", "message"), [
    ({"num_generations": 1}, "at least 2"), ({"reward_functions": []}, "no reward model"),
    ({"batch_size": 6, "gradient_accumulation_steps": 1}, "whole groups of 4"), ({"rollout_batch_size": 3, "batch_size": 8}, "multiple of 2"),
    ({"stop_token": "<|nope|>"}, "not a token"), ({"max_completion_length": 5000}, "leaves no room"),
    ({"reward_functions": ["lenght"]}, "length"), ({"fast_inference": True}, "vllm"), ({"enable_thinking": True}, "thinking"),
], ids=str)  # fmt: skip
def test_mistakes(tmp_path: Path, run: Run, settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, RewardError, ImportError), match=message):
        run(**settings).train()
    assert not (tmp_path / "out" / "model").exists()


def test_a_reward_that_is_not_a_number_stops_the_run_and_shows_the_sample(run: Run) -> None:
    with pytest.raises(RewardError, match="broken"):
        run(reward_functions=[broken]).train()


def broken(completion: str) -> float:
    return float("nan")


def test_under_autocast_the_sampler_is_the_policy_that_learns(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """At this learning rate a step moves a float32 master by less than a bfloat16 can show."""
    from aligntune.models import precision
    from aligntune.rollouts.rounded import RoundedEngine

    monkeypatch.setattr(precision, "bf16_is_fast", lambda _: True)
    session = run("grpo", precision="bf16", use_peft=False, max_steps=6, learning_rate=1e-4)
    rows = trained(session)
    assert isinstance(session.engine.engine, RoundedEngine)
    assert max(row["sampler_mismatch"] for row in rows if "sampler_mismatch" in row) < 0.02
    assert {parameter.dtype for parameter in session.model.parameters()} == {torch.float32}
