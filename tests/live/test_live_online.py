"""Every setting of online RL acts: each is changed, and an effect is observed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import tiny
from aligntune.config import applies, rl
from aligntune.config.algorithms import TRAINING_CLASSES
from aligntune.config.enums import AlgorithmType
from aligntune.config.run import RLRunConfig
from aligntune.errors import AlignTuneError
from aligntune.models.load import loading_arguments
from aligntune.trainers.reward_source import reward_model_of
from live.cases import Case, Observe, four_bits, observed, session
from live.compiled import kept

ROOT: dict[str, Path] = {}
ONLINE = applies.ONLINE - {AlgorithmType.META_ES}


@pytest.fixture(scope="module", autouse=True)
def _files(tmp_path_factory: pytest.TempPathFactory) -> None:
    from transformers import LlamaForSequenceClassification

    from aligntune.algorithms.mirror_map import MirrorMap

    root = ROOT["root"] = tmp_path_factory.mktemp("live")
    tiny.write_model(root / "model")
    tiny.write_model(root / "other", seed=1)
    LlamaForSequenceClassification(tiny.model(2, num_labels=1).config).save_pretrained(root / "reward")
    tiny.tokenizer().save_pretrained(root / "reward")
    MirrorMap.random(7).save(root / "map.pt")
    prompts = [{"prompt": f"please say {word}", "answer": word, "source": at} for at, word in enumerate(tiny.WORDS)]
    tiny.write_rows(root / "prompts.jsonl", prompts)
    tiny.write_rows(root / "more.jsonl", prompts[:9])
    tiny.write_rows(root / "held.jsonl", prompts[3:7])
    tiny.write_rows(root / "odd.jsonl", [{"ask": row["prompt"]} for row in prompts[:4]])
    tiny.write_rows(root / "asked.jsonl", [{"question": row["prompt"]} for row in prompts[:4]])
    tiny.write_rows(root / "both.jsonl", [{"prompt": "one", "instruction": "another"}] * 4)
    (root / "splits").mkdir()
    tiny.write_rows(root / "splits" / "train.jsonl", prompts[:6])
    tiny.write_rows(root / "splits" / "test.jsonl", prompts[6:11])


class Here:
    """A path inside the fixtures' folder, resolved when the test runs."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


def real(value: Any) -> Any:
    if isinstance(value, Here):
        return str(ROOT["root"] / value.name)
    return {key: real(part) for key, part in value.items()} if isinstance(value, dict) else value


def spread(completion: str, source: int) -> float:
    """A reward that tells completions and prompts apart."""
    return sum(map(ord, completion)) % 7 + 0.1 * source


def coarse(completion: str) -> float:
    """The same for all completions: no signal."""
    return 1.0


# Observations ---------------------------------------------------------------------------------------------------------


def arg(name: str) -> Observe:
    """A field of the trainer's arguments."""
    return lambda s: getattr(s.build_trainer().args, name)


def rows(s: Any) -> Any:
    return [row["prompt_ids"] for row in s.train_rows]


def attempt(observe: Observe) -> Observe:
    """What is observed, or the error in its place."""

    def look(s: Any) -> Any:
        try:
            return observe(s)
        except AlignTuneError as error:
            return f"{type(error).__name__}: {error}"

    return look


def built(s: Any) -> Any:
    s.train_rows  # noqa: B018
    s.build_trainer()
    return "built"


outcome = attempt(built)


def lora(name: str) -> Observe:
    return lambda s: getattr(s.model.peft_config["default"], name)


def loading(name: str) -> Observe:
    return lambda s: loading_arguments(s.config.model, s.precision, trained=True).get(name)


def phase(s: Any) -> Any:
    """A trainer that has sampled its first rollout."""
    trainer = s.build_trainer()
    trainer.begin_phase()
    return trainer


def rollout(name: str) -> Observe:
    def look(s: Any) -> Any:
        found = getattr(phase(s).rollout, name)
        return found.tolist() if isinstance(found, torch.Tensor) else found

    return look


def measured(name: str) -> Observe:
    """A metric of the first rollout."""
    return lambda s: phase(s).rollout.metrics.get(name)


def loss(s: Any) -> float:
    """Of the first optimiser batch, with policy and critic moved away from where they sampled."""
    trainer = phase(s)
    generator = torch.Generator().manual_seed(0)
    critic = [] if trainer.critic is None else list(trainer.critic.parameters())
    with torch.no_grad():
        for weight in [*s.model.parameters(), *critic]:
            weight.add_(0.03 * torch.randn(weight.shape, generator=generator))
    return round(float(trainer.training_step(trainer.model, {})), 6)


def pieces(s: Any) -> int:
    """Of the first micro-batch."""
    trainer = phase(s)
    return len(trainer.pieces(trainer.order[: trainer.plan.micro], trainer.micro_batch_tokens))


def mode(s: Any) -> Any:
    reference = s.build_trainer().reference
    return None if reference is None else reference.mode


def metrics(s: Any) -> list[dict[str, Any]]:
    s.train(overwrite=True)
    path = s.directory.metrics.path
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(s: Any) -> Any:
    return [line["kl"] for line in metrics(s) if line["split"] == "train"]


def trail(s: Any) -> Any:
    return [(line["split"], line["step"]) for line in metrics(s)]


def checkpoints(s: Any) -> Any:
    s.train(overwrite=True)
    return sorted(path.name for path in s.directory.checkpoints.glob("checkpoint-*"))


def samples(s: Any) -> Any:
    s.train(overwrite=True)
    found = [json.loads(line) for line in (s.directory.path / "samples.jsonl").read_text().splitlines()]
    return [(row["step"], row["prompt"], row["completion"]) for row in found if "sample" in row]


def logged(s: Any) -> Any:
    import io
    from contextlib import redirect_stdout

    with redirect_stdout(io.StringIO()) as out:
        s.train(overwrite=True)
    return len(out.getvalue().splitlines()) > 0


def drawn(s: Any) -> Any:
    """The first prompts in the order of the run."""
    return [row["prompt_text"] for row in s.stream().draw(12)]


FULL = {"model.use_peft": False}
SHORT = {"train.max_steps": 2}
EVAL = {"eval_dataset": {"name": Here("held.jsonl")}, "train.eval_strategy": "steps"}
BEST = EVAL | {"train.load_best_model_at_end": True, "train.save_interval": 100}
PPO = {"algorithm": "ppo", "train.num_generations": None}
UNEVEN = {"train.max_completion_length": 60}  # some completions end before
MOVED = FULL | {"train.num_ppo_epochs": 2}
MIRROR = MOVED | {"algorithm": "neural_mirror_grpo", "train.mirror_coefficient": 1.0}
DAPO = {"algorithm": "dapo", "rewards": [{"type": "live.test_live_online:coarse"}]}
REWARD = {"model.reward_path": Here("reward")}
CHOSEN = {"backend": "trl"}
TOOLS = "{% for t in tools or [] %}{{ t['function']['name'] }}{% endfor %}{% for m in messages %}{{ m['content'] }}{% endfor %}"
THINKS = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}A:{{ '<think>' if enable_thinking }}{% endif %}"
TOOL = {
    "type": "function",
    "function": {"name": "look_up", "description": "", "parameters": {"type": "object", "properties": {}}},
}


def sampled(**changes: Any) -> dict[str, Any]:
    return {"enabled": True, "interval_steps": 1, "max_new_tokens": 3} | changes


def sample_case(name: str, value: Any) -> Case:
    rare = {"interval_steps": 2} if name == "percent_of_max_steps" else {}
    return Case(
        "logging.sample_logging", sampled(**{**rare, name: value}), samples, base=SHORT, against=sampled(**rare)
    )


CASES: list[Case] = [
    # model
    Case("model.name_or_path", Here("other"), lambda s: float(next(s.model.parameters()).detach().sum())),
    Case("model.sft_path", Here("other"), lambda s: float(next(s.model.parameters()).detach().sum())),
    Case("model.reward_path", Here("reward"), lambda s: s.rewards.names),
    Case("model.reward_model_name", Here("reward"), lambda s: s.rewards.names),
    Case("model.reward_model_source", {"source_type": "pretrained_local", "model_path": Here("reward")}, lambda s: s.rewards.names),
    Case("model.precision", "fp16", lambda s: str(s.config.model.precision), against="fp32"),
    Case("model.quantization", {"load_in_4bit": True}, four_bits(lambda s: s.model)),
    Case("model.compile", True, kept),
    Case("model.selective_checkpointing", "half", kept, base={"model.lora_dropout": 0.0}),
    Case("model.attn_implementation", "eager", lambda s: s.model.config._attn_implementation),
    Case("model.gradient_checkpointing", True, arg("gradient_checkpointing")),
    Case("model.max_memory", {"cpu": "1MB"}, loading("max_memory")),
    Case("model.device_map", {"": "cpu"}, loading("device_map")),
    Case("model.use_unsloth", True, lambda s: str(s.config.backend), base={"backend": "auto"}),
    Case("model.max_seq_length", 12, rows),
    Case("model.reward_value_model", Here("other"), lambda s: s.build_trainer().critic.trunk is None, base=PPO),
    Case("model.reward_value_loading_type", "unsloth", lambda s: s, base=REWARD, against="standard"),
    Case("model.reward_model_quantization", {"load_in_4bit": True}, four_bits(lambda s: reward_model_of(s.config).model), base=REWARD),
    Case("model.value_model_quantization", {"load_in_4bit": True}, four_bits(lambda s: s.build_trainer().critic), base=PPO | {"model.reward_value_model": Here("other")}),
    Case("model.use_peft", False, lambda s: hasattr(s.model, "peft_config")),
    Case("model.lora_r", 4, lora("r")),
    Case("model.lora_alpha", 4, lora("lora_alpha")),
    Case("model.lora_dropout", 0.5, lora("lora_dropout"), base={"model.disable_dropout": False}),
    Case("model.lora_target_modules", ["o_proj"], lora("target_modules")),
    Case("model.trust_remote_code", True, loading("trust_remote_code")),
    Case("model.model_init_kwargs", {"attention_dropout": 0.5}, lambda s: s.model.config.attention_dropout),
    Case("model.ref_model_init_kwargs", {"use_cache": False}, mode),
    Case("model.model_adapter_name", "policy", lambda s: s.model.active_adapter),
    Case("model.ref_adapter_name", "frozen", mode),
    Case("model.force_use_ref_model", True, mode),
    Case("model.disable_dropout", False, lora("lora_dropout")),
    Case("model.use_logits_to_keep", False, lambda s: s, against=True),
    Case("model.reward_device", "cuda", outcome, base=REWARD),
    # dataset
    Case("dataset.name", Here("more.jsonl"), rows),
    Case("dataset.split", "test", rows, base={"dataset.name": Here("splits")}),
    Case("dataset.percent", 50.0, rows),
    Case("dataset.max_samples", 3, rows),
    Case("dataset.field_mappings", {"ask": "prompt"}, attempt(rows), base={"dataset.name": Here("odd.jsonl")}),
    Case("dataset.column_mapping", {"ask": "prompt"}, attempt(rows), base={"dataset.name": Here("odd.jsonl")}),
    Case("dataset.format_type", "instruction", rows, base={"dataset.name": Here("both.jsonl")}, against="prompt"),
    Case("dataset.auto_detect_fields", False, attempt(rows), base={"dataset.name": Here("asked.jsonl")}),
    Case("dataset.task_type", "text", rows),
    Case("dataset.chat_template", "zephyr", rows),
    Case("dataset.system_prompt", "be brief", rows),
    Case("dataset.pad_token", "<|im_start|>", lambda s: s.tokenizer.pad_token),
    Case("dataset.label_pad_token_id", -1, lambda s: s, against=-100),
    Case("dataset.truncation_mode", "keep_start", rows, base={"train.max_prompt_length": 9}),
    Case("dataset.padding_free", True, lambda s: s.backend, base=CHOSEN),
    Case("dataset.tools", [TOOL], rows, base={"dataset.chat_template": TOOLS}),
    Case("dataset.preserve_columns", ["source"], lambda s: s.train_rows.column_names),
    Case("dataset.processing_fn", "live.test_live_online:shout", rows),
    Case("dataset.processing_batched", True, rows, base={"dataset.processing_fn": "live.test_live_online:shout_or_repeat"}),
    Case("dataset.processing_fn_kwargs", {"mark": "?"}, rows, base={"dataset.processing_fn": "live.test_live_online:shout"}),
    # train: optimiser and schedule
    Case("train.per_device_batch_size", 4, arg("per_device_train_batch_size")),
    Case("train.per_device_eval_batch_size", 3, lambda s: s.held_out().batch_size, base=EVAL),
    Case("train.gradient_accumulation_steps", 3, arg("gradient_accumulation_steps")),
    Case("train.micro_batch_tokens", 64, pieces),
    Case("train.max_steps", 3, arg("max_steps")),
    Case("train.epochs", 3, arg("max_steps")),
    Case("train.eval_interval", 1, trail, base=EVAL | SHORT, against=2),
    Case("train.eval_steps", 1, trail, base=EVAL | SHORT, against=2),
    Case("train.save_interval", 1, checkpoints, base=SHORT),
    Case("train.save_steps", 1, checkpoints, base=SHORT),
    Case("train.learning_rate", 1e-3, arg("learning_rate")),
    Case("train.max_grad_norm", 0.5, arg("max_grad_norm")),
    Case("train.weight_decay", 0.5, arg("weight_decay")),
    Case("train.optimizer", "sgd", arg("optim")),
    Case("train.lr_scheduler", "linear", arg("lr_scheduler_type")),
    Case("train.warmup_steps", 5, arg("warmup_steps")),
    Case("train.warmup_ratio", 0.5, arg("warmup_steps")),
    Case("train.eval_strategy", "steps", trail, base=SHORT | {"eval_dataset": {"name": Here("held.jsonl")}, "train.eval_interval": 1}),
    Case("train.save_strategy", "no", checkpoints, base=SHORT),
    Case("train.save_total_limit", 1, checkpoints, base=SHORT | {"train.save_interval": 1}),
    Case("train.load_best_model_at_end", True, arg("load_best_model_at_end"), base=EVAL),
    Case("train.metric_for_best_model", "eval_pass@1", arg("metric_for_best_model"), base=BEST),
    Case("train.greater_is_better", False, arg("greater_is_better"), base=BEST),
    Case("train.logging_steps", 1, trail, base=SHORT),
    Case("train.logging_strategy", "no", trail, base=SHORT | {"train.logging_steps": 1, "train.save_strategy": "no"}),
    Case("train.seed", 7, rollout("completion_ids")),
    Case("train.data_seed", 7, drawn),
    Case("train.use_liger_kernel", True, outcome),
    Case("train.use_liger_loss", True, lambda s: s, against=False),
    Case("train.gradient_checkpointing_kwargs", {"use_reentrant": True}, arg("gradient_checkpointing_kwargs"), base={"model.gradient_checkpointing": True}),
    Case("train.group_by_length", False, drawn),
    Case("train.ds3_gather_for_generation", False, lambda s: s.config.train.ds3_gather_for_generation, base={"launch": {"launcher": "accelerate", "strategy": "zero3"}}),
    # train: prompts and rollouts
    Case("train.max_prompt_length", 9, rows),
    Case("train.truncation_mode", "keep_start", rows, base={"train.max_prompt_length": 9}),
    Case("train.max_completion_length", 3, rollout("completion_ids")),
    Case("train.response_length", 3, rollout("completion_ids"), base=PPO | {"train.max_completion_length": None}, against=5),
    Case("train.rollout_batch_size", 4, lambda s: len(phase(s).rollout)),
    Case("train.num_generations", 2, lambda s: s.plan.group),
    Case("train.temperature", 0.3, rollout("completion_ids")),
    Case("train.top_p", 0.2, rollout("completion_ids")),
    Case("train.generation_kwargs", {"top_k": 2}, rollout("completion_ids")),
    Case("train.stop_token", "e", lambda s: s.stop_token_ids),
    Case("train.enable_thinking", True, rows, base={"dataset.chat_template": THINKS}),
    Case("train.fast_inference", True, outcome),
    Case("train.vllm_gpu_memory_utilization", 0.5, lambda s: s.config.train.vllm_gpu_memory_utilization, base={"train.fast_inference": True}),
    Case("train.padding_free", True, lambda s: s.backend, base=CHOSEN),
    Case("train.reward_weights", [3.0], measured("reward")),
    # train: losses and advantages
    Case("train.num_ppo_epochs", 3, lambda s: s.plan.passes),
    Case("train.kl_coef", 0.5, loss, base=MOVED),
    Case("train.beta", 0.5, loss, base=MOVED),
    Case("train.grpo_beta", 0.5, loss, base=MOVED),
    Case("train.kl_estimator", "k2", loss, base=MOVED),
    Case("train.cliprange", 0.001, loss, base=MOVED),
    Case("train.cliprange_high", 0.001, loss, base=MOVED),
    Case("train.loss_type", "dr_grpo", loss, base=MOVED | UNEVEN),
    Case("train.loss_function", "live.test_live_online:likelihood", loss, base=MOVED),
    Case("train.advantage_function", "live.test_live_online:plain_rewards", rollout("advantages")),
    Case("train.callbacks", ["live.test_live_online:Watcher"], lambda s: "Watcher" in [type(each).__name__ for each in s.build_trainer().callback_handler.callbacks]),
    Case("train.scale_rewards", "none", rollout("advantages")),
    Case("train.mask_truncated_completions", False, rollout("loss_mask"), against=True),
    Case("train.grpo_alpha", 0.05, loss, base=MOVED),
    Case("train.gspo_gamma", 1e-6, loss, base=MOVED | {"algorithm": "gspo", "train.data_seed": 5}),
    Case("train.gspo_delta", 0.0001, loss, base=MOVED | {"algorithm": "gspo"}),
    Case("train.sync_ref_model", True, lambda s: "SyncReference" in [type(each).__name__ for each in s.build_trainer().callback_handler.callbacks]),
    Case("train.ref_model_mixup_alpha", 0.1, losses, base=FULL | {"train.max_steps": 4, "train.sync_ref_model": True, "train.ref_model_sync_steps": 1, "train.learning_rate": 1e-2, "train.logging_steps": 1}),
    Case("train.ref_model_sync_steps", 1, losses, base=FULL | {"train.max_steps": 4, "train.sync_ref_model": True, "train.learning_rate": 1e-2, "train.logging_steps": 1}),
    Case("train.dynamic_sampling", False, lambda s: phase(s).sampler.stream.position, base=DAPO),
    Case("train.max_resample_batches", 1, lambda s: phase(s).sampler.stream.position, base=DAPO),
    Case("train.overlong_buffer", 30, rollout("advantages"), base=UNEVEN | {"algorithm": "dapo", "train.dynamic_sampling": False, "train.scale_rewards": "none"}),
    Case("train.overlong_penalty", 9.0, rollout("advantages"), base=UNEVEN | {"algorithm": "dapo", "train.dynamic_sampling": False, "train.overlong_buffer": 30, "train.scale_rewards": "none"}),
    Case("train.mirror_coefficient", 2.0, loss, base=MIRROR),
    Case("train.mirror_map", "prob_l2", loss, base=MIRROR),
    Case("train.mirror_seed", 5, loss, base=MIRROR | {"train.mirror_coefficient": 100.0}),
    Case("train.mirror_path", Here("map.pt"), loss, base=MIRROR | {"train.mirror_coefficient": 100.0}),
    Case("train.cliprange_value", 0.0001, loss, base=PPO | MOVED),
    Case("train.whiten_rewards", True, rollout("advantages"), base=PPO),
    Case("train.vf_coef", 5.0, loss, base=PPO | MOVED),
    Case("train.gamma", 0.5, rollout("returns"), base=PPO),
    Case("train.lam", 0.5, rollout("advantages"), base=PPO | {"train.gamma": 0.9}),
    Case("train.missing_eos_penalty", 5.0, rollout("returns"), base=PPO),
    # logging
    Case("logging.output_dir", Here("elsewhere"), lambda s: s.directory.path),
    Case("logging.run_name", "mine", arg("run_name")),
    Case("logging.loggers", "none", lambda s: s.config.logging.loggers, against=["tensorboard"]),
    Case("logging.report_to", ["wandb"], lambda s: s.config.logging.loggers),
    Case("logging.log_level", "ERROR", logged, base=SHORT | {"train.logging_steps": 1}),
    Case("logging.sample_logging", sampled(), samples, base=SHORT | {"logging.loggers": "none"}, against={"enabled": False}),
    *(sample_case(name, value) for name, value in (
        ("prompts", ["say red"]), ("interval_steps", 2), ("percent_of_max_steps", 0.5), ("max_new_tokens", 5), ("temperature", 0.0),
        ("top_p", 0.1), ("num_samples", 1),
    )),
    # run
    Case("backend", "native", lambda s: s.backend, against="trl"),
    Case("skip_backends", ["native", "unsloth"], lambda s: s.backend, base={"backend": "auto"}, against=["unsloth"]),
    Case("eval_split", "test", lambda s: len(s.eval_rows), base={"dataset.name": Here("splits")}, against="train"),
    Case("eval_dataset", {"name": Here("held.jsonl")}, lambda s: s.eval_rows is None),
    Case("rewards", [{"type": "length"}], lambda s: s.rewards.names),
]  # fmt: skip


def likelihood(batch: Any, config: Any, normalizers: Any) -> torch.Tensor:
    return -batch.log_probs[batch.completion_mask].sum() / normalizers.num_tokens


def plain_rewards(rollouts: Any, config: Any, all_sum: Any) -> torch.Tensor:
    return rollouts.rewards.view(-1)


class Watcher(TrainerCallback):
    """Does nothing."""


def shout(row: dict[str, Any], mark: str = "!") -> dict[str, Any]:
    return {**row, "prompt": row["prompt"] + mark}


def shout_or_repeat(batch: dict[str, Any]) -> dict[str, Any]:
    if isinstance(batch["prompt"], list):
        return {name: values * 2 for name, values in batch.items()}
    return shout(batch)


ONE_VALUE = (
    "model.use_logits_to_keep",
    "dataset.label_pad_token_id",
    "train.use_liger_loss",
    "model.reward_value_loading_type",
)
"""Settings of which the other value is refused."""


@pytest.mark.parametrize("case", CASES, ids=str)
def test_setting_acts(case: Case, tmp_path: Path) -> None:
    common = {
        "algorithm": "grpo", "model.name_or_path": Here("model"), "model.precision": "fp32", "dataset.name": Here("prompts.jsonl"),
        "logging.output_dir": str(tmp_path / "out"), "backend": "native", "train.per_device_batch_size": 8, "train.num_generations": 4,
        "train.max_completion_length": 6, "train.temperature": 1.0, "train.mask_truncated_completions": False, "logging.loggers": "none",
        "rewards": [{"type": "live.test_live_online:spread"}], "train.kl_coef": 0.1,
    }  # fmt: skip
    case = Case(case.path, real(case.value), case.observe, real(dict(case.base)), real(case.against))
    replaces = {"train.beta": "train.kl_coef", "train.grpo_beta": "train.kl_coef", "train.response_length": "train.max_completion_length",
                "logging.report_to": "logging.loggers"}  # fmt: skip
    common.pop(replaces.get(case.path, ""), None)
    gone = [path for path, value in case.base.items() if value is None]
    common = {path: value for path, value in real(common).items() if path not in gone}
    case = Case(
        case.path,
        case.value,
        case.observe,
        {path: value for path, value in case.base.items() if value is not None},
        case.against,
    )
    if case.path in ONE_VALUE:
        session(common, {**case.base, case.path: case.against})
        with pytest.raises(AlignTuneError, match=case.path.split(".")[1]):
            session(common, {**case.base, case.path: case.value})
        return
    if case.path == "rewards":
        common["rewards"] = [{"type": "live.test_live_online:spread"}]
    before, after = observed(common, case)
    assert before != after


ELSEWHERE = {
    "dataset.weight": "tests/data/test_mix.py", "dataset.dataset_num_proc": "tests/data/test_tokenize.py",
    "dataset.config_name": "tests/data/test_sources.py", "dataset.precompute_ref_log_probs": "DPO", "dataset.precompute_ref_batch_size": "DPO",
    "fallback": "tests/adapters", "algorithm": "every other test", "datasets": "tests/config", "launch": "tests/launch",
    "reward_training": "tests/trainers", "model": "sections", "dataset": "sections", "train": "sections", "logging": "sections",
}  # fmt: skip
"""Settings whose effect is observed by another test, and by which."""


def test_every_setting_has_a_case() -> None:
    names = set(RLRunConfig.model_fields)
    for algorithm in ONLINE:
        sections = {
            "model": rl.ModelConfig,
            "dataset": rl.DatasetConfig,
            "train": TRAINING_CLASSES[algorithm],
            "logging": rl.LoggingConfig,
        }
        names |= {
            f"{section}.{name}"
            for section, cls in sections.items()
            for name in cls.model_fields
            if applies.refusal(algorithm, section, name) is None
        }
    covered = {case.path for case in CASES} | set(ELSEWHERE)
    assert names - covered == set()
    assert covered - names - {"dataset.precompute_ref_log_probs", "dataset.precompute_ref_batch_size"} == set()
