"""References, reward models, value models and starts: each acts as its setting says."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from online_helpers import digits, lines, trained
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import tiny
from aligntune.config.best_metric import OF_ONE_REWARD, ONLINE_METRICS
from aligntune.errors import AlignTuneError, MissingExtra, ModelError
from aligntune.rewards import RewardSet
from aligntune.rewards.model import load
from aligntune.trainers import online_state
from aligntune.trainers.online_trainer import OnlineTrainer

Run = Callable[..., Any]


def column(found: list[dict[str, Any]], name: str) -> list[float]:
    return [row[name] for row in found if name in row]


# References -----------------------------------------------------------------------------------------------------------


def test_every_kind_of_reference_is_the_start(run: Run) -> None:
    """A disabled adapter, a frozen copy and a named adapter start as the policy and stay, so that they give the same run."""
    lora = {"use_peft": True, "learning_rate": 1e-2, "max_steps": 5, "kl_coef": 0.1}
    kinds = {
        "disabled": {}, "copy": {"force_use_ref_model": True}, "loaded": {"ref_model_init_kwargs": {"low_cpu_mem_usage": True}},
        "named": {"ref_adapter_name": "anchor", "model_adapter_name": "learner"},
    }  # fmt: skip
    kl = {name: column(trained(run(out=name, **lora, **settings)), "kl") for name, settings in kinds.items()}
    assert kl["disabled"][0] == pytest.approx(0, abs=1e-7)
    assert kl["disabled"][-1] > 1e-5
    for name in ("copy", "loaded", "named"):
        assert kl[name] == pytest.approx(kl["disabled"], abs=1e-6), name


def test_named_adapters_are_trained_and_kept(files: Path, run: Run) -> None:
    session = run(use_peft=True, model_adapter_name="learner", ref_adapter_name="anchor", kl_coef=0.1)
    session.train()
    assert session.model.active_adapter == "learner"
    weights = dict(session.model.named_parameters())
    moved = {name: bool(weights[name].abs().sum() > 0) for name in weights if "lora_B" in name}
    assert all(value == (".learner." in name) for name, value in moved.items())  # B starts at zero
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(files / "model"), session.directory.model)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.allclose(again(ids).logits, session.model.eval()(ids).logits, atol=1e-6)


def test_named_adapters_are_read_from_their_folders(files: Path, tmp_path: Path, run: Run) -> None:
    base = AutoModelForCausalLM.from_pretrained(files / "model")
    peft = get_peft_model(
        base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"), adapter_name="anchor"
    )
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))
    peft.save_pretrained(tmp_path / "adapters")
    session = run(use_peft=True, sft_path=str(tmp_path / "adapters"), ref_adapter_name="anchor", kl_coef=0.1)
    first = trained(session)[0]
    assert first["kl"] > 1e-5  # the policy starts at the base, the reference elsewhere
    assert session.model.peft_config["anchor"].r == 2


@pytest.mark.parametrize("use_peft", [False, True])
def test_a_synchronised_reference_follows_the_policy(run: Run, use_peft: bool) -> None:
    """alpha 1 after every step: the reference is the policy before the step, whose KL is 0 again."""
    settings = {"use_peft": use_peft, "learning_rate": 1e-2, "kl_coef": 0.1, "max_steps": 4}
    still = column(trained(run(out="still", **settings)), "kl")
    moving = trained(
        run(out="moving", sync_ref_model=True, ref_model_mixup_alpha=1.0, ref_model_sync_steps=1, **settings)
    )
    assert still[-1] > 1e-5
    assert column(moving, "kl") == pytest.approx([0] * 4, abs=1e-7)


def test_a_moved_reference_survives_a_restart(tmp_path: Path, run: Run) -> None:
    settings = {"learning_rate": 1e-2, "kl_coef": 0.1, "max_steps": 6, "save_interval": 1, "sync_ref_model": True,
                "ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 2}  # fmt: skip
    whole = trained(run(out="whole", **settings))
    run(out="cut", **settings).train()
    run(out="cut", **settings).train(resume=str(tmp_path / "cut" / "checkpoints" / "checkpoint-3"))
    assert lines(tmp_path / "cut") == whole


@pytest.mark.parametrize(("world", "tokens"), [(2, [100, 0]), (4, [10, 20, 30, 40]), (6, [100, 0, 0, 0, 0, 0])])
def test_ranks_of_another_number_all_draw_anew(tmp_path: Path, world: int, tokens: list[int]) -> None:
    """Four processes wrote; a rank that finds a file of its number must not go on in its rollout while others begin one."""
    for rank in range(4):
        state = {"phase": 3, "done": 1, "order": torch.arange(2), "position": 24, "tokens": 10 * (rank + 1), "rewards": {},
                 "rollout": dict.fromkeys(("prompt_ids", "completion_ids", "loss_mask", "counted", "advantages", "sampler_log_probs"))}  # fmt: skip
        torch.save(state, tmp_path / f"{rank}.{online_state.STATE}")
    found = []
    for rank in range(world):
        sampler = SimpleNamespace(stream=SimpleNamespace(position=0), rewards=RewardSet(["length"]))
        trainer: Any = SimpleNamespace(args=SimpleNamespace(world_size=world, process_index=rank), sampler=sampler, rollout=None,
                                       done=0, critic=None, critic_updates=None, reference=None)  # fmt: skip
        online_state.restore(trainer, tmp_path)
        found.append(trainer)
    assert [trainer.tokens for trainer in found] == tokens
    assert {(trainer.phase, trainer.sampler.stream.position) for trainer in found} == {(3, 24)}
    assert {trainer.done for trainer in found} == {1 if world == 4 else 0}
    assert {trainer.rollout is None for trainer in found} == {world != 4}


# Start ----------------------------------------------------------------------------------------------------------------


def test_sft_path_is_where_policy_and_reference_start(tmp_path: Path, run: Run) -> None:
    tiny.write_model(tmp_path / "sft", seed=5)
    for use_peft in (False, True):
        session = run(
            out=f"out{use_peft}",
            sft_path=str(tmp_path / "sft"),
            use_peft=use_peft,
            kl_coef=0.1,
            force_use_ref_model=use_peft,
        )
        weights = [
            value for name, value in session.model.state_dict().items() if "q_proj" in name and "lora" not in name
        ]
        start = [value for name, value in tiny.model(5).state_dict().items() if "q_proj" in name]
        assert all(torch.equal(*pair) for pair in zip(weights, start, strict=True))
        assert trained(session)[0]["kl"] == pytest.approx(0, abs=1e-7)


def test_sft_path_may_be_an_adapter_of_another_place(files: Path, tmp_path: Path, run: Run) -> None:
    """Its recorded base is gone: name_or_path is the base."""
    gone = tiny.write_model(tmp_path / "gone")
    peft = get_peft_model(
        AutoModelForCausalLM.from_pretrained(gone), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))
    peft.save_pretrained(tmp_path / "sft")
    gone.rename(tmp_path / "elsewhere")
    session = run(sft_path=str(tmp_path / "sft"), kl_coef=0.1)
    assert not torch.equal(
        session.model.model.layers[0].self_attn.q_proj.weight, tiny.model().model.layers[0].self_attn.q_proj.weight
    )
    assert trained(session)[0]["kl"] == pytest.approx(0, abs=1e-7)


# Reward models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
@pytest.mark.parametrize("setting", ["reward_path", "reward_model_name", "reward_model_source"])
def test_a_reward_model_alone(files: Path, run: Run, algorithm: str, setting: str) -> None:
    folder = str(files / "reward")
    value = {"source_type": "pretrained_local", "model_path": folder} if setting == "reward_model_source" else folder
    session = run(algorithm, reward_functions=None, **{setting: value}, kl_coef=0.0, max_steps=1)
    found = trained(session)[0]
    assert found["reward"] == pytest.approx(found["rewards/reward_model/mean"])
    # the same number, computed beside the run from what the run sampled
    rollout = session.trainer.rollout
    texts = session.tokenizer.batch_decode(rollout.completion_ids, skip_special_tokens=True)
    asked = [session.tokenizer.decode(ids) for ids in rollout.prompt_ids]
    questions = [[{"role": "user", "content": text.split("user\n")[1].split("<|im_end|>")[0]}] for text in asked]
    scores = load(folder)(questions, texts)
    assert found["reward"] == pytest.approx(sum(scores) / len(scores), rel=1e-5)


def test_functions_and_a_model_are_summed_by_weight(files: Path, run: Run) -> None:
    found = trained(
        run(reward_functions=[digits], reward_function_weights=[3.0], reward_path=str(files / "reward"), max_steps=1)
    )[0]
    assert found["reward"] == pytest.approx(
        3 * found["rewards/digits/mean"] + found["rewards/reward_model/mean"], abs=1e-6
    )
    other = trained(
        run(reward_functions=[digits], reward_weights=[5.0], reward_path=str(files / "reward"), max_steps=1)
    )[0]
    assert other["reward"] == pytest.approx(
        5 * other["rewards/digits/mean"] + other["rewards/reward_model/mean"], abs=1e-6
    )


def test_a_reward_of_none_leaves_its_completion_out(run: Run) -> None:
    def sometimes(completion: str) -> float | None:
        return None if "a" <= completion[:1] <= "z" else digits(completion)

    found = trained(run(reward_functions=[sometimes], max_steps=3))
    assert all(row["loss"] == row["loss"] for row in found)  # no NaN
    assert max(column(found, "reward_null")) > 0
    nothing = trained(run(out="nothing", reward_functions=[never], kl_coef=0.1, max_steps=2))
    assert all(row["loss"] == row["grad_norm"] == 0 for row in nothing)


@pytest.mark.parametrize(
    ("algorithm", "reward", "message"),
    [("grpo", "never", "has the reward None"), ("dapo", "constant", "score the same")],
)
def test_why_nothing_carries_loss(
    run: Run, capsys: pytest.CaptureFixture[str], algorithm: str, reward: str, message: str
) -> None:
    trained(run(algorithm, reward_functions=[globals()[reward]], max_steps=1, max_completion_length=2))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "none carries loss" in line]
    assert message in line


def never(completion: str) -> float | None:
    return None


def test_dropout_acts_in_the_update_alone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampled and old log-probabilities are those of the model that is saved, in every phase."""
    seen: list[tuple[str, bool]] = []

    def watch(name: str) -> None:
        plain = getattr(OnlineTrainer, name)

        def watched(self: Any, *given: Any, **named: Any) -> Any:
            seen.append((name, self.model.training))
            return plain(self, *given, **named)

        monkeypatch.setattr(OnlineTrainer, name, watched)

    for name in ("_rollout", "_measure", "loss_of"):
        watch(name)
    run(use_peft=True, disable_dropout=False, lora_dropout=0.5, max_steps=2, kl_coef=0.1).train()
    assert seen == [("_rollout", False), ("_measure", False), ("loss_of", True)] * 2


def test_equal_rewards_move_nothing(run: Run) -> None:
    found = trained(run(reward_functions=[constant], kl_coef=0.0))
    assert all(row["grad_norm"] == 0 and row["zero_variance_groups"] == 1 for row in found)


def test_an_entropy_bonus_moves_what_equal_rewards_do_not(run: Run) -> None:
    found = trained(run(reward_functions=[constant], kl_coef=0.0, grpo_alpha=0.1, max_steps=1))[0]
    assert found["grad_norm"] > 0


def constant(completion: str) -> float:
    return 0.25


@pytest.mark.parametrize(
    "settings", [{}, {"generation_kwargs": {"no_repeat_ngram_size": 9}}], ids=["graph", "transformers"]
)
def test_a_policy_that_has_diverged_is_an_error(run: Run, settings: dict[str, Any]) -> None:
    session = run(**settings)
    torch.nn.init.constant_(session.model.get_input_embeddings().weight, float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        session.train()


# Value models ---------------------------------------------------------------------------------------------------------


def test_a_value_model_learns_beside_the_policy(tmp_path: Path, run: Run) -> None:
    tiny.write_model(tmp_path / "critic", seed=3)
    session = run("ppo", reward_value_model=str(tmp_path / "critic"), kl_coef=0.0, max_steps=6)
    found = trained(session)
    fresh = tiny.model(3)
    assert any(
        not torch.equal(*pair)
        for pair in zip(session.trainer.critic.trunk.parameters(), fresh.parameters(), strict=True)
    )
    assert column(found, "value_error")[3] < column(found, "value_error")[0]  # within the first phase's passes


def test_a_value_model_with_other_tokens_is_refused(tmp_path: Path, run: Run) -> None:
    tiny.write_model(tmp_path / "critic", vocab_size=260)
    other = tiny.tokenizer()
    other.add_tokens(["<new>"])
    other.save_pretrained(tmp_path / "critic")
    with pytest.raises(ModelError, match="another tokenizer"):
        run("ppo", reward_value_model=str(tmp_path / "critic")).train()


# Batches --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "gspo"])
def test_padding_changes_nothing(run: Run, algorithm: str) -> None:
    """Rows without padding, and the same rows padded on the right to the longest of the batch."""
    settings = {"kl_coef": 0.1, "num_ppo_epochs": 2, "max_completion_length": 9}
    packed, padded = (
        trained(run(algorithm, out="a", **settings)),
        run(algorithm, out="b", padding_free=False, **settings),
    )
    shapes: list[tuple[int, ...]] = []
    padded.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    found = trained(padded)
    assert max(rows for rows, _ in shapes) == 8
    for name in ("loss", "grad_norm", "reward", "kl", "entropy", "ratio_max"):
        assert column(found, name) == pytest.approx(column(packed, name), abs=2e-5), name


def test_a_model_that_cannot_be_packed_is_padded_by_itself(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aligntune.trainers.online.check_packed", lambda model: "its layers leak")
    session = run(max_steps=1)
    assert trained(session)[0]["ratio_max"] == pytest.approx(1)
    with pytest.raises(ModelError, match="its layers leak"):
        run(out="b", padding_free=True).train()


def test_truncated_completions_are_not_run_in_the_update(run: Run) -> None:
    """Nothing ends within 2 tokens but by chance: the update then reads one short row in place of eight."""
    masked, whole = (
        trained(run(out=str(on), mask_truncated_completions=on, max_completion_length=2, kl_coef=0.0, max_steps=1))[0]
        for on in (True, False)
    )
    assert masked["completions/truncated_share"] == whole["completions/truncated_share"] == 1
    assert masked["num_tokens"] < whole["num_tokens"] / 4


def test_completions_are_punished_by_the_length_that_the_loss_does_not_see(run: Run) -> None:
    """Truncated ones carry no loss, and are 2 tokens long all the same: the limit."""
    settings = {"overlong_buffer": 1, "dynamic_sampling": False, "max_completion_length": 2, "kl_coef": 0.0, "max_steps": 1}  # fmt: skip
    (found,) = trained(run("dapo", mask_truncated_completions=True, **settings))
    assert found["completions/truncated_share"] == 1
    assert found["overlong_punishment"] == -1


def test_one_warning_when_everything_is_truncated(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    found = trained(run(mask_truncated_completions=True, max_completion_length=1, max_steps=3))
    assert all(row["loss"] == row["grad_norm"] == 0 for row in found)
    assert not any("advantages/std" in row for row in found), "none reaches the loss"
    assert capsys.readouterr().out.count("every completion of a rollout was truncated") == 1


# Schedules ------------------------------------------------------------------------------------------------------------


def test_strategies_by_epoch(files: Path, tmp_path: Path, run: Run) -> None:
    """16 prompts, 4 a phase: an epoch is 4 steps."""
    run(
        batch_size=16, max_steps=None, epochs=2, eval_strategy="epoch", save_strategy="epoch", logging_strategy="epoch",
        eval_dataset=str(files / "prompts.jsonl"),
    ).train()  # fmt: skip
    assert [row["step"] for row in lines(tmp_path / "out", "eval")] == [0, 4, 8]
    assert [(row["step"], row["epoch"]) for row in lines(tmp_path / "out")] == [(4, 1.0), (8, 2.0)]
    assert sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir()) == [
        "checkpoint-4",
        "checkpoint-8",
    ]


def test_the_best_weights_are_kept_by_the_held_out_reward(files: Path, run: Run) -> None:
    session = run(
        eval_dataset=str(files / "prompts.jsonl"), eval_strategy="steps", eval_interval=1, save_interval=1, load_best_model_at_end=True,
        max_steps=3, learning_rate=3e-2,
    )  # fmt: skip
    session.train()
    rewards = {row["step"]: row["reward"] for row in lines(session.directory.path, "eval") if row["step"] > 0}
    best = max(rewards, key=lambda step: (rewards[step], -step))
    assert session.trainer.state.best_global_step == best
    assert session.trainer.args.metric_for_best_model == "eval_reward"
    given = {name.removeprefix("eval_") for name in session.metrics if name.startswith("eval_")}
    of_rewards = {name for name in given if OF_ONE_REWARD.fullmatch(name)}
    assert of_rewards
    assert given - of_rewards == set(ONLINE_METRICS)


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "error", "message"), [
    ({"reward_path": "/nowhere"}, ModelError, "no such folder"),
    ({"reward_path": "MODEL"}, ModelError, "without a reward head"),
    ({"fast_inference": True}, MissingExtra, "vllm"),
    ({"use_liger_kernel": True}, AlignTuneError, "liger"),
    ({"sft_path": "/nowhere"}, ModelError, "no such folder"),
], ids=str)  # fmt: skip
def test_settings_that_cannot_act(
    files: Path, run: Run, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    settings = {name: str(files / "model") if value == "MODEL" else value for name, value in settings.items()}
    with pytest.raises(error, match=message):
        run(**settings).train()


def test_a_tokenizer_without_an_end(files: Path, tmp_path: Path, run: Run) -> None:
    tiny.write_model(tmp_path / "endless")
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        run(model=tmp_path / "endless").train()


def test_prompts_over_the_budget_are_cut_and_counted(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "aligntune"):
        ends, starts = (run(out=mode, max_prompt_length=6, truncation_mode=mode) for mode in ("keep_end", "keep_start"))
        assert all(len(row["prompt_ids"]) == 6 for row in ends.train_rows)
        assert ends.tokenizer.decode(ends.train_rows[0]["prompt_ids"]) == "stant\n"
        assert starts.tokenizer.decode(starts.train_rows[0]["prompt_ids"]) == "<|im_start|>user\n"
    assert "cut 16 of 16 prompts" in caplog.text


# What a user calls ----------------------------------------------------------------------------------------------------


def test_describing_a_run_loads_no_model(files: Path, run: Run) -> None:
    session = run(reward_path=str(files / "reward"))
    assert "4 optimiser steps" in session.describe()
    assert not {"model", "rewards", "engine"} & set(vars(session))


def test_a_users_own_prompts_are_put_as_the_runs(run: Run) -> None:
    """A text is a user message; its answer is the greedy one, the same as in the evaluation."""
    session = run()
    row = session.train_rows[0]
    asked = json.loads(row["prompt_json"])
    assert session.asker(asked[-1]["content"])[1] == list(row["prompt_ids"])
    one, other = session.predict([asked[-1]["content"], asked])
    assert one == other == session.predict(asked[-1]["content"])[0]
    raw = run(dataset={"task_type": "text"})
    assert raw.asker("say red")[1] == raw.tokenizer("say red")["input_ids"]
    [tokens] = session.preview(1)
    assert "".join(text for text, _ in tokens) == row["prompt_text"]
    assert not any(trained for _, trained in tokens)
