"""A loss and advantages of one's own take the algorithm's place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from online_helpers import trained

from aligntune.algorithms import dr_grpo, grpo
from aligntune.algorithms.batch import Loss
from aligntune.algorithms.ops import token_mean
from aligntune.errors import BackendError, ConfigError

Run = Callable[..., Any]
SEEN = ("loss", "grad_norm")

FILE = """
from aligntune.algorithms.ops import masked, token_mean

def reinforce(batch, config, normalizers):
    return -token_mean(masked(batch.log_probs * batch.token_advantages, batch.completion_mask), batch.completion_mask, normalizers)
"""


def undivided(rollouts: Any, config: Any, all_sum: Any) -> Any:
    return grpo.group_relative(rollouts.rewards, "none", all_sum)


def test_given_another_algorithms_functions_a_run_is_that_algorithm(run: Run) -> None:
    settings = {"num_ppo_epochs": 2, "rollout_batch_size": 4, "max_completion_length": 9}
    want = trained(run("dr_grpo", "dr", **settings))
    found = trained(run("grpo", "own", loss_function=dr_grpo.loss, advantage_function=undivided, **settings))
    assert [[row[name] for name in SEEN] for row in found] == [[row[name] for name in SEEN] for row in want]
    plain = trained(run("grpo", "grpo", **settings))
    assert [row["loss"] for row in found] != [row["loss"] for row in plain]


def test_a_scalar_is_a_loss_and_a_file_has_it(run: Run, tmp_path: Path) -> None:
    """Of completions by the policy itself, A log pi has the gradient of A pi / pi_old."""
    (tmp_path / "mine.py").write_text(FILE)
    settings = {"loss_type": "dapo", "kl_coef": 0.0, "max_steps": 1}
    found = trained(run(out="own", loss_function=f"{tmp_path / 'mine.py'}:reinforce", **settings))
    want = trained(run(out="plain", **settings))
    assert found[0]["grad_norm"] == pytest.approx(want[0]["grad_norm"], rel=1e-5)
    assert found[0]["loss"] != want[0]["loss"]


def test_advantages_may_be_a_tensor(run: Run) -> None:
    """Without a baseline: the rewards themselves."""
    found = trained(run(advantage_function=lambda rollouts, config, all_sum: rollouts.rewards.view(-1), kl_coef=0.0, max_steps=1))  # fmt: skip
    assert found[0]["loss"] == pytest.approx(-found[0]["reward"], abs=1e-6)


def no_loss(batch: Any, config: Any, normalizers: Any) -> Any:
    return batch.log_probs


def no_advantages(rollouts: Any, config: Any, all_sum: Any) -> Any:
    return torch.zeros(3)


@pytest.mark.parametrize(("settings", "message"), [
    ({"loss_function": no_loss}, r"loss_function: should return a Loss or a scalar tensor, got a tensor \(8, 5\)"),
    ({"advantage_function": no_advantages}, r"should return one advantage a completion, \(8,\), or one a token, \(8, 5\), got a tensor \(3,\)"),
    ({"loss_function": "nowhere.py:loss"}, "there is no file nowhere.py"),
])  # fmt: skip
def test_functions_that_cannot_be(run: Run, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(max_steps=1, **settings).train()


def test_where_they_have_no_place(run: Run) -> None:
    mine = {
        "loss_function": lambda batch, config, normalizers: Loss(
            token_mean(batch.log_probs, batch.completion_mask, normalizers)
        )
    }
    with pytest.raises(BackendError, match="has no place for loss_function"):
        run(backend="trl", fallback=False, **mine)
    with pytest.raises(ConfigError, match="loss_function: has no effect with meta_es"):
        run("meta_es", **mine)
