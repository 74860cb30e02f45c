"""Preference pairs on a tiny model: what the first step must be, invariances, exact resume, learning, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Trainer

import tiny
from aligntune.algorithms.batch import Normalizers
from aligntune.config.best_metric import metrics_of
from aligntune.core.backend_factory import create_rl_trainer
from aligntune.errors import DataError
from aligntune.models.forward import use_padding
from aligntune.trainers import pairs_evaluating
from aligntune.trainers.length_groups import GroupsByLength, LengthGroups
from aligntune.trainers.pair_batches import Pairs
from aligntune.trainers.pairs_trainer import PairsTrainer
from aligntune.trainers.samples import SampleLogger
from comparing import without_timing

pytestmark = pytest.mark.usefixtures("short_answers")

AT_THE_REFERENCE = {
    "sigmoid": math.log(2), "robust": math.log(2), "aot": None, "hinge": 1.0, "ipo": 25.0, "kto": 0.5, "nca_pair": 2 * math.log(2),
    "bco_pair": 2 * math.log(2), "sppo_hard": 50.0, "apo_zero": 1.0, "apo_down": 1.0, "discopop": (math.log(2) + 1) / 2,
    "sigmoid_norm": math.log(2), "aot_unpaired": math.log(2),
}  # fmt: skip
"""Loss where policy and reference are equal, at beta 0.1, by the formulas. (aot compares sorted margins: the same there.)"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    tiny.write_model(folder / "model")
    words = tiny.WORDS
    rows = [
        {"prompt": f"say {word}", "chosen": word, "rejected": words[(at + 5) % len(words)] + "z" * (at % 3)}
        for at, word in enumerate(words)
    ]
    tiny.write_rows(folder / "pairs.jsonl", rows)
    tiny.write_rows(folder / "held.jsonl", [row | {"prompt": row["prompt"] + "!"} for row in rows[:7]])
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNTUNE_CACHE", str(tmp_path / "cache"))


def run(files: Path, out: Path, **settings: Any) -> Any:
    given: dict[str, Any] = {
        "precision": "fp32", "use_peft": False, "batch_size": 8, "learning_rate": 3e-3, "max_steps": 4, "logging_steps": 1, "loggers": "none",
        "lr_scheduler": "constant", "backend": "native", "fallback": False, "max_grad_norm": 0.0,
    }  # fmt: skip
    data = settings.pop("data", "pairs.jsonl")
    return create_rl_trainer(files / "model", files / data, "dpo", output_dir=out, **(given | settings))


def lines(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in without_timing(row).items() if not name.startswith("elapsed")}
        for row in rows
        if row["split"] == split
    ]


def trained(session: Any) -> list[dict[str, Any]]:
    session.train(overwrite=True)
    return lines(session.directory.path)


@pytest.mark.parametrize("loss", AT_THE_REFERENCE)
def test_the_first_loss_is_that_of_equal_policies(files: Path, tmp_path: Path, loss: str) -> None:
    first = trained(run(files, tmp_path, loss_type=loss, max_steps=1))[0]
    assert first["loss"] == pytest.approx(AT_THE_REFERENCE[loss] or math.log(2), rel=1e-5)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert first["kl/chosen"] == pytest.approx(0, abs=1e-7)
    assert first["grad_norm"] > 0


@pytest.mark.parametrize("settings", [
    {}, {"loss_type": "kto"}, {"loss_type": "aot"}, {"loss_type": "aot_unpaired"}, {"rpo_alpha": 0.5}, {"use_weighting": True},
    {"loss_weights": {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}}, {"ld_alpha": 0.3}, {"f_divergence_type": "js_divergence"},
], ids=str)  # fmt: skip
def test_the_update_does_not_depend_on_micro_batches(files: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    common = {"group_by_length": False, **settings}
    one = trained(run(files, tmp_path / "a", batch_size=8, **common))
    other = trained(run(files, tmp_path / "b", batch_size=2, gradient_accumulation_steps=4, **common))
    for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
        assert [row[name] for row in one] == pytest.approx([row[name] for row in other], abs=3e-5, rel=1e-4), name


@pytest.mark.parametrize("settings", [
    {"force_use_ref_model": True}, {"ref_model_init_kwargs": {"use_cache": False}}, {"ref_adapter_name": "frozen"},
    {"ref_adapter_name": "frozen", "model_adapter_name": "policy"},
], ids=str)  # fmt: skip
def test_lora_with_its_adapter_off_is_every_other_reference(
    files: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    common: dict[str, Any] = {"use_peft": True, "learning_rate": 1e-2, "max_steps": 4}
    plain, copied = run(files, tmp_path / "a", **common), run(files, tmp_path / "b", **common, **settings)
    expected, found = trained(plain), trained(copied)
    modes = ("adapter disabled", "adapter frozen" if "ref_adapter_name" in settings else "copy")
    assert (plain.trainer.reference.mode, copied.trainer.reference.mode) == modes
    if modes[1] == "copy":
        assert not any(weight.requires_grad for weight in copied.trainer.reference.model.parameters())
    for one, other in zip(expected, found, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert expected[-1]["rewards/margins"] != 0


@pytest.mark.parametrize("peft", [True, False])
def test_precomputed_references_equal_those_computed_on_the_fly(files: Path, tmp_path: Path, peft: bool) -> None:
    common: dict[str, Any] = {"use_peft": peft, "eval_dataset": str(files / "held.jsonl"), "ld_alpha": 0.5}
    expected = trained(run(files, tmp_path / "a", **common))
    session = run(files, tmp_path / "b", precompute_ref_log_probs=True, precompute_ref_batch_size=3, **common)
    found = trained(session)
    for one, other in zip(
        [*expected, *lines(tmp_path / "a", "eval")], [*found, *lines(tmp_path / "b", "eval")], strict=True
    ):
        assert one == pytest.approx(other, abs=2e-5)
    assert session.trainer.reference is None


def test_precomputed_references_are_kept_by_content(files: Path, tmp_path: Path) -> None:
    def arrows() -> set[str]:
        return {path.name for path in (tmp_path / "cache").glob("*.arrow")}

    run(files, tmp_path / "a", precompute_ref_log_probs=True).build_trainer()
    first = arrows()
    run(files, tmp_path / "b", precompute_ref_log_probs=True).build_trainer()
    assert arrows() == first
    session = run(files, tmp_path / "c", precompute_ref_log_probs=True)
    with torch.no_grad():
        next(session.model.parameters()).add_(1e-3)
    session.build_trainer()
    assert len(arrows()) == len(first) + 1


def test_a_reference_that_follows_at_once_leaves_no_margin(files: Path, tmp_path: Path) -> None:
    """TR-DPO with alpha 1 at every step: each step starts at the reference, so at ln 2."""
    common: dict[str, Any] = {"sync_ref_model": True, "ref_model_sync_steps": 1}
    full = trained(run(files, tmp_path / "a", ref_model_mixup_alpha=1.0, **common))
    assert [row["loss"] for row in full] == pytest.approx([math.log(2)] * 4, abs=1e-6)
    half = trained(run(files, tmp_path / "b", ref_model_mixup_alpha=0.5, **common))
    assert half[-1]["loss"] < math.log(2) - 1e-4


@pytest.mark.parametrize("settings", [
    {}, {"use_peft": True}, {"sync_ref_model": True, "ref_model_sync_steps": 2, "use_peft": True}, {"precompute_ref_log_probs": True},
    {"loss_type": "aot", "batch_size": 4, "gradient_accumulation_steps": 2},
], ids=str)  # fmt: skip
def test_resume_is_exact(files: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    common: dict[str, Any] = {"save_interval": 1, "max_steps": 5, **settings}
    whole, cut = run(files, tmp_path / "whole", **common), run(files, tmp_path / "cut", **common)
    expected = trained(whole)
    cut.train()
    again = run(files, tmp_path / "cut", **common)
    again.train(resume=str(tmp_path / "cut" / "checkpoints" / "checkpoint-3"))
    assert lines(tmp_path / "cut") == expected
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("loss", ["sigmoid", "kto", "aot_unpaired"])
def test_evaluation_does_not_depend_on_its_batches(files: Path, tmp_path: Path, loss: str) -> None:
    found = []
    for size in (1, 3, 7):
        session = run(
            files,
            tmp_path / str(size),
            loss_type=loss,
            eval_dataset=str(files / "held.jsonl"),
            per_device_eval_batch_size=size,
        )
        session.train()
        found.append({name: value for name, value in session.metrics.items() if name.startswith("eval_")})
        assert set(metrics_of(session.config)) == {name.removeprefix("eval_") for name in found[-1]}
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert found[0] == pytest.approx(found[2], abs=1e-5)
    assert found[0]["eval_rewards/accuracies"] * 7 == pytest.approx(round(found[0]["eval_rewards/accuracies"] * 7))


def test_dropout_acts_in_training_alone(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the step after an evaluation, too, and after whoever leaves the model without dropout."""
    seen: list[tuple[bool, bool]] = []
    plain = PairsTrainer.loss_of

    def watched(self: Any, model: Any, *given: Any) -> Any:
        seen.append((torch.is_grad_enabled(), model.training))
        found = plain(self, model, *given)
        self.model.eval()
        return found

    monkeypatch.setattr(PairsTrainer, "loss_of", watched)
    run(
        files, tmp_path, use_peft=True, disable_dropout=False, lora_dropout=0.5, max_steps=2,
        eval_dataset=str(files / "held.jsonl"), eval_strategy="steps", eval_interval=1,
    ).train()  # fmt: skip
    assert len(lines(tmp_path, "eval")) == 3
    assert [training for grad, training in seen if grad] == [True, True]
    assert not any(training for grad, training in seen if not grad)


def test_a_step_counts_what_is_trained() -> None:
    """Without a prompt an answer's first token has no predictor: 2 + (3 - 1) tokens of chosen answers in 2 pairs."""
    told: Any = SimpleNamespace(accelerator=SimpleNamespace(num_processes=1), needs=SimpleNamespace(whole_batch=False))
    pieces = [Pairs([[1]], [[4, 5]], [[6]]), Pairs([[]], [[6, 7, 8]], [[9, 9, 9, 9]])]
    steps = PairsTrainer._steps(told, pieces)
    assert [step.totals for step in steps] == [Normalizers(2, 4)] * 2


def test_a_padded_model_is_cut_by_padded_tokens() -> None:
    """3 + 5 and 2 + 2 tokens; padded 10 and 4: within 12 together, padded only one by one."""
    pairs = Pairs([[1, 1], [2]], [[4], [5]], [[7, 7, 7], [8]])
    model = tiny.model()
    told: Any = SimpleNamespace(model=model, micro_batch_tokens=12, _steps=list)
    for sizes in ([2], [1, 1]):
        ((batch,), _) = PairsTrainer.get_batch_samples(told, iter([{"pairs": pairs}]), 2, None)
        assert [len(piece) for piece, _ in batch["pieces"]] == sizes
        use_padding(model)


def test_a_log_holds_the_mean_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, float]] = []
    monkeypatch.setattr(Trainer, "log", lambda self, logs, *given: seen.append(dict(logs)))
    trainer: Any = PairsTrainer.__new__(PairsTrainer)
    trainer.accelerator, trainer.args = (
        SimpleNamespace(reduce=lambda values, how: values),
        SimpleNamespace(device="cpu"),
    )
    trainer._logged = [{"loss": torch.tensor(9.0), "kl/chosen": torch.tensor(value)} for value in (1.0, 3.0, 8.0)]
    for logs in ({"eval_loss": 0.5}, {"loss": 0.25}, {"loss": 0.125}):
        trainer.log(logs)
    assert seen == [{"eval_loss": 0.5}, {"loss": 0.25, "kl/chosen": 4.0}, {"loss": 0.125}]


def test_it_learns_which_answers_are_preferred(files: Path, tmp_path: Path) -> None:
    session = run(
        files,
        tmp_path,
        max_steps=40,
        learning_rate=1e-3,
        eval_dataset=str(files / "held.jsonl"),
        eval_strategy="steps",
        eval_interval=40,
        logging_steps=10,
    )
    session.train()
    before, *_, after = lines(tmp_path, "eval")
    assert before["rewards/accuracies"] == 0  # ties at the reference are wrong
    assert before["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert after["rewards/accuracies"] == 1
    assert after["loss"] < 0.6
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in samples} == {0, 40}


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_evaluation_always_runs_at_the_end(files: Path, tmp_path: Path, strategy: str) -> None:
    """What the docstring of `eval_strategy` says: `no` means none while training."""
    held_out = str(files / "held.jsonl")
    run(files, tmp_path, max_steps=2, eval_dataset=held_out, eval_strategy=strategy, eval_interval=1).train()
    assert [line["step"] for line in lines(tmp_path, "eval")] == {"no": [2], "steps": [0, 1, 2]}[strategy]


def test_batches_of_like_length_depend_on_the_seed_alone() -> None:
    lengths = [7, 1, 9, 3, 8, 2, 5, 4, 6]
    sampler = LengthGroups(lengths, 2, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(9))
    assert lengths[first[0]] == 9
    batches = [sorted(lengths[row] for row in first[at : at + 2]) for at in range(0, 9, 2)]
    assert sorted(batches) == [[1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert first == list(LengthGroups(lengths, 2, seed=3))
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(LengthGroups(lengths, 2, seed=4)) != first


@pytest.mark.parametrize(("data_seed", "seed"), [(None, 1), (7, 7), (0, 0)])
def test_groups_of_like_length_are_optimiser_batches(data_seed: int | None, seed: int) -> None:
    trainer: Any = GroupsByLength()
    trainer.train_dataset = Dataset.from_dict({"length": [3, 1, 2]})
    trainer.args = SimpleNamespace(
        train_sampling_strategy="group_by_length", train_batch_size=2, gradient_accumulation_steps=3, world_size=4, seed=1,
        data_seed=data_seed, length_column_name="length",
    )  # fmt: skip
    sampler = trainer._get_train_sampler()
    assert (sampler.lengths, sampler.batch, sampler.seed) == ([3, 1, 2], 24, seed)


def test_long_rows_come_first_and_a_short_batch_last() -> None:
    """Stretches of 50 batches are sorted among themselves: here two, and a row is left over."""
    lengths = list(range(201))
    found = [lengths[row] for row in LengthGroups(lengths, 2, seed=0)]
    assert max(found[:2]) == 200 or found[-1] == 200
    batches = [found[at : at + 2] for at in range(0, 200, 2)]
    assert sorted(found) == lengths
    assert all(first > second for first, second in batches)
    assert max(first - second for first, second in batches) < 30  # neighbours of 100 random ones lie 2 apart on average
    assert [first for first, _ in batches] != sorted((first for first, _ in batches), reverse=True)


def test_what_the_report_shows_is_asked_with_the_tools_of_its_row(files: Path, tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "paint", "description": "", "parameters": {}}}
    row = {"prompt": [{"role": "user", "content": "say red"}], "tools": [tool]}
    row |= {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    tiny.write_rows(files / "tools.jsonl", [row])
    session = run(files, tmp_path, data="tools.jsonl", sample_logging={"enabled": True})
    session.tokenizer.chat_template = "{{ tools[0].function.name }}: " + tiny.CHATML
    asked = session.tokenizer("paint: <|im_start|>user\nsay red<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    [samples] = [callback for callback in session.callbacks() if isinstance(callback, SampleLogger)]
    assert samples.asked == [(row["prompt"], asked)]
    seen: list[Any] = []
    session.generator.engine.generate = lambda prompts, _: seen.extend(prompts) or SimpleNamespace(completion_ids=[[]])
    session.show_samples(0)
    assert seen == [asked]


def test_shots_answer_held_out_prompts(files: Path, tmp_path: Path) -> None:
    session = run(
        files, tmp_path, eval_dataset=str(files / "held.jsonl"), dpo_eval_enabled=True, dpo_eval_max_samples=3, dpo_zero_shot_max_samples=2,
        dpo_few_shot_max_samples=1, dpo_few_shot_examples_text="say red: red", max_target_length=4,
    )  # fmt: skip
    found = session.evaluate()
    assert len(session.eval_rows) == 3
    for shots in ("zero", "few"):
        assert {f"eval_{shots}_shot_{name}" for name in ("rougeL", "bleu", "length_ratio")} <= set(found)
    assert found["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_pairs_that_teach_nothing_are_dropped_and_counted(
    files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    tiny.write_rows(files / "mixed.jsonl", [good, good | {"rejected": "b"}, good | {"chosen": " "}])
    with caplog.at_level("WARNING", "aligntune"):
        assert len(run(files, tmp_path, data="mixed.jsonl").train_rows) == 1
    assert "chosen equals rejected" in caplog.text
    assert "empty completion" in caplog.text
    tiny.write_rows(files / "equal.jsonl", [good | {"rejected": "b"}])
    with pytest.raises(DataError, match="chosen equals rejected"):
        run(files, tmp_path, data="equal.jsonl").train_rows  # noqa: B018


def test_an_evaluation_holds_one_batch_of_pairs_at_a_time(files: Path) -> None:
    rows = Dataset.from_dict(
        {"prompt_ids": [[1], [], [3]], "chosen_ids": [[4, 5], [6], [7]], "rejected_ids": [[8], [9], [10, 11]]}
    )
    read: list[range] = []

    class Rows:
        def select(self, places: range) -> Dataset:
            read.append(places)
            return rows.select(places)

    batches = pairs_evaluating._Batches(Rows(), [(range(2), True), (range(2, 3), False)])
    (pairs, counts) = next(iter(batches))
    assert (len(batches), read, counts) == (2, [range(2)], True)
    assert (pairs.prompts, pairs.chosen, pairs.rejected) == ([[1], []], [[4, 5], [6]], [[8], [9]])
    assert [len(pairs) for pairs, _ in batches] == [2, 1]
    assert (
        pairs_evaluating._answer_tokens(rows.select([2, 1, 0])) == 3
    )  # an answer without a prompt has one predictor less
