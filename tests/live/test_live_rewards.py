"""Every setting of reward models acts: of their training, of their source, and those in the model section of online RL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from aligntune.config.resolve import resolve
from aligntune.config.rewards import RewardModelSourceConfig, RewardModelTrainingConfig
from aligntune.config.rl import ModelConfig
from aligntune.errors import AlignTuneError, ConfigError
from aligntune.models import load as loading
from aligntune.rewards.model import load
from aligntune.trainers.passes import BoundedPasses
from aligntune.trainers.reward_model import label_texts, train_on_texts
from aligntune.trainers.reward_source import reward_model_of
from live.cases import Case, four_bits, observed, session

ROOT: dict[str, Path] = {}
TEXTS = ["one " * (1 + n % 4) + word for n, word in enumerate(tiny.WORDS[:12])]


def here(name: str) -> str:
    return str(ROOT["root"] / name)


def real(value: Any) -> Any:
    """Names that begin with @ as paths inside the fixtures' folder."""
    if isinstance(value, dict):
        return {key: real(part) for key, part in value.items()}
    return here(value[1:]) if isinstance(value, str) and value.startswith("@") else value


@pytest.fixture(scope="module", autouse=True)
def _files(tmp_path_factory: pytest.TempPathFactory) -> None:
    from transformers import LlamaForSequenceClassification

    root = ROOT["root"] = tmp_path_factory.mktemp("live_rewards")
    for seed, name in enumerate(("model", "other", "value")):
        tiny.write_model(root / name, seed=seed, num_hidden_layers=1)
    for seed, name in enumerate(("reward", "reward2")):
        config = tiny.model(num_labels=1).config
        torch.manual_seed(seed)
        LlamaForSequenceClassification(config).save_pretrained(root / name)
        tiny.tokenizer().save_pretrained(root / name)
    tiny.write_rows(root / "prompts.jsonl", [{"prompt": f"say {word}"} for word in tiny.WORDS])


# Training ---------------------------------------------------------------------------------------------------------------


def training(**changes: Any) -> dict[str, Any]:
    settings = {
        "base_model_name": "@model", "training_texts": TEXTS, "reward_functions": ["brevity", "length"], "output_dir": "@trained",
        "num_epochs": 1, "learning_rate": 1e-2, "batch_size": 2, "gradient_accumulation_steps": 1,
    }  # fmt: skip
    return real(settings | changes)


def labels(config: RewardModelTrainingConfig) -> Any:
    return label_texts(config)[1]


def texts(config: RewardModelTrainingConfig) -> Any:
    return label_texts(config)[0]


def trained(config: RewardModelTrainingConfig) -> dict[str, Any]:
    """Where the model lies, what it says when read back (of two texts, one of them long), and the trail; each run once."""
    key = config.model_dump_json()
    if key not in DONE:
        folder = train_on_texts(config, overwrite=True).folder
        rows = [json.loads(line) for line in (folder.parent / "metrics.jsonl").read_text().splitlines()]
        said = load(str(folder), device="cpu")(["", ""], ["red", "one two three " * 20])
        DONE[key] = {"folder": folder, "scores": said, "rows": rows}
    return DONE[key]


DONE: dict[str, dict[str, Any]] = {}


def scores(config: RewardModelTrainingConfig) -> Any:
    return trained(config)["scores"]


def trail(name: str, split: str = "train") -> Any:
    return lambda config: [row[name] for row in trained(config)["rows"] if row["split"] == split]


def passes(config: RewardModelTrainingConfig) -> list[int]:
    """Of each micro-batch."""
    found: list[int] = []
    plain = BoundedPasses.passes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BoundedPasses, "passes", lambda s, m, pieces: found.append(len(pieces)) or plain(s, m, pieces))
        train_on_texts(config, overwrite=True)
    return found


REFERENCED = {"reward_functions": ["fuzzy_match"]}
TRAINING = [
    Case("base_model_name", "@other", scores),
    Case("training_texts", [*TEXTS[:-1], "quite different"], texts),
    Case("reward_functions", ["diversity"], labels),
    Case("reward_weights", [1.0, 3.0], labels),
    Case("reference_texts", list(reversed(TEXTS)), labels, base=REFERENCED, against=[*TEXTS[:-1], "else"]),
    Case("output_dir", "@elsewhere", lambda config: trained(config)["folder"]),
    Case("num_epochs", 2, trail("epoch")),
    Case("learning_rate", 1e-3, trail("learning_rate")),
    Case("batch_size", 4, trail("step")),
    Case("gradient_accumulation_steps", 2, trail("step")),
    Case("micro_batch_tokens", 12, passes),
    Case("max_length", 4, scores),
    Case("eval_interval", 2, trail("step", "eval")),
]


@pytest.mark.parametrize("case", TRAINING, ids=str)
def test_setting_of_training_acts(case: Case) -> None:
    before = training(**case.base, **({} if case.against is None else {case.path: case.against}))
    after = training(**{**case.base, case.path: case.value})
    one, other = (case.observe(RewardModelTrainingConfig.model_validate(config)) for config in (before, after))
    assert one != other


# Source, and the model section ------------------------------------------------------------------------------------------


def said(s: Any) -> Any:
    """What the run's rewards say of two completions."""
    return s.rewards.score(["say red", "say blue"], ["red", "one two three"]).total


def value(s: Any) -> Any:
    critic = s.build_trainer().critic
    return None if critic.trunk is None else sum(float(weight.detach().sum()) for weight in critic.trunk.parameters())


def outcome(s: Any) -> Any:
    """`built`, or the error in its place."""
    try:
        s.train_rows  # noqa: B018
        s.build_trainer()
    except AlignTuneError as error:
        return str(error)
    return "built"


LOCAL = {"source_type": "pretrained_local", "model_path": "@reward"}
HUB = {"source_type": "pretrained_hf", "model_name": "@reward"}
OWN = {"source_type": "custom_trained", "training_config": "own"}
TUNED = LOCAL | {"fine_tune_with_rewards": True, "training_config": "tuned"}
SOURCE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "source_type": (LOCAL, OWN),
    "model_name": (HUB, HUB | {"model_name": "@reward2"}),
    "model_path": (LOCAL, LOCAL | {"model_path": "@reward2"}),
    "training_config": (OWN, OWN | {"training_config": "fewer"}),
    "fine_tune_with_rewards": (LOCAL, TUNED),
}
"""Two sources that differ in that setting."""
RECIPES: dict[str, dict[str, Any]] = {
    "own": {"output_dir": "@own"},
    "fewer": {"output_dir": "@fewer", "reward_functions": ["diversity"]},
    "tuned": {"output_dir": "@tuned"},
}


def source(config: dict[str, Any]) -> dict[str, Any]:
    recipe = {"training_config": training(**RECIPES[config["training_config"]])} if "training_config" in config else {}
    return real(config) | recipe


PPO = {"algorithm": "ppo", "train.num_generations": None}
REWARD = {"model.reward_path": "@reward"}
MODEL = [
    Case("model.reward_path", "@reward2", said, against="@reward"),
    Case("model.reward_model_name", "@reward2", said, against="@reward"),
    *(Case("model.reward_model_source", two, said, against=one) for one, two in SOURCE.values()),
    Case("reward_training", lambda: training(output_dir="@once"), said, against=lambda: training(reward_functions=["diversity"], output_dir="@twice")),
    Case("model.reward_device", "cuda", outcome, base=REWARD, against="cpu"),
    Case("model.reward_model_quantization", {"load_in_4bit": True}, four_bits(lambda s: reward_model_of(s.config).model), base=REWARD),
    Case("model.reward_value_model", "@value", value, base=PPO | REWARD, against="@other"),
]  # fmt: skip


def common(tmp_path: Path, **more: Any) -> dict[str, Any]:
    settings = {
        "algorithm": "grpo", "model.name_or_path": "@model", "model.precision": "fp32", "dataset.name": "@prompts.jsonl",
        "logging.output_dir": str(tmp_path / "out"), "backend": "native", "train.per_device_batch_size": 4,
        "train.num_generations": 4, "train.max_completion_length": 6, "logging.loggers": "none",
    }  # fmt: skip
    return {path: real(part) for path, part in (settings | more).items() if part is not None}


@pytest.mark.parametrize("case", MODEL, ids=lambda case: f"{case.path.split('.')[-1]}-{'made' if callable(case.value) else str(case.value)[:60]}")  # fmt: skip
def test_setting_of_the_run_acts(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def resolved(part: Any) -> Any:
        if callable(part):
            return part()
        return source(part) if case.path.endswith("source") else real(part)

    base = {path: real(part) for path, part in case.base.items()}
    gone = [path for path, part in base.items() if part is None]
    base = {path: part for path, part in base.items() if part is not None}
    settings = {path: part for path, part in common(tmp_path).items() if path not in gone}
    before, after = observed(
        settings, Case(case.path, resolved(case.value), case.observe, base, resolved(case.against))
    )
    assert before != after


REFUSED = [
    ({"model.reward_device": "cpu"}, "reward_device: needs a reward model"),
    ({"model.reward_value_loading_type": "standard"}, "needs a reward model or a value model, and there is neither"),
    (REWARD | {"model.reward_device": "cuda"}, "has no CUDA device; use auto or cpu"),
    (REWARD | {"model.reward_value_loading_type": "unsloth"}, "unsloth needs backend: unsloth; use standard"),
    (REWARD | {"model.reward_model_name": "@reward2"}, "reward_model_name"),
    (REWARD | {"model.reward_path": "@model"}, "a model without a reward head"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=str)
def test_what_cannot_act_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    rewards = [] if "model.reward_path" in settings else [{"type": "length"}]
    with pytest.raises(AlignTuneError, match=message):
        session({**common(tmp_path), "rewards": rewards, **real(settings)}, {}).train()


@pytest.mark.parametrize(("changes", "message"), [
    ({"source_type": "pretrained_hf"}, "source_type pretrained_hf needs model_name"),
    (LOCAL | {"model_name": "a/b"}, "source_type pretrained_local takes model_path, not model_name"),
    (LOCAL | {"training_config": "own"}, "takes model_path, not training_config"),
    (LOCAL | {"fine_tune_with_rewards": True}, "fine_tune_with_rewards needs training_config"),
    (OWN | {"fine_tune_with_rewards": True}, "custom_trained already trains one"),
    ({"source_type": "pretrained"}, "pretrained_hf"),
], ids=str)  # fmt: skip
def test_a_source_that_contradicts_itself_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    tree = {"algorithm": "grpo", "model": {"name_or_path": here("model"), "reward_model_source": source(changes)},
            "dataset": {"name": here("prompts.jsonl")}}  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        resolve(tree)


def test_device_and_quantization_reach_the_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with a GPU and bitsandbytes, which this one is told to be."""
    from transformers import AutoModelForSequenceClassification

    seen: dict[str, Any] = {}

    class Enough(Exception):
        pass

    def from_pretrained(name: str, **options: Any) -> Any:
        seen.update(options, name=name)
        raise Enough

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", from_pretrained)
    settings = REWARD | {"model.reward_device": "cuda", "model.reward_model_quantization": {"load_in_8bit": True}}
    run = session({**common(tmp_path), **real(settings)}, {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(loading, "require", lambda *_, **__: None)
    with pytest.raises(Enough):
        reward_model_of(run.config)
    assert seen["name"] == here("reward")
    assert seen["device_map"] == {"": "cuda"}
    assert seen["quantization_config"].load_in_8bit


def test_every_setting_has_a_case() -> None:
    assert {case.path for case in TRAINING} == set(RewardModelTrainingConfig.model_fields)
    assert set(SOURCE) == set(RewardModelSourceConfig.model_fields)
    refused = {"reward_value_loading_type"}  # but for one value: see REFUSED
    in_model = {name for name in ModelConfig.model_fields if name.startswith("reward_")} - refused
    assert {case.path for case in MODEL} == {f"model.{name}" for name in in_model} | {"reward_training"}
