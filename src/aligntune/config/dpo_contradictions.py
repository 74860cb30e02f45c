"""Which settings of DPO exclude each other, or have no effect beside others?"""

from __future__ import annotations

from collections.abc import Iterator

from aligntune.config.algorithms import DPO_LOSSES, MARGIN_LOSSES, SMOOTHED_LOSSES, DPOConfig
from aligntune.config.run import RLRunConfig
from aligntune.config.synonyms import Path

EVALUATION = (
    "dpo_eval_max_samples",
    "dpo_zero_shot_max_samples",
    "dpo_few_shot_max_samples",
    "dpo_few_shot_examples_text",
)


def dpo_contradictions(config: RLRunConfig, train: DPOConfig) -> Iterator[tuple[Path, str]]:
    """(path, message) of what a run of DPO says that cannot act."""
    unknown = [name for name in train.losses if name not in DPO_LOSSES]
    if unknown:
        yield ("train", "loss_weights"), f"there is no DPO loss '{unknown[0]}'; there are {', '.join(DPO_LOSSES)}"
        return
    for name, message in [*_losses(train), *_of_losses(train)]:
        yield ("train", name), message
    precomputes = config.sources[0].precompute_ref_log_probs
    if precomputes and train.sync_ref_model:
        yield (
            ("dataset", "precompute_ref_log_probs"),
            "needs a reference that stays, and sync_ref_model moves it: turn one off",
        )
    if config.sources[0].is_set("precompute_ref_batch_size") and not precomputes:
        yield ("dataset", "precompute_ref_batch_size"), "needs precompute_ref_log_probs: true"
    for name in EVALUATION:
        if not train.dpo_eval_enabled and train.is_set(name) and getattr(train, name) != 0:
            yield ("train", name), "needs dpo_eval_enabled: true"
    if train.dpo_eval_enabled and not config.has_eval:
        yield ("train", "dpo_eval_enabled"), "needs held-out pairs: give eval_dataset or eval_split"


def _losses(train: DPOConfig) -> Iterator[tuple[str, str]]:
    """Which losses there are, and whether anything is learnt."""
    if train.loss_weights and train.is_set("loss_type") and train.loss_type not in (None, *train.losses):
        yield "loss_type", f"is {train.loss_type}, which is not among loss_weights: keep one of the two"
    if not any(train.losses.values()):
        yield "loss_weights", "are all 0: nothing would be learnt"
    if train.beta == 0 and set(train.losses) != {"sft"}:
        yield "beta", "is 0: the policy would not learn from the pairs; 0.1 is usual"


def _of_losses(train: DPOConfig) -> Iterator[tuple[str, str]]:
    """Settings that some losses have and others have not."""
    names = [name for name in train.losses if name != "sft"]
    one_sided = [name for name in names if name not in MARGIN_LOSSES]
    transports = [name for name in names if name.startswith("aot")]
    if "exo_pair" in names and train.label_smoothing == 0:
        yield "label_smoothing", "is 0, and exo_pair needs it above 0; the paper uses 1e-3"
    if train.label_smoothing > 0 and not set(names) & set(SMOOTHED_LOSSES):
        yield (
            "label_smoothing",
            f"has no effect on {', '.join(names) or 'sft'}; it is for {', '.join(sorted(SMOOTHED_LOSSES))}",
        )
    if train.f_divergence_type != "reverse_kl" and one_sided:
        yield (
            "f_divergence_type",
            f"{train.f_divergence_type} is for losses of the margin; {', '.join(one_sided)} look at one answer at a time",
        )
    if train.f_divergence_type != "reverse_kl" and not names:
        yield "f_divergence_type", "has no effect on the sft loss"
    if train.is_set("f_alpha_divergence_coef") and train.f_divergence_type != "alpha_divergence":
        yield "f_alpha_divergence_coef", "needs f_divergence_type: alpha_divergence"
    if train.is_set("discopop_tau") and "discopop" not in names:
        yield "discopop_tau", "needs loss_type: discopop"
    if train.use_weighting and transports:
        yield (
            "use_weighting",
            f"is for losses of single pairs; {', '.join(transports)} match answers of different pairs",
        )
    if train.use_weighting and not names:
        yield "use_weighting", "has no effect on the sft loss"
