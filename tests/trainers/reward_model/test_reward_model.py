"""Reward models: they learn, they come back as they were, and a bad request is told what is wrong with it."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import TrainerCallback

import tiny
from aligntune.api import evaluate
from aligntune.config.base import LoraSettings
from aligntune.config.enums import PrecisionType
from aligntune.config.rewards import RewardModelSourceConfig, RewardModelTrainingConfig
from aligntune.errors import ConfigError, DataError, ModelError, RewardError
from aligntune.models.use import load_for_answers
from aligntune.rewards.model import load
from aligntune.trainers import reward_model
from aligntune.trainers.reward_held_out import rank_correlation
from aligntune.trainers.reward_model import RewardTraining, label_texts, train_on_pairs, train_on_texts
from aligntune.trainers.reward_source import reward_model_of, trained_folder
from aligntune.trainers.reward_trainer import pair_losses

_RNG = random.Random(0)
TEXTS = [" ".join(_RNG.choice(["cat", "dog", "sun"]) for _ in range(_RNG.randint(1, 12))) for _ in range(100)]


def share_of_cats(completion: str) -> float:
    words = completion.split()
    return 10 + 5 * words.count("cat") / len(words)


def hundreds(completion: str) -> float:
    return 300 + 200 * share_of_cats(completion)


def not_a_number(completion: str) -> float:
    return math.nan


def constant(completion: str) -> float:
    return 1.0


def config(tmp_path: Path, **changes: Any) -> RewardModelTrainingConfig:
    tiny.write_model(tmp_path / "base")
    settings: dict[str, Any] = {
        "base_model_name": str(tmp_path / "base"), "training_texts": TEXTS, "reward_functions": [share_of_cats],
        "output_dir": str(tmp_path / "out"), "num_epochs": 5, "learning_rate": 3e-3, "gradient_accumulation_steps": 1,
    }  # fmt: skip
    return RewardModelTrainingConfig(**(settings | changes))


def pairs(count: int) -> list[dict[str, Any]]:
    return [{"prompt": "say it", "chosen": "yes " + text, "rejected": "no " + text} for text in TEXTS[:count]]


def test_distilled_scores_rank_held_out_texts_in_the_rewards_own_units(tmp_path: Path) -> None:
    done = train_on_texts(config(tmp_path), precision=PrecisionType.FP32, held_out=0.2)
    assert done.metrics["held_out_rows"] == 20
    assert done.metrics["rank_correlation"] > 0.6
    scores = load(str(done.folder), device="cpu")([""] * 20, TEXTS[:20])
    assert 9 < sum(scores) / 20 < 15  # labels lie in 10..15
    assert scores == pytest.approx(done.model([""] * 20, TEXTS[:20]), abs=1e-5)


@pytest.mark.parametrize("lora", [None, LoraSettings(8, 16, 0.0, None, False)])
def test_pairs_are_told_apart_and_the_model_comes_back(tmp_path: Path, lora: LoraSettings | None) -> None:
    tiny.write_model(tmp_path / "base")
    settings = RewardTraining(
        str(tmp_path / "base"), str(tmp_path / "out"), 4, 1e-2 if lora else 3e-3, 8, 1, lora=lora, held_out=0.2, precision=PrecisionType.FP32
    )  # fmt: skip
    done = train_on_pairs(pairs(100), settings)
    assert done.metrics["accuracy"] > 0.8
    assert done.metrics["margin"] > 0
    asked, said = ["say it"] * 2, ["yes cat", "no cat"]
    assert load(str(done.folder), device="cpu")(asked, said) == pytest.approx(done.model(asked, said), abs=1e-4)
    with pytest.raises(ConfigError, match="already holds a run"):
        train_on_pairs(pairs(10), settings)


def test_other_libraries_keep_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As the first thing that a process does."""
    tiny.write_model(tmp_path / "base")
    transformers.utils.logging.enable_progress_bar()
    transformers.utils.logging.set_verbosity_warning()
    capfd.readouterr()
    train_on_pairs(pairs(10), RewardTraining(str(tmp_path / "base"), str(tmp_path / "out"), 1, 1e-3, 8, 1))
    said = "".join(capfd.readouterr())
    assert "step 1/" in said
    assert not [word for word in ("LOAD REPORT", "Loading weights", "Writing model") if word in said]


def test_an_adapter_that_is_loaded_scores_in_the_rewards_own_units(tmp_path: Path) -> None:
    lora = LoraSettings(4, 8, 0.0, None, False)
    trained = train_on_texts(config(tmp_path, reward_functions=[hundreds], num_epochs=1), lora=lora)
    texts = ["cat dog", "dog"]
    scores = load(str(trained.folder), device="cpu")(["", ""], texts)
    assert scores == pytest.approx(trained.model(["", ""], texts), rel=1e-4)
    assert all(1500 < score < 4500 for score in scores)  # labels are 2300 to 3300; standardised ones are near 0
    (checkpoint,) = (tmp_path / "out" / "checkpoints").glob("checkpoint-*")
    assert load(str(checkpoint), device="cpu")(["", ""], texts) == pytest.approx(scores, rel=1e-4)
    rows = tiny.write_rows(tmp_path / "pairs.jsonl", [{"prompt": "", "chosen": texts[0], "rejected": texts[1]}])
    measured = evaluate(str(checkpoint), str(rows), precision="fp32").metrics
    assert [measured[f"rewards/{side}"] for side in ("chosen", "rejected")] == pytest.approx(scores, rel=1e-4)
    with pytest.raises(ModelError, match="writes no text"):
        load_for_answers(str(checkpoint))


def test_an_adapter_on_top_of_an_adapter_comes_back(tmp_path: Path) -> None:
    """The first one's weights are in no folder but its own: the model is written whole."""
    base, lora = tiny.write_model(tmp_path / "base"), LoraSettings(4, 8, 0.0, None, False)
    for name in ("one", "two"):
        done = train_on_pairs(pairs(12), RewardTraining(str(base), str(tmp_path / name), 1, 3e-2, 4, 1, lora=lora))
        base = done.folder
    asked, said = ["say it"] * 2, ["yes cat", "no cat"]
    assert load(str(base), device="cpu")(asked, said) == pytest.approx(done.model(asked, said), abs=1e-5)
    again = train_on_texts(
        config(tmp_path, reward_functions=[hundreds], base_model_name=str(tmp_path / "one" / "model"), num_epochs=1),
        lora=lora,
    )
    assert load(str(again.folder), device="cpu")([""], ["dog"]) == pytest.approx(again.model([""], ["dog"]), rel=1e-5)


def test_pair_losses_by_hand() -> None:
    scores = torch.tensor([1.0, 3.0, 0.0, 3.0])  # two chosen, then two rejected
    assert pair_losses(scores, torch.zeros(2)).tolist() == pytest.approx([math.log(1 + math.exp(-1)), math.log(2)])
    margins = torch.tensor([1.0, 0.0])
    assert pair_losses(scores, margins).tolist() == pytest.approx([math.log(2), math.log(2)])
    assert pair_losses(scores, margins, centering=0.5).tolist() == pytest.approx([math.log(2) + 0.5, math.log(2) + 18])


def test_rank_correlation_with_ties() -> None:
    assert rank_correlation([1, 2, 3], [10, 20, 90]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 1, 2], [1, 2, 3]) == pytest.approx(math.sqrt(3) / 2)  # ranks 1.5 1.5 3 and 1 2 3


def test_labels_are_the_weighted_sum_and_see_the_references(tmp_path: Path) -> None:
    def same(completion: str, reference: str) -> float:
        return float(completion == reference)

    asked = config(tmp_path, reward_functions=[share_of_cats, same], reward_weights=[2.0, 3.0], reference_texts=TEXTS)
    assert label_texts(asked)[1] == pytest.approx([2 * share_of_cats(text) + 3 for text in TEXTS])


def test_bad_requests(tmp_path: Path) -> None:
    for wrong in ({"training_texts": TEXTS[:9]}, {"reward_weights": [1.0, 2.0]}, {"reward_weights": [-1.0]}):
        with pytest.raises(ValueError):
            config(tmp_path, **wrong)
    with pytest.raises(RewardError):
        label_texts(config(tmp_path, reward_functions=[not_a_number]))
    with pytest.raises(RewardError, match="nothing to learn"):
        train_on_texts(config(tmp_path, reward_functions=[constant]))
    with pytest.raises(DataError, match="at least 2"):
        train_on_pairs(pairs(1), RewardTraining("x", str(tmp_path)))
    with pytest.raises(ModelError, match="head"):
        load(str(tmp_path / "base"))
    for row, message in (({"chosen": None}, "row 1: chosen is None"), ({"prompt": None}, "row 1: prompt is None")):
        with pytest.raises(DataError, match=message):
            train_on_pairs([*pairs(1), pairs(1)[0] | row], RewardTraining("none", str(tmp_path / "none")))


def test_a_classifier_gets_a_new_head(tmp_path: Path) -> None:
    from transformers import LlamaForSequenceClassification

    LlamaForSequenceClassification(tiny.model(num_labels=3).config).save_pretrained(tmp_path / "three")
    tiny.tokenizer().save_pretrained(tmp_path / "three")
    with pytest.raises(ModelError, match="3 outputs: say which one counts"):
        load(str(tmp_path / "three"), device="cpu")
    done = train_on_pairs(pairs(10), RewardTraining(str(tmp_path / "three"), str(tmp_path / "out"), 1, 1e-3))
    again = load(str(done.folder), device="cpu")
    assert again.outputs == 1
    assert list(again.model.config.id2label) == [0]


def test_a_run_trains_its_reward_model_once(tmp_path: Path) -> None:
    def run(**model: Any) -> Any:
        names = dict.fromkeys(["reward_path", "reward_model_name", "reward_model_source", "reward_model_quantization"])
        options = names | {"reward_device": "cpu", "trust_remote_code": False} | model
        training = options.pop("training", None)
        return SimpleNamespace(model=SimpleNamespace(**options), reward_training=training)

    training = config(tmp_path, num_epochs=1)
    first = reward_model_of(run(training=training))
    weights = tmp_path / "out" / "model" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    source = RewardModelSourceConfig(source_type="custom_trained", training_config=training)
    second = reward_model_of(run(reward_model_source=source))
    assert first is not None
    assert second is not None
    assert weights.stat().st_mtime_ns == written
    assert first(["", ""], TEXTS[:2]) == second(["", ""], TEXTS[:2])
    tuned = RewardModelSourceConfig(
        source_type="pretrained_local", model_path=str(tmp_path / "out" / "model"), fine_tune_with_rewards=True,
        training_config=training.model_copy(update={"output_dir": str(tmp_path / "tuned")}),
    )  # fmt: skip
    third = reward_model_of(run(reward_model_source=tuned))
    assert third is not None
    assert third(["", ""], TEXTS[:2]) != first(["", ""], TEXTS[:2])
    assert reward_model_of(run()) is None
    with pytest.raises(ConfigError, match="keep one"):
        reward_model_of(run(training=training, reward_path="somewhere"))


def test_a_training_inside_a_run_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stops(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    training = config(tmp_path, training_texts=TEXTS[:24], num_epochs=2, eval_interval=2)
    whole = trained_folder(training.model_copy(update={"output_dir": str(tmp_path / "whole")}), start=None)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(reward_model, "EvaluatesLast", Stops)
        trained_folder(training, start=None)
    cut = trained_folder(training, start=None)
    one, other = (load(str(folder), device="cpu")(["", ""], TEXTS[:2]) for folder in (whole, cut))
    assert one == other
    sessions = json.loads((cut.parent / "status.json").read_text())["sessions"]
    assert [session["from_step"] for session in sessions] == [0, 2]
    with pytest.raises(ConfigError, match="already holds a run"):
        trained_folder(training.model_copy(update={"num_epochs": 1}), start=None)
    assert trained_folder(training, start=None) == cut


@pytest.mark.parametrize("share", [0, 1, 1.5, -0.1, float("nan")])
def test_a_share_that_holds_nothing_out_or_leaves_nothing_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=r"held_out: .* should be a share above 0 and below 1"):
        RewardTraining("base", "out", held_out=share)
