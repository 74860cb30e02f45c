"""Rollouts by generate: right tokens, exact log-probabilities, and everything left as it was found."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from aligntune.errors import ConfigError
from aligntune.models.forward import packed_log_probs
from aligntune.models.packed import PackedRows
from aligntune.rollouts.base import SamplingParams
from aligntune.rollouts.transformers import TransformersEngine

NAMES = ("llama", "qwen2", "qwen3", "mistral")
PROMPTS = [[3, 4, 5, 6, 7], [8], [9, 10, 11]]


def recomputed(model, rollouts, generations=1, temperature=1.0):
    prompts = [p for p in PROMPTS for _ in range(generations)]
    rows = PackedRows.from_completions(prompts, rollouts.completion_ids)
    values = packed_log_probs(model, rows, temperature=temperature).log_probs
    return [v.tolist() for v in values.split(rows.counts)]


def assert_close(got, want, tolerance=1e-4):
    assert [len(row) for row in got] == [len(row) for row in want]
    for a, b in zip(got, want, strict=True):
        assert a == pytest.approx(b, abs=tolerance)


def greedy_by_hand(model, prompt, steps, stops=()):
    ids = list(prompt)
    for _ in range(steps):
        ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] in stops:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", NAMES)
def test_greedy_equals_one_row_at_a_time(name, build_model):
    model = build_model(name)
    rollouts = TransformersEngine(model).generate(PROMPTS, SamplingParams(max_new_tokens=9, temperature=0))
    assert rollouts.completion_ids == [greedy_by_hand(model, p, 9) for p in PROMPTS]
    assert rollouts.finished == [False] * 3
    assert_close(rollouts.log_probs, recomputed(model, rollouts))
    assert rollouts.sampler_log_probs == [[0.0] * 9] * 3


def test_stop_tokens_end_a_completion_and_belong_to_it(model):
    free = TransformersEngine(model).generate(PROMPTS, SamplingParams(max_new_tokens=9, temperature=0))
    stops = (free.completion_ids[0][3], free.completion_ids[1][1])
    rollouts = TransformersEngine(model).generate(
        PROMPTS, SamplingParams(max_new_tokens=9, temperature=0, stop_token_ids=stops)
    )
    assert rollouts.completion_ids == [greedy_by_hand(model, p, 9, stops) for p in PROMPTS]
    assert rollouts.finished == [row[-1] in stops for row in rollouts.completion_ids]
    assert rollouts.finished[:2] == [True, True]
    assert_close(rollouts.log_probs, recomputed(model, rollouts))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_those_of_the_tempered_distribution(model, temperature):
    params = SamplingParams(
        max_new_tokens=6, temperature=temperature, num_generations=3, seed=1, stop_token_ids=(0, 1, 2)
    )
    rollouts = TransformersEngine(model).generate(PROMPTS, params)
    assert len(rollouts) == 9
    assert_close(rollouts.log_probs, recomputed(model, rollouts, 3, temperature))
    assert rollouts.sampler_log_probs == rollouts.log_probs


def test_truncation_and_penalty_show_in_the_samplers_own_log_probs(model):
    params = SamplingParams(max_new_tokens=6, top_k=3, repetition_penalty=1.5, seed=1)
    rollouts = TransformersEngine(model).generate(PROMPTS, params)
    assert_close(rollouts.log_probs, recomputed(model, rollouts))
    for prompt, row, sampler in zip(PROMPTS, rollouts.completion_ids, rollouts.sampler_log_probs, strict=True):
        ids = list(prompt)
        for token, got in zip(row, sampler, strict=True):
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            seen = torch.tensor(sorted(set(ids)))
            logits[seen] = torch.where(logits[seen] < 0, logits[seen] * 1.5, logits[seen] / 1.5)
            top = logits.topk(3)
            assert token in top.indices
            assert got == pytest.approx((logits[token] - top.values.logsumexp(0)).item(), abs=1e-4)
            ids.append(token)


def test_seed_decides_and_the_global_state_is_left_alone(model):
    engine = TransformersEngine(model)
    params = SamplingParams(max_new_tokens=8, seed=3, num_generations=2)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = engine.generate(PROMPTS, params)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    assert engine.generate(PROMPTS, params) == first
    assert engine.generate(PROMPTS, SamplingParams(max_new_tokens=8, seed=4, num_generations=2)) != first


def test_model_is_left_as_found(model):
    model.gradient_checkpointing_enable()
    model.train()
    model.model.layers[0].eval()
    model.config.use_cache = False
    model.generation_config.repetition_penalty = 5.0
    rollouts = TransformersEngine(model).generate(PROMPTS, SamplingParams(max_new_tokens=5, temperature=0))
    assert model.training
    assert model.model.layers[1].training
    assert not model.model.layers[0].training
    assert model.config.use_cache is False
    assert model.is_gradient_checkpointing
    assert model.generation_config.repetition_penalty == 5.0
    assert rollouts.completion_ids == [greedy_by_hand(model.eval(), p, 5) for p in PROMPTS]  # penalty of 5 not applied


def test_rows_in_batches_give_the_same_greedy_tokens(model):
    params = SamplingParams(max_new_tokens=5, temperature=0, num_generations=2)
    assert (
        TransformersEngine(model, max_rows=2).generate(PROMPTS, params).completion_ids
        == TransformersEngine(model).generate(PROMPTS, params).completion_ids
    )


def test_lora_is_live(model):
    params = SamplingParams(max_new_tokens=6, temperature=0)
    base = TransformersEngine(model).generate(PROMPTS, params)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                p.mul_(5)
    engine = TransformersEngine(adapted)
    rollouts = engine.generate(PROMPTS, params)
    assert rollouts.completion_ids != base.completion_ids
    assert_close(rollouts.log_probs, recomputed(adapted, rollouts))
    with adapted.disable_adapter():
        assert engine.generate(PROMPTS, params).completion_ids == base.completion_ids


def test_generation_kwargs_reach_generate_or_are_refused(model):
    engine = TransformersEngine(model)
    params = SamplingParams.build({"no_repeat_ngram_size": 1}, max_new_tokens=9, temperature=0)
    rollouts = engine.generate(PROMPTS, params)
    assert all(len(set(p + row)) == len(p + row) for p, row in zip(PROMPTS, rollouts.completion_ids, strict=True))
    assert_close(rollouts.log_probs, recomputed(model, rollouts))  # still those of the model
    with pytest.raises(ConfigError, match="num_beams"):
        engine.generate(PROMPTS, SamplingParams.build({"num_beams": 2}, max_new_tokens=2))
    with pytest.raises(ConfigError, match="no_such_thing"):
        engine.generate(PROMPTS, SamplingParams.build({"no_such_thing": 2}, max_new_tokens=2))
    for name, value in (("stop_strings", ["a"]), ("guidance_scale", 2.0), ("use_cache", False), ("pad_token_id", 1)):
        with pytest.raises(ConfigError, match=f"{name} in generation_kwargs"):
            engine.generate(PROMPTS, SamplingParams.build({name: value}, max_new_tokens=2))
