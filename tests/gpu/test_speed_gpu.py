"""What makes a run fast on a GPU gives the numbers of the plain way: the split optimiser's kernel, compiled layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, TrainerCallback

import tiny
from aligntune.core.backend_factory import create_sft_trainer
from aligntune.models.forward import packed_loss
from aligntune.models.kernels import compile as kernels
from aligntune.models.kernels.attention import resolve_attention
from aligntune.models.packed import PackedRows
from aligntune.optim.split_adamw import SplitAdamW
from aligntune.trainers.packed_sft import PackedSFTTrainer

pytestmark = pytest.mark.gpu

SHAPE = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 1000}  # fmt: skip


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_the_kernel_equals_plain_torch(moments: torch.dtype) -> None:
    """Tensors of several blocks, of an odd size, and one whose gradients lie in another order: two launches a step."""
    torch.manual_seed(0)
    starts = [torch.randn(*shape).to(torch.bfloat16) for shape in ((3, 1001), (64, 96), (5,), (32, 48))]
    gradients = [[(torch.randn_like(start) * 0.01) for start in starts] for _ in range(20)]
    found = []
    for device in ("cpu", "cuda"):
        parameters = [torch.nn.Parameter(start.clone().to(device)) for start in starts]
        optimizer = SplitAdamW(parameters, lr=1e-3, weight_decay=0.1, moments=moments)
        for step in gradients:
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient.to(device)
            parameters[-1].grad = gradient.to(device).T.contiguous().T
            optimizer.step()
        found.append([(p.data.float().cpu(), optimizer.state[p]["exp_avg_sq"].float().cpu()) for p in parameters])
    weights, other = (torch.cat([weight.flatten() for weight, _ in of]) for of in found)
    assert (weights != other).float().mean() < 0.02  # the last bit, where float32 rounds otherwise
    for (plain, plain_sq), (kernel, kernel_sq) in zip(*found, strict=True):
        torch.testing.assert_close(kernel, plain, rtol=2**-7, atol=1e-6)
        torch.testing.assert_close(kernel_sq, plain_sq, rtol=2**-6, atol=1e-9)


@pytest.mark.parametrize("keep", ["all", "cheap", "half", "mlp"])
def test_compiled_layers_give_the_plain_gradients(keep: str) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    name, _ = resolve_attention("auto", "cuda")
    model = AutoModelForCausalLM.from_config(Qwen2Config(**SHAPE), attn_implementation=name).to("cuda", torch.bfloat16)
    lengths = [(40, 7, 100), (13, 260), (90, 91, 92)]
    batches = [
        PackedRows.build([[i % 900 + 3 for i in range(n)] for n in row], [[True] * n for n in row], "cuda")
        for row in lengths
    ]
    trained = [
        p for name, p in model.named_parameters() if "k_proj.bias" not in name
    ]  # whose gradient is zero but for rounding
    want = [torch.autograd.grad(packed_loss(model, rows), trained) for rows in batches]
    kernels.compile_layers(model, keep=keep)  # type: ignore[arg-type]
    for rows, plain in zip(batches, want):
        for one, other in zip(torch.autograd.grad(packed_loss(model, rows), trained), plain):
            assert torch.nn.functional.cosine_similarity(one.flatten().float(), other.flatten().float(), 0) > 0.999
            assert float(one.float().norm()) == pytest.approx(float(other.float().norm()), rel=0.02)


@pytest.mark.parametrize("settings", [
    {"compile": True}, {}, {"selective_checkpointing": "half", "optimizer": "adamw_split_bf16"}, {"use_peft": True, "lora_dropout": 0.0},
], ids=str)  # fmt: skip
def test_a_native_run(tmp_path: Path, settings: dict[str, Any]) -> None:
    torch._dynamo.reset()
    tiny.write_model(tmp_path / "model", hidden_size=128, num_attention_heads=4)
    tiny.write_rows(tmp_path / "train.jsonl", tiny.chats(64))
    session = create_sft_trainer(
        model_name=tmp_path / "model", dataset_name=tmp_path / "train.jsonl", output_dir=tmp_path / "out", precision="bf16", batch_size=16,
        learning_rate=3e-3, max_steps=30, log_interval=1, loggers="none", backend="native", gradient_checkpointing=False, **settings,
    )  # fmt: skip
    session.train()
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["split"] == "train"]
    assert losses[-1] < losses[0] - (0.1 if settings.get("use_peft") else 1.0)
    assert session.predict(["say red"])


class NoWaiting(TrainerCallback):
    """An error wherever the host waits for the GPU, in steps 5 to 9."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in (4, 9):
            torch.cuda.set_sync_debug_mode("error" if state.global_step == 4 else "default")


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "adamw_split_bf16"])
def test_steps_between_two_log_lines_wait_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str) -> None:  # fmt: skip
    """The batch of the next step too is copied while the GPU computes."""
    monkeypatch.setattr(PackedSFTTrainer, "__init__", watched(PackedSFTTrainer.__init__))
    tiny.write_model(tmp_path / "model", hidden_size=128, num_attention_heads=4)
    tiny.write_rows(tmp_path / "train.jsonl", tiny.chats(64))
    session = create_sft_trainer(
        model_name=tmp_path / "model", dataset_name=tmp_path / "train.jsonl", output_dir=tmp_path / "out", precision="bf16", batch_size=4,
        max_steps=12, log_interval=12, loggers="none", backend="native", gradient_checkpointing=False, optimizer=optimizer, compile=False,
    )  # fmt: skip
    session.train()


def watched(init: Any) -> Any:
    def patched(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.add_callback(NoWaiting())

    return patched
