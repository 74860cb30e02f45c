"""Evaluation rows and greedy answers: no reference in the prompt, the same answers in every batch."""

from __future__ import annotations

import logging

import pytest
import torch

from aligntune.data.examples import ChatExample, CompletionExample, PairExample, PromptExample, TextExample
from aligntune.errors import DataError
from aligntune.evaluation.answers import EvaluationRow, GreedyGenerator, choose, evaluation_row
from aligntune.rollouts.occasional import occasional_engine


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CHAT = [said("system", "w0"), said("user", "w1"), said("assistant", "w2"), said("user", "w3"), said("assistant", "w4")]


@pytest.mark.parametrize(
    ("example", "prompt", "reference"),
    [
        (ChatExample(CHAT), CHAT[:4], "w4"),
        (ChatExample(CHAT, prompt_length=2), CHAT[:4], "w4"),  # completions of several turns: the last one is asked for
        (ChatExample([*CHAT, said("user", "w5")]), CHAT[:4], "w4"),
        (CompletionExample("w1 w2", " w3"), "w1 w2", " w3"),
        (PairExample("w1", "w2", "w3"), "w1", "w2"),
        (PairExample(CHAT[:2], CHAT[2:3], [said("assistant", "w9")]), CHAT[:2], "w2"),
    ],
)
def test_rows_are_cut_before_the_answer(example, prompt, reference: str):
    row = evaluation_row(example, {"level": 3})
    assert row == EvaluationRow(prompt, reference, {"level": 3})


@pytest.mark.parametrize(
    "example",
    [
        TextExample("w1 w2"),
        PromptExample("w1"),
        CompletionExample("w1", " "),
        ChatExample([said("user", "w1")]),
        ChatExample([said("assistant", "w1")]),  # nothing to answer
        ChatExample([said("user", "w1"), said("assistant", "")]),  # a bare tool call has no text to compare with
    ],
)
def test_examples_without_an_answer_have_no_row(example):
    assert evaluation_row(example) is None


def test_choice_is_deterministic_ordered_and_not_the_first_rows():
    assert choose(5, 10) == choose(5, None) == [0, 1, 2, 3, 4]
    drawn = choose(1000, 50, seed=1)
    assert drawn == choose(1000, 50, seed=1) == sorted(set(drawn))
    assert drawn != choose(1000, 50, seed=2)
    assert drawn[-1] > 500


PROMPTS = ["w1 w2 w3", [said("user", "w4")], [said("system", "w5"), said("user", "w6 w7 w8 w9 w10 w11")], "w12"]


def greedy_by_hand(model, ids: list[int], stops: set[int], steps: int) -> list[int]:
    out: list[int] = []
    with torch.no_grad():
        while len(out) < steps and not (out and out[-1] in stops):
            out.append(int(model(torch.tensor([[*ids, *out]])).logits[0, -1].argmax()))
    return out


@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_answers_are_greedy_whatever_the_batch(model, tokenizer, batch_size: int):
    generator = GreedyGenerator.of(model, tokenizer, batch_size=batch_size)
    answers = generator.generate(PROMPTS, max_new_tokens=6)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = generator.prompt_ids(prompt)
        expected = greedy_by_hand(model, ids, set(generator.stop_token_ids), 6)
        assert answer == tokenizer.decode(expected, skip_special_tokens=True)


def test_prompts_are_those_of_training(model, tokenizer):
    generator = GreedyGenerator.of(model, tokenizer)
    assert tokenizer.decode(generator.prompt_ids("w1 w2")) == "<s> w1 w2"
    assert tokenizer.decode(generator.prompt_ids(CHAT[:2])) == "<|system|> w0 <|end|> <|user|> w1 <|end|> <|assistant|>"


def test_the_reference_never_reaches_the_model(model, tokenizer):
    seen: list[list[int]] = []

    class Engine:
        name = "recording"

        def generate(self, prompt_ids, params):
            from aligntune.rollouts.base import Rollouts

            seen.extend(prompt_ids)
            assert params.greedy
            assert params.seed == 7
            return Rollouts([[2]] * len(prompt_ids), None, [[0.0]] * len(prompt_ids), [True] * len(prompt_ids))

        def update_weights(self):
            raise AssertionError("evaluation does not train")

    examples = [ChatExample(CHAT), CompletionExample("w1", "w4"), PairExample(CHAT[:2], [CHAT[4]], [CHAT[2]])]
    rows = [evaluation_row(example) for example in examples]
    answers = GreedyGenerator(Engine(), tokenizer, seed=7).generate([row.prompt for row in rows], max_new_tokens=3)
    assert answers == ["", "", ""]
    reference = tokenizer.convert_tokens_to_ids("w4")
    assert len(seen) == 3
    assert not any(reference in ids for ids in seen)


def test_an_answer_ends_with_its_turn(model, tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    generator = GreedyGenerator.of(model, tokenizer)
    assert generator.stop_token_ids == (tokenizer.eos_token_id, end)
    model.generation_config.eos_token_id = [5, 2]
    assert GreedyGenerator.of(model, tokenizer).stop_token_ids == (2, 5, end)


def test_long_prompts_keep_their_end(model, tokenizer, caplog: pytest.LogCaptureFixture):
    generator = GreedyGenerator.of(model, tokenizer)
    long = " ".join(f"w{at % 40}" for at in range(100))
    with caplog.at_level(logging.WARNING):
        cut = generator.generate([long], max_new_tokens=4)
    assert "1 of 1 evaluation prompts lose their beginning: they exceed 60 tokens" in caplog.text
    ids = generator.prompt_ids(long)[-60:]
    assert cut == [
        tokenizer.decode(greedy_by_hand(model, ids, set(generator.stop_token_ids), 4), skip_special_tokens=True)
    ]
    with pytest.raises(DataError, match=r"leaves no room .*lower it \(evaluation.max_new_tokens\)"):
        generator.generate([long], max_new_tokens=64)


@pytest.mark.parametrize("name", ["graph", "transformers"])
def test_everything_is_left_as_found(model, tokenizer, name: str):
    model.train()
    model.generation_config.do_sample = True
    attention = model.config._attn_implementation
    state, side = torch.get_rng_state(), tokenizer.padding_side
    engine, _ = occasional_engine(model, name=name)
    GreedyGenerator.of(model, tokenizer, engine=engine).generate(PROMPTS, max_new_tokens=2)
    assert model.config._attn_implementation == attention
    assert model.training
    assert model.generation_config.do_sample
    assert torch.equal(state, torch.get_rng_state())
    assert tokenizer.padding_side == side
