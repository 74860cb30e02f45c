"""Which optimisers and learning-rate schedules are there? transformers' names, known without importing it.

A test compares the lists with the installed transformers. Some names of transformers are left out because they need arguments
that no setting gives: the modules that GaLore and APOLLO project, the floor or the phases of some schedules.
"""

from __future__ import annotations

SPLIT_OPTIMIZERS = ("adamw_split", "adamw_split_bf16")
"""Optimisers of our own (`aligntune.optim.split_adamw`)."""

OPTIMIZERS = (
    "adamw_torch", "adamw_torch_fused", *SPLIT_OPTIMIZERS, "adamw_8bit", "adamw_bnb_8bit", "adamw_torch_8bit", "adamw_torch_4bit",
    "adamw_anyprecision", "adamw_torch_xla", "adamw_torch_npu_fused", "stable_adamw", "grokadamw", "adafactor", "sgd", "adagrad",
    "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "lion_8bit", "lion_32bit", "ademamix", "ademamix_8bit",
    "paged_adamw_8bit", "paged_adamw_32bit", "paged_lion_8bit", "paged_lion_32bit", "paged_ademamix_8bit", "paged_ademamix_32bit",
    "lomo", "adalomo", "schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd",
)  # fmt: skip

MEASURED_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
"""Those that go by the metric of the evaluations (`metric_for_best_model`)."""

SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    *MEASURED_SCHEDULES,
)  # fmt: skip
