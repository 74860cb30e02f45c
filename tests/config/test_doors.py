"""What the Python door and the YAML reader make of values, objects and files that are not quite what they should be."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aligntune.api import create_rl_trainer, create_sft_trainer
from aligntune.config.dump import plain_tree, to_yaml
from aligntune.config.resolve import Resolved, resolve
from aligntune.errors import ConfigError

RUN = {"model": {"name_or_path": "m"}, "dataset": {"name": "d"}}


def sft(config: Any = RUN, **arguments: Any) -> Resolved:
    return resolve(config, arguments=arguments, algorithm="sft")


def grpo(**arguments: Any) -> Resolved:
    return resolve(RUN, arguments={"rewards": ["length"], **arguments}, algorithm="grpo")


def yaml_run(folder: Path, text: str, *overrides: str) -> Resolved:
    file = folder / "run.yaml"
    file.write_text(text)
    return resolve(file, overrides=overrides)


# Values


def test_numbers_of_array_libraries_are_numbers() -> None:
    train = sft(max_steps=np.int64(3), learning_rate=np.float32(0.5), packing=np.bool_(True)).config.train
    assert (train.max_steps, train.learning_rate, train.packing) == (3, 0.5, True)
    assert (type(train.max_steps), type(train.packing)) == (int, bool)
    assert grpo(rewards=["length", "f1"], reward_weights=np.array([1, 2])).config.train.reward_weights == [1, 2]


def test_a_long_value_is_shown_short() -> None:
    with pytest.raises(ConfigError) as caught:
        sft(learning_rate=["x" * 5000])
    assert len(str(caught.value)) < 300


def test_one_problem_is_one_line() -> None:
    with pytest.raises(ConfigError) as caught:
        grpo(rewards=[{"type": 3}])
    assert str(caught.value).startswith("argument rewards: rewards.0.type: should be a callable")
    with pytest.raises(ConfigError, match=r"rewards\.0\.type: should be"):
        grpo(rewards=[None])


@pytest.mark.parametrize("name", ["model_name", "dataset_name", "output_dir"])
def test_empty_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="should not be empty"):
        sft({}, **{"model_name": "m", "dataset_name": "d", name: ""})


# Settings of something that is off


@pytest.mark.parametrize(("given", "message"), [
    ({"lora_r": 8}, "model.lora_rank: has no effect without LoRA: set peft_enabled: true"),
    ({"lora_target_modules": ["q_proj"]}, "model.target_modules: has no effect without LoRA"),
    ({"packing_strategy": "wrapped"}, "train.packing_strategy: needs packing: true"),
    ({"early_stopping_threshold": 0.1}, "train.early_stopping_threshold: needs early_stopping_patience"),
    ({"processing_fn_kwargs": {"a": 1}}, "dataset.processing_fn_kwargs: needs processing_fn"),
    ({"gradient_checkpointing": False, "train": {"gradient_checkpointing_kwargs": {"use_reentrant": True}}},
     "train.gradient_checkpointing_kwargs: needs model.gradient_checkpointing: true"),
    ({"eval_dataset": {"name": "e", "weight": 2.0}}, "eval_dataset.weight: has no effect"),
])  # fmt: skip
def test_settings_of_what_is_off_are_refused(given: dict[str, Any], message: str) -> None:
    arguments = {name: value for name, value in given.items() if name != "train"} | given.get("train", {})
    with pytest.raises(ConfigError, match=message):
        sft(**arguments)


def test_their_defaults_are_not_refused() -> None:
    assert sft(lora_rank=16, packing_strategy="bfd", processing_batched=False).config.model.lora is None
    with pytest.raises(ConfigError, match=r"model\.lora_r: has no effect without LoRA: set use_peft: true"):
        grpo(use_peft=False, lora_r=3)


@pytest.mark.parametrize(("algorithm", "given", "message"), [
    ("dapo", {"overlong_penalty": 0.5}, "overlong_penalty: needs overlong_buffer above 0"),
    ("dapo", {"overlong_buffer": 257}, "overlong_buffer: is 257, more than max_completion_length 256"),
    ("dapo", {"dynamic_sampling": False, "max_resample_batches": 3}, "max_resample_batches: needs dynamic_sampling: true"),
    ("grpo", {"kl_coef": 0.0, "kl_estimator": "k2"}, "kl_estimator: needs kl_coef above 0"),
    ("ppo", {"kl_coef": 0.0, "kl_estimator": "k3"}, "kl_estimator: needs kl_coef above 0"),
    ("neural_mirror_grpo", {"kl_estimator": "k2"}, "kl_estimator: needs kl_coef above 0"),
    ("neural_mirror_grpo", {"mirror_map": "kl", "mirror_seed": 3}, "mirror_seed: is of mirror_map neural, not kl"),
    ("neural_mirror_grpo", {"mirror_path": "map.json", "mirror_seed": 3}, "mirror_seed: draws a random map"),
    ("neural_mirror_grpo", {"mirror_coefficient": 0.0, "mirror_map": "kl"}, "mirror_map: needs mirror_coefficient above 0"),
    ("gspo", {"gspo_delta": 4e-4, "cliprange_high": 0.3}, "cliprange_high: has no effect beside gspo_delta"),
    ("gspo", {"gspo_gamma": 3e-4, "gspo_delta": 4e-4, "cliprange": 0.3}, "cliprange: has no effect beside gspo_gamma"),
])  # fmt: skip
def test_settings_of_an_algorithms_part_that_is_off_are_refused(
    algorithm: str, given: dict[str, Any], message: str
) -> None:
    tree = {"model": "m", "dataset": {"name": "d"}, "rewards": ["length"]}
    with pytest.raises(ConfigError, match=message):
        resolve(tree, algorithm=algorithm, arguments=given)
    for name, value in given.items():  # what is resolved says no more than it was told: it can be resolved again
        if name in ("kl_coef", "overlong_buffer", "dynamic_sampling", "gspo_gamma"):
            limits = {"max_completion_length": 1024, name: value}
            again = resolve(resolve(tree, algorithm=algorithm, arguments=limits).config)
            assert getattr(again.config.train, name) == value


# Datasets


def test_synonyms_hold_in_every_dataset() -> None:
    mapping = {"question": "prompt"}
    found = resolve({"model": "m"}, algorithm="grpo", arguments={
        "rewards": ["length"], "datasets": [{"name": "a", "column_mapping": mapping}, {"dataset_name": "b"}],
        "eval_dataset": {"name": "e", "column_mapping": mapping},
    }).config  # fmt: skip
    assert found.datasets[0].field_mappings == found.eval_dataset.field_mappings == mapping
    assert (found.datasets[1].name, found.datasets[1].field_mappings) == ("b", {})
    found = sft(
        {"model": "m"},
        datasets=[{"name": "a", "dataset_text_field": "t"}],
        eval_dataset={"name": "e", "dataset_text_field": "u"},
    )
    assert (found.config.datasets[0].text_column, found.config.eval_dataset.text_column) == ("t", "u")


def test_synonyms_that_disagree_within_a_dataset() -> None:
    with pytest.raises(
        ConfigError, match=r"datasets\.0\.dataset_name: is 'b', but its synonym datasets\.0\.name is 'a'"
    ):
        sft({"model": "m"}, datasets=[{"name": "a", "dataset_name": "b"}])
    with pytest.raises(ConfigError, match=r"eval_dataset\.dataset_text_field: is 'u', but its synonym"):
        sft(eval_dataset={"name": "e", "text_column": "t", "dataset_text_field": "u"})


def test_settings_of_dataset_hold_for_each_of_datasets() -> None:
    found = resolve({"model": "m"}, algorithm="sft", arguments={
        "datasets": [Path("a"), {"name": "b", "split": "test"}], "column_mapping": {"x": "text"}, "pad_token": "<p>",
    })  # fmt: skip
    assert [(item.name, item.split, item.column_mapping, item.pad_token) for item in found.config.datasets] == [
        ("a", "train", {"x": "text"}, "<p>"),
        ("b", "test", {"x": "text"}, "<p>"),
    ]


def test_what_is_of_the_whole_run_cannot_differ_between_datasets() -> None:
    with pytest.raises(ConfigError, match="differ in pad_token, which is of the whole run"):
        sft({"model": "m"}, datasets=["a", {"name": "b", "pad_token": "<p>"}])


def test_datasets_are_written_as_entries(tmp_path: Path) -> None:
    found = sft({"model": "m"}, datasets=["a", Path("b")])
    assert plain_tree(found)[0]["datasets"] == [{"name": "a"}, {"name": "b"}]
    (tmp_path / "again.yaml").write_text(to_yaml(found))
    assert resolve(tmp_path / "again.yaml").config == found.config


@pytest.mark.parametrize("rows", [[{"text": "a"}], {"text": ["a"]}, 3, (row for row in ())])
@pytest.mark.parametrize("name", ["dataset_name", "dataset", "eval_dataset"])
def test_rows_in_memory_are_refused_with_the_way_out(rows: Any, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}: .*write them to a file first"):
        create_sft_trainer("m", **{"dataset_name": "d", name: rows})


# Reward functions


def test_one_reward_function_needs_no_list() -> None:
    def right(completion: str) -> float:
        return 1.0

    for given in (right, "length"):
        assert [item.type for item in create_rl_trainer("m", "d", "grpo", reward_functions=given).config.rewards] == [
            given
        ]


@pytest.mark.parametrize(("functions", "weights", "message"), [
    ({"length": 1.0}, None, "should be a list of names and functions"), (["length"], 0.5, "should be a list of numbers"),
    (["length"], {"length": 1}, "should be a list of numbers"), (["length"], ["a"], "rewards.0.weight: should be a number"),
    (["length"], [None], "rewards.0.weight: should be a number"), (["length"], [1, 2], "2 entries for 1"),
    ([{"type": "length"}], None, r"give those as rewards="),
])  # fmt: skip
def test_reward_functions_that_cannot_be_read(functions: Any, weights: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_rl_trainer("m", "d", "grpo", reward_functions=functions, reward_function_weights=weights)


def test_weights_may_be_an_array() -> None:
    made = create_rl_trainer(
        "m", "d", "grpo", reward_functions=["length", "f1"], reward_function_weights=np.array([1, 2])
    )
    assert [item.weight for item in made.config.rewards] == [1, 2]


class _Scorer:
    def __call__(self, completion: str) -> float:
        return 1.0

    def method(self, completion: str) -> float:
        return 1.0


@pytest.mark.parametrize("function", [_Scorer(), functools.partial(_Scorer(), completion="x"), _Scorer().method])
def test_objects_that_score_are_written_as_not_importable(function: Any) -> None:
    assert "# not importable by name, set again in Python: rewards.0.type" in to_yaml(grpo(rewards=[function]))


# Config objects, files, overrides


def test_the_config_of_a_run_is_a_config() -> None:
    first = sft(epochs=2, column_mapping={"a": "text"}).config
    again = sft(first, learning_rate=0.5).config
    assert (again.train.epochs, again.train.learning_rate, again.dataset.column_mapping) == (2, 0.5, {"a": "text"})
    assert sft(first).config == first
    with pytest.raises(ConfigError, match="config: should be a YAML file"):
        sft(3)


BASE = "algorithm: sft\nmodel: m\ndataset: d\n"


@pytest.mark.parametrize(("text", "message"), [
    ("# \x07\n", r"run\.yaml:4: not valid YAML: it holds the control character"),
    ("train: &a {dataset_kwargs: *a}\n", "alias"), ("include: 3\n", r"run\.yaml:4: include: should be a file or a list"),
    ("include: [null]\n", "include: should be a file"), ("train: {seed: 0123}\n", "train.seed: should be a whole number, got '0123'"),
    ("train: {max_steps: 1:30}\n", "should be a whole number, got '1:30'"),
])  # fmt: skip
def test_files_that_cannot_be_read(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        yaml_run(tmp_path, BASE + text)


def test_times_and_dates_are_text(tmp_path: Path) -> None:
    launch = "launch: {launcher: slurm, num_processes: 2, slurm: {time: 8:00:00}}\n"
    found = yaml_run(
        tmp_path, BASE + launch + "logging: {run_name: 2026-01-31}\ntrain: {max_steps: 1_000, seed: 0}\n"
    ).config
    assert (found.launch.slurm["time"], found.logging.run_name) == ("8:00:00", "2026-01-31")
    assert (found.train.max_steps, found.train.seed) == (1000, 0)


@pytest.mark.parametrize(
    "override", ["dataset.name.x=2", "train.learning_rate.x=2", "datasets.5.weight=2.0", "datasets.0.weight=2.0"]
)
def test_overrides_into_what_holds_no_settings(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=rf"override {override}: .*cannot be set"):
        yaml_run(
            tmp_path,
            BASE.replace("dataset: d", "datasets: [d]" if "datasets" in override else "dataset: d")
            + "train: {learning_rate: 1e-4}\n",
            override,
        )


def test_null_takes_a_section_back(tmp_path: Path) -> None:
    text = "algorithm: sft\nmodel: m\ndataset: d\neval_dataset: {name: e, split: test}\ntrain: {seed: 5}\n"
    assert yaml_run(tmp_path, text).config.eval_source.name == "e"
    found = yaml_run(tmp_path, text, "eval_dataset=null", "train=null", "train.epochs=2")
    assert found.config.eval_source is None
    assert (found.config.train.seed, found.config.train.epochs) == (42, 2)
    assert not [path for path in found.origins if path[:1] == ("eval_dataset",) or path == ("train", "seed")]
    with pytest.raises(ConfigError, match=r"dataset.name: is required"):
        yaml_run(tmp_path, text, "dataset=null")
