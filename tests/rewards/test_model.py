"""A reward model scores like the model itself, whatever the batch; a model without a head is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from aligntune.errors import ConfigError, ModelError
from aligntune.rewards import RewardSet
from aligntune.rewards.model import RewardModel, load

from .conftest import WORDS, tiny_bert, tiny_tokenizer

PAIRS = [("it was", "the cat sat"), ("it was a dog", "blue"), ("", "then the bird ran quickly and slowly"), ("red", "")]


def columns() -> tuple[list[str], list[str]]:
    return [pair[0] for pair in PAIRS], [pair[1] for pair in PAIRS]


def test_scores_are_the_models_own(reward_model_folder: Path) -> None:
    reward = load(str(reward_model_folder), device="cpu")
    by_hand = []
    for prompt, completion in PAIRS:
        given = (prompt, completion) if prompt else (completion,)
        with torch.inference_mode():
            by_hand.append(reward.model(**reward.tokenizer(*given, return_tensors="pt")).logits.item())
    assert len(set(by_hand)) == 4
    for batch_size in (1, 3, 8):
        reward.batch_size = batch_size
        assert reward(*columns()) == pytest.approx(by_hand, abs=1e-5)


def test_by_name_in_a_config(reward_model_folder: Path) -> None:
    config = {"type": "reward_model", "params": {"model": str(reward_model_folder), "device": "cpu"}, "weight": 0.5}
    direct = load(str(reward_model_folder), device="cpu")(*columns())
    assert RewardSet([config]).score(*columns()).total == pytest.approx([score / 2 for score in direct])


def test_a_loaded_model_is_a_reward(reward_model_folder: Path) -> None:
    reward = load(str(reward_model_folder), device="cpu")
    rewards = RewardSet([reward])
    assert rewards.names == ["reward_model"]
    assert rewards.score(*columns()).total == pytest.approx(reward(*columns()))


def test_a_decoder_with_a_chat_template(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4 + len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[CLS] {{ m.content }} [SEP]{% endfor %}"
    reward = RewardModel(LlamaForSequenceClassification(config), tokenizer, batch_size=2)
    prompts = [[{"role": "user", "content": "the cat"}], [{"role": "user", "content": "a dog ran on it"}]]
    completions = [[{"role": "assistant", "content": "sat"}], [{"role": "assistant", "content": "red and blue"}]]
    scores = reward(prompts, completions)
    for prompt, completion, score in zip(prompts, completions, scores, strict=True):
        text = f"[CLS] {prompt[0]['content']} [SEP][CLS] {completion[0]['content']} [SEP]"
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        with torch.inference_mode():
            assert reward.model(input_ids=ids["input_ids"]).logits.item() == pytest.approx(score, abs=1e-5)


def test_classifiers_need_a_label() -> None:
    from transformers import BertForSequenceClassification

    model = tiny_bert(BertForSequenceClassification, num_labels=3, id2label={0: "bad", 1: "fine", 2: "great"})
    with pytest.raises(ModelError, match="3 outputs: say which one counts with label: bad or fine or great"):
        RewardModel(model, tiny_tokenizer())
    scores = {
        label: RewardModel(model, tiny_tokenizer(), label=label)(["it was"], ["red"])[0] for label in ("bad", "FINE", 2)
    }
    assert sum(scores.values()) == pytest.approx(1.0)
    assert all(0 < score < 1 for score in scores.values())


def test_of_labels_that_exclude_nothing_each_has_its_own_probability() -> None:
    from transformers import BertForSequenceClassification

    kind = "multi_label_classification"
    reward = RewardModel(
        tiny_bert(BertForSequenceClassification, num_labels=3, problem_type=kind), tiny_tokenizer(), label=1
    )
    with torch.inference_mode():
        logits = reward.model(**reward.tokenizer("it was", "red", return_tensors="pt")).logits[0]
    assert reward(["it was"], ["red"]) == pytest.approx([logits[1].sigmoid().item()], abs=1e-6)


def test_scores_of_standardised_labels_are_in_their_own_unit() -> None:
    from transformers import BertForSequenceClassification

    reward = RewardModel(tiny_bert(BertForSequenceClassification, num_labels=1), tiny_tokenizer())
    plain = reward(*columns())
    reward.model.config.reward_scale = [2.0, 3.0]  # mean, standard deviation
    assert reward(*columns()) == pytest.approx([3 * score + 2 for score in plain], abs=1e-5)


def test_the_positions_of_a_roberta_begin_after_its_padding_id() -> None:
    """Of 10 positions ids 0 and 1 are not used."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=4 + len(WORDS), hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=10, pad_token_id=1, num_labels=1,
    )  # fmt: skip
    reward = RewardModel(RobertaForSequenceClassification(config), tiny_tokenizer())
    assert len(reward.encode("", "the cat sat on the red mat and ran")["input_ids"]) == 8
    assert len(reward(["the cat sat"], ["on the red mat and ran"])) == 1


def test_inputs_that_no_token_opens_or_parts() -> None:
    """A chat template without a first token: nothing but the end stays. A tokenizer without separator: one text."""
    from transformers import BertForSequenceClassification

    tokenizer = tiny_tokenizer()
    reward = RewardModel(tiny_bert(BertForSequenceClassification, num_labels=1), tokenizer, max_length=3)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    ids = reward.encode("the cat", "sat on mat")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["sat", "on", "mat"]
    tokenizer.chat_template, tokenizer.sep_token, reward.max_length = None, None, 64
    assert reward.encode("the cat ", "sat") == dict(tokenizer("the cat sat"))


def test_long_inputs_lose_their_beginning(reward_model_folder: Path) -> None:
    reward = load(str(reward_model_folder), device="cpu", max_length=6)
    alone = reward.tokenizer.convert_ids_to_tokens(reward.encode("", "the cat sat on the red mat")["input_ids"])
    assert alone == ["[CLS]", "on", "the", "red", "mat", "[SEP]"]
    ids = reward.encode("the cat sat on the mat", "red dog")["input_ids"]
    words = reward.tokenizer.convert_ids_to_tokens(ids)
    assert words[0] == "[CLS]"
    assert words[-3:] == ["red", "dog", "[SEP]"]
    assert len(words) == 6


def test_a_model_without_a_head_is_refused(encoder_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"classifier\.weight: it is a model without a reward head"):
        load(str(encoder_folder), device="cpu")
    from transformers import BertModel

    with pytest.raises(ModelError, match="BertModel has no classification head"):
        RewardModel(tiny_bert(BertModel), tiny_tokenizer())
    with pytest.raises(ModelError, match="no such folder"):
        load(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="reward_model needs params"):
        RewardSet(["reward_model"]).score(["p"], ["c"])


@pytest.mark.parametrize("trusts", [False, True])
def test_code_that_comes_with_a_model_runs_only_when_trusted(tmp_path: Path, monkeypatch: Any, trusts: bool) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, ran = tmp_path / "model", tmp_path / "ran"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own_code.Own"}}')
    (folder / "own_code.py").write_text(f"open({str(ran)!r}, 'w').close()\nraise ValueError('that is all')")
    with pytest.raises(ModelError):
        load(str(folder), device="cpu", **({"trust_remote_code": True} if trusts else {}))
    assert ran.exists() == trusts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": {"load_in_4bits": True}}, "quantization.load_in_4bits is not a field of BitsAndBytesConfig"),
        ({"device": "gpu"}, "device='gpu': use auto, cpu or cuda"),
    ],
)
def test_what_cannot_be_had_is_refused(reward_model_folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(str(reward_model_folder), **options)


def test_an_adapter_with_its_head(reward_model_folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import BertForSequenceClassification, BertModel

    base = tmp_path / "base"
    tiny_bert(BertModel).save_pretrained(base)
    model: Any = BertForSequenceClassification.from_pretrained(base, num_labels=1)
    torch.manual_seed(1)
    adapted = get_peft_model(
        model, LoraConfig(target_modules=["query"], modules_to_save=["classifier"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    wanted = RewardModel(adapted.merge_and_unload(), tiny_tokenizer())(*columns())
    assert load(str(tmp_path / "adapter"), device="cpu")(*columns()) == pytest.approx(wanted, abs=1e-5)
