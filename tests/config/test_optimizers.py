"""The names of optimisers and schedules are those of transformers, known without importing it."""

from __future__ import annotations

import pytest

from aligntune.config.optimizers import MEASURED_SCHEDULES, OPTIMIZERS, SCHEDULES, SPLIT_OPTIMIZERS
from aligntune.config.resolve import resolve
from aligntune.config.words import closest
from aligntune.errors import ConfigError

BASE = {"model": "m", "dataset": "d"}


def test_the_optimisers_are_all_of_transformers_but_those_that_need_modules() -> None:
    from transformers.training_args import OptimizerNames

    left = {member.value for member in OptimizerNames} - set(OPTIMIZERS)
    assert all(name.startswith(("galore_", "apollo_")) for name in left), left
    assert set(OPTIMIZERS) - {member.value for member in OptimizerNames} == set(SPLIT_OPTIMIZERS)


def test_the_schedules_are_those_of_transformers_that_need_no_arguments() -> None:
    import torch
    from transformers import get_scheduler
    from transformers.trainer_utils import SchedulerType

    names = [member.value for member in SchedulerType]
    assert set(SCHEDULES) <= set(names)
    for name in names:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        try:
            get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=4)
        except (TypeError, ValueError):
            assert name not in SCHEDULES
        else:
            assert name in SCHEDULES


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "grpo"])
@pytest.mark.parametrize(("setting", "word", "near"), [
    ("optimizer", "adamw_trch", "adamw_torch"), ("optimizer", "adamw", "adamw_torch"), ("optim", "rmspop", "rmsprop"),
    ("lr_scheduler", "cosin", "cosine"), ("lr_scheduler_type", "constant_warmup", "constant_with_warmup"),
])  # fmt: skip
def test_an_unknown_name_is_refused_with_the_nearest(algorithm: str, setting: str, word: str, near: str) -> None:
    base = BASE | ({"rewards": ["length"]} if algorithm == "grpo" else {})
    with pytest.raises(ConfigError, match=rf"train.*: should be one of .*did you mean {near}\?.*, got '{word}'"):
        resolve(base, arguments={setting: word}, algorithm=algorithm)


def test_a_name_in_other_letters_is_the_same_name() -> None:
    train = resolve(BASE, arguments={"optimizer": "AdamW-8bit", "lr_scheduler": "Cosine"}, algorithm="sft").config.train
    assert (train.optimizer, train.lr_scheduler) == ("adamw_8bit", "cosine")


def test_the_nearest_name() -> None:
    assert closest("lion", OPTIMIZERS) == "lion_8bit"
    assert closest("adamw", OPTIMIZERS) == "adamw_torch"
    assert closest("nothing_like_it", OPTIMIZERS) is None
    assert set(MEASURED_SCHEDULES) < set(SCHEDULES)
