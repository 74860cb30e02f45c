"""Every row of the parameter reference is a setting of ours, with its name, type and default."""

from __future__ import annotations

import ast
import csv
import types
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import pytest

from aligntune.config import rl, sft
from aligntune.config.algorithms import (
    DAPOConfig,
    DPOConfig,
    DrGRPOConfig,
    GRPOConfig,
    GSPOConfig,
    MetaESConfig,
    PPOConfig,
)
from aligntune.config.base import Section
from aligntune.config.enums import PrecisionType, TaskType
from aligntune.config.rewards import RewardConfig, RewardModelSourceConfig, RewardModelTrainingConfig
from aligntune.config.synonyms import RENAMES

CLASSES: dict[tuple[str, str], list[type[Section]]] = {
    ("sft", "ModelConfig"): [sft.ModelConfig],
    ("sft", "DatasetConfig"): [sft.DatasetConfig],
    ("sft", "TrainingConfig"): [sft.TrainingConfig],
    ("sft", "EvaluationConfig"): [sft.EvaluationConfig],
    ("sft", "LoggingConfig"): [sft.LoggingConfig],
    ("rl", "ModelConfig"): [rl.ModelConfig],
    ("rl", "DatasetConfig"): [rl.DatasetConfig],
    ("rl", "TrainingConfig"): [rl.TrainingConfig],
    ("rl", "LoggingConfig"): [rl.LoggingConfig],
    ("rl", "SampleLoggingConfig"): [rl.SampleLoggingConfig],
    ("rl", "RewardConfig"): [RewardConfig],
    ("rl", "RewardModelTrainingConfig"): [RewardModelTrainingConfig],
    ("rl", "RewardModelSourceConfig"): [RewardModelSourceConfig],
    ("algo", "ALGO:PPO"): [PPOConfig],
    ("algo", "ALGO:DPO"): [DPOConfig],
    ("algo", "ALGO:DPO_EVAL"): [DPOConfig],
    ("algo", "ALGO:GRPO"): [GRPOConfig],
    ("algo", "ALGO:DAPO/DRGRPO"): [DAPOConfig, DrGRPOConfig],
    ("algo", "ALGO:GSPO"): [GSPOConfig],
    ("algo", "ALGO:Meta-ES"): [MetaESConfig],
}

with (Path(__file__).parent.parent / "data" / "parameters.csv").open(newline="", encoding="utf-8") as file:
    ROWS = list(csv.DictReader(file))

TYPES: dict[str, tuple[Any, ...]] = {
    "str": (str,), "bool": (bool,), "int": (int,), "float": (float,), "Dict": (dict,), "str/Dict": (str, dict),
    "List[str]": (list,), "List[float]": (list,), "PrecisionType": (PrecisionType,), "TaskType": (TaskType,), "Any": (Any,),
    "Callable": (Any,), "List[Callable]": (list,), "RewardModelSourceConfig": (RewardModelSourceConfig,),
    "RewardModelTrainingConfig": (RewardModelTrainingConfig,), "SampleLoggingConfig": (rl.SampleLoggingConfig,),
}  # fmt: skip


def base_types(annotation: Any) -> set[Any]:
    """The plain classes an annotation admits, without None."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return base_types(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return set().union(*(base_types(part) for part in get_args(annotation))) - {type(None)}
    return {origin or annotation}


def expected_default(row: dict[str, str]) -> Any:
    text = row["default"].strip("`")
    if text.isupper() and text.isidentifier():  # an enum member by name
        return {"AUTO": PrecisionType.AUTO, "SUPERVISED_FINE_TUNING": TaskType.SUPERVISED_FINE_TUNING}[text]
    if text == "bf16":
        return PrecisionType.BF16
    return ast.literal_eval(text.replace("`", ""))


def test_the_reference_has_335_names() -> None:
    assert len(ROWS) == 335


@pytest.mark.parametrize("row", ROWS, ids=[f"{row['cls']}.{row['name']}" for row in ROWS])
def test_row(row: dict[str, str]) -> None:
    for cls in CLASSES[row["section"], row["cls"]]:
        name = row["name"]
        if (row["cls"], name) == ("DatasetConfig", "config"):  # the reference writes `subset` / `config`
            name = RENAMES["sft"]["dataset"][name]
        info = cls.model_fields[name]
        assert set(TYPES[row["type"]]) <= base_types(info.annotation), (name, info.annotation)
        if "Required" in row["default"]:
            assert info.is_required()
        elif row["default"] == "See above":
            assert info.default == rl.SampleLoggingConfig()
        elif row["default"] == "`batch_size`":
            assert info.default is None  # derived from the batch size; tests/config/test_resolve.py
        elif (row["cls"], name) == ("ModelConfig", "trust_remote_code"):
            # decisions: the one default that is changed. The reference says True, which runs code that nobody has read.
            assert info.default is False
            assert row["default"] == "`True`"
        else:
            assert info.get_default(call_default_factory=True) == expected_default(row)


def test_every_setting_is_documented() -> None:
    from aligntune.config.reference import _inherited, walk

    for side, cls_name, name, info in walk():
        cls = next(
            (
                cls
                for group in CLASSES.values()
                for cls in group
                if cls.__name__ == cls_name and name in cls.model_fields
            ),
            None,
        )
        documented = info.description or (cls and _inherited(cls, name))
        assert documented or cls is None, (side, cls_name, name)
