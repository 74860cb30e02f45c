"""What does each RL algorithm add to the common training settings?"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from aligntune.config.base import Count, Function, Number, OneOf, Rate, Seed, Size, Text, Weight
from aligntune.config.enums import AlgorithmType
from aligntune.config.rl import TrainingConfig

DPO_LOSSES = (
    "sigmoid", "hinge", "ipo", "kto", "robust", "exo_pair", "nca_pair", "bco_pair", "apo_zero", "apo_down", "sppo_hard",
    "aot", "aot_unpaired", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
SMOOTHED_LOSSES = ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired", "sigmoid_norm")
"""Those that take `label_smoothing`."""
MARGIN_LOSSES = ("sigmoid", "hinge", "ipo", "robust", "exo_pair", "discopop", "sigmoid_norm")
"""Those of the difference of scores alone, where the partition function of an f-divergence cancels."""
GRPO_LOSSES = ("grpo", "dapo", "dr_grpo")
"""How token losses are summed: mean of sequence means, mean over all tokens, or sum over a constant."""


class PPOConfig(TrainingConfig):
    """Proximal policy optimisation (arXiv 1707.06347) with a value head; details as in arXiv 2403.17031."""

    own_defaults = {
        "mask_truncated_completions": (False, "without a loss it could not learn from missing_eos_penalty"),
    }
    num_ppo_epochs: Count | None = 4


class DPOConfig(TrainingConfig):
    """Direct preference optimisation (arXiv 2305.18290) and its relatives."""

    loss_type: Annotated[str, OneOf(*DPO_LOSSES)] | None = "sigmoid"
    """Name of the loss; see the page on DPO for each formula and source."""
    precompute_ref_log_probs: bool = False
    """Synonym of the dataset section's `precompute_ref_log_probs`."""
    dpo_eval_enabled: bool = False
    """Evaluate on held-out pairs: reward accuracy, margin, log-probabilities; greedy answers zero-shot and few-shot."""
    dpo_eval_max_samples: Count | None = None
    """At most this many held-out pairs."""
    dpo_zero_shot_max_samples: Size = 50
    """Prompts answered zero-shot and scored against the chosen answer (ROUGE-L, BLEU, length ratio)."""
    dpo_few_shot_max_samples: Size = 30
    """Prompts answered with `dpo_few_shot_examples_text` in front."""
    dpo_few_shot_examples_text: str | None = None
    """The examples put in front; without it the few-shot part is an error unless its sample count is 0."""

    @property
    def losses(self) -> dict[str, float]:
        """Name -> weight of the losses in use: `loss_weights`, or `loss_type` alone."""
        return dict(self.loss_weights or {str(self.loss_type): 1.0})

    @model_validator(mode="after")
    def _few_shot_has_text(self) -> Self:
        asked = self.dpo_eval_enabled or self.is_set("dpo_few_shot_max_samples")
        if asked and self.dpo_few_shot_max_samples and not self.dpo_few_shot_examples_text:
            raise ValueError("few-shot answers need dpo_few_shot_examples_text (or set dpo_few_shot_max_samples to 0)")
        return self


class GRPOConfig(TrainingConfig):
    """Group relative policy optimisation (arXiv 2402.03300)."""

    own_defaults = {
        "kl_estimator": ("k3", "k1 has zero expected gradient in a loss"),
        "num_ppo_epochs": (1, "one update per rollout in the GRPO family"),
    }
    loss_type: Annotated[str, OneOf(*GRPO_LOSSES)] | None = None
    """How token losses are summed; unset: the algorithm's own."""


class DAPOConfig(GRPOConfig):
    """Decoupled clip and dynamic sampling policy optimisation (arXiv 2503.14476)."""

    own_defaults = {**GRPOConfig.own_defaults, "cliprange_high": (0.28, "DAPO's upper clip")}
    dynamic_sampling: bool = True
    """Draw prompts again whose completions all score the same (they have no gradient). (Addition.)"""
    max_resample_batches: Count = 10
    """Rollout rounds after which dynamic sampling stops and trains on what it has. (Addition.)"""
    overlong_buffer: Size = 0
    """Soft punishment: completions in the last this many tokens before the limit lose up to `overlong_penalty`. (Addition.)"""
    overlong_penalty: Weight = 1.0
    """Most that the soft punishment takes away. (Addition.)"""


class DrGRPOConfig(GRPOConfig):
    """GRPO done right (arXiv 2503.20783): no division by the standard deviation, a constant normaliser."""

    own_defaults = {
        **GRPOConfig.own_defaults,
        "scale_rewards": ("none", "Dr. GRPO does not divide by the standard deviation"),
    }


class GSPOConfig(GRPOConfig):
    """Group sequence policy optimisation (arXiv 2507.18071): the ratio and the clip act on whole sequences."""


class NeuralMirrorConfig(GRPOConfig):
    """GRPO with a learned Bregman divergence in place of KL (arXiv 2602.04380)."""

    own_defaults = {**GRPOConfig.own_defaults, "kl_coef": (0.0, "the mirror divergence takes the place of KL")}
    mirror_map: Annotated[str, OneOf("neural", "kl", "prob_l2", "log_l2")] = "neural"
    """The divergence: the 126-unit neural map, generalised KL, squared distance of probabilities or of
    log-probabilities. (Addition.)"""
    mirror_coefficient: Weight = 1e-4
    """Weight of the divergence in the loss. (Addition to this table; Meta-ES has it in the reference.)"""
    mirror_path: Text | None = None
    """File with the parameters of the neural map. Unset: drawn at random under `mirror_seed`. (Addition.)"""
    mirror_seed: Seed = 0
    """Seed of a random map. (Addition.)"""


class MetaESConfig(NeuralMirrorConfig):
    """Evolution of the reward function, the mirror map, or both (arXiv 1703.03864; 2602.04380)."""

    meta_iterations: Count = 15
    """Generations; the centre is measured before the first and after each."""
    patience: Count = 5
    """Stop after this many measured centres in a row without an improvement of `min_delta`."""
    min_delta: Weight = 0.001
    """Least improvement of the centre's fitness that counts."""
    init_scale: Weight = 0.01
    """Standard deviation of the first centre around its start (the rewards as given, the map as drawn or loaded). Unset:
    0 when rewards evolve, so that the first centre is the reward as given."""
    N: Annotated[int, Field(ge=2)] = 10
    """Candidates per generation, in antithetic pairs: even."""
    T: Count = 100
    """Optimiser steps of each candidate."""
    sigma: Rate = 0.01
    """Standard deviation of the perturbations. 0.01 is a factor e of a weight, and the size of a random map's parameters."""
    sigma_decay: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Factor of `sigma` after each generation."""
    alpha: Rate = 0.01
    """Step size of the evolution."""
    debug_mode: bool = False
    """Write every candidate's parameters, fitness and log to `candidates.jsonl` in the run's folder."""
    eval_timeout: Count = 5
    """Seconds for the check of one answer, for verifiers that take `timeout_s`."""
    eval_max_tokens: Count = 512
    """Longest answer in the fitness evaluation, in tokens."""
    eval_k: Count = 1
    """Top-k sampling of the fitness evaluation; 1 is greedy."""
    eval_temperature: Rate = 0.8
    """Temperature of the fitness evaluation, where `eval_k` is above 1."""
    num_workers: Count = 1
    """Processes that train candidates, on one machine and device; 1 is the run's own."""
    no_wandb: bool = False
    """Leave Weights & Biases out even when it is among the loggers."""
    wandb_project: str = "neural-mirror-es"
    """Project of the run at Weights & Biases, Trackio or MLflow."""
    resume: Text | None = None
    """Folder of a former run, or its `evolution.json`, whose evolution is continued bit for bit. (A run that was killed
    is continued in its own folder by `--resume auto`.)"""
    target: Annotated[str, OneOf("rewards", "mirror", "both")] = "rewards"
    """What evolves: the weights and `evolved_params` of the rewards, the neural mirror map, or both. (Addition.)"""
    evolved_params: dict[str, Annotated[list[Number], Field(min_length=2, max_length=2)]] = {}
    """Parameters of rewards that evolve beside the weights: `REWARD.PARAM: [low, high]`; they start as given in the
    reward's `params`, else at its default. (Addition.)"""
    shaping: Annotated[str, OneOf("rank", "zscore", "none")] = "rank"
    """How fitness becomes utility: centred ranks, z-scores, or as it is. (Addition.)"""
    verifier: Function | str | None = None
    """Reward whose raw score of the held-out answers is the fitness; it does not evolve. Also one of `rewards`, which then
    gives its params; as another it is measured only. Unset with `target: mirror`: the only reward. (Addition.)"""
    fitness_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the training prompts held out for the fitness. Evaluation data stays untouched. (Addition.)"""

    @property
    def trainings(self) -> int:
        """Those of the whole evolution: a generation's centre and its N candidates, and the last centre. `patience` may end it earlier."""
        return self.meta_iterations * (self.N + 1) + 1

    @model_validator(mode="after")
    def _even(self) -> Self:
        if self.N % 2:
            raise ValueError(f"N is {self.N}; candidates come in antithetic pairs, so it must be even")
        return self


TRAINING_CLASSES: dict[AlgorithmType, type[TrainingConfig]] = {
    AlgorithmType.PPO: PPOConfig,
    AlgorithmType.DPO: DPOConfig,
    AlgorithmType.GRPO: GRPOConfig,
    AlgorithmType.DAPO: DAPOConfig,
    AlgorithmType.DR_GRPO: DrGRPOConfig,
    AlgorithmType.GSPO: GSPOConfig,
    AlgorithmType.NEURAL_MIRROR_GRPO: NeuralMirrorConfig,
    AlgorithmType.META_ES: MetaESConfig,
}
