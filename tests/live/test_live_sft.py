"""Every setting of supervised fine-tuning acts: each is changed, and an effect is observed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import tiny
from aligntune.config import sft
from aligntune.config.run import RunConfig
from aligntune.errors import AlignTuneError
from aligntune.models.load import loading_arguments
from live.cases import Case, Observe, four_bits, observed, session
from live.compiled import kept

pytestmark = pytest.mark.usefixtures("short_answers")

FOLDER: dict[str, Path] = {}


@pytest.fixture(scope="module", autouse=True)
def _files(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = FOLDER["root"] = tmp_path_factory.mktemp("live")
    tiny.write_model(folder / "model")
    tiny.write_model(folder / "other", seed=1)
    tiny.write_rows(folder / "chats.jsonl", tiny.chats(12))
    tiny.write_rows(folder / "eval.jsonl", tiny.chats(4, start=50))
    tiny.write_rows(folder / "alpaca.jsonl", tiny.alpaca(12))
    tiny.write_rows(folder / "odd.jsonl", [
        {"q": "hi", "a": "lo", "instruction": "i", "response": "r", "output": "o", "input": "in", "context": "c", "text": "t t",
         "label": at % 2, "other_label": 1 - at % 2, "words": ["a", "b"], "tokens": ["c", "d"], "ner_tags": ["O", "B-X"],
         "tags": ["B-X", "O"], "messages": tiny.chats(1)[0]["messages"], "talk": tiny.chats(1, 9)[0]["messages"]}
        for at in range(6)
    ])  # fmt: skip
    data = folder / "splits"
    data.mkdir()
    tiny.write_rows(data / "train.jsonl", tiny.chats(6))
    tiny.write_rows(data / "test.jsonl", tiny.chats(5, 20))


class Here:
    """A path inside the fixtures' folder, resolved when the test runs."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


def real(value: Any) -> Any:
    if isinstance(value, Here):
        return str(FOLDER["root"] / value.name)
    return {key: real(part) for key, part in value.items()} if isinstance(value, dict) else value


# Observations ---------------------------------------------------------------------------------------------------------


def arg(name: str) -> Observe:
    """A field of the trainer's arguments, as the trainer holds it."""
    return lambda s: getattr(s.build_trainer().args, name)


def rows(s: Any) -> Any:
    return [(list(row["input_ids"]), list(row["labels"])) for row in s.train_rows]


def lora(name: str) -> Observe:
    return lambda s: getattr(s.model.peft_config["default"], name)


def loading(name: str) -> Observe:
    """An argument of `from_pretrained`."""
    return lambda s: loading_arguments(s.config.model, s.precision, trained=True).get(name)


def refusal(s: Any) -> str:
    """The error that a setting leads to on this machine."""
    try:
        s.model  # noqa: B018
        s.build_trainer()
    except AlignTuneError as error:
        return str(error)
    return "none"


def batch(s: Any) -> Any:
    trainer = s.build_trainer()
    return {
        name: tuple(value.shape)
        for name, value in next(iter(trainer.get_train_dataloader())).items()
        if hasattr(value, "shape")
    }


def pieces(s: Any) -> int:
    """Of the first training batch; TRL's batches have none."""
    return len(next(iter(s.build_trainer().get_train_dataloader())).get("pieces", ()))


def loss(s: Any) -> float:
    """The loss of the first training batch."""
    trainer = s.build_trainer()
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    torch.manual_seed(0)
    return round(float(trainer.compute_loss(trainer.model, inputs).detach()), 6)


def called(s: Any) -> list[str]:
    return [type(each).__name__ for each in s.build_trainer().callback_handler.callbacks]


def metric_names(s: Any) -> Any:
    return sorted(
        name for name in s.evaluate() if name.startswith("eval_") and not name.endswith(("_runtime", "_per_second"))
    )


def checkpoints(s: Any) -> Any:
    s.train(overwrite=True)
    return sorted(path.name for path in s.directory.checkpoints.glob("checkpoint-*"))


def trail(s: Any) -> Any:
    """Steps at which something was logged, by split."""
    s.train(overwrite=True)
    lines = [json.loads(line) for line in s.directory.metrics.path.read_text().splitlines()]
    return [(line["split"], line["step"]) for line in lines]


def callbacks(name: str) -> Observe:
    def look(s: Any) -> Any:
        found = [vars(callback) for callback in s.build_trainer().callback_handler.callbacks]
        return [attributes[name] for attributes in found if name in attributes]

    return look


def logged(s: Any) -> Any:
    """Which lines the run's console showed."""
    import io
    from contextlib import redirect_stdout

    with redirect_stdout(io.StringIO()) as out:
        s.train(overwrite=True)
    return len(out.getvalue().splitlines()) > 0


LORA = {"model.peft_enabled": True}
EVAL = {"eval_dataset": {"name": Here("eval.jsonl")}, "evaluation.max_new_tokens": 2}
SHORT = {"train.max_steps": 2}
ODD = {"dataset.name": Here("odd.jsonl")}
ALPACA = {"dataset.name": Here("alpaca.jsonl")}


def alpaca_rows(**more: Any) -> dict[str, Any]:
    return ODD | {"dataset.format_type": "alpaca", "dataset.task_type": "instruction_following"} | more


CASES: list[Case] = [
    # model
    Case("model.name_or_path", Here("other"), lambda s: float(next(s.model.parameters()).detach().sum())),
    Case("model.precision", "fp16", lambda s: s.config.train.fp16, against="fp32"),
    Case("model.quantization", {"load_in_4bit": True}, four_bits(lambda s: s.model), base=LORA),
    Case("model.compile", True, kept),
    Case("model.selective_checkpointing", "half", kept),
    Case("model.attn_implementation", "eager", lambda s: s.model.config._attn_implementation),
    Case("model.gradient_checkpointing", False, arg("gradient_checkpointing")),
    Case("model.use_gradient_checkpointing", False, arg("gradient_checkpointing")),
    Case("model.max_memory", {"cpu": "1MB"}, loading("max_memory")),
    Case("model.device_map", {"": "cpu"}, loading("device_map")),
    Case("model.use_unsloth", True, lambda s: str(s.config.backend), base={"backend": "auto"}),
    Case("model.max_seq_length", 16, rows),
    Case("model.peft_enabled", True, lambda s: hasattr(s.model, "peft_config")),
    Case("model.lora_rank", 4, lora("r"), base=LORA),
    Case("model.lora_alpha", 4, lora("lora_alpha"), base=LORA),
    Case("model.lora_dropout", 0.5, lora("lora_dropout"), base=LORA),
    Case("model.target_modules", ["o_proj"], lora("target_modules"), base=LORA),
    Case("model.bias", "all", lora("bias"), base=LORA),
    Case("model.model_init_kwargs", {"attention_dropout": 0.5}, lambda s: s.model.config.attention_dropout),
    # dataset
    Case("dataset.name", Here("alpaca.jsonl"), rows),
    Case("dataset.split", "test", rows, base={"dataset.name": Here("splits")}),
    Case("dataset.subset", "some", lambda s: s.config.dataset.subset),
    Case("dataset.percent", 50.0, lambda s: len(s.train_rows)),
    Case("dataset.max_samples", 3, lambda s: len(s.train_rows)),
    Case("dataset.column_mapping", {"q": "instruction2"}, lambda s: sorted(s.raw_rows(s.config.dataset).column_names), base=ODD),
    Case("dataset.task_type", "text_generation", rows, base=ODD | {"dataset.auto_detect_fields": True}, against="chat_completion"),
    Case("dataset.auto_detect_fields", True, lambda s: outcome(rows, s), base={"dataset.name": Here("qa.jsonl")}),
    Case("dataset.format_type", "text", rows, base=ODD, against="messages"),
    Case("dataset.text_column", "q", rows, base=ODD | {"dataset.format_type": "text"}),
    Case("dataset.dataset_text_field", "q", rows, base=ODD | {"dataset.format_type": "text"}),
    Case("dataset.instruction_column", "q", rows, base=alpaca_rows()),
    Case("dataset.output_column", "a", rows, base=alpaca_rows()),
    Case("dataset.input_column", "q", rows, base=alpaca_rows()),
    Case("dataset.response_column", "a", rows, base=alpaca_rows() | {"dataset.format_type": "dolly"}),
    Case("dataset.context_column", "q", rows, base=alpaca_rows() | {"dataset.format_type": "dolly"}),
    Case("dataset.messages_column", "talk", rows, base=ODD | {"dataset.format_type": "messages"}),
    Case("dataset.chat_template", "zephyr", rows),
    Case("dataset.dataset_num_proc", 2, lambda s: s.config.train.dataset_num_proc),
    Case("dataset.pad_token", "<|im_start|>", lambda s: s.tokenizer.pad_token),
    Case("dataset.preserve_columns", ["q"], lambda s: s.train_rows.column_names, base=ODD | {"dataset.format_type": "text"}),
    Case("dataset.processing_fn", "live.test_live_sft:shout", rows),
    Case("dataset.processing_batched", True, rows, base={"dataset.processing_fn": "live.test_live_sft:shout_or_repeat"}),
    Case("dataset.processing_fn_kwargs", {"mark": "?"}, rows, base={"dataset.processing_fn": "live.test_live_sft:shout"}),
    Case("dataset.streaming", True, lambda s: type(s.train_rows).__name__, base=SHORT),
    Case("dataset.system_prompt", "be brief", rows),
    # train
    Case("train.per_device_batch_size", 3, arg("per_device_train_batch_size")),
    Case("train.gradient_accumulation_steps", 3, arg("gradient_accumulation_steps")),
    Case("train.micro_batch_tokens", 64, pieces, base={"train.per_device_batch_size": 4}),
    Case("train.max_steps", 3, arg("max_steps")),
    Case("train.epochs", 1, arg("num_train_epochs")),
    Case("train.learning_rate", 1e-3, arg("learning_rate")),
    Case("train.weight_decay", 0.5, arg("weight_decay")),
    Case("train.warmup_steps", 5, arg("warmup_steps")),
    Case("train.warmup_ratio", 0.5, arg("warmup_steps")),
    Case("train.eval_interval", 1, trail, base=EVAL | SHORT, against=2),
    Case("train.save_interval", 1, checkpoints, base=SHORT),
    Case("train.max_grad_norm", 0.5, arg("max_grad_norm")),
    Case("train.fp16", True, lambda s: str(s.config.model.precision)),
    Case("train.bf16", True, lambda s: str(s.config.model.precision), against=False),
    Case("train.dataloader_num_workers", 1, arg("dataloader_num_workers")),
    Case("train.remove_unused_columns", True, arg("remove_unused_columns")),
    Case("train.optimizer", "sgd", arg("optim")),
    Case("train.lr_scheduler", "linear", arg("lr_scheduler_type")),
    Case("train.group_by_length", True, arg("train_sampling_strategy")),
    Case("train.dataloader_drop_last", True, arg("dataloader_drop_last")),
    Case("train.eval_accumulation_steps", 2, arg("eval_accumulation_steps")),
    Case("train.label_smoothing_factor", 0.2, loss),
    Case("train.early_stopping_patience", 2, callbacks("early_stopping_patience"), base=EVAL),
    Case("train.early_stopping_threshold", 0.5, callbacks("early_stopping_threshold"), base=EVAL | {"train.early_stopping_patience": 1}),
    Case("train.load_best_model_at_end", False, arg("load_best_model_at_end"), base=EVAL),
    Case("train.metric_for_best_model", "eval_bleu", arg("metric_for_best_model"), base=EVAL),
    Case("train.greater_is_better", True, arg("greater_is_better"), base=EVAL),
    Case("train.use_trl", True, lambda s: s.backend, base={"backend": "auto"}),
    Case("train.dataset_num_proc", 2, lambda s: s.config.dataset.dataset_num_proc),
    Case("train.packing", True, rows, base={"model.max_seq_length": 128}),
    Case("train.packing_strategy", "wrapped", rows, base={"train.packing": True, "model.max_seq_length": 64}),
    Case("train.eval_packing", True, lambda s: len(s.eval_rows), base=EVAL),
    Case("train.padding_free", True, batch, base={"train.per_device_batch_size": 2}),
    Case("train.pad_to_multiple_of", 64, batch),
    Case("train.completion_only_loss", True, rows),
    Case("train.assistant_only_loss", True, rows),
    Case("train.loss_type", "dft", loss),
    Case("train.loss_function", "live.test_live_sft:squared", loss, base={"backend": "native"}),
    Case("train.callbacks", ["live.test_live_sft:Watcher"], called),
    Case("train.activation_offloading", True, refusal),
    Case("train.use_flash_attention_2", False, lambda s: s.config.model.attn_implementation),
    Case("train.gradient_checkpointing", False, arg("gradient_checkpointing")),
    Case("train.gradient_checkpointing_kwargs", {"use_reentrant": True}, arg("gradient_checkpointing_kwargs")),
    Case("train.seed", 7, arg("seed")),
    Case("train.data_seed", 7, arg("data_seed")),
    Case("train.save_total_limit", 1, checkpoints, base=SHORT | {"train.save_interval": 1}),
    Case("train.use_liger_kernel", True, refusal),
    # evaluation
    Case("evaluation.compute_perplexity", False, metric_names, base=EVAL),
    Case("evaluation.compute_rouge", False, metric_names, base=EVAL),
    Case("evaluation.compute_bleu", False, metric_names, base=EVAL),
    Case("evaluation.compute_meteor", True, metric_names, base=EVAL),
    Case("evaluation.compute_codebleu", True, metric_names, base=EVAL),
    Case("evaluation.compute_bertscore", True, lambda s: outcome(metric_names, s), base=EVAL),  # its own model is not on disk
    Case("evaluation.compute_semantic_similarity", True, lambda s: outcome(metric_names, s), base=EVAL),
    Case("evaluation.custom_metrics", ["live.test_live_sft:mean_length"], metric_names, base=EVAL),
    Case("evaluation.max_samples_for_quality_metrics", 2, lambda s: len(s.evaluator.chosen), base=EVAL),
    Case("evaluation.bertscore_model", Here("nowhere"), lambda s: outcome(metric_names, s), base=EVAL | {"evaluation.compute_bertscore": True}, against=Here("model")),
    Case("evaluation.semantic_similarity_model", Here("nowhere"), lambda s: outcome(metric_names, s), base=EVAL | {"evaluation.compute_semantic_similarity": True}, against=Here("model")),
    Case("evaluation.max_new_tokens", 5, lambda s: s.evaluator.max_new_tokens, base=EVAL),
    # logging
    Case("logging.output_dir", Here("elsewhere"), lambda s: s.directory.path),
    Case("logging.run_name", "mine", arg("run_name")),
    Case("logging.loggers", "none", lambda s: (s.train(overwrite=True), (s.directory.path / "tensorboard").exists())[1], base=SHORT, against=["tensorboard"]),
    Case("logging.report_to", ["wandb"], lambda s: s.config.logging.loggers),
    Case("logging.log_level", "ERROR", logged, base=SHORT),
    Case("logging.log_interval", 1, trail, base=SHORT),
    Case("logging.save_strategy", "no", checkpoints, base=SHORT),
    Case("logging.eval_strategy", "no", trail, base=EVAL | SHORT),
    # run
    Case("backend", "native", lambda s: s.backend),
    Case("skip_backends", ["native"], lambda s: s.backend, base={"backend": "auto"}),
    Case("eval_split", "test", lambda s: len(s.eval_rows), base={"dataset.name": Here("splits")}, against="train"),
]  # fmt: skip


def squared(log_probs: torch.Tensor) -> torch.Tensor:
    return log_probs**2


class Watcher(TrainerCallback):
    """Does nothing."""


def shout(row: dict[str, Any], mark: str = "!") -> dict[str, Any]:
    return {"messages": [{**message, "content": message["content"] + mark} for message in row["messages"]]}


def shout_or_repeat(rows: dict[str, Any]) -> dict[str, Any]:
    if isinstance(rows["messages"][0], list):
        return {"messages": rows["messages"] * 2}
    return shout(rows)


def mean_length(predictions: list[str], references: list[str], **columns: Any) -> dict[str, float]:
    return {"mean_length": sum(map(len, predictions)) / len(predictions)}


def outcome(observe: Observe, s: Any) -> Any:
    """What is observed, or the error in its place."""
    try:
        return observe(s)
    except AlignTuneError as error:
        return f"{type(error).__name__}: {error}"


TRL_ONLY = ("train.padding_free", "train.use_trl")
"""The native trainer never pads."""


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.path.startswith("train.") and case.path not in TRL_ONLY], ids=str
)
def test_training_setting_acts_on_the_native_backend_too(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path, "native")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_setting_acts(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path, "trl")


def check(case: Case, tmp_path: Path, backend: str) -> None:
    tiny.write_rows(FOLDER["root"] / "qa.jsonl", [{"question": "hi there", "answer": "lo"}] * 4)
    common = {
        "algorithm": "sft", "model.name_or_path": Here("model"), "model.precision": "fp32", "dataset.name": Here("chats.jsonl"),
        "logging.output_dir": str(tmp_path / "out"), "backend": backend,
    }  # fmt: skip
    if case.path in ("train.fp16", "train.bf16"):
        del common["model.precision"]
    case = Case(case.path, real(case.value), case.observe, real(dict(case.base)), real(case.against))
    before, after = observed(real(common), case)
    assert before != after


ELSEWHERE = {
    "model.num_labels": "test_live_classification", "dataset.label_column": "test_live_classification", "dataset.tokens_column": "test_live_classification",
    "dataset.tags_column": "test_live_classification", "dataset.weight": "test_weights_of_a_mixture", "fallback": "test_no_fallback",
    "train.dataset_kwargs": "tests/data/test_sources.py", "algorithm": "every other test", "launch": "tests/launch",
}  # fmt: skip
"""Settings whose effect is observed by another test, and by which."""


def test_every_setting_has_a_case() -> None:
    sections = {"model": sft.ModelConfig, "dataset": sft.DatasetConfig, "train": sft.TrainingConfig,
                "evaluation": sft.EvaluationConfig, "logging": sft.LoggingConfig}  # fmt: skip
    names = {f"{section}.{name}" for section, cls in sections.items() for name in cls.model_fields}
    names |= set(RunConfig.model_fields)
    covered = {case.path for case in CASES} | set(ELSEWHERE)
    assert names - covered == set()
    assert covered - names == set()


def test_weights_of_a_mixture(tmp_path: Path) -> None:
    root = FOLDER["root"]
    common = {
        "algorithm": "sft",
        "model.name_or_path": str(root / "model"),
        "model.precision": "fp32",
        "logging.output_dir": str(tmp_path),
    }
    sizes = [
        len(session(common, {"datasets": [{"name": str(root / "chats.jsonl"), "weight": weight}, {"name": str(root / "eval.jsonl")}]}).train_rows)
        for weight in (1.0, 9.0)
    ]  # fmt: skip
    assert sizes[0] != sizes[1]


def test_no_fallback(tmp_path: Path) -> None:
    from aligntune.errors import BackendError

    common = {"algorithm": "sft", "model.name_or_path": "m", "dataset.name": "d", "backend": "unsloth"}
    assert session(common, {}).backend != "unsloth"
    with pytest.raises(BackendError, match="unsloth"):
        session(common, {"fallback": False})
