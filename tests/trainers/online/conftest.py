"""A tiny policy, prompts, a reward model, and a run on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from es_helpers import TWO
from es_rewards import letters
from online_helpers import digits, write_reward_model

import tiny
from aligntune.core.backend_factory import create_rl_trainer


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("online")
    tiny.write_model(folder / "model")
    write_reward_model(folder / "reward")
    tiny.write_rows(folder / "prompts.jsonl", [{"prompt": f"say {word}", "answer": word} for word in tiny.WORDS])
    return folder


@pytest.fixture
def run(files: Path, tmp_path: Path) -> Callable[..., Any]:
    """run(algorithm, **settings) -> a session of four steps in tmp_path."""

    def make(algorithm: str = "grpo", out: str = "out", model: Path = files / "model", **settings: Any) -> Any:
        given: dict[str, Any] = {
            "reward_functions": [digits], "precision": "fp32", "use_peft": False, "batch_size": 8, "learning_rate": 3e-3, "max_steps": 4,
            "logging_steps": 1, "max_completion_length": 5, "temperature": 1.0, "top_p": 1.0, "loggers": "none", "lr_scheduler": "constant",
            "mask_truncated_completions": False, "backend": "native",
        }  # fmt: skip
        given |= {"missing_eos_penalty": 0.0} if algorithm == "ppo" else {"num_generations": 4}
        kept = {name: value for name, value in (given | settings).items() if value is not None}
        return create_rl_trainer(model, files / "prompts.jsonl", algorithm, output_dir=tmp_path / out, **kept)

    return make


@pytest.fixture
def evolve(run: Callable[..., Any]) -> Callable[..., Any]:
    """A Meta-ES session: two generations of two candidates of two steps."""

    def make(out: str = "out", **settings: Any) -> Any:
        given: dict[str, Any] = {
            "reward_functions": None, "rewards": TWO, "verifier": letters, "meta_iterations": 2, "N": 2, "T": 2, "eval_max_tokens": 5,
            "max_steps": 2, "save_strategy": "no", "logging_steps": 2, "learning_rate": 1e-2, "mirror_coefficient": 0.0,
        }  # fmt: skip
        return run("meta_es", out, **(given | settings))

    return make
