"""The parts of a rollout phase, by hand: plan, order of prompts, dynamic sampling, missing rewards, normalisers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from fractions import Fraction
from threading import Barrier, Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

import tiny
from aligntune.algorithms import base as algorithms
from aligntune.algorithms.ops import group_advantages
from aligntune.errors import ConfigError
from aligntune.rewards import RewardSet
from aligntune.rollouts.base import Rollouts, SamplingParams
from aligntune.trainers.held_out import HeldOut
from aligntune.trainers.online_metrics import Meter, pooled
from aligntune.trainers.online_plan import Plan, make_plan
from aligntune.trainers.prompt_stream import PromptStream
from aligntune.trainers.rollout import Rollout
from aligntune.trainers.rollout_phase import Sampler, Scored, joined, length_metrics, reward_arguments
from aligntune.trainers.samples import is_due


def prompts(count: int) -> Dataset:
    return Dataset.from_list([
        {"prompt_ids": [at + 5], "prompt_text": f"p{at}", "prompt_json": json.dumps(f"p{at}"), "length": at % 7, "level": at}
        for at in range(count)
    ])  # fmt: skip


# Plan -----------------------------------------------------------------------------------------------------------------


def plan_of(algorithm: str = "grpo", **train: Any) -> Plan:
    settings = {"num_generations": 4} | train if algorithm == "grpo" else train
    return make_plan(SimpleNamespace(train=tiny.settings_of(algorithm, **settings)), algorithm == "grpo")


def test_unset_a_phase_is_what_one_step_consumes():
    plan = plan_of(per_device_batch_size=8, gradient_accumulation_steps=2)
    assert (plan.prompts, plan.completions, plan.step, plan.steps, plan.on_policy) == (4, 16, 16, 1, True)


def test_a_larger_phase_serves_several_steps():
    plan = plan_of(per_device_batch_size=8, rollout_batch_size=6, num_ppo_epochs=3)
    assert (plan.completions, plan.steps, plan.on_policy) == (24, 9, False)
    assert plan.phases(rows=13, world=2) == 2  # 12 prompts a phase, the second runs on into the next pass


def test_ppo_samples_one_completion_and_goes_over_it_four_times():
    plan = plan_of("ppo", per_device_batch_size=8)
    assert (plan.prompts, plan.group, plan.steps) == (8, 1, 4)


@pytest.mark.parametrize(("train", "message"), [
    ({"per_device_batch_size": 6, "gradient_accumulation_steps": 1}, "multiple of 2"),
    ({"per_device_batch_size": 8, "rollout_batch_size": 3}, "multiple of 2"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_with_what_would(train: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        plan_of(**train)


# Order of prompts -----------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 5), st.booleans())
def test_every_pass_draws_every_prompt_once(count: int, world: int, phase: int, by_length: bool):
    rows = prompts(count)
    streams = [
        PromptStream(rows, seed=3, phase=phase * world, by_length=by_length, rank=rank, world=world)
        for rank in range(world)
    ]
    drawn: list[int] = []
    while len(drawn) < 3 * count:
        parts = [[row["level"] for row in stream.draw(phase * world)] for stream in streams]
        drawn += [level for at in range(phase) for level in (part[at] for part in parts)]
    for start in range(0, 2 * count, count):
        assert sorted(drawn[start : start + count]) == list(range(count))


def test_the_order_is_a_function_of_seed_and_position():
    one, other = PromptStream(prompts(20), seed=1), PromptStream(prompts(20), seed=1)
    one.draw(13)
    other.position = 13
    assert one.draw(20) == other.draw(20)
    assert PromptStream(prompts(20), seed=2).order(0).tolist() != PromptStream(prompts(20), seed=1).order(0).tolist()
    assert one.order(0).tolist() != one.order(1).tolist()


def test_by_length_a_phase_holds_like_lengths():
    """32 prompts of lengths 0 to 6; random phases of 4 spread over about 5 lengths."""

    def spread(by_length: bool) -> float:
        stream = PromptStream(prompts(32), seed=0, phase=4, by_length=by_length)
        phases = [[row["length"] for row in stream.draw(4)] for _ in range(8)]
        return sum(max(lengths) - min(lengths) for lengths in phases) / 8

    assert spread(True) < 1.5 < 3 < spread(False)
    firsts = [PromptStream(prompts(32), seed=seed, phase=4, by_length=True).draw(1)[0]["length"] for seed in range(8)]
    assert len(set(firsts)) > 2  # the phases themselves come in random order


# Dynamic sampling -----------------------------------------------------------------------------------------------------


class Engine:
    """Completions are the prompt's number; `calls` keeps how many prompts were asked for each time, `seeds` with which seed."""

    name = "fake"

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.seeds: list[int | None] = []

    def generate(self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams) -> Rollouts:
        self.calls.append(len(prompt_ids))
        self.seeds.append(params.seed)
        ids = [[prompt[0], member + 1] for prompt in prompt_ids for member in range(params.num_generations)]
        return Rollouts(ids, [[-1.0, -1.0]] * len(ids), [[-1.0, -1.0]] * len(ids), [True] * len(ids))


def sampler(good: Any, *, rows: int = 40, **settings: Any) -> Sampler:
    """Prompts of levels for which `good` holds have a signal: their two completions score 0 and 1, others 1 and 1."""

    def score(completion_ids: list[int], level: int) -> float:
        return float(completion_ids[1] == 1) if good(level) else 1.0

    stream = PromptStream(prompts(rows), seed=0)
    config = tiny.settings_of("dapo", num_generations=2, **settings)
    params = SamplingParams(max_new_tokens=2, num_generations=2)
    return Sampler(stream, Engine(), RewardSet([score]), tiny.tokenizer(), algorithms.get("dapo"), config, params)


def levels(scored: Any) -> list[int]:
    return [row["level"] for row in scored.rows]


def test_prompts_without_a_signal_are_replaced():
    made = sampler(lambda level: level % 2 == 0)
    found = made.sample(8, seed=0)
    assert len(found.rows) == 8
    assert found.fillers == 0
    assert all(level % 2 == 0 for level in levels(found))
    assert found.metrics["dynamic_sampling/rounds"] == len(made.engine.calls) > 1
    assert len(set(made.engine.seeds)) == len(made.engine.seeds), "each draw has random numbers of its own"
    assert found.metrics["dynamic_sampling/missing_share"] == 0
    # `reward` is over all that was drawn: half of the completions of good prompts, all of the others'
    share = sum(level % 2 == 0 for level in made.stream.order(0)[: sum(made.engine.calls)]) / sum(made.engine.calls)
    assert found.metrics["reward"] == pytest.approx(1 - share / 2)
    assert found.metrics["dynamic_sampling/kept_share"] == pytest.approx(share)


def test_later_draws_ask_for_more_when_few_are_kept():
    made = sampler(lambda level: level % 4 == 0, rows=400)
    made.sample(8, seed=0)
    first, second = made.engine.calls[:2]
    kept = sum(level % 4 == 0 for level in made.stream.order(0)[:8])
    assert (first, second) == (8, min(8, math.ceil((8 - kept) / max(Fraction(kept, 8), Fraction(1, 4)))))


def test_the_cap_holds_and_what_is_missing_is_filled_but_not_counted():
    made = sampler(lambda level: level == made.stream.order(0)[0], max_resample_batches=3)
    found = made.sample(4, seed=0)
    assert len(made.engine.calls) == 3
    assert (len(found.rows), found.fillers) == (4, 3)
    assert found.metrics["dynamic_sampling/missing_share"] == 0.75


def test_without_dynamic_sampling_one_draw_is_kept_whole():
    made = sampler(lambda level: False, dynamic_sampling=False)
    found = made.sample(4, seed=0)
    assert made.engine.calls == [4]
    assert found.fillers == 0


def of_processes(world: int, prompts_of_all: int, good: Any, **settings: Any) -> list[tuple[Sampler, list[Any]]]:
    """Two phases of `world` processes, which are threads here: by rank, its sampler and what it got."""
    barrier, records = Barrier(world, timeout=20), [[] for _ in range(world)]
    made = [sampler(good, **settings) for _ in range(world)]
    found: list[list[Any]] = [[] for _ in range(world)]

    def run(rank: int) -> None:
        def gather(own: list[Any]) -> list[Any]:
            barrier.wait()
            records[rank] = list(own)
            barrier.wait()
            return [record for part in records for record in part]

        made[rank].stream.rank, made[rank].stream.world = rank, world
        for phase in range(2):
            found[rank].append(made[rank].sample(prompts_of_all // world, phase, gather))

    threads = [Thread(target=run, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=40)
    assert not any(thread.is_alive() for thread in threads)
    return list(zip(made, found, strict=True))


@pytest.mark.parametrize(
    "good", [lambda level: level % 3 == 0, lambda level: level < 20, lambda level: level in (7, 25)]
)
def test_processes_keep_what_one_would(good: Any):
    """Prompts, completions, fillers, place in the stream and metrics, though a draw does not divide by the processes and is
    empty for some, and one has kept more than another."""
    ((alone, phases),) = of_processes(1, 6, good, max_resample_batches=4)
    assert len(alone.engine.calls) > 2
    for world in (2, 3, 6):
        several = of_processes(world, 6, good, max_resample_batches=4)
        calls = [made.engine.calls for made, _ in several]
        assert [sum(call) for call in zip(*calls, strict=True)] == alone.engine.calls
        assert {made.stream.position for made, _ in several} == {alone.stream.position}
        for phase, whole in enumerate(phases):
            parts = [found[phase] for _, found in several]
            dealt = [levels(part)[at] for at in range(6 // world) for part in parts]
            assert dealt == levels(whole)
            assert sum(part.fillers for part in parts) == whole.fillers
            assert all(part.rollouts.completion_ids[0][0] == part.rows[0]["prompt_ids"][0] for part in parts)
            for part in parts:
                measured = {name: value for name, value in part.metrics.items() if not name.startswith("perf/")}
                assert measured == pytest.approx({name: whole.metrics[name] for name in measured})
                assert set(part.metrics) == set(whole.metrics)


def test_metrics_of_several_draws():
    parts = [{"reward": 1.0, "completions/max_length": 5.0, "perf/rollout_seconds": 1.0}, {"reward": 0.0, "completions/max_length": 9.0,
             "perf/rollout_seconds": 2.0, "only": 3.0}]  # fmt: skip
    expected = {"reward": 0.75, "completions/max_length": 9.0, "perf/rollout_seconds": 3.0, "only": 3.0}
    assert pooled(parts, [3, 1]) == expected
    assert pooled(parts, [3, 1], at_once=True) == expected | {"perf/rollout_seconds": 1.25}


def test_spreads_are_about_the_mean_of_all():
    """Scores 1, 3 here and 5, 5, 7, 11 there: mean 32/6, squares 230/6, so that the variance is 89/9. Of a second reward the
    scores are 2, null and null, 4, 4, 10: mean 5, variance 9."""
    here = {"reward": 2.0, "reward_std": 1.0, "reward_null": 0.0,
            "rewards/b/mean": 2.0, "rewards/b/std": 0.0, "rewards/b/null": 0.5,
            "rewards/b/weighted/mean": 4.0, "rewards/b/weighted/std": 0.0}  # fmt: skip
    there = {"reward": 7.0, "reward_std": math.sqrt(6), "reward_null": 0.0,
             "rewards/b/mean": 6.0, "rewards/b/std": math.sqrt(8), "rewards/b/null": 0.25,
             "rewards/b/weighted/mean": 12.0, "rewards/b/weighted/std": 2 * math.sqrt(8)}  # fmt: skip
    found = pooled([here, there], [2, 4])
    assert found == pytest.approx({
        "reward": 32 / 6, "reward_std": math.sqrt(89) / 3, "reward_null": 0.0,
        "rewards/b/mean": 5.0, "rewards/b/std": 3.0, "rewards/b/null": 2 / 6,
        "rewards/b/weighted/mean": 10.0, "rewards/b/weighted/std": 6.0,
    })  # fmt: skip
    assert pooled([found, found], [1, 1], at_once=True) == pytest.approx(found)
    nulls = [{"reward": 2.0, "reward_std": 0.0, "reward_null": 0.5}, {"reward": 6.0, "reward_std": math.sqrt(8), "reward_null": 0.25}]  # fmt: skip
    assert pooled(nulls, [2, 4]) == pytest.approx({"reward": 5.0, "reward_std": 3.0, "reward_null": 2 / 6})


def test_a_process_may_have_no_prompt_in_a_draw():
    """The fourth draw is of 4 prompts for 6 processes."""
    several = of_processes(6, 6, lambda level: level % 3 == 0, max_resample_batches=4)
    assert [made.engine.calls[3] for made, _ in several] == [1, 1, 1, 1, 0, 0]


def test_lengths_by_hand():
    found = Rollouts([[1], [1, 2, 3], [1, 2]], None, [[0.0], [0.0] * 3, [0.0] * 2], [True, False, True])
    assert length_metrics(found) == pytest.approx({
        "completions/mean_length": 2, "completions/min_length": 1, "completions/max_length": 3, "completions/truncated_share": 1 / 3,
    })  # fmt: skip
    assert length_metrics(Rollouts([], None, [], [])) == {}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_draws_are_joined_without_log_probs_that_one_lacks(order: tuple[int, int]):
    drawn = [
        Scored([{"level": at}], Rollouts([[at]], known, [[-1.0]], [True]), torch.tensor([[float(at)]]), {})
        for at, known in enumerate(([[-2.0]], None))
    ]
    whole = joined([drawn[at] for at in order])
    assert (levels(whole), whole.rewards.flatten().tolist()) == (list(order), list(order))
    assert whole.rollouts == Rollouts([[at] for at in order], None, [[-1.0]] * 2, [True] * 2)
    assert joined([drawn[0]] * 2).rollouts.log_probs == [[-2.0]] * 2


# Rewards --------------------------------------------------------------------------------------------------------------


def test_rewards_see_what_was_asked_and_the_columns():
    rows = [
        {
            "prompt_ids": [5],
            "prompt_text": "<user>hi",
            "prompt_json": json.dumps([{"role": "user", "content": "hi"}]),
            "length": 1,
            "answer": "a",
        }
    ]
    tokenizer = tiny.tokenizer()
    ids = tokenizer("yes")["input_ids"]
    asked, said, columns, _ = reward_arguments(rows, [ids, [*ids, tokenizer.eos_token_id]], tokenizer, 2)
    assert asked == [[{"role": "user", "content": "hi"}]] * 2
    assert said == ["yes", "yes"]
    assert columns == {"answer": ["a", "a"]}


def test_held_out_prompts_by_hand():
    """Levels 0 to 4 in batches of 2: scores 1, 1/2, 1, 1/2, 1. Running means are those of the training alone."""

    def halves(level: int) -> float:
        return 1.0 if level % 2 == 0 else 0.5

    def level(level: int) -> float | None:
        return None if level == 4 else float(level)

    rewards = RewardSet([{"type": halves, "weight": 2.0}, {"type": level, "normalize": True}])
    shown: list[dict[str, Any]] = []
    recorder: Any = SimpleNamespace(sample=lambda step, sample: shown.append(sample))
    params = SamplingParams(max_new_tokens=2, temperature=0.0)
    held_out = HeldOut(prompts(5), Engine(), rewards, tiny.tokenizer(), params, recorder, batch_size=2)
    assert held_out(3) == pytest.approx({
        "reward": 1.6, "rewards/halves/mean": 0.8, "rewards/halves/accuracy": 0.6, "pass@1": 0.6, "rewards/level/mean": 1.5,
        "rewards/level/accuracy": 0.6, "completions/mean_length": 2, "completions/truncated_share": 0,
    })  # fmt: skip
    assert rewards.state_dict() == {"level": [0, 0, 0]}
    assert [sample["prompt"] for sample in shown] == ["p0", "p1"]


def test_a_missing_reward_leaves_its_group_alone():
    nan = float("nan")
    keep = algorithms.get("dapo").keep_groups
    rewards = torch.tensor([[1.0, nan, 0.0], [nan, 1.0, nan], [nan, nan, nan]])
    assert keep(rewards, tiny.settings_of("dapo")).tolist() == [True, False, False]
    alike = torch.cat([torch.rand(1000)[:, None].repeat(1, 7), torch.full((1000, 1), nan)], 1)
    assert not keep(alike, tiny.settings_of("dapo")).any(), "equal rewards and a missing one are no signal"
    assert not group_advantages(alike, "group").any()


# The rollout ----------------------------------------------------------------------------------------------------------


def rollout() -> Rollout:
    """Rows of 1, 3 and 2 tokens; the second carries no loss, the third is a filler."""
    mask = torch.tensor([[1, 0, 0], [0, 0, 0], [0, 0, 0]], dtype=torch.bool)
    counted = torch.tensor([True, True, False])
    return Rollout([[7], [7, 8], [9]], [[1], [1, 2, 3], [1, 2]], mask, counted, torch.zeros(3), torch.zeros(3, 3))


def test_what_the_losses_divide_by():
    counts = rollout().counts(torch.arange(3), 9)
    assert (counts.num_sequences, counts.num_tokens, counts.max_completion_length) == (2, 1, 9)


def test_rows_without_loss_are_not_run_but_one_row_stays():
    assert rollout().with_loss(torch.tensor([1, 0, 2])).tolist() == [0]
    assert rollout().with_loss(torch.tensor([1, 2])).tolist() == [2]  # the shorter of the two


def test_the_meter_knows_means_extremes_and_sums():
    meter = Meter()
    meter.add({"loss/policy": 1.0, "ratio_max": 1.0, "ratio_min": 0.5, "perf/rollout_seconds": 1.0})
    meter.add({"loss/policy": 2.0, "ratio_max": 3.0, "ratio_min": 0.7, "perf/rollout_seconds": 1.0, "kl": 4.0})
    assert meter.pop() == {
        "loss/policy": 1.5,
        "ratio_max": 3.0,
        "ratio_min": 0.5,
        "perf/rollout_seconds": 2.0,
        "kl": 4.0,
    }
    assert meter.pop() == {}


@pytest.mark.parametrize(("settings", "due"), [
    ({"interval_steps": 4}, [4, 8, 10]), ({"percent_of_max_steps": 0.5}, [5, 10]), ({"interval_steps": 4, "percent_of_max_steps": 0.5}, [4, 5, 8, 10]),
    ({}, list(range(1, 11))),
])  # fmt: skip
def test_when_samples_are_due(settings: dict[str, Any], due: list[int]):
    from aligntune.config.rl import SampleLoggingConfig

    config = SampleLoggingConfig(enabled=True, **settings)
    assert [step for step in range(1, 11) if is_due(config, step, 10)] == due
