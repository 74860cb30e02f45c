"""Two processes do what one does: the same losses, evaluations and weights, files from one of them, and resume.

All runs take place in one start of two processes (`ranks.py`); the tests read what they left behind.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from aligntune.api import create_trainer
from aligntune.models.use import export

EXACT = {"rel": 1e-5, "abs": 1e-5}
SFT = ["sft-native", "sft-trl", "sft_lora-native", "sft_compiled-native", "sft_stream-native", "sft_classes-native"]
RL = ["dpo-native", "dpo-trl", "dpo_sync-native", "grpo-native", "grpo-trl", "ppo-native", "dapo-native"]
SHARDED = [*SFT, *(name for name in RL if name != "grpo-trl")]
"""TRL's GRPO generates with the policy itself, whose shards our told completions do not gather."""
CUT = {"sft-native": 73, "dpo-native": 132, "grpo-native": 71}
"""Most tokens of a pass, with which the two ranks cut some batch into different numbers of pieces."""
EVERY = [
    *((name, "ddp") for name in [*SFT, *RL]),
    *((name, "fsdp2") for name in SHARDED),
    *((name, f"cut_{layout}") for name in CUT for layout in ("ddp", "fsdp2")),
]
MODELS = {
    "sft": None,
    "sft_lora": {"peft_enabled": True, "lora_rank": 4, "lora_dropout": 0.0},
    "sft_compiled": {"selective_checkpointing": "mlp", "gradient_checkpointing": False},
}
Finished = tuple[Path, list[str]]


@pytest.fixture(scope="module")
def finished(
    parts: Path, sft_config: Callable[..., dict[str, Any]], rl_config: Callable[..., dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Finished:  # fmt: skip
    """The folder with one folder for each run, named NAME-LAYOUT, and what each rank printed."""
    folder = tmp_path_factory.mktemp("runs")

    def config(name: str, layout: str, world: int = 2, **train: Any) -> dict[str, Any]:
        algorithm, backend = name.split("-")
        out = folder / f"{name}-{layout}"
        if algorithm.startswith("sft"):
            found = sft_config(out, world, backend, MODELS.get(algorithm), **train)
            if algorithm == "sft_stream":
                found["dataset"] |= {"streaming": True}
            if algorithm == "sft_classes":
                del found["evaluation"]
                found |= {
                    part: {"name": str(parts / f"{name}.jsonl"), "task_type": "text_classification"}
                    for part, name in (("dataset", "classes"), ("eval_dataset", "held_out_classes"))
                }
            return found
        if algorithm == "dpo_sync":  # a reference that follows the policy
            algorithm, train = "dpo", {"sync_ref_model": True, "ref_model_sync_steps": 1, **train}
        if algorithm == "ppo":  # two steps a rollout: the checkpoint is written when one is through
            train = {"save_strategy": "steps", "save_interval": 2, **train}
        return rl_config(algorithm, out, world, backend, **train)

    def cut(layout: str) -> list[dict[str, Any]]:
        return [config(name, f"cut_{layout}", micro_batch_tokens=tokens) for name, tokens in CUT.items()]

    def resumed(layout: str, of: str, world: int = 2, name: str = "sft-native") -> dict[str, Any]:
        """A run in a folder of its own that goes on from the second step of another."""
        checkpoint = folder / f"{name}-{of}" / "checkpoints" / "checkpoint-2"
        return {"config": config(name, layout, world), "train": {"resume": str(checkpoint)}}

    def phase(world: int, sharded: bool, cases: list[dict[str, Any]]) -> dict[str, Any]:
        whole = [case if "config" in case else {"config": case} for case in cases]
        return {"world": world, "sharded": sharded, "cases": whole}

    def dropping(layout: str, world: int = 2) -> dict[str, Any]:
        return config("dapo-native", layout, world) | {"rewards": [{"type": f"{ranks.__file__}:only_some"}]}

    def disagreeing() -> dict[str, Any]:
        train = {"eval_interval": 1, "save_interval": 4, "load_best_model_at_end": True, "greater_is_better": True}
        found = config("sft-native", "disagreeing", metric_for_best_model="of_rank", early_stopping_patience=2, **train)
        found["evaluation"] |= {"custom_metrics": [f"{ranks.__file__}:of_this_rank"]}
        return found

    phases = [
        phase(1, False, [*(config(name, "one", 1) for name in [*SFT, *RL]), dropping("dropping_one", 1)]),
        phase(2, True, [*(config(name, "fsdp2") for name in SHARDED), *cut("fsdp2"),
                        *(resumed("one_then_fsdp2", "one", name=name) for name in ("sft-native", "sft_lora-native"))]),
        phase(2, False, [*(config(name, "ddp") for name in [*SFT, *RL]), *cut("ddp"), resumed("one_then_ddp", "one"),
                         resumed("fsdp2_then_ddp", "fsdp2"), dropping("dropping"), disagreeing()]),
        phase(1, True, [config("sft-native", "fsdp2_alone", 1), resumed("fsdp2_then_alone", "fsdp2", 1)]),
        phase(2, True, [resumed("fsdp2_alone_then_two", "fsdp2_alone")]),
        phase(1, False, [resumed("fsdp2_then_plain", "fsdp2", 1, name="ppo-native")]),
    ]  # fmt: skip
    return folder, ranks.run_phases(phases, folder)


def metrics(folder: Path, name: str = "loss") -> dict[tuple[int, str], float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {(row["step"], row["split"]): row[name] for row in rows if name in row}


def weights(folder: Path) -> dict[str, Any]:
    (file,) = (folder / "model").glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize(("name", "layout"), EVERY, ids=["-".join(pair) for pair in EVERY])
def test_two_processes_equal_one(finished: Finished, name: str, layout: str) -> None:
    """Losses, evaluations, gradients and weights at an equal global batch."""
    one, two = finished[0] / f"{name}-one", finished[0] / f"{name}-{layout}"
    assert metrics(two) == pytest.approx(metrics(one), **EXACT)
    norms = metrics(one, "grad_norm")
    assert metrics(two, "grad_norm") == pytest.approx(norms, rel=1e-4)
    assert max(norms.values()) > 0.1
    trained = weights(two)
    for key, weight in weights(one).items():
        torch.testing.assert_close(trained[key], weight, rtol=0, atol=1e-4)
    assert (two / "report.html").exists()


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("layout", ["cut_ddp", "cut_fsdp2"])
def test_ranks_cut_their_own_batches(finished: Finished, name: str, layout: str) -> None:
    """Some batches in one piece, some in two, and not the same on both ranks: they had to wait for each other. No token is
    counted twice."""
    folder, outputs = finished
    (one,), (other,) = (
        [
            json.loads(line.rpartition(f"{name}-{layout} ")[2])
            for line in output.splitlines()
            if f"{name}-{layout} [" in line
        ]
        for output in outputs
    )
    assert set(one) | set(other) == {1, 2}
    assert one != other
    assert metrics(folder / f"{name}-{layout}", "num_tokens") == metrics(folder / f"{name}-one", "num_tokens")


@pytest.mark.parametrize("name", ["grpo-native", "grpo-trl", "ppo-native", "dapo-native"])
def test_rewards_are_those_of_all_ranks(finished: Finished, name: str) -> None:
    """The completions are the same, so are their rewards and lengths, whoever made them."""
    one, two = finished[0] / f"{name}-one", finished[0] / f"{name}-ddp"
    for measured in (
        "reward",
        "reward_std",
        "completions/mean_length",
        "completions/min_length",
        "completions/max_length",
    ):
        expected = metrics(one, measured)
        assert len(set(expected.values())) > 1
        assert metrics(two, measured) == pytest.approx(expected, **EXACT)
    if name == "ppo-native":  # means over tokens, of which one rank has more than the other
        for measured in ("return_mean", "kl"):
            assert metrics(two, measured) == pytest.approx(metrics(one, measured), **EXACT)


def test_dynamic_sampling_keeps_what_one_process_would(finished: Finished) -> None:
    """Two thirds of the prompts are dropped, on one rank more than on the other: prompts, rewards and losses stay those of one."""
    one, two = finished[0] / "dapo-native-dropping_one", finished[0] / "dapo-native-dropping"
    assert max(metrics(two, "dynamic_sampling/rounds").values()) > 1
    assert 0 < min(metrics(two, "dynamic_sampling/kept_share").values()) < 1
    for measured in ("loss", "reward", "reward_std", "advantages/std", "dynamic_sampling/rounds", "dynamic_sampling/kept_share",
                     "dynamic_sampling/missing_share", "completions/mean_length", "num_tokens"):  # fmt: skip
        expected = metrics(one, measured)
        assert len(expected) == 3
        assert metrics(two, measured) == pytest.approx(expected, **EXACT)


def check_continued(runs: Path, name: str, continued: str, whole: str) -> None:
    """From the second step on, the losses, evaluations and gradients of the run that was not interrupted."""
    for measured, exact in (("loss", EXACT), ("grad_norm", {"rel": 1e-4})):
        expected = {at: value for at, value in metrics(runs / f"{name}-{whole}", measured).items() if at[0] > 2}
        got = metrics(runs / f"{name}-{continued}", measured)
        assert {at: got[at] for at in expected} == pytest.approx(expected, **exact)
        assert {3, 4} <= {step for step, _ in expected} <= {3, 4, 5}


@pytest.mark.parametrize(
    ("name", "continued", "whole"),
    [
        ("sft-native", "one_then_ddp", "one"),
        ("sft-native", "one_then_fsdp2", "one"),
        ("sft_lora-native", "one_then_fsdp2", "one"),
        ("sft-native", "fsdp2_then_ddp", "one"),
        ("ppo-native", "fsdp2_then_plain", "one"),
        ("sft-native", "fsdp2_then_alone", "fsdp2"),
        ("sft-native", "fsdp2_alone_then_two", "fsdp2_alone"),
    ],
)
def test_another_number_of_processes_continues(finished: Finished, name: str, continued: str, whole: str) -> None:
    check_continued(finished[0], name, continued, whole)
    if name == "ppo-native":  # others count on from the metrics in their own folder
        counted = metrics(finished[0] / f"{name}-{whole}", "num_tokens")
        assert metrics(finished[0] / f"{name}-{continued}", "num_tokens").items() <= counted.items()


@pytest.mark.parametrize(
    ("name", "began"),
    [("sft-native", "ddp"), ("sft-native", "fsdp2"), ("sft_lora-native", "fsdp2"), ("sft-trl", "fsdp2")],
)
def test_one_process_continues_what_two_began(
    finished: Finished, sft_config: Callable[..., dict[str, Any]], name: str, began: str
) -> None:
    runs = finished[0]
    again = create_trainer(
        sft_config(
            runs / f"{name}-{began}_then_one",
            backend=name.partition("-")[2],
            model=MODELS[name.split("-")[0]],
        )
    )
    again.train(resume=str(runs / f"{name}-{began}/checkpoints/checkpoint-2"))
    check_continued(runs, name, f"{began}_then_one", "one")
    torch.testing.assert_close(
        weights(runs / f"{name}-{began}_then_one"), weights(runs / f"{name}-one"), rtol=0, atol=1e-4
    )


def test_ranks_that_measure_otherwise_keep_and_stop_as_the_first_does(finished: Finished) -> None:
    """By the other rank's numbers the run would have ended at its second evaluation, and kept the first weights."""
    losses = metrics(finished[0] / "sft-native-disagreeing")
    assert (4, "train") in losses
    checkpoints = (finished[0] / "sft-native-disagreeing/checkpoints").glob("checkpoint-*")
    assert "checkpoint-4" in {path.name for path in checkpoints}


def test_one_rank_writes(finished: Finished) -> None:
    """Beside its random state in checkpoints, the second rank opens no file of a run for writing."""
    _, outputs = finished
    assert outputs[1].count("done") > 15
    assert [line for output in outputs for line in output.splitlines() if " wrote " in line] == []


@pytest.mark.parametrize("layout", ["one", "ddp", "fsdp2"])
def test_models_load_in_transformers(finished: Finished, tmp_path: Path, layout: str) -> None:
    """Whole weights by transformers alone; an adapter by PEFT, and merged by our own export."""
    runs = finished[0]
    ids = AutoTokenizer.from_pretrained(runs / f"sft-native-{layout}" / "model")(
        "say red", return_tensors="pt"
    ).input_ids
    expected = AutoModelForCausalLM.from_pretrained(runs / "sft-native-one" / "model")(ids).logits
    found = AutoModelForCausalLM.from_pretrained(runs / f"sft-native-{layout}" / "model")(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    adapted = AutoPeftModelForCausalLM.from_pretrained(runs / f"sft_lora-native-{layout}" / "model")
    with torch.no_grad():
        logits = adapted(ids).logits
        with adapted.disable_adapter():
            assert (adapted(ids).logits - logits).abs().max() > 1e-2
    export(runs / f"sft_lora-native-{layout}" / "model", tmp_path / "merged", dtype="fp32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids)
    torch.testing.assert_close(merged.logits, logits, rtol=0, atol=1e-4)
