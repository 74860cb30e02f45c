"""Meta-ES as a run: exact resume with one and two processes, bit for bit; what fails; what is refused; what it leaves behind."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from es_helpers import TWO, Evolve, killed_after, same_runs, state, weights
from es_rewards import digits, letters, longer

from aligntune.algorithms.mirror_map import SIZE, MirrorMap
from aligntune.errors import ConfigError, RewardError
from aligntune.rewards import RewardSet
from aligntune.rewards.evolved import UNIT, RewardGenes


def test_killed_and_resumed_equals_uninterrupted(
    evolve: Evolve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evolve("whole").train()
    killed_after(evolve("cut"), 1, monkeypatch)
    assert len(state(tmp_path / "cut")["history"]) == 1
    assert any(state(tmp_path / "cut")["state"]["center"])  # the first step has moved the weights
    evolve("cut").train(resume="auto")
    same_runs(tmp_path / "whole", tmp_path / "cut")


def test_the_final_training_resumes_with_what_evolved(evolve: Evolve, tmp_path: Path) -> None:
    settings = {
        "init_scale": 0.02,
        "meta_iterations": 1,
        "T": 1,
        "max_steps": 3,
        "save_strategy": "steps",
        "save_interval": 1,
    }
    evolve("whole", **settings).train()
    evolve("cut", **settings).train()
    again = evolve("cut", **settings)
    again.train(resume=str(tmp_path / "cut" / "checkpoints" / "checkpoint-2"))
    same_runs(tmp_path / "whole", tmp_path / "cut")
    assert {entry.name: entry.weight for entry in again.rewards.entries} != {
        "letters": 0.0,
        "digits": 0.5,
        "longer": 2.0,
    }


def test_the_evolution_of_another_run_goes_on(evolve: Evolve, tmp_path: Path) -> None:
    evolve("whole").train()
    evolve("short", meta_iterations=1).train()
    evolve("long", resume=str(tmp_path / "short")).train()
    assert state(tmp_path / "long") == state(tmp_path / "whole")
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "long")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_state_of_another_config_is_refused(evolve: Evolve, tmp_path: Path) -> None:
    evolve("old", meta_iterations=1, T=1).train()
    for changed, message in (
        ({"T": 3}, r"train\.T \(saved 1, now 3\)"),
        ({"learning_rate": 1e-4}, "train.learning_rate"),
        ({"rewards": [TWO[0], {"type": longer, "weight": 1.0}]}, "rewards"),
        ({"max_samples": 9}, "prompts"),
    ):
        with pytest.raises(ConfigError, match=f"another config.*{message}.*without resume"):
            evolve("new", resume=str(tmp_path / "old"), **({"T": 1} | changed)).train(overwrite=True)


def test_a_missing_state_is_named(evolve: Evolve, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no .*give the folder of a Meta-ES run"):
        evolve(resume=str(tmp_path / "nowhere")).train()


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_a_file_that_holds_no_state_is_named(evolve: Evolve, tmp_path: Path, content: str) -> None:
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(ConfigError, match=r"state.json: is .*evolution.json"):
        evolve(resume=str(tmp_path / "state.json")).train()


def test_a_finished_evolution_is_not_replaced_unasked(evolve: Evolve) -> None:
    evolve(meta_iterations=1, T=1).train()
    with pytest.raises(ConfigError, match="already holds a run"):
        evolve().train()


def test_candidates_start_from_the_same_weights(evolve: Evolve) -> None:
    """A candidate measured again, after another one, gives the same; and the policy is as it was."""
    session = evolve(T=3)
    before = {name: weight.clone() for name, weight in session.model.named_parameters()}
    start = session.genome.start()
    first = session.candidates(start, 5)
    other = session.candidates(start + UNIT, 5)
    again = session.candidates(start, 5)
    assert first.fitness == again.fitness
    assert first.reward == again.reward
    assert other.reward != first.reward
    assert all(torch.equal(before[name], weight) for name, weight in session.model.named_parameters())
    assert session.candidates(start, 6).reward != first.reward  # the seed decides the prompts and the answers


def test_a_candidate_trains_as_a_run_with_its_weights(evolve: Evolve, run: Callable[..., Any], tmp_path: Path) -> None:
    """The fitness of a centre is what a Neural Mirror GRPO run of these weights, prompts and seeds gets."""
    session = evolve(T=3)
    theta = session.genome.start() + torch.tensor([math.log(3.0), 0.0], dtype=torch.float64) * UNIT
    outcome = session.candidates(theta, 9)
    other = evolve("plain", T=3, rewards=[{"type": digits, "weight": 1.5}, {"type": longer, "weight": 2.0}])
    assert other.candidates(other.genome.start(), 9).reward == pytest.approx(outcome.reward, rel=1e-12)
    assert other.candidates(other.genome.start(), 9).fitness == outcome.fitness


def test_failed_candidates_drop_their_pair(evolve: Evolve, tmp_path: Path) -> None:
    """A limit far from its start breaks one candidate of a pair; the pairs nearer to it go on."""
    rewards = [{"type": "es_rewards:breaks", "params": {"limit": 1.0}}, {"type": longer, "weight": 2.0}]
    session = evolve(rewards=rewards, evolved_params={"breaks.limit": [0.5, 1.5]}, N=8, T=1, meta_iterations=1)
    session.train()
    record = state(tmp_path / "out")["history"][0]
    assert 0 < record["candidates/failed"] < 4
    assert "is too high" in (tmp_path / "out" / "report.html").read_text()


def test_all_failed(evolve: Evolve) -> None:
    broken = [{"type": digits}, {"type": "es_rewards:broken"}]
    with pytest.raises(
        RewardError, match=r"(?s)generation 0: every candidate pair.*fewer training steps.*no score today"
    ):
        evolve(rewards=broken).train()


def test_candidates_that_the_verifier_cannot_tell_apart(evolve: Evolve, tmp_path: Path) -> None:
    evolve(verifier="es_rewards:never", N=2, T=1, meta_iterations=1).train()
    told = (tmp_path / "out" / "report.html").read_text()
    assert "generation 0: all 2 candidates have the fitness 0, so nothing is learnt" in told
    assert "generation 1: all" not in told  # the last one measures its centre alone


def test_what_a_run_leaves_behind(evolve: Evolve, tmp_path: Path) -> None:
    session = evolve(target="both", mirror_coefficient=1.0, debug_mode=True, N=2, meta_iterations=1, loggers="none")
    session.train()
    folder = tmp_path / "out"
    records = [json.loads(line) for line in (folder / "evolution.jsonl").read_text().splitlines()]
    assert [record["generation"] for record in records] == [0, 1]
    assert [record["cost/trainings"] for record in records] == [3, 1]
    assert records[0]["cost/steps"] == 6
    assert records[0]["numbers"]["digits.weight"] == 0.5
    candidates = [json.loads(line) for line in (folder / "candidates.jsonl").read_text().splitlines()]
    assert [(line["generation"], line["candidate"]) for line in candidates] == [(0, -1), (0, 0), (0, 1), (1, -1)]
    assert all(len(line["log"]) == 2 and len(line["theta"]) == 2 + SIZE for line in candidates)
    best = torch.tensor(json.loads((folder / "evolution.json").read_text())["state"]["best"], dtype=torch.float64)
    assert torch.equal(MirrorMap.load(folder / "mirror_map.json").phi, MirrorMap.from_unconstrained(best[2:]).phi)
    entries = {entry.name: entry.weight for entry in session.rewards.entries}
    evolved = session.genome.numbers(best)  # the final training's rewards are the best centre's
    assert entries == {"letters": 0.0, "digits": evolved["digits.weight"], "longer": evolved["longer.weight"]}
    page = (folder / "report.html").read_text()
    for title in (
        "Fitness by generation",
        "What evolved",
        "Cost of the evolution",
        "Evolved: Mirror map",
        "Divergence of policy p",
    ):
        assert title in page


# Prompts and fitness --------------------------------------------------------------------------------------------------


def test_no_prompt_is_trained_on_and_judged(evolve: Evolve) -> None:
    session = evolve(fitness_share=0.25)
    trained, judged = (set(rows["prompt_text"]) for rows in (session.train_rows, session.fitness_rows))
    assert len(judged) == 4
    assert len(trained) == 12
    assert not trained & judged


def test_fitness_is_the_verifiers_mean(evolve: Evolve) -> None:
    """By hand: greedy answers of the model to the fitness prompts, scored one by one."""
    session = evolve(eval_max_tokens=4)
    found = session.engine.generate([row["prompt_ids"] for row in session.fitness_rows], session.fitness.params)
    texts = session.tokenizer.batch_decode(found.completion_ids, skip_special_tokens=True)
    assert session.fitness(0) == pytest.approx(sum(map(letters, texts)) / len(texts))
    assert {len(ids) for ids in found.completion_ids} <= {1, 2, 3, 4}


def test_the_verifier_is_measured_and_has_no_part_in_the_reward(evolve: Evolve) -> None:
    session = evolve()
    assert {entry.name: entry.weight for entry in session.rewards.entries} == {
        "letters": 0.0,
        "digits": 0.5,
        "longer": 2.0,
    }
    assert session.genome.genes.genes[0].name == "digits.weight"


def test_a_configured_reward_as_verifier_gives_its_params(evolve: Evolve) -> None:
    rewards = [{"type": longer}, {"type": digits, "params": {"scale": 0.5}}]
    session = evolve(rewards=rewards, verifier=digits)
    assert session.verifier.entries[0].caller.params == {"scale": 0.5}
    assert session.verifier.entries[0].weight == 1.0
    assert [entry.name for entry in session.rewards.entries] == ["digits", "longer"]  # first: pass@1 is the verifier's


# Genes ----------------------------------------------------------------------------------------------------------------


def test_genes_by_hand() -> None:
    rewards = RewardSet(
        [{"type": digits, "weight": 0.5, "params": {"scale": 0.25, "least": 2}}, {"type": longer, "weight": 2.0}]
    )
    genes = RewardGenes(rewards, {"digits.scale": [0.0, 1.0], "digits.least": [0.0, 4.0]})
    assert genes.values([0.0] * 4) == {
        "digits.weight": 0.5,
        "longer.weight": 2.0,
        "digits.scale": 0.25,
        "digits.least": 2,
    }
    moved = genes.values([UNIT, -UNIT, UNIT * math.log(3.0), UNIT * math.log(3.0)])
    assert moved["digits.weight"] == pytest.approx(0.5 * math.e)
    assert moved["longer.weight"] == pytest.approx(2.0 / math.e)
    assert moved["digits.scale"] == pytest.approx(0.5)  # odds 1/3 times 3
    assert moved["digits.least"] == 3  # a whole number stays one: odds 1 times 3 of [0, 4]
    made = genes.express(rewards, [UNIT, -UNIT, UNIT * math.log(3.0), 0.0])
    assert made.entries[0].caller.params == {"scale": pytest.approx(0.5), "least": 2}
    assert rewards.entries[0].caller.params == {"scale": 0.25, "least": 2}
    assert made.score([""], ["12ab"]).total[0] == pytest.approx(0.5 * math.e * 0.5 * 0.5 + 2.0 / math.e * 0.8)
    assert all(math.isfinite(value) and value > 0 for value in genes.values([1e9, -1e9, 0, 0]).values())


@pytest.mark.parametrize(("params", "message"), [
    ({"digit.scale": [0, 1]}, "REWARD.PARAM with one of the rewards digits, longer"), ({"digits.skale": [0, 1]}, "takes scale, least"),
    ({"digits.scale": [2.0, 3.0]}, "starts outside at 1"), ({"longer.scale": [0, 1]}, "takes none"),
    ({"digits.scale": [0.0, math.inf]}, "must be finite"),
])  # fmt: skip
def test_genes_refused(params: dict[str, list[float]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RewardGenes(RewardSet([digits, longer]), params)


@pytest.mark.parametrize(("settings", "message"), [
    ({"verifier": None}, "verifier: is unset: name the reward"), ({"N": 5}, "must be even"),
    ({"target": "mirror"}, "mirror_coefficient: is 0"), ({"target": "both", "mirror_coefficient": 1.0, "mirror_map": "kl"}, "evolves the neural map"),
    ({"target": "mirror", "mirror_coefficient": 1.0, "evolved_params": {"digits.scale": [0.0, 2.0]}}, "needs target: rewards, or both"),
    ({"eval_temperature": 0.5}, "eval_k above 1"), ({"launch": {"launcher": "torchrun"}}, "num_workers"),
    ({"rewards": [{"type": digits}]}, "second reward"), ({"rewards": [{"type": digits}, {"type": longer, "weight": 0.0}]}, "second reward"),
    ({"eval_timeout": 3}, "letters has no time limit"), ({"verifier": digits, "rewards": TWO, "evolved_params": {"digits.scale": [0.0, 2.0]}}, "does not evolve"),
])  # fmt: skip
def test_refused(evolve: Evolve, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evolve(**settings).train_rows  # noqa: B018
