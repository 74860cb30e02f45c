"""The graph engine's road on the CPU: token for token what generate gives, exact log-probabilities, rows compacted."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma2Config, PhimoeConfig

from aligntune.errors import ConfigError
from aligntune.models.forward import packed_log_probs
from aligntune.models.packed import PackedRows
from aligntune.rollouts import graph
from aligntune.rollouts.base import SamplingParams
from aligntune.rollouts.graph import GraphEngine, check_rollouts
from aligntune.rollouts.step_graphs import bucket_sizes
from aligntune.rollouts.transformers import TransformersEngine

NAMES = ("llama", "qwen2", "qwen3", "mistral")
PROMPTS = [[3, 4, 5, 6, 7], [8], [9, 10, 11], [12, 13, 14, 15, 16, 17, 18, 19, 20]]


def recomputed(model, rollouts, generations=1, temperature=1.0):
    prompts = [p for p in PROMPTS for _ in range(generations)]
    rows = PackedRows.from_completions(prompts, rollouts.completion_ids)
    values = packed_log_probs(model, rows, temperature=temperature).log_probs
    return [v.tolist() for v in values.split(rows.counts)]


def assert_close(got, want):
    assert [len(row) for row in got] == [len(row) for row in want]
    for a, b in zip(got, want, strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def assert_same_rollouts(got, want):
    assert got.completion_ids == want.completion_ids
    assert got.finished == want.finished
    assert_close(got.log_probs, want.log_probs)
    assert_close(got.sampler_log_probs, want.sampler_log_probs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedy_equals_generate_token_for_token(name, penalty, build_model):
    model = build_model(name)
    params = SamplingParams(max_new_tokens=20, temperature=0, repetition_penalty=penalty, stop_token_ids=(1, 2, 30))
    assert_same_rollouts(
        GraphEngine(model).generate(PROMPTS, params), TransformersEngine(model).generate(PROMPTS, params)
    )
    assert check_rollouts(model) is None


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_log_probs_are_exact_while_rows_finish_and_move(model, temperature):
    stops = tuple(range(20))  # rows finish at different steps
    params = SamplingParams(max_new_tokens=25, temperature=temperature, stop_token_ids=stops, num_generations=5, seed=1)
    rollouts = GraphEngine(model).generate(PROMPTS, params)
    lengths = [len(row) for row in rollouts.completion_ids]
    assert len(lengths) == 20
    assert len(set(lengths)) > 3
    assert all(row[-1] in stops for row, done in zip(rollouts.completion_ids, rollouts.finished, strict=True) if done)
    assert not any(t in stops for row in rollouts.completion_ids for t in row[:-1])
    assert_close(rollouts.log_probs, recomputed(model, rollouts, 5, temperature))
    assert rollouts.sampler_log_probs == rollouts.log_probs


def test_completions_of_a_prompt_differ_and_follow_the_model(model):
    """First tokens of many completions against the model's own distribution."""
    params = SamplingParams(max_new_tokens=1, num_generations=4000, seed=0)
    rollouts = GraphEngine(model, max_rows=4000).generate([[3, 4]], params)
    counts = torch.bincount(torch.tensor(rollouts.completion_ids).flatten(), minlength=53) / 4000
    want = model(input_ids=torch.tensor([[3, 4]])).logits[0, -1].softmax(-1)
    assert (counts - want).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_truncation_shows_in_the_samplers_own_log_probs(model):
    params = SamplingParams(max_new_tokens=6, top_k=4, top_p=0.9, min_p=0.01, repetition_penalty=1.2, seed=3)
    rollouts = GraphEngine(model).generate(PROMPTS, params)
    assert_close(rollouts.log_probs, recomputed(model, rollouts))
    pairs = zip(rollouts.log_probs, rollouts.sampler_log_probs, strict=True)
    assert any(q > p + 1e-3 for a, b in pairs for p, q in zip(a, b, strict=True))
    assert all(q <= 1e-6 for row in rollouts.sampler_log_probs for q in row)


def test_seed_decides_and_global_state_is_left_alone(model):
    params = SamplingParams(max_new_tokens=8, seed=3, num_generations=2)
    before = torch.get_rng_state()
    engine = GraphEngine(model)
    first = engine.generate(PROMPTS, params)
    assert torch.equal(torch.get_rng_state(), before)
    assert engine.generate(PROMPTS, params) == first
    assert GraphEngine(model).generate(PROMPTS, params) == first
    assert engine.generate(PROMPTS, SamplingParams(max_new_tokens=8, seed=4, num_generations=2)) != first


def test_batches_of_rows_and_of_prompt_tokens_change_nothing(model, monkeypatch):
    params = SamplingParams(max_new_tokens=9, temperature=0, num_generations=2)
    want = GraphEngine(model).generate(PROMPTS, params)
    assert_same_rollouts(GraphEngine(model, max_rows=4).generate(PROMPTS, params), want)
    monkeypatch.setattr(graph, "PREFILL_TOKENS", 6)
    assert_same_rollouts(GraphEngine(model).generate(PROMPTS, params), want)


def test_buffers_are_reused_and_weights_are_live(model):
    params = SamplingParams(max_new_tokens=9, temperature=0)
    engine = GraphEngine(model)
    engine.generate(PROMPTS, params)
    store = engine.store
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    assert_same_rollouts(engine.generate(PROMPTS, params), TransformersEngine(model).generate(PROMPTS, params))
    shorter = SamplingParams(max_new_tokens=5, temperature=0)
    assert_same_rollouts(
        engine.generate(PROMPTS[:2], shorter), TransformersEngine(model).generate(PROMPTS[:2], shorter)
    )
    assert engine.store is store
    longer = SamplingParams(max_new_tokens=30, temperature=0)
    assert_same_rollouts(engine.generate(PROMPTS, longer), TransformersEngine(model).generate(PROMPTS, longer))
    engine.release()
    assert engine.store is None
    assert not any(hasattr(module, "aligntune_keys") for module in model.modules())


def test_lora_is_live(model):
    params = SamplingParams(max_new_tokens=6, temperature=0)
    base = GraphEngine(model).generate(PROMPTS, params)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                p.mul_(5)
    engine = GraphEngine(adapted)
    rollouts = engine.generate(PROMPTS, params)
    assert rollouts.completion_ids != base.completion_ids
    assert_close(rollouts.log_probs, recomputed(adapted, rollouts))
    with adapted.disable_adapter():
        assert engine.generate(PROMPTS, params).completion_ids == base.completion_ids


def test_model_is_left_as_found(model):
    model.gradient_checkpointing_enable()
    model.train()
    GraphEngine(model).generate(PROMPTS, SamplingParams(max_new_tokens=3))
    assert model.training
    assert model.is_gradient_checkpointing
    assert model.config._attn_implementation == "sdpa"
    loss = model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss
    loss.backward()
    assert model.lm_head.weight.grad is not None


def test_unknown_generation_kwargs_are_refused(model):
    with pytest.raises(ConfigError, match="no_repeat_ngram_size"):
        GraphEngine(model).generate(PROMPTS, SamplingParams.build({"no_repeat_ngram_size": 2}, max_new_tokens=2))


def test_a_model_that_cannot_run_says_why():
    shape = {"vocab_size": 53, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 4}
    config = Gemma2Config(**shape, num_attention_heads=4, num_key_value_heads=2, attn_logit_softcapping=2.0)
    model = AutoModelForCausalLM.from_config(config)
    assert "soft-capping" in check_rollouts(model)
    assert model.config._attn_implementation != "aligntune_rollout"


def test_windows_that_only_the_mask_knows_are_refused():
    shape = {"vocab_size": 53, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = PhimoeConfig(**shape, num_attention_heads=4, num_key_value_heads=2, sliding_window=30)
    assert "sliding windows" in check_rollouts(AutoModelForCausalLM.from_config(config))


def test_buckets():
    assert bucket_sizes(100) == [104, 80, 56, 40, 32, 24, 16, 8]
    assert bucket_sizes(1) == [8]
    assert bucket_sizes(128)[:3] == [128, 96, 64]
