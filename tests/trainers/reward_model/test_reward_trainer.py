"""A reward model's step does not depend on its cuts; held-out rows are measured all along; a killed run is continued."""

from __future__ import annotations

import json
import math
import random
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback

import tiny
from aligntune.config.base import LoraSettings
from aligntune.config.enums import PrecisionType
from aligntune.config.rewards import RewardModelTrainingConfig
from aligntune.errors import ConfigError
from aligntune.rewards.model import RewardModel
from aligntune.trainers import reward_model
from aligntune.trainers.reward_held_out import HeldPairs, HeldTexts
from aligntune.trainers.reward_model import RewardTraining, Trained, hold_out, train_on_pairs, train_on_texts
from aligntune.trainers.reward_trainer import RewardCollator, RewardTrainer, pair_losses, text_losses
from shell import start

PAIRS = [
    {"prompt": f"say {n}", "chosen": "yes " + word * (1 + n % 3), "rejected": word + " no", "margin": n % 2}
    for n, word in enumerate(tiny.WORDS * 2)
]
TEXTS = [f"{word} " * (1 + n % 5) for n, word in enumerate(tiny.WORDS * 2)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.write_model(tmp_path_factory.mktemp("reward") / "base"))


def on_pairs(base: str, out: Path, rows: list[dict[str, Any]] = PAIRS, **changes: Any) -> Trained:
    options: dict[str, Any] = {"epochs": 2, "learning_rate": 3e-3, "batch_size": 4, "gradient_accumulation_steps": 2}
    options |= {"precision": PrecisionType.FP32, "held_out": 0.2} | changes
    return train_on_pairs(rows, RewardTraining(base, str(out), **options))


def on_texts(base: str, out: Path, **changes: Any) -> Trained:
    config = RewardModelTrainingConfig(
        base_model_name=base, training_texts=TEXTS, reward_functions=["brevity"], output_dir=str(out), num_epochs=2,
        learning_rate=3e-3, gradient_accumulation_steps=1,
    )  # fmt: skip
    return train_on_texts(config, **{"precision": PrecisionType.FP32, "held_out": 0.2} | changes)


def lines(folder: Path, split: str) -> list[dict[str, Any]]:
    """The trail without what the clock says."""
    clock = ("time", "elapsed_s", "tokens_per_second", "memory_gib")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in clock} for row in rows if row["split"] == split]


@pytest.mark.parametrize("kind", ["pairs", "texts"])
def test_a_step_of_8_rows_is_the_same_however_it_is_cut(kind: str, base: str, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, TrainingArguments

    tokenizer = tiny.tokenizer()
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    if kind == "pairs":
        rows = [
            {side: tokenizer(row[side]) for side in ("chosen", "rejected")} | {"label": 0.5 * row["margin"]}
            for row in PAIRS[:8]
        ]
    else:
        rows = [{"text": tokenizer(text), "label": float(n)} for n, text in enumerate(TEXTS[:8])]
    losses = partial(pair_losses, centering=0.1) if kind == "pairs" else text_losses
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = RewardTrainer(model, arguments, row_losses=losses, measure=dict)
    found = []
    for sizes, tokens in (
        ([8], None),
        ([4, 4], None),
        ([3, 5], None),
        ([5, 3], None),
        ([3, 3, 2], None),
        ([8], 60),
        ([5, 3], 1),
    ):
        ends = [sum(sizes[: at + 1]) for at in range(len(sizes))]
        cut = [rows[end - size : end] for size, end in zip(sizes, ends, strict=True)]
        trainer.micro_batch_tokens = tokens
        batches, number = trainer.get_batch_samples(iter(map(RewardCollator(tokenizer, tokens), cut)), len(cut), None)
        assert tokens is None or all(len(batch["pieces"]) > 1 for batch in batches)
        model.zero_grad()
        loss = sum(float(trainer.training_step(model, batch, number)) for batch in batches)
        gradients = torch.cat([weight.grad.flatten() for weight in model.parameters()])
        found.append((loss, gradients))
    assert found[0][1].norm() > 0.1
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-6)
        assert float((gradients - found[0][1]).abs().max()) < 1e-6


def test_a_whole_run_logs_the_same_losses_for_other_cuts(base: str, tmp_path: Path) -> None:
    runs = []
    for batch_size, accumulation, tokens in ((8, 1, None), (5, 2, None), (8, 1, 60)):
        out = tmp_path / f"{batch_size}-{tokens}"
        rows = PAIRS[:10]  # 8 of them are trained on: one step an epoch
        cut = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation, "micro_batch_tokens": tokens}
        on_pairs(base, out, rows, learning_rate=1e-4, **cut)
        runs.append([(row["loss"], row["num_tokens"]) for row in lines(out, "train")])
    assert len(runs[0]) == 2
    for run in runs[1:]:
        for found, expected in zip(run, runs[0], strict=True):
            assert found == pytest.approx(expected, abs=1e-5)


class Told:
    """A reward model that says what it was told."""

    def __init__(self, scores: dict[str, float]) -> None:
        self.scores = scores

    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        return [self.scores[text] for text in completions]


def test_held_out_metrics_by_hand() -> None:
    said: Any = Told({"a": 2.0, "b": 1.0, "c": 0.0, "d": 0.0})
    texts = HeldTexts(said, ["a", "b", "c"], [2.0, 0.0, 1.0], std=2.0)()
    assert texts == pytest.approx({"mse": 2 / 3, "loss": 1 / 6, "rank_correlation": 0.5})
    rows = [{"prompt": "", "chosen": one, "rejected": other} for one, other in ("ab", "cd", "cb")]
    pairs = HeldPairs(said, rows)()
    by_hand = [math.log(1 + math.exp(-lead)) for lead in (1.0, 0.0, -1.0)]
    assert pairs == pytest.approx({"accuracy": 0.5, "margin": 0.0, "loss": sum(by_hand) / 3})  # a tie counts half


def test_rows_of_one_prompt_are_held_out_together() -> None:
    keys = [n // 4 for n in range(80)]
    kept, held = hold_out(keys, 0.2, seed=0)
    assert len(held) == 16
    assert sorted(kept + held) == list(range(80))
    assert not {keys[at] for at in kept} & {keys[at] for at in held}
    assert hold_out(keys, 0.2, seed=0) == (kept, held)
    assert hold_out(keys, 0.2, seed=1) != (kept, held)
    assert len(hold_out(["one prompt"] * 40, 0.1, seed=0)[1]) == 4  # too few prompts: by rows
    assert [len(part) for part in hold_out(["a", "b"], 0.1, seed=0)] == [1, 1]


@pytest.mark.parametrize(("kind", "names"), [("pairs", HeldPairs.names), ("texts", HeldTexts.names)])
def test_every_evaluation_is_in_the_trail_and_the_report(
    kind: str, names: tuple[str, ...], base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = on_pairs if kind == "pairs" else on_texts
    done = train(base, tmp_path / "out", eval_interval=3, best_metric=None)
    seen = lines(tmp_path / "out", "eval")
    last = lines(tmp_path / "out", "train")[-1]["step"]
    assert [row["step"] for row in seen] == sorted({0, *range(3, last + 1, 3), last})
    assert all(name in row for row in seen for name in names)
    assert {name: seen[-1][name] for name in names} == {name: done.metrics[name] for name in names}
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("eval at step")]
    assert len(shown) == len(seen)
    assert all(name.replace("_", " ") in line for name in names for line in shown)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Held-out rows" in page
    assert "Reward model of base from" in page
    assert f"aligntune reward score {tmp_path / 'out' / 'model'}" in page


def test_the_best_evaluation_is_kept(base: str, tmp_path: Path) -> None:
    """Nothing but noise to learn: what fits the training rows is wrong on others, and an early evaluation is best."""
    noise = random.Random(1)
    sides = [noise.sample(["chosen", "rejected"], 2) for _ in range(24)]
    rows = [{"prompt": f"say {n}", one: "yes", other: "no"} for n, (one, other) in enumerate(sides)]
    options: dict[str, Any] = {"epochs": 3, "learning_rate": 0.02, "rows": rows}
    best = on_pairs(base, tmp_path / "best", **options)
    last = on_pairs(base, tmp_path / "last", best_metric=None, **options)
    seen = [row["loss"] for row in lines(tmp_path / "best", "eval")[1:]]
    assert seen == [row["loss"] for row in lines(tmp_path / "last", "eval")[1:]]
    assert min(seen) < seen[-1]
    assert best.metrics["loss"] == min(seen)
    assert last.metrics["loss"] == seen[-1]
    with pytest.raises(ConfigError, match="best_metric: f1 is not measured; choose of loss, accuracy, margin"):
        on_pairs(base, tmp_path / "wrong", best_metric="f1")


def test_training_that_only_made_it_worse_is_said(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for name, rate in (("worse", 10.0), ("better", 3e-3)):
        on_pairs(base, tmp_path / name, epochs=1, learning_rate=rate)
        before, *after = [row["loss"] for row in lines(tmp_path / name, "eval")]
        said.append((before < min(after), "before the first step loss was" in "".join(capsys.readouterr())))
    assert said == [(True, True), (False, False)]


def test_the_folder_says_what_ran(base: str, tmp_path: Path) -> None:
    on_texts(base, tmp_path / "texts")
    written = (tmp_path / "texts" / "config.yaml").read_text()
    content = yaml.safe_load(written)["reward_training"]
    again = RewardModelTrainingConfig.model_validate(content)
    assert (again.base_model_name, again.training_texts, again.num_epochs) == (base, TEXTS, 2)
    assert "held_out=0.2" in written
    assert "reward_training.max_length: 512" in written
    facts = json.loads((tmp_path / "texts" / "provenance.json").read_text())
    assert facts["seeds"] == {"seed": 42}
    assert [(entry["role"], entry["rows"]) for entry in facts["data"]] == [("train", 26), ("eval", 6)]
    few = PAIRS[:8]
    on_pairs(base, tmp_path / "one", few, epochs=1)
    on_pairs(base, tmp_path / "same", few, epochs=1, learning_rate=1e-3)
    on_pairs(base, tmp_path / "other", [row | {"chosen": "else"} for row in few], epochs=1)
    one, same, other = (
        [entry["fingerprint"] for entry in json.loads((tmp_path / name / "provenance.json").read_text())["data"]]
        for name in ("one", "same", "other")
    )
    assert one == same
    assert not set(one) & set(other)
    assert yaml.safe_load((tmp_path / "one" / "config.yaml").read_text())["reward_pairs"]["base"] == base


def test_an_encoder_trains_on_what_it_will_score(tmp_path: Path) -> None:
    """Both segments of a pair have their token types in training too: the first loss is that of the scores."""
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    tokenizer: Any = tiny.tokenizer(None)
    tokenizer.add_special_tokens({"sep_token": "<|im_start|>", "cls_token": "<|im_end|>"})
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_end|> $A <|im_start|>", pair="<|im_end|> $A <|im_start|> $B:1 <|im_start|>:1",
        special_tokens=[("<|im_end|>", 2), ("<|im_start|>", 1)],
    )  # fmt: skip
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=259, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=1,
        max_position_embeddings=64, initializer_range=0.3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    model.save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    judge = RewardModel(model, tokenizer)
    expected = HeldPairs(judge, PAIRS[:8])()["loss"]
    rows = [
        {side: judge.encode(row["prompt"], row[side]) for side in ("chosen", "rejected")} | {"label": row["margin"]}
        for row in PAIRS[:8]
    ]
    batch = RewardCollator(tokenizer)(rows)
    assert batch["token_type_ids"].sum() > 0
    labels = batch.pop("labels")
    with torch.no_grad():
        scores = model.eval()(**batch).logits[:, 0]
    assert float(pair_losses(scores, labels).mean()) == pytest.approx(expected, abs=1e-6)
    long = judge.encode("a prompt", "x" * 100)  # longer than the model takes: the end is kept
    assert len(long["input_ids"]) == 64
    assert tokenizer.decode(long["input_ids"]).endswith("xx<|im_start|>")


@pytest.mark.parametrize("lora", [None, LoraSettings(4, 8, 0.0, None, False)])
def test_an_interrupted_run_resumes_exactly(
    lora: LoraSettings | None, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stops(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    options: dict[str, Any] = {"lora": lora, "eval_interval": 2, "rows": PAIRS[:16]}
    whole = on_pairs(base, tmp_path / "whole", gradient_accumulation_steps=1, **options)
    monkeypatch.setattr(reward_model, "EvaluatesLast", Stops)
    with pytest.raises(KeyboardInterrupt):
        on_pairs(base, tmp_path / "cut", gradient_accumulation_steps=1, **options)
    monkeypatch.undo()
    cut = on_pairs(base, tmp_path / "cut", gradient_accumulation_steps=1, resume=True, **options)
    for split in ("train", "eval"):
        assert lines(tmp_path / "cut", split) == lines(tmp_path / "whole", split)
    assert cut.metrics == whole.metrics
    for one, other in zip(whole.model.model.parameters(), cut.model.model.parameters(), strict=True):
        assert torch.equal(one, other)


class Waits(TrainerCallback):
    """Keeps a run from its end: a minute a step after the eighth."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        time.sleep(0.0 if state.global_step <= 8 else 60)


def train_without_end(base: str, out: Path, options: dict[str, Any]) -> None:
    reward_model.EvaluatesLast = Waits
    on_pairs(base, out, **options)


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(base: str, tmp_path: Path) -> None:
    """kill -9 in mid-training, then `resume`: the same metrics, line by line, and the same weights, bit for bit."""
    options: dict[str, Any] = {"epochs": 4, "gradient_accumulation_steps": 1, "eval_interval": 4}
    on_pairs(base, tmp_path / "whole", **options)
    running = start(train_without_end, base, tmp_path / "cut", options)
    mark = tmp_path / "cut" / "checkpoints" / "checkpoint-8" / "aligntune.json"
    deadline = time.monotonic() + 60
    while not mark.exists() and running.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    running.kill()
    running.join()
    assert running.exitcode == -signal.SIGKILL
    assert not (tmp_path / "cut" / "model").exists()
    with pytest.raises(ConfigError, match="already holds a run"):
        on_pairs(base, tmp_path / "cut", **options)
    on_pairs(base, tmp_path / "cut", resume=True, **options)
    for split in ("train", "eval"):
        assert lines(tmp_path / "cut", split) == lines(tmp_path / "whole", split)
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    sessions = json.loads((tmp_path / "cut" / "status.json").read_text())["sessions"]
    assert [session["outcome"] for session in sessions] == ["killed", "finished"]
    through = on_pairs(base, tmp_path / "cut", resume=True, **options)  # all steps are done: it is only read
    assert through.metrics["loss"] == min(row["loss"] for row in lines(tmp_path / "whole", "eval")[1:])
