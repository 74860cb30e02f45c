"""The loss of pairs is TRL's: same model, same pairs, same number."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny

trl = pytest.importorskip("trl")

pytestmark = pytest.mark.adapter


def test_loss_equals_that_of_the_reward_trainer(tmp_path: Path) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, TrainingArguments

    from aligntune.trainers.reward_trainer import RewardCollator, RewardTrainer, pair_losses

    tiny.write_model(tmp_path / "base")
    tokenizer = tiny.tokenizer()
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1).eval()
    model.config.pad_token_id = tokenizer.pad_token_id
    rows = [{"chosen": tokenizer(f"yes {n} cat"), "rejected": tokenizer(f"no {n}"), "label": 0.5 * n} for n in range(4)]
    data = Dataset.from_list(
        [
            {
                "chosen_ids": row["chosen"]["input_ids"],
                "rejected_ids": row["rejected"]["input_ids"],
                "margin": row["label"],
            }
            for row in rows
        ]
    )
    options = trl.RewardConfig(
        output_dir=str(tmp_path / "trl"), report_to="none", use_cpu=True, bf16=False, max_length=512
    )
    theirs = trl.RewardTrainer(model=model, args=options, train_dataset=data, processing_class=tokenizer)
    batch = next(iter(theirs.get_train_dataloader()))
    model.eval()
    arguments = TrainingArguments(output_dir=str(tmp_path / "own"), use_cpu=True, report_to="none")
    ours = RewardTrainer(model, arguments, row_losses=pair_losses, measure=dict)
    expected = float(theirs.compute_loss(model, batch))
    assert float(ours.compute_loss(model, RewardCollator(tokenizer)(rows))) == pytest.approx(expected, abs=1e-5)
