"""Every setting of DPO acts: each is changed, and an effect is observed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import tiny
from aligntune.config import rl
from aligntune.config.algorithms import DPOConfig
from aligntune.config.applies import refusal as not_for
from aligntune.config.enums import AlgorithmType
from aligntune.config.run import RLRunConfig
from aligntune.errors import AlignTuneError
from aligntune.models.load import loading_arguments
from live.cases import Case, Observe, four_bits, observed, session
from live.compiled import kept

pytestmark = pytest.mark.usefixtures("short_answers")

ROOT: dict[str, Path] = {}


def pairs(count: int, start: int = 0) -> list[dict[str, Any]]:
    words = tiny.WORDS
    return [
        {"prompt": f"please say {words[at % 16]}", "chosen": words[at % 16] + "." * (at % 5), "rejected": words[(at + 3) % 16][::-1] + "?",
         "source": at}
        for at in range(start, start + count)
    ]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _files(tmp_path_factory: pytest.TempPathFactory) -> None:
    root = ROOT["root"] = tmp_path_factory.mktemp("live")
    tiny.write_model(root / "model")
    tiny.write_model(root / "other", seed=1)
    tiny.write_rows(root / "pairs.jsonl", pairs(8))
    tiny.write_rows(root / "more.jsonl", pairs(9, 20))
    tiny.write_rows(root / "held.jsonl", pairs(4, 40))
    tiny.write_rows(
        root / "odd.jsonl", [{"ask": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in pairs(4)]
    )
    tiny.write_rows(
        root / "prefs.jsonl",
        [{"question": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in pairs(4)],
    )
    (root / "splits").mkdir()
    tiny.write_rows(root / "splits" / "train.jsonl", pairs(6))
    tiny.write_rows(root / "splits" / "test.jsonl", pairs(5, 20))


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


# Observations ---------------------------------------------------------------------------------------------------------


def arg(name: str) -> Observe:
    return lambda s: getattr(s.build_trainer().args, name)


def rows(s: Any) -> Any:
    return [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in s.train_rows]


def outcome(s: Any) -> str:
    """The error that a setting leads to on this machine."""
    try:
        s.build_trainer()
    except AlignTuneError as error:
        return str(error)
    return "none"


def lora(name: str) -> Observe:
    return lambda s: getattr(s.model.peft_config["default"], name)


def loading(name: str) -> Observe:
    return lambda s: loading_arguments(s.config.model, s.precision, trained=True).get(name)


def loss(s: Any) -> float:
    """Of the first rows, with the policy moved away from its reference."""
    trainer = s.build_trainer()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in s.model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    batch = trainer.data_collator([trainer.train_dataset[at] for at in range(4)])
    return round(float(trainer.compute_loss(trainer.model.train(), batch).detach()), 5)


def pieces(s: Any) -> int:
    """Of the first micro-batch."""
    trainer = s.build_trainer()
    (batch,), _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
    return len(batch["pieces"])


def mode(s: Any) -> Any:
    reference = s.build_trainer().reference
    return None if reference is None else reference.mode


def lines(s: Any) -> list[dict[str, Any]]:
    s.train(overwrite=True)
    return [json.loads(line) for line in s.directory.metrics.path.read_text().splitlines()]


def callbacks(s: Any) -> list[str]:
    return [type(each).__name__ for each in s.build_trainer().callback_handler.callbacks]


def losses(s: Any) -> Any:
    return [line["loss"] for line in lines(s)]


def trail(s: Any) -> Any:
    s.train(overwrite=True)
    path = s.directory.metrics.path
    return (
        [(line["split"], line["step"]) for line in map(json.loads, path.read_text().splitlines())]
        if path.exists()
        else []
    )


def checkpoints(s: Any) -> Any:
    s.train(overwrite=True)
    return sorted(path.name for path in s.directory.checkpoints.glob("checkpoint-*"))


def samples(s: Any) -> Any:
    s.train(overwrite=True)
    found = [json.loads(line) for line in (s.directory.path / "samples.jsonl").read_text().splitlines()]
    return [(row["step"], row["prompt"], row["completion"]) for row in found if "sample" in row]


def metrics(s: Any) -> Any:
    return {name: round(value, 4) for name, value in s.evaluate().items()}


def asked_with_examples(s: Any) -> Any:
    """The prompts of an evaluation that have examples in front."""
    asked: list[Any] = []
    generate = s.generator.generate
    s.generator = SimpleNamespace(generate=lambda prompts, **rest: asked.extend(prompts) or generate(prompts, **rest))
    s.evaluate()
    return [prompt for prompt in map(str, asked) if ": " in prompt]


def dropouts(s: Any) -> Any:
    return sum(module.p for module in s.model.modules() if isinstance(module, torch.nn.Dropout))


def logged(s: Any) -> Any:
    import io
    from contextlib import redirect_stdout

    with redirect_stdout(io.StringIO()) as out:
        s.train(overwrite=True)
    return len(out.getvalue().splitlines()) > 0


def order(s: Any) -> Any:
    return [batch["pairs"].prompts for batch in s.build_trainer().get_train_dataloader()]


SHORT = {"train.max_steps": 2}
FULL = {"model.use_peft": False}
EVAL = {"eval_dataset": {"name": Here("held.jsonl")}}
BEST = EVAL | {"train.eval_strategy": "steps", "train.load_best_model_at_end": True, "train.save_interval": 100}
SHOTS = EVAL | {"train.dpo_eval_enabled": True, "train.max_target_length": 6, "train.dpo_few_shot_max_samples": 0}
FEW = SHOTS | {"train.dpo_few_shot_examples_text": "say red: red", "train.dpo_few_shot_max_samples": 3}
SAMPLED = SHORT | {"logging.sample_logging": {"enabled": True, "interval_steps": 1, "max_new_tokens": 3}}


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
    Case("model.precision", "fp16", lambda s: str(s.config.model.precision), against="fp32"),
    Case("model.quantization", {"load_in_4bit": True}, four_bits(lambda s: s.model)),
    Case("model.compile", True, kept),
    Case("model.selective_checkpointing", "half", kept, base={"model.lora_dropout": 0.0}),
    Case("model.attn_implementation", "eager", lambda s: s.model.config._attn_implementation),
    Case("model.gradient_checkpointing", True, arg("gradient_checkpointing")),
    Case("model.max_memory", {"cpu": "1MB"}, loading("max_memory")),
    Case("model.device_map", {"": "cpu"}, loading("device_map")),
    Case("model.use_unsloth", True, lambda s: str(s.config.backend), base={"backend": "auto"}),
    Case("model.max_seq_length", 24, rows),
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
    # dataset
    Case("dataset.name", Here("more.jsonl"), rows),
    Case("dataset.split", "test", rows, base={"dataset.name": Here("splits")}),
    Case("dataset.percent", 50.0, rows),
    Case("dataset.max_samples", 3, rows),
    Case("dataset.field_mappings", {"ask": "prompt", "good": "chosen", "bad": "rejected"}, lambda s: attempt(rows, s), base={"dataset.name": Here("odd.jsonl")}),
    Case("dataset.column_mapping", {"ask": "prompt", "good": "chosen", "bad": "rejected"}, lambda s: attempt(rows, s), base={"dataset.name": Here("odd.jsonl")}),
    Case("dataset.format_type", "ranked", lambda s: attempt(rows, s)),
    Case("dataset.auto_detect_fields", False, lambda s: attempt(rows, s), base={"dataset.name": Here("prefs.jsonl")}),
    Case("dataset.task_type", "text", rows),
    Case("dataset.chat_template", "zephyr", rows),
    Case("dataset.system_prompt", "be brief", rows),
    Case("dataset.pad_token", "<|im_start|>", lambda s: s.tokenizer.pad_token),
    Case("dataset.label_pad_token_id", -1, lambda s: s, against=-100),
    Case("dataset.truncation_mode", "keep_start", rows, base={"train.max_prompt_length": 9}),
    Case("dataset.padding_free", True, lambda s: s.backend, base={"backend": "trl"}),
    Case("dataset.precompute_ref_log_probs", True, mode),
    Case("dataset.precompute_ref_batch_size", 2, lambda s: s.config.sources[0].precompute_ref_batch_size, base={"dataset.precompute_ref_log_probs": True}),
    Case("dataset.preserve_columns", ["source"], lambda s: s.train_rows.column_names),
    Case("dataset.processing_fn", "live.test_live_dpo:shout", rows),
    Case("dataset.processing_batched", True, rows, base={"dataset.processing_fn": "live.test_live_dpo:shout_or_repeat"}),
    Case("dataset.processing_fn_kwargs", {"mark": "?"}, rows, base={"dataset.processing_fn": "live.test_live_dpo:shout"}),
    # train
    Case("train.per_device_batch_size", 3, arg("per_device_train_batch_size")),
    Case("train.per_device_eval_batch_size", 3, arg("per_device_eval_batch_size")),
    Case("train.gradient_accumulation_steps", 3, arg("gradient_accumulation_steps")),
    Case("train.micro_batch_tokens", 64, pieces, base={"train.per_device_batch_size": 4}),
    Case("train.max_steps", 3, arg("max_steps")),
    Case("train.epochs", 2, arg("num_train_epochs")),
    Case("train.eval_interval", 1, trail, base=EVAL | SHORT | {"train.eval_strategy": "steps"}, against=2),
    Case("train.eval_steps", 1, trail, base=EVAL | SHORT | {"train.eval_strategy": "steps"}, against=2),
    Case("train.save_interval", 1, checkpoints, base=SHORT),
    Case("train.save_steps", 1, checkpoints, base=SHORT),
    Case("train.learning_rate", 1e-3, arg("learning_rate")),
    Case("train.max_grad_norm", 0.5, arg("max_grad_norm")),
    Case("train.weight_decay", 0.5, arg("weight_decay")),
    Case("train.optimizer", "sgd", arg("optim")),
    Case("train.lr_scheduler", "linear", arg("lr_scheduler_type")),
    Case("train.warmup_steps", 5, arg("warmup_steps")),
    Case("train.warmup_ratio", 0.5, arg("warmup_steps")),
    Case("train.max_length", 24, rows),
    Case("train.max_prompt_length", 9, rows),
    Case("train.max_target_length", 3, rows),
    Case("train.padding_free", True, lambda s: s.backend, base={"backend": "trl"}),
    Case("train.truncation_mode", "keep_start", rows, base={"train.max_prompt_length": 9}),
    Case("train.beta", 0.5, loss),
    Case("train.loss_type", "hinge", loss),
    Case("train.loss_function", "live.test_live_dpo:chosen_alone", loss),
    Case("train.callbacks", ["live.test_live_dpo:Watcher"], callbacks),
    Case("train.loss_weights", {"sigmoid": 0.5, "sft": 1.0}, loss),
    Case("train.f_divergence_type", "js_divergence", loss),
    Case("train.f_alpha_divergence_coef", 0.5, loss, base={"train.f_divergence_type": "alpha_divergence"}),
    Case("train.reference_free", True, mode),
    Case("train.label_smoothing", 0.2, loss),
    Case("train.use_weighting", True, loss),
    Case("train.rpo_alpha", 0.5, loss),
    Case("train.ld_alpha", 0.1, loss),
    Case("train.discopop_tau", 5.0, loss, base={"train.loss_type": "discopop"}),
    Case("train.sync_ref_model", True, lambda s: len(s.build_trainer().callback_handler.callbacks), base=FULL),
    Case("train.ref_model_sync_steps", 1, losses, base=FULL | SHORT | {"train.sync_ref_model": True, "train.learning_rate": 1e-2}),
    Case("train.ref_model_mixup_alpha", 0.1, losses, base=FULL | SHORT | {"train.sync_ref_model": True, "train.ref_model_sync_steps": 1, "train.learning_rate": 1e-2}),
    Case("train.eval_strategy", "steps", arg("eval_strategy"), base=EVAL),
    Case("train.save_strategy", "no", checkpoints, base=SHORT),
    Case("train.save_total_limit", 1, checkpoints, base=SHORT | {"train.save_interval": 1}),
    Case("train.load_best_model_at_end", False, arg("load_best_model_at_end"), base=BEST, against=True),
    Case("train.metric_for_best_model", "eval_loss", arg("metric_for_best_model"), base=BEST),
    Case("train.greater_is_better", False, arg("greater_is_better"), base=BEST, against=True),
    Case("train.logging_steps", 1, trail, base=SHORT, against=2),
    Case("train.logging_strategy", "no", trail, base=SHORT | {"train.logging_steps": 1}),
    Case("train.seed", 7, arg("seed")),
    Case("train.data_seed", 7, order),
    Case("train.use_liger_kernel", True, outcome),
    Case("train.use_liger_loss", True, lambda s: s, against=False),
    Case("train.gradient_checkpointing_kwargs", {"use_reentrant": True}, arg("gradient_checkpointing_kwargs"), base={"model.gradient_checkpointing": True}),
    Case("train.group_by_length", False, order),
    Case("train.precompute_ref_log_probs", True, mode),
    Case("train.dpo_eval_enabled", True, lambda s: sorted(metrics(s)), base=EVAL | {"train.max_target_length": 6, "train.dpo_few_shot_max_samples": 0}),
    Case("train.dpo_eval_max_samples", 2, lambda s: len(s.eval_rows), base=SHOTS),
    Case("train.dpo_zero_shot_max_samples", 0, lambda s: sorted(metrics(s)), base=SHOTS),
    Case("train.dpo_few_shot_max_samples", 0, lambda s: sorted(metrics(s)), base=FEW),
    Case("train.dpo_few_shot_examples_text", "say blue: blue", asked_with_examples, base=FEW),
    # logging
    Case("logging.output_dir", Here("elsewhere"), lambda s: s.directory.path),
    Case("logging.run_name", "mine", arg("run_name")),
    Case("logging.loggers", "none", lambda s: (s.train(overwrite=True), (s.directory.path / "tensorboard").exists())[1], base=SHORT, against=["tensorboard"]),
    Case("logging.report_to", ["wandb"], lambda s: s.config.logging.loggers),
    Case("logging.log_level", "ERROR", logged, base=SHORT | {"train.logging_steps": 1}),
    Case("logging.sample_logging", {"enabled": False}, samples, base=SHORT, against=sampled()),
    sample_case("prompts", ["hello"]),
    sample_case("interval_steps", 2),
    sample_case("percent_of_max_steps", 0.5),
    sample_case("max_new_tokens", 1),
    sample_case("temperature", 0.0),
    sample_case("top_p", 0.01),
    sample_case("num_samples", 1),
    # run
    Case("backend", "trl", lambda s: s.backend, against="native"),
    Case("skip_backends", ["native", "unsloth"], lambda s: s.backend, base={"backend": "auto"}, against=["unsloth"]),
    Case("eval_split", "test", lambda s: len(s.eval_rows), base={"dataset.name": Here("splits")}, against="train"),
    Case("eval_dataset", {"name": Here("held.jsonl")}, lambda s: s.eval_rows is None),
]  # fmt: skip


def chosen_alone(batch: Any, config: Any, normalizers: Any) -> torch.Tensor:
    return -batch.chosen_log_probs[batch.chosen_mask].sum() / normalizers.num_tokens


class Watcher(TrainerCallback):
    """Does nothing."""


def shout(row: dict[str, Any], mark: str = "!") -> dict[str, Any]:
    return {**row, "chosen": row["chosen"] + mark}


def shout_or_repeat(batch: dict[str, Any]) -> dict[str, Any]:
    if isinstance(batch["chosen"], list):
        return {name: values * 2 for name, values in batch.items()}
    return shout(batch)


def attempt(observe: Observe, s: Any) -> Any:
    """What is observed, or the error in its place."""
    try:
        return observe(s)
    except AlignTuneError as error:
        return f"{type(error).__name__}: {error}"


ONE_VALUE = ("model.use_logits_to_keep", "dataset.label_pad_token_id", "train.use_liger_loss")
"""Settings of which the other value is refused."""


@pytest.mark.parametrize("case", CASES, ids=str)
def test_setting_acts(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNTUNE_CACHE", str(tmp_path / "cache"))
    common = {
        "algorithm": "dpo", "model.name_or_path": Here("model"), "model.precision": "fp32", "dataset.name": Here("pairs.jsonl"),
        "logging.output_dir": str(tmp_path / "out"), "backend": "native", "train.per_device_batch_size": 2,
    }  # fmt: skip
    case = Case(case.path, real(case.value), case.observe, real(dict(case.base)), real(case.against))
    if case.path in ONE_VALUE:
        session(real(common), {case.path: case.against})
        with pytest.raises(AlignTuneError, match=case.path.split(".")[1]):
            session(real(common), {case.path: case.value})
        return
    before, after = observed(real(common), case)
    assert before != after


ELSEWHERE = {
    "dataset.weight": "tests/data/test_mix.py", "dataset.dataset_num_proc": "tests/data/test_tokenize.py",
    "dataset.config_name": "tests/data/test_sources.py", "dataset.tools": "tests/data/test_template.py",
    "fallback": "tests/adapters/test_trl_dpo.py", "algorithm": "every other test", "datasets": "tests/config", "launch": "tests/launch",
    "rewards": "refused (tests/config)", "reward_training": "refused (tests/config)",
    "model": "sections", "dataset": "sections", "train": "sections", "logging": "sections",
}  # fmt: skip
"""Settings whose effect is observed by another test, and by which."""


def test_every_setting_has_a_case() -> None:
    sections = {"model": rl.ModelConfig, "dataset": rl.DatasetConfig, "train": DPOConfig, "logging": rl.LoggingConfig}
    names = {
        f"{section}.{name}"
        for section, cls in sections.items()
        for name in cls.model_fields
        if not_for(AlgorithmType.DPO, section, name) is None
    }
    names |= set(RLRunConfig.model_fields)
    covered = {case.path for case in CASES} | set(ELSEWHERE)
    assert names - covered == set()
    assert covered - names == set()
