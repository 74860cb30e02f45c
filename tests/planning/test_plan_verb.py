"""`aligntune plan`: counts against a real run, advice that is true, what it prints, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tiny
from aligntune.api import create_sft_trainer
from aligntune.config.resolve import resolve
from aligntune.errors import AlignTuneError, ConfigError
from aligntune.planning import plan as planning
from aligntune.planning.memory import GIB, needed, peak
from aligntune.planning.plan import make_plan
from aligntune.planning.rows import count_rows

QWEN = {"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True}  # fmt: skip


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    """A model of which there is only the config."""
    (tmp_path / "qwen").mkdir()
    (tmp_path / "qwen" / "config.json").write_text(json.dumps(QWEN))
    return tmp_path / "qwen"


def run(folder: Path, algorithm: str = "sft", **sections: Any) -> dict[str, Any]:
    config = {"algorithm": algorithm, "model": {"name_or_path": str(folder)}, "dataset": {"name": "hub/rows"}}
    if algorithm not in ("sft", "dpo"):
        config["rewards"] = [{"type": "gsm8k"}]
    for name, values in sections.items():
        config[name] = config.get(name, {}) | values if isinstance(values, dict) else values
    return config


# Steps --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "train"),
    [
        (11, {"per_device_batch_size": 2, "gradient_accumulation_steps": 3, "epochs": 2}),
        (10, {"per_device_batch_size": 4, "epochs": 1, "dataloader_drop_last": True}),
    ],
)
def test_steps_are_those_of_the_run(rows: int, train: dict[str, Any], tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "model")
    data = tiny.write_rows(tmp_path / "rows.jsonl", tiny.chats(rows))
    config = run(
        model, model={"name_or_path": str(model), "precision": "fp32"}, dataset={"name": str(data)}, eval_dataset={"name": str(data)}, backend="native",
        train=train | {"eval_interval": 2, "save_interval": 2}, logging={"output_dir": str(tmp_path / "out"), "loggers": "none"},
        evaluation={"compute_rouge": False, "compute_bleu": False},
    )  # fmt: skip
    found = make_plan(config).steps
    trainer = create_sft_trainer(config=config)
    trainer.train()
    assert found.rows == rows
    assert found.steps == trainer.trainer.state.global_step
    evaluated = [entry["step"] for entry in trainer.trainer.state.log_history if "eval_loss" in entry]
    assert found.evaluations == len(evaluated)
    assert found.checkpoints is not None
    assert found.checkpoints >= len(list((tmp_path / "out" / "checkpoints").glob("checkpoint-*")))


@pytest.mark.parametrize(("strategy", "held_out", "count"), [("no", True, 1), ("no", False, 0), ("steps", True, 3)])
def test_the_evaluation_at_the_end_counts(qwen: Path, strategy: str, held_out: bool, count: int) -> None:
    """Ten steps: before the first, after the fifth, after the last."""
    train = {"max_steps": 10, "eval_strategy": strategy, "eval_interval": 5}
    rest = {"eval_dataset": {"name": "hub/held"}} if held_out else {}
    train = train if held_out else {"max_steps": 10}
    assert make_plan(run(qwen, "dpo", train=train, **rest)).steps.evaluations == count


def test_the_trainings_of_an_evolution(qwen: Path) -> None:
    """Two generations of a centre and four candidates, and the last centre."""
    train = {"verifier": "exact_match", "meta_iterations": 2, "N": 4, "T": 3, "max_steps": 5, "num_generations": 8}
    config = run(qwen, "meta_es", train=train, eval_dataset={"name": "hub/held"})
    assert make_plan(config).steps.evolution == (11, 3)
    assert make_plan(run(qwen, "grpo", train={"max_steps": 5})).steps.evolution is None


def test_steps_of_online_algorithms(qwen: Path, tmp_path: Path) -> None:
    data = tiny.write_rows(tmp_path / "rows.jsonl", tiny.alpaca(100))
    train = {"per_device_batch_size": 4, "gradient_accumulation_steps": 4, "num_generations": 8, "rollout_batch_size": 8, "num_ppo_epochs": 2,
             "max_completion_length": 100}  # fmt: skip
    config = run(qwen, "grpo", dataset={"name": str(data), "max_samples": 50}, train=train)
    steps = make_plan(config).steps
    assert steps.rollouts is not None
    assert (steps.rollouts.prompts, steps.rollouts.completions, steps.rollouts.completion_tokens) == (8, 64, 6400)
    assert (steps.rollouts.passes, steps.rollouts.steps) == (2, 8)  # 2 passes over 64 completions, 16 a step
    assert steps.steps == 7 * 8  # 50 prompts are 7 phases of 8
    with pytest.raises(ConfigError, match="do not fill whole"):
        make_plan(run(qwen, "grpo", train=train | {"rollout_batch_size": 3}))


def test_several_processes_share(qwen: Path) -> None:
    alone = make_plan(run(qwen, train={"max_steps": 5}))
    config = run(
        qwen, train={"max_steps": 5}, launch={"launcher": "accelerate", "strategy": "fsdp2", "num_processes": 4}
    )
    four = make_plan(config)
    assert four.steps.global_batch == 4 * alone.steps.global_batch
    assert four.moments["optimiser step"]["weights"] == alone.moments["optimiser step"]["weights"] / 4


def test_ddp_keeps_gradients(qwen: Path) -> None:
    """In its buckets, from step to step; on backends other than native once more beside them."""
    launch = {"launcher": "torchrun", "num_processes": 2}
    end, weights = "end of the forward pass", 4 * 494_032_768
    native = make_plan(run(qwen, train={"max_steps": 5}, launch=launch, backend="native"))
    assert native.moments[end]["gradients"] == native.moments["optimiser step"]["gradients"] == weights
    trl = make_plan(run(qwen, train={"max_steps": 5}, launch=launch, backend="trl"))
    assert "gradients" not in trl.moments[end]
    assert trl.moments[end]["gradient buckets of DDP"] == trl.moments["optimiser step"]["gradients"] == weights


def test_rows_are_counted_without_loading(tmp_path: Path) -> None:
    from datasets import Dataset

    from aligntune.config.sft import DatasetConfig

    rows = [{"text": "a\nb", "number": at} for at in range(7)]
    table = Dataset.from_list(rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    tiny.write_rows(tmp_path / "rows.jsonl", rows)
    table.to_csv(tmp_path / "rows.csv")
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "saved")
    for name in ("rows.json", "rows.jsonl", "rows.csv", "rows.parquet", "saved"):
        assert count_rows([DatasetConfig(name=str(tmp_path / name))]) == 7, name
    file = str(tmp_path / "rows.jsonl")
    assert count_rows([DatasetConfig(name=file, percent=50.0, max_samples=3)]) == 3
    assert count_rows([DatasetConfig(name=file, percent=50.0)]) == 4  # round(3.5)
    assert count_rows([DatasetConfig(name=file, split="train[:10%]")]) is None
    assert count_rows([DatasetConfig(name="hub/rows")]) is None
    assert count_rows([DatasetConfig(name=file), DatasetConfig(name=file)]) == 14
    assert count_rows([DatasetConfig(name=file, weight=3.0), DatasetConfig(name=file, weight=1.0)]) == 28  # 21 and 7


# Memory -------------------------------------------------------------------------------------------------------------


def lines(config: dict[str, Any]) -> set[str]:
    return {line for part in make_plan(config).moments.values() for line in part}


def test_what_each_algorithm_holds(qwen: Path, tmp_path: Path) -> None:
    full = {"use_peft": False}
    assert "reference model" in lines(run(qwen, "dpo", model=full))
    assert "reference model" not in lines(run(qwen, "dpo"))  # the adapter is switched off
    assert "reference model" in lines(run(qwen, "dpo", model={"force_use_ref_model": True}))
    assert "reference model" not in lines(run(qwen, "dpo", model=full, dataset={"precompute_ref_log_probs": True}))
    assert "reference model" not in lines(run(qwen, "dpo", model=full, train={"reference_free": True}))
    for algorithm in ("grpo", "dapo", "dr_grpo", "gspo", "neural_mirror_grpo", "ppo"):
        assert {"rollout cache", "reading prompts"} <= lines(run(qwen, algorithm)), algorithm
    assert "reference model" in lines(run(qwen, "ppo", model=full))
    assert "reference model" not in lines(run(qwen, "grpo", model=full, train={"kl_coef": 0.0}))
    valued = lines(run(qwen, "ppo", model={"reward_value_model": str(qwen), "reward_path": str(qwen)}))
    assert {"value model's weights and states", "value model's activations", "reward model"} <= valued
    (tmp_path / "reward" / "model").parent.mkdir()
    (tmp_path / "reward" / "model").symlink_to(qwen)
    assert "reward model" in lines(run(qwen, "ppo", model={"reward_path": str(tmp_path / "reward")}))  # a run's folder
    classifier = {"dataset": {"task_type": "text_classification"}}
    assert "logits" not in lines(run(qwen, **classifier))


@pytest.mark.parametrize("algorithm", ["dpo", "ppo", "grpo", "dapo", "dr_grpo", "gspo", "neural_mirror_grpo"])
def test_the_plan_knows_what_the_algorithm_says_of_itself(algorithm: str, qwen: Path) -> None:
    from aligntune.algorithms import base
    from aligntune.planning.situation import phases_of
    from aligntune.trainers import online_plan

    spec = base.get(algorithm)
    trains: list[dict[str, Any]] = (
        [{}, {"reference_free": True}] if algorithm == "dpo" else [{"kl_coef": 0.0}, {"kl_coef": 0.1}]
    )
    for train in trains:
        found = resolve(run(qwen, algorithm, train=train)).config
        assert found.has_reference == spec.needs(found.train).reference, train
        if algorithm != "dpo":
            assert phases_of(found) == online_plan.make_plan(found, spec.group_relative)


def test_a_classifier_has_no_language_model_head(tmp_path: Path) -> None:
    for tied in (True, False):
        (tmp_path / "config.json").write_text(json.dumps(QWEN | {"tie_word_embeddings": tied}))
        plan = make_plan(run(tmp_path, dataset={"task_type": "token_classification"}))
        assert plan.situation.training.shape.parameters == 494_032_768
        assert plan.moments["end of the backward pass"]["gradients"] == 4 * 494_032_768
        assert "gradient of the embedding" not in plan.moments["end of the backward pass"]


def test_precision_and_quantisation(qwen: Path) -> None:
    adapter = {"peft_enabled": True}
    weights = {
        name: make_plan(run(qwen, model=adapter | more)).moments["optimiser step"]["weights"]
        for name, more in {
            "bf16": {},
            "fp32": {"precision": "fp32"},
            "4bit": {"quantization": {"load_in_4bit": True}},
        }.items()
    }
    assert weights["4bit"] < weights["bf16"] < weights["fp32"]


# Advice -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "card", "train"),
    [("sft", 20, {"per_device_batch_size": 8}), ("sft", 6, {"per_device_batch_size": 8}), ("sft", 2.2, {"per_device_batch_size": 8}),
     ("dpo", 12, {"per_device_batch_size": 8}), ("dpo", 4, {"per_device_batch_size": 8}), ("grpo", 16, {"per_device_batch_size": 16, "gradient_accumulation_steps": 2})],
)  # fmt: skip
def test_advice_is_true(algorithm: str, card: float, train: dict[str, Any], qwen: Path) -> None:
    """Planning the config with the proposed settings gives the promised size, and it fits."""
    config = run(
        qwen,
        algorithm,
        model={"gradient_checkpointing": False} | ({} if algorithm == "sft" else {"use_peft": False}),
        train=train,
    )
    plan = make_plan(config, card=card * GIB)
    assert plan.fits is False
    assert plan.advice is not None
    assert plan.advice.fits
    overrides = [override for change in plan.advice.changes for override in change.overrides]
    again = make_plan(config, overrides, card=card * GIB)
    assert again.fits
    assert again.needs == plan.advice.peak
    assert plan.needs - sum(change.saves for change in plan.advice.changes) == pytest.approx(again.needs)
    assert again.steps.global_batch == plan.steps.global_batch
    assert all(change.saves > 0 for change in plan.advice.changes)


def test_advice_begins_with_what_costs_least(qwen: Path) -> None:
    config = run(qwen, backend="trl", model={"gradient_checkpointing": False}, train={"per_device_batch_size": 8})
    plan = make_plan(config, card=20 * GIB)
    assert plan.advice is not None
    assert [change.overrides for change in plan.advice.changes] == [("model.gradient_checkpointing=true",)]
    batch = make_plan(config, card=10 * GIB)
    assert batch.advice is not None
    assert [change.overrides for change in batch.advice.changes] == [
        ("model.gradient_checkpointing=true",),
        ("train.per_device_batch_size=2", "train.gradient_accumulation_steps=4"),
    ]
    hopeless = make_plan(config, card=0.7 * GIB)
    assert hopeless.advice is not None
    assert not hopeless.advice.fits


def changes(config: dict[str, Any], card: float) -> list[tuple[str, ...]]:
    plan = make_plan(config, card=card * GIB)
    assert plan.advice is not None
    assert plan.advice.fits
    return [change.overrides for change in plan.advice.changes]


def test_advice_for_the_native_backend(qwen: Path) -> None:
    """First what layers recompute, then moments in bfloat16, then gradient checkpointing in place of the first."""
    config = run(
        qwen,
        backend="native",
        model={"gradient_checkpointing": False},
        train={"per_device_batch_size": 8, "max_steps": 5},
    )
    mlp, split = ("model.selective_checkpointing=mlp",), ("train.optimizer=adamw_split_bf16",)
    checkpointing = ("model.gradient_checkpointing=true",)
    assert changes(config, 20) == [("model.selective_checkpointing=cheap",)]
    assert changes(config, 17) == [("model.selective_checkpointing=half",)]
    assert changes(config, 14) == [mlp]
    assert changes(config, 10) == [mlp, split]
    assert set(changes(config, 8)) == {split, checkpointing}
    assert changes(config, 6) == [checkpointing, ("model.peft_enabled=true",)]  # whose weights are not split
    selective = config | {"model": {"name_or_path": str(qwen), "selective_checkpointing": "mlp"}}
    assert set(changes(selective, 8)) == {split, ("model.selective_checkpointing=off", *checkpointing)}
    plain = config | {"model": {"name_or_path": str(qwen), "gradient_checkpointing": False, "compile": False}}
    assert changes(plain, 20) == [checkpointing]


def test_offloaded_activations_are_said_not_to_be_counted(qwen: Path) -> None:
    kept, moved = (make_plan(run(qwen, train={"activation_offloading": on})) for on in (False, True))
    assert not any("activation_offloading" in note for note in kept.situation.notes)
    assert any("with activation_offloading expect less" in note for note in moved.situation.notes)


def test_a_batch_that_is_cut_needs_what_a_pass_needs(qwen: Path) -> None:
    """Rows of at most 2,048 tokens, 32 of them: the peak is that of the longest pass with gradients of earlier ones."""

    def batch(algorithm: str = "sft", tokens: int | None = None, **train: Any) -> tuple[int, int, int | None]:
        train = {"per_device_batch_size": 32, "micro_batch_tokens": tokens} | train
        found = make_plan(run(qwen, algorithm, train=train)).situation.training.batch
        return found.tokens, found.predicted, found.cut_from

    assert batch() == batch(tokens=65536) == (65536, 65536, None)
    assert batch(tokens=16384) == (16384, 16384, 65536)
    assert batch(tokens=100) == (2048, 2048, 65536)  # no row is cut
    assert batch("dpo", 100, max_target_length=256) == (2048, 2048, 65536)  # a pair of two answers of 1,024 tokens
    assert batch("dpo", 16384, max_target_length=128) == (16384, 8192, 65536)  # all of the answers, at most
    assert batch("grpo", 4096, max_prompt_length=512, max_completion_length=100) == (4096, 3200, 32 * 612)
    tagged = {"dataset": {"task_type": "token_classification"}}
    classes = make_plan(run(qwen, train={"per_device_batch_size": 32, "micro_batch_tokens": 5000}, **tagged))
    assert classes.situation.training.batch.tokens == 4096  # whole rows, since they are padded
    cut = make_plan(run(qwen, train={"per_device_batch_size": 32, "micro_batch_tokens": 16384}))
    same = make_plan(run(qwen, train={"per_device_batch_size": 8, "gradient_accumulation_steps": 4}))
    assert cut.moments == same.moments
    assert cut.steps.tokens_per_step == same.steps.tokens_per_step == 65536
    assert cut.steps.global_batch == 32


def test_advice_cuts_passes_first_while_they_are_long(qwen: Path) -> None:
    """Passes of at least 16,384 tokens come first, shorter ones after what layers recompute."""
    config = run(qwen, train={"per_device_batch_size": 64}, model={"gradient_checkpointing": True})
    assert changes(config, 16) == [("train.micro_batch_tokens=32768",)]
    plain = run(qwen, "grpo", train={"per_device_batch_size": 64}, model={"use_peft": False, "gradient_checkpointing": False})  # fmt: skip
    assert changes(plain, 20) == [("train.micro_batch_tokens=16384",), ("model.selective_checkpointing=mlp",)]
    lora = run(qwen, train={"per_device_batch_size": 8}, model={"peft_enabled": True, "gradient_checkpointing": True})
    assert changes(lora, make_plan(lora).needs / GIB - 0.2) == [("train.micro_batch_tokens=8192",)]


def test_what_is_compiled(qwen: Path) -> None:
    def kept(algorithm: str, **sections: Any) -> str | None:
        return make_plan(run(qwen, algorithm, **{"backend": "native"} | sections)).situation.training.compiled

    assert kept("sft") == kept("dpo", model={"compile": True}) == kept("grpo", model={"compile": True}) == "all"
    assert kept("sft", model={"selective_checkpointing": "half"}) == "half"
    assert kept("sft", backend="trl") is None
    assert kept("sft", train={"activation_offloading": True}) is None
    assert kept("sft", model={"compile": False}) is None
    assert kept("sft", train={"max_steps": 249}) is None
    assert kept("sft", train={"max_steps": 249}, model={"compile": True}) == "all"
    assert kept("sft", train={"max_steps": 125, "gradient_accumulation_steps": 2}) == "all"
    assert kept("grpo") is kept("dpo") is None
    assert kept("sft", dataset={"task_type": "text_classification"}) is None
    four_bit = {"quantization": {"load_in_4bit": True}}
    assert kept("dpo", model=four_bit) is None
    for model in (four_bit | {"compile": True}, four_bit | {"selective_checkpointing": "mlp"}):
        with pytest.raises(ConfigError, match="quantised layers do not compile"):
            kept("dpo", model=model)
    with pytest.raises(ConfigError, match="lora_dropout"):
        kept("sft", model={"peft_enabled": True, "selective_checkpointing": "mlp"})


def test_advice_contradicts_what_was_given_under_another_name(qwen: Path) -> None:
    plan = make_plan(run(qwen), ["gradient_checkpointing=false", "batch_size=8", "backend=trl"], card=20 * GIB)
    assert plan.advice is not None
    assert [change.overrides for change in plan.advice.changes] == [("model.gradient_checkpointing=true",)]


def test_what_is_needed_is_the_peak_and_the_allowances(qwen: Path) -> None:
    plan = make_plan(run(qwen))
    assert plan.needs == needed(peak(plan.situation.training)) == 0.6 * GIB + 1.05 * peak(plan.situation.training)
    assert plan.card is None
    assert plan.fits is None


# The shell ----------------------------------------------------------------------------------------------------------


def aligntune(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aligntune.cli.main", "plan", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_verb(qwen: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"algorithm: sft\nmodel: {{name_or_path: {qwen}}}\ndataset: {{name: hub/rows}}\ntrain: {{max_steps: 250}}\n"
    )
    shown = aligntune(file, "--gpu-memory", 80)
    assert shown.returncode == 0, shown.stderr
    assert "494.0M parameters, 494.0M trained" in shown.stdout
    assert "fits: needs" in shown.stdout
    small = aligntune(file, "batch_size=8", "--gpu-memory", 6, "--json")
    assert small.returncode == 1, small.stderr
    found = json.loads(small.stdout)
    assert found["fits"] is False
    assert found["fits_with_changes"] is True
    assert found["steps"]["steps"] == 250
    assert found["steps"]["checkpoints"] == 1
    assert found["peak_gib"] == pytest.approx(
        max(sum(part.values()) for part in found["moments_gib"].values()), abs=0.02
    )
    bad = aligntune(file, "lerning_rate=1")
    assert (bad.returncode, "did you mean learning_rate" in bad.stderr) == (2, True)


def test_torch_is_not_imported(qwen: Path) -> None:
    code = (
        "import sys; from aligntune.planning.plan import make_plan\n"
        f"make_plan({run(qwen)!r}, card=1e9); make_plan({run(qwen, 'grpo')!r}, card=1e9)\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'trl', 'peft') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def test_free_memory_is_that_of_the_first_visible_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\ncase "$*" in *"-i 3"*) echo 1024;; *) printf "2048\\n512\\n";; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert planning.free_memory() == 2 * GIB
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert planning.free_memory() == 1 * GIB
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert planning.free_memory() is None
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert planning.free_memory() is None


def test_every_config_that_cannot_run_is_refused(qwen: Path) -> None:
    for config in (
        run(qwen, train={"epochs": 0}),
        run(qwen, "meta_es"),
        run(qwen.parent / "nothing"),
        run(qwen, "grpo", train={"max_completion_length": 4000}),
        run(qwen, model={"peft_enabled": True, "target_modules": ["w_proj"]}),
    ):
        with pytest.raises(AlignTuneError):
            make_plan(config)
