"""Which algorithm uses which setting? A setting given to an algorithm that does not use it is refused."""

from __future__ import annotations

from aligntune.config.enums import AlgorithmType as A

GROUP_RELATIVE = frozenset({A.GRPO, A.DAPO, A.DR_GRPO, A.GSPO, A.NEURAL_MIRROR_GRPO, A.META_ES})
ONLINE = GROUP_RELATIVE | {A.PPO}
DPO = frozenset({A.DPO})
PPO = frozenset({A.PPO})
ALL = ONLINE | DPO

_TRAIN: dict[frozenset[A], str] = {
    ONLINE: "rollout_batch_size kl_coef cliprange cliprange_high num_ppo_epochs temperature kl_estimator response_length "
            "stop_token ds3_gather_for_generation generation_kwargs max_completion_length top_p mask_truncated_completions "
            "enable_thinking fast_inference vllm_gpu_memory_utilization reward_weights",
    PPO: "cliprange_value whiten_rewards vf_coef gamma lam missing_eos_penalty",
    DPO: "max_length max_target_length loss_weights f_divergence_type f_alpha_divergence_coef reference_free "
         "label_smoothing use_weighting rpo_alpha ld_alpha discopop_tau",
    GROUP_RELATIVE | DPO: "beta loss_type",
    GROUP_RELATIVE: "grpo_alpha grpo_beta num_generations scale_rewards",
    ALL - {A.META_ES}: "loss_function",
    ONLINE - {A.META_ES}: "advantage_function",
    frozenset({A.GSPO}): "gspo_gamma gspo_delta",
}  # fmt: skip

_MODEL: dict[frozenset[A], str] = {
    PPO: "reward_value_model value_model_quantization",
    ONLINE: "reward_path reward_model_name reward_model_source reward_value_loading_type reward_model_quantization "
            "reward_device",
}  # fmt: skip

_DATASET: dict[frozenset[A], str] = {DPO: "precompute_ref_log_probs precompute_ref_batch_size"}

APPLIES: dict[tuple[str, str], frozenset[A]] = {
    (section, name): algorithms
    for section, table in (("train", _TRAIN), ("model", _MODEL), ("dataset", _DATASET))
    for algorithms, names in table.items()
    for name in names.split()
}

INSTEAD: dict[tuple[A, str], str] = {
    (A.DPO, "kl_coef"): "DPO's strength is beta",
    (A.DPO, "grpo_beta"): "DPO's strength is beta",
    (A.PPO, "beta"): "PPO's KL weight is kl_coef",
    (A.PPO, "grpo_beta"): "PPO's KL weight is kl_coef",
    (A.DPO, "max_completion_length"): "DPO cuts completions by max_target_length",
    (A.DPO, "response_length"): "DPO cuts completions by max_target_length",
}


def refusal(algorithm: A, section: str, name: str) -> str | None:
    """Why `section.name` cannot act in a run of `algorithm`, or None when it can."""
    algorithms = APPLIES.get((section, name), ALL)
    if algorithm is A.SFT or algorithm in algorithms:
        return None
    users = ", ".join(sorted(member.value for member in algorithms))
    instead = INSTEAD.get((algorithm, name))
    return f"has no effect with {algorithm.value} (used by {users})" + (f"; {instead}" if instead else "")
