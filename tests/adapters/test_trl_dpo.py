"""Our DPO and TRL's are the same loss where TRL has it, and what TRL would ignore does not reach it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

import tiny
from aligntune.core.backend_factory import create_rl_trainer
from aligntune.errors import BackendError

pytestmark = [pytest.mark.adapter, pytest.mark.usefixtures("short_answers")]
pytest.importorskip("trl")

SAME = [
    *({"loss_type": name} for name in (
        "sigmoid", "hinge", "ipo", "robust", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop",
        "sft", "sigmoid_norm",
    )),
    {"loss_type": "exo_pair", "label_smoothing": 0.1}, {"loss_type": "robust", "label_smoothing": 0.2},
    {"loss_type": "aot", "label_smoothing": 0.2}, {"loss_type": "discopop", "discopop_tau": 0.5},
    {"loss_weights": {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 0.5}}, {"rpo_alpha": 0.7}, {"ld_alpha": 0.4}, {"use_weighting": True},
    {"f_divergence_type": "forward_kl"}, {"f_divergence_type": "js_divergence"},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3}, {"beta": 0.7},
]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trl")
    tiny.write_model(folder / "model")
    rows = [
        {"prompt": f"say {word}", "chosen": word + "." * (at % 4), "rejected": word[::-1] + "?"}
        for at, word in enumerate(tiny.WORDS)
    ]
    tiny.write_rows(folder / "pairs.jsonl", rows)
    return folder


def run(files: Path, out: Path, backend: str, **settings: Any) -> Any:
    given: dict[str, Any] = {
        "precision": "fp32", "use_peft": False, "batch_size": 6, "max_steps": 3, "logging_steps": 1, "loggers": "none", "learning_rate": 3e-3,
        "group_by_length": False, "fallback": False,
    }  # fmt: skip
    return create_rl_trainer(
        files / "model", files / "pairs.jsonl", "dpo", backend=backend, output_dir=out, **(given | settings)
    )


def loss_and_gradients(session: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Of the first rows, with the policy moved away from its reference."""
    trainer = session.build_trainer()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in session.model.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator))
    batch = trainer.data_collator([trainer.train_dataset[at] for at in range(6)])
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
    loss.backward()
    return float(loss.detach()), {name: weight.grad for name, weight in session.model.named_parameters()}


@pytest.mark.parametrize("settings", SAME, ids=str)
def test_same_loss_and_gradient(files: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    (ours, mine), (theirs, other) = (
        loss_and_gradients(run(files, tmp_path / name, name, **settings)) for name in ("native", "trl")
    )
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    scale = max(float(gradient.abs().max()) for gradient in other.values())
    assert scale > 0
    for name, gradient in other.items():
        torch.testing.assert_close(
            mine[name], gradient, atol=1e-5 * max(1.0, scale), rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("settings", [
    {}, {"use_peft": True}, {"precompute_ref_log_probs": True}, {"sync_ref_model": True, "ref_model_sync_steps": 1},
    {"use_peft": True, "force_use_ref_model": True},
], ids=str)  # fmt: skip
def test_same_training_and_evaluation(files: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    found = []
    for backend in ("native", "trl"):
        session = run(files, tmp_path / backend, backend, eval_dataset=str(files / "pairs.jsonl"), **settings)
        found.append(session.train())
        assert session.backend == backend
        assert not (tmp_path / backend / "model" / "ref").exists(), "TRL's copy of the adapter is no part of the model"
    names = [name for name in found[0] if name.startswith("eval_")]
    assert {"eval_loss", "eval_rewards/accuracies", "eval_logps/chosen"} <= set(names)
    for name in ("train_loss", *names):
        assert found[0][name] == pytest.approx(found[1][name], abs=2e-4, rel=1e-4), name


@pytest.mark.parametrize(("wrote", "reads"), [("trl", "trl"), ("trl", "native"), ("native", "trl")])
def test_a_reference_that_moves_survives_a_restart(files: Path, tmp_path: Path, wrote: str, reads: str) -> None:
    """On the backend that wrote the checkpoint, and on the other."""
    settings = {"sync_ref_model": True, "ref_model_sync_steps": 1, "save_interval": 2, "max_steps": 4}
    whole = run(files, tmp_path / "run", wrote, **settings).train()
    again = run(files, tmp_path / "run", reads, **settings)
    resumed = again.train(resume=str(tmp_path / "run" / "checkpoints" / "checkpoint-2"))
    assert resumed["train_loss"] == pytest.approx(whole["train_loss"], abs=1e-6 if wrote == reads else 1e-5)


def test_nothing_is_said_of_the_text_that_stands_in_for_ours(
    files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A tokenizer that merges "a" and "b": TRL warns of a prompt that is no prefix of prompt and answer."""
    model = tmp_path / "model"
    tiny.model(vocab_size=260).save_pretrained(model)
    plain = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
    plain["model"] |= {"vocab": plain["model"]["vocab"] | {"ab": 259}, "merges": [["a", "b"]]}
    merging = tiny.tokenizer()
    merging._tokenizer = Tokenizer.from_str(json.dumps(plain))
    merging.save_pretrained(model)
    assert len(AutoTokenizer.from_pretrained(model)("ab").input_ids) == 1
    logging.getLogger("trl").propagate = True
    with caplog.at_level(logging.WARNING):
        create_rl_trainer(
            model, files / "pairs.jsonl", "dpo", backend="trl", fallback=False, precision="fp32", max_steps=1, loggers="none",
            output_dir=tmp_path / "out",
        ).build_trainer()  # fmt: skip
    assert "prefix" not in caplog.text


@pytest.mark.parametrize(("settings", "reason"), [
    ({"loss_type": "kto"}, "kto"), ({"label_smoothing": 0.1}, "label_smoothing"), ({"reference_free": True}, "reference_free"),
    ({"padding_free": True}, "padding_free"), ({"rpo_alpha": 1.0, "gradient_accumulation_steps": 2}, "micro-batches"),
    ({"ref_model_init_kwargs": {"use_cache": False}}, "ref_model_init_kwargs"), ({"rpo_alpha": 1.0, "use_weighting": True}, "use_weighting"),
], ids=str)  # fmt: skip
def test_what_trl_would_ignore_is_not_sent_there(
    files: Path, tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(BackendError, match=reason):
        run(files, tmp_path, "trl", **settings)
    session = run(files, tmp_path, "trl", **{"fallback": True, **settings})
    assert session.backend == "native"
    assert any(reason in line for line in session.reasons)
