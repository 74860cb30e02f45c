"""What can TRL not express? Asked without importing TRL."""

from __future__ import annotations

from aligntune.config.enums import AlgorithmType
from aligntune.config.launch import SHARDED
from aligntune.config.run import RLRunConfig


def grpo(run: RLRunConfig) -> str | None:
    """What TRL's trainer cannot express of this run, or None."""
    train, model = run.train, run.model
    algorithm = run.algorithm
    if run.launch.strategy in SHARDED and train.kl_coef > 0 and not model.use_peft:
        return f"shards its reference before ours can take its place (kl_coef > 0 without LoRA under {run.launch.strategy})"
    if algorithm is AlgorithmType.DAPO and getattr(train, "dynamic_sampling", False):
        return "has no dynamic sampling (dynamic_sampling: false runs there)"
    if getattr(train, "overlong_buffer", 0):
        return "has no soft overlong punishment inside the group comparison"
    if train.kl_coef > 0 and train.kl_estimator != "k3":
        return f"knows kl_estimator k3 only, not {train.kl_estimator}"
    named = {
        "grpo_alpha": train.is_set("grpo_alpha"), "stop_token": train.stop_token != "eos", "padding_free": train.padding_free,
        "sync_ref_model with LoRA": train.sync_ref_model and model.use_peft, "fast_inference": train.fast_inference,
        "use_liger_loss": bool(train.use_liger_loss),
    }  # fmt: skip
    adapters = ("force_use_ref_model", "ref_model_init_kwargs", "model_adapter_name", "ref_adapter_name")
    named |= {name: bool(getattr(model, name)) for name in adapters}
    refused = [name for name, given in named.items() if given]
    return f"does not act on {', '.join(refused)}" if refused else None


def dpo(run: RLRunConfig) -> str | None:
    """What TRL's trainer cannot express of this run, or None. Most of these it would accept and ignore."""
    from aligntune.config.algorithms import DPOConfig

    train, model = run.train, run.model
    assert isinstance(train, DPOConfig)
    losses = train.losses
    if "kto" in losses:
        return "has no pairwise kto loss any more"
    smoothed = {"robust", "exo_pair", "aot", "aot_unpaired"}
    if train.label_smoothing and not set(losses) <= smoothed:
        return f"ignores label_smoothing with {', '.join(sorted(set(losses) - smoothed))}"
    if train.reference_free:
        return "has no reference_free"
    if train.gradient_accumulation_steps > 1 and ({"sft", "aot", "aot_unpaired"} & set(losses) or train.rpo_alpha):
        return "computes sft and aot losses on micro-batches, not on the optimiser batch"
    if train.use_weighting and (train.rpo_alpha or "sft" in losses):
        return "weighs the sft term by use_weighting too"
    if train.sync_ref_model and run.launch.strategy == "zero3" and run.launch.is_active:
        return "cannot keep a reference that moves in checkpoints under zero3 (sync_ref_model)"
    named = {
        "padding_free": train.padding_free, "use_liger_kernel": train.use_liger_kernel,
        "ref_model_init_kwargs": bool(model.ref_model_init_kwargs), "model_adapter_name": model.model_adapter_name is not None,
        "ref_adapter_name": model.ref_adapter_name is not None, "sync_ref_model with LoRA": train.sync_ref_model and model.use_peft,
    }  # fmt: skip
    refused = [name for name, given in named.items() if given]
    return f"does not act on {', '.join(refused)}" if refused else None
