"""Our losses inside a wrapper that behaves as DDP does on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from aligntune.models.forward import packed_log_probs, packed_loss
from aligntune.models.packed import PackedRows
from aligntune.trainers.online_forward import Forward


class Moving(nn.Module):
    """Takes the first argument of a call and moves it to its device, which needs one."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any) -> Any:
        return self.module(inputs[0].to("cpu"), *inputs[1:])


def online_log_probs(model: nn.Module, rows: PackedRows) -> Tensor:
    return Forward(None, temperature=1.0)(model, rows).log_probs


@pytest.mark.parametrize(
    "compute", [packed_loss, lambda model, rows: packed_log_probs(model, rows).log_probs, online_log_probs]
)
def test_a_wrapper_gets_a_tensor_to_move(compute: Any) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)).eval()  # fmt: skip
    rows = PackedRows.build([[3, 4, 5], [6, 7]], [[True] * 3, [True] * 2])
    torch.testing.assert_close(compute(Moving(model), rows), compute(model, rows))
