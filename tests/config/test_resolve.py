"""Which value holds, where it comes from, and what is said when it cannot hold."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligntune.config import load
from aligntune.config.dump import to_yaml
from aligntune.config.enums import AlgorithmType, BackendType, PrecisionType, TaskType
from aligntune.config.load import parse_overrides, parse_value
from aligntune.config.resolve import Resolved, resolve
from aligntune.errors import ConfigError

BASE = {"model": {"name_or_path": "m"}, "dataset": {"name": "d"}}


def sft(*overrides: str, **arguments: object) -> Resolved:
    return resolve(BASE, algorithm="sft", arguments=arguments, overrides=overrides)


def rl(algorithm: str, *overrides: str, **arguments: object) -> Resolved:
    if algorithm != "dpo":
        arguments.setdefault("rewards", ["length"])
    if algorithm == "meta_es":
        arguments.setdefault("verifier", "exact_match")
    return resolve(BASE, algorithm=algorithm, arguments=arguments, overrides=overrides)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# Precedence and origins


def test_file_argument_override_in_that_order(tmp_path: Path) -> None:
    file = write(
        tmp_path / "run.yaml",
        "algorithm: sft\nmodel: {name_or_path: m}\ndataset: {name: d}\ntrain:\n  learning_rate: 2e-4\n  epochs: 5\n  seed: 1\n",
    )
    found = resolve(file, arguments={"epochs": 6, "seed": 2}, overrides=["seed=3"])
    train = found.config.train
    assert (train.learning_rate, train.epochs, train.seed, train.weight_decay) == (2e-4, 6, 3, 0.01)
    assert str(found.origin("train", "learning_rate")) == f"{file}:5"
    assert str(found.origin("train", "epochs")) == "argument epochs"
    assert str(found.origin("train", "seed")) == "override seed=3"
    assert str(found.origin("train", "weight_decay")) == "default"


def test_the_factory_names_of_the_reference() -> None:
    found = resolve(algorithm="sft", arguments={
        "model_name": "meta-llama/Llama-2-7b-hf", "dataset_name": "tatsu-lab/alpaca", "backend": "auto", "output_dir": "./output",
        "num_epochs": 3, "batch_size": 4, "learning_rate": 2e-4, "max_seq_length": 512, "max_samples": 1000,
    }).config  # fmt: skip
    assert found.model.name_or_path == "meta-llama/Llama-2-7b-hf"
    assert found.dataset.name == "tatsu-lab/alpaca"
    assert (found.train.epochs, found.train.per_device_batch_size, found.model.max_seq_length) == (3, 4, 512)
    assert (found.dataset.max_samples, found.logging.output_dir) == (1000, "./output")


@pytest.mark.parametrize("word", ["Dr-GRPO", "drgrpo", "DR_GRPO", AlgorithmType.DR_GRPO])
def test_algorithm_words(word: object) -> None:
    assert rl(word).config.algorithm is AlgorithmType.DR_GRPO


def test_enums_take_members_and_strings_in_any_case() -> None:
    found = sft(
        precision="Bf16", task_type="text-generation", backend=BackendType.TRL, use_peft=True, bias="LORA_ONLY"
    ).config
    assert found.model.precision is PrecisionType.BF16
    assert found.dataset.task_type is TaskType.TEXT_GENERATION
    assert (found.backend, found.model.bias) == (BackendType.TRL, "lora_only")


def test_include_is_overlaid(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "model: {name_or_path: base, max_seq_length: 4}\ntrain: {epochs: 9}\n")
    file = write(tmp_path / "run.yaml", "include: base.yaml\nalgorithm: sft\nmodel: {name_or_path: own}\ndataset: d\n")
    found = resolve(file)
    assert (found.config.model.name_or_path, found.config.model.max_seq_length, found.config.train.epochs) == (
        "own",
        4,
        9,
    )
    assert str(found.origin("train", "epochs")).endswith("base.yaml:2")


@pytest.mark.parametrize(("base", "own"), [
    ("model: m\n", "model: {lora_rank: 4, peft_enabled: true}\n"),
    ("model: {name_or_path: other, lora_rank: 4, peft_enabled: true}\n", "model: m\n"),
    ("model: {model_name: other, lora_rank: 4, peft_enabled: true}\n", "model: {model_name: m}\n"),
])  # fmt: skip
def test_a_name_alone_leaves_the_other_settings_of_an_include(tmp_path: Path, base: str, own: str) -> None:
    write(tmp_path / "base.yaml", base + "dataset: {name: d, max_samples: 5}\n")
    file = write(tmp_path / "run.yaml", f"include: base.yaml\nalgorithm: sft\ndataset: e\n{own}")
    found = resolve(file).config
    assert (found.model.name_or_path, found.model.lora.rank) == ("m", 4)
    assert (found.dataset.name, found.dataset.max_samples) == ("e", 5)


def test_a_name_alone_leaves_the_other_settings_of_an_include_before(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "model: {name_or_path: old, max_seq_length: 77}\n")
    write(tmp_path / "name.yaml", "model: new\n")
    file = write(tmp_path / "run.yaml", "include: [base.yaml, name.yaml]\nalgorithm: sft\ndataset: d\n")
    model = resolve(file).config.model
    assert (model.name_or_path, model.max_seq_length) == ("new", 77)


def test_include_of_itself_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml", "include: run.yaml\n")
    with pytest.raises(ConfigError, match="includes itself"):
        resolve(file)


@pytest.mark.parametrize(("text", "value"), [
    ("2e-4", 2e-4), ("1E5", 1e5), ("1.", 1.0), (".5", 0.5), ("-3", -3), ("true", True), ("yes", "yes"), ("null", None),
    ("[1, a]", [1, "a"]), ("{a: 1e-3}", {"a": 1e-3}), ("2e", "2e"), ("1_000", 1000), ("a: b: c", "a: b: c"),
])  # fmt: skip
def test_values_of_overrides(text: str, value: object) -> None:
    assert parse_value(text) == value


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_that_python_prints_is_read_as_that_number(number: float) -> None:
    assert parse_value(repr(number)) == number
    assert isinstance(parse_value(repr(number)), float)


def test_forms_of_overrides() -> None:
    tokens = ["a.b=1", "--c.d", "2", "--e=x", "--no-f", "--g", "--h", "k=v"]
    assert [(name, value) for name, value, _ in parse_overrides(tokens)] == [
        ("a.b", 1), ("c.d", 2), ("e", "x"), ("f", False), ("g", True), ("h", True), ("k", "v"),
    ]  # fmt: skip


# Synonyms


@pytest.mark.parametrize(("given", "path", "value"), [
    ({"num_epochs": 7}, "train.epochs", 7), ({"batch_size": 7}, "train.per_device_batch_size", 7),
    ({"optim": "sgd"}, "train.optimizer", "sgd"), ({"eval_steps": 7}, "train.eval_interval", 7),
    ({"logging_steps": 7}, "logging.log_interval", 7), ({"use_peft": True}, "model.peft_enabled", True),
    ({"use_peft": True, "lora_r": 7}, "model.lora_rank", 7),
    ({"use_peft": True, "lora_target_modules": ["q_proj"]}, "model.target_modules", ["q_proj"]),
    ({"config_name": "x"}, "dataset.subset", "x"), ({"config": "x"}, "dataset.subset", "x"),
    ({"field_mappings": {"a": "b"}}, "dataset.column_mapping", {"a": "b"}),
    ({"dataset_text_field": "t"}, "dataset.text_column", "t"), ({"text_column": "t"}, "dataset.dataset_text_field", "t"),
    ({"report_to": ["wandb"]}, "logging.loggers", ["wandb"]), ({"fp16": True}, "model.precision", "fp16"),
    ({"bf16": False}, "model.precision", "fp32"), ({"precision": "fp32"}, "train.bf16", False),
    ({"use_flash_attention_2": True}, "model.attn_implementation", "flash_attention_2"),
    ({"use_flash_attention_2": False}, "model.attn_implementation", "sdpa"), ({"attn_implementation": "auto"}, "train.use_flash_attention_2", None),
    ({"attn_implementation": "sdpa"}, "train.use_flash_attention_2", False),
    ({"use_gradient_checkpointing": False}, "model.gradient_checkpointing", False),
    ({"train": {"gradient_checkpointing": False}}, "model.gradient_checkpointing", False),
    ({"use_trl": True}, "backend", "trl"), ({"use_unsloth": True}, "backend", "unsloth"),
])  # fmt: skip
def test_sft_synonyms(given: dict[str, object], path: str, value: object) -> None:
    assert {row[0]: row[1] for row in sft(**given).rows()}[path] == value


@pytest.mark.parametrize(("algorithm", "given", "path", "value"), [
    ("grpo", {"lora_rank": 7}, "model.lora_r", 7), ("grpo", {"peft_enabled": False}, "model.use_peft", False),
    ("grpo", {"grpo_beta": 0.3}, "train.kl_coef", 0.3), ("grpo", {"beta": 0.3}, "train.kl_coef", 0.3),
    ("grpo", {"kl_coef": 0.3}, "train.grpo_beta", 0.3), ("grpo", {"response_length": 9}, "train.max_completion_length", 9),
    ("ppo", {"kl_coef": 0.3}, "train.beta", 0.1), ("ppo", {"response_length": 9}, "train.max_completion_length", 9), ("ppo", {}, "train.max_completion_length", 128),
    ("grpo", {}, "train.max_completion_length", 256), ("grpo", {"eval_steps": 5}, "train.eval_interval", 5),
    ("dpo", {"column_mapping": {"a": "b"}}, "dataset.field_mappings", {"a": "b"}),
    ("dpo", {"train": {"precompute_ref_log_probs": True}}, "dataset.precompute_ref_log_probs", True),
    ("dpo", {"train": {"padding_free": True}}, "dataset.padding_free", True),
])  # fmt: skip
def test_rl_synonyms(algorithm: str, given: dict[str, object], path: str, value: object) -> None:
    assert {row[0]: row[1] for row in rl(algorithm, **given).rows()}[path] == value


def test_synonyms_that_disagree_are_an_error_naming_both() -> None:
    with pytest.raises(ConfigError, match=r"train.num_epochs.*5.*synonym train.epochs is 4") as caught:
        resolve(BASE | {"train": {"epochs": 4, "num_epochs": 5}}, algorithm="sft")
    assert "keep one of" in str(caught.value)


def test_synonyms_that_agree_are_fine() -> None:
    assert sft(bf16=True, precision="bf16", fp16=False).config.model.precision is PrecisionType.BF16


@pytest.mark.parametrize("given", [
    {"precision": "fp16", "bf16": True}, {"precision": "bf16", "bf16": False}, {"bf16": True, "fp16": True},
    {"attn_implementation": "flash_attention_2", "use_flash_attention_2": False}, {"backend": "trl", "use_unsloth": True},
    {"backend": "trl", "use_trl": False}, {"text_column": "a", "dataset_text_field": "b"},
    {"gradient_checkpointing": True, "use_gradient_checkpointing": False},
])  # fmt: skip
def test_contradictory_synonyms(given: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="synonym"):
        sft(**given)


def test_a_higher_layer_wins_over_a_synonym_of_a_lower_one(tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml", "algorithm: sft\nmodel: m\ndataset: d\ntrain: {num_epochs: 4, bf16: true}\n")
    found = resolve(file, overrides=["epochs=5", "precision=fp32"]).config
    assert (found.train.epochs, found.model.precision, found.train.bf16) == (5, PrecisionType.FP32, False)


def test_use_unsloth_false_keeps_auto_from_it() -> None:
    found = sft(use_unsloth=False).config
    assert (found.backend, found.skip_backends) == (BackendType.AUTO, [BackendType.UNSLOTH])


@pytest.mark.parametrize(("lines", "counts"), [
    ("model: m\ndataset: d\nbackend: native\nlogging: {report_to: none}\ntrain: {gradient_checkpointing: false, epochs: 1}", (7, 0)),
    ("model: {name_or_path: m, use_unsloth: false}\ndataset: d\ntrain: {bf16: true, num_epochs: 2}", (6, 0)),
    ("model: m\ndataset: d\ntrain: {bf16: false}", (4, 0)),
    ("model: m\ndatasets: [{name: d, text_column: t}]\neval_split: test\ntrain: {metric_for_best_model: rougeL}", (6, 1)),
    ("model: m\ndataset: d\neval_dataset: {name: d, dataset_text_field: t}", (5, 0)),
])  # fmt: skip
def test_a_setting_counts_once(tmp_path: Path, lines: str, counts: tuple[int, int]) -> None:
    """What was written, under however many names it is shown, and what follows from it."""
    assert resolve(write(tmp_path / "run.yaml", f"algorithm: sft\n{lines}\n")).counts() == counts


# Refusals


def refusal_of(file: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(file)
    return str(caught.value)


def test_all_problems_are_reported_together_with_lines(tmp_path: Path) -> None:
    file = write(
        tmp_path / "run.yaml",
        "algorithm: sft\nmodel:\n  name_or_path: m\n  lora_rnk: 4\ndataset: {name: d}\ntrain:\n  epochs: 0\n  learning_rate: fast\nlogging: {output_dir: x, colour: red}\n",
    )
    text = refusal_of(file)
    assert text.startswith("4 problems:")
    assert f"{file}:4: model.lora_rnk: is not a setting: did you mean lora_rank?" in text
    assert f"{file}:7: train.epochs: should be greater than or equal to 1, got 0" in text
    assert f"{file}:8: train.learning_rate: should be a number, got 'fast'" in text
    assert f"{file}:9: logging.colour: is not a setting" in text


def test_problems_are_in_the_order_of_the_lines(tmp_path: Path) -> None:
    lines = ["algorithm: sft", "train:", "  lerning_rate: 1", "  epochs: 0", "model:", *["  # (line ten)"] * 4]
    file = write(tmp_path / "run.yaml", "\n".join([*lines, "  name_or_path: [m]", "  lora_rnk: 4", "dataset: d\n"]))
    with pytest.raises(ConfigError) as caught:
        resolve(file, overrides=["colour=red"])
    places = [line.strip().removeprefix(f"{file}:").split(":")[0] for line in str(caught.value).splitlines()[1:]]
    assert places == ["3", "4", "10", "11", "override colour=red"]


def test_what_follows_from_a_refused_setting_is_not_refused_too() -> None:
    with pytest.raises(ConfigError) as caught:
        sft(metric_for_best_model="rougeL")
    assert "greater_is_better" not in str(caught.value)


def test_a_path_in_a_file_is_told_its_section(tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml", "algorithm: sft\nmodel: m\ndataset: d\ntrain.epochs: 3\n")
    assert refusal_of(file) == f"{file}:4: train.epochs: is not a setting: in a file, put epochs under train:"


def test_aliases_of_aliases_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "MOST_VALUES", 1000)
    lines = ["a0: &a0 [x, x]", *(f"a{at}: &a{at} [*a{at - 1}, *a{at - 1}]" for at in range(1, 40))]
    assert "holds more than 1,000 values; aliases" in refusal_of(write(tmp_path / "run.yaml", "\n".join(lines) + "\n"))


def test_a_setting_of_another_section_is_pointed_at() -> None:
    with pytest.raises(ConfigError, match=r"say train\.learning_rate"):
        resolve(BASE | {"model": {"name_or_path": "m", "learning_rate": 1.0}}, algorithm="sft")


def test_a_typo_in_an_argument() -> None:
    with pytest.raises(ConfigError, match="lerning_rate: is not a setting: did you mean learning_rate"):
        sft(lerning_rate=1.0)


@pytest.mark.parametrize(("algorithm", "given", "message"), [
    ("dpo", {"kl_coef": 0.2}, "DPO's strength is beta"), ("dpo", {"grpo_beta": 0.2}, "beta"),
    ("ppo", {"beta": 0.2}, "kl_coef"), ("grpo", {"rpo_alpha": 1.0}, "used by dpo"), ("ppo", {"num_generations": 4}, r"no effect with ppo \(used by dapo, dr_grpo, grpo, gspo, meta_es, neural_mirror_grpo\)"),
    ("grpo", {"gamma": 0.9}, "used by ppo"), ("grpo", {"gspo_delta": 0.1}, "used by gspo"), ("grpo", {"num_generations": 1}, "at least 2"),
    ("dpo", {"eval_split": "test", "load_best_model_at_end": True}, "load_best_model_at_end: needs evaluations: set eval_strategy"),
    ("grpo", {"reward_path": "a", "reward_model_name": "b"}, "keep one"), ("dpo", {"rewards": ["length"]}, "preference pairs"),
    ("grpo", {"rewards": []}, "no reward model"), ("meta_es", {"N": 7}, "must be even"),
    ("grpo", {"reward_weights": [1.0, 2.0]}, "2 entries for 1"), ("dpo", {"label_pad_token_id": 0}, "-100"),
    ("dpo", {"loss_type": "sigmoidal"}, "should be one of sigmoid"), ("grpo", {"scale_rewards": "std"}, "group, batch, none"),
    ("dpo", {"ref_model_sync_steps": 3}, "ref_model_sync_steps: needs sync_ref_model"), ("dpo", {"ref_model_mixup_alpha": 0.5}, "alpha: needs sync_ref_model"),
    ("grpo", {"sync_ref_model": True, "kl_coef": 0.0}, "needs a reference: kl_coef is 0"), ("grpo", {"use_logits_to_keep": False}, "cannot be turned off"),
    ("grpo", {"vllm_gpu_memory_utilization": 0.5}, "needs fast_inference"), ("grpo", {"ds3_gather_for_generation": True}, "needs launch.strategy: zero3"),
])  # fmt: skip
def test_rl_refusals(algorithm: str, given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rl(algorithm, **given)


@pytest.mark.parametrize(("given", "message"), [
    ({"early_stopping_patience": 3}, "needs evaluation data"), ({"load_best_model_at_end": True}, "needs evaluation data"),
    ({"eval_split": "test", "eval_strategy": "no", "early_stopping_patience": 3}, "early_stopping_patience: needs evaluations: set eval_strategy"),
    ({"eval_split": "test", "save_strategy": "no", "load_best_model_at_end": True}, "load_best_model_at_end: needs checkpoints"),
    ({"metric_for_best_model": "rouge1"}, "metric_for_best_model: has no effect: no best"),
    ({"quantization": {"load_in_4bit": True}}, "turn LoRA on"), ({"num_labels": 3}, "classification"),
    ({"label_smoothing_factor": 0.1, "loss_type": "dft"}, "nll"), ({"per_device_batch_size": True}, "whole number, got True"),
    ({"epochs": "3"}, "whole number, got '3'"), ({"percent": 120.0}, "less than or equal to 100"), ({"dataset_name": None}, "dataset.name: .*"),
    ({"eval_split": "test", "eval_interval": 30, "save_interval": 100}, "not a multiple of eval_interval 30"),
    ({"datasets": ["a", "b"]}, "not both"), ({"algorithm": "dpo"}, "this trainer runs sft"), ({"algorithm": "foo"}, "should be one of"),
    ({"completion_only_loss": False, "assistant_only_loss": True}, "contradict each other"),
    ({"eval_split": "test", "eval_strategy": "epoch", "save_strategy": "steps", "load_best_model_at_end": True}, "load_best_model_at_end: needs checkpoints"),
    ({"selective_checkpointing": "half", "compile": False}, "needs compiled layers"),
    ({"selective_checkpointing": "half", "gradient_checkpointing": True}, "gradient_checkpointing: true exclude each other"),
    ({"activation_offloading": True, "compile": True}, "model.compile: true exclude each other"),
    ({"activation_offloading": True, "selective_checkpointing": "mlp"}, "model.selective_checkpointing: mlp exclude each other"),
    ({"optimizer": "adamw_split", "task_type": "text_classification", "num_labels": 2}, "adamw_split is for language modelling"),
    ({"optimizer": "adamw_split", "use_peft": True}, "adamw_split is for full fine-tuning"), ({"optimizer": "adamw_split", "precision": "fp32"}, "splits bfloat16 weights: .* not fp32"),
    ({"learning_rate": float("inf")}, "train.learning_rate: should be a finite number, got inf"), ({"weight_decay": float("nan")}, "weight_decay: should be"),
    ({"seed": 2**32}, "train.seed: should be less than 4294967296"), ({"output_dir": "a\0b"}, "logging.output_dir: should not hold the character NUL"),
    ({"optimizer": "adamw_split_bf16", "launch": {"launcher": "accelerate", "strategy": "zero2"}}, "adamw_split_bf16 needs whole weights"),
])  # fmt: skip
def test_sft_refusals(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sft(**given)


@pytest.mark.parametrize(("text", "message"), [
    ("a: [1", "not valid YAML"), ("- a\n", "settings by name"), ("algorithm: sft\nalgorithm: dpo\n", "set twice"),
    ("algorithm: sft\nmodel: 3\n", "should hold settings by name"),
])  # fmt: skip
def test_files_that_are_no_configs(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(write(tmp_path / "run.yaml", text))


def test_missing_file() -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        resolve("nowhere.yaml")


# Derived values


@pytest.mark.parametrize(("algorithm", "given", "path", "value"), [
    ("grpo", {}, "train.num_generations", 8), ("grpo", {"batch_size": 4}, "train.num_generations", 4),
    ("grpo", {}, "train.kl_estimator", "k3"), ("grpo", {"kl_estimator": "k2"}, "train.kl_estimator", "k2"),
    ("ppo", {}, "train.kl_estimator", "k1"), ("ppo", {}, "train.num_ppo_epochs", 4), ("ppo", {}, "train.mask_truncated_completions", False),
    ("ppo", {"mask_truncated_completions": True}, "train.mask_truncated_completions", True), ("grpo", {}, "train.mask_truncated_completions", True), ("gspo", {}, "train.num_ppo_epochs", 1),
    ("dr_grpo", {}, "train.scale_rewards", "none"), ("dr_grpo", {"scale_rewards": "group"}, "train.scale_rewards", "group"),
    ("ppo", {"num_ppo_epochs": None}, "train.num_ppo_epochs", 4), ("dpo", {"loss_type": None}, "train.loss_type", "sigmoid"),
    ("dpo", {"loss_type": None, "loss_weights": {"hinge": 1.0}}, "train.loss_type", None),
    ("dapo", {}, "train.cliprange_high", 0.28), ("dapo", {"cliprange_high": None}, "train.cliprange_high", 0.28),
    ("grpo", {}, "train.cliprange_high", None),
    ("nmgrpo", {}, "train.kl_coef", 0.0), ("meta_es", {}, "train.init_scale", 0.0), ("meta_es", {"target": "mirror"}, "train.init_scale", 0.01), ("dpo", {}, "train.epochs", 1), ("dpo", {"max_steps": 5}, "train.epochs", None),
    ("dpo", {"eval_split": "test", "eval_strategy": "steps", "load_best_model_at_end": True}, "train.metric_for_best_model", "eval_rewards/accuracies"),
    ("grpo", {"eval_split": "test", "eval_strategy": "steps", "load_best_model_at_end": True}, "train.metric_for_best_model", "eval_reward"),
    ("grpo", {"eval_split": "test", "eval_strategy": "steps", "load_best_model_at_end": True}, "train.greater_is_better", True),
    ("dpo", {"eval_split": "test", "eval_strategy": "steps", "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}, "train.greater_is_better", False),
    ("dpo", {"eval_split": "test", "eval_strategy": "steps", "load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}, "train.greater_is_better", True),
    ("grpo", {"batch_size": 2}, "train.num_generations", 2), ("grpo", {"batch_size": 1}, "train.num_generations", 8),
    ("grpo", {"batch_size": 1}, "train.gradient_accumulation_steps", 8), ("grpo", {"batch_size": 6, "num_generations": 4}, "train.gradient_accumulation_steps", 2),
    ("grpo", {"batch_size": 8, "num_generations": 4}, "train.gradient_accumulation_steps", 1),
    ("grpo", {"selective_checkpointing": "half"}, "model.gradient_checkpointing", False),
    ("dpo", {"optimizer": "adamw_split", "use_peft": False, "precision": "bf16"}, "train.optimizer", "adamw_split"),
    ("dpo", {"metric_for_best_model": None}, "train.greater_is_better", False),
])  # fmt: skip
def test_derived(algorithm: str, given: dict[str, object], path: str, value: object) -> None:
    assert {row[0]: row[1] for row in rl(algorithm, **given).rows()}[path] == value


@pytest.mark.parametrize(("batch", "why"), [(2, "per_device_batch_size"), (1, "per_device_batch_size is below 2")])
def test_why_a_group_has_its_size(batch: int, why: str) -> None:
    assert str(rl("grpo", batch_size=batch).origin("train", "num_generations")).endswith(f"({why})")


def test_the_save_interval_fits_the_evaluations() -> None:
    found = sft(eval_split="test", eval_interval=30)
    assert found.config.train.save_interval == 510
    assert "multiple of eval_interval" in str(found.origin("train", "save_interval"))


def test_evaluation_data_inherits_from_the_dataset() -> None:
    given = BASE | {"dataset": {"name": "d", "format_type": "alpaca", "max_samples": 5}, "eval_dataset": {"name": "e"}}
    found = resolve(given, algorithm="sft").config
    assert (found.eval_source.name, found.eval_source.format_type, found.eval_source.max_samples) == (
        "e",
        "alpaca",
        None,
    )


def test_eval_split_of_the_dataset() -> None:
    source = sft(eval_split="test", max_samples=4).config.eval_source
    assert (source.name, source.split, source.max_samples) == ("d", "test", None)


# Round trip


@pytest.mark.parametrize("found", [
    sft(bf16=False, num_epochs=2, eval_split="test", eval_interval=30), sft(use_unsloth=False, quantization={"load_in_4bit": True}, use_peft=True),
    rl("grpo", grpo_beta=0.02, rewards=["length", {"type": "math_correctness", "weight": 2.0}]), rl("ppo", response_length=16),
    rl("dpo", loss_weights={"sigmoid": 0.8, "sft": 1.0}), rl("meta_es", N=4, sample_logging={"enabled": True, "interval_steps": 5}),
])  # fmt: skip
def test_the_written_config_resolves_to_the_same_run(tmp_path: Path, found: Resolved) -> None:
    again = resolve(write(tmp_path / "config.yaml", to_yaml(found)))
    assert again.config == found.config


def test_a_name_that_is_no_identifier_is_shown(tmp_path: Path) -> None:
    file = write(
        tmp_path / "run.yaml",
        "algorithm: sft\nmodel: {name_or_path: m}\ndataset: {name: d}\ntrain:\n  learning-rate: 1e-4\nx-common: 1\n",
    )
    said = refusal_of(file)
    assert f"{file}:5: train.learning-rate: is not a setting: did you mean learning_rate?" in said
    assert f"{file}:6: x-common: is not a setting" in said


def test_an_override_that_is_given_twice() -> None:
    with pytest.raises(ConfigError, match=r"train\.epochs: is given twice: 1 \(override epochs=1\), then 2; keep one"):
        sft("epochs=1", "epochs=2")


def test_a_union_is_one_problem() -> None:
    with pytest.raises(ConfigError) as raised:
        sft("peft_enabled=true", "target_modules=[1]")
    assert str(raised.value) == "override target_modules=[1]: model.target_modules.0: should be text, got 1"


def test_a_number_in_a_name_that_is_no_list() -> None:
    with pytest.raises(ConfigError, match=r"dataset\.0: is not a setting"):
        sft("dataset.0.name=rows.jsonl")


def test_a_metrics_model_without_the_metric() -> None:
    for metric in ("bertscore", "semantic_similarity"):
        with pytest.raises(ConfigError, match=rf"{metric}_model: needs compute_{metric}: true"):
            sft(**{f"{metric}_model": "m"})
        assert (
            getattr(sft(**{f"{metric}_model": "m", f"compute_{metric}": True}).config.evaluation, f"{metric}_model")
            == "m"
        )


def test_an_argument_that_torchs_checkpoint_would_drop() -> None:
    with pytest.raises(ConfigError, match=r"use_reentrent is not an argument .*did you mean use_reentrant\?"):
        sft(gradient_checkpointing_kwargs={"use_reentrent": True})


def test_an_unknown_logger_is_said_by_validate() -> None:
    from aligntune.config.enums import LOGGERS
    from aligntune.reporting import sinks

    assert set(LOGGERS) == set(sinks.LOGGERS)
    for named in ("tensorbord", ["wandb", "tensorbord"]):
        with pytest.raises(ConfigError, match=r"loggers: unknown logger 'tensorbord': did you mean tensorboard\?"):
            sft(loggers=named)
    for named in ("none", "all", [], ["TensorBoard"]):
        assert sft(loggers=named).config.logging.loggers == named
