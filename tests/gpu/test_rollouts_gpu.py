"""The graph engine with its graphs: greedy equals generate, log-probabilities equal the forward pass, weights are live."""

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPE = {
    "vocab_size": 997, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
}  # fmt: skip
PROMPTS = [[(7 * i + j) % 997 for j in range(3 + 5 * i)] for i in range(11)]


def build(name="llama", dtype=torch.float32):
    from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    configs = {
        "llama": LlamaConfig(**SHAPE), "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
        "qwen3": Qwen3Config(**SHAPE), "mistral": MistralConfig(**SHAPE, sliding_window=20),
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configs[name], attn_implementation="sdpa")
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.15)
    return model.cuda().to(dtype).eval()


def difference(model, rollouts, generations=1, temperature=1.0):
    """Largest and mean distance between reported log-probabilities and those of a packed forward pass."""
    from aligntune.models.forward import packed_log_probs
    from aligntune.models.packed import PackedRows

    prompts = [p for p in PROMPTS for _ in range(generations)]
    rows = PackedRows.from_completions(prompts, rollouts.completion_ids, "cuda")
    with torch.no_grad():
        want = packed_log_probs(model, rows, temperature=temperature).log_probs.cpu()
    gap = (torch.tensor([x for row in rollouts.log_probs for x in row]) - want).abs()
    return gap.max().item(), gap.mean().item()


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_greedy_equals_generate_token_for_token(name):
    from aligntune.rollouts.base import SamplingParams
    from aligntune.rollouts.graph import GraphEngine
    from aligntune.rollouts.transformers import TransformersEngine

    model = build(name)
    params = SamplingParams(max_new_tokens=60, temperature=0, stop_token_ids=tuple(range(40)))
    want = TransformersEngine(model).generate(PROMPTS, params)
    got = GraphEngine(model, compile_layers=False).generate(PROMPTS, params)
    assert got.completion_ids == want.completion_ids
    assert got.finished == want.finished
    assert difference(model, got)[0] < 2e-3


@pytest.mark.parametrize("compiled", [False, True])
def test_sampled_log_probs_while_rows_finish(compiled):
    from aligntune.rollouts.base import SamplingParams
    from aligntune.rollouts.graph import GraphEngine

    model = build("qwen2", torch.bfloat16)
    engine = GraphEngine(model, compile_layers=compiled)
    params = SamplingParams(
        max_new_tokens=100, temperature=0.8, seed=1, num_generations=6, stop_token_ids=tuple(range(30))
    )
    first = engine.generate(PROMPTS, params)
    assert len({len(row) for row in first.completion_ids}) > 10
    largest, mean = difference(model, first, 6, 0.8)
    assert mean < 0.06
    assert largest < 0.5
    again = engine.generate(PROMPTS, params)  # all graphs captured by now
    same = sum(a == b for a, b in zip(first.completion_ids, again.completion_ids, strict=True))
    assert same >= 0.9 * len(first)
    fresh = GraphEngine(model, compile_layers=compiled).generate(PROMPTS[:3], params)
    same = sum(a == b for a, b in zip(first.completion_ids[:18], fresh.completion_ids, strict=True))
    assert same >= 0.5 * 18  # a row's draws do not depend on its batch; rounding may


def test_truncation_and_penalty_inside_the_graph():
    from aligntune.rollouts.base import SamplingParams
    from aligntune.rollouts.graph import GraphEngine

    model = build()
    params = SamplingParams(max_new_tokens=40, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.3, seed=0)
    rollouts = GraphEngine(model, compile_layers=False).generate(PROMPTS, params)
    assert difference(model, rollouts)[0] < 2e-3
    pairs = [
        (p, q)
        for a, b in zip(rollouts.log_probs, rollouts.sampler_log_probs, strict=True)
        for p, q in zip(a, b, strict=True)
    ]
    assert all(q <= 1e-5 for _, q in pairs)
    assert sum(q > p for p, q in pairs) > 0.5 * len(pairs)


def test_weights_and_adapters_are_live():
    from peft import LoraConfig, get_peft_model

    from aligntune.rollouts.base import SamplingParams
    from aligntune.rollouts.graph import GraphEngine

    model = get_peft_model(build(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    engine = GraphEngine(model, compile_layers=False)
    params = SamplingParams(max_new_tokens=20, temperature=0)
    adapted = engine.generate(PROMPTS, params)
    assert difference(model, adapted)[0] < 2e-3
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.mul_(4)
    changed = engine.generate(PROMPTS, params)
    assert changed.completion_ids != adapted.completion_ids
    assert difference(model, changed)[0] < 2e-3
    with model.disable_adapter():
        base = engine.generate(PROMPTS, params)
        assert difference(model, base)[0] < 2e-3
    assert base.completion_ids != changed.completion_ids


def test_a_trained_and_compiled_model_rolls_out_in_between():
    from aligntune.models.forward import packed_loss
    from aligntune.models.kernels.attention import resolve_attention
    from aligntune.models.kernels.compile import compile_layers
    from aligntune.models.packed import PackedRows
    from aligntune.rollouts.base import SamplingParams
    from aligntune.rollouts.graph import GraphEngine

    model = build("qwen2", torch.bfloat16)
    model.set_attn_implementation(resolve_attention("auto", "cuda")[0])
    compile_layers(model)
    engine = GraphEngine(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        rollouts = engine.generate(PROMPTS, SamplingParams(max_new_tokens=30, seed=0))
        largest, mean = difference(model, rollouts)
        assert mean < 0.06
        assert largest < 0.5
        packed_loss(model, PackedRows.from_completions(PROMPTS, rollouts.completion_ids, "cuda")).backward()
        optimizer.step()
        optimizer.zero_grad()
