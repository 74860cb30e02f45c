"""What will the compiled decoder layers of a run keep on a GPU? As `trainers.compiling` decides it."""

from __future__ import annotations

from typing import get_args

from aligntune.config.compiling import compiling
from aligntune.config.run import RLRunConfig, SFTRunConfig
from aligntune.planning.memory import Keep
from aligntune.planning.shapes import FAMILIES, Shape


def what_compiled_layers_keep(run: SFTRunConfig | RLRunConfig, shape: Shape, steps: int | None) -> Keep | None:
    """For a run of the native backend's language-model trainers; None: layers are not compiled.

    Raises ConfigError when compiling was asked for and the run will refuse it.
    """
    found, wanted = compiling(run, steps), run.model.selective_checkpointing
    if found is None:
        return None
    if shape.family is FAMILIES["gpt2"]:
        found = found.unless("this architecture keeps its layers elsewhere")
    if wanted != "off" and run.model.lora is not None and run.model.lora.dropout:
        found = found.unless(
            "selective_checkpointing would draw other dropout in its second pass: set the dropout of LoRA (lora_dropout) to 0"
        )
    return None if found.problem is not None else next((keep for keep in get_args(Keep) if keep == wanted), "all")
