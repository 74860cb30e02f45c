"""The bridge from `transformers.Trainer` to the recorder, driven by real training of a tiny model."""

import types

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from aligntune.reporting import Recorder, RunDirectory, Sink
from aligntune.reporting.events import TrailSink
from aligntune.trainers import callbacks
from aligntune.trainers.callbacks import attach_recorder, split_of
from comparing import without_timing

ROWS, LENGTH, PADDING, BATCH = 32, 6, 2, 2
TOKENS_PER_STEP = BATCH * (LENGTH - PADDING)


def dataset():
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([1] * (LENGTH - PADDING) + [0] * PADDING)
    ids = torch.randint(0, 16, (ROWS, LENGTH), generator=generator)
    return [{"input_ids": row, "labels": row.masked_fill(mask == 0, -100), "attention_mask": mask} for row in ids]


def build(run, sinks=(), **changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, num_key_value_heads=1, attention_dropout=0.1, **sizes))
    options = {
        "output_dir": str(run.checkpoints),
        "per_device_train_batch_size": BATCH,
        "max_steps": 12,
        "logging_steps": 4,
        "save_steps": 5,
        "eval_strategy": "steps",
        "eval_steps": 6,
        "report_to": "none",
        "use_cpu": True,
        **changes,
    }
    rows = dataset()
    trainer = Trainer(model, TrainingArguments(**options), train_dataset=rows, eval_dataset=rows[:4])
    recorder = Recorder([TrailSink(run), *sinks], step=run.resumed_from)
    attach_recorder(trainer, recorder, run)
    return trainer, recorder


class Kill(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Progress(Sink):
    def __init__(self):
        self.seen = []

    def progress(self, step, total, phase):
        self.seen.append((step, total, phase))


def test_what_is_logged(tmp_path, capsys):
    run = RunDirectory.create(tmp_path)
    progress = Progress()
    trainer, recorder = build(run, [progress])
    trainer.train()
    trainer.evaluate()
    recorder.close()
    rows = run.metrics.rows()
    # every 4 steps, and before each evaluation (6, 12) and save (5, 10, and 12 at the end); then our own evaluation
    steps = [(row["step"], row["split"]) for row in rows]
    train = [step for step, split in steps if split == "train"]
    assert train == [4, 5, 6, 8, 10, 12]
    assert [step for step, split in steps if split == "eval"] == [6, 12, 12]
    last = next(row for row in reversed(rows) if row["split"] == "train")
    assert {"loss", "learning_rate", "grad_norm", "epoch", "num_tokens", "tokens_per_second", "elapsed_s"} <= set(last)
    assert last["num_tokens"] == 12 * TOKENS_PER_STEP
    evaluation = rows[-1]
    assert {"loss", "runtime", "samples_per_second"} <= set(evaluation)
    assert not [name for row in rows for name in row if name.startswith(("eval_", "train_", "total_flos"))]
    assert (12, 12, "train") in progress.seen
    assert (1, 1, "eval") in progress.seen
    assert "loss" not in capsys.readouterr().out  # the trainer's own printing is gone


def test_a_killed_and_resumed_run_leaves_the_same_lines(tmp_path):
    whole = RunDirectory.create(tmp_path / "whole")
    trainer, recorder = build(whole)
    trainer.train()
    recorder.close()

    killed = RunDirectory.create(tmp_path / "killed")
    trainer, recorder = build(killed)
    trainer.add_callback(Kill(9))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    recorder.close()
    assert max(row["step"] for row in killed.metrics.rows()) == 8

    checkpoint = killed.latest_checkpoint()
    assert checkpoint.name == "checkpoint-5"
    again = RunDirectory.create(tmp_path / "killed", resume=checkpoint)
    trainer, recorder = build(again)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    recorder.close()

    one, two = ([without_timing(row) for row in run.metrics.rows()] for run in (whole, again))
    assert one == two
    assert [row["num_tokens"] for row in two if row["split"] == "train"][-1] == 12 * TOKENS_PER_STEP


def test_resuming_a_finished_run_repeats_only_what_came_after_its_last_save(tmp_path):
    run = RunDirectory.create(tmp_path)
    trainer, recorder = build(run, eval_on_start=True, max_steps=-1, num_train_epochs=1)
    trainer.train()
    trainer.evaluate()
    recorder.close()
    before = [without_timing(row) for row in run.metrics.rows()]
    checkpoint = run.latest_checkpoint()
    assert checkpoint.name == "checkpoint-16"
    again = RunDirectory.create(tmp_path, resume=checkpoint)
    trainer, recorder = build(again, eval_on_start=True, max_steps=-1, num_train_epochs=1)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    trainer.evaluate()
    recorder.close()
    assert [without_timing(row) for row in again.metrics.rows()] == before


def test_without_logging_no_log_is_forced(tmp_path):
    run = RunDirectory.create(tmp_path)
    trainer, recorder = build(run, logging_strategy="no")
    trainer.train()
    recorder.close()
    assert {row["split"] for row in run.metrics.rows()} == {"eval"}


def test_saves_by_epoch_are_logged_and_marked(tmp_path):
    run = RunDirectory.create(tmp_path)
    trainer, recorder = build(
        run, max_steps=-1, num_train_epochs=1, save_strategy="epoch", eval_strategy="no", logging_steps=10
    )
    trainer.train()
    recorder.close()
    assert [row["step"] for row in run.metrics.rows()] == [10, 16]
    assert run.latest_checkpoint().name == "checkpoint-16"


def test_a_trainer_that_keeps_its_count_is_believed(tmp_path):
    """Also where the metrics of the session before lie in another folder."""
    first, second = RunDirectory.create(tmp_path / "first"), RunDirectory.create(tmp_path / "second")
    build(first, include_num_input_tokens_seen="non_padding")[0].train()
    trainer, recorder = build(second, include_num_input_tokens_seen="non_padding")
    trainer.train(resume_from_checkpoint=str(first.checkpoints / "checkpoint-5"))
    recorder.close()
    counted = [row["num_tokens"] for row in second.metrics.rows() if row["split"] == "train"]
    assert counted[-1] == 12 * TOKENS_PER_STEP


def test_the_token_hook_leaves_the_model(tmp_path):
    run = RunDirectory.create(tmp_path)
    trainer, recorder = build(run, max_steps=1)
    trainer.train()
    recorder.close()
    assert not trainer.model._forward_pre_hooks


def test_gradient_accumulation_counts_every_micro_batch(tmp_path):
    run = RunDirectory.create(tmp_path)
    trainer, recorder = build(run, max_steps=4, gradient_accumulation_steps=2, eval_strategy="no", save_strategy="no")
    trainer.train()
    recorder.close()
    assert run.metrics.rows()[-1]["num_tokens"] == 4 * 2 * TOKENS_PER_STEP


@pytest.mark.parametrize(
    ("logs", "split", "values"),
    [
        ({"loss": 1.0, "epoch": 0.5}, "train", {"loss": 1.0, "epoch": 0.5}),
        ({"eval_loss": 1.0, "epoch": 0.5}, "eval", {"loss": 1.0, "epoch": 0.5}),
        ({"eval_news_loss": 1.0}, "eval", {"news_loss": 1.0}),
        ({"eval_rewards/chosen": 1.0}, "eval", {"rewards/chosen": 1.0}),
        ({"test_accuracy": 1.0}, "test", {"accuracy": 1.0}),
        ({"loss": 1.0, "num_input_tokens_seen": 8, "train_runtime": 2.0}, "train", {"loss": 1.0, "num_tokens": 8}),
    ],
)
def test_splits(logs, split, values):
    assert split_of(logs) == (split, values)


def test_each_of_several_gpus_is_named(tmp_path, monkeypatch):
    run = RunDirectory.create(tmp_path)
    recorder = Recorder([TrailSink(run)])
    said = []
    monkeypatch.setattr(recorder, "note", said.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    monkeypatch.setattr(callbacks, "gathered", lambda peaks: [*peaks, *(2 * peak for peak in peaks)])
    for count in (1, 2):
        arguments = types.SimpleNamespace(device=torch.device("cuda"), world_size=count)
        callbacks.RecorderCallback(recorder, run).on_train_end(arguments, None, None)
    assert said == ["peak memory by process: 3.0, 6.0 GiB"]


def test_checkpoints_do_not_grow_with_every_line_logged(tmp_path, monkeypatch):
    monkeypatch.setattr(callbacks, "KEPT_LOGS", 2)
    run = RunDirectory.create(tmp_path / "run")
    trainer, _ = build(run, logging_steps=1)
    trainer.train()
    history = trainer.state.log_history
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [6, 12]
    trained = [entry["step"] for entry in history if "loss" in entry]
    assert trained[-2:] == [11, 12]
    assert len(trained) < 6
    assert [row["step"] for row in run.metrics.rows() if row["split"] == "train"] == list(range(1, 13))
