"""The GRPO family on TRL and on our own trainer: the same run, and the same loss and gradients of TRL's own batches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import tiny
from aligntune.algorithms import base as algorithms
from aligntune.algorithms.batch import Normalizers, RolloutBatch
from aligntune.backends.select import choose
from aligntune.config.resolve import resolve
from aligntune.core.backend_factory import create_rl_trainer
from aligntune.models.forward import packed_log_probs
from aligntune.models.packed import PackedRows
from aligntune.reporting.text import is_timing

pytestmark = pytest.mark.adapter

FAMILY = {
    "grpo": {},
    "dapo": {"dynamic_sampling": False},
    "dr_grpo": {},
    "gspo": {"gspo_gamma": 3e-4, "gspo_delta": 4e-4},
}
SHARED = {
    "loss",
    "grad_norm",
    "reward",
    "kl",
    "entropy",
    "clip_fraction_low",
    "zero_variance_groups",
    "completions/mean_length",
    "num_tokens",
}
Run = Callable[..., Any]


def digits(completion: str) -> float:
    return sum(character.isdigit() for character in completion) / max(1, len(completion))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    tiny.write_model(tmp_path / "model")
    tiny.write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"say {word}", "answer": word} for word in tiny.WORDS])

    def make(algorithm: str, backend: str, out: str = "", **settings: Any) -> Any:
        given: dict[str, Any] = {
            "reward_functions": [digits], "precision": "fp32", "use_peft": False, "batch_size": 4, "gradient_accumulation_steps": 2,
            "learning_rate": 3e-3, "max_steps": 4, "logging_steps": 1, "max_completion_length": 6, "temperature": 0.9, "top_p": 1.0,
            "loggers": "none", "num_generations": 4, "kl_coef": 0.05, "backend": backend, "fallback": False,
            "mask_truncated_completions": False,
        }  # fmt: skip
        return create_rl_trainer(
            tmp_path / "model",
            tmp_path / "prompts.jsonl",
            algorithm,
            output_dir=tmp_path / (out or backend),
            **(given | settings),
        )

    return make


def metrics(session: Any, split: str = "train") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (session.directory.path / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == split]


def same_runs(run: Run, algorithm: str, **settings: Any) -> tuple[Any, Any]:
    """Train on both; every step's numbers agree (TRL averages token metrics over micro-batches, and Adam amplifies rounding)."""
    sessions = [run(algorithm, backend, **settings) for backend in ("native", "trl")]
    for session in sessions:
        session.train()
    ours, theirs = (metrics(session) for session in sessions)
    assert len(ours) == len(theirs) == 4
    assert {*ours[0]} & {*theirs[0]} >= SHARED
    for mine, yours in zip(ours, theirs, strict=True):
        for name in {*mine} & {*yours} - {"split", "num_tokens"}:  # TRL counts what it sampled, we what was trained
            if not is_timing(name):
                loose = 5e-2 if name in ("kl", "entropy", "clip_fraction_low", "clip_fraction_high") else 1e-3
                assert yours[name] == pytest.approx(mine[name], abs=1e-5, rel=loose), name
    return sessions[0], sessions[1]


@pytest.mark.parametrize("algorithm", FAMILY)
def test_the_same_run(run: Run, algorithm: str) -> None:
    ours, theirs = same_runs(run, algorithm, **FAMILY[algorithm])
    assert metrics(ours)[-1]["kl"] > 1e-5
    for mine, yours in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.allclose(mine, yours, atol=2e-4)


@pytest.mark.parametrize("algorithm", FAMILY)
def test_the_same_run_over_several_passes(run: Run, algorithm: str) -> None:
    """The second pass has ratios other than 1: clips bind on both."""
    ours, _ = same_runs(run, algorithm, num_ppo_epochs=2, **FAMILY[algorithm])
    assert metrics(ours)[1]["ratio_max"] > 1.001
    if algorithm == "gspo":
        assert metrics(ours)[1]["clip_fraction_low"] + metrics(ours)[1]["clip_fraction_high"] > 0


def test_the_same_run_with_lora(run: Run) -> None:
    _, theirs = same_runs(run, "grpo", use_peft=True)
    assert list(theirs.model.peft_config) == ["default"]  # TRL's reference adapter does not stay


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    {"mask_truncated_completions": True}, {"scale_rewards": "batch"}, {"loss_type": "dapo"}, {"group_by_length": False, "data_seed": 3},
    {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}, {"max_prompt_length": 9, "max_steps": 4},
    {"temperature": 0.7}, {"cliprange": 0.01, "cliprange_high": 0.02, "num_ppo_epochs": 2},
    {"rewards": [{"type": "length", "normalize": True, "clip": 1.0}], "reward_functions": None},
], ids=str)  # fmt: skip
def test_settings_mean_the_same(run: Run, settings: dict[str, Any]) -> None:
    if "rewards" in settings:
        settings = {**settings, "reward_functions": None}
    same_runs(run, "grpo", **settings)


@pytest.mark.parametrize("algorithm", FAMILY)
def test_the_same_loss_and_gradients_of_its_own_batches(
    run: Run, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's batches of four updates on each of two rollouts, so that all but the first are off-policy."""
    from aligntune.backends.trl.grpo import SessionGRPOTrainer

    session = run(algorithm, "trl", rollout_batch_size=4, num_ppo_epochs=2, max_steps=8, **FAMILY[algorithm])
    worst: list[tuple[float, float]] = []
    ratios: list[float] = []
    original = SessionGRPOTrainer.compute_loss

    def compare(trainer: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss = original(trainer, model, inputs, *args, **kwargs)
        batch = as_batch(model, inputs, session.sampling.temperature)
        ratios.append(float((batch.log_probs - batch.old_log_probs).detach()[batch.completion_mask].exp().max()))
        ours = algorithms.get(algorithm).loss(batch, session.config.train, counts(trainer, session, inputs)).value
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        theirs = torch.autograd.grad(loss, parameters, retain_graph=True)
        mine = torch.autograd.grad(ours, parameters)
        difference = max(float((one - other).abs().max()) for one, other in zip(theirs, mine, strict=True))
        worst.append((abs(float(loss.detach() - ours.detach())), difference))
        return loss

    monkeypatch.setattr(SessionGRPOTrainer, "compute_loss", compare)
    session.train()
    assert len(worst) == 16  # two micro-batches a step
    assert max(ratios) > 1.01
    assert max(value for value, _ in worst) < 1e-5
    assert max(gradient for _, gradient in worst) < 1e-5


def as_batch(model: Any, inputs: dict[str, Any], temperature: float) -> RolloutBatch:
    """TRL's padded batch as ours, with our own log-probabilities."""
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True)]
    completions = [
        ids[mask.bool()].tolist() for ids, mask in zip(inputs["completion_ids"], inputs["completion_mask"], strict=True)
    ]
    rows = PackedRows.from_completions(prompts, completions)
    found = packed_log_probs(model, rows, temperature=temperature)
    log_probs = rows.padded(found.log_probs)
    width = log_probs.shape[1]
    return RolloutBatch(
        log_probs, inputs["old_per_token_logps"][:, :width], inputs["completion_mask"][:, :width], inputs["advantages"],
        inputs["ref_per_token_logps"][:, :width],
    )  # fmt: skip


def counts(trainer: Any, session: Any, inputs: dict[str, Any]) -> Normalizers:
    """What TRL divides by: token counts are those of the whole rollout, shared out evenly over its steps."""
    plan = session.plan
    tokens = inputs["num_items_in_batch"] * plan.accumulation / trainer.args.steps_per_generation
    return Normalizers(plan.step, tokens, session.config.train.max_completion_length)


@pytest.mark.parametrize(("wrote", "reads"), [("trl", "trl"), ("trl", "native"), ("native", "trl")])
@pytest.mark.parametrize("settings", [
    {"rewards": [{"type": "length", "normalize": True}], "reward_functions": None},
    {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5},
], ids=["running means", "a reference that moves"])  # fmt: skip
def test_resume_continues_what_either_backend_wrote(
    run: Run, tmp_path: Path, settings: dict[str, Any], wrote: str, reads: str
) -> None:
    """The order of prompts, running means of rewards, and the reference."""
    run("grpo", wrote, out="cut", save_interval=1, **settings).train()
    again = run("grpo", reads, out="cut", save_interval=1, **settings)
    whole = metrics(again)
    again.train(resume=str(tmp_path / "cut" / "checkpoints" / "checkpoint-2"))
    assert len(whole) == len(metrics(again)) == 4
    near = 1e-6 if wrote == reads else 1e-5
    for expected, found in zip(whole, metrics(again), strict=True):
        assert found["reward"] == pytest.approx(expected["reward"], abs=near)
        assert found["loss"] == pytest.approx(expected["loss"], abs=near)


def test_evaluation_is_ours(run: Run, tmp_path: Path) -> None:
    settings = {"eval_dataset": str(tmp_path / "prompts.jsonl"), "eval_strategy": "steps", "eval_interval": 2}
    sessions = [run("grpo", backend, **settings) for backend in ("native", "trl")]
    results = [session.train() for session in sessions]
    names = [name for name in results[0] if name.startswith("eval_")]
    assert "eval_pass@1" in names
    for name in names:
        assert results[1][name] == pytest.approx(results[0][name], abs=1e-6), name
    assert [row["step"] for row in metrics(sessions[1], "eval")] == [0, 2, 4]


def test_a_policy_changed_in_memory_has_the_right_reference(run: Run, tmp_path: Path) -> None:
    """TRL reads its reference from the folder the policy came from, which lacks the merged adapter: its KL would not start at 0."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    peft = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(3))
    peft.save_pretrained(tmp_path / "sft")
    session = run("grpo", "trl", sft_path=str(tmp_path / "sft"), pad_token="<|new|>")
    session.train()
    assert metrics(session)[0]["kl"] == pytest.approx(0, abs=1e-7)


def test_a_policy_whose_head_was_untied_has_the_right_reference(run: Run, tmp_path: Path) -> None:
    """An adapter of the embedding, merged: the folder that TRL reads the reference from has one weight for both."""
    config = LoraConfig(r=2, target_modules=["embed_tokens"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), config).save_pretrained(tmp_path / "sft")
    session = run("grpo", "trl", sft_path=str(tmp_path / "sft"), max_steps=1)
    session.train()
    assert metrics(session)[0]["kl"] == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(("algorithm", "train", "reason"), [
    ("ppo", {}, "PPO left TRL"), ("neural_mirror_grpo", {}, "no neural_mirror_grpo"), ("dapo", {}, "dynamic_sampling"),
    ("dapo", {"dynamic_sampling": False, "overlong_buffer": 4}, "overlong"), ("grpo", {"kl_estimator": "k2"}, "k3 only"),
    ("grpo", {"grpo_alpha": 0.01}, "grpo_alpha"), ("grpo", {"padding_free": True}, "padding_free"), ("grpo", {"stop_token": "x"}, "stop_token"),
    ("grpo", {"sync_ref_model": True}, "sync_ref_model with LoRA"),
], ids=str)  # fmt: skip
def test_what_trl_cannot_express_runs_native(algorithm: str, train: dict[str, Any], reason: str) -> None:
    tree = {
        "algorithm": algorithm,
        "backend": "trl",
        "model": {"name_or_path": "m"},
        "dataset": {"name": "d"},
        "train": train,
        "rewards": [{"type": "length"}],
    }
    backend, reasons = choose(resolve(tree).config)
    assert backend.name == "native"
    assert any(line.startswith("trl: ") and reason in line for line in reasons)


def test_the_rest_of_the_family_runs_on_trl() -> None:
    for algorithm, train in FAMILY.items():
        tree = {
            "algorithm": algorithm,
            "backend": "trl",
            "model": {"name_or_path": "m"},
            "dataset": {"name": "d"},
            "train": train,
            "rewards": [{"type": "length"}],
        }
        assert choose(resolve(tree).config)[0].name == "trl"
