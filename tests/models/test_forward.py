"""Packed log-probabilities and losses against the model's own padded or single-row logits."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoConfig,
    GraniteConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from aligntune.errors import ModelError
from aligntune.models.forward import check_packed, model_head, packed_log_probs, packed_loss
from aligntune.models.packed import PackedRows

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "llama-tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE),
    "mistral-sliding": MistralConfig(**SHAPE, sliding_window=3),
    "gemma2-softcap": Gemma2Config(**SHAPE, sliding_window=4, final_logit_softcapping=0.5, query_pre_attn_scalar=4),
    "granite-scaled": GraniteConfig(**SHAPE, logits_scaling=0.25),
    "cohere-scaled": CohereConfig(**SHAPE, logit_scale=3.0),
    "gpt2": GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=32),
}
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11]]
COMPLETIONS = [[12, 13], [14, 15, 16, 17, 18, 19], []]


def build(name, **kwargs):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], **kwargs)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def plain(model, prompt, completion, temperature=1.0):
    """Log-probabilities of the completion from the full logits of one row."""
    ids = torch.tensor([[*prompt, *completion]])
    log_p = (model(input_ids=ids).logits[0].float() / temperature).log_softmax(-1)
    return log_p[len(prompt) - 1 : -1].gather(-1, ids[0, len(prompt) :, None])[:, 0]


def test_layout_by_hand():
    rows = PackedRows.from_completions(PROMPTS, COMPLETIONS)
    assert rows.input_ids.tolist() == [[3, 4, 5, 12, 13, 6, 14, 15, 16, 17, 18, 19, 7, 8, 9, 10, 11]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]]
    assert rows.cu_seqlens.tolist() == [0, 5, 12, 17]
    assert rows.max_length == 7
    assert rows.predictors.tolist() == [2, 3, 5, 6, 7, 8, 9, 10]
    assert rows.counts == (2, 6, 0)
    assert rows.padded(rows.targets, fill=-1).tolist() == [[12, 13, -1, -1, -1, -1], [14, 15, 16, 17, 18, 19], [-1] * 6]
    assert rows.mask().sum(1).tolist() == [2, 6, 0]


def test_flat_tensors_give_the_same_rows():
    want = PackedRows.from_completions(PROMPTS, COMPLETIONS)
    labels = torch.full((1, 17), -100)
    labels[0, want.predictors + 1] = want.targets
    labels[0, 5] = 6  # the first token of a row has no predictor
    got = PackedRows.from_flat(want.input_ids, want.position_ids, labels)
    for name in ("position_ids", "cu_seqlens", "predictors", "targets", "cells"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert got.counts == want.counts


def test_bad_rows_are_refused():
    with pytest.raises(ValueError, match="without tokens"):
        PackedRows.from_completions([[]], [[1]])
    with pytest.raises(ValueError, match="empty row"):
        PackedRows.build([[]], [[]])
    with pytest.raises(ValueError, match="flags"):
        PackedRows.build([[1, 2]], [[True]])


@pytest.mark.parametrize("name", CONFIGS)
def test_log_probs_and_gradients_equal_the_plain_forward(name):
    model = build(name, attn_implementation="eager" if "gemma2" in name else "sdpa")
    rows = PackedRows.from_completions(PROMPTS, COMPLETIONS)
    got = packed_log_probs(model, rows, temperature=0.7, chunk_tokens=3).log_probs
    want = torch.cat([plain(model, p, c, 0.7) for p, c in zip(PROMPTS, COMPLETIONS, strict=True) if c])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
    ramp = torch.linspace(-1, 1, len(got))
    parameters = list(model.parameters())
    for a, b in zip(*(torch.autograd.grad((x * ramp).sum(), parameters) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert check_packed(model) is None


def test_loss_is_cross_entropy_of_trained_tokens():
    model = build("qwen2")
    rows = PackedRows.from_completions(PROMPTS, COMPLETIONS)
    want = -torch.cat([plain(model, p, c) for p, c in zip(PROMPTS[:2], COMPLETIONS[:2], strict=True)])
    torch.testing.assert_close(packed_loss(model, rows), want.mean())
    torch.testing.assert_close(packed_loss(model, rows, reduction="sum"), want.sum())
    torch.testing.assert_close(packed_loss(model, rows, reduction="none"), want)


def test_entropy_is_that_of_the_tempered_distribution():
    model = build("llama")
    rows = PackedRows.from_completions([[1, 2]], [[3]])
    logits = model(input_ids=torch.tensor([[1, 2]])).logits[0, -1] / 0.5
    want = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(packed_log_probs(model, rows, temperature=0.5, entropy=True).entropy[0], want)


def test_the_head_sees_the_trained_tokens_only():
    model, seen = build("llama"), []
    model.lm_head.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    packed_log_probs(model, PackedRows.from_completions(PROMPTS, COMPLETIONS))
    assert seen == [sum(map(len, COMPLETIONS))]


def test_lora_on_the_trunk_with_gradient_checkpointing():
    base = build("qwen2")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    rows = PackedRows.from_completions(PROMPTS, COMPLETIONS)
    want = torch.cat([plain(model, p, c) for p, c in zip(PROMPTS[:2], COMPLETIONS[:2], strict=True)])
    trained = [p for p in model.parameters() if p.requires_grad]
    want_grads = torch.autograd.grad(want.sum(), trained)
    model.enable_input_require_grads()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    got = packed_log_probs(model, rows).log_probs
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for a, b in zip(torch.autograd.grad(got.sum(), trained), want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    with model.disable_adapter():
        reference = packed_log_probs(model, rows).log_probs
    assert (reference - got).abs().max() > 1e-3


def test_adapter_on_the_head_and_encoder_decoders_are_refused():
    model = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ModelError, match="lm_head out of target_modules"):
        model_head(model)
    trained = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    head = model_head(trained)
    assert head.weight.requires_grad
    from transformers import T5Config, T5ForConditionalGeneration

    t5 = T5ForConditionalGeneration(T5Config(vocab_size=9, d_model=4, d_kv=2, d_ff=4, num_layers=1, num_heads=2))
    with pytest.raises(ModelError, match="encoder-decoder"):
        packed_loss(t5, PackedRows.from_completions([[1]], [[2]]))


def test_a_head_that_does_more_is_found(monkeypatch):
    model = build("llama")
    plain_forward = model.forward

    def doubled(*args, **kwargs):
        out = plain_forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out

    monkeypatch.setattr(model, "forward", doubled)
    assert "other log-probabilities" in check_packed(model)


def test_masks_of_a_fixed_size_are_found():
    config = GPTNeoConfig(
        vocab_size=61, hidden_size=16, num_layers=1, attention_types=[[["global"], 1]], num_heads=2, max_position_embeddings=32
    )  # fmt: skip
    assert "fixed size" in check_packed(AutoModelForCausalLM.from_config(config))


def test_a_model_that_refuses_packed_rows_says_why(monkeypatch):
    model = build("llama")

    def refuses(*args, **kwargs):
        raise ValueError("no packed sequences here")

    monkeypatch.setattr(model.model, "forward", refuses)
    assert "no packed sequences here" in check_packed(model)


def test_the_trunk_is_found_where_transformers_does_not_look():
    config = Llama4TextConfig(**SHAPE, num_local_experts=2, intermediate_size_mlp=16, attention_chunk_size=8)
    assert check_packed(AutoModelForCausalLM.from_config(config)) is None


def test_bfloat16():
    model = build("qwen2").bfloat16()
    rows = PackedRows.from_completions(PROMPTS, COMPLETIONS)
    got = packed_log_probs(model, rows).log_probs
    assert got.dtype == torch.float32
    want = packed_log_probs(build("qwen2"), rows).log_probs
    torch.testing.assert_close(got, want, rtol=0.1, atol=0.3)
    F.relu(got.sum()).backward()
    assert model.lm_head.weight.grad.dtype == torch.bfloat16
